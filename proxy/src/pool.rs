//! Server connections of one user of one database: who has one, who waits for one, how many there may be.
//!
//! Invariant: a connection is leased only for a [`Pass`]; it comes back only at rest, of the present generation, and
//! with no cancel on its way to it. The size is exact over all workers. Waiters are served in order, those that a pause
//! held before all others and in the order in which they came to the gate, so that its end is no stampede; except that a
//! waiter on the releasing worker may overtake a bounded number of tickets, which saves a wake-up across threads.

mod connection;
mod errand;
mod leaving;
mod limits;
mod prewarm;
mod refusal;
mod site;

pub use connection::{Place, Pooled};
pub use errand::{Errand, Errands, Probed, Successor};
pub use leaving::Leaving;
pub use limits::Tally;
pub use prewarm::{Prewarmed, Standing, Verdict};
pub use site::Site;

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use crate::backend;
use crate::backend::{ConnectError, Login};
use crate::client::Server;
use crate::gate::Pass;
use crate::parameters::{Reported, Settings};
use crate::pool::refusal::{no_server, refused};
use crate::relay::ShutSignal;
use crate::report::Report;
use crate::route::Active;
use crate::statements::Shelf;
use crate::tracker::Tracker;

/// How many tickets a waiter on the releasing worker may overtake, as a multiple of the pool's size.
const OVERTAKE_POOL_SIZES: u64 = 4;

/// Tickets below this are turns of clients that a pause has held.
const NEWCOMERS: u64 = 1 << 62;

/// Where housekeeping runs.
const MAIN_THREAD: usize = 0;

/// The pool of one user of one database.
pub struct Pool {
    /// What it shares with the other pools of its database.
    pub site: Arc<Site>,
    /// The user.
    pub user: Box<[u8]>,
    sharing: Sharing,
    /// How to log in to servers in the user's name; renewed at each client login.
    login: Mutex<Login>,
    inner: Mutex<Inner>,
    /// Connections of this pool: open or being opened.
    open: Arc<AtomicU32>,
    /// Connections of this user over all databases.
    user_open: Arc<Tally>,
    /// Connections being opened.
    opening: AtomicU32,
    /// Connections of other pools that are being closed for ours.
    coming: AtomicU32,
    /// What servers told the last connection at its start: the welcome of clients that log in.
    welcome: ArcSwap<Option<Arc<Reported>>>,
}

/// Who may use a pool's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Any client of the user, one after the other.
    Pooled,
    /// One client, which has one connection: it was made for that client and is closed after it.
    OneToOne,
}

#[derive(Default)]
struct Inner {
    #[expect(clippy::vec_box, reason = "connections move between lists, channels and tasks as pointers")]
    idle: Vec<Box<Pooled>>,
    waiters: VecDeque<Waiter>,
    next_ticket: u64,
    /// Prewarmed connections by backend.
    parked: BTreeMap<Box<str>, Prewarmed>,
    failed_at: Option<Instant>,
}

struct Waiter {
    ticket: u64,
    worker: usize,
    since: Instant,
    hand: oneshot::Sender<Box<Pooled>>,
    refuse: Arc<Mutex<Option<Report>>>,
}

/// A server connection for one transaction. Dropped in the middle of things it closes the connection.
pub struct Lease {
    /// The connection.
    pub pooled: Box<Pooled>,
    pool: Arc<Pool>,
    /// Permission for that transaction.
    pub pass: Pass,
}

/// A server connection that a session-pooled client keeps between its transactions.
pub struct Kept {
    /// The connection.
    pub pooled: Box<Pooled>,
    pool: Arc<Pool>,
}

/// Why there is no lease.
#[derive(Debug)]
pub enum NoServer {
    /// The gate shut while the client waited: its pass is gone, and it waits at the gate now.
    Shut,
    /// The client gets this.
    Refused(Box<Report>),
}

impl Pool {
    /// An empty pool of the user that `login` names.
    #[must_use]
    pub fn new(site: Arc<Site>, sharing: Sharing, user_open: Arc<Tally>, login: Login) -> Arc<Self> {
        let pool = Arc::new(Self {
            site,
            user: login.user.clone(),
            sharing,
            login: Mutex::new(login),
            inner: Mutex::default(),
            open: Arc::default(),
            user_open,
            opening: AtomicU32::new(0),
            coming: AtomicU32::new(0),
            welcome: ArcSwap::from_pointee(None),
        });
        pool.site.connections.enrol(&pool);
        pool.user_open.enrol(&pool);
        pool
    }

    /// The newest secret of the user: a changed password reaches the servers with the next login.
    pub fn learn(&self, login: Login) {
        *lock(&self.login) = login;
    }

