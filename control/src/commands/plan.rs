//! `proxyctl plan`: the steps, as the engine will take them.
//!
//! Invariant: reads nothing but the plan.

use std::fmt;

use serde::Serialize;

use crate::plan::{OnFailure, POINT_OF_NO_RETURN, Plan, Step};
use crate::printer::{Exit, Printer};

#[derive(Serialize)]
struct Steps {
    steps: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    name: Step,
    purpose: &'static str,
    holds_clients: bool,
    on_failure: OnFailure,
}

/// Prints it.
pub fn run(printer: Printer) -> anyhow::Result<Exit> {
    let line = |step: Step| Line {
        name: step,
        purpose: step.purpose(),
        holds_clients: step.holds_clients(),
        on_failure: step.on_failure(),
    };
    printer.data(&Steps { steps: Plan.steps().map(line).collect() });
    Ok(Exit::Done)
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
        Ok(())
    }
}
