//! The way back: reverse replication is attached after a cutover, `proxyctl rollback` goes back with the cutover's own
//! guarantees, and what stands in its way, or was left undone, is said with the command that mends it.
//!
//! Invariant: whatever is refused or dies here, the ledger adds up on the side that serves.

use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::cluster::Cluster;
use e2e::control::Finished;
use e2e::faults::FaultProxy;
use e2e::pair::{APP, DATABASE, PGCUTOVER, PairOptions, SOURCE, SUBSCRIPTION, TARGET, password};
use e2e::shuttle::Shuttle;
use e2e::stage::Stage;
use e2e::workload::WorkloadOptions;
use pgcutover_api::store::{self, Name};
use serde_json::Value as Json;

use crate::stand::eventually;

/// A cutover, or whatever a loaded machine needs for one.
const LIMIT: Duration = Duration::from_secs(60);
/// Exit codes of proxyctl, as its help tells them.
const DONE: i32 = 0;
const REFUSED: i32 = 3;
const ABORTED: i32 = 4;
const UNFINISHED: i32 = 5;

const INSERT: &str = "INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 1)";
/// Everything of a way back on one server.
const TRACES: &str = "SELECT coalesce(string_agg(trace, ', ' ORDER BY trace), '') FROM (
      SELECT 'slot ' || slot_name FROM pg_replication_slots
      UNION ALL SELECT 'publication ' || pubname FROM pg_publication WHERE pubname LIKE 'pgcutover%'
      UNION ALL SELECT 'subscription ' || subname FROM pg_subscription) traces (trace)";

async fn open(majors: (u32, u32), proxies: u16) -> Stage {
    let binaries = Binaries::of(&[majors.0, majors.1]).unwrap();
    let mut stage = Stage::start(&binaries, &PairOptions::new(majors.0, majors.1), proxies).await.unwrap();
    stage.control.with_way_back();
    // Tests share a machine: what they measure is not the stall.
    let budgets = [("stall", "5s"), ("transaction_age_max", "60s"), ("drain", "4s"), ("lease", "5s")];
    stage.control.budget(&budgets);
    stage
}

async fn ends(stage: &Stage, args: &[&str], code: i32) -> Json {
    let ended = stage.control.run(args, LIMIT).await.unwrap();
    assert_eq!(ended.code, Some(code), "{args:?}: {}", ended.story());
    ended.json().unwrap()
}

/// A run that ends so; where clients are afterwards.
async fn committed(stage: &Stage, verb: &str, side: &str) {
    let report = ends(stage, &[verb], DONE).await;
    assert_eq!((&report["outcome"], &report["target"]), (&Json::from("committed"), &Json::from(side)), "{report:#}");
    let attached = report["steps"].as_array().unwrap().iter().find(|step| step["name"] == "attached").unwrap();
    assert_eq!(attached["facts"]["attached"], true, "{report:#}");
}

/// A red finding names `object` and a fix with `word`.
fn says(report: &Json, object: &str, word: &str) {
    let has = |found: &Json, key: &str, what: &str| found[key].as_str().unwrap().contains(what);
    let found = report["findings"].as_array().unwrap();
    let named = found.iter().any(|found| {
        found["level"] == "red"
            && (has(found, "object", object) || has(found, "problem", object))
            && has(found, "fix", word)
    });
    assert!(named, "no finding names {object} with a fix like {word}: {found:#?}");
}

async fn backend(stage: &mut Stage) -> String {
    let gates = stage.proxies[0].ask("SHOW GATES").await.unwrap();
    let gate = gates.iter().find(|gate| gate.get("database") == Some(DATABASE)).unwrap();
    assert_eq!(gate.get("state"), Some("open"));
    gate.get("backend").unwrap().to_owned()
}

async fn traces(cluster: &Cluster) -> String {
    cluster.superuser(DATABASE).await.unwrap().text(TRACES).await.unwrap().unwrap()
}

