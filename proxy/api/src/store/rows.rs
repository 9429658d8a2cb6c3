//! What the store's rows mean.
//!
//! Invariant: a row that is not what its statement promises is an error that names the column, never a default.

use std::str::FromStr;

use thiserror::Error;

use crate::epoch::{Epoch, RunId};
use crate::store::Outcome;

/// An epoch that is open and not decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenEpoch {
    /// The epoch.
    pub epoch: Epoch,
    /// The run that opened it.
    pub run: RunId,
    /// The backend it wants to move to.
    pub target: String,
}

/// A decided epoch, from `decision` (here) or `evidence` (decided on the other side).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The epoch.
    pub epoch: Epoch,
    /// The run.
    pub run: RunId,
    /// Commit or abort.
    pub outcome: Outcome,
    /// The backend that the epoch wanted to move to.
    pub target: String,
}

/// What one server's store says of one database, read in one statement.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreView {
    /// The opened epoch that nothing has decided: hold.
    pub open: Option<OpenEpoch>,
    /// The newest decided epoch.
    pub last: Option<Decision>,
    /// The newest committed epoch: the one to follow if it is newer than the route's. Not always `last`: an aborted epoch
    /// may come after the commit that a proxy missed.
    pub last_commit: Option<Decision>,
}

/// A proxy as it enrolled itself in `member`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The proxy's instance name.
    pub instance: String,
    /// Where its console can be reached, for people and for `proxies` in proxyctl's configuration.
    pub address: String,
    /// Its active backend.
    pub backend: String,
    /// Its route's epoch; 0 before any switch.
    pub route_epoch: Epoch,
    /// The epoch of its pause, if it has one.
    pub paused_epoch: Option<Epoch>,
    /// How long ago it was seen, by the server's clock; 0 in what a proxy writes.
    pub seen_ms_ago: u64,
}

/// Which server this is. A promoted or restored server has another timeline (R14).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `pg_control_system().system_identifier`.
    pub system_identifier: u64,
    /// The timeline of a primary; `None` in recovery.
    pub timeline: Option<u32>,
    /// Whether it is a standby.
    pub in_recovery: bool,
    /// `server_version_num`, such as 130023.
    pub version_num: u32,
}

/// The form of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GateForm {
    /// A no-op.
    Open,
    /// Shut until an abort of its epoch is visible.
    Fenced,
    /// Shut until evidence of a commit of its epoch, or a newer one, is visible.
    Target,
}

/// One row of `pgcutover.gates`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    /// The route.
    pub db: String,
    /// Its form; `None` if the function's body is not one of ours.
    pub form: Option<GateForm>,
    /// The epoch of the form; 0 for the no-op.
    pub epoch: Epoch,
}

/// A row that is not what the statement promises: another version's store, or not ours.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadRow {
    /// Another number of columns.
    #[error("the store answered {found} columns where {wanted} were asked for")]
    Columns {
        /// Columns that the statement has.
        wanted: usize,
        /// Columns that came.
        found: usize,
    },
    /// NULL where a value has to be.
    #[error("the store answered NULL for {0}")]
    Null(&'static str),
    /// A value that can't be read.
    #[error("the store answered {value:?} for {column}")]
    Value {
        /// The column.
        column: &'static str,
        /// What came, cut to 80 characters.
        value: String,
    },
}

impl BadRow {
    pub(super) fn value(column: &'static str, value: &str) -> Self {
        Self::Value { column, value: value.chars().take(80).collect() }
    }
}

impl StoreView {
    /// Reads the one row of [`view`](crate::store::view).
    pub fn decode(row: &[Option<&str>]) -> Result<Self, BadRow> {
        let [epoch, run, target, decided, rest @ ..] = row else {
            return Err(BadRow::Columns { wanted: 12, found: row.len() });
        };
        let ([last, commit], []) = rest.as_chunks::<4>() else {
            return Err(BadRow::Columns { wanted: 12, found: row.len() });
        };
        let open = match epoch {
            Some(epoch) if !boolean(*decided, "decided")? => Some(OpenEpoch {
                epoch: parse(Some(epoch), "epoch")?,
                run: parse(*run, "run")?,
                target: text(*target, "target")?,
            }),
            Some(_) | None => None,
        };
        Ok(Self { open, last: Decision::decode(last)?, last_commit: Decision::decode(commit)? })
    }
}

