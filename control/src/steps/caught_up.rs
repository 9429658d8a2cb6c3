//! S4: everything that was committed on the source before the fence is applied on the target.
//!
//! Invariant: the sentinel is written after the barrier; "caught up" needs it on the target and every subscription's applied
//! position behind it.

use crate::clusters::{CatchUpError, Subscription};
use crate::event::Facts;
use crate::finding::Finding;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo};

/// Sends the sentinel and waits.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let token = token(scene)?;
    let subscriptions = scene.subscriptions().await?;
    let limit = scene.config.budgets.catch_up;
    match scene.clusters.catch_up(&scene.database, &token, &subscriptions, limit).await {
        Ok(caught_up) => Ok(Facts::new()
            .with("sentinel", token)
            .with("source_lsn", caught_up.position.to_string())
            .with("waited_ms", caught_up.waited.as_secs_f64() * 1000.0)
            .with("nudges", caught_up.nudges)),
        Err(error) => Err(explain(scene, &subscriptions, &error).await),
    }
}

fn token(scene: &Scene) -> Result<String, StepError> {
    let claim = scene.claim()?;
    Ok(format!("{} {}", claim.run, claim.epoch))
}

/// Why it did not arrive, as far as the servers tell.
pub async fn explain(scene: &Scene, subscriptions: &[Subscription], error: &CatchUpError) -> StepError {
    let mut found = Vec::new();
    let now = scene
        .clusters
        .target
        .subscriptions(&scene.database, &scene.config.replication.subscriptions, STEP_DEADLINE)
        .await;
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
    StepError::found(error.to_string(), found)
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
