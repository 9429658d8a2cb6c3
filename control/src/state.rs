//! Where a run stands: a fold over its journal. One function knows every legal move.
//!
//! Invariant: pure. A run whose epoch was opened is never undone, and never ends as aborted, before the abort is
//! decided (PROTOCOL R2); nothing is switched before the commit is (R7).

use pgcutover_api::epoch::Epoch;

use crate::event::{Decision, Ending, Event};
use crate::plan::{Goal, POINT_OF_NO_RETURN, Step};

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was journaled yet.
    Fresh,
    /// No step runs; the next one may start.
    Between,
    /// A step acts.
    Running(Step),
    /// A step failed before the decision: traffic goes back to the source.
    Aborting,
    /// Over.
    Ended(Ending),
}

/// The last step that only looks.
const BEFORE_THE_DECISION: Step = Step::Checked;

/// Where a run stands.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// What it is doing.
    pub phase: Phase,
    /// What it is for.
    pub goal: Goal,
    /// The epoch the store opened for it.
    pub epoch: Option<Epoch>,
    /// The store's answer, once known.
    pub decision: Option<Decision>,
    /// Steps that were started and not undone, in order.
    pub touched: Vec<Step>,
    /// Steps that failed, in order.
    pub failed: Vec<Step>,
    /// Steps that could not be taken back.
    pub stuck: Vec<Step>,
    /// Whether it was taken up after it broke off.
    pub is_continued: bool,
}

impl Default for State {
    fn default() -> State {
        State {
            phase: Phase::Fresh,
            goal: Goal::Cutover,
            epoch: None,
            decision: None,
            touched: Vec::new(),
            failed: Vec::new(),
            stuck: Vec::new(),
            is_continued: false,
        }
    }
}

/// An event that must not follow what was journaled before it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{event} must not follow {phase:?} (epoch {epoch:?}, decision {decision:?})")]
pub struct IllegalEvent {
    /// The event's words.
    pub event: String,
    /// What the run was doing.
    pub phase: Phase,
    /// Its epoch.
    pub epoch: Option<Epoch>,
    /// Its decision.
    pub decision: Option<Decision>,
}

