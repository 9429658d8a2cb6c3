//! One file per verb: gather, act through a lower module, print, and say how it ended.
//!
//! Invariant: no command is longer than a screen; none of them touches a server or proxy but through the modules below.

use clap::Args;
use pgcutover_api::command::Warrant;
use pgcutover_api::epoch::{Claim, Epoch, RunId};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::clusters::{Cluster, Role};
use crate::config::Config;
use crate::event::Ending;
use crate::printer::{Exit, Printer};
use crate::proxies::{Fleet, ProxyError};
use crate::roster;

pub mod abort;
pub mod completions;
pub mod cutover;
pub mod history;
pub mod objects;
pub mod pause;
pub mod plan;
pub mod preflight;
pub mod report;
pub mod resume;
pub mod resume_run;
pub mod rollback;
pub mod series;
pub mod sessions;
pub mod status;
pub mod switch;
pub mod verify;
pub mod watch_pgbouncer;
pub mod way_back;

/// What every verb gets.
#[derive(Debug)]
pub struct Context {
    /// What was asked for.
    pub config: Config,
    /// Where results go.
    pub printer: Printer,
}

impl From<Ending> for Exit {
    fn from(ending: Ending) -> Exit {
        match ending {
            Ending::Committed | Ending::Rehearsed => Exit::Done,
            Ending::Refused => Exit::Refused,
            Ending::Aborted => Exit::Aborted,
            Ending::Unfinished => Exit::Unfinished,
            Ending::Undecided => Exit::Undecided,
        }
    }
}

/// Becomes true at Ctrl-C or SIGTERM: an orderly abort, as long as nothing is decided.
fn interrupt(printer: Printer) -> std::io::Result<watch::Receiver<bool>> {
    let (wanted, watch) = watch::channel(false);
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Ends with the process.
    tokio::spawn(async move {
        loop {
            tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
            printer.talk("ending: an undecided cutover is aborted, a decided one is finished");
            wanted.send_replace(true);
        }
    });
    Ok(watch)
}

impl Context {
    /// Every proxy that can be had, and who can't.
    pub async fn fleet(&self) -> (Fleet, Vec<ProxyError>) {
        let source = Cluster::new(Role::Source, &self.config.source.endpoint);
        roster::assemble_some(&self.config, &source).await
    }
}

/// Whose pause is meant.
#[derive(Debug, Clone, Copy, Args)]
pub struct Owner {
    /// The run that owns the pause (SHOW GATES tells it).
    #[arg(long, requires = "epoch")]
    run: Option<RunId>,
    /// Its epoch.
    #[arg(long, requires = "run")]
    epoch: Option<Epoch>,
}

impl Owner {
    /// Both or nothing, as the definition demands.
    pub fn claim(self) -> Option<Claim> {
        Some(Claim { run: self.run?, epoch: self.epoch? })
    }
}

/// By what right.
#[derive(Debug, Clone, Copy, Args)]
pub struct Right {
    #[command(flatten)]
    owner: Owner,
    /// Against the owner: nobody else must be at work on this database.
    #[arg(long, conflicts_with_all = ["run", "epoch"])]
    force: bool,
}

impl Right {
    /// The right that was claimed, if any.
    pub fn warrant(self) -> Option<Warrant> {
        if self.force { Some(Warrant::Force) } else { self.owner.claim().map(Warrant::Claim) }
    }
}

/// What each proxy said to one order.
#[derive(Debug, Serialize)]
pub struct Answers {
    /// The order.
    pub order: String,
    /// One line per proxy.
    pub proxies: Vec<ProxyAnswer>,
}

/// What one proxy said.
#[derive(Debug, Serialize)]
pub struct ProxyAnswer {
    /// Its name.
    pub proxy: String,
    /// `done`, or its words.
    pub answer: String,
    /// Whether it did what was asked.
    pub done: bool,
}

impl Answers {
    /// Collects them.
    pub fn new<T>(order: String, answers: Vec<(&str, Result<T, ProxyError>)>) -> Answers {
        let line = |(proxy, answer): (&str, Result<T, ProxyError>)| ProxyAnswer {
            proxy: proxy.to_owned(),
            done: answer.is_ok(),
            answer: answer.map_or_else(|error| error.message, |_| "done".to_owned()),
        };
        Answers { order, proxies: answers.into_iter().map(line).collect() }
    }

    /// Adds proxies that could not be reached.
    #[must_use]
    pub fn and_unreached(mut self, errors: Vec<ProxyError>) -> Answers {
        let lines = errors.into_iter();
        self.proxies.extend(lines.map(|error| ProxyAnswer { proxy: error.proxy, answer: error.message, done: false }));
        self
    }

    /// Whether every proxy did what was asked.
    pub fn all_done(&self) -> bool {
        self.proxies.iter().all(|proxy| proxy.done)
    }
}

impl std::fmt::Display for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.order)?;
        for line in &self.proxies {
            writeln!(f, "  {}: {}", line.proxy, line.answer)?;
        }
        Ok(())
    }
}
