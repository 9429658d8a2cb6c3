//! Typed questions to source and target: everything proxyctl reads from and writes to a PostgreSQL server.
//!
//! Invariant: every wait has a limit given by the caller; a statement is one message, so a controller that dies leaves no
//! transaction open; an answer that can't be read is an error, never a default.

mod barrier;
pub mod digest;
pub mod pin;
mod replication;
mod sequences;
mod standby;
mod store;
mod tables;
pub mod way_back;

use std::fmt;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

pub use crate::clusters::barrier::{BarrierError, Passed, PreparedTransaction, Writer};
pub use crate::clusters::replication::{
    CatchUpError, CaughtUp, Coverage, Extent, Feed, Lag, Lsn, PublishedTable, SlotState, Subscription, TableState,
    uncovered,
};
pub use crate::clusters::sequences::{Position, Sequence, SequenceDrift, Setting, drift};
pub use crate::clusters::standby::{Promotion, Receiver, Recovery, Standby};
pub use crate::clusters::store::{Certainty, DecideError};
pub use crate::clusters::tables::{GateState, TableFacts, TableKind, Ungated};
pub use crate::clusters::way_back::Offer;
use crate::config::Endpoint;
use crate::dial;

/// No statement of ours runs longer on a server than this, whoever stopped waiting for it.
const STATEMENT_MAX: Duration = Duration::from_secs(30);

/// Which of the two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The one that loses its clients.
    Source,
    /// The one that gains them.
    Target,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Source => "source",
            Role::Target => "target",
        })
    }
}

/// Why a server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// No connection could be had: nothing was asked.
    #[error("{role}: cannot connect: {error}")]
    Unreachable {
        /// Which server.
        role: Role,
        /// Why.
        error: dial::DialError,
    },
    /// The server answered with an error: the transaction has not happened.
    #[error("{role}: {what}: {message} [{sqlstate}]")]
    Refused {
        /// Which server.
        role: Role,
        /// What was asked.
        what: &'static str,
        /// The error's SQLSTATE.
        sqlstate: String,
        /// The server's words.
        message: String,
    },
    /// The connection broke: whether it happened is not known.
    #[error("{role}: {what}: connection lost: {message}")]
    Lost {
        /// Which server.
        role: Role,
        /// What was asked.
        what: &'static str,
        /// How it broke.
        message: String,
    },
    /// No answer in time: whether it happened is not known.
    #[error("{role}: {what}: no answer within {limit:?}")]
    Deadline {
        /// Which server.
        role: Role,
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// An answer that can't be read.
    #[error("{role}: {what}: {problem}")]
    Answer {
        /// Which server.
        role: Role,
        /// What was asked.
        what: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl ClusterError {
    /// The server's SQLSTATE, if it answered.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            ClusterError::Refused { sqlstate, .. } => Some(sqlstate),
            ClusterError::Unreachable { .. }
            | ClusterError::Lost { .. }
            | ClusterError::Deadline { .. }
            | ClusterError::Answer { .. } => None,
        }
    }

    /// Whether the server can be told to be away rather than to refuse.
    pub fn is_absence(&self) -> bool {
        match self {
            ClusterError::Unreachable { .. } | ClusterError::Lost { .. } | ClusterError::Deadline { .. } => true,
            ClusterError::Refused { .. } | ClusterError::Answer { .. } => false,
        }
    }
}

/// What came back for one message.
#[derive(Debug, Default)]
pub struct Answer {
    /// The rows of all its statements.
    pub rows: Vec<SimpleQueryRow>,
    /// The row count of each statement's command tag, 0 where the tag has none.
    pub counts: Vec<u64>,
}

impl Answer {
    /// Every row, decoded; the error names the server and the question.
    fn decoded<T>(&self, role: Role, what: &'static str, decode: Decode<T>) -> Result<Vec<T>, ClusterError> {
        let decoded = self.rows.iter().map(|row| decode(&Cells(row))).collect::<Result<Vec<T>, BadCell>>();
        decoded.map_err(|problem| ClusterError::Answer { role, what, problem: problem.to_string() })
    }
}

/// One server, connected when needed and again after a loss. Questions to one `Cluster` wait for each other; for something
/// that must not wait, make [`Cluster::another`].
#[derive(Debug)]
pub struct Cluster {
    role: Role,
    endpoint: Endpoint,
    client: Mutex<Option<Client>>,
}

