//! The rows of our own SHOW tables, typed on both sides of the wire.
//!
//! Invariant: `Row::from_text` of what `Row::to_text` printed is the same row; a column that a newer proxy added is ignored,
//! one that is missing is an error that names it.

use std::time::Duration;
use std::time::SystemTime;

use thiserror::Error;

use crate::command::words;
use crate::epoch::Epoch;
use crate::epoch::RunId;

/// The type of a column on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `text`.
    Text,
    /// `int4`: counts, ports, pids.
    Int4,
    /// `int8`: epochs, milliseconds, identities.
    Int8,
    /// `numeric`: PgBouncer's statistics.
    Numeric,
}

impl Kind {
    /// The type's OID in pg_type.
    pub const fn oid(self) -> u32 {
        match self {
            Self::Text => 25,
            Self::Int4 => 23,
            Self::Int8 => 20,
            Self::Numeric => 1700,
        }
    }

    /// The type's size in bytes, -1 for a variable one.
    pub const fn size_bytes(self) -> i16 {
        match self {
            Self::Text | Self::Numeric => -1,
            Self::Int4 => 4,
            Self::Int8 => 8,
        }
    }
}

/// A column's name and type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
}

/// A row of a SHOW table.
pub trait Row: Sized {
    /// The table's columns in order.
    const COLUMNS: &'static [Column];

    /// The values in the order of the columns; `None` is NULL.
    fn to_text(&self) -> Vec<Option<String>>;

    /// Reads a row from a lookup of values by column name: outer `None` for no such column, inner for NULL.
    ///
    /// # Errors
    /// [`RowError`] names the column that is missing or does not read.
    fn from_text<'a>(cell: impl Fn(&str) -> Option<Option<&'a str>>) -> Result<Self, RowError>;
}

/// A row that does not read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("column {column}: {problem}")]
pub struct RowError {
    /// The column.
    pub column: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

/// A value of a column.
pub trait Cell: Sized {
    /// Its type on the wire.
    const KIND: Kind;

    /// Its text; `None` is NULL.
    fn to_cell(&self) -> Option<String>;

    /// From its text.
    ///
    /// # Errors
    /// What is wrong with the text.
    fn from_cell(text: Option<&str>) -> Result<Self, String>;
}

impl Cell for String {
    const KIND: Kind = Kind::Text;

    fn to_cell(&self) -> Option<String> {
        Some(self.clone())
    }

    fn from_cell(text: Option<&str>) -> Result<Self, String> {
        Ok(text.unwrap_or_default().to_owned())
    }
}

/// Cells that print with Display and read with FromStr.
macro_rules! plain_cells {
    ($($type:ty => $kind:ident),+ $(,)?) => { $(
        impl Cell for $type {
            const KIND: Kind = Kind::$kind;

            fn to_cell(&self) -> Option<String> {
                Some(self.to_string())
            }

            fn from_cell(text: Option<&str>) -> Result<Self, String> {
                let text = text.ok_or("is NULL")?;
                text.parse().map_err(|error| format!("{text:?}: {error}"))
            }
        }
    )+ };
}
plain_cells! { i32 => Int4, u16 => Int4, u64 => Int8, Epoch => Int8, RunId => Text }

/// A count, at most `int4`'s largest: a larger one is printed as that.
impl Cell for u32 {
    const KIND: Kind = Kind::Int4;

    fn to_cell(&self) -> Option<String> {
        Some((*self).min(i32::MAX as u32).to_string())
    }

    fn from_cell(text: Option<&str>) -> Result<Self, String> {
        let text = text.ok_or("is NULL")?;
        text.parse().map_err(|error| format!("{text:?}: {error}"))
    }
}

/// NULL when there is none; the empty string for texts, whose readers would not expect a NULL.
impl<T: Cell> Cell for Option<T> {
    const KIND: Kind = T::KIND;

    fn to_cell(&self) -> Option<String> {
        match (self, T::KIND) {
            (Some(value), _) => value.to_cell(),
            (None, Kind::Text) => Some(String::new()),
            (None, Kind::Int4 | Kind::Int8 | Kind::Numeric) => None,
        }
    }

    fn from_cell(text: Option<&str>) -> Result<Self, String> {
        match text {
            None | Some("") => Ok(None),
            Some(text) => T::from_cell(Some(text)).map(Some),
        }
    }
}

/// A moment, as RFC 3339 in UTC with milliseconds.
impl Cell for SystemTime {
    const KIND: Kind = Kind::Text;

    fn to_cell(&self) -> Option<String> {
        Some(humantime::format_rfc3339_millis(*self).to_string())
    }

    fn from_cell(text: Option<&str>) -> Result<Self, String> {
        let text = text.ok_or("is NULL")?;
        humantime::parse_rfc3339(text).map_err(|error| format!("{text:?}: {error}"))
    }
}

/// A time in whole milliseconds.
impl Cell for Duration {
    const KIND: Kind = Kind::Int8;

