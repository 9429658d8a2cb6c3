//! The drivers of Rust on the course, in this process.
//!
//! Invariant: the course is one function for both; a driver only says how it does a part of it.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgSslMode};
use sqlx::{Acquire, ConnectOptions, Row};
use tokio::sync::mpsc;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Config, NoTls, Statement};
use tokio_util::sync::CancellationToken;

use crate::drivers::course::{Engagement, InTransaction, Order, Pooling, ROUNDS_MAX, Types, check};
use crate::drivers::moods::{Mood, Spot};
use crate::drivers::{Notebook, note};

/// Longer than any hold budget: an answer that has not come by then never will.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

const LEDGER: &str = "INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4)";
const ACCOUNT: &str = "UPDATE accounts SET abalance = abalance + $1 WHERE aid = $2";
const PARCEL: &str = "INSERT INTO parcel (client, n, body, sent) VALUES ($1, $2, $3, $4)";
const LOOK: &str = "SELECT body, sent FROM parcel WHERE client = $1 AND n = $2";
const NOTIFY: &str = "SELECT pg_notify($1, $2)";
const FEEL: &str = "INSERT INTO feeling (client, n, mood, moods, spot) VALUES ($1, $2, $3, $4, $5)";
const FELT: &str = "SELECT mood, moods, spot FROM feeling WHERE client = $1 AND n = $2";

/// What goes into `feeling` and comes back.
type Feeling = (Mood, Vec<Mood>, Spot);

fn feeling(order: Order) -> Feeling {
    let mood = Mood(order.mood().to_owned());
    (mood.clone(), vec![mood.clone(), Mood("ok".to_owned())], Spot { street: "street".to_owned(), mood })
}

/// How a driver does the parts of the course.
trait Driver {
    async fn transfer(&mut self, order: Order) -> Result<()>;
    async fn parcel(&mut self, order: Order) -> Result<(Vec<u8>, SystemTime)>;
    /// The SQLSTATE that came.
    async fn collide(&mut self, order: Order, inside: InTransaction) -> Result<String>;
    async fn begin_session(&mut self) -> Result<()>;
    async fn setting(&mut self) -> Result<String>;
    /// What was heard of the notification to itself.
    async fn echo(&mut self, order: Order) -> Result<String>;
    async fn feel(&mut self, order: Order) -> Result<Feeling>;
}

async fn run(
    driver: &mut impl Driver,
    engagement: &Engagement,
    notebook: &Notebook,
    stop: CancellationToken,
) -> Result<()> {
    if engagement.pooling == Pooling::Session {
        driver.begin_session().await.context("connecting")?;
    }
    for n in 1..=ROUNDS_MAX {
        let order = Order { client: engagement.client, n };
        let transfer = tokio::time::timeout(ANSWER_LIMIT, driver.transfer(order)).await;
        let outcome = transfer.context("no answer").and_then(|outcome| outcome);
        note(notebook, |told| match &outcome {
            Ok(()) => told.acknowledged.push((order.client, n)),
            Err(_) => told.unknown.push((order.client, n)),
        });
        outcome.context("transfer")?;
        let rest = afterwards(driver, engagement, order, notebook);
        tokio::time::timeout(ANSWER_LIMIT, rest).await.context("no answer")?.with_context(|| format!("round {n}"))?;
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(engagement.pace) => {}
        }
    }
    Ok(())
}

async fn afterwards(
    driver: &mut impl Driver,
    engagement: &Engagement,
    order: Order,
    notebook: &Notebook,
) -> Result<()> {
    check("parcel", driver.parcel(order).await?, (order.body(), order.sent()))?;
    if let Some(inside) = order.collision() {
        check("collision", driver.collide(order, inside).await?.as_str(), "23505")?;
        note(notebook, |told| told.refused += 1);
    }
    if engagement.pooling == Pooling::Session {
        check("work_mem", driver.setting().await?.as_str(), "7MB")?;
        check("notification", driver.echo(order).await?, order.n.to_string())?;
    }
    if engagement.types == Types::OtherOids {
        check("feeling", driver.feel(order).await?, feeling(order))?;
    }
    Ok(())
}

/// The version that this program was built with.
fn locked(package: &str) -> Option<String> {
    let lock = include_str!("../../../Cargo.lock");
    let after = lock.split_once(&format!("name = \"{package}\"\nversion = \""))?.1;
    Some(after.split('"').next()?.to_owned())
}

struct TokioPostgres {
    client: tokio_postgres::Client,
    heard: mpsc::UnboundedReceiver<String>,
    /// None: each statement goes out unnamed, in one trip.
    kept: Option<Kept>,
    /// For types of one's own; made at the first use, also where only the types are taken from them.
    own: Option<(Statement, Statement)>,
    channel: String,
}

/// Prepared once, by name.
struct Kept {
    ledger: Statement,
    account: Statement,
    parcel: Statement,
    look: Statement,
}

