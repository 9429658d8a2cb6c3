//! S9, second half: every proxy lets its clients go, on the target.
//!
//! Invariant: a proxy resumes only where its own route has reached the epoch (PROTOCOL R7); it sees to that itself.

use pgcutover_api::command::{Command, ResumeWith, Warrant};
use pgcutover_api::rows::GateState;

use crate::proxies::{Proxy, ProxyError, SHOW_DEADLINE};
use crate::report;
use crate::state::Facts;
use crate::steps::{STEP_DEADLINE, Scene, StepError, switched};

/// Resumes all of them at once.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let claim = scene.claim()?;
    let database = scene.config.database.clone();
    let order = Command::ResumeWith(ResumeWith { database, warrant: Warrant::Claim(claim) });
    let answers = scene.fleet.each(|proxy| resume(scene, proxy, &order)).await;
    let missed: Vec<ProxyError> = answers.into_iter().filter_map(|(_, answer)| answer.err()).collect();
    scene.observe(report::RESUME_ANSWERED, Facts::new());
    if let Some(leases) = scene.leases.take() {
        leases.stop().await;
    }
    if !missed.is_empty() {
        return Err(switched::told(missed));
    }
    // A target that was once a source has a gate: its evidence is there, the no-op is cheaper.
    let settled = scene.clusters.target.settle(&scene.turn()?, STEP_DEADLINE).await.is_ok();
    Ok(Facts::new().with("target_gate_settled", settled))
}

async fn resume(scene: &Scene, proxy: &Proxy, order: &Command) -> Result<(), ProxyError> {
    match proxy.order(order, SHOW_DEADLINE).await {
        Ok(_) => Ok(()),
        Err(_) if serves_target(scene, proxy).await => Ok(()),
        Err(error) => Err(error),
    }
}

async fn serves_target(scene: &Scene, proxy: &Proxy) -> bool {
    let open = proxy.gate(&scene.config.database).await.is_ok_and(|gate| gate.state == GateState::Open);
    open && switched::routes_to_target(scene, proxy).await
}

/// Past the point of no return.
pub async fn undo(_scene: &Scene) -> Result<(), StepError> {
    Ok(())
}

/// Every proxy serves the target.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    for proxy in scene.fleet.iter() {
        if !serves_target(scene, proxy).await {
            return Err(StepError::plain(format!("proxy {} does not serve the target yet", proxy.name())));
        }
    }
    Ok(())
}
