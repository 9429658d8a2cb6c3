//! The proxy looks for itself: what the store says (R9), and what becomes of a lease that ends (R8).
//!
//! Invariant: no lease of an epoch pause ends otherwise than through decide(abort); while nobody answers the gate stays
//! shut, and clients are shed by their own hold budget.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgcutover_api::command::EpochPause;
use pgcutover_api::epoch::Claim;
use pgcutover_api::store;
use pgcutover_api::store::{Decision, Member, Outcome};

use crate::database::Database;
use crate::database::link::Silence;
use crate::database::switch::WATCH;
use crate::database::verdict::{Verdict, verdict};
use crate::gate::Pause;
use crate::relay::ShutSignal;
use crate::route::Active;

/// How often a proxy reads the store of its active backend.
const LOOK: Duration = Duration::from_secs(1);

/// How soon an ended lease that nobody could decide is asked about again, and a drain looked after.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Watches one database until the process ends.
pub async fn watch(database: Arc<Database>) {
    let closing = database.process.closing.clone();
    // Ended by the process.
    tokio::select! {
        () = closing.cancelled() => {}
        () = database.watch_forever() => {}
        () = database.keep_names() => {}
    }
}

impl Database {
    async fn watch_forever(self: &Arc<Self>) {
        let mut look_at = Instant::now();
        loop {
            // Enabled before anything is read: a pause that begins meanwhile wakes us for its lease.
            let change = self.site.gate.change();
            tokio::pin!(change);
            change.as_mut().enable();
            let now = Instant::now();
            if now >= look_at {
                self.look().await;
                look_at = Instant::now() + self.until_next_look();
            }
            self.abandon_outlived();
            self.sift_drafts();
            let writes_end = self.settle_writes();
            let asked_again = self.settle_ended_lease().await;
            let lease_ends = self.site.gate.pause().and_then(|pause| pause.lease_ends);
            let next = match (asked_again, lease_ends) {
                (Settled::No, _) => look_at.min(Instant::now() + ASK_AGAIN),
                (Settled::Yes, Some(end)) => look_at.min(end),
                (Settled::Yes, None) => look_at,
            };
            let next = writes_end.map_or(next, |end| next.min(end));
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = &mut change => {}
            }
        }
    }

    fn until_next_look(&self) -> Duration {
        if self.is_draining() {
            return ASK_AGAIN;
        }
        // More than one look before its lease ends.
        self.own_hold_now().map_or(LOOK, |_| LOOK.min(self.site.config.load().general.pause_lease / 4))
    }

    /// The hold that this proxy made by itself, if that is what holds the gate.
    fn own_hold_now(&self) -> Option<Pause> {
        self.site.gate.pause().filter(|pause| pause.owner == WATCH)
    }

    /// R8 where no RENEW comes: the run that this hold is for says in the store that it lives. The lease lasts from when it last
    /// said so; one that has ended is not revived.
    async fn renew_own_hold(&self, backend: &str) {
        let Some((claim, ends)) = self.own_hold_now().and_then(|pause| Some((pause.claim()?, pause.lease_ends?)))
        else {
            return;
        };
        let Ok(route) = self.route_name() else { return };
        // Unanswered: the lease goes on running.
        let Ok(rows) = self.run(backend, &store::members(route)).await else { return };
        let members = rows.iter().filter_map(|row| {
            let columns: [_; 6] = std::array::from_fn(|column| row.text(column));
            Member::decode(&columns).ok()
        });
        let Some(silent_ms) = store::sign_of_life(members, claim) else { return };
        let (now, lease) = (Instant::now(), self.site.config.load().general.pause_lease);
        let left = lease.saturating_sub(Duration::from_millis(silent_ms));
        if now + left > ends {
            // Over, or another's by now: nothing to renew.
            let _ = self.site.gate.renew(claim, left, now);
        }
    }

    /// Whether a pause of an epoch waits for open transactions: once they have ended a run waits to read that in the store.
    fn is_draining(&self) -> bool {
        self.site.gate.passes() > 0 && self.site.gate.pause().is_some_and(|pause| pause.epoch.is_some())
    }

    /// R9: one look at the active backend's store, and what follows from it.
    pub(super) async fn look(self: &Arc<Self>) {
        let active = self.site.route.active();
        let view = match self.view(&active.backend).await {
            Ok(view) => view,
            Err(silence) => {
                // Without a store nothing is armed, and the control login works all the same.
                let answers = silence.is_unarmed();
                self.note_answer(answers, &silence);
                if !answers {
                    self.look_elsewhere(&active).await;
                }
                return;
            }
        };
        self.store_answers.store(true, Ordering::Release);
        let pause = self.site.gate.pause();
        match verdict(active.epoch, pause.as_ref().and_then(|pause| pause.epoch.as_ref()), &view) {
            Verdict::Rest => self.renew_own_hold(&active.backend).await,
            Verdict::Hold(open) => {
                let claim = Claim { run: open.run, epoch: open.epoch };
                tracing::warn!(database = %self.name(), %claim, "an epoch is open that nobody told us of: holding");
                // R14, for the end of the hold's lease.
                let _ = self.identify(&active.backend).await;
                // Paused since, by the run itself or by an admin: held all the same.
                let _ = self.hold(self.own_hold(claim, &open.target));
            }
            Verdict::Follow(commit) => self.follow_or_log(&commit).await,
            Verdict::Resume => {
                if let Some(pause) = pause {
                    self.resume_on_source(&pause, &verdict(active.epoch, None, &view)).await;
                }
            }
        }
        self.enrol_member().await;
    }

    /// R9, before the first client is served: whatever was decided while this proxy was not there. A store that is silent
    /// keeps nobody waiting for longer than one answer may take, or two where another backend is asked.
    pub async fn look_first(self: &Arc<Self>) {
        if self.route_name().is_ok() {
            self.look().await;
        }
    }

    /// R9 where the active backend is silent: the evidence of a newer commit is on its target.
    async fn look_elsewhere(self: &Arc<Self>, active: &Active) {
        for (backend, _) in self.backends() {
            if backend == *active.backend {
                continue;
            }
            let commit = self.view(&backend).await.ok().and_then(|view| view.last_commit);
            if let Some(commit) = commit.filter(|commit| commit.epoch > active.epoch && commit.target == backend) {
                return self.follow_or_log(&commit).await;
            }
        }
    }

    /// After a read abort, and a look since that came to `then`: what was aborted need not be the last epoch.
    async fn resume_on_source(self: &Arc<Self>, pause: &Pause, then: &Verdict) {
        match then {
            Verdict::Follow(commit) => self.follow_or_log(commit).await,
            Verdict::Hold(open) => {
                let claim = Claim { run: open.run, epoch: open.epoch };
                tracing::warn!(database = %self.name(), %claim, "a newer epoch is open: holding on for it");
                // Over already: whoever ended it has the last word.
                let _ = self.site.gate.succeed(pause.id, self.own_hold(claim, &open.target), Instant::now());
            }
            Verdict::Rest | Verdict::Resume => {
                self.open(pause);
            }
        }
    }

    fn note_answer(&self, answers: bool, silence: &Silence) {
        let before = self.store_answers.swap(answers, Ordering::AcqRel);
        if before && !answers {
            tracing::warn!(database = %self.name(), %silence, "the decision store can't be read");
        }
    }

    async fn follow_or_log(self: &Arc<Self>, commit: &Decision) {
        if let Err(refusal) = self.follow(commit).await {
            tracing::error!(database = %self.name(), epoch = %commit.epoch, target = %commit.target, refusal = %refusal.message,
                "a committed epoch can't be followed yet: holding");
        }
    }

    /// Writes this proxy's row among the members: paused only once it is drained.
    pub(super) async fn enrol_member(&self) {
        let active = self.site.route.active();
        let drained = self.site.gate.pause().filter(|_| self.site.gate.passes() == 0);
        let member = Member {
            instance: self.process.instance.to_string(),
            address: crate::database::lock(&self.process.address).clone(),
            backend: active.backend.to_string(),
            route_epoch: active.epoch,
            paused_epoch: drained.and_then(|pause| pause.claim()).map(|claim| claim.epoch),
            seen_ms_ago: 0,
        };
        if let Err(error) = self.enroll(&active.backend, &member).await {
            tracing::warn!(database = %self.name(), %error, "this proxy could not enrol itself as a member");
        }
    }

    /// R8: what becomes of a lease that has ended.
    pub(super) async fn settle_ended_lease(self: &Arc<Self>) -> Settled {
        let ended = |pause: &Pause| pause.lease_ends.is_some_and(|end| end <= Instant::now());
        let Some(pause) = self.site.gate.pause().filter(ended) else { return Settled::Yes };
        self.site.events.leases_ended.count();
        let Some(epoch) = &pause.epoch else {
            tracing::warn!(database = %self.name(), owner = %pause.owner, "the lease of a pause has ended: resuming");
            self.open(&pause);
            return Settled::Yes;
        };
        match self.outcome_of(epoch).await {
            Some(Decided::Abort) => {
                // R9: nobody is served by what was decided alone; a newer epoch may be open, or committed.
                let active = self.site.route.active();
                let Ok(view) = self.view(&active.backend).await else { return Settled::No };
                tracing::warn!(database = %self.name(), claim = %epoch.claim, "the lease has ended and the epoch is aborted: resuming on the source");
                self.resume_on_source(&pause, &verdict(active.epoch, None, &view)).await;
                Settled::Yes
            }
            Some(Decided::Commit(commit)) => {
                self.follow_or_log(&commit).await;
                if self.site.gate.is_shut() { Settled::No } else { Settled::Yes }
            }
            None => Settled::No,
        }
    }

    /// decide(abort) on the source; where it is silent, or no longer the same server (R14), evidence on the target: of that
    /// epoch, or of a newer one, which is opened only after that was aborted.
    async fn outcome_of(&self, epoch: &EpochPause) -> Option<Decided> {
        let Claim { run, epoch: number } = epoch.claim;
        match self.decide_abort(epoch).await {
            Ok(Outcome::Abort) => return Some(Decided::Abort),
            Ok(Outcome::Commit) => {
                let target = epoch.target.clone();
                return Some(Decided::Commit(Decision { epoch: number, run, outcome: Outcome::Commit, target }));
            }
            Err(silence) => {
                tracing::warn!(database = %self.name(), claim = %epoch.claim, %silence, "the epoch can't be decided: holding");
            }
        }
        let evidence = self.view(&epoch.target).await.ok()?.last_commit?;
        let is_ours = evidence.epoch == number && evidence.run == run;
        let is_newer = evidence.epoch > number && evidence.target == epoch.target;
        (is_ours || is_newer).then_some(Decided::Commit(evidence))
    }

    async fn decide_abort(&self, epoch: &EpochPause) -> Result<Outcome, Silence> {
        let before = self.identity(&epoch.source);
        let now = self.identify(&epoch.source).await?;
        if before.is_some_and(|b| (b.system_identifier, b.timeline) != (now.system_identifier, now.timeline)) {
            return Err(Silence::Replaced(now.system_identifier, now.timeline));
        }
        self.decide(&epoch.source, &self.turn(epoch.claim)?, Outcome::Abort).await
    }
}

/// How an epoch ended, as far as it concerns who holds for it.
enum Decided {
    /// Aborted.
    Abort,
    /// Committed, or aborted before this one was.
    Commit(Decision),
}

/// Whether an ended lease has found its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// Nothing to do, or done.
    Yes,
    /// Nobody answered: ask again.
    No,
}
