//! An authenticated connection to a PostgreSQL server, and the few statements that we send in our own name.
//!
//! Invariant: a [`ServerConnection`] that a caller holds has read its first ReadyForQuery; `rest` is what the last one
//! said, and [`Rest::Busy`] from the first byte of a request of ours until its ReadyForQuery. At rest it owns no buffer.

mod batch;
mod dial;
mod login;
mod statement;

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::frame;
use crate::message::{self, CancelKey, Malformed, Pair, Protocol, Status};
use crate::report::{Blame, SqlState};
use crate::resolver::Name;
use crate::scram::{self, Keys};
use crate::stream::{Peer, Stream};
use crate::tls::Connector;

pub use batch::{Alive, Answer, Asides, Batch, Column, Described};
pub(crate) use login::{md5_hex, md5_stored};
pub use statement::{Row, ServerError};

/// The longest message of a server that is read here, in bytes: welcome messages and answers to our own statements.
/// What belongs to clients is never read here.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Room for one read, in bytes: a whole welcome fits.
const READ_BYTES: usize = 4096;

/// Reported settings of one server; PostgreSQL 17 has 14, extensions add a few.
const PARAMETERS_LEN_MAX: usize = 256;

/// Where a server is, and how to speak to it.
#[derive(Clone, Debug)]
pub struct Address {
    /// A name, an IP address, or a directory (starting with `/`) with a Unix socket.
    pub host: Box<str>,
    /// TCP port, or the socket's number.
    pub port: u16,
    /// The host's present answer, shared by all who connect there; `None` where `host` needs none, or is resolved at
    /// each attempt.
    pub name: Option<Arc<Name>>,
    /// The database's name on that server.
    pub dbname: Box<[u8]>,
    /// sslmode and roots.
    pub tls: Connector,
    /// The protocol that is asked for; a server that does not speak it is taken at its own word.
    pub protocol: Protocol,
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
    /// The 32 hexadecimal digits behind `md5` as PostgreSQL stores it: servers that ask for md5, only.
    Md5([u8; 32]),
    /// SCRAM keys caught from the client's own proof: servers with the same verifier, only.
    Scram(Arc<PassThrough>),
}

/// A password, and the SCRAM keys derived from it so far.
pub struct Password {
    text: Box<[u8]>,
    /// Held while deriving, so that twenty logins at once hash once.
    derived: Mutex<Vec<Derived>>,
}

/// Keys for one server's salt and iterations.
struct Derived {
    salt: Box<[u8]>,
    iterations: u32,
    keys: Keys,
}

impl Password {
    /// A password, not yet derived from.
    #[must_use]
    pub fn new(text: impl Into<Box<[u8]>>) -> Arc<Self> {
        Arc::new(Self { text: text.into(), derived: Mutex::default() })
    }

    /// The password.
    #[must_use]
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// The SCRAM keys for a salt: cached, and derived off the event loop. `None` only while the runtime shuts down.
    /// Cancel safe.
    pub async fn keys(&self, salt: &[u8], iterations: u32) -> Option<Keys> {
        /// A source, a target, a rotation of each.
        const DERIVED_LEN_MAX: usize = 4;
        let mut derived = self.derived.lock().await;
        if let Some(known) = derived.iter().find(|d| *d.salt == *salt && d.iterations == iterations) {
            return Some(known.keys.clone());
        }
        let (text, owned_salt) = (self.text.clone(), Box::<[u8]>::from(salt));
        let keys = tokio::task::spawn_blocking(move || Keys::derive(&text, &owned_salt, iterations)).await.ok()?;
        if derived.len() == DERIVED_LEN_MAX {
            derived.remove(0);
        }
        derived.push(Derived { salt: salt.into(), iterations, keys: keys.clone() });
        Some(keys)
    }
}

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Password(..)")
    }
}

