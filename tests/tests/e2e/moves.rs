//! The bounded form of `cargo run -p e2e --bin moves`: one small move of each way.
//!
//! Invariant: of the other ways only the account is judged, not how well they do.

use std::time::Duration;

use e2e::binaries::{Binaries, Network};
use e2e::bouncer::Bouncer;
use e2e::moves::{Move, Moved, Way};
use e2e::printer::not_checked;

async fn moved(way: Way) -> Moved {
    let around = Duration::from_secs(1);
    let small = Move { way, majors: (13, 17), fronts: 2, clients: 20, writes_per_s: 100, around, rehearse: false };
    let moved = small.run(&Binaries::of(&[13, 17]).unwrap()).await.unwrap();
    assert_eq!(moved.outcome, "committed", "{:?}", moved.story);
    assert!(moved.adds_up(), "{} errors {:?}; {}", moved.account.errors, moved.sqlstates, moved.account.audit);
    assert_eq!(moved.stalls_us.len(), 20, "every client has its stall");
    assert!(moved.on_target > 20, "clients work on the target");
    moved
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_pgcutover_nobody_sees_an_error() {
    let moved = moved(Way::Pgcutover).await;
    assert!(moved.is_good(), "{:?}; {}", moved.account.error_texts, moved.account.audit);
    assert_eq!(moved.in_doubt, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_a_script_around_pgbouncers_the_account_is_complete() {
    if let Err(why) = Bouncer::installed(Network::from_env()) {
        not_checked("the move by a script around PgBouncers", format_args!("{why:#}"));
        return;
    }
    moved(Way::Pgbouncer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_ending_sessions_the_account_is_complete() {
    let moved = moved(Way::Terminate).await;
    // It would measure something else if sessions had not been ended.
    assert!(moved.account.errors >= 20, "{:?}", moved.sqlstates);
}