impl State {
    /// The state after every event of a journal.
    pub fn replay<'a>(events: impl IntoIterator<Item = &'a Event>) -> Result<State, IllegalEvent> {
        events.into_iter().try_fold(State::default(), State::next)
    }

    /// The state after one more event. Every legal move is here.
    pub fn next(self, event: &Event) -> Result<State, IllegalEvent> {
        use Phase::{Aborting, Between, Ended, Fresh, Running};
        match (event, self.phase) {
            (Event::Began(began), Fresh) => Ok(State { goal: began.goal, ..self }.in_phase(Between)),
            (Event::Started { step }, Between) if self.may_start(*step) => Ok(self.started(*step)),
            (Event::Opened { epoch }, Running(Step::Paused)) if self.epoch.is_none() => {
                Ok(State { epoch: Some(*epoch), ..self })
            }
            (Event::Finished { step, .. }, Running(running)) if *step == running && self.may_finish(running) => {
                Ok(self.in_phase(Between))
            }
            (Event::Failed { step, .. }, Running(running)) if *step == running => Ok(self.failed(running)),
            (Event::Decided { outcome }, Running(POINT_OF_NO_RETURN)) if self.may_be_decided() => {
                Ok(State { decision: Some(*outcome), ..self })
            }
            (Event::Decided { outcome }, Aborting) if self.may_be_decided() => {
                Ok(self.decided_while_aborting(*outcome))
            }
            (Event::Turned, Between) if self.may_turn() => Ok(self.in_phase(Aborting)),
            (Event::Undone { step }, Aborting) if self.may_undo(*step) => Ok(self.undone(*step)),
            (Event::UndoFailed { step, .. }, Aborting) if self.may_undo(*step) => Ok(self.stuck_at(*step)),
            (Event::Continued { epoch }, _) if self.may_continue(*epoch) => Ok(self.continued(*epoch)),
            (Event::Found { .. } | Event::Observed { .. }, Between | Running(_) | Aborting) => Ok(self),
            (Event::Ended { ending }, Between | Aborting) if self.may_end(*ending) => Ok(self.in_phase(Ended(*ending))),
            _ => Err(self.refuses(event)),
        }
    }

    /// The step that comes next, if the plan goes on.
    pub fn next_step(&self) -> Option<Step> {
        let last = self.touched.last().copied();
        if self.decision == Some(Decision::Commit) {
            // Whatever the run was for and had begun: what follows a commit is its evidence, then the rest of the plan.
            return Goal::Cutover.step_after(last.max(Some(BEFORE_THE_DECISION)));
        }
        self.goal.step_after(last)
    }

    /// Whether nothing is left to do for the run, as far as its journal tells.
    pub fn is_over(&self) -> bool {
        match self.phase {
            Phase::Fresh => true,
            Phase::Between | Phase::Running(_) | Phase::Aborting => false,
            Phase::Ended(Ending::Committed | Ending::Refused) => true,
            Phase::Ended(Ending::Unfinished | Ending::Undecided) => false,
            Phase::Ended(Ending::Aborted | Ending::Rehearsed) => self.stuck.is_empty(),
        }
    }

    /// The step at which a run came to an end that another attempt may not come to: what moves by itself was in the way. What
    /// preflight finds has to be mended first.
    pub fn may_do_better(&self) -> Option<Step> {
        let ended = matches!(self.phase, Phase::Ended(Ending::Aborted | Ending::Refused)) && !self.is_continued;
        self.failed.last().copied().filter(|step| ended && *step > Step::Armed)
    }

    fn may_turn(&self) -> bool {
        self.goal == Goal::Rehearsal && self.next_step().is_none() && self.decision.is_none()
    }

    /// A rehearsal in which nothing failed.
    pub fn is_rehearsed(&self) -> bool {
        self.goal == Goal::Rehearsal && self.failed.is_empty() && !self.is_continued
    }

    fn may_start(&self, step: Step) -> bool {
        self.next_step() == Some(step) && (step <= POINT_OF_NO_RETURN || self.decision == Some(Decision::Commit))
    }

    fn may_finish(&self, step: Step) -> bool {
        match step {
            Step::Paused => self.epoch.is_some(),
            POINT_OF_NO_RETURN => self.decision == Some(Decision::Commit),
            Step::Armed
            | Step::Calm
            | Step::Fenced
            | Step::CaughtUp
            | Step::Transplanted
            | Step::Durable
            | Step::WayBack
            | Step::Checked
            | Step::Switched
            | Step::Resumed
            | Step::Attached => true,
        }
    }

    fn may_be_decided(&self) -> bool {
        self.epoch.is_some() && self.decision.is_none()
    }

    fn may_undo(&self, step: Step) -> bool {
        self.touched.contains(&step) && (self.epoch.is_none() || self.decision == Some(Decision::Abort))
    }

    fn may_end(&self, ending: Ending) -> bool {
        let aborting = self.phase == Phase::Aborting;
        match ending {
            Ending::Committed => {
                let forward = !aborting && self.decision == Some(Decision::Commit);
                forward && self.next_step().is_none() && self.failed.is_empty()
            }
            Ending::Unfinished => !aborting && self.decision == Some(Decision::Commit) && !self.failed.is_empty(),
            Ending::Aborted => aborting && self.decision == Some(Decision::Abort) && !self.is_rehearsed(),
            Ending::Rehearsed => aborting && self.decision == Some(Decision::Abort) && self.is_rehearsed(),
            Ending::Refused => aborting && self.epoch.is_none(),
            // The epoch may be open in the store although its opening was never answered; a rehearsal turns without a
            // failure and may find nobody to record its abort.
            Ending::Undecided => {
                let held = self.failed.iter().any(|step| step.holds_clients());
                let opened = self.epoch.is_some() && (self.is_rehearsed() || self.is_continued);
                aborting && self.decision.is_none() && (held || opened)
            }
        }
    }

    fn in_phase(self, phase: Phase) -> State {
        State { phase, ..self }
    }

    fn started(mut self, step: Step) -> State {
        self.touched.push(step);
        self.in_phase(Phase::Running(step))
    }

    fn failed(mut self, step: Step) -> State {
        self.failed.push(step);
        let forward = self.decision == Some(Decision::Commit);
        self.in_phase(if forward { Phase::Between } else { Phase::Aborting })
    }

    /// A commit that was thought lost was not: everything from there goes forward.
    fn decided_while_aborting(mut self, outcome: Decision) -> State {
        self.decision = Some(outcome);
        match outcome {
            Decision::Abort => self,
            Decision::Commit => {
                // The step of the decision is taken again: its evidence comes before any switch (R10).
                self.touched.retain(|step| *step < POINT_OF_NO_RETURN);
                self.in_phase(Phase::Between)
            }
        }
    }

    fn undone(mut self, step: Step) -> State {
        self.touched.retain(|touched| *touched != step);
        self.stuck.retain(|stuck| *stuck != step);
        self
    }

    fn stuck_at(mut self, step: Step) -> State {
        if !self.stuck.contains(&step) {
            self.stuck.push(step);
        }
        self
    }

    fn may_continue(&self, epoch: Option<Epoch>) -> bool {
        let begun = match self.phase {
            Phase::Fresh | Phase::Ended(Ending::Committed) => false,
            Phase::Ended(Ending::Refused) => epoch.is_some(),
            Phase::Between | Phase::Running(_) | Phase::Aborting | Phase::Ended(_) => true,
        };
        begun && (self.epoch.is_none() || self.epoch == epoch)
    }

    /// Forward from the first step after the decision that was not finished, or back over everything before it.
    fn continued(mut self, epoch: Option<Epoch>) -> State {
        let forward = self.decision == Some(Decision::Commit);
        if forward {
            let running = if let Phase::Running(step) = self.phase { Some(step) } else { None };
            let unfinished = self.failed.iter().copied().chain(running);
            if let Some(first) = unfinished.filter(|step| *step >= POINT_OF_NO_RETURN).min() {
                self.touched.retain(|step| *step < first);
            }
        } else if epoch.is_some() {
            let before = |step: &Step| *step < POINT_OF_NO_RETURN && self.goal.takes(*step);
            self.touched = Step::ALL.into_iter().filter(before).collect();
        }
        self.epoch = epoch;
        self.is_continued = true;
        self.failed.clear();
        self.stuck.clear();
        self.in_phase(if forward { Phase::Between } else { Phase::Aborting })
    }

    fn refuses(&self, event: &Event) -> IllegalEvent {
        IllegalEvent { event: format!("{event:?}"), phase: self.phase, epoch: self.epoch, decision: self.decision }
    }
}

