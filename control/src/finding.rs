//! What is wrong, with which object, and what a person can do about it: the one form in which preflight, steps and
//! report speak of trouble.
//!
//! Invariant: a red finding always names a fix.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Checked and found right.
    Green,
    /// Worth knowing; a cutover may go on.
    Yellow,
    /// A cutover must not start.
    Red,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// Which check or step says so: `replica_identity`, `paused`.
    pub check: String,
    /// The object: a table, a role, a proxy, a setting.
    pub object: String,
    /// What is so.
    pub problem: String,
    /// What to do about it; empty only for a green one.
    pub fix: String,
}

impl Finding {
    /// A cutover must not start, or could not go on.
    pub fn red(check: &str, object: impl Into<String>, problem: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding {
            level: Level::Red,
            check: check.to_owned(),
            object: object.into(),
            problem: problem.into(),
            fix: fix.into(),
        }
    }

    /// Worth knowing.
    pub fn yellow(
        check: &str,
        object: impl Into<String>,
        problem: impl Into<String>,
        fix: impl Into<String>,
    ) -> Finding {
        Finding { level: Level::Yellow, ..Finding::red(check, object, problem, fix) }
    }

    /// Checked and found right.
    pub fn green(check: &str, object: impl Into<String>, problem: impl Into<String>) -> Finding {
        Finding { level: Level::Green, ..Finding::red(check, object, problem, "") }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Green => "green ",
            Level::Yellow => "yellow",
            Level::Red => "RED   ",
        };
        write!(f, "{level} {}: {}: {}", self.check, self.object, self.problem)?;
        if !self.fix.is_empty() {
            write!(f, "\n       fix: {}", self.fix)?;
        }
        Ok(())
    }
}
