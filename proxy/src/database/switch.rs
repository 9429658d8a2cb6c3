//! PREPARE SWITCH and SWITCH: from one backend to another.
//!
//! Invariant (R7, R10): the route moves under a shut and drained gate, after this proxy has read the commit itself and
//! the evidence is on the target; or by an operator's force. A route file that can't be written is an alarm and stops
//! nothing.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use pgcutover_api::command::{PrepareSwitch, Switch, Warrant};
use pgcutover_api::epoch::{Claim, Epoch, RunId};
use pgcutover_api::store::Decision;

use crate::client::{Client, Order};
use crate::config::PoolMode;
use crate::database::refusal::{Refusal, Why};
use crate::database::{Database, SWITCHES_KEPT, lock};
use crate::gate::{Intent, Pause};
use crate::pool;
use crate::pool::{Pool, Standing};
use crate::route::{Active, Endpoint};

/// The owner of a hold that a proxy made by itself.
pub(super) const WATCH: &str = "watch";

/// A switch that happened.
#[derive(Debug, Clone)]
pub struct Switched {
    /// When.
    pub at: SystemTime,
    /// The backend before.
    pub from: String,
    /// The backend after.
    pub to: String,
    /// The route's epoch after it.
    pub epoch: Epoch,
    /// Whose it was.
    pub run: Option<RunId>,
    /// By what right.
    pub by: SwitchedBy,
    /// Clients held at that moment.
    pub held: u32,
    /// From the gate's shutting to its opening; `None` while it is shut.
    pub pause: Option<Duration>,
}

/// Where a route goes.
pub(super) struct Leap<'a> {
    pub(super) to: &'a str,
    pub(super) epoch: Epoch,
    pub(super) run: Option<RunId>,
    pub(super) by: SwitchedBy,
}

/// By what right a route moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwitchedBy {
    /// SWITCH after a read commit.
    Decision,
    /// The proxy found the commit by itself.
    Followed,
    /// SWITCH by force.
    Force,
    /// RELOAD with another address.
    Reload,
}

impl SwitchedBy {
    /// The evidence was written there, or nobody has looked.
    fn standing(self) -> Standing {
        match self {
            Self::Decision | Self::Followed => Standing::Primary,
            Self::Force | Self::Reload => Standing::Unknown,
        }
    }
}

impl Database {
    /// Opens connections to a backend, for each user as many as it has now; a verdict per user. For the active backend none are
    /// needed, and those that were opened to others are closed.
    ///
    /// # Errors
    /// No such backend; or it is the active one, and an epoch holds the gate, which may be about to switch.
    pub async fn prepare(
        self: &Arc<Self>,
        prepare: &PrepareSwitch,
    ) -> Result<Vec<(Arc<Pool>, pool::Verdict)>, Refusal> {
        let endpoint = self.endpoint(&prepare.backend).ok_or_else(|| self.unknown_backend(&prepare.backend))?;
        let now = self.site.route.active();
        if *now.backend == *prepare.backend {
            return self.stay().map(|()| Vec::new());
        }
        let target =
            Active { backend: prepare.backend.as_str().into(), endpoint, epoch: now.epoch, generation: now.generation };
        let pools = self.pools();
        let open: u32 = pools.iter().map(|pool| pool.counts().open).sum();
        let warmed = pools.into_iter().map(|pool| {
            let target = &target;
            // Of the connections that are open the kept ones are a part; a number asked for is for the others.
            let (kept, drafted) = self.kept_of(&pool, &prepare.backend);
            let kept = if prepare.connections.is_some() { kept } else { 0 };
            let share = (wanted(pool.counts().open, open, prepare.connections) + kept).saturating_sub(drafted);
            async move {
                let verdict = pool.prewarm(target, share, 0).await;
                (pool, verdict)
            }
        });
        let verdicts = futures_util::future::join_all(warmed).await;
        self.look_at_sessions(&target).await;
        // The control login too: SWITCH writes the evidence there, and should not have to connect first.
        if let Err(error) = self.identify(&prepare.backend).await {
            tracing::warn!(database = %self.name(), backend = %prepare.backend, %error, "no control connection to the target");
        }
        Ok(verdicts)
    }

    /// No switch is to come: what was opened for one closes.
    fn stay(&self) -> Result<(), Refusal> {
        if let Some(pause) = self.site.gate.pause().filter(|pause| pause.epoch.is_some()) {
            return Err(self.held_by(&pause));
        }
        self.pools().iter().for_each(|pool| pool.unpark());
        self.drop_drafts();
        Ok(())
    }

