//! One or two servers behind one proxy, with nothing that replicates between them: enough for what a console promises.
//!
//! Invariant: the proxy ends before the servers behind it.

use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::cluster::{Cluster, ClusterOptions, Identity};
use e2e::pair::{APP, OTHER, PROXY, PairOptions, SOURCE, TARGET, password, single};
use e2e::proxy::{ADMIN, Proxy, ProxyOptions};
use e2e::wire::{Report, Wire};
use pgcutover_api::epoch::{Claim, Epoch, RunId};
use pgcutover_api::store::{Name, Outcome, StoreView, Turn};
use postgres_protocol::message::backend::Message;
use proxyctl::clusters::{self, Role};
use tokio::task::JoinHandle;
use tokio_postgres::error::DbError;
use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};
use toml::{Table, Value};

use crate::armed::{LIMIT, as_proxyctl};

/// Between looks at a condition.
const LOOK: Duration = Duration::from_millis(10);

/// Servers and the proxy in front of them.
pub(crate) struct Stand {
    /// One visit to the console for all that does not wait.
    pub(crate) admin: Client,
    pub(crate) proxy: Proxy,
    /// The source, and the target if there are two.
    pub(crate) servers: Vec<Cluster>,
}

/// What a waiting command was answered with.
pub(crate) type Answer = JoinHandle<Result<Vec<SimpleQueryRow>, DbError>>;

impl Stand {
    /// A server of each major; `change` alters the configuration before the proxy starts.
    pub(crate) async fn start(majors: &[u32], change: impl FnOnce(&mut ProxyOptions, &[Cluster])) -> Stand {
        let binaries = Binaries::of(majors).unwrap();
        let mut servers = Vec::new();
        for major in majors {
            // Two servers of one version that were not cloned from each other have different identities.
            let identity = if majors[0] == *major && !servers.is_empty() { Identity::Own } else { Identity::Template };
            let source = ClusterOptions { identity, ..ClusterOptions::new(*major) };
            servers.push(single(&binaries, &PairOptions { source, ..PairOptions::new(*major, *major) }).await.unwrap());
        }
        let backends: Vec<_> = [SOURCE, TARGET].into_iter().zip(servers.iter().map(Cluster::port)).collect();
        let mut options = ProxyOptions::for_backends(&backends, 1).unwrap();
        options.users.extend([APP, OTHER].map(|user| format!("\"{user}\" \"{}\"", password(user))));
        change(&mut options, &servers);
        let proxy = Proxy::start(options).await.unwrap();
        Stand { admin: proxy.admin().await.unwrap(), proxy, servers }
    }

    /// Two servers with the decision store on both, and short deadlines.
    pub(crate) async fn armed(majors: [u32; 2], change: impl FnOnce(&mut ProxyOptions, &[Cluster])) -> Stand {
        let stand = Stand::start(&majors, |options, servers| {
            hasty(options);
            change(options, servers);
        })
        .await;
        stand.install().await;
        stand
    }

    /// The decision store on both servers.
    pub(crate) async fn install(&self) {
        for store in [self.green(), self.blue()] {
            store.install(LIMIT).await.unwrap();
            store.grant(PROXY, LIMIT).await.unwrap();
            store.seed(&app(), LIMIT).await.unwrap();
        }
    }

    /// The source's store, as proxyctl reaches it.
    pub(crate) fn blue(&self) -> clusters::Cluster {
        as_proxyctl(Role::Source, &self.servers[0])
    }

    /// The target's.
    pub(crate) fn green(&self) -> clusters::Cluster {
        as_proxyctl(Role::Target, &self.servers[1])
    }

    /// Opens the next epoch on the source.
    pub(crate) async fn open(&self) -> Turn {
        open_on(&self.blue(), TARGET).await
    }

    pub(crate) async fn client(&self) -> Client {
        self.proxy.connect(APP).await.unwrap()
    }

