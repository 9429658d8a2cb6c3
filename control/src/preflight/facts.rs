//! What preflight has to know, and how it is asked.
//!
//! Invariant: a right is proved by using it, in a transaction that is rolled back; never by reading a list of rights alone.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgcutover_api::store::{Gate, Identity, Member, Name};

use crate::clusters::{
    BadCell, Cells, Cluster, ClusterError, Clusters, PreparedTransaction, PublishedTable, Sequence, SlotState,
    Subscription, TableFacts, TableState, way_back,
};
use crate::config::members::{Address, Unlisted};
use crate::config::{Change, Replication};
use crate::preflight::attempts::{Attempt, attempts, tried};
use crate::preflight::definitions;
use crate::preflight::definitions::Definitions;
use crate::preflight::standby;
use crate::preflight::standby::StandbyFacts;
use crate::preflight::types;
use crate::preflight::types::Types;

/// What the caller wants to know, and what it knows already.
#[derive(Debug, Clone)]
pub struct Inquiry {
    /// The route.
    pub db: Name,
    /// How changes get to the target.
    pub replication: Replication,
    /// How the source will reach the target for the way back, if there is to be one; libpq's words.
    pub reverse_dsn: Option<String>,
    /// What the proxies said.
    pub proxies: Vec<ProxyFacts>,
    /// What PgBouncers said.
    pub bouncers: Vec<BouncerFacts>,
    /// What counts as too much.
    pub limits: Limits,
    /// How long one question may take.
    pub limit: Duration,
}

/// What counts as too much, from the configuration.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Replication lag, bytes of WAL.
    pub lag_bytes_max: u64,
    /// Age of the oldest transaction.
    pub transaction_age_max: Duration,
    /// The gap for sequences.
    pub gap: u32,
    /// Whether a slot for the way back will be made.
    pub way_back: bool,
    /// The proxies' control login.
    pub proxy_role: String,
    /// The backend that has to be active on every proxy.
    pub source_backend: String,
    /// Whether types may have other numbers on the target.
    pub oid_change: Change,
    /// Whether columns may have another order or other types there.
    pub column_change: Change,
    /// What becomes of proxies that nobody listed.
    pub unlisted: Unlisted,
}

/// One proxy, as its console describes it; the caller asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyFacts {
    /// Its name in our configuration.
    pub name: String,
    /// Its instance name, if it said so.
    pub instance: Option<String>,
    /// How it was found.
    pub origin: String,
    /// SHOW GATES: whether it can read and record decisions.
    pub control: Control,
    /// SHOW SESSIONS: the application names of its clients.
    pub applications: Vec<String>,
    /// SHOW SERVERS: the server processes (`remote_pid`) of its connections to the source.
    pub server_pids: Vec<i32>,
    /// SHOW BACKENDS.
    pub backends: Vec<ProxyBackend>,
    /// PREPARE SWITCH: who was let in on the target.
    pub logins: Vec<LoginVerdict>,
}

/// One PgBouncer, as its console describes it; the caller asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BouncerFacts {
    /// Its name in our configuration.
    pub name: String,
    /// SHOW DATABASES: where the database points; or why that is not known.
    pub points_at: Result<Address, String>,
    /// Where it has to point.
    pub source: Address,
    /// How it pools the database's clients.
    pub pool_mode: String,
    /// SHOW SERVERS: the server processes of its connections to the source.
    pub server_pids: Vec<i32>,
    /// Who ends a hold if we die.
    pub watched: Watched,
}

/// Who keeps a PgBouncer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watched {
    /// A process of its own, which has enrolled.
    ByItsKeeper,
    /// The run itself: nobody if it dies.
    ByThisRun,
    /// Nobody.
    ByNobody,
}

/// Whether a proxy has a control login for the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// It has.
    Given,
    /// It has not: it could not follow a decision by itself.
    Missing,
}

/// One backend of a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyBackend {
    /// Its name.
    pub name: String,
    /// Whether it is the active one.
    pub is_active: bool,
    /// The server behind it, if the proxy has asked it.
    pub system_identifier: Option<u64>,
}

