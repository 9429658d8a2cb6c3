//! Why a verb of an operator did nothing.
//!
//! Invariant: each says what is so, and what to do about it where something can be done.

/// The kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// No such backend.
    Unknown,
    /// Not in this state, or not of this run or epoch.
    WrongState,
    /// Transactions were open at the deadline; traffic goes on.
    NotDrained,
    /// Not known yet, or the store does not answer.
    Undecided,
    /// Tried, and failed.
    Failed,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub why: Why,
    /// For people.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Refusal {
    /// Without a hint.
    pub fn new(why: Why, message: impl Into<String>) -> Self {
        Self { why, message: message.into(), hint: None }
    }

    /// With advice.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}