    /// Asks the console; the command has to succeed.
    pub(crate) async fn ask(&self, command: &str) -> Vec<SimpleQueryRow> {
        self.admin.rows(command).await.unwrap_or_else(|error| panic!("{error:?}"))
    }

    /// The error that the console answers with.
    pub(crate) async fn refused(&self, command: &str) -> DbError {
        refusal(&self.admin, command).await
    }

    /// Sends a command that waits.
    pub(crate) async fn begin(&self, command: &str) -> Answer {
        let admin = self.proxy.admin().await.unwrap();
        sent(admin, command)
    }

    /// A column of the gate's row.
    pub(crate) async fn gate(&self, column: &str) -> String {
        self.gate_of("app", column).await
    }

    pub(crate) async fn gate_of(&self, database: &str, column: &str) -> String {
        let rows = self.ask("SHOW GATES").await;
        let row = rows.iter().find(|row| row.get("database") == Some(database)).unwrap();
        row.get(column).unwrap_or_else(|| panic!("no column {column}")).to_owned()
    }

    /// Waits until a column of the gate's row says `value`.
    pub(crate) async fn gate_says(&self, column: &str, value: &str) {
        eventually(&format!("{column} = {value}"), async || self.gate(column).await == value).await;
    }

    /// Waits until so many clients have a transaction on a server; merely waiting for one they could be sent back.
    pub(crate) async fn runs(&self, clients: usize) {
        let active = async || {
            let sessions = self.ask("SHOW SESSIONS").await;
            sessions.iter().filter(|row| row.get("state") == Some("active")).count() == clients
        };
        eventually("transactions run", active).await;
    }

    /// Kills the proxy and starts it again with its files as they are.
    pub(crate) async fn kill_and_restart(&mut self) {
        self.proxy.kill9();
        self.proxy.restart().await.unwrap();
        self.admin = self.proxy.admin().await.unwrap();
    }

    /// A column of a backend's row.
    pub(crate) async fn backend(&self, backend: &str, column: &str) -> String {
        let rows = self.ask("SHOW BACKENDS").await;
        let row = rows.iter().find(|row| row.get("backend") == Some(backend)).unwrap();
        row.get(column).unwrap_or_default().to_owned()
    }

    /// Waits until a client has been held for so long.
    pub(crate) async fn held_for(&self, time: Duration) {
        let long_enough = async || self.gate("held_ms_max").await.parse::<u128>().unwrap() > time.as_millis();
        eventually("a client is held long enough", long_enough).await;
    }

    /// Something the proxy has written to its log.
    pub(crate) fn logged(&self, text: &str) -> bool {
        String::from_utf8_lossy(&std::fs::read(self.proxy.log()).unwrap_or_default()).contains(text)
    }

    /// The port of the server that answers this client.
    pub(crate) fn port(&self, server: usize) -> i64 {
        i64::from(self.servers[server].port())
    }

    /// A console connection of which every byte is seen.
    pub(crate) async fn console(&self) -> Wire {
        Wire::log_in(self.proxy.port(), ADMIN, &password(ADMIN), "pgcutover").await.unwrap().0
    }

    /// A client's connection of which every byte is seen.
    pub(crate) async fn wire(&self) -> Wire {
        Wire::log_in(self.proxy.port(), APP, &password(APP), "app").await.unwrap().0
    }
}

impl Drop for Stand {
    #[expect(clippy::print_stdout, reason = "the test runner shows it with the failure; the log is gone afterwards")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", String::from_utf8_lossy(&std::fs::read(self.proxy.log()).unwrap_or_default()));
        }
    }
}

/// Opens the next epoch in a store.
pub(crate) async fn open_on(store: &clusters::Cluster, target: &str) -> Turn {
    let run = RunId::random();
    let epoch = store.open(&app(), run, &Name::new(target).unwrap(), Epoch::ZERO).await.unwrap();
    Turn { db: app(), claim: Claim { run, epoch } }
}

