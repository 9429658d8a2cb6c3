//! A trace in plain words.
//!
//! Invariant: one line per step, and the words of the glossary.

use crate::state::Duty;
use crate::state::Form;
use crate::state::Lack;
use crate::state::Outcome;
use crate::state::Phase;
use crate::state::Sent;
use crate::state::Shape;
use crate::state::Side;
use crate::state::State;
use crate::state::Transaction;
use crate::step::ControllerVerb;
use crate::step::ProxyVerb;
use crate::step::Step;
use crate::step::WriterVerb;

const fn side(side: Side) -> &'static str {
    match side {
        Side::Blue => "blue",
        Side::Green => "green",
    }
}

/// What happened in a step that led to `after`.
pub fn line(step: Step, after: &State) -> String {
    match step {
        Step::Proxy(index, verb) => format!("proxy {}: {}", index + 1, proxy(index, verb, after)),
        Step::Controller(verb) => format!("controller: {}", controller(verb, after)),
        Step::Arrives(sent, number) => format!("store: {} of epoch {number} arrives", statement(sent)),
        Step::Writer(verb) => format!("writer past the proxies: {}", writer(verb)),
        Step::Cut(cut) => format!("network: proxy {} can not reach {} any more", cut.proxy + 1, side(cut.side)),
        Step::Mend => "network: whole again".to_owned(),
        Step::FenceExpires(at) => format!("time: the fence on {} expires", side(at)),
    }
}

const fn statement(sent: Sent) -> &'static str {
    match sent {
        Sent::Flip => "flip",
        Sent::Guard => "guard",
        Sent::Unfence => "unfence",
        Sent::Settle => "settle",
        Sent::Detach => "S10's drop of the subscription",
        Sent::Attach => "S10's subscription of the old source",
        Sent::Commit => "decide(commit)",
        Sent::Abort => "decide(abort)",
        Sent::Switch => "SWITCH",
        Sent::Resume => "RESUME",
    }
}

fn proxy(index: usize, verb: ProxyVerb, after: &State) -> String {
    let proxy = after.proxies[index];
    let now = phase(proxy.phase);
    let route = format!("{} (epoch {})", side(after.route(index)), proxy.route_epoch);
    match verb {
        ProxyVerb::Pause(number) => format!("PAUSE of epoch {number} arrives; drained and held"),
        ProxyVerb::Switch(number) => format!("SWITCH of epoch {number} arrives; its route is {route}"),
        ProxyVerb::Resume(number) => format!("RESUME of epoch {number} arrives; it serves {route}"),
        ProxyVerb::LeaseEnd => format!("its lease ends; it {now}"),
        ProxyVerb::Decide => format!("its decide(abort) is answered; it {now}, route {route}"),
        ProxyVerb::Look => format!("it looks; it {now}, route {route}"),
        ProxyVerb::Kill => "it dies".to_owned(),
        ProxyVerb::Start => format!("it starts at {route}; it {now}"),
        ProxyVerb::StartStale(_) => format!("it starts at an old route, {route}; it {now}"),
    }
}

fn controller(verb: ControllerVerb, after: &State) -> String {
    let number = after.controller.epoch;
    match verb {
        ControllerVerb::Open(source) => {
            format!(
                "a new run opens epoch {number} from {} to {}; guard and PAUSE are sent",
                side(source),
                side(source.other())
            )
        }
        ControllerVerb::Fence => format!("every living proxy is paused at epoch {number}; flip is sent"),
        ControllerVerb::Attach => "S10: the subscription of the old source is ordered".to_owned(),
        ControllerVerb::Check => format!("the checks of epoch {number} are green; decide(commit) is sent"),
        ControllerVerb::RenewRefused => format!("a RENEW is refused; it asks for the abort of epoch {number}"),
        ControllerVerb::Abort => format!("it gives up and asks for the abort of epoch {number}"),
        ControllerVerb::ResumeRun => format!("resume-run of epoch {number}"),
        ControllerVerb::Finish => "it reads the outcome, sends what follows from it, and ends".to_owned(),
        ControllerVerb::Crash => "it dies".to_owned(),
        ControllerVerb::Closed => "its epoch was closed over it; it ends".to_owned(),
    }
}

