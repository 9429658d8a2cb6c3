//! S4b: every session that keeps its server connection gets a copy on the target, on every proxy, all or none.
//!
//! Invariant: a session that can't be moved stops the cutover before clients are held, and again here. A copy belongs to
//! the pause: whoever resumes on the source closes it.

use std::time::Duration;

use pgcutover_api::command::{Command, Transplant, Warrant};
use pgcutover_api::rows::{Fate, SessionRow, TransplantRow, YesNo};

use crate::finding::Finding;
use crate::proxies::{Proxy, ProxyError};
use crate::state::Facts;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo};

/// Reading and restoring a few hundred sessions; a session in trouble is given up sooner.
const ANSWER: Duration = STEP_DEADLINE.saturating_sub(Duration::from_millis(200));

/// What a client can do that holds a cutover up.
const FIX: &str = "let this client disconnect, or pool its user in transaction mode";

/// Makes the copies.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let rows = transplant(scene).await?;
    let longest = rows.iter().map(|row| row.probe_us + row.restore_us).max().unwrap_or(0);
    Ok(Facts::new().with("sessions_moved", rows.len()).with("session_us_max", longest))
}

/// RESUME on the source closes the copies.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// The copies are there: asked again, a proxy answers what it has done.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    transplant(scene).await.map(drop)
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

/// Refuses while sessions keep their server connection that could not be moved when they were last looked at.
pub async fn foresee(scene: &Scene) -> Result<(), StepError> {
    let of_proxies = scene.fleet.all(|proxy| proxy.sessions(&scene.config.database)).await?;
    let found: Vec<Finding> = of_proxies.iter().flat_map(|(proxy, rows)| tied(proxy, rows)).collect();
    if found.is_empty() { Ok(()) } else { Err(refusal(found)) }
}

/// What a proxy's sessions say of themselves that a cutover can't go on with.
pub fn tied(proxy: &str, sessions: &[SessionRow]) -> Vec<Finding> {
    sessions.iter().filter(|row| row.movable == YesNo::No).map(|row| finding(proxy, row)).collect()
}

fn finding(proxy: &str, row: &SessionRow) -> Finding {
    let who = format!("{proxy}: {} from {}:{} ({})", row.user, row.addr, row.port, row.application_name);
    let problem = format!("its session cannot be moved ({} pooling): {}", row.pool_mode, row.reason);
    Finding::red("transplanted", who, problem, FIX)
}

fn refusal(sessions: Vec<Finding>) -> StepError {
    StepError::found(format!("{} sessions cannot be moved", sessions.len()), sessions)
}
