//! What a proxy does about what it reads in the store: R7, R8 and R9 as one function.
//!
//! Pure: no IO and no clock. Invariant: nothing here ever answers "resume on the source" without a read abort, and
//! nothing follows an epoch that is not newer than the route's.

use pgcutover_api::command::EpochPause;
use pgcutover_api::epoch::Epoch;
use pgcutover_api::store::{Decision, OpenEpoch, Outcome, StoreView};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Rest,
    /// Shut the gate: an epoch is open that nobody told us of.
    Hold(OpenEpoch),
    /// Go where a newer epoch was committed to.
    Follow(Decision),
    /// The paused epoch is aborted: resume on the source.
    Resume,
}

/// What to do about `view`, as read on the active backend, with a route of `route_epoch` and perhaps a claimed pause.
pub(super) fn verdict(route_epoch: Epoch, pause: Option<&EpochPause>, view: &StoreView) -> Verdict {
    if let Some(commit) = view.last_commit.as_ref().filter(|commit| commit.epoch > route_epoch) {
        return Verdict::Follow(commit.clone());
    }
    if let Some(pause) = pause {
        let aborted = |decision: &Decision| {
            decision.outcome == Outcome::Abort && decision.epoch == pause.claim.epoch && decision.run == pause.claim.run
        };
        return if view.last.as_ref().is_some_and(aborted) { Verdict::Resume } else { Verdict::Rest };
    }
    match &view.open {
        Some(open) if open.epoch > route_epoch => Verdict::Hold(open.clone()),
        Some(_) | None => Verdict::Rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgcutover_api::epoch::{Claim, RunId};

    fn epoch(number: u64) -> Epoch {
        number.try_into().unwrap()
    }

    fn run(digit: char) -> RunId {
        "00000000-0000-4000-8000-00000000000x".replace('x', &digit.to_string()).parse().unwrap()
    }

    fn decision(number: u64, outcome: Outcome) -> Decision {
        Decision { epoch: epoch(number), run: run('1'), outcome, target: "green".to_owned() }
    }

    fn pause(number: u64, digit: char) -> EpochPause {
        let claim = Claim { run: run(digit), epoch: epoch(number) };
        EpochPause { claim, source: "blue".to_owned(), target: "green".to_owned() }
    }

    #[test]
    fn an_open_epoch_that_nobody_told_us_of_is_held() {
        let open = OpenEpoch { epoch: epoch(3), run: run('1'), target: "green".to_owned() };
        let view = StoreView { open: Some(open.clone()), ..StoreView::default() };
        assert_eq!(verdict(epoch(2), None, &view), Verdict::Hold(open));
        assert_eq!(verdict(epoch(3), None, &view), Verdict::Rest, "replicated from the other side");
        assert_eq!(verdict(epoch(2), Some(&pause(3, '1')), &view), Verdict::Rest, "held already");
    }

    #[test]
    fn only_newer_commits_are_followed_also_over_a_later_abort() {
        let commit = decision(3, Outcome::Commit);
        let view = StoreView { open: None, last: Some(decision(4, Outcome::Abort)), last_commit: Some(commit.clone()) };
        assert_eq!(verdict(epoch(2), None, &view), Verdict::Follow(commit.clone()));
        assert_eq!(verdict(epoch(2), Some(&pause(4, '1')), &view), Verdict::Follow(commit));
        assert_eq!(verdict(epoch(3), None, &view), Verdict::Rest);
    }

    #[test]
    fn only_the_abort_of_the_very_epoch_and_run_resumes() {
        let view = StoreView { open: None, last: Some(decision(4, Outcome::Abort)), last_commit: None };
        assert_eq!(verdict(epoch(2), Some(&pause(4, '1')), &view), Verdict::Resume);
        assert_eq!(verdict(epoch(2), Some(&pause(5, '1')), &view), Verdict::Rest);
        assert_eq!(verdict(epoch(2), Some(&pause(4, '2')), &view), Verdict::Rest);
    }
}
