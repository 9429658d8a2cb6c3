//! What happens in a run, as its journal says it.
//!
//! Invariant: plain data; a name that was ever written is still read. Which event may follow which is the state's affair.

use std::fmt;

use pgcutover_api::epoch::{Epoch, RunId};
use pgcutover_api::store::Outcome;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::finding::Finding;
use crate::plan::{Goal, Step};

/// What one step learned, for the report: names and plain values.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Facts(pub Map<String, Value>);

impl Facts {
    /// No facts yet.
    pub fn new() -> Facts {
        Facts::default()
    }

    /// With one more.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Facts {
        self.0.insert(name.to_owned(), value.into());
        self
    }
}

/// The outcome of an epoch, as the decision store knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Traffic belongs to the target.
    Commit,
    /// Traffic stays on the source.
    Abort,
}

impl From<Outcome> for Decision {
    fn from(outcome: Outcome) -> Decision {
        match outcome {
            Outcome::Commit => Decision::Commit,
            Outcome::Abort => Decision::Abort,
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// Every proxy serves the target.
    Committed,
    /// Traffic is on the source; clients were held for a while.
    Aborted,
    /// It did not start: no client was held.
    Refused,
    /// Decided, but not every proxy or server has confirmed it; they follow by themselves.
    Unfinished,
    /// The source could not be asked; proxies hold by their own rules.
    Undecided,
    /// A rehearsal saw all that it can see; traffic is on the source as before.
    Rehearsed,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Ending::Committed => "committed",
            Ending::Aborted => "aborted",
            Ending::Refused => "refused",
            Ending::Unfinished => "unfinished",
            Ending::Undecided => "undecided",
            Ending::Rehearsed => "rehearsed",
        })
    }
}

/// Who moves where; the first line of every journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Began {
    /// The run.
    pub run: RunId,
    /// What it is for; journals of before there were rehearsals do not say.
    #[serde(default)]
    pub goal: Goal,
    /// The route name.
    pub database: String,
    /// Backend name of the source.
    pub source: String,
    /// Backend name of the target.
    pub target: String,
    /// Names of the proxies.
    pub proxies: Vec<String>,
    /// Limits in force, milliseconds by name.
    pub budgets_ms: Vec<(String, u64)>,
    /// proxyctl's own version.
    pub proxyctl_version: String,
    /// Who started it: user, host and process.
    #[serde(default)]
    pub by: String,
    /// A digest of the configuration file's text, to tell whether two runs were asked the same.
    #[serde(default)]
    pub config: String,
}

/// One line of a journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A run begins.
    Began(Began),
    /// A step is about to act.
    Started {
        /// Which.
        step: Step,
    },
    /// The store opened the epoch for this run.
    Opened {
        /// Its number.
        epoch: Epoch,
    },
    /// A step did what it should.
    Finished {
        /// Which.
        step: Step,
        /// What it learned.
        facts: Facts,
    },
    /// A step did not.
    Failed {
        /// Which.
        step: Step,
        /// Why.
        error: String,
    },
    /// The store's answer is known.
    Decided {
        /// What it said.
        outcome: Decision,
    },
    /// A rehearsal has seen everything and goes back.
    Turned,
    /// Somebody takes up a run that broke off, or that ended with something left to do. The store counts, not the journal's
    /// end, which a crash may have lost: whatever a step before the decision could have done is held to be there.
    Continued {
        /// The epoch that the store opened for the run; none if it opened none.
        epoch: Option<Epoch>,
    },
    /// What a step did was taken back.
    Undone {
        /// Which.
        step: Step,
    },
    /// It could not be taken back; harmless to either side, but a person should know.
    UndoFailed {
        /// Which.
        step: Step,
        /// Why.
        error: String,
    },
    /// Something for a person to fix or to know.
    Found {
        /// What.
        finding: Finding,
    },
    /// Something seen on the way: versions, positions, moments.
    Observed {
        /// What was looked at.
        what: String,
        /// What was seen.
        facts: Facts,
    },
    /// The run is over.
    Ended {
        /// How.
        ending: Ending,
    },
}
