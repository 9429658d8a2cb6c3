//! What the console asks of the rest of the proxy.
//!
//! Invariant: plain data both ways; no row borrows from a pool, no verb knows how it is written on the wire.

use std::borrow::Cow;
use std::future::Future;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use pgcutover_api::command::{PauseWith, PrepareSwitch, Renew, ResumeWith, Scope, Shutdown, Switch, Transplant};
use pgcutover_api::rows::{
    BackendRow, BlockerRow, GateRow, PauseRow, PoolMode, PrepareRow, SessionRow, SwitchRow, TransplantRow, YesNo,
};

use crate::message::Replication;
use crate::metrics::DatabaseTraffic;
use crate::report::{Blame, Report, SqlState};

/// The proxy as an operator sees it: verbs and snapshots.
///
/// Every verb is authorised, parsed and logged before it comes here. A future that is dropped before it is ready gives up
/// *waiting*; what a verb has done by then stays done, except where its comment says otherwise.
pub trait Admin: Send + Sync {
    /// `PAUSE [db]`: shut the gates and wait until no transaction is open; no deadline. Ready once drained.
    ///
    /// Each call waits for its own databases only. When somebody resumes one of them first the answer is
    /// [`Refusal::resumed`]. A gate that is already shut by another pause is an error, as in PgBouncer.
    ///
    /// *Dropped before it is ready* (Ctrl-C, or the admin hung up): the gates that this very call shut open again.
    fn pause(&self, by: &Visitor, scope: Scope) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `PAUSE db WITH (…)`: as [`Admin::pause`] with a lease and a drain deadline. At the deadline, by `on_timeout`:
    /// [`Refusal::not_drained`] with the gate open again, or the remaining transactions are cancelled or terminated.
    ///
    /// *Dropped before it is ready*: an unowned pause that this call began is undone. An epoch pause stays: the epoch has
    /// to be decided first, so it ends by RESUME or SWITCH of its run, or by its lease.
    fn pause_with(&self, by: &Visitor, pause: PauseWith) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `RESUME [db]`: end PgBouncer's kind of pause, also one that is still draining. An epoch pause is an error that
    /// names its owner; nothing to resume is one too.
    fn resume(&self, scope: Scope) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `RESUME db WITH (…)`.
    fn resume_with(&self, resume: ResumeWith) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `SWITCH db TO backend WITH (…)`.
    fn switch(&self, switch: Switch) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `RENEW db WITH (…)`.
    fn renew(&self, renew: Renew) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `PREPARE SWITCH db TO backend`: a row per user, whatever became of it; none for the active backend, which closes what
    /// was parked.
    ///
    /// *Dropped before it is ready*: connections under way are dropped, those parked stay parked.
    fn prepare(&self, prepare: PrepareSwitch) -> impl Future<Output = Result<Vec<PrepareRow>, Refusal>> + Send;

    /// `TRANSPLANT db TO backend WITH (…)`, under a drained pause: a row per session that keeps its server; all are moved
    /// or none. SWITCH then gives each client its copy, RESUME on the source closes the copies.
    ///
    /// *Dropped before it is ready*: the copies made so far are closed.
    fn transplant(&self, transplant: Transplant) -> impl Future<Output = Result<Vec<TransplantRow>, Refusal>> + Send;

    /// `RECONNECT [db]`: retire the server connections that exist now.
    fn reconnect(&self, scope: Scope) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `WAIT_CLOSE [db]`: ready once no retired connection is left of those that were retired when it was called.
    fn wait_close(&self, scope: Scope) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `KILL [db]`: drop clients and server connections at once; the databases are paused afterwards.
    fn kill(&self, by: &Visitor, scope: Scope) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `KILL_CLIENT id`.
    fn kill_client(&self, id: u64) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `DISABLE db` (`admits` = no) and `ENABLE db` (yes): whether new logins are admitted.
    fn set_admits(&self, database: &str, admits: YesNo) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `RELOAD`: whole or not at all; the message names file, key and reason.
    fn reload(&self) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `SET key = value`: until the next RELOAD.
    fn set(&self, key: &str, value: &str) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// `SHUTDOWN …`: begins it. The console's own connection is ended by its [`Visitor::closing`] token.
    fn shutdown(&self, how: Shutdown) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// Every database.
    fn databases(&self) -> impl Future<Output = Vec<DatabaseRow>> + Send;

    /// Every (database, user) pool.
    fn pools(&self) -> impl Future<Output = Vec<PoolRow>> + Send;

    /// Every client connection: logged in (also consoles), logging in, or sending a cancel request.
    fn clients(&self) -> impl Future<Output = Vec<SocketRow>> + Send;

    /// Every server connection.
    fn servers(&self) -> impl Future<Output = Vec<SocketRow>> + Send;

    /// Every user that is configured or connected.
    fn users(&self) -> impl Future<Output = Vec<UserRow>> + Send;

    /// Every configuration key.
    fn settings(&self) -> impl Future<Output = Vec<SettingRow>> + Send;

    /// How many of what SHOW LISTS counts.
    fn census(&self) -> impl Future<Output = Census> + Send;