    /// What the last server said at its start.
    #[must_use]
    pub fn welcome(&self) -> Option<Arc<Reported>> {
        self.welcome.load().as_ref().clone()
    }

    /// A connection for the transaction that `pass` permits; `turn`: where a client that a pause has held stood at the gate.
    ///
    /// The wait is ended by a connection, by the gate ([`NoServer::Shut`]), by a failed attempt to connect, or by
    /// `query_wait_timeout`. Cancel safe: dropped while waiting, a connection already handed over goes back.
    ///
    /// # Errors
    /// [`NoServer`].
    pub async fn checkout(
        self: &Arc<Self>,
        pass: Pass,
        turn: Option<NonZeroU64>,
        worker: usize,
    ) -> Result<Lease, NoServer> {
        if let Some(pooled) = self.take_idle(worker) {
            return Ok(Lease { pooled, pool: Arc::clone(self), pass });
        }
        let pooled = self.wait(worker, turn, &pass).await?;
        let pooled = rehomed(pooled, worker).ok_or_else(|| refused(Report::server_connection_lost()))?;
        Ok(Lease { pooled, pool: Arc::clone(self), pass })
    }

    /// A connection at rest, this worker's own if there is one.
    fn take_idle(self: &Arc<Self>, worker: usize) -> Option<Box<Pooled>> {
        let generation = self.site.route.generation();
        loop {
            let mut inner = self.lock();
            let own = inner.idle.iter().rposition(|pooled| pooled.home == worker);
            let index = own.or_else(|| inner.idle.len().checked_sub(1))?;
            let mut pooled = inner.idle.remove(index);
            drop(inner);
            if pooled.generation != generation || !pooled.is_alive() {
                self.dismiss(pooled);
                continue;
            }
            if let Some(pooled) = rehomed(pooled, worker) {
                return Some(pooled);
            }
        }
    }

    async fn wait(
        self: &Arc<Self>,
        worker: usize,
        turn: Option<NonZeroU64>,
        pass: &Pass,
    ) -> Result<Box<Pooled>, NoServer> {
        let (hold, refuse) = self.queue(worker, turn);
        // Looked at after the waiter stands in the queue: a pause either finds it there or is seen here.
        if pass.is_stale() {
            self.send_back_waiters();
        }
        // One may have come to rest after we looked and before we stood in the queue: nobody else would hand it over.
        let stray = self.lock().idle.pop();
        if let Some(pooled) = stray {
            self.put(pooled);
        }
        self.open_more(worker);
        let mut waiting = Waiting { pool: self, hold };
        let timeout = self.site.config.load().general.query_wait_timeout;
        let limit = if timeout.is_zero() { Duration::MAX } else { timeout };
        match tokio::time::timeout(limit, &mut waiting.hold).await {
            Ok(Ok(pooled)) => Ok(pooled),
            Ok(Err(_)) => Err(lock(&refuse).take().map_or(NoServer::Shut, refused)),
            Err(_) => {
                self.site.events.query_wait_timeouts.count();
                Err(refused(Report::query_wait_timeout()))
            }
        }
    }

    /// Takes a place in the queue: at its end, or where the client's turn at the gate puts it.
    fn queue(
        &self,
        worker: usize,
        turn: Option<NonZeroU64>,
    ) -> (oneshot::Receiver<Box<Pooled>>, Arc<Mutex<Option<Report>>>) {
        let (hand, hold) = oneshot::channel();
        let refuse = Arc::new(Mutex::new(None));
        let mut inner = self.lock();
        inner.next_ticket += 1;
        let ticket = turn.map_or(NEWCOMERS + inner.next_ticket, NonZeroU64::get);
        let place = inner.waiters.partition_point(|waiter| waiter.ticket <= ticket);
        let waiter = Waiter { ticket, worker, since: Instant::now(), hand, refuse: Arc::clone(&refuse) };
        inner.waiters.insert(place, waiter);
        (hold, refuse)
    }

    /// Sends those who wait for a connection back to the gate: their transactions have not begun.
    pub fn send_back_waiters(&self) {
        let waiters = std::mem::take(&mut self.lock().waiters);
        drop(waiters);
    }

