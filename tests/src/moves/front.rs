//! What stands between the clients and the two servers, and how it moves them from one to the other.
//!
//! Invariant: a front that was set up serves the source; once [`Front::carry`] returns well, clients are let to the target.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::Value as Json;

use crate::bouncer::Bouncer;
use crate::client::Client;
use crate::control::{StepTime, steps};
use crate::moves::script::Script;
use crate::moves::{Move, Way};
use crate::pair::Pair;
use crate::process::cpu_s;
use crate::proxy::{ADMIN, Proxy};
use crate::stage::{Serving, Stage};

/// No move takes this long: every step has a limit of seconds.
const MOVE_LIMIT: Duration = Duration::from_secs(90);

/// Server connections of each pooler; the default of both.
const POOL_SIZE: u32 = 20;

/// The front with all that is behind it.
pub(super) enum Front {
    /// Proxies, and proxyctl.
    Proxies(Stage),
    /// PgBouncers and a script. They end before the servers.
    Bouncers(Vec<Bouncer>, Pair),
    /// Nothing: clients look up the port of the server whenever they log in.
    Nothing(Arc<AtomicU16>, Pair),
}

/// How the move went.
pub(super) struct Carried {
    pub(super) outcome: String,
    pub(super) pause_ms: f64,
    pub(super) parts: Vec<StepTime>,
    pub(super) story: String,
}

impl Carried {
    /// After a decision clients are on the target, or on their way to it.
    pub(super) fn serving(&self) -> Serving {
        if ["committed", "unfinished"].contains(&self.outcome.as_str()) { Serving::Target } else { Serving::Source }
    }

    fn by_hand(script: Script) -> Carried {
        let (pause_ms, parts) = script.end();
        Carried { outcome: "committed".to_owned(), pause_ms, parts, story: String::new() }
    }
}

impl Front {
    pub(super) async fn set_up(wanted: &Move, pair: Pair) -> Result<Front> {
        match wanted.way {
            Way::Pgcutover => {
                let change = |options: &mut crate::proxy::ProxyOptions| {
                    options.setting("max_client_conn", i64::from(wanted.clients) + 100);
                    options.setting("default_pool_size", i64::from(POOL_SIZE));
                };
                let mut stage = Stage::with(pair, wanted.fronts, change).await?;
                stage.control.with_way_back();
                // What is measured is told, not refused.
                stage.control.budget(&[("stall", "2s")]);
                Ok(Front::Proxies(stage))
            }
            Way::Pgbouncer => {
                // A failed login is tried again after a second: fifteen, the default, would be what its clients wait.
                let lines = format!(
                    "pool_mode = transaction\ndefault_pool_size = {POOL_SIZE}\nserver_login_retry = 1\n\
                     max_client_conn = {}\n",
                    wanted.clients + 100
                );
                let mut bouncers = Vec::new();
                for _ in 0..wanted.fronts {
                    bouncers.push(Bouncer::with(pair.source.port(), &lines).await?);
                }
                Ok(Front::Bouncers(bouncers, pair))
            }
            Way::Terminate => Ok(Front::Nothing(Arc::new(AtomicU16::new(pair.source.port())), pair)),
        }
    }

    pub(super) fn pair(&self) -> &Pair {
        match self {
            Front::Proxies(stage) => &stage.pair,
            Front::Bouncers(_, pair) | Front::Nothing(_, pair) => pair,
        }
    }

    /// Where clients connect, unless they look it up.
    pub(super) fn ports(&self) -> Vec<u16> {
        match self {
            Front::Proxies(stage) => stage.ports(),
            Front::Bouncers(bouncers, _) => bouncers.iter().map(Bouncer::port).collect(),
            Front::Nothing(..) => Vec::new(),
        }
    }

    /// Where clients look up the server.
    pub(super) fn address(&self) -> Option<Arc<AtomicU16>> {
        match self {
            Front::Proxies(_) | Front::Bouncers(..) => None,
            Front::Nothing(address, _) => Some(Arc::clone(address)),
        }
    }