/// Whether a user of a proxy's clients could log in to the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginVerdict {
    /// The user.
    pub user: String,
    /// What happened.
    pub verdict: Verdict,
}

/// What the target said to a login through the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It was let in.
    In,
    /// It was refused, with the server's words.
    Refused(String),
    /// Nobody has tried.
    Unknown,
}

/// Everything that is judged.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The route.
    pub db: Name,
    /// The server that loses its clients.
    pub source: ClusterFacts,
    /// The server that gains them.
    pub target: ClusterFacts,
    /// What lies between them; nothing where that is the write-ahead log.
    pub replication: ReplicationFacts,
    /// The target as a physical standby; none where it is a server of its own.
    pub standby: Option<StandbyFacts>,
    /// The proxies we know.
    pub proxies: Vec<ProxyFacts>,
    /// The PgBouncers we know.
    pub bouncers: Vec<BouncerFacts>,
    /// The proxies that enrolled themselves on the source.
    pub members: Vec<Member>,
    /// What counts as too much.
    pub limits: Limits,
}

/// Replication as both sides see it.
#[derive(Debug, Clone, Default)]
pub struct ReplicationFacts {
    /// On the target.
    pub subscriptions: Vec<Subscription>,
    /// Names that the configuration asks for and the target lacks.
    pub missing: Vec<String>,
    /// On the target.
    pub states: Vec<TableState>,
    /// On the source.
    pub published: Vec<PublishedTable>,
    /// On the source.
    pub slots: Vec<SlotState>,
    /// Publications of the source whose owner's rights our login lacks.
    pub publications_of_others: Vec<String>,
    /// Subscriptions of the target whose owner's rights our login lacks.
    pub subscriptions_of_others: Vec<String>,
}

/// One server.
#[derive(Debug, Clone)]
pub struct ClusterFacts {
    /// Which server it is.
    pub identity: Identity,
    /// The server's own name of the database.
    pub database: String,
    /// Our login on it.
    pub login: String,
    /// `wal_level`.
    pub wal_level: String,
    /// `synchronous_standby_names`.
    pub synchronous_standby_names: String,
    /// `max_replication_slots`.
    pub slots_max: u32,
    /// Slots that exist.
    pub slots_used: u32,
    /// Large objects of the database.
    pub large_objects: u64,
    /// Its clock less ours, ms.
    pub clock_ahead_ms: i64,
    /// The user's tables.
    pub tables: Vec<TableFacts>,
    /// The user's sequences.
    pub sequences: Vec<Sequence>,
    /// Foreign tables.
    pub foreign_tables: Vec<String>,
    /// Materialized views.
    pub materialized_views: Vec<String>,
    /// Triggers that fire in apply workers too, as `schema.table trigger`.
    pub replica_triggers: Vec<String>,
    /// Functions that read numbers of this one server: process ids, transaction ids, log positions, snapshots.
    pub server_bound: Vec<String>,
    /// Sessions of the database.
    pub sessions: Vec<Session>,
    /// Prepared transactions of the database.
    pub prepared: Vec<PreparedTransaction>,
    /// The roles that may log in to the database.
    pub logins: Vec<LoginRole>,
    /// Whether their verifiers could be read.
    pub verifiers: Verifiers,
    /// Types that clients may know by number.
    pub types: Types,
    /// What the user's tables consist of.
    pub definitions: Definitions,
    /// The decision store, if it is there.
    pub store: Option<StoreFacts>,
    /// What was tried.
    pub attempts: Vec<Attempt>,
}

/// One session of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Its server process.
    pub pid: i32,
    /// Its user.
    pub user: String,
    /// Its application name, if our login may see it.
    pub application: Option<String>,
    /// Its address; none for a Unix socket.
    pub address: Option<String>,
    /// `client backend`, `walsender` …; none if our login may not see it.
    pub backend_type: Option<String>,
    /// Age of its transaction, ms; none outside a transaction.
    pub transaction_age_ms: Option<i64>,
}

