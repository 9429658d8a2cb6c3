//! S9, first half: every proxy reads the commit and routes to the target.
//!
//! Invariant: decided before; a proxy that misses the order follows the decision by itself, so a miss is told, not undone.

use std::time::Duration;

use pgcutover_api::command::{Command, Switch, Warrant};

use crate::finding::Finding;
use crate::proxies::{Proxy, ProxyError, SHOW_DEADLINE};
use crate::state::Facts;
use crate::steps::{Scene, StepError};

/// A proxy looks at the store every second: after this it has followed, or something is wrong with it.
pub const PATIENCE: Duration = Duration::from_secs(4);
/// Between two looks at a proxy that did not answer well.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Switches all of them at once.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let claim = scene.claim()?;
    let (database, backend) = (scene.config.database.clone(), scene.config.target.backend.clone());
    let order = Command::Switch(Switch { database, backend, warrant: Warrant::Claim(claim) });
    let answers = scene.fleet.each(|proxy| switch(scene, proxy, &order)).await;
    let missed: Vec<ProxyError> = answers.into_iter().filter_map(|(_, answer)| answer.err()).collect();
    if missed.is_empty() {
        Ok(Facts::new().with("backend", scene.config.target.backend.as_str()))
    } else {
        Err(told(missed))
    }
}

async fn switch(scene: &Scene, proxy: &Proxy, order: &Command) -> Result<(), ProxyError> {
    let Err(error) = proxy.order(order, SHOW_DEADLINE).await else { return Ok(()) };
    let until = tokio::time::Instant::now() + PATIENCE;
    while tokio::time::Instant::now() < until {
        if routes_to_target(scene, proxy).await {
            return Ok(());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Err(error)
}

/// Whether it has got there, by the order or by itself.
pub async fn routes_to_target(scene: &Scene, proxy: &Proxy) -> bool {
    let Some(claim) = scene.claim else { return false };
    let gate = proxy.gate(&scene.config.database).await;
    gate.is_ok_and(|gate| gate.route_epoch >= claim.epoch && gate.backend == scene.config.target.backend)
}

/// What to say of proxies that did not confirm.
pub fn told(missed: Vec<ProxyError>) -> StepError {
    let found = missed.iter().map(|error| {
        let fix = "nothing if it is down: it follows the decision when it starts; else see its log and SHOW GATES";
        Finding::red("switched", &error.proxy, &error.message, fix)
    });
    StepError::found("not every proxy confirmed; each follows the decision by itself", found.collect())
}

/// Past the point of no return.
pub async fn undo(_scene: &Scene) -> Result<(), StepError> {
    Ok(())
}

/// Every proxy routes to the target.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    for proxy in scene.fleet.iter() {
        if !routes_to_target(scene, proxy).await {
            return Err(StepError::plain(format!("proxy {} does not route to the target", proxy.name())));
        }
    }
    Ok(())
}
