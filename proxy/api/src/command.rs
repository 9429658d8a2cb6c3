//! The words of the admin console as values: PgBouncer's verbs and ours.
//!
//! Invariant: `parse(&command.to_string()) == Ok(command)` for every [`Command`]; what is typed in any accepted form prints
//! in one form.

use std::fmt;
use std::time::Duration;

use crate::epoch::Claim;
use crate::epoch::Lease;

mod lexer;
mod parser;
mod print;

pub use parser::GrammarError;
pub use parser::parse;

/// A command is refused above this length: the longest legal one is under 700 bytes.
pub const COMMAND_BYTES_MAX: usize = 4096;
/// A name is refused above this length, as in PostgreSQL and PgBouncer.
pub const NAME_BYTES_MAX: usize = 63;
/// The value of a SET is refused above this length, as in PgBouncer.
pub const VALUE_BYTES_MAX: usize = 255;

/// One order to the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `SHOW table` (or PgBouncer's alias `SELECT table`).
    Show(Show),
    /// `SET key = value`.
    Set {
        /// A configuration key, or a parameter that drivers set on connecting.
        key: String,
        /// Its new value as typed.
        value: String,
    },
    /// `RELOAD`: read the configuration file again, whole or not at all.
    Reload,
    /// `PAUSE [db]`: PgBouncer's; any admin may resume it.
    Pause(Scope),
    /// `PAUSE db WITH (…)`: leased, and owned when it names an epoch.
    PauseWith(PauseWith),
    /// `PREPARE SWITCH db TO backend [WITH (connections n)]`.
    PrepareSwitch(PrepareSwitch),
    /// `SWITCH db TO backend WITH (run '…', epoch n | force)`.
    Switch(Switch),
    /// `TRANSPLANT db TO backend WITH (run '…', epoch n | force)`.
    Transplant(Transplant),
    /// `RESUME [db]`: ends PgBouncer's kind of pause.
    Resume(Scope),
    /// `RESUME db WITH (run '…', epoch n | force)`.
    ResumeWith(ResumeWith),
    /// `RENEW db WITH (run '…', epoch n, lease '3s')`.
    Renew(Renew),
    /// `RECONNECT [db]`: server connections close when next at rest.
    Reconnect(Scope),
    /// `WAIT_CLOSE [db]`: answered when the connections that RECONNECT, RELOAD or SWITCH retired are gone.
    WaitClose(Scope),
    /// `KILL [db]`: drop clients and server connections at once, and pause.
    Kill(Scope),
    /// `KILL_CLIENT id`: drop one client, by the `id` of SHOW CLIENTS.
    KillClient(u64),
    /// `DISABLE db`: refuse new logins.
    Disable(String),
    /// `ENABLE db`: admit logins again.
    Enable(String),
    /// `SUSPEND`: known, so that the answer can say what to use.
    Suspend,
    /// `SHUTDOWN [WAIT_FOR_SERVERS | WAIT_FOR_CLIENTS]`.
    Shutdown(Shutdown),
}

/// What a PgBouncer verb with an optional name acts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// No name given.
    All,
    /// The database of that name.
    Database(String),
}

/// The tables of SHOW.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Show {
    /// One of the fixed tables.
    Table(Table),
    /// `BLOCKERS [db]`: who holds a drain open.
    Blockers(Scope),
    /// A PostgreSQL setting that drivers ask for.
    Setting(DriverSetting),
}

/// Defines a fieldless enum with the one word each variant has on the wire.
macro_rules! words {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$inner])* $variant),+ }

        impl $name {
            /// Every one of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its word.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// By its word, in any case.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.word().eq_ignore_ascii_case(word))
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}
pub(crate) use words;

words! {
    /// A table that SHOW prints whole.
    Table {
        /// The product and its version.
        Version = "VERSION",
        /// Active, paused or suspended.
        State = "STATE",
        /// Databases and their limits.
        Databases = "DATABASES",
        /// One row per (database, user).
        Pools = "POOLS",
        /// Pools of cancel requests to peers.
        PeerPools = "PEER_POOLS",
        /// Other instances that cancel requests are forwarded to.
        Peers = "PEERS",
        /// Client connections.
        Clients = "CLIENTS",
        /// Server connections.
        Servers = "SERVERS",
        /// Both, with buffer figures.
        Sockets = "SOCKETS",
        /// Sockets that are not empty.
        ActiveSockets = "ACTIVE_SOCKETS",
        /// Users and their limits.
        Users = "USERS",
        /// How many of everything.
        Lists = "LISTS",
        /// Configuration keys.
        Config = "CONFIG",
        /// Totals and averages per database.
        Stats = "STATS",
        /// Totals per database.
        StatsTotals = "STATS_TOTALS",
        /// Averages per database.
        StatsAverages = "STATS_AVERAGES",
        /// Sums over all databases.
        Totals = "TOTALS",
        /// Memory pools.
        Mem = "MEM",
        /// Resolved names.
        DnsHosts = "DNS_HOSTS",
        /// DNS zones.
        DnsZones = "DNS_ZONES",
        /// File descriptors with secrets: known, so that the answer can say what to use.
        Fds = "FDS",
        /// The commands.
        Help = "HELP",
        /// The gate of every database.
        Gates = "GATES",
        /// The declared backends.
        Backends = "BACKENDS",
        /// Every session, movable or not and why.
        Sessions = "SESSIONS",
        /// The last switches.
        Switches = "SWITCHES",
        /// The pauses that are over.
        Pauses = "PAUSES",
    }
}

