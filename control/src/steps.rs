//! The steps of a cutover, one file each: `run`, `undo`, `verify`.
//!
//! Invariant: effects of a cutover happen here and nowhere else. Every step is idempotent; until the decision each can be
//! undone, and none is before `decide(abort)` has answered abort (PROTOCOL R2). `verify` looks whether the world is still as
//! `run` left it; `checked` calls it for all that came before.

use std::time::Duration;

use pgcutover_api::epoch::{Claim, Lease, RunId};
use pgcutover_api::store::{Identity, Name, Turn};

use crate::bouncers::Keepers;
use crate::clusters::way_back::epoch_of as way_back_of;
use crate::clusters::{Cluster, ClusterError, Clusters, Feed, Subscription};
use crate::config::{Config, Replication};
use crate::event::{Event, Facts};
use crate::finding::Finding;
use crate::journal::Journal;
use crate::plan::Step;
use crate::proxies::{Fleet, Leases, ProxyError, ProxyErrors};

pub mod armed;
pub mod calm;
pub mod paused;
pub mod fenced;
pub mod caught_up;
pub mod transplanted;
pub mod durable;
pub mod way_back;
pub mod promoted;
pub mod checked;
pub mod decided;
pub mod switched;
pub mod resumed;
pub mod attached;
pub mod heartbeat;
pub mod curve;
pub mod evidence;
pub mod drift;
pub mod inspection;
pub mod rounds;
pub mod pinned;
pub mod compared;
pub mod reverse;
pub mod install;
pub mod uninstall;
pub mod kept;

/// Everything a step acts on.
pub struct Scene {
    /// What was asked for.
    pub config: Config,
    /// The run.
    pub run: RunId,
    /// The route, as the store takes it.
    pub database: Name,
    /// The two servers.
    pub clusters: Clusters,
    /// The source once more, for decisions only: they must not wait behind anything.
    pub decider: Cluster,
    /// Which servers they were when the run began.
    pub identities: Option<(Identity, Identity)>,
    /// The source's catalogue when it was armed, where DDL can't be refused and is only watched (R13).
    pub catalogue: Option<String>,
    /// The proxies.
    pub fleet: Fleet,
    /// What is remembered.
    pub journal: Journal,
    /// Run and epoch, once the epoch is open.
    pub claim: Option<Claim>,
    /// The source went away while it was asked to open the epoch, and did not come back.
    pub open_is_unknown: bool,
    /// Renewals, while clients are held.
    pub leases: Option<Leases>,
    /// Keepers of PgBouncers within this process, if nobody else keeps them.
    pub keepers: Option<Keepers>,
    /// Beats from `armed` on.
    pub heartbeat: Option<heartbeat::Heartbeat>,
    /// What is written down for the report.
    pub evidence: evidence::Evidence,
    /// The snapshots at which both sides are compared.
    pub pinning: pinned::Pinning,
    /// Proxies that could not be reached when a broken-off run was taken up.
    pub absent: Vec<ProxyError>,
}

impl Scene {
    /// Nobody is connected yet: what cannot be reached belongs into the report.
    pub fn new(config: Config, journal: Journal, run: RunId) -> Scene {
        let clusters = Clusters::unconnected(&config.source.endpoint, &config.target.endpoint);
        Scene {
            run,
            database: config.route.clone(),
            decider: clusters.source.another(),
            clusters,
            identities: None,
            catalogue: None,
            fleet: Fleet::none(),
            journal,
            claim: None,
            open_is_unknown: false,
            leases: None,
            keepers: None,
            heartbeat: None,
            evidence: evidence::Evidence::default(),
            pinning: pinned::Pinning::Never,
            absent: Vec::new(),
            config,
        }
    }

    /// Route, run and epoch, for the store.
    pub fn turn(&self) -> Result<Turn, StepError> {
        let claim = self.claim.ok_or_else(|| StepError::plain("no epoch is open"))?;
        Ok(Turn { db: self.database.clone(), claim })
    }

    /// Run and epoch.
    pub fn claim(&self) -> Result<Claim, StepError> {
        self.claim.ok_or_else(|| StepError::plain("no epoch is open"))
    }

    /// The lease of every pause.
    pub fn lease(&self) -> Result<Lease, StepError> {
        let lease = Lease::try_from(self.config.budgets.lease);
        lease.map_err(|error| StepError::plain(format!("budgets.lease: {error}")))
    }

    /// What brings the changes.
    pub async fn feed(&self) -> Result<Feed, StepError> {
        match &self.config.replication {
            Replication::Logical { subscriptions } => self.subscriptions(subscriptions).await.map(Feed::Subscriptions),
            Replication::Physical => Ok(Feed::Wal),
        }
    }

    /// The subscriptions that must have caught up; none is an error.
    async fn subscriptions(&self, named: &[String]) -> Result<Vec<Subscription>, StepError> {
        let found = self.clusters.target.subscriptions(&self.database, named, STEP_DEADLINE).await?;
        let ours = found.iter().any(|subscription| way_back_of(&self.database, &subscription.name).is_some());
        let lacks = |name: &String| !found.iter().any(|subscription| subscription.name == *name);
        if found.is_empty() || !ours && named.iter().any(lacks) {
            let fix = "CREATE SUBSCRIPTION on the target, or correct replication.subscriptions";
            let object = if named.is_empty() { "subscriptions".to_owned() } else { named.join(", ") };
            let finding = Finding::red("replication", object, "the target has no such subscription", fix);
            return Err(StepError::found("the target subscribes to nothing", vec![finding]));
        }
        Ok(found)
    }

