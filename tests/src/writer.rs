//! One client of the load: its connection, its transactions, its notes.
//!
//! Half of the clients speak the simple query protocol, half the extended one: with unnamed statements, or, where a
//! session is theirs, with named ones.
//!
//! Invariant: each number `n` is sent once and is noted once, as acknowledged, unknown or refused. Whoever keeps
//! something in its session has it to the end, or says what is missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Config, Error};
use tokio_util::sync::CancellationToken;

use crate::belongings::Belongings;
use crate::client::Client;
use crate::errors::ClientError;
use crate::ledger::Notes;
use crate::samples::{Kind, Samples, now_us};

/// Longer than any hold budget: whoever has not been answered by then never will be.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Between attempts to log in again.
const LOGIN_PAUSE: Duration = Duration::from_millis(50);
/// Whoever insists waits twice as long after each further failure, up to this: what retry loops of applications do.
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// How a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Query messages.
    Simple,
    /// Parse, Bind, Describe, Execute, Sync; unnamed statements.
    Extended,
}

/// Totals that can be read while the load runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// Transactions that ended well, reads among them.
    pub transactions: AtomicU64,
    /// Writes acknowledged.
    pub acknowledged: AtomicU64,
    /// Errors of any kind.
    pub errors: AtomicU64,
}

/// What a client brings home.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// What it was told.
    pub notes: Notes,
    /// What it waited.
    pub samples: Samples,
    /// What went wrong.
    pub errors: Vec<ClientError>,
}

/// When a client sends its next transaction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// Closed loop: so long after the last began, but not before it was answered.
    ThinkTime(Duration),
    /// Open loop: at fixed times whatever happens; waits count from the time at which it was to be sent.
    Schedule(Duration),
    /// Open loop, and nothing is given up: whoever fails leaves the connection, backs off, asks again where the database is
    /// and sends the same work under a new number; its wait counts from when it was first to be sent.
    Insist(Duration),
}

/// What a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Diet {
    Mixed,
    ReadsOnly,
    SingleWrites,
}

/// A client before it runs.
pub(crate) struct Writer {
    pub(crate) login: Config,
    /// The port, where `login` names none: looked up at every login, as a name is.
    pub(crate) address: Option<Arc<AtomicU16>>,
    /// When it logs in, and when its first transaction is due.
    pub(crate) begins: (Instant, Instant),
    pub(crate) protocol: Protocol,
    pub(crate) pace: Pace,
    pub(crate) diet: Diet,
    /// Whether it keeps settings, statements and a channel in its session.
    pub(crate) keeps: bool,
    /// Writes go to accounts 1 to this.
    pub(crate) accounts: u32,
    pub(crate) counters: Arc<Counters>,
    /// Since something last went well.
    pub(crate) failures: u32,
    pub(crate) record: Record,
}

/// A client that is logged in.
struct Session {
    client: Client,
    belongings: Option<Belongings>,
}

/// The numbers of one write.
#[derive(Clone, Copy, Debug)]
struct Entry {
    client: i32,
    n: i64,
    aid: i64,
    delta: i64,
}

/// One statement of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Begin,
    Insert,
    History,
    Update,
    Commit,
    Read,
    /// The whole transaction as one string (simple protocol only).
    OneString,
    /// Insert and update in one statement, committed by itself.
    OneStatement,
}

impl Step {
    /// After it was sent and before it is answered nobody knows whether the write counts.
    fn decides(self) -> bool {
        matches!(self, Step::Commit | Step::OneString | Step::OneStatement)
    }

    /// Those that can be prepared.
    const PREPARED: [Step; 5] = [Step::Insert, Step::History, Step::Update, Step::Read, Step::OneStatement];

    /// Of its parameters.
    fn types(self) -> &'static [Type] {
        if self.sql().contains('$') { &[Type::INT4, Type::INT8, Type::INT8, Type::INT8] } else { &[] }
    }

    fn kind(self) -> Kind {
        if self == Step::Read { Kind::Read } else { Kind::Write }
    }

    fn sql(self) -> &'static str {
        match self {
            Step::Begin => "BEGIN",
            Step::Commit => "COMMIT",
            Step::Insert => "INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4)",
            Step::History => "INSERT INTO history (client, n, aid, delta) VALUES ($1, $2, $3, $4)",
            Step::Update => "UPDATE accounts SET abalance = abalance + $4 WHERE aid = $3",
            Step::Read => "SELECT abalance FROM accounts WHERE aid = $3",
            Step::OneString => {
                "BEGIN; INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4); \
                 UPDATE accounts SET abalance = abalance + $4 WHERE aid = $3; COMMIT"
            }
            Step::OneStatement => ONE_STATEMENT,
        }
    }
}

