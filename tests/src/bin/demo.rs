//! `cargo demo`: two servers of different majors, load through the proxy, one cutover in the middle, the verdict.
//!
//! Invariant: exit code 0 means that the cutover took place, no client saw an error, and every acknowledged write is on
//! the new server exactly once.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use e2e::account::Account;
use e2e::binaries::{Binaries, Network, Wanted};
use e2e::cluster::Commits;
use e2e::control::{Finished, StepTime, steps};
use e2e::ledger::Audit;
use e2e::pair::{OTHER, PairOptions};
use e2e::printer::{result, say};
use e2e::program::{self, Output};
use e2e::run_dir::RunDir;
use e2e::samples::{Stalls, csv, now_us};
use e2e::stage::{Serving, Stage};
use e2e::workload::{Outcome, Workload, WorkloadOptions};
use serde::Serialize;
use serde_json::Value as Json;
use tokio::signal::unix::{SignalKind, signal};

/// The versions of the demo unless others are asked for.
const PREFERRED: (u32, u32) = (13, 17);

/// No cutover takes this long: every step has a budget of seconds.
const CUTOVER_LIMIT: Duration = Duration::from_secs(60);

/// Stalls are looked at from this long before proxyctl starts until the load ends.
const BEFORE_US: i64 = 1_000_000;

/// All clients log in at once; their key derivations (SCRAM) take this machine's time, not the proxy's.
const SETTLING_US: i64 = 1_000_000;

/// Moves a loaded database from one PostgreSQL server to another of a different major version and says what its
/// clients noticed.
///
/// Exit codes: 0 no error, nothing lost, nothing doubled; 1 otherwise; 2 usage; 75 server binaries are missing and
/// can't be (or may not be) fetched; 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "cargo demo")]
#[expect(clippy::struct_excessive_bools, reason = "flags on a command line are booleans")]
struct Args {
    /// Major version of the old server [default: 13]
    #[arg(long)]
    from: Option<u32>,
    /// Major version of the new server [default: 17]
    #[arg(long)]
    to: Option<u32>,
    /// Clients in a closed loop; two probes come on top
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=5000))]
    clients: u32,
    /// Proxies in front of the servers
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9))]
    proxies: u16,
    /// How the proxy shares server connections; those pooled by session keep settings, 20 statements and a LISTEN
    #[arg(long, value_enum, default_value_t = Pooling::Mixed)]
    pooling: Pooling,
    /// How long the load runs; the cutover starts in the middle
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(4..=3600))]
    seconds: u64,
    /// Runs one after the other, each with servers of its own; one line a run, then their sum
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Never fetch server binaries
    #[arg(long)]
    offline: bool,
    /// What to print on stdout
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Keep data directories, logs and journal
    #[arg(long)]
    keep: bool,
    /// Where the HTML report goes [default: target/demo/cutover.html]
    #[arg(long)]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pooling {
    Transaction,
    /// Every client but the probes
    Session,
    /// Half of the clients by session, the others by transaction
    Mixed,
}

impl Pooling {
    /// How many of these clients keep their session.
    fn sessions(self, clients: u32) -> u32 {
        match self {
            Pooling::Transaction => 0,
            Pooling::Session => clients,
            Pooling::Mixed => clients / 2,
        }
    }
}

/// The last line of stdout with `--output json`.
#[derive(Debug, Serialize)]
struct Verdict {
    outcome: String,
    source_version: String,
    target_version: String,
    clients: u32,
    /// Those of them that are pooled by session.
    sessions: u32,
    #[serde(flatten)]
    account: Account,
    stall_ms: Stalls,
    /// The same before the cutover: what this machine does to clients anyway.
    stall_ms_before: Stalls,
    pause_ms: Option<f64>,
    steps: Vec<StepTime>,
    findings: Json,
    report_html: Option<PathBuf>,
    kept: Option<PathBuf>,
}

