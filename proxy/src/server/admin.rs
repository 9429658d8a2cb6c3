//! The console's verbs and snapshots, done to the real thing.
//!
//! Invariant: what a verb means for one database is the database's own business; here it finds its databases, and each
//! of several is treated independently of the others.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgcutover_api::command::{Mode, PauseWith, PrepareSwitch, Renew, ResumeWith, Scope, Shutdown, Switch, Transplant};
use pgcutover_api::rows::{
    BackendRow, BlockerRow, GateRow, PauseRow, PrepareRow, SessionRow, SwitchRow, TransplantRow, YesNo,
};
use tokio::sync::watch;

use crate::client::{Order, Server};
use crate::connection::Door;
use crate::console;
use crate::console::{
    Admin, Census, DatabaseRow, DnsRow, Peer, PoolRow, Refusal, SettingRow, SocketRow, UserRow, Visitor, Why,
};
use crate::database;
use crate::database::Database;
use crate::gate::PauseId;
use crate::http::{Pages, Readiness};
use crate::metrics;
use crate::metrics::DatabaseTraffic;
use crate::relay::ShutSignal;
use crate::server::reload;
use crate::server::rows;
use crate::server::settings;

/// How often WAIT_CLOSE looks: a connection's end has no other sign.
const CLOSE_LOOK: Duration = Duration::from_millis(50);

/// Whoever operates the process, at the console.
#[derive(Clone)]
pub(super) struct Operator {
    /// The proxy.
    pub(super) door: Arc<Door>,
    /// Where a wish to end goes.
    pub(super) ending: watch::Sender<Option<Shutdown>>,
}

impl Operator {
    fn database(&self, name: &str) -> Result<Arc<Database>, Refusal> {
        self.door.databases.load().get(name).cloned().ok_or_else(|| Refusal::unknown_database(name))
    }

    fn databases_in(&self, scope: &Scope) -> Result<Vec<Arc<Database>>, Refusal> {
        match scope {
            Scope::All => Ok(rows::all(&self.door)),
            Scope::Database(name) => self.database(name).map(|database| vec![database]),
        }
    }

    /// A row, or several, per database.
    fn each<T, R: IntoIterator<Item = T>>(&self, rows_of: impl Fn(&Database) -> R) -> Vec<T> {
        rows::all(&self.door).iter().flat_map(|database| rows_of(database)).collect()
    }
}

impl From<database::Refusal> for Refusal {
    fn from(refusal: database::Refusal) -> Self {
        let why = match refusal.why {
            database::Why::Unknown => Why::Unknown,
            database::Why::WrongState => Why::WrongState,
            database::Why::NotDrained => Why::NotDrained,
            database::Why::Undecided => Why::Undecided,
            database::Why::Failed => Why::Failed,
        };
        Self { hint: refusal.hint.map(Into::into), ..Self::new(why, refusal.message) }
    }
}

/// The pauses of one PAUSE of several databases: undone together, unless all of them came about or one failed.
#[derive(Default)]
struct Pauses(Mutex<Vec<(Arc<Database>, PauseId)>>);

impl Pauses {
    fn complete(&self, database: &Arc<Database>, id: PauseId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((Arc::clone(database), id));
    }

    fn keep(self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Pauses {
    fn drop(&mut self) {
        for (database, id) in self.0.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            database.site.gate.open(id);
        }
    }
}

impl Admin for Operator {
    async fn pause(&self, by: &Visitor, scope: Scope) -> Result<(), Refusal> {
        let mut databases = self.databases_in(&scope)?;
        if scope == Scope::All {
            databases.retain(|database| !database.site.gate.is_shut());
            if databases.is_empty() {
                return Err(Refusal::new(Why::WrongState, "already suspended/paused"));
            }
        }
        let pauses = Pauses::default();
        let each = databases
            .iter()
            .map(|database| async { database.pause(by.to_string()).await.map(|id| pauses.complete(database, id)) });
        let outcomes = join_all(each).await;
        pauses.keep();
        outcomes.into_iter().collect::<Result<(), _>>().map_err(Into::into)
    }

