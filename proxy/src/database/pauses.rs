//! The pauses that are over, for SHOW PAUSES.
//!
//! Invariant: what is written down here costs no client anything: the gate is open before any of it is.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use pgcutover_api::epoch::Claim;

use crate::database::{Database, lock};
use crate::gate::{Pause, PauseId};
use crate::metrics::Holds;

/// Pauses that are remembered.
const KEPT: usize = 100;

/// A pause that is over.
#[derive(Debug, Clone)]
pub struct Paused {
    /// When the gate was shut.
    pub at: SystemTime,
    /// Who asked, see [`Pause::owner`].
    pub owner: String,
    /// Run and epoch of an epoch pause.
    pub claim: Option<Claim>,
    /// From the gate's shutting until no transaction was open; `None` if it did not come to that.
    pub drain: Option<Duration>,
    /// From the gate's shutting to its opening.
    pub pause: Duration,
    /// Clients that waited when it opened.
    pub held: u32,
    /// How long it held transactions. Those that it let go last are still coming in for a moment.
    pub holds: Arc<Holds>,
}

impl Database {
    /// Takes note that no transaction is open any more under this pause.
    pub(super) fn note_drained(&self, id: PauseId) {
        *lock(&self.drained) = Some((id, Instant::now()));
    }

    /// Opens the gate if this pause still holds it; what is returned is how long it held transactions.
    pub(super) fn lift(&self, id: PauseId) -> Option<Arc<Holds>> {
        self.site.gate.open(id).then(|| self.site.holds.swap(Arc::default()))
    }

    /// Writes down a pause that was lifted just now.
    pub(super) fn note_over(&self, pause: &Pause, held: u32, holds: Arc<Holds>) {
        let drained = lock(&self.drained).filter(|(id, _)| *id == pause.id);
        let paused = Paused {
            at: SystemTime::now().checked_sub(pause.since.elapsed()).unwrap_or(SystemTime::UNIX_EPOCH),
            owner: pause.owner.clone(),
            claim: pause.claim(),
            drain: drained.map(|(_, at)| at.saturating_duration_since(pause.since)),
            pause: pause.since.elapsed(),
            held,
            holds,
        };
        let mut pauses = lock(&self.pauses);
        if pauses.len() == KEPT {
            pauses.pop_front();
        }
        pauses.push_back(paused);
    }

    /// The pauses that are over, the oldest first.
    #[must_use]
    pub fn pauses(&self) -> Vec<Paused> {
        lock(&self.pauses).iter().cloned().collect()
    }
}
