//! One move of a loaded database, by pgcutover or as teams do it without: what clients noticed of it.
//!
//! The same servers, the same rows, the same clients and the same open-loop load for every way, so that what differs is the
//! way. Each move has servers of its own.
//!
//! Invariant: every write that a client was told anything about is in the figures, as acknowledged, in doubt or refused, and
//! so is every wait, also of clients that nobody served again.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value as Json;

use crate::account::Account;
use crate::binaries::Binaries;
use crate::cluster::{Cluster, Commits};
use crate::control::StepTime;
use crate::errors::ClientError;
use crate::moves::front::Front;
use crate::pair::{DATABASE, Pair, PairOptions};
use crate::process::{cpu_s, family_cpu_s};
use crate::samples::{Stalls, now_us};
use crate::stage::{Serving, audit_of};
use crate::workload::{OpenLoop, Outcome, Workload, WorkloadOptions};

mod front;
mod script;

/// Stalls are counted to the move from this long before it begins: what was sent just before may be hit by it.
const BEFORE_US: i64 = 250_000;

/// So many clients log in each second before the load begins: the key derivations (SCRAM) of both ends share this machine.
const LOGINS_PER_S: u32 = 250;

/// Load comes through at once; a loaded machine gets time.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// Who moves the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Proxies in transaction pooling, and `proxyctl cutover`.
    Pgcutover,
    /// PgBouncers in transaction pooling, and a script: PAUSE, read-only, catch up, sequences, edit, RELOAD, RESUME.
    Pgbouncer,
    /// No pooler: the source is made read-only, sessions are ended, clients reconnect with back-off and look up the address.
    Terminate,
}

impl Way {
    /// All of them, in the order of tables.
    pub const ALL: [Way; 3] = [Way::Pgcutover, Way::Pgbouncer, Way::Terminate];

    /// In tables and on command lines.
    pub fn word(self) -> &'static str {
        match self {
            Way::Pgcutover => "pgcutover",
            Way::Pgbouncer => "pgbouncer",
            Way::Terminate => "terminate",
        }
    }
}

/// What is moved, under what load.
#[derive(Clone, Debug)]
pub struct Move {
    /// By whom.
    pub way: Way,
    /// Majors of source and target.
    pub majors: (u32, u32),
    /// Proxies or PgBouncers, clients in turn.
    pub fronts: u16,
    /// Open-loop clients.
    pub clients: u32,
    /// Writes a second of all of them together.
    pub writes_per_s: u32,
    /// Load before the move begins and after it ended, each.
    pub around: Duration,
    /// Whether `proxyctl rehearse` comes first, to be compared with what then happens.
    pub rehearse: bool,
}

/// Shares of one core, while nothing moves.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cpu {
    /// Both servers.
    pub servers: f64,
    /// Proxies or PgBouncers.
    pub fronts: f64,
    /// The clients.
    pub load: f64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Moved {
    /// By whom.
    pub way: Way,
    /// `committed`, or how proxyctl said that it ended.
    pub outcome: String,
    /// From the first client held to the last let go, as whoever moved it saw it.
    pub pause_ms: f64,
    /// What the move consisted of.
    pub parts: Vec<StepTime>,
    /// Over the clients, from the beginning of the move to the end of the load.
    pub stall_ms: Stalls,
    /// Of each client; what several runs are summed up from.
    pub stalls_us: Vec<u64>,
    /// The same before the move: what this machine does to clients anyway.
    pub stall_ms_before: Stalls,
    /// Writes acknowledged each second before the move.
    pub writes_per_s_before: f64,
    /// What uses the machine meanwhile.
    pub cpu: Cpu,
    /// What clients were told, and what the servers have.
    #[serde(flatten)]
    pub account: Account,
    /// Errors by their SQLSTATE; `none` for broken connections.
    pub sqlstates: BTreeMap<String, usize>,
    /// Writes whose client does not know whether they took place; it has sent them again, so those that did are there twice.
    pub in_doubt: usize,
    /// Writes that the target took.
    pub on_target: i64,
    /// What the rehearsal predicted, with its parts.
    pub prediction: Option<Json>,
    /// What proxyctl said of a move that was not committed.
    pub story: Option<String>,
}

impl Moved {
    /// The move took place, nobody saw an error, everything is where it belongs.
    pub fn is_good(&self) -> bool {
        self.outcome == "committed" && self.account.is_good()
    }

    /// Whether every write is accounted for: each acknowledged one is stored or counted as lost, each stored one was
    /// acknowledged, is in doubt, or is counted as wrong.
    pub fn adds_up(&self) -> bool {
        let audit = &self.account.audit;
        let kept = audit.acknowledged - audit.lost.len();
        let excused = audit.unknown + audit.phantom.len();
        self.account.writes_acknowledged == audit.acknowledged
            && self.account.errors == self.sqlstates.values().sum::<usize>()
            && (kept..=kept + excused).contains(&(audit.stored - audit.doubled.len()))
    }