    fn to_cell(&self) -> Option<String> {
        Some(self.as_millis().min(i64::MAX as u128).to_string())
    }

    fn from_cell(text: Option<&str>) -> Result<Self, String> {
        u64::from_cell(text).map(Self::from_millis)
    }
}

/// Makes fieldless word enums cells of type text.
macro_rules! word_cells {
    ($($type:ty),+ $(,)?) => { $(
        impl Cell for $type {
            const KIND: Kind = Kind::Text;

            fn to_cell(&self) -> Option<String> {
                Some(self.word().to_owned())
            }

            fn from_cell(text: Option<&str>) -> Result<Self, String> {
                let text = text.ok_or("is NULL")?;
                Self::from_word(text).ok_or_else(|| format!("{text:?} is not a known word"))
            }
        }
    )+ };
}
word_cells! {
    YesNo, GateState, PoolMode, SessionState, BlockerReason, SwitchHow, Verdict, Fate, Prospect, crate::command::Mode
}

words! {
    /// A yes or no.
    YesNo {
        /// It is so.
        Yes = "yes",
        /// It is not.
        No = "no",
    }
}

impl From<bool> for YesNo {
    fn from(is_so: bool) -> Self {
        if is_so { Self::Yes } else { Self::No }
    }
}

impl From<YesNo> for bool {
    fn from(answer: YesNo) -> Self {
        answer == YesNo::Yes
    }
}

words! {
    /// What a gate does.
    GateState {
        /// Transactions begin.
        Open = "open",
        /// None begins, or none that writes; some are still open.
        Pausing = "pausing",
        /// None begins and none is open, or none that writes.
        Paused = "paused",
    }
}

words! {
    /// For how long a client keeps its server connection.
    PoolMode {
        /// Until it leaves.
        Session = "session",
        /// Until its transaction ends.
        Transaction = "transaction",
    }
}

words! {
    /// What a session does.
    SessionState {
        /// A transaction is open or a query is under way.
        Active = "active",
        /// At rest.
        Idle = "idle",
        /// Its next transaction waits for a gate.
        Held = "held",
        /// Its next transaction waits for a server connection.
        Waiting = "waiting",
    }
}

words! {
    /// Why a session keeps a drain from ending.
    BlockerReason {
        /// Its transaction is open.
        Transaction = "transaction",
        /// It keeps its server connection until it leaves.
        SessionPooling = "session_pooling",
        /// It is a replication connection, which keeps its server and moves with no switch.
        Replication = "replication",
        /// Its transaction waits for a lock that a held session owns.
        WaitsForHeld = "waits_for_held",
    }
}

words! {
    /// Why a route was switched.
    SwitchHow {
        /// By a SWITCH whose decision the proxy had read.
        Decision = "decision",
        /// The proxy found the decision by itself.
        Followed = "followed",
        /// By an operator's FORCE.
        Force = "force",
        /// The active backend's address changed in the configuration.
        Reload = "reload",
    }
}

words! {
    /// What became of connecting as a user to the new backend.
    Verdict {
        /// Enough connections are open.
        In = "in",
        /// The backend refused.
        Refused = "refused",
        /// Nobody knows: no stored key for that user, or no answer in time.
        Unknown = "unknown",
    }
}

words! {
    /// What became of a session that was to be moved.
    Fate {
        /// Its copy stands ready on the new backend.
        Moved = "moved",
        /// It has none, and holds the others up.
        Refused = "refused",
        /// It has none; the switch disconnects it.
        Leaves = "leaves",
    }
}

words! {
    /// What will become of a session when its database moves, as far as the last look at it tells.
    Prospect {
        /// It moves along.
        Moves = "moves",
        /// The database does not move while it is there.
        Refuses = "refuses",
        /// It is waited for before the pause; if it is still there and can't be moved, the database stays.
        Waits = "waits",
        /// It is disconnected.
        Leaves = "leaves",
        /// Nobody could look at it yet.
        Unknown = "unknown",
    }
}

/// Defines a row type whose fields are its columns, in order.
macro_rules! rows {
    ($($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $field:ident: $type:ty),+ $(,)? })+) => { $(
        $(#[$outer])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$inner])* pub $field: $type),+ }

        impl Row for $name {
            const COLUMNS: &'static [Column] =
                &[$(Column { name: stringify!($field), kind: <$type as Cell>::KIND }),+];

            fn to_text(&self) -> Vec<Option<String>> {
                vec![$(self.$field.to_cell()),+]
            }

            fn from_text<'a>(cell: impl Fn(&str) -> Option<Option<&'a str>>) -> Result<Self, RowError> {
                Ok(Self { $($field: read(stringify!($field), &cell)?),+ })
            }
        }
    )+ };
}