pub(crate) async fn tokio_postgres(
    mode: &str,
    engagement: &Engagement,
    notebook: &Notebook,
    stop: CancellationToken,
) -> Result<()> {
    note(notebook, |told| told.version = locked("tokio-postgres"));
    let mut config = Config::new();
    config.host("127.0.0.1").port(engagement.port).user(&engagement.user).password(&engagement.password);
    config.dbname(&engagement.database).application_name(engagement.name).connect_timeout(ANSWER_LIMIT);
    let (client, mut connection) = config.connect(NoTls).await.context("connecting")?;
    let (tell, heard) = mpsc::unbounded_channel();
    // Ends with the client or its connection; the next query then says so.
    tokio::spawn(async move {
        let mut messages = futures_util::stream::poll_fn(move |context| connection.poll_message(context));
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(heard) = message {
                // Nobody listens any more when the course is over.
                let _ = tell.send(heard.payload().to_owned());
            }
        }
    });
    let kept = if mode == "prepared" { Some(Kept::prepare(&client).await.context("preparing")?) } else { None };
    let channel = format!("echo_{}", engagement.client);
    run(&mut TokioPostgres { client, heard, kept, own: None, channel }, engagement, notebook, stop).await
}

impl Kept {
    async fn prepare(client: &tokio_postgres::Client) -> Result<Kept, tokio_postgres::Error> {
        Ok(Kept {
            ledger: client.prepare(LEDGER).await?,
            account: client.prepare(ACCOUNT).await?,
            parcel: client.prepare(PARCEL).await?,
            look: client.prepare(LOOK).await?,
        })
    }
}

const ENTRY: [Type; 4] = [Type::INT4, Type::INT8, Type::INT8, Type::INT8];

fn typed<'a>(values: &[&'a (dyn ToSql + Sync)], types: &[Type]) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    values.iter().copied().zip(types.iter().cloned()).collect()
}

impl TokioPostgres {
    async fn send(&self, order: Order) -> Result<(), tokio_postgres::Error> {
        let (body, sent) = (order.body(), order.sent());
        let values: [&(dyn ToSql + Sync); 4] = [&order.client, &order.n, &body, &sent];
        match &self.kept {
            Some(kept) => self.client.execute(&kept.parcel, &values).await.map(drop),
            None => {
                let types = [Type::INT4, Type::INT8, Type::BYTEA, Type::TIMESTAMPTZ];
                self.client.query_typed(PARCEL, &typed(&values, &types)).await.map(drop)
            }
        }
    }
}

impl Driver for TokioPostgres {
    async fn transfer(&mut self, order: Order) -> Result<()> {
        let (aid, delta) = (order.aid(), order.delta());
        let entry: [&(dyn ToSql + Sync); 4] = [&order.client, &order.n, &aid, &delta];
        let change: [&(dyn ToSql + Sync); 2] = [&delta, &aid];
        self.client.batch_execute("BEGIN").await?;
        match &self.kept {
            Some(kept) => {
                self.client.execute(&kept.ledger, &entry).await?;
                self.client.execute(&kept.account, &change).await?;
            }
            None => {
                self.client.query_typed(LEDGER, &typed(&entry, &ENTRY)).await?;
                self.client.query_typed(ACCOUNT, &typed(&change, &[Type::INT8, Type::INT8])).await?;
            }
        }
        self.send(order).await?;
        Ok(self.client.batch_execute("COMMIT").await?)
    }

    async fn parcel(&mut self, order: Order) -> Result<(Vec<u8>, SystemTime)> {
        let values: [&(dyn ToSql + Sync); 2] = [&order.client, &order.n];
        let rows = match &self.kept {
            Some(kept) => self.client.query(&kept.look, &values).await?,
            None => self.client.query_typed(LOOK, &typed(&values, &[Type::INT4, Type::INT8])).await?,
        };
        let row = rows.first().context("no row")?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    }

    async fn collide(&mut self, order: Order, inside: InTransaction) -> Result<String> {
        if inside == InTransaction::Yes {
            self.client.batch_execute("BEGIN").await?;
        }
        let refused = self.send(order).await;
        if inside == InTransaction::Yes {
            self.client.batch_execute("ROLLBACK").await?;
        }
        let error = refused.err().context("nothing was refused")?;
        Ok(error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()))
    }

    async fn begin_session(&mut self) -> Result<()> {
        let sql = format!("SET work_mem = '7MB'; LISTEN {}", self.channel);
        Ok(self.client.batch_execute(&sql).await?)
    }

    async fn setting(&mut self) -> Result<String> {
        Ok(self.client.query_typed("SHOW work_mem", &[]).await?.first().context("no row")?.try_get(0)?)
    }

    async fn echo(&mut self, order: Order) -> Result<String> {
        let payload = order.n.to_string();
        let values: [&(dyn ToSql + Sync); 2] = [&self.channel, &payload];
        self.client.query_typed(NOTIFY, &typed(&values, &[Type::TEXT, Type::TEXT])).await?;
        self.heard.recv().await.context("the connection is gone")
    }

    async fn feel(&mut self, order: Order) -> Result<Feeling> {
        if self.own.is_none() {
            self.own = Some((self.client.prepare(FEEL).await?, self.client.prepare(FELT).await?));
        }
        let (feel, felt) = self.own.as_ref().context("prepared above")?;
        let (mood, moods, spot) = feeling(order);
        let values: [&(dyn ToSql + Sync); 5] = [&order.client, &order.n, &mood, &moods, &spot];
        let rows = if self.kept.is_some() {
            self.client.execute(feel, &values).await?;
            self.client.query(felt, &values[..2]).await?
        } else {
            self.client.query_typed(FEEL, &typed(&values, feel.params())).await?;
            self.client.query_typed(FELT, &typed(&values[..2], felt.params())).await?
        };
        let row = rows.first().context("no row")?;
        Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
    }
}

