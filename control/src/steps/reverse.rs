//! The way back between two servers, whatever run left it: who serves, what leads to it, and who has to follow it.
//!
//! Invariant: everything is read off the servers, nothing off a journal, and doing it again changes nothing: so any run or
//! command finishes what a dead one left. Nothing follows the server that serves before what led there is switched off
//! (else changes would go in a circle), and only the server that the last commit fenced follows it.

use std::time::Duration;

use pgcutover_api::epoch::Claim;
use pgcutover_api::store::{GateForm, Name};

use crate::clusters::{Cluster, ClusterError, Clusters, Offer, Role, Subscription, way_back};
use crate::config::{Config, Side};
use crate::finding::Finding;
use crate::steps::{STEP_DEADLINE, StepError};

/// How long an apply worker may take to end, or to begin: launchers start one every five seconds at most.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Connecting to another server, from a server.
const CONNECT: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// The command that does again what is done here.
pub const COMMAND: &str = "proxyctl way-back attach";

/// What the newest commit says: which of the two servers has the database, by which epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// The one that serves, as the configuration calls it.
    pub by: Role,
    /// By which run and epoch.
    pub claim: Claim,
}

/// The two servers of a route by what they are now.
#[derive(Clone, Copy)]
pub struct Way<'a> {
    /// The route.
    pub db: &'a Name,
    /// By which run and epoch the one serves.
    pub claim: Claim,
    /// The server that serves.
    pub serving: (&'a Cluster, &'a Side),
    /// The one that served before.
    pub other: (&'a Cluster, &'a Side),
}

/// How a way back stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// The other server follows.
    Follows {
        /// The subscription there, and the slot here.
        name: String,
        /// What was dropped because it led here.
        dropped: Vec<String>,
    },
    /// The last run made no slot: there is none.
    None,
    /// There is a slot, but the other server is not the one that the last commit fenced: it was made anew.
    Stranger(Offer),
}

/// Who has the database; none where nothing was ever committed.
pub async fn served(config: &Config, clusters: &Clusters) -> Result<Option<Served>, ClusterError> {
    let mut newest: Option<Served> = None;
    for cluster in [&clusters.source, &clusters.target] {
        if !cluster.installed(STEP_DEADLINE).await? {
            continue;
        }
        let Some(commit) = cluster.view(&config.route, STEP_DEADLINE).await?.last_commit else { continue };
        let sides = [(&config.source, Role::Source), (&config.target, Role::Target)];
        let Some((_, by)) = sides.into_iter().find(|(side, _)| side.backend == commit.target.as_str()) else {
            continue;
        };
        let claim = Claim { run: commit.run, epoch: commit.epoch };
        if newest.is_none_or(|newest| newest.claim.epoch < claim.epoch) {
            newest = Some(Served { by, claim });
        }
    }
    Ok(newest)
}

