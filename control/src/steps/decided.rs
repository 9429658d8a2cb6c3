//! S8: the decision. After `commit` nothing goes back.
//!
//! Invariant: an outcome counts only once the store acknowledged it; an unknown one is asked for again until it is known or
//! patience ends (PROTOCOL R11). The decision travels on a connection of its own, so that nothing queues before it.

use std::time::Duration;

use pgcutover_api::store::{Outcome, Turn};

use crate::clusters::{ClusterError, DecideError};
use crate::event::{Decision, Event, Facts};
use crate::finding::Finding;
use crate::steps::{Scene, StepError, Undo, paused};

/// How long an outcome is asked for: as long as proxies hold their clients by default.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// One attempt: a server that hangs must not use up all the patience.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long the target may take to note the evidence; the proxies write it as well.
const WITNESS_PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts to leave it there, while every client waits.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Decides for the target, and leaves the evidence there.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let turn = scene.turn()?;
    // A run that was taken up after its commit knows the answer; what may be missing is the evidence.
    let known = scene.journal.state().decision == Some(Decision::Commit);
    if !known {
        let decision = decide(scene, Outcome::Commit).await?;
        confirmed(scene, decision)?;
    }
    evidence(scene, &turn).await?;
    Ok(Facts::new().with("outcome", "commit").with("epoch", turn.claim.epoch.as_u64()))
}

fn confirmed(scene: &mut Scene, decision: Decision) -> Result<(), StepError> {
    match decision {
        Decision::Commit => Ok(scene.journal.append([Event::Decided { outcome: Decision::Commit }])?),
        Decision::Abort => {
            scene.journal.append([Event::Decided { outcome: Decision::Abort }])?;
            let fix =
                "see which lease ended: the network between proxyctl and the proxies, or renew and lease too close";
            let problem = "a proxy's lease ended first: the epoch was aborted before it could be committed";
            Err(StepError::found(problem, vec![Finding::red("decided", &scene.config.database, problem, fix)]))
        }
    }
}

/// The outcome of the epoch, whoever decided it; asks for `want` where nobody has.
pub async fn decide(scene: &Scene, want: Outcome) -> Result<Decision, StepError> {
    let turn = scene.turn()?;
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        match scene.decider.decide(&turn, want, ATTEMPT).await {
            Ok(outcome) => return Ok(outcome.into()),
            Err(DecideError::Unknown(_)) if tokio::time::Instant::now() < until => {}
            Err(error) => {
                let fix = format!(
                    "bring {} back, then run 'proxyctl resume-run': it asks for the outcome and acts by it ('proxyctl abort' does so from any machine)",
                    scene.config.source.backend
                );
                let finding = Finding::red("decided", &scene.config.source.backend, error.to_string(), fix);
                return Err(StepError::found(error.to_string(), vec![finding]));
            }
        }
    }
}

async fn evidence(scene: &Scene, turn: &Turn) -> Result<(), StepError> {
    let target = paused::name(&scene.config.target.backend)?;
    let until = tokio::time::Instant::now() + WITNESS_PATIENCE;
    loop {
        match scene.clusters.target.witness(turn, &target, WITNESS_PATIENCE).await {
            Ok(()) => return Ok(()),
            Err(error) if again(&error) && tokio::time::Instant::now() < until => {
                // reason: a target that is away is asked again, within WITNESS_PATIENCE.
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Err(error) => {
                let fix = "nothing: each proxy writes the evidence itself before it switches; see why the target did not answer";
                let finding = Finding::red("decided", &scene.config.target.backend, error.to_string(), fix);
                return Err(StepError::found(format!("no evidence on the target: {error}"), vec![finding]));
            }
        }
    }
}

fn again(error: &ClusterError) -> bool {
    error.is_absence()
}

/// A decision is not taken back.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// The store knows the commit.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    let claim = scene.claim()?;
    let view = scene.decider.view(&scene.database, ATTEMPT).await?;
    match view.last_commit {
        Some(commit) if commit.epoch == claim.epoch && commit.run == claim.run => Ok(()),
        Some(_) | None => Err(StepError::plain(format!("the source knows no commit of {claim}"))),
    }
}
