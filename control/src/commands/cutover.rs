//! `proxyctl cutover`: the whole of it; `proxyctl rehearse`: all of it that can be taken back, and then taken back.
//!
//! Invariant: whatever happens after the journal is there, a report is printed and written.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use pgcutover_api::epoch::RunId;
use tokio::sync::watch;

use crate::commands::{Context, report};
use crate::config::Config;
use crate::engine::{Engine, Hooks};
use crate::event::Event;
use crate::journal::{Journal, JournalError};
use crate::plan::{Goal, Step};
use crate::printer::{Exit, Printer};
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
    /// Not more than so many attempts (default: policy.attempts); another one follows an abort or a moment that was not calm.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    attempts: Option<u32>,
    #[command(flatten)]
    hooks: Hooks,
}

/// Waits between attempts grow up to this: a moment of calm comes within minutes, or somebody has to look.
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// How one attempt ended.
struct Attempt {
    exit: Exit,
    /// Why another one may do better, if it may.
    again: Option<String>,
}

impl Cutover {
    /// Whether it names a file of one run.
    pub fn is_of_one_run(&self) -> bool {
        self.report.is_some() || self.clients.is_some()
    }

    /// Cuts over, or rehearses it.
    pub async fn run(
        &self,
        goal: Goal,
        context: Context,
        mut interrupt: watch::Receiver<bool>,
    ) -> anyhow::Result<Exit> {
        let Context { config, printer } = context;
        let attempts = self.attempts.unwrap_or(config.policy.attempts);
        let mut number = 1;
        loop {
            let Attempt { exit, again } = self.attempt(goal, &config, printer, interrupt.clone()).await?;
            let Some(reason) = again.filter(|_| number < attempts && !*interrupt.borrow()) else { return Ok(exit) };
            let wait = back_off(config.policy.back_off, number);
            printer.talk(format_args!("attempt {number} of {attempts} {reason}; the next one in {wait:?}"));
            if tokio::time::timeout(wait, interrupt.wait_for(|wanted| *wanted)).await.is_ok() {
                return Ok(exit);
            }
            number += 1;
        }
    }

    async fn attempt(
        &self,
        goal: Goal,
        config: &Config,
        printer: Printer,
        interrupt: watch::Receiver<bool>,
    ) -> anyhow::Result<Attempt> {
        let run = RunId::random();
        let journal = match Journal::create(&config.journal_dir, &config.database, run) {
            Ok(journal) => journal,
            Err(error @ JournalError::Locked { .. }) => {
                printer.talk(format_args!("proxyctl: {error}"));
                return Ok(Attempt { exit: Exit::Refused, again: None });
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(who) = journal.died_at_work() {
            printer.talk(format_args!("a stale lock: {who} died at work; 'proxyctl resume-run' tells what it left"));
        }
        printer.talk(format_args!("run {run}, journal {}", journal.path().display()));
        let scene = Scene::new(config.clone(), journal, run);
        let mut engine = Engine::new(scene, goal, printer.progress(), interrupt, self.hooks);
        let ended = engine.run().await;
        if let Some(keepers) = engine.scene.keepers.take() {
            keepers.end().await;
        }
        let Engine { scene, progress, .. } = engine;
        drop(progress);
        let exit = report::tell(printer, &scene.journal, self.report.clone(), self.clients.as_deref());
        ended.context("the journal could not be written: the run stands as reported")?;
        Ok(Attempt { exit, again: scene.journal.state().may_do_better().map(|step| reason(&scene.journal, step)) })
    }
}

fn reason(journal: &Journal, step: Step) -> String {
    let why = |event: &Event| if let Event::Failed { error, .. } = event { Some(error.clone()) } else { None };
    let why = journal.records().iter().rev().find_map(|record| why(&record.event)).unwrap_or_default();
    format!("failed at '{step}': {why}")
}

/// Twice as long after each attempt.
fn back_off(first: Duration, attempt: u32) -> Duration {
    first.saturating_mul(2u32.saturating_pow(attempt.saturating_sub(1))).min(BACK_OFF_MAX.max(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_further_and_further_apart_up_to_a_minute() {
        let first = Duration::from_secs(5);
        let waits: Vec<u64> = (1..7).map(|attempt| back_off(first, attempt).as_secs()).collect();
        assert_eq!(waits, [5, 10, 20, 40, 60, 60]);
        assert_eq!(back_off(Duration::from_secs(300), 9), Duration::from_secs(300));
        assert_eq!(back_off(first, u32::MAX), BACK_OFF_MAX);
    }
}
