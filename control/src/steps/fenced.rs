//! S3: the source refuses writes from everyone; writers that passed the gate earlier have ended.
//!
//! Invariant: fence before catch-up, never after. The flip is conditional on the epoch being this run's and open (R3); the
//! barrier counts locks (R5).

use pgcutover_api::store::{GateForm, SQLSTATE_WRONG_EPOCH};

use crate::clusters::{BarrierError, Ungated};
use crate::event::Facts;
use crate::finding::Finding;
use crate::report::lag::FENCE_LSN;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo};

/// Flips, then waits.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    scene.clusters.source.flip(&scene.turn()?, STEP_DEADLINE).await?;
    let passed = scene.clusters.source.barrier(scene.config.budgets.barrier).await.map_err(|error| explain(&error))?;
    Ok(Facts::new()
        .with("barrier_ms", passed.waited.as_secs_f64() * 1000.0)
        .with(FENCE_LSN, passed.position.to_string()))
}

fn explain(error: &BarrierError) -> StepError {
    let findings = match error {
        BarrierError::Writers { writers, .. } => writers
            .iter()
            .map(|writer| {
                let problem =
                    format!("still writes: {writer}: {}", writer.query.as_deref().unwrap_or("statement unknown"));
                let fix = "end this transaction (it may bypass the proxies), or raise budgets.barrier";
                Finding::red("fenced", &writer.table, problem, fix)
            })
            .collect(),
        BarrierError::Prepared(prepared) => prepared
            .iter()
            .map(|prepared| {
                let problem =
                    format!("prepared by {} {} ms ago: it may commit at any time", prepared.owner, prepared.age_ms);
                let fix = format!("COMMIT PREPARED or ROLLBACK PREPARED '{}'", prepared.gid);
                Finding::red("fenced", &prepared.gid, problem, fix)
            })
            .collect(),
        BarrierError::Cluster(_) => Vec::new(),
    };
    StepError::found(error.to_string(), findings)
}

/// Opens the gate again. The gate lets writes pass from the moment the abort is visible; this makes it cheap again.
pub async fn undo(scene: &Scene) -> Result<Undo, StepError> {
    match scene.clusters.source.unfence(&scene.turn()?, STEP_DEADLINE).await {
        Ok(()) => Ok(Undo::Done),
        // The abort is decided, so this says that a newer epoch has been opened since: the gate is that one's.
        Err(error) if error.sqlstate() == Some(SQLSTATE_WRONG_EPOCH) => Ok(Undo::Nothing),
        Err(error) => Err(error.into()),
    }
}

/// The gate is shut at this epoch, no table is without it, nothing is prepared.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    let claim = scene.claim()?;
    let gates = scene.clusters.source.gates(STEP_DEADLINE).await?;
    let ours = gates.iter().find(|gate| gate.db == scene.database.as_str());
    if !ours.is_some_and(|gate| gate.form == Some(GateForm::Fenced) && gate.epoch == claim.epoch) {
        return Err(StepError::plain(format!("the gate of the source is not shut at {claim}: {ours:?}")));
    }
    let ungated = scene.clusters.source.ungated(&scene.database, STEP_DEADLINE).await?;
    if !ungated.is_empty() {
        let found = ungated.iter().map(open_table).collect();
        return Err(StepError::found("tables of the source are not gated", found));
    }
    let prepared = scene.clusters.source.prepared_transactions(STEP_DEADLINE).await?;
    if prepared.is_empty() { Ok(()) } else { Err(explain(&BarrierError::Prepared(prepared))) }
}

/// A table that writers could still reach.
pub fn open_table(ungated: &Ungated) -> Finding {
    let fix = "let proxyctl's role be a member of the table's owner, wait until nobody holds a lock on it, run again";
    Finding::red("fenced", &ungated.table, &ungated.reason, fix)
}
