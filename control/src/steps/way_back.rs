//! S6: a logical slot on the target, made between catch-up and the first client write there, from which the old source
//! follows once clients are let go (S10); and what it takes before: the publication that it sends (S0). Of a physical move the
//! same step promotes the standby (`promoted`): after that an abort costs it.
//!
//! Invariant: the publication is there before the slot is, or changes would be sent by none. The slot is dropped again by an
//! abort, so that it does not keep WAL for nobody.

use std::time::Duration;

use crate::clusters::way_back;
use crate::config::Replication;
use crate::event::Facts;
use crate::finding::Finding;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo, promoted};

/// A publication of thousands of tables, each with a lock that VACUUM may hold.
const OFFER: Duration = Duration::from_secs(20);

/// S0: the publication on the target; what an earlier run that died left there is dropped: nobody follows a server that does
/// not serve.
pub async fn offer(scene: &mut Scene) -> Result<(), StepError> {
    if !scene.config.way_back.enabled {
        return Ok(());
    }
    let target = &scene.clusters.target;
    let tables = scene.clusters.source.tables(&scene.database, STEP_DEADLINE).await?;
    if let Err(error) = target.offer(&scene.database, &tables, OFFER).await {
        return Err(refused(&way_back::publication(&scene.database), &error.to_string()));
    }
    let left = target.offers(&scene.database, STEP_DEADLINE).await?;
    for offer in left.iter().filter(|offer| !offer.is_active) {
        target.drop_slot(&offer.slot, STEP_DEADLINE).await?;
    }
    Ok(())
}

/// Makes it, where asked for.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    if scene.config.replication == Replication::Physical {
        return promoted::run(scene).await;
    }
    if !scene.config.way_back.enabled {
        return Ok(Facts::new().with("enabled", false));
    }
    let slot = slot(scene)?;
    match scene.clusters.target.create_slot(&slot, STEP_DEADLINE).await {
        Ok(lsn) => Ok(Facts::new().with("enabled", true).with("slot", slot).with("lsn", lsn.to_string())),
        Err(error) => Err(refused(&slot, &error.to_string())),
    }
}

fn refused(object: &str, problem: &str) -> StepError {
    let fix = "the target needs wal_level = logical, a free max_replication_slots, REPLICATION for proxyctl's role and \
               the rights of the tables' owner; or set way_back.enabled = false";
    StepError::found(problem, vec![Finding::red("way_back", object, problem, fix)])
}

fn slot(scene: &Scene) -> Result<String, StepError> {
    Ok(way_back::of_epoch(&scene.database, scene.claim()?.epoch))
}

/// Drops it.
pub async fn undo(scene: &Scene) -> Result<Undo, StepError> {
    if scene.config.replication == Replication::Physical {
        return promoted::undo(scene).await;
    }
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
