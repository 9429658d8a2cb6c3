//! The moment at which a run has made both servers equal, kept: a snapshot of each, taken in S7, compared after clients were let
//! go.
//!
//! Invariant: nothing here fails a run or lengthens its pause by more than a fraction of the stall that is allowed: without a
//! pin the run says that it was not verified, and why.

use std::time::Duration;

use crate::clusters::digest::{Floats, Manner, Text};
use crate::clusters::pin::Pin;
use crate::clusters::{Cluster, ClusterError, Clusters, Feed, Sequence, drift};
use crate::config::Replication;
use crate::event::{Ending, Event};
use crate::journal::Record;
use crate::report::verification::{SequencesLine, VERIFICATION, Verification};
use crate::steps::compared::{Unit, compare, units};
use crate::steps::{STEP_DEADLINE, Scene};

/// Decision, switch, resume and way back come before the first question, and take so long at most.
pub const BEFORE_FIRST: Duration = Duration::from_secs(60);

/// 12 prints floats as every later version does.
const SHORT_FLOATS: u32 = 120_000;

/// Where a run is with its two snapshots.
#[derive(Debug, Default)]
pub enum Pinning {
    /// It did not come to it.
    #[default]
    Never,
    /// It does without.
    Without(String),
    /// Both are connected.
    Ahead(Box<Pins>),
    /// Both are taken.
    Taken(Box<Pins>),
}

/// Two connections, one a side, and what they are for.
#[derive(Debug)]
pub struct Pins {
    /// On the source.
    pub source: Pin,
    /// On the target.
    pub target: Pin,
    /// What there is to compare.
    pub units: Vec<Unit>,
}

impl Pins {
    /// Connects to both.
    pub async fn connect(source: &Cluster, target: &Cluster, idle: Duration) -> Result<Pins, ClusterError> {
        let (source, target) = tokio::try_join!(source.pin_ahead(idle), target.pin_ahead(idle))?;
        Ok(Pins { source, target, units: Vec::new() })
    }

    /// In what the two sides differ.
    pub fn manner(&self) -> Manner {
        let older = self.source.version_num.min(self.target.version_num);
        let same_text = self.source.encoding == self.target.encoding;
        Manner {
            floats: if older < SHORT_FLOATS { Floats::ByBits } else { Floats::AsPrinted },
            text: if same_text { Text::AsStored } else { Text::InUtf8 },
        }
    }
}

/// Before anybody is held: two logins, and what the publications carry.
pub async fn ahead(scene: &Scene, feed: &Feed) -> Pinning {
    if !scene.config.verify.enabled {
        return Pinning::Without("[verify] enabled = false".to_owned());
    }
    let of = match feed {
        Feed::Subscriptions(of) => of,
        Feed::Wal => return Pinning::Without(PHYSICAL.to_owned()),
    };
    let (source, target) = (&scene.clusters.source, &scene.clusters.target);
    let connected = async {
        let mut pins = Pins::connect(source, target, scene.config.verify.time_max + BEFORE_FIRST).await?;
        let tables = source.tables(&scene.database, STEP_DEADLINE).await?;
        pins.units = units(&tables, &source.published(of, STEP_DEADLINE).await?);
        Ok::<Pins, ClusterError>(pins)
    };
    match connected.await {
        Ok(pins) => Pinning::Ahead(Box::new(pins)),
        Err(error) => Pinning::Without(error.to_string()),
    }
}

/// Why a physical move is not compared.
pub const PHYSICAL: &str = "the target is the source's copy, byte by byte";

/// Within the pause, beside the checks: both snapshots at once, a round trip. How long it took.
pub async fn take(pinning: Pinning, stall: Duration) -> (Pinning, Option<Duration>) {
    let pins = match pinning {
        Pinning::Ahead(pins) => pins,
        Pinning::Never | Pinning::Without(_) | Pinning::Taken(_) => return (pinning, None),
    };
    // Who may be held for so long may be held for a quarter of it longer, where a server hangs.
    let limit = stall / 4;
    let began = tokio::time::Instant::now();
    let taken = tokio::try_join!(pins.source.take(limit), pins.target.take(limit));
    match taken {
        Ok(_) => (Pinning::Taken(pins), Some(began.elapsed())),
        Err(error) => (Pinning::Without(format!("the moment could not be kept: {error}")), None),
    }
}

