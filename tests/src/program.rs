//! What the programs of the harness have in common: a runtime, the form of their results, and an exit code that says what
//! came of it.
//!
//! Invariant: success only where the work says that all was well.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::binaries::{EXIT_NO_SERVERS, Missing};
use crate::printer::say;

/// The form of what a program prints on stdout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// The same as JSON, one object on a line.
    Json,
}

/// Does the work of a program; the load and whatever looks after it share two threads.
pub fn run(name: &str, work: impl Future<Output = Result<ExitCode>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let ended = runtime.context("starting the runtime").and_then(|runtime| runtime.block_on(work));
    ended.unwrap_or_else(|error| {
        say(format_args!("{name}: {error:#}"));
        if error.is::<Missing>() { ExitCode::from(EXIT_NO_SERVERS) } else { ExitCode::FAILURE }
    })
}

/// Success, or not.
pub fn exit(is_good: bool) -> ExitCode {
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