fn read<'a, T: Cell>(column: &'static str, cell: impl Fn(&str) -> Option<Option<&'a str>>) -> Result<T, RowError> {
    let text = cell(column).ok_or_else(|| RowError { column, problem: "is missing".to_owned() })?;
    T::from_cell(text).map_err(|problem| RowError { column, problem })
}

rows! {
    /// SHOW GATES: one row per database.
    GateRow {
        /// The route name.
        database: String,
        /// What it does.
        state: GateState,
        /// Who paused it: the run of an epoch pause, `user@address` of the admin otherwise, empty while open.
        owner: String,
        /// The run of an epoch pause.
        run: Option<RunId>,
        /// Its epoch.
        epoch: Option<Epoch>,
        /// What is held; empty while open.
        mode: Option<crate::command::Mode>,
        /// What is left of the lease; NULL: no lease.
        lease_ms: Option<Duration>,
        /// Whether a pause is complete.
        drained: YesNo,
        /// Transactions that are open; while only writes are held, those that may write.
        open_transactions: u32,
        /// Clients whose next transaction waits for the gate.
        held_clients: u32,
        /// For how long the first of them has waited.
        held_ms_max: Duration,
        /// The active backend.
        backend: String,
        /// The epoch of the route.
        route_epoch: Epoch,
        /// Whether the database has a working control login.
        control: YesNo,
    }

    /// SHOW BACKENDS: one row per declared backend.
    BackendRow {
        /// The route name.
        database: String,
        /// The backend's name.
        backend: String,
        /// Whether it is the active one.
        active: YesNo,
        /// Whether the configuration names it as the initial one.
        configured: YesNo,
        /// Host or socket directory.
        host: String,
        /// Port.
        port: u16,
        /// The database's name there.
        dbname: String,
        /// The user that every client becomes, if any.
        user: String,
        /// libpq's sslmode.
        sslmode: String,
        /// Open connections.
        connections: u32,
        /// Of these at rest.
        idle: u32,
        /// Of these opened by PREPARE SWITCH.
        prewarmed: u32,
        /// Transactions begun on it since the start.
        transactions: u64,
        /// Empty until the first connection.
        server_version: String,
        /// The cluster's system identifier, empty until the control login read it.
        system_identifier: String,
        /// Its timeline.
        timeline: Option<u32>,
        /// The epoch of the database's route.
        route_epoch: Epoch,
    }

    /// SHOW SESSIONS: one row per client of a database.
    SessionRow {
        /// The route name.
        database: String,
        /// The client's user.
        user: String,
        /// The `id` of SHOW CLIENTS.
        client_id: u64,
        /// The client's address, `unix` for a socket.
        addr: String,
        /// Its port.
        port: u16,
        /// As the client set it.
        application_name: String,
        /// How it is pooled.
        pool_mode: PoolMode,
        /// What it does.
        state: SessionState,
        /// The process of the server connection it has, if any.
        linked: Option<i32>,
        /// Whether a switch can take it along.
        movable: YesNo,
        /// Why not.
        reason: String,
        /// What will become of it: not movable, that is by the database's `session_policy`.
        verdict: Prospect,
    }

    /// SHOW BLOCKERS: one row per session that a drain waits for.
    BlockerRow {
        /// The route name.
        database: String,
        /// The client's user.
        user: String,
        /// The `id` of SHOW CLIENTS.
        client_id: u64,
        /// The client's address, `unix` for a socket.
        addr: String,
        /// Its port.
        port: u16,
        /// As the client set it.
        application_name: String,
        /// How it is pooled.
        pool_mode: PoolMode,
        /// The process of its server connection.
        server_pid: Option<i32>,
        /// The last status byte `I`, `T` or `E`, or `active` while a query is under way.
        state: String,
        /// For how long its transaction has been open.
        transaction_ms: Duration,
        /// The start of its last statement, where it is known.
        query: String,
        /// Why the drain waits for it.
        reason: BlockerReason,
        /// The server process whose lock it waits for.
        waits_for: Option<i32>,
    }

    /// SHOW SWITCHES: one row per switch since the start.
    SwitchRow {
        /// The route name.
        database: String,
        /// When.
        at: SystemTime,
        /// The backend before.
        from_backend: String,
        /// The backend after.
        to_backend: String,
        /// The epoch of the route after it.
        epoch: Epoch,
        /// Whose it was.
        run: Option<RunId>,
        /// By what right.
        how: SwitchHow,
        /// Clients that were held at that moment.
        held_clients: u32,
        /// From the gate's shutting to its opening; NULL: still shut.
        pause_ms: Option<Duration>,
    }

    /// SHOW PAUSES: one row per pause that is over, since the start; the last ones, if there were many.
    PauseRow {
        /// The route name.
        database: String,
        /// When the gate was shut.
        at: SystemTime,
        /// Who paused it: the run of an epoch pause, `user@address` of the admin otherwise.
        owner: String,
        /// The run of an epoch pause.
        run: Option<RunId>,
        /// Its epoch.
        epoch: Option<Epoch>,
        /// From the gate's shutting until no transaction was open; NULL: it did not come to that.
        drain_ms: Option<Duration>,
        /// From the gate's shutting to its opening.
        pause_ms: Duration,
        /// Clients that waited when it opened.
        held_clients: u32,
        /// Transactions that it held and that were let go, or given up, so far.
        holds: u32,
        /// Half of these were held no longer than this, to within an eighth; NULL: none was held.
        held_us_p50: Option<u64>,
        /// The longest.
        held_us_max: Option<u64>,
    }

    /// TRANSPLANT: one row per session that keeps its server; all are moved or none.
    TransplantRow {
        /// The `id` of SHOW CLIENTS.
        client_id: u64,
        /// The client's user.
        user: String,
        /// What became of it.
        verdict: Fate,
        /// Why not.
        reason: String,
        /// How long reading it took, in microseconds.
        probe_us: u64,
        /// How long restoring it took, in microseconds.
        restore_us: u64,
    }

    /// PREPARE SWITCH: one row per user.
    PrepareRow {
        /// The user.
        user: String,
        /// Connections wanted.
        wanted: u32,
        /// Connections open.
        open: u32,
        /// What became of it.
        status: Verdict,
        /// The server's code for a refusal.
        sqlstate: String,
        /// Its words.
        message: String,
    }
}

