//! README's chapter "Your first production cutover": its commands print what it says, with the rights that it grants; and what it ends
//! with, `proxyctl objects drop`, takes nothing away that anybody still needs.
//!
//! Invariant: figures in the chapter are not compared, words are.

use std::fs;
use std::path::Path;
use std::time::Duration;

use e2e::binaries::{Binaries, Network};
use e2e::chapter::{blocks, play};
use e2e::client::Client;
use e2e::control::Finished;
use e2e::pair::{APP, DATABASE, PairOptions, SOURCE, TARGET};
use e2e::stage::Stage;
use serde_json::Value as Json;

use crate::theatre::REFUSED;

/// A cutover, or whatever a loaded machine needs for one.
const LIMIT: Duration = Duration::from_secs(60);
const DONE: i32 = 0;

const INSERT: &str = "INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 1)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chapter_on_a_first_cutover_shows_what_its_commands_print() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let played = play(Network::from_env()).await.unwrap();
    let unprinted = blocks::unprinted(&page, &played).unwrap();
    assert!(
        unprinted.is_empty(),
        "nobody printed {unprinted:#?}; `cargo run -p e2e --bin chapter` writes README.md anew"
    );
}

async fn ends(stage: &Stage, args: &[&str], code: i32) -> Json {
    let ended: Finished = stage.control.run(args, LIMIT).await.unwrap();
    assert_eq!(ended.code, Some(code), "{}", ended.story());
    ended.json().unwrap()
}

/// The problems that `objects drop` names, and that it drops nothing then.
async fn refusals(stage: &Stage, args: &[&str]) -> String {
    let refused = ends(stage, &[&["objects", "drop"], args].concat(), REFUSED).await;
    assert_eq!(refused["dropped"], Json::from(Vec::<String>::new()), "{refused:#}");
    let findings = refused["findings"].as_array().unwrap().iter();
    assert!(findings.clone().all(|found| found["level"] == "red" && found["fix"] != ""), "{refused:#}");
    findings.map(|found| format!("{}: {}\n", found["object"], found["problem"])).collect()
}

fn names(text: &str, parts: &[&str]) {
    assert_eq!(text.lines().count(), parts.len(), "{text}");
    for part in parts {
        assert!(text.contains(part), "no {part} in:\n{text}");
    }
}

async fn stores(stage: &Stage) -> i64 {
    let mut there = 0;
    for cluster in [&stage.pair.source, &stage.pair.target] {
        let client = cluster.superuser(DATABASE).await.unwrap();
        there += client.number("SELECT count(*) FROM pg_namespace WHERE nspname = 'pgcutover'").await.unwrap();
    }
    there
}

async fn insert(client: &Client, n: u32) {
    client.run(&INSERT.replace("1, 1, 1", &format!("1, {n}, 1"))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_objects_go_only_when_nobody_needs_them_and_clients_do_not_notice() {
    let mut stage = Stage::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17), 2).await.unwrap();
    stage.control.budget(&[("stall", "5s"), ("transaction_age_max", "60s"), ("drain", "4s"), ("lease", "10s")]);
    stage.control.with_way_back();
    assert_eq!(ends(&stage, &["objects", "drop"], DONE).await["dropped"], Json::from(Vec::<String>::new()));
    let client = stage.proxies[1].connect(APP).await.unwrap();

    let killed = stage.control.run(&["cutover", "--stop-at", "after:fenced"], LIMIT).await.unwrap();
    assert_eq!(killed.code, None, "{}", killed.story());
    let open = refusals(&stage, &[]).await;
    assert!(open.contains("epoch 1 of run") && open.contains("subscription app_sub carries"), "{open}");
    ends(&stage, &["abort"], DONE).await;
    names(&refusals(&stage, &[]).await, &["subscription app_sub carries"]);
    insert(&client, 1).await;

    ends(&stage, &["cutover"], DONE).await;
    let follows = "subscription pgcutover_back_app_2 carries";
    let (slot, file) = ("slot pgcutover_back_app_2 keeps WAL", "its file says active = \\\"blue\\\"");
    names(&refusals(&stage, &[]).await, &[follows, slot, "is fenced by epoch 2", "proxy p1", file]);
    names(&refusals(&stage, &["--unfence"]).await, &[follows, slot, "proxy p1", "proxy p2"]);
    ends(&stage, &["way-back", "drop"], DONE).await;
    for proxy in &mut stage.proxies {
        proxy.options().database(DATABASE).insert("active".to_owned(), TARGET.into());
        proxy.write().unwrap();
        proxy.ask("RELOAD").await.unwrap();
    }
    let all = stage.control.config["proxies"].clone();
    stage.control.config["proxies"].as_array_mut().unwrap().truncate(1);
    names(&refusals(&stage, &["--unfence"]).await, &["proxy p2\": \"goes by the store of"]);
    stage.control.config["proxies"] = all;
    names(&refusals(&stage, &[]).await, &["is fenced by epoch 2"]);
    insert(&client, 2).await;
    assert_eq!(stores(&stage).await, 2);

    let dropped = ends(&stage, &["objects", "drop", "--unfence"], DONE).await;
    assert_eq!(dropped["dropped"], Json::from(vec!["schema pgcutover of blue", "schema pgcutover of green"]));
    assert_eq!(stores(&stage).await, 0);
    insert(&client, 3).await;
    // One that has lost everything goes by its file, and finds no store that would hold it.
    stage.proxies[0].kill9();
    fs::remove_dir_all(stage.proxies[0].dir().join("state")).unwrap();
    fs::create_dir(stage.proxies[0].dir().join("state")).unwrap();
    stage.proxies[0].restart().await.unwrap();
    let again = stage.proxies[0].connect(APP).await.unwrap();
    insert(&again, 4).await;
    let serving = stage.pair.target.superuser(DATABASE).await.unwrap();
    assert_eq!(serving.number("SELECT count(*) FROM ledger").await.unwrap(), 4);
    assert_eq!(ends(&stage, &["objects", "drop"], DONE).await["dropped"], Json::from(Vec::<String>::new()));
    // The same configuration again would go from a server that nobody is on.
    let refused = ends(&stage, &["preflight"], REFUSED).await;
    let elsewhere = |found: &Json| found["level"] == "red" && found["problem"].as_str().unwrap().contains(TARGET);
    assert!(refused["findings"].as_array().unwrap().iter().any(elsewhere), "{refused:#}, from {SOURCE}");
}
