//! PgBouncer's SHOW tables, with PgBouncer 1.25's columns and types.
//!
//! Invariant: each row has as many cells as its table has columns. Source: PgBouncer 1.25, usage.md and the type letters of
//! its console: s text, i int4, q int8, N numeric, T a moment as text.

use std::net::SocketAddr;
use std::time::SystemTime;

use pgcutover_api::command::{DriverSetting, Table};
use pgcutover_api::rows::{Column, GateState, Kind, PoolMode, Row, YesNo};

use super::admin::{
    Admin, Census, ClientState, DatabaseRow, PoolRow, ServerState, SettingRow, SocketRow, SocketState, UserRow,
};
use crate::metrics::{DatabaseTraffic, Traffic};

/// A table as it goes on the wire.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sheet {
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Vec<Option<String>>>,
}

impl Sheet {
    /// Of rows of our own.
    pub(super) fn of<R: Row>(rows: &[R]) -> Self {
        Self { columns: R::COLUMNS.to_vec(), rows: rows.iter().map(Row::to_text).collect() }
    }

    /// Of PgBouncer's type letters and names.
    fn new(letters: &str, names: &[&'static str], rows: impl IntoIterator<Item = Vec<Option<String>>>) -> Self {
        let columns = letters.chars().zip(names).map(|(letter, &name)| Column { name, kind: kind(letter) });
        Self { columns: columns.collect(), rows: rows.into_iter().collect() }
    }
}

fn kind(letter: char) -> Kind {
    match letter {
        'i' => Kind::Int4,
        'q' => Kind::Int8,
        'N' => Kind::Numeric,
        // s, T
        _ => Kind::Text,
    }
}

/// Any SHOW table without an argument.
pub(super) async fn table<A: Admin>(table: Table, admin: &A) -> Sheet {
    match table {
        Table::Version => Sheet::new("s", &["version"], [vec![text(VERSION)]]),
        Table::State => state(admin).await,
        Table::Databases => databases(&admin.databases().await),
        Table::Pools => pools(&admin.pools().await),
        Table::PeerPools => Sheet::new("iiiii", PEER_POOLS, []),
        Table::Peers => peers(admin).await,
        Table::Clients => clients(&admin.clients().await),
        Table::Servers => servers(&admin.servers().await),
        Table::Sockets => sockets(&all_sockets(admin).await),
        Table::ActiveSockets => sockets(&busy(all_sockets(admin).await)),
        Table::Users => users(&admin.users().await),
        Table::Lists => lists(admin.census().await),
        Table::Config => config(&admin.settings().await),
        Table::Stats => stats(&admin.traffic().await),
        Table::StatsTotals => stats_totals(&admin.traffic().await),
        Table::StatsAverages => stats_averages(&admin.traffic().await),
        Table::Totals => totals(&admin.traffic().await),
        Table::Mem => Sheet::new("siiii", &["name", "size", "used", "free", "memtotal"], []),
        Table::DnsHosts => dns_hosts(admin).await,
        Table::DnsZones => Sheet::new("sqi", &["zonename", "serial", "count"], []),
        Table::Gates => Sheet::of(&admin.gates().await),
        Table::Backends => Sheet::of(&admin.backends().await),
        Table::Sessions => Sheet::of(&admin.sessions().await),
        Table::Switches => Sheet::of(&admin.switches().await),
        // Answered with a notice and with a refusal.
        Table::Help | Table::Fds => Sheet::new("", &[], []),
    }
}

/// Ours first; tools that look for PgBouncer's name and version to know the columns find those, too.
const VERSION: &str = concat!("pgcutover ", env!("CARGO_PKG_VERSION"), " (console of PgBouncer 1.25.0)");

/// A setting that a driver asks for.
pub(super) fn setting(setting: DriverSetting) -> Sheet {
    let value = match setting {
        DriverSetting::ClientEncoding => "UTF-8",
        DriverSetting::DefaultTransactionIsolation => "read committed",
        DriverSetting::StandardConformingStrings => "on",
        DriverSetting::DateStyle => "ISO",
        DriverSetting::TimeZone => "GMT",
        DriverSetting::ExtraFloatDigits => "2",
    };
    Sheet::new("s", &[setting.word()], [vec![text(value)]])
}

fn text(value: impl Into<String>) -> Option<String> {
    Some(value.into())
}

fn number(value: impl ToString) -> Option<String> {
    Some(value.to_string())
}

/// An int4 that a count may not overflow.
fn count(value: u32) -> Option<String> {
    number(value.min(i32::MAX.unsigned_abs()))
}

fn flag(answer: YesNo) -> Option<String> {
    number(u8::from(answer == YesNo::Yes))
}

fn mode(mode: Option<PoolMode>) -> Option<String> {
    mode.map(|mode| mode.word().to_owned())
}

/// PgBouncer's three rows. Paused means: every database is. One of several is seen in SHOW DATABASES and SHOW GATES.
async fn state<A: Admin>(admin: &A) -> Sheet {
    let gates = admin.gates().await;
    let paused = !gates.is_empty() && gates.iter().all(|gate| gate.state != GateState::Open);
    let row = |key: &str, is_so: bool| vec![text(key), text(YesNo::from(is_so).word())];
    let rows = [row("active", !paused), row("paused", paused), row("suspended", false)];
    Sheet::new("ss", &["key", "value"], rows)
}

const DATABASES: &[&str] = &[
    "name",
    "host",
    "port",
    "database",
    "force_user",
    "pool_size",
    "min_pool_size",
    "reserve_pool_size",
    "server_lifetime",
    "pool_mode",
    "load_balance_hosts",
    "max_connections",
    "current_connections",
    "max_client_connections",
    "current_client_connections",
    "paused",
    "disabled",
];

fn databases(databases: &[DatabaseRow]) -> Sheet {
    let row = |row: &DatabaseRow| {
        vec![
            text(&row.name),
            text(&row.host),
            number(row.port),
            text(&row.dbname),
            row.force_user.clone(),
            count(row.pool_size),
            count(row.min_pool_size),
            number(0), // There is no reserve pool.
            count(row.server_lifetime_s),
            mode(row.pool_mode),
            None, // One host per backend: nothing to balance.
            count(row.max_connections),
            count(row.current_connections),
            count(row.max_client_connections),
            count(row.current_client_connections),
            flag(row.paused),
            flag(row.disabled),
        ]
    };
    Sheet::new("ssissiiiissiiiiii", DATABASES, databases.iter().map(row))
}

const POOLS: &[&str] = &[
    "database",
    "user",
    "cl_active",
    "cl_waiting",
    "cl_active_cancel_req",
    "cl_waiting_cancel_req",
    "sv_active",
    "sv_active_cancel",
    "sv_being_canceled",
    "sv_idle",
    "sv_used",
    "sv_tested",
    "sv_login",
    "maxwait",
    "maxwait_us",
    "pool_mode",
    "load_balance_hosts",
];

fn pools(pools: &[PoolRow]) -> Sheet {
    let row = |row: &PoolRow| {
        vec![
            text(&row.database),
            text(&row.user),
            count(row.cl_active),
            count(row.cl_waiting),
            count(row.cancels.cl_active),
            count(row.cancels.cl_waiting),
            count(row.sv_active),
            count(row.cancels.sv_active),
            count(row.cancels.sv_being_canceled),
            count(row.sv_idle),
            count(row.sv_used),
            count(row.sv_tested),
            count(row.sv_login),
            count(u32::try_from(row.maxwait.as_secs()).unwrap_or(u32::MAX)),
            count(row.maxwait.subsec_micros()),
            mode(Some(row.pool_mode)),
            None,
        ]
    };
    Sheet::new("ssiiiiiiiiiiiiiss", POOLS, pools.iter().map(row))
}

const PEER_POOLS: &[&str] =
    &["peer_id", "cl_active_cancel_req", "cl_waiting_cancel_req", "sv_active_cancel", "sv_login"];

async fn peers<A: Admin>(admin: &A) -> Sheet {
    let rows = admin.peers().await;
    let row = |peer: super::admin::Peer| vec![number(peer.peer_id), text(peer.host), number(peer.port), number(0)];
    Sheet::new("isii", &["peer_id", "host", "port", "pool_size"], rows.into_iter().map(row))
}

const SOCKETS: &[&str] = &[
    "type",
    "user",
    "database",
    "replication",
    "state",
    "addr",
    "port",
    "local_addr",
    "local_port",
    "connect_time",
    "request_time",
    "wait",
    "wait_us",
    "close_needed",
    "ptr",
    "link",
    "remote_pid",
    "tls",
    "application_name",
    "prepared_statements",
    "id",
    "recv_pos",
    "pkt_pos",
    "pkt_remain",
    "send_pos",
    "send_remain",
    "pkt_avail",
    "send_avail",
];
/// Of [`SOCKETS`] without the buffer figures.
const SOCKET_LETTERS: &str = "ssssssisiTTiiississii";
/// Of all of [`SOCKETS`].
const SOCKET_LETTERS_ALL: &str = "ssssssisiTTiiississiiiiiiiii";

async fn all_sockets<A: Admin>(admin: &A) -> Vec<SocketRow> {
    let mut sockets = admin.clients().await;
    sockets.extend(admin.servers().await);
    sockets
}

fn busy(mut sockets: Vec<SocketRow>) -> Vec<SocketRow> {
    sockets.retain(|socket| {
        !matches!(socket.state, SocketState::Client(ClientState::Idle) | SocketState::Server(ServerState::Idle))
    });
    sockets
}

fn clients(clients: &[SocketRow]) -> Sheet {
    let word = |socket: &SocketRow| match socket.state {
        SocketState::Client(ClientState::Active) => Some("active"),
        SocketState::Client(ClientState::Idle) => Some("idle"),
        SocketState::Client(ClientState::Waiting) => Some("waiting"),
        SocketState::Client(ClientState::ActiveCancelReq) => Some("active_cancel_req"),
        SocketState::Client(ClientState::WaitingCancelReq) => Some("waiting_cancel_req"),
        SocketState::Login(_) | SocketState::Server(_) => None,
    };
    let rows = clients.iter().filter_map(|socket| word(socket).map(|word| socket_row("C", word, socket)));
    Sheet::new(SOCKET_LETTERS, SOCKETS, rows)
}

fn servers(servers: &[SocketRow]) -> Sheet {
    let word = |socket: &SocketRow| match socket.state {
        SocketState::Server(ServerState::Active) => Some("active"),
        SocketState::Server(ServerState::Idle) => Some("idle"),
        SocketState::Server(ServerState::Used) => Some("used"),
        SocketState::Server(ServerState::Tested) => Some("tested"),
        SocketState::Server(ServerState::New) => Some("new"),
        SocketState::Server(ServerState::ActiveCancel) => Some("active_cancel"),
        SocketState::Server(ServerState::BeingCanceled) => Some("being_canceled"),
        SocketState::Login(_) | SocketState::Client(_) => None,
    };
    let rows = servers.iter().filter_map(|socket| word(socket).map(|word| socket_row("S", word, socket)));
    Sheet::new(SOCKET_LETTERS, SOCKETS, rows)
}

/// SHOW SOCKETS has its own words, and leaves cancel requests out.
fn sockets(sockets: &[SocketRow]) -> Sheet {
    let words = |socket: &SocketRow| match socket.state {
        SocketState::Login(_) => Some(("C", "cl_login")),
        SocketState::Client(ClientState::Active | ClientState::Idle) => Some(("C", "cl_active")),
        SocketState::Client(ClientState::Waiting) => Some(("C", "cl_waiting")),
        SocketState::Client(ClientState::ActiveCancelReq | ClientState::WaitingCancelReq) => None,
        SocketState::Server(ServerState::Active) => Some(("S", "sv_active")),
        SocketState::Server(ServerState::Idle) => Some(("S", "sv_idle")),
        SocketState::Server(ServerState::Used) => Some(("S", "sv_used")),
        SocketState::Server(ServerState::Tested) => Some(("S", "sv_tested")),
        SocketState::Server(ServerState::New) => Some(("S", "sv_login")),
        SocketState::Server(ServerState::ActiveCancel | ServerState::BeingCanceled) => None,
    };
    let figures = SOCKET_LETTERS_ALL.len() - SOCKET_LETTERS.len();
    let rows = sockets.iter().filter_map(|socket| {
        let (role, word) = words(socket)?;
        let mut cells = socket_row(role, word, socket);
        // Buffers exist only while a batch is forwarded: their figures are zero whenever anybody looks.
        cells.extend(std::iter::repeat_n(number(0), figures));
        Some(cells)
    });
    Sheet::new(SOCKET_LETTERS_ALL, SOCKETS, rows)
}

fn socket_row(role: &str, state: &str, socket: &SocketRow) -> Vec<Option<String>> {
    let (addr, port) = address(socket.addr);
    let (local_addr, local_port) = address(socket.local_addr);
    vec![
        text(role),
        text(socket.user.as_deref().unwrap_or("(nouser)")),
        text(socket.database.as_deref().unwrap_or("(nodb)")),
        text("none"),
        text(state),
        addr,
        port,
        local_addr,
        local_port,
        moment(socket.connect_time),
        socket.request_time.and_then(moment),
        count(u32::try_from(socket.wait.as_secs()).unwrap_or(u32::MAX)),
        count(socket.wait.subsec_micros()),
        flag(socket.close_needed),
        pointer(socket.id),
        socket.link.map_or_else(|| text(""), pointer),
        number(socket.remote_pid),
        text(&socket.tls),
        text(&socket.application_name),
        count(socket.prepared_statements),
        // PgBouncer's type for it is int4; ids start at 1, so this wraps after two thousand million connections.
        number(socket.id & u64::from(i32::MAX.unsigned_abs())),
    ]
}

fn address(address: Option<SocketAddr>) -> (Option<String>, Option<String>) {
    match address {
        Some(address) => (number(address.ip()), number(address.port())),
        None => (text("unix"), number(0)),
    }
}

/// PgBouncer prints where a socket is in memory; what people use it for is to join `ptr` with `link`.
fn pointer(id: u64) -> Option<String> {
    text(format!("{id:#x}"))
}

/// `2026-08-05 12:00:00 UTC`.
fn moment(at: SystemTime) -> Option<String> {
    let rfc3339 = humantime::format_rfc3339_seconds(at).to_string();
    text(rfc3339.replace('T', " ").replace('Z', " UTC"))
}

fn users(users: &[UserRow]) -> Sheet {
    let row = |user: &UserRow| {
        vec![
            text(&user.name),
            text(user.pool_size.map_or_else(String::new, |size| size.to_string())),
            text(""), // There is no reserve pool.
            mode(user.pool_mode),
            count(user.max_user_connections),
            count(user.current_connections),
            number(0), // Clients are limited in all and per database, not per user.
            count(user.current_client_connections),
        ]
    };
    let names = [
        "name",
        "pool_size",
        "reserve_pool_size",
        "pool_mode",
        "max_user_connections",
        "current_connections",
        "max_user_client_connections",
        "current_client_connections",
    ];
    Sheet::new("ssssiiii", &names, users.iter().map(row))
}

fn lists(census: Census) -> Sheet {
    let items = [
        ("databases", census.databases),
        ("users", census.users),
        ("peers", census.peers),
        ("pools", census.pools),
        ("peer_pools", census.peers),
        ("free_clients", census.free_clients),
        ("used_clients", census.used_clients),
        ("login_clients", census.login_clients),
        ("free_servers", 0), // Server connections are allocated one by one.
        ("used_servers", census.used_servers),
        ("dns_names", census.dns_names),
        ("dns_zones", 0), // The system's resolver does not tell zones.
        ("dns_queries", census.dns_pending),
        ("dns_pending", census.dns_pending),
    ];
    Sheet::new("si", &["list", "items"], items.map(|(list, items)| vec![text(list), count(items)]))
}

fn config(settings: &[SettingRow]) -> Sheet {
    let row = |setting: &SettingRow| {
        vec![text(&setting.key), text(&setting.value), text(&setting.default), text(setting.changeable.word())]
    };
    Sheet::new("ssss", &["key", "value", "default", "changeable"], settings.iter().map(row))
}

async fn dns_hosts<A: Admin>(admin: &A) -> Sheet {
    let rows = admin.dns_hosts().await;
    let row = |host: super::admin::DnsRow| vec![text(host.hostname), number(host.ttl_s), text(host.addrs)];
    Sheet::new("sqs", &["hostname", "ttl", "addrs"], rows.into_iter().map(row))
}

/// The eleven figures of PgBouncer 1.25, in its order.
fn figures(traffic: &Traffic) -> [u64; 11] {
    [
        traffic.server_assignment_count,
        traffic.xact_count,
        traffic.query_count,
        traffic.bytes_received,
        traffic.bytes_sent,
        traffic.xact_time_us,
        traffic.query_time_us,
        traffic.wait_time_us,
        traffic.client_parse_count,
        traffic.server_parse_count,
        traffic.bind_count,
    ]
}

fn stats(databases: &[DatabaseTraffic]) -> Sheet {
    let names = [
        "database",
        "total_server_assignment_count",
        "total_xact_count",
        "total_query_count",
        "total_received",
        "total_sent",
        "total_xact_time",
        "total_query_time",
        "total_wait_time",
        "total_client_parse_count",
        "total_server_parse_count",
        "total_bind_count",
        "avg_server_assignment_count",
        "avg_xact_count",
        "avg_query_count",
        "avg_recv",
        "avg_sent",
        "avg_xact_time",
        "avg_query_time",
        "avg_wait_time",
        "avg_client_parse_count",
        "avg_server_parse_count",
        "avg_bind_count",
    ];
    let rows =
        databases.iter().map(|row| named(&row.database, figures(&row.total).into_iter().chain(figures(&row.average))));
    Sheet::new("sNNNNNNNNNNNNNNNNNNNNNN", &names, rows)
}

fn named(database: &str, figures: impl IntoIterator<Item = u64>) -> Vec<Option<String>> {
    std::iter::once(text(database)).chain(figures.into_iter().map(number)).collect()
}

fn stats_totals(databases: &[DatabaseTraffic]) -> Sheet {
    let names = [
        "database",
        "server_assignment_count",
        "xact_count",
        "query_count",
        "bytes_received",
        "bytes_sent",
        "xact_time",
        "query_time",
        "wait_time",
        "client_parse_count",
        "server_parse_count",
        "bind_count",
    ];
    Sheet::new("sNNNNNNNNNNN", &names, databases.iter().map(|row| named(&row.database, figures(&row.total))))
}

fn stats_averages(databases: &[DatabaseTraffic]) -> Sheet {
    let names = [
        "database",
        "server_assignment_count",
        "xact_count",
        "query_count",
        "bytes_received",
        "bytes_sent",
        "xact_time",
        "query_time",
        "wait_time",
        "avg_client_parse_count",
        "avg_server_parse_count",
        "avg_bind_count",
    ];
    Sheet::new("sNNNNNNNNNNN", &names, databases.iter().map(|row| named(&row.database, figures(&row.average))))
}

/// PgBouncer's internal names for the figures.
const TOTALS: [&str; 11] = [
    "server_assignment_count",
    "xact_count",
    "query_count",
    "client_bytes",
    "server_bytes",
    "xact_time",
    "query_time",
    "wait_time",
    "ps_client_parse_count",
    "ps_server_parse_count",
    "ps_bind_count",
];

fn totals(databases: &[DatabaseTraffic]) -> Sheet {
    let (mut total, mut average) = (Traffic::default(), Traffic::default());
    let (mut xact_us, mut query_us) = (0_u128, 0_u128);
    for row in databases {
        total += row.total;
        average += row.average;
        // A mean of means is weighted by what each is the mean of.
        xact_us += u128::from(row.average.xact_time_us) * u128::from(row.average.xact_count);
        query_us += u128::from(row.average.query_time_us) * u128::from(row.average.query_count);
    }
    average.xact_time_us = mean(xact_us, average.xact_count);
    average.query_time_us = mean(query_us, average.query_count);
    let rows = |prefix: &'static str, traffic: &Traffic| {
        let named = TOTALS.into_iter().zip(figures(traffic));
        named.map(move |(name, figure)| vec![text(format!("{prefix}_{name}")), number(figure)])
    };
    Sheet::new("sN", &["name", "value"], rows("total", &total).chain(rows("avg", &average)))
}

fn mean(sum: u128, count: u64) -> u64 {
    u64::try_from(sum.checked_div(u128::from(count)).unwrap_or(0)).unwrap_or(u64::MAX)
}
