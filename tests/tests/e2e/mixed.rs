//! PgBouncers among the proxies of a cutover, kept by `proxyctl watch-pgbouncer`; and PgBouncers before and behind proxies.
//!
//! Invariant: whatever dies, the PgBouncer ends on the decided side with the proxy, without a person; no client sees an error but
//! that of its own killed pooler, and the ledger balances.

use std::fs;

use e2e::binaries::{Binaries, Network};
use e2e::bouncer::Bouncer;
use e2e::client::Client;
use e2e::control::{Finished, Running};
use e2e::kept::Kept;
use e2e::pair::{APP, DATABASE, OTHER, Pair, PairOptions, SOURCE, TARGET, password};
use e2e::printer::not_checked;
use e2e::proxy::ADMIN;
use e2e::shuttle::Shuttle;
use e2e::stage::{Serving, Stage};
use e2e::workload::{Outcome, Workload, WorkloadOptions};
use nix::sys::signal::Signal;
use serde_json::Value as Json;
use toml::{Table, Value};

use crate::house::until;
use crate::theatre::{ABORTED, LIMIT, REFUSED};

const DONE: i32 = 0;
/// Deadlines that suit tests, which share a machine: what they measure is not the stall.
const BUDGETS: [(&str, &str); 5] =
    [("drain", "2s"), ("lease", "2500ms"), ("renew", "200ms"), ("stall", "5s"), ("transaction_age_max", "60s")];

/// The keeper has not been seen for so long that nobody takes it for alive.
const GONE: &str =
    "SELECT NOT EXISTS (SELECT FROM pgcutover.member WHERE instance = 'b1' AND seen_at > now() - interval '3 s')";

fn is_missing() -> bool {
    if let Err(why) = Bouncer::installed(Network::from_env()) {
        not_checked("PgBouncer as a member", format_args!("{why:#}"));
        return true;
    }
    false
}

async fn pair() -> Pair {
    Pair::start(&Binaries::of(&[15, 17]).unwrap(), &PairOptions::new(15, 17)).await.unwrap()
}

/// So many proxies, and one PgBouncer that is kept, with these lines in its file.
async fn cast(proxies: u16, lines: &str) -> (Stage, Kept) {
    let mut stage = Stage::with(pair().await, proxies, |_| ()).await.unwrap();
    stage.control.budget(&BUDGETS);
    let lines = format!("pool_mode = transaction\ndefault_pool_size = 10\n{lines}");
    let kept = Kept::start(&mut stage, "b1", &lines).await.unwrap();
    (stage, kept)
}

fn load(ports: Vec<u16>) -> WorkloadOptions {
    let mut load = WorkloadOptions::new(ports, 8);
    load.writes_per_s = 200;
    load
}

/// Proxies and a PgBouncer before a pair, its keeper, and load on all of them.
struct Mixed {
    load: Workload,
    kept: Kept,
    stage: Stage,
}

impl Mixed {
    async fn open() -> Mixed {
        Mixed::with(1, "").await
    }

    async fn with(proxies: u16, lines: &str) -> Mixed {
        let (stage, kept) = cast(proxies, lines).await;
        let mut ports = stage.ports();
        ports.push(kept.bouncer.port());
        let load = Workload::start(&load(ports)).await.unwrap();
        load.acknowledges(50, LIMIT).await.unwrap();
        Mixed { load, kept, stage }
    }

    /// A client of PgBouncer is answered by this server.
    async fn is_served_by(&self, port: u16) {
        let client = self.kept.bouncer.connect(APP, DATABASE).await.unwrap();
        assert_eq!(client.number("SELECT inet_server_port()").await.unwrap(), i64::from(port));
    }

    async fn source(&self) -> Client {
        self.stage.pair.source.superuser(DATABASE).await.unwrap()
    }