    /// Gives a connection at rest to the next waiter, or keeps it.
    fn put(self: &Arc<Self>, mut pooled: Box<Pooled>) {
        if self.is_outdated(&pooled) {
            return self.dismiss(pooled);
        }
        let size = u64::from(self.open.load(Ordering::Relaxed).max(1));
        let mut inner = self.lock();
        loop {
            let Some(head) = inner.waiters.front() else {
                if !self.is_contested() {
                    inner.idle.push(pooled);
                    return;
                }
                drop(inner);
                let Some(back) = self.yield_to_starving(pooled) else { return };
                pooled = back;
                inner = self.lock();
                continue;
            };
            let bound = head.ticket + OVERTAKE_POOL_SIZES * size;
            let home = pooled.home;
            let local = inner.waiters.iter().take_while(|w| w.ticket <= bound).position(|w| w.worker == home);
            let Some(waiter) = inner.waiters.remove(local.unwrap_or(0)) else { continue };
            match waiter.hand.send(pooled) {
                Ok(()) => return,
                Err(back) => pooled = back, // That waiter is gone.
            }
        }
    }

    fn is_outdated(&self, pooled: &Pooled) -> bool {
        let lifetime = self.site.config.load().general.server_lifetime;
        pooled.generation != self.site.route.generation()
            || (!lifetime.is_zero() && pooled.server.opened_at.elapsed() > lifetime)
    }

    /// Closes connections at rest that are outdated or unused for too long; opens up to `min_pool_size`.
    pub fn keep_house(self: &Arc<Self>, now: Instant) {
        let idle_limit = self.site.config.load().general.server_idle_timeout;
        let mut inner = self.lock();
        let floor = usize::try_from(self.site.config.load().general.min_pool_size).unwrap_or(usize::MAX);
        let mut open = usize::try_from(self.open.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        let gone: Vec<_> = inner
            .idle
            .extract_if(.., |pooled| {
                let unused = !idle_limit.is_zero() && now.duration_since(pooled.idle_since) > idle_limit;
                let close = self.is_outdated(pooled) || (unused && open > floor) || !pooled.is_alive();
                open -= usize::from(close);
                close
            })
            .collect();
        drop(inner);
        gone.into_iter().for_each(|pooled| self.dismiss(pooled));
        // Another pool of the database or of the user may have freed a place that somebody here waits for.
        self.open_more(MAIN_THREAD);
        if !self.site.gate.is_shut() {
            self.open_spare(floor, MAIN_THREAD);
        }
    }

    /// Closes every connection at rest, as PgBouncer's PAUSE does: the server may be restarted.
    pub fn close_idle(self: &Arc<Self>) {
        let idle = std::mem::take(&mut self.lock().idle);
        idle.into_iter().for_each(|pooled| self.dismiss(pooled));
    }

    /// Connections: idle, being opened, open in all.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let inner = self.lock();
        Counts {
            idle: u32::try_from(inner.idle.len()).unwrap_or(u32::MAX),
            opening: self.opening.load(Ordering::Relaxed),
            open: self.open.load(Ordering::Relaxed),
            parked: u32::try_from(inner.parked.values().map(Prewarmed::open).sum::<usize>()).unwrap_or(u32::MAX),
            waiting: u32::try_from(inner.waiters.len()).unwrap_or(u32::MAX),
            waiting_since: inner.waiters.front().map(|waiter| waiter.since),
        }
    }

    async fn connect(&self, active: &Active, place: Place, worker: usize) -> Result<Box<Pooled>, ConnectError> {
        let own = lock(&self.login).clone();
        let login = match &active.endpoint.forced {
            Some(forced) => Login { settings: own.settings, ..forced.clone() },
            None => own,
        };
        let limit = self.site.config.load().general.server_connect_timeout;
        let server = backend::connect(&active.endpoint.address, &login, tokio::time::Instant::now() + limit).await?;
        let id = self.site.ids.fetch_add(1, Ordering::Relaxed);
        let shared = Server::new(
            id,
            &server,
            Arc::clone(&active.endpoint.address),
            &active.backend,
            &login.user,
            &self.site.database,
            self.site.begun_on(&active.backend),
        );
        lock(&self.site.servers).insert(id, Arc::downgrade(&shared));
        let initial = Arc::new(server.parameters.clone());
        Ok(Box::new(Pooled {
            shared,
            reported: Arc::clone(&initial),
            initial,
            applied: Arc::new(Settings::default()),
            is_reset: false,
            tracker: Tracker::default(),
            shelf: Shelf::default(),
            home: worker,
            generation: active.generation,
            idle_since: Instant::now(),
            place,
            server,
        }))
    }

