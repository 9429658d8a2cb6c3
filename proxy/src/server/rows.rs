//! What SHOW shows: snapshots of the running proxy as rows.
//!
//! Invariant: nothing here changes anything, and no lock is held over more than one record.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use pgcutover_api::command::Mode;
use pgcutover_api::rows::{
    BackendRow, BlockerReason, BlockerRow, Fate, GateRow, GateState, PauseRow, PoolMode, PrepareRow, Prospect,
    SessionRow, SessionState, SwitchHow, SwitchRow, TransplantRow, Verdict, YesNo,
};

use crate::client::{Client, Look, Server, State};
use crate::config;
use crate::config::{Backend, Config, SessionPolicy};
use crate::connection::Door;
use crate::console::{
    Census, ClientState, DatabaseRow, DnsRow, Forwards, Peer, PoolRow, ServerState, SocketRow, SocketState, UserRow,
};
use crate::database::{Blocker, Database, Moved, Paused, Switched, SwitchedBy, Transplanted};
use crate::message::Replication;
use crate::parameters;
use crate::pool;
use crate::pool::Pool;
use crate::relay::ShutSignal;
use crate::transplant::Reason;

/// Why it is not known whether a session could move.
const NOT_LOOKED_AT: &str = "session pooling: not looked at yet; PREPARE SWITCH does";

/// The databases, in the order of their names.
pub(super) fn all(door: &Door) -> Vec<Arc<Database>> {
    door.databases.load().values().cloned().collect()
}

pub(super) fn database(database: &Database, config: &Config) -> DatabaseRow {
    let active = database.site.route.active();
    let (general, settings) = (&config.general, config.databases.get(database.name()));
    let address = &active.endpoint.address;
    DatabaseRow {
        name: database.name().to_owned(),
        host: address.host.to_string(),
        port: address.port,
        dbname: text(&address.dbname),
        force_user: active.endpoint.forced.as_ref().map(|login| text(&login.user)),
        pool_size: settings.and_then(|s| s.pool_size).unwrap_or(general.default_pool_size),
        min_pool_size: general.min_pool_size,
        server_lifetime_s: u32::try_from(general.server_lifetime.as_secs()).unwrap_or(u32::MAX),
        pool_mode: settings.and_then(|s| s.pool_mode).map(mode),
        max_connections: settings.and_then(|s| s.max_db_connections).unwrap_or(general.max_db_connections),
        current_connections: database.site.connections.open(),
        max_client_connections: 0, // Clients are limited in all, not per database.
        current_client_connections: count(database.clients().len()),
        paused: database.site.gate.is_shut().into(),
        disabled: YesNo::from(!database.admits()),
    }
}

/// The pools of one database.
pub(super) fn pools(database: &Database, config: &Config) -> Vec<PoolRow> {
    let mut by_user: BTreeMap<Box<[u8]>, Vec<Arc<Client>>> = BTreeMap::new();
    for client in database.clients() {
        by_user.entry(client.who.user.clone()).or_default().push(client);
    }
    let row = |pool: Arc<Pool>| {
        let clients = by_user.remove(&pool.user).unwrap_or_default();
        pool_row(&pool, &clients, config.pool_mode(database.name(), &text(&pool.user)))
    };
    database.pools().into_iter().map(row).collect()
}

fn pool_row(pool: &Pool, clients: &[Arc<Client>], pool_mode: config::PoolMode) -> PoolRow {
    let waiting: Vec<&Arc<Client>> = clients.iter().filter(|client| is_waiting(client.state())).collect();
    let cancelled = clients.iter().filter_map(|client| client.linked()).filter(|server| server.is_being_cancelled());
    let counts = pool.counts();
    PoolRow {
        database: pool.site.database.to_string(),
        user: text(&pool.user),
        cl_active: count(clients.len() - waiting.len()),
        cl_waiting: count(waiting.len()),
        // The requests themselves come and go without being listed.
        cancels: Forwards { sv_being_canceled: count(cancelled.count()), ..Forwards::default() },
        sv_active: counts.open.saturating_sub(counts.idle).saturating_sub(counts.opening),
        sv_idle: counts.idle,
        sv_used: 0, // A connection is looked at whenever it is taken.
        sv_tested: 0,
        sv_login: counts.opening,
        maxwait: longest(waiting.into_iter()),
        pool_mode: mode(pool_mode),
    }
}

