//! The rules of the protocol as switches, so that a test can drop one and watch what breaks.
//!
//! Invariant: a rule changes what a transition does, never which states can be written down.

use std::fmt;
use std::str::FromStr;

/// One rule, or the part of one that can be dropped by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The fence opens by an abort only. Dropped: it also opens by time while no commit is visible.
    R1,
    /// Abort is a decision. Dropped: a controller resumes and unfences without asking, and a resumed run goes on.
    R2,
    /// Flip and unfence are conditional on the open epoch and its decision. Dropped: they act whenever they arrive.
    R3,
    /// The target's form of the gate never replaces the gate of a newer epoch. Dropped: it acts whenever it arrives.
    R3Guard,
    /// An epoch opens only when the last one is decided. Dropped: it opens over an undecided one.
    R4,
    /// An epoch opens only on the side that the newest commit names. Dropped: also on the side that a commit left.
    R4Side,
    /// A run begins only where the proxies are, which only preflight can see on a server that never had a cutover. Dropped:
    /// also on a server that never served clients.
    R4Active,
    /// The barrier waits for writers that passed the gate before the flip. Dropped: it does not.
    R5,
    /// Proof before switch and resume. Dropped: SWITCH and RESUME act on any pause.
    R7,
    /// PAUSE is refused for a decided or closed epoch and on another active backend. Dropped: it is obeyed.
    R7Pause,
    /// A lease that ends asks for an abort. Dropped: the proxy resumes at once.
    R8,
    /// A hold made at start-up has a lease. Dropped: it has none.
    R8StartUp,
    /// Proxies look for themselves. Dropped: a proxy serves at its route until it is told otherwise.
    R9,
    /// The target is shut until evidence of the commit. Dropped: its gate is opened when a run prepares it.
    R10,
    /// Whoever learns commit writes the evidence before it switches. Dropped: only the controller does.
    R10Witness,
}

impl Rule {
    /// Every rule, in the order of the document.
    pub const ALL: [Self; 15] = [
        Self::R1,
        Self::R2,
        Self::R3,
        Self::R3Guard,
        Self::R4,
        Self::R4Side,
        Self::R4Active,
        Self::R5,
        Self::R7,
        Self::R7Pause,
        Self::R8,
        Self::R8StartUp,
        Self::R9,
        Self::R10,
        Self::R10Witness,
    ];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::R1 => "R1",
            Self::R2 => "R2",
            Self::R3 => "R3",
            Self::R3Guard => "R3-guard",
            Self::R4 => "R4",
            Self::R4Side => "R4-side",
            Self::R4Active => "R4-active",
            Self::R5 => "R5",
            Self::R7 => "R7",
            Self::R7Pause => "R7-pause",
            Self::R8 => "R8",
            Self::R8StartUp => "R8-start-up",
            Self::R9 => "R9",
            Self::R10 => "R10",
            Self::R10Witness => "R10-witness",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no rule.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "no rule is called {0}; there are R1 R2 R3 R3-guard R4 R4-side R4-active R5 R7 R7-pause R8 R8-start-up R9 R10 R10-witness"
)]
pub struct UnknownRule(String);

impl FromStr for Rule {
    type Err = UnknownRule;

    fn from_str(name: &str) -> Result<Self, UnknownRule> {
        let known = Self::ALL.into_iter().find(|rule| rule.name().eq_ignore_ascii_case(name));
        known.ok_or_else(|| UnknownRule(name.to_owned()))
    }
}

/// The rules that are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules(u16);

impl Rules {
    /// All of them.
    pub const fn all() -> Self {
        Self(u16::MAX)
    }

    /// All of them but these.
    pub fn without(dropped: &[Rule]) -> Self {
        Self(dropped.iter().fold(u16::MAX, |on, &rule| on & !(1 << rule as u16)))
    }

    /// Whether this one is on.
    pub const fn has(self, rule: Rule) -> bool {
        self.0 & (1 << rule as u16) != 0
    }
}
