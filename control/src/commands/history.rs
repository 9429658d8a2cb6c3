//! `proxyctl history`: what runs there were, from their journals.
//!
//! Invariant: reads journals only; one that can't be read is a line that says so, and hides no other.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use clap::Args;
use pgcutover_api::epoch::{Epoch, RunId};
use serde::Serialize;

use crate::commands::Context;
use crate::event::Ending;
use crate::finding::Level;
use crate::journal;
use crate::plan::{Goal, Step};
use crate::printer::Exit;
use crate::report::{Report, StepOutcome};

/// How many.
#[derive(Debug, Args)]
pub struct History {
    /// Only so many of the last ones.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
}

#[derive(Serialize)]
struct Runs {
    runs: Vec<Line>,
    /// Journals that can't be read, and why.
    unreadable: Vec<String>,
}

#[derive(Serialize)]
struct Line {
    run: RunId,
    database: String,
    goal: Goal,
    began_at_us: u64,
    by: String,
    /// Digest of the configuration.
    config: String,
    source: String,
    target: String,
    epoch: Option<Epoch>,
    outcome: Ending,
    /// False: its proxyctl died, and nobody took it up.
    ended: bool,
    pause_ms: Option<f64>,
    /// The step that failed, or in which it broke off.
    stopped_at: Option<Step>,
    /// What was to fix first.
    finding: Option<String>,
    journal: PathBuf,
}

impl History {
    /// Reads and prints, oldest first.
    pub fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let dir = &context.config.journal_dir;
        let mut runs = Runs { runs: Vec::new(), unreadable: Vec::new() };
        for run in journal::runs(dir)? {
            let path = journal::path(dir, run);
            match journal::read(&path) {
                // Broken off before its first line was on disk: it has done nothing.
                Ok(replay) if replay.records.is_empty() => {}
                Ok(replay) => runs.runs.push(line(run, Report::fold(&path, &replay.records, &replay.state))),
                Err(error) => runs.unreadable.push(error.to_string()),
            }
        }
        runs.runs.sort_by_key(|line| line.began_at_us);
        let too_many = self.last.map_or(0, |last| runs.runs.len().saturating_sub(last));
        runs.runs.drain(..too_many);
        let exit = if runs.unreadable.is_empty() { Exit::Done } else { Exit::Unexpected };
        context.printer.data(&runs);
        Ok(exit)
    }
}

fn line(run: RunId, report: Report) -> Line {
    let stopped = |outcome| matches!(outcome, StepOutcome::Failed | StepOutcome::BrokenOff);
    let red = report.findings.iter().find(|finding| finding.level == Level::Red);
    Line {
        run,
        goal: report.goal,
        began_at_us: report.began_at_us,
        epoch: report.epoch,
        outcome: report.outcome,
        ended: report.ended,
        pause_ms: report.pause_ms,
        stopped_at: report.steps.iter().rfind(|step| stopped(step.outcome)).map(|step| step.name),
        finding: red.map(|finding| format!("{}: {}", finding.object, finding.problem)),
        database: report.database,
        by: report.by,
        config: report.config,
        source: report.source,
        target: report.target,
        journal: report.journal,
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.runs {
            writeln!(f, "{line}")?;
        }
        self.unreadable.iter().try_for_each(|error| writeln!(f, "ERROR: {error}"))?;
        write!(f, "{} run{}", self.runs.len(), if self.runs.len() == 1 { "" } else { "s" })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_micros(self.began_at_us));
        let what = match self.goal {
            Goal::Cutover => "cutover",
            Goal::Rehearsal => "rehearsal",
        };
        let Line { run, database, source, target, outcome, .. } = self;
        write!(f, "{at} {run} {database} {source} -> {target} {what} {outcome}")?;
        if !self.ended {
            write!(f, " (broke off: 'proxyctl resume-run')")?;
        }
        if let Some(epoch) = self.epoch {
            write!(f, ", epoch {epoch}")?;
        }
        if let Some(pause_ms) = self.pause_ms {
            write!(f, ", held {pause_ms:.1} ms")?;
        }
        write!(f, ", by {}, configuration {}", self.by, self.config)?;
        if let Some(step) = self.stopped_at {
            write!(f, "; stopped at '{step}'")?;
        }
        self.finding.iter().try_for_each(|finding| write!(f, ": {finding}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use crate::report::tests::{committed, fold};

    #[test]
    fn a_line_says_when_what_by_whom_and_how_it_ended() {
        let run = "8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f".parse().unwrap();
        let text = line(run, fold(committed())).to_string();
        for part in
            ["2023-11-14T22:13:20Z 8a6f0c1e-", "blue -> green cutover committed, epoch 7, held ", "by ops@db1, pid 7"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("broke off") && !text.contains("stopped"), "{text}");
    }

    #[test]
    fn a_run_that_broke_off_says_where_and_what_to_run() {
        let mut events = committed();
        let at = events.iter().position(|event| *event == Event::Started { step: Step::Fenced }).unwrap();
        events.truncate(at + 1);
        let text = line(RunId::random(), fold(events)).to_string();
        assert!(text.contains("broke off: 'proxyctl resume-run'") && text.contains("stopped at 'fenced'"), "{text}");
    }
}