/// A whole write as one statement: parameters are client, n, aid, delta.
pub(crate) const ONE_STATEMENT: &str = "WITH entry AS \
     (INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4) RETURNING aid, delta) \
     UPDATE accounts SET abalance = abalance + entry.delta FROM entry WHERE accounts.aid = entry.aid";

/// How a write ended.
enum Ending {
    Acknowledged,
    Unknown,
    Refused,
}

impl Writer {
    /// Runs until told to stop; the transaction under way is finished.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> Record {
        let (login_at, mut next) = self.begins;
        let mut n = 0;
        until(login_at, &stop).await;
        while !stop.is_cancelled() {
            let Some(session) = self.log_in(&stop).await else { break };
            while !session.client.is_closed() && until(next, &stop).await {
                let began = match self.pace {
                    Pace::ThinkTime(_) => Instant::now(),
                    Pace::Schedule(_) | Pace::Insist(_) => next,
                };
                n += 1;
                let fine = self.transaction(&session, n, began).await;
                self.failures = if fine { 0 } else { self.failures + 1 };
                if fine || !self.insists() {
                    next = began + self.period();
                }
                if !fine && (self.insists() || session.client.batch_execute("ROLLBACK").await.is_err()) {
                    break;
                }
            }
            self.look_over(session).await;
            if self.insists() && self.failures > 0 {
                self.rest(&stop).await;
            }
        }
        if self.insists() && next < Instant::now() {
            // Whoever still waits when all is over has waited at least so long.
            self.waited(Kind::Write, next);
        }
        self.record
    }

    fn insists(&self) -> bool {
        matches!(self.pace, Pace::Insist(_))
    }

    /// Between two attempts. Clients differ by a quarter each way, so that not all of them come back at one moment.
    async fn rest(&self, stop: &CancellationToken) {
        let pause = match self.pace {
            Pace::ThinkTime(_) | Pace::Schedule(_) => LOGIN_PAUSE,
            Pace::Insist(_) => {
                let doubled = LOGIN_PAUSE * 2_u32.pow(self.failures.saturating_sub(1).min(10));
                doubled.min(BACK_OFF_MAX) * (75 + self.record.notes.client.unsigned_abs() * 37 % 50) / 100
            }
        };
        until(Instant::now() + pause, stop).await;
    }

    /// A session's last minute: is everything there that was put into it?
    async fn look_over(&mut self, session: Session) {
        let who = self.record.notes.client;
        let Some(belongings) = session.belongings else { return };
        match belongings.missing(&session.client).await {
            Ok(missing) => missing.into_iter().for_each(|what| self.error(ClientError::because(who, what))),
            // That the connection broke has been noted by whoever used it.
            Err(_) if session.client.is_closed() => {}
            Err(error) => self.error(ClientError::of(who, "looking over the session", &error)),
        }
    }

    fn period(&self) -> Duration {
        match self.pace {
            Pace::ThinkTime(period) | Pace::Schedule(period) | Pace::Insist(period) => period,
        }
    }

    async fn log_in(&mut self, stop: &CancellationToken) -> Option<Session> {
        while !stop.is_cancelled() {
            match self.session().await {
                Ok(session) => return Some(session),
                Err(error) => self.error(ClientError::of(self.record.notes.client, "login", &error)),
            }
            self.failures += 1;
            self.rest(stop).await;
        }
        None
    }

    async fn session(&self) -> Result<Session, Error> {
        let mut login = self.login.clone();
        if let Some(address) = &self.address {
            login.port(address.load(Ordering::Relaxed));
        }
        let client = Client::connect(&login).await?;
        let belongings = if self.keeps {
            let statements = Step::PREPARED.map(|step| (step.sql(), step.types()));
            Some(Belongings::acquire(&client, self.record.notes.client, &statements).await?)
        } else {
            None
        };
        Ok(Session { client, belongings })
    }

    /// One write (or read) with its notes; false when it failed. `began` is when it was to be sent.
    async fn transaction(&mut self, session: &Session, n: i64, began: Instant) -> bool {
        let entry = self.entry(n);
        let steps = self.steps(n);
        let writes = steps.iter().any(|step| step.decides());
        let mut sent = began;
        for step in steps {
            if let Err(ending) = self.step(session, step, entry, sent).await {
                if writes {
                    self.note(n, &ending);
                }
                return false;
            }
            sent = Instant::now();
        }
        self.counters.transactions.fetch_add(1, Ordering::Relaxed);
        if writes {
            self.note(n, &Ending::Acknowledged);
        }
        true
    }

    fn note(&mut self, n: i64, ending: &Ending) {
        let notes = &mut self.record.notes;
        match ending {
            Ending::Acknowledged => {
                notes.acknowledged.push(n);
                self.counters.acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            Ending::Unknown => notes.unknown.push(n),
            Ending::Refused => notes.refused.push(n),
        }
    }

    fn entry(&self, n: i64) -> Entry {
        let client = self.record.notes.client;
        // Any spread will do; a multiplier prime to the number of accounts visits them all.
        let aid = (i64::from(client) * 7919 + n * 104_729).rem_euclid(i64::from(self.accounts)) + 1;
        Entry { client, n, aid, delta: n % 199 - 99 }
    }

    /// The shapes of transactions, in turn.
    fn steps(&self, n: i64) -> Vec<Step> {
        use Step::{Begin, Commit, History, Insert, OneStatement, OneString, Read, Update};
        let whole = match self.protocol {
            Protocol::Simple => OneString,
            Protocol::Extended => OneStatement,
        };
        match self.diet {
            Diet::ReadsOnly => vec![Read],
            Diet::SingleWrites => vec![OneStatement],
            Diet::Mixed => match n.rem_euclid(6) {
                0 => vec![whole],
                1 => vec![Begin, Insert, History, Update, Commit],
                2 => vec![Read, Begin, Insert, Update, Commit],
                3 => vec![OneStatement],
                _ => vec![Begin, Insert, Update, Commit],
            },
        }
    }

    async fn step(&mut self, session: &Session, step: Step, entry: Entry, sent: Instant) -> Result<(), Ending> {
        let answer = tokio::time::timeout(ANSWER_LIMIT, send(session, self.protocol, step, entry)).await;
        self.waited(step.kind(), sent);
        let doing = format!("{step:?}").to_lowercase();
        let who = self.record.notes.client;
        match answer {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.error(ClientError::of(who, &doing, &error));
                Err(if step.decides() && leaves_open(&error) { Ending::Unknown } else { Ending::Refused })
            }
            Err(_elapsed) => {
                self.error(ClientError::because(who, format!("{doing}: no answer in {ANSWER_LIMIT:?}")));
                Err(if step.decides() { Ending::Unknown } else { Ending::Refused })
            }
        }
    }

    /// Notes a wait that ends now.
    fn waited(&mut self, kind: Kind, since: Instant) {
        let waited = since.elapsed();
        let at_us = now_us() - i64::try_from(waited.as_micros()).unwrap_or(0);
        self.record.samples.add(at_us, waited, kind);
    }

    fn error(&mut self, error: ClientError) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        self.record.errors.push(error);
    }
}

