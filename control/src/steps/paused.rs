//! S2: the epoch is opened in the store, every proxy is paused at it with a lease, open transactions end.
//!
//! Invariant: the fleet is the one that was armed: names and members are looked up once more. The epoch is in the store and
//! in the journal before the first PAUSE is sent (PROTOCOL R4).

use std::time::Duration;

use pgcutover_api::command::{Command, EpochPause, Mode, PauseWith, ResumeWith, Warrant};
use pgcutover_api::epoch::{Claim, Epoch};
use pgcutover_api::rows::{BlockerRow, GateState};
use pgcutover_api::store::{Name, SQLSTATE_UNDECIDED};

use crate::clusters::ClusterError;
use crate::config::Replication;
use crate::event::{Event, Facts};
use crate::finding::Finding;
use crate::proxies::{ProxyErrors, SHOW_DEADLINE};
use crate::report;
use crate::report::timeline::{HELD, Moment};
use crate::roster;
use crate::roster::Change;
use crate::steps::calm::Old;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo, calm, decided, evidence, kept};

/// How long members that are not ours to command may take to hold by themselves: their look, and what it takes.
const MEMBERS_PATIENCE: Duration = Duration::from_millis(1500);

/// How long after its drain deadline a proxy may take to say so.
const ANSWER: Duration = Duration::from_secs(1);
/// Between two looks at members that hold by themselves.
const LOOK: Duration = Duration::from_millis(20);
/// Between two questions to a source that is away.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Opens the epoch and pauses.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    evidence::before(scene).await;
    unchanged(scene).await?;
    let claim = open(scene).await?;
    let guarded = match scene.config.replication {
        Replication::Logical { .. } => scene.clusters.target.guard(&scene.turn()?, STEP_DEADLINE).await?,
        // A standby takes no client's writes; its copy of this epoch must never be decided.
        Replication::Physical => {
            scene.clusters.source.bind(&scene.turn()?, STEP_DEADLINE).await?;
            false
        }
    };
    let lease = scene.lease()?;
    let database = scene.config.database.clone();
    let mut leases = scene.fleet.keep(&database, claim, lease, scene.config.budgets.renew);
    kept::renew(scene, claim, &mut leases).await?;
    scene.observe(report::PAUSE_SENT, Facts::new().with("epoch", claim.epoch.as_u64()));
    let paused = pause_all(scene, claim).await;
    evidence::tell(scene, Moment::Paused);
    leases.confirm();
    scene.leases = Some(leases);
    paused?;
    // Whoever nobody listed holds by itself; its clients would meet the fence otherwise.
    members(scene, claim).await?;
    let gates = scene.fleet.all(|proxy| proxy.gate(&database)).await?;
    let held: u32 = gates.iter().map(|(_, gate)| gate.held_clients).sum();
    let by_proxy = gates.iter().fold(Facts::new(), |facts, (proxy, gate)| facts.with(proxy, gate.held_clients));
    scene.observe(HELD, by_proxy);
    Ok(Facts::new().with("epoch", claim.epoch.as_u64()).with("held_clients", held).with("target_guarded", guarded))
}

/// A proxy that came after the others were armed has opened no connections to the target; one that left is not there to be
/// paused. Nobody is held yet: begin again.
async fn unchanged(scene: &Scene) -> Result<(), StepError> {
    let changes = roster::changes(&scene.config, &scene.clusters.source, &scene.fleet).await;
    if changes.is_empty() {
        return Ok(());
    }
    let found = changes.iter().map(changed).map(|(object, problem)| {
        let fix = "run it again: the fleet changed while it was prepared, and nothing has happened";
        Finding::red("paused", object, problem, fix)
    });
    Err(StepError::found("the fleet is not the one that was prepared", found.collect()))
}

/// What is said of a change.
pub fn changed(change: &Change) -> (String, String) {
    match change {
        Change::Came(proxy) => (proxy.clone(), "came after the run began".to_owned()),
        Change::Left(proxy) => (proxy.clone(), "was there when the run began and is no longer found".to_owned()),
        Change::Unknown(words) => ("proxies".to_owned(), format!("can't be looked up again: {words}")),
    }
}

async fn open(scene: &mut Scene) -> Result<Claim, StepError> {
    let floor = scene.fleet.epoch_max(&scene.config.database).await?.max(known_on_target(scene).await?);
    let target = name(&scene.config.target.backend)?;
    let epoch = match scene.clusters.source.open(&scene.database, scene.run, &target, floor).await {
        Ok(epoch) => epoch,
        Err(error) if error.is_absence() => opened_after_all(scene, error).await?,
        Err(error) => return Err(refused(scene, error)),
    };
    let claim = Claim { run: scene.run, epoch };
    scene.claim = Some(claim);
    scene.journal.append([Event::Opened { epoch }])?;
    Ok(claim)
}

