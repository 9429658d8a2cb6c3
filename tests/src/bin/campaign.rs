//! `cargo campaign`: many cutovers in a row, there and back, under load, through several proxies; what clients noticed.
//!
//! Invariant: exit code 0 means that all of them were committed, no client saw an error, and every acknowledged write is on
//! the side that serves in the end, exactly once.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use e2e::account::Account;
use e2e::binaries::Binaries;
use e2e::cluster::Commits;
use e2e::kept::Kept;
use e2e::pair::{OTHER, Pair, PairOptions};
use e2e::printer::{result, say};
use e2e::product::Product;
use e2e::program::{self, Output};
use e2e::run_dir::RunDir;
use e2e::samples::Stalls;
use e2e::shuttle::{Shuttle, Verdict};
use e2e::stage::Stage;
use e2e::workload::WorkloadOptions;

/// Moves a loaded database there and back, again and again: `proxyctl cutover`, `proxyctl rollback`, `proxyctl cutover` …
///
/// Exit codes: 0 no error, nothing lost, nothing doubled; 1 otherwise; 2 usage; 75 server binaries are missing.
#[derive(Debug, Parser)]
#[command(name = "cargo campaign")]
struct Args {
    /// Cutovers, those there and those back counted alike
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    cutovers: u32,
    /// Proxies in front of the servers
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(0..=9))]
    proxies: u16,
    /// PgBouncers beside them, each with its keeper
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=9))]
    pgbouncers: u16,
    /// Major version of the server that serves first
    #[arg(long, default_value_t = 13)]
    from: u32,
    /// Major version of the other one
    #[arg(long, default_value_t = 17)]
    to: u32,
    /// Clients in a closed loop; two probes a proxy come on top
    #[arg(long, default_value_t = 32)]
    clients: u32,
    /// How many of them are pooled by session, with settings, statements and a LISTEN of their own
    #[arg(long, default_value_t = 0)]
    sessions: u32,
    /// Writes a second of all of them together
    #[arg(long, default_value_t = 400)]
    writes: u32,
    /// What to print on stdout
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Keep data directories, logs and journals
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("campaign", async {
        let verdict = campaign(&args).await?;
        match args.output {
            Output::Json => result(serde_json::to_string(&verdict)?),
            Output::Text => result(words(&verdict)),
        }
        Ok(program::exit(verdict.is_good()))
    })
}

async fn campaign(args: &Args) -> Result<Verdict> {
    if args.keep {
        RunDir::current()?.keep()?;
    }
    let binaries = Binaries::of(&[args.from, args.to])?;
    let mut options = PairOptions::new(args.from, args.to);
    let connections = (args.sessions + 150).to_string();
    for cluster in [&mut options.source, &mut options.target] {
        cluster.commits = Commits::WaitForDisk;
        cluster.settings.push(("max_connections".to_owned(), connections.clone()));
    }
    Product::build()?;
    say(format_args!("starting PostgreSQL {} and {}, {} proxies", args.from, args.to, args.proxies));
    let pair = Pair::start(&binaries, &options).await?;
    let (clients, sessions) = (i64::from(args.clients), i64::from(args.sessions));
    let mut stage = Stage::with(pair, args.proxies, |options| {
        options.setting("max_client_conn", clients + 100);
        let user = options.user(OTHER);
        user.insert("pool_mode".to_owned(), "session".into());
        user.insert("pool_size".to_owned(), sessions.max(1).into());
    })
    .await?;
    stage.control.with_way_back();
    // The machine is shared with the servers and the load: what is measured is told, not refused.
    stage.control.budget(&[("stall", "2s")]);
    let mut ports = stage.ports();
    let mut kept = Vec::new();
    for n in 1..=args.pgbouncers {
        let lines = "pool_mode = transaction\ndefault_pool_size = 20\n";
        kept.push(Kept::start(&mut stage, &format!("b{n}"), lines).await?);
    }
    ports.extend(kept.iter().map(|kept| kept.bouncer.port()));
    let mut load = WorkloadOptions::new(ports, args.clients);
    load.sessions.0 = args.sessions;
    load.writes_per_s = args.writes;
    load.probes = u32::from(args.proxies + args.pgbouncers);
    let shuttle = Shuttle { cutovers: args.cutovers, load, between: 200 };
    shuttle.run(&stage).await
}

fn words(verdict: &Verdict) -> String {
    let Verdict { committed, cutovers, source_version, target_version, proxies, clients, sessions, .. } = verdict;
    let Account { errors, lost, duplicated, two_sided, transactions, writes_acknowledged, .. } = &verdict.account;
    let line =
        |what: &str, of: &Stalls| format!("{what}: p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms", of.p50, of.p99, of.max);
    let mut lines = vec![
        format!(
            "{committed} of {cutovers} cutovers between PostgreSQL {source_version} and {target_version} committed, through \
             {proxies} proxies, under {clients} clients ({sessions} in sessions of their own), {:.0} writes/s.",
            verdict.account.writes_per_s
        ),
        format!(
            "{errors} errors in {transactions} transactions; of {writes_acknowledged} acknowledged writes {lost} lost, \
             {duplicated} doubled, {two_sided} on two sides; the other server has {}.",
            if verdict.followed { "them all too" } else { "NOT all of them" }
        ),
        line("Stalls of every client in every cutover", &verdict.stall_ms),
        line("Longest stall of each cutover", &verdict.stall_ms_max),
        line("Pauses", &verdict.pause_ms),
    ];
    if !verdict.account.error_texts.is_empty() {
        lines.push(format!("Errors: {:?}", verdict.account.error_texts));
    }
    if !verdict.account.audit.is_clean() {
        lines.push(format!("WRONG: {}", verdict.account.audit));
    }
    lines.extend(verdict.story.clone());
    lines.join("\n")
}
