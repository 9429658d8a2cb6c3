//! The few statements that we send in our own name: decisions, checks, resets.
//!
//! Invariant: an answer is read to its ReadyForQuery, also after an error; where that fails the connection stays
//! `Busy` and is of no more use.

use bytes::Bytes;
use thiserror::Error;
use tokio::time::{Instant, timeout_at};

use crate::backend::{Rest, ServerConnection, WireError};
use crate::message;
use crate::report::SqlState;

/// The longest answer to a statement of ours, in bytes: thousands of rows of the largest of them.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// A row of text values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row(Vec<Option<Bytes>>);

impl Row {
    /// How many columns it has.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.0.len()
    }

    /// A column from 0; `None` for NULL, for a column that is not there, and for bytes that are not UTF-8.
    #[must_use]
    pub fn text(&self, column: usize) -> Option<&str> {
        std::str::from_utf8(self.bytes(column)?).ok()
    }

    /// A column from 0, as it came; `None` for NULL and for a column that is not there.
    #[must_use]
    pub fn bytes(&self, column: usize) -> Option<&[u8]> {
        self.0.get(column)?.as_deref()
    }

    /// A column from 0 parsed; `None` also for a text that is not a `T`.
    #[must_use]
    pub fn parse<T: std::str::FromStr>(&self, column: usize) -> Option<T> {
        self.text(column)?.parse().ok()
    }
}

/// Why a statement of ours gave no rows.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ServerError {
    /// The server refused the statement; the connection is at rest and can go on.
    #[error("{message} ({sqlstate})")]
    Refused {
        /// The server's.
        sqlstate: SqlState,
        /// The server's.
        message: String,
    },
    /// The connection is of no use any more: drop it.
    #[error("{0}")]
    Broken(String),
    /// No answer by the deadline; the statement may still run: drop the connection.
    #[error("no answer in time")]
    Timeout,
}

impl ServerError {
    /// The server's SQLSTATE, where it refused.
    #[must_use]
    pub fn sqlstate(&self) -> Option<SqlState> {
        match self {
            Self::Refused { sqlstate, message: _ } => Some(*sqlstate),
            Self::Broken(_) | Self::Timeout => None,
        }
    }
}

impl From<WireError> for ServerError {
    fn from(error: WireError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl ServerConnection {
    /// Runs one statement with text parameters, gives text rows. Not cancel safe: drop the connection with the future.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn query(
        &mut self,
        sql: &str,
        params: &[Option<&str>],
        deadline: Instant,
    ) -> Result<Vec<Row>, ServerError> {
        message::put_statement(&mut self.output, sql.as_bytes(), params);
        self.run(deadline).await
    }

    /// Runs statements separated by `;` as one simple query, gives all their rows. Not cancel safe.
    ///
    /// # Errors
    /// [`ServerError`]: of the first statement that failed.
    pub async fn simple(&mut self, sql: &str, deadline: Instant) -> Result<Vec<Row>, ServerError> {
        message::put_query(&mut self.output, sql.as_bytes());
        self.run(deadline).await
    }

    async fn run(&mut self, deadline: Instant) -> Result<Vec<Row>, ServerError> {
        if self.rest == Rest::Busy {
            return Err(ServerError::Broken("the connection is in the middle of another request".to_owned()));
        }
        self.rest = Rest::Busy;
        match timeout_at(deadline, Box::pin(self.exchange())).await {
            Ok(answer) => answer,
            Err(_) => Err(ServerError::Timeout),
        }
    }

    /// Sends the request and reads its answer to the ReadyForQuery.
    async fn exchange(&mut self) -> Result<Vec<Row>, ServerError> {
        self.send().await?;
        let mut rows = Vec::new();
        let mut refused = None;
        let mut answer_bytes = 0;
        loop {
            let (tag, body) = match (self.next().await, &refused) {
                // A FATAL error is the reason, the closed connection only its consequence.
                (Err(WireError::Closed), Some(ServerError::Refused { sqlstate, message })) => {
                    return Err(ServerError::Broken(format!("{message} ({sqlstate})")));
                }
                (next, _) => next?,
            };
            answer_bytes += body.len();
            if answer_bytes > ANSWER_BYTES_MAX {
                return Err(ServerError::Broken("the answer is too long".to_owned()));
            }
            match tag {
                b'Z' => {
                    self.come_to_rest(&body)?;
                    return refused.map_or(Ok(rows), Err);
                }
                b'D' => rows.push(row(&body)?),
                b'E' => refused = refused.or(Some(refusal(&body))),
                b'S' => self.learn(&body)?,
                // ParseComplete, BindComplete, CloseComplete, NoData, RowDescription, CommandComplete,
                // EmptyQueryResponse; notices and notifications: nothing that changes the rows.
                b'1' | b'2' | b'3' | b'n' | b'T' | b'C' | b'I' | b'N' | b'A' => {}
                _ => return Err(ServerError::Broken(format!("unexpected message {tag:#04x} in an answer"))),
            }
        }
    }
}

pub(super) fn row(body: &Bytes) -> Result<Row, WireError> {
    let values = message::data_row(body)?;
    Ok(Row(values.into_iter().map(|value| value.map(|bytes| body.slice_ref(bytes))).collect()))
}

pub(super) fn refusal(body: &[u8]) -> ServerError {
    let notice = message::notice(body);
    ServerError::Refused {
        sqlstate: SqlState::parse(notice.sqlstate).unwrap_or(SqlState::INTERNAL_ERROR),
        message: String::from_utf8_lossy(notice.message).into_owned(),
    }
}
