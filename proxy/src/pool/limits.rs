//! How many connections there may be, and whose go when others wait for their places.
//!
//! Invariant: a place is taken before a connection is opened and freed only after it is closed, so the limits are exact.
//! Who can't get a place stands in the tally's queue before it looks for an idle connection to evict, and whoever brings
//! one to rest looks at that queue under its own lock: one of the two sees the other. No lock is taken under another
//! pool's; under its own a pool takes at most a tally's.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use crate::pool::connection::{Place, Pooled};
use crate::pool::{Inner, Opener, Pool, lock};

/// Connections that one pool opens at a time: enough that twenty logins of 5 ms take 15 ms, few enough that a server
/// that forks a process for each is not knocked over.
pub(super) const OPENING_MAX: u32 = 8;

/// How long a closed connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// What one limit counts: the connections of a database or of a user, over all pools.
#[derive(Default)]
pub struct Tally {
    open: Arc<AtomicU32>,
    pools: Mutex<Vec<Weak<Pool>>>,
    /// Pools whose waiters this limit keeps from a connection, the longest first.
    starving: Mutex<VecDeque<Weak<Pool>>>,
    /// Its length, to be looked at whenever a connection comes to rest.
    starving_len: AtomicUsize,
}

impl Tally {
    /// Connections, those being opened and those being closed included.
    #[must_use]
    pub fn open(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self) -> &Arc<AtomicU32> {
        &self.open
    }

    pub(super) fn enrol(&self, pool: &Arc<Pool>) {
        let mut pools = lock(&self.pools);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    fn note_starving(&self, pool: &Arc<Pool>) {
        let mut starving = lock(&self.starving);
        let pool = Arc::downgrade(pool);
        if !starving.iter().any(|other| other.ptr_eq(&pool)) {
            starving.push_back(pool);
        }
        self.starving_len.store(starving.len(), Ordering::Relaxed);
    }

    fn next_starving(&self) -> Option<Arc<Pool>> {
        let mut starving = lock(&self.starving);
        let next = std::iter::from_fn(|| starving.pop_front()).find_map(|pool| pool.upgrade());
        self.starving_len.store(starving.len(), Ordering::Relaxed);
        next
    }

    /// Takes the connection that has been at rest the longest from whichever other pool has it.
    fn oldest_idle(&self, needy: &Arc<Pool>) -> Option<(Arc<Pool>, Box<Pooled>)> {
        let mut pools: Vec<_> = lock(&self.pools).iter().filter_map(Weak::upgrade).collect();
        pools.retain(|pool| !Arc::ptr_eq(pool, needy));
        loop {
            let since = |pool: &Arc<Pool>| pool.lock().idle.iter().map(|pooled| pooled.idle_since).min();
            let (_, pool) = pools.iter().filter_map(|pool| Some((since(pool)?, pool))).min_by_key(|(at, _)| *at)?;
            let mut inner = pool.lock();
            let oldest = (0..inner.idle.len()).min_by_key(|index| inner.idle[*index].idle_since);
            // Taken meanwhile: whoever took it has made the search shorter.
            let Some(oldest) = oldest else { continue };
            let pooled = inner.idle.remove(oldest);
            drop(inner);
            return Some((Arc::clone(pool), pooled));
        }
    }
}

/// What keeps a pool from another connection.
enum Full<'a> {
    /// Its own size.
    Pool,
    /// A limit that it shares with other pools.
    Shared(&'a Tally),
}

/// A place that an evicted connection will free, for as long as it takes.
struct Coming(Arc<Pool>);

impl Coming {
    fn to(needy: &Arc<Pool>) -> Self {
        needy.coming.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(needy))
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.coming.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    fn place(&self) -> Result<Place, Full<'_>> {
        let config = self.site.config.load();
        let user = String::from_utf8_lossy(&self.user);
        let database = &self.site.database;
        let database_limit = config.databases.get(&**database).and_then(|d| d.max_db_connections);
        let user_limit = config.users.get(&*user).and_then(|u| u.max_user_connections);
        let limits = [
            config.pool_size(database, &user),
            database_limit.unwrap_or(config.general.max_db_connections),
            user_limit.unwrap_or(config.general.max_user_connections),
        ];
        Place::take(self.counts_of_a_place(), limits).map_err(|reached| match reached {
            0 => Full::Pool,
            1 => Full::Shared(&self.site.connections),
            _ => Full::Shared(&self.user_open),
        })
    }

    pub(super) fn counts_of_a_place(&self) -> [&Arc<AtomicU32>; 3] {
        [&self.open, self.site.connections.count(), self.user_open.count()]
    }

    /// Connections that waiters could use now.
    fn wanted(inner: &mut Inner) -> u32 {
        while inner.waiters.pop_front_if(|waiter| waiter.hand.is_closed()).is_some() {}
        let live = inner.waiters.iter().filter(|waiter| !waiter.hand.is_closed());
        live.take(OPENING_MAX as usize).map(|_| 1).sum()
    }

