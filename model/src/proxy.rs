//! What a proxy does: by order of a controller, and by itself.
//!
//! Invariant: a proxy learns of a decision only by reading a store that it can reach; no message carries one that it
//! believes.

use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::Form;
use crate::state::Outcome;
use crate::state::Phase;
use crate::state::Proxy;
use crate::state::Sent;
use crate::state::Shape;
use crate::state::Side;
use crate::state::State;
use crate::store;
use crate::store::View;

/// What to do about what was read: `proxy/src/database/verdict.rs`: verdict.
enum Verdict {
    Rest,
    Hold(u8),
    Follow(u8),
    Resume,
}

fn verdict(state: &State, proxy: Proxy, view: View) -> Verdict {
    if let Some(commit) = view.last_commit.filter(|&commit| commit > proxy.route_epoch) {
        return Verdict::Follow(commit);
    }
    if proxy.hold > 0 {
        let aborted = view.last == Some(proxy.hold) && state.epoch(proxy.hold).outcome == Outcome::Abort;
        return if aborted { Verdict::Resume } else { Verdict::Rest };
    }
    match view.open {
        Some(open) if open > proxy.route_epoch => Verdict::Hold(open),
        Some(_) | None => Verdict::Rest,
    }
}

/// Whether a proxy's control login works on a side.
fn reaches(state: &State, index: usize, side: Side, rules: Rules) -> bool {
    // Without R12 the fence is one that shuts out everyone.
    let shut_out = !rules.has(Rule::R12) && state.gates[side.index()].form == Form::Fenced;
    !state.is_cut(index, side) && !shut_out
}

/// PAUSE of an epoch arrives: drained and held.
pub(crate) fn pause(state: &State, index: usize, number: u8, rules: Rules) -> Option<State> {
    let mut next = *state;
    let source = state.epoch(number).source;
    let current = state.route(index) == source && store::view(state, source).open == Some(number);
    if state.proxies[index].phase != Phase::Serving || !reaches(state, index, source, rules) {
        return None;
    }
    if !current && rules.has(Rule::R7Pause) {
        return None;
    }
    hold(&mut next.proxies[index], number);
    Some(next)
}

/// SWITCH of an epoch arrives.
pub(crate) fn switch(state: &State, index: usize, number: u8, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = state.proxies[index];
    let held = matches!(proxy.phase, Phase::Held | Phase::Asking);
    if !held || !state.epoch(number).was_sent(Sent::Switch) {
        return None;
    }
    let proven = proxy.hold == number && reads_commit(state, index, number, rules);
    let moved_on = store::last_opened(state, state.epoch(number).source.other()) > Some(number);
    if (!proven && rules.has(Rule::R7)) || (moved_on && rules.has(Rule::R7Newest)) {
        return None;
    }
    if !bears_witness(&mut next, index, number, rules) {
        return None;
    }
    next.proxies[index].route_epoch = number;
    (next != *state).then_some(next)
}

/// Whether it reads this very commit: on the source, or, where that is silent, on the target.
fn reads_commit(state: &State, index: usize, number: u8, rules: Rules) -> bool {
    let source = state.epoch(number).source;
    let asked = [source, source.other()].into_iter().find(|&side| reaches(state, index, side, rules));
    asked.is_some_and(|side| store::newest_commit(state, side) == Some(number))
}

/// Whoever learns of a commit writes the evidence before it switches; false where the target is out of reach.
fn bears_witness(state: &mut State, index: usize, number: u8, rules: Rules) -> bool {
    if rules.has(Rule::R10Witness) {
        if !reaches(state, index, state.epoch(number).source.other(), rules) {
            return false;
        }
        store::witness(state, number);
    }
    true
}

/// RESUME of an epoch arrives.
pub(crate) fn resume(state: &State, index: usize, number: u8, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = state.proxies[index];
    let held = matches!(proxy.phase, Phase::Held | Phase::Asking);
    let source = state.epoch(number).source;
    let reads_abort = || {
        reaches(state, index, source, rules)
            && store::view(state, source).last == Some(number)
            && state.epoch(number).outcome == Outcome::Abort
    };
    let proven = proxy.hold == number && (proxy.route_epoch == number || reads_abort());
    if !held || !state.epoch(number).was_sent(Sent::Resume) || (!proven && rules.has(Rule::R7)) {
        return None;
    }
    serve(&mut next.proxies[index]);
    Some(next)
}

/// The lease of its hold ends.
pub(crate) fn lease_end(state: &State, index: usize, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = &mut next.proxies[index];
    if proxy.phase != Phase::Held || proxy.leaseless {
        return None;
    }
    if rules.has(Rule::R8) {
        proxy.phase = Phase::Asking;
    } else {
        serve(proxy);
    }
    Some(next)
}

/// Its `decide(abort)` is answered; where the source is silent, evidence on the target counts.
pub(crate) fn decide(state: &State, index: usize, shape: Shape, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = state.proxies[index];
    if proxy.phase != Phase::Asking {
        return None;
    }
    let source = state.epoch(proxy.hold).source;
    let answer = if reaches(state, index, source, rules) {
        store::decide(&mut next, proxy.hold, Outcome::Abort, shape.data)
    } else {
        None
    };
    match answer {
        Some(Outcome::Abort) => {
            end_own_hold(&mut next.proxies[index], rules);
            Some(next)
        }
        Some(Outcome::Commit) => {
            let number = evidence(state, index, rules).unwrap_or(proxy.hold);
            follow_to(&next, index, number, rules)
        }
        // Where nothing tells, it holds, and asks again.
        Some(Outcome::Undecided) | None => follow_to(&next, index, evidence(state, index, rules)?, rules),
    }
}