/// Waits for a moment; false if it is told to stop first.
async fn until(moment: Instant, stop: &CancellationToken) -> bool {
    tokio::select! {
        () = tokio::time::sleep_until(moment.into()) => !stop.is_cancelled(),
        () = stop.cancelled() => false,
    }
}

/// Does this answer to a commit leave open whether it took place? A broken connection does, and so does a server that
/// goes down (class 57P) or a connection exception that somebody in between reports (class 08).
fn leaves_open(error: &Error) -> bool {
    error
        .as_db_error()
        .is_none_or(|error| error.code().code().starts_with("57P") || error.code().code().starts_with("08"))
}

async fn send(session: &Session, protocol: Protocol, step: Step, entry: Entry) -> Result<(), Error> {
    let client = &session.client;
    let Entry { client: who, n, aid, delta } = entry;
    if protocol == Protocol::Simple || step == Step::OneString {
        let values = [("$1", i64::from(who)), ("$2", n), ("$3", aid), ("$4", delta)];
        let sql = values.iter().fold(step.sql().to_owned(), |sql, (name, value)| {
            // In brackets: a minus sign after another minus sign would begin a comment.
            sql.replace(name, &format!("({value})"))
        });
        return client.batch_execute(&sql).await;
    }
    let values: [&(dyn ToSql + Sync); 4] = [&who, &n, &aid, &delta];
    let values = &values[..step.types().len()];
    if let Some(statement) = session.belongings.as_ref().and_then(|belongings| belongings.statement(step.sql())) {
        return client.query(statement, values).await.map(drop);
    }
    let typed: Vec<_> = values.iter().copied().zip(step.types().iter().cloned()).collect();
    client.query_typed(step.sql(), &typed).await.map(drop)
}
