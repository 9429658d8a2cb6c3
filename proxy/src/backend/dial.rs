//! From an address to a stream, plain or TLS, as its sslmode demands.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream, lookup_host};

use crate::backend::{Address, BackendKey, ConnectError, ConnectFailure};
use crate::config::SslMode;
use crate::message;
use crate::resolver::Name;
use crate::stream::{Keepalive, Stream};
use crate::tls::TlsError;

/// A server that lost power or its network is noticed within a minute; shorter would cost idle pools traffic.
const KEEPALIVE: Keepalive = Keepalive { idle: Duration::from_secs(30), interval: Duration::from_secs(10), probes: 3 };

/// How long an address may be silent while there is another one to try: a lost SYN is repeated after one second.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether a connection attempt asks for TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attempt {
    Plain,
    Tls,
}

/// What to try first, and what then if that is refused: libpq's order.
pub(super) fn attempts(address: &Address) -> (Attempt, Option<Attempt>) {
    if address.host.starts_with('/') {
        return (Attempt::Plain, None);
    }
    match address.tls.mode() {
        SslMode::Disable => (Attempt::Plain, None),
        SslMode::Allow => (Attempt::Plain, Some(Attempt::Tls)),
        SslMode::Prefer => (Attempt::Tls, Some(Attempt::Plain)),
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => (Attempt::Tls, None),
    }
}

/// Opens a socket, with TLS on it if the attempt asks for it and the server has it. `at` is an address that is known
/// already. The caller bounds the time.
pub(super) async fn open(address: &Address, at: Option<SocketAddr>, attempt: Attempt) -> Result<Stream, ConnectError> {
    if address.host.starts_with('/') {
        let path = format!("{}/.s.PGSQL.{}", address.host, address.port);
        let unix = UnixStream::connect(&path).await;
        return unix.map(Stream::Unix).map_err(|e| network(&path, &e));
    }
    let tcp = match (at, &address.name) {
        (Some(at), _) => TcpStream::connect(at).await.map_err(|e| network(at, &e))?,
        (None, Some(name)) => reach(name).await?,
        (None, None) => resolve(address).await?,
    };
    let place = tcp.peer_addr().map_err(|e| network(&address.host, &e))?;
    let stream = match attempt {
        Attempt::Plain => Stream::Tcp(tcp),
        Attempt::Tls => address.tls.connect(tcp, &address.host).await.map_err(|e| tls(place, &e))?,
    };
    stream.configure(Some(KEEPALIVE)).map_err(|e| network(place, &e))?;
    Ok(stream)
}

/// Connects to where the name's answer points, or to the next address of the same answer if nobody answers there.
async fn reach(name: &Name) -> Result<TcpStream, ConnectError> {
    let host = name.place().0;
    // Ended by an answer that stays while we connect, or by the caller's deadline.
    loop {
        let candidates = name.candidates().await.map_err(|e| network(host, &e))?;
        let (tcp, at) = first_that_answers(host, &candidates).await?;
        if candidates.first().is_some_and(|first| name.settle(at, *first)) {
            return Ok(tcp);
        }
    }
}

/// Resolves the name once and takes the first of its addresses that answers.
async fn resolve(address: &Address) -> Result<TcpStream, ConnectError> {
    let host = &*address.host;
    let found: Vec<_> = lookup_host((host, address.port)).await.map_err(|e| network(host, &e))?.collect();
    Ok(first_that_answers(host, &found).await?.0)
}

async fn first_that_answers(host: &str, all: &[SocketAddr]) -> Result<(TcpStream, SocketAddr), ConnectError> {
    let mut failed = ConnectError::new(ConnectFailure::Network, format!("{host}: the name has no address"));
    for (index, at) in all.iter().enumerate() {
        // The last one may take all the time that there is.
        let patience = if index + 1 < all.len() { PATIENCE } else { Duration::MAX };
        match tokio::time::timeout(patience, TcpStream::connect(at)).await {
            Ok(Ok(tcp)) => return Ok((tcp, *at)),
            Ok(Err(error)) => failed = network(at, &error),
            Err(_) => failed = ConnectError::new(ConnectFailure::Network, format!("{at}: no answer in {PATIENCE:?}")),
        }
    }
    Err(failed)
}

/// Sends a cancel request over a connection of its own and waits for the server to close it.
pub(super) async fn cancel(address: &Address, key: &BackendKey) -> Result<(), ConnectError> {
    let (first, second) = attempts(address);
    let mut stream = match (open(address, key.peer, first).await, second) {
        (Err(error), Some(second)) if error.failure == ConnectFailure::Tls => open(address, key.peer, second).await?,
        (opened, _) => opened?,
    };
    let mut request = BytesMut::new();
    message::put_cancel_request(&mut request, &key.key);
    let sent = async {
        stream.write_all(&request).await?;
        stream.flush().await
    };
    sent.await.map_err(|e| network(&address.host, &e))?;
    // The postmaster's child signals before it closes. A reset is a close, and so is a TLS stream that just ends.
    let mut nothing = [0; 64];
    while let Ok(1..) = stream.read(&mut nothing).await {}
    Ok(())
}

fn network(place: impl std::fmt::Display, error: &std::io::Error) -> ConnectError {
    ConnectError::new(ConnectFailure::Network, format!("{place}: {error}"))
}

fn tls(place: SocketAddr, error: &TlsError) -> ConnectError {
    ConnectError::new(ConnectFailure::Tls, format!("{place}: {error}"))
}