    /// What PgBouncer's keeper enrolled on the source of its pause.
    async fn until_row(&self, paused_epoch: &str) {
        let row = "SELECT EXISTS (SELECT FROM pgcutover.member WHERE instance = 'b1' AND paused_epoch IS";
        self.source().await.until(&format!("{row} {paused_epoch})"), LIMIT).await.unwrap();
    }

    async fn until_aborted(&self) {
        let aborted = "SELECT EXISTS (SELECT FROM pgcutover.decision WHERE outcome = 'abort')";
        self.source().await.until(aborted, LIMIT).await.unwrap();
    }

    /// A cutover that waits, with everybody held, for a signal.
    async fn held(&self) -> Running {
        let running = self.stage.control.spawn(&["cutover", "--hold-at", "after:paused"]).unwrap();
        until("it stands in the pause", || async { running.stderr().contains("held after:paused") }).await;
        running
    }

    async fn goes_on(running: Running) -> Finished {
        running.signal(Signal::SIGUSR1).unwrap();
        running.wait(LIMIT).await.unwrap()
    }

    /// Everybody serves `side`, writes go on, and the ledger balances.
    async fn ends_on(self, side: &str) -> Outcome {
        let pair = &self.stage.pair;
        let (port, serving) = match side {
            SOURCE => (pair.source.port(), Serving::Source),
            _ => (pair.target.port(), Serving::Target),
        };
        for proxy in &self.stage.proxies {
            until("the proxy is there", || async {
                let gates = proxy.ask("SHOW GATES").await.unwrap();
                (gates[0].get("backend"), gates[0].get("state")) == (Some(side), Some("open"))
            })
            .await;
        }
        until("PgBouncer is there", || async { points_at(&self.kept.bouncer).await == port }).await;
        self.is_served_by(port).await;
        self.load.acknowledges(100, LIMIT).await.unwrap();
        let outcome = self.load.stop().await.unwrap();
        let audit = self.stage.audit(&outcome.notes(), serving).await.unwrap();
        assert!(audit.is_clean(), "{audit}");
        outcome
    }

    async fn ends_without_error_on(self, side: &str) {
        let errors = self.ends_on(side).await.errors();
        assert!(errors.is_empty(), "{} errors such as {:?}", errors.len(), errors.first());
    }

    async fn cutover(&self, more: &[&str]) -> Finished {
        self.stage.control.run(&[&["cutover"], more].concat(), LIMIT).await.unwrap()
    }
}

async fn shown(bouncer: &Bouncer, show: &str, row: (&str, &str), column: &str) -> String {
    bouncer.shown(show, row, column).await.unwrap()
}

async fn points_at(bouncer: &Bouncer) -> u16 {
    bouncer.points_at().await.unwrap()
}