/// A role that may log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginRole {
    /// Its name.
    pub name: String,
    /// `pg_authid.rolpassword`; none if there is none, or if it could not be read.
    pub verifier: Option<String>,
    /// Whether it is a superuser or a replication login: one that applications hardly use.
    pub is_administrative: bool,
}

/// Whether `pg_authid` could be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verifiers {
    /// Yes.
    Read,
    /// No.
    Hidden,
}

/// The decision store as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreFacts {
    /// Its owner, in whose name the gates act.
    pub owner: String,
    /// The missing part, if the owner lacks pg_read_all_stats or our login lacks the owner's rights.
    pub lacks: Option<String>,
    /// Its gates.
    pub gates: Vec<Gate>,
}

/// Asks both servers. Each question has the inquiry's limit; an absent server is an error.
pub async fn gather(clusters: &Clusters, inquiry: &Inquiry) -> Result<Facts, ClusterError> {
    let limit = inquiry.limit;
    let (mut source, mut target, between) = tokio::try_join!(
        cluster(&clusters.source, inquiry),
        cluster(&clusters.target, inquiry),
        between(clusters, inquiry)
    )?;
    let (replication, standby) = between;
    if let Some(conninfo) = &inquiry.reverse_dsn {
        source.attempts.push(tried("subscribe", clusters.source.try_subscribe(&inquiry.db, conninfo, limit).await)?);
        for forward in &replication.subscriptions {
            target.attempts.push(tried("detach", clusters.target.try_disable(&forward.name, limit).await)?);
        }
    }
    // Without the owner's rights there is nothing to read; that is a finding already.
    let ours = source.store.as_ref().is_some_and(|store| store.lacks.is_none());
    let members = if ours { clusters.source.members(&inquiry.db, limit).await? } else { Vec::new() };
    Ok(Facts {
        db: inquiry.db.clone(),
        source,
        target,
        replication,
        standby,
        proxies: inquiry.proxies.clone(),
        bouncers: inquiry.bouncers.clone(),
        members,
        limits: inquiry.limits.clone(),
    })
}

async fn between(
    clusters: &Clusters,
    inquiry: &Inquiry,
) -> Result<(ReplicationFacts, Option<StandbyFacts>), ClusterError> {
    match &inquiry.replication {
        Replication::Logical { subscriptions } => Ok((replication(clusters, inquiry, subscriptions).await?, None)),
        Replication::Physical => {
            Ok((ReplicationFacts::default(), Some(standby::gather(clusters, inquiry.limit).await?)))
        }
    }
}

async fn replication(
    clusters: &Clusters,
    inquiry: &Inquiry,
    named: &[String],
) -> Result<ReplicationFacts, ClusterError> {
    let limit = inquiry.limit;
    let subscriptions = clusters.target.subscriptions(&inquiry.db, named, limit).await?;
    let there = |name: &String| subscriptions.iter().any(|s| s.name == *name);
    let ours = subscriptions.iter().any(|s| way_back::epoch_of(&inquiry.db, &s.name).is_some());
    let missing = named.iter().filter(|name| !ours && !there(name)).cloned().collect();
    let states = clusters.target.table_states(&subscriptions, limit).await?;
    let published = clusters.source.published(&subscriptions, limit).await?;
    let slots = clusters.source.slots(&subscriptions, limit).await?;
    let name = |row: &Cells<'_>| row.text("name");
    let publications_of_others = clusters.source.list("publications", PUBLICATIONS_OF_OTHERS, limit, name).await?;
    let subscriptions_of_others = clusters.target.list("subscriptions", SUBSCRIPTIONS_OF_OTHERS, limit, name).await?;
    Ok(ReplicationFacts {
        subscriptions,
        missing,
        states,
        published,
        slots,
        publications_of_others,
        subscriptions_of_others,
    })
}

const PUBLICATIONS_OF_OTHERS: &str =
    "SELECT p.pubname AS name FROM pg_publication p WHERE NOT pg_has_role(p.pubowner, 'USAGE') ORDER BY 1";
