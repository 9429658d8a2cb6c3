//! S9, first half: every proxy reads the commit and routes to the target.
//!
//! Invariant: decided before; a proxy that misses the order follows the decision by itself. Nobody waits for it here: the
//! clients of the others are held.

use std::time::Duration;

use pgcutover_api::command::{Command, Switch, Warrant};

use crate::event::Facts;
use crate::finding::Finding;
use crate::proxies::{Proxy, ProxyError};
use crate::report::timeline::Moment;
use crate::steps::{Scene, StepError, Undo, evidence};

/// A proxy looks at the store every second: after this it has followed, or something is wrong with it.
pub const PATIENCE: Duration = Duration::from_secs(4);
/// Reading one row, writing another, replacing one file: 5 ms. Clients of the other proxies wait for a dead one as long; a slow
/// one gets RESUME behind SWITCH on the same connection, and whatever it misses it finds in the store.
const ANSWER: Duration = Duration::from_millis(250);

/// Switches all of them at once.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let claim = scene.claim()?;
    let (database, backend) = (scene.config.database.clone(), scene.config.target.backend.clone());
    let order = Command::Switch(Switch { database, backend, warrant: Warrant::Claim(claim) });
    let here: &Scene = scene;
    let answers =
        here.fleet.each(|proxy| evidence::answered(here, Moment::Switched, proxy.name(), proxy.order(&order, ANSWER)));
    let answers = answers.await;
    let missed: Vec<String> =
        answers.into_iter().filter_map(|(_, answer)| answer.err()).map(|error| error.to_string()).collect();
    evidence::tell(scene, Moment::Switched);
    Ok(Facts::new().with("backend", scene.config.target.backend.as_str()).with("unconfirmed", missed))
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
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
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
