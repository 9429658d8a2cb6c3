//! S5: sequences are set with their gap and what was applied is on the target's disk, by one synchronous transaction.
//!
//! Invariant: a row of ours is always written, sequences or not (PROTOCOL R6). Sequences are read after the barrier. Nothing of
//! it is for a physical standby: it replays only what is on its disk, and its sequences arrive by WAL, up to 32 numbers ahead.

use crate::clusters::{Position, Sequence, drift};
use crate::config::Replication;
use crate::event::Facts;
use crate::finding::Finding;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo};

/// Reads there, sets here.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    if scene.config.replication == Replication::Physical {
        return Ok(Facts::new().with("by", "wal"));
    }
    let sequences = scene.clusters.source.sequences(STEP_DEADLINE).await?;
    let hidden: Vec<&Sequence> = sequences.iter().filter(|sequence| sequence.position == Position::Hidden).collect();
    if !hidden.is_empty() {
        return Err(unreadable(&hidden, &scene.config.source.backend));
    }
    let gap = scene.config.sequences.gap;
    let limit = scene.config.budgets.catch_up;
    let set = scene.clusters.target.make_durable(&scene.turn()?, &sequences, gap, limit).await?;
    Ok(Facts::new().with("sequences_set", set).with("gap", gap))
}

fn unreadable(hidden: &[&Sequence], backend: &str) -> StepError {
    let found = hidden.iter().map(|sequence| {
        let fix =
            format!("on {backend}: GRANT SELECT, USAGE ON SEQUENCE {} TO the role of source.dsn", sequence.full_name());
        Finding::red("durable", sequence.full_name(), "its position may not be read: it could not be carried over", fix)
    });
    StepError::found("sequences of the source may not be read", found.collect())
}

/// The target's sequences stand further than needed, which harms nothing.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// No sequence of the target stands less far than it has to.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    if scene.config.replication == Replication::Physical {
        return Ok(());
    }
    let (source, target) = tokio::try_join!(
        scene.clusters.source.sequences(STEP_DEADLINE),
        scene.clusters.target.sequences(STEP_DEADLINE)
    )?;
    let found: Vec<Finding> = drift(&source, &target, scene.config.sequences.gap)
        .into_iter()
        .map(|drift| {
            let fix = "create the sequence on the target, or let proxyctl's role read and set it there";
            Finding::red("durable", drift.sequence, drift.problem, fix)
        })
        .collect();
    if found.is_empty() { Ok(()) } else { Err(StepError::found("sequences of the target do not stand right", found)) }
}