    /// SWITCH: swaps the route; the gate stays shut until RESUME.
    ///
    /// # Errors
    /// [`Refusal`]; the route has not moved then.
    pub async fn switch(&self, switch: &Switch) -> Result<(), Refusal> {
        let _alone = self.moving.lock().await;
        let endpoint = self.endpoint(&switch.backend).ok_or_else(|| self.unknown_backend(&switch.backend))?;
        let pause = self.drained_pause()?;
        if let Some(client) = self.without_successor(&switch.backend, self.kept_clients()).first() {
            let message = format!(
                "session-pooled clients of {} keep their server, client {} among them",
                self.name(),
                client.who.id
            );
            let hint = format!(
                "TRANSPLANT {0} TO {1} moves them; SHOW BLOCKERS {0}; let them leave, or KILL_CLIENT",
                self.name(),
                switch.backend
            );
            return Err(Refusal::new(Why::WrongState, message).with_hint(hint));
        }
        match switch.warrant {
            Warrant::Force => {
                let epoch = self.site.route.active().epoch;
                let leap = Leap { to: &switch.backend, epoch, run: None, by: SwitchedBy::Force };
                self.move_route(endpoint, leap);
            }
            Warrant::Claim(claim) => {
                let commit = self.read_commit(claim, &switch.backend, &pause).await?;
                self.bear_witness(&commit).await?;
                let leap =
                    Leap { to: &switch.backend, epoch: claim.epoch, run: Some(claim.run), by: SwitchedBy::Decision };
                self.move_route(endpoint, leap);
            }
        }
        self.hand_over().await;
        Ok(())
    }

    /// Goes where a commit says that this proxy found by itself, and opens the gate there.
    ///
    /// Whoever still has a transaction on the old side gets the drain deadline and is then ended: that side takes no
    /// writes any more and its reads are stale.
    ///
    /// # Errors
    /// The evidence can't be written, or the target is not declared: the gate stays shut, and the watch tries again.
    pub(super) async fn follow(&self, commit: &Decision) -> Result<(), Refusal> {
        let _alone = self.moving.lock().await;
        if self.site.route.active().epoch < commit.epoch {
            let endpoint = self.endpoint(&commit.target).ok_or_else(|| self.unknown_backend(&commit.target))?;
            self.hold_for(commit).await;
            self.bear_witness(commit).await?;
            self.site.events.decisions_followed.count();
            let run = Some(commit.run);
            let leap = Leap { to: &commit.target, epoch: commit.epoch, run, by: SwitchedBy::Followed };
            self.move_route(endpoint, leap);
            self.hand_over().await;
        }
        if let Some(pause) = self.site.gate.pause() {
            self.open(&pause);
        }
        Ok(())
    }

    pub(super) fn drained_pause(&self) -> Result<Pause, Refusal> {
        let pause = self.site.gate.pause();
        let pause = pause.ok_or_else(|| Refusal::new(Why::WrongState, format!("{} is not paused", self.name())))?;
        match self.site.gate.passes() {
            0 => Ok(pause),
            open => Err(Refusal::new(Why::WrongState, format!("{open} transactions of {} are open", self.name()))),
        }
    }

    /// R7: the commit of this very run and epoch, read by this proxy: on the source, or as evidence on the target.
    async fn read_commit(&self, claim: Claim, target: &str, pause: &Pause) -> Result<Decision, Refusal> {
        let Some(epoch) = pause.epoch.as_ref().filter(|epoch| epoch.claim == claim) else {
            let owner = pause.claim().map_or(pause.owner.clone(), |owner| owner.to_string());
            return Err(Refusal::new(Why::WrongState, format!("{} is paused by {owner}", self.name())));
        };
        let view = match self.view(&epoch.source).await {
            Ok(view) => view,
            Err(silence) => {
                tracing::warn!(database = %self.name(), %silence, "the source's store is silent; looking for evidence");
                self.view(target).await.map_err(|_| self.silent(&silence))?
            }
        };
        match view.last_commit {
            Some(commit) if commit.epoch == claim.epoch && commit.run == claim.run && commit.target == target => {
                Ok(commit)
            }
            Some(_) | None => Err(Refusal::new(Why::Undecided, format!("{claim} is not committed to '{target}'"))),
        }
    }

