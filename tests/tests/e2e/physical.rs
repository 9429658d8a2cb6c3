//! A streaming standby as target: it is promoted within the stall, and at every moment one side takes writes.
//!
//! Invariant: whoever was killed around the promotion, everybody ends on one side and the ledger adds up; what became of the
//! standby is said.

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::cluster::{Cluster, ClusterOptions, Identity};
use e2e::control::{Finished, SHORT};
use e2e::ledger::{Sides, audit};
use e2e::pair::{APP, DATABASE, PGCUTOVER, Pair, SOURCE, TARGET, password};
use e2e::proxy::ProxyOptions;
use e2e::stage::Stage;
use e2e::wire::Wire;
use postgres_protocol::message::backend::Message;
use toml::Value;

use crate::theatre::{ABORTED, LIMIT, REFUSED, Theatre};

const MAJOR: u32 = 17;
const INSERT: &str = "INSERT INTO branches (bid) VALUES (99)";

async fn stage(proxies: u16) -> Stage {
    staged(proxies, |_| ()).await
}

async fn staged(proxies: u16, change: impl Fn(&mut ProxyOptions)) -> Stage {
    let pair = Pair::physical(&Binaries::of(&[MAJOR]).unwrap(), MAJOR).await.unwrap();
    let mut stage = Stage::with(pair, proxies, change).await.unwrap();
    stage.control.with_way_back();
    stage.control.set("replication", "kind", "physical");
    stage.control.budget(&SHORT);
    stage
}

async fn theatre(proxies: u16) -> Theatre {
    let mut theatre = Theatre::on(stage(proxies).await).await;
    // Whoever waits for one to end is too slow here.
    theatre.stage.control.budget(&[("lease", "10s")]);
    theatre
}

async fn proxyctl(stage: &Stage, args: &[&str], code: Option<i32>) -> Finished {
    let finished = stage.control.run(args, LIMIT).await.unwrap();
    assert_eq!(finished.code, code, "{args:?}: {}", finished.story());
    finished
}

async fn is_standby(cluster: &Cluster) -> bool {
    let client = cluster.superuser(DATABASE).await.unwrap();
    client.text("SELECT pg_is_in_recovery()").await.unwrap().as_deref() == Some("t")
}

async fn refuses_writes(cluster: &Cluster) {
    let client = cluster.connect(APP, &password(APP), DATABASE).await.unwrap();
    let refused = client.simple_query(INSERT).await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "25006", "{refused}");
}

/// What a client is told of `in_hot_standby` at login, and with its first answer.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; only reports are asked for")]
async fn told_of_standby(port: u16) -> Vec<String> {
    let (mut wire, mut messages) = Wire::log_in(port, APP, &password(APP), DATABASE).await.unwrap();
    messages.extend(wire.query("SELECT 1").await.unwrap().0);
    let told = messages.iter().filter_map(|message| match message {
        Message::ParameterStatus(body) if body.name().unwrap() == "in_hot_standby" => {
            Some(body.value().unwrap().to_owned())
        }
        _ => None,
    });
    told.collect()
}

/// The rehearsal before it never promotes; connections that were opened on the standby serve clients after it; the old server
/// takes no writes any more, after a restart neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_rehearsed_and_promoted_under_load_without_an_error() {
    let mut theatre = theatre(2).await;
    let rehearsal = proxyctl(&theatre.stage, &["rehearse"], Some(0)).await.json().unwrap();
    assert_eq!(rehearsal["outcome"], "rehearsed");
    let parts = rehearsal["prediction"]["parts"].as_array().unwrap();
    let promotion = parts.iter().find(|part| part["step"] == "way_back").unwrap();
    assert_eq!(promotion["known"]["how"], "estimated", "{promotion}");
    assert!(is_standby(&theatre.stage.pair.target).await);
    assert_eq!(theatre.settled().await, SOURCE);

    let report = proxyctl(&theatre.stage, &["cutover"], Some(0)).await.json().unwrap();
    assert_eq!(report["outcome"], "committed");
    assert!(report["findings"].to_string().contains("pg_rewind"), "the way back is told: {}", report["findings"]);
    assert_eq!(theatre.settled().await, TARGET);
    theatre.load.acknowledges(100, LIMIT).await.unwrap();
    let target = theatre.stage.pair.target.superuser(DATABASE).await.unwrap();
    let survivors = "SELECT count(*) FROM pg_stat_activity a WHERE a.usename = 'app' \
        AND a.backend_start < (SELECT min(e.at) FROM pgcutover.evidence e) AND a.state_change > (SELECT min(e.at) FROM pgcutover.evidence e)";
    assert!(target.number(survivors).await.unwrap() > 0, "no connection of before the promotion serves");
    for port in theatre.stage.ports() {
        for _ in 0..3 {
            assert!(!told_of_standby(port).await.contains(&"on".to_owned()), "a client believes to be on a standby");
        }
    }
    refuses_writes(&theatre.stage.pair.source).await;
    theatre.stage.pair.source.restart().await.unwrap();
    refuses_writes(&theatre.stage.pair.source).await;
    let rollback = proxyctl(&theatre.stage, &["rollback"], Some(REFUSED)).await;
    assert!(rollback.stdout.contains("pg_rewind") && rollback.stdout.contains("swap [source]"), "{}", rollback.story());
    let again = proxyctl(&theatre.stage, &["cutover"], Some(REFUSED)).await;
    assert!(again.stdout.contains("is served by green already"), "{}", again.story());
    theatre.ends_without_error_on(TARGET).await;
}

