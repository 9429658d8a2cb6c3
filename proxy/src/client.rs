//! What the rest of the proxy may know of a connected client, and ask of it.
//!
//! Invariant: a session writes here without a lock per message; whoever wants something from it raises an order and
//! wakes it. A server connection is linked under a lock, so that a cancel never follows a link that has ended.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use crate::backend::{Address, BackendKey};
use crate::config::PoolMode;
use crate::message::Replication;

/// Who a client is; fixed once it is logged in.
#[derive(Debug, Clone)]
pub struct Who {
    /// Unique among clients and servers.
    pub id: u64,
    /// The user name's bytes.
    pub user: Box<[u8]>,
    /// The database name as the client gave it.
    pub database: Box<str>,
    /// Its address; `None` over a Unix socket.
    pub addr: Option<SocketAddr>,
    /// Ours.
    pub local_addr: Option<SocketAddr>,
    /// Protocol and cipher; empty without TLS.
    pub tls: Box<str>,
    /// How long it keeps its server.
    pub pool_mode: PoolMode,
    /// Whether its connection is one for replication: such a one keeps its server, and moves with no switch.
    pub replication: Replication,
}

/// A logged-in client.
#[derive(Debug)]
pub struct Client {
    /// See [`Who`].
    pub who: Who,
    /// When it logged in.
    pub connected_at: SystemTime,
    born: Instant,
    state: AtomicU8,
    /// When the state began, in microseconds since `born`.
    state_since_us: AtomicU64,
    application_name: Mutex<Box<str>>,
    link: Mutex<Option<Arc<Server>>>,
    look: Mutex<Look>,
    orders: AtomicU8,
    waker: AtomicWaker,
    /// Its place in the order in which clients came to a shut gate; 0 unless it was held for its next transaction.
    pub turn: AtomicU64,
    /// Its named statements in transaction pooling.
    pub prepared: AtomicUsize,
}

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// At rest.
    Idle = 0,
    /// In a transaction, on a server connection.
    Active = 1,
    /// Held by the gate.
    Held = 2,
    /// Waiting for a server connection.
    Waiting = 3,
}

/// What somebody else wants a session to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Order {
    /// Answer what is held or waiting with "canceled".
    Cancel = 1,
    /// End now.
    Kill = 2,
    /// End when at rest.
    Leave = 4,
    /// Run the errand that was left for it, when next between two transactions.
    Errand = 8,
}

/// What a look at a session found, for the question whether it could be moved.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Look {
    /// Nobody has looked.
    #[default]
    None,
    /// It could not be looked at, for this reason.
    Missed(Box<str>),
    /// Nothing kept it where it is.
    Movable,
    /// It stays, for these reasons.
    Stays(Box<str>),
}

/// What others know of a server connection.
#[derive(Debug)]
pub struct Server {
    /// Unique among clients and servers.
    pub id: u64,
    /// The server process; 0 if unknown.
    pub pid: i32,
    /// Its cancel key.
    pub key: Option<BackendKey>,
    /// Where it is.
    pub address: Arc<Address>,
    /// The declared backend.
    pub backend: Box<str>,
    /// The user it is logged in as.
    pub user: Box<[u8]>,
    /// The route's name.
    pub database: Box<str>,
    /// When it was opened.
    pub connected_at: SystemTime,
    /// Its end of the connection and ours.
    pub addr: Option<SocketAddr>,
    /// Ours.
    pub local_addr: Option<SocketAddr>,
    /// Whether it is encrypted.
    pub tls: bool,
    /// The client it serves; 0 for none.
    pub client: AtomicU64,
    /// The route's generation that it belongs to; [`Server::PARKED`] before its backend is active.
    pub generation: AtomicU64,
    /// Named statements prepared there for clients that share it.
    pub prepared: AtomicUsize,
    /// Transactions begun on it.
    transactions: AtomicU64,
    /// Where they are added when it is gone.
    begun: Arc<AtomicU64>,
    /// Cancel requests on their way to it.
    cancels: AtomicU32,
    cancelled: Notify,
    /// A cancel request went its way and nobody knows whether it has arrived, or will.
    in_doubt: AtomicBool,
}

impl Who {
    /// Whether its connection is one for replication.
    #[must_use]
    pub fn replicates(&self) -> bool {
        self.replication != Replication::No
    }
}

