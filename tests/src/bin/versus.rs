//! What the proxy costs, beside PgBouncer on the same machine in the same minutes.
//!
//! `cargo run --release -p e2e --bin versus`: one server, both poolers in front of it, pgbench select-only through each
//! in turn. Machines are noisy, so what counts is the ratio within one repetition, and its spread.
//!
//! Invariant: both poolers serve the same server with the same pool size and log in to it in the same way.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::binaries::{Binaries, Network, Wanted};
use e2e::bouncer::Bouncer;
use e2e::pair::{APP, DATABASE, OTHER, PairOptions, SOURCE, password, single};
use e2e::printer::{result, say};
use e2e::process::cpu_s;
use e2e::proxy::{Proxy, ProxyOptions};
use tokio::process::Command as Tokio;

/// What a transaction is: one row of a small table by its key.
const SCRIPT: &str = "\\set aid random(1, 1000)\nSELECT abalance FROM accounts WHERE aid = :aid;\n";

/// Compares CPU time and throughput of pgcutover and PgBouncer.
#[derive(Debug, Parser)]
#[command(name = "versus")]
struct Args {
    /// Repetitions of the whole round
    #[arg(long, default_value_t = 3)]
    repeat: u32,
    /// Seconds of load for each figure
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Clients, a figure each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64])]
    clients: Vec<u32>,
    /// pgbench's protocol modes; `prepared` needs a PgBouncer of 1.21 or later in transaction pooling
    #[arg(long, value_delimiter = ',', default_values_t = ["simple".to_owned(), "extended".to_owned()])]
    modes: Vec<String>,
    /// Server connections of each pooler
    #[arg(long, default_value_t = 20)]
    pool_size: u32,
    /// Threads of the proxy; PgBouncer has one
    #[arg(long, default_value_t = 2)]
    workers: u32,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
struct Figure {
    /// CPU seconds of the pooler per 100,000 transactions.
    cpu_s: f64,
    /// Transactions per second.
    tps: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    match compare(&args).await {
        Ok(table) => {
            result(table);
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(format_args!("versus: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn compare(args: &Args) -> Result<String> {
    ensure!(!cfg!(debug_assertions), "a debug build says nothing about cost: cargo run --release -p e2e --bin versus");
    let binaries = Binaries::find(&Wanted::AtLeast(1), Network::from_env())?;
    let newest = *binaries.majors().last().context("no server binaries")?;
    let cluster = single(&binaries, &PairOptions::new(newest, newest)).await?;
    let superuser = cluster.superuser("postgres").await?;
    superuser.run("ALTER SYSTEM SET max_connections = 300").await?;
    let backends = [(SOURCE, cluster.port())];
    let mut options = ProxyOptions::for_backends(&backends, 1)?;
    for login in [APP, OTHER] {
        options.users.push(format!("\"{login}\" \"{}\"", password(login)));
    }
    options.setting("default_pool_size", i64::from(args.pool_size));
    options.setting("workers", i64::from(args.workers));
    let proxy = Proxy::start(options).await?;
    let bouncer = Bouncer::start(cluster.port(), args.pool_size).await?;
    let script = proxy.dir().join("select.sql");
    std::fs::write(&script, SCRIPT)?;
    let poolers = [
        ("pgcutover", proxy.port(), proxy.pid().context("the proxy does not run")?),
        ("pgbouncer", bouncer.port(), bouncer.pid()),
    ];
    let mut figures: BTreeMap<(String, u32), Vec<[Figure; 2]>> = BTreeMap::new();
    for repetition in 0..args.repeat {
        for mode in &args.modes {
            for clients in &args.clients {
                let load = Load { script: &script, mode, clients: *clients, seconds: args.seconds };
                // In turn first, so that neither always finds the warmer machine.
                let (first, second) = if repetition % 2 == 0 { (0, 1) } else { (1, 0) };
                let mut pair = [None, None];
                for index in [first, second] {
                    let (name, port, pid) = poolers[index];
                    let figure = load.run(port, pid).await.with_context(|| name.to_owned())?;
                    say(format_args!(
                        "{repetition} {mode} {clients} {name}: {:.2} CPU s per 100,000, {:.0} tps",
                        figure.cpu_s, figure.tps
                    ));
                    pair[index] = Some(figure);
                }
                if let [Some(ours), Some(theirs)] = pair {
                    figures.entry((mode.clone(), *clients)).or_default().push([ours, theirs]);
                }
            }
        }
    }
    Ok(table(&figures))
}

/// One pgbench run.
struct Load<'a> {
    script: &'a Path,
    mode: &'a str,
    clients: u32,
    seconds: u32,
}

impl Load<'_> {
    async fn run(&self, port: u16, pid: u32) -> Result<Figure> {
        let before = cpu_s(pid)?;
        let mut pgbench = Tokio::new("pgbench");
        pgbench.args(["-n", "-M", self.mode, "-h", "127.0.0.1", "-p", &port.to_string(), "-U", APP]);
        pgbench.args(["-c", &self.clients.to_string(), "-j", &self.clients.min(2).to_string()]);
        pgbench.args(["-T", &self.seconds.to_string(), "-f"]).arg(self.script).arg(DATABASE);
        pgbench.env("PGPASSWORD", password(APP)).kill_on_drop(true);
        let limit = Duration::from_secs(u64::from(self.seconds) + 30);
        let output = tokio::time::timeout(limit, pgbench.output()).await.context("pgbench does not end")??;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "pgbench: {complaint}");
        let number = |after: &str| -> Option<f64> {
            let rest = said.split_once(after)?.1.trim_start();
            rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
        };
        let processed = number("transactions actually processed:").context("pgbench said no number")?;
        let tps = number("tps =").context("pgbench said no tps")?;
        Ok(Figure { cpu_s: (cpu_s(pid)? - before) / processed * 100_000.0, tps })
    }
}

/// A Markdown table of ratios, pgcutover to PgBouncer: below 1 is cheaper (CPU), above 1 is faster (tps).
fn table(figures: &BTreeMap<(String, u32), Vec<[Figure; 2]>>) -> String {
    let version = Command::new("pgbouncer").arg("--version").output().ok();
    let version = version.and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_default();
    let mut lines = vec![
        format!("beside {}", version.lines().next().unwrap_or("PgBouncer")),
        "| protocol | clients | CPU s per 100,000 | PgBouncer's | ratio [min-max] | tps ratio [min-max] |".to_owned(),
        "|---|---|---|---|---|---|".to_owned(),
    ];
    for ((mode, clients), pairs) in figures {
        let spread = |part: fn(&[Figure; 2]) -> f64| Spread::of(pairs.iter().map(part).collect());
        let (ours, theirs) = (spread(|pair| pair[0].cpu_s), spread(|pair| pair[1].cpu_s));
        let cpu = spread(|pair| pair[0].cpu_s / pair[1].cpu_s);
        let tps = spread(|pair| pair[0].tps / pair[1].tps);
        lines.push(format!("| {mode} | {clients} | {:.2} | {:.2} | {cpu} | {tps} |", ours.median, theirs.median));
    }
    lines.join("\n")
}

/// Median, smallest and largest.
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Spread {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Spread { median: at(values.len() / 2), min: at(0), max: at(values.len().saturating_sub(1)) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} [{:.2}-{:.2}]", self.median, self.min, self.max)
    }
}
