//! Every transition that is possible in a state, named by the product's verb.
//!
//! Invariant: `successors` is complete: what is not listed here cannot happen.

use crate::controller;
use crate::data;
use crate::proxy;
use crate::rules::Rule;
use crate::rules::Rules;
use crate::state::Cut;
use crate::state::Form;
use crate::state::Outcome;
use crate::state::Sent;
use crate::state::Shape;
use crate::state::Side;
use crate::state::State;
use crate::store;
use crate::writer;

/// What a proxy does or is made to do. Each says where the product does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyVerb {
    /// PAUSE of this epoch arrives.
    ///
    /// In `proxy/src/database/pause.rs`: pause_with, check_epoch; `proxy/src/gate.rs`: shut, drained.
    Pause(u8),
    /// SWITCH of this epoch arrives.
    ///
    /// In `proxy/src/database/switch.rs`: switch, read_commit, bear_witness; `proxy/src/route.rs`: switch.
    Switch(u8),
    /// RESUME of this epoch arrives.
    ///
    /// In `proxy/src/database/pause.rs`: resume_with, require_abort, open.
    Resume(u8),
    /// The lease of its hold ends.
    ///
    /// In `proxy/src/database/watch.rs`: settle_ended_lease; `proxy/src/gate.rs`: end_lease.
    LeaseEnd,
    /// It asks `decide(abort)` and acts on the answer.
    ///
    /// In `proxy/src/database/watch.rs`: settle_ended_lease, outcome_of, decide_abort.
    Decide,
    /// It reads its active backend, and does what follows.
    ///
    /// In `proxy/src/database/watch.rs`: look; `proxy/src/database/verdict.rs`: verdict; `proxy/src/database/switch.rs`:
    /// follow, hold_for, own_hold.
    Look,
    /// It dies.
    ///
    /// In nothing: kill -9, a machine that goes.
    Kill,
    /// It starts at its last route.
    ///
    /// In `proxy/src/database.rs`: start; `proxy/src/route.rs`: load.
    Start,
    /// It starts at an older route.
    ///
    /// In `proxy/src/database.rs`: start; `proxy/src/route.rs`: load.
    StartStale(u8),
}

/// What the controller does. Each says where the product does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControllerVerb {
    /// A new run opens an epoch on this side and sends guard and PAUSE.
    ///
    /// In `control/src/steps/paused.rs`: run, open, pause_all; `proxy/api/sql/objects.sql`: open.
    Open(Side),
    /// Everyone is paused: flip is sent.
    ///
    /// In `control/src/steps/fenced.rs`: run.
    Fence,
    /// Everything arrived, the way back is kept, the checks are green: `decide(commit)` is sent.
    ///
    /// In `control/src/steps/caught_up.rs`: run; `control/src/steps/way_back.rs`: run; `control/src/steps/checked.rs`: run;
    /// `control/src/steps/paused.rs`: members; `control/src/clusters/barrier.rs`: barrier;
    /// `control/src/steps/decided.rs`: run.
    Check,
    /// A RENEW is refused.
    ///
    /// In `control/src/engine.rs`: act, lease_lost; `proxy/src/database/pause.rs`: renew.
    RenewRefused,
    /// It gives up.
    ///
    /// In `control/src/engine.rs`: fail, go_back; `control/src/steps/decided.rs`: decide.
    Abort,
    /// It takes up the last epoch of its journal.
    ///
    /// In `control/src/commands/resume_run.rs`: run, take_up; `control/src/engine.rs`: take_up, taken_up;
    /// `control/src/commands/abort.rs`: run.
    ResumeRun,
    /// It reads the outcome and sends what follows.
    ///
    /// In `control/src/engine.rs`: go_back, undo_all; `control/src/steps/decided.rs`: run, evidence;
    /// `control/src/steps/switched.rs`: run; `control/src/steps/resumed.rs`: run; `control/src/steps/way_back.rs`: undo.
    Finish,
    /// S10: the forward subscription is gone, so the reverse one is ordered.
    ///
    /// In `control/src/steps/attached.rs`: run, finish.
    Attach,
    /// It dies.
    ///
    /// In nothing: kill -9, a machine that goes.
    Crash,
    /// Its epoch was closed over it.
    ///
    /// In nothing: only without R4.
    Closed,
}

