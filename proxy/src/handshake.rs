//! From a socket's first byte to what the client wants: TLS, GSS refusal, protocol negotiation, startup or cancel.
//!
//! Invariant: bytes that came before TLS are never read as if they came after it; at most one
//! NegotiateProtocolVersion is written; nothing longer than a startup packet is read or kept.

use tokio::time::Instant;

use crate::message::{CancelKey, Startup};
use crate::report::Report;
use crate::stream::Stream;
use crate::tls::Acceptor;

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

/// Learns what the client wants; the stream comes back with TLS on it where that was agreed.
///
/// # Errors
/// A [`Report`] to count and log; it has been written to the client where the protocol allows, and the stream is gone.
/// The deadline gives [`Report::login_timeout`].
pub async fn greet(stream: Stream, tls: &Acceptor, deadline: Instant) -> Result<(Stream, Hello), Report> {
    let _ = (stream, tls, deadline);
    unimplemented!()
}
