//! S7: everything the decision relies on is looked at once more, at the same time.
//!
//! The snapshots at which both sides are compared later are taken meanwhile, on connections of their own.
//!
//! Invariant: reads only. What it proves: the servers are the same primaries, every living proxy is paused at this epoch, the
//! source is fenced and every table of it gated, nothing is prepared, the sentinel is right, no sequence stands behind, no
//! session is tied, the schema is the one that was armed, the target takes our writes and keeps clients out until the evidence where
//! it has a gate. A physical target has been promoted; in a rehearsal it is still the standby, which holds the fence.

use pgcutover_api::store::GateForm;

use crate::config::Replication;
use crate::event::Facts;
use crate::finding::Finding;
use crate::plan::Goal;
use crate::steps::{
    STEP_DEADLINE, Scene, StepError, Undo, armed, caught_up, durable, fenced, paused, pinned, transplanted, way_back,
};

/// Looks. A rehearsal has set no sequence: there it is the target's other state that counts.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let pinning = std::mem::take(&mut scene.pinning);
    let pins = pinned::take(pinning, scene.config.budgets.stall);
    let (checked, (pinning, taken)) = tokio::join!(checks(scene), pins);
    scene.pinning = pinning;
    checked?;
    Ok(Facts::new().with("pin_ms", taken.map(|taken| taken.as_secs_f64() * 1000.0)))
}

async fn checks(scene: &Scene) -> Result<(), StepError> {
    match scene.journal.state().goal {
        Goal::Cutover => verify(scene).await,
        Goal::Rehearsal => all_but_sequences(scene).await,
    }
}

/// Nothing was done.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// Every step before is still as it was left. Questions to one server queue on its connection; those to the others do not.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    tokio::try_join!(all_but_sequences(scene), durable::verify(scene))?;
    Ok(())
}

async fn all_but_sequences(scene: &Scene) -> Result<(), StepError> {
    tokio::try_join!(
        armed::verify(scene),
        paused::verify(scene),
        fenced::verify(scene),
        caught_up::verify(scene),
        transplanted::verify(scene),
        way_back::verify(scene),
        target_is_shut(scene),
        catalogue_is_unchanged(scene),
    )?;
    Ok(())
}

/// R13: where no event trigger refuses DDL, what changed since the gates were armed may stand on one side only.
async fn catalogue_is_unchanged(scene: &Scene) -> Result<(), StepError> {
    let Some(armed) = &scene.catalogue else { return Ok(()) };
    if *armed == scene.clusters.source.fingerprint(STEP_DEADLINE).await? {
        return Ok(());
    }
    let problem = "the schema of the source changed after the gates were armed";
    let fix = "bring the change to the target too, and let nobody change the schema during a cutover; \
               the event trigger that `proxyctl objects` prints, run by a superuser, refuses it";
    let finding = Finding::red("checked", &scene.config.database, problem, fix);
    Err(StepError::found(problem, vec![finding]))
}

/// A target that has a gate keeps clients out until the evidence of this epoch is there (R10).
async fn target_is_shut(scene: &Scene) -> Result<(), StepError> {
    let claim = scene.claim()?;
    let gates = scene.clusters.target.gates(STEP_DEADLINE).await?;
    let gate = gates.iter().find(|gate| gate.db == scene.database.as_str());
    let is = |form| gate.is_some_and(|gate| gate.form == Some(form) && gate.epoch == claim.epoch);
    let is_shut = match (&scene.config.replication, scene.journal.state().goal) {
        (Replication::Logical { .. }, _) => gate.is_none() || is(GateForm::Target),
        (Replication::Physical, Goal::Cutover) => is(GateForm::Target),
        (Replication::Physical, Goal::Rehearsal) => is(GateForm::Fenced),
    };
    if is_shut {
        return Ok(());
    }
    Err(StepError::plain(format!("the target's gate would let clients in before the decision: {gate:?}")))
}