    /// The prediction as a multiple of what happened.
    pub fn predicted_to_real(&self) -> Option<f64> {
        let predicted_ms = self.prediction.as_ref()?.get("pause_ms")?.as_f64()?;
        Some(predicted_ms / self.pause_ms)
    }
}

impl Move {
    /// Starts everything, moves in the middle of the load, asks the ledger.
    ///
    /// # Errors
    /// Something does not start or answer, or a script comes to nothing; that proxyctl does not commit is in the result.
    pub async fn run(&self, binaries: &Binaries) -> Result<Moved> {
        let front = Front::set_up(self, self.pair(binaries).await?).await?;
        let workload = Workload::start(&self.load(&front)).await?;
        // A second's worth: poolers have opened their server connections by then, and caught up.
        workload.acknowledges(self.writes_per_s.into(), LOAD_LIMIT).await.context("the load does not come through")?;
        let (before_us, before) = (now_us(), Reading::of(&front, &workload));
        tokio::time::sleep(self.around).await; // the load's own time
        let calm = before.until(&Reading::of(&front, &workload));
        let calm_until_us = now_us();
        let prediction = if self.rehearse { front.rehearse().await? } else { None };
        let from_us = now_us() - BEFORE_US;
        let carried = front.carry().await?;
        workload.acknowledges(u64::from(self.clients), LOAD_LIMIT).await.context("no load after the move")?;
        tokio::time::sleep(self.around).await; // the load's own time
        let outcome = workload.stop().await?;
        let audit = audit_of(front.pair(), &outcome.notes(), carried.serving()).await?;
        let stalls = |window| outcome.samples().filter_map(|(_, one)| one.stall_us(None, window)).collect::<Vec<u64>>();
        let stalls_us = stalls((from_us, i64::MAX));
        let is_committed = carried.serving() == Serving::Target;
        Ok(Moved {
            way: self.way,
            stall_ms: Stalls::of_us(stalls_us.clone()),
            stalls_us,
            stall_ms_before: Stalls::of_us(stalls((before_us, calm_until_us))),
            writes_per_s_before: calm.0,
            cpu: calm.1,
            in_doubt: audit.unknown,
            account: Account::of(&outcome, audit),
            sqlstates: by_sqlstate(&outcome),
            on_target: taken_by(&front.pair().target).await?,
            prediction,
            story: (!is_committed).then_some(carried.story),
            outcome: carried.outcome,
            pause_ms: carried.pause_ms,
            parts: carried.parts,
        })
    }

    async fn pair(&self, binaries: &Binaries) -> Result<Pair> {
        let mut options = PairOptions::new(self.majors.0, self.majors.1);
        for cluster in [&mut options.source, &mut options.target] {
            cluster.commits = Commits::WaitForDisk;
            // Where no pooler is, each client has a server connection.
            cluster.settings.push(("max_connections".to_owned(), (self.clients + 150).to_string()));
        }
        Pair::start(binaries, &options).await
    }

    fn load(&self, front: &Front) -> WorkloadOptions {
        let mut load = WorkloadOptions::new(front.ports(), self.clients);
        load.writes_per_s = self.writes_per_s;
        // All clients together are a probe of 1 / writes_per_s.
        load.probes = 0;
        let log_in = Duration::from_secs(1) * self.clients / LOGINS_PER_S;
        load.open_loop = Some(OpenLoop { log_in, address: front.address() });
        load
    }
}

fn by_sqlstate(outcome: &Outcome) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for ClientError { sqlstate, .. } in outcome.errors() {
        *found.entry(sqlstate.unwrap_or_else(|| "none".to_owned())).or_default() += 1;
    }
    found
}

/// Rows of the ledger that say that this server took them.
async fn taken_by(cluster: &Cluster) -> Result<i64> {
    let count = format!("SELECT count(*) FROM ledger WHERE port = {}", cluster.port());
    cluster.superuser(DATABASE).await?.number(&count).await
}

/// CPU seconds and writes up to a moment.
struct Reading {
    at: Instant,
    writes: u64,
    cpu_s: [f64; 3],
}

impl Reading {
    fn of(front: &Front, workload: &Workload) -> Reading {
        let pair = front.pair();
        let servers = [&pair.source, &pair.target].into_iter().filter_map(Cluster::pid).map(family_cpu_s).sum();
        let load = cpu_s(std::process::id()).unwrap_or_default();
        let writes = workload.counters().acknowledged.load(Ordering::Relaxed);
        Reading { at: Instant::now(), writes, cpu_s: [servers, front.cpu_s(), load] }
    }

    /// Writes each second, and who uses how much of a core, from this to a later one.
    fn until(&self, later: &Reading) -> (f64, Cpu) {
        let seconds = later.at.duration_since(self.at).as_secs_f64();
        let share = |at: usize| (later.cpu_s[at] - self.cpu_s[at]) / seconds;
        let writes = u32::try_from(later.writes - self.writes).unwrap_or(u32::MAX);
        (f64::from(writes) / seconds, Cpu { servers: share(0), fronts: share(1), load: share(2) })
    }
}
