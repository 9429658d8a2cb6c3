//! A writer that goes past the proxies, straight to a server: READ COMMITTED, or REPEATABLE READ with an old snapshot.
//!
//! Invariant: it is where clients once were, and it obeys nothing but the gate of that server.

use crate::data;
use crate::rules::Rules;
use crate::state::Outcome;
use crate::state::Shape;
use crate::state::Side;
use crate::state::State;
use crate::state::Transaction;
use crate::state::Writer;
use crate::store;

const RESTS: Writer = Writer { transaction: Transaction::None, side: Side::Blue, seen: 0 };

/// Whether clients ever knew a side: it owned the database once.
pub(crate) fn knows(state: &State, side: Side) -> bool {
    let moved_there = |number: u8| {
        let epoch = state.epoch(number);
        epoch.source != side && epoch.outcome == Outcome::Commit
    };
    side == Side::Blue || state.owner == side || state.opened().any(moved_there)
}

/// Takes a REPEATABLE READ snapshot.
pub(crate) fn snapshot(state: &State, side: Side) -> Option<State> {
    let mut next = *state;
    if state.writer.transaction != Transaction::None || !knows(state, side) {
        return None;
    }
    next.writer = Writer { transaction: Transaction::Snapshot, side, seen: store::snapshot(state, side) };
    Some(next)
}

/// Writes on a side and stays open: through the snapshot it has, or at READ COMMITTED.
pub(crate) fn write(state: &State, side: Side, rules: Rules) -> Option<State> {
    let mut next = *state;
    if !may_write(state, side, rules) || state.writer.transaction == Transaction::Wrote {
        return None;
    }
    next.writer = Writer { transaction: Transaction::Wrote, side, seen: 0 };
    Some(next)
}

/// Whether its next statement on a side would be accepted, or what it wrote there can still be committed.
pub(crate) fn may_write(state: &State, side: Side, rules: Rules) -> bool {
    let writer = state.writer;
    match writer.transaction {
        Transaction::None => knows(state, side) && store::accepts(state, side, store::snapshot(state, side), rules),
        Transaction::Snapshot => writer.side == side && store::accepts(state, side, writer.seen, rules),
        Transaction::Wrote => writer.side == side,
    }
}

/// Ends whatever it has open; what it wrote is committed.
pub(crate) fn end(state: &State, shape: Shape) -> Option<State> {
    let mut next = *state;
    next.writer = RESTS;
    if shape.data && state.writer.transaction == Transaction::Wrote {
        data::write(&mut next, state.writer.side);
    }
    (state.writer != RESTS).then_some(next)
}
