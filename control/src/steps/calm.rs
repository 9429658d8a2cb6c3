//! S1: nothing would make the pause long: lag, old transactions, tied sessions, the way of a heartbeat.
//!
//! Invariant: no client is held; a run that is not calm in time ends here and nothing has happened.

use std::time::Duration;

use crate::clusters::{BadCell, Cells, ClusterError, Feed, Subscription};
use crate::config::Replication;
use crate::event::Facts;
use crate::finding::Finding;
use crate::report::prediction::PROMOTION;
use crate::steps::heartbeat::Heartbeat;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo, transplanted};

/// How long calm is waited for.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// Beats that must have arrived before they predict anything.
const BEATS: usize = 5;
/// Beats go ten times a second: this long without one and replication stands.
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// Flip, barrier, sequences, checks and decision on two servers nearby, measured: 20 to 60 ms.
const FIXED: Duration = Duration::from_millis(50);

/// Transactions of clients, oldest first; a drain would wait for each of them.
const OLD: &str = "SELECT a.pid, coalesce(a.usename, '') || coalesce(', ' || a.application_name, '') AS who, \
      coalesce(left(a.query, 120), '') AS query, (extract(epoch FROM clock_timestamp() - a.xact_start) * 1000)::bigint AS age_ms \
    FROM pg_stat_activity a WHERE a.datname = current_database() AND a.xact_start IS NOT NULL AND a.pid <> pg_backend_pid() \
      AND coalesce(a.backend_type, 'client backend') = 'client backend' \
      AND a.application_name IS DISTINCT FROM 'proxyctl verify' ORDER BY a.xact_start LIMIT 20";

/// An open transaction of a client.
#[derive(Debug, Clone)]
pub struct Old {
    /// Its server process.
    pub pid: i32,
    /// User and application.
    pub who: String,
    /// The beginning of its last statement.
    pub query: String,
    /// Its age.
    pub age_ms: i64,
}

fn old(row: &Cells<'_>) -> Result<Old, BadCell> {
    Ok(Old { pid: row.number("pid")?, who: row.text("who")?, query: row.text("query")?, age_ms: row.number("age_ms")? })
}

/// The oldest open transactions on the source.
pub async fn open_transactions(scene: &Scene) -> Result<Vec<Old>, ClusterError> {
    scene.clusters.source.list("old transactions", OLD, STEP_DEADLINE, old).await
}

/// Waits for calm.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let until = tokio::time::Instant::now() + PATIENCE;
    transplanted::foresee(scene).await?;
    loop {
        let (facts, storms) = look(scene).await?;
        if storms.is_empty() {
            return Ok(facts);
        }
        if tokio::time::Instant::now() >= until {
            return Err(StepError::found(format!("not calm within {PATIENCE:?}"), storms));
        }
        // reason: calm has no event; looked at again within PATIENCE.
        tokio::time::sleep(LOOK).await;
    }
}

async fn look(scene: &Scene) -> Result<(Facts, Vec<Finding>), StepError> {
    let mut storms = Vec::new();
    let lag_bytes = lag(scene, &mut storms).await?;
    let age_ms = old_transactions(scene, &mut storms).await?;
    let predicted_ms = predicted(scene, &mut storms);
    let facts = Facts::new().with("lag_bytes", lag_bytes).with("transaction_age_ms_max", age_ms);
    Ok((facts.with("predicted_stall_ms", predicted_ms), storms))
}

async fn lag(scene: &Scene, storms: &mut Vec<Finding>) -> Result<i64, StepError> {
    match scene.feed().await? {
        Feed::Subscriptions(of) => of_subscriptions(scene, of, storms).await,
        Feed::Wal => of_standby(scene, storms).await,
    }
}