struct Sqlx {
    connection: PgConnection,
    options: PgConnectOptions,
    /// Listens on a connection of its own.
    listener: Option<PgListener>,
    persistent: bool,
    channel: String,
}

pub(crate) async fn sqlx(
    mode: &str,
    engagement: &Engagement,
    notebook: &Notebook,
    stop: CancellationToken,
) -> Result<()> {
    note(notebook, |told| told.version = locked("sqlx"));
    let options = PgConnectOptions::new_without_pgpass().host("127.0.0.1").port(engagement.port);
    let options = options.username(&engagement.user).password(&engagement.password).database(&engagement.database);
    let options = options.ssl_mode(PgSslMode::Disable).application_name(engagement.name);
    let connection = options.connect().await.context("connecting")?;
    let (persistent, channel) = (mode == "persistent", format!("echo_{}", engagement.client));
    run(&mut Sqlx { connection, options, listener: None, persistent, channel }, engagement, notebook, stop).await
}

async fn send_parcel(connection: &mut PgConnection, persistent: bool, order: Order) -> Result<(), sqlx::Error> {
    let query = sqlx::query(PARCEL).bind(order.client).bind(order.n).bind(order.body());
    let sent = time::OffsetDateTime::from(order.sent());
    query.bind(sent).persistent(persistent).execute(connection).await.map(drop)
}

impl Driver for Sqlx {
    async fn transfer(&mut self, order: Order) -> Result<()> {
        let (aid, delta) = (order.aid(), order.delta());
        let mut transaction = self.connection.begin().await?;
        let ledger = sqlx::query(LEDGER).bind(order.client).bind(order.n).bind(aid).bind(delta);
        ledger.persistent(self.persistent).execute(&mut *transaction).await?;
        let account = sqlx::query(ACCOUNT).bind(delta).bind(aid);
        account.persistent(self.persistent).execute(&mut *transaction).await?;
        send_parcel(&mut transaction, self.persistent, order).await?;
        Ok(transaction.commit().await?)
    }

    async fn parcel(&mut self, order: Order) -> Result<(Vec<u8>, SystemTime)> {
        let look = sqlx::query(LOOK).bind(order.client).bind(order.n).persistent(self.persistent);
        let row = look.fetch_one(&mut self.connection).await?;
        Ok((row.try_get(0)?, row.try_get::<time::OffsetDateTime, _>(1)?.into()))
    }

    async fn collide(&mut self, order: Order, inside: InTransaction) -> Result<String> {
        let refused = match inside {
            InTransaction::No => send_parcel(&mut self.connection, self.persistent, order).await,
            InTransaction::Yes => {
                let mut transaction = self.connection.begin().await?;
                let refused = send_parcel(&mut transaction, self.persistent, order).await;
                transaction.rollback().await?;
                refused
            }
        };
        let error = refused.err().context("nothing was refused")?;
        let code = error.as_database_error().and_then(|error| error.code()).map(|code| code.into_owned());
        Ok(code.unwrap_or_else(|| error.to_string()))
    }

    async fn begin_session(&mut self) -> Result<()> {
        sqlx::query("SET work_mem = '7MB'").execute(&mut self.connection).await?;
        let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1).connect_with(self.options.clone()).await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.listen(&self.channel).await?;
        self.listener = Some(listener);
        Ok(())
    }

    async fn setting(&mut self) -> Result<String> {
        let show = sqlx::query("SHOW work_mem").persistent(self.persistent);
        Ok(show.fetch_one(&mut self.connection).await?.try_get(0)?)
    }

    async fn echo(&mut self, order: Order) -> Result<String> {
        let notify = sqlx::query(NOTIFY).bind(&self.channel).bind(order.n.to_string()).persistent(self.persistent);
        notify.execute(&mut self.connection).await?;
        let listener = self.listener.as_mut().context("no listener")?;
        // `recv` would connect again and hide that its connection was lost.
        let heard = listener.try_recv().await?.context("the listener has lost its connection")?;
        ensure!(heard.channel() == self.channel, "heard on {}", heard.channel());
        Ok(heard.payload().to_owned())
    }

    async fn feel(&mut self, order: Order) -> Result<Feeling> {
        let (mood, moods, spot) = feeling(order);
        let feel = sqlx::query(FEEL).bind(order.client).bind(order.n).bind(mood).bind(moods).bind(spot);
        feel.persistent(self.persistent).execute(&mut self.connection).await?;
        let felt = sqlx::query(FELT).bind(order.client).bind(order.n).persistent(self.persistent);
        let row = felt.fetch_one(&mut self.connection).await?;
        Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
    }
}
