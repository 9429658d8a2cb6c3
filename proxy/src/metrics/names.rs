//! Every metric by name.
//!
//! Invariant: a name, its unit and its words stand here once; adding a metric means one entry here and one line where it is
//! read. Counts of time are whole microseconds, as the statistics count them: the exporter's counters are integers.

/// What a metric does over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
}

/// One published figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Its name, with the unit where it has one.
    pub name: &'static str,
    /// What it does over time.
    pub kind: Kind,
    /// What it counts, in which unit.
    pub help: &'static str,
}

/// Defines a constant for each metric and the list of them.
macro_rules! metrics {
    ($($constant:ident = $kind:ident $name:literal, $help:literal;)+) => {
        $(
            #[doc = $help]
            pub(crate) const $constant: Metric =
                Metric { name: concat!("pgcutover_", $name), kind: Kind::$kind, help: $help };
        )+

        /// All of them.
        pub const METRICS: &[Metric] = &[$($constant),+];
    };
}

metrics! {
    BUILD_INFO = Gauge "build_info", "1, labelled with the version.";
    CLIENTS = Gauge "clients", "Client connections, also those logging in.";
    CLIENTS_LOGGING_IN = Gauge "clients_logging_in", "Client connections that are logging in.";
    CLIENTS_FREE = Gauge "clients_free", "Clients that max_client_conn still admits.";
    SERVERS = Gauge "servers", "Server connections.";

    DATABASE_CLIENTS = Gauge "database_clients", "Clients of a database.";
    DATABASE_SERVERS = Gauge "database_servers", "Server connections of a database.";
    DATABASE_SERVERS_MAX = Gauge "database_servers_max", "Server connections that a database may have, 0 for no limit.";
    DATABASE_DISABLED = Gauge "database_disabled", "1 while DISABLE refuses logins.";
    POOL_CLIENTS = Gauge "pool_clients", "Clients of a pool, by state.";
    POOL_SERVERS = Gauge "pool_servers", "Server connections of a pool, by state.";
    POOL_CANCELS = Gauge "pool_cancels", "Cancel requests of a pool, by state.";
    POOL_WAIT_SECONDS_MAX = Gauge "pool_wait_seconds_max", "For how long the first waiting client of a pool has waited, in seconds.";

    GATE_SHUT = Gauge "gate_shut", "1 while no transaction may begin: pausing or paused.";
    GATE_DRAINED = Gauge "gate_drained", "1 while a pause is complete: no transaction is open.";
    GATE_OPEN_TRANSACTIONS = Gauge "gate_open_transactions", "Transactions that are open.";
    GATE_HELD_CLIENTS = Gauge "gate_held_clients", "Clients whose next transaction waits for the gate.";
    GATE_HELD_SECONDS_MAX = Gauge "gate_held_seconds_max", "For how long the first held client has waited, in seconds.";
    GATE_LEASE_SECONDS = Gauge "gate_lease_seconds", "What is left of a pause's lease, in seconds; absent without one.";
    ROUTE_EPOCH = Gauge "route_epoch", "The epoch of a database's route.";
    CONTROL_LOGIN_UP = Gauge "control_login_up", "1 while the control login works: without it the proxy cannot follow a decision.";
    BACKEND_ACTIVE = Gauge "backend_active", "1 for the backend that clients are on.";
    BACKEND_SERVERS = Gauge "backend_servers", "Connections to a backend.";
    BACKEND_PREWARMED = Gauge "backend_prewarmed", "Connections that PREPARE SWITCH parked.";
    BACKEND_TRANSACTIONS = Counter "backend_transactions_total", "Transactions begun on a backend.";
    SWITCHES = Counter "switches_total", "Switches of a database since the start.";
    LAST_PAUSE_SECONDS = Gauge "last_pause_seconds", "From shutting to opening the gate of the last switch, in seconds.";

    SERVER_ASSIGNMENTS = Counter "server_assignments_total", "How often a client was given a server connection.";
    TRANSACTIONS = Counter "transactions_total", "Transactions that ended.";
    QUERIES = Counter "queries_total", "Queries that ended.";
    RECEIVED_BYTES = Counter "received_bytes_total", "Bytes from clients.";
    SENT_BYTES = Counter "sent_bytes_total", "Bytes to clients.";
    TRANSACTION_TIME = Counter "transaction_microseconds_total", "Time in transactions, in microseconds.";
    QUERY_TIME = Counter "query_microseconds_total", "Time in queries, in microseconds.";
    WAIT_TIME = Counter "client_wait_microseconds_total", "Time that clients waited for a server connection, in microseconds.";
    CLIENT_PARSES = Counter "client_parses_total", "Parse messages from clients.";
    SERVER_PARSES = Counter "server_parses_total", "Parse messages to servers.";
    BINDS = Counter "binds_total", "Bind messages from clients.";
    LOGINS = Counter "logins_total", "Clients that logged in.";

    LOGINS_REFUSED = Counter "logins_refused_total", "Logins that were refused.";
    QUERY_WAIT_TIMEOUTS = Counter "query_wait_timeouts_total", "Clients that waited longer than query_wait_timeout for a server connection.";
    HOLDS_SHED = Counter "holds_shed_total", "Clients that were held longer than hold_budget.";
    HOLDS_CANCELED = Counter "holds_canceled_total", "Held clients whose cancel request was answered.";
    CANCELS_FORWARDED = Counter "cancels_forwarded_total", "Cancel requests sent on to a server or a peer.";
    CANCELS_DROPPED = Counter "cancels_dropped_total", "Cancel requests of unknown keys.";
    SERVER_LOGINS_FAILED = Counter "server_logins_failed_total", "Server connections that could not be made.";
    SERVERS_LOST = Counter "servers_lost_total", "Server connections that broke while a client had them.";
    LEASES_ENDED = Counter "leases_ended_total", "Pauses whose lease ended.";
    DECISIONS_FOLLOWED = Counter "decisions_followed_total", "Switches that followed a decision found by the proxy itself.";
    NAMES_MOVED = Counter "names_moved_total", "Backends whose host name got another address: moves that nobody ordered.";
    ROUTE_WRITES_FAILED = Counter "route_writes_failed_total", "Route files that could not be written: alarm, the route would be lost with the process.";

    HELD_BUCKET = Counter "held_microseconds_bucket", "Clients by how long a gate held them, in microseconds, up to le.";
    HELD_COUNT = Counter "held_microseconds_count", "Clients that a gate held.";
    HELD_SUM = Counter "held_microseconds_sum", "Time that gates held clients, in microseconds.";
}