async fn of_standby(scene: &Scene, storms: &mut Vec<Finding>) -> Result<i64, StepError> {
    let lag_bytes = scene.clusters.standby_lag(STEP_DEADLINE).await?;
    let max = scene.config.budgets.lag_bytes_max;
    if lag_bytes > max {
        let problem = format!("has not replayed the last {lag_bytes} bytes, limit {max}");
        let fix = "wait for it, or raise budgets.lag_bytes_max";
        storms.push(Finding::red("calm", &scene.config.target.backend, problem, fix));
    }
    Ok(i64::try_from(lag_bytes).unwrap_or(i64::MAX))
}

async fn of_subscriptions(
    scene: &Scene,
    subscriptions: Vec<Subscription>,
    storms: &mut Vec<Finding>,
) -> Result<i64, StepError> {
    let slots = scene.clusters.source.slots(&subscriptions, STEP_DEADLINE).await?;
    let max = scene.config.budgets.lag_bytes_max;
    let mut worst = 0;
    for subscription in &subscriptions {
        let slot = slots.iter().find(|slot| Some(&slot.name) == subscription.slot.as_ref());
        let Some(lag_bytes) = slot.and_then(|slot| slot.lag.applied_bytes) else {
            let fix = "see the target's log: the subscription is disabled, its worker fails, or the slot is gone";
            storms.push(Finding::red("calm", &subscription.name, "nobody reads its slot on the source", fix));
            continue;
        };
        worst = worst.max(lag_bytes);
        if lag_bytes > i64::try_from(max).unwrap_or(i64::MAX) {
            let problem = format!("lags {lag_bytes} bytes behind, limit {max}");
            storms.push(Finding::red(
                "calm",
                &subscription.name,
                problem,
                "wait for it, or raise budgets.lag_bytes_max",
            ));
        }
    }
    Ok(worst)
}

async fn old_transactions(scene: &Scene, storms: &mut Vec<Finding>) -> Result<i64, StepError> {
    let limit_ms = i64::try_from(scene.config.budgets.transaction_age_max.as_millis()).unwrap_or(i64::MAX);
    let oldest = open_transactions(scene).await?;
    for old in oldest.iter().filter(|old| old.age_ms > limit_ms) {
        let problem = format!("transaction is {} ms old, limit {limit_ms}: {}", old.age_ms, old.query);
        let fix = "end it or wait for it, or raise budgets.transaction_age_max";
        storms.push(Finding::red("calm", format!("pid {} ({})", old.pid, old.who), problem, fix));
    }
    Ok(oldest.iter().map(|old| old.age_ms).max().unwrap_or(0))
}

fn predicted(scene: &Scene, storms: &mut Vec<Finding>) -> Option<u64> {
    let silence = scene.heartbeat.as_ref().map(Heartbeat::silence).unwrap_or_default();
    if silence > SILENCE_MAX {
        let problem = format!("no heartbeat has arrived on the target for {silence:.1?}");
        let fix = "replication stands: see the target's log and the subscription; it is looked at again until it moves";
        storms.push(Finding::red("calm", "heartbeat", problem, fix));
        return None;
    }
    let travel = scene.heartbeat.as_ref().and_then(|heartbeat| heartbeat.travel_max(BEATS));
    let budget = scene.config.budgets.stall;
    let Some(travel) = travel else {
        storms.push(Finding::red(
            "calm",
            "heartbeat",
            "too few beats have arrived",
            "see why the subscription is slow",
        ));
        return None;
    };
    let promotion = match scene.config.replication {
        Replication::Logical { .. } => Duration::ZERO,
        Replication::Physical => PROMOTION,
    };
    let predicted = travel + FIXED + promotion;
    if predicted > budget {
        let problem =
            format!("a change takes {travel:?} to arrive: the stall would be about {predicted:?}, budget {budget:?}");
        storms.push(Finding::red("calm", "heartbeat", problem, "wait for a quieter moment, or raise budgets.stall"));
    }
    u64::try_from(predicted.as_millis()).ok()
}

/// Nothing was done.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// Calm may end at any moment; what it was for is behind us.
pub async fn verify(_scene: &Scene) -> Result<(), StepError> {
    Ok(())
}