    /// CPU seconds it has used so far.
    pub(super) fn cpu_s(&self) -> f64 {
        let pids: Vec<u32> = match self {
            Front::Proxies(stage) => stage.proxies.iter().filter_map(Proxy::pid).collect(),
            Front::Bouncers(bouncers, _) => bouncers.iter().map(Bouncer::pid).collect(),
            Front::Nothing(..) => Vec::new(),
        };
        pids.into_iter().filter_map(|pid| cpu_s(pid).ok()).sum()
    }

    /// What a rehearsal says a move would hold clients for; only proxyctl can say.
    pub(super) async fn rehearse(&self) -> Result<Option<Json>> {
        let Front::Proxies(stage) = self else { return Ok(None) };
        let rehearsed = stage.control.run(&["rehearse"], MOVE_LIMIT).await?;
        ensure!(rehearsed.code == Some(0), "{}", rehearsed.story());
        Ok(Some(rehearsed.json()?.get("prediction").context("a rehearsal without prediction")?.clone()))
    }

    /// Moves the database.
    pub(super) async fn carry(&self) -> Result<Carried> {
        match self {
            Front::Proxies(stage) => {
                let ended = stage.control.run(&["cutover"], MOVE_LIMIT).await?;
                let report = ended.json()?;
                let outcome = report.get("outcome").and_then(Json::as_str).unwrap_or("failed").to_owned();
                let pause_ms = report.get("pause_ms").and_then(Json::as_f64).unwrap_or_default();
                Ok(Carried { outcome, pause_ms, parts: steps(&report), story: ended.story() })
            }
            Front::Bouncers(bouncers, pair) => {
                let carried = tokio::time::timeout(MOVE_LIMIT, past_bouncers(bouncers, pair));
                Ok(Carried::by_hand(carried.await.context("PAUSE, edit, RELOAD, RESUME")??))
            }
            Front::Nothing(address, pair) => {
                let carried = tokio::time::timeout(MOVE_LIMIT, past_nothing(address, pair));
                Ok(Carried::by_hand(carried.await.context("terminate and reconnect")??))
            }
        }
    }
}

/// PAUSE all of them at once, move, edit their files, RELOAD, RESUME.
async fn past_bouncers(bouncers: &[Bouncer], pair: &Pair) -> Result<Script> {
    let consoles = try_join_all(bouncers.iter().map(|bouncer| bouncer.connect(ADMIN, "pgbouncer"))).await?;
    let mut script = Script::ready(pair).await?;
    script.begin();
    all(&consoles, "PAUSE").await?;
    script.done("PAUSE");
    script.read_only().await?;
    script.caught_up().await?;
    script.sequences().await?;
    let [old, new] = [&pair.source, &pair.target].map(|cluster| format!("host=127.0.0.1 port={}\n", cluster.port()));
    for bouncer in bouncers {
        let file = bouncer.dir().join("pgbouncer.ini");
        let text = fs::read_to_string(&file)?;
        ensure!(text.contains(&old), "{} does not name the source", file.display());
        fs::write(&file, text.replace(&old, &new))?;
    }
    all(&consoles, "RELOAD").await?;
    script.done("edit, RELOAD");
    all(&consoles, "RESUME").await?;
    script.done("RESUME");
    Ok(script)
}

async fn all(consoles: &[Client], command: &str) -> Result<()> {
    try_join_all(consoles.iter().map(|console| console.run(command))).await.map(drop)
}

/// The source refuses writes and ends every session; clients come back by themselves, and look up the address as they do.
async fn past_nothing(address: &AtomicU16, pair: &Pair) -> Result<Script> {
    let mut script = Script::ready(pair).await?;
    script.begin();
    script.read_only().await?;
    script.caught_up().await?;
    script.sequences().await?;
    address.store(pair.target.port(), Ordering::Relaxed);
    script.done("address");
    Ok(script)
}