fn writer(verb: WriterVerb) -> String {
    match verb {
        WriterVerb::Snapshot(at) => format!("takes a REPEATABLE READ snapshot on {}", side(at)),
        WriterVerb::Write(at) => format!("writes on {} and stays open", side(at)),
        WriterVerb::End => "ends its transaction".to_owned(),
    }
}

const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Down => "is down",
        Phase::Looking => "has yet to look, and serves nobody",
        Phase::Serving => "serves",
        Phase::Held => "holds",
        Phase::Asking => "holds and asks for an abort",
    }
}

/// A state, a line for each thing in it.
pub fn picture(state: &State, shape: Shape) -> Vec<String> {
    let mut lines = vec![format!("the database belongs to {}", side(state.owner))];
    for number in state.opened() {
        let epoch = state.epoch(number);
        let outcome = match epoch.outcome {
            Outcome::Undecided => "undecided",
            Outcome::Commit => "commit",
            Outcome::Abort => "abort",
        };
        let evidence = if epoch.evidence { ", evidence on its target" } else { "" };
        lines.push(format!("epoch {number} from {}: {outcome}{evidence}", side(epoch.source)));
    }
    for at in [Side::Blue, Side::Green] {
        let gate = state.gates[at.index()];
        let form = match gate.form {
            Form::Open => "open".to_owned(),
            Form::Fenced => format!("the fence of epoch {}", gate.epoch),
            Form::Target => format!("shut until evidence of epoch {}", gate.epoch),
        };
        lines.push(format!("gate on {}: {form}{}", side(at), if gate.expired { ", expired" } else { "" }));
    }
    for (index, proxy) in state.proxies.iter().take(shape.proxies()).enumerate() {
        let who = match index {
            listed if listed < shape.listed => "",
            member if member < shape.heeded() => " (not listed, a member)",
            _ => " (unknown)",
        };
        let hold = if proxy.hold > 0 { format!(" at epoch {}", proxy.hold) } else { String::new() };
        let route = side(state.route(index));
        let (doing, since) = (phase(proxy.phase), proxy.route_epoch);
        lines.push(format!("proxy {}{who} {doing}{hold}, route {route} (epoch {since})", index + 1));
    }
    lines.extend(state.cut.map(|cut| format!("proxy {} can not reach {}", cut.proxy + 1, side(cut.side))));
    if shape.data {
        lines.extend([Side::Blue, Side::Green].map(|from| replication(state, from)));
    }
    lines.push(format!("controller: {:?}", state.controller.duty).replace(&format!("{:?}", Duty::Idle), "none"));
    lines.extend(open_transaction(state));
    lines
}

fn replication(state: &State, from: Side) -> String {
    let link = state.link(from);
    let to = side(from.other());
    let attached = if link.attached { "is" } else { "is not" };
    let slot = if link.slot > 0 { format!(", a slot of epoch {} waits", link.slot) } else { String::new() };
    let lack = match link.lack {
        Lack::Nothing => "lacks nothing",
        Lack::Kept => "lacks what is kept for it",
        Lack::Gone => "lacks what nobody kept",
    };
    format!("{to} {attached} subscribed to {}{slot}; it {lack}", side(from))
}

fn open_transaction(state: &State) -> Option<String> {
    let at = side(state.writer.side);
    match state.writer.transaction {
        Transaction::None => None,
        Transaction::Snapshot => Some(format!("writer past the proxies: an old snapshot on {at}")),
        Transaction::Wrote => Some(format!("writer past the proxies: written on {at}, not committed")),
    }
}