impl Cluster {
    /// A server that is not connected yet.
    pub fn new(role: Role, endpoint: &Endpoint) -> Cluster {
        Cluster { role, endpoint: endpoint.clone(), client: Mutex::new(None) }
    }

    /// Connects. The limit is [`dial::CONNECT_DEADLINE`].
    pub async fn connect(role: Role, endpoint: &Endpoint) -> Result<Cluster, ClusterError> {
        let cluster = Cluster::new(role, endpoint);
        let client = cluster.dial().await?;
        *cluster.client.lock().await = Some(client);
        Ok(cluster)
    }

    /// The same server over a connection of its own.
    pub fn another(&self) -> Cluster {
        Cluster::new(self.role, &self.endpoint)
    }

    /// Another database of the same server, over a connection of its own.
    pub fn of_database(&self, name: &str) -> Cluster {
        let mut endpoint = self.endpoint.clone();
        endpoint.pg.dbname(name);
        Cluster::new(self.role, &endpoint)
    }

    /// Which of the two it is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Sends one message and waits for all of its answer, at most `limit`, connecting included. After an error the
    /// transaction it left open is rolled back; after a loss or a missed limit the next question connects anew.
    /// Not cancel safe: a dropped call leaves the connection to the next caller with its answer still under way, which
    /// the driver discards.
    pub async fn ask(&self, what: &'static str, sql: &str, limit: Duration) -> Result<Answer, ClusterError> {
        match tokio::time::timeout(limit, self.converse(what, sql)).await {
            Ok(answer) => answer,
            Err(_) => {
                // The connection still owes an answer; the server ends the statement by STATEMENT_MAX.
                if let Ok(mut client) = self.client.try_lock() {
                    *client = None;
                }
                Err(ClusterError::Deadline { role: self.role, what, limit })
            }
        }
    }

    async fn converse(&self, what: &'static str, sql: &str) -> Result<Answer, ClusterError> {
        let mut slot = self.client.lock().await;
        let client = match slot.take() {
            Some(client) if !client.is_closed() => client,
            Some(_) | None => self.dial().await?,
        };
        let client = slot.insert(client);
        let error = match client.simple_query(sql).await {
            Ok(messages) => return Ok(collect(messages)),
            Err(error) => error,
        };
        let Some(refused) = refusal(self.role, what, &error) else {
            *slot = None;
            return Err(ClusterError::Lost { role: self.role, what, message: dial::words(&error) });
        };
        if client.simple_query(pgcutover_api::store::ROLLBACK).await.is_err() {
            *slot = None;
        }
        Err(refused)
    }

    async fn dial(&self) -> Result<Client, ClusterError> {
        let client = dial::dial(&self.endpoint, "proxyctl")
            .await
            .map_err(|error| ClusterError::Unreachable { role: self.role, error })?;
        // What a role or database sets must not change what our statements mean.
        let settings = format!(
            "SET search_path = pg_catalog; SET standard_conforming_strings = on; SET row_security = off; \
             SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
             SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET statement_timeout = {}",
            STATEMENT_MAX.as_millis()
        );
        client.batch_execute(&settings).await.map_err(|error| ClusterError::Lost {
            role: self.role,
            what: "session settings",
            message: dial::words(&error),
        })?;
        Ok(client)
    }

    /// The first row, decoded; no row is an error.
    async fn one<T>(
        &self,
        what: &'static str,
        sql: &str,
        limit: Duration,
        decode: Decode<T>,
    ) -> Result<T, ClusterError> {
        let answer = self.ask(what, sql, limit).await?;
        let row = answer.rows.first().ok_or_else(|| self.unreadable(what, "no row came"))?;
        decode(&Cells(row)).map_err(|problem| self.unreadable(what, problem))
    }

    /// Every row, decoded.
    pub(crate) async fn list<T>(
        &self,
        what: &'static str,
        sql: &str,
        limit: Duration,
        decode: Decode<T>,
    ) -> Result<Vec<T>, ClusterError> {
        self.ask(what, sql, limit).await?.decoded(self.role, what, decode)
    }

    fn unreadable(&self, what: &'static str, problem: impl fmt::Display) -> ClusterError {
        ClusterError::Answer { role: self.role, what, problem: problem.to_string() }
    }
}

