//! `proxyctl abort`: ends what an earlier run left open, also when its proxyctl is dead.
//!
//! Invariant: nothing is opened or resumed before the store has answered abort; if it answers commit nothing is done here,
//! the proxies follow by themselves.

use std::fmt;

use pgcutover_api::command::{Command, ResumeWith, Warrant};
use pgcutover_api::epoch::Claim;
use pgcutover_api::store::{GateForm, Name, Outcome, Turn};
use serde::Serialize;

use crate::clusters::{Cluster, ClusterError, Role};
use crate::commands::{Answers, Context};
use crate::config::Replication;
use crate::event::Decision;
use crate::printer::Exit;
use crate::proxies::{ProxyError, SHOW_DEADLINE};
use crate::roster;
use crate::steps::{STEP_DEADLINE, decided, kept};

#[derive(Serialize)]
struct Aborted {
    database: String,
    claim: Option<Claim>,
    outcome: Option<Decision>,
    fence: String,
    proxies: Option<Answers>,
}

/// Aborts the open epoch.
pub async fn run(context: &Context) -> anyhow::Result<Exit> {
    let config = &context.config;
    let database = config.route.clone();
    let mut source = Cluster::new(Role::Source, &config.source.endpoint);
    let claim = match open(&source, &database).await {
        Ok(Some(claim)) => Ok(Some(claim)),
        Ok(None) => {
            let target = Cluster::new(Role::Target, &config.target.endpoint);
            let there = match config.replication {
                Replication::Logical { .. } => open(&target, &database).await,
                // What is open there is a copy of what is open on the source.
                Replication::Physical => Ok(None),
            };
            // One that can't be asked now stops nobody: the epochs of a move there are on the source.
            match there {
                // A rollback's: what is the target here is its source.
                Ok(Some(claim)) => {
                    source = target;
                    Ok(Some(claim))
                }
                Ok(None) | Err(_) => fenced(&source, &database).await,
            }
        }
        Err(error) => Err(error),
    };
    let claim = match claim {
        Ok(claim) => claim,
        Err(error) if error.is_absence() => return undecided(context, &error),
        Err(error) => return Err(error.into()),
    };
    let mut result =
        Aborted { database: config.database.clone(), claim, outcome: None, fence: "none".to_owned(), proxies: None };
    if let Some(claim) = claim {
        let turn = Turn { db: database, claim };
        let outcome = source.decide(&turn, Outcome::Abort, decided::PATIENCE).await;
        match outcome {
            Ok(Outcome::Abort) => land(context, &source, &turn, &mut result).await,
            Ok(Outcome::Commit) => result.outcome = Some(Decision::Commit),
            Err(error) => return undecided(context, &error),
        }
    }
    let exit = exit(&result);
    context.printer.data(&result);
    Ok(exit)
}

/// The epoch that is open on a server.
async fn open(server: &Cluster, database: &Name) -> Result<Option<Claim>, ClusterError> {
    if !server.installed(STEP_DEADLINE).await? {
        return Ok(None);
    }
    let open = server.view(database, STEP_DEADLINE).await?.open;
    Ok(open.map(|open| Claim { run: open.run, epoch: open.epoch }))
}

/// A decided epoch whose fence still stands: its outcome says whether the fence may open.
async fn fenced(source: &Cluster, database: &Name) -> Result<Option<Claim>, ClusterError> {
    if !source.installed(STEP_DEADLINE).await? {
        return Ok(None);
    }
    let view = source.view(database, STEP_DEADLINE).await?;
    let gates = source.gates(STEP_DEADLINE).await?;
    let fenced = gates.iter().find(|gate| gate.db == database.as_str() && gate.form == Some(GateForm::Fenced));
    Ok(view
        .last
        .filter(|last| fenced.is_some_and(|gate| gate.epoch == last.epoch))
        .map(|last| Claim { run: last.run, epoch: last.epoch }))
}

async fn land(context: &Context, source: &Cluster, turn: &Turn, result: &mut Aborted) {
    let database = context.config.database.clone();
    let resume = Command::ResumeWith(ResumeWith { database, warrant: Warrant::Claim(turn.claim) });
    let proxies = async {
        let (fleet, unreached) = roster::assemble_some(&context.config, source).await;
        let answers = fleet.each(|proxy| proxy.order_aside(&resume, SHOW_DEADLINE)).await;
        Answers::new(resume.to_string(), answers).and_unreached(unreached)
    };
    let (fence, proxies) = tokio::join!(source.unfence(turn, STEP_DEADLINE), proxies);
    let bouncers = kept::still_held(&context.config, source, turn.claim).await.into_iter();
    let bouncers = bouncers.map(|found| {
        let message = format!("{}: {}", found.problem, found.fix);
        ProxyError { proxy: found.object, sqlstate: None, message }
    });
    result.outcome = Some(Decision::Abort);
    result.fence = fence.map_or_else(|error| error.to_string(), |()| "open".to_owned());
    result.proxies = Some(proxies.and_unreached(bouncers.collect()));
}

fn undecided(context: &Context, error: &dyn fmt::Display) -> anyhow::Result<Exit> {
    context.printer.talk(format_args!("proxyctl: undecided: {error}; proxies hold by their own rules, run this again"));
    Ok(Exit::Undecided)
}

fn exit(result: &Aborted) -> Exit {
    match result.outcome {
        None | Some(Decision::Abort) => Exit::Done,
        Some(Decision::Commit) => Exit::Unfinished,
    }
}

impl fmt::Display for Aborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.claim, self.outcome) {
            (None, _) => writeln!(f, "{}: no epoch is open, nothing to abort", self.database)?,
            (Some(claim), Some(Decision::Abort)) => {
                writeln!(f, "{}: {claim} is aborted; fence: {}", self.database, self.fence)?
            }
            (Some(claim), Some(Decision::Commit)) => {
                writeln!(
                    f,
                    "{}: {claim} was committed and cannot be aborted; proxies follow by themselves",
                    self.database
                )?;
            }
            (Some(claim), None) => writeln!(f, "{}: {claim} is undecided", self.database)?,
        }
        // A proxy that was never paused, or has landed already, refuses the RESUME: that is no failure.
        self.proxies.iter().try_for_each(|answers| write!(f, "{answers}"))
    }
}