/// Before the promotion an abort costs nothing, after it the standby, of which nobody can make a second side.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_killed_around_the_promotion_ends_on_the_source_and_says_what_it_cost() {
    ends_on_the_source(2, &[("before:way_back", Order::NotGiven), ("after:way_back", Order::Given)]).await;
}

/// The order was given, and its sender died before it could put the target's gate there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_killed_between_promotion_and_gate_leaves_no_second_side() {
    ends_on_the_source(1, &[("before:way_back", Order::OnItsWay)]).await;
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    NotGiven,
    OnItsWay,
    Given,
}

async fn ends_on_the_source(proxies: u16, kills: &[(&str, Order)]) {
    let mut theatre = theatre(proxies).await;
    for (at, order) in kills {
        proxyctl(&theatre.stage, &["cutover", "--stop-at", at], None).await;
        if *order == Order::OnItsWay {
            theatre.stage.pair.target.superuser(DATABASE).await.unwrap().run("SELECT pg_promote()").await.unwrap();
        }
        let promoted = *order != Order::NotGiven;
        assert_eq!(is_standby(&theatre.stage.pair.target).await, !promoted, "{at}");
        if promoted {
            undecidable(&theatre.stage).await;
        }
        let taken_up = proxyctl(&theatre.stage, &["resume-run"], Some(ABORTED)).await;
        assert_eq!(
            taken_up.stdout.contains("was promoted before the move was aborted"),
            promoted,
            "{at}: {}",
            taken_up.story()
        );
        assert_eq!(theatre.settled().await, SOURCE, "{at}");
        theatre.load.acknowledges(50, LIMIT).await.unwrap();
        refuses_writes(&theatre.stage.pair.target).await;
    }
    let again = proxyctl(&theatre.stage, &["cutover"], Some(REFUSED)).await;
    assert!(again.stdout.contains("is no standby"), "{}", again.story());
    let Theatre { stage, load } = theatre;
    let outcome = load.stop().await.unwrap();
    assert!(outcome.errors().is_empty(), "{:?}", outcome.errors().first());
    let (source, target) =
        (stage.pair.source.superuser(DATABASE).await.unwrap(), stage.pair.target.superuser(DATABASE).await.unwrap());
    let sides = Sides { serving: &source, other: Some(&target), moves: 0 };
    let audit = audit(&outcome.notes(), sides).await.unwrap();
    assert!(audit.is_clean(), "{audit}");
}

