//! `proxyctl cutover`: the whole of it; `proxyctl rehearse`: all of it that can be taken back, and then taken back.
//!
//! Invariant: whatever happens after the journal is there, a report is printed and written.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use pgcutover_api::epoch::RunId;

use crate::commands::{Context, interrupt, report};
use crate::engine::{Engine, Hooks};
use crate::journal::{Journal, JournalError};
use crate::plan::Goal;
use crate::printer::Exit;
use crate::steps::Scene;

/// How.
#[derive(Debug, Args)]
pub struct Cutover {
    /// Write the HTML page there (default: beside the journal).
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// What clients saw, read when the run is over: lines of client,at_us,stall_us.
    #[arg(long, value_name = "FILE")]
    clients: Option<PathBuf>,
    #[command(flatten)]
    hooks: Hooks,
}

impl Cutover {
    /// Cuts over, or rehearses it.
    pub async fn run(self, goal: Goal, context: Context) -> anyhow::Result<Exit> {
        let Context { config, printer } = context;
        let run = RunId::random();
        let journal = match Journal::create(&config.journal_dir, &config.database, run) {
            Ok(journal) => journal,
            Err(error @ JournalError::Locked { .. }) => {
                printer.talk(format_args!("proxyctl: {error}"));
                return Ok(Exit::Refused);
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(who) = journal.died_at_work() {
            printer.talk(format_args!("a stale lock: {who} died at work; 'proxyctl resume-run' tells what it left"));
        }
        printer.talk(format_args!("run {run}, journal {}", journal.path().display()));
        let scene = Scene::new(config, journal, run);
        let mut engine = Engine::new(scene, goal, printer.progress(), interrupt(printer)?, self.hooks);
        let ended = engine.run().await;
        let Engine { scene, progress, .. } = engine;
        drop(progress);
        report::tell(printer, &scene.journal, self.report, self.clients.as_deref());
        Ok(ended.context("the journal could not be written: the run stands as reported")?.into())
    }
}
