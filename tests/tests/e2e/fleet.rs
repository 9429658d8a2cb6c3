//! Who takes part in a cutover: proxies behind a name, proxies that enrolled, proxies that nobody listed, proxies that are gone.
//!
//! Invariant: whoever serves the database ends on the decided side with its clients; whoever can't is named, with where it was
//! found and since when it is silent.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use e2e::binaries::Binaries;
use e2e::control::{Finished, Running};
use e2e::faults::{Direction, Fault, FaultProxy};
use e2e::pair::{DATABASE, Pair, PairOptions, TARGET, password};
use e2e::printer;
use e2e::proxy::{ADMIN, own_hosts_file_is_possible};
use e2e::stage::{Serving, Stage};
use e2e::workload::{Workload, WorkloadOptions};
use nix::sys::signal::Signal;
use serde_json::Value as Json;
use toml::{Table, Value};

use crate::house::until;

/// A cutover and whatever ends it.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a proxy holds by itself for a run that says nothing.
const HOLD_LEASE_MS: u64 = 2000;
/// Exit codes of proxyctl, as its help tells them.
const DONE: i32 = 0;
const REFUSED: i32 = 3;
const UNFINISHED: i32 = 5;

/// A stage of proxies, and the load on all of them.
struct Scene {
    stage: Stage,
    load: Workload,
}

impl Scene {
    async fn open(proxies: u16) -> Scene {
        let binaries = Binaries::of(&[15, 17]).unwrap();
        let pair = Pair::start(&binaries, &PairOptions::new(15, 17)).await.unwrap();
        let mut stage = Stage::with(pair, proxies, |options| {
            options.setting("drain_timeout", "1s");
            options.setting("pause_lease", format!("{HOLD_LEASE_MS}ms"));
        })
        .await
        .unwrap();
        // Tests share a machine: what they measure is not the stall.
        stage.control.budget(&[("stall", "5s"), ("transaction_age_max", "60s")]);
        let mut load = WorkloadOptions::new(stage.ports(), 8);
        load.writes_per_s = 200;
        let load = Workload::start(&load).await.unwrap();
        load.acknowledges(50, LIMIT).await.unwrap();
        Scene { stage, load }
    }

    fn control(&mut self) -> &mut Table {
        &mut self.stage.control.config
    }

    /// Only these entries; each is the first proxy's with other words.
    fn entries(&mut self, entries: &[&[(&str, String)]]) {
        let entry = |words: &&[(&str, String)]| {
            Value::Table(words.iter().map(|(key, value)| ((*key).to_owned(), value.clone().into())).collect())
        };
        let entries = entries.iter().map(entry).collect();
        self.control().insert("proxies".to_owned(), Value::Array(entries));
    }

    fn listed(&self, at: usize) -> [(&'static str, String); 2] {
        let proxy = &self.stage.proxies[at];
        [("name", proxy.name().to_owned()), ("dsn", proxy.admin_dsn())]
    }

    /// The store is there, and every proxy has enrolled itself.
    async fn enrolled(&self) {
        let objects = self.stage.control.run(&["objects"], LIMIT).await.unwrap();
        assert_eq!(objects.code, Some(DONE), "{}", objects.story());
        let source = self.stage.pair.source.superuser(DATABASE).await.unwrap();
        let count = self.stage.proxies.len();
        source.until(&format!("SELECT count(*) = {count} FROM pgcutover.member"), LIMIT).await.unwrap();
    }

    async fn run(&self, verb: &str) -> Finished {
        self.stage.control.run(&[verb], LIMIT).await.unwrap()
    }

    /// Where proxyctl found whom, as `status` tells it.
    async fn origins(&self) -> Vec<(String, String)> {
        let status = self.run("status").await.json().unwrap();
        let text = |row: &Json, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        status["proxies"].as_array().unwrap().iter().map(|row| (text(row, "proxy"), text(row, "origin"))).collect()
    }

    /// Every proxy serves the target, no client saw an error, the ledger balances.
    async fn everybody_moved(self) {
        for proxy in &self.stage.proxies {
            until("it serves the target", || async {
                let gates = proxy.ask("SHOW GATES").await.unwrap();
                (gates[0].get("backend"), gates[0].get("state")) == (Some(TARGET), Some("open"))
            })
            .await;
        }
        self.load.acknowledges(50, LIMIT).await.unwrap();
        let outcome = self.load.stop().await.unwrap();
        let audit = self.stage.audit(&outcome.notes(), Serving::Target).await.unwrap();
        assert!(audit.is_clean(), "{audit}");
        assert!(outcome.errors().is_empty(), "{:?}", outcome.errors().first());
    }
}

/// A red or yellow finding of the run about `object`.
fn finding<'a>(json: &'a Json, level: &str, object: &str) -> &'a Json {
    let all = json["findings"].as_array().unwrap();
    let about = |found: &&Json| found["level"] == level && found["object"].as_str().unwrap().contains(object);
    all.iter().find(about).unwrap_or_else(|| panic!("no {level} finding about {object}: {all:#?}"))
}