/// SCRAM keys and the verifier they belong to: a server with another one refuses them.
#[derive(Debug)]
pub struct PassThrough {
    /// ClientKey and ServerKey.
    pub keys: Keys,
    /// Where they were proven.
    pub verifier: scram::Verifier,
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

impl From<Status> for Rest {
    fn from(status: Status) -> Self {
        match status {
            Status::Idle => Self::Idle,
            Status::InTransaction => Self::InTransaction,
            Status::Failed => Self::Failed,
        }
    }
}

/// A connection that may be used.
#[derive(Debug)]
pub struct ServerConnection {
    /// The socket.
    pub stream: Stream,
    /// Its cancel key; `None` where the server sent none.
    pub key: Option<BackendKey>,
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
    /// Whole messages for the client that came aside (notices, notifications, settings) while a session's own state was
    /// read or restored: whoever relays to the client sends them first and leaves this empty. Other statements of ours
    /// keep nothing here.
    pub asides: BytesMut,
}

/// Which part of connecting failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectFailure {
    /// The name, the network, or nobody listening.
    Network,
    /// TLS: refused, or the certificate is not the one demanded.
    Tls,
    /// The server knows us and says no (wrong password, no such role or database, pg_hba), or we lack the secret that
    /// it asks for.
    Refused,
    /// The server is there and takes no one now (53300, 57P03, …).
    Unavailable,
    /// What the server said makes no sense, or it failed to prove itself.
    Protocol,
    /// Not done by the deadline.
    Timeout,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}{}", sqlstate.map(|s| format!(" ({s})")).unwrap_or_default())]
pub struct ConnectError {
    /// Which part failed.
    pub failure: ConnectFailure,
    /// The server's, where it said one.
    pub sqlstate: Option<SqlState>,
    /// For logs and the operator; may name addresses: not for clients.
    pub message: String,
    /// [`Blame::Operator`] for credentials and certificates, else [`Blame::Source`].
    pub blame: Blame,
}

impl ConnectError {
    fn new(failure: ConnectFailure, message: impl Into<String>) -> Self {
        let blame = match failure {
            ConnectFailure::Tls | ConnectFailure::Refused => Blame::Operator,
            ConnectFailure::Network
            | ConnectFailure::Unavailable
            | ConnectFailure::Protocol
            | ConnectFailure::Timeout => Blame::Source,
        };
        Self { failure, sqlstate: None, message: message.into(), blame }
    }

    /// The same, where the server was the target of a move.
    #[must_use]
    pub fn at_target(mut self) -> Self {
        if self.blame == Blame::Source {
            self.blame = Blame::Target;
        }
        self
    }

    /// What a server's ErrorResponse during login means.
    fn refused(body: &[u8]) -> Self {
        let notice = message::notice(body);
        let sqlstate = SqlState::parse(notice.sqlstate);
        let failure = match sqlstate.as_ref().map(SqlState::as_str) {
            // Wrong user or password, no such database, no right to connect, a database that takes no connections.
            Some(code) if code.starts_with("28") || matches!(code, "3D000" | "42501" | "55000") => {
                ConnectFailure::Refused
            }
            Some(_) | None => ConnectFailure::Unavailable,
        };
        let message = String::from_utf8_lossy(notice.message).into_owned();
        Self { sqlstate, ..Self::new(failure, message) }
    }
}