#[cfg(test)]
mod tests {
    use pgcutover_api::epoch::RunId;
    use proptest::prelude::*;

    use super::*;
    use crate::event::{Began, Facts};

    fn epoch(number: u64) -> Epoch {
        Epoch::try_from(number).unwrap()
    }

    fn began() -> Event {
        began_for(Goal::Cutover)
    }

    fn began_for(goal: Goal) -> Event {
        Event::Began(Began {
            run: RunId::random(),
            goal,
            database: "app".into(),
            source: "blue".into(),
            target: "green".into(),
            proxies: vec!["p1".into()],
            budgets_ms: Vec::new(),
            proxyctl_version: "0".into(),
            by: "ops@db1, pid 7".into(),
            config: "0".into(),
        })
    }

    fn finished(step: Step) -> Event {
        Event::Finished { step, facts: Facts::new() }
    }

    fn failed(step: Step) -> Event {
        Event::Failed { step, error: "no".into() }
    }

    /// The events of a run that goes well, up to and including `last`.
    fn happy(last: Step) -> Vec<Event> {
        happy_for(Goal::Cutover, last)
    }

    fn happy_for(goal: Goal, last: Step) -> Vec<Event> {
        let mut events = vec![began_for(goal)];
        let steps = std::iter::successors(goal.step_after(None), |step| goal.step_after(Some(*step)));
        for step in steps.take_while(|step| *step <= last) {
            events.push(Event::Started { step });
            if step == Step::Paused {
                events.push(Event::Opened { epoch: epoch(7) });
            }
            if step == Step::Decided {
                events.push(Event::Decided { outcome: Decision::Commit });
            }
            events.push(finished(step));
        }
        events
    }

