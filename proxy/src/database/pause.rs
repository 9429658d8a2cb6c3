//! PAUSE, RESUME, RENEW and KILL of one database.
//!
//! Invariant: an epoch pause begins only for an epoch that its store has open, on the backend that the run names as its
//! source; it ends only by a switch to that epoch, by a read abort, or by force. A pause without an epoch that is
//! dropped before it is complete is undone by whoever began it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgcutover_api::command::{EpochPause, OnTimeout, PauseWith, Warrant};
use pgcutover_api::epoch::{Claim, Lease};
use pgcutover_api::store::{Outcome, Turn};

use crate::backend;
use crate::client::{Order, State};
use crate::database::link::Silence;
use crate::database::refusal::{Refusal, Why};
use crate::database::{Database, lock};
use crate::gate::{Drained, Intent, NotRenewed, Pause, PauseId};

/// How often a drain looks for transactions that wait for a lock of a held session.
const LOCK_LOOK: Duration = Duration::from_millis(100);

/// How long one cancel request may take.
const CANCEL: Duration = Duration::from_secs(2);

/// How long KILL waits for its clients to be gone: a last word to a client that does not read takes two seconds.
const KILL: Duration = Duration::from_secs(5);

/// How often it looks.
const KILL_LOOK: Duration = Duration::from_millis(10);

impl Database {
    /// PgBouncer's PAUSE: no deadline; ready when no transaction is open and no server connection at rest is left.
    ///
    /// Dropped before it is ready the pause is undone.
    ///
    /// # Errors
    /// Paused already, or resumed by somebody before it was complete.
    pub async fn pause(self: &Arc<Self>, owner: String) -> Result<PauseId, Refusal> {
        let lease = self.site.config.load().general.pause_lease_default;
        let intent = Intent { owner, epoch: None, lease: (!lease.is_zero()).then_some(lease) };
        let id = self.shut(intent)?;
        let undo = self.undo(id);
        let drained = self.drain(id).await;
        undo.keep();
        match drained {
            Drained::Yes => {
                // As in PgBouncer: whoever paused may restart the server now.
                self.pools().iter().for_each(|pool| pool.close_idle());
                Ok(id)
            }
            Drained::Ended => Err(self.resumed()),
        }
    }

    /// PAUSE … WITH: leased, with a drain deadline.
    ///
    /// # Errors
    /// [`Refusal`]; with [`Why::NotDrained`] traffic goes on.
    pub async fn pause_with(self: &Arc<Self>, owner: String, pause: PauseWith) -> Result<(), Refusal> {
        let general = self.site.config.load().general.clone();
        let drain = pause.drain.unwrap_or(general.drain_timeout);
        let lease = pause.lease.map_or(general.pause_lease, Lease::duration);
        self.check_deadlines(drain, lease, general.hold_budget)?;
        if let Some(epoch) = &pause.epoch {
            self.check_epoch(epoch).await?;
        }
        let owned = pause.epoch.is_some();
        let id = self.shut(Intent { owner, epoch: pause.epoch, lease: Some(lease) })?;
        let undo = Undo { database: self, id: (!owned).then_some(id) };
        let outcome = self.drain_until(id, drain, pause.on_timeout).await;
        undo.keep();
        if owned && outcome.is_ok() {
            // Whoever checks the members before deciding finds this proxy paused now, not at its next look.
            self.enrol_member().await;
        }
        outcome
    }

    fn check_deadlines(&self, drain: Duration, lease: Duration, hold_budget: Duration) -> Result<(), Refusal> {
        if drain < lease && lease + drain < hold_budget {
            return Ok(());
        }
        let message = format!(
            "drain {drain:?} has to be shorter than lease {lease:?}, and both together shorter than hold_budget {hold_budget:?}"
        );
        Err(Refusal::new(Why::WrongState, message))
    }

