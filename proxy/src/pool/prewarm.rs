//! Connections opened to a backend before it becomes active.
//!
//! Invariant: parked connections are logged in and at rest, and they serve nobody until the route points at their
//! backend. They take no place of the pool until then: the connections they replace still have theirs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use futures_util::stream;

use crate::backend::{ConnectError, ConnectFailure};
use crate::pool::Pool;
use crate::pool::connection::{Place, Pooled};
use crate::pool::limits::OPENING_MAX;
use crate::route::Active;

/// Parked connections of one backend.
#[derive(Debug, Default)]
pub struct Prewarmed {
    #[expect(clippy::vec_box, reason = "connections move between lists, channels and tasks as pointers")]
    connections: Vec<Box<Pooled>>,
}

impl Prewarmed {
    /// How many.
    #[must_use]
    pub fn open(&self) -> usize {
        self.connections.len()
    }
}

/// What is known of a backend that connections were parked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It has taken a write since: whatever it was when they were opened, it is a primary.
    Primary,
    /// Nothing.
    Unknown,
}

/// What came of prewarming for one user.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// Connections asked for.
    pub wanted: usize,
    /// Connections parked now.
    pub open: usize,
    /// The last refusal; `None` if all are in.
    pub error: Option<ConnectError>,
}

impl Verdict {
    /// Whether the server knows the user and says no.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.error.as_ref().is_some_and(|error| error.failure == ConnectFailure::Refused)
    }
}

impl Pool {
    /// Opens connections to a backend until `wanted` are parked there, several at a time, before any pause.
    ///
    /// Each is bounded by `server_connect_timeout`. Cancel safe: what is parked stays parked.
    pub async fn prewarm(self: &Arc<Self>, target: &Active, wanted: usize, worker: usize) -> Verdict {
        let have = self.sift(&target.backend);
        let missing = wanted.saturating_sub(have);
        let parallel = usize::try_from(OPENING_MAX).unwrap_or(1);
        let mut error = None;
        let mut outcomes =
            stream::iter(0..missing).map(|_| self.connect(target, Place::none(), worker)).buffer_unordered(parallel);
        while let Some(outcome) = outcomes.next().await {
            match outcome {
                Ok(pooled) => self.park(&target.backend, pooled),
                Err(failed) => {
                    let stop = failed.failure == ConnectFailure::Refused;
                    error = Some(failed);
                    // A refusal is the same for every further attempt.
                    if stop {
                        break;
                    }
                }
            }
        }
        drop(outcomes);
        Verdict { wanted, open: self.sift(&target.backend), error }
    }

    /// The parked connections of a backend become the pool's own, of the route's present generation, each in the place of a
    /// former one, which closes in its turn; former ones without a successor close at once, so that others can be opened.
    pub fn adopt_prewarmed(self: &Arc<Self>, backend: &str, standing: Standing) {
        let generation = self.site.route.generation();
        let mut inner = self.lock();
        let parked = inner.parked.remove(backend).unwrap_or_default();
        let mut former = std::mem::take(&mut inner.idle);
        drop(inner);
        for mut pooled in parked.connections {
            pooled.generation = generation;
            if standing == Standing::Primary {
                pooled.promoted();
            }
            if pooled.is_alive() {
                pooled.shared.generation.store(generation, Ordering::Relaxed);
                pooled.place = self.place_of(former.pop());
                self.welcome.store(Arc::new(Some(Arc::clone(&pooled.initial))));
                self.put(pooled);
            } else {
                self.dismiss(pooled);
            }
        }
        former.into_iter().for_each(|pooled| self.dismiss(pooled));
    }

    /// The place of a connection that leaves for the one that succeeds it.
    fn place_of(self: &Arc<Self>, former: Option<Box<Pooled>>) -> Place {
        let Some(mut former) = former else { return self.force_place() };
        let place = std::mem::replace(&mut former.place, Place::none());
        self.dismiss_later(former);
        place
    }

    /// Closes what was parked, each in its turn: the switch is off.
    pub fn unpark(self: &Arc<Self>) {
        let parked = std::mem::take(&mut self.lock().parked);
        for pooled in parked.into_values().flat_map(|warm| warm.connections) {
            self.dismiss_later(pooled);
        }
    }

    /// Takes a parked connection that is still there.
    pub(super) fn unpark_one(self: &Arc<Self>, backend: &str) -> Option<Box<Pooled>> {
        loop {
            let mut pooled = self.lock().parked.get_mut(backend)?.connections.pop()?;
            if pooled.is_alive() {
                return Some(pooled);
            }
            self.dismiss(pooled);
        }
    }

    /// Drops parked connections that are gone; how many are left.
    fn sift(self: &Arc<Self>, backend: &str) -> usize {
        let mut inner = self.lock();
        let Some(warm) = inner.parked.get_mut(backend) else { return 0 };
        let gone: Vec<_> = warm.connections.extract_if(.., |pooled| !pooled.is_alive()).collect();
        let left = warm.connections.len();
        drop(inner);
        drop(gone);
        left
    }

    fn park(&self, backend: &str, pooled: Box<Pooled>) {
        self.lock().parked.entry(backend.into()).or_default().connections.push(pooled);
    }

    /// A place for a parked connection that becomes the pool's own: the limits were checked when it was asked for, and
    /// the connection it replaces is on its way out.
    pub(super) fn force_place(&self) -> Place {
        let counts = self.counts_of_a_place();
        counts.iter().for_each(|count| {
            count.fetch_add(1, Ordering::AcqRel);
        });
        Place::taken(counts)
    }
}