    #[test]
    fn a_run_that_goes_well_ends_committed() {
        let mut events = happy(Step::Attached);
        events.push(Event::Ended { ending: Ending::Committed });
        assert_eq!(State::replay(&events).unwrap().phase, Phase::Ended(Ending::Committed));
    }

    #[test]
    fn a_rehearsal_turns_after_its_last_step_and_ends_by_a_decided_abort() {
        let mut events = happy_for(Goal::Rehearsal, Step::Transplanted);
        assert!(State::replay(&events).unwrap().next(&Event::Turned).is_err());
        events = happy_for(Goal::Rehearsal, Step::Checked);
        let seen = State::replay(&events).unwrap();
        assert_eq!(seen.next_step(), None);
        for step in [Step::Durable, Step::Decided] {
            assert!(seen.clone().next(&Event::Started { step }).is_err());
        }
        assert!(State::replay(&happy(Step::Checked)).unwrap().next(&Event::Turned).is_err());
        let turned = seen.next(&Event::Turned).unwrap();
        assert!(turned.clone().next(&Event::Ended { ending: Ending::Rehearsed }).is_err());
        assert!(turned.clone().next(&Event::Ended { ending: Ending::Undecided }).is_ok());
        let aborted = turned.next(&Event::Decided { outcome: Decision::Abort }).unwrap();
        assert!(aborted.clone().next(&Event::Ended { ending: Ending::Aborted }).is_err());
        assert!(aborted.next(&Event::Ended { ending: Ending::Rehearsed }).is_ok());
    }

    #[test]
    fn a_failure_while_clients_are_held_needs_a_decided_abort_before_anything_is_undone() {
        for step in Step::ALL.into_iter().filter(|step| step.holds_clients() && *step < POINT_OF_NO_RETURN) {
            let mut events = happy(step);
            events.pop();
            events.push(failed(step));
            let aborting = State::replay(&events).unwrap();
            assert_eq!(aborting.phase, Phase::Aborting);
            assert!(aborting.clone().next(&Event::Undone { step }).is_err());
            assert!(aborting.clone().next(&Event::Ended { ending: Ending::Aborted }).is_err());
            assert!(aborting.clone().next(&Event::Ended { ending: Ending::Refused }).is_err());
            let aborted = aborting.next(&Event::Decided { outcome: Decision::Abort }).unwrap();
            let aborted = aborted.next(&Event::Undone { step }).unwrap();
            assert_eq!(
                aborted.next(&Event::Ended { ending: Ending::Aborted }).unwrap().phase,
                Phase::Ended(Ending::Aborted)
            );
        }
    }

    #[test]
    fn a_failure_before_the_pause_is_a_refusal() {
        let events = [began(), Event::Started { step: Step::Armed }, failed(Step::Armed)];
        let state = State::replay(&events).unwrap();
        assert!(state.clone().next(&Event::Ended { ending: Ending::Undecided }).is_err());
        assert!(state.next(&Event::Ended { ending: Ending::Refused }).is_ok());
    }

    #[test]
    fn another_attempt_follows_what_may_pass_by_itself() {
        let failed_at = |step, decided: bool, ending| {
            let mut events = happy(step);
            events.pop();
            events.push(failed(step));
            if decided {
                events.push(Event::Decided { outcome: Decision::Abort });
            }
            events.push(Event::Ended { ending });
            State::replay(&events).unwrap().may_do_better()
        };
        assert_eq!(failed_at(Step::Armed, false, Ending::Refused), None);
        assert_eq!(failed_at(Step::Calm, false, Ending::Refused), Some(Step::Calm));
        assert_eq!(failed_at(Step::Paused, true, Ending::Aborted), Some(Step::Paused));
        assert_eq!(failed_at(Step::Paused, false, Ending::Undecided), None);
        assert_eq!(State::replay(&happy(Step::Resumed)).unwrap().may_do_better(), None);
    }

