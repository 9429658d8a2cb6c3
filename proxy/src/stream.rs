//! A socket, plain or TLS, of a client or of a server.
//!
//! Invariant: small in memory: a plain stream is its socket and nothing else, TLS state lives behind a pointer, so
//! an idle plain client's future stays under 1 kB. Nothing is buffered here that TLS did not buffer.
//!
//! Cancel safety: `poll_read` and `poll_write` are tokio's and rustls' own: a read or write that is dropped while
//! pending has moved nothing that its caller was not told about (TLS keeps half-sent records itself; `flush` sends
//! them). `read_exact` and `write_all` over them are not cancel safe.

use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::report::Report;

/// A socket of a client or a server.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket; never TLS, as in PostgreSQL.
    Unix(UnixStream),
    /// TLS over TCP, we are the server: a client's.
    TlsServer(Box<tokio_rustls::server::TlsStream<TcpStream>>),
    /// TLS over TCP, we are the client: a server's.
    TlsClient(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP peer.
    Tcp(SocketAddr),
    /// A process on this machine, with the user id the kernel gave us (`None` where it gave none).
    Unix {
        /// Its user id.
        uid: Option<u32>,
    },
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { uid: _ } => f.write_str("unix"),
        }
    }
}

/// What came in on a connection on which nobody was waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// Nothing: the connection is at rest.
    Nothing,
    /// Bytes; they were appended to the buffer.
    Bytes,
    /// The end of the stream, or an error.
    End,
}

/// TCP keepalive of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Between two probes.
    pub interval: Duration,
    /// Unanswered probes after which the connection is dead.
    pub probes: u32,
}

impl Stream {
    /// Who is at the other end.
    ///
    /// # Errors
    /// Where the peer has gone already.
    pub fn peer(&self) -> io::Result<Peer> {
        match (self.tcp(), self) {
            (Some(tcp), _) => tcp.peer_addr().map(Peer::Tcp),
            (None, Self::Unix(unix)) => Ok(Peer::Unix { uid: unix.peer_cred().ok().map(|cred| cred.uid()) }),
            (None, Self::Tcp(_) | Self::TlsServer(_) | Self::TlsClient(_)) => {
                Err(io::Error::from(io::ErrorKind::NotConnected))
            }
        }
    }

    /// The local end of a TCP connection.
    #[must_use]
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.tcp().and_then(|tcp| tcp.local_addr().ok())
    }

    /// Whether what we send is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::TlsServer(_) | Self::TlsClient(_))
    }

    /// Whether the peer is a process on this machine, over a Unix socket.
    #[must_use]
    pub fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Sends small messages at once, and notices a dead peer; nothing to do on a Unix socket.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn configure(&self, keepalive: Option<Keepalive>) -> io::Result<()> {
        let Some(tcp) = self.tcp() else { return Ok(()) };
        tcp.set_nodelay(true)?;
        let Some(Keepalive { idle, interval, probes }) = keepalive else { return Ok(()) };
        let settings = socket2::TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
        socket2::SockRef::from(tcp).set_tcp_keepalive(&settings)
    }

    /// Takes what has come in without waiting for anything: how a pool asks whether a connection at rest still is.
    ///
    /// A plain connection on which nothing arrived costs no system call (the runtime would have seen it). Bytes are
    /// not lost: a ParameterStatus, a notice or a notification may come at rest, so they go to `into`.
    pub fn arrived(&mut self, into: &mut BytesMut) -> Arrived {
        let mut nobody = Context::from_waker(Waker::noop());
        // Not initialised: this runs on every checkout.
        let mut chunk = [MaybeUninit::uninit(); 1024];
        let mut buffer = ReadBuf::uninit(&mut chunk);
        match Pin::new(self).poll_read(&mut nobody, &mut buffer) {
            Poll::Pending => Arrived::Nothing,
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => Arrived::End,
            Poll::Ready(Ok(())) => {
                into.put_slice(buffer.filled());
                Arrived::Bytes
            }
            Poll::Ready(Err(_)) => Arrived::End,
        }
    }

    /// Ready when a read is worth trying; owns no buffer, so an idle client costs none. Cancel safe.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(s) => s.poll_read_ready(cx),
            Self::Unix(s) => s.poll_read_ready(cx),
            Self::TlsServer(s) => {
                let (tcp, session) = s.get_mut();
                if has_plaintext(session.process_new_packets()) { Poll::Ready(Ok(())) } else { tcp.poll_read_ready(cx) }
            }
            Self::TlsClient(s) => {
                let (tcp, session) = s.get_mut();
                if has_plaintext(session.process_new_packets()) { Poll::Ready(Ok(())) } else { tcp.poll_read_ready(cx) }
            }
        }
    }

    /// Registers a plain socket with the runtime of the calling thread, so that nobody has to be woken across threads;
    /// a TLS stream can't be taken apart and stays where it is.
    ///
    /// # Errors
    /// The operating system's; the socket is closed then.
    pub fn rehome(self) -> io::Result<Self> {
        match self {
            Self::Tcp(s) => Ok(Self::Tcp(TcpStream::from_std(s.into_std()?)?)),
            Self::Unix(s) => Ok(Self::Unix(UnixStream::from_std(s.into_std()?)?)),
            tls @ (Self::TlsServer(_) | Self::TlsClient(_)) => Ok(tls),
        }
    }

    /// Tells the peer why, closes our half, and takes what the peer had still sent: a socket that is closed over unread
    /// bytes resets the connection, and the peer would lose the report. Failures no longer matter; a peer that does not
    /// read is left after five seconds.
    pub async fn refuse(&mut self, report: &Report) {
        /// Enough for a startup packet, a pipelined query or an HTTP request.
        const ROUNDS_MAX: usize = 32;
        /// A few hundred bytes into an empty buffer take no time; only a full one makes us wait.
        const SAYING: Duration = Duration::from_secs(5);
        let words = report.to_bytes();
        let said = async {
            self.write_all(&words).await?;
            self.shutdown().await
        };
        if let Ok(Ok(())) = tokio::time::timeout(SAYING, said).await {
            let mut ignored = BytesMut::new();
            for _ in 0..ROUNDS_MAX {
                match self.arrived(&mut ignored) {
                    Arrived::Bytes => ignored.clear(),
                    Arrived::Nothing | Arrived::End => return,
                }
            }
        }
    }

    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(tcp) => Some(tcp),
            Self::Unix(_) => None,
            Self::TlsServer(tls) => Some(tls.get_ref().0),
            Self::TlsClient(tls) => Some(tls.get_ref().0),
        }
    }
}