/// The greatest epoch that the target's store knows: an epoch that is new to the source only would be no new one (R4).
async fn known_on_target(scene: &Scene) -> Result<Epoch, StepError> {
    let view = scene.clusters.target.view(&scene.database, STEP_DEADLINE).await?;
    let open = view.open.map(|open| open.epoch);
    let last = view.last.map(|last| last.epoch);
    Ok(open.max(last).unwrap_or(Epoch::ZERO))
}

/// The source went away under the question: nothing else may happen before it has said whether it opened the epoch.
async fn opened_after_all(scene: &mut Scene, error: ClusterError) -> Result<Epoch, StepError> {
    let until = tokio::time::Instant::now() + decided::PATIENCE;
    loop {
        match scene.clusters.source.view(&scene.database, STEP_DEADLINE).await {
            Ok(view) => match view.open {
                Some(open) if open.run == scene.run => return Ok(open.epoch),
                Some(_) | None => return Err(error.into()),
            },
            // reason: a source that is away is asked again, within PATIENCE.
            Err(_) if tokio::time::Instant::now() < until => tokio::time::sleep(ASK_AGAIN).await,
            Err(_) => {
                scene.open_is_unknown = true;
                return Err(error.into());
            }
        }
    }
}

/// What to do about an epoch that is open already.
pub const OPEN_FIX: &str = "if the proxyctl of that run lives, wait for it; if it died, 'proxyctl resume-run' where its \
     journal is, or 'proxyctl abort' anywhere; its leases end it in seconds too";

fn refused(scene: &Scene, error: ClusterError) -> StepError {
    if error.sqlstate() != Some(SQLSTATE_UNDECIDED) {
        return error.into();
    }
    let finding = Finding::red("paused", &scene.config.database, error.to_string(), OPEN_FIX);
    StepError::found(error.to_string(), vec![finding])
}

/// A backend's or database's name as the store takes it.
pub fn name(text: &str) -> Result<Name, StepError> {
    Name::new(text).map_err(|error| StepError::plain(error.to_string()))
}

/// Sends every PAUSE at once. Shortly before the drain deadline it asks who holds the drain open: afterwards nobody does.
async fn pause_all(scene: &Scene, claim: Claim) -> Result<(), StepError> {
    let drain = scene.config.budgets.drain;
    let command = command(scene, claim)?;
    let ask_at = drain.mul_f32(0.75);
    let pauses = async {
        let proxies = scene.fleet.all_or_first(|proxy| {
            evidence::answered(scene, Moment::Paused, proxy.name(), proxy.order(&command, drain + ANSWER))
        });
        let proxies = async { proxies.await.map_err(Missed::Proxies) };
        let bouncers = async { kept::held(scene, claim).await.map_err(Missed::Bouncer) };
        tokio::try_join!(proxies, bouncers)
    };
    let blockers = async {
        // reason: shortly before the drain deadline, while blockers are still there.
        tokio::time::sleep(ask_at).await;
        blockers(scene).await
    };
    tokio::pin!(pauses);
    let blocked = tokio::select! {
        biased;
        done = &mut pauses => return done.map(drop).map_err(|missed| missed.told(Vec::new())),
        blocked = blockers => blocked,
    };
    pauses.await.map(drop).map_err(|missed| missed.told(blocked))
}

/// Who was not paused.
enum Missed {
    Proxies(ProxyErrors),
    Bouncer(StepError),
}

impl Missed {
    /// With those who held the drain open.
    fn told(self, mut blocked: Vec<Finding>) -> StepError {
        let mut error = match self {
            Missed::Proxies(errors) => StepError::from(errors),
            Missed::Bouncer(error) => error,
        };
        blocked.append(&mut error.findings);
        StepError { findings: blocked, ..error }
    }
}

/// Who holds the drain open, as proxies and source tell it.
async fn blockers(scene: &Scene) -> Vec<Finding> {
    let of_proxies = scene.fleet.each(|proxy| proxy.blockers(&scene.config.database));
    let (of_proxies, on_source) = tokio::join!(of_proxies, calm::open_transactions(scene));
    let on_source = on_source.unwrap_or_default();
    let rows = of_proxies
        .into_iter()
        .flat_map(|(proxy, rows)| rows.unwrap_or_default().into_iter().map(move |row| (proxy, row)));
    rows.map(|(proxy, row)| blocker(proxy, &row, &on_source)).collect()
}

fn blocker(proxy: &str, row: &BlockerRow, on_source: &[Old]) -> Finding {
    let who = format!("{}: {} from {}:{} ({})", proxy, row.user, row.addr, row.port, row.application_name);
    let pid = row.server_pid.map_or("no server process".to_owned(), |pid| format!("server pid {pid}"));
    // Our login on the source may see what the proxies' may not.
    let seen = on_source.iter().find(|old| Some(old.pid) == row.server_pid);
    let problem = format!(
        "{pid} holds the drain open ({}): transaction {} ms old, state {}, last statement: {}",
        row.reason,
        row.transaction_ms.as_millis(),
        row.state,
        seen.map_or(row.query.as_str(), |old| old.query.as_str())
    );
    let fix =
        "end or shorten this transaction, raise budgets.drain, or set policy.on_timeout to 'cancel' or 'terminate'";
    Finding::red("paused", who, problem, fix)
}

