//! The bounded form of the kill matrix (`cargo run -p e2e --bin kills`): one cell for each victim but proxyctl, whose cells
//! are all played elsewhere (`faults`, `resume_run`).
//!
//! Invariant: what a cell promises is checked where it is played.

use e2e::binaries::Binaries;
use e2e::kills::{Cell, Outcome, Victim};
use e2e::pair::{SOURCE, TARGET};

async fn played(moment: &'static str, step: &str, victim: Victim) -> Outcome {
    let cell = Cell { step: step.to_owned(), moment, victim };
    let played = cell.play(&Binaries::of(&[13, 17]).unwrap(), (13, 17)).await;
    played.unwrap_or_else(|error| panic!("{cell}: {error:#}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_killed_after_the_fence_comes_back_as_the_one_side() {
    assert_eq!(played("after", "fenced", Victim::Source).await.side, SOURCE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_killed_after_the_decision_comes_back_as_the_one_side() {
    assert_eq!(played("after", "decided", Victim::Target).await.side, TARGET);
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
