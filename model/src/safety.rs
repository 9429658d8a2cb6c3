//! What must never be, and what must always be within reach.
//!
//! Invariant: these look at a state only; they know nothing of how it came to be.

use std::fmt;

use crate::state::Phase;
use crate::state::Shape;
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
    /// A proxy that is listed or enrolled serves a side that does not own the database.
    LoserServed,
    /// The database was moved to a side that lacked an acknowledged write.
    Lost,
    /// Each side is subscribed to the other: a change goes round.
    Echo,
    /// The proxies alone can not get back to service from here, even on a whole network.
    Stuck,
    /// A proxy that reaches the side that owns the database can not get back to service while it does not reach the other.
    Stranded,
}

impl Fault {
    /// Every one of them.
    pub const ALL: [Self; 6] = [Self::TwoSides, Self::LoserServed, Self::Lost, Self::Echo, Self::Stuck, Self::Stranded];

    /// Whether a search of this shape can find it.
    pub const fn is_looked_for(self, shape: Shape) -> bool {
        match self {
            Self::Lost | Self::Echo => shape.data,
            Self::Stranded => shape.cuts(),
            Self::TwoSides | Self::LoserServed | Self::Stuck => true,
        }
    }

    /// Whether it is one of a way that is not there, and so only found once everything was visited.
    pub const fn needs_all(self) -> bool {
        match self {
            Self::Stuck | Self::Stranded => true,
            Self::TwoSides | Self::LoserServed | Self::Lost | Self::Echo => false,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TwoSides => "two sides: a write would be acknowledged on the side that does not own the database",
            Self::LoserServed => "the loser is served: a proxy answers reads from the side that lost the database",
            Self::Lost => "lost: the database was moved to a side that lacked an acknowledged write",
            Self::Echo => "echo: each side is subscribed to the other",
            Self::Stranded => "stranded: a proxy that reaches the owner waits for the server that lost",
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

    /// Whether a listed or enrolled proxy serves the side that does not own the database.
    ///
    /// One that nobody knows of may, for the second until it looks: its writes are refused.
    pub fn loser_served(&self, state: &State) -> bool {
        let loser = state.owner.other();
        (0..self.shape.heeded()).any(|index| serves(state, index, loser))
    }

    /// Whether each side is subscribed to the other.
    pub fn echo(&self, state: &State) -> bool {
        state.links.iter().all(|link| link.attached)
    }

    /// The faults of this state alone, one after the other.
    pub fn faults(&self, state: &State) -> impl Iterator<Item = Fault> {
        let all = [
            (Fault::TwoSides, self.two_sides(state)),
            (Fault::LoserServed, self.loser_served(state)),
            (Fault::Lost, state.lost),
            (Fault::Echo, self.echo(state)),
        ];
        all.into_iter().filter(|(_, there)| *there).map(|(fault, _)| fault)
    }

    /// Whether what follows is of no interest any more: two sides, or something lost.
    pub fn is_over(&self, state: &State) -> bool {
        state.lost || self.two_sides(state)
    }

    /// Whether every proxy serves the owner, and the owner takes writes.
    pub fn in_service(&self, state: &State) -> bool {
        let mut proxies = 0..self.shape.proxies();
        proxies.all(|index| serves(state, index, state.owner)) && self.takes_writes(state)
    }

    /// The same of the proxies that reach the owner. One that does not, or that reaches it while the commit is known on the
    /// other side only, has to wait.
    pub fn in_service_so_far(&self, state: &State) -> bool {
        let told = store::newest_commit(state, state.owner.other()).is_none_or(|number| state.epoch(number).evidence);
        let excused = |index| state.is_cut(index, state.owner) || (state.is_cut(index, state.owner.other()) && !told);
        let mut others = (0..self.shape.proxies()).filter(|&index| !excused(index)).peekable();
        (others.peek().is_none() || self.takes_writes(state)) && others.all(|index| serves(state, index, state.owner))
    }

    /// Whether a write is accepted now on the owner.
    pub fn takes_writes(&self, state: &State) -> bool {
        self.accepts_now(state, state.owner)
    }

    fn routed_to(&self, state: &State, side: Side) -> bool {
        (0..self.shape.proxies()).any(|index| serves(state, index, side))
    }

    fn accepts_now(&self, state: &State, side: Side) -> bool {
        store::accepts(state, side, store::snapshot(state, side), self.rules)
    }
}

fn serves(state: &State, index: usize, side: Side) -> bool {
    let serving = state.proxies[index].phase == Phase::Serving && state.route(index) == side;
    serving && !state.is_cut(index, side)
}