impl GateRow {
    /// Whether transactions begin, all or those that read: writes may wait for a person while a run is done.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.state == GateState::Open || self.mode == Some(crate::command::Mode::Writes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::command::Mode;

    fn again<R: Row>(row: &R) -> Result<R, RowError> {
        let cells = row.to_text();
        R::from_text(|name| {
            let at = R::COLUMNS.iter().position(|column| column.name == name)?;
            Some(cells[at].as_deref())
        })
    }

    fn gate(state: GateState, owned: bool, number: u64) -> GateRow {
        GateRow {
            database: "app".to_owned(),
            state,
            owner: "o'wner".to_owned(),
            run: owned.then(RunId::random),
            epoch: owned.then(|| Epoch::try_from(number >> 1).unwrap()),
            mode: owned.then_some(Mode::All),
            lease_ms: owned.then(|| Duration::from_millis(number >> 1)),
            drained: YesNo::from(owned),
            open_transactions: 3,
            held_clients: 4,
            held_ms_max: Duration::from_millis(5),
            backend: "blue".to_owned(),
            route_epoch: Epoch::ZERO,
            control: YesNo::No,
        }
    }

    proptest! {
        #[test]
        fn what_a_row_prints_reads_as_the_same_row(owned: bool, number: u64, which in 0_usize..3) {
            let row = gate(GateState::ALL[which], owned, number);
            prop_assert_eq!(again(&row), Ok(row));
        }
    }

    #[test]
    fn a_gate_serves_while_only_writes_are_held() {
        let mut row = gate(GateState::Paused, true, 8);
        assert!(!row.serves());
        row.mode = Some(Mode::Writes);
        assert!(row.serves() && gate(GateState::Open, false, 8).serves());
    }

    #[test]
    fn a_switch_keeps_its_moment_to_the_millisecond() {
        let row = SwitchRow {
            database: "app".to_owned(),
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            from_backend: "blue".to_owned(),
            to_backend: "green".to_owned(),
            epoch: Epoch::MAX,
            run: None,
            how: SwitchHow::Followed,
            held_clients: u32::MAX >> 1,
            pause_ms: None,
        };
        assert_eq!(row.to_text()[1].as_deref(), Some("2023-11-14T22:13:20.123Z"));
        assert_eq!(row.to_text()[5].as_deref(), Some(""), "no run is an empty text");
        assert_eq!(row.to_text()[8], None, "no time is NULL");
        assert_eq!(again(&row), Ok(row));
    }

    #[test]
    fn a_missing_column_is_named() {
        let error = PrepareRow::from_text(|name| (name != "open").then_some(Some("1"))).unwrap_err();
        assert_eq!(error.to_string(), "column open: is missing");
    }

    #[test]
    fn columns_have_the_types_of_the_contract() {
        let kind = |name: &str| GateRow::COLUMNS.iter().find(|column| column.name == name).unwrap().kind;
        assert_eq!((kind("run"), kind("epoch"), kind("lease_ms")), (Kind::Text, Kind::Int8, Kind::Int8));
        assert_eq!((kind("held_clients"), kind("drained")), (Kind::Int4, Kind::Text));
    }
}