impl Verdict {
    fn is_good(&self) -> bool {
        self.outcome == "committed" && self.account.is_good()
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("demo", async {
        let Some(verdicts) = interruptible(&args).await? else {
            say("interrupted; servers and proxies are stopped");
            return Ok(ExitCode::from(130));
        };
        if args.repeat > 1 {
            sum_up(args.output, &Campaign::of(&verdicts));
        }
        Ok(program::exit(verdicts.iter().all(Verdict::is_good)))
    })
}

/// Several demos in one line.
#[derive(Debug, Serialize)]
struct Campaign {
    runs: usize,
    committed: usize,
    errors: usize,
    lost: usize,
    duplicated: usize,
    stall_ms_max: Vec<f64>,
    stall_ms_max_median: f64,
    stall_ms_max_worst: f64,
    pause_ms: Vec<f64>,
}

impl Campaign {
    fn of(verdicts: &[Verdict]) -> Campaign {
        let sum = |part: fn(&Verdict) -> usize| verdicts.iter().map(part).sum();
        let stall_ms_max: Vec<f64> = verdicts.iter().map(|verdict| verdict.stall_ms.max).collect();
        let mut sorted = stall_ms_max.clone();
        sorted.sort_by(f64::total_cmp);
        Campaign {
            runs: verdicts.len(),
            committed: sum(|verdict| usize::from(verdict.outcome == "committed")),
            errors: sum(|verdict| verdict.account.errors),
            lost: sum(|verdict| verdict.account.lost),
            duplicated: sum(|verdict| verdict.account.duplicated),
            stall_ms_max_median: sorted.get(sorted.len() / 2).copied().unwrap_or_default(),
            stall_ms_max_worst: sorted.last().copied().unwrap_or_default(),
            stall_ms_max,
            pause_ms: verdicts.iter().filter_map(|verdict| verdict.pause_ms).collect(),
        }
    }
}

fn sum_up(output: Output, campaign: &Campaign) {
    match output {
        Output::Json => result(serde_json::to_string(campaign).unwrap_or_else(|error| error.to_string())),
        Output::Text => {
            let Campaign { runs, committed, errors, lost, duplicated, .. } = campaign;
            let (median, worst) = (campaign.stall_ms_max_median, campaign.stall_ms_max_worst);
            result(format!(
                "{committed} of {runs} runs committed: {errors} errors, {lost} lost, {duplicated} doubled; \
                 longest stall {median:.0} ms (median of the runs), {worst:.0} ms (worst)."
            ));
        }
    }
}

/// The demos, or nothing if SIGINT or SIGTERM came first; either way everything they started is stopped.
async fn interruptible(args: &Args) -> Result<Option<Vec<Verdict>>> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        verdicts = repeated(args) => verdicts.map(Some),
        _ = tokio::signal::ctrl_c() => Ok(None),
        _ = terminate.recv() => Ok(None),
    }
}

async fn repeated(args: &Args) -> Result<Vec<Verdict>> {
    let mut verdicts = Vec::new();
    for run in 1..=args.repeat {
        if args.repeat > 1 {
            say(format_args!("run {run} of {}", args.repeat));
        }
        let verdict = demo(args).await?;
        match args.output {
            Output::Json => result(serde_json::to_string(&verdict).unwrap_or_else(|error| error.to_string())),
            Output::Text => result(words(&verdict)),
        }
        verdicts.push(verdict);
    }
    Ok(verdicts)
}

async fn demo(args: &Args) -> Result<Verdict> {
    if args.keep {
        RunDir::current()?.keep()?;
    }
    let (stage, setup) = set_up(args).await?;
    let half = Duration::from_secs(args.seconds) / 2;
    say(format_args!("load: {} clients and 2 probes for {} s", args.clients, args.seconds));
    let mut load = WorkloadOptions::new(stage.ports(), args.clients);
    load.sessions.0 = args.pooling.sessions(args.clients);
    let workload = Workload::start(&load).await?;
    let started_us = now_us();
    workload.acknowledges(1, CUTOVER_LIMIT).await.context("the load does not get through the proxy")?;
    watch(&workload, half).await;

    say("cutover");
    let times = Times { settled_us: started_us + SETTLING_US, from_us: now_us() - BEFORE_US };
    let control = stage.control.run(&["cutover"], CUTOVER_LIMIT).await?;
    say(format_args!("cutover: proxyctl ended with {}", control.code.unwrap_or(-1)));
    watch(&workload, half).await;

    let outcome = workload.stop().await?;
    let cutover = Cutover::of(&control, times);
    let audit = stage.audit(&outcome.notes(), cutover.serving()).await?;
    let page = page(args, &stage, &cutover, &outcome).await;
    let mut verdict = verdict(args, &setup, &cutover, &outcome, audit);
    match page {
        Ok(page) => verdict.report_html = Some(page),
        Err(error) => say(format_args!("no HTML report: {error:#}")),
    }
    if !verdict.is_good() {
        say(control.story());
        say(format_args!("ledger: {}", verdict.account.audit));
    }
    Ok(verdict)
}