    #[test]
    fn a_commit_found_while_aborting_goes_forward() {
        let mut events = happy(Step::Checked);
        events.extend([
            Event::Started { step: Step::Decided },
            failed(Step::Decided),
            Event::Decided { outcome: Decision::Commit },
        ]);
        let state = State::replay(&events).unwrap();
        // Its evidence comes before any switch.
        assert_eq!(state.next_step(), Some(Step::Decided));
        assert!(state.clone().next(&Event::Undone { step: Step::Paused }).is_err());
        assert!(state.clone().next(&Event::Started { step: Step::Switched }).is_err());
        let state = state.next(&Event::Started { step: Step::Decided }).unwrap();
        let state = state.next(&finished(Step::Decided)).unwrap();
        assert!(state.next(&Event::Started { step: Step::Switched }).is_ok());
    }

    #[test]
    fn a_run_is_taken_up_where_it_broke_off_after_a_commit_and_undone_whole_before_it() {
        let mut events = happy(Step::Switched);
        events.pop();
        let seven = Event::Continued { epoch: Some(epoch(7)) };
        let state = State::replay(&events).unwrap().next(&seven).unwrap();
        assert_eq!((state.phase, state.next_step()), (Phase::Between, Some(Step::Switched)));
        for last in Step::ALL.into_iter().filter(|step| (Step::Paused..POINT_OF_NO_RETURN).contains(step)) {
            let state = State::replay(&happy(last)).unwrap().next(&seven).unwrap();
            assert_eq!(state.phase, Phase::Aborting);
            // The end of the journal may be lost: whatever comes before the decision may have been done.
            assert_eq!(state.touched.last(), Some(&Step::Checked));
            assert!(state.clone().next(&Event::Undone { step: Step::Paused }).is_err());
            assert!(state.next(&Event::Ended { ending: Ending::Aborted }).is_err());
        }
        let other = Event::Continued { epoch: Some(epoch(8)) };
        assert!(State::replay(&happy(Step::Fenced)).unwrap().next(&other).is_err());
        assert!(State::default().next(&seven).is_err());
    }

    #[test]
    fn a_rehearsal_that_was_taken_up_measured_nothing() {
        let state = State::replay(&happy_for(Goal::Rehearsal, Step::Checked)).unwrap();
        let state = state.next(&Event::Continued { epoch: Some(epoch(7)) }).unwrap();
        let state = state.next(&Event::Decided { outcome: Decision::Abort }).unwrap();
        assert!(state.clone().next(&Event::Ended { ending: Ending::Rehearsed }).is_err());
        assert!(state.next(&Event::Ended { ending: Ending::Aborted }).is_ok());
    }

    #[test]
    fn nothing_is_switched_before_the_commit() {
        let mut events = happy(Step::Checked);
        events.push(Event::Started { step: Step::Decided });
        let state = State::replay(&events).unwrap();
        assert!(state.clone().next(&finished(Step::Decided)).is_err());
        assert!(state.next(&Event::Started { step: Step::Switched }).is_err());
    }

    #[test]
    fn a_proxy_that_missed_the_switch_leaves_the_run_unfinished() {
        let mut events = happy(Step::Decided);
        events.extend([Event::Started { step: Step::Switched }, failed(Step::Switched)]);
        events.extend([Event::Started { step: Step::Resumed }, finished(Step::Resumed)]);
        let state = State::replay(&events).unwrap();
        assert!(state.clone().next(&Event::Ended { ending: Ending::Committed }).is_err());
        assert!(state.next(&Event::Ended { ending: Ending::Unfinished }).is_ok());
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let step = prop::sample::select(Step::ALL.to_vec());
        let decision = prop::sample::select(vec![Decision::Commit, Decision::Abort]);
        let ending = prop::sample::select(vec![
            Ending::Committed,
            Ending::Aborted,
            Ending::Refused,
            Ending::Unfinished,
            Ending::Undecided,
            Ending::Rehearsed,
        ]);
        prop_oneof![
            Just(began()),
            Just(Event::Turned),
            prop::option::of(1..9u64).prop_map(|number| Event::Continued { epoch: number.map(epoch) }),
            step.clone().prop_map(|step| Event::Started { step }),
            (1..9u64).prop_map(|number| Event::Opened { epoch: epoch(number) }),
            step.clone().prop_map(finished),
            step.clone().prop_map(failed),
            decision.prop_map(|outcome| Event::Decided { outcome }),
            step.clone().prop_map(|step| Event::Undone { step }),
            step.prop_map(|step| Event::UndoFailed { step, error: String::new() }),
            ending.prop_map(|ending| Event::Ended { ending }),
        ]
    }

