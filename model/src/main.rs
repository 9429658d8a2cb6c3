//! Walks through every state of the cutover protocol and says what it found.
//!
//! Exit codes: 0 no fault, 1 a fault, 2 usage, 3 the search was cut short by `--states-max`.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use model::rules::Rule;
use model::rules::Rules;
use model::safety::Fault;
use model::search::Found;
use model::search::Trace;
use model::search::Wish;
use model::state::CRASHES_ANY;
use model::state::Shape;
use model::step::Machine;
use model::words;

/// An exhaustive search through the cutover protocol
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Proxies that the controller knows of
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=4))]
    proxies: u8,
    /// Proxies that nobody told the controller of (4 proxies in all)
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=4))]
    strangers: u8,
    /// Epochs that may be opened
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    epochs: u8,
    /// Times the controller may crash; 7 is any number
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(0..=7))]
    crashes: u8,
    /// Rules to drop, with commas: R1 R2 R3 R3-guard R4 R4-side R4-active R5 R7 R7-pause R8 R8-start-up R9 R10 R10-witness
    #[arg(long, value_delimiter = ',')]
    without: Vec<Rule>,
    /// Give up at this many states (about 50 bytes each)
    #[arg(long, default_value_t = 60_000_000)]
    states_max: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.proxies + args.strangers > 4 {
        say("at most 4 proxies in all");
        return ExitCode::from(2);
    }
    let shape = Shape {
        known: usize::from(args.proxies),
        strangers: usize::from(args.strangers),
        epochs: usize::from(args.epochs),
        crashes: args.crashes,
    };
    let machine = Machine { shape, rules: Rules::without(&args.without) };
    let began = Instant::now();
    let found = machine.search(Wish { states_max: args.states_max, until: None });
    say(&headline(&args));
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

fn headline(args: &Args) -> String {
    let crashes = if args.crashes == CRASHES_ANY { "any number of".to_owned() } else { args.crashes.to_string() };
    let dropped: Vec<_> = args.without.iter().map(|rule| rule.name()).collect();
    let rules = if dropped.is_empty() { "all rules".to_owned() } else { format!("without {}", dropped.join(", ")) };
    format!(
        "{} proxies, {} unknown to the controller, {} epochs, {crashes} controller crashes, {rules}",
        args.proxies, args.strangers, args.epochs
    )
}

fn verdict(found: &Found, shape: Shape) -> ExitCode {
    for fault in Fault::ALL {
        match found.faults.iter().find(|(kind, _)| *kind == fault) {
            Some((_, trace)) => tell(fault, trace, shape),
            None if fault == Fault::Stuck && !found.complete => say("not searched: stuck states"),
            None => say(&format!("none: {fault}")),
        }
    }
    match (found.faults.is_empty(), found.complete) {
        (true, true) => ExitCode::SUCCESS,
        (true, false) => ExitCode::from(3),
        (false, _) => ExitCode::FAILURE,
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
