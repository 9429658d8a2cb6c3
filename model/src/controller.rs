//! What a controller does: one run at a time, which may die between any two of its steps.
//!
//! Invariant: after a crash it knows the run and epoch of its journal and nothing of what its messages did.

use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::CRASHES_ANY;
use crate::state::Controller;
use crate::state::Duty;
use crate::state::Form;
use crate::state::Outcome;
use crate::state::Phase;
use crate::state::Sent;
use crate::state::Shape;
use crate::state::Side;
use crate::state::State;
use crate::state::Transaction;
use crate::store;
use crate::writer;

/// A new run opens an epoch on a side that clients know, and sends PAUSE to the proxies it was told of.
pub(crate) fn open(state: &State, source: Side, shape: Shape, rules: Rules) -> Option<State> {
    let mut next = *state;
    if state.controller.duty != Duty::Idle || (!writer::knows(state, source) && rules.has(Rule::R4Active)) {
        return None;
    }
    let number = store::open(&mut next, source, shape.epochs, rules)?;
    enter(&mut next, Duty::Pausing, number);
    Some(next)
}

/// Every living proxy it was told of answered PAUSE: it orders the fence on the source and the guard on the target.
pub(crate) fn fence(state: &State, shape: Shape) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    if state.controller.duty != Duty::Pausing || !all_held(state, shape, number) {
        return None;
    }
    next.epoch_mut(number).send(Sent::Guard);
    next.epoch_mut(number).send(Sent::Flip);
    enter(&mut next, Duty::Fencing, number);
    Some(next)
}

/// S7 is green: it sends `decide(commit)`.
pub(crate) fn check(state: &State, shape: Shape, rules: Rules) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    if state.controller.duty != Duty::Fencing || !all_held(state, shape, number) {
        return None;
    }
    let source = state.epoch(number).source;
    let target = state.gates[source.other().index()];
    let guarded = !rules.has(Rule::R10)
        || !store::has_gate(state, source.other())
        || (target.form == Form::Target && target.epoch == number);
    let passed = state.writer.transaction == Transaction::Wrote && state.writer.side == source;
    if !store::fenced_at(state, source, number) || !guarded || (passed && rules.has(Rule::R5)) {
        return None;
    }
    next.epoch_mut(number).send(Sent::Commit);
    enter(&mut next, Duty::Deciding, number);
    Some(next)
}

/// A RENEW is refused, because a proxy's hold is over: it aborts.
pub(crate) fn renew_refused(state: &State, shape: Shape) -> Option<State> {
    if all_held(state, shape, state.controller.epoch) || state.controller.duty != Duty::Fencing {
        return None;
    }
    abort(state)
}

/// It gives up: a deadline, an error, an operator.
pub(crate) fn abort(state: &State) -> Option<State> {
    let mut next = *state;
    match state.controller.duty {
        Duty::Pausing | Duty::Fencing => {}
        Duty::Idle | Duty::Deciding | Duty::Aborting => return None,
    }
    next.epoch_mut(state.controller.epoch).send(Sent::Abort);
    enter(&mut next, Duty::Aborting, state.controller.epoch);
    Some(next)
}

/// `resume-run` of the journal's last epoch.
pub(crate) fn resume_run(state: &State, rules: Rules) -> Option<State> {
    let mut next = *state;
    let number = state.opened().next_back()?;
    if state.controller.duty != Duty::Idle {
        return None;
    }
    if rules.has(Rule::R2) {
        next.epoch_mut(number).send(Sent::Abort);
        enter(&mut next, Duty::Aborting, number);
    } else {
        next.epoch_mut(number).send(Sent::Guard);
        next.epoch_mut(number).send(Sent::Flip);
        enter(&mut next, Duty::Fencing, number);
    }
    Some(next)
}

/// It reads the outcome, and sends what follows from it: after a commit the evidence first, then SWITCH and RESUME; after an
/// abort unfence and RESUME.
pub(crate) fn finish(state: &State, rules: Rules) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    let outcome = match state.controller.duty {
        Duty::Deciding | Duty::Aborting => state.epoch(number).outcome,
        Duty::Idle | Duty::Pausing | Duty::Fencing => return None,
    };
    let assumed = !rules.has(Rule::R2) && state.controller.duty == Duty::Aborting && outcome == Outcome::Undecided;
    match outcome {
        Outcome::Commit => {
            store::witness(&mut next, number);
            next.epoch_mut(number).send(Sent::Switch);
        }
        Outcome::Abort => next.epoch_mut(number).send(Sent::Unfence),
        Outcome::Undecided if assumed => next.epoch_mut(number).send(Sent::Unfence),
        Outcome::Undecided => return None,
    }
    next.epoch_mut(number).send(Sent::Resume);
    enter(&mut next, Duty::Idle, 0);
    Some(next)
}

/// It dies.
pub(crate) fn crash(state: &State) -> Option<State> {
    let mut next = *state;
    let left = state.controller.crashes_left;
    if state.controller.duty == Duty::Idle || left == 0 {
        return None;
    }
    enter(&mut next, Duty::Idle, 0);
    next.controller.crashes_left = if left == CRASHES_ANY { left } else { left - 1 };
    Some(next)
}

/// A run of an epoch that was closed over it can learn nothing more: it ends. Only without R4.
pub(crate) fn closed(state: &State) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    if state.controller.duty == Duty::Idle || state.epoch(number).outcome != Outcome::Undecided {
        return None;
    }
    if store::last_opened(state, state.epoch(number).source) == Some(number) {
        return None;
    }
    enter(&mut next, Duty::Idle, 0);
    Some(next)
}

fn enter(state: &mut State, duty: Duty, epoch: u8) {
    state.controller = Controller { duty, epoch, crashes_left: state.controller.crashes_left };
}

/// Every living proxy that it was told of is held at this epoch, under a lease that has not ended.
fn all_held(state: &State, shape: Shape, number: u8) -> bool {
    let known = state.proxies.iter().take(shape.known);
    known.filter(|proxy| proxy.phase != Phase::Down).all(|proxy| proxy.phase == Phase::Held && proxy.hold == number)
}
