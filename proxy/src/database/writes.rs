//! PAUSE … WITH (mode writes): reads go on, writes wait, for work that a person does on the database.
//!
//! Invariant: a courtesy to clients and nobody's fence: no run, no switch and no decision relies on it, and it stands in the
//! way of none. A client that asks for a writable transaction gets one, and what does not come by this proxy is not seen.

use std::sync::Arc;
use std::time::Instant;

use pgcutover_api::command::PauseWith;
use pgcutover_api::epoch::Lease;

use crate::database::Database;
use crate::database::refusal::{Refusal, Why};
use crate::gate::Intent;

impl Database {
    /// Holds writes; ready when no transaction is open that began before. Without a lease of its own it has that of a plain
    /// PAUSE: none, unless `pause_lease_default` says otherwise.
    ///
    /// Dropped before it is ready it is undone.
    ///
    /// # Errors
    /// [`Refusal`]; with [`Why::NotDrained`] writes go on.
    pub async fn pause_writes(self: &Arc<Self>, owner: String, pause: PauseWith) -> Result<(), Refusal> {
        if pause.epoch.is_some() {
            return Err(Refusal::new(Why::WrongState, "a run pauses everything, not only writes").with_hint(
                "mode writes is a courtesy and no fence: leave out run, epoch, source and target, or the mode",
            ));
        }
        let general = self.site.config.load().general.clone();
        let drain = pause.drain.unwrap_or(general.drain_timeout);
        let lease = pause.lease.map_or(general.pause_lease_default, Lease::duration);
        if !lease.is_zero() && lease <= drain {
            let message = format!("drain {drain:?} has to be shorter than lease {lease:?}");
            return Err(Refusal::new(Why::WrongState, message));
        }
        let intent = Intent { owner, epoch: None, lease: (!lease.is_zero()).then_some(lease) };
        let id = self.site.gate.hold_writes(intent, Instant::now()).map_err(|held| {
            let message = format!("writes of {} are already paused by {}", self.name(), held.owner);
            Refusal::new(Why::WrongState, message)
        })?;
        // Whoever waits for a connection has not begun: it comes back as one that may only read.
        self.pools().iter().for_each(|pool| pool.send_back_waiters());
        let undo = self.undo(id);
        let outcome = self.drain_until(id, drain, pause.on_timeout).await;
        undo.keep();
        outcome
    }

    /// Ends the pause of writes, if there is one.
    pub(super) fn release_writes(&self) -> bool {
        let Some(pause) = self.site.gate.writes().filter(|pause| self.lift(pause.id).is_some()) else { return false };
        let pause_ms = pause.since.elapsed();
        tracing::info!(database = %self.name(), owner = %pause.owner, ?pause_ms, "writes resumed");
        true
    }

    /// Ends a pause of writes whose lease has ended; when the lease of one that goes on does.
    pub(super) fn settle_writes(&self) -> Option<Instant> {
        let pause = self.site.gate.writes()?;
        let end = pause.lease_ends?;
        if end > Instant::now() {
            return Some(end);
        }
        self.site.events.leases_ended.count();
        tracing::warn!(database = %self.name(), owner = %pause.owner, "the lease of a pause of writes has ended");
        self.release_writes();
        None
    }

    /// Since when writes have been held, where only they are: what began before is waited for.
    pub(super) fn only_writes_held_since(&self) -> Option<Instant> {
        let gate = &self.site.gate;
        gate.writes().filter(|_| gate.pause().is_none()).map(|pause| pause.since)
    }
}
