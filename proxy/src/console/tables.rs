//! PgBouncer's SHOW tables, with PgBouncer 1.25's columns and types.
//!
//! Invariant: each row has as many cells as its table has columns. Source: PgBouncer 1.25, usage.md and the type letters of
//! its console: s text, i int4, q int8, N numeric, T a moment as text.

use pgcutover_api::command::{DriverSetting, Table};
use pgcutover_api::rows::{Column, GateRow, Kind, PoolMode, Row, YesNo};

use super::admin::{Admin, Census, DatabaseRow, PoolRow, SettingRow, UserRow};

mod sockets;
mod stats;

use sockets::{all_sockets, busy, clients, servers, sockets};
use stats::{stats, stats_averages, stats_totals, totals};

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
        Table::Pauses => Sheet::of(&admin.pauses().await),
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

/// PgBouncer's three rows. Paused means: every database is, and not only its writes. One of several is seen in SHOW DATABASES and SHOW GATES.
async fn state<A: Admin>(admin: &A) -> Sheet {
    let gates = admin.gates().await;
    let paused = !gates.is_empty() && !gates.iter().any(GateRow::serves);
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