/// The promoted copy has the open epoch too, and the fence that opens by its abort: nobody may decide it there.
async fn undecidable(stage: &Stage) {
    let target = stage.pair.target.connect(PGCUTOVER, &password(PGCUTOVER), DATABASE).await.unwrap();
    let open = "SELECT pgcutover.decide(s.db, s.epoch, s.run, 'abort') FROM pgcutover.state s";
    let refused = target.simple_query(open).await.unwrap_err();
    assert!(format!("{refused:?}").contains("was opened before this server was promoted"), "{refused:?}");
    refuses_writes(&stage.pair.target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_killed_after_its_decision_is_brought_to_its_end_on_the_promoted_server() {
    let mut theatre = theatre(1).await;
    proxyctl(&theatre.stage, &["cutover", "--stop-at", "after:decided"], None).await;
    let taken_up = proxyctl(&theatre.stage, &["resume-run"], Some(0)).await;
    assert_eq!(taken_up.json().unwrap()["outcome"], "committed");
    assert_eq!(theatre.settled().await, TARGET);
    theatre.ends_without_error_on(TARGET).await;
}

struct Seed {
    check: &'static str,
    says: &'static str,
    sow: &'static str,
    reap: &'static str,
}

/// Each on the source, as superuser; what the standby has to know arrives by WAL.
const SEEDS: [Seed; 4] = [
    Seed {
        check: "promotion",
        says: "GRANT EXECUTE ON FUNCTION pg_catalog.pg_promote",
        sow: "REVOKE EXECUTE ON FUNCTION pg_promote(boolean, integer) FROM pgcutover",
        reap: "GRANT EXECUTE ON FUNCTION pg_promote(boolean, integer) TO pgcutover",
    },
    Seed {
        check: "synchronous_standby",
        says: "would wait for it for ever",
        sow: "ALTER SYSTEM SET synchronous_standby_names = '*'",
        reap: "ALTER SYSTEM RESET synchronous_standby_names",
    },
    Seed {
        check: "feeds",
        says: "subscription app.stray",
        sow: "CREATE PUBLICATION stray; CREATE SUBSCRIPTION stray CONNECTION 'dbname=nowhere host=127.0.0.1 port=1' PUBLICATION stray \
              WITH (connect = false); ALTER SUBSCRIPTION stray ENABLE",
        reap: "ALTER SUBSCRIPTION stray DISABLE; ALTER SUBSCRIPTION stray SET (slot_name = NONE); DROP SUBSCRIPTION stray; \
               DROP PUBLICATION stray",
    },
    Seed { check: "neighbours", says: "database postgres", sow: "", reap: "" },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preflight_is_red_where_a_physical_move_could_not_be_kept_safe() {
    let mut stage = stage(1).await;
    green(&stage).await;
    let source = stage.pair.source.superuser(DATABASE).await.unwrap();
    let beside = stage.pair.source.superuser("postgres").await.unwrap();
    for Seed { check, says, sow, reap } in SEEDS {
        let neighbour = check == "neighbours";
        let (client, sow, reap): (&Client, _, _) =
            if neighbour { (&beside, "CREATE TABLE stray (a int)", "DROP TABLE stray") } else { (&source, sow, reap) };
        for statement in sow.split("; ") {
            client.run(statement).await.unwrap();
        }
        client.run("SELECT pg_reload_conf()").await.unwrap();
        red(&stage, check, says).await;
        for statement in reap.split("; ") {
            client.run(statement).await.unwrap();
        }
        client.run("SELECT pg_reload_conf()").await.unwrap();
    }
    paused_and_pooled(&stage).await;
    // Its own source is no standby of it; a server of another origin still less.
    let ours = stage.control.config["target"]["dsn"].clone();
    let source_dsn = stage.control.config["source"]["dsn"].clone();
    stage.control.set("target", "dsn", source_dsn);
    red(&stage, "identity", "is no standby").await;
    let mut other = ClusterOptions::new(MAJOR);
    other.identity = Identity::Own;
    let other = Cluster::start(&Binaries::of(&[MAJOR]).unwrap(), &other).await.unwrap();
    let superuser = other.superuser("postgres").await.unwrap();
    superuser
        .run(&format!("CREATE ROLE {PGCUTOVER} SUPERUSER LOGIN PASSWORD '{}'", password(PGCUTOVER)))
        .await
        .unwrap();
    superuser.run(&format!("CREATE DATABASE {DATABASE}")).await.unwrap();
    stage.control.set("target", "dsn", other.dsn(PGCUTOVER, &password(PGCUTOVER), DATABASE));
    red(&stage, "identity", "can't be a standby of it").await;
    stage.control.set("target", "dsn", ours);
    assert!(is_standby(&stage.pair.target).await);
}

async fn paused_and_pooled(stage: &Stage) {
    let standby = stage.pair.target.superuser(DATABASE).await.unwrap();
    standby.run("SELECT pg_wal_replay_pause()").await.unwrap();
    red(stage, "streaming", "replay is paused").await;
    standby.run("SELECT pg_wal_replay_resume()").await.unwrap();
}

async fn findings(stage: &Stage, code: i32) -> Vec<serde_json::Value> {
    let preflight = proxyctl(stage, &["preflight"], Some(code)).await;
    preflight.json().unwrap()["findings"].as_array().unwrap().clone()
}

async fn green(stage: &Stage) {
    let found = findings(stage, 0).await;
    assert!(found.iter().all(|finding| finding["level"] != "red"), "{found:#?}");
}

async fn red(stage: &Stage, check: &str, says: &str) {
    let found = findings(stage, REFUSED).await;
    let told = found
        .iter()
        .any(|finding| finding["level"] == "red" && finding["check"] == check && finding.to_string().contains(says));
    assert!(told, "no red {check} that says '{says}': {found:#?}");
}

/// A session that keeps its server can't be restored on a standby yet: it is refused before anybody is held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_pooled_client_is_refused_in_preflight_and_by_the_run() {
    let session = |options: &mut ProxyOptions| {
        options.database(DATABASE).insert("pool_mode".to_owned(), Value::from("session"));
    };
    let stage = staged(1, session).await;
    let client = stage.proxies[0].connect(APP).await.unwrap();
    client.run("LISTEN news").await.unwrap();
    red(&stage, "transplanted", "is pooled by session").await;
    let refused = proxyctl(&stage, &["cutover"], Some(REFUSED)).await;
    assert!(refused.stdout.contains("is pooled by session"), "{}", refused.story());
    assert!(is_standby(&stage.pair.target).await);
    client.run(INSERT).await.unwrap();
}
