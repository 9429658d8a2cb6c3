//! Cutovers in a row, there and back, under load, through several proxies: what clients noticed of all of them.
//!
//! Invariant: a shuttle's verdict is good only if every cutover was committed, no client saw an error, and every write that
//! was acknowledged on either side is on the side that serves in the end, exactly once, and on the other one too.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value as Json;

use crate::account::Account;
use crate::ledger::{Audit, Sides, audit};
use crate::pair::DATABASE;
use crate::printer::say;
use crate::samples::{Samples, Stalls, now_us};
use crate::stage::Stage;
use crate::workload::{Workload, WorkloadOptions};

/// No cutover takes this long: every step has a budget of seconds.
const CUTOVER_LIMIT: Duration = Duration::from_secs(90);
/// Load comes through at once; a loaded machine gets time.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// What is shuttled, and how often.
#[derive(Clone, Debug)]
pub struct Shuttle {
    /// So many cutovers: there, back, there …
    pub cutovers: u32,
    /// The load that goes on all the while.
    pub load: WorkloadOptions,
    /// Writes that have to come through between two cutovers.
    pub between: u64,
}

/// One cutover.
#[derive(Clone, Debug, Serialize)]
pub struct Crossing {
    /// The backend that served afterwards, if it was committed.
    pub to: String,
    /// What proxyctl said.
    pub outcome: String,
    /// From the first PAUSE to the last RESUME.
    pub pause_ms: f64,
    /// proxyctl's whole run.
    pub run_ms: f64,
    /// Over the clients, from its start to the next one's.
    pub stall_ms: Stalls,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Version of the server that served first.
    pub source_version: String,
    /// Version of the other one.
    pub target_version: String,
    /// Proxies in front of both.
    pub proxies: usize,
    /// Clients in a closed loop; the probes come on top.
    pub clients: u32,
    /// Those of them that are pooled by session.
    pub sessions: u32,
    /// Cutovers that were asked for.
    pub cutovers: u32,
    /// Those that were committed.
    pub committed: usize,
    /// What clients were told, and what the servers have.
    #[serde(flatten)]
    pub account: Account,
    /// Whether the server that does not serve has it all too.
    pub followed: bool,
    /// Quantiles over every client and cutover.
    pub stall_ms: Stalls,
    /// Quantiles over the cutovers of the longest stall in each.
    pub stall_ms_max: Stalls,
    /// Quantiles over the cutovers.
    pub pause_ms: Stalls,
    /// Each of them.
    pub crossings: Vec<Crossing>,
    /// What proxyctl said of the one that was not committed.
    pub story: Option<String>,
}

impl Verdict {
    /// Whether nobody noticed anything.
    pub fn is_good(&self) -> bool {
        self.committed == self.cutovers as usize && self.followed && self.account.is_good()
    }
}

impl Shuttle {
    /// Goes there and back; stops at the first one that is not committed.
    ///
    /// # Errors
    /// Something of the stage does not answer.
    pub async fn run(&self, stage: &Stage) -> Result<Verdict> {
        let workload = Workload::start(&self.load).await?;
        let mut crossings: Vec<(i64, Crossing)> = Vec::new();
        let mut story = None;
        for n in 1..=self.cutovers {
            workload.acknowledges(self.between, LOAD_LIMIT).await?;
            let (at_us, crossing, words) = cross(stage, n).await?;
            say(format_args!(
                "{n:>4} of {}: to {:<6} {:<10} pause {:>6.1} ms, run {:>6.0} ms",
                self.cutovers, crossing.to, crossing.outcome, crossing.pause_ms, crossing.run_ms
            ));
            let is_committed = crossing.outcome == "committed";
            crossings.push((at_us, crossing));
            if !is_committed {
                story = Some(words);
                break;
            }
        }
        workload.acknowledges(self.between, LOAD_LIMIT).await?;
        let outcome = workload.stop().await?;
        let samples: Vec<&Samples> = outcome.samples().map(|(_, samples)| samples).collect();
        let stalls_us = longest(&samples, &mut crossings);
        let crossings: Vec<Crossing> = crossings.into_iter().map(|(_, crossing)| crossing).collect();
        let committed = crossings.iter().filter(|crossing| crossing.outcome == "committed").count();
        let (audit, followed) = compare(stage, &outcome.notes(), committed).await?;
        let of = |part: fn(&Crossing) -> f64| Stalls::of_ms(crossings.iter().map(part));
        Ok(Verdict {
            source_version: stage.pair.source.version().into(),
            target_version: stage.pair.target.version().into(),
            proxies: stage.proxies.len(),
            clients: self.load.clients,
            sessions: self.load.sessions.0,
            cutovers: self.cutovers,
            committed,
            account: Account::of(&outcome, audit),
            followed,
            stall_ms: Stalls::of_us(stalls_us),
            stall_ms_max: of(|crossing| crossing.stall_ms.max),
            pause_ms: of(|crossing| crossing.pause_ms),
            crossings,
            story,
        })
    }
}

/// The `n`th cutover, from 1; odd ones lead there.
async fn cross(stage: &Stage, n: u32) -> Result<(i64, Crossing, String)> {
    let verb = if n % 2 == 1 { "cutover" } else { "rollback" };
    let at_us = now_us();
    let ended = stage.control.run(&[verb], CUTOVER_LIMIT).await?;
    let run_ms = Duration::from_micros(u64::try_from(now_us() - at_us).unwrap_or_default()).as_secs_f64() * 1e3;
    let json = ended.json().unwrap_or_default();
    let text = |key: &str| json.get(key).and_then(Json::as_str).unwrap_or("unknown").to_owned();
    let crossing = Crossing {
        to: text("target"),
        outcome: text("outcome"),
        pause_ms: json.get("pause_ms").and_then(Json::as_f64).unwrap_or_default(),
        run_ms,
        stall_ms: Stalls::default(),
    };
    Ok((at_us, crossing, ended.story()))
}

/// The longest stall of every client in every crossing, µs; each crossing gets its own.
fn longest(samples: &[&Samples], crossings: &mut [(i64, Crossing)]) -> Vec<u64> {
    let begins: Vec<i64> = crossings.iter().map(|(at_us, _)| *at_us).collect();
    let mut all = Vec::new();
    for (at, (from_us, crossing)) in crossings.iter_mut().enumerate() {
        let until_us = begins.get(at + 1).map_or(i64::MAX, |next| next - 1);
        let stalls: Vec<u64> = samples.iter().filter_map(|one| one.stall_us(None, (*from_us, until_us))).collect();
        crossing.stall_ms = Stalls::of_us(stalls.clone());
        all.extend(stalls);
    }
    all
}

/// The ledger against the side that serves after so many moves, and whether the other side gets there too.
async fn compare(stage: &Stage, notes: &[crate::ledger::Notes], moves: usize) -> Result<(Audit, bool)> {
    let (source, target) =
        tokio::try_join!(stage.pair.source.superuser(DATABASE), stage.pair.target.superuser(DATABASE))?;
    let (serving, other) = if moves % 2 == 1 { (&target, &source) } else { (&source, &target) };
    const TOTAL: &str = "SELECT (SELECT count(*) FROM ledger) + (SELECT sum(abalance) FROM accounts)";
    let total = serving.number(TOTAL).await?;
    let followed = other.until(&format!("SELECT ({TOTAL}) = {total}"), LOAD_LIMIT).await.is_ok();
    Ok((audit(notes, Sides { serving, other: Some(other), moves }).await?, followed))
}
