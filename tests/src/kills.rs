//! One cell of the kill matrix: a cutover under load, and a victim that dies before or after one of its steps.
//!
//! Invariant: nobody intervenes. What died is started again after [`OUTAGE`], as a supervisor does, a network that was cut comes
//! back after it; proxyctl never is, and a source that is gone stays away until clients were held for all of their budget.
//! Whatever happens, everybody ends on one side and the ledger adds up.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::binaries::Binaries;
use crate::control::{Finished, Running};
use crate::errors::ClientError;
use crate::pair::{SOURCE, TARGET};
use crate::samples::Sample;
use crate::stage::Stage;
use crate::workload::{Workload, WorkloadOptions};
use crate::writer::Record;

mod cast;

pub use cast::{AWAY, OUTAGE};
use cast::{Cast, HOLD_BUDGET, Standing};

/// Anything that is waited for, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(90);
/// A run that a loaded machine ends before the moment (not calm, a drain too long) is followed by another.
const RUNS_MAX: usize = 3;
/// Between two looks at something that has no event.
const LOOK: Duration = Duration::from_millis(10);

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victim {
    /// The controller, for good.
    Proxyctl,
    /// The second of two proxies.
    Proxy,
    /// The old server, with all its processes.
    Source,
    /// The same, for longer than anybody is held.
    SourceGone,
    /// The new one.
    Target,
    /// Every packet between the second proxy and everybody but its clients.
    Network,
    /// The PgBouncer beside the proxy, with its clients' connections.
    Pgbouncer,
    /// The process that keeps it.
    Keeper,
}

impl Victim {
    /// Those of a fleet of proxies, in the order of the table.
    pub const OF_PROXIES: [Victim; 6] =
        [Victim::Proxyctl, Victim::Proxy, Victim::Source, Victim::SourceGone, Victim::Target, Victim::Network];
    /// Those where a PgBouncer takes part.
    pub const OF_PGBOUNCERS: [Victim; 3] = [Victim::Proxyctl, Victim::Pgbouncer, Victim::Keeper];

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Victim::Proxyctl => "proxyctl",
            Victim::Proxy => "proxy",
            Victim::Source => "source",
            Victim::SourceGone => "source-gone",
            Victim::Target => "target",
            Victim::Network => "network",
            Victim::Pgbouncer => "pgbouncer",
            Victim::Keeper => "keeper",
        }
    }
}

impl FromStr for Victim {
    type Err = String;

    fn from_str(text: &str) -> Result<Victim, String> {
        let mut all = Victim::OF_PROXIES.into_iter().chain(Victim::OF_PGBOUNCERS);
        all.find(|victim| victim.word() == text).ok_or_else(|| format!("nobody is called {text}"))
    }
}

/// How the target follows the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A server of another major, by logical replication.
    #[default]
    Logical,
    /// A streaming standby, which the run promotes.
    Physical,
}

/// Who stands before the servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Members {
    /// Two proxies.
    #[default]
    Proxies,
    /// A proxy, and a PgBouncer with its keeper.
    Pgbouncer,
}

/// What the cells of a matrix have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Replication.
    pub kind: Kind,
    /// Poolers.
    pub members: Members,
    /// Majors of source and target; a standby's is the target's.
    pub majors: (u32, u32),
}

impl Setting {
    /// Who can die there.
    pub fn victims(&self) -> &'static [Victim] {
        match self.members {
            Members::Proxies => &Victim::OF_PROXIES,
            Members::Pgbouncer => &Victim::OF_PGBOUNCERS,
        }
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
    /// The shortest and the longest wait of clients that were answered that they were held too long, each for the first time.
    pub shed_ms: Option<(u64, u64)>,
    /// The ledger, in one line.
    pub ledger: String,
}

/// What happened until everybody was served again.
struct Played {
    finished: Option<Finished>,
    /// How things stood at the kill.
    stood: Standing,
    side: String,
    service: Duration,
}

