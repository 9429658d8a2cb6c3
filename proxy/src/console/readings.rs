//! The snapshots of SHOW as figures for the exporter.
//!
//! Invariant: whatever a monitor could read from SHOW is on the page too, a pause above all.

use std::time::Duration;

use pgcutover_api::rows::{BackendRow, GateRow, SwitchRow, YesNo};

use super::admin::{Admin, Census, DatabaseRow, PoolRow};
use crate::metrics::{DatabaseTraffic, Metric, Reading, names};

/// What the proxy looks like now.
pub async fn readings<A: Admin>(admin: &A) -> Vec<Reading> {
    let mut readings = vec![Reading::new(&names::BUILD_INFO).label("version", env!("CARGO_PKG_VERSION")).count(1)];
    readings.extend(census(admin.census().await));
    readings.extend(admin.databases().await.iter().flat_map(database));
    readings.extend(admin.pools().await.iter().flat_map(pool));
    readings.extend(admin.gates().await.iter().flat_map(gate));
    readings.extend(admin.backends().await.iter().flat_map(backend));
    readings.extend(admin.traffic().await.iter().flat_map(traffic));
    readings.extend(switches(&admin.switches().await));
    readings
}

fn census(census: Census) -> [Reading; 4] {
    [
        Reading::new(&names::CLIENTS).count(census.used_clients.into()),
        Reading::new(&names::CLIENTS_LOGGING_IN).count(census.login_clients.into()),
        Reading::new(&names::CLIENTS_FREE).count(census.free_clients.into()),
        Reading::new(&names::SERVERS).count(census.used_servers.into()),
    ]
}

fn database(row: &DatabaseRow) -> [Reading; 4] {
    let reading = |metric| Reading::new(metric).label("database", &row.name);
    [
        reading(&names::DATABASE_CLIENTS).count(row.current_client_connections.into()),
        reading(&names::DATABASE_SERVERS).count(row.current_connections.into()),
        reading(&names::DATABASE_SERVERS_MAX).count(row.max_connections.into()),
        reading(&names::DATABASE_DISABLED).count(one_if(row.disabled)),
    ]
}

fn pool(row: &PoolRow) -> Vec<Reading> {
    let reading = |metric| Reading::new(metric).label("database", &row.database).label("user", &row.user);
    let states = [
        (&names::POOL_CLIENTS, "active", row.cl_active),
        (&names::POOL_CLIENTS, "waiting", row.cl_waiting),
        (&names::POOL_SERVERS, "active", row.sv_active),
        (&names::POOL_SERVERS, "idle", row.sv_idle),
        (&names::POOL_SERVERS, "used", row.sv_used),
        (&names::POOL_SERVERS, "tested", row.sv_tested),
        (&names::POOL_SERVERS, "login", row.sv_login),
        (&names::POOL_CANCELS, "active", row.cancels.cl_active),
        (&names::POOL_CANCELS, "waiting", row.cancels.cl_waiting),
    ];
    let levels = states.map(|(metric, state, count)| reading(metric).label("state", state).count(count.into()));
    let wait = reading(&names::POOL_WAIT_SECONDS_MAX).level(row.maxwait.as_secs_f64());
    levels.into_iter().chain([wait]).collect()
}

fn gate(row: &GateRow) -> Vec<Reading> {
    let reading = |metric| Reading::new(metric).label("database", &row.database);
    let shut = YesNo::from(!row.serves());
    let mut readings = vec![
        reading(&names::GATE_SHUT).count(one_if(shut)),
        reading(&names::GATE_DRAINED).count(one_if(row.drained)),
        reading(&names::GATE_OPEN_TRANSACTIONS).count(row.open_transactions.into()),
        reading(&names::GATE_HELD_CLIENTS).count(row.held_clients.into()),
        reading(&names::GATE_HELD_SECONDS_MAX).level(row.held_ms_max.as_secs_f64()),
        reading(&names::ROUTE_EPOCH).count(row.route_epoch.as_u64()),
        reading(&names::CONTROL_LOGIN_UP).count(one_if(row.control)),
    ];
    readings.extend(row.lease_ms.map(|left| reading(&names::GATE_LEASE_SECONDS).level(left.as_secs_f64())));
    readings
}

fn backend(row: &BackendRow) -> [Reading; 4] {
    let reading = |metric| Reading::new(metric).label("database", &row.database).label("backend", &row.backend);
    [
        reading(&names::BACKEND_ACTIVE).count(one_if(row.active)),
        reading(&names::BACKEND_SERVERS).count(row.connections.into()),
        reading(&names::BACKEND_PREWARMED).count(row.prewarmed.into()),
        reading(&names::BACKEND_TRANSACTIONS).count(row.transactions),
    ]
}

fn traffic(row: &DatabaseTraffic) -> [Reading; 12] {
    let figures: [(&'static Metric, u64); 12] = [
        (&names::SERVER_ASSIGNMENTS, row.total.server_assignment_count),
        (&names::TRANSACTIONS, row.total.xact_count),
        (&names::QUERIES, row.total.query_count),
        (&names::RECEIVED_BYTES, row.total.bytes_received),
        (&names::SENT_BYTES, row.total.bytes_sent),
        (&names::TRANSACTION_TIME, row.total.xact_time_us),
        (&names::QUERY_TIME, row.total.query_time_us),
        (&names::WAIT_TIME, row.total.wait_time_us),
        (&names::CLIENT_PARSES, row.total.client_parse_count),
        (&names::SERVER_PARSES, row.total.server_parse_count),
        (&names::BINDS, row.total.bind_count),
        (&names::LOGINS, row.total.client_login_count),
    ];
    figures.map(|(metric, figure)| Reading::new(metric).label("database", &row.database).count(figure))
}

/// How many per database, and the last pause of each.
fn switches(rows: &[SwitchRow]) -> Vec<Reading> {
    let mut by_database: std::collections::BTreeMap<&str, (u64, Option<Duration>)> = std::collections::BTreeMap::new();
    for row in rows {
        let (count, pause) = by_database.entry(&row.database).or_default();
        *count += 1;
        *pause = row.pause_ms.or(*pause);
    }
    let readings = |(database, (count, pause)): (&str, (u64, Option<Duration>))| {
        let reading = |metric| Reading::new(metric).label("database", database);
        let pause = pause.map(|pause| reading(&names::LAST_PAUSE_SECONDS).level(pause.as_secs_f64()));
        std::iter::once(reading(&names::SWITCHES).count(count)).chain(pause).collect::<Vec<_>>()
    };
    by_database.into_iter().flat_map(readings).collect()
}

fn one_if(answer: YesNo) -> u64 {
    u64::from(bool::from(answer))
}
