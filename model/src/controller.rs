//! What a controller does: one run at a time, which may die between any two of its steps.
//!
//! Invariant: after a crash it knows the run and epoch of its journal and nothing of what its messages did.

use crate::data;
use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::CRASHES_ANY;
use crate::state::Controller;
use crate::state::Duty;
use crate::state::Form;
use crate::state::Outcome;
use crate::state::Phase;
use crate::state::Proxy;
use crate::state::Sent;
use crate::state::Shape;
use crate::state::Side;
use crate::state::State;
use crate::state::Transaction;
use crate::store;
use crate::writer;

/// A new run opens an epoch on a side that clients know, and sends guard to the target and PAUSE to the proxies it was
/// told of.
pub(crate) fn open(state: &State, source: Side, shape: Shape, rules: Rules) -> Option<State> {
    let mut next = *state;
    if state.controller.duty != Duty::Idle || (!writer::knows(state, source) && rules.has(Rule::R4Active)) {
        return None;
    }
    let number = store::open(&mut next, source, shape.epochs, rules)?;
    next.epoch_mut(number).send(Sent::Guard);
    enter(&mut next, Duty::Pausing, number);
    Some(next)
}

/// Every living proxy it was told of answered PAUSE: it orders the fence on the source.
pub(crate) fn fence(state: &State, shape: Shape) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    if state.controller.duty != Duty::Pausing || !all_held(state, shape, number) {
        return None;
    }
    next.epoch_mut(number).send(Sent::Flip);
    enter(&mut next, Duty::Fencing, number);
    Some(next)
}

/// Everything arrived on the target, the way back is kept, S7 is green: it sends `decide(commit)`.
pub(crate) fn check(state: &State, shape: Shape, rules: Rules) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    if state.controller.duty != Duty::Fencing || !all_held(state, shape, number) || !members_hold(state, shape, rules) {
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
    if shape.data {
        data::catch_up(&mut next, source, rules)?;
        data::keep_way_back(&mut next, number, rules);
    }
    next.epoch_mut(number).send(Sent::Commit);
    enter(&mut next, Duty::Deciding, number);
    Some(next)
}

/// A RENEW is refused, because a proxy's hold is over: it aborts.
pub(crate) fn renew_refused(state: &State, shape: Shape) -> Option<State> {
    let number = state.controller.epoch;
    let renewed = |proxy: &Proxy| proxy.phase == Phase::Held && proxy.hold == number;
    if state.controller.duty != Duty::Fencing || state.proxies.iter().take(shape.listed).all(renewed) {
        return None;
    }
    abort(state)
}

/// It gives up: a deadline, an error, an operator.
pub(crate) fn abort(state: &State) -> Option<State> {
    let mut next = *state;
    match state.controller.duty {
        Duty::Pausing | Duty::Fencing => {}
        Duty::Idle | Duty::Deciding | Duty::Aborting | Duty::Detaching => return None,
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

/// It reads the outcome, and sends what follows from it: after a commit the evidence first, then SWITCH, RESUME and settle;
/// after an abort unfence and RESUME.
pub(crate) fn finish(state: &State, shape: Shape, rules: Rules) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    let outcome = match state.controller.duty {
        Duty::Deciding | Duty::Aborting => state.epoch(number).outcome,
        Duty::Idle | Duty::Pausing | Duty::Fencing | Duty::Detaching => return None,
    };
    let assumed = !rules.has(Rule::R2) && state.controller.duty == Duty::Aborting && outcome == Outcome::Undecided;
    let mut duty = Duty::Idle;
    match outcome {
        Outcome::Commit => {
            store::witness(&mut next, number);
            next.epoch_mut(number).send(Sent::Switch);
            next.epoch_mut(number).send(Sent::Settle);
            if shape.data {
                next.epoch_mut(number).send(Sent::Detach);
                duty = Duty::Detaching;
            }
        }
        Outcome::Abort => {
            next.epoch_mut(number).send(Sent::Unfence);
            data::give_up_way_back(&mut next, number);
        }
        Outcome::Undecided if assumed => next.epoch_mut(number).send(Sent::Unfence),
        Outcome::Undecided => return None,
    }
    next.epoch_mut(number).send(Sent::Resume);
    enter(&mut next, duty, if duty == Duty::Idle { 0 } else { number });
    Some(next)
}

/// S10: the subscription from the old source is gone, so that one away from the new one can be made.
pub(crate) fn attach(state: &State, rules: Rules) -> Option<State> {
    let mut next = *state;
    let number = state.controller.epoch;
    if state.controller.duty != Duty::Detaching {
        return None;
    }
    if state.link(state.epoch(number).source).attached && rules.has(Rule::S10) {
        return None;
    }
    next.epoch_mut(number).send(Sent::Attach);
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

/// Every living proxy that it was told of is held at this epoch.
fn all_held(state: &State, shape: Shape, number: u8) -> bool {
    state.proxies.iter().take(shape.listed).all(|proxy| proxy.phase == Phase::Down || holds(proxy, number))
}

/// So is every living proxy in the source's list of members; one that can't reach the source drops out of it.
fn members_hold(state: &State, shape: Shape, rules: Rules) -> bool {
    let number = state.controller.epoch;
    let source = state.epoch(number).source;
    let enrolled = |&index: &usize| {
        let down = state.proxies[index].phase == Phase::Down;
        !down && !state.is_cut(index, source) && state.route(index) == source
    };
    let mut members = (shape.listed..shape.heeded()).filter(enrolled);
    !rules.has(Rule::R9Members) || members.all(|index| holds(&state.proxies[index], number))
}

fn holds(proxy: &Proxy, number: u8) -> bool {
    matches!(proxy.phase, Phase::Held | Phase::Asking) && proxy.hold == number
}