fn red<'a>(json: &'a Json, object: &str) -> &'a Json {
    let all = json["findings"].as_array().unwrap();
    let about = |found: &&Json| found["level"] == "red" && found["object"].as_str().unwrap().contains(object);
    all.iter().find(about).unwrap_or_else(|| panic!("no red finding about {object}: {all:#?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_and_a_pgbouncer_move_there_and_back_as_one() {
    if is_missing() {
        return;
    }
    let (mut stage, kept) = cast(1, "").await;
    stage.control.with_way_back();
    let ports = [stage.ports(), vec![kept.bouncer.port()]].concat();
    let verdict = Shuttle { cutovers: 2, load: load(ports), between: 60 }.run(&stage).await.unwrap();
    assert!(verdict.is_good(), "{verdict:#?}");
    assert_eq!(points_at(&kept.bouncer).await, stage.pair.source.port());
    let status = stage.control.run(&["status"], LIMIT).await.unwrap().json().unwrap();
    let row = &status["proxies"][1];
    let told = (&row["proxy"], &row["backend"], &row["route_epoch"], &row["state"]);
    assert_eq!(told, (&"b1".into(), &SOURCE.into(), &2.into(), &"open".into()), "{status}");
    until("what was eased is as it was", || async {
        shown(&kept.bouncer, "SHOW CONFIG", ("key", "server_login_retry"), "value").await == "15"
    })
    .await;
    // Two would end each other's holds.
    let second = kept.once().await.unwrap();
    assert_eq!(second.code, Some(REFUSED), "{}", second.story());
    assert!(second.stderr.contains("keeps this PgBouncer already"), "{}", second.story());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pgbouncer_follows_an_abort_and_what_a_killed_proxyctl_left_in_the_store() {
    if is_missing() {
        return;
    }
    let mut mixed = Mixed::open().await;
    // Killed in the pause: its lease ends, and the abort is decided by whoever comes first.
    let finished = mixed.cutover(&["--stop-at", "after:paused"]).await;
    assert_eq!(finished.code, None, "{}", finished.story());
    mixed.until_aborted().await;
    mixed.is_served_by(mixed.stage.pair.source.port()).await;
    // Interrupted.
    let armed = mixed.cutover(&["--stop-at", "before:calm"]).await;
    assert_eq!(armed.code, None, "{}", armed.story());
    // The drain waits for this transaction of the proxy's, with PgBouncer held meanwhile.
    mixed.stage.control.budget(&[("drain", "5s"), ("lease", "6s")]);
    let client = mixed.stage.proxies[0].connect(APP).await.unwrap();
    client.run("BEGIN; UPDATE branches SET bbalance = bbalance WHERE bid = 1").await.unwrap();
    let running = mixed.stage.control.spawn(&["cutover"]).unwrap();
    mixed.until_row("NOT NULL").await;
    running.signal(Signal::SIGINT).unwrap();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(ABORTED), "{}", finished.story());
    assert!(!finished.stdout.contains("were let go"), "{}", finished.story());
    mixed.is_served_by(mixed.stage.pair.source.port()).await;
    client.run("COMMIT").await.unwrap();
    // Killed after the decision.
    let finished = mixed.cutover(&["--stop-at", "after:decided"]).await;
    assert_eq!(finished.code, None, "{}", finished.story());
    mixed.ends_without_error_on(TARGET).await;
}

/// Who was killed with everybody held comes back, finds its own PAUSE, and goes where the store says; meanwhile a run that ends
/// names it. A person's RESUME lets nobody past the pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_outlives_its_keeper_and_a_persons_resume() {
    if is_missing() {
        return;
    }
    let mut mixed = Mixed::open().await;
    let running = mixed.held().await;
    let mut keeper = mixed.kept.keeper.take().unwrap();
    keeper.kill9();
    let silent = "SELECT seen_at < now() - interval '1 s' FROM pgcutover.member WHERE instance = 'b1'";
    mixed.source().await.until(silent, LIMIT).await.unwrap();
    let finished = Mixed::goes_on(running).await;
    assert_eq!(finished.code, Some(ABORTED), "{}", finished.story());
    let problems = finished.json().unwrap()["findings"].to_string();
    assert!(problems.contains("nobody says that its clients were let go"), "{problems}");
    mixed.kept.keep(&mixed.stage.pair).await.unwrap();
    mixed.is_served_by(mixed.stage.pair.source.port()).await;

    let running = mixed.held().await;
    let console = mixed.kept.bouncer.connect(ADMIN, "pgbouncer").await.unwrap();
    console.run("RESUME").await.unwrap();
    let keeper = mixed.kept.keeper.as_ref().unwrap();
    until("it is noticed", || async { keeper.stderr().contains("somebody resumed it: holding again") }).await;
    // What is enrolled since says no earlier that it is paused than it is again.
    let noticed = mixed.source().await.text("SELECT now()::text").await.unwrap().unwrap();
    mixed.until_row(&format!("NOT NULL AND seen_at > '{noticed}'")).await;
    let finished = Mixed::goes_on(running).await;
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    mixed.ends_without_error_on(TARGET).await;
}