/// What was set up, for the verdict.
struct Setup {
    source_version: String,
    target_version: String,
}

async fn set_up(args: &Args) -> Result<(Stage, Setup)> {
    let network = if args.offline { Network::Offline } else { Network::from_env() };
    let (binaries, from, to) = versions(args, network)?;
    let mut options = PairOptions::new(from, to);
    let connections = (args.pooling.sessions(args.clients) + 150).to_string();
    for cluster in [&mut options.source, &mut options.target] {
        cluster.commits = Commits::WaitForDisk;
        cluster.settings.push(("max_connections".to_owned(), connections.clone()));
    }
    e2e::product::Product::build()?;
    say(format_args!("starting PostgreSQL {from} and {to} with logical replication"));
    let pair = e2e::pair::Pair::start(&binaries, &options).await?;
    let setup = Setup { source_version: pair.source.version().into(), target_version: pair.target.version().into() };
    say(format_args!("starting {} of pgcutover", if args.proxies == 1 { "one" } else { "several" }));
    let (clients, sessions) = (i64::from(args.clients), i64::from(args.pooling.sessions(args.clients)));
    let change = |options: &mut e2e::proxy::ProxyOptions| {
        options.setting("max_client_conn", clients + 100);
        let user = options.user(OTHER);
        user.insert("pool_mode".to_owned(), "session".into());
        user.insert("pool_size".to_owned(), sessions.max(1).into());
    };
    let mut stage = Stage::with(pair, args.proxies, change).await?;
    stage.control.with_way_back();
    Ok((stage, setup))
}

/// The versions that were asked for; else the preferred ones; else, if those can't be had, the oldest and the newest.
fn versions(args: &Args, network: Network) -> Result<(Binaries, u32, u32)> {
    let (from, to) = (args.from.unwrap_or(PREFERRED.0), args.to.unwrap_or(PREFERRED.1));
    let exact = Binaries::find(&Wanted::Majors(vec![from, to]), network);
    if args.from.is_some() || args.to.is_some() || exact.is_ok() {
        return Ok((exact?, from, to));
    }
    let binaries = Binaries::find(&Wanted::AtLeast(2), Network::Offline).or(exact)?;
    let majors = binaries.majors();
    let (Some(oldest), Some(newest)) = (majors.first(), majors.last()) else { bail!("no server binaries") };
    say(format_args!("PostgreSQL {from} and {to} are not here; taking {oldest} and {newest}"));
    Ok((binaries, *oldest, *newest))
}

/// Lets the load run, saying every second how it goes.
async fn watch(workload: &Workload, time: Duration) {
    let mut last = workload.counters().acknowledged.load(Ordering::Relaxed);
    for _ in 0..time.as_secs().max(1) {
        tokio::time::sleep(Duration::from_secs(1)).await; // the load's own time
        let now = workload.counters().acknowledged.load(Ordering::Relaxed);
        let errors = workload.counters().errors.load(Ordering::Relaxed);
        say(format_args!("  {:>5} writes/s, {now} acknowledged, {errors} errors", now - last));
        last = now;
    }
}

/// What proxyctl reported; everything optional, for it may have failed before it could say anything.
struct Cutover {
    json: Json,
    times: Times,
}

/// What divides the load into before and during, in µs since 1970.
#[derive(Clone, Copy)]
struct Times {
    /// All clients are logged in.
    settled_us: i64,
    /// From when on stalls are counted to the cutover.
    from_us: i64,
}

impl Cutover {
    fn of(control: &Finished, times: Times) -> Cutover {
        Cutover { json: control.json().unwrap_or_default(), times }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.json.get(key).and_then(Json::as_str)
    }

    fn outcome(&self) -> String {
        self.text("outcome").unwrap_or("failed").to_owned()
    }

