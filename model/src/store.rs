//! The decision store and the gates: what one transaction on one server does.
//!
//! Invariant: each function here is one atomic transaction on one side; with the rules on, a decision is written once and
//! never changed.

use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::Form;
use crate::state::Gate;
use crate::state::Lack;
use crate::state::Outcome;
use crate::state::Side;
use crate::state::State;

/// What one read of a side's store says: `proxy/api/src/store.rs`: view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct View {
    /// The opened epoch that nothing has decided.
    pub(crate) open: Option<u8>,
    /// The newest decided epoch.
    pub(crate) last: Option<u8>,
    /// The newest committed one.
    pub(crate) last_commit: Option<u8>,
}

/// The epoch in the `state` row of a side.
pub(crate) fn last_opened(state: &State, side: Side) -> Option<u8> {
    state.opened().rev().find(|&number| state.epoch(number).source == side)
}

/// Whether a side has a row that tells how this epoch was decided.
fn visible(state: &State, side: Side, number: u8) -> bool {
    let epoch = state.epoch(number);
    if epoch.source == side { epoch.outcome != Outcome::Undecided } else { epoch.evidence }
}

/// Reads a side as a proxy does, in one statement.
pub(crate) fn view(state: &State, side: Side) -> View {
    View {
        open: last_opened(state, side).filter(|&number| !visible(state, side, number)),
        last: state.opened().rev().find(|&number| visible(state, side, number)),
        last_commit: newest_commit(state, side),
    }
}

/// `open()`: the number of the new epoch, or `None` where the store refuses.
pub(crate) fn open(state: &mut State, source: Side, epochs_max: usize, rules: Rules) -> Option<u8> {
    let open_here = last_opened(state, source);
    let undecided = open_here.is_some_and(|number| state.epoch(number).outcome == Outcome::Undecided);
    let left = newest_commit(state, source).is_some_and(|number| state.epoch(number).source == source);
    let next = state.last + 1;
    let refused = (undecided && rules.has(Rule::R4)) || (left && rules.has(Rule::R4Side));
    if refused || usize::from(next) > epochs_max {
        return None;
    }
    state.last = next;
    state.epoch_mut(next).source = source;
    Some(next)
}

pub(crate) fn newest_commit(state: &State, side: Side) -> Option<u8> {
    state.opened().rev().find(|&number| visible(state, side, number) && state.epoch(number).outcome == Outcome::Commit)
}

/// `decide()`: the outcome that stands afterwards, or `None` where the epoch is closed (another one was opened over it).
pub(crate) fn decide(state: &mut State, number: u8, want: Outcome, data: bool) -> Option<Outcome> {
    let epoch = *state.epoch(number);
    if epoch.outcome != Outcome::Undecided {
        return Some(epoch.outcome);
    }
    if last_opened(state, epoch.source) != Some(number) {
        return None;
    }
    state.epoch_mut(number).outcome = want;
    if want == Outcome::Commit && state.owner == epoch.source {
        state.owner = epoch.source.other();
        state.lost |= state.link(epoch.source).lack != Lack::Nothing && data;
    }
    Some(want)
}

/// `flip()` on the source.
pub(crate) fn flip(state: &mut State, number: u8, rules: Rules) {
    let epoch = *state.epoch(number);
    let allowed = last_opened(state, epoch.source) == Some(number) && epoch.outcome == Outcome::Undecided;
    if allowed || !rules.has(Rule::R3) {
        let expired = fenced_at(state, epoch.source, number) && state.gates[epoch.source.index()].expired;
        state.gates[epoch.source.index()] = Gate { form: Form::Fenced, epoch: number, expired };
    }
}

/// `unfence()` on the source.
pub(crate) fn unfence(state: &mut State, number: u8, rules: Rules) {
    let epoch = *state.epoch(number);
    let allowed = last_opened(state, epoch.source) == Some(number)
        && epoch.outcome == Outcome::Abort
        && fenced_at(state, epoch.source, number);
    if allowed || !rules.has(Rule::R3) {
        state.gates[epoch.source.index()] = OPEN;
    }
}

/// `guard()` on the target, where that has a gate.
pub(crate) fn guard(state: &mut State, number: u8, rules: Rules) {
    let side = state.epoch(number).source.other();
    let view = view(state, side);
    let known = last_opened(state, side).max(view.last).max(Some(state.gates[side.index()].epoch));
    // A gate of this very epoch is replaced by itself.
    let over = known.is_some_and(|known| known > number) || view.last == Some(number) || view.open.is_some();
    if !has_gate(state, side) || (over && rules.has(Rule::R3Guard)) {
        return;
    }
    let guarded = Gate { form: Form::Target, epoch: number, expired: false };
    state.gates[side.index()] = if rules.has(Rule::R10) { guarded } else { OPEN };
}

/// `settle()` on the target: the no-op again, after the evidence.
pub(crate) fn settle(state: &mut State, number: u8) {
    let side = state.epoch(number).source.other();
    let gate = state.gates[side.index()];
    if state.epoch(number).evidence && gate.form == Form::Target && gate.epoch <= number {
        state.gates[side.index()] = OPEN;
    }
}

const OPEN: Gate = Gate { form: Form::Open, epoch: 0, expired: false };

/// Whether a side's gate is this epoch's fence.
pub(crate) fn fenced_at(state: &State, side: Side, number: u8) -> bool {
    let gate = state.gates[side.index()];
    gate.form == Form::Fenced && gate.epoch == number
}

/// Whether triggers were ever made on a side: it was a source once.
pub(crate) fn has_gate(state: &State, side: Side) -> bool {
    last_opened(state, side).is_some()
}

/// `witness()` on the target: only ever a copy of a commit.
pub(crate) fn witness(state: &mut State, number: u8) {
    if state.epoch(number).outcome == Outcome::Commit {
        state.epoch_mut(number).evidence = true;
    }
}

/// The rows of a side that a snapshot taken now sees, a bit per epoch.
pub(crate) fn snapshot(state: &State, side: Side) -> u8 {
    state.opened().filter(|&number| visible(state, side, number)).fold(0, |seen, number| seen | bit(number))
}

const fn bit(number: u8) -> u8 {
    1 << (number - 1)
}

/// Whether the gate of a side lets a write pass whose snapshot sees these rows.
pub(crate) fn accepts(state: &State, side: Side, seen: u8, rules: Rules) -> bool {
    let gate = state.gates[side.index()];
    let saw = |number: u8, outcome| seen & bit(number) != 0 && state.epoch(number).outcome == outcome;
    match gate.form {
        Form::Open => true,
        Form::Fenced => {
            let by_time = !rules.has(Rule::R1) && gate.expired && !saw(gate.epoch, Outcome::Commit);
            saw(gate.epoch, Outcome::Abort) || by_time
        }
        Form::Target => state
            .opened()
            .filter(|&number| number >= gate.epoch && state.epoch(number).source != side)
            .any(|number| saw(number, Outcome::Commit)),
    }
}
