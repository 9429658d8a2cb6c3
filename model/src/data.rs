//! What is replicated where: subscriptions, slots, and what the other side lacks.
//!
//! Invariant: as many writes happen as can: one more write never makes a lack smaller, so the fewest are never worse.

use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::Lack;
use crate::state::Link;
use crate::state::Side;
use crate::state::State;

/// A write is acknowledged on a side.
pub(crate) fn write(state: &mut State, side: Side) {
    let link = state.link_mut(side);
    let kept = if link.attached || link.slot > 0 { Lack::Kept } else { Lack::Gone };
    link.lack = link.lack.max(kept);
}

/// S4: the sentinel arrives on the target, and with it all that was kept; `None` while no subscription brings it.
pub(crate) fn catch_up(state: &mut State, source: Side, rules: Rules) -> Option<()> {
    if !rules.has(Rule::S4) {
        return Some(());
    }
    let link = state.link_mut(source);
    if link.lack == Lack::Kept && link.attached {
        link.lack = Lack::Nothing;
    }
    link.attached.then_some(())
}

/// S6: a slot on the target, from which the source can follow.
pub(crate) fn keep_way_back(state: &mut State, number: u8, rules: Rules) {
    if rules.has(Rule::S6) {
        state.link_mut(state.epoch(number).source.other()).slot = number;
    }
}

/// The undo of S6.
pub(crate) fn give_up_way_back(state: &mut State, number: u8) {
    let link = state.link_mut(state.epoch(number).source.other());
    link.slot = if link.slot == number { 0 } else { link.slot };
}

/// S10: what leads from the epoch's source to its target is dropped there, also by a message so late that it leads there
/// anew: a way forward is lost then, and no write.
pub(crate) fn detach(state: &mut State, number: u8) {
    let source = state.epoch(number).source;
    state.link_mut(source).attached = false;
}

/// S10: the old source subscribes to the slot of S6.
pub(crate) fn attach(state: &mut State, number: u8, rules: Rules) {
    let target = state.epoch(number).source.other();
    let link = *state.link(target);
    // Without S6 it makes its slot now.
    if link.slot == number || !rules.has(Rule::S6) {
        *state.link_mut(target) = Link { attached: true, slot: 0, ..link };
    }
}