fn is_waiting(state: State) -> bool {
    match state {
        State::Held | State::Waiting => true,
        State::Idle | State::Active => false,
    }
}

/// For how long the first of them has been in its state.
fn longest<'a>(clients: impl Iterator<Item = &'a Arc<Client>>) -> Duration {
    clients.map(|client| client.state_since().elapsed()).max().unwrap_or_default()
}

pub(super) fn client(client: &Client) -> SocketRow {
    let (state, since) = (client.state(), client.state_since().elapsed());
    SocketRow {
        state: SocketState::Client(match state {
            State::Active => ClientState::Active,
            State::Idle => ClientState::Idle,
            State::Held | State::Waiting => ClientState::Waiting,
        }),
        id: client.who.id,
        link: client.linked().map(|server| server.id),
        user: Some(text(&client.who.user)),
        database: Some(client.who.database.to_string()),
        replication: client.who.replication,
        addr: client.who.addr,
        local_addr: client.who.local_addr,
        connect_time: client.connected_at,
        // Of a client at rest: when its last request was answered.
        request_time: SystemTime::now().checked_sub(since),
        wait: if is_waiting(state) { since } else { Duration::ZERO },
        close_needed: YesNo::No,
        remote_pid: 0,
        tls: client.who.tls.to_string(),
        application_name: client.application_name().to_string(),
        prepared_statements: count(client.prepared.load(Ordering::Relaxed)),
    }
}

/// The server connections of one database.
pub(super) fn servers(database: &Database) -> Vec<SocketRow> {
    let generation = database.site.route.generation();
    let clients = database.clients();
    let replication = |client: Option<u64>| {
        let client = clients.iter().find(|one| one.who.replicates() && Some(one.who.id) == client);
        client.map_or(Replication::No, |client| client.who.replication)
    };
    let row = |server: Arc<Server>| SocketRow {
        state: SocketState::Server(match linked(&server) {
            _ if server.is_being_cancelled() => ServerState::BeingCanceled,
            Some(_) => ServerState::Active,
            None => ServerState::Idle,
        }),
        id: server.id,
        link: linked(&server),
        user: Some(text(&server.user)),
        database: Some(server.database.to_string()),
        replication: replication(linked(&server)),
        addr: server.addr,
        local_addr: server.local_addr,
        connect_time: server.connected_at,
        request_time: None,
        wait: Duration::ZERO,
        close_needed: YesNo::from(server.generation.load(Ordering::Relaxed) < generation),
        remote_pid: server.pid,
        tls: if server.tls { "TLS".to_owned() } else { String::new() },
        application_name: String::new(),
        prepared_statements: count(server.prepared.load(Ordering::Relaxed)),
    };
    database.site.servers().into_iter().map(row).collect()
}

fn linked(server: &Server) -> Option<u64> {
    Some(server.client.load(Ordering::Relaxed)).filter(|id| *id != 0)
}

/// Users that are configured, in the user file, or connected.
pub(super) fn users(door: &Door) -> Vec<UserRow> {
    let config = door.process.config.load();
    let mut clients: BTreeMap<String, u32> = BTreeMap::new();
    for client in door.process.clients.all() {
        *clients.entry(text(&client.who.user)).or_default() += 1;
    }
    let servers: BTreeMap<String, u32> = {
        let open = door.process.user_connections.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        open.iter().map(|(user, tally)| (text(user), tally.open())).collect()
    };
    let mut names: BTreeSet<String> =
        config.users.keys().chain(clients.keys()).chain(servers.keys()).cloned().collect();
    names.extend(door.users.load().names().map(text));
    let row = |name: String| {
        let settings = config.users.get(&name);
        UserRow {
            pool_size: settings.and_then(|user| user.pool_size),
            pool_mode: settings.and_then(|user| user.pool_mode).map(mode),
            max_user_connections: settings
                .and_then(|user| user.max_user_connections)
                .unwrap_or(config.general.max_user_connections),
            current_connections: servers.get(&name).copied().unwrap_or_default(),
            current_client_connections: clients.get(&name).copied().unwrap_or_default(),
            name,
        }
    };
    names.into_iter().map(row).collect()
}

