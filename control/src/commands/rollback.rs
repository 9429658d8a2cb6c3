//! `proxyctl rollback`: the cutover the other way round: from the server that serves to the one that served before.
//!
//! Invariant: the direction is read off the servers' decisions, never guessed; the pipeline is the cutover's own, so its
//! guarantees are too.

use std::fmt;

use clap::Args;
use serde::Serialize;

use crate::clusters::{Cluster, Clusters, Role, way_back};
use crate::commands::cutover::Cutover;
use crate::commands::{Context, series};
use crate::config::{Config, Replication};
use crate::event::Ending;
use crate::finding::Finding;
use crate::plan::Goal;
use crate::printer::Exit;
use crate::steps::{promoted, reverse};

/// How.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags on a command line are booleans")]
pub struct Rollback {
    /// Only look for what would make it fail, and change nothing.
    #[arg(long, conflicts_with = "rehearse")]
    preflight: bool,
    /// Take every step that can be taken back, then go back.
    #[arg(long)]
    rehearse: bool,
    #[command(flatten)]
    how: Cutover,
}

#[derive(Serialize)]
struct Refusal {
    database: String,
    outcome: Ending,
    findings: Vec<Finding>,
}

impl Rollback {
    /// Whether it names a file of one run.
    pub fn is_of_one_run(&self) -> bool {
        self.how.is_of_one_run()
    }

    /// Turns the configurations round and goes; where one of them leads nowhere, nothing happens.
    pub async fn run(self, contexts: Vec<Context>) -> anyhow::Result<Exit> {
        let mut back = Vec::new();
        for context in contexts {
            match turned(context).await {
                Ok(context) => back.push(context),
                Err((context, finding)) => {
                    let database = context.config.database.clone();
                    context.printer.data(&Refusal { database, outcome: Ending::Refused, findings: vec![finding] });
                    return Ok(Exit::Refused);
                }
            }
        }
        match (self.preflight, self.rehearse) {
            (true, _) => series::preflights(&back, Some("rollback --rehearse")).await,
            (false, true) => series::run(&self.how, Goal::Rehearsal, back).await,
            (false, false) => series::run(&self.how, Goal::Cutover, back).await,
        }
    }
}

async fn turned(context: Context) -> Result<Context, (Context, Finding)> {
    let config = &context.config;
    if config.replication == Replication::Physical {
        let finding = no_way_back(config);
        return Err((context, finding));
    }
    let clusters = Clusters {
        source: Cluster::new(Role::Source, &config.source.endpoint),
        target: Cluster::new(Role::Target, &config.target.endpoint),
    };
    match reverse::served(config, &clusters).await {
        Ok(Some(served)) if served.by == Role::Target => {
            let subscription = way_back::of_epoch(&config.route, served.claim.epoch);
            let Context { config, printer } = context;
            Ok(Context { config: config.turned(Some(subscription)), printer })
        }
        Ok(Some(_) | None) => {
            let problem =
                format!("is served by {}, where it is to come from: nothing leads back", config.source.backend);
            let fix = "proxyctl status tells where it is; proxyctl cutover moves it";
            let finding = Finding::red("rollback", &config.database, problem, fix);
            Err((context, finding))
        }
        Err(error) => {
            let fix = "both servers have to answer before anything can be moved back: see that they run";
            let finding = Finding::red("rollback", &config.database, error.to_string(), fix);
            Err((context, finding))
        }
    }
}

/// A promoted server has nothing that follows it.
fn no_way_back(config: &Config) -> Finding {
    let (old, new) = (&config.source.backend, &config.target.backend);
    let problem = format!("moves physically: nothing leads from {new} back to {old}");
    let fix = format!(
        "rebuild {old} as a standby of {new} (pg_rewind --source-server, or pg_basebackup -R); {}",
        promoted::RETURN
    );
    Finding::red("rollback", &config.database, problem, fix)
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: rollback refused, nothing happened", self.database)?;
        self.findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))
    }
}
