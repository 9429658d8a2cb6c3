//! The admin consoles of the proxies: orders, tables, and leases that are kept alive.
//!
//! # What a fleet promises
//! Prewarm, pause and transplant are done by all or count as done by none; an ordered pause ends with the first proxy that
//! did not make it, so that the others' clients wait for it no longer than it takes to fail. Switch and resume come after a
//! decision, which every proxy finds by itself: one that does not answer is named, and nobody waits for it.
//!
//! What a dead proxy costs: before the pause a refusal; in the pause an abort, at most [`SHOW_DEADLINE`] after it fell silent
//! or at the next refused RENEW; after the decision nothing to the clients of the others. What ends it: it is started again
//! (and follows the store), or it is taken out of the configuration.
//!
//! Invariant: every order is bounded; what all of them must do counts only when all of them did it. A lease is renewed on
//! a connection of its own, because PAUSE keeps the other one waiting.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use pgcutover_api::command::{Command, Renew, Scope, Show, Table};
use pgcutover_api::epoch::{Claim, Epoch, Lease};
use pgcutover_api::rows::{BackendRow, BlockerRow, GateRow, PauseRow, Row, SessionRow, SwitchRow};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use crate::config;
use crate::config::Endpoint;
use crate::dial;

/// A table of a console is answered from memory; one that takes longer comes from a proxy in trouble.
pub const SHOW_DEADLINE: Duration = Duration::from_secs(2);

/// What a proxy did not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("proxy {proxy}: {message}")]
pub struct ProxyError {
    /// Its name.
    pub proxy: String,
    /// The SQLSTATE of its refusal; none if it did not answer.
    pub sqlstate: Option<String>,
    /// Its words, or what happened instead of an answer.
    pub message: String,
}

impl ProxyError {
    /// Whether it answered at all.
    pub fn answered(&self) -> bool {
        self.sqlstate.is_some()
    }
}

/// Several of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyErrors(pub Vec<ProxyError>);

impl fmt::Display for ProxyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(ProxyError::to_string).collect();
        f.write_str(&lines.join("; "))
    }
}

impl std::error::Error for ProxyErrors {}

/// Where one proxy's console is.
#[derive(Debug, Clone)]
pub struct ProxyAddress {
    /// The name reports use.
    pub name: String,
    /// How to reach it.
    pub endpoint: Endpoint,
    /// How it was found.
    pub origin: Origin,
}

/// How a proxy was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// By its address in the configuration.
    Listed,
    /// By a name that answers with its address.
    Dns {
        /// The name.
        host: String,
    },
    /// By what it enrolled in the store.
    Enrolled {
        /// Its instance name there.
        instance: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Listed => f.write_str("listed"),
            Origin::Dns { host } => write!(f, "found by the name {host}"),
            Origin::Enrolled { instance } => write!(f, "enrolled as {instance}"),
        }
    }
}

/// One proxy's console.
pub struct Proxy {
    address: ProxyAddress,
    /// Its own name for itself; empty if it did not say.
    instance: String,
    /// When it last answered.
    heard: std::sync::Mutex<Instant>,
    orders: Client,
    /// For RENEW, and for whatever must not wait behind a PAUSE.
    aside: Mutex<Arc<Client>>,
}

impl Proxy {
    /// Logs in twice, and asks for its name.
    pub async fn connect(address: &ProxyAddress) -> Result<Proxy, ProxyError> {
        let (orders, aside) = tokio::try_join!(console(address), console(address))?;
        let (heard, aside) = (std::sync::Mutex::new(Instant::now()), Mutex::new(Arc::new(aside)));
        let mut proxy = Proxy { address: address.clone(), instance: String::new(), heard, orders, aside };
        proxy.instance = proxy.setting("instance").await?.unwrap_or_default();
        Ok(proxy)
    }

    /// The name in the configuration.
    pub fn name(&self) -> &str {
        &self.address.name
    }

    /// Its own name for itself; empty if it does not say.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// How it was found.
    pub fn origin(&self) -> &Origin {
        &self.address.origin
    }

    /// Gives an order on the connection for orders.
    pub async fn order(&self, command: &Command, limit: Duration) -> Result<Vec<SimpleQueryRow>, ProxyError> {
        self.heard(send(self.name(), &self.orders, command, limit).await)
    }

