//! S0: what an earlier run left to do is done, preflight is green, our objects are there (target first), gates are armed as
//! no-ops, the way back is published, one sentinel was seen through, heartbeats go, every proxy has opened connections to the target.
//! On a physical standby all of ours arrives by WAL.
//!
//! Invariant: no client waits for any of it longer than a lock attempt; everything stays when a run is refused, because the
//! next run needs it and a no-op gate costs less than a microsecond a statement (`proxyctl objects remove` takes it away). Only the
//! connections to the target are closed then.

use std::time::Duration;

use pgcutover_api::rows::{PrepareRow, Verdict};
use pgcutover_api::store::Identity;

use crate::clusters::{CatchUpError, Certainty, ClusterError, Clusters, Feed, Role};
use crate::config::{Budgets, HOLD_BUDGET_DEFAULT, Replication};
use crate::event::Facts;
use crate::finding::{Finding, Level};
use crate::plan::Goal;
use crate::proxies::{Fleet, ProxyError, ProxyErrors};
use crate::report;
use crate::roster;
use crate::steps::heartbeat::Heartbeat;
use crate::steps::{
    STEP_DEADLINE, Scene, StepError, Undo, attached, caught_up, evidence, fenced, inspection, install, kept, pinned,
    way_back,
};

/// One table takes milliseconds unless a writer sits on it; thousands of tables take a while.
const ARM_TABLES: Duration = Duration::from_secs(60);
/// The first sentinel also pays for a subscription that has just been refreshed, whose worker starts anew.
const FIRST_SENTINEL: Duration = Duration::from_secs(20);

/// Does all that.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    scene.fleet = gathered(scene).await?;
    identify(scene).await?;
    attached::finish(scene).await?;
    let findings = inspection::inspect(&scene.config, &scene.clusters, &scene.fleet).await?;
    admit(scene, findings)?;
    install::install(&scene.config, &scene.clusters).await?;
    kept::keep_unleased(scene).await?;
    let certainty = scene.clusters.source.arm(&scene.database, STEP_DEADLINE).await?;
    let feed = scene.feed().await?;
    match &feed {
        Feed::Subscriptions(of) => scene.clusters.publish_store(of, STEP_DEADLINE).await?,
        Feed::Wal => {}
    }
    let ungated = scene.clusters.source.arm_tables(&scene.database, ARM_TABLES).await?;
    if !ungated.is_empty() {
        let found = ungated.iter().map(fenced::open_table).collect();
        return Err(StepError::found("tables of the source could not be gated", found));
    }
    way_back::offer(scene).await?;
    // Connected now, so that no login happens while clients are held.
    scene.decider.view(&scene.database, STEP_DEADLINE).await?;
    let travel = see_through(scene, &feed).await?;
    scene.heartbeat = Some(Heartbeat::start(&scene.clusters, &scene.database, scene.evidence.lag.clone()));
    holds(&scene.config.budgets, &scene.fleet).await?;
    if certainty == Certainty::Watched {
        scene.catalogue = Some(scene.clusters.source.fingerprint(STEP_DEADLINE).await?);
    }
    let opened = prepare(scene).await?;
    evidence::members(scene).await;
    scene.pinning = pinned::ahead(scene, &feed).await;
    Ok(Facts::new()
        .with("first_sentinel_ms", travel.as_secs_f64() * 1000.0)
        .with("connections_prepared", opened)
        .with("ddl", if certainty == Certainty::Enforced { "refused by an event trigger" } else { "watched" }))
}

/// Every proxy, or the refusal that says of each missing one when the source's store last saw it.
async fn gathered(scene: &Scene) -> Result<Fleet, StepError> {
    let source = &scene.clusters.source;
    let absent = match roster::assemble(&scene.config, source).await {
        Ok(fleet) => return Ok(fleet),
        Err(absent) => absent,
    };
    let members = roster::members(source, &scene.config).await.unwrap_or_default();
    let seen = absent.0.into_iter().map(|error| roster::last_seen(error, &members));
    Err(StepError::from(ProxyErrors(seen.collect())))
}

/// Remembers which servers these are: whoever answers later must be the same (R14).
async fn identify(scene: &mut Scene) -> Result<(), StepError> {
    let (source, target) = identities(&scene.clusters).await?;
    for (what, backend, identity) in [
        (report::SOURCE, scene.config.source.backend.clone(), &source),
        (report::TARGET, scene.config.target.backend.clone(), &target),
    ] {
        let facts = Facts::new()
            .with("backend", backend)
            .with("version", version(identity.version_num))
            .with("system_identifier", identity.system_identifier.to_string())
            .with("timeline", identity.timeline.map_or("in recovery".to_owned(), |timeline| timeline.to_string()));
        scene.observe(what, facts);
    }
    scene.identities = Some((source, target));
    Ok(())
}

async fn identities(clusters: &Clusters) -> Result<(Identity, Identity), ClusterError> {
    tokio::try_join!(clusters.source.identity(STEP_DEADLINE), clusters.target.identity(STEP_DEADLINE))
}

/// `server_version_num` as people say it: 130023 is 13.23.
pub fn version(number: u32) -> String {
    format!("{}.{}", number / 10_000, number % 10_000)
}

fn admit(scene: &mut Scene, findings: Vec<Finding>) -> Result<(), StepError> {
    let (red, other): (Vec<Finding>, Vec<Finding>) =
        findings.into_iter().partition(|finding| finding.level == Level::Red);
    for finding in other {
        scene.find(finding);
    }
    if red.is_empty() {
        Ok(())
    } else {
        Err(StepError::found(format!("preflight is red: {} findings", red.len()), red))
    }
}