    /// R10: whoever learns of a commit writes the evidence before it switches.
    async fn bear_witness(&self, commit: &Decision) -> Result<(), Refusal> {
        let claim = Claim { run: commit.run, epoch: commit.epoch };
        let turn = self.turn(claim).map_err(|error| self.silent(&error))?;
        self.witness(&turn, &commit.target).await.map_err(|error| {
            Refusal::new(Why::Failed, format!("no evidence could be written on '{}': {error}", commit.target))
                .with_hint("the proxy holds and tries again; it never serves a side without evidence")
        })
    }

    /// Shuts the gate for a commit that this proxy was not paused for, and sees that nothing runs on the old side.
    async fn hold_for(&self, commit: &Decision) {
        let claim = Claim { run: commit.run, epoch: commit.epoch };
        let id = match self.site.gate.pause() {
            Some(pause) => Some(pause.id),
            None => {
                // R14, for the end of the hold's lease; a source that is silent now is not asked then either.
                let _ = self.identify(&self.site.route.active().backend).await;
                self.shut(self.own_hold(claim, &commit.target)).ok()
            }
        };
        let left_behind = self.without_successor(&commit.target, self.kept_clients());
        left_behind.iter().for_each(|client| client.order(Order::Leave));
        let Some(id) = id else { return };
        let drain = self.site.config.load().general.drain_timeout;
        if tokio::time::timeout(drain, self.drain(id)).await.is_err() {
            self.terminate_open();
            // Ended by the terminated clients' sessions, which close their connections at once.
            let _ = tokio::time::timeout(drain, self.drain(id)).await;
        }
    }

    /// A hold that the proxy makes by itself.
    pub(super) fn own_hold(&self, claim: Claim, target: &str) -> Intent {
        let source = self.site.route.active().backend.to_string();
        let epoch = pgcutover_api::command::EpochPause { claim, source, target: target.to_owned() };
        let lease = self.site.config.load().general.pause_lease;
        Intent { owner: WATCH.to_owned(), epoch: Some(epoch), lease: Some(lease) }
    }

    fn move_route(&self, endpoint: Arc<Endpoint>, leap: Leap<'_>) {
        let from = self.site.route.active().backend.to_string();
        if let Err(error) = self.site.route.switch(leap.to, endpoint, leap.epoch) {
            self.site.events.route_writes_failed.count();
            tracing::error!(database = %self.name(), %error, "ALARM: the route was switched and could not be written down");
        }
        self.pools().iter().for_each(|pool| pool.adopt_prewarmed(leap.to, leap.by.standing()));
        self.lookups.close_idle();
        self.record(&from, &leap);
        tracing::info!(database = %self.name(), from, to = leap.to, epoch = %leap.epoch, by = ?leap.by, "switched");
    }

    pub(super) fn record(&self, from: &str, leap: &Leap<'_>) {
        let switched = Switched {
            at: SystemTime::now(),
            from: from.to_owned(),
            to: leap.to.to_owned(),
            epoch: leap.epoch,
            run: leap.run,
            by: leap.by,
            held: self.site.gate.held(),
            pause: None,
        };
        let mut switches = lock(&self.switches);
        if switches.len() == SWITCHES_KEPT {
            switches.pop_front();
        }
        switches.push_back(switched);
    }

    /// The switches since the start, the oldest first.
    #[must_use]
    pub fn switches(&self) -> Vec<Switched> {
        lock(&self.switches).iter().cloned().collect()
    }

    /// Session-pooled clients that have a server connection of their own.
    pub(super) fn kept_clients(&self) -> Vec<Arc<Client>> {
        let mut clients = self.clients();
        clients.retain(|client| client.who.pool_mode == PoolMode::Session && client.linked().is_some());
        clients
    }

    /// When the gate was shut, for rows that show it.
    #[must_use]
    pub fn paused_for(&self) -> Option<Duration> {
        self.site.gate.pause().map(|pause| Instant::now().saturating_duration_since(pause.since))
    }
}

/// A pool's share of the connections to prewarm.
fn wanted(open: u32, open_in_all: u32, asked: Option<u32>) -> usize {
    let share = match asked {
        None => open,
        Some(total) if open_in_all == 0 => total,
        Some(total) => {
            (u64::from(total) * u64::from(open)).div_ceil(u64::from(open_in_all)).try_into().unwrap_or(total)
        }
    };
    // A pool without connections gets one: the first client should not have to wait for a login.
    usize::try_from(share.max(1)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pool_gets_its_share_and_at_least_one() {
        assert_eq!(wanted(5, 20, Some(20)), 5);
        assert_eq!(wanted(0, 20, Some(20)), 1);
        assert_eq!(wanted(7, 20, None), 7);
        assert_eq!(wanted(0, 0, Some(4)), 4);
    }
}
