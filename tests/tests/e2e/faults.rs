//! Whatever dies or blocks in a cutover: everybody ends on one side, clients see no error but the fault's own, nothing is
//! lost, and the report says what to fix.
//!
//! Invariant: a fault is placed by state, not by time: a transaction that a test keeps open holds the drain, and so the
//! cutover, exactly there until the test lets go.

use std::time::{Duration, Instant};

use e2e::cluster::Stop;
use e2e::control::Finished;
use e2e::faults::{Cut, Direction, Fault, FaultProxy};
use e2e::pair::{DATABASE, SOURCE, SUBSCRIPTION, TARGET};
use nix::sys::signal::Signal;
use proxyctl::plan::{POINT_OF_NO_RETURN, Plan, Step};
use serde_json::Value as Json;

use crate::theatre::{ABORTED, LIMIT, REFUSED, Theatre, UNDECIDED};

/// The run ended like this, and a red finding says `object` and a fix with `word`.
fn says(finished: &Finished, code: i32, object: &str, word: &str) {
    assert_eq!(finished.code, Some(code), "{}", finished.story());
    let json = finished.json().unwrap();
    let outcome = match code {
        REFUSED => "refused",
        ABORTED => "aborted",
        UNDECIDED => "undecided",
        other => panic!("no outcome for {other}"),
    };
    assert_eq!(json["outcome"], outcome);
    let red: Vec<&Json> = json["findings"].as_array().unwrap().iter().filter(|found| found["level"] == "red").collect();
    let named = red.iter().any(|found| {
        let has = |key: &str, what: &str| found[key].as_str().unwrap().contains(what);
        (has("object", object) || has("problem", object)) && has("fix", word)
    });
    assert!(named, "no finding names {object} with a fix like {word}: {red:#?}");
    assert!(red.iter().all(|found| !found["fix"].as_str().unwrap().is_empty()));
    let page = std::fs::read_to_string(json["report_html"].as_str().unwrap()).unwrap();
    assert!(page.contains("What to fix"));
}

/// Up to the decision a dead proxyctl leaves everybody on the source, one run after the other, without a person.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxyctl_killed_before_the_decision_leaves_everybody_on_the_source() {
    let mut theatre = Theatre::open(2).await;
    let crashes =
        Plan.steps().filter(|step| *step <= POINT_OF_NO_RETURN).flat_map(|step| ["before", "after"].map(|m| (m, step)));
    for (moment, step) in crashes.filter(|crash| *crash != ("after", POINT_OF_NO_RETURN)) {
        let at = format!("{moment}:{step}");
        let finished = theatre.stage.control.run(&["cutover", "--stop-at", &at], LIMIT).await.unwrap();
        assert_eq!(finished.code, None, "{at}: {}", finished.story());
        assert_eq!(theatre.settled().await, SOURCE, "{at}");
        theatre.load.acknowledges(20, LIMIT).await.unwrap();
        assert_eq!(theatre.load.counters().errors.load(std::sync::atomic::Ordering::Relaxed), 0, "{at}");
    }
    theatre.ends_without_error_on(SOURCE).await;
}

/// From the decision on it leaves everybody on the target.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxyctl_killed_after_the_decision_leaves_everybody_on_the_target() {
    for at in [
        "after:decided",
        "before:switched",
        "after:switched",
        "before:resumed",
        "after:resumed",
        "before:attached",
        "after:attached",
    ] {
        let theatre = Theatre::open(2).await;
        let finished = theatre.stage.control.run(&["cutover", "--stop-at", at], LIMIT).await.unwrap();
        assert_eq!(finished.code, None, "{at}: {}", finished.story());
        theatre.ends_without_error_on(TARGET).await;
    }
}

