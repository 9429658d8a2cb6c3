//! `proxyctl objects`: our tables and gates: print them, install them, remove the gates.
//!
//! Invariant: a gate that holds is never removed; the store itself stays, it is the memory of what was decided.

use std::time::Duration;

use clap::{Args, ValueEnum};
use pgcutover_api::store;
use serde::Serialize;

use crate::clusters::{Certainty, Clusters, Ungated};
use crate::commands::Context;
use crate::config::Replication;
use crate::printer::{Exit, Printer};
use crate::steps::{STEP_DEADLINE, install};

/// Many tables, each with a lock to be had.
const REMOVE: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Args)]
pub struct Objects {
    /// What to do.
    #[arg(value_enum, default_value_t)]
    work: Work,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Work {
    /// Install our tables and functions on both servers, target first.
    #[default]
    Install,
    /// Take the gates of this database off both servers.
    Remove,
    /// Print the SQL of the roles and the store, for reading or for running it by hand.
    Sql,
}

#[derive(Serialize)]
struct Done {
    done: &'static str,
    /// What a superuser has to run on the source so that DDL is refused and not only noticed; none if nothing.
    superuser_sql: Option<String>,
    left: Vec<String>,
}

impl Objects {
    /// Whether no configuration is needed.
    pub fn only_prints(&self) -> bool {
        self.work == Work::Sql
    }

    /// Prints the SQL.
    pub fn print(&self, printer: Printer) -> anyhow::Result<Exit> {
        printer.raw(&format!("{}\n{}\n{}", store::ROLES, store::SUBSCRIBER, store::OBJECTS));
        Ok(Exit::Done)
    }

    /// Installs, target first, or removes.
    pub async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = &context.config;
        let clusters = Clusters::connect(&config.source.endpoint, &config.target.endpoint).await?;
        let mut left: Vec<Ungated> = Vec::new();
        let mut superuser_sql = None;
        if self.work == Work::Remove {
            let database = config.route.clone();
            left.extend(clusters.source.disarm(&database, REMOVE).await?);
            match config.replication {
                Replication::Logical { .. } => left.extend(clusters.target.disarm(&database, REMOVE).await?),
                // What is removed on the source is removed on its standby.
                Replication::Physical if clusters.target.is_in_recovery(STEP_DEADLINE).await? => {}
                Replication::Physical => left.extend(clusters.target.disarm(&database, REMOVE).await?),
            }
        } else {
            install::install(config, &clusters).await?;
            let certainty = clusters.source.arm(&config.route, STEP_DEADLINE).await?;
            superuser_sql = (certainty == Certainty::Watched).then(|| store::event_trigger(&config.route));
        }
        let done = match (self.work, &config.replication) {
            (Work::Remove, _) => "gates removed",
            (Work::Install | Work::Sql, Replication::Logical { .. }) => "objects installed on target and source",
            (Work::Install | Work::Sql, Replication::Physical) => {
                "objects installed on the source, whose standby gets them"
            }
        };
        let left: Vec<String> = left.iter().map(Ungated::to_string).collect();
        let exit = if left.is_empty() { Exit::Done } else { Exit::Unfinished };
        context.printer.data(&Done { done, superuser_sql, left });
        Ok(exit)
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.done)?;
        if let Some(sql) = &self.superuser_sql {
            writeln!(f, "DDL will be noticed, not refused, unless a superuser runs this on the source:\n{sql};")?;
        }
        self.left.iter().try_for_each(|left| writeln!(f, "  left: {left}"))
    }
}