impl Decision {
    fn decode([epoch, run, outcome, target]: &[Option<&str>; 4]) -> Result<Option<Self>, BadRow> {
        let Some(epoch) = epoch else { return Ok(None) };
        Ok(Some(Self {
            epoch: parse(Some(epoch), "epoch")?,
            run: parse(*run, "run")?,
            outcome: Outcome::from_str(required(*outcome, "outcome")?)?,
            target: text(*target, "target")?,
        }))
    }
}

impl Member {
    /// Reads one row of [`members`](crate::store::members).
    pub fn decode(row: &[Option<&str>]) -> Result<Self, BadRow> {
        let [instance, address, backend, route_epoch, paused_epoch, seen_ms_ago] = columns(row)?;
        Ok(Self {
            instance: text(instance, "instance")?,
            address: text(address, "address")?,
            backend: text(backend, "backend")?,
            route_epoch: parse(route_epoch, "route_epoch")?,
            paused_epoch: paused_epoch.map(|epoch| parse(Some(epoch), "paused_epoch")).transpose()?,
            seen_ms_ago: parse(seen_ms_ago, "seen_at")?,
        })
    }
}

impl Identity {
    /// Reads the one row of [`IDENTITY`](crate::store::IDENTITY).
    pub fn decode(row: &[Option<&str>]) -> Result<Self, BadRow> {
        let [system, timeline, recovery, version] = columns(row)?;
        // A bigint in SQL: identifiers of servers initialised after 2038 would come back negative.
        let system: i64 = parse(system, "system_identifier")?;
        let hex = |digits: &str| u32::from_str_radix(digits, 16).map_err(|_| BadRow::value("timeline", digits));
        Ok(Self {
            system_identifier: system.cast_unsigned(),
            timeline: timeline.map(hex).transpose()?,
            in_recovery: boolean(recovery, "pg_is_in_recovery")?,
            version_num: parse(version, "server_version_num")?,
        })
    }
}

impl Gate {
    /// Reads one row of [`GATES`](crate::store::GATES).
    pub fn decode(row: &[Option<&str>]) -> Result<Self, BadRow> {
        let [db, form, epoch] = columns(row)?;
        let form = match form {
            None => None,
            Some("open") => Some(GateForm::Open),
            Some("fenced") => Some(GateForm::Fenced),
            Some("target") => Some(GateForm::Target),
            Some(other) => return Err(BadRow::value("form", other)),
        };
        let epoch = if form.is_some() { parse(epoch, "epoch")? } else { Epoch::ZERO };
        Ok(Self { db: text(db, "db")?, form, epoch })
    }
}

/// Reads the answer of [`open`](crate::store::open).
pub fn decode_epoch(row: &[Option<&str>]) -> Result<Epoch, BadRow> {
    let [epoch] = columns(row)?;
    parse(epoch, "epoch")
}

/// Reads the answer of [`decide`](crate::store::decide) and [`witness`](crate::store::witness).
pub fn decode_outcome(row: &[Option<&str>]) -> Result<Outcome, BadRow> {
    let [outcome] = columns(row)?;
    Outcome::from_str(required(outcome, "outcome")?)
}

/// Reads an answer of one boolean: [`guard`](crate::store::guard), [`arm_table`](crate::store::arm_table), [`disarm_table`](crate::store::disarm_table), [`INSTALLED`](crate::store::INSTALLED).
pub fn decode_bool(row: &[Option<&str>]) -> Result<bool, BadRow> {
    let [answer] = columns(row)?;
    boolean(answer, "answer")
}

fn columns<'a, const N: usize>(row: &[Option<&'a str>]) -> Result<[Option<&'a str>; N], BadRow> {
    row.try_into().map_err(|_| BadRow::Columns { wanted: N, found: row.len() })
}

fn required<'a>(value: Option<&'a str>, column: &'static str) -> Result<&'a str, BadRow> {
    value.ok_or(BadRow::Null(column))
}

fn text(value: Option<&str>, column: &'static str) -> Result<String, BadRow> {
    required(value, column).map(str::to_owned)
}

fn parse<T: FromStr>(value: Option<&str>, column: &'static str) -> Result<T, BadRow> {
    let value = required(value, column)?;
    value.parse().map_err(|_| BadRow::value(column, value))
}

fn boolean(value: Option<&str>, column: &'static str) -> Result<bool, BadRow> {
    match required(value, column)? {
        "t" => Ok(true),
        "f" => Ok(false),
        other => Err(BadRow::value(column, other)),
    }
}
