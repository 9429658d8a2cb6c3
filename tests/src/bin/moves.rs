//! The same move three ways under the same load: by pgcutover, by a script around PgBouncers, by ending every session.
//!
//! `cargo run -p e2e --bin moves`: what clients noticed of each, run after run, and their sum.
//!
//! Invariant: exit code 0 means that no move by pgcutover failed, lost, doubled or showed anybody an error, and that the
//! account of every other one is complete.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use e2e::binaries::{Binaries, Network};
use e2e::bouncer::Bouncer;
use e2e::moves::{Move, Moved, Way};
use e2e::printer::{result, say};
use e2e::product::Product;
use e2e::program::{self, Output};
use e2e::run_dir::RunDir;
use e2e::samples::Stalls;
use serde::Serialize;

/// Moves a loaded database, each time with servers of its own, and says what its clients noticed.
///
/// Exit codes: 0 no move by pgcutover failed or was noticed as an error, and every account is complete; 1 otherwise; 2 usage;
/// 75 server binaries are missing.
#[derive(Debug, Parser)]
#[command(name = "moves")]
#[expect(clippy::struct_excessive_bools, reason = "flags on a command line are booleans")]
struct Args {
    /// Runs of each way, in turn
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Who moves
    #[arg(long, value_enum, default_value_t = Ways::All)]
    way: Ways,
    /// Open-loop clients
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=999))]
    clients: u32,
    /// Writes a second of all clients together
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    writes: u32,
    /// Proxies, or PgBouncers
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
    proxies: u16,
    /// Seconds of load before the move, and after it
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Major version of the old server
    #[arg(long, default_value_t = 13)]
    from: u32,
    /// Major version of the new one
    #[arg(long, default_value_t = 17)]
    to: u32,
    /// Rehearse before each move by pgcutover, and compare what it predicted with what happened
    #[arg(long)]
    rehearse: bool,
    /// Stdout: a table, or a line of JSON for each run and one for the sum
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Keep data directories, logs and journals
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ways {
    /// proxyctl and proxies
    Pgcutover,
    /// PAUSE, edit, RELOAD, RESUME
    Pgbouncer,
    /// Read-only, pg_terminate_backend, clients reconnect
    Terminate,
    /// One after the other
    All,
}