impl Client {
    /// A client that has just logged in.
    #[must_use]
    pub fn new(who: Who, application_name: &str) -> Arc<Self> {
        Arc::new(Self {
            who,
            connected_at: SystemTime::now(),
            born: Instant::now(),
            state: AtomicU8::new(State::Idle as u8),
            state_since_us: AtomicU64::new(0),
            application_name: Mutex::new(application_name.into()),
            link: Mutex::new(None),
            look: Mutex::default(),
            orders: AtomicU8::new(0),
            waker: AtomicWaker::new(),
            turn: AtomicU64::new(0),
            prepared: AtomicUsize::new(0),
        })
    }

    /// Where it stood at the gate, if a pause has held it since the last time.
    pub fn take_turn(&self) -> Option<NonZeroU64> {
        if self.turn.load(Ordering::Relaxed) == 0 {
            return None;
        }
        NonZeroU64::new(self.turn.swap(0, Ordering::Relaxed))
    }

    /// Enters a state.
    pub fn enter(&self, state: State, now: Instant) {
        let since = now.saturating_duration_since(self.born);
        self.state_since_us.store(u64::try_from(since.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Relaxed) {
            1 => State::Active,
            2 => State::Held,
            3 => State::Waiting,
            _ => State::Idle,
        }
    }

    /// When it entered its state.
    #[must_use]
    pub fn state_since(&self) -> Instant {
        self.born + Duration::from_micros(self.state_since_us.load(Ordering::Relaxed))
    }

    /// As the client last set it.
    #[must_use]
    pub fn application_name(&self) -> Box<str> {
        lock(&self.application_name).clone()
    }

    /// Takes note of a new one.
    pub fn rename(&self, application_name: &str) {
        *lock(&self.application_name) = application_name.into();
    }

    /// Links it to the server connection that serves it.
    pub fn link(&self, server: &Arc<Server>) {
        server.client.store(self.who.id, Ordering::Relaxed);
        *lock(&self.link) = Some(Arc::clone(server));
    }

    /// Links it to another server connection at once: a cancel finds the one or the other.
    pub fn relink(&self, server: &Arc<Server>) {
        server.client.store(self.who.id, Ordering::Relaxed);
        if let Some(former) = lock(&self.link).replace(Arc::clone(server)) {
            former.client.store(0, Ordering::Relaxed);
        }
    }

    /// What the last look at its session found.
    #[must_use]
    pub fn look(&self) -> Look {
        lock(&self.look).clone()
    }

    /// Takes note of a look.
    pub fn looked(&self, look: Look) {
        *lock(&self.look) = look;
    }

    /// Ends the link. From here on no new cancel goes to that server for this client.
    pub fn unlink(&self) {
        if let Some(server) = lock(&self.link).take() {
            server.client.store(0, Ordering::Relaxed);
        }
    }

    /// The server connection that serves it.
    #[must_use]
    pub fn linked(&self) -> Option<Arc<Server>> {
        lock(&self.link).clone()
    }

    /// The server to cancel, marked so that its connection serves nobody else until the mark is dropped.
    #[must_use]
    pub fn cancel_target(&self) -> Option<CancelMark> {
        let link = lock(&self.link);
        let server = link.as_ref()?;
        server.cancels.fetch_add(1, Ordering::AcqRel);
        Some(CancelMark { server: Arc::clone(server) })
    }

    /// Raises an order and wakes the session.
    pub fn order(&self, order: Order) {
        self.orders.fetch_or(order as u8, Ordering::AcqRel);
        self.waker.wake();
    }

    /// Takes an order, to carry it out; whether there was one.
    #[must_use]
    pub fn take(&self, order: Order) -> bool {
        let bit = order as u8;
        self.orders.load(Ordering::Acquire) & bit != 0 && self.orders.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    /// Takes back an order that was not carried out, because what it was about is over.
    pub fn forget(&self, order: Order) {
        if self.orders.load(Ordering::Relaxed) != 0 {
            self.orders.fetch_and(!(order as u8), Ordering::AcqRel);
        }
    }

    /// The strongest of the orders in `among`; pending orders wake the caller's task.
    pub fn poll_order(&self, cx: &mut Context<'_>, among: &[Order]) -> Poll<Order> {
        self.waker.register(cx.waker());
        let raised = self.orders.load(Ordering::Acquire);
        match among.iter().find(|order| raised & **order as u8 != 0) {
            Some(order) => Poll::Ready(*order),
            None => Poll::Pending,
        }
    }
}

/// A cancel request on its way.
#[derive(Debug)]
pub struct CancelMark {
    server: Arc<Server>,
}

impl CancelMark {
    /// It may still arrive after this mark is gone: the server connection serves this client to the end of what it does
    /// and nobody after it.
    pub fn doubt(&self) {
        self.server.in_doubt.store(true, Ordering::Release);
    }

    /// Whom it is for.
    #[must_use]
    pub fn server(&self) -> &Server {
        &self.server
    }
}

impl Drop for CancelMark {
    fn drop(&mut self) {
        if self.server.cancels.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.server.cancelled.notify_waiters();
        }
    }
}

impl Server {
    /// No generation yet: prewarmed, and newer than all.
    pub const PARKED: u64 = u64::MAX;