/// What a store says of the database.
pub(crate) async fn view(store: &clusters::Cluster) -> StoreView {
    store.view(&app(), LIMIT).await.unwrap()
}

/// The last outcome in a store.
pub(crate) async fn outcome(store: &clusters::Cluster) -> Option<Outcome> {
    view(store).await.last.map(|decision| decision.outcome)
}

/// The route's name.
pub(crate) fn app() -> Name {
    Name::new("app").unwrap()
}

/// `run '…', epoch n`.
pub(crate) fn claim(turn: &Turn) -> String {
    format!("run '{}', epoch {}", turn.claim.run, turn.claim.epoch)
}

/// An epoch pause with short deadlines.
pub(crate) fn pause(turn: &Turn) -> String {
    format!("PAUSE app WITH ({}, source 'blue', target 'green', drain '200ms', lease '600ms')", claim(turn))
}

/// Short deadlines for everything that waits.
pub(crate) fn hasty(options: &mut ProxyOptions) {
    options.setting("drain_timeout", "200ms");
    options.setting("pause_lease", "600ms");
    options.setting("hold_budget", "2s");
}

/// Another database on the same server.
pub(crate) fn second_database(options: &mut ProxyOptions, servers: &[Cluster]) {
    let backend = Table::from_iter([
        ("host".to_owned(), Value::from("127.0.0.1")),
        ("port".to_owned(), i64::from(servers[0].port()).into()),
        ("dbname".to_owned(), "app".into()),
    ]);
    let backends = Table::from_iter([(SOURCE.to_owned(), Value::Table(backend))]);
    let database = options.database("second");
    database.insert("active".to_owned(), SOURCE.into());
    database.insert("backends".to_owned(), Value::Table(backends));
}

/// Lets a user keep its server.
pub(crate) fn session_pooled(options: &mut ProxyOptions, user: &str) {
    let mode = Table::from_iter([("pool_mode".to_owned(), Value::from("session"))]);
    options.config.insert("users".to_owned(), Value::Table(Table::from_iter([(user.to_owned(), Value::Table(mode))])));
}

fn row(message: SimpleQueryMessage) -> Option<SimpleQueryRow> {
    if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None }
}

/// Sends a statement that waits, on a connection of its own.
pub(crate) fn sent(client: Client, sql: &str) -> Answer {
    let sql = sql.to_owned();
    tokio::spawn(async move {
        let answer = client.simple_query(&sql).await;
        match answer {
            Ok(messages) => Ok(messages.into_iter().filter_map(row).collect()),
            Err(error) => Err(error.as_db_error().unwrap_or_else(|| panic!("{sql}: {error}")).clone()),
        }
    })
}

/// The answer of a command that waits, which has to come by now.
pub(crate) async fn answered(answer: Answer) -> Result<Vec<SimpleQueryRow>, DbError> {
    tokio::time::timeout(LIMIT, answer).await.expect("no answer").unwrap()
}

/// The error that a statement is answered with.
pub(crate) async fn refusal(client: &Client, sql: &str) -> DbError {
    match client.simple_query(sql).await {
        Ok(_) => panic!("not refused: {sql}"),
        Err(error) => error.as_db_error().unwrap_or_else(|| panic!("{sql}: {error}")).clone(),
    }
}

/// Waits until something holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            // reason: between two looks at the condition, which has its deadline below
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// The tags and errors of an answer.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
pub(crate) fn said(messages: &[Message]) -> Vec<String> {
    messages
        .iter()
        .filter_map(|message| match message {
            Message::CommandComplete(body) => Some(body.tag().unwrap().to_owned()),
            Message::ErrorResponse(body) => Some(Report::of(body).sqlstate),
            _ => None,
        })
        .collect()
}

/// The server that a client talks to.
pub(crate) const WHERE: &str = "SELECT inet_server_port()";