/// After clients were let go: compares, tells, lets both snapshots go. `stop` ends it at once.
pub async fn verify(scene: &mut Scene, ending: Ending, stop: impl Future<Output = ()>, tell: &impl Fn(&str)) {
    let pinning = std::mem::take(&mut scene.pinning);
    match ending {
        Ending::Committed | Ending::Unfinished | Ending::Rehearsed => {}
        Ending::Aborted | Ending::Refused | Ending::Undecided => return,
    }
    let mut verification = match pinning {
        Pinning::Taken(pins) => together(scene, &pins, stop, tell).await,
        Pinning::Without(why) => Verification::none(why),
        Pinning::Ahead(_) => Verification::none("no moment was kept"),
        Pinning::Never if scene.journal.records().iter().any(is_verification) => return,
        Pinning::Never if scene.config.replication == Replication::Physical => Verification::none(PHYSICAL),
        Pinning::Never => Verification::none("proxyctl was away when both sides were equal"),
    };
    if verification.none.is_none() && ending != Ending::Rehearsed {
        verification.sequences = sequences(&scene.clusters).await;
    }
    for finding in verification.findings(&fix(scene, ending)) {
        scene.find(finding);
    }
    scene.observe(VERIFICATION, verification.facts());
}

fn is_verification(record: &Record) -> bool {
    matches!(&record.event, Event::Observed { what, .. } if what == VERIFICATION)
}

async fn together(
    scene: &mut Scene,
    pins: &Pins,
    stop: impl Future<Output = ()>,
    tell: &impl Fn(&str),
) -> Verification {
    let mut verification = Verification::default();
    let began = tokio::time::Instant::now();
    let is_whole = tokio::select! {
        biased;
        () = stop => false,
        () = compare(pins, scene.config.verify.time_max, &mut verification, tell) => true,
    };
    if is_whole {
        // What they held back is given free now, not when the server notices that they are gone.
        let _ = tokio::join!(pins.source.release(), pins.target.release());
    } else {
        let clusters = &scene.clusters;
        let _ = tokio::join!(
            clusters.source.end_pin(pins.source.pid, STEP_DEADLINE),
            clusters.target.end_pin(pins.target.pid, STEP_DEADLINE)
        );
        verification.leave_out(pins.units.iter().map(Unit::table), "it was interrupted");
    }
    verification.ms = began.elapsed().as_secs_f64() * 1000.0;
    verification.sort();
    verification
}

/// They are not in any snapshot; those of the target can only have gone further since.
async fn sequences(clusters: &Clusters) -> Option<SequencesLine> {
    let both = tokio::try_join!(clusters.source.sequences(STEP_DEADLINE), clusters.target.sequences(STEP_DEADLINE));
    let (source, target) = both.ok()?;
    // One that begins again at its end may stand anywhere.
    let source: Vec<Sequence> = source.into_iter().filter(|sequence| !sequence.cycles).collect();
    let behind = drift(&source, &target, 0).into_iter();
    let behind = behind.map(|drift| format!("{}: {}", drift.sequence, drift.problem)).collect();
    Some(SequencesLine { compared: source.len(), behind })
}

fn fix(scene: &Scene, ending: Ending) -> String {
    match ending {
        Ending::Rehearsed => {
            "do not cut over before it is known why: somebody writes to the target, or the copy is not whole; \
                              mend these rows there, or copy the table anew, and rehearse again"
                .to_owned()
        }
        Ending::Committed | Ending::Unfinished | Ending::Aborted | Ending::Refused | Ending::Undecided => {
            let back = if scene.config.way_back.enabled { "; 'proxyctl rollback' still leads back" } else { "" };
            format!(
                "clients are on {} and stay there: look at these rows on both servers and mend them on {}{back}",
                scene.config.target.backend, scene.config.target.backend
            )
        }
    }
}
