//! Threads that serve clients: a single-threaded runtime each.
//!
//! Invariant: connections are dealt out in turn, so workers have equally many; a connection stays with its worker. The
//! figures behind this choice are in ARCHITECTURE.md. Worker 0 is the main thread: it accepts, watches and keeps house.

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::connection;
use crate::connection::{Door, Rights, Visitor};
use crate::console;
use crate::server::admin::Operator;
use crate::stream::Stream;

/// Connections on their way to a worker; more than that and accepting waits, as the kernel's backlog is there for.
const DEALT_MAX: usize = 1024;

/// The threads.
#[derive(Clone)]
pub(super) struct Workers {
    doors: Vec<mpsc::Sender<Dealt>>,
    stop: CancellationToken,
}

/// A connection on its way to a worker, registered with no runtime.
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

struct Dealt {
    socket: Socket,
    reception: Reception,
}

/// What a new connection is received with.
#[derive(Clone)]
pub(super) struct Reception {
    pub(super) door: Arc<Door>,
    pub(super) operator: Operator,
    pub(super) workers: Workers,
}

impl Workers {
    /// Starts `count` threads, or one per core for 0.
    pub(super) fn start(count: usize) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let count = if count == 0 { cores } else { count };
        let stop = CancellationToken::new();
        let doors = (1..=count)
            .map(|worker| {
                let (sender, receiver) = mpsc::channel(DEALT_MAX);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let stop = stop.clone();
                std::thread::Builder::new()
                    .name(format!("worker-{worker}"))
                    .spawn(move || runtime.block_on(work(worker, receiver, stop)))?;
                Ok(sender)
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self { doors, stop })
    }

    pub(super) fn count(&self) -> usize {
        self.doors.len()
    }

    /// Ends the threads; what they still run ends with them.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }
}

impl Reception {
    /// Deals a connection to the next worker.
    pub(super) fn receive(&mut self, stream: Stream) {
        self.workers.doors.rotate_left(1);
        let socket = match stream {
            Stream::Tcp(tcp) => tcp.into_std().map(Socket::Tcp),
            Stream::Unix(unix) => unix.into_std().map(Socket::Unix),
            Stream::TlsServer(_) | Stream::TlsClient(_) => return, // Nothing that was just accepted has TLS on it.
        };
        let Some(door) = self.workers.doors.last() else { return };
        match socket {
            Ok(socket) => {
                let dealt = Dealt { socket, reception: self.clone() };
                if door.try_send(dealt).is_err() {
                    tracing::warn!("a worker is overwhelmed: a new connection was closed");
                }
            }
            Err(error) => tracing::warn!(%error, "a new connection could not be dealt"),
        }
    }
}

/// A worker's life.
async fn work(worker: usize, mut dealt: mpsc::Receiver<Dealt>, stop: CancellationToken) {
    loop {
        let Dealt { socket, reception } = tokio::select! {
            () = stop.cancelled() => return,
            dealt = dealt.recv() => match dealt {
                Some(dealt) => dealt,
                None => return,
            },
        };
        let stream = match socket {
            Socket::Tcp(tcp) => tokio::net::TcpStream::from_std(tcp).map(Stream::Tcp),
            Socket::Unix(unix) => tokio::net::UnixStream::from_std(unix).map(Stream::Unix),
        };
        match stream {
            Ok(stream) => {
                let tasks = reception.door.process.tasks.clone();
                tasks.spawn(serve(stream, worker, reception.door, reception.operator));
            }
            Err(error) => tracing::warn!(%error, "a new connection could not be registered"),
        }
    }
}

async fn serve(stream: Stream, worker: usize, door: Arc<Door>, operator: Operator) {
    if let Some(visitor) = connection::serve(stream, door, worker).await {
        // Boxed: clients' futures must not carry the console's.
        Box::pin(visit(visitor, &operator)).await;
    }
}

async fn visit(visitor: Visitor, operator: &Operator) {
    let Visitor { stream, user, rights, key, cancels, place: _place } = visitor;
    let addr = match stream.peer() {
        Ok(crate::stream::Peer::Tcp(addr)) => Some(addr),
        Ok(crate::stream::Peer::Unix { uid: _ }) | Err(_) => None,
    };
    let visit = console::Visit {
        visitor: console::Visitor { user, addr },
        authority: match rights {
            Rights::Admin => console::Authority::Admin,
            Rights::Stats => console::Authority::Stats,
        },
        key: key.key.clone(),
        cancels,
        closing: operator.door.process.closing.clone(),
    };
    if let Err(error) = console::serve(stream, &visit, operator).await {
        tracing::debug!(by = %visit.visitor, %error, "a visit to the console ended");
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;
    use crate::config::Config;
    use crate::server;

    /// What an idle plain client may cost besides its socket, in bytes: PgBouncer's are 1,300.
    const IDLE_CLIENT_BYTES_MAX: usize = 1024;

    #[tokio::test]
    async fn the_future_of_an_idle_plain_client_is_under_one_kilobyte() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pgcutover.toml");
        let state = directory.path().display();
        let text = format!(
            "[pgcutover]\nstate_dir = \"{state}\"\nauth_type = \"trust\"\n\
             [databases.app]\nactive = \"blue\"\n[databases.app.backends.blue]\nhost = \"127.0.0.1\"\nport = 1\n"
        );
        std::fs::write(&path, text).unwrap();
        let door = server::door(Config::load(&path).unwrap(), 1).unwrap();
        let (ending, _ended) = watch::channel(None);
        let operator = Operator { door: Arc::clone(&door), ending };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let future = serve(Stream::Tcp(client), 1, door, operator);
        let bytes = std::mem::size_of_val(&future);
        assert!(bytes < IDLE_CLIENT_BYTES_MAX, "{bytes} bytes: box what an idle client does not need");
    }
}