const SUBSCRIPTIONS_OF_OTHERS: &str = "SELECT s.subname AS name FROM pg_subscription s \
    WHERE s.subdbid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) \
      AND NOT pg_has_role(s.subowner, 'USAGE') ORDER BY 1";

async fn cluster(cluster: &Cluster, inquiry: &Inquiry) -> Result<ClusterFacts, ClusterError> {
    let limit = inquiry.limit;
    let identity = cluster.identity(limit).await?;
    let basics = basics(cluster, limit).await?;
    let (logins, verifiers) = logins(cluster, limit).await?;
    Ok(ClusterFacts {
        identity,
        database: basics.database,
        login: basics.login,
        wal_level: basics.wal_level,
        synchronous_standby_names: basics.synchronous_standby_names,
        slots_max: basics.slots_max,
        slots_used: basics.slots_used,
        large_objects: basics.large_objects,
        clock_ahead_ms: basics.clock_ahead_ms,
        tables: cluster.tables(&inquiry.db, limit).await?,
        sequences: cluster.sequences(limit).await?,
        foreign_tables: relations(cluster, 'f', limit).await?,
        materialized_views: relations(cluster, 'm', limit).await?,
        replica_triggers: cluster.list("triggers", REPLICA_TRIGGERS, limit, |row| row.text("name")).await?,
        server_bound: cluster.list("functions", SERVER_BOUND, limit, |row| row.text("name")).await?,
        sessions: cluster.list("sessions", SESSIONS, limit, session).await?,
        prepared: cluster.prepared_transactions(limit).await?,
        logins,
        verifiers,
        types: types::of(cluster, limit).await?,
        definitions: definitions::of(cluster, limit).await?,
        store: store(cluster, limit).await?,
        attempts: attempts(cluster, inquiry).await?,
    })
}

const BASICS: &str = "SELECT current_database() AS database, session_user AS login, \
      current_setting('wal_level') AS wal_level, current_setting('synchronous_standby_names') AS standbys, \
      current_setting('max_replication_slots') AS slots_max, (SELECT count(*) FROM pg_replication_slots) AS slots_used, \
      (SELECT count(*) FROM pg_largeobject_metadata) AS large_objects, \
      (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now_ms";

struct Basics {
    database: String,
    login: String,
    wal_level: String,
    synchronous_standby_names: String,
    slots_max: u32,
    slots_used: u32,
    large_objects: u64,
    clock_ahead_ms: i64,
}

async fn basics(cluster: &Cluster, limit: Duration) -> Result<Basics, ClusterError> {
    let before_ms = now_ms();
    let mut rows = cluster.list("settings", BASICS, limit, basics_row).await?;
    // The server read its clock about half-way.
    let here_ms = before_ms + (now_ms() - before_ms) / 2;
    let mut basics = rows.pop().ok_or_else(|| ClusterError::Answer {
        role: cluster.role(),
        what: "settings",
        problem: "no row came".to_owned(),
    })?;
    basics.clock_ahead_ms -= here_ms;
    Ok(basics)
}

