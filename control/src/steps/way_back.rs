//! S6: a logical slot on the target, made between catch-up and the first client write there, from which the old source can
//! follow. Attaching it is a later verb; it is made only where `[way_back] enabled = true`.
//!
//! Invariant: dropped again by an abort, so that it does not keep WAL for nobody. Kept after a commit: it keeps WAL on the
//! new source until it is attached or dropped.

use crate::finding::Finding;
use crate::state::Facts;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo};

/// Makes it, where asked for.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    if !scene.config.way_back.enabled {
        return Ok(Facts::new().with("enabled", false));
    }
    let slot = slot(scene)?;
    match scene.clusters.target.create_slot(&slot, STEP_DEADLINE).await {
        Ok(lsn) => {
            let problem = format!("keeps WAL on the new source from {lsn} on");
            let fix = format!("attach it, or SELECT pg_drop_replication_slot('{slot}') when no way back is needed");
            scene.find(Finding::yellow("way_back", &slot, problem, fix));
            Ok(Facts::new().with("enabled", true).with("slot", slot).with("lsn", lsn.to_string()))
        }
        Err(error) => {
            let fix = "the target needs wal_level = logical, a free max_replication_slots, and REPLICATION for proxyctl's role; \
                       or set way_back.enabled = false";
            let finding = Finding::red("way_back", &slot, error.to_string(), fix);
            Err(StepError::found(error.to_string(), vec![finding]))
        }
    }
}

/// Its name: one per database and epoch, in the letters a slot may have.
fn slot(scene: &Scene) -> Result<String, StepError> {
    let letters = scene.database.as_str().chars();
    let plain: String =
        letters.map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).take(30).collect();
    Ok(format!("pgcutover_back_{plain}_{}", scene.claim()?.epoch))
}

/// Drops it.
pub async fn undo(scene: &Scene) -> Result<Undo, StepError> {
    if !scene.config.way_back.enabled {
        return Ok(Undo::Nothing);
    }
    scene.clusters.target.drop_slot(&slot(scene)?, STEP_DEADLINE).await?;
    Ok(Undo::Done)
}

/// A slot does not go by itself.
pub async fn verify(_scene: &Scene) -> Result<(), StepError> {
    Ok(())
}
