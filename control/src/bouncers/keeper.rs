//! Beside each PgBouncer: looks at the store, holds, points it elsewhere, lets it go; and decides when nobody else does.
//!
//! # Whose lease it holds
//! The hold's lease is renewed by what proxyctl writes into the store while it holds (see `Cluster::renew_lease`). When that
//! stops for as long as a lease lasts, or when the drain does not end in time, the keeper asks for `decide(abort)` like any
//! proxy (R8), and does what the store answers; whether PgBouncer itself is there or not.
//!
//! Invariant: it touches PgBouncer only as a [`Verdict`] says; while nobody answers, everything stays as it is.

use std::time::{Duration, Instant};

use pgcutover_api::epoch::{Claim, Epoch};
use pgcutover_api::store::{Decision, Member, Name, Outcome, StoreView, Turn};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::bouncers::grip::{Grip, Trouble, marks};
use crate::bouncers::point;
use crate::bouncers::verdict::{Verdict, verdict};
use crate::clusters::{Cluster, DecideError, Role};
use crate::config::Config;
use crate::config::members::{Address, BouncerEntry};

/// Between two looks at the store: as much later than the proxies the hold may begin.
const LOOK: Duration = Duration::from_millis(50);
/// While it holds: as much later than the decision clients go on.
const LOOK_HELD: Duration = Duration::from_millis(10);
/// After something that did not work.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two entries among the members, unless something changed.
const ENROL: Duration = Duration::from_secs(1);
/// While it holds: a run does not decide without it (see `steps::kept`).
const ENROL_HELD: Duration = Duration::from_millis(200);
/// One question to a server.
const ASK: Duration = Duration::from_secs(1);
/// Keepers that are asked to end get this long for what they hold and for what they eased.
const STOP: Duration = Duration::from_secs(5);

/// What keeps one PgBouncer.
pub struct Keeper {
    config: Config,
    database: Name,
    /// The two sides; which of them is active, PgBouncer says.
    sides: [Side; 2],
    last_active: usize,
    grip: Grip,
    enrolled: Option<(Instant, Member)>,
    /// What was last complained of: once is enough.
    told: String,
}

struct Side {
    backend: String,
    cluster: Cluster,
    address: Address,
}

impl Keeper {
    /// For one PgBouncer. Nothing is connected yet.
    pub fn new(config: &Config, entry: &BouncerEntry) -> Keeper {
        let side = |role, side: &crate::config::Side, address: &Address| Side {
            backend: side.backend.clone(),
            cluster: Cluster::new(role, &side.endpoint),
            address: address.clone(),
        };
        Keeper {
            database: config.route.clone(),
            sides: [
                side(Role::Source, &config.source, &entry.source),
                side(Role::Target, &config.target, &entry.target),
            ],
            last_active: 0,
            grip: Grip::new(config, entry),
            config: config.clone(),
            enrolled: None,
            told: String::new(),
        }
    }

    /// Whether PgBouncer can be kept: it points at one of the sides, and its template gives the file that it has. One that is
    /// away may come; one whose clients a dead keeper has left held is kept in any case.
    ///
    /// # Errors
    /// Why not, for people.
    pub async fn check(&mut self) -> Result<(), String> {
        if self.grip.was_left_held() {
            return Ok(());
        }
        match self.active().await {
            Ok(_) => {}
            Err(trouble) if trouble.is_away() => {}
            Err(trouble) => return Err(trouble.to_string()),
        }
        self.can_be_pointed()
    }

    fn can_be_pointed(&self) -> Result<(), String> {
        let [one, other] = &self.sides;
        point::check(&self.grip.entry.point, [(&one.backend, &one.address), (&other.backend, &other.address)])
    }

