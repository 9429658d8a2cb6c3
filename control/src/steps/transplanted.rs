//! S4b: no live session has to be moved. Moving them is not built yet; this step proves that none needs it.
//!
//! Invariant: a session that is tied to a server connection stops the cutover before clients are held, and again here.

use pgcutover_api::rows::{SessionRow, YesNo};

use crate::finding::Finding;
use crate::state::Facts;
use crate::steps::{Scene, StepError, Undo};

/// Proves it.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let sessions = tied(scene).await?;
    if sessions.is_empty() { Ok(Facts::new().with("sessions_moved", 0)) } else { Err(refusal(sessions)) }
}

/// Nothing was moved.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// Still none is tied.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    let sessions = tied(scene).await?;
    if sessions.is_empty() { Ok(()) } else { Err(refusal(sessions)) }
}

/// Sessions that keep their server connection and cannot be moved.
async fn tied(scene: &Scene) -> Result<Vec<Finding>, StepError> {
    let of_proxies = scene.fleet.all(|proxy| proxy.sessions(&scene.config.database)).await?;
    let immovable = |row: &SessionRow| row.movable == YesNo::No;
    let found = of_proxies
        .iter()
        .flat_map(|(proxy, rows)| rows.iter().filter(|row| immovable(row)).map(move |row| finding(proxy, row)));
    Ok(found.collect())
}

fn finding(proxy: &str, row: &SessionRow) -> Finding {
    let who = format!("{proxy}: {} from {}:{} ({})", row.user, row.addr, row.port, row.application_name);
    let problem = format!("its session cannot be moved ({} pooling): {}", row.pool_mode, row.reason);
    Finding::red("transplanted", who, problem, "let this client disconnect, or pool its user in transaction mode")
}

fn refusal(sessions: Vec<Finding>) -> StepError {
    StepError::found(format!("{} sessions cannot be moved", sessions.len()), sessions)
}