/// With no proxy beside it nobody but its keeper can end what a dead proxyctl began, PgBouncer there or not. Its clients lose their
/// connections when it is killed, which is the fault's own doing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pgbouncer_alone_that_is_killed_ends_where_the_store_says() {
    if is_missing() {
        return;
    }
    let mut mixed = Mixed::with(0, "").await;
    let file = mixed.kept.bouncer.dir().join("pgbouncer.ini");
    let old = fs::read(&file).unwrap();
    // With proxyctl.
    let finished = mixed.cutover(&["--stop-at", "after:fenced"]).await;
    assert_eq!(finished.code, None, "{}", finished.story());
    mixed.kept.bouncer.kill9();
    mixed.until_aborted().await;
    mixed.kept.bouncer.restart().await.unwrap();
    mixed.is_served_by(mixed.stage.pair.source.port()).await;
    // In the pause, and it stays away.
    let running = mixed.held().await;
    mixed.kept.bouncer.kill9();
    mixed.until_row("NULL").await;
    let finished = Mixed::goes_on(running).await;
    assert_eq!(finished.code, Some(ABORTED), "{}", finished.story());
    assert!(red(&finished.json().unwrap(), "PgBouncer b1")["problem"].as_str().unwrap().contains("is not held"));
    mixed.kept.bouncer.restart().await.unwrap();
    mixed.is_served_by(mixed.stage.pair.source.port()).await;
    // In the pause, and it comes back open.
    mixed.load.acknowledges(20, LIMIT).await.unwrap();
    let running = mixed.held().await;
    mixed.kept.bouncer.kill9();
    mixed.until_row("NULL").await;
    mixed.kept.bouncer.restart().await.unwrap();
    mixed.until_row("NOT NULL").await;
    let finished = Mixed::goes_on(running).await;
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    // After it, and it comes back with its old file.
    mixed.is_served_by(mixed.stage.pair.target.port()).await;
    mixed.kept.bouncer.kill9();
    fs::write(&file, old).unwrap();
    mixed.kept.bouncer.restart().await.unwrap();
    mixed.ends_on(TARGET).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pgbouncer_that_nobody_keeps_is_refused_or_kept_by_the_run_itself() {
    if is_missing() {
        return;
    }
    let mut mixed = Mixed::open().await;
    // A keeper that enrolled is no proxy to be commanded where it enrolled.
    let dsn = format!("user={ADMIN} password={} dbname=pgcutover", password(ADMIN));
    let members = [("name", "m"), ("find", "members"), ("dsn", &dsn)];
    let members = Table::from_iter(members.map(|(key, value)| (key.to_owned(), value.into())));
    mixed.stage.control.config.insert("proxies".to_owned(), Value::Array(vec![members.into()]));
    let preflight = mixed.stage.control.run(&["preflight"], LIMIT).await.unwrap();
    assert_eq!(preflight.code, Some(DONE), "{}", preflight.story());
    let keeper = mixed.kept.keeper.take().unwrap();
    keeper.signal(Signal::SIGTERM).unwrap();
    assert_eq!(keeper.wait(LIMIT).await.unwrap().code, Some(DONE));
    mixed.source().await.until(GONE, LIMIT).await.unwrap();
    let refused = mixed.cutover(&[]).await;
    assert_eq!(refused.code, Some(REFUSED), "{}", refused.story());
    assert!(red(&refused.json().unwrap(), "PgBouncer b1")["problem"].as_str().unwrap().contains("nobody keeps it"));
    mixed.stage.control.set("policy", "accept_unleased", true);
    let finished = mixed.cutover(&[]).await;
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    let retry = shown(&mixed.kept.bouncer, "SHOW CONFIG", ("key", "server_login_retry"), "value").await;
    assert_eq!(retry, "15", "set back before the run ends");
    mixed.ends_without_error_on(TARGET).await;
}

