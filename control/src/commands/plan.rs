//! `proxyctl plan`: the steps, as the engine will take them.
//!
//! Invariant: reads nothing but the plan; with `--drift` it looks at what is declared, and changes nothing.

use std::fmt;

use clap::Args;
use serde::Serialize;

use crate::commands::Context;
use crate::finding::Finding;
use crate::plan::{self, OnFailure, POINT_OF_NO_RETURN, Step};
use crate::printer::{Exit, Printer};
use crate::steps::drift;

/// What besides the steps.
#[derive(Debug, Args)]
pub struct Plan {
    /// Compare what the configuration declares with what is: routes, servers, gates, subscriptions. Exit code 7 if they differ.
    #[arg(long)]
    drift: bool,
}

#[derive(Serialize)]
struct Steps {
    steps: Vec<Line>,
    /// What differs; none if nobody looked.
    drift: Option<Vec<Finding>>,
}

#[derive(Serialize)]
struct Line {
    name: Step,
    purpose: &'static str,
    holds_clients: bool,
    on_failure: OnFailure,
}

impl Plan {
    /// Whether no configuration is needed.
    pub fn only_prints(&self) -> bool {
        !self.drift
    }

    /// Prints the steps.
    pub fn print(&self, printer: Printer) -> anyhow::Result<Exit> {
        printer.data(&Steps { steps: lines(), drift: None });
        Ok(Exit::Done)
    }

    /// Looks, and prints both.
    pub async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let found = drift::look(&context.config).await?;
        let exit = if found.is_empty() { Exit::Done } else { Exit::Drift };
        context.printer.data(&Steps { steps: lines(), drift: Some(found) });
        Ok(exit)
    }
}

fn lines() -> Vec<Line> {
    let line = |step: Step| Line {
        name: step,
        purpose: step.purpose(),
        holds_clients: step.holds_clients(),
        on_failure: step.on_failure(),
    };
    plan::Plan.steps().map(line).collect()
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.steps {
            let failure = match line.on_failure {
                OnFailure::Stop => "stop: nothing happened",
                OnFailure::Abort => "decide(abort), resume on the source",
                OnFailure::AskAgain => "ask until the outcome is known",
                OnFailure::GoForward => "goes forward by itself",
            };
            let held = if line.holds_clients { "clients held" } else { "" };
            writeln!(f, "{:<13} {:<13} {}", line.name, held, line.purpose)?;
            writeln!(f, "{:<27} on failure: {failure}", "")?;
            if line.name == POINT_OF_NO_RETURN {
                writeln!(f, "------------- point of no return")?;
            }
        }
        let Some(drift) = &self.drift else { return Ok(()) };
        drift.iter().try_for_each(|finding| writeln!(f, "{finding}"))?;
        if drift.is_empty() { writeln!(f, "everything is as declared") } else { writeln!(f, "{} differ", drift.len()) }
    }
}
