//! A breadth-first walk through every state, and the search for those without a way back.
//!
//! Invariant: states are kept whole, so two of them are taken for one only where the proxies have changed places; memory is
//! bounded by `states_max`.

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
#[derive(Clone, Copy)]
pub struct Wish<'a> {
    /// It gives up, incomplete, at this many states (each takes about 30 bytes).
    pub states_max: usize,
    /// It ends at the first fault of this kind.
    pub until: Option<Fault>,
    /// Is told now and then how many states are done, of how many that are known.
    pub progress: &'a dyn Fn(usize, usize),
}

/// How many states are done between two tidings of progress.
const TIDINGS: usize = 1 << 19;

impl Machine {
    /// Visits every state reachable from the first one; states that differ only in which proxy is which are one.
    pub fn search(&self, wish: Wish<'_>) -> Found {
        let mut walk = Walk::new(*self);
        let complete = walk.run(wish);
        if complete && walk.wants_more(wish) {
            walk.note_no_way(Fault::Stuck);
            if self.shape.cuts() {
                walk.note_no_way(Fault::Stranded);
            }
        }
        Found {
            states: walk.states.len(),
            transitions: walk.transitions,
            complete,
            depth: walk.way(walk.states.len() - 1).len(),
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
            transitions: 0,
            faults: Vec::new(),
        };
        walk.visit(walk.word(&machine.first()), NONE);
        walk
    }

    /// Whether all was visited.
    fn run(&mut self, wish: Wish<'_>) -> bool {
        let mut next = Vec::new();
        let mut at = 0;
        while at < self.states.len() {
            let state = State::unpack(self.states[at]);
            let machine = self.machine;
            for fault in machine.faults(&state) {
                self.note(fault, at);
            }
            if !self.wants_more(wish) || self.states.len() > wish.states_max {
                return false;
            }
            if !self.machine.is_over(&state) {
                self.expand(&state, at, &mut next);
            }
            at += 1;
            if at % TIDINGS == 0 {
                (wish.progress)(at, self.states.len());
            }
        }
        true
    }

    fn expand(&mut self, state: &State, at: usize, next: &mut Vec<(Step, State)>) {
        self.machine.successors(state, next);
        self.transitions += next.len() as u64;
        for (_, after) in next.iter() {
            self.visit(self.word(after), index_of(at));
        }
    }

    fn word(&self, state: &State) -> u128 {
        state.sorted(self.machine.shape).pack()
    }

    fn visit(&mut self, word: u128, parent: u32) {
        let fresh = index_of(self.states.len());
        if self.table.find_or_put(word, fresh, &self.states) == fresh {
            self.states.push(word);
            self.parents.push(parent);
            self.table.grow_if_full(&self.states);
        }
    }

    fn wants_more(&self, wish: Wish<'_>) -> bool {
        !self.faults.iter().any(|&(fault, _)| Some(fault) == wish.until)
    }

    fn note(&mut self, fault: Fault, at: usize) {
        if !self.faults.iter().any(|&(known, _)| known == fault) {
            self.faults.push((fault, at));
        }
    }

    /// Finds the first state from which no chain of the proxies' own steps leads to service.
    fn note_no_way(&mut self, fault: Fault) {
        let mut good: Vec<bool> = self.states.iter().map(|&word| self.is_end(word, fault)).collect();
        let mut next = Vec::new();
        let mut changed = true;
        while changed {
            changed = false;
            // The proxies' own steps mostly lead to states visited later, so backwards one round does most of the work.
            for at in (0..good.len()).rev() {
                if good[at] {
                    continue;
                }
                self.machine.unaided(&State::unpack(self.states[at]), fault == Fault::Stuck, &mut next);
                good[at] = next.iter().any(|(_, after)| good[self.table.find(self.word(after), &self.states)]);
                changed |= good[at];
            }
        }
        if let Some(at) = good.iter().position(|&good| !good) {
            self.note(fault, at);
        }
    }

    fn is_end(&self, word: u128, fault: Fault) -> bool {
        let state = State::unpack(word);
        let served = match fault {
            Fault::Stranded => self.machine.in_service_so_far(&state),
            Fault::Stuck | Fault::TwoSides | Fault::LoserServed | Fault::Lost | Fault::Echo => {
                self.machine.in_service(&state)
            }
        };
        served || self.machine.is_over(&state)
    }

    /// The states from the first one's successor to this one.
    fn way(&self, at: usize) -> Vec<u128> {
        let mut way = Vec::new();
        let mut at = at;
        while self.parents[at] != NONE {
            way.push(self.states[at]);
            at = self.parents[at] as usize;
        }
        way.reverse();
        way
    }

    /// The same as steps: states are kept sorted, and a story needs each proxy to keep its place.
    fn trace(&self, at: usize) -> Trace {
        let mut state = self.machine.first();
        let mut next = Vec::new();
        let mut trace = Vec::new();
        for word in self.way(at) {
            self.machine.successors(&state, &mut next);
            let Some(&(step, after)) = next.iter().find(|(_, after)| self.word(after) == word) else { break };
            trace.push((step, after));
            state = after;
        }
        trace
    }
}

fn index_of(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(NONE) // states_max keeps it below
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

    /// The index of a state that is there.
    fn find(&self, word: u128, states: &[u128]) -> usize {
        let mask = self.places.len() - 1;
        let mut place = hash(word) & mask;
        // Ended by the state, or by an empty place: there always is one.
        while self.places[place] != NONE && states[self.places[place] as usize] != word {
            place = (place + 1) & mask;
        }
        self.places[place] as usize
    }

    fn grow_if_full(&mut self, states: &[u128]) {
        // Three quarters: memory is what bounds a search.
        if states.len() * 4 < self.places.len() * 3 {
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
