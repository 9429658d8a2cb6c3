//! What a keeper does about what it reads in the store of the server that its PgBouncer points at.
//!
//! Pure: no IO and no clock. Invariant: nothing here answers "let go" for an epoch that is not over.

use pgcutover_api::epoch::Claim;
use pgcutover_api::store::{Decision, OpenEpoch, Outcome, StoreView};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing; a hold goes on.
    Stay,
    /// Hold everybody for this epoch.
    Hold(OpenEpoch),
    /// Point it at the other side: the newest commit says so.
    Follow(Decision),
    /// The epoch of the hold is over, and it stayed on this side.
    LetGo,
}

/// What to do, on `active`, with `other` to go to, perhaps holding for an epoch.
pub(super) fn verdict(active: &str, other: &str, hold: Option<Claim>, view: &StoreView) -> Verdict {
    // Where the newest commit leads, evidence of one decided on the other side included, is where clients belong.
    if let Some(commit) = view.last_commit.as_ref().filter(|commit| commit.target != active && commit.target == other) {
        return Verdict::Follow(commit.clone());
    }
    let open = view.open.as_ref().filter(|open| open.target == other);
    match (open, hold) {
        (Some(open), Some(claim)) if claim.run == open.run && claim.epoch == open.epoch => Verdict::Stay,
        // A new epoch opens only after the last one was decided: the hold goes on for it.
        (Some(open), _) => Verdict::Hold(open.clone()),
        (None, None) => Verdict::Stay,
        // Neither open nor decided: not the server that opened it. Nobody has said abort.
        (None, Some(claim)) => match view.last.as_ref().filter(|last| is_over(claim, last)) {
            Some(last) if last.outcome == Outcome::Abort || last.target == active => Verdict::LetGo,
            // It moved to a server that this PgBouncer knows nothing of: clients do not belong here.
            Some(_) | None => Verdict::Stay,
        },
    }
}

/// A newer epoch opens only after this one was decided; another run's answer is none (R4).
fn is_over(claim: Claim, last: &Decision) -> bool {
    last.epoch > claim.epoch || (last.epoch, last.run) == (claim.epoch, claim.run)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgcutover_api::epoch::{Epoch, RunId};

    fn epoch(number: u64) -> Epoch {
        number.try_into().unwrap()
    }

    fn run() -> RunId {
        "00000000-0000-4000-8000-000000000001".parse().unwrap()
    }

    fn hold(number: u64) -> Option<Claim> {
        Some(Claim { run: run(), epoch: epoch(number) })
    }

    fn open(number: u64, target: &str) -> OpenEpoch {
        OpenEpoch { epoch: epoch(number), run: run(), target: target.to_owned() }
    }

    fn decided(number: u64, outcome: Outcome, target: &str) -> Decision {
        Decision { epoch: epoch(number), run: run(), outcome, target: target.to_owned() }
    }

    fn on_blue(hold: Option<Claim>, view: &StoreView) -> Verdict {
        verdict("blue", "green", hold, view)
    }

    #[test]
    fn an_open_epoch_is_held_once_and_let_go_only_when_it_is_over() {
        let view = StoreView { open: Some(open(2, "green")), ..StoreView::default() };
        assert_eq!(on_blue(None, &view), Verdict::Hold(open(2, "green")));
        assert_eq!(on_blue(hold(2), &view), Verdict::Stay);
        assert_eq!(on_blue(hold(1), &view), Verdict::Hold(open(2, "green")));
        assert_eq!(on_blue(hold(2), &StoreView::default()), Verdict::Stay, "nobody said abort");
        let before = StoreView { last: Some(decided(1, Outcome::Abort, "green")), ..StoreView::default() };
        assert_eq!(on_blue(hold(2), &before), Verdict::Stay);
        let aborted = StoreView { last: Some(decided(2, Outcome::Abort, "green")), ..StoreView::default() };
        assert_eq!(on_blue(hold(2), &aborted), Verdict::LetGo);
        assert_eq!(on_blue(None, &aborted), Verdict::Stay);
        let of_another = StoreView {
            last: Some(Decision { run: RunId::random(), ..decided(2, Outcome::Abort, "green") }),
            ..StoreView::default()
        };
        assert_eq!(on_blue(hold(2), &of_another), Verdict::Stay, "another run's abort");
        assert_eq!(on_blue(hold(1), &of_another), Verdict::LetGo, "a newer epoch came after it");
    }

    #[test]
    fn the_newest_commit_says_where_clients_belong() {
        let commit = decided(3, Outcome::Commit, "green");
        let view = StoreView { last: Some(commit.clone()), last_commit: Some(commit.clone()), ..StoreView::default() };
        for held in [None, hold(3)] {
            assert_eq!(on_blue(held, &view), Verdict::Follow(commit.clone()));
        }
        assert_eq!(verdict("green", "blue", None, &view), Verdict::Stay);
        assert_eq!(verdict("green", "blue", hold(3), &view), Verdict::LetGo);
        // An aborted way back after the commit that was missed.
        let later = StoreView { last: Some(decided(4, Outcome::Abort, "green")), ..view };
        assert_eq!(on_blue(None, &later), Verdict::Follow(commit));
    }

    #[test]
    fn a_run_to_somewhere_else_is_none_of_its_business() {
        let view = StoreView { open: Some(open(2, "red")), ..StoreView::default() };
        assert_eq!(on_blue(None, &view), Verdict::Stay);
        let commit = decided(2, Outcome::Commit, "red");
        let view = StoreView { last: Some(commit.clone()), last_commit: Some(commit), ..StoreView::default() };
        assert_eq!(on_blue(None, &view), Verdict::Stay);
        assert_eq!(on_blue(hold(2), &view), Verdict::Stay, "clients do not belong here any more");
    }
}