/// Not through a proxy.
async fn directly(cluster: &Cluster) -> Client {
    cluster.connect(APP, &password(APP), DATABASE).await.unwrap()
}

async fn way_back(stage: &Stage) -> Json {
    stage.control.run(&["way-back"], LIMIT).await.unwrap().json().unwrap()
}

async fn shuttles(majors: (u32, u32), proxies: u16, cutovers: u32) {
    let stage = open(majors, proxies).await;
    let mut load = WorkloadOptions::new(stage.ports(), 8);
    load.writes_per_s = 150;
    let verdict = Shuttle { cutovers, load, between: 60 }.run(&stage).await.unwrap();
    assert!(verdict.is_good(), "{verdict:#?}");
    assert!(verdict.account.writes_acknowledged > 60 * cutovers as usize);
    assert_eq!(verdict.crossings.iter().filter(|crossing| crossing.to == SOURCE).count(), cutovers as usize / 2);
}

/// The campaign's bounded form: `cargo campaign -- --cutovers 200` is the whole of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_and_back_twice_under_load_keeps_every_acknowledged_write() {
    shuttles((13, 17), 3, 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_and_back_between_16_and_18_keeps_every_acknowledged_write() {
    shuttles((16, 18), 1, 2).await;
}

/// What a cutover leaves on either server, that only the side that serves takes writes, and that `drop` takes all of it away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_with_nothing_written_goes_back_and_each_move_leaves_one_way_only() {
    let mut stage = open((13, 17), 1).await;
    let (source, target) =
        (stage.pair.source.superuser(DATABASE).await.unwrap(), stage.pair.target.superuser(DATABASE).await.unwrap());
    // With the event trigger DDL is fenced too, but not the subscription of the way back.
    ends(&stage, &["objects"], DONE).await;
    source.run(&store::event_trigger(&Name::new(DATABASE).unwrap())).await.unwrap();
    committed(&stage, "cutover", TARGET).await;
    assert_eq!(backend(&mut stage).await, TARGET);
    let late = source.run("CREATE TABLE late (a int)").await.unwrap_err();
    assert!(format!("{late:#}").contains("fenced"), "{late:#}");
    let offered = "publication pgcutover_back_app, slot pgcutover_back_app_1";
    assert_eq!(traces(&stage.pair.target).await, offered, "what led there is dropped");
    assert_eq!(traces(&stage.pair.source).await, "subscription pgcutover_back_app_1", "and so is its slot");
    let fenced = directly(&stage.pair.source).await.simple_query(INSERT).await.unwrap_err();
    assert_eq!(fenced.code().unwrap().code(), "25006");

    committed(&stage, "rollback", SOURCE).await;
    assert_eq!(backend(&mut stage).await, SOURCE);
    let fenced = directly(&stage.pair.target).await.simple_query(INSERT).await.unwrap_err();
    assert_eq!(fenced.code().unwrap().code(), "25006");
    assert_eq!(traces(&stage.pair.source).await, "publication pgcutover_back_app, slot pgcutover_back_app_2");
    assert_eq!(traces(&stage.pair.target).await, "publication pgcutover_back_app, subscription pgcutover_back_app_2");
    let client = stage.proxies[0].connect(APP).await.unwrap();
    client.run("TRUNCATE history").await.unwrap();
    client.run(INSERT).await.unwrap();
    target.until("SELECT count(*) = 1 FROM ledger", LIMIT).await.unwrap();

    let standing = way_back(&stage).await;
    assert_eq!((&standing["serving"], &standing["attached"]), (&Json::from(SOURCE), &Json::from(true)), "{standing}");
    ends(&stage, &["way-back", "drop"], DONE).await;
    assert_eq!(traces(&stage.pair.source).await + &traces(&stage.pair.target).await, "");
    let refused = ends(&stage, &["rollback"], REFUSED).await;
    says(&refused, "served by blue", "proxyctl status");
    client.run(&INSERT.replace("1, 1, 1", "1, 2, 1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_is_refused_while_the_way_back_is_broken_or_lags_or_was_never_made() {
    let mut stage = open((13, 17), 1).await;
    stage.control.set("budgets", "lag_bytes_max", 20_000);
    says(&ends(&stage, &["rollback"], REFUSED).await, "served by blue", "proxyctl status");
    committed(&stage, "cutover", TARGET).await;
    let client = stage.proxies[0].connect(APP).await.unwrap();
    let old = stage.pair.source.superuser(DATABASE).await.unwrap();
    const NAME: &str = "pgcutover_back_app_1";

    old.run(&format!("ALTER SUBSCRIPTION {NAME} DISABLE")).await.unwrap();
    let target = stage.pair.target.superuser(DATABASE).await.unwrap();
    target.until("SELECT NOT bool_or(active) FROM pg_replication_slots", LIMIT).await.unwrap();
    client.run(INSERT).await.unwrap();
    let refused = ends(&stage, &["rollback"], REFUSED).await;
    says(&refused, NAME, &format!("ALTER SUBSCRIPTION {NAME} ENABLE"));
    assert!(
        refused["findings"].as_array().unwrap().iter().all(|found| found["check"] != "lag" || found["level"] != "red")
    );

    // Whoever locks a table of the old server holds the whole stream up.
    old.run("BEGIN; LOCK TABLE ledger").await.unwrap();
    let enabling = stage.pair.source.superuser(DATABASE).await.unwrap();
    enabling.run(&format!("ALTER SUBSCRIPTION {NAME} ENABLE")).await.unwrap();
    target.until("SELECT bool_and(active) FROM pg_replication_slots", LIMIT).await.unwrap();
    client
        .run("INSERT INTO ledger (client, n, aid, delta) SELECT 2, n, 1, 0 FROM generate_series(1, 1000) n")
        .await
        .unwrap();
    let refused = ends(&stage, &["rollback", "--preflight"], REFUSED).await;
    says(&refused, "bytes behind", "caught up");
    says(&ends(&stage, &["rollback"], REFUSED).await, NAME, "caught up");
    assert_eq!(backend(&mut stage).await, TARGET);
    client.run(&INSERT.replace("1, 1, 1", "1, 2, 1")).await.unwrap();

    old.run("COMMIT").await.unwrap();
    old.until("SELECT count(*) = 1002 FROM ledger", LIMIT).await.unwrap();
    committed(&stage, "rollback", SOURCE).await;
    assert_eq!(client.number("SELECT count(*) FROM ledger").await.unwrap(), 1002);

    // Without one: what was never made can't be attached.
    stage.control.set("way_back", "enabled", false);
    let report = ends(&stage, &["cutover"], DONE).await;
    assert_eq!(report["outcome"], "committed");
    says(&ends(&stage, &["rollback"], REFUSED).await, "nothing leads back", "proxyctl way-back attach");
    says(&ends(&stage, &["way-back", "attach"], UNFINISHED).await, "made no slot", "new copy");
}

/// Whichever command comes next finishes what a run that died after its decision left to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_killed_between_decision_and_attachment_is_finished_by_the_next_command() {
    for (at, command, code) in [
        ("after:decided", ["rollback"].as_slice(), DONE),
        ("before:attached", &["cutover"], REFUSED),
        ("before:attached", &["way-back", "attach"], DONE),
    ] {
        let mut stage = open((13, 17), 2).await;
        let killed = stage.control.run(&["cutover", "--stop-at", at], LIMIT).await.unwrap();
        assert_eq!(killed.code, None, "{at}: {}", killed.story());
        let proxies = &stage.proxies;
        eventually("both proxies follow the decision", async || {
            let mut there = 0;
            for proxy in proxies {
                let gates = proxy.ask("SHOW GATES").await.unwrap();
                there += gates.iter().filter(|gate| gate.get("backend") == Some(TARGET)).count();
            }
            there == 2
        })
        .await;
        let client = stage.proxies[1].connect(APP).await.unwrap();
        client.run(INSERT).await.unwrap();
        let report = ends(&stage, command, code).await;
        if command[0] == "rollback" {
            assert_eq!(report["outcome"], "committed");
            assert_eq!(backend(&mut stage).await, SOURCE);
        } else {
            assert_eq!(way_back(&stage).await["attached"], true, "{at}, {command:?}: {report:#}");
            if command[0] == "cutover" {
                says(&report, "is served by green already", "proxyctl rollback");
            }
            assert!(!traces(&stage.pair.target).await.contains(SUBSCRIPTION));
            assert_eq!(backend(&mut stage).await, TARGET);
        }
        let old = stage.pair.source.superuser(DATABASE).await.unwrap();
        old.until("SELECT count(*) = 1 FROM ledger", LIMIT).await.unwrap();
        client.run(&INSERT.replace("1, 1, 1", "1, 2, 1")).await.unwrap();
    }
}

/// The lease is long: whoever waits for it waits for half a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abort_ends_what_a_dead_rollback_left_open() {
    let mut stage = open((13, 17), 1).await;
    committed(&stage, "cutover", TARGET).await;
    stage.control.budget(&[("lease", "10s")]);
    ends_killed(&stage.control.run(&["rollback", "--stop-at", "after:fenced"], LIMIT).await.unwrap());
    let asked = std::time::Instant::now();
    let aborted = ends(&stage, &["abort"], DONE).await;
    assert_eq!((&aborted["outcome"], &aborted["fence"]), (&Json::from("abort"), &Json::from("open")), "{aborted}");
    let client = stage.proxies[0].connect(APP).await.unwrap();
    client.run(INSERT).await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(8), "{:?}: a lease was waited for", asked.elapsed());
    assert_eq!(backend(&mut stage).await, TARGET);
    committed(&stage, "rollback", SOURCE).await;
    assert_eq!(client.number("SELECT count(*) FROM ledger").await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resume_run_takes_up_rollbacks_too() {
    let mut stage = open((13, 17), 1).await;
    committed(&stage, "cutover", TARGET).await;
    stage.control.budget(&[("lease", "10s")]);
    ends_killed(&stage.control.run(&["rollback", "--stop-at", "after:way_back"], LIMIT).await.unwrap());
    assert_eq!(ends(&stage, &["resume-run"], ABORTED).await["outcome"], "aborted");
    assert_eq!(backend(&mut stage).await, TARGET);
    assert!(!traces(&stage.pair.source).await.contains("slot"), "a slot keeps WAL on what does not serve");
    let client = stage.proxies[0].connect(APP).await.unwrap();
    client.run(INSERT).await.unwrap();
    ends_killed(&stage.control.run(&["rollback", "--stop-at", "after:decided"], LIMIT).await.unwrap());
    let report = ends(&stage, &["resume-run"], DONE).await;
    assert_eq!(report["outcome"], "committed", "{report:#}");
    assert_eq!((backend(&mut stage).await.as_str(), &way_back(&stage).await["attached"]), (SOURCE, &Json::from(true)));
    assert_eq!(client.number("SELECT count(*) FROM ledger").await.unwrap(), 1);
}

/// Whoever would follow without being what the last commit fenced would lose what it lacks, silently.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_made_anew_never_follows() {
    let stage = open((13, 17), 1).await;
    ends_killed(&stage.control.run(&["cutover", "--stop-at", "before:attached"], LIMIT).await.unwrap());
    let old = stage.pair.source.superuser(DATABASE).await.unwrap();
    old.run("SELECT pgcutover.put_gate('app', 'open', 0)").await.unwrap();
    says(
        &ends(&stage, &["way-back", "attach"], UNFINISHED).await,
        "not the server that the last commit fenced",
        "copy",
    );
    says(&ends(&stage, &["rollback"], REFUSED).await, "nothing leads back", "new copy");
    assert!(!traces(&stage.pair.source).await.contains("subscription"));
}