/// How a row becomes a value.
pub(crate) type Decode<T> = fn(&Cells<'_>) -> Result<T, BadCell>;

/// A cell that does not hold what the statement promises.
#[derive(Debug, thiserror::Error)]
#[error("column {column}: {value:?} is not {wanted}")]
pub(crate) struct BadCell {
    column: &'static str,
    value: Option<String>,
    wanted: &'static str,
}

/// One row, read by column names.
pub(crate) struct Cells<'a>(&'a SimpleQueryRow);

impl Cells<'_> {
    /// The cell or NULL; a column that is not there counts as NULL and fails where a value is needed.
    pub(crate) fn maybe(&self, column: &'static str) -> Option<&str> {
        self.0.try_get(column).ok().flatten()
    }

    /// A text that must be there.
    pub(crate) fn text(&self, column: &'static str) -> Result<String, BadCell> {
        self.maybe(column).map(str::to_owned).ok_or(BadCell { column, value: None, wanted: "a text" })
    }

    /// A text or NULL.
    pub(crate) fn maybe_text(&self, column: &'static str) -> Option<String> {
        self.maybe(column).map(str::to_owned)
    }

    /// A number that must be there.
    pub(crate) fn number<T: std::str::FromStr>(&self, column: &'static str) -> Result<T, BadCell> {
        let bad =
            |value: Option<&str>| BadCell { column, value: value.map(str::to_owned), wanted: "a number in range" };
        let value = self.maybe(column).ok_or_else(|| bad(None))?;
        value.parse().map_err(|_| bad(Some(value)))
    }

    /// A number or NULL.
    pub(crate) fn maybe_number<T: std::str::FromStr>(&self, column: &'static str) -> Result<Option<T>, BadCell> {
        self.maybe(column).map(|_| self.number(column)).transpose()
    }

    /// A boolean that must be there.
    pub(crate) fn flag(&self, column: &'static str) -> Result<bool, BadCell> {
        match self.maybe(column) {
            Some("t") => Ok(true),
            Some("f") => Ok(false),
            other => Err(BadCell { column, value: other.map(str::to_owned), wanted: "t or f" }),
        }
    }
}

/// All cells of a row, for the decoders of the store.
fn cells(row: &SimpleQueryRow) -> Vec<Option<&str>> {
    (0..row.len()).map(|at| row.get(at)).collect()
}

fn collect(messages: Vec<SimpleQueryMessage>) -> Answer {
    let mut answer = Answer::default();
    for message in messages {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the driver's enum is non-exhaustive; descriptions carry no data"
        )]
        match message {
            SimpleQueryMessage::Row(row) => answer.rows.push(row),
            SimpleQueryMessage::CommandComplete(count) => answer.counts.push(count),
            _ => {}
        }
    }
    answer
}

/// What the server said, if it was the server that said something.
fn refusal(role: Role, what: &'static str, error: &tokio_postgres::Error) -> Option<ClusterError> {
    let db = error.as_db_error()?;
    let (sqlstate, message) = (db.code().code().to_owned(), message_of(db));
    Some(ClusterError::Refused { role, what, sqlstate, message })
}

fn message_of(db: &tokio_postgres::error::DbError) -> String {
    match db.detail() {
        Some(detail) => format!("{} ({detail})", db.message()),
        None => db.message().to_owned(),
    }
}

/// A point in time by which something has to be done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    start: Instant,
    limit: Duration,
}

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Deadline {
        Deadline { start: Instant::now(), limit }
    }

    /// What is left; zero once it is over.
    pub(crate) fn left(&self) -> Duration {
        self.limit.saturating_sub(self.start.elapsed())
    }

    pub(crate) fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    /// How long it took so far.
    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Source and target of one cutover.
#[derive(Debug)]
pub struct Clusters {
    /// The server that loses its clients.
    pub source: Cluster,
    /// The server that gains them.
    pub target: Cluster,
}

impl Clusters {
    /// Both, connected when they are first asked.
    pub fn unconnected(source: &Endpoint, target: &Endpoint) -> Clusters {
        Clusters { source: Cluster::new(Role::Source, source), target: Cluster::new(Role::Target, target) }
    }

    /// Connects to both. The limit is [`dial::CONNECT_DEADLINE`].
    pub async fn connect(source: &Endpoint, target: &Endpoint) -> Result<Clusters, ClusterError> {
        let (source, target) =
            tokio::try_join!(Cluster::connect(Role::Source, source), Cluster::connect(Role::Target, target))?;
        Ok(Clusters { source, target })
    }
}
