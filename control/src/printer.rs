//! The only place that prints: stdout is data, stderr is talk, the exit code is a type.
//!
//! Invariant: with `--output json` stdout carries JSON and nothing else; a closed pipe ends nothing (a cutover goes on).

use std::fmt::Display;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// The form of stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// The same facts as one JSON object on one line.
    Json,
}

/// What the process tells the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// Something unexpected.
    Unexpected,
    /// Wrong usage or configuration.
    Usage,
    /// Preflight is red or it is not calm; nothing happened.
    Refused,
    /// Aborted; traffic is on the source.
    Aborted,
    /// Decided but not finished everywhere.
    Unfinished,
    /// Undecided: the source could not be reached.
    Undecided,
    /// What is differs from what is declared.
    Drift,
    /// It ended well, but both servers were compared and differ.
    Differs,
}

impl Exit {
    /// Every one of them, for `--help`.
    pub const ALL: [Exit; 9] = [
        Exit::Done,
        Exit::Unexpected,
        Exit::Usage,
        Exit::Refused,
        Exit::Aborted,
        Exit::Unfinished,
        Exit::Undecided,
        Exit::Drift,
        Exit::Differs,
    ];

    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Unexpected => 1,
            Exit::Usage => 2,
            Exit::Refused => 3,
            Exit::Aborted => 4,
            Exit::Unfinished => 5,
            Exit::Undecided => 6,
            Exit::Drift => 7,
            Exit::Differs => 8,
        }
    }

    /// What it means.
    pub fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done",
            Exit::Unexpected => "an unexpected error",
            Exit::Usage => "wrong usage or configuration",
            Exit::Refused => "preflight is red or it is not calm; nothing happened",
            Exit::Aborted => "aborted; traffic is on the source",
            Exit::Unfinished => "decided, but not finished everywhere; what is missing follows by itself",
            Exit::Undecided => "undecided: the source cannot be reached; proxies hold by their own rules",
            Exit::Drift => "what is differs from what is declared ('plan --drift')",
            Exit::Differs => "as 0, but both servers were compared and are not equal: the report names what differs",
        }
    }

    /// The lines of `--help`.
    pub fn help() -> String {
        let lines = Exit::ALL.iter().map(|exit| format!("  {}  {}", exit.code(), exit.meaning()));
        format!("Exit codes:\n{}", lines.collect::<Vec<_>>().join("\n"))
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// Says things.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    output: Output,
}

impl Printer {
    /// In that form.
    pub fn new(output: Output) -> Printer {
        Printer { output }
    }

    /// Whether stdout is JSON.
    pub fn output(&self) -> Output {
        self.output
    }

    /// The result of a command, on stdout.
    pub fn data(&self, result: &(impl Display + Serialize)) {
        let text = match self.output {
            Output::Text => result.to_string(),
            Output::Json => serde_json::to_string(result).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}")),
        };
        self.raw(&format!("{}\n", text.trim_end_matches('\n')));
    }

    /// Bytes for another program (completions, SQL), on stdout, in either form.
    pub fn raw(&self, text: &str) {
        // A reader that left must not end a cutover.
        let _ = stdout().lock().write_all(text.as_bytes());
    }

    /// A line for people, on stderr.
    pub fn talk(&self, line: impl Display) {
        let _ = writeln!(stderr().lock(), "{line}");
    }

    /// What to do after this, for people: none where a program reads.
    pub fn next(&self, line: impl Display) {
        match self.output {
            Output::Text => self.talk(format_args!("next: {line}")),
            Output::Json => {}
        }
    }

    /// The course of a run: a live display on a terminal, silence in a pipe.
    pub fn progress(&self) -> Progress {
        if stderr().is_terminal() { Progress { bar: Some(spinner()) } } else { Progress { bar: None } }
    }
}

fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    // Ten times a second looks alive and costs nothing.
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// The course of a run.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A line on stderr, display or not.
    pub fn say(&self, line: &str) {
        let _ = writeln!(stderr().lock(), "{line}");
    }

    /// Something is about to happen.
    pub fn now(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(line.to_owned());
        }
    }

    /// Something has happened; stays on the screen.
    pub fn done(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.println(line);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_documentation() {
        assert_eq!(Exit::ALL.map(Exit::code), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(Exit::help().contains("  4  aborted; traffic is on the source"));
    }
}
