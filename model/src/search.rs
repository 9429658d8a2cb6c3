//! A breadth-first walk through every state, and the search for those without a way back.
//!
//! Invariant: states are kept whole, so two of them are never taken for one; memory is bounded by `states_max`.

use crate::safety::Fault;
use crate::state::State;
use crate::step::Machine;
use crate::step::Step;

/// A state of no parent, or an empty place in the table.
const NONE: u32 = u32::MAX;

/// What a search found.
#[derive(Debug)]
pub struct Found {
    /// How many states were visited.
    pub states: usize,
    /// How many transitions were taken, those to states already known included.
    pub transitions: u64,
    /// Whether every reachable state was visited; if not, no conclusion beyond the faults can be drawn.
    pub complete: bool,
    /// The most steps from the first state to any other.
    pub depth: usize,
    /// The first of each kind of fault, reached by the shortest way.
    pub faults: Vec<(Fault, Trace)>,
}

/// A way from the first state, as the steps and the states after them.
pub type Trace = Vec<(Step, State)>;

/// What a search does beyond visiting everything.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// It gives up, incomplete, at this many states (each takes about 50 bytes).
    pub states_max: usize,
    /// It ends at the first fault of this kind.
    pub until: Option<Fault>,
}

impl Machine {
    /// Visits every state reachable from the first one.
    pub fn search(&self, wish: Wish) -> Found {
        let mut walk = Walk::new(*self);
        let complete = walk.run(wish);
        if complete && walk.wants_more(wish) {
            walk.note_stuck();
        }
        Found {
            states: walk.states.len(),
            transitions: walk.transitions,
            complete,
            depth: walk.trace(walk.states.len() - 1).len(),
            faults: walk.faults.iter().map(|&(fault, at)| (fault, walk.trace(at))).collect(),
        }
    }
}

struct Walk {
    machine: Machine,
    /// In the order of the visit: by distance from the first.
    states: Vec<u128>,
    parents: Vec<u32>,
    table: Table,
    /// For each visited state where its part of `unaided` ends.
    unaided_ends: Vec<u64>,
    /// Where the steps lead that proxies take by themselves.
    unaided: Vec<u32>,
    transitions: u64,
    faults: Vec<(Fault, usize)>,
}

impl Walk {
    fn new(machine: Machine) -> Self {
        let mut walk = Self {
            machine,
            states: Vec::new(),
            parents: Vec::new(),
            table: Table::new(),
            unaided_ends: Vec::new(),
            unaided: Vec::new(),
            transitions: 0,
            faults: Vec::new(),
        };
        walk.visit(State::first(machine.shape.crashes).pack(), NONE);
        walk
    }

    /// Whether all was visited.
    fn run(&mut self, wish: Wish) -> bool {
        let mut next = Vec::new();
        let mut at = 0;
        while at < self.states.len() {
            let state = State::unpack(self.states[at]);
            self.note_faults(&state, at);
            if !self.wants_more(wish) || self.states.len() > wish.states_max {
                return false;
            }
            // Two sides is the end of the story: what follows from it is of no interest.
            if !self.machine.two_sides(&state) {
                self.expand(&state, at, &mut next);
            }
            self.unaided_ends.push(self.unaided.len() as u64);
            at += 1;
        }
        true
    }

    fn expand(&mut self, state: &State, at: usize, next: &mut Vec<(Step, State)>) {
        self.machine.successors(state, next);
        self.transitions += next.len() as u64;
        for (step, after) in next.iter() {
            let index = self.visit(after.pack(), index_of(at));
            if step.is_unaided() {
                self.unaided.push(index);
            }
        }
    }

    fn visit(&mut self, word: u128, parent: u32) -> u32 {
        let fresh = index_of(self.states.len());
        let index = self.table.find_or_put(word, fresh, &self.states);
        if index == fresh {
            self.states.push(word);
            self.parents.push(parent);
            self.table.grow_if_full(&self.states);
        }
        index
    }

    fn wants_more(&self, wish: Wish) -> bool {
        !self.faults.iter().any(|&(fault, _)| Some(fault) == wish.until)
    }

    fn note_faults(&mut self, state: &State, at: usize) {
        if self.machine.two_sides(state) {
            self.note(Fault::TwoSides, at);
        }
        if self.machine.loser_served(state) {
            self.note(Fault::LoserServed, at);
        }
    }

    fn note(&mut self, fault: Fault, at: usize) {
        if !self.faults.iter().any(|&(known, _)| known == fault) {
            self.faults.push((fault, at));
        }
    }

    /// Finds the first state from which no chain of unaided steps leads to service.
    fn note_stuck(&mut self) {
        let mut good: Vec<bool> = self.states.iter().map(|&word| self.is_end(word)).collect();
        let mut changed = true;
        while changed {
            changed = false;
            // Unaided steps mostly lead to states visited later, so backwards one round does most of the work.
            for at in (0..good.len()).rev() {
                let start = if at == 0 { 0 } else { self.unaided_ends[at - 1] };
                let led_to = &self.unaided[usize_of(start)..usize_of(self.unaided_ends[at])];
                if !good[at] && led_to.iter().any(|&after| good[after as usize]) {
                    good[at] = true;
                    changed = true;
                }
            }
        }
        if let Some(at) = good.iter().position(|&good| !good) {
            self.note(Fault::Stuck, at);
        }
    }

    fn is_end(&self, word: u128) -> bool {
        let state = State::unpack(word);
        self.machine.in_service(&state) || self.machine.two_sides(&state)
    }

    fn trace(&self, at: usize) -> Trace {
        let mut way = Vec::new();
        let mut next = Vec::new();
        let mut at = at;
        while self.parents[at] != NONE {
            let parent = self.parents[at] as usize;
            let after = State::unpack(self.states[at]);
            self.machine.successors(&State::unpack(self.states[parent]), &mut next);
            way.extend(next.iter().find(|(_, state)| *state == after).copied());
            at = parent;
        }
        way.reverse();
        way
    }
}

fn index_of(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(NONE) // states_max keeps it below
}

fn usize_of(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX) // it was a length
}

/// A hash table from packed states to their indices; the states themselves live in the walk.
struct Table {
    places: Vec<u32>,
}

impl Table {
    fn new() -> Self {
        Self { places: vec![NONE; 1 << 16] }
    }

    /// The index of a state, which is `fresh` if it was not there.
    fn find_or_put(&mut self, word: u128, fresh: u32, states: &[u128]) -> u32 {
        let mask = self.places.len() - 1;
        let mut place = hash(word) & mask;
        loop {
            match self.places[place] {
                NONE => {
                    self.places[place] = fresh;
                    return fresh;
                }
                index if states[index as usize] == word => return index,
                _ => place = (place + 1) & mask,
            }
        }
    }

    fn grow_if_full(&mut self, states: &[u128]) {
        if states.len() * 2 < self.places.len() {
            return;
        }
        let mut bigger = Self { places: vec![NONE; self.places.len() * 2] };
        for (index, &word) in states.iter().enumerate() {
            bigger.find_or_put(word, index_of(index), states);
        }
        *self = bigger;
    }
}

/// Two rounds of multiply and fold: the packed bits are few and close together.
fn hash(word: u128) -> usize {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15; // 2^64 over the golden ratio
    let [low, high] = [word as u64, (word >> 64) as u64];
    let mixed = (low ^ high.rotate_left(32)).wrapping_mul(ODD);
    let mixed = (mixed ^ (mixed >> 29) ^ high).wrapping_mul(ODD);
    usize::try_from(mixed ^ (mixed >> 32)).unwrap_or(0) // 64-bit machines only
}