    /// After a decision clients are on the target, or on their way to it.
    fn serving(&self) -> Serving {
        match self.outcome().as_str() {
            "committed" | "unfinished" => Serving::Target,
            _ => Serving::Source,
        }
    }
}

fn verdict(args: &Args, setup: &Setup, cutover: &Cutover, outcome: &Outcome, audit: Audit) -> Verdict {
    let stalls = |from_us, to_us| Stalls::over(outcome.samples().map(|(_, samples)| samples), None, (from_us, to_us));
    let Times { settled_us, from_us } = cutover.times;
    Verdict {
        outcome: cutover.outcome(),
        source_version: setup.source_version.clone(),
        target_version: setup.target_version.clone(),
        clients: args.clients,
        sessions: args.pooling.sessions(args.clients),
        account: Account::of(outcome, audit),
        stall_ms: stalls(from_us, i64::MAX),
        stall_ms_before: stalls(settled_us, from_us),
        pause_ms: cutover.json.get("pause_ms").and_then(Json::as_f64),
        steps: steps(&cutover.json),
        findings: cutover.json.get("findings").cloned().unwrap_or_default(),
        report_html: None,
        kept: args.keep.then(|| RunDir::current().map(|run| run.path().to_owned()).unwrap_or_default()),
    }
}

/// Lets proxyctl draw its report again, with what the clients felt.
async fn page(args: &Args, stage: &Stage, cutover: &Cutover, outcome: &Outcome) -> Result<PathBuf> {
    let run = cutover.text("run").context("proxyctl named no run")?;
    let page = match &args.report {
        Some(page) => std::path::absolute(page)?,
        None => default_page()?,
    };
    let clients = stage.control.dir().join("clients.csv");
    std::fs::write(&clients, csv(outcome.samples()))?;
    let path = |path: &Path| path.display().to_string();
    let args = ["report", run, "--clients", &path(&clients), "--report", &path(&page)];
    let control = stage.control.run(&args, CUTOVER_LIMIT).await?;
    if control.code != Some(0) || !page.is_file() {
        bail!("{}", control.story());
    }
    Ok(page)
}

/// `target/demo/cutover.html`, two levels above this program.
fn default_page() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(2).context("a program without target directory")?;
    let directory = target.join("demo");
    std::fs::create_dir_all(&directory)?;
    let page = directory.join("cutover.html");
    // The last demo's must not pass for this one's.
    if page.exists() {
        std::fs::remove_file(&page)?;
    }
    Ok(page)
}

/// The verdict in plain words.
fn words(verdict: &Verdict) -> String {
    let Verdict { source_version, target_version, clients, sessions, account, .. } = verdict;
    let Account { errors, lost, duplicated, two_sided, audit, .. } = account;
    let mut lines = vec![match verdict.outcome.as_str() {
        "committed" => format!(
            "PostgreSQL {source_version} handed over to {target_version} under {clients} clients, \
             {sessions} of them in sessions of their own."
        ),
        other => format!("No cutover from PostgreSQL {source_version} to {target_version}: {other}."),
    }];
    lines.push(match errors {
        0 => format!("No client saw an error in {} transactions.", account.transactions),
        _ => format!("Clients saw {errors} errors: {:?}", account.error_texts),
    });
    lines.push(if audit.is_clean() {
        format!("All {} acknowledged writes are there, each exactly once.", account.writes_acknowledged)
    } else {
        format!("WRONG: {lost} lost, {duplicated} doubled, {two_sided} on two sides. {audit}")
    });
    let (Stalls { p50, max, .. }, before) = (verdict.stall_ms, verdict.stall_ms_before.max);
    lines.push(format!(
        "The longest stall of any client was {max:.0} ms, of half of them at most {p50:.0} ms ({before:.0} ms before the cutover)."
    ));
    if let Some(pause_ms) = verdict.pause_ms {
        let steps: Vec<String> = verdict.steps.iter().map(|step| format!("{} {:.1}", step.name, step.ms)).collect();
        lines.push(format!("The pause took {pause_ms:.0} ms (steps in ms: {}).", steps.join(", ")));
    }
    lines.extend(verdict.report_html.iter().map(|page| format!("Report: {}", page.display())));
    lines.extend(verdict.kept.iter().map(|kept| format!("Kept: {}", kept.display())));
    lines.join("\n")
}
