//! S4: everything that was committed on the source before the fence is applied on the target.
//!
//! Invariant: the sentinel is written after the barrier; "caught up" needs it on the target and every subscription's applied
//! position behind it, or the standby's replayed one. A standby replays nothing that is not on its disk (R6).

use crate::clusters::{CatchUpError, Feed, Recovery, Subscription};
use crate::config::Replication;
use crate::event::Facts;
use crate::finding::Finding;
use crate::report::lag::{REPLAYED_LSN, SENTINEL_LSN};
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo};

/// Sends the sentinel and waits.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let token = token(scene)?;
    let feed = scene.feed().await?;
    let limit = scene.config.budgets.catch_up;
    match scene.clusters.catch_up(&scene.database, &token, &feed, limit).await {
        Ok(caught_up) => Ok(Facts::new()
            .with("sentinel", token)
            .with(SENTINEL_LSN, caught_up.position.to_string())
            .with(REPLAYED_LSN, caught_up.replayed.map(|replayed| replayed.to_string()))
            .with("waited_ms", caught_up.waited.as_secs_f64() * 1000.0)
            .with("nudges", caught_up.nudges)),
        Err(error) => Err(explain(scene, &feed, &error).await),
    }
}

fn token(scene: &Scene) -> Result<String, StepError> {
    let claim = scene.claim()?;
    Ok(format!("{} {}", claim.run, claim.epoch))
}

/// Why it did not arrive, as far as the servers tell.
pub async fn explain(scene: &Scene, feed: &Feed, error: &CatchUpError) -> StepError {
    let found = match (feed, &scene.config.replication) {
        (Feed::Subscriptions(of), Replication::Logical { subscriptions }) => {
            idle(scene, of, subscriptions, error).await
        }
        (Feed::Wal | Feed::Subscriptions(_), _) => still(scene, error).await,
    };
    StepError::found(error.to_string(), found)
}

async fn still(scene: &Scene, error: &CatchUpError) -> Vec<Finding> {
    let backend = &scene.config.target.backend;
    let red = |problem: String, fix: String| vec![Finding::red("caught_up", backend, problem, fix)];
    let standby = match scene.clusters.target.standby(STEP_DEADLINE).await {
        Ok(standby) => standby,
        Err(error) => return red(error.to_string(), format!("see that {backend} runs and answers")),
    };
    match (standby.recovery, &standby.receiver) {
        (Recovery::Over, _) => red("is no standby any more: somebody promoted it".into(), "rebuild it".into()),
        (Recovery::Paused, _) => red("its replay is paused".into(), "there: SELECT pg_wal_replay_resume()".into()),
        (Recovery::Replaying, None) => {
            red("it receives no WAL".into(), "see its log: it does not reach its source, or lacks WAL or its slot".into())
        }
        (Recovery::Replaying, Some(_)) => red(
            error.to_string(),
            "see its log and its sessions: a long query there holds replay up; raise budgets.catch_up if it is only slow"
                .into(),
        ),
    }
}

async fn idle(scene: &Scene, subscriptions: &[Subscription], named: &[String], error: &CatchUpError) -> Vec<Finding> {
    let mut found = Vec::new();
    let now = scene.clusters.target.subscriptions(&scene.database, named, STEP_DEADLINE).await;
    for subscription in now.as_deref().unwrap_or(subscriptions) {
        if !subscription.is_enabled {
            let fix = format!("on the target: ALTER SUBSCRIPTION {} ENABLE", subscription.name);
            found.push(Finding::red("caught_up", &subscription.name, "the subscription is disabled", fix));
        }
    }
    if let Err(error) = now {
        let fix = format!("see that {} runs and answers", scene.config.target.backend);
        found.push(Finding::red("caught_up", &scene.config.target.backend, error.to_string(), fix));
    } else if found.is_empty() {
        found.extend(idle_slots(scene, subscriptions).await);
    }
    if found.is_empty() {
        let fix =
            "see the target's log for the apply worker's error or lock; raise budgets.catch_up if it is only slow";
        found.push(Finding::red("caught_up", &scene.config.target.backend, error.to_string(), fix));
    }
    found
}

async fn idle_slots(scene: &Scene, subscriptions: &[Subscription]) -> Vec<Finding> {
    let Ok(slots) = scene.clusters.source.slots(subscriptions, STEP_DEADLINE).await else { return Vec::new() };
    let fix = "see the target's log: its apply worker fails or does not reach the source";
    let idle = slots.iter().filter(|slot| !slot.is_active);
    idle.map(|slot| Finding::red("caught_up", &slot.name, "nobody reads this slot on the source", fix)).collect()
}

/// Replication goes on as before.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// The sentinel of this run and epoch is on the target.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    let token = token(scene)?;
    let there = scene.clusters.target.sentinel(&scene.database, STEP_DEADLINE).await?;
    if there.as_deref() == Some(&token) {
        return Ok(());
    }
    Err(StepError::plain(format!("the sentinel on the target is {there:?}, not {token:?}")))
}