    async fn pause_with(&self, by: &Visitor, pause: PauseWith) -> Result<(), Refusal> {
        let database = self.database(&pause.database)?;
        match pause.mode {
            Mode::All => database.pause_with(by.to_string(), pause).await?,
            Mode::Writes => database.pause_writes(by.to_string(), pause).await?,
        }
        Ok(())
    }

    async fn resume(&self, scope: Scope) -> Result<(), Refusal> {
        let mut databases = self.databases_in(&scope)?;
        if scope == Scope::All {
            databases.retain(|database| database.site.gate.is_paused());
            if databases.is_empty() {
                return Err(Refusal::new(Why::WrongState, "pooler is not paused/suspended"));
            }
        }
        // Each one, though an epoch may hold another.
        let outcomes: Vec<_> = databases.iter().map(|database| database.resume()).collect();
        outcomes.into_iter().collect::<Result<(), _>>().map_err(Into::into)
    }

    async fn resume_with(&self, resume: ResumeWith) -> Result<(), Refusal> {
        Ok(self.database(&resume.database)?.resume_with(resume.warrant).await?)
    }

    async fn switch(&self, switch: Switch) -> Result<(), Refusal> {
        Ok(self.database(&switch.database)?.switch(&switch).await?)
    }

    async fn renew(&self, renew: Renew) -> Result<(), Refusal> {
        Ok(self.database(&renew.database)?.renew(renew.claim, renew.lease)?)
    }

    async fn prepare(&self, prepare: PrepareSwitch) -> Result<Vec<PrepareRow>, Refusal> {
        let verdicts = self.database(&prepare.database)?.prepare(&prepare).await?;
        Ok(verdicts.iter().map(|(pool, verdict)| rows::prepared(pool, verdict)).collect())
    }

    async fn transplant(&self, transplant: Transplant) -> Result<Vec<TransplantRow>, Refusal> {
        let moved = self.database(&transplant.database)?.transplant(&transplant).await?;
        Ok(moved.iter().map(rows::transplanted).collect())
    }

    async fn reconnect(&self, scope: Scope) -> Result<(), Refusal> {
        let databases = self.databases_in(&scope)?;
        join_all(databases.iter().map(|database| database.reconnect())).await;
        Ok(())
    }

    async fn wait_close(&self, scope: Scope) -> Result<(), Refusal> {
        let databases = self.databases_in(&scope)?;
        let retired: Vec<Weak<Server>> = databases
            .iter()
            .flat_map(|database| database.site.retired())
            .map(|server| Arc::downgrade(&server))
            .collect();
        // Ended by the last transaction on them, by their sessions' end, or by the admin.
        while retired.iter().any(|server| server.strong_count() > 0) {
            tokio::time::sleep(CLOSE_LOOK).await;
        }
        Ok(())
    }

    async fn kill(&self, by: &Visitor, scope: Scope) -> Result<(), Refusal> {
        let databases = self.databases_in(&scope)?;
        join_all(databases.iter().map(|database| database.kill(by.to_string()))).await;
        Ok(())
    }

    async fn kill_client(&self, id: u64) -> Result<(), Refusal> {
        let client = self.door.process.clients.find(id);
        let client = client.ok_or_else(|| Refusal::new(Why::Unknown, format!("no such client: {id}")))?;
        client.order(Order::Kill);
        Ok(())
    }

    async fn set_admits(&self, database: &str, admits: YesNo) -> Result<(), Refusal> {
        self.database(database)?.set_admits(admits.into());
        Ok(())
    }

    async fn reload(&self) -> Result<(), Refusal> {
        reload::reload(&self.door).await.map_err(|reason| Refusal::new(Why::Failed, reason))
    }

    async fn set(&self, key: &str, value: &str) -> Result<(), Refusal> {
        // Ended by the RELOAD or SET before this one.
        let _alone = self.door.changing.lock().await;
        let config = settings::set(&self.door.process.config.load(), key, value)?;
        self.door.process.config.store(Arc::new(config));
        Ok(())
    }