    /// Whoever does not answer is told with when it last did.
    fn heard<T>(&self, answer: Result<T, ProxyError>) -> Result<T, ProxyError> {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Err(error) if !error.answered() => {
                let silent_ms = heard.elapsed().as_millis();
                Err(ProxyError { message: format!("{}; it last answered {silent_ms} ms ago", error.message), ..error })
            }
            answer => {
                *heard = Instant::now();
                answer
            }
        }
    }

    /// Gives an order on the other connection, made anew if it is gone.
    pub async fn order_aside(&self, command: &Command, limit: Duration) -> Result<Vec<SimpleQueryRow>, ProxyError> {
        let client = {
            let mut aside = self.aside.lock().await;
            if aside.is_closed() {
                *aside = Arc::new(self.heard(console(&self.address).await)?);
            }
            aside.clone()
        };
        self.heard(send(self.name(), &client, command, limit).await)
    }

    /// The rows of an order's answer.
    pub async fn rows<R: Row>(&self, command: &Command, limit: Duration) -> Result<Vec<R>, ProxyError> {
        let rows = self.order_aside(command, limit).await?;
        rows.iter().map(|row| typed(self.name(), row)).collect()
    }

    async fn table<R: Row>(&self, table: Table) -> Result<Vec<R>, ProxyError> {
        self.rows(&Command::Show(Show::Table(table)), SHOW_DEADLINE).await
    }

    /// The gate of a database.
    pub async fn gate(&self, database: &str) -> Result<GateRow, ProxyError> {
        let gates: Vec<GateRow> = self.table(Table::Gates).await?;
        gates.into_iter().find(|gate| gate.database == database).ok_or_else(|| self.lacks(database))
    }

    /// The declared backends of a database.
    pub async fn backends(&self, database: &str) -> Result<Vec<BackendRow>, ProxyError> {
        let backends: Vec<BackendRow> = self.table(Table::Backends).await?;
        Ok(backends.into_iter().filter(|backend| backend.database == database).collect())
    }

    /// The sessions of a database.
    pub async fn sessions(&self, database: &str) -> Result<Vec<SessionRow>, ProxyError> {
        let sessions: Vec<SessionRow> = self.table(Table::Sessions).await?;
        Ok(sessions.into_iter().filter(|session| session.database == database).collect())
    }

    /// The switches of a database since the proxy started.
    pub async fn switches(&self, database: &str) -> Result<Vec<SwitchRow>, ProxyError> {
        let switches: Vec<SwitchRow> = self.table(Table::Switches).await?;
        Ok(switches.into_iter().filter(|switch| switch.database == database).collect())
    }

    /// The pauses of a database that are over, since the proxy started.
    pub async fn pauses(&self, database: &str) -> Result<Vec<PauseRow>, ProxyError> {
        let pauses: Vec<PauseRow> = self.table(Table::Pauses).await?;
        Ok(pauses.into_iter().filter(|pause| pause.database == database).collect())
    }

    /// A digest of what it runs with: its keys, and the backends it declares.
    pub async fn config_digest(&self) -> Result<String, ProxyError> {
        let keys = self.order_aside(&Command::Show(Show::Table(Table::Config)), SHOW_DEADLINE).await?;
        let backends: Vec<BackendRow> = self.table(Table::Backends).await?;
        let keys = keys.iter().map(|row| format!("{:?}={:?}", row.get("key"), row.get("value")));
        let backends = backends.iter().map(|row| {
            let BackendRow { database, backend, host, port, dbname, user, sslmode, .. } = row;
            format!("{database}.{backend}={host}:{port}/{dbname} {user} {sslmode}")
        });
        Ok(config::digest(&keys.chain(backends).collect::<Vec<_>>().join("\n")))
    }

    /// Who holds a drain open.
    pub async fn blockers(&self, database: &str) -> Result<Vec<BlockerRow>, ProxyError> {
        self.rows(&Command::Show(Show::Blockers(Scope::Database(database.to_owned()))), SHOW_DEADLINE).await
    }

    /// The value of a key of its configuration.
    pub async fn setting(&self, key: &str) -> Result<Option<String>, ProxyError> {
        let rows = self.order_aside(&Command::Show(Show::Table(Table::Config)), SHOW_DEADLINE).await?;
        let row = rows.iter().find(|row| row.get("key") == Some(key));
        Ok(row.and_then(|row| row.get("value")).map(str::to_owned))
    }

    /// The server processes of its connections for a database.
    pub async fn server_pids(&self, database: &str) -> Result<Vec<i32>, ProxyError> {
        let rows = self.order_aside(&Command::Show(Show::Table(Table::Servers)), SHOW_DEADLINE).await?;
        let ours = rows.iter().filter(|row| row.get("database") == Some(database));
        Ok(ours.filter_map(|row| row.get("remote_pid")?.parse().ok()).collect())
    }

    fn lacks(&self, database: &str) -> ProxyError {
        let message = format!("serves no database '{database}'");
        ProxyError { proxy: self.name().to_owned(), sqlstate: Some("42704".to_owned()), message }
    }
}

