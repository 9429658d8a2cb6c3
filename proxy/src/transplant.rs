//! Moves what a session is made of from its old server to a new one: read, said again, compared.
//!
//! Invariant: what is not known to be restorable is refused with its [`Reason`]; a refusal changes nothing on the old
//! server. The new connection is of no use to anyone else once a restore has begun, whatever came of it.

mod prepare;
mod probe;
mod ready;
mod reason;
mod restore;
mod sequences;
mod snapshot;
mod still;

use std::sync::Arc;

use thiserror::Error;
use tokio::time::Instant;

use crate::backend::ServerConnection;
use crate::backend::ServerError;

pub use reason::{NotMovable, Reason};
pub use sequences::{Seat, Ticket};
pub use snapshot::Snapshot;

/// What the prober has to be told, because no server can say it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// Names of custom settings (`myapp.user_id`) that are to move: configured, and seen in `SET`.
    pub custom_settings: Vec<Box<[u8]>>,
    /// What is so for all sessions of this database: of [`survey`], once per attempt.
    pub survey: Arc<Survey>,
    /// What only the wire has seen of this session.
    pub seen: Seen,
}

/// What is so for all sessions of a database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// What speaks against moving any of them; [`Reason::AdvisoryLocks`]: against those that hold one.
    pub reasons: Vec<Reason>,
    /// The OIDs of all sequences that are not temporary.
    pub sequences: Vec<u32>,
    /// The server has the decision store's function that tells a session from what it was.
    pub prints: bool,
}

impl Survey {
    /// Whether that was found.
    #[must_use]
    pub fn forbids(&self, reason: Reason) -> bool {
        self.reasons.contains(&reason)
    }
}

/// What went over a session's wire since its login and can't be read from a server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Whatever forbids a move by itself: [`Reason::Load`], [`Reason::SessionAuthorization`], [`Reason::FunctionCall`],
    /// [`Reason::RandomSeed`], [`Reason::DynamicSetting`].
    pub reasons: Vec<Reason>,
    /// The server has reported another standard_conforming_strings, DateStyle, IntervalStyle or TimeZone than at login
    /// (all four are reported, so the wire misses none); statements may have been parsed under either.
    pub parse_settings: ParseSettings,
    /// Calls of functions that take session advisory locks.
    pub lock_calls: LockCalls,
    /// The text of the last Parse of the unnamed statement. The server says whether it is still alive; where it is and
    /// this is `None` the session stays.
    pub unnamed: Option<Box<[u8]>>,
}

/// Whether all statements of a session were parsed under the same settings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ParseSettings {
    /// No report since the login differed from it.
    #[default]
    Unchanged,
    /// One did, also if it has been set back since.
    Changed,
}

/// How often a session advisory lock was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockCalls {
    /// So many calls, each for one lock with a key that is no OID (not `regclass`).
    Counted(u32),
    /// Unknown: repeated by a prepared statement, over rows, in a function, or with a key computed from an OID.
    Unclear,
}

impl Default for LockCalls {
    fn default() -> Self {
        Self::Counted(0)
    }
}

/// Why a session has no successor on the new server.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// The new server can't give what the old one has; `detail` names it (for the operator: may hold settings' values).
    #[error("{}: {detail}", reason.text())]
    Differs {
        /// Which kind.
        reason: Reason,
        /// The statement, setting, type, lock …
        detail: String,
    },
    /// The new server refused or failed.
    #[error("{0}")]
    Server(#[from] ServerError),
}

impl RestoreError {
    /// What to show for it.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Differs { reason, detail: _ } => *reason,
            Self::Server(_) => Reason::Server,
        }
    }
}

/// What is so for all sessions of the database that `server` is connected to.
///
/// # Errors
/// [`ServerError`].
pub async fn survey(server: &mut ServerConnection, deadline: Instant) -> Result<Survey, ServerError> {
    probe::survey(server, deadline).await
}

/// Reads what a session is made of, between two transactions; leaves no trace in it. What the server says aside
/// meanwhile is kept in [`ServerConnection::asides`] for the client. `before` is what was read of it earlier: where nothing
/// but the values of sequences has changed since, only they are read. Not cancel safe: finish it or drop the connection.
///
/// # Errors
/// [`ServerError::Broken`] and [`ServerError::Timeout`]: the old connection is lost. A refused statement is no error
/// but a [`NotMovable`].
pub async fn probe(
    server: &mut ServerConnection,
    hints: &Hints,
    before: Option<&Snapshot>,
    deadline: Instant,
) -> Result<Result<Snapshot, NotMovable>, ServerError> {
    // Boxed: the future is large, and waits inside others that are many.
    match Box::pin(probe::read(server, hints, before, deadline)).await {
        Ok(snapshot) => Ok(Ok(snapshot)),
        Err(probe::Failure::Stays(why)) => Ok(Err(why)),
        Err(probe::Failure::Lost(error)) => Err(error),
    }
}

/// Says all of a snapshot to a fresh connection of the same login, and compares. Notifications that come meanwhile are
/// kept in [`ServerConnection::asides`]. `tickets` are those for its [`Snapshot::seats`], in that order. Not cancel safe.
///
/// # Errors
/// [`RestoreError`]: the caller closes this connection, the session goes on where it was.
pub async fn restore(
    server: &mut ServerConnection,
    snapshot: &Snapshot,
    tickets: &[Ticket],
    deadline: Instant,
) -> Result<(), RestoreError> {
    Box::pin(restore::write(server, snapshot, tickets, deadline)).await
}

/// Makes a copy of a session ready for [`touch_up`] and for its client, so that both take less time under a pause and right
/// after it.
///
/// # Errors
/// [`ServerError::Broken`] and [`ServerError::Timeout`]: the connection is lost. A refusal is none: the copy is as good as
/// before.
pub async fn get_ready(
    server: &mut ServerConnection,
    snapshot: &Snapshot,
    deadline: Instant,
) -> Result<(), ServerError> {
    Box::pin(restore::get_ready(server, snapshot, deadline)).await
}

/// Brings a connection that was made a copy of `made` up to `snapshot`, where they differ in sequences only; `false`: in
/// more, and nothing was done. Not cancel safe.
///
/// # Errors
/// [`RestoreError`]: the caller closes this connection.
pub async fn touch_up(
    server: &mut ServerConnection,
    made: &Snapshot,
    snapshot: &Snapshot,
    tickets: &[Ticket],
    deadline: Instant,
) -> Result<bool, RestoreError> {
    if !made.differs_in_sequences_only(snapshot) {
        return Ok(false);
    }
    Box::pin(restore::touch_up(server, snapshot, tickets, deadline)).await?;
    Ok(true)
}
