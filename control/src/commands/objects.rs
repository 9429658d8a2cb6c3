//! `proxyctl objects`: our tables and gates: print them, install them, remove the gates, drop everything.
//!
//! Invariant: `remove` never removes a gate that holds, and leaves the store, the memory of what was decided; `drop` takes that
//! away too, once nobody needs it.

use std::time::Duration;

use clap::{Args, ValueEnum};
use pgcutover_api::store;
use serde::Serialize;

use crate::clusters::{Certainty, Clusters, Ungated};
use crate::commands::Context;
use crate::config::{Config, Replication};
use crate::finding::Finding;
use crate::printer::{Exit, Printer};
use crate::steps::uninstall::{Fence, Servers};
use crate::steps::{STEP_DEADLINE, install};

/// Many tables, each with a lock to be had.
const REMOVE: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Args)]
pub struct Objects {
    /// What to do.
    #[arg(value_enum, default_value_t)]
    work: Work,
    /// Of the SQL only this part.
    #[arg(value_enum)]
    part: Option<Part>,
    /// With drop: also where the fence of the old server falls by it.
    #[arg(long)]
    unfence: bool,
}

/// A part of the SQL, each to be run by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Our two logins and their rights: a superuser, with psql, on both servers.
    Roles,
    /// The way back on a server before PostgreSQL 16: a superuser, there.
    WayBack,
    /// Tables and functions: what 'proxyctl objects' installs itself, as its own login.
    Store,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Work {
    /// Install our tables and functions on both servers, target first.
    #[default]
    Install,
    /// Take the gates of this database off both servers; our tables stay.
    Remove,
    /// Take everything of ours off both servers, gates included, if nobody needs it any more.
    Drop,
    /// Print the SQL of the roles and the store, for reading or for running it by hand.
    Sql,
}

#[derive(Serialize)]
struct Dropped {
    database: String,
    serving: String,
    other: String,
    dropped: Vec<String>,
    /// Tables whose lock could not be had; they keep their gate, and the server its store.
    left: Vec<String>,
    /// What a superuser has to run for the rest; none where something is left.
    superuser_sql: Option<String>,
    findings: Vec<Finding>,
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
        let sql = match self.part {
            None => format!("{}\n{}\n{}", store::ROLES, store::SUBSCRIBER, store::OBJECTS),
            Some(Part::Roles) => store::ROLES.to_owned(),
            Some(Part::WayBack) => store::SUBSCRIBER.to_owned(),
            Some(Part::Store) => store::OBJECTS.to_owned(),
        };
        printer.raw(&sql);
        Ok(Exit::Done)
    }

    /// Installs, target first, removes or drops.
    pub async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        if self.part.is_some() || self.unfence && self.work != Work::Drop {
            context.printer.talk("proxyctl: a part belongs to 'objects sql', --unfence to 'objects drop'");
            return Ok(Exit::Usage);
        }
        match self.work {
            Work::Drop => self.drop_all(context).await,
            Work::Install | Work::Remove | Work::Sql => self.install_or_remove(context).await,
        }
    }

    async fn drop_all(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = &context.config;
        let clusters = Clusters::connect(&config.source.endpoint, &config.target.endpoint).await?;
        let (fleet, absent) = context.fleet().await;
        let servers = Servers::of(config, &clusters).await?;
        let fence = if self.unfence { Fence::MayFall } else { Fence::Stays };
        let findings = servers.hindrances(&fleet, &absent, fence).await?;
        let (serving, other) = servers.names();
        let (serving, other) = (serving.to_owned(), other.to_owned());
        let (exit, dropped, left) = if findings.is_empty() {
            let (dropped, left) = servers.drop_stores().await?;
            (if left.is_empty() { Exit::Done } else { Exit::Unfinished }, dropped, left)
        } else {
            (Exit::Refused, Vec::new(), Vec::new())
        };
        let left = left.iter().map(Ungated::to_string).collect();
        let superuser_sql = (exit == Exit::Done).then(|| logins_sql(config));
        let database = config.database.clone();
        context.printer.data(&Dropped { database, serving, other, dropped, left, superuser_sql, findings });
        Ok(exit)
    }

    async fn install_or_remove(&self, context: &Context) -> anyhow::Result<Exit> {
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
            (Work::Install | Work::Drop | Work::Sql, Replication::Logical { .. }) => {
                "objects installed on target and source"
            }
            (Work::Install | Work::Drop | Work::Sql, Replication::Physical) => {
                "objects installed on the source, whose standby gets them"
            }
        };
        let left: Vec<String> = left.iter().map(Ungated::to_string).collect();
        let exit = if left.is_empty() { Exit::Done } else { Exit::Unfinished };
        context.printer.data(&Done { done, superuser_sql, left });
        if self.work == Work::Install {
            context.printer.next("'proxyctl preflight'");
        }
        Ok(exit)
    }
}

/// What our logins leave to a superuser.
fn logins_sql(config: &Config) -> String {
    let proxyctl = config.source.endpoint.pg.get_user().unwrap_or("pgcutover");
    let logins = [proxyctl, &config.policy.proxy_role].map(store::identifier).join(", ");
    format!("DROP SCHEMA IF EXISTS pgcutover_subscriber CASCADE; DROP OWNED BY {logins}; DROP ROLE {logins};")
}

impl std::fmt::Display for Dropped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Dropped { database, serving, other, .. } = self;
        match (self.findings.is_empty(), self.left.is_empty(), self.dropped.is_empty()) {
            (false, _, _) => writeln!(f, "{database}: served by {serving}; nothing was dropped")?,
            (true, false, _) => {
                writeln!(f, "{database}: served by {serving}; not everything could be dropped, run it again")?
            }
            (true, true, false) => {
                writeln!(f, "{database}: served by {serving}; our tables, functions and gates are gone")?
            }
            (true, true, true) => writeln!(f, "{database}: nothing of ours is on {serving} or {other}")?,
        }
        self.dropped.iter().try_for_each(|dropped| writeln!(f, "  dropped: {dropped}"))?;
        self.left.iter().try_for_each(|left| writeln!(f, "  left: {left}"))?;
        self.findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))?;
        if let Some(sql) = &self.superuser_sql {
            writeln!(
                f,
                "Our logins are left. Once no proxy's file has control_user any more, a superuser runs on both servers, in that database:"
            )?;
            writeln!(f, "{sql}")?;
        }
        Ok(())
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
