//! From a socket's first byte to what the client wants: TLS, GSS refusal, protocol negotiation, startup or cancel.
//!
//! Invariant: bytes that came before TLS are never read as if they came after it; at most one
//! NegotiateProtocolVersion is written; nothing longer than a startup packet is read or kept; nothing behind the
//! startup packet is read.

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::frame;
use crate::message::{self, CancelKey, FirstPacket, Malformed, PairRef, Protocol, Replication, Startup};
use crate::report::{Blame, Report, SqlState};
use crate::stream::{Arrived, Stream};
use crate::tls::{Acceptor, TlsError};

/// The first byte of a TLS record that carries a ClientHello; no startup packet is long enough to begin with it.
const TLS_HANDSHAKE_BYTE: u8 = 0x16;

/// Names of protocol options in a StartupMessage begin with this.
const PROTOCOL_OPTION_PREFIX: &[u8] = b"_pq_.";

/// What a new connection turned out to be.
#[derive(Debug)]
pub enum Hello {
    /// A session to be authenticated.
    Session(Box<Startup>),
    /// A cancel request; the client waits for us to close.
    Cancel(CancelKey),
    /// It left without a word (a port scan, a health check).
    Gone,
}

/// Learns what the client wants; the stream comes back with TLS on it where that was agreed. Not cancel safe: a
/// dropped future closes the socket.
///
/// # Errors
/// A [`Report`] to count and log; it has been written to the client where the protocol allows, and the stream is gone.
/// The deadline gives [`Report::login_timeout`].
pub async fn greet(stream: Stream, tls: &Acceptor, deadline: Instant) -> Result<(Stream, Hello), Report> {
    // Boxed: only clients that are logging in pay for this future.
    match timeout_at(deadline, Box::pin(converse(stream, tls))).await {
        Ok(learnt) => learnt,
        Err(_) => Err(Report::login_timeout()),
    }
}

async fn converse(stream: Stream, tls: &Acceptor) -> Result<(Stream, Hello), Report> {
    let mut stream = match stream {
        Stream::Tcp(tcp) if tls.offers_tls() => match direct(tcp, tls).await? {
            Some(stream) => stream,
            None => return Err(Report::client_gone()),
        },
        Stream::Tcp(_) | Stream::Unix(_) | Stream::TlsServer(_) | Stream::TlsClient(_) => stream,
    };
    // Each may be asked for once, and GSS encryption not inside TLS: as in PostgreSQL.
    let (mut may_ask_tls, mut may_ask_gss) = (!stream.is_tls(), !stream.is_tls());
    loop {
        let packet = match packet(&mut stream).await {
            Ok(Some(packet)) => packet,
            Ok(None) => return Ok((stream, Hello::Gone)),
            Err(report) => return Err(refuse(stream, report).await),
        };
        match judge(&packet, tls.requires_tls() && !stream.is_tls() && !stream.is_unix()) {
            Ok(Wish::Tls) if may_ask_tls => {
                stream = answer_tls_request(stream, tls).await?;
                may_ask_tls = false;
                may_ask_gss &= !stream.is_tls();
            }
            Ok(Wish::Gss) if may_ask_gss => {
                may_ask_gss = false;
                stream.write_all(b"N").await.map_err(|_| Report::client_gone())?;
            }
            Ok(Wish::Tls | Wish::Gss) => {
                let report = Report::protocol_violation("encryption was requested a second time");
                return Err(refuse(stream, report).await);
            }
            Ok(Wish::Cancel(key)) => return Ok((stream, Hello::Cancel(key))),
            Ok(Wish::Session { startup, negotiation }) => {
                if let Some(message) = negotiation {
                    stream.write_all(&message).await.map_err(|_| Report::client_gone())?;
                }
                return Ok((stream, Hello::Session(startup)));
            }
            Err(report) => return Err(refuse(stream, report).await),
        }
    }
}

/// A client may begin with TLS at once (libpq 17, `sslnegotiation=direct`). `None`: it left without a word.
async fn direct(tcp: TcpStream, tls: &Acceptor) -> Result<Option<Stream>, Report> {
    let mut first = [0; 1];
    match tcp.peek(&mut first).await {
        Ok(1..) if first == [TLS_HANDSHAKE_BYTE] => tls.accept_direct(tcp).await.map(Some).map_err(|e| failed(&e)),
        Ok(1..) => Ok(Some(Stream::Tcp(tcp))),
        Ok(0) | Err(_) => Ok(None),
    }
}

/// Says `S` and shakes hands, or `N`.
async fn answer_tls_request(mut stream: Stream, tls: &Acceptor) -> Result<Stream, Report> {
    if !tls.offers_tls() || stream.is_unix() {
        stream.write_all(b"N").await.map_err(|_| Report::client_gone())?;
        return Ok(stream);
    }
    // A client waits for our answer; what is here already was slipped in by somebody else, or by a broken client.
    if stream.arrived(&mut BytesMut::new()) == Arrived::Bytes {
        return Err(refuse(stream, Report::unencrypted_data()).await);
    }
    stream.write_all(b"S").await.map_err(|_| Report::client_gone())?;
    match stream {
        Stream::Tcp(tcp) => tls.accept(tcp).await.map_err(|e| failed(&e)),
        Stream::Unix(_) | Stream::TlsServer(_) | Stream::TlsClient(_) => {
            Err(Report::internal("TLS was promised on a stream that can't have it"))
        }
    }
}

