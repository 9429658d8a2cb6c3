//! S4b: every session that keeps its server connection gets a copy on the target, on every proxy, all or none.
//!
//! Invariant: a session that can't be moved, and that its database's policy does not let go, stops the cutover before
//! clients are held, and again here. A copy belongs to the pause: whoever resumes on the source closes it.

use std::time::Duration;

use pgcutover_api::command::{Command, Transplant, Warrant};
use pgcutover_api::rows::{Fate, PoolMode, Prospect, SessionRow, TransplantRow};

use crate::config::Replication;
use crate::event::Facts;
use crate::finding::Finding;
use crate::proxies::{Proxy, ProxyError};
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo, inspection};

/// Reading and restoring a few hundred sessions; a session in trouble is given up sooner.
const ANSWER: Duration = STEP_DEADLINE.saturating_sub(Duration::from_millis(200));

/// Between two looks at sessions that are waited for.
const LOOK: Duration = Duration::from_millis(200);

/// What to do about a client that holds a cutover up.
const FIX: &str =
    "let this client disconnect, pool its user in transaction mode, or set session_policy = \"disconnect\"";

/// Makes the copies.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    if scene.config.replication == Replication::Physical {
        return nobody_kept(scene).await.map(|()| Facts::new().with("sessions_moved", 0));
    }
    let rows = transplant(scene).await?;
    let count = |wanted: fn(&TransplantRow) -> bool| rows.iter().filter(|row| wanted(row)).count();
    let max = |part: fn(&TransplantRow) -> u64| rows.iter().map(part).max().unwrap_or(0);
    Ok(Facts::new()
        .with("sessions_moved", count(|row| row.verdict == Fate::Moved))
        .with("sessions_leaving", count(|row| row.verdict == Fate::Leaves))
        .with("sessions_known_before", count(|row| row.verdict == Fate::Moved && row.probe_us == 0))
        .with("probe_us_max", max(|row| row.probe_us))
        .with("restore_us_max", max(|row| row.restore_us)))
}

/// RESUME on the source closes the copies.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// The copies are there: asked again, a proxy answers what it has done.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    if scene.config.replication == Replication::Physical {
        return nobody_kept(scene).await;
    }
    transplant(scene).await.map(drop)
}

/// A standby restores no session: LISTEN and advisory locks of what is read-only, numbers drawn from sequences.
async fn nobody_kept(scene: &Scene) -> Result<(), StepError> {
    let of_proxies = scene.fleet.all(|proxy| proxy.sessions(&scene.config.database)).await?;
    let found: Vec<Finding> = of_proxies.iter().flat_map(|(proxy, rows)| kept(proxy, rows)).collect();
    if found.is_empty() { Ok(()) } else { Err(refusal(found)) }
}

/// Sessions that keep their server, which a physical move does not take along yet.
pub fn kept(proxy: &str, sessions: &[SessionRow]) -> Vec<Finding> {
    let kept = sessions.iter().filter(|row| row.pool_mode == PoolMode::Session);
    let told = kept.map(|row| {
        let who = format!("{proxy}: {} from {}:{} ({})", row.user, row.addr, row.port, row.application_name);
        let problem = "is pooled by session: a standby can't be given its LISTEN, locks and sequences (replication.kind = 'physical')";
        let fix = "pool its user in transaction mode, let it disconnect, or move logically";
        Finding::red("transplanted", who, problem, fix)
    });
    told.collect()
}

async fn transplant(scene: &Scene) -> Result<Vec<TransplantRow>, StepError> {
    let warrant = Warrant::Claim(scene.claim()?);
    let (database, backend) = (scene.config.database.clone(), scene.config.target.backend.clone());
    let order = Command::Transplant(Transplant { database, backend, warrant });
    let of_proxies = scene.fleet.all(|proxy| moved(proxy, &order)).await?;
    let refused = |row: &&TransplantRow| row.verdict == Fate::Refused;
    let found: Vec<Finding> = of_proxies
        .iter()
        .flat_map(|(proxy, rows)| rows.iter().filter(refused).map(move |row| refusal_of(proxy, row)))
        .collect();
    if found.is_empty() { Ok(of_proxies.into_iter().flat_map(|(_, rows)| rows).collect()) } else { Err(refusal(found)) }
}

async fn moved(proxy: &Proxy, order: &Command) -> Result<Vec<TransplantRow>, ProxyError> {
    proxy.rows(order, ANSWER).await
}

fn refusal_of(proxy: &str, row: &TransplantRow) -> Finding {
    let who = format!("{proxy}: client {} of {}", row.client_id, row.user);
    Finding::red("transplanted", who, format!("its session cannot be moved: {}", row.reason), FIX)
}

/// Refuses while there are sessions that could not be moved when they were last looked at; those that may be waited for
/// get as long as a drain.
pub async fn foresee(scene: &Scene) -> Result<(), StepError> {
    if scene.config.replication == Replication::Physical {
        return nobody_kept(scene).await;
    }
    let until = tokio::time::Instant::now() + scene.config.budgets.drain;
    loop {
        let of_proxies = scene.fleet.all(|proxy| proxy.sessions(&scene.config.database)).await?;
        let of = |verdict| {
            let rows = of_proxies.iter().flat_map(move |(proxy, rows)| rows.iter().map(move |row| (*proxy, row)));
            let rows = rows.filter(move |(_, row)| row.verdict == verdict);
            rows.map(|(proxy, row)| finding(proxy, row, Finding::red)).collect::<Vec<_>>()
        };
        let (stuck, waiting) = (of(Prospect::Refuses), of(Prospect::Waits));
        if !stuck.is_empty() {
            return Err(refusal(stuck));
        }
        if waiting.is_empty() {
            return Ok(());
        }
        if tokio::time::Instant::now() >= until {
            return Err(refusal(waiting));
        }
        // reason: what a client does to its session has no event; looked at again within the drain budget.
        tokio::time::sleep(LOOK).await;
        scene.fleet.all(|proxy| inspection::prepare(&scene.config, proxy)).await?;
    }
}

/// What a proxy's sessions say of themselves that a cutover can't go on with, or ends.
pub fn tied(proxy: &str, sessions: &[SessionRow]) -> Vec<Finding> {
    let told = |row: &SessionRow| match row.verdict {
        Prospect::Refuses => Some(finding(proxy, row, Finding::red)),
        Prospect::Waits | Prospect::Leaves => Some(finding(proxy, row, Finding::yellow)),
        // Who could not be looked at is looked at again under the pause.
        Prospect::Moves | Prospect::Unknown => None,
    };
    sessions.iter().filter_map(told).collect()
}

fn finding(proxy: &str, row: &SessionRow, level: fn(&str, String, String, &'static str) -> Finding) -> Finding {
    let who = format!("{proxy}: {} from {}:{} ({})", row.user, row.addr, row.port, row.application_name);
    let then = match row.verdict {
        Prospect::Waits => "; it is waited for before clients are held",
        Prospect::Leaves => "; the cutover disconnects it",
        Prospect::Moves | Prospect::Refuses | Prospect::Unknown => "",
    };
    let problem = format!("its session cannot be moved ({} pooling): {}{then}", row.pool_mode, row.reason);
    level("transplanted", who, problem, FIX)
}

fn refusal(sessions: Vec<Finding>) -> StepError {
    StepError::found(format!("{} sessions cannot be moved", sessions.len()), sessions)
}