    /// Everyone who waits gets the answer that this attempt brought, unless other connections may still come free.
    fn refuse_waiters(&self, error: &ConnectError) {
        let mut inner = self.lock();
        inner.failed_at = Some(Instant::now());
        // This attempt's own place is still counted.
        if self.open.load(Ordering::Acquire) > self.opening.load(Ordering::Acquire) {
            return;
        }
        let waiters = std::mem::take(&mut inner.waiters);
        drop(inner);
        for waiter in waiters {
            *lock(&waiter.refuse) = Some(no_server(&self.site.database, error));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

/// Connections of a pool.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// At rest.
    pub idle: u32,
    /// Being opened.
    pub opening: u32,
    /// In all, those being opened included.
    pub open: u32,
    /// Prewarmed on other backends; not in `open`.
    pub parked: u32,
    /// Clients that wait.
    pub waiting: u32,
    /// Since when the first of them waits.
    pub waiting_since: Option<Instant>,
}

/// Counts an opening for as long as it lasts.
struct Opener {
    pool: Arc<Pool>,
}

impl Opener {
    async fn run(self, place: Place, worker: usize, rest_until: Option<Instant>) {
        if let Some(until) = rest_until {
            tokio::time::sleep_until(until.into()).await;
        }
        let active = self.pool.site.route.active();
        let outcome = self.pool.connect(&active, place, worker).await;
        match outcome {
            Ok(pooled) => {
                pooled.shared.generation.store(active.generation, Ordering::Relaxed);
                self.pool.welcome.store(Arc::new(Some(Arc::clone(&pooled.initial))));
                self.pool.lock().failed_at = None;
                self.pool.put(pooled);
            }
            Err(error) => {
                self.pool.site.events.server_logins_failed.count();
                tracing::warn!(database = %self.pool.site.database, backend = %active.backend, %error, "no server connection");
                self.pool.refuse_waiters(&error);
            }
        }
        let pool = Arc::clone(&self.pool);
        drop(self);
        pool.open_more(worker);
        // A failed attempt has freed its place.
        pool.feed_starving(worker);
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.pool.opening.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A waiter's end of the hand-over: what was handed over and not taken goes back.
struct Waiting<'a> {
    pool: &'a Arc<Pool>,
    hold: oneshot::Receiver<Box<Pooled>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.hold.close();
        if let Ok(pooled) = self.hold.try_recv() {
            self.pool.put(pooled);
        }
    }
}

impl Lease {
    /// The transaction is over and the connection rests: it goes back, its pass with it.
    pub fn rest(self) {
        let Lease { pooled, pool, pass } = self;
        give_back(&pool, pooled);
        drop(pass);
    }

    /// The transaction is over; the client keeps the connection.
    #[must_use]
    pub fn keep(self) -> Kept {
        let Lease { pooled, pool, pass } = self;
        drop(pass);
        Kept { pooled, pool }
    }

    /// The connection is in the middle of things: it is closed.
    pub fn close(self) {
        let Lease { pooled, pool, pass } = self;
        pool.dismiss(pooled);
        drop(pass);
    }
}

impl Kept {
    /// The client's next transaction.
    #[must_use]
    pub fn begin(self, pass: Pass) -> Lease {
        Lease { pooled: self.pooled, pool: self.pool, pass }
    }

    /// Whether the connection may serve another client after this one.
    #[must_use]
    pub fn sharing(&self) -> Sharing {
        self.pool.sharing
    }

    /// The client has left and the connection was reset.
    pub fn rest(self) {
        give_back(&self.pool, self.pooled);
    }

    /// The client has left in the middle of things.
    pub fn close(self) {
        self.pool.dismiss(self.pooled);
    }

    /// The client goes on with another connection, as do many others now.
    pub fn leave(self) {
        self.pool.dismiss_later(self.pooled);
    }
}

/// Back to the pool, unless it was one client's own, or a cancel is on its way: then when that has arrived, so that it hits nobody else.
fn give_back(pool: &Arc<Pool>, mut pooled: Box<Pooled>) {
    if pool.sharing == Sharing::OneToOne {
        return pool.dismiss(pooled);
    }
    pooled.idle_since = Instant::now();
    if !pooled.shared.is_being_cancelled() {
        return settle(pool, pooled);
    }
    let limbo = Arc::clone(pool);
    pool.site.tasks.spawn(async move {
        pooled.shared.uncancelled().await;
        settle(&limbo, pooled);
    });
}

/// No cancel is on its way. One that may still arrive would hit whoever is served next.
fn settle(pool: &Arc<Pool>, pooled: Box<Pooled>) {
    if pooled.shared.is_in_doubt() { pool.dismiss(pooled) } else { pool.put(pooled) }
}

/// Registered with this worker's runtime, so that waiting for it wakes no other thread.
fn rehomed(pooled: Box<Pooled>, worker: usize) -> Option<Box<Pooled>> {
    if pooled.home == worker {
        return Some(pooled);
    }
    let mut pooled = *pooled;
    pooled.server.stream = pooled.server.stream.rehome().ok()?;
    pooled.home = worker;
    Some(Box::new(pooled))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