/// What the writer past the proxies does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriterVerb {
    /// It takes a REPEATABLE READ snapshot on this side.
    ///
    /// In nothing: an application that goes past the proxies.
    Snapshot(Side),
    /// It writes on this side and stays open.
    ///
    /// In `proxy/api/sql/objects.sql`: put_gate, for what lets it pass or refuses it.
    Write(Side),
    /// It ends what it has open.
    ///
    /// In nothing: an application that goes past the proxies.
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
    /// The network between one proxy and one server breaks.
    Cut(Cut),
    /// It works again.
    Mend,
    /// The fence of this side expires. Only without R1.
    FenceExpires(Side),
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
    /// Everything as it is before the first run.
    pub fn first(&self) -> State {
        State::first(self.shape.crashes)
    }

    /// Puts every step that is possible, with the state after it, into `out`.
    pub fn successors(&self, state: &State, out: &mut Vec<(Step, State)>) {
        out.clear();
        self.controller_steps(state, out);
        self.arrivals(state, out);
        self.writer_steps(state, out);
        for index in 0..self.shape.proxies() {
            self.own_steps(state, index, out);
            self.orders(state, index, out);
        }
        if self.shape.cuts() {
            self.cuts(state, out);
        }
        if !self.rules.has(Rule::R1) {
            expiries(state, out);
        }
        if self.shape.data {
            out.iter_mut().for_each(|(_, next)| self.write_what_can_be(next));
        }
    }

    /// Puts the steps that proxies take by themselves into `out`, and with `mended` the network's recovery.
    pub fn unaided(&self, state: &State, mended: bool, out: &mut Vec<(Step, State)>) {
        out.clear();
        for index in 0..self.shape.proxies() {
            self.own_steps(state, index, out);
        }
        if mended {
            out.extend(proxy::mend(state, self.rules).map(|next| (Step::Mend, next)));
        }
        if self.shape.data {
            out.iter_mut().for_each(|(_, next)| self.write_what_can_be(next));
        }
    }

    fn own_steps(&self, state: &State, index: usize, out: &mut Vec<(Step, State)>) {
        let mut add = |verb, next: Option<State>| out.extend(next.map(|next| (Step::Proxy(index, verb), next)));
        let rules = self.rules;
        add(ProxyVerb::LeaseEnd, proxy::lease_end(state, index, rules));
        add(ProxyVerb::Decide, proxy::decide(state, index, self.shape, rules));
        add(ProxyVerb::Look, proxy::look(state, index, rules));
        add(ProxyVerb::Start, proxy::start(state, index, rules));
        for number in state.opened() {
            add(ProxyVerb::StartStale(number - 1), proxy::start_stale(state, index, number - 1, rules));
        }
    }

    fn write_what_can_be(&self, state: &mut State) {
        if self.takes_writes(state) {
            data::write(state, state.owner);
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
        add(ControllerVerb::Finish, controller::finish(state, shape, rules));
        add(ControllerVerb::Attach, controller::attach(state, rules));
        add(ControllerVerb::Crash, controller::crash(state));
        add(ControllerVerb::Closed, controller::closed(state));
    }

    fn arrivals(&self, state: &State, out: &mut Vec<(Step, State)>) {
        for number in state.opened() {
            for sent in Sent::TO_SERVERS {
                if !state.epoch(number).was_sent(sent) {
                    continue;
                }
                let mut next = *state;
                self.arrive(&mut next, sent, number);
                if next != *state {
                    out.push((Step::Arrives(sent, number), next));
                }
            }
        }
    }

    fn arrive(&self, next: &mut State, sent: Sent, number: u8) {
        match sent {
            Sent::Flip => store::flip(next, number, self.rules),
            Sent::Guard => store::guard(next, number, self.rules),
            Sent::Unfence => store::unfence(next, number, self.rules),
            Sent::Settle => store::settle(next, number),
            Sent::Commit => {
                store::decide(next, number, Outcome::Commit, self.shape.data);
            }
            Sent::Abort => {
                store::decide(next, number, Outcome::Abort, self.shape.data);
            }
            Sent::Detach => data::detach(next, number),
            Sent::Attach => data::attach(next, number, self.rules),
            Sent::Switch | Sent::Resume => {} // these arrive at proxies
        }
    }

    fn orders(&self, state: &State, index: usize, out: &mut Vec<(Step, State)>) {
        let mut add = |verb, next: Option<State>| out.extend(next.map(|next| (Step::Proxy(index, verb), next)));
        let rules = self.rules;
        if index < self.shape.listed {
            for number in state.opened() {
                add(ProxyVerb::Pause(number), proxy::pause(state, index, number, rules));
                add(ProxyVerb::Switch(number), proxy::switch(state, index, number, rules));
                add(ProxyVerb::Resume(number), proxy::resume(state, index, number, rules));
            }
        }
        add(ProxyVerb::Kill, proxy::kill(state, index));
    }

    fn writer_steps(&self, state: &State, out: &mut Vec<(Step, State)>) {
        let mut add = |verb, next: Option<State>| out.extend(next.map(|next| (Step::Writer(verb), next)));
        for side in [Side::Blue, Side::Green] {
            add(WriterVerb::Snapshot(side), writer::snapshot(state, side));
            add(WriterVerb::Write(side), writer::write(state, side, self.rules));
        }
        add(WriterVerb::End, writer::end(state, self.shape));
    }

    fn cuts(&self, state: &State, out: &mut Vec<(Step, State)>) {
        if state.cut.is_some() {
            out.extend(proxy::mend(state, self.rules).map(|next| (Step::Mend, next)));
            return;
        }
        for proxy in 0..self.shape.proxies() {
            for side in [Side::Blue, Side::Green] {
                let cut = Cut { proxy, side };
                out.push((Step::Cut(cut), State { cut: Some(cut), ..*state }));
            }
        }
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