    /// R7: the epoch is open in the store of the backend that is active here, and it is that run's.
    async fn check_epoch(&self, pause: &EpochPause) -> Result<(), Refusal> {
        let active = self.site.route.active();
        if *active.backend != *pause.source {
            let message = format!("{} is on backend '{}', not on '{}'", self.name(), active.backend, pause.source);
            return Err(Refusal::new(Why::WrongState, message)
                .with_hint("the run's source is not this proxy's; see SHOW BACKENDS"));
        }
        if self.endpoint(&pause.target).is_none() {
            return Err(self.unknown_backend(&pause.target));
        }
        let view = self.view(&pause.source).await.map_err(|error| self.silent(&error))?;
        let open = view.open.as_ref().map(|open| Claim { run: open.run, epoch: open.epoch });
        if open != Some(pause.claim) {
            let message = format!("{} is not open in the store of backend '{}'", pause.claim, pause.source);
            return Err(Refusal::new(Why::WrongState, message).with_hint("it was decided, or never opened here"));
        }
        self.identify(&pause.source).await.map_err(|error| self.silent(&error))?;
        Ok(())
    }

    /// Shuts the gate and sends those who wait for a connection back to it.
    pub(super) fn shut(&self, intent: Intent) -> Result<PauseId, Refusal> {
        let id = self.site.gate.shut(intent, Instant::now()).map_err(|held| self.held_by(&held))?;
        self.pools().iter().for_each(|pool| pool.send_back_waiters());
        Ok(id)
    }

    /// The same for the watch: a gate that is shut already stays its owner's.
    pub(super) fn hold(&self, intent: Intent) -> Result<PauseId, Refusal> {
        let id = self.site.gate.hold(intent, Instant::now()).map_err(|held| self.held_by(&held))?;
        self.pools().iter().for_each(|pool| pool.send_back_waiters());
        Ok(id)
    }

    /// Waits for the drain; meanwhile a held session whose lock an open transaction waits for is let through.
    pub(super) async fn drain(&self, id: PauseId) -> Drained {
        loop {
            tokio::select! {
                drained = self.site.gate.drained(id) => {
                    if drained == Drained::Yes {
                        self.note_drained(id);
                    }
                    return drained;
                }
                // reason: lock waits have no event; ended by the drain or its deadline.
                () = tokio::time::sleep(LOCK_LOOK) => self.let_lock_owners_through(id).await,
            }
        }
    }

    pub(super) async fn drain_until(
        self: &Arc<Self>,
        id: PauseId,
        drain: Duration,
        on_timeout: OnTimeout,
    ) -> Result<(), Refusal> {
        match tokio::time::timeout(drain, self.drain(id)).await {
            Ok(Drained::Yes) => return Ok(()),
            Ok(Drained::Ended) => return Err(self.resumed()),
            Err(_) => {}
        }
        // A pause of writes waits for no transaction that only reads.
        let waited_for = || match self.site.gate.writes().is_some_and(|writes| writes.id == id) {
            true => self.site.gate.writers(),
            false => self.site.gate.passes(),
        };
        let open = waited_for();
        match on_timeout {
            OnTimeout::Abort => {}
            OnTimeout::Cancel => self.cancel_open().await,
            OnTimeout::Terminate => self.terminate_open(),
        }
        if on_timeout != OnTimeout::Abort {
            // What was cancelled needs a moment to end; it gets as long as the drain had.
            match tokio::time::timeout(drain, self.drain(id)).await {
                Ok(Drained::Yes) => return Ok(()),
                Ok(Drained::Ended) => return Err(self.resumed()),
                Err(_) => {}
            }
        }
        self.give_up(id).await;
        let message = format!("{open} transactions of {} were still open after {drain:?}", self.name());
        let hint = format!("traffic goes on; SHOW BLOCKERS {} says who", self.name());
        Err(Refusal::new(Why::NotDrained, message).with_hint(hint))
    }

    /// Ends a pause that could not be completed: an epoch has to be decided first (R2).
    async fn give_up(self: &Arc<Self>, id: PauseId) {
        match self.site.gate.pause().filter(|pause| pause.id == id).and_then(|pause| pause.epoch) {
            None => {
                self.lift(id);
            }
            Some(_) => {
                self.site.gate.end_lease(id, Instant::now());
                self.settle_ended_lease().await;
            }
        }
    }

