//! `proxyctl completions SHELL`.
//!
//! Invariant: made from the command line's one definition.

use clap::Args;
use clap_complete::Shell;

use crate::printer::{Exit, Printer};

/// Which shell.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell that will read them.
    shell: Shell,
}

impl Completions {
    /// Prints them.
    pub fn run(&self, definition: &mut clap::Command, printer: Printer) -> anyhow::Result<Exit> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, definition, "proxyctl", &mut script);
        printer.raw(&String::from_utf8(script)?);
        Ok(Exit::Done)
    }
}