impl<'a> Way<'a> {
    /// The way back of what is served.
    pub fn of(config: &'a Config, clusters: &'a Clusters, served: Served) -> Way<'a> {
        let (source, target) = ((&clusters.source, &config.source), (&clusters.target, &config.target));
        let (serving, other) = if served.by == Role::Source { (source, target) } else { (target, source) };
        Way { db: &config.route, claim: served.claim, serving, other }
    }

    /// Its name on both servers.
    pub fn name(&self) -> String {
        way_back::of_epoch(self.db, self.claim.epoch)
    }

    /// The slot from which the other server can follow, if the last run made one.
    pub async fn offer(&self) -> Result<Option<Offer>, ClusterError> {
        let offers = self.serving.0.offers(self.db, STEP_DEADLINE).await?;
        Ok(offers.into_iter().find(|offer| offer.epoch == self.claim.epoch))
    }

    /// Drops what led here, and lets the other server follow.
    pub async fn attach(&self) -> Result<Attached, StepError> {
        let Some(offer) = self.offer().await? else { return Ok(Attached::None) };
        if offer.wal_status.as_deref() == Some("lost") {
            let fix = "only a new copy leads back; raise max_slot_wal_keep_size for the next one";
            let problem = "the new source has thrown away WAL that the old one has not seen";
            return Err(StepError::found(problem, vec![Finding::red("way_back", offer.slot, problem, fix)]));
        }
        if !self.other_was_fenced().await? {
            return Ok(Attached::Stranger(offer));
        }
        let mut dropped = self.detach(Which::All).await?;
        let (other, name) = (self.other.0, self.name());
        let there = other.all_subscriptions(STEP_DEADLINE).await?;
        for old in there.iter().filter(|s| s.name != name && way_back::epoch_of(self.db, &s.name).is_some()) {
            drop_subscription(other, self.serving.0, old).await?;
            dropped.push(old.name.clone());
        }
        if !there.iter().any(|subscription| subscription.name == name) {
            other.subscribe(self.db, &name, &self.serving.1.conninfo(), CONNECT).await?;
        }
        self.until_read(&name).await?;
        Ok(Attached::Follows { name, dropped })
    }

    /// Whether the other server is the one that lost this epoch: its gate says so. A copy made since has no such gate; a
    /// rollback that was aborted has left the form of a target there.
    async fn other_was_fenced(&self) -> Result<bool, ClusterError> {
        if !self.other.0.installed(STEP_DEADLINE).await? {
            return Ok(false);
        }
        let gates = self.other.0.gates(STEP_DEADLINE).await?;
        let epoch = self.claim.epoch;
        Ok(gates.iter().any(|gate| {
            gate.db == self.db.as_str()
                && match gate.form {
                    Some(GateForm::Fenced) => gate.epoch == epoch,
                    Some(GateForm::Target) => gate.epoch > epoch,
                    Some(GateForm::Open) | None => false,
                }
        }))
    }

    /// Drops the subscriptions that led here, with their slots on the other server.
    pub async fn detach(&self, which: Which) -> Result<Vec<String>, StepError> {
        let (serving, other) = (self.serving.0, self.other.0);
        let forward = serving.all_subscriptions(STEP_DEADLINE).await?;
        let slots = other.slots(&forward, STEP_DEADLINE).await?;
        // A database may have subscriptions from elsewhere: what leads here has its slot there.
        let leads_here = |s: &Subscription| slots.iter().any(|slot| s.slot.as_deref() == Some(slot.name.as_str()));
        let ours = |s: &Subscription| way_back::epoch_of(self.db, &s.name).is_some();
        let mut dropped = Vec::new();
        for subscription in &forward {
            if ours(subscription) || which == Which::All && leads_here(subscription) {
                drop_subscription(serving, other, subscription).await?;
                dropped.push(subscription.name.clone());
            }
        }
        Ok(dropped)
    }

    /// Until somebody reads the slot and has said how far it is.
    async fn until_read(&self, name: &str) -> Result<(), StepError> {
        let own = Subscription {
            name: name.to_owned(),
            is_enabled: true,
            slot: Some(name.to_owned()),
            publications: Vec::new(),
        };
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            let slots = self.serving.0.slots(std::slice::from_ref(&own), STEP_DEADLINE).await?;
            let there = self.other.0.all_subscriptions(STEP_DEADLINE).await?;
            // One that somebody has switched off is told by preflight.
            let rests = there.iter().any(|subscription| subscription.name == name && !subscription.is_enabled);
            if rests || slots.iter().any(|slot| slot.is_active && slot.lag.applied_bytes.is_some()) {
                return Ok(());
            }
            if tokio::time::Instant::now() >= until {
                let problem = format!("{} has subscribed, but nobody reads the slot", self.other.1.backend);
                let fix = format!(
                    "see the log of {}: its apply worker fails or does not reach {}",
                    self.other.1.backend, self.serving.1.backend
                );
                return Err(StepError::found(&problem, vec![Finding::red("way_back", name, &problem, fix)]));
            }
            // reason: a worker that begins tells nobody; looked at again within PATIENCE.
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Says of an attempt that failed what it means and how to go on.
    pub fn not_attached(&self, error: &StepError) -> Finding {
        let problem = format!("the way back is not attached: {error}; {} keeps WAL for it", self.serving.1.backend);
        let causes: Vec<&str> = error.findings.iter().map(|finding| finding.fix.as_str()).collect();
        let fix = format!(
            "run '{COMMAND}' once this is mended ({}), or '{} drop' to do without",
            causes.join("; "),
            COMMAND.trim_end_matches(" attach")
        );
        Finding::red("attached", self.name(), problem, fix)
    }
}

/// Which of the subscriptions that led here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All of them.
    All,
    /// Those that we made.
    Ours,
}

/// Drops a subscription of `on` and its slot on `from`: rest, slot, subscription, so that a crash leaves what can be found again.
pub async fn drop_subscription(on: &Cluster, from: &Cluster, subscription: &Subscription) -> Result<(), StepError> {
    on.disable(&subscription.name, STEP_DEADLINE).await?;
    if let Some(slot) = &subscription.slot {
        let until = tokio::time::Instant::now() + PATIENCE;
        while let Err(error) = from.drop_slot(slot, STEP_DEADLINE).await {
            let is_read = error.sqlstate() == Some("55006");
            if !is_read || tokio::time::Instant::now() >= until {
                return Err(error.into());
            }
            // reason: a worker that ends tells nobody; tried again within PATIENCE.
            tokio::time::sleep(LOOK).await;
        }
    }
    on.unsubscribe(&subscription.name, STEP_DEADLINE).await?;
    Ok(())
}