pub(super) fn census(door: &Door) -> Census {
    let databases = all(door);
    let inside = door.inside.load(Ordering::Relaxed);
    let config = door.process.config.load();
    Census {
        databases: count(databases.len()),
        users: count(users(door).len()),
        peers: count(config.peers.len()),
        pools: count(databases.iter().map(|database| database.pools().len()).sum()),
        free_clients: config.general.max_client_conn.saturating_sub(inside),
        used_clients: inside,
        login_clients: door.logging_in.load(Ordering::Relaxed),
        used_servers: databases.iter().map(|database| database.site.connections.open()).sum(),
        dns_names: count(hosts(&databases, &config).iter().map(|host| &host.hostname).collect::<BTreeSet<_>>().len()),
        dns_pending: count(databases.iter().map(|database| database.lookups_pending()).sum()),
    }
}

/// Answers for host names: one row each. Databases that share a name share the row while they have the same answer.
pub(super) fn hosts(databases: &[Arc<Database>], config: &Config) -> Vec<DnsRow> {
    let mut rows: BTreeMap<(String, String), u64> = BTreeMap::new();
    for known in databases.iter().flat_map(|database| database.known_names(config)) {
        let addrs: Vec<String> = known.addresses.iter().map(|address| address.ip().to_string()).collect();
        let ttl_s = rows.entry((known.host.to_string(), addrs.join(","))).or_insert(u64::MAX);
        *ttl_s = known.left.as_secs().min(*ttl_s);
    }
    rows.into_iter().map(|((hostname, addrs), ttl_s)| DnsRow { hostname, ttl_s, addrs }).collect()
}

pub(super) fn peers(config: &Config) -> Vec<Peer> {
    let row = |(id, peer): (&u16, &config::Peer)| Peer { peer_id: *id, host: peer.host.clone(), port: peer.port };
    config.peers.iter().map(row).collect()
}

pub(super) fn gate(database: &Database) -> GateRow {
    let gate = &database.site.gate;
    let active = database.site.route.active();
    // The pause first: once it is there its open transactions only get fewer.
    let (pause, mode) = match gate.pause() {
        Some(pause) => (Some(pause), Mode::All),
        None => (gate.writes(), Mode::Writes),
    };
    let open = if mode == Mode::Writes && pause.is_some() { gate.writers() } else { gate.passes() };
    let state = match (&pause, open) {
        (None, _) => GateState::Open,
        (Some(_), 0) => GateState::Paused,
        (Some(_), _) => GateState::Pausing,
    };
    let claim = pause.as_ref().and_then(|pause| pause.claim());
    let owner = pause.as_ref().map(|pause| claim.map_or_else(|| pause.owner.clone(), |claim| claim.run.to_string()));
    let left = |end: Instant| end.saturating_duration_since(Instant::now());
    let clients = database.clients();
    GateRow {
        database: database.name().to_owned(),
        state,
        owner: owner.unwrap_or_default(),
        run: claim.map(|claim| claim.run),
        epoch: claim.map(|claim| claim.epoch),
        mode: pause.as_ref().map(|_| mode),
        lease_ms: pause.and_then(|pause| pause.lease_ends).map(left),
        drained: YesNo::from(state == GateState::Paused),
        open_transactions: u32::try_from(open).unwrap_or(u32::MAX),
        held_clients: gate.held(),
        held_ms_max: longest(clients.iter().filter(|client| client.state() == State::Held)),
        backend: active.backend.to_string(),
        route_epoch: active.epoch,
        control: database.store_answers().into(),
    }
}

