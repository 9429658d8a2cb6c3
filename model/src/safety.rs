//! What must never be, and what must always be within reach.
//!
//! Invariant: these look at a state only; they know nothing of how it came to be.

use std::fmt;

use crate::state::Phase;
use crate::state::Side;
use crate::state::State;
use crate::step::Machine;
use crate::store;
use crate::writer;

/// A way in which a state is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A client's write would be acknowledged on a side that does not own the database.
    TwoSides,
    /// A proxy that the controller was told of serves a side that does not own the database.
    LoserServed,
    /// The proxies alone can not get back to service from here.
    Stuck,
}

impl Fault {
    /// Every one of them.
    pub const ALL: [Self; 3] = [Self::TwoSides, Self::LoserServed, Self::Stuck];
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TwoSides => "two sides: a write would be acknowledged on the side that does not own the database",
            Self::LoserServed => "the loser is served: a proxy answers reads from the side that lost the database",
            Self::Stuck => "stuck: with the controller dead the proxies can never get back to service",
        })
    }
}

impl Machine {
    /// Whether a client's write would be acknowledged on the side that does not own the database.
    pub fn two_sides(&self, state: &State) -> bool {
        let loser = state.owner.other();
        writer::may_write(state, loser, self.rules) || (self.routed_to(state, loser) && self.accepts_now(state, loser))
    }

    /// Whether a known proxy serves the side that does not own the database.
    ///
    /// One that the controller was not told of may, for the second until it looks: its writes are refused.
    pub fn loser_served(&self, state: &State) -> bool {
        let loser = state.owner.other();
        state.proxies.iter().take(self.shape.known).any(|proxy| proxy.phase == Phase::Serving && proxy.route == loser)
    }

    /// Whether every proxy serves the owner, and the owner takes writes.
    pub fn in_service(&self, state: &State) -> bool {
        let all = self.shape.known + self.shape.strangers;
        let mut proxies = state.proxies.iter().take(all);
        proxies.all(|proxy| proxy.phase == Phase::Serving && proxy.route == state.owner)
            && self.accepts_now(state, state.owner)
    }

    fn routed_to(&self, state: &State, side: Side) -> bool {
        let all = self.shape.known + self.shape.strangers;
        state.proxies.iter().take(all).any(|proxy| proxy.phase == Phase::Serving && proxy.route == side)
    }

    fn accepts_now(&self, state: &State, side: Side) -> bool {
        store::accepts(state, side, store::snapshot(state, side), self.rules)
    }
}
