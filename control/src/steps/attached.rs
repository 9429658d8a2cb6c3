//! S10: what led to the target is dropped, and the old source follows the new one.
//!
//! Invariant: no client waits for it, and the cutover stands whatever becomes of it: what could not be attached is told, with
//! the command that does it later.

use crate::clusters::Role;
use crate::config::Replication;
use crate::event::Facts;
use crate::finding::Finding;
use crate::steps::reverse::{self, Attached, Served, Way, Which};
use crate::steps::{Scene, StepError, Undo, promoted};

/// Attaches.
pub async fn run(scene: &mut Scene) -> Result<Facts, StepError> {
    // Its rows would still travel the old way.
    scene.heartbeat = None;
    if scene.config.replication == Replication::Physical {
        scene.find(promoted::way_back(scene));
        return Ok(Facts::new().with("enabled", false).with("attached", false));
    }
    let enabled = scene.config.way_back.enabled;
    let facts = Facts::new().with("enabled", enabled);
    let claim = scene.claim()?;
    let way = Way::of(&scene.config, &scene.clusters, Served { by: Role::Target, claim });
    let outcome = if enabled { way.attach().await } else { without(&way).await };
    let (facts, finding) = match outcome {
        Ok(Attached::Follows { name, dropped }) => {
            (facts.with("attached", true).with("subscription", name).with("dropped", dropped), None)
        }
        Ok(Attached::None) => (facts.with("attached", false), None),
        Ok(Attached::Stranger(_)) => {
            let error = StepError::plain("the old source is not fenced by this epoch");
            (facts.with("attached", false), Some(way.not_attached(&error)))
        }
        Err(error) => (facts.with("attached", false), Some(told(&way, enabled, &error))),
    };
    if let Some(finding) = finding {
        scene.find(finding);
    }
    Ok(facts)
}

/// No way back is wanted. One that led here has served its purpose: kept, it would feed what no longer serves.
async fn without(way: &Way<'_>) -> Result<Attached, StepError> {
    way.detach(Which::Ours).await.map(|_| Attached::None)
}

fn told(way: &Way<'_>, enabled: bool, error: &StepError) -> Finding {
    if enabled {
        return way.not_attached(error);
    }
    let fix = "run 'proxyctl way-back drop' once this is mended";
    Finding::red("attached", way.name(), format!("what led here could not be dropped: {error}"), fix)
}

/// Finishes what a run that died left: a decided move whose old source does not follow yet. At the start of a run, before
/// anything is judged; a run to the server that serves already ends here.
pub async fn finish(scene: &mut Scene) -> Result<(), StepError> {
    let Some(served) = reverse::served(&scene.config, &scene.clusters).await? else { return Ok(()) };
    let way = Way::of(&scene.config, &scene.clusters, served);
    let mut red = Vec::new();
    let mut left = None;
    match way.attach().await {
        Ok(Attached::Follows { .. } | Attached::None) => {}
        Ok(Attached::Stranger(offer)) => left = Some(offer),
        Err(error) => red.push(way.not_attached(&error)),
    }
    if served.by == Role::Target {
        let problem = format!("is served by {} already, by epoch {}", way.serving.1.backend, served.claim.epoch);
        let fix = match scene.config.replication {
            Replication::Logical { .. } => "nothing is left to do; 'proxyctl rollback' leads back".to_owned(),
            Replication::Physical => {
                format!("nothing is left to do; back: rebuild the old server as a standby, {}", promoted::RETURN)
            }
        };
        red.push(Finding::red("armed", &scene.config.database, problem, fix));
    }
    if let Some(offer) = left {
        let kept = offer.kept_bytes.unwrap_or_default();
        let problem = format!("a way back that nobody can take any more keeps {kept} bytes of WAL");
        scene.find(Finding::yellow("way_back", offer.slot, problem, "run 'proxyctl way-back drop'"));
    }
    let Some(first) = red.first() else { return Ok(()) };
    Err(StepError::found(format!("{}: {}", first.object, first.problem), red))
}

/// Past the point of no return.
pub async fn undo(_scene: &Scene) -> Result<Undo, StepError> {
    Ok(Undo::Nothing)
}
