//! S9, second half: every proxy lets its clients go, on the target.
//!
//! Invariant: a proxy resumes only where its own route has reached the epoch (PROTOCOL R7); it sees to that itself.

use std::time::Duration;

use pgcutover_api::command::{Command, ResumeWith, Warrant};

use crate::event::Facts;
use crate::finding::Finding;
use crate::proxies::{Proxy, ProxyError, SHOW_DEADLINE};
use crate::report;
use crate::report::timeline::Moment;
use crate::roster;
use crate::steps::{STEP_DEADLINE, Scene, StepError, Undo, evidence, kept, paused, switched};

/// Between two looks at a proxy that did not answer well.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Resumes all of them at once, then waits for those that have to follow by themselves.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    let claim = scene.claim()?;
    let database = scene.config.database.clone();
    let order = Command::ResumeWith(ResumeWith { database, warrant: Warrant::Claim(claim) });
    let here: &Scene = scene;
    let answers = here
        .fleet
        .each(|proxy| evidence::answered(here, Moment::Resumed, proxy.name(), proxy.order(&order, SHOW_DEADLINE)));
    let answers = answers.await;
    let unconfirmed = answers.iter().filter(|(_, answer)| answer.is_err()).count();
    // Whoever answered well is looked at too: what counts is where it routes.
    let all: Vec<ProxyError> =
        answers.into_iter().map(|(proxy, answer)| answer.err().unwrap_or_else(|| astray(proxy))).collect();
    scene.observe(report::RESUME_ANSWERED, Facts::new());
    if let Some(leases) = scene.leases.take() {
        leases.stop().await;
    }
    let (mut missed, behind) = tokio::join!(stragglers(scene, all), kept::behind(scene, claim));
    evidence::resumed(scene).await;
    missed.extend(behind);
    missed.extend(scene.absent.iter().cloned());
    if !missed.is_empty() {
        return Err(switched::told(missed));
    }
    latecomers(scene).await;
    // A target that was once a source has a gate: its evidence is there, the no-op is cheaper.
    let settled = scene.clusters.target.settle(&scene.turn()?, STEP_DEADLINE).await.is_ok();
    Ok(Facts::new().with("unconfirmed", unconfirmed).with("target_gate_settled", settled))
}

/// Proxies that appeared or vanished while the run went on: they held and followed by themselves, or they are gone.
async fn latecomers(scene: &mut Scene) {
    for change in roster::changes(&scene.config, &scene.clusters.target, &scene.fleet).await {
        let (object, problem) = paused::changed(&change);
        let fix = "nothing: whoever serves the database follows the decision by itself; 'proxyctl status' lists them";
        scene.find(Finding::yellow("resumed", object, problem, fix));
    }
}

fn astray(proxy: &str) -> ProxyError {
    let message = "it resumed, but it does not route to the target".to_owned();
    ProxyError { proxy: proxy.to_owned(), sqlstate: Some("55000".to_owned()), message }
}

/// Those that do not serve the target after all the patience there is.
async fn stragglers(scene: &Scene, mut missed: Vec<ProxyError>) -> Vec<ProxyError> {
    let until = tokio::time::Instant::now() + switched::PATIENCE;
    loop {
        let mut still = Vec::new();
        for error in missed {
            let proxy = scene.fleet.iter().find(|proxy| proxy.name() == error.proxy);
            let there = match proxy {
                Some(proxy) => serves_target(scene, proxy).await,
                None => false,
            };
            if !there {
                still.push(error);
            }
        }
        if still.is_empty() || tokio::time::Instant::now() >= until {
            return still;
        }
        missed = still;
        // reason: a straggler follows by itself; looked at again within the deadline.
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn serves_target(scene: &Scene, proxy: &Proxy) -> bool {
    let open = proxy.gate(&scene.config.database).await.is_ok_and(|gate| gate.serves());
    open && switched::routes_to_target(scene, proxy).await
}

/// Past the point of no return.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}

/// Every proxy serves the target.
pub async fn verify(scene: &Scene) -> Result<(), StepError> {
    for proxy in scene.fleet.iter() {
        if !serves_target(scene, proxy).await {
            return Err(StepError::plain(format!("proxy {} does not serve the target yet", proxy.name())));
        }
    }
    Ok(())
}
