//! One cell of the kill matrix: a cutover under load, and a victim that dies before or after one of its steps.
//!
//! Invariant: nobody intervenes. A process that died is started again after [`OUTAGE`], as a supervisor does, a network that
//! was cut comes back after it; proxyctl never is. Whatever happens, everybody ends on one side and the ledger adds up.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::Serialize;
use toml::Value;

use crate::binaries::Binaries;
use crate::control::{Running, SHORT};
use crate::faults::{Fault, FaultProxy};
use crate::pair::{DATABASE, Pair, PairOptions, SOURCE, TARGET};
use crate::stage::{Serving, Stage};
use crate::workload::{Workload, WorkloadOptions};

/// How long a victim is away.
pub const OUTAGE: Duration = Duration::from_millis(1500);
/// Anything that is waited for, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(90);
/// A run that a loaded machine ends before the moment (not calm, a drain too long) is followed by another.
const RUNS_MAX: usize = 3;
/// Between two looks at something that has no event.
const LOOK: Duration = Duration::from_millis(10);

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Victim {
    /// The controller, for good.
    Proxyctl,
    /// The second of two proxies.
    Proxy,
    /// The old server, with all its processes.
    Source,
    /// The new one.
    Target,
    /// Every packet between the second proxy and everybody but its clients.
    Network,
}

impl Victim {
    /// All of them, in the order of the table.
    pub const ALL: [Victim; 5] = [Victim::Proxyctl, Victim::Proxy, Victim::Source, Victim::Target, Victim::Network];

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Victim::Proxyctl => "proxyctl",
            Victim::Proxy => "proxy",
            Victim::Source => "source",
            Victim::Target => "target",
            Victim::Network => "network",
        }
    }
}

impl FromStr for Victim {
    type Err = String;

    fn from_str(text: &str) -> Result<Victim, String> {
        Victim::ALL.into_iter().find(|victim| victim.word() == text).ok_or_else(|| format!("nobody is called {text}"))
    }
}

/// One cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// The step's name.
    pub step: String,
    /// `before` or `after`.
    pub moment: &'static str,
    /// Who dies there.
    pub victim: Victim,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} {}", self.moment, self.step, self.victim.word())
    }
}

/// What became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Where.
    #[serde(flatten)]
    pub cell: Cell,
    /// The backend that everybody ended on.
    pub side: String,
    /// From the kill until every proxy that runs serves, and writes go on.
    pub service_ms: u64,
    /// proxyctl's exit code; none if it was the victim.
    pub exit: Option<i32>,
    /// Errors that clients saw.
    pub client_errors: usize,
    /// Their SQLSTATEs, or `-` for a connection that broke.
    pub sqlstates: Vec<String>,
    /// The ledger, in one line.
    pub ledger: String,
}

/// The two faults of a network that is cut: to the servers and to proxyctl.
struct Links {
    links: Vec<FaultProxy>,
}

impl Links {
    fn set(&self, fault: Fault) {
        for link in &self.links {
            link.set_both(fault);
        }
    }
}

impl Cell {
    /// Plays it.
    ///
    /// # Errors
    /// What must not happen did: somebody is stuck, the ledger does not add up, an exit code says the wrong side, or a client
    /// that the victim does not concern saw an error.
    pub async fn play(&self, binaries: &Binaries, majors: (u32, u32)) -> Result<Outcome> {
        let (mut stage, links) = stage(binaries, majors).await?;
        let mut options = WorkloadOptions::new(stage.ports(), 8);
        options.writes_per_s = 200;
        let load = Workload::start(&options).await?;
        load.acknowledges(50, LIMIT).await?;

        let at = format!("{}:{}", self.moment, self.step);
        let (exit, killed) = if self.victim == Victim::Proxyctl {
            killed_at(&stage, &at).await?;
            (None, Instant::now())
        } else {
            let running = held_at(&stage, &at).await?;
            let killed = Instant::now();
            self.strike(&mut stage, &links).await?;
            running.signal(Signal::SIGUSR1)?;
            let revived = self.revive(&mut stage, &links);
            let (finished, revived) = tokio::join!(running.wait(LIMIT), revived);
            revived?;
            (Some(finished?), killed)
        };
        let side = settled(&mut stage).await?;
        load.acknowledges(5, LIMIT).await?;
        let service_ms = u64::try_from(killed.elapsed().as_millis())?;
        // Every client has had its turn.
        load.acknowledges(50, LIMIT).await?;
        let seen = load.counters().errors.load(Ordering::Relaxed);
        let outcome = load.stop().await?;
        let serving = if side == SOURCE { Serving::Source } else { Serving::Target };
        let audit = stage.audit(&outcome.notes(), serving).await?;
        ensure!(audit.is_clean(), "the ledger does not add up on {side}: {audit}");
        let errors = outcome.errors();
        if self.victim == Victim::Proxyctl {
            ensure!(seen == 0 && errors.is_empty(), "{} errors such as {:?}", errors.len(), errors.first());
        }
        let code = exit.as_ref().and_then(|finished| finished.code);
        if let Some(finished) = &exit {
            let wanted = match finished.code {
                Some(0 | 5) => Some(TARGET),
                Some(3 | 4) => Some(SOURCE),
                // It could not know.
                Some(6) => None,
                Some(_) | None => bail!("an end that is none: {}", finished.story()),
            };
            ensure!(wanted.is_none_or(|wanted| wanted == side), "everybody is on {side}: {}", finished.story());
        }
        let mut sqlstates: Vec<String> =
            errors.iter().map(|error| error.sqlstate.clone().unwrap_or_else(|| "-".to_owned())).collect();
        sqlstates.sort();
        sqlstates.dedup();
        let (client_errors, ledger) = (errors.len(), audit.to_string());
        Ok(Outcome { cell: self.clone(), side, service_ms, exit: code, client_errors, sqlstates, ledger })
    }