    /// Opens connections while there are waiters without one under way and places are left; where a limit shared with
    /// other pools is in the way, their idle connections have to go. How many it opens.
    pub(super) fn open_more(self: &Arc<Self>, worker: usize) -> u32 {
        let mut opened = 0;
        let mut queued_at: Option<*const Tally> = None;
        loop {
            let mut inner = self.lock();
            let wanted = Self::wanted(&mut inner);
            if self.opening.load(Ordering::Acquire) >= wanted {
                return opened;
            }
            match self.place() {
                Ok(place) => {
                    self.opening.fetch_add(1, Ordering::AcqRel);
                    let rest = inner.failed_at.map(|at| at + self.site.config.load().general.server_login_retry);
                    drop(inner);
                    self.open_one(place, worker, rest);
                    opened += 1;
                }
                Err(Full::Pool) => return opened,
                Err(Full::Shared(tally)) => {
                    drop(inner);
                    if queued_at.replace(tally) != Some(tally) {
                        // Asked once more: a place freed before we stood in the queue was announced to nobody.
                        tally.note_starving(self);
                    } else if !self.wants_more() || !self.evict_for_us(tally) {
                        return opened;
                    }
                }
            }
        }
    }

    /// Whether somebody waits for whom no connection is under way, nor a place.
    fn wants_more(&self) -> bool {
        let wanted = Self::wanted(&mut self.lock());
        self.opening.load(Ordering::Acquire) + self.coming.load(Ordering::Acquire) < wanted
    }

    fn evict_for_us(self: &Arc<Self>, tally: &Tally) -> bool {
        let Some((owner, pooled)) = tally.oldest_idle(self) else { return false };
        owner.close(pooled, Some(Coming::to(self)));
        true
    }

    /// Whether a limit keeps some pool from a connection. To be asked under this pool's lock.
    pub(super) fn is_contested(&self) -> bool {
        let starving = |tally: &Tally| tally.starving_len.load(Ordering::Relaxed) > 0;
        starving(&self.site.connections) || starving(&self.user_open)
    }

    /// Closes a connection that nobody of this pool waits for, if another pool starves for its place; else it comes back.
    pub(super) fn yield_to_starving(self: &Arc<Self>, pooled: Box<Pooled>) -> Option<Box<Pooled>> {
        let home = pooled.home;
        for tally in [&self.site.connections, &self.user_open] {
            while let Some(needy) = tally.next_starving() {
                if !Arc::ptr_eq(&needy, self) && needy.wants_more() {
                    self.close(pooled, Some(Coming::to(&needy)));
                    // It may need more than this one: then it queues again.
                    needy.open_more(home);
                    return None;
                }
            }
        }
        Some(pooled)
    }

    /// A place has come free: for whoever starves the longest.
    pub(super) fn feed_starving(&self, worker: usize) {
        for tally in [&self.site.connections, &self.user_open] {
            for _ in 0..tally.starving_len.load(Ordering::Relaxed) {
                let Some(needy) = tally.next_starving() else { break };
                if needy.open_more(worker) > 0 {
                    break;
                }
            }
        }
    }

    /// Closes a connection with a goodbye, in the background; it counts as no failure. Only then is its place free for
    /// those who wait.
    pub(super) fn dismiss(self: &Arc<Self>, pooled: Box<Pooled>) {
        self.close(pooled, None);
    }

    fn close(self: &Arc<Self>, pooled: Box<Pooled>, coming: Option<Coming>) {
        let pool = Arc::clone(self);
        self.site.tasks.spawn(async move {
            let deadline = tokio::time::Instant::now() + GOODBYE;
            let Pooled { server, place, home, .. } = *pooled;
            server.terminate(deadline).await;
            drop(place);
            if let Some(coming) = coming {
                let needy = Arc::clone(&coming.0);
                drop(coming);
                needy.open_more(home);
            }
            pool.open_more(home);
            pool.feed_starving(home);
        });
    }

    /// Opens connections that nobody waits for, up to `min_pool_size`.
    pub(super) fn open_spare(self: &Arc<Self>, floor: usize, worker: usize) {
        while usize::try_from(self.open.load(Ordering::Relaxed)).is_ok_and(|open| open < floor) {
            let failed_at = self.lock().failed_at;
            let retry = self.site.config.load().general.server_login_retry;
            if failed_at.is_some_and(|at| at.elapsed() < retry) {
                return;
            }
            let Ok(place) = self.place() else { return };
            self.opening.fetch_add(1, Ordering::AcqRel);
            self.open_one(place, worker, None);
        }
    }

    fn open_one(self: &Arc<Self>, place: Place, worker: usize, rest_until: Option<std::time::Instant>) {
        let opener = Opener { pool: Arc::clone(self) };
        self.site.tasks.spawn(opener.run(place, worker, rest_until));
    }
}
