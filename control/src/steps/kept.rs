//! PgBouncers as a run sees them: through what their keepers enrol, and what their consoles show.
//!
//! Invariant: proxyctl commands none of them. It waits, within limits, for what the keepers do by the store; what is missing is
//! named with who stands in the way.

use std::time::Duration;

use pgcutover_api::epoch::Claim;
use pgcutover_api::store::{Member, Outcome};
use tokio::time::Instant;

use crate::bouncers::{Console, ConsoleError, Keepers};
use crate::clusters::Cluster;
use crate::config::Config;
use crate::config::members::{BouncerEntry, Unleased, Unlisted};
use crate::finding::Finding;
use crate::preflight::{BouncerFacts, Watched};
use crate::proxies::{Leases, ProxyError};
use crate::report::timeline::Moment;
use crate::roster;
use crate::steps::{STEP_DEADLINE, Scene, StepError, switched};

/// Between two looks at the members.
const LOOK: Duration = Duration::from_millis(10);
/// A keeper that holds was seen within this, or it may have died: one that enrols five times as often has missed four entries.
/// What the run decides without it, its clients wait for until it is started again.
const FRESH_MS: u64 = 1000;
/// How much later than the proxies a keeper may begin to drain, and a loaded machine may take to say so.
const LATER: Duration = Duration::from_millis(1500);

/// Keepers within this process, where the configuration accepts that nobody holds their lease; they have enrolled when this
/// returns.
pub async fn keep_unleased(scene: &mut Scene) -> Result<(), StepError> {
    if scene.config.bouncers.is_empty() || scene.config.policy.unleased == Unleased::Refuse {
        return Ok(());
    }
    let members = roster::members(&scene.clusters.source, &scene.config).await?;
    let orphans: Vec<&BouncerEntry> = missing(&scene.config, &members, |_| true).collect();
    scene.keepers = Some(Keepers::start(&scene.config, &orphans));
    let until = Instant::now() + STEP_DEADLINE;
    loop {
        let members = scene.clusters.source.members(&scene.database, STEP_DEADLINE).await?;
        let absent: Vec<Finding> = missing(&scene.config, &members, |_| true).map(unkept).collect();
        if absent.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(StepError::found("a PgBouncer can't be kept", absent));
        }
        // reason: keepers enrol by themselves; asked again within the deadline.
        tokio::time::sleep(LOOK).await;
    }
}

fn unkept(entry: &BouncerEntry) -> Finding {
    let fix = format!(
        "run 'proxyctl watch-pgbouncer {0}' beside it and see what it says; or see SHOW DATABASES there",
        entry.name
    );
    Finding::red(
        "pgbouncer",
        format!("PgBouncer {}", entry.name),
        "nobody keeps it: no living keeper has enrolled",
        fix,
    )
}

/// PgBouncers without a living keeper whose row is `right`.
fn missing<'a>(
    config: &'a Config,
    members: &'a [Member],
    right: impl Fn(&Member) -> bool + 'a,
) -> impl Iterator<Item = &'a BouncerEntry> + 'a {
    let is_right = move |entry: &&BouncerEntry| {
        !members.iter().any(|member| member.instance == entry.name && roster::is_alive(member) && right(member))
    };
    config.bouncers.iter().filter(is_right)
}

/// Whether a keeper says now that it holds for this epoch.
fn holds(member: &Member, claim: Claim) -> bool {
    member.paused_epoch == Some(claim.epoch) && member.seen_ms_ago < FRESH_MS
}

/// Tells those that nobody commands, keepers and proxies that no entry stands for, that this run lives, for as long as it renews
/// the leases of the others.
pub async fn renew(scene: &Scene, claim: Claim, leases: &mut Leases) -> Result<(), StepError> {
    if scene.config.bouncers.is_empty() && scene.config.policy.unlisted == Unlisted::Refuse {
        return Ok(());
    }
    let (cluster, database, every) =
        (scene.clusters.source.another(), scene.database.clone(), scene.config.budgets.renew);
    cluster.renew_lease(&database, claim, STEP_DEADLINE).await?;
    leases.also(async move {
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            // What is not renewed ends by itself: the keeper then asks for the abort, and the decision learns of that.
            let _ = cluster.renew_lease(&database, claim, every).await;
        }
    });
    Ok(())
}