/// The cutover stands; the way back waits for whoever mends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_that_cannot_be_attached_is_told_with_the_command_that_attaches_it() {
    let mut stage = open((13, 17), 1).await;
    let network = FaultProxy::start(stage.pair.target.port()).await.unwrap();
    let dsn = format!(
        "host=127.0.0.1 port={} user={PGCUTOVER} password={} dbname={DATABASE}",
        network.port(),
        password(PGCUTOVER)
    );
    let side = stage.control.config["target"].as_table_mut().unwrap();
    side.insert("replication_dsn".to_owned(), dsn.into());
    // A transaction holds the drain, and so the run, where preflight is behind it.
    ends_killed(&stage.control.run(&["cutover", "--stop-at", "before:calm"], LIMIT).await.unwrap());
    let client = stage.proxies[0].connect(APP).await.unwrap();
    client.run("BEGIN; UPDATE branches SET bbalance = 1 WHERE bid = 1").await.unwrap();
    let running = stage.control.spawn(&["cutover"]).unwrap();
    let proxy = &stage.proxies[0];
    eventually("the run pauses", async || {
        proxy.ask("SHOW GATES").await.unwrap().iter().any(|gate| gate.get("state") == Some("pausing"))
    })
    .await;
    network.shut();
    client.run("COMMIT").await.unwrap();
    let ended = running.wait(LIMIT).await.unwrap();
    let report = ended.json().unwrap();
    assert_eq!((ended.code, &report["outcome"]), (Some(DONE), &Json::from("committed")), "{}", ended.story());
    says(&report, "the way back is not attached", "proxyctl way-back attach");
    let page = std::fs::read_to_string(report["report_html"].as_str().unwrap()).unwrap();
    assert!(page.contains("way back is not attached"));
    client.run(INSERT).await.unwrap();
    says(&ends(&stage, &["way-back", "attach"], UNFINISHED).await, "the way back is not attached", "way-back attach");
    says(&ends(&stage, &["rollback"], REFUSED).await, "the way back is not attached", "way-back attach");
    assert_eq!(backend(&mut stage).await, TARGET);

    network.reopen();
    assert_eq!(ends(&stage, &["way-back", "attach"], DONE).await["attached"], true);
    let old = stage.pair.source.superuser(DATABASE).await.unwrap();
    old.until("SELECT count(*) = 1 FROM ledger", LIMIT).await.unwrap();
    committed(&stage, "rollback", SOURCE).await;
}

