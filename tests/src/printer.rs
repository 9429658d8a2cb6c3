//! Writes to the terminal: results to stdout, talk to stderr.
//!
//! Invariant: no other module of this crate prints.

use std::fmt::Display;
use std::io::{Write, stderr};

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

/// A check that this machine can't make, past the test runner, which would hide the words of a test that passes.
/// `.ci/run` looks for them: what was not checked is not green there.
pub fn not_checked(what: &str, why: impl Display) {
    // Nobody is left to be told that stderr is closed.
    let _ = writeln!(stderr(), "!! NOT CHECKED: {what}. {why}");
}