    /// Every resolved host name.
    fn dns_hosts(&self) -> impl Future<Output = Vec<DnsRow>> + Send;

    /// The instances that cancel requests are forwarded to.
    fn peers(&self) -> impl Future<Output = Vec<Peer>> + Send;

    /// Totals and averages per database: [`crate::metrics::Book::traffic`].
    fn traffic(&self) -> impl Future<Output = Vec<DatabaseTraffic>> + Send;

    /// Every gate.
    fn gates(&self) -> impl Future<Output = Vec<GateRow>> + Send;

    /// Every declared backend.
    fn backends(&self) -> impl Future<Output = Vec<BackendRow>> + Send;

    /// Every client of a database, with what a switch can do with it.
    fn sessions(&self) -> impl Future<Output = Vec<SessionRow>> + Send;

    /// Who a drain waits for, or would wait for if it began now.
    ///
    /// # Errors
    /// [`Refusal::unknown`] for a database that is not there.
    fn blockers(&self, scope: Scope) -> impl Future<Output = Result<Vec<BlockerRow>, Refusal>> + Send;

    /// The switches since the start, the oldest first.
    fn switches(&self) -> impl Future<Output = Vec<SwitchRow>> + Send;

    /// The pauses that are over, the oldest first.
    fn pauses(&self) -> impl Future<Output = Vec<PauseRow>> + Send;
}

/// Who sits at a console.
#[derive(Debug, Clone)]
pub struct Visitor {
    /// The user as it logged in.
    pub user: String,
    /// From where; `None` over a Unix socket.
    pub addr: Option<SocketAddr>,
}

impl std::fmt::Display for Visitor {
    /// `user@address`, as SHOW GATES names an owner.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.addr {
            Some(addr) => write!(f, "{}@{addr}", self.user),
            None => write!(f, "{}@unix", self.user),
        }
    }
}

/// Why a verb did nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub why: Why,
    /// For people.
    pub message: Cow<'static, str>,
    /// More of the facts.
    pub detail: Option<Cow<'static, str>>,
    /// What to do instead.
    pub hint: Option<Cow<'static, str>>,
}

/// The kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// No database, backend, client or key of that name: 42704.
    Unknown,
    /// Not in this state, or not of this run or epoch: 55000.
    WrongState,
    /// Transactions were still open at the deadline: 55P03.
    NotDrained,
    /// The decision is not known yet or the store does not answer: 57P03.
    Undecided,
    /// Not in this version: 0A000.
    NotHere,
    /// It was tried and failed: F0000 for RELOAD, as in PgBouncer; else 55000.
    Failed,
}

impl Refusal {
    /// With no detail and no hint.
    pub fn new(why: Why, message: impl Into<Cow<'static, str>>) -> Self {
        Self { why, message: message.into(), detail: None, hint: None }
    }

    /// PgBouncer's words for a database that is not there.
    pub fn unknown_database(database: &str) -> Self {
        Self::new(Why::Unknown, format!("no such database: {database}"))
    }

    /// The answer to a PAUSE that somebody resumed while it waited.
    pub fn resumed(database: &str) -> Self {
        Self::new(Why::WrongState, format!("the pause of {database} was ended by RESUME before it was complete"))
    }

    /// The answer at the drain deadline with `on_timeout abort`.
    pub fn not_drained(database: &str, open_transactions: u32, drain: Duration) -> Self {
        let open = format!("{open_transactions} transactions of {database} were still open after {drain:?}");
        Self::new(Why::NotDrained, open).with_hint(format!("traffic goes on; SHOW BLOCKERS {database} says who"))
    }

    /// With facts.
    #[must_use]
    pub fn with_detail(self, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    /// With advice.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<Cow<'static, str>>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// As the ERROR that the admin reads.
    pub(super) fn into_report(self, sqlstate: SqlState) -> Report {
        let report = Report::error(sqlstate, self.message, Blame::Operator);
        Report { detail: self.detail, hint: self.hint, ..report }
    }
}

/// A row of SHOW DATABASES.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseRow {
    /// The route name.
    pub name: String,
    /// The active backend's host or socket directory.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The database's name there.
    pub dbname: String,
    /// The user that every client becomes.
    pub force_user: Option<String>,
    /// Server connections per user at most.
    pub pool_size: u32,
    /// Server connections kept open.
    pub min_pool_size: u32,
    /// Seconds.
    pub server_lifetime_s: u32,
    /// Set for this database, not inherited.
    pub pool_mode: Option<PoolMode>,
    /// Server connections at most, 0 for no limit.
    pub max_connections: u32,
    /// Server connections.
    pub current_connections: u32,
    /// Clients at most, 0 for no limit.
    pub max_client_connections: u32,
    /// Clients.
    pub current_client_connections: u32,
    /// Whether its gate is shut.
    pub paused: YesNo,
    /// Whether DISABLE refuses logins.
    pub disabled: YesNo,
}