/// Two proxies behind one name, each at its own address, for proxyctl alone; `None` where that takes rights we lack.
struct Town {
    scene: Scene,
    hosts: PathBuf,
    _second: FaultProxy,
}

const HERE: &str = "127.0.0.1 proxies.test\n";
const BOTH: &str = "127.0.0.1 proxies.test\n127.0.0.2 proxies.test\n";

impl Town {
    async fn found() -> Option<Town> {
        if !own_hosts_file_is_possible() {
            printer::result(format_args!("nothing was tried: a hosts file for one process takes root and unshare(1)"));
            return None;
        }
        let mut scene = Scene::open(2).await;
        let port = scene.stage.proxies[0].port();
        let there = SocketAddr::from(([127, 0, 0, 2], port));
        let second = FaultProxy::at(there, scene.stage.proxies[1].port()).await.unwrap();
        let hosts = scene.stage.control.dir().join("hosts");
        std::fs::write(&hosts, BOTH).unwrap();
        let secret = password(ADMIN);
        let dsn = format!("host=proxies.test port={port} user={ADMIN} password={secret} dbname=pgcutover");
        scene.entries(&[&[("name", "p".to_owned()), ("find", "dns".to_owned()), ("dsn", dsn)]]);
        scene.stage.control.hosts = Some(hosts.clone());
        Some(Town { scene, hosts, _second: second })
    }