    async fn cancel_open(&self) {
        let marks: Vec<_> = self.active_clients().filter_map(|client| client.cancel_target()).collect();
        let sent = marks.into_iter().map(|mark| async move {
            let server = mark.server();
            let Some(key) = &server.key else { return };
            let deadline = tokio::time::Instant::now() + CANCEL;
            if let Err(error) = backend::cancel(&server.address, key, deadline).await {
                tracing::warn!(pid = server.pid, %error, "the cancel of an open transaction failed");
            }
        });
        futures_util::future::join_all(sent).await;
    }

    /// Ends the connections of clients in a transaction.
    pub(super) fn terminate_open(&self) {
        self.active_clients().for_each(|client| client.order(Order::Kill));
    }

    /// Clients in a transaction; while only writes are held, in one that began before.
    fn active_clients(&self) -> impl Iterator<Item = Arc<crate::client::Client>> {
        let held_since = self.only_writes_held_since();
        self.clients().into_iter().filter(move |client| {
            client.state() == State::Active && held_since.is_none_or(|since| client.state_since() < since)
        })
    }

    /// PgBouncer's KILL: ends every client and the server connections with them; the gate stays shut.
    pub async fn kill(&self, owner: String) {
        // Shut by somebody already: it stays theirs.
        let _ = self.shut(Intent { owner, epoch: None, lease: None });
        let victims = self.clients();
        victims.iter().for_each(|client| client.order(Order::Kill));
        let gone = async {
            // A client's end has no other sign, and a few looks cost nothing. Ended by the clock below.
            while victims.iter().any(|victim| self.process.clients.find(victim.who.id).is_some()) {
                // reason: killed clients leave one by one; looked at again within the deadline.
                tokio::time::sleep(KILL_LOOK).await;
            }
        };
        if tokio::time::timeout(KILL, gone).await.is_err() {
            tracing::warn!(database = %self.name(), "some killed clients are still leaving");
        }
        // Only now: a session-pooled client gives its connection back when it leaves.
        self.pools().iter().for_each(|pool| pool.close_idle());
    }

    /// PgBouncer's RESUME, also of a pause that is still draining.
    ///
    /// # Errors
    /// Not paused, or paused by a run.
    pub fn resume(&self) -> Result<(), Refusal> {
        let Some(pause) = self.site.gate.pause() else {
            return if self.release_writes() { Ok(()) } else { Err(self.not_paused()) };
        };
        if pause.epoch.is_some() {
            return Err(self.held_by(&pause));
        }
        let (opened, released) = (self.open(&pause), self.release_writes());
        if opened || released { Ok(()) } else { Err(self.not_paused()) }
    }

    /// RESUME … WITH: by its run once the epoch is decided here, or by force.
    ///
    /// # Errors
    /// [`Refusal`]; the pause goes on.
    pub async fn resume_with(&self, warrant: Warrant) -> Result<(), Refusal> {
        let Some(pause) = self.site.gate.pause() else {
            let released = warrant == Warrant::Force && self.release_writes();
            return if released { Ok(()) } else { Err(self.not_paused()) };
        };
        match warrant {
            Warrant::Force => {
                tracing::warn!(database = %self.name(), ?pause, "resumed by force: an operator takes responsibility")
            }
            Warrant::Claim(claim) => {
                if pause.claim() != Some(claim) {
                    return Err(self.held_by(&pause));
                }
                if self.site.route.active().epoch != claim.epoch {
                    self.require_abort(claim, &pause).await?;
                }
            }
        }
        self.open(&pause);
        Ok(())
    }