    /// Keeps it until `stop` becomes true, and then until what it holds is let go and set back.
    ///
    /// # Errors
    /// Another process keeps it with the same directory, or the directory can't be used.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<(), String> {
        let _post = self.grip.take_post(&self.config)?;
        loop {
            let looked = self.look().await;
            // What can't be set back now is, by the note, when it is kept again.
            let is_off = self.grip.is_off() || looked.is_err() && self.grip.hold().is_none();
            if *stop.borrow() && is_off {
                return Ok(());
            }
            let rest = looked.unwrap_or_else(|trouble| {
                self.complain(&trouble.to_string());
                AGAIN
            });
            tokio::select! {
                // reason: the store tells nobody when it changes; whoever stops the keeper ends this.
                () = tokio::time::sleep(rest) => {}
                _ = stop.changed() => {}
            }
        }
    }

    fn complain(&mut self, words: &str) {
        if self.told != words {
            tracing::warn!(pgbouncer = %self.grip.entry.name, "{words}");
            self.told = words.to_owned();
        }
    }

    /// One look at PgBouncer and at the store of the side that it points at, and what follows.
    async fn look(&mut self) -> Result<Duration, Trouble> {
        let active = match self.active().await {
            Ok(active) => active,
            Err(trouble) => return self.out_of_sight(trouble).await,
        };
        self.last_active = active;
        let (here, there) = (&self.sides[active], &self.sides[1 - active]);
        let claim = self.grip.hold().map(|hold| hold.claim);
        let view = match here.cluster.view(&self.database, ASK).await {
            Ok(view) => view,
            Err(error) => {
                let commit = self.evidence(active).await.ok_or(error)?;
                return self.follow(active, &commit).await;
            }
        };
        match verdict(&here.backend, &there.backend, claim, &view) {
            Verdict::Stay => {}
            Verdict::Hold(open) => self.hold(active, Claim { run: open.run, epoch: open.epoch }).await?,
            // From here on it is, or will be, a member of the other side.
            Verdict::Follow(commit) => return self.follow(active, &commit).await,
            Verdict::LetGo => self.grip.let_go().await?,
        }
        let tended = self.tend(active).await;
        self.enrol(active, &view).await?;
        tended?;
        self.told.clear();
        Ok(if self.grip.hold().is_some() { LOOK_HELD } else { LOOK })
    }

    /// PgBouncer is away, or points at neither side: nobody must take it for paused a moment longer, and a lease ends all the
    /// same.
    async fn out_of_sight(&mut self, trouble: Trouble) -> Result<Duration, Trouble> {
        self.grip.lost();
        let _ = self.enrol(self.last_active, &StoreView::default()).await;
        self.settle(self.last_active).await?;
        Err(trouble)
    }

    /// The side that PgBouncer points at.
    async fn active(&mut self) -> Result<usize, Trouble> {
        let address = self.grip.pointed().await?;
        let found = self.sides.iter().position(|side| side.address == address);
        found.ok_or_else(|| {
            let name = &self.grip.entry.database;
            Trouble::Other(format!("'{name}' points at {address}, which is neither side of the configuration"))
        })
    }

    /// The store is silent, or of another server than it was: evidence on the other side says that clients belong there (R8,
    /// R14), of the epoch they are held for or of a newer one.
    async fn evidence(&self, active: usize) -> Option<Decision> {
        let there = &self.sides[1 - active];
        let commit = there.cluster.view(&self.database, ASK).await.ok()?.last_commit?;
        let is_ours = self.grip.hold().is_none_or(|hold| {
            let claim = hold.claim;
            commit.epoch > claim.epoch || (commit.epoch, commit.run) == (claim.epoch, claim.run)
        });
        (commit.target == there.backend && is_ours).then_some(commit)
    }

    async fn hold(&mut self, active: usize, claim: Claim) -> Result<(), Trouble> {
        let source = self.sides[active].cluster.identity(ASK).await.ok();
        self.grip.take(claim, source.as_ref()).await
    }

    /// Looks after a hold, or after what is left of one.
    async fn tend(&mut self, active: usize) -> Result<(), Trouble> {
        if self.grip.hold().is_none() {
            return self.grip.restore().await;
        }
        let pressed = self.grip.press().await;
        // A PAUSE that can't be had is a reason more to end it in time.
        self.settle(active).await?;
        pressed
    }

    /// Ends a hold whose drain or lease has ended (R8).
    async fn settle(&mut self, active: usize) -> Result<(), Trouble> {
        let Some(claim) = self.grip.hold().map(|hold| hold.claim) else { return Ok(()) };
        let now = Instant::now();
        let age = self.sides[active].cluster.lease_age(&self.database, claim, ASK).await?;
        if let Some(age) = age {
            self.grip.renewed(age, now);
        }
        let (drained, Some(hold)) = (self.grip.is_drained(), self.grip.hold()) else { return Ok(()) };
        let why = match (now >= hold.lease_ends, !drained && now >= hold.drain_ends) {
            (_, true) => "the drain did not end in time",
            (true, false) => "the lease has ended",
            (false, false) => return Ok(()),
        };
        self.give_up(active, claim, why).await
    }

    /// The store is asked; the next look does what it says.
    async fn give_up(&mut self, active: usize, claim: Claim, why: &str) -> Result<(), Trouble> {
        let before = self.grip.hold().and_then(|hold| hold.source);
        let now = marks(&self.sides[active].cluster.identity(ASK).await?);
        if before.is_some_and(|before| before != now) {
            if let Some(commit) = self.evidence(active).await {
                return self.follow(active, &commit).await.map(drop);
            }
            let problem = "the server is not the one that was paused: it is not asked to decide (R14)";
            return Err(Trouble::Other(problem.to_owned()));
        }
        let (name, blockers) = (self.grip.entry.name.clone(), self.grip.blockers().await);
        tracing::warn!(pgbouncer = %name, %claim, ?blockers, "{why}: deciding");
        let turn = Turn { db: self.database.clone(), claim };
        match self.sides[active].cluster.decide(&turn, Outcome::Abort, ASK).await {
            Ok(outcome) => {
                tracing::warn!(pgbouncer = %name, %claim, %outcome, "decided");
                Ok(())
            }
            Err(DecideError::Refused(error) | DecideError::Unknown(error)) => Err(error.into()),
        }
    }

    /// Goes where a commit says: evidence first, then the file, then RELOAD, then a look, then RESUME.
    async fn follow(&mut self, active: usize, commit: &Decision) -> Result<Duration, Trouble> {
        let claim = Claim { run: commit.run, epoch: commit.epoch };
        let held = match self.grip.hold() {
            Some(_) => self.grip.press().await,
            None => self.hold(active, claim).await,
        };
        // Past the drain's end whoever still has a transaction there only reads: that side takes no writes any more.
        let drained = self.grip.is_drained();
        if !drained && self.grip.hold().is_some_and(|hold| Instant::now() < hold.drain_ends) {
            return held.map(|()| LOOK_HELD);
        }
        let there = &self.sides[1 - active];
        let turn = Turn { db: self.database.clone(), claim };
        let target = Name::new(&there.backend).map_err(|error| Trouble::Other(error.to_string()))?;
        there.cluster.witness(&turn, &target, ASK).await?;
        let wanted = &there.address;
        point::point(&self.grip.entry.point, &there.backend, wanted).await.map_err(Trouble::Other)?;
        self.grip.reload().await?;
        let pointed = self.grip.pointed().await?;
        if pointed != *wanted {
            let name = &self.grip.entry.database;
            return Err(Trouble::Other(format!("after RELOAD '{name}' points at {pointed}, not at {wanted}: holding")));
        }
        tracing::info!(pgbouncer = %self.grip.entry.name, %claim, to = %wanted, "switched");
        // RELOAD took the file's word for what was eased.
        self.grip.ease().await?;
        if !drained {
            self.grip.close_fast().await?;
        }
        self.grip.let_go().await?;
        Ok(LOOK_HELD)
    }

    /// Among the members of the side that it serves: paused only once it is drained. One that could not be pointed elsewhere
    /// is not offered as one that follows.
    async fn enrol(&mut self, active: usize, view: &StoreView) -> Result<(), Trouble> {
        let here = &self.sides[active];
        let drained = self.grip.hold().filter(|_| self.grip.is_drained());
        let commit = view.last_commit.as_ref().filter(|commit| commit.target == here.backend);
        let member = Member {
            instance: self.grip.entry.name.clone(),
            address: format!("PgBouncer at {}", self.grip.entry.endpoint.describe()),
            backend: here.backend.clone(),
            route_epoch: commit.map_or(Epoch::ZERO, |commit| commit.epoch),
            paused_epoch: drained.map(|hold| hold.claim.epoch),
            seen_ms_ago: 0,
        };
        let (now, every) = (Instant::now(), if drained.is_some() { ENROL_HELD } else { ENROL });
        if self.enrolled.as_ref().is_some_and(|(at, last)| *last == member && now.duration_since(*at) < every) {
            return Ok(());
        }
        if self.grip.hold().is_none() {
            self.can_be_pointed().map_err(Trouble::Other)?;
        }
        here.cluster.enroll(&self.database, &member, ASK).await?;
        self.enrolled = Some((now, member));
        Ok(())
    }
}

/// Keepers that live within this process, for as long as it lives: what they hold nobody ends if it dies.
pub struct Keepers {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Keepers {
    /// One for each of these PgBouncers, which nobody else may keep.
    pub fn start(config: &Config, entries: &[&BouncerEntry]) -> Keepers {
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for entry in entries {
            let (name, kept) = (entry.name.clone(), Keeper::new(config, entry).run(stopped.clone()));
            tasks.spawn(async move {
                if let Err(problem) = kept.await {
                    tracing::error!(pgbouncer = %name, "it can't be kept: {problem}");
                }
            });
        }
        Keepers { stop, tasks }
    }

    /// Ends them once they hold nobody, or after a while.
    pub async fn end(mut self) {
        self.stop.send_replace(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(STOP, all).await;
    }
}
