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
    /// SWITCH is refused once a newer epoch was opened on its target. Dropped: it goes there all the same.
    R7Newest,
    /// PAUSE is refused for a decided or closed epoch and on another active backend. Dropped: it is obeyed.
    R7Pause,
    /// A lease that ends asks for an abort. Dropped: the proxy resumes at once.
    R8,
    /// A hold made at start-up has a lease. Dropped: it has none.
    R8StartUp,
    /// Where the source is silent, evidence on the target counts. Dropped: only the source is asked.
    R8Evidence,
    /// A newer commit than the held epoch's counts wherever it is known. Dropped: only the held epoch's.
    R8Newer,
    /// Proxies look for themselves. Dropped: a proxy serves at its route until it is told otherwise.
    R9,
    /// A proxy that starts serves nobody before its first look. Dropped: it serves at its route at once.
    R9Start,
    /// A proxy that ends its hold by itself looks once more before it serves. Dropped: it serves at once, and looks later.
    R9Again,
    /// A proxy looks at each new server connection. Dropped: after a broken network it serves on, and looks later.
    R9Connect,
    /// Where its active backend is silent, evidence of a newer commit on another backend counts. Dropped: it waits.
    R9Evidence,
    /// S7 asks for every living member, listed or not. Dropped: only for the listed ones.
    R9Members,
    /// The target is shut until evidence of the commit. Dropped: its gate is opened when a run prepares it.
    R10,
    /// Whoever learns commit writes the evidence before it switches. Dropped: only the controller does.
    R10Witness,
    /// Other fences come after the decision. Dropped: the fence shuts out the proxies' control logins too.
    R12,
    /// The sentinel arrives on the target before the decision. Dropped: nobody waits for it.
    S4,
    /// The way back is kept from before the decision. Dropped: its slot is made when it is attached.
    S6,
    /// The subscription from the old source is dropped before one away from the new source is made. Dropped: whenever.
    S10,
}

impl Rule {
    /// Every rule, in the order of the document.
    pub const ALL: [Self; 27] = [
        Self::R1,
        Self::R2,
        Self::R3,
        Self::R3Guard,
        Self::R4,
        Self::R4Side,
        Self::R4Active,
        Self::R5,
        Self::R7,
        Self::R7Newest,
        Self::R7Pause,
        Self::R8,
        Self::R8StartUp,
        Self::R8Evidence,
        Self::R8Newer,
        Self::R9,
        Self::R9Start,
        Self::R9Again,
        Self::R9Connect,
        Self::R9Evidence,
        Self::R9Members,
        Self::R10,
        Self::R10Witness,
        Self::R12,
        Self::S4,
        Self::S6,
        Self::S10,
    ];

    /// Those that the model asks for and the product does not follow yet. Without them a proxy may answer reads from the loser
    /// until its next look; nothing worse: a test shows it.
    pub const AHEAD: [Self; 3] = [Self::R7Newest, Self::R9Again, Self::R9Connect];

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
            Self::R7Newest => "R7-newest",
            Self::R7Pause => "R7-pause",
            Self::R8 => "R8",
            Self::R8StartUp => "R8-start-up",
            Self::R8Evidence => "R8-evidence",
            Self::R8Newer => "R8-newer",
            Self::R9 => "R9",
            Self::R9Start => "R9-start",
            Self::R9Again => "R9-again",
            Self::R9Connect => "R9-connect",
            Self::R9Evidence => "R9-evidence",
            Self::R9Members => "R9-members",
            Self::R10 => "R10",
            Self::R10Witness => "R10-witness",
            Self::R12 => "R12",
            Self::S4 => "S4",
            Self::S6 => "S6",
            Self::S10 => "S10",
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
#[error("no rule is called {0}; there are {names}", names = Rule::ALL.map(Rule::name).join(" "))]
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
pub struct Rules(u32);

impl Rules {
    /// All of them.
    pub const fn all() -> Self {
        Self(u32::MAX)
    }

    /// All of them but these.
    pub fn without(dropped: &[Rule]) -> Self {
        Self(dropped.iter().fold(u32::MAX, |on, &rule| on & !(1 << rule as u16)))
    }

    /// Whether this one is on.
    pub const fn has(self, rule: Rule) -> bool {
        self.0 & (1 << rule as u16) != 0
    }
}
