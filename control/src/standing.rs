//! What the stores of both servers say of a run: whoever takes one up acts by this, not by what a journal remembers.
//!
//! Invariant: pure. A commit that either server knows is a commit; an abort is one only where the source says so.

use std::fmt;

use pgcutover_api::epoch::{Epoch, RunId};
use pgcutover_api::store::{Decision as Decided, StoreView};

use crate::event::Decision;
use crate::state::State;

/// How a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// No epoch of it is known: nobody is held for it.
    Unopened,
    /// Its epoch is open.
    Open(Epoch),
    /// Its epoch is decided.
    Decided(Epoch, Decision),
    /// Newer epochs came after its own, which is therefore decided; how, `decide` tells.
    Older(Epoch),
    /// The source does not answer, and the target has no evidence.
    Unknown,
}

/// What both servers said; nothing of one that could not be asked.
#[derive(Debug, Clone, Copy)]
pub struct Views<'a> {
    /// The source.
    pub source: Option<&'a StoreView>,
    /// The target.
    pub target: Option<&'a StoreView>,
}

impl Standing {
    /// Of a run, whose journal knows this epoch, if any.
    pub fn of(run: RunId, journaled: Option<Epoch>, views: Views<'_>) -> Standing {
        let ours = |decided: &&Decided| decided.run == run;
        // Decided on the source, or carried to the target as evidence.
        for view in [views.source, views.target].into_iter().flatten() {
            if let Some(commit) = view.last_commit.as_ref().filter(ours) {
                return Standing::Decided(commit.epoch, Decision::Commit);
            }
        }
        let Some(source) = views.source else { return Standing::Unknown };
        if let Some(open) = source.open.as_ref().filter(|open| open.run == run) {
            return Standing::Open(open.epoch);
        }
        if let Some(last) = source.last.as_ref().filter(ours) {
            return Standing::Decided(last.epoch, last.outcome.into());
        }
        journaled.map_or(Standing::Unopened, Standing::Older)
    }

    /// The epoch, where it is known.
    pub fn epoch(self) -> Option<Epoch> {
        match self {
            Standing::Open(epoch) | Standing::Decided(epoch, _) | Standing::Older(epoch) => Some(epoch),
            Standing::Unopened | Standing::Unknown => None,
        }
    }

    /// Whether a journal tells something else than the store: then it is another run's, or was altered.
    pub fn contradicts(self, state: &State) -> Option<String> {
        if let (Some(here), Some(there)) = (state.epoch, self.epoch())
            && here != there
        {
            return Some(format!("its journal tells of epoch {here}, the store of epoch {there}"));
        }
        match (state.decision, self) {
            (Some(journaled), Standing::Decided(epoch, decided)) if journaled != decided => {
                Some(format!("its journal tells {journaled:?} of epoch {epoch}, the store {decided:?}"))
            }
            (Some(journaled), Standing::Open(epoch)) => {
                Some(format!("its journal tells {journaled:?} of epoch {epoch}, which is open in the store"))
            }
            (Some(_) | None, _) => None,
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Standing::Unopened => f.write_str("the store knows no epoch of it"),
            Standing::Open(epoch) => write!(f, "its epoch {epoch} is open: nobody has decided"),
            Standing::Decided(epoch, Decision::Commit) => write!(f, "its epoch {epoch} is committed"),
            Standing::Decided(epoch, Decision::Abort) => write!(f, "its epoch {epoch} is aborted"),
            Standing::Older(epoch) => write!(f, "its epoch {epoch} is over, a newer one came after it"),
            Standing::Unknown => f.write_str("the source does not answer, and the target has no evidence of a commit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use pgcutover_api::store::{OpenEpoch, Outcome};

    use super::*;

    fn epoch(number: u64) -> Epoch {
        Epoch::try_from(number).unwrap()
    }

    fn decided(run: RunId, number: u64, outcome: Outcome) -> Decided {
        Decided { epoch: epoch(number), run, outcome, target: "green".into() }
    }

    fn open(run: RunId, number: u64, last: Option<Decided>) -> StoreView {
        let open = OpenEpoch { epoch: epoch(number), run, target: "green".into() };
        let last_commit = last.clone().filter(|last| last.outcome == Outcome::Commit);
        StoreView { open: Some(open), last, last_commit }
    }

    fn over(last: Decided) -> StoreView {
        let last_commit = Some(last.clone()).filter(|last| last.outcome == Outcome::Commit);
        StoreView { open: None, last: Some(last), last_commit }
    }

    #[test]
    fn what_the_source_says_is_how_a_run_stands() {
        let (run, other) = (RunId::random(), RunId::random());
        let of = |view: &StoreView, journaled| {
            Standing::of(run, journaled, Views { source: Some(view), target: Some(&StoreView::default()) })
        };
        assert_eq!(of(&StoreView::default(), None), Standing::Unopened);
        assert_eq!(of(&open(run, 7, None), None), Standing::Open(epoch(7)));
        assert_eq!(of(&over(decided(run, 7, Outcome::Abort)), None), Standing::Decided(epoch(7), Decision::Abort));
        assert_eq!(of(&over(decided(run, 7, Outcome::Commit)), None), Standing::Decided(epoch(7), Decision::Commit));
        // Somebody else's epoch says nothing of ours, but that ours is over if there was one.
        assert_eq!(of(&open(other, 8, None), None), Standing::Unopened);
        assert_eq!(of(&open(other, 8, None), Some(epoch(7))), Standing::Older(epoch(7)));
    }

    #[test]
    fn evidence_on_the_target_is_a_commit_while_the_source_is_away_and_nothing_else_is() {
        let run = RunId::random();
        let with = |target: &StoreView| Standing::of(run, None, Views { source: None, target: Some(target) });
        assert_eq!(with(&over(decided(run, 7, Outcome::Commit))), Standing::Decided(epoch(7), Decision::Commit));
        assert_eq!(with(&over(decided(run, 7, Outcome::Abort))), Standing::Unknown);
        assert_eq!(with(&StoreView::default()), Standing::Unknown);
        assert_eq!(Standing::of(run, Some(epoch(7)), Views { source: None, target: None }), Standing::Unknown);
    }

    #[test]
    fn a_commit_that_only_the_target_knows_wins_over_an_open_epoch() {
        // A source that was restored from a copy has lost the decision; clients may be on the target already (R14).
        let run = RunId::random();
        let (source, target) = (open(run, 7, None), over(decided(run, 7, Outcome::Commit)));
        let standing = Standing::of(run, None, Views { source: Some(&source), target: Some(&target) });
        assert_eq!(standing, Standing::Decided(epoch(7), Decision::Commit));
    }

    #[test]
    fn a_journal_that_tells_another_story_is_noticed() {
        let aborted = State { epoch: Some(epoch(7)), decision: Some(Decision::Abort), ..State::default() };
        assert!(Standing::Decided(epoch(7), Decision::Commit).contradicts(&aborted).is_some());
        assert!(Standing::Open(epoch(7)).contradicts(&aborted).is_some());
        assert!(Standing::Decided(epoch(8), Decision::Abort).contradicts(&aborted).is_some());
        assert_eq!(Standing::Decided(epoch(7), Decision::Abort).contradicts(&aborted), None);
        assert_eq!(Standing::Unknown.contradicts(&aborted), None);
        let undecided = State { epoch: Some(epoch(7)), ..State::default() };
        assert_eq!(Standing::Decided(epoch(7), Decision::Commit).contradicts(&undecided), None);
    }
}