async fn console(address: &ProxyAddress) -> Result<Client, ProxyError> {
    dial::dial(&address.endpoint, "proxyctl").await.map_err(|error| ProxyError {
        proxy: address.name.clone(),
        sqlstate: None,
        message: format!("{}: {error}", address.endpoint.describe()),
    })
}

async fn send(
    proxy: &str,
    client: &Client,
    command: &Command,
    limit: Duration,
) -> Result<Vec<SimpleQueryRow>, ProxyError> {
    let failed = |sqlstate, message| ProxyError { proxy: proxy.to_owned(), sqlstate, message };
    let verb = command.verb();
    let answer = tokio::time::timeout(limit, client.simple_query(&command.to_string())).await;
    match answer {
        Ok(Ok(messages)) => Ok(messages.into_iter().filter_map(row).collect()),
        Ok(Err(error)) => {
            let sqlstate = error.as_db_error().map(|db| db.code().code().to_owned());
            Err(failed(sqlstate, format!("{verb}: {}", dial::words(&error))))
        }
        Err(_) => Err(failed(None, format!("{verb}: no answer within {limit:?}"))),
    }
}

fn row(message: SimpleQueryMessage) -> Option<SimpleQueryRow> {
    // What is left out: RowDescription and CommandComplete.
    if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None }
}

fn typed<R: Row>(proxy: &str, row: &SimpleQueryRow) -> Result<R, ProxyError> {
    let cell = |name: &str| {
        let at = row.columns().iter().position(|column| column.name() == name)?;
        Some(row.get(at))
    };
    R::from_text(cell).map_err(|error| ProxyError {
        proxy: proxy.to_owned(),
        sqlstate: Some("XX000".to_owned()),
        message: format!("its answer does not read: {error}"),
    })
}

/// Every proxy of a cutover.
pub struct Fleet {
    proxies: Vec<Arc<Proxy>>,
    lost: watch::Sender<Option<ProxyError>>,
}

/// Tells when a lease is lost.
#[derive(Debug, Clone)]
pub struct Losses(watch::Receiver<Option<ProxyError>>);

impl Losses {
    /// The first lease that was lost so far.
    pub fn one(&self) -> Option<ProxyError> {
        self.0.borrow().clone()
    }

