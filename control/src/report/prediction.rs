//! What a cutover would take, by a rehearsal: parts that were measured, and parts that had to be estimated, from what.
//!
//! Invariant: pure; the parts add up to the prediction.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::plan::Step;
use crate::report::{ABORT_ANSWERED, PAUSE_SENT, Report, SEQUENCES_READ, ms};

/// Setting one sequence on a server nearby.
const SETVAL_MS: f64 = 0.05;

/// From the order to promote a standby to the end of its recovery; measured on PostgreSQL 15: 78 to 139 ms.
pub const PROMOTION: Duration = Duration::from_millis(110);

const PROMOTIONS: &str = "a rehearsal never promotes; promotions of PostgreSQL 15 took 78 to 139 ms";

/// What the step that would promote says in a rehearsal, as `false`.
pub const PROMOTED: &str = "promoted";

/// How long clients would be held.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// From the first PAUSE sent to the last RESUME answered.
    pub pause_ms: f64,
    /// What that consists of, in order.
    pub parts: Vec<Part>,
}

/// One step's part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    /// Which step.
    pub step: Step,
    /// How much of it clients wait for.
    pub ms: f64,
    /// Where the figure comes from.
    pub known: Known,
}

/// Where a figure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "how", content = "from")]
pub enum Known {
    /// The rehearsal did it.
    Measured,
    /// The rehearsal did something like it.
    Estimated(&'static str),
}

impl Prediction {
    /// Adds up; `None` where the rehearsal held nobody.
    pub fn of(report: &Report) -> Option<Prediction> {
        let (paused_us, resumed_us) = report.pause_us()?;
        let sent = report.observations.iter().find(|seen| seen.what == PAUSE_SENT)?;
        let answered = report.observations.iter().find(|seen| seen.what == ABORT_ANSWERED)?;
        let asked_us = answered.facts.0.get("asked_us")?.as_u64()?;
        let decision_ms = ms(answered.at_us.saturating_sub(asked_us));
        let resume_ms = ms(resumed_us.saturating_sub(answered.at_us));
        let number = |key: &str| {
            let read = report.observations.iter().rfind(|seen| seen.what == SEQUENCES_READ)?;
            read.facts.0.get(key)?.as_f64()
        };
        let sequences_ms = number("ms").unwrap_or(0.0) + number("count").unwrap_or(0.0) * SETVAL_MS;
        let estimated = |step, ms, from| Part { step, ms, known: Known::Estimated(from) };
        let mut parts: Vec<Part> = Vec::new();
        for line in report.steps.iter().filter(|line| line.name.holds_clients()) {
            // Opening the epoch holds nobody: the pause counts from the first PAUSE.
            let unheld_ms = if line.name == Step::Paused { ms(sent.at_us.saturating_sub(line.at_us)) } else { 0.0 };
            let ms = (line.ms - unheld_ms).max(0.0);
            let left_out = line.facts.0.get(PROMOTED).and_then(serde_json::Value::as_bool) == Some(false);
            parts.push(if left_out {
                // A rehearsal never promotes.
                estimated(line.name, PROMOTION.as_secs_f64() * 1000.0, PROMOTIONS)
            } else {
                Part { step: line.name, ms, known: Known::Measured }
            });
        }
        parts.push(estimated(
            Step::Durable,
            sequences_ms + decision_ms,
            "reading the sequences once more, 0.05 ms for each, and one commit like the abort's",
        ));
        parts.push(estimated(Step::Decided, 2.0 * decision_ms, "two commits like the abort's, one on either server"));
        parts.push(estimated(
            Step::Switched,
            3.0 * decision_ms,
            "reading the decision, the evidence and a file, each like the abort's commit",
        ));
        // A rehearsal's RESUME waits for every proxy to read the abort; that of a cutover asks no server.
        parts.push(estimated(
            Step::Resumed,
            resume_ms.min(decision_ms),
            "an answer of every proxy, no longer than the abort's commit",
        ));
        parts.sort_by_key(|part| part.step);
        debug_assert!(paused_us <= resumed_us, "a run resumes after it paused");
        Some(Prediction { pause_ms: parts.iter().map(|part| part.ms).sum(), parts })
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Known::Measured => f.write_str("measured"),
            Known::Estimated(from) => write!(f, "estimated: {from}"),
        }
    }
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "a cutover would hold clients for about {:.1} ms:", self.pause_ms)?;
        for part in &self.parts {
            writeln!(f, "  {:<13}{:>10.1} ms  {}", part.step, part.ms, part.known)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::event::{Decision, Ending, Event, Facts};
    use crate::plan::Goal;
    use crate::report::tests::{committed, fold};
    use crate::report::{RESUME_ANSWERED, StepOutcome};

    use super::*;

    fn rehearsed() -> Report {
        let goal = Goal::Rehearsal;
        let mut events: Vec<Event> = committed().into_iter().filter(|event| !of_the_way_forward(event)).collect();
        if let Some(Event::Began(began)) = events.first_mut() {
            began.goal = goal;
        }
        let seen = |what: &str, facts| Event::Observed { what: what.into(), facts };
        events.push(Event::Turned);
        // Records are 5 ms apart: the abort took 3 ms, resuming 15.
        let answered_us = 1_700_000_000_000_000 + events.len() as u64 * 5_000;
        events.push(seen(ABORT_ANSWERED, Facts::new().with("asked_us", answered_us - 3_000)));
        events.push(Event::Decided { outcome: Decision::Abort });
        events.push(Event::Undone { step: Step::Fenced });
        events.push(seen(RESUME_ANSWERED, Facts::new()));
        events.push(Event::Undone { step: Step::Paused });
        events.push(seen(SEQUENCES_READ, Facts::new().with("ms", 2.0).with("count", 20)));
        events.push(Event::Ended { ending: Ending::Rehearsed });
        fold(events)
    }

    /// What a rehearsal does not do.
    fn of_the_way_forward(event: &Event) -> bool {
        if let Event::Started { step } | Event::Finished { step, .. } = event {
            return *step >= Step::Decided || *step == Step::Durable;
        }
        matches!(event, Event::Decided { .. } | Event::Ended { .. })
            || matches!(event, Event::Observed { what, .. } if what == RESUME_ANSWERED)
    }

    #[test]
    fn the_parts_are_those_of_a_cutover_and_add_up() {
        let report = rehearsed();
        let prediction = report.prediction.clone().unwrap();
        let steps: Vec<Step> = prediction.parts.iter().map(|part| part.step).collect();
        assert_eq!(steps, Step::ALL.into_iter().filter(|step| step.holds_clients()).collect::<Vec<_>>());
        let part = |step| prediction.parts.iter().find(|part| part.step == step).unwrap().ms;
        // It began, opened its epoch (5 ms each), then sent the PAUSE: the last 5 ms count.
        assert!((part(Step::Paused) - 5.0).abs() < 0.001, "{prediction}");
        assert!((part(Step::Durable) - (2.0 + 1.0 + 3.0)).abs() < 0.001, "{prediction}");
        assert!((part(Step::Decided) - 6.0).abs() < 0.001, "{prediction}");
        // RESUME took 15 ms, but on the source, after every proxy had read the abort.
        assert!((part(Step::Switched) - 9.0).abs() < 0.001, "{prediction}");
        assert!((part(Step::Resumed) - 3.0).abs() < 0.001, "{prediction}");
        let sum: f64 = prediction.parts.iter().map(|part| part.ms).sum();
        assert!((sum - prediction.pause_ms).abs() < 0.001);
        assert_eq!(report.outcome, Ending::Rehearsed);
        assert_eq!(report.steps[3].outcome, StepOutcome::Undone);
        assert!(report.to_string().contains("estimated: two commits"), "{report}");
    }

    #[test]
    fn only_a_rehearsal_predicts() {
        assert_eq!(fold(committed()).prediction, None);
    }
}