    /// What others may know of a connection that has just been opened.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "one constructor for one record; each field has one source")]
    pub fn new(
        id: u64,
        connection: &crate::backend::ServerConnection,
        address: Arc<Address>,
        backend: &str,
        user: &[u8],
        database: &str,
        begun: Arc<AtomicU64>,
    ) -> Arc<Self> {
        let peer = connection.stream.peer().ok();
        Arc::new(Self {
            id,
            pid: connection.pid(),
            key: connection.key.clone(),
            address,
            backend: backend.into(),
            user: user.into(),
            database: database.into(),
            connected_at: SystemTime::now(),
            addr: match peer {
                Some(crate::stream::Peer::Tcp(addr)) => Some(addr),
                Some(crate::stream::Peer::Unix { uid: _ }) | None => None,
            },
            local_addr: connection.stream.local_address(),
            tls: connection.stream.is_tls(),
            client: AtomicU64::new(0),
            generation: AtomicU64::new(Self::PARKED),
            prepared: AtomicUsize::new(0),
            transactions: AtomicU64::new(0),
            begun,
            cancels: AtomicU32::new(0),
            cancelled: Notify::new(),
            in_doubt: AtomicBool::new(false),
        })
    }

    /// One more transaction. Only whoever has the connection counts, so this need not be one locked addition.
    pub fn begin(&self) {
        self.transactions.store(self.transactions() + 1, Ordering::Relaxed);
    }

    /// Transactions begun on it.
    #[must_use]
    pub fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Relaxed)
    }

    /// Whether it waits for its backend to become active.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.generation.load(Ordering::Relaxed) == Self::PARKED
    }

    /// Whether a cancel may still arrive that nobody waits for.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt.load(Ordering::Acquire)
    }

    /// Whether a cancel is on its way to it.
    #[must_use]
    pub fn is_being_cancelled(&self) -> bool {
        self.cancels.load(Ordering::Acquire) > 0
    }

    /// Waits until no cancel is on its way. Ended by the cancel requests' own deadline.
    pub async fn uncancelled(&self) {
        loop {
            let done = self.cancelled.notified();
            tokio::pin!(done);
            done.as_mut().enable();
            if !self.is_being_cancelled() {
                return;
            }
            done.await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.begun.fetch_add(self.transactions(), Ordering::Relaxed);
    }
}

/// Every logged-in client.
#[derive(Debug, Default)]
pub struct Clients {
    all: Mutex<HashMap<u64, Arc<Client>>>,
}

impl Clients {
    /// Enrols a client until the guard is dropped.
    pub fn enrol(self: &Arc<Self>, client: &Arc<Client>) -> Enrolled {
        lock(&self.all).insert(client.who.id, Arc::clone(client));
        Enrolled { clients: Arc::clone(self), id: client.who.id }
    }

    /// A client by its id.
    #[must_use]
    pub fn find(&self, id: u64) -> Option<Arc<Client>> {
        lock(&self.all).get(&id).cloned()
    }

    /// Everyone, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Client>> {
        lock(&self.all).values().cloned().collect()
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.all).len()
    }
}

/// A place among the clients; dropping it frees the place.
#[derive(Debug)]
pub struct Enrolled {
    clients: Arc<Clients>,
    id: u64,
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        lock(&self.clients.all).remove(&self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can panic half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