fn ends_killed(ended: &Finished) {
    assert_eq!(ended.code, None, "{}", ended.story());
}

/// Nobody only believes to have a way back: where one of the rights is missing preflight is red, until it is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preflight_names_the_right_that_a_way_back_lacks() {
    let mut stage = open((13, 17), 1).await;
    ends(&stage, &["preflight"], DONE).await;
    let (source, target) =
        (stage.pair.source.superuser(DATABASE).await.unwrap(), stage.pair.target.superuser(DATABASE).await.unwrap());
    source.run("DROP SCHEMA pgcutover_subscriber CASCADE").await.unwrap();
    says(&ends(&stage, &["preflight"], REFUSED).await, "source role pgcutover", "pgcutover_subscriber");
    source.run(store::SUBSCRIBER).await.unwrap();
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} OWNER TO postgres")).await.unwrap();
    says(&ends(&stage, &["preflight"], REFUSED).await, "target role pgcutover", "OWNER TO pgcutover");
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} OWNER TO {PGCUTOVER}")).await.unwrap();
    target.run("ALTER TABLE ledger DROP CONSTRAINT ledger_pkey").await.unwrap();
    says(&ends(&stage, &["preflight"], REFUSED).await, "table public.ledger", "REPLICA IDENTITY FULL");
    source.run("DROP SCHEMA pgcutover_subscriber CASCADE").await.unwrap();
    stage.control.set("way_back", "enabled", false);
    ends(&stage, &["preflight"], DONE).await;
}