/// The declared backends of one database.
pub(super) fn backends(database: &Database, config: &Config) -> Vec<BackendRow> {
    let active = database.site.route.active();
    let servers = database.site.servers();
    let row = |(name, settings): (String, Backend)| {
        let here = || servers.iter().filter(|server| *server.backend == *name);
        let is_active = *active.backend == *name;
        let begun = database.site.begun_on(&name).load(Ordering::Relaxed);
        let identity = database.identity(&name);
        let version = identity.as_ref().map(|identity| version(identity.version_num));
        BackendRow {
            database: database.name().to_owned(),
            active: is_active.into(),
            configured: config.databases.get(database.name()).is_some_and(|d| d.active == name).into(),
            host: settings.host,
            port: settings.port,
            dbname: settings.dbname,
            user: settings.user.unwrap_or_default(),
            sslmode: settings.sslmode.as_str().to_owned(),
            connections: count(here().count()),
            idle: count(here().filter(|server| linked(server).is_none()).count()),
            prewarmed: count(here().filter(|server| server.is_parked()).count()),
            transactions: begun + here().map(|server| server.transactions()).sum::<u64>(),
            server_version: version.or_else(|| reported_version(database).filter(|_| is_active)).unwrap_or_default(),
            system_identifier: identity.as_ref().map(|i| i.system_identifier.to_string()).unwrap_or_default(),
            timeline: identity.and_then(|identity| identity.timeline),
            route_epoch: active.epoch,
            backend: name,
        }
    };
    database.backends().into_iter().map(row).collect()
}

/// 130023 is 13.23.
fn version(number: u32) -> String {
    format!("{}.{}", number / 10_000, number % 10_000)
}

/// What the active backend's server said at a login.
fn reported_version(database: &Database) -> Option<String> {
    let told = database.pools().iter().find_map(|pool| pool.welcome()).or_else(|| database.welcome())?;
    // Distributors add their own words after it.
    parameters::reported(&told, b"server_version").map(text).and_then(|said| said.split(' ').next().map(str::to_owned))
}

pub(super) fn session(client: &Client, policy: SessionPolicy) -> SessionRow {
    let (addr, port) = address(client);
    let (verdict, reason) = prospect(client, policy);
    SessionRow {
        database: client.who.database.to_string(),
        user: text(&client.who.user),
        client_id: client.who.id,
        addr,
        port,
        application_name: client.application_name().to_string(),
        pool_mode: mode(client.who.pool_mode),
        state: match client.state() {
            State::Idle => SessionState::Idle,
            State::Active => SessionState::Active,
            State::Held => SessionState::Held,
            State::Waiting => SessionState::Waiting,
        },
        linked: client.linked().map(|server| server.pid),
        movable: (verdict == Prospect::Moves).into(),
        reason,
        verdict,
    }
}

/// What a switch would do to a client, and why. One without a server of its own has nothing to move.
fn prospect(client: &Client, policy: SessionPolicy) -> (Prospect, String) {
    let keeps = client.who.pool_mode == config::PoolMode::Session && client.linked().is_some();
    let stays = match policy {
        SessionPolicy::Refuse => Prospect::Refuses,
        SessionPolicy::Wait => Prospect::Waits,
        SessionPolicy::Disconnect => Prospect::Leaves,
    };
    match client.look() {
        _ if client.who.replicates() => (stays, Reason::Replication.text().to_owned()),
        _ if !keeps => (Prospect::Moves, String::new()),
        Look::Movable => (Prospect::Moves, String::new()),
        Look::Stays(why) => (stays, why.into()),
        Look::Missed(why) => (Prospect::Unknown, why.into()),
        Look::None => (Prospect::Unknown, NOT_LOOKED_AT.to_owned()),
    }
}

pub(super) fn transplanted(moved: &Transplanted) -> TransplantRow {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    TransplantRow {
        client_id: moved.client.who.id,
        user: text(&moved.client.who.user),
        verdict: match moved.outcome {
            Moved::Copied => Fate::Moved,
            Moved::Leaves(_) => Fate::Leaves,
            Moved::Refused(_) => Fate::Refused,
        },
        reason: moved.outcome.why().to_owned(),
        probe_us: micros(moved.probe),
        restore_us: micros(moved.restore),
    }
}