    /// R7: without a switch to the epoch only a read abort resumes.
    async fn require_abort(&self, claim: Claim, pause: &Pause) -> Result<(), Refusal> {
        let source = pause.epoch.as_ref().map_or("", |epoch| epoch.source.as_str());
        let view = self.view(source).await.map_err(|error| self.silent(&error))?;
        let decided = view.last.filter(|last| last.epoch == claim.epoch && last.run == claim.run);
        match decided.map(|decision| decision.outcome) {
            Some(Outcome::Abort) => Ok(()),
            Some(Outcome::Commit) => {
                let message = format!("{claim} is committed: SWITCH {} before RESUME", self.name());
                Err(Refusal::new(Why::WrongState, message))
            }
            None => Err(Refusal::new(Why::Undecided, format!("{claim} is not decided"))
                .with_hint("decide it (proxyctl abort); nobody resumes before that")),
        }
    }

    /// RENEW: the lease lasts from now on.
    ///
    /// # Errors
    /// Not paused, another's, or ended: an ended lease is never revived.
    pub fn renew(&self, claim: Claim, lease: Lease) -> Result<(), Refusal> {
        self.site.gate.renew(claim, lease.duration(), Instant::now()).map_err(|error| match error {
            NotRenewed::Open => self.not_paused(),
            NotRenewed::Other(owner) => Refusal::new(Why::WrongState, format!("{} is paused by {owner}", self.name())),
            NotRenewed::Unclaimed => {
                Refusal::new(Why::WrongState, format!("the pause of {} has no epoch", self.name()))
            }
            NotRenewed::Ended => Refusal::new(Why::WrongState, format!("the lease of {} has ended", self.name()))
                .with_hint("the proxy is deciding the epoch; abort the run"),
        })
    }

    /// Opens the gate if this pause still holds it, and completes the record of a switch made under it.
    pub(super) fn open(&self, pause: &Pause) -> bool {
        let held = self.site.gate.held();
        let Some(holds) = self.lift(pause.id) else { return false };
        self.abandon_outlived();
        if pause.epoch.is_some() {
            // Adopted where the switch took place; where it did not, its connections must not stay on the target.
            self.pools().iter().for_each(|pool| pool.unpark());
        }
        let pause_ms = pause.since.elapsed();
        if let Some(last) = lock(&self.switches).back_mut().filter(|last| last.pause.is_none()) {
            last.pause = Some(pause_ms);
        }
        self.note_over(pause, held, holds);
        tracing::info!(database = %self.name(), owner = %pause.owner, ?pause_ms, "resumed");
        true
    }

    pub(super) fn turn(&self, claim: Claim) -> Result<Turn, Silence> {
        Ok(Turn { db: self.route_name()?.clone(), claim })
    }

    fn not_paused(&self) -> Refusal {
        Refusal::new(Why::WrongState, format!("database {} is not paused", self.name()))
    }

    fn resumed(&self) -> Refusal {
        Refusal::new(Why::WrongState, format!("the pause of {} was ended before it was complete", self.name()))
    }

    pub(super) fn held_by(&self, pause: &Pause) -> Refusal {
        match pause.claim() {
            Some(claim) => Refusal::new(Why::WrongState, format!("database {} is paused by {claim}", self.name()))
                .with_hint("RESUME … WITH its run and epoch, or WITH (force) if you know better"),
            None => {
                Refusal::new(Why::WrongState, format!("database {} is already paused by {}", self.name(), pause.owner))
            }
        }
    }

    /// Undoes this pause, unless it is kept.
    pub(super) fn undo(&self, id: PauseId) -> Undo<'_> {
        Undo { database: self, id: Some(id) }
    }

    pub(super) fn unknown_backend(&self, backend: &str) -> Refusal {
        let known: Vec<String> = self.backends().into_iter().map(|(name, _)| name).collect();
        Refusal::new(Why::Unknown, format!("no such backend: {backend}")).with_hint(format!(
            "{} has {}",
            self.name(),
            known.join(", ")
        ))
    }

    pub(super) fn silent(&self, error: &Silence) -> Refusal {
        Refusal::new(Why::Undecided, format!("the decision store of {} can't be read: {error}", self.name()))
    }
}

/// Undoes a pause unless it is kept.
pub(super) struct Undo<'a> {
    database: &'a Database,
    id: Option<PauseId>,
}

impl Undo<'_> {
    pub(super) fn keep(mut self) {
        self.id = None;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.database.lift(id);
        }
    }
}