/// Waits until every PgBouncer is held for this epoch. Who keeps one from it is asked shortly before the drain's end.
pub async fn held(scene: &Scene, claim: Claim) -> Result<(), StepError> {
    let drain = scene.config.budgets.drain;
    let (began, mut blockers) = (Instant::now(), Vec::new());
    while let Some(entry) = unheld(scene, claim).await? {
        let waited = began.elapsed();
        if blockers.is_empty() && waited > drain.mul_f32(0.75) {
            blockers = self::blockers(entry).await;
        }
        if waited > drain + LATER || is_aborted(scene, claim).await? {
            if blockers.is_empty() {
                let fix = "see what its keeper says, and SHOW SERVERS on its console";
                let object = format!("PgBouncer {}", entry.name);
                let problem = format!("was not held for {claim} within {waited:?}");
                blockers.push(Finding::red("paused", object, problem, fix));
            }
            return Err(StepError::found(format!("PgBouncer {} was not drained", entry.name), blockers));
        }
        // reason: keepers hold by themselves; asked again within the drain and LATER.
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

async fn unheld(scene: &Scene, claim: Claim) -> Result<Option<&BouncerEntry>, StepError> {
    if scene.config.bouncers.is_empty() {
        return Ok(None);
    }
    let members = scene.clusters.source.members(&scene.database, STEP_DEADLINE).await?;
    note(scene, Moment::Paused, &members, |member| holds(member, claim));
    let name = missing(&scene.config, &members, |member| holds(member, claim)).next();
    let name = name.map(|entry| entry.name.clone());
    Ok(scene.config.bouncers.iter().find(|entry| Some(&entry.name) == name.as_ref()))
}

/// Takes note of the PgBouncers that are there: as seen from here, so up to a look late.
fn note(scene: &Scene, moment: Moment, members: &[Member], is_there: impl Fn(&Member) -> bool) {
    for member in members.iter().filter(|member| stands_for(&scene.config, member) && is_there(member)) {
        scene.evidence.note(moment, &member.instance, scene.journal.now_us());
    }
}

/// A keeper whose drain took too long has decided.
async fn is_aborted(scene: &Scene, claim: Claim) -> Result<bool, StepError> {
    let view = scene.clusters.source.view(&scene.database, STEP_DEADLINE).await?;
    Ok(view.last.is_some_and(|last| last.epoch == claim.epoch && last.outcome == Outcome::Abort))
}

async fn blockers(entry: &BouncerEntry) -> Vec<Finding> {
    let found = async { Console::open(&entry.endpoint).await?.blockers().await }.await.unwrap_or_default();
    let found = found.into_iter().map(|blocker| {
        let problem = format!(
            "server pid {} serves this client, and PAUSE waits for it: a transaction is open, or it is pooled by session",
            blocker.server_pid
        );
        let fix = "end the transaction or the session, pool it by transaction, or raise budgets.drain";
        Finding::red("paused", format!("{}: {}", entry.name, blocker.client), problem, fix)
    });
    found.collect()
}

/// After an abort: PgBouncers of which no living keeper says in time that nobody is held there any more.
pub async fn still_held(config: &Config, source: &Cluster, claim: Claim) -> Vec<Finding> {
    let until = Instant::now() + LATER;
    loop {
        let members = source.members(&config.route, STEP_DEADLINE).await.unwrap_or_default();
        let gone = |member: &Member| member.paused_epoch != Some(claim.epoch);
        let held: Vec<Finding> = missing(config, &members, gone).map(kept_back).collect();
        if held.is_empty() || Instant::now() >= until {
            return held;
        }
        // reason: keepers let go by themselves; looked at again within LATER.
        tokio::time::sleep(LOOK).await;
    }
}

fn kept_back(entry: &BouncerEntry) -> Finding {
    let fix = format!("start its keeper ('proxyctl watch-pgbouncer {}'): it lets them go; or RESUME there", entry.name);
    let problem = "nobody says that its clients were let go: they wait if they were held";
    Finding::red("paused", format!("PgBouncer {}", entry.name), problem, fix)
}

/// Whether a member is the keeper of a PgBouncer that the configuration names.
pub fn stands_for(config: &Config, member: &Member) -> bool {
    config.bouncers.iter().any(|entry| entry.name == member.instance)
}

/// Every PgBouncer is still held for this epoch.
pub fn loose(config: &Config, members: &[Member], claim: Claim) -> Vec<Finding> {
    let found = missing(config, members, |member| holds(member, claim)).map(|entry| {
        let fix = "see what its keeper says: PgBouncer went away, or somebody resumed it";
        let object = format!("PgBouncer {}", entry.name);
        Finding::red("paused", object, format!("is not held for {claim}, or nobody keeps it any more"), fix)
    });
    found.collect()
}

/// Those that do not serve the target after all the patience there is.
pub async fn behind(scene: &Scene, claim: Claim) -> Vec<ProxyError> {
    if scene.config.bouncers.is_empty() {
        return Vec::new();
    }
    let until = Instant::now() + switched::PATIENCE;
    let target = &scene.config.target.backend;
    loop {
        let members = scene.clusters.target.members(&scene.database, STEP_DEADLINE).await.unwrap_or_default();
        let there = |member: &Member| {
            member.backend == *target && member.route_epoch >= claim.epoch && member.paused_epoch.is_none()
        };
        note(scene, Moment::Switched, &members, |member| member.route_epoch >= claim.epoch);
        note(scene, Moment::Resumed, &members, there);
        let behind: Vec<ProxyError> = missing(&scene.config, &members, there).map(not_there).collect();
        if behind.is_empty() || Instant::now() >= until {
            return behind;
        }
        // reason: keepers follow by themselves; looked at again within the deadline.
        tokio::time::sleep(LOOK).await;
    }
}

fn not_there(entry: &BouncerEntry) -> ProxyError {
    let message = "its keeper has not brought it to the target yet; its clients are held".to_owned();
    ProxyError { proxy: format!("PgBouncer {}", entry.name), sqlstate: None, message }
}

/// What preflight wants to know of each.
pub async fn facts(config: &Config, source: &Cluster) -> Vec<BouncerFacts> {
    if config.bouncers.is_empty() {
        return Vec::new();
    }
    let members = roster::members(source, config).await.unwrap_or_default();
    futures_util::future::join_all(config.bouncers.iter().map(|entry| of_one(config, entry, &members))).await
}

async fn of_one(config: &Config, entry: &BouncerEntry, members: &[Member]) -> BouncerFacts {
    let asked = async {
        let console = Console::open(&entry.endpoint).await?;
        let pointed = console.pointed(&entry.database).await?;
        let pool_mode = match pointed.pool_mode.as_str() {
            "" => console.setting("pool_mode").await?,
            own => own.to_owned(),
        };
        Ok::<_, ConsoleError>((pointed.address, pool_mode, console.server_pids(&entry.database).await?))
    };
    let (points_at, pool_mode, server_pids) = match asked.await {
        Ok((address, pool_mode, pids)) => (Ok(address), pool_mode, pids),
        Err(error) => (Err(error.to_string()), String::new(), Vec::new()),
    };
    let is_watched = members.iter().any(|member| member.instance == entry.name && roster::is_alive(member));
    let watched = match (is_watched, config.policy.unleased) {
        (true, _) => Watched::ByItsKeeper,
        (false, Unleased::Keep) => Watched::ByThisRun,
        (false, Unleased::Refuse) => Watched::ByNobody,
    };
    let name = entry.name.clone();
    BouncerFacts { name, points_at, source: entry.source.clone(), pool_mode, server_pids, watched }
}