fn basics_row(row: &Cells<'_>) -> Result<Basics, BadCell> {
    Ok(Basics {
        database: row.text("database")?,
        login: row.text("login")?,
        wal_level: row.text("wal_level")?,
        synchronous_standby_names: row.text("standbys")?,
        slots_max: row.number("slots_max")?,
        slots_used: row.number("slots_used")?,
        large_objects: row.number("large_objects")?,
        clock_ahead_ms: row.number("now_ms")?,
    })
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

const REPLICA_TRIGGERS: &str = "SELECT n.nspname || '.' || c.relname || ' ' || t.tgname AS name FROM pg_trigger t \
    JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE t.tgenabled IN ('A', 'R') AND NOT t.tgisinternal AND t.tgname NOT IN ('pgcutover_gate', 'pgcutover_local') ORDER BY 1";

/// Whether they keep what they read is not to be seen; extensions know what they do.
const SERVER_BOUND: &str = "SELECT p.oid::regprocedure::text AS name FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
    WHERE n.nspname !~ '^(pg_|information_schema$|pgcutover$)' \
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e') \
      AND p.prosrc ~* '(pg_backend_pid|txid_current|pg_current_xact_id|pg_current_wal|pg_export_snapshot|pg_current_snapshot)' \
    ORDER BY 1";

const SESSIONS: &str = "SELECT a.pid, coalesce(a.usename, '') AS usename, a.application_name, host(a.client_addr) AS client_addr, \
      a.backend_type, (extract(epoch FROM clock_timestamp() - a.xact_start) * 1000)::bigint AS age_ms \
    FROM pg_stat_activity a WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() ORDER BY a.pid";

async fn relations(cluster: &Cluster, kind: char, limit: Duration) -> Result<Vec<String>, ClusterError> {
    let sql = format!(
        "SELECT n.nspname || '.' || c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind = '{kind}' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1"
    );
    cluster.list("relations", &sql, limit, |row| row.text("name")).await
}

fn session(row: &Cells<'_>) -> Result<Session, BadCell> {
    Ok(Session {
        pid: row.number("pid")?,
        user: row.text("usename")?,
        application: row.maybe_text("application_name"),
        address: row.maybe_text("client_addr"),
        backend_type: row.maybe_text("backend_type"),
        transaction_age_ms: row.maybe_number("age_ms")?,
    })
}

async fn logins(cluster: &Cluster, limit: Duration) -> Result<(Vec<LoginRole>, Verifiers), ClusterError> {
    const READABLE: &str = "SELECT has_column_privilege('pg_authid', 'rolname', 'SELECT') \
        AND has_column_privilege('pg_authid', 'rolpassword', 'SELECT') AS readable";
    let readable = cluster.list("rights on pg_authid", READABLE, limit, |row| row.flag("readable")).await?;
    let (verifier, from, verifiers) = if readable == [true] {
        ("a.rolpassword", "JOIN pg_authid a ON a.rolname = r.rolname", Verifiers::Read)
    } else {
        ("NULL", "", Verifiers::Hidden)
    };
    let sql = format!(
        "SELECT r.rolname, {verifier} AS verifier, r.rolsuper OR r.rolreplication AS administrative FROM pg_roles r {from} \
         WHERE r.rolcanlogin AND has_database_privilege(r.rolname, current_database(), 'CONNECT') ORDER BY 1"
    );
    let logins = cluster.list("logins", &sql, limit, |row| {
        Ok(LoginRole {
            name: row.text("rolname")?,
            verifier: row.maybe_text("verifier"),
            is_administrative: row.flag("administrative")?,
        })
    });
    Ok((logins.await?, verifiers))
}

async fn store(cluster: &Cluster, limit: Duration) -> Result<Option<StoreFacts>, ClusterError> {
    const OWNER: &str = "SELECT pg_get_userbyid(c.relowner) AS owner, pg_has_role(c.relowner, 'USAGE') AS ours, \
          (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = c.relowner) \
            OR pg_has_role(c.relowner, 'pg_read_all_stats', 'USAGE') AS reads \
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'pgcutover' AND c.relname = 'state'";
    if !cluster.installed(limit).await? {
        return Ok(None);
    }
    let rows = cluster.list("owner of the store", OWNER, limit, |row| {
        let owner = row.text("owner")?;
        let lacks = match (row.flag("ours")?, row.flag("reads")?) {
            (false, _) => Some(format!("our login has not the rights of its owner {owner}")),
            (true, false) => {
                Some(format!("its owner {owner} has not pg_read_all_stats: its gates would stop apply workers"))
            }
            (true, true) => None,
        };
        Ok((owner, lacks))
    });
    let Some((owner, lacks)) = rows.await?.pop() else { return Ok(None) };
    // The gates view belongs to the owner too; without its rights there is nothing more to see.
    let gates = if lacks.is_none() { cluster.gates(limit).await? } else { Vec::new() };
    Ok(Some(StoreFacts { owner, lacks, gates }))
}
