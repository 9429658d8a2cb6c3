//! `proxyctl rehearse`: the live system goes through everything that can be taken back, and is as before.
//!
//! Invariant: what a rehearsal may leave is its journal and its aborted epoch; the test compares everything else.

use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::pair::{DATABASE, PairOptions, SOURCE, TARGET};
use e2e::stage::{Serving, Stage};
use e2e::workload::{Workload, WorkloadOptions};
use serde_json::Value as Json;

use crate::evidence;

/// A rehearsal, or a cutover.
const LIMIT: Duration = Duration::from_secs(60);

/// Everything of a server that a run may change: slots, publications, subscriptions, gates, triggers, objects, settings, roles.
const TRACES: &str = "SELECT string_agg(trace, E'\\n' ORDER BY trace) FROM (
      SELECT 'slot ' || slot_name || ' ' || slot_type FROM pg_replication_slots
      UNION ALL SELECT 'publication ' || pubname || ' ' || coalesce(tables.n, 0) FROM pg_publication
        LEFT JOIN (SELECT pubname AS name, count(*) AS n FROM pg_publication_tables GROUP BY 1) tables ON tables.name = pubname
      UNION ALL SELECT 'subscription ' || subname || ' ' || subenabled FROM pg_subscription
      UNION ALL SELECT 'gate ' || db || ' ' || form || ' ' || epoch FROM pgcutover.gates
      UNION ALL SELECT 'trigger ' || tgrelid::regclass || ' ' || tgname || ' ' || tgenabled::text FROM pg_trigger
      UNION ALL SELECT 'prepared ' || gid FROM pg_prepared_xacts
      UNION ALL SELECT 'event trigger ' || evtname || ' ' || evtenabled::text FROM pg_event_trigger
      UNION ALL SELECT 'relation ' || oid::regclass FROM pg_class WHERE oid >= 16384 AND relpersistence <> 't'
      UNION ALL SELECT 'function ' || oid::regprocedure FROM pg_proc WHERE oid >= 16384
      UNION ALL SELECT 'role ' || rolname || ' ' || rolcanlogin || ' ' || rolconnlimit FROM pg_roles WHERE oid >= 16384
      UNION ALL SELECT 'database ' || datname || ' ' || datallowconn || ' ' || datconnlimit FROM pg_database
      UNION ALL SELECT 'setting ' || setdatabase || ' ' || setrole || ' ' || array_to_string(setconfig, ' ') FROM pg_db_role_setting
      UNION ALL SELECT 'file ' || name || ' ' || setting FROM pg_file_settings
    ) traces (trace)";

/// Whether nobody of these is connected: proxyctl to neither server, clients' connections not to the target. Those of proxies' control logins come
/// and go.
const NOBODY: &str =
    "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'client backend' AND usename::text = ANY ($who)";

/// Sequences of the target: nobody writes there.
const SEQUENCES: &str =
    "SELECT string_agg(sequencename || ' ' || coalesce(last_value, 0), ', ' ORDER BY 1) FROM pg_sequences";

async fn traces(stage: &Stage) -> [String; 3] {
    let source = stage.pair.source.superuser(DATABASE).await.unwrap();
    let target = stage.pair.target.superuser(DATABASE).await.unwrap();
    [
        source.text(TRACES).await.unwrap().unwrap(),
        target.text(TRACES).await.unwrap().unwrap(),
        target.text(SEQUENCES).await.unwrap().unwrap(),
    ]
}

/// A server takes a moment to end a session whose client has gone.
pub(crate) async fn nobody_stays(stage: &Stage) {
    for (cluster, who) in [(&stage.pair.source, "{pgcutover}"), (&stage.pair.target, "{pgcutover,app,other}")] {
        let client = cluster.superuser(DATABASE).await.unwrap();
        client.until(&NOBODY.replace("$who", &format!("'{who}'")), LIMIT).await.unwrap();
    }
}