    async fn shutdown(&self, how: Shutdown) -> Result<(), Refusal> {
        self.ending.send_replace(Some(how));
        Ok(())
    }

    async fn databases(&self) -> Vec<DatabaseRow> {
        let config = self.door.process.config.load_full();
        self.each(|database| [rows::database(database, &config)])
    }

    async fn pools(&self) -> Vec<PoolRow> {
        let config = self.door.process.config.load_full();
        self.each(|database| rows::pools(database, &config))
    }

    async fn clients(&self) -> Vec<SocketRow> {
        self.door.process.clients.all().iter().map(|client| rows::client(client)).collect()
    }

    async fn servers(&self) -> Vec<SocketRow> {
        self.each(rows::servers)
    }

    async fn users(&self) -> Vec<UserRow> {
        rows::users(&self.door)
    }

    async fn settings(&self) -> Vec<SettingRow> {
        settings::rows(&self.door.process.config.load())
    }

    async fn census(&self) -> Census {
        rows::census(&self.door)
    }

    async fn dns_hosts(&self) -> Vec<DnsRow> {
        rows::hosts(&rows::all(&self.door), &self.door.process.config.load())
    }

    async fn peers(&self) -> Vec<Peer> {
        rows::peers(&self.door.process.config.load())
    }

    async fn traffic(&self) -> Vec<DatabaseTraffic> {
        self.door.book.traffic(Instant::now())
    }

    async fn gates(&self) -> Vec<GateRow> {
        self.each(|database| [rows::gate(database)])
    }

    async fn backends(&self) -> Vec<BackendRow> {
        let config = self.door.process.config.load_full();
        self.each(|database| rows::backends(database, &config))
    }

    async fn sessions(&self) -> Vec<SessionRow> {
        let config = self.door.process.config.load_full();
        self.each(|database| {
            let policy = config.session_policy(database.name());
            database.clients().iter().map(|client| rows::session(client, policy)).collect::<Vec<_>>()
        })
    }

    async fn blockers(&self, scope: Scope) -> Result<Vec<BlockerRow>, Refusal> {
        let databases = self.databases_in(&scope)?;
        let found = join_all(databases.iter().map(|database| database.blockers())).await;
        Ok(found.iter().flatten().map(rows::blocker).collect())
    }

    async fn switches(&self) -> Vec<SwitchRow> {
        let of = |database: &Database| {
            let row = |switched| rows::switch(database, switched);
            database.switches().into_iter().map(row).collect::<Vec<_>>()
        };
        let mut rows = self.each(of);
        rows.sort_by_key(|row| row.at);
        rows
    }

    async fn pauses(&self) -> Vec<PauseRow> {
        let of = |database: &Database| {
            let row = |paused| rows::pause(database, paused);
            database.pauses().into_iter().map(row).collect::<Vec<_>>()
        };
        let mut rows = self.each(of);
        rows.sort_by_key(|row| row.at);
        rows
    }
}

/// The HTTP pages.
pub(super) struct Page {
    operator: Operator,
    readiness: watch::Sender<Readiness>,
}

impl Page {
    /// Not ready yet.
    pub(super) fn new(operator: Operator) -> Arc<Self> {
        Arc::new(Self { operator, readiness: watch::Sender::new(Readiness::Starting) })
    }

    /// Everything is up.
    pub(super) fn ready(&self) {
        self.readiness.send_replace(Readiness::Ready);
    }

    /// The process is ending.
    pub(super) fn draining(&self) {
        self.readiness.send_replace(Readiness::Draining);
    }
}

impl Pages for Page {
    async fn metrics(&self) -> String {
        let mut readings = console::readings(&self.operator).await;
        readings.extend(self.operator.door.process.events.readings());
        metrics::page(readings)
    }

    fn readiness(&self) -> Readiness {
        *self.readiness.borrow()
    }
}
