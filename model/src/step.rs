//! Every transition that is possible in a state, named by the product's verb.
//!
//! Invariant: `successors` is complete: what is not listed here cannot happen.

use crate::controller;
use crate::proxy;
use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::Form;
use crate::state::Outcome;
use crate::state::Sent;
use crate::state::Shape;
use crate::state::Side;
use crate::state::State;
use crate::store;
use crate::writer;

/// What a proxy does or is made to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyVerb {
    /// PAUSE of this epoch arrives.
    Pause(u8),
    /// SWITCH of this epoch arrives.
    Switch(u8),
    /// RESUME of this epoch arrives.
    Resume(u8),
    /// The lease of its hold ends.
    LeaseEnd,
    /// It asks `decide(abort)` and acts on the answer.
    Decide,
    /// It reads its active backend.
    Look,
    /// It reads a newer commit and goes to the other side.
    Follow,
    /// It dies.
    Kill,
    /// It starts at its last route.
    Start,
    /// It starts at an older route.
    StartStale(u8),
}

/// What the controller does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControllerVerb {
    /// A new run opens an epoch on this side and sends PAUSE.
    Open(Side),
    /// Everyone is paused: flip and guard are sent.
    Fence,
    /// The checks are green: `decide(commit)` is sent.
    Check,
    /// A RENEW is refused.
    RenewRefused,
    /// It gives up.
    Abort,
    /// It takes up the last epoch of its journal.
    ResumeRun,
    /// It reads the outcome and sends what follows.
    Finish,
    /// It dies.
    Crash,
    /// Its epoch was closed over it.
    Closed,
}

/// What the writer past the proxies does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriterVerb {
    /// It takes a REPEATABLE READ snapshot on this side.
    Snapshot(Side),
    /// It writes on this side and stays open.
    Write(Side),
    /// It ends what it has open.
    End,
}

/// One transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Of the proxy of this index.
    Proxy(usize, ProxyVerb),
    /// Of the controller.
    Controller(ControllerVerb),
    /// A statement that a controller sent for this epoch arrives, perhaps late, perhaps again.
    Arrives(Sent, u8),
    /// Of the writer.
    Writer(WriterVerb),
    /// The fence of this side expires. Only without R1.
    FenceExpires(Side),
}

impl Step {
    /// Whether proxies do this by themselves, without a controller and without anything dying.
    pub const fn is_unaided(self) -> bool {
        match self {
            Self::Proxy(_, verb) => match verb {
                ProxyVerb::LeaseEnd
                | ProxyVerb::Decide
                | ProxyVerb::Look
                | ProxyVerb::Follow
                | ProxyVerb::Start
                | ProxyVerb::StartStale(_) => true,
                ProxyVerb::Pause(_) | ProxyVerb::Switch(_) | ProxyVerb::Resume(_) | ProxyVerb::Kill => false,
            },
            Self::Controller(_) | Self::Arrives(..) | Self::Writer(_) | Self::FenceExpires(_) => false,
        }
    }
}

/// The machine: how many of everything, under which rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// How many of everything.
    pub shape: Shape,
    /// The rules that are on.
    pub rules: Rules,
}

impl Machine {
    /// Puts every step that is possible, with the state after it, into `out`.
    pub fn successors(&self, state: &State, out: &mut Vec<(Step, State)>) {
        out.clear();
        self.controller_steps(state, out);
        self.arrivals(state, out);
        for index in 0..self.shape.known + self.shape.strangers {
            self.proxy_steps(state, index, out);
        }
        self.writer_steps(state, out);
        if !self.rules.has(Rule::R1) {
            expiries(state, out);
        }
    }

    fn controller_steps(&self, state: &State, out: &mut Vec<(Step, State)>) {
        let mut add = |verb, next: Option<State>| out.extend(next.map(|next| (Step::Controller(verb), next)));
        let Self { shape, rules } = *self;
        for side in [Side::Blue, Side::Green] {
            add(ControllerVerb::Open(side), controller::open(state, side, shape, rules));
        }
        add(ControllerVerb::Fence, controller::fence(state, shape));
        add(ControllerVerb::Check, controller::check(state, shape, rules));
        add(ControllerVerb::RenewRefused, controller::renew_refused(state, shape));
        add(ControllerVerb::Abort, controller::abort(state));
        add(ControllerVerb::ResumeRun, controller::resume_run(state, rules));
        add(ControllerVerb::Finish, controller::finish(state, rules));
        add(ControllerVerb::Crash, controller::crash(state));
        add(ControllerVerb::Closed, controller::closed(state));
    }

    fn arrivals(&self, state: &State, out: &mut Vec<(Step, State)>) {
        for number in state.opened() {
            for sent in [Sent::Flip, Sent::Guard, Sent::Unfence, Sent::Commit, Sent::Abort] {
                if !state.epoch(number).was_sent(sent) {
                    continue;
                }
                let mut next = *state;
                match sent {
                    Sent::Flip => store::flip(&mut next, number, self.rules),
                    Sent::Guard => store::guard(&mut next, number, self.rules),
                    Sent::Unfence => store::unfence(&mut next, number, self.rules),
                    Sent::Commit => {
                        store::decide(&mut next, number, Outcome::Commit);
                    }
                    Sent::Abort => {
                        store::decide(&mut next, number, Outcome::Abort);
                    }
                    Sent::Switch | Sent::Resume => continue, // these arrive at proxies
                }
                if next != *state {
                    out.push((Step::Arrives(sent, number), next));
                }
            }
        }
    }

    fn proxy_steps(&self, state: &State, index: usize, out: &mut Vec<(Step, State)>) {
        let mut add = |verb, next: Option<State>| out.extend(next.map(|next| (Step::Proxy(index, verb), next)));
        let rules = self.rules;
        for number in state.opened() {
            if index < self.shape.known {
                add(ProxyVerb::Pause(number), proxy::pause(state, index, number, rules));
                add(ProxyVerb::Switch(number), proxy::switch(state, index, number, rules));
                add(ProxyVerb::Resume(number), proxy::resume(state, index, number, rules));
            }
            add(ProxyVerb::StartStale(number - 1), proxy::start_stale(state, index, number - 1));
        }
        add(ProxyVerb::LeaseEnd, proxy::lease_end(state, index, rules));
        add(ProxyVerb::Decide, proxy::decide(state, index, rules));
        add(ProxyVerb::Look, proxy::look(state, index, rules));
        add(ProxyVerb::Follow, proxy::follow(state, index, rules));
        add(ProxyVerb::Kill, proxy::kill(state, index));
        add(ProxyVerb::Start, proxy::start(state, index));
    }

    fn writer_steps(&self, state: &State, out: &mut Vec<(Step, State)>) {
        let mut add = |verb, next: Option<State>| out.extend(next.map(|next| (Step::Writer(verb), next)));
        for side in [Side::Blue, Side::Green] {
            add(WriterVerb::Snapshot(side), writer::snapshot(state, side));
            add(WriterVerb::Write(side), writer::write(state, side, self.rules));
        }
        add(WriterVerb::End, writer::end(state));
    }
}

fn expiries(state: &State, out: &mut Vec<(Step, State)>) {
    for side in [Side::Blue, Side::Green] {
        let gate = state.gates[side.index()];
        if gate.form == Form::Fenced && !gate.expired {
            let mut next = *state;
            next.gates[side.index()].expired = true;
            out.push((Step::FenceExpires(side), next));
        }
    }
}