    proptest! {
        /// From nothing, and by events in any order: no panic, no decision that nobody told, no step before the one it follows.
        #[test]
        fn no_sequence_of_events_claims_what_was_not_told(events in prop::collection::vec(any_event(), 0..80)) {
            let mut state = State::default();
            let mut told = Vec::new();
            for event in events {
                let Ok(after) = state.clone().next(&event) else { continue };
                told.push(event);
                let decided = |wanted| told.contains(&Event::Decided { outcome: wanted });
                prop_assert!(after.decision.is_none_or(decided));
                prop_assert_eq!(&State::replay(&told).unwrap(), &after, "a replay is where the run stood");
                if let Phase::Running(step) = after.phase {
                    for earlier in Step::ALL.into_iter().filter(|earlier| *earlier < step && after.goal.takes(*earlier)) {
                        let started = told.contains(&Event::Started { step: earlier });
                        prop_assert!(started || after.is_continued, "{} before {}", step, earlier);
                    }
                }
                state = after;
            }
        }

        /// Whatever is thrown at it after any prefix of a good run: the promises hold in every state it reaches.
        #[test]
        fn no_sequence_of_legal_events_breaks_a_promise(
            goal in prop::sample::select(vec![Goal::Cutover, Goal::Rehearsal]),
            last in prop::sample::select(Step::ALL.to_vec()),
            cut in 0..3usize,
            tail in prop::collection::vec(any_event(), 0..60),
        ) {
            let mut events = happy_for(goal, last);
            events.truncate(events.len() - cut.min(events.len() - 1));
            let mut state = State::replay(&events).unwrap();
            for event in tail {
                let before = state.clone();
                let Ok(after) = state.clone().next(&event) else { continue };
                prop_assert!(before.decision.is_none() || after.decision == before.decision, "a decision never changes");
                prop_assert!(before.epoch.is_none() || after.epoch == before.epoch, "an epoch never changes");
                if matches!(event, Event::Undone { .. }) {
                    prop_assert!(after.epoch.is_none() || after.decision == Some(Decision::Abort), "undone before the abort");
                }
                if let Event::Started { step } = event {
                    prop_assert_eq!(before.next_step(), Some(step));
                    prop_assert!(step <= POINT_OF_NO_RETURN || before.decision == Some(Decision::Commit));
                }
                if after.decision == Some(Decision::Abort) {
                    prop_assert!(!matches!(after.phase, Phase::Running(step) if step > POINT_OF_NO_RETURN));
                }
                if after.decision == Some(Decision::Commit) && after.phase == Phase::Between {
                    // Forward, and nothing of it left out.
                    let taken = after.touched.iter().filter(|step| **step >= POINT_OF_NO_RETURN);
                    let next = after.next_step();
                    prop_assert!(taken.clone().all(|step| next.is_none_or(|next| *step < next)));
                    prop_assert!(next.is_none_or(|next| next >= POINT_OF_NO_RETURN));
                    prop_assert!(next.is_some() || taken.count() == Step::ALL.iter().filter(|step| **step >= POINT_OF_NO_RETURN).count());
                }
                if matches!(after.phase, Phase::Running(step) if step > POINT_OF_NO_RETURN) {
                    prop_assert_eq!(after.decision, Some(Decision::Commit));
                }
                match after.phase {
                    Phase::Ended(Ending::Aborted | Ending::Rehearsed) => prop_assert_eq!(after.decision, Some(Decision::Abort)),
                    Phase::Ended(Ending::Committed | Ending::Unfinished) => {
                        prop_assert_eq!(after.decision, Some(Decision::Commit));
                    }
                    Phase::Ended(Ending::Refused) => prop_assert_eq!(after.epoch, None),
                    Phase::Ended(Ending::Undecided) => prop_assert_eq!(after.decision, None),
                    Phase::Fresh | Phase::Between | Phase::Running(_) | Phase::Aborting => {}
                }
                state = after;
            }
        }
    }
}