    /// Waits until a lease is lost; for ever if none is (whoever holds the leases ends the wait). Cancel safe.
    pub async fn first(&mut self) -> ProxyError {
        loop {
            if let Some(error) = self.0.borrow_and_update().clone() {
                return error;
            }
            if self.0.changed().await.is_err() {
                // The fleet is gone: nothing more can come.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Fleet {
    /// Nobody yet.
    pub fn none() -> Fleet {
        Fleet { proxies: Vec::new(), lost: watch::Sender::new(None) }
    }

    /// Logs in where that works; the rest is told.
    pub async fn connect_some(addresses: &[ProxyAddress]) -> (Fleet, Vec<ProxyError>) {
        let (mut proxies, mut errors) = (Vec::new(), Vec::new());
        for result in join_all(addresses.iter().map(Proxy::connect)).await {
            match result {
                Ok(proxy) => proxies.push(Arc::new(proxy)),
                Err(error) => errors.push(error),
            }
        }
        (Fleet { proxies, lost: watch::Sender::new(None) }, errors)
    }

    /// Takes the proxies of another fleet in, whose leases nobody has been told of yet.
    pub fn join(&mut self, other: Fleet) {
        self.proxies.extend(other.proxies);
    }

    /// Without those that another proxy answers for at the address where they enrolled.
    pub fn that_are_who_enrolled(mut self) -> (Fleet, Vec<ProxyError>) {
        let mut strangers = Vec::new();
        self.proxies.retain(|proxy| match proxy.origin() {
            Origin::Enrolled { instance } if instance != proxy.instance() => {
                let message = format!("'{}' answers where it enrolled", proxy.instance());
                strangers.push(ProxyError { proxy: proxy.name().to_owned(), sqlstate: None, message });
                false
            }
            Origin::Enrolled { .. } | Origin::Dns { .. } | Origin::Listed => true,
        });
        (self, strangers)
    }

    /// Whether one of them calls itself that.
    pub fn has_instance(&self, instance: &str) -> bool {
        self.proxies.iter().any(|proxy| proxy.instance() == instance)
    }

    /// Tells when a lease is lost.
    pub fn losses(&self) -> Losses {
        Losses(self.lost.subscribe())
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Proxy>> {
        self.proxies.iter()
    }

    /// Asks every proxy at the same time.
    pub async fn each<'a, T, F>(&'a self, ask: impl Fn(&'a Proxy) -> F) -> Vec<(&'a str, Result<T, ProxyError>)>
    where
        F: Future<Output = Result<T, ProxyError>>,
    {
        let answers = join_all(self.proxies.iter().map(|proxy| ask(proxy))).await;
        self.proxies.iter().map(|proxy| proxy.name()).zip(answers).collect()
    }

    /// Asks every proxy at the same time; the answers, if all of them answered well.
    pub async fn all<'a, T, F>(&'a self, ask: impl Fn(&'a Proxy) -> F) -> Result<Vec<(&'a str, T)>, ProxyErrors>
    where
        F: Future<Output = Result<T, ProxyError>>,
    {
        let answers = self.each(ask).await;
        all(answers.into_iter().map(|(name, answer)| answer.map(|answer| (name, answer))).collect())
    }

    /// Asks every proxy at the same time; ends with the first that does not do it, and leaves the others at it.
    pub async fn all_or_first<'a, T, F>(&'a self, ask: impl Fn(&'a Proxy) -> F) -> Result<Vec<T>, ProxyErrors>
    where
        F: Future<Output = Result<T, ProxyError>>,
    {
        let mut answers: FuturesUnordered<F> = self.proxies.iter().map(|proxy| ask(proxy)).collect();
        let mut done = Vec::new();
        while let Some(answer) = answers.next().await {
            done.push(answer.map_err(|error| ProxyErrors(vec![error]))?);
        }
        Ok(done)
    }

    /// The largest epoch any of them routes by or is paused at.
    pub async fn epoch_max(&self, database: &str) -> Result<Epoch, ProxyErrors> {
        let gates = self.all(|proxy| proxy.gate(database)).await?;
        let epochs = gates.iter().map(|(_, gate)| gate.route_epoch.max(gate.epoch.unwrap_or(Epoch::ZERO)));
        Ok(epochs.max().unwrap_or(Epoch::ZERO))
    }

    /// Renews the pause of every proxy from now on, until the result is dropped.
    pub fn keep(&self, database: &str, claim: Claim, lease: Lease, every: Duration) -> Leases {
        let mut leases = Leases { tasks: JoinSet::new(), confirmed: Arc::new(AtomicBool::new(false)) };
        for proxy in &self.proxies {
            let renewer = Renewer {
                proxy: proxy.clone(),
                command: Command::Renew(Renew { database: database.to_owned(), claim, lease }),
                every,
                // A lease that was not renewed for this long may be over before the next attempt is.
                limit: lease.duration().saturating_sub(every),
                confirmed: leases.confirmed.clone(),
                lost: self.lost.clone(),
            };
            leases.tasks.spawn(renewer.run());
        }
        leases
    }
}

fn all<T>(results: Vec<Result<T, ProxyError>>) -> Result<Vec<T>, ProxyErrors> {
    let (mut fine, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => fine.push(value),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(fine) } else { Err(ProxyErrors(errors)) }
}

/// The leases of a paused fleet. Dropping it ends the renewing, and so, in time, the leases.
pub struct Leases {
    tasks: JoinSet<()>,
    confirmed: Arc<AtomicBool>,
}

impl Leases {
    /// Every PAUSE was answered: from here on a refused RENEW means that a lease is lost.
    pub fn confirm(&self) {
        self.confirmed.store(true, Ordering::Release);
    }

    /// Renews something else for as long.
    pub fn also(&mut self, renewing: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(renewing);
    }

    /// Stops renewing, once what is under way is answered or given up.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

struct Renewer {
    proxy: Arc<Proxy>,
    command: Command,
    every: Duration,
    limit: Duration,
    confirmed: Arc<AtomicBool>,
    lost: watch::Sender<Option<ProxyError>>,
}

impl Renewer {
    /// Ends when a lease is lost or when its `Leases` is dropped.
    async fn run(self) {
        let mut tick = tokio::time::interval(self.every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first tick is now: PAUSE itself starts the lease.
        tick.tick().await;
        loop {
            tick.tick().await;
            let Err(error) = self.proxy.order_aside(&self.command, self.limit).await else { continue };
            // Before its PAUSE has arrived a proxy refuses with cause; the answer to PAUSE says more.
            if error.answered() && !self.confirmed.load(Ordering::Acquire) {
                continue;
            }
            self.lost.send_replace(Some(error));
            return;
        }
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.proxies.iter().map(|proxy| proxy.name())).finish()
    }
}