/// A TLS handshake that failed can't be answered: the client no longer listens to plain bytes.
fn failed(error: &TlsError) -> Report {
    Report::fatal(SqlState::PROTOCOL_VIOLATION, format!("could not accept SSL connection: {error}"), Blame::Client)
}

async fn refuse(mut stream: Stream, report: Report) -> Report {
    stream.refuse(&report).await;
    report
}

/// Reads one startup packet, and not a byte more. `None`: the client closed before its first byte.
async fn packet(stream: &mut Stream) -> Result<Option<Vec<u8>>, Report> {
    let mut packet = vec![0; 4];
    match stream.read(&mut packet).await {
        Ok(0) | Err(_) => return Ok(None),
        Ok(read) => {
            let missing = packet.get_mut(read..).unwrap_or_default();
            stream.read_exact(missing).await.map_err(|_| Report::client_gone())?;
        }
    }
    let invalid = |_| Report::protocol_violation("invalid length of startup packet");
    frame::startup(&packet).map_err(invalid)?;
    let length = packet.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    packet.resize(usize::try_from(length).unwrap_or(frame::STARTUP_BYTES_MAX), 0);
    stream.read_exact(packet.get_mut(4..).unwrap_or_default()).await.map_err(|_| Report::client_gone())?;
    Ok(Some(packet))
}

/// What one startup packet asks for.
#[derive(Debug)]
enum Wish {
    Tls,
    Gss,
    Cancel(CancelKey),
    Session {
        startup: Box<Startup>,
        /// To be sent first, where what is spoken differs from what was asked for.
        negotiation: Option<BytesMut>,
    },
}

/// Reads a startup packet. Pure.
fn judge(packet: &[u8], lacks_tls: bool) -> Result<Wish, Report> {
    let body = frame::startup(packet).ok().flatten();
    let body = body.ok_or_else(|| Report::protocol_violation("invalid length of startup packet"))?;
    match message::first_packet(body).map_err(malformed)? {
        FirstPacket::SslRequest => Ok(Wish::Tls),
        FirstPacket::GssEncRequest => Ok(Wish::Gss),
        // Cancel requests carry no secret of a user's; libpq before 17 sends them without TLS.
        FirstPacket::Cancel(key) => Ok(Wish::Cancel(key)),
        FirstPacket::Startup { major: 3, minor, parameters } => {
            let pairs = message::startup_pairs(parameters).map_err(malformed)?;
            if lacks_tls {
                return Err(Report::tls_required());
            }
            session(minor, &pairs)
        }
        FirstPacket::Startup { major, minor, parameters: _ } => Err(Report::unsupported_protocol(major, minor)),
    }
}

/// Negotiates the version and sorts the parameters.
fn session(minor: u16, pairs: &[PairRef<'_>]) -> Result<Wish, Report> {
    // 3.1 was never released; who asks for it is told 3.0.
    let protocol = if minor >= 2 { Protocol::V3_2 } else { Protocol::V3_0 };
    let unknown_options: Vec<&[u8]> =
        pairs.iter().map(|(name, _)| *name).filter(|name| name.starts_with(PROTOCOL_OPTION_PREFIX)).collect();
    let as_asked = matches!(minor, 0 | 2) && unknown_options.is_empty();
    let negotiation = (!as_asked).then(|| {
        let mut out = BytesMut::new();
        message::put_negotiate_protocol_version(&mut out, protocol, &unknown_options);
        out
    });
    let startup = Box::new(sorted(protocol, pairs)?);
    Ok(Wish::Session { startup, negotiation })
}

fn sorted(protocol: Protocol, pairs: &[PairRef<'_>]) -> Result<Startup, Report> {
    let (mut user, mut database, mut replication) = (&b""[..], &b""[..], Replication::No);
    let (mut options, mut settings) = (Vec::new(), Vec::new());
    for &(name, value) in pairs {
        match name {
            b"user" => user = value,
            b"database" => database = value,
            b"replication" => replication = read_replication(value)?,
            b"options" => options = message::options(value).map_err(invalid_options)?,
            name if name.starts_with(PROTOCOL_OPTION_PREFIX) => {}
            name => settings.push((name.into(), value.into())),
        }
    }
    if user.is_empty() {
        return Err(Report::fatal(
            SqlState::INVALID_AUTHORIZATION,
            "no PostgreSQL user name specified in startup packet",
            Blame::Client,
        ));
    }
    // PostgreSQL applies the switches in `options` first, then the parameters of their own.
    options.extend(settings);
    let database = if database.is_empty() { user } else { database };
    Ok(Startup { protocol, user: user.into(), database: database.into(), replication, settings: options })
}

fn read_replication(value: &[u8]) -> Result<Replication, Report> {
    match value.to_ascii_lowercase().as_slice() {
        b"database" => Ok(Replication::Database),
        b"true" | b"on" | b"yes" | b"1" => Ok(Replication::Physical),
        b"false" | b"off" | b"no" | b"0" => Ok(Replication::No),
        _ => Err(Report::protocol_violation("invalid value for parameter \"replication\"")),
    }
}

fn malformed(error: Malformed) -> Report {
    Report::protocol_violation(error.to_string())
}

fn invalid_options(error: Malformed) -> Report {
    Report::fatal(SqlState::SYNTAX_ERROR, error.to_string(), Blame::Client)
}

#[cfg(test)]
mod tests;
