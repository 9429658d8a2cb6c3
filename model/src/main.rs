//! Walks through every state of the cutover protocol and says what it found.
//!
//! Exit codes: 0 no fault, 1 a fault, 2 usage, 3 a search was cut short by `--states-max`.

use std::io::IsTerminal;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use model::campaign;
use model::rules::Rule;
use model::rules::Rules;
use model::safety::Fault;
use model::search::Found;
use model::search::Trace;
use model::search::Wish;
use model::state::CRASHES_ANY;
use model::state::Network;
use model::state::PROXIES_MAX;
use model::state::Shape;
use model::step::Machine;
use model::words;

/// An exhaustive search through the cutover protocol
#[derive(Parser)]
#[command(version)]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
struct Args {
    /// Every search of the table in ARCHITECTURE.md, one after the other; the other options but --states-max are ignored
    #[arg(long)]
    campaign: bool,
    /// Proxies that the controller was told of
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=3))]
    proxies: u8,
    /// Proxies that it was not told of, but that enrolled themselves as members
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    members: u8,
    /// Proxies that nobody knows of (3 proxies in all)
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    strangers: u8,
    /// Epochs that may be opened: cutovers, rollbacks, and those that are aborted
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    epochs: u8,
    /// Times the controller may crash; 3 is any number
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=3))]
    crashes: u8,
    /// One proxy at a time may be cut off from one server
    #[arg(long)]
    cuts: bool,
    /// Data too: subscriptions, catch-up, the way back
    #[arg(long)]
    data: bool,
    /// Rules to drop, with commas; an unknown one gets the list of all
    #[arg(long, value_delimiter = ',')]
    without: Vec<Rule>,
    /// Give up at this many states (about 30 bytes each)
    #[arg(long, default_value_t = 180_000_000)]
    states_max: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.campaign {
        let worst = campaign::SHAPES.iter().map(|&shape| one(shape, &[], args.states_max)).max();
        return ExitCode::from(worst.unwrap_or(0));
    }
    let shape = Shape {
        listed: usize::from(args.proxies),
        members: usize::from(args.members),
        strangers: usize::from(args.strangers),
        epochs: usize::from(args.epochs),
        crashes: args.crashes,
        network: if args.cuts { Network::Cuts } else { Network::Whole },
        data: args.data,
    };
    if shape.proxies() > PROXIES_MAX {
        say(&format!("at most {PROXIES_MAX} proxies in all"));
        return ExitCode::from(2);
    }
    ExitCode::from(one(shape, &args.without, args.states_max))
}

/// One search; its exit code.
fn one(shape: Shape, without: &[Rule], states_max: usize) -> u8 {
    let machine = Machine { shape, rules: Rules::without(without) };
    let began = Instant::now();
    let terminal = std::io::stderr().is_terminal();
    let progress = |done: usize, known: usize| {
        if terminal {
            murmur(&format!("{done} of {known} states, {:.0} s", began.elapsed().as_secs_f64()));
        }
    };
    let found = machine.search(Wish { states_max, until: None, progress: &progress });
    if terminal {
        murmur("");
    }
    say(&headline(shape, without));
    say(&format!(
        "{} states, {} transitions, depth {}, {:.1} s{}",
        found.states,
        found.transitions,
        found.depth,
        began.elapsed().as_secs_f64(),
        if found.complete { "" } else { "; NOT COMPLETE" }
    ));
    verdict(&found, shape)
}

fn headline(shape: Shape, without: &[Rule]) -> String {
    let crashes = if shape.crashes == CRASHES_ANY { "any number of".to_owned() } else { shape.crashes.to_string() };
    let dropped: Vec<_> = without.iter().map(|rule| rule.name()).collect();
    let rules = if dropped.is_empty() { "all rules".to_owned() } else { format!("without {}", dropped.join(", ")) };
    let cuts = if shape.cuts() { ", a proxy cut off from one server" } else { "" };
    let data = if shape.data { ", data" } else { "" };
    format!(
        "{} listed proxies, {} members, {} strangers, {} epochs, {crashes} controller crashes{cuts}{data}, {rules}",
        shape.listed, shape.members, shape.strangers, shape.epochs
    )
}

fn verdict(found: &Found, shape: Shape) -> u8 {
    for fault in Fault::ALL {
        match found.faults.iter().find(|(kind, _)| *kind == fault) {
            Some((_, trace)) => tell(fault, trace, shape),
            None if fault.is_looked_for(shape) && (found.complete || !fault.needs_all()) => {
                say(&format!("none: {fault}"))
            }
            None => say(&format!("not searched: {fault}")),
        }
    }
    match (found.faults.is_empty(), found.complete) {
        (true, true) => 0,
        (true, false) => 3,
        (false, _) => 1,
    }
}

fn tell(fault: Fault, trace: &Trace, shape: Shape) {
    say(&format!("FOUND in {} steps: {fault}", trace.len()));
    for (number, (step, after)) in trace.iter().enumerate() {
        say(&format!("  {:>2}. {}", number + 1, words::line(*step, after)));
    }
    if let Some((_, last)) = trace.last() {
        for line in words::picture(last, shape) {
            say(&format!("      {line}"));
        }
    }
}

#[expect(clippy::print_stdout, reason = "the one place that prints: results are data")]
fn say(line: &str) {
    println!("{line}");
}

/// Progress, in place of the last one.
fn murmur(line: &str) {
    // A terminal that does not take it misses nothing.
    let _ = write!(std::io::stderr(), "\r\x1b[K{line}");
}