/// Whether decrypted bytes wait, or an error that the next read reports.
fn has_plaintext(state: Result<rustls::IoState, rustls::Error>) -> bool {
    state.map_or(true, |state| state.plaintext_bytes_to_read() > 0 || state.peer_has_closed())
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_read(cx, buf),
            Self::TlsServer(s) => Pin::new(s).poll_read(cx, buf),
            Self::TlsClient(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_write(cx, buf),
            Self::TlsServer(s) => Pin::new(s).poll_write(cx, buf),
            Self::TlsClient(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_flush(cx),
            Self::Unix(s) => Pin::new(s).poll_flush(cx),
            Self::TlsServer(s) => Pin::new(s).poll_flush(cx),
            Self::TlsClient(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Self::Unix(s) => Pin::new(s).poll_shutdown(cx),
            Self::TlsServer(s) => Pin::new(s).poll_shutdown(cx),
            Self::TlsClient(s) => Pin::new(s).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Unix(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::TlsServer(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::TlsClient(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(s) => s.is_write_vectored(),
            Self::Unix(s) => s.is_write_vectored(),
            Self::TlsServer(s) => s.is_write_vectored(),
            Self::TlsClient(s) => s.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn what_arrives_at_rest_is_kept_and_an_end_is_seen() {
        let (mut peer, socket) = UnixStream::pair().unwrap();
        let mut stream = Stream::Unix(socket);
        let mut news = BytesMut::new();
        assert_eq!(stream.arrived(&mut news), Arrived::Nothing);
        peer.write_all(b"news").await.unwrap();
        while stream.arrived(&mut news) == Arrived::Nothing {
            tokio::task::yield_now().await;
        }
        assert_eq!((stream.arrived(&mut news), &news[..]), (Arrived::Nothing, &b"news"[..]));
        drop(peer);
        while stream.arrived(&mut news) == Arrived::Nothing {
            tokio::task::yield_now().await;
        }
        assert_eq!((stream.arrived(&mut news), &news[..]), (Arrived::End, &b"news"[..]));
    }

    #[tokio::test]
    async fn a_refusal_is_read_even_by_a_peer_that_sent_more_than_we_read() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        peer.write_all(&[b'x'; 5000]).await.unwrap();
        socket.readable().await.unwrap();
        let report = Report::admin_shutdown();
        Stream::Tcp(socket).refuse(&report).await;
        let mut said = Vec::new();
        peer.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, report.to_bytes());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_left() {
        let (_peer, socket) = UnixStream::pair().unwrap();
        while socket.try_write(&[0; 4096]).is_ok() {}
        Stream::Unix(socket).refuse(&Report::admin_shutdown()).await;
    }
}