/// The commit of its hold's epoch that the target has evidence of, or a newer one that any server in reach knows of.
fn evidence(state: &State, index: usize, rules: Rules) -> Option<u8> {
    let hold = state.proxies[index].hold;
    let target = state.epoch(hold).source.other();
    let newest = |side| store::newest_commit(state, side).filter(|_| reaches(state, index, side, rules));
    let of_this = newest(target).filter(|&commit| commit == hold && rules.has(Rule::R8Evidence));
    let newer = newest(target).max(newest(target.other())).filter(|&commit| commit > hold && rules.has(Rule::R8Newer));
    newer.or(of_this)
}

/// It reads its active backend: at start, at a new server connection, every second; and does what follows from that.
pub(crate) fn look(state: &State, index: usize, rules: Rules) -> Option<State> {
    let proxy = state.proxies[index];
    match proxy.phase {
        Phase::Down => return None,
        Phase::Looking if !rules.has(Rule::R9) => {
            let mut next = *state;
            serve(&mut next.proxies[index]);
            return Some(next);
        }
        Phase::Serving | Phase::Held | Phase::Asking if !rules.has(Rule::R9) => return None,
        Phase::Looking | Phase::Serving | Phase::Held | Phase::Asking => {}
    }
    let route = state.route(index);
    let side = if reaches(state, index, route, rules) { Some(route) } else { elsewhere(state, index, rules) }?;
    let next = match verdict(state, proxy, store::view(state, side)) {
        Verdict::Follow(number) => return follow_to(state, index, number, rules),
        // Silent: what is open or aborted elsewhere says nothing of its own side.
        Verdict::Rest | Verdict::Hold(_) | Verdict::Resume if side != route => return None,
        Verdict::Rest if proxy.hold > 0 => return None,
        Verdict::Rest => {
            let mut next = *state;
            serve(&mut next.proxies[index]);
            next
        }
        Verdict::Resume => {
            let mut next = *state;
            end_own_hold(&mut next.proxies[index], rules);
            next
        }
        Verdict::Hold(number) => {
            let mut next = *state;
            next.proxies[index].leaseless = proxy.phase == Phase::Looking && !rules.has(Rule::R8StartUp);
            hold(&mut next.proxies[index], number);
            next
        }
    };
    (next != *state).then_some(next)
}

/// Where its active backend is silent: the other one, for evidence of a newer commit. One that holds asks there anyway.
fn elsewhere(state: &State, index: usize, rules: Rules) -> Option<Side> {
    let other = state.route(index).other();
    let asks = state.proxies[index].hold == 0 && rules.has(Rule::R9Evidence);
    (asks && reaches(state, index, other, rules)).then_some(other)
}

/// It goes where a commit went, and looks there before it serves; it holds where the target can't be told.
fn follow_to(state: &State, index: usize, number: u8, rules: Rules) -> Option<State> {
    let mut next = *state;
    if state.proxies[index].route_epoch < number {
        if !bears_witness(&mut next, index, number, rules) {
            if state.proxies[index].hold > 0 {
                return None;
            }
            hold(&mut next.proxies[index], number);
            return Some(next);
        }
        next.proxies[index].route_epoch = number;
    }
    end_own_hold(&mut next.proxies[index], rules);
    Some(next)
}

/// Its hold ends without anyone's RESUME: it looks before it serves.
fn end_own_hold(proxy: &mut Proxy, rules: Rules) {
    serve(proxy);
    if rules.has(Rule::R9Again) {
        proxy.phase = Phase::Looking;
    }
}

/// It dies.
pub(crate) fn kill(state: &State, index: usize) -> Option<State> {
    let mut next = *state;
    let proxy = &mut next.proxies[index];
    if proxy.phase == Phase::Down {
        return None;
    }
    *proxy = Proxy { phase: Phase::Down, hold: 0, leaseless: false, route_epoch: proxy.route_epoch };
    Some(next)
}

/// It starts, at the route it last had.
pub(crate) fn start(state: &State, index: usize, rules: Rules) -> Option<State> {
    let mut next = *state;
    if state.proxies[index].phase != Phase::Down {
        return None;
    }
    next.proxies[index].phase = if rules.has(Rule::R9Start) { Phase::Looking } else { Phase::Serving };
    Some(next)
}

/// It starts at an older route: the file was lost or could not be written. `route_epoch` 0 is the configuration's.
pub(crate) fn start_stale(state: &State, index: usize, route_epoch: u8, rules: Rules) -> Option<State> {
    let mut next = start(state, index, rules)?;
    let was_a_route = route_epoch == 0 || state.epoch(route_epoch).outcome == Outcome::Commit;
    if route_epoch >= state.proxies[index].route_epoch || !was_a_route {
        return None;
    }
    next.proxies[index].route_epoch = route_epoch;
    Some(next)
}

/// Its network to a server comes back: the new connections look before they serve.
pub(crate) fn mend(state: &State, rules: Rules) -> Option<State> {
    let mut next = *state;
    let cut = next.cut.take()?;
    let proxy = &mut next.proxies[cut.proxy];
    let serves_there = proxy.phase == Phase::Serving && state.route(cut.proxy) == cut.side;
    if serves_there && rules.has(Rule::R9Connect) {
        proxy.phase = Phase::Looking;
    }
    Some(next)
}

fn hold(proxy: &mut Proxy, number: u8) {
    proxy.phase = Phase::Held;
    proxy.hold = number;
}

fn serve(proxy: &mut Proxy) {
    proxy.phase = Phase::Serving;
    proxy.hold = 0;
    proxy.leaseless = false;
}