    /// A cutover that stands between what was prepared and the pause.
    async fn begun(&self) -> Running {
        let running = self.scene.stage.control.spawn(&["cutover", "--hold-at", "before:paused"]).unwrap();
        until("it stands before the pause", || async { running.stderr().contains("held before:paused") }).await;
        running
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_with_several_addresses_is_several_proxies() {
    let Some(town) = Town::found().await else { return };
    let found = "found by the name proxies.test".to_owned();
    let expected = ["p@127.0.0.1", "p@127.0.0.2"].map(|name| (name.to_owned(), found.clone()));
    assert_eq!(town.scene.origins().await, expected);
    let finished = town.scene.run("cutover").await;
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    town.scene.everybody_moved().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_that_changed_before_the_pause_is_named_and_nobody_is_held() {
    let Some(town) = Town::found().await else { return };
    let running = town.begun().await;
    std::fs::write(&town.hosts, HERE).unwrap();
    running.signal(Signal::SIGUSR1).unwrap();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(REFUSED), "{}", finished.story());
    let json = finished.json().unwrap();
    let left = finding(&json, "red", "p@127.0.0.2");
    assert!(left["problem"].as_str().unwrap().contains("no longer found"), "{left}");
    assert!(json["epoch"].is_null(), "no epoch was opened: {json}");
    std::fs::write(&town.hosts, BOTH).unwrap();
    let finished = town.scene.run("cutover").await;
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    town.scene.everybody_moved().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_that_enrolled_are_commanded_where_they_enrolled() {
    let mut scene = Scene::open(3).await;
    let dsn = format!("user={ADMIN} password={} dbname=pgcutover", password(ADMIN));
    let members = [("name", "m".to_owned()), ("find", "members".to_owned()), ("dsn", dsn)];
    let first = scene.listed(0);
    scene.entries(&[&first, &members]);
    scene.enrolled().await;
    let origins = [("p1", "listed"), ("m@p2", "enrolled as p2"), ("m@p3", "enrolled as p3")];
    assert_eq!(scene.origins().await, origins.map(|(name, origin)| (name.to_owned(), origin.to_owned())));
    let preflight = scene.run("preflight").await.json().unwrap();
    let told = finding(&preflight, "green", "proxy m@p3");
    assert!(told["problem"].as_str().unwrap().contains("enrolled as p3"), "{told}");
    let finished = scene.run("cutover").await;
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    scene.everybody_moved().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_nobody_listed_stops_a_cutover_or_holds_and_follows_by_policy() {
    let mut scene = Scene::open(2).await;
    let first = scene.listed(0);
    scene.entries(&[&first]);
    scene.enrolled().await;
    let refused = scene.run("cutover").await;
    assert_eq!(refused.code, Some(REFUSED), "{}", refused.story());
    finding(&refused.json().unwrap(), "red", "proxy instance p2");
    let status = scene.run("status").await.json().unwrap();
    assert_eq!((&status["unlisted"][0]["instance"], &status["unlisted"][0]["alive"]), (&"p2".into(), &true.into()));
    scene.stage.control.set("policy", "unlisted", "follow");
    // Nobody renews its hold; it reads that the run lives, also for longer than its own lease.
    let running = scene.stage.control.spawn(&["cutover", "--hold-at", "after:paused"]).unwrap();
    let held = async || {
        let gates = scene.stage.proxies[1].ask("SHOW GATES").await.unwrap();
        gates[0].get("held_ms_max").and_then(|ms| ms.parse::<u64>().ok()).unwrap_or_default()
    };
    until("it holds for longer than its lease", || async {
        held().await > HOLD_LEASE_MS + 1000 || running.stderr().contains("lease")
    })
    .await;
    running.signal(Signal::SIGUSR1).unwrap();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(DONE), "{}", finished.story());
    let json = finished.json().unwrap();
    finding(&json, "yellow", "proxy instance p2");
    let second = &scene.stage.proxies[1];
    until("it has followed", || async { !second.ask("SHOW SWITCHES").await.unwrap().is_empty() }).await;
    assert_eq!(second.ask("SHOW SWITCHES").await.unwrap()[0].get("how"), Some("followed"));
    scene.everybody_moved().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_is_gone_is_named_with_when_it_was_last_seen() {
    let mut scene = Scene::open(2).await;
    scene.enrolled().await;
    scene.stage.proxies[1].kill9();
    let refused = scene.run("cutover").await;
    assert_eq!(refused.code, Some(REFUSED), "{}", refused.story());
    let json = refused.json().unwrap();
    let gone = finding(&json, "red", "p2");
    assert!(gone["problem"].as_str().unwrap().contains("the store last saw it"), "{gone}");
    assert!(gone["fix"].as_str().unwrap().contains("start the proxy"), "{gone}");
    let status = scene.run("status").await.json().unwrap();
    assert!(status["proxies"][1]["error"].as_str().unwrap().contains("last saw it"), "{status}");
    let _ = scene.load.stop().await.unwrap();
}

/// What one proxy that fell silent costs the clients of the others once the cutover is decided: a quarter of a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_proxy_that_falls_silent_after_the_decision() {
    let mut scene = Scene::open(2).await;
    let console = FaultProxy::start(scene.stage.proxies[1].port()).await.unwrap();
    let (port, first) = (scene.stage.proxies[1].port(), scene.listed(0));
    let dsn = scene.listed(1)[1].1.replace(&format!("port={port}"), &format!("port={}", console.port()));
    scene.entries(&[&first, &[("name", "p2".to_owned()), ("dsn", dsn)]]);
    scene.enrolled().await;
    // Whoever decides waits for this transaction; whoever reads does not.
    let source = &scene.stage.pair.source;
    let (guard, look) = (source.superuser(DATABASE).await.unwrap(), source.superuser(DATABASE).await.unwrap());
    guard.run("BEGIN; LOCK TABLE pgcutover.decision IN EXCLUSIVE MODE").await.unwrap();
    let running = scene.stage.control.spawn(&["cutover"]).unwrap();
    let deciding =
        "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'pgcutover.decision'::regclass)";
    look.until(deciding, LIMIT).await.unwrap();
    console.set(Direction::Up, Fault::Hold);
    let admin = scene.stage.proxies[0].admin().await.unwrap();
    guard.run("COMMIT").await.unwrap();
    let decided = Instant::now();
    until("the first proxy is open", || async {
        admin.rows("SHOW GATES").await.unwrap()[0].get("state") == Some("open")
    })
    .await;
    let waited = decided.elapsed();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(UNFINISHED), "{}", finished.story());
    let json = finished.json().unwrap();
    let silent = finding(&json, "red", "p2");
    assert!(silent["problem"].as_str().unwrap().contains("it last answered"), "{silent}");
    assert!(waited < Duration::from_millis(900), "{waited:?}");
    scene.everybody_moved().await;
}
