//! What a proxy does: by order of a controller, and by itself.
//!
//! Invariant: a proxy learns of a decision only by reading the store; no message carries one that it believes.

use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::Outcome;
use crate::state::Phase;
use crate::state::Proxy;
use crate::state::Sent;
use crate::state::Side;
use crate::state::State;
use crate::store;
use crate::store::Reading;

/// PAUSE of an epoch arrives: drained and held.
pub(crate) fn pause(state: &State, index: usize, number: u8, rules: Rules) -> Option<State> {
    let mut next = *state;
    let epoch = state.epoch(number);
    let proxy = &mut next.proxies[index];
    let open = epoch.outcome == Outcome::Undecided && store::last_opened(state, epoch.source) == Some(number);
    let stale = !open || proxy.route != epoch.source;
    if proxy.phase != Phase::Serving || (stale && rules.has(Rule::R7Pause)) {
        return None;
    }
    hold(proxy, number);
    Some(next)
}

/// SWITCH of an epoch arrives.
pub(crate) fn switch(state: &State, index: usize, number: u8, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = state.proxies[index];
    let proven = proxy.hold == number && state.epoch(number).outcome == Outcome::Commit && proxy.route_epoch < number;
    let sent = state.epoch(number).was_sent(Sent::Switch);
    if proxy.phase != Phase::Held || !sent || (!proven && rules.has(Rule::R7)) {
        return None;
    }
    take_route(&mut next, index, number, rules);
    (next != *state).then_some(next)
}

/// RESUME of an epoch arrives.
pub(crate) fn resume(state: &State, index: usize, number: u8, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = state.proxies[index];
    let held = matches!(proxy.phase, Phase::Held | Phase::Asking);
    let proven = proxy.hold == number && (proxy.route_epoch == number || state.epoch(number).outcome == Outcome::Abort);
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

/// Its `decide(abort)` is answered.
pub(crate) fn decide(state: &State, index: usize, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = state.proxies[index];
    if proxy.phase != Phase::Asking {
        return None;
    }
    match store::decide(&mut next, proxy.hold, Outcome::Abort) {
        Some(Outcome::Commit) if proxy.route_epoch < proxy.hold => {
            take_route(&mut next, index, proxy.hold, rules);
            serve(&mut next.proxies[index]);
        }
        Some(Outcome::Commit | Outcome::Abort | Outcome::Undecided) => serve(&mut next.proxies[index]),
        None => look_again(&mut next.proxies[index]),
    }
    Some(next)
}

/// It reads its active backend: at start, at a new server connection, every second.
pub(crate) fn look(state: &State, index: usize, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = &mut next.proxies[index];
    let looks = match proxy.phase {
        Phase::Looking => true,
        Phase::Serving => rules.has(Rule::R9),
        Phase::Down | Phase::Held | Phase::Asking => false,
    };
    if !looks {
        return None;
    }
    let reading = if rules.has(Rule::R9) { store::look(state, proxy.route) } else { Reading::Nothing };
    match reading {
        Reading::Open(number) => {
            proxy.leaseless = proxy.phase == Phase::Looking && !rules.has(Rule::R8StartUp);
            hold(proxy, number);
        }
        Reading::Decided(number, Outcome::Commit, side) if number > proxy.route_epoch && side != proxy.route => {
            return None; // it follows instead
        }
        Reading::Decided(number, Outcome::Commit, _) if number > proxy.route_epoch => {
            proxy.route_epoch = number;
            serve(proxy);
        }
        Reading::Decided(..) | Reading::Nothing => serve(proxy),
    }
    (next != *state).then_some(next)
}

/// It reads a newer commit to the other side, and goes there to look again before it serves.
pub(crate) fn follow(state: &State, index: usize, rules: Rules) -> Option<State> {
    let mut next = *state;
    let proxy = state.proxies[index];
    if !matches!(proxy.phase, Phase::Looking | Phase::Serving) || !rules.has(Rule::R9) {
        return None;
    }
    match store::look(state, proxy.route) {
        Reading::Decided(number, Outcome::Commit, side) if number > proxy.route_epoch && side != proxy.route => {
            take_route(&mut next, index, number, rules);
            look_again(&mut next.proxies[index]);
            Some(next)
        }
        Reading::Decided(..) | Reading::Open(_) | Reading::Nothing => None,
    }
}

/// It dies.
pub(crate) fn kill(state: &State, index: usize) -> Option<State> {
    let mut next = *state;
    let proxy = &mut next.proxies[index];
    if proxy.phase == Phase::Down {
        return None;
    }
    let (route, route_epoch) = (proxy.route, proxy.route_epoch);
    *proxy = Proxy { phase: Phase::Down, hold: 0, leaseless: false, route, route_epoch };
    Some(next)
}

/// It starts, at the route it last had.
pub(crate) fn start(state: &State, index: usize) -> Option<State> {
    let mut next = *state;
    if state.proxies[index].phase != Phase::Down {
        return None;
    }
    look_again(&mut next.proxies[index]);
    Some(next)
}

/// It starts at an older route: the file was lost or could not be written. `route_epoch` 0 is the configuration's.
pub(crate) fn start_stale(state: &State, index: usize, route_epoch: u8) -> Option<State> {
    let mut next = start(state, index)?;
    let proxy = &mut next.proxies[index];
    let was_a_route = route_epoch == 0 || state.epoch(route_epoch).outcome == Outcome::Commit;
    if route_epoch >= proxy.route_epoch || !was_a_route {
        return None;
    }
    proxy.route_epoch = route_epoch;
    proxy.route = match route_epoch {
        0 => Side::Blue,
        number => state.epoch(number).source.other(),
    };
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

fn look_again(proxy: &mut Proxy) {
    serve(proxy);
    proxy.phase = Phase::Looking;
}

/// Writes the evidence on the target, then makes that the active backend.
fn take_route(state: &mut State, index: usize, number: u8, rules: Rules) {
    if rules.has(Rule::R10Witness) {
        store::witness(state, number);
    }
    let proxy = &mut state.proxies[index];
    proxy.route = state.epochs[usize::from(number) - 1].source.other();
    proxy.route_epoch = number;
}
