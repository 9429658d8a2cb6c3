//! The steps of a cutover, their order, and the point of no return: they live here only.
//!
//! Invariant: pure; `Step`'s derived order is the order in which steps run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One step of a cutover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Objects made, gates armed, sentinel seen through, proxies prepared.
    Armed,
    /// Nothing would make the pause long.
    Calm,
    /// The epoch is open and every proxy holds its clients.
    Paused,
    /// The source refuses writes from everyone.
    Fenced,
    /// The target has applied everything.
    CaughtUp,
    /// Live sessions sit on the target.
    Transplanted,
    /// What was applied is on the target's disk; sequences are set.
    Durable,
    /// Changes made on the target from here on can be brought back.
    WayBack,
    /// Everything a commit relies on was looked at once more.
    Checked,
    /// The decision is recorded.
    Decided,
    /// Every proxy routes to the target.
    Switched,
    /// Every proxy lets its clients go.
    Resumed,
    /// What led here is dropped, the old server follows the new one.
    Attached,
}

/// What happens when a step fails, for `proxyctl plan` and the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// No client has noticed anything: stop.
    Stop,
    /// `decide(abort)`, open the fence, resume on the source.
    Abort,
    /// Ask until the outcome is known, then do as it says.
    AskAgain,
    /// Decided: go forward.
    GoForward,
}

/// What a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// To move the database.
    #[default]
    Cutover,
    /// To learn what that would take: everything before the decision that leaves nothing behind, then an abort.
    Rehearsal,
}

impl Goal {
    /// The step after `last` (the first one after `None`); none when a run with this goal has taken its last.
    pub fn step_after(self, last: Option<Step>) -> Option<Step> {
        Step::ALL.into_iter().find(|step| Some(*step) > last && self.takes(*step))
    }

    /// Whether a run with this goal takes the step: sequences of the target are not set for a rehearsal, and it never decides
    /// for the target.
    pub fn takes(self, step: Step) -> bool {
        match self {
            Goal::Cutover => true,
            Goal::Rehearsal => step < POINT_OF_NO_RETURN && step != Step::Durable,
        }
    }
}

/// The one step after which nothing goes back.
pub const POINT_OF_NO_RETURN: Step = Step::Decided;

impl Step {
    /// Every step, in order.
    pub const ALL: [Step; 13] = [
        Step::Armed,
        Step::Calm,
        Step::Paused,
        Step::Fenced,
        Step::CaughtUp,
        Step::Transplanted,
        Step::Durable,
        Step::WayBack,
        Step::Checked,
        Step::Decided,
        Step::Switched,
        Step::Resumed,
        Step::Attached,
    ];

    /// Its name in journals, reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Step::Armed => "armed",
            Step::Calm => "calm",
            Step::Paused => "paused",
            Step::Fenced => "fenced",
            Step::CaughtUp => "caught_up",
            Step::Transplanted => "transplanted",
            Step::Durable => "durable",
            Step::WayBack => "way_back",
            Step::Checked => "checked",
            Step::Decided => "decided",
            Step::Switched => "switched",
            Step::Resumed => "resumed",
            Step::Attached => "attached",
        }
    }

    /// Whether clients are held while it runs.
    pub fn holds_clients(self) -> bool {
        (Step::Paused..=Step::Resumed).contains(&self)
    }

    /// What happens when it fails.
    pub fn on_failure(self) -> OnFailure {
        if self > POINT_OF_NO_RETURN {
            OnFailure::GoForward
        } else if self == POINT_OF_NO_RETURN {
            OnFailure::AskAgain
        } else if self.holds_clients() {
            OnFailure::Abort
        } else {
            OnFailure::Stop
        }
    }

    /// What it does, in one line for people.
    pub fn purpose(self) -> &'static str {
        match self {
            Step::Armed => {
                "make our objects (target first), arm the gates, see a sentinel through, prepare the proxies"
            }
            Step::Calm => "lag, old transactions and sessions are within their limits",
            Step::Paused => "open the epoch, pause every proxy, let open transactions end",
            Step::Fenced => "flip the gate on the source, wait for writers that passed it earlier",
            Step::CaughtUp => "wait for the sentinel and the replay position on every subscription, or on the standby",
            Step::Transplanted => "give every session that keeps its server a copy on the target, all or none",
            Step::Durable => "set sequences and flush what was applied, in one synchronous transaction on the target",
            Step::WayBack => "make the slot for the way back; a physical standby is promoted",
            Step::Checked => "look once more at everything the decision relies on",
            Step::Decided => "record the commit on the source (point of no return), its evidence on the target",
            Step::Switched => "every proxy reads the commit and routes to the target",
            Step::Resumed => "every proxy lets its clients go",
            Step::Attached => {
                "drop the subscription that led here, let the old server follow the new one: the way back"
            }
        }
    }
}

/// The plan of a cutover.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plan;

impl Plan {
    /// The steps, in order.
    pub fn steps(self) -> impl Iterator<Item = Step> {
        Step::ALL.into_iter()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// No step has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{name}' is not a step; steps are {}", Step::ALL.map(Step::name).join(", "))]
pub struct UnknownStep {
    name: String,
}

impl FromStr for Step {
    type Err = UnknownStep;

    fn from_str(name: &str) -> Result<Step, UnknownStep> {
        Step::ALL.into_iter().find(|step| step.name() == name).ok_or_else(|| UnknownStep { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_the_order_of_the_list() {
        let mut sorted = Step::ALL;
        sorted.sort();
        assert_eq!(sorted, Step::ALL);
        assert_eq!(walked(Goal::Cutover), Step::ALL);
    }

    fn walked(goal: Goal) -> Vec<Step> {
        let mut walked = Vec::new();
        while let Some(next) = goal.step_after(walked.last().copied()) {
            walked.push(next);
        }
        walked
    }

    #[test]
    fn a_rehearsal_takes_what_leaves_nothing_behind_and_never_decides() {
        let walked = walked(Goal::Rehearsal);
        assert_eq!(walked.first(), Some(&Step::Armed));
        assert_eq!(walked.last(), Some(&Step::Checked));
        assert!(!walked.contains(&Step::Durable));
    }

    #[test]
    fn the_fence_comes_before_catch_up_and_the_evidence_of_catch_up_before_the_decision() {
        assert!(Step::Paused < Step::Fenced && Step::Fenced < Step::CaughtUp);
        assert!(Step::Checked < POINT_OF_NO_RETURN && POINT_OF_NO_RETURN < Step::Switched);
    }

    #[test]
    fn names_read_back_and_equal_those_in_the_journal() {
        for step in Plan.steps() {
            assert_eq!(step.name().parse(), Ok(step));
            assert_eq!(serde_json::to_value(step).unwrap(), step.name());
        }
        assert!("nonsense".parse::<Step>().is_err());
    }

    #[test]
    fn only_steps_that_hold_clients_need_an_abort() {
        let kinds = Plan.steps().map(Step::on_failure).collect::<Vec<_>>();
        assert_eq!(kinds.iter().filter(|kind| **kind == OnFailure::Stop).count(), 2);
        assert_eq!(kinds.iter().filter(|kind| **kind == OnFailure::AskAgain).count(), 1);
        assert_eq!(kinds[10..], [OnFailure::GoForward; 3]);
    }
}