impl Cell {
    /// Plays it.
    ///
    /// # Errors
    /// What must not happen did: somebody is stuck, the ledger does not add up, an exit code says the wrong side, the side that
    /// lost takes writes, or a client saw an error that it should not.
    pub async fn play(&self, binaries: &Binaries, setting: &Setting) -> Result<Outcome> {
        let mut cast = Cast::gather(binaries, setting, self.victim).await?;
        let mut options = WorkloadOptions::new(cast.ports(), 8);
        options.writes_per_s = 200;
        let load = Workload::start(&options).await?;
        load.acknowledges(50, LIMIT).await?;
        let played = self.act(&mut cast, &load).await?;
        // Every client has had its turn.
        load.acknowledges(50, LIMIT).await?;
        let seen = load.counters().errors.load(Ordering::Relaxed);
        let outcome = load.stop().await?;
        let side = cast.settled().await?;
        ensure!(side == played.side, "served on {} first, and on {side} in the end", played.side);
        let ledger = cast.audit(&outcome.notes(), &side).await?;
        let errors = outcome.errors();
        let shed_ms = shed_ms(&outcome.records);
        match self.victim {
            Victim::Proxyctl => {
                ensure!(seen == 0 && errors.is_empty(), "{} errors such as {:?}", errors.len(), errors.first());
            }
            Victim::SourceGone => held_then_shed(played.stood, &errors, shed_ms)?,
            Victim::Proxy | Victim::Source | Victim::Target | Victim::Network | Victim::Pgbouncer | Victim::Keeper => {}
        }
        if let Some(finished) = &played.finished {
            says(finished, &side)?;
        }
        let mut sqlstates: Vec<String> =
            errors.iter().map(|error| error.sqlstate.clone().unwrap_or_else(|| "-".to_owned())).collect();
        sqlstates.sort();
        sqlstates.dedup();
        Ok(Outcome {
            cell: self.clone(),
            side,
            service_ms: u64::try_from(played.service.as_millis())?,
            exit: played.finished.and_then(|finished| finished.code),
            client_errors: errors.len(),
            sqlstates,
            shed_ms,
            ledger,
        })
    }

    /// The run, the kill, and what was killed coming back.
    async fn act(&self, cast: &mut Cast, load: &Workload) -> Result<Played> {
        let at = format!("{}:{}", self.moment, self.step);
        if self.victim == Victim::Proxyctl {
            killed_at(&cast.stage, &at).await?;
            let (killed, stood) = (Instant::now(), Standing::Open);
            let side = cast.serves(load).await?;
            return Ok(Played { finished: None, stood, side, service: killed.elapsed() });
        }
        let running = held_at(&cast.stage, &at).await?;
        let stood = cast.standing().await?;
        let killed = Instant::now();
        cast.strike(self.victim).await?;
        running.signal(Signal::SIGUSR1)?;
        let comes_back = async {
            let mut served = None;
            if self.victim == Victim::SourceGone && stood == Standing::Committed {
                // Everybody gets there without it.
                served = Some((cast.serves(load).await?, killed.elapsed()));
                ensure!(killed.elapsed() < AWAY, "nobody waited for the source, and it took {:?}", killed.elapsed());
            }
            cast.revive(self.victim, killed).await?;
            anyhow::Ok(served)
        };
        let (finished, served) = tokio::join!(running.wait(LIMIT), comes_back);
        let (side, service) = match served? {
            Some(served) => served,
            None => (cast.serves(load).await?, killed.elapsed()),
        };
        Ok(Played { finished: Some(finished?), stood, side, service })
    }
}

/// What a source that is gone costs: nobody gets an error that can't be retried, whoever is held gets none before its budget is
/// used up, and nobody gets any once the commit is known without it.
fn held_then_shed(stood: Standing, errors: &[ClientError], shed_ms: Option<(u64, u64)>) -> Result<()> {
    let retryable = |error: &&ClientError| {
        error.sqlstate.as_deref().is_some_and(|state| state.starts_with("08") || state.starts_with("57P"))
    };
    if let Some(error) = errors.iter().find(|error| !retryable(error)) {
        bail!("not to be retried: {error:?}");
    }
    match (stood, shed_ms) {
        (Standing::Open, _) => Ok(()),
        (Standing::Held, Some((first, _))) if u128::from(first) >= HOLD_BUDGET.as_millis() => Ok(()),
        (Standing::Held, shed) => bail!("held for {HOLD_BUDGET:?} and shed after {shed:?} ms"),
        (Standing::Committed, _) if errors.is_empty() => Ok(()),
        (Standing::Committed, _) => bail!("{} errors such as {:?}", errors.len(), errors.first()),
    }
}

/// proxyctl's end has to be that of the side; it may not know.
fn says(finished: &Finished, side: &str) -> Result<()> {
    let wanted = match finished.code {
        Some(0 | 5) => Some(TARGET),
        Some(3 | 4) => Some(SOURCE),
        Some(6) => None,
        Some(_) | None => bail!("an end that is none: {}", finished.story()),
    };
    ensure!(wanted.is_none_or(|wanted| wanted == side), "everybody is on {side}: {}", finished.story());
    Ok(())
}

/// Of clients' first answers that they were held too long: the shortest and the longest wait for one. Later ones would count what
/// a client that sends at fixed times is late.
fn shed_ms(records: &[Record]) -> Option<(u64, u64)> {
    let waits: Vec<u64> = records.iter().filter_map(first_shed_ms).collect();
    Some((*waits.iter().min()?, *waits.iter().max()?))
}

fn first_shed_ms(record: &Record) -> Option<u64> {
    let shed = record.errors.iter().find(|error| error.text.contains("hold_budget"))?;
    let ended_us = |sample: &&Sample| sample.at_us.saturating_add_unsigned(sample.latency_us);
    // The answer was noted right before the error.
    let sample = record.samples.all().iter().rev().find(|sample| ended_us(sample) <= shed.at_us)?;
    Some(sample.latency_us / 1000)
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