fn command(scene: &Scene, claim: Claim) -> Result<Command, StepError> {
    let config = &scene.config;
    Ok(Command::PauseWith(PauseWith {
        database: config.database.clone(),
        epoch: Some(EpochPause { claim, source: config.source.backend.clone(), target: config.target.backend.clone() }),
        drain: Some(config.budgets.drain),
        on_timeout: config.policy.on_timeout,
        lease: Some(scene.lease()?),
        mode: Mode::All,
    }))
}

/// Lets clients go on the source. The abort is decided; each proxy reads that itself before it resumes.
pub async fn undo(scene: &Scene) -> Result<Undo, StepError> {
    let Some(claim) = scene.claim else { return Ok(Undo::Nothing) };
    let database = scene.config.database.clone();
    let resume = Command::ResumeWith(ResumeWith { database, warrant: Warrant::Claim(claim) });
    let mut missed = Vec::new();
    let answers = scene.fleet.each(|proxy| {
        evidence::answered(scene, Moment::Resumed, proxy.name(), proxy.order_aside(&resume, SHOW_DEADLINE))
    });
    for (_, answer) in answers.await {
        if let Err(error) = answer {
            missed.push(error);
        }
    }
    let bouncers = kept::still_held(&scene.config, &scene.clusters.source, claim);
    let (mut still_held, bouncers) = tokio::join!(held(scene, missed), bouncers);
    still_held.extend(scene.absent.iter().cloned());
    if still_held.is_empty() && bouncers.is_empty() {
        return Ok(Undo::Done);
    }
    let mut error = match still_held.is_empty() {
        true => StepError::plain("not every PgBouncer has let its clients go"),
        false => StepError::from(ProxyErrors(still_held)),
    };
    error.findings.extend(bouncers);
    Err(error)
}

/// A proxy that refused because it is open already has done what was wanted: its lease ended, or it never paused. One that
/// somebody else has paused since is not ours to resume.
async fn held(scene: &Scene, missed: Vec<crate::proxies::ProxyError>) -> Vec<crate::proxies::ProxyError> {
    let mut still = Vec::new();
    for error in missed {
        let proxy = scene.fleet.iter().find(|proxy| proxy.name() == error.proxy);
        let gate = match proxy {
            Some(proxy) => proxy.gate(&scene.config.database).await.ok(),
            None => None,
        };
        if !gate.is_some_and(|gate| gate.state == GateState::Open || gate.run != Some(scene.run)) {
            still.push(error);
        }
    }
    still
}

/// Every proxy is paused and drained at this epoch, and so is every living proxy that the source knows of.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    let claim = scene.claim()?;
    let gates = scene.fleet.all(|proxy| proxy.gate(&scene.config.database)).await?;
    for (name, gate) in &gates {
        let ours = gate.run == Some(claim.run) && gate.epoch == Some(claim.epoch);
        if !ours || gate.state != GateState::Paused || !bool::from(gate.drained) {
            let fix = "see SHOW GATES there: somebody resumed it, or its lease ended";
            let finding = Finding::red("paused", *name, format!("is {} and not paused at {claim}", gate.state), fix);
            return Err(StepError::found(format!("proxy {name} is not paused at {claim}"), vec![finding]));
        }
    }
    members(scene, claim).await
}

async fn members(scene: &Scene, claim: Claim) -> Result<(), StepError> {
    let patience = tokio::time::Instant::now() + MEMBERS_PATIENCE;
    loop {
        let members = scene.clusters.source.members(&scene.database, STEP_DEADLINE).await?;
        let alive = members.iter().filter(|member| roster::is_alive(member));
        let alive = alive.filter(|member| !kept::stands_for(&scene.config, member));
        let loose: Vec<_> = alive.filter(|member| member.paused_epoch != Some(claim.epoch)).collect();
        let mut unkept = kept::loose(&scene.config, &members, claim);
        if loose.is_empty() && unkept.is_empty() {
            return Ok(());
        }
        if tokio::time::Instant::now() >= patience {
            let fix = "name this proxy in [[proxies]], or stop it; one that died counts as alive for three seconds, and proxies that \
                       nobody listed hold by themselves within a second";
            let found = loose.iter().map(|member| {
                let object = format!("{} ({})", member.instance, member.address);
                let ms = member.seen_ms_ago;
                let problem = format!("serves the database and is not paused at {claim}; last seen {ms} ms ago");
                Finding::red("paused", object, problem, fix)
            });
            unkept.extend(found);
            return Err(StepError::found("a living proxy is not paused", unkept));
        }
        // reason: members hold by themselves at their own look; asked again within the patience.
        tokio::time::sleep(LOOK).await;
    }
}
