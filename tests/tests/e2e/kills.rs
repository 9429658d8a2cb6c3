//! The bounded form of the kill matrix (`cargo run -p e2e --bin kills`): one cell for each victim but proxyctl, whose cells
//! are all played elsewhere (`faults`, `resume_run`), two for a source that is gone, one for a
//! standby that was promoted.
//!
//! Invariant: what a cell promises is checked where it is played.

use e2e::binaries::Binaries;
use e2e::kills::{AWAY, Cell, Kind, Members, Outcome, Setting, Victim};
use e2e::pair::{SOURCE, TARGET};

async fn played(moment: &'static str, step: &str, victim: Victim) -> Outcome {
    played_by(Kind::Logical, moment, step, victim).await
}

async fn played_by(kind: Kind, moment: &'static str, step: &str, victim: Victim) -> Outcome {
    let cell = Cell { step: step.to_owned(), moment, victim };
    let setting = Setting { kind, members: Members::Proxies, majors: (13, 17) };
    let played = cell.play(&Binaries::of(&[13, 17]).unwrap(), &setting).await;
    played.unwrap_or_else(|error| panic!("{cell}: {error:#}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_killed_after_the_fence_comes_back_as_the_one_side() {
    assert_eq!(played("after", "fenced", Victim::Source).await.side, SOURCE);
}

/// Nobody can decide: clients wait for as long as they may, are told to try again, and are served once it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_gone_before_the_decision_holds_clients_and_sheds_them_with_what_can_be_retried() {
    let outcome = played("after", "checked", Victim::SourceGone).await;
    assert_eq!(outcome.sqlstates, ["57P03"]);
}

/// The evidence is on the target: nobody needs the source.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_gone_after_the_decision_is_not_waited_for() {
    let outcome = played("after", "decided", Victim::SourceGone).await;
    assert_eq!((outcome.side.as_str(), outcome.client_errors), (TARGET, 0));
    assert!(u128::from(outcome.service_ms) < AWAY.as_millis());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_killed_after_the_decision_comes_back_as_the_one_side() {
    assert_eq!(played("after", "decided", Victim::Target).await.side, TARGET);
}

/// It comes back as a primary of its own, which nobody follows and nobody can write to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_killed_after_its_promotion_costs_the_move_and_is_no_second_side() {
    assert_eq!(played_by(Kind::Physical, "after", "way_back", Victim::Target).await.side, SOURCE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_killed_before_the_switch_starts_again_on_the_target() {
    assert_eq!(played("before", "switched", Victim::Proxy).await.side, TARGET);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_cut_off_before_the_decision_ends_where_the_others_do() {
    // Its lease ends, or proxyctl commits first: one side either way.
    let outcome = played("after", "checked", Victim::Network).await;
    assert!([SOURCE, TARGET].contains(&outcome.side.as_str()), "{}", outcome.side);
}