/// What can go wrong while reading one message of a server.
#[derive(Debug, Error)]
enum WireError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("server closed the connection unexpectedly")]
    Closed,
    #[error("{0}")]
    Frame(#[from] frame::FrameError),
    #[error("{0}")]
    Malformed(#[from] Malformed),
}

impl From<WireError> for ConnectError {
    fn from(error: WireError) -> Self {
        let failure = match error {
            WireError::Io(_) | WireError::Closed => ConnectFailure::Network,
            WireError::Frame(_) | WireError::Malformed(_) => ConnectFailure::Protocol,
        };
        Self::new(failure, error.to_string())
    }
}

/// Connects, authenticates and reads the welcome, by the deadline. Cancel safe: a dropped future closes the socket.
///
/// # Errors
/// [`ConnectError`]; nothing is left open.
pub async fn connect(address: &Address, login: &Login, deadline: Instant) -> Result<ServerConnection, ConnectError> {
    // Boxed: the future is large, and waits inside others that are many.
    let entering = async {
        // Ended by an answer of the host's name that stays while we log in, or by the deadline.
        loop {
            let connection = login::enter(address, login).await?;
            if connection.is_where_its_name_is(address) {
                return Ok(connection);
            }
        }
    };
    match timeout_at(deadline, Box::pin(entering)).await {
        Ok(entered) => entered,
        Err(_) => Err(ConnectError::new(ConnectFailure::Timeout, "no connection in time (server_connect_timeout)")),
    }
}

/// Sends a cancel request and waits until the server closes: the signal has been sent then.
///
/// # Errors
/// [`ConnectError`]; after a [`ConnectFailure::Timeout`] the signal may still be sent.
pub async fn cancel(address: &Address, key: &BackendKey, deadline: Instant) -> Result<(), ConnectError> {
    match timeout_at(deadline, Box::pin(dial::cancel(address, key))).await {
        Ok(sent) => sent,
        Err(_) => Err(ConnectError::new(ConnectFailure::Timeout, "no answer to a cancel request in time")),
    }
}

impl ServerConnection {
    /// A socket whose login is still to come.
    fn fresh(stream: Stream) -> Self {
        Self {
            stream,
            key: None,
            parameters: Vec::new(),
            rest: Rest::Busy,
            opened_at: Instant::now(),
            input: BytesMut::new(),
            output: BytesMut::new(),
            asides: BytesMut::new(),
        }
    }

    /// Whether the host's name still has the answer by which this connection was made.
    fn is_where_its_name_is(&self, address: &Address) -> bool {
        match (&address.name, self.stream.peer()) {
            (Some(name), Ok(Peer::Tcp(peer))) => name.is_at(peer),
            (Some(_), Ok(Peer::Unix { uid: _ }) | Err(_)) | (None, _) => true,
        }
    }

    /// The server process' id; 0 where the server sent no key.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.key.as_ref().map_or(0, |key| key.key.pid)
    }

    /// What the server reports of a setting.
    #[must_use]
    pub fn parameter(&self, name: &[u8]) -> Option<&[u8]> {
        self.parameters.iter().find(|(n, _)| **n == *name).map(|(_, value)| &**value)
    }

    /// Says goodbye, so that the server does not log a lost connection, and waits for its end of the session until the
    /// deadline. Whatever fails, the socket is closed then.
    pub async fn terminate(mut self, deadline: Instant) {
        let goodbye = async {
            self.stream.write_all(b"X\0\0\0\x04").await?;
            self.stream.shutdown().await?;
            // It closes its end once the session is gone: only then does it count no connection any more.
            let mut rest = [0; 512];
            while self.stream.read(&mut rest).await? > 0 {}
            std::io::Result::Ok(())
        };
        // Neither a lost connection nor a late one matters any more.
        let _ = timeout_at(deadline, goodbye).await;
    }

    /// Keeps a reported setting.
    fn learn(&mut self, body: &[u8]) -> Result<(), WireError> {
        const MESSAGE: &str = "ParameterStatus";
        let (name, value) = message::parameter_status(body)?;
        if let Some((_, known)) = self.parameters.iter_mut().find(|(n, _)| **n == *name) {
            *known = value.into();
        } else if self.parameters.len() < PARAMETERS_LEN_MAX {
            self.parameters.push((name.into(), value.into()));
        } else {
            return Err(Malformed { message: MESSAGE, what: "too many settings" }.into());
        }
        Ok(())
    }

    /// Writes what `output` holds. Not cancel safe.
    async fn send(&mut self) -> Result<(), WireError> {
        self.stream.write_all(&self.output).await?;
        self.stream.flush().await?;
        self.output = BytesMut::new();
        Ok(())
    }

    /// Reads the next message: its tag and its body. Cancel safe: what was read stays in `input`.
    async fn next(&mut self) -> Result<(u8, Bytes), WireError> {
        loop {
            if let Some(header) = frame::header(&self.input)?
                && frame::next(&self.input, MESSAGE_BYTES_MAX)?.is_some()
            {
                let mut whole = self.input.split_to(header.total_bytes);
                whole.advance(frame::HEADER_BYTES);
                return Ok((header.tag, whole.freeze()));
            }
            self.input.reserve(READ_BYTES);
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(WireError::Closed);
            }
        }
    }

    /// A ReadyForQuery has come: at rest nothing is buffered.
    fn come_to_rest(&mut self, body: &[u8]) -> Result<(), WireError> {
        self.rest = message::ready_for_query(body)?.into();
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