async fn see_through(scene: &Scene, feed: &Feed) -> Result<Duration, StepError> {
    let token = format!("{} armed", scene.run);
    match scene.clusters.catch_up(&scene.database, &token, feed, FIRST_SENTINEL).await {
        Ok(caught_up) => Ok(caught_up.waited),
        Err(error @ CatchUpError::Late { .. }) => Err(caught_up::explain(scene, feed, &error).await),
        Err(error @ (CatchUpError::NoSentinel(_) | CatchUpError::Cluster(_))) => {
            Err(StepError::plain(error.to_string()))
        }
    }
}

/// Clients must be able to wait out the worst pause that the budgets allow.
async fn holds(budgets: &Budgets, fleet: &Fleet) -> Result<(), StepError> {
    for (proxy, setting) in fleet.all(|proxy| proxy.setting("hold_budget")).await? {
        let hold = setting.as_deref().and_then(span).unwrap_or(HOLD_BUDGET_DEFAULT);
        if let Err(reason) = budgets.fit_into(hold) {
            let finding =
                Finding::red("armed", proxy, &reason, "lower the budgets, or raise hold_budget on this proxy");
            return Err(StepError::found(reason, vec![finding]));
        }
    }
    Ok(())
}

/// Plain seconds, or with a unit.
fn span(text: &str) -> Option<Duration> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.or_else(|| humantime::parse_duration(text).ok())
}

/// Right before the pause once more: what preflight had opened may have gone idle, and refusals count now.
async fn prepare(scene: &mut Scene) -> Result<u32, StepError> {
    let config = &scene.config;
    let verdicts = scene.fleet.all(|proxy| inspection::prepare(config, proxy)).await;
    let verdicts = verdicts.map_err(|errors| refused(errors.0, &scene.config.target.backend))?;
    let (mut opened, mut red, mut doubts) = (0, Vec::new(), Vec::new());
    for (proxy, rows) in &verdicts {
        for row in rows {
            opened += row.open;
            match row.status {
                Verdict::In => {}
                Verdict::Refused => red.push(refusal(proxy, row)),
                Verdict::Unknown => doubts.push(unknown(proxy, row)),
            }
        }
    }
    for finding in doubts {
        scene.find(finding);
    }
    if red.is_empty() { Ok(opened) } else { Err(StepError::found("the target refuses users of the source", red)) }
}

fn refused(errors: Vec<ProxyError>, target: &str) -> StepError {
    let found = errors.iter().map(|error| {
        let fix = format!("see that this proxy declares the backend '{target}' and reaches it: SHOW BACKENDS");
        Finding::red("armed", &error.proxy, &error.message, fix)
    });
    StepError::found("a proxy could not prepare the switch", found.collect())
}

fn refusal(proxy: &str, row: &PrepareRow) -> Finding {
    let fix =
        "make the user on the target with the same password verifier, and let it connect (pg_hba.conf, GRANT CONNECT)";
    Finding::red("armed", format!("{proxy}: user {}", row.user), format!("{} [{}]", row.message, row.sqlstate), fix)
}

fn unknown(proxy: &str, row: &PrepareRow) -> Finding {
    let problem = format!("whether this user may log in to the target is not known: {}", row.message);
    let fix = "let the user log in through the proxy once before the cutover";
    Finding::yellow("armed", format!("{proxy}: user {}", row.user), problem, fix)
}

/// Everything on the servers stays, see above, but for connections that nobody needs now; the heartbeat ends with the run.
pub async fn undo(scene: &Scene) -> Result<Undo, StepError> {
    // A proxy that does not answer keeps them until it is asked again, or ends: no client is served by them.
    scene.fleet.each(|proxy| inspection::let_go(&scene.config, proxy)).await;
    Ok(Undo::Nothing)
}

/// The servers are still the ones of the beginning, primaries both; a standby has been promoted, but not by a rehearsal.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    let (source, target) = identities(&scene.clusters).await?;
    let Some((first_source, first_target)) = &scene.identities else {
        return Err(StepError::plain("the servers were never identified"));
    };
    for (role, first, now) in [(Role::Source, first_source, &source), (Role::Target, first_target, &target)] {
        let as_it_was = first == now && !now.in_recovery;
        let as_it_should = match (role, &scene.config.replication, scene.journal.state().goal) {
            (Role::Source, _, _) | (Role::Target, Replication::Logical { .. }, _) => as_it_was,
            (Role::Target, Replication::Physical, Goal::Rehearsal) => first == now && now.in_recovery,
            (Role::Target, Replication::Physical, Goal::Cutover) => is_promoted(first, now, &source),
        };
        if !as_it_should {
            let problem = format!("is not the server it was when the run began: {first:?}, now {now:?}");
            let fix = "a failover happened, or the name resolves to another server: end it, then run again";
            return Err(StepError::found(
                format!("{role} {problem}"),
                vec![Finding::red("checked", role.to_string(), problem, fix)],
            ));
        }
    }
    Ok(())
}

/// The standby of before, on a timeline of its own.
fn is_promoted(standby: &Identity, now: &Identity, source: &Identity) -> bool {
    let same = (standby.system_identifier, standby.version_num) == (now.system_identifier, now.version_num);
    same && !now.in_recovery && now.timeline > source.timeline
}