words! {
    /// PostgreSQL settings that drivers read or set on connecting; answered with a constant, setting them does nothing.
    DriverSetting {
        /// UTF8.
        ClientEncoding = "client_encoding",
        /// read committed.
        DefaultTransactionIsolation = "default_transaction_isolation",
        /// on.
        StandardConformingStrings = "standard_conforming_strings",
        /// ISO.
        DateStyle = "datestyle",
        /// GMT.
        TimeZone = "timezone",
        /// 2.
        ExtraFloatDigits = "extra_float_digits",
    }
}

words! {
    /// What a pause does with transactions that are still open at the drain deadline.
    OnTimeout {
        /// Give the pause up: traffic goes on.
        Abort = "abort",
        /// Send a cancel request for each.
        Cancel = "cancel",
        /// Close their connections.
        Terminate = "terminate",
    }
}

words! {
    /// What a pause holds.
    Mode {
        /// Every transaction.
        All = "all",
        /// Transactions that write.
        Writes = "writes",
    }
}

words! {
    /// What a shutdown waits for.
    Shutdown {
        /// Nothing.
        Now = "NOW",
        /// Transactions under way.
        WaitForServers = "WAIT_FOR_SERVERS",
        /// Every client to leave.
        WaitForClients = "WAIT_FOR_CLIENTS",
    }
}

/// `PAUSE db WITH (…)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PauseWith {
    /// The route name.
    pub database: String,
    /// Set for an epoch pause: ended only by that run and epoch, by its lease's decision, or by force.
    pub epoch: Option<EpochPause>,
    /// How long open transactions may take to end; at most a day; `None`: the configured `drain_timeout`.
    pub drain: Option<Duration>,
    /// What happens to those that did not.
    pub on_timeout: OnTimeout,
    /// How long the pause lasts unless renewed; `None`: the configured `pause_lease`.
    pub lease: Option<Lease>,
    /// What is held.
    pub mode: Mode,
}

/// Whose pause it is and between which backends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochPause {
    /// Its owner.
    pub claim: Claim,
    /// The backend that has to be the active one.
    pub source: String,
    /// The backend that the run wants to switch to.
    pub target: String,
}

/// `PREPARE SWITCH db TO backend [WITH (connections n)]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrepareSwitch {
    /// The route name.
    pub database: String,
    /// The backend to open connections to; the active one closes those that were opened to others.
    pub backend: String,
    /// How many in all; `None`: as many as are open on the active one.
    pub connections: Option<u32>,
}

/// `SWITCH db TO backend WITH (…)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    /// The route name.
    pub database: String,
    /// The new active backend.
    pub backend: String,
    /// By what right.
    pub warrant: Warrant,
}

/// `TRANSPLANT db TO backend WITH (…)`: live sessions are copied to a backend, all or none, before SWITCH adopts them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transplant {
    /// The route name.
    pub database: String,
    /// The backend that gets the copies.
    pub backend: String,
    /// By what right.
    pub warrant: Warrant,
}

/// `RESUME db WITH (…)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeWith {
    /// The route name.
    pub database: String,
    /// By what right.
    pub warrant: Warrant,
}

/// By what right a pause is used or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warrant {
    /// As its owner.
    Claim(Claim),
    /// Against its owner: an operator who knows better takes the responsibility.
    Force,
}

/// `RENEW db WITH (run '…', epoch n, lease '3s')`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renew {
    /// The route name.
    pub database: String,
    /// The owner.
    pub claim: Claim,
    /// How long from now.
    pub lease: Lease,
}

impl Command {
    /// The tag of CommandComplete: `SET k=v` for SET, the first word of the command for the others.
    pub fn tag(&self) -> String {
        if let Self::Set { key, value } = self { format!("SET {key}={value}") } else { self.verb().to_owned() }
    }

    /// The word it begins with.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Show(_) => "SHOW",
            Self::Set { .. } => "SET",
            Self::Reload => "RELOAD",
            Self::Pause(_) | Self::PauseWith(_) => "PAUSE",
            Self::PrepareSwitch(_) => "PREPARE",
            Self::Switch(_) => "SWITCH",
            Self::Transplant(_) => "TRANSPLANT",
            Self::Resume(_) | Self::ResumeWith(_) => "RESUME",
            Self::Renew(_) => "RENEW",
            Self::Reconnect(_) => "RECONNECT",
            Self::WaitClose(_) => "WAIT_CLOSE",
            Self::Kill(_) => "KILL",
            Self::KillClient(_) => "KILL_CLIENT",
            Self::Disable(_) => "DISABLE",
            Self::Enable(_) => "ENABLE",
            Self::Suspend => "SUSPEND",
            Self::Shutdown(_) => "SHUTDOWN",
        }
    }

    /// Whether PgBouncer has this command too: its failures then carry PgBouncer's SQLSTATE.
    pub fn is_pgbouncers(&self) -> bool {
        match self {
            Self::PauseWith(_)
            | Self::PrepareSwitch(_)
            | Self::Switch(_)
            | Self::Transplant(_)
            | Self::ResumeWith(_)
            | Self::Renew(_) => false,
            Self::Show(Show::Blockers(_)) => false,
            Self::Show(Show::Table(table)) => {
                !matches!(table, Table::Gates | Table::Backends | Table::Sessions | Table::Switches | Table::Pauses)
            }
            Self::Show(Show::Setting(_))
            | Self::Set { .. }
            | Self::Reload
            | Self::Pause(_)
            | Self::Resume(_)
            | Self::Reconnect(_)
            | Self::WaitClose(_)
            | Self::Kill(_)
            | Self::KillClient(_)
            | Self::Disable(_)
            | Self::Enable(_)
            | Self::Suspend
            | Self::Shutdown(_) => true,
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print::command(self, f)
    }
}
