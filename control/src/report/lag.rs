//! How late replication was over the run, and where the log stood when it mattered.
//!
//! Invariant: pure; figures are those of the points that were kept, each the worst of its beats.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

use crate::plan::Step;
use crate::report::{Report, ms};

/// The heartbeats: `points` of moment and lag in microseconds, and how many `beats` they stand for.
pub const LAG: &str = "lag";
/// The source's position right after the fence, in the facts of that step.
pub const FENCE_LSN: &str = "fence_lsn";
/// The source's position behind the sentinel.
pub const SENTINEL_LSN: &str = "source_lsn";
/// What the target had replayed when catch-up was over.
pub const REPLAYED_LSN: &str = "target_replayed_lsn";

/// How late replication was.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lag {
    /// Heartbeats that were written.
    pub beats: u64,
    /// The median of the points.
    pub median_ms: f64,
    /// The greatest.
    pub max_ms: f64,
    /// That of the last beat before the fence; none if it never came to that.
    pub at_fence_ms: Option<f64>,
    /// In order.
    pub points: Vec<Point>,
}

/// One or a few beats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Point {
    /// When it was sent, microseconds since 1970.
    pub at_us: u64,
    /// How long it took to arrive.
    pub lag_ms: f64,
}

/// Folds the heartbeats; none in a journal without any.
pub fn lag(report: &Report) -> Option<Lag> {
    let seen = report.observations.iter().rfind(|seen| seen.what == LAG)?;
    let pairs = seen.facts.0.get("points")?.as_array()?;
    let point = |pair: &Value| Some(Point { at_us: pair.get(0)?.as_u64()?, lag_ms: ms(pair.get(1)?.as_u64()?) });
    let points: Vec<Point> = pairs.iter().filter_map(point).collect();
    let mut sorted: Vec<f64> = points.iter().map(|point| point.lag_ms).collect();
    sorted.sort_by(f64::total_cmp);
    let fenced_us = report.steps.iter().rfind(|step| step.name == Step::Fenced).map(|step| step.at_us);
    let before = |at_us: u64| points.iter().rfind(|point| point.at_us <= at_us);
    Some(Lag {
        beats: seen.facts.0.get("beats").and_then(Value::as_u64).unwrap_or(points.len() as u64),
        median_ms: *sorted.get(sorted.len() / 2)?,
        max_ms: *sorted.last()?,
        at_fence_ms: fenced_us.and_then(before).map(|point| point.lag_ms),
        points,
    })
}

impl fmt::Display for Lag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replication lag: median {:.1} ms, max {:.1} ms", self.median_ms, self.max_ms)?;
        self.at_fence_ms.iter().try_for_each(|at_fence_ms| write!(f, ", {at_fence_ms:.1} ms at the fence"))?;
        write!(f, " ({} heartbeats)", self.beats)
    }
}

/// Where the log stood; what was never asked is none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Positions {
    /// The source, right after the fence.
    pub fence: Option<String>,
    /// The source, behind the sentinel.
    pub sentinel: Option<String>,
    /// The target, when it had caught up.
    pub replayed: Option<String>,
}

/// Folds the facts of the steps; none where none of them was taken.
pub fn positions(report: &Report) -> Option<Positions> {
    let fact = |of: Step, key: &str| {
        let step = report.steps.iter().rfind(|step| step.name == of)?;
        step.facts.0.get(key)?.as_str().map(str::to_owned)
    };
    let positions = Positions {
        fence: fact(Step::Fenced, FENCE_LSN),
        sentinel: fact(Step::CaughtUp, SENTINEL_LSN),
        replayed: fact(Step::CaughtUp, REPLAYED_LSN),
    };
    (positions != Positions::default()).then_some(positions)
}

impl Positions {
    /// Those that are known.
    pub fn words(&self) -> String {
        let told = [("fence", &self.fence), ("sentinel", &self.sentinel), ("replayed on the target", &self.replayed)];
        let told = told.iter().filter_map(|(name, lsn)| Some(format!("{name} {}", lsn.as_ref()?)));
        told.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::event::{Event, Facts};
    use crate::report::tests::{committed, fold};

    #[test]
    fn the_curve_has_its_median_its_peak_and_its_last_beat_before_the_fence() {
        let fenced_us = fold(committed()).steps.iter().find(|step| step.name == Step::Fenced).unwrap().at_us;
        let points = json!([
            [fenced_us - 300_000, 2_000],
            [fenced_us - 200_000, 90_000],
            [fenced_us - 100_000, 3_000],
            [fenced_us + 100_000, 4_000],
            [fenced_us + 200_000, 5_000],
        ]);
        let mut events = committed();
        let facts = Facts::new().with("beats", 9).with("points", points);
        events.insert(events.len() - 1, Event::Observed { what: LAG.to_owned(), facts });
        let report = fold(events);
        let lag = report.lag.clone().unwrap();
        assert_eq!((lag.median_ms, lag.max_ms, lag.at_fence_ms, lag.beats), (4.0, 90.0, Some(3.0), 9));
        assert!(
            report
                .to_string()
                .contains("replication lag: median 4.0 ms, max 90.0 ms, 3.0 ms at the fence (9 heartbeats)")
        );
        let page = crate::report::html::page(&report, &crate::report::samples::Samples::default());
        assert_eq!(page.matches("<svg").count(), 2, "steps and lag");
        assert!(page.contains("<polyline"), "the lag is drawn");
    }

    #[test]
    fn where_the_log_stood_comes_from_the_steps() {
        let told = [(Step::Fenced, FENCE_LSN, "0/1A"), (Step::CaughtUp, REPLAYED_LSN, "0/1C")];
        let mut events = committed();
        for event in &mut events {
            if let Event::Finished { step, facts } = event
                && let Some((_, key, lsn)) = told.iter().find(|(of, ..)| of == step)
            {
                *facts = Facts::new().with(key, *lsn);
            }
        }
        let report = fold(events);
        assert!(report.to_string().contains("log: fence 0/1A, replayed on the target 0/1C"), "{report}");
        assert_eq!(report.log.unwrap().sentinel, None);
    }
}
