//! Writes to the terminal: results to stdout, talk to stderr.
//!
//! Invariant: no other module of this crate prints.

use std::fmt::Display;

/// One line of talk for people: progress, what is being fetched, what went wrong.
#[expect(clippy::print_stderr, reason = "the one place that talks")]
pub fn say(line: impl Display) {
    eprintln!("{line}");
}

/// One line of result, for people or for programs.
#[expect(clippy::print_stdout, reason = "the one place that prints results")]
pub fn result(line: impl Display) {
    println!("{line}");
}