/// A row of SHOW POOLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRow {
    /// The route name.
    pub database: String,
    /// The user.
    pub user: String,
    /// Clients linked to a server, or at rest.
    pub cl_active: u32,
    /// Clients that wait for a server or for the gate.
    pub cl_waiting: u32,
    /// Cancel requests by whether they are on their way or wait to be, and what they do to servers.
    pub cancels: Forwards,
    /// Servers linked to a client.
    pub sv_active: u32,
    /// Servers at rest.
    pub sv_idle: u32,
    /// Servers to be checked before use.
    pub sv_used: u32,
    /// Servers being reset or checked.
    pub sv_tested: u32,
    /// Servers logging in.
    pub sv_login: u32,
    /// For how long the first waiting client has waited.
    pub maxwait: Duration,
    /// How it pools.
    pub pool_mode: PoolMode,
}

/// Cancel requests of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Forwards {
    /// Sent to the server, not answered yet.
    pub cl_active: u32,
    /// Not sent yet.
    pub cl_waiting: u32,
    /// Server connections that carry one.
    pub sv_active: u32,
    /// Servers that a cancel is under way to.
    pub sv_being_canceled: u32,
}

/// A row of SHOW CLIENTS, SERVERS or SOCKETS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketRow {
    /// What it is and does.
    pub state: SocketState,
    /// The `id` that KILL_CLIENT takes; unique among clients and servers.
    pub id: u64,
    /// The id of the one it is linked to.
    pub link: Option<u64>,
    /// The user; `None` before the Startup.
    pub user: Option<String>,
    /// The route name; `None` before the Startup.
    pub database: Option<String>,
    /// Whether it is for replication.
    pub replication: Replication,
    /// The peer's address; `None` for a Unix socket.
    pub addr: Option<SocketAddr>,
    /// Ours; `None` for a Unix socket.
    pub local_addr: Option<SocketAddr>,
    /// When it connected.
    pub connect_time: SystemTime,
    /// When its last request came; `None` for none yet.
    pub request_time: Option<SystemTime>,
    /// For how long it has waited; zero if it does not.
    pub wait: Duration,
    /// Whether it closes when next at rest.
    pub close_needed: YesNo,
    /// The process behind it: the server's, or the peer's over a Unix socket; 0 if unknown.
    pub remote_pid: i32,
    /// Protocol version and cipher; empty without TLS.
    pub tls: String,
    /// As the client set it.
    pub application_name: String,
    /// Named statements it has.
    pub prepared_statements: u32,
}

/// What a socket is and does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketState {
    /// A client that is logging in.
    Login(LoginState),
    /// A client.
    Client(ClientState),
    /// A server connection.
    Server(ServerState),
}

/// A client before its welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginState {
    /// Its password is checked.
    Authenticating,
    /// It waits for the parameters of its welcome.
    Waiting,
}

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientState {
    /// Linked to a server.
    Active,
    /// At rest.
    Idle,
    /// Waits for a server or for the gate.
    Waiting,
    /// Its cancel request is on the way.
    ActiveCancelReq,
    /// Its cancel request waits for a connection.
    WaitingCancelReq,
}

/// What a server connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerState {
    /// Linked to a client.
    Active,
    /// At rest.
    Idle,
    /// At rest for so long that it is checked before use.
    Used,
    /// Being reset or checked.
    Tested,
    /// Logging in.
    New,
    /// Carries a cancel request.
    ActiveCancel,
    /// A cancel for it is under way.
    BeingCanceled,
}

/// A row of SHOW USERS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRow {
    /// The user.
    pub name: String,
    /// Set for this user, not inherited.
    pub pool_size: Option<u32>,
    /// Set for this user, not inherited.
    pub pool_mode: Option<PoolMode>,
    /// Server connections at most, 0 for no limit.
    pub max_user_connections: u32,
    /// Server connections.
    pub current_connections: u32,
    /// Clients.
    pub current_client_connections: u32,
}

/// A row of SHOW CONFIG.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingRow {
    /// The key.
    pub key: String,
    /// What it is; never a password.
    pub value: String,
    /// What it is when nobody sets it.
    pub default: String,
    /// Whether SET or RELOAD can change it.
    pub changeable: YesNo,
}

/// The figures of SHOW LISTS that exist here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Census {
    /// Databases.
    pub databases: u32,
    /// Users.
    pub users: u32,
    /// Peers.
    pub peers: u32,
    /// Pools.
    pub pools: u32,
    /// How many more clients are admitted.
    pub free_clients: u32,
    /// Clients, also those logging in.
    pub used_clients: u32,
    /// Clients logging in.
    pub login_clients: u32,
    /// Server connections.
    pub used_servers: u32,
    /// Resolved host names.
    pub dns_names: u32,
    /// Lookups under way.
    pub dns_pending: u32,
}

/// A row of SHOW DNS_HOSTS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsRow {
    /// The name.
    pub hostname: String,
    /// Seconds until it is looked up again.
    pub ttl_s: u64,
    /// The addresses of the answer, separated by commas.
    pub addrs: String,
}

/// A row of SHOW PEERS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// As in cancel keys.
    pub peer_id: u16,
    /// Where it listens.
    pub host: String,
    /// Its port.
    pub port: u16,
}
