//! An authenticated connection to a PostgreSQL server, and the few statements that we send in our own name.
//!
//! Invariant: a [`ServerConnection`] has read its first ReadyForQuery; `status` is what the last one said, and
//! `Rest::Busy` from the first byte of a request of ours until its ReadyForQuery.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use tokio::time::Instant;

use crate::message::{CancelKey, Pair};
use crate::report::{Blame, SqlState};
use crate::scram;
use crate::stream::Stream;
use crate::tls::Connector;

/// Where a server is, and how to speak to it.
#[derive(Clone)]
pub struct Address {
    /// A name, an IP address, or a directory (starting with `/`) with a Unix socket.
    pub host: Box<str>,
    /// TCP port, or the socket's number.
    pub port: u16,
    /// The database's name on that server.
    pub dbname: Box<[u8]>,
    /// sslmode and roots.
    pub tls: Connector,
    /// Whether a password may be sent in the clear over plain TCP; over TLS and Unix sockets it always may.
    pub cleartext: Cleartext,
}

/// Whether a password may cross the network unencrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cleartext {
    /// Only inside TLS or over a Unix socket.
    Protected,
    /// Anywhere; the operator said so.
    Anywhere,
}

/// What we know that lets us log in to a server in a user's name. Clones share their caches.
#[derive(Clone, Debug)]
pub enum Secret {
    /// Nothing: servers that trust us, only.
    None,
    /// The password itself.
    Password(Arc<Password>),
    /// `md5…` as PostgreSQL stores it: servers that ask for md5, only.
    Md5([u8; 32]),
    /// SCRAM keys caught from the client's own proof: servers with the same verifier, only.
    Scram(Arc<PassThrough>),
}

/// A password, and the SCRAM keys derived from it so far.
pub struct Password {
    text: Box<[u8]>,
    derived: Mutex<Vec<()>>,
}

impl Password {
    /// A password, not yet derived from.
    #[must_use]
    pub fn new(text: impl Into<Box<[u8]>>) -> Arc<Self> {
        Arc::new(Self { text: text.into(), derived: Mutex::default() })
    }
}

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Password(..)")
    }
}

/// SCRAM keys and the verifier they belong to.
#[derive(Debug)]
pub struct PassThrough {
    /// ClientKey and ServerKey.
    pub keys: scram::Keys,
}

/// Who logs in to a server, and with which settings.
#[derive(Clone, Debug)]
pub struct Login {
    /// The role.
    pub user: Box<[u8]>,
    /// Its proof.
    pub secret: Secret,
    /// Settings for the StartupMessage, in order (`application_name`, `client_encoding`, …); not user or database.
    pub settings: Vec<Pair>,
}

/// A server's cancel key, and the address its process is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendKey {
    /// pid and secret as the server gave them.
    pub key: CancelKey,
    /// The address that was really connected to (`None`: a Unix socket), so that a cancel goes to the same server.
    pub peer: Option<SocketAddr>,
}

/// What the last ReadyForQuery said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// `I`: no transaction.
    Idle,
    /// `T`: in a transaction.
    InTransaction,
    /// `E`: in a failed transaction.
    Failed,
    /// A request of ours has no ReadyForQuery yet, or the stream is broken.
    Busy,
}

/// A connection that may be used.
#[derive(Debug)]
pub struct ServerConnection {
    /// The socket.
    pub stream: Stream,
    /// Its cancel key; `None` where the server sent none.
    pub key: Option<BackendKey>,
    /// The server process' id; 0 where the server sent no key.
    pub pid: i32,
    /// What the server reports of its settings, in the order of first report.
    pub parameters: Vec<Pair>,
    /// See [`Rest`].
    pub rest: Rest,
    /// When the connection was opened.
    pub opened_at: Instant,
    /// Bytes read and not consumed; empty at rest.
    pub input: BytesMut,
    /// Bytes to be written; empty at rest.
    pub output: BytesMut,
}

/// Which part of connecting failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectFailure {
    /// The name, the network, or nobody listening.
    Network,
    /// TLS: refused, or the certificate is not the one demanded.
    Tls,
    /// The server knows us and says no: wrong password, no such role or database, pg_hba.
    Refused,
    /// The server is there and takes no one now (53300, 57P03, …).
    Unavailable,
    /// What the server said makes no sense, or it failed to prove itself.
    Protocol,
    /// Not done by the deadline.
    Timeout,
}

/// Why there is no connection.
#[derive(Debug, Clone, Error)]
#[error("{message}{}", sqlstate.map(|s| format!(" ({s})")).unwrap_or_default())]
pub struct ConnectError {
    /// Which part failed.
    pub failure: ConnectFailure,
    /// The server's, where it said one.
    pub sqlstate: Option<SqlState>,
    /// For logs and the operator; may name addresses: not for clients.
    pub message: String,
    /// [`Blame::Operator`] for credentials and certificates, else [`Blame::Source`]; who connects to a target says so.
    pub blame: Blame,
}

/// Connects, authenticates and reads the welcome, by the deadline.
///
/// # Errors
/// [`ConnectError`]; nothing is left open.
pub async fn connect(address: &Address, login: &Login, deadline: Instant) -> Result<ServerConnection, ConnectError> {
    let _ = (address, login, deadline);
    unimplemented!()
}

/// Sends a cancel request and waits until the server closes: the signal has been sent then.
///
/// # Errors
/// [`ConnectError`].
pub async fn cancel(address: &Address, key: &BackendKey, deadline: Instant) -> Result<(), ConnectError> {
    let _ = (address, key, deadline);
    unimplemented!()
}

/// A row of text values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row(Vec<Option<Bytes>>);

impl Row {
    /// A column from 0; `None` for NULL, for a column that is not there, and for bytes that are not UTF-8.
    #[must_use]
    pub fn text(&self, column: usize) -> Option<&str> {
        self.0.get(column)?.as_deref().and_then(|bytes| std::str::from_utf8(bytes).ok())
    }
}

/// Why a statement of ours gave no rows.
#[derive(Debug, Clone, Error)]
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
        let _ = (sql, params, deadline);
        unimplemented!()
    }

    /// Runs statements separated by `;` as one simple query, gives all their rows. Not cancel safe.
    ///
    /// # Errors
    /// [`ServerError`]: of the first statement that failed.
    pub async fn simple(&mut self, sql: &str, deadline: Instant) -> Result<Vec<Row>, ServerError> {
        let _ = (sql, deadline);
        unimplemented!()
    }

    /// What the server reports of a setting.
    #[must_use]
    pub fn parameter(&self, name: &[u8]) -> Option<&[u8]> {
        self.parameters.iter().find(|(n, _)| **n == *name).map(|(_, value)| &**value)
    }
}
