//! What an operator sees around a cutover: attempts that follow one another with their reasons, what differs from what is
//! declared, a heartbeat that stays away, and the history of it all.
//!
//! Invariant: as the least role; each run leaves its journal, and nothing else is asked afterwards.

use std::time::{Duration, Instant};

use e2e::control::Running;
use e2e::pair::{APP, DATABASE, SOURCE, SUBSCRIPTION, TARGET};
use nix::sys::signal::Signal;

use crate::rehearse::nobody_stays;
use crate::theatre::{ABORTED, LIMIT, REFUSED, Theatre};

/// What `plan --drift` ends with where something differs.
const DRIFT: i32 = 7;

async fn until_said(running: &Running, words: &str) {
    let until = Instant::now() + LIMIT;
    while !running.stderr().contains(words) {
        assert!(Instant::now() < until, "never said {words:?}: {}", running.stderr());
        // reason: a look at what a process has said; the loop has a deadline.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_attempt_follows_an_abort_and_history_tells_of_both() {
    let mut theatre = Theatre::open(1).await;
    theatre.stage.control.set("policy", "back_off", "200ms");
    // Gates are put on tables that nobody writes at that moment: so before the transaction.
    let armed = theatre.stage.control.run(&["cutover", "--stop-at", "before:calm"], LIMIT).await.unwrap();
    assert_eq!(armed.code, None, "{}", armed.story());
    let client = theatre.stage.proxies[0].connect(APP).await.unwrap();
    client.run("BEGIN; UPDATE branches SET bbalance = bbalance WHERE bid = 1").await.unwrap();
    let finished = theatre.stage.control.run(&["cutover", "--attempts", "2"], LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(ABORTED), "{}", finished.story());
    assert!(finished.stderr.contains("attempt 1 of 2 failed at 'paused': "), "{}", finished.story());
    assert!(finished.stderr.contains("the next one in 200ms"), "{}", finished.story());
    let running = theatre.stage.control.spawn(&["cutover", "--attempts", "3"]).unwrap();
    until_said(&running, "attempt 1 of 3 failed").await;
    client.run("COMMIT").await.unwrap();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    assert_eq!(finished.json().unwrap()["outcome"], "committed");

    let history = theatre.stage.control.run(&["history"], LIMIT).await.unwrap().json().unwrap();
    let runs = history["runs"].as_array().unwrap();
    let outcomes: Vec<&str> = runs.iter().map(|run| run["outcome"].as_str().unwrap()).collect();
    let (first, rest) = outcomes.split_first().unwrap();
    let (last, aborted) = rest.split_last().unwrap();
    assert_eq!((*first, *last), ("refused", "committed"), "{outcomes:?}");
    assert!(aborted.len() >= 3 && aborted.iter().all(|outcome| *outcome == "aborted"), "{outcomes:?}");
    assert_eq!((&runs[0]["ended"], &runs[0]["stopped_at"]), (&false.into(), &"calm".into()));
    for run in runs {
        assert!(run["by"].as_str().unwrap().contains("pid "), "{run}");
        assert_eq!(run["config"], runs[0]["config"]);
    }
    assert!(runs.last().unwrap()["pause_ms"].as_f64().unwrap() > 0.0);
    let last_two = theatre.stage.control.run(&["history", "--last", "2"], LIMIT).await.unwrap().json().unwrap();
    assert_eq!(last_two["runs"].as_array().unwrap()[..], runs[runs.len() - 2..]);
    theatre.ends_without_error_on(TARGET).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_differs_from_what_is_declared_is_named_and_has_its_exit_code() {
    let theatre = Theatre::open(1).await;
    let drift = async |wanted: &[&str]| {
        let plan = theatre.stage.control.run(&["plan", "--drift"], LIMIT).await.unwrap();
        let found = plan.json().unwrap()["drift"].to_string();
        let code = if wanted.is_empty() { 0 } else { DRIFT };
        assert_eq!(plan.code, Some(code), "{}", plan.story());
        assert!(wanted.iter().all(|word| found.contains(word)), "{wanted:?}: {found}");
    };
    drift(&["gates", "not installed"]).await;
    let armed = theatre.stage.control.run(&["cutover", "--stop-at", "before:calm"], LIMIT).await.unwrap();
    assert_eq!(armed.code, None, "{}", armed.story());
    drift(&[]).await;
    let source = theatre.stage.pair.source.superuser(DATABASE).await.unwrap();
    source.run("CREATE TABLE made_later (id int PRIMARY KEY)").await.unwrap();
    drift(&["made_later"]).await;
    source.run("DROP TABLE made_later").await.unwrap();
    let target = theatre.stage.pair.target.superuser(DATABASE).await.unwrap();
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} DISABLE")).await.unwrap();
    drift(&[SUBSCRIPTION, "ENABLE"]).await;
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} ENABLE")).await.unwrap();
    drift(&[]).await;
    let finished = theatre.stage.control.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    drift(&["routes to green", "fenced by epoch"]).await;
    theatre.ends_without_error_on(TARGET).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_stays_away_is_named_before_anybody_is_held_and_nothing_stays_open() {
    let theatre = Theatre::open(1).await;
    let target = theatre.stage.pair.target.superuser(DATABASE).await.unwrap();
    let preflight = theatre.stage.control.run(&["preflight"], LIMIT).await.unwrap();
    assert_eq!(preflight.code, Some(0), "{}", preflight.story());
    nobody_stays(&theatre.stage).await;
    let running = theatre.stage.control.spawn(&["cutover", "--hold-at", "before:calm"]).unwrap();
    until_said(&running, "held before:calm").await;
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} DISABLE")).await.unwrap();
    target.until("SELECT NOT EXISTS (SELECT FROM pg_stat_subscription WHERE pid IS NOT NULL)", LIMIT).await.unwrap();
    let opened = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{APP}'");
    assert!(target.number(&opened).await.unwrap() > 0, "nothing was opened for the switch");
    running.signal(Signal::SIGUSR1).unwrap();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(REFUSED), "{}", finished.story());
    nobody_stays(&theatre.stage).await;
    let found = finished.json().unwrap()["findings"].to_string();
    assert!(found.contains("no heartbeat has arrived on the target for "), "{found}");
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} ENABLE")).await.unwrap();
    theatre.ends_without_error_on(SOURCE).await;
}
