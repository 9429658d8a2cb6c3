//! Sockets that clients connect to.
//!
//! Invariant: a listener that stops accepting for lack of descriptors starts again by itself; a Unix socket's file goes
//! when its listener goes, and never one that another process listens on.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, UnixListener, UnixStream, lookup_host};

use crate::connection::Door;
use crate::server::worker::Reception;
use crate::stream::{Keepalive, Stream};

/// Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Rest after a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Notices a dead client within about two minutes.
const KEEPALIVE: Keepalive = Keepalive { idle: Duration::from_secs(60), interval: Duration::from_secs(15), probes: 4 };

/// One socket.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _file: SocketFile },
}

/// Removes the socket's file.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be gone already, with its directory.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds everything the configuration names and says what was bound.
pub(super) async fn bind(door: &Door) -> anyhow::Result<Vec<Listener>> {
    let config = door.process.config.load_full();
    let mut port = config.general.listen_port;
    let mut listeners = Vec::new();
    for name in &config.general.listen_addr {
        let host = if name == "*" { "::" } else { name.as_str() };
        let addresses = lookup_host((host, port)).await.with_context(|| format!("listen_addr {name}"))?;
        for address in addresses {
            let listener = tcp(address).with_context(|| format!("listen_addr {name}: {address}"))?;
            let bound = listener.local_addr()?;
            port = bound.port();
            tracing::info!("listening on {bound}");
            let mut own = door.process.address.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if own.is_empty() {
                *own = bound.to_string();
            }
            drop(own);
            listeners.push(Listener::Tcp(listener));
        }
    }
    if let Some(directory) = &config.general.unix_socket_dir {
        let path = directory.join(format!(".s.PGSQL.{port}"));
        listeners.push(unix(path.clone()).await.with_context(|| format!("unix_socket_dir: {}", path.display()))?);
        tracing::info!("listening on {}", path.display());
    }
    Ok(listeners)
}

fn tcp(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn unix(path: PathBuf) -> io::Result<Listener> {
    // A file that nobody listens on is left over from a process that was killed.
    if path.exists() {
        if UnixStream::connect(&path).await.is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(&path)?;
    }
    let listener = UnixListener::bind(&path)?;
    Ok(Listener::Unix { listener, _file: SocketFile(path) })
}

impl Listener {
    /// Accepts until the process closes.
    pub(super) async fn accept(self, mut reception: Reception) {
        let closing = reception.door.process.closing.clone();
        loop {
            let accepted = tokio::select! {
                () = closing.cancelled() => return,
                accepted = self.next() => accepted,
            };
            match accepted {
                Ok(stream) => reception.receive(stream),
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_REST).await;
                }
            }
        }
    }

    /// Cancel safe: accept is.
    async fn next(&self) -> io::Result<Stream> {
        let stream = match self {
            Listener::Tcp(listener) => Stream::Tcp(listener.accept().await?.0),
            Listener::Unix { listener, .. } => Stream::Unix(listener.accept().await?.0),
        };
        stream.configure(Some(KEEPALIVE))?;
        Ok(stream)
    }
}