    /// Writes down something seen; a full disk does not stop a step for that.
    pub fn observe(&mut self, what: &str, facts: Facts) {
        let _ = self.journal.note(Event::Observed { what: what.to_owned(), facts });
    }

    /// Writes down something for a person.
    pub fn find(&mut self, finding: Finding) {
        let _ = self.journal.note(Event::Found { finding });
    }
}

/// Why a step did not do what it should, with what a person can do about it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// What happened.
    pub message: String,
    /// What to fix; may be empty where the message says it all.
    pub findings: Vec<Finding>,
}

impl StepError {
    /// Without a fix of its own.
    pub fn plain(message: impl Into<String>) -> StepError {
        StepError { message: message.into(), findings: Vec::new() }
    }

    /// Because of these.
    pub fn found(message: impl Into<String>, findings: Vec<Finding>) -> StepError {
        StepError { message: message.into(), findings }
    }
}

impl From<ClusterError> for StepError {
    fn from(error: ClusterError) -> StepError {
        let fix = match &error {
            ClusterError::Unreachable { role, .. }
            | ClusterError::Lost { role, .. }
            | ClusterError::Deadline { role, .. } => {
                format!("see that the server of [{role}] runs and answers, then run again")
            }
            ClusterError::Refused { role, sqlstate, .. } if sqlstate.starts_with("42") => {
                format!("give proxyctl's role on the {role} what it lacks: 'proxyctl objects sql' lists the rights")
            }
            ClusterError::Refused { role, .. } | ClusterError::Answer { role, .. } => {
                format!("see the message and the log of the {role}")
            }
        };
        let role = match &error {
            ClusterError::Unreachable { role, .. }
            | ClusterError::Lost { role, .. }
            | ClusterError::Deadline { role, .. }
            | ClusterError::Refused { role, .. }
            | ClusterError::Answer { role, .. } => role,
        };
        let finding = Finding::red("server", role.to_string(), error.to_string(), fix);
        StepError::found(error.to_string(), vec![finding])
    }
}

impl From<crate::journal::JournalError> for StepError {
    fn from(error: crate::journal::JournalError) -> StepError {
        StepError::plain(error.to_string())
    }
}

impl From<ProxyErrors> for StepError {
    fn from(errors: ProxyErrors) -> StepError {
        let found = errors.0.iter().map(|error| {
            let fix = if error.answered() {
                "see the proxy's own words; SHOW GATES and SHOW BACKENDS on its console say more"
            } else {
                "start the proxy, or take it out of [[proxies]] if it no longer serves the database"
            };
            Finding::red("proxies", &error.proxy, &error.message, fix)
        });
        StepError::found(errors.to_string(), found.collect())
    }
}

/// A query on a server in the same region takes a few milliseconds; a step without a budget of its own gets this much.
pub const STEP_DEADLINE: Duration = Duration::from_secs(3);

/// How long a step may take at most.
pub fn limit(step: Step, config: &Config) -> Duration {
    let budgets = &config.budgets;
    match step {
        // No client waits; arming retries every busy table.
        Step::Armed => Duration::from_secs(120),
        Step::Calm => calm::PATIENCE + STEP_DEADLINE,
        Step::Paused => budgets.drain + STEP_DEADLINE,
        Step::Fenced => budgets.barrier + STEP_DEADLINE,
        Step::CaughtUp => budgets.catch_up + STEP_DEADLINE,
        // The first of many sequences may take a while to reach the disk.
        Step::Durable => budgets.catch_up + STEP_DEADLINE,
        Step::Transplanted | Step::WayBack | Step::Checked => STEP_DEADLINE,
        // It ends by itself, see there.
        Step::Decided => decided::PATIENCE * 2,
        Step::Switched | Step::Resumed => switched::PATIENCE * 2,
        // Nobody waits for it.
        Step::Attached => reverse::PATIENCE * 6,
    }
}

/// Does a step.
pub async fn run(step: Step, scene: &mut Scene) -> Result<Facts, StepError> {
    match step {
        Step::Armed => armed::run(scene).await,
        Step::Calm => calm::run(scene).await,
        Step::Paused => paused::run(scene).await,
        Step::Fenced => fenced::run(scene).await,
        Step::CaughtUp => caught_up::run(scene).await,
        Step::Transplanted => transplanted::run(scene).await,
        Step::Durable => durable::run(scene).await,
        Step::WayBack => way_back::run(scene).await,
        Step::Checked => checked::run(scene).await,
        Step::Decided => decided::run(scene).await,
        Step::Switched => switched::run(scene).await,
        Step::Resumed => resumed::run(scene).await,
        Step::Attached => attached::run(scene).await,
    }
}

/// What taking a step back came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Undo {
    /// It was taken back.
    Done,
    /// It left nothing that had to be.
    Nothing,
    /// Clients are safe from what it did, but somebody has to clear up.
    Cost(Box<Finding>),
}

/// Takes a step back. Only before the decision, and only once an abort is decided or no epoch was opened.
pub async fn undo(step: Step, scene: &Scene) -> Result<Undo, StepError> {
    match step {
        Step::Armed => armed::undo(scene).await,
        Step::Calm => calm::undo(scene).await,
        Step::Paused => paused::undo(scene).await,
        Step::Fenced => fenced::undo(scene).await,
        Step::CaughtUp => caught_up::undo(scene).await,
        Step::Transplanted => transplanted::undo(scene).await,
        Step::Durable => durable::undo(scene).await,
        Step::WayBack => way_back::undo(scene).await,
        Step::Checked => checked::undo(scene).await,
        Step::Decided => decided::undo(scene).await,
        Step::Switched => switched::undo(scene).await,
        Step::Resumed => resumed::undo(scene).await,
        Step::Attached => attached::undo(scene).await,
    }
}