    async fn strike(&self, stage: &mut Stage, links: &Links) -> Result<()> {
        match self.victim {
            Victim::Proxyctl => {}
            Victim::Proxy => stage.proxies[1].kill9(),
            Victim::Source => stage.pair.source.kill9().await?,
            Victim::Target => stage.pair.target.kill9().await?,
            Victim::Network => links.set(Fault::Hold),
        }
        Ok(())
    }

    async fn revive(&self, stage: &mut Stage, links: &Links) -> Result<()> {
        // reason: a supervisor takes its time; the length of the outage is part of the experiment.
        tokio::time::sleep(OUTAGE).await;
        match self.victim {
            Victim::Proxyctl => {}
            Victim::Proxy => stage.proxies[1].restart().await?,
            Victim::Source => stage.pair.source.restart().await?,
            Victim::Target => stage.pair.target.restart().await?,
            Victim::Network => links.set(Fault::Pass),
        }
        Ok(())
    }
}

/// Two proxies; everything between the second one and the others goes through links that can be cut.
async fn stage(binaries: &Binaries, (from, to): (u32, u32)) -> Result<(Stage, Links)> {
    let pair = Pair::start(binaries, &PairOptions::new(from, to)).await?;
    let mut links = Vec::new();
    for port in [pair.source.port(), pair.target.port()] {
        links.push(FaultProxy::start(port).await?);
    }
    let ports = [links[0].port(), links[1].port()];
    let mut stage = Stage::with(pair, 2, |options| {
        // Longer than the worst pause that the budgets below allow, shorter than anybody's patience here.
        options.setting("hold_budget", "8s");
        if options.name == "p2" {
            options.backend_port(SOURCE, ports[0]);
            options.backend_port(TARGET, ports[1]);
        }
    })
    .await?;
    let console = stage.proxies[1].port();
    links.push(FaultProxy::start(console).await?);
    let config = &mut stage.control.config;
    let second = config.get_mut("proxies").and_then(Value::as_array_mut).and_then(|proxies| proxies.get_mut(1));
    let second = second.and_then(Value::as_table_mut).context("two proxies")?;
    let dsn = second.get("dsn").and_then(Value::as_str).context("a dsn")?;
    let dsn = dsn.replace(&format!("port={console}"), &format!("port={}", links[2].port()));
    second.insert("dsn".to_owned(), dsn.into());
    stage.control.budget(&SHORT);
    stage.control.with_way_back();
    Ok((stage, Links { links }))
}

/// A cutover that is killed at that moment.
async fn killed_at(stage: &Stage, at: &str) -> Result<()> {
    let mut story = String::new();
    for _ in 0..RUNS_MAX {
        let finished = stage.control.run(&["cutover", "--stop-at", at], LIMIT).await?;
        if finished.code.is_none() {
            return Ok(());
        }
        story = finished.story();
    }
    bail!("never came to {at}: {story}")
}

/// A cutover that waits at that moment.
async fn held_at(stage: &Stage, at: &str) -> Result<Running> {
    let mut story = String::new();
    for _ in 0..RUNS_MAX {
        let mut running = stage.control.spawn(&["cutover", "--hold-at", at])?;
        let until = Instant::now() + LIMIT;
        while !running.has_ended() {
            if running.stderr().contains(&format!("held {at}")) {
                return Ok(running);
            }
            ensure!(Instant::now() < until, "never came to {at}: {}", running.stderr());
            // reason: a look at what a process has said; the loop has a deadline.
            tokio::time::sleep(LOOK).await;
        }
        story = running.wait(LIMIT).await?.story();
    }
    bail!("never came to {at}: {story}")
}

/// Waits until every proxy is open, all on one backend; which.
async fn settled(stage: &mut Stage) -> Result<String> {
    let until = Instant::now() + LIMIT;
    loop {
        let mut gates = Vec::new();
        for proxy in &stage.proxies {
            let rows = proxy.ask("SHOW GATES").await?;
            let gate = rows.iter().find(|row| row.get("database") == Some(DATABASE)).context("no gate")?;
            gates.push(["state", "backend"].map(|column| gate.get(column).unwrap_or_default().to_owned()));
        }
        if gates[0][0] == "open" && gates.iter().all(|gate| *gate == gates[0]) {
            return Ok(gates[0][1].clone());
        }
        ensure!(Instant::now() < until, "gates do not settle: {gates:?}");
        // reason: a look at the gates; the loop has a deadline.
        tokio::time::sleep(LOOK).await;
    }
}
