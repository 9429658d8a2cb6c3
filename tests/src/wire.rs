//! A connection that speaks the protocol byte by byte, for what a driver would not do.
//!
//! Invariant: after [`Wire::log_in`] the server has said ReadyForQuery and nothing is pending.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{ErrorFields, ErrorResponseBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::fallible_iterator::FallibleIterator;

/// Longer than any hold budget.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A raw connection.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    input: BytesMut,
}

/// An ErrorResponse or notice, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// ERROR, FATAL, …
    pub severity: String,
    /// SQLSTATE.
    pub sqlstate: String,
    /// The words.
    pub message: String,
}

impl Report {
    /// The fields that matter; an unreadable one is empty.
    pub fn of(body: &ErrorResponseBody) -> Report {
        fn fill(mut fields: ErrorFields<'_>, report: &mut Report) -> io::Result<()> {
            while let Some(field) = fields.next()? {
                let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
                match field.type_() {
                    b'S' => report.severity = value,
                    b'C' => report.sqlstate = value,
                    b'M' => report.message = value,
                    _ => {}
                }
            }
            Ok(())
        }
        let mut report = Report::default();
        // What could be read before the broken field stays.
        let _ = fill(body.fields(), &mut report);
        report
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.severity, self.sqlstate, self.message)
    }
}

impl Wire {
    /// A TCP connection to a port of this machine, nothing said yet.
    ///
    /// # Errors
    /// As the operating system says.
    pub async fn connect(port: u16) -> Result<Wire> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.with_context(|| format!("connecting to {port}"))?;
        stream.set_nodelay(true)?;
        Ok(Wire { stream, input: BytesMut::new() })
    }

    /// Connects and logs in with SCRAM or without a password; returns what came up to ReadyForQuery.
    ///
    /// # Errors
    /// The login was refused (the message holds the ErrorResponse), or asks for another method.
    #[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is the welcome")]
    pub async fn log_in(port: u16, user: &str, password: &str, database: &str) -> Result<(Wire, Vec<Message>)> {
        let mut wire = Wire::connect(port).await?;
        let mut output = BytesMut::new();
        frontend::startup_message([("user", user), ("database", database)], &mut output)?;
        wire.send(&output).await?;
        let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        let mut welcome = Vec::new();
        loop {
            output.clear();
            match wire.message().await? {
                Message::AuthenticationSasl(_) => {
                    frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut output)?;
                }
                Message::AuthenticationSaslContinue(body) => {
                    scram.update(body.data())?;
                    frontend::sasl_response(scram.message(), &mut output)?;
                }
                Message::AuthenticationSaslFinal(body) => scram.finish(body.data())?,
                Message::AuthenticationCleartextPassword => {
                    frontend::password_message(password.as_bytes(), &mut output)?;
                }
                Message::ErrorResponse(body) => bail!("login: {}", Report::of(&body)),
                Message::ReadyForQuery(_) => return Ok((wire, welcome)),
                other => welcome.push(other),
            }
            wire.send(&output).await?;
        }
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The next message. Not cancel safe in [`Wire::send`]'s company, but by itself it is: what has arrived is kept.
    ///
    /// # Errors
    /// The connection broke or was closed (`UnexpectedEof`), the bytes are no message, or none came in a minute.
    pub async fn message(&mut self) -> io::Result<Message> {
        loop {
            if let Some(message) = Message::parse(&mut self.input)? {
                return Ok(message);
            }
            let reading = tokio::time::timeout(ANSWER_LIMIT, self.stream.read_buf(&mut self.input));
            if reading.await.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Reads until ReadyForQuery: what came before it, and its status byte (`I`, `T` or `E`).
    ///
    /// # Errors
    /// As [`Wire::message`].
    #[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; all the rest comes before the end")]
    pub async fn until_ready(&mut self) -> io::Result<(Vec<Message>, u8)> {
        let mut before = Vec::new();
        loop {
            match self.message().await? {
                Message::ReadyForQuery(body) => return Ok((before, body.status())),
                other => before.push(other),
            }
        }
    }

    /// A simple query up to its ReadyForQuery.
    ///
    /// # Errors
    /// As [`Wire::message`].
    pub async fn query(&mut self, sql: &str) -> io::Result<(Vec<Message>, u8)> {
        let mut output = BytesMut::new();
        frontend::query(sql, &mut output)?;
        self.send(&output).await?;
        self.until_ready().await
    }

    /// The socket, for what is not said here.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }
}