#[test]
fn the_crashes_after_the_decision_are_all_of_the_plan() {
    assert_eq!(
        Plan.steps().filter(|step| *step > POINT_OF_NO_RETURN).collect::<Vec<_>>(),
        [Step::Switched, Step::Resumed, Step::Attached]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_stops_in_the_pause_is_named_and_clients_stay_on_the_source() {
    let mut theatre = Theatre::open(2).await;
    let (client, running) = theatre.held().await;
    theatre.stage.pair.target.stop(Stop::Immediate);
    client.run("COMMIT").await.unwrap();
    says(&running.wait(LIMIT).await.unwrap(), ABORTED, "target", "runs and answers");
    // The audit compares with a target that has caught up.
    theatre.stage.pair.target.restart().await.unwrap();
    theatre.ends_without_error_on(SOURCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_down_is_a_refusal_with_a_report() {
    let mut theatre = Theatre::open(1).await;
    theatre.stage.pair.target.stop(Stop::Fast);
    says(&theatre.stage.control.run(&["cutover"], LIMIT).await.unwrap(), REFUSED, "target", "runs and answers");
    theatre.stage.pair.target.restart().await.unwrap();
    theatre.ends_without_error_on(SOURCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_disabled_in_the_pause_is_named_with_the_statement_that_enables_it() {
    let mut theatre = Theatre::open(1).await;
    theatre.patient();
    let target = theatre.stage.pair.target.superuser(DATABASE).await.unwrap();
    let (client, running) = theatre.held().await;
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} DISABLE")).await.unwrap();
    // The worker sees the change at its next look.
    target.until("SELECT NOT EXISTS (SELECT FROM pg_stat_subscription WHERE pid IS NOT NULL)", LIMIT).await.unwrap();
    client.run("COMMIT").await.unwrap();
    says(&running.wait(LIMIT).await.unwrap(), ABORTED, SUBSCRIPTION, "ENABLE");
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} ENABLE")).await.unwrap();
    theatre.ends_without_error_on(SOURCE).await;
}

/// Where no event trigger refuses DDL, what it changes in the pause would stay on the source alone (R13).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_changed_in_the_pause_ends_the_cutover_or_is_refused_there() {
    let mut theatre = Theatre::open(1).await;
    theatre.patient();
    let source = theatre.stage.pair.source.superuser(DATABASE).await.unwrap();
    let (client, running) = theatre.held().await;
    source.run("CREATE INDEX added_in_the_pause ON ledger (n)").await.unwrap();
    client.run("COMMIT").await.unwrap();
    says(&running.wait(LIMIT).await.unwrap(), ABORTED, "schema", "target");
    source.run("DROP INDEX added_in_the_pause").await.unwrap();
    // With the event trigger that `objects` prints, run by a superuser, it is refused instead.
    let printed = theatre.stage.control.run(&["objects"], LIMIT).await.unwrap().json().unwrap();
    source.run(printed["superuser_sql"].as_str().unwrap()).await.unwrap();
    let fenced = theatre.stage.control.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(fenced.code, Some(0), "{}", fenced.story());
    let refused = source.run("ALTER TABLE ledger ADD COLUMN added_too_late int").await.unwrap_err();
    assert!(format!("{refused:#}").contains("fenced"), "{refused:#}");
    theatre.ends_without_error_on(TARGET).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_held_past_the_deadline_ends_the_cutover_and_not_itself() {
    let theatre = Theatre::open(2).await;
    let (client, running) = theatre.held().await;
    let finished = running.wait(LIMIT).await.unwrap();
    says(&finished, ABORTED, "UPDATE branches", "budgets.drain");
    // The drain's deadline and what ending the pause takes, no lease.
    let pause_ms = finished.json().unwrap()["pause_ms"].as_f64().unwrap();
    assert!(pause_ms < 3000.0, "{pause_ms} ms");
    client.run("COMMIT").await.unwrap();
    theatre.ends_without_error_on(SOURCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_is_named_before_and_in_the_pause() {
    let theatre = Theatre::with(1, &[("max_prepared_transactions", "5")]).await;
    let source = theatre.stage.pair.source.superuser(DATABASE).await.unwrap();
    let prepare = "BEGIN; UPDATE branches SET bbalance = bbalance WHERE bid = 2; PREPARE TRANSACTION 'orphan'";
    source.run(prepare).await.unwrap();
    says(&theatre.stage.control.run(&["cutover"], LIMIT).await.unwrap(), REFUSED, "orphan", "ROLLBACK PREPARED");
    source.run("ROLLBACK PREPARED 'orphan'").await.unwrap();
    let (client, running) = theatre.held().await;
    source.run(prepare).await.unwrap();
    client.run("COMMIT").await.unwrap();
    says(&running.wait(LIMIT).await.unwrap(), ABORTED, "orphan", "ROLLBACK PREPARED");
    source.run("ROLLBACK PREPARED 'orphan'").await.unwrap();
    theatre.ends_without_error_on(SOURCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_that_may_not_be_read_is_named_before_and_in_the_pause() {
    let theatre = Theatre::open(1).await;
    let source = theatre.stage.pair.source.superuser(DATABASE).await.unwrap();
    let target = theatre.stage.pair.target.superuser(DATABASE).await.unwrap();
    // On the target it is not missing.
    target.run("CREATE SEQUENCE secret; GRANT ALL ON SEQUENCE secret TO pgcutover").await.unwrap();
    source.run("CREATE SEQUENCE secret").await.unwrap();
    says(&theatre.stage.control.run(&["cutover"], LIMIT).await.unwrap(), REFUSED, "secret", "GRANT");
    source.run("DROP SEQUENCE secret").await.unwrap();
    let (client, running) = theatre.held().await;
    source.run("CREATE SEQUENCE secret").await.unwrap();
    client.run("COMMIT").await.unwrap();
    says(&running.wait(LIMIT).await.unwrap(), ABORTED, "secret", "GRANT");
    theatre.ends_without_error_on(SOURCE).await;
}

/// Its own clients lose their connections, which is the fault's own doing; the others notice nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_killed_in_the_pause_is_named_and_the_others_serve_on() {
    let mut theatre = Theatre::open(2).await;
    let (client, running) = theatre.held().await;
    theatre.stage.proxies[1].kill9();
    client.run("COMMIT").await.unwrap();
    let name = theatre.stage.proxies[1].name().to_owned();
    says(&running.wait(LIMIT).await.unwrap(), ABORTED, &name, "start the proxy");
    let outcome = theatre.ends_on(SOURCE).await;
    // Clients go to the proxies in turn: odd numbers to the first, and its pair of probes, 1000 and 1001.
    let of_first = |client: i32| client >= 1000 || client % 2 == 1;
    let others: Vec<_> = outcome.errors().into_iter().filter(|error| of_first(error.client)).collect();
    assert!(others.is_empty(), "{others:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupt_in_the_pause_gives_clients_back_at_once() {
    let theatre = Theatre::open(2).await;
    let (client, running) = theatre.held().await;
    let asked = Instant::now();
    running.signal(Signal::SIGINT).unwrap();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(ABORTED), "{}", finished.story());
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    client.run("COMMIT").await.unwrap();
    theatre.ends_without_error_on(SOURCE).await;
}

/// Nothing can be decided while the source is away: clients of it see that. When it is back, the proxies end it by themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_stops_in_the_pause_leaves_it_undecided_until_it_is_back() {
    let mut theatre = Theatre::open(2).await;
    let (client, running) = theatre.held().await;
    theatre.stage.pair.source.stop(Stop::Immediate);
    assert!(client.run("COMMIT").await.is_err());
    let finished = running.wait(LIMIT).await.unwrap();
    says(&finished, UNDECIDED, SOURCE, "proxyctl abort");
    theatre.stage.pair.source.restart().await.unwrap();
    theatre.ends_on(SOURCE).await;
}

/// An operator's `abort` after a crash is an end too, without waiting for a lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abort_ends_what_a_dead_proxyctl_left_and_report_tells_its_story() {
    let mut theatre = Theatre::open(2).await;
    theatre.stage.control.budget(&[("lease", "10s")]);
    let finished = theatre.stage.control.run(&["cutover", "--stop-at", "after:fenced"], LIMIT).await.unwrap();
    assert_eq!(finished.code, None);
    let asked = Instant::now();
    let aborted = theatre.stage.control.run(&["abort"], LIMIT).await.unwrap();
    assert_eq!(aborted.code, Some(0), "{}", aborted.story());
    assert_eq!(aborted.json().unwrap()["outcome"], "abort");
    assert_eq!(theatre.settled().await, SOURCE);
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}: a lease was waited for", asked.elapsed());
    let run = aborted.json().unwrap()["claim"]["run"].as_str().unwrap().to_owned();
    let report = theatre.stage.control.run(&["report", &run], LIMIT).await.unwrap().json().unwrap();
    assert_eq!((&report["ended"], &report["outcome"]), (&Json::Bool(false), &Json::from("undecided")));
    assert_eq!(report["steps"].as_array().unwrap().last().unwrap()["outcome"], "broken_off");
    theatre.ends_without_error_on(SOURCE).await;
}

/// The decision is on the source, its answer is lost: proxyctl asks again and acts by what it hears.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_whose_answer_is_lost_is_asked_for_again() {
    let mut theatre = Theatre::open(2).await;
    let port = theatre.stage.pair.source.port();
    let network = FaultProxy::start(port).await.unwrap();
    let side = theatre.stage.control.config["source"].as_table_mut().unwrap();
    let dsn = side["dsn"].as_str().unwrap().replace(&format!("port={port}"), &format!("port={}", network.port()));
    side.insert("dsn".to_owned(), dsn.into());
    let (client, running) = theatre.held().await;
    // Whoever decides waits for this transaction; whoever reads does not.
    let guard = theatre.stage.pair.source.superuser(DATABASE).await.unwrap();
    guard.run("BEGIN; LOCK TABLE pgcutover.decision IN EXCLUSIVE MODE").await.unwrap();
    client.run("COMMIT").await.unwrap();
    let source = theatre.stage.pair.source.superuser(DATABASE).await.unwrap();
    let deciding = "SELECT EXISTS (SELECT FROM pg_locks
        WHERE NOT granted AND relation = 'pgcutover.decision'::regclass)";
    source.until(deciding, LIMIT).await.unwrap();
    network.set(Direction::Down, Fault::Hold);
    guard.run("COMMIT").await.unwrap();
    source.until("SELECT EXISTS (SELECT FROM pgcutover.decision WHERE outcome = 'commit')", LIMIT).await.unwrap();
    network.cut(Cut::Reset);
    network.set(Direction::Down, Fault::Pass);
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    let report = finished.json().unwrap();
    assert_eq!(report["outcome"], "committed");
    assert_eq!(source.number("SELECT count(*) FROM pgcutover.decision WHERE outcome = 'commit'").await.unwrap(), 1);
    theatre.ends_without_error_on(TARGET).await;
}