/// A client that is pooled by session keeps PAUSE waiting for ever: the drain's end aborts, and says who it was. Where a cutover
/// passes such a PgBouncer by, its clients meet the fence; it follows when its keeper is back, and no session goes on reading what
/// nobody writes any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_a_drain_with_its_name_and_stays_behind_no_longer_than_its_transaction() {
    if is_missing() {
        return;
    }
    let (mut stage, mut kept) = cast(1, &format!("[users]\n{OTHER} = pool_mode=session\n")).await;
    const WHERE: &str = "SELECT inet_server_port()";
    let [source, target] = [&stage.pair.source, &stage.pair.target].map(|server| i64::from(server.port()));
    let session = kept.bouncer.connect(OTHER, DATABASE).await.unwrap();
    assert_eq!(session.number(WHERE).await.unwrap(), source);
    let finished = stage.control.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(ABORTED), "{}", finished.story());
    let json = finished.json().unwrap();
    let named = red(&json, &format!("b1: {OTHER} from 127.0.0.1"));
    assert!(named["problem"].as_str().unwrap().contains("pooled by session"), "{named}");
    assert_eq!(session.number(WHERE).await.unwrap(), source);

    kept.keeper.take().unwrap().kill9();
    stage.control.config.remove("pgbouncer");
    stage.control.set("policy", "unlisted", "follow");
    stage.pair.source.superuser(DATABASE).await.unwrap().until(GONE, LIMIT).await.unwrap();
    let finished = stage.control.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    let client = kept.bouncer.connect(APP, DATABASE).await.unwrap();
    assert_eq!(client.number(WHERE).await.unwrap(), source, "nobody has moved it");
    kept.keep(&stage.pair).await.unwrap();
    until("PgBouncer is there", || async { i64::from(points_at(&kept.bouncer).await) == target }).await;
    until("the session is not on the source any more", || async {
        session.is_closed() || session.number(WHERE).await.is_ok_and(|port| port == target)
    })
    .await;
    assert_eq!(client.number(WHERE).await.unwrap(), target);
}

/// A stage whose clients come through `ports`, moved under load.
async fn moves_without_error(stage: Stage, ports: Vec<u16>) {
    let load = Workload::start(&load(ports)).await.unwrap();
    load.acknowledges(50, LIMIT).await.unwrap();
    let finished = stage.control.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    load.acknowledges(100, LIMIT).await.unwrap();
    let outcome = load.stop().await.unwrap();
    let audit = stage.audit(&outcome.notes(), Serving::Target).await.unwrap();
    assert!(audit.is_clean(), "{audit}");
    assert!(outcome.errors().is_empty(), "{:?}", outcome.errors().first());
}

/// PgBouncer sees slow answers for as long as its server, the proxy, holds them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pgbouncer_in_front_of_a_proxy_needs_nothing_to_be_moved() {
    if is_missing() {
        return;
    }
    let mut stage = Stage::with(pair().await, 1, |_| ()).await.unwrap();
    stage.control.budget(&BUDGETS);
    let bouncer = Bouncer::start(stage.proxies[0].port(), 10).await.unwrap();
    let ports = vec![bouncer.port()];
    moves_without_error(stage, ports).await;
}

/// Each backend of the proxy is a PgBouncer before its server: the proxy moves from one to the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_in_front_of_pgbouncers_moves_from_one_to_the_other() {
    if is_missing() {
        return;
    }
    let pair = pair().await;
    let [old, new] = [&pair.source, &pair.target].map(|server| server.port());
    let (old, new) = (Bouncer::start(old, 30).await.unwrap(), Bouncer::start(new, 30).await.unwrap());
    let mut stage = Stage::with(pair, 1, |options| {
        options.backend_port(SOURCE, old.port());
        options.backend_port(TARGET, new.port());
        // Poolers hand each other passwords: a verifier is good for one server.
        options.users.retain(|line| !line.contains("SCRAM-SHA-256$"));
        options.users.extend([APP, OTHER].map(|user| format!("\"{user}\" \"{}\"", password(user))));
    })
    .await
    .unwrap();
    stage.control.budget(&BUDGETS);
    let ports = stage.ports();
    moves_without_error(stage, ports).await;
}
