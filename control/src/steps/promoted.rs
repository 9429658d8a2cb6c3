//! S6 of a physical move: the standby is promoted, and its clone of the fence is replaced by the target's form (R10).
//!
//! Invariant: a rehearsal never promotes. The decision comes after it and is taken on the source alone: an abort costs the
//! standby, never the move's one side. At no moment does the promoted server take writes before the evidence: until its gate
//! is a target's it has the source's fence, and that opens by an abort only, which nobody can decide there.

use std::time::Duration;

use crate::clusters::ClusterError;
use crate::event::Facts;
use crate::finding::Finding;
use crate::plan::Goal;
use crate::report::prediction::PROMOTED;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo};

/// An order to promote that was on its way when its sender died takes effect well within this.
const UNDER_WAY: Duration = Duration::from_secs(1);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Promotes, then shuts the new primary to clients until the evidence.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    if scene.journal.state().goal == Goal::Rehearsal {
        return Ok(Facts::new().with(PROMOTED, false));
    }
    // From here on beats would go nowhere.
    scene.heartbeat = None;
    let (turn, target) = (scene.turn()?, &scene.clusters.target);
    let promotion = target.promote(&turn, STEP_DEADLINE).await.map_err(|error| refused(scene, &error))?;
    // A synchronous write of ours: it takes them, and what was replayed is on its disk (R6).
    target.guard(&turn, STEP_DEADLINE).await?;
    Ok(Facts::new().with(PROMOTED, true).with("promotion_ms", promotion.took.as_secs_f64() * 1000.0))
}

fn refused(scene: &Scene, error: &ClusterError) -> StepError {
    let backend = &scene.config.target.backend;
    let fix = format!(
        "see the log of {backend}; proxyctl's role needs GRANT EXECUTE ON FUNCTION pg_promote(boolean, integer), given on {}",
        scene.config.source.backend
    );
    StepError::found(error.to_string(), vec![Finding::red("way_back", backend, error.to_string(), fix)])
}

/// A promotion is not taken back. The abort is decided and clients are on the source: what is left is to keep clients out of
/// the promoted server for good, and to say what it has become.
pub async fn undo(scene: &Scene) -> Result<Undo, StepError> {
    if scene.journal.state().goal == Goal::Rehearsal {
        return Ok(Undo::Nothing);
    }
    let target = &scene.clusters.target;
    let until = tokio::time::Instant::now() + UNDER_WAY;
    while target.is_in_recovery(STEP_DEADLINE).await? {
        if tokio::time::Instant::now() >= until {
            return Ok(Undo::Nothing);
        }
        // reason: whether an order is on its way nobody can tell; looked at again within UNDER_WAY.
        tokio::time::sleep(LOOK).await;
    }
    target.guard(&scene.turn()?, STEP_DEADLINE).await?;
    let (backend, source) = (&scene.config.target.backend, &scene.config.source.backend);
    let problem =
        format!("was promoted before the move was aborted: it follows {source} no more, and takes no client's writes");
    let fix = format!("rebuild it as a standby of {source} (pg_rewind, or pg_basebackup), then run again");
    Ok(Undo::Cost(Box::new(Finding::yellow("way_back", backend, problem, fix))))
}

/// How the next move back is made.
pub fn way_back(scene: &Scene) -> Finding {
    let (old, new) = (&scene.config.source.backend, &scene.config.target.backend);
    let problem = format!("no way back: {old} does not follow {new}");
    let fix = format!("rebuild {old} as a standby of {new} (pg_rewind, or pg_basebackup); {RETURN}");
    Finding::yellow("attached", &scene.config.database, problem, fix)
}

/// What leads back once the old server is a standby again.
pub const RETURN: &str = "then swap [source] and [target] and run 'proxyctl cutover' with that configuration";