impl Ways {
    fn each(self) -> Vec<Way> {
        match self {
            Ways::Pgcutover => vec![Way::Pgcutover],
            Ways::Pgbouncer => vec![Way::Pgbouncer],
            Ways::Terminate => vec![Way::Terminate],
            Ways::All => Way::ALL.to_vec(),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("moves", async {
        let moved = moves(&args).await?;
        let sums: Vec<Sum> = args.way.each().into_iter().map(|way| Sum::of(way, &moved)).collect();
        match args.output {
            Output::Json => result(serde_json::to_string(&sums)?),
            Output::Text => result(table(&args, Product::build()?.profile(), &sums)),
        }
        let is_good = |moved: &Moved| moved.adds_up() && (moved.way != Way::Pgcutover || moved.is_good());
        Ok(program::exit(moved.iter().all(is_good)))
    })
}

async fn moves(args: &Args) -> Result<Vec<Moved>> {
    if args.keep {
        RunDir::current()?.keep()?;
    }
    let binaries = Binaries::of(&[args.from, args.to])?;
    let ways = args.way.each();
    if ways.contains(&Way::Pgbouncer) {
        Bouncer::installed(Network::from_env())?;
    }
    Product::build()?;
    let mut all = Vec::new();
    for run in 1..=args.runs {
        for way in &ways {
            let wanted = Move {
                way: *way,
                majors: (args.from, args.to),
                fronts: args.proxies,
                clients: args.clients,
                writes_per_s: args.writes,
                around: Duration::from_secs(args.seconds),
                rehearse: args.rehearse,
            };
            let moved = wanted.run(&binaries).await?;
            if stderr().is_terminal() || !moved.adds_up() || moved.story.is_some() {
                say(line(run, args.runs, &moved));
            }
            if args.output == Output::Json {
                result(serde_json::to_string(&moved)?);
            }
            all.push(moved);
        }
    }
    Ok(all)
}

/// One run, for whoever watches.
fn line(run: u32, runs: u32, moved: &Moved) -> String {
    let Moved { way, outcome, pause_ms, stall_ms, account, in_doubt, cpu, .. } = moved;
    let mut line = format!(
        "{run:>3} of {runs}: {:<9} {outcome}, pause {pause_ms:.0} ms, stall p50 {:.0} p99 {:.0} max {:.0} ms (before {:.0}), \
         {} errors, {} lost, {} doubled, {in_doubt} in doubt, {:.0} writes/s; cores: servers {:.2}, fronts {:.2}, load {:.2}",
        way.word(),
        stall_ms.p50,
        stall_ms.p99,
        stall_ms.max,
        moved.stall_ms_before.max,
        account.errors,
        account.lost,
        account.duplicated,
        moved.writes_per_s_before,
        cpu.servers,
        cpu.fronts,
        cpu.load
    );
    let parts: Vec<String> = moved.parts.iter().map(|part| format!("{} {:.0}", part.name, part.ms)).collect();
    line.push_str(&format!("\n     {}", parts.join(", ")));
    if let Some(ratio) = moved.predicted_to_real() {
        line.push_str(&format!("\n     predicted {:.0} ms, {ratio:.2} times what it took", ratio * pause_ms));
    }
    if !moved.adds_up() {
        line.push_str(&format!("\n     THE ACCOUNT IS NOT COMPLETE: {}", account.audit));
    }
    line.extend(moved.story.iter().map(|story| format!("\n     {story}")));
    line
}

/// All runs of one way.
#[derive(Debug, Serialize)]
struct Sum {
    way: Way,
    runs: usize,
    committed: usize,
    /// Over every client of every run.
    stall_ms: Stalls,
    /// Over the runs: the longest stall of each.
    stall_ms_max: Stalls,
    pause_ms: Stalls,
    errors: usize,
    sqlstates: BTreeMap<String, usize>,
    lost: usize,
    doubled: usize,
    in_doubt: usize,
    writes_acknowledged: usize,
    /// The slowest run's.
    writes_per_s_before: f64,
    /// What rehearsals predicted, as multiples of what happened.
    predicted_to_real: Vec<f64>,
}

impl Sum {
    fn of(way: Way, moved: &[Moved]) -> Sum {
        let runs: Vec<&Moved> = moved.iter().filter(|moved| moved.way == way).collect();
        let sum = |part: fn(&Moved) -> usize| runs.iter().map(|moved| part(moved)).sum();
        let over = |part: fn(&Moved) -> f64| Stalls::of_ms(runs.iter().map(|moved| part(moved)));
        let mut sqlstates = BTreeMap::new();
        for (state, count) in runs.iter().flat_map(|moved| &moved.sqlstates) {
            *sqlstates.entry(state.clone()).or_default() += count;
        }
        Sum {
            way,
            runs: runs.len(),
            committed: sum(|moved| usize::from(moved.outcome == "committed")),
            stall_ms: Stalls::of_us(runs.iter().flat_map(|moved| moved.stalls_us.iter().copied()).collect()),
            stall_ms_max: over(|moved| moved.stall_ms.max),
            pause_ms: over(|moved| moved.pause_ms),
            errors: sum(|moved| moved.account.errors),
            sqlstates,
            lost: sum(|moved| moved.account.lost),
            doubled: sum(|moved| moved.account.duplicated),
            in_doubt: sum(|moved| moved.in_doubt),
            writes_acknowledged: sum(|moved| moved.account.writes_acknowledged),
            writes_per_s_before: runs.iter().map(|moved| moved.writes_per_s_before).fold(f64::INFINITY, f64::min),
            predicted_to_real: runs.iter().filter_map(|moved| moved.predicted_to_real()).collect(),
        }
    }
}

/// A Markdown table, a line for each way.
fn table(args: &Args, profile: &str, sums: &[Sum]) -> String {
    let Args { clients, writes, proxies, from, to, .. } = args;
    let mut lines = vec![
        format!(
            "PostgreSQL {from} to {to}, {clients} open-loop clients, {writes} writes/s, {proxies} proxies or PgBouncers; pgcutover's \
             build: {profile}. Milliseconds; stalls of every client in every run."
        ),
        "| way | moved | stall p50 | p99 | max | longest of a run, median | pause, median | max | errors | lost | doubled | in doubt \
         | acknowledged | writes/s before |"
            .to_owned(),
        format!("|{}", "---|".repeat(14)),
    ];
    for sum in sums {
        let (word, runs, committed) = (sum.way.word(), sum.runs, sum.committed);
        let Stalls { p50, p99, max } = sum.stall_ms;
        lines.push(format!(
            "| {word} | {committed} of {runs} | {p50:.0} | {p99:.0} | {max:.0} | {:.0} | {:.0} | {:.0} | {} {} | {} | {} | {} | {} | {:.0} |",
            sum.stall_ms_max.p50,
            sum.pause_ms.p50,
            sum.pause_ms.max,
            sum.errors,
            states(&sum.sqlstates),
            sum.lost,
            sum.doubled,
            sum.in_doubt,
            sum.writes_acknowledged,
            sum.writes_per_s_before
        ));
    }
    let predicted = sums.iter().filter(|sum| !sum.predicted_to_real.is_empty());
    lines.extend(predicted.map(|sum| {
        let ratios: Vec<String> = sum.predicted_to_real.iter().map(|ratio| format!("{ratio:.2}")).collect();
        format!("Predicted by the rehearsal as a multiple of the pause that followed: {}.", ratios.join(", "))
    }));
    lines.join("\n")
}

fn states(states: &BTreeMap<String, usize>) -> String {
    let words: Vec<String> = states.iter().map(|(state, count)| format!("{state}: {count}")).collect();
    if words.is_empty() { String::new() } else { format!("({})", words.join(", ")) }
}