async fn rehearsals(count: usize) {
    let mut stage = Stage::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17), 2).await.unwrap();
    // Tests share a machine: what they measure is not the stall.
    stage.control.budget(&[("stall", "5s"), ("transaction_age_max", "60s"), ("drain", "4s"), ("lease", "5s")]);
    stage.control.with_way_back();
    let mut load = WorkloadOptions::new(stage.ports(), 8);
    load.writes_per_s = 200;
    let load = Workload::start(&load).await.unwrap();
    load.acknowledges(100, LIMIT).await.unwrap();

    let mut before = None;
    let mut epochs = Vec::new();
    for _ in 0..count {
        let rehearsal = stage.control.run(&["rehearse"], LIMIT).await.unwrap();
        let report = rehearsal.json().unwrap();
        assert_eq!(rehearsal.code, Some(0), "{}", rehearsal.story());
        assert_eq!(report["outcome"], "rehearsed", "{}", rehearsal.story());
        predicts(&report);
        evidence::tells(&report, &["p1", "p2"], SOURCE, SOURCE);
        epochs.push(report["epoch"].as_u64().unwrap());
        for proxy in &stage.proxies {
            let gates = proxy.ask("SHOW GATES").await.unwrap();
            let gate = gates.iter().find(|gate| gate.get("database") == Some(DATABASE)).unwrap();
            assert_eq!([gate.get("state"), gate.get("backend")], [Some("open"), Some("blue")]);
        }
        // The first one arms the gates, which stay.
        let now = traces(&stage).await;
        assert_eq!(*before.get_or_insert_with(|| now.clone()), now);
        nobody_stays(&stage).await;
        load.acknowledges(20, LIMIT).await.unwrap();
    }
    assert!(epochs.is_sorted_by(|one, next| one < next), "{epochs:?}");

    let cutover = stage.control.run(&["cutover"], LIMIT).await.unwrap();
    let report = cutover.json().unwrap();
    assert_eq!(report["outcome"], "committed", "{}", cutover.story());
    evidence::tells(&report, &["p1", "p2"], SOURCE, TARGET);
    let page = std::fs::read_to_string(report["report_html"].as_str().unwrap()).unwrap();
    for words in ["Where traffic goes", "<td>p2</td><td>green</td>", "Replication lag", "replayed on the target"] {
        assert!(page.contains(words), "{words} is not on the page");
    }
    let status = stage.control.run(&["status"], LIMIT).await.unwrap().json().unwrap();
    let way_back = &status["way_back"];
    assert_eq!((&way_back["attached"], &status["way_back_error"]), (&true.into(), &Json::Null), "{status:#}");
    assert!(
        way_back["name"].as_str().unwrap().starts_with("pgcutover_back_") && way_back["lag_bytes"].is_i64(),
        "{status:#}"
    );
    load.acknowledges(100, LIMIT).await.unwrap();
    let outcome = load.stop().await.unwrap();
    let errors = outcome.errors();
    assert!(errors.is_empty(), "{} errors such as {:?}", errors.len(), errors.first());
    let audit = stage.audit(&outcome.notes(), Serving::Target).await.unwrap();
    assert!(audit.is_clean(), "{audit}");
}

/// Every step that holds clients has its part, and says where the figure comes from.
fn predicts(report: &Json) {
    let parts = report["prediction"]["parts"].as_array().unwrap();
    let of = |how: &str| {
        let parts = parts.iter().filter(|part| part["known"]["how"] == how);
        parts.map(|part| part["step"].as_str().unwrap()).collect::<Vec<_>>()
    };
    let measured = ["paused", "fenced", "caught_up", "transplanted", "way_back", "checked"];
    assert_eq!(of("measured"), measured);
    assert_eq!(of("estimated"), ["durable", "decided", "switched", "resumed"]);
    let sum: f64 = parts.iter().map(|part| part["ms"].as_f64().unwrap()).sum();
    assert!((sum - report["prediction"]["pause_ms"].as_f64().unwrap()).abs() < 0.01);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rehearsal_under_load_leaves_nothing_and_a_cutover_follows() {
    rehearsals(3).await;
}

/// The campaign: `cargo test -p e2e --test e2e -- --ignored forty_rehearsals`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; its bounded form is the test above"]
async fn forty_rehearsals_in_a_row_leave_nothing() {
    rehearsals(40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rehearsal_that_fails_is_an_abort_and_says_why() {
    let mut stage = Stage::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17), 1).await.unwrap();
    stage.control.budget(&[("stall", "5s"), ("transaction_age_max", "60s"), ("drain", "700ms"), ("lease", "2s")]);
    let armed = stage.control.run(&["rehearse", "--stop-at", "before:calm"], LIMIT).await.unwrap();
    assert_eq!(armed.code, None, "{}", armed.story());
    let client = stage.proxies[0].connect(e2e::pair::APP).await.unwrap();
    client.run("BEGIN; UPDATE branches SET bbalance = bbalance WHERE bid = 1").await.unwrap();
    let rehearsal = stage.control.run(&["rehearse"], LIMIT).await.unwrap();
    let report = rehearsal.json().unwrap();
    assert_eq!((rehearsal.code, &report["outcome"]), (Some(4), &Json::from("aborted")), "{}", rehearsal.story());
    assert!(report["prediction"].is_null());
    let found = report["findings"].as_array().unwrap().iter();
    assert!(found.map(|finding| finding["check"].as_str().unwrap()).any(|check| check == "paused"));
    client.run("COMMIT").await.unwrap();
}