pub(super) fn blocker(blocker: &Blocker) -> BlockerRow {
    let client = &blocker.client;
    let (addr, port) = address(client);
    let reason = match (blocker.in_transaction, blocker.waits_for) {
        _ if client.who.replicates() => BlockerReason::Replication,
        (false, _) => BlockerReason::SessionPooling,
        (true, Some((_, true))) => BlockerReason::WaitsForHeld,
        (true, Some((_, false)) | None) => BlockerReason::Transaction,
    };
    BlockerRow {
        database: client.who.database.to_string(),
        user: text(&client.who.user),
        client_id: client.who.id,
        addr,
        port,
        application_name: client.application_name().to_string(),
        pool_mode: mode(client.who.pool_mode),
        server_pid: blocker.pid,
        state: status(&blocker.activity.state, blocker.in_transaction).to_owned(),
        transaction_ms: if blocker.in_transaction { blocker.since } else { Duration::ZERO },
        query: blocker.activity.query.clone(),
        reason,
        waits_for: blocker.waits_for.map(|(pid, _)| pid),
    }
}

/// The status byte for pg_stat_activity's words; without them, what the proxy knows by itself.
fn status(activity: &str, in_transaction: bool) -> &'static str {
    match activity {
        "active" | "fastpath function call" => "active",
        "idle in transaction" => "T",
        "idle in transaction (aborted)" => "E",
        "idle" => "I",
        _ if in_transaction => "T",
        _ => "I",
    }
}

pub(super) fn switch(database: &Database, switched: Switched) -> SwitchRow {
    SwitchRow {
        database: database.name().to_owned(),
        at: switched.at,
        from_backend: switched.from,
        to_backend: switched.to,
        epoch: switched.epoch,
        run: switched.run,
        how: match switched.by {
            SwitchedBy::Decision => SwitchHow::Decision,
            SwitchedBy::Followed => SwitchHow::Followed,
            SwitchedBy::Force => SwitchHow::Force,
            SwitchedBy::Reload => SwitchHow::Reload,
        },
        held_clients: switched.held,
        pause_ms: switched.pause,
    }
}

pub(super) fn pause(database: &Database, paused: Paused) -> PauseRow {
    let felt = paused.holds.felt();
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    PauseRow {
        database: database.name().to_owned(),
        at: paused.at,
        owner: paused.claim.map_or(paused.owner, |claim| claim.run.to_string()),
        run: paused.claim.map(|claim| claim.run),
        epoch: paused.claim.map(|claim| claim.epoch),
        drain_ms: paused.drain,
        pause_ms: paused.pause,
        held_clients: paused.held,
        holds: felt.map_or(0, |felt| felt.count),
        held_us_p50: felt.map(|felt| micros(felt.p50)),
        held_us_max: felt.map(|felt| micros(felt.longest)),
    }
}

pub(super) fn prepared(pool: &Pool, verdict: &pool::Verdict) -> PrepareRow {
    let error = verdict.error.as_ref();
    let status = if verdict.open >= verdict.wanted {
        Verdict::In
    } else if verdict.is_refused() {
        Verdict::Refused
    } else {
        Verdict::Unknown
    };
    PrepareRow {
        user: text(&pool.user),
        wanted: count(verdict.wanted),
        open: count(verdict.open),
        status,
        sqlstate: error.and_then(|error| error.sqlstate).map(|state| state.as_str().to_owned()).unwrap_or_default(),
        message: error.map(|error| error.message.clone()).unwrap_or_default(),
    }
}

fn address(client: &Client) -> (String, u16) {
    client.who.addr.map_or(("unix".to_owned(), 0), |addr| (addr.ip().to_string(), addr.port()))
}

fn mode(mode: config::PoolMode) -> PoolMode {
    match mode {
        config::PoolMode::Session => PoolMode::Session,
        config::PoolMode::Transaction => PoolMode::Transaction,
    }
}

/// Names need not be UTF-8.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocker_has_a_status_byte_with_and_without_the_servers_words() {
        let shown =
            [("active", true), ("idle in transaction", true), ("idle in transaction (aborted)", true), ("idle", false)];
        assert_eq!(shown.map(|(words, open)| status(words, open)), ["active", "T", "E", "I"]);
        assert_eq!((status("", true), status("", false)), ("T", "I"));
    }

    #[test]
    fn a_version_reads_as_people_write_it() {
        assert_eq!((version(130_023), version(170_000)), ("13.23".to_owned(), "17.0".to_owned()));
    }
}
