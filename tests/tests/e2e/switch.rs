//! SWITCH and PREPARE SWITCH by an operator: everyone moves, nobody sees more than a wait.
//!
//! Invariant: after a switch no statement reaches the former backend, and what survives the process says the same.

use std::collections::BTreeSet;

use bytes::BytesMut;
use e2e::pair::{APP, OTHER, TARGET};
use e2e::wire::Wire;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::NoTls;
use tokio_postgres::fallible_iterator::FallibleIterator;

use crate::stand::{Stand, WHERE, answered, sent, session_pooled};

const TO_GREEN: &str = "SWITCH app TO green WITH (force)";

async fn switch(stand: &Stand) {
    stand.ask("PAUSE app").await;
    stand.ask(TO_GREEN).await;
    stand.ask("RESUME app").await;
}

async fn send(wire: &mut Wire, statements: &[&str]) {
    let mut bytes = BytesMut::new();
    statements.iter().for_each(|sql| frontend::query(sql, &mut bytes).unwrap());
    wire.send(&bytes).await.unwrap();
}

async fn page(stand: &Stand, path: &str) -> String {
    let mut http = tokio::net::TcpStream::connect(("127.0.0.1", stand.proxy.http_port())).await.unwrap();
    http.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut page = String::new();
    http.read_to_string(&mut page).await.unwrap();
    page
}

#[tokio::test]
async fn a_switch_moves_everyone_onto_the_prewarmed_connections() {
    let stand = Stand::start(&[13, 17], |_, _| ()).await;
    let mut clients = Vec::new();
    for _ in 0..5 {
        clients.push(stand.client().await);
        clients.last().unwrap().run("BEGIN").await.unwrap();
    }
    for client in &clients {
        assert_eq!(client.number(WHERE).await.unwrap(), stand.port(0));
        client.run("COMMIT").await.unwrap();
    }
    let verdicts = stand.ask("PREPARE SWITCH app TO green WITH (connections 5)").await;
    let verdict = ["user", "wanted", "open", "status", "sqlstate"].map(|column| verdicts[0].get(column).unwrap_or(""));
    assert_eq!(verdict, [APP, "5", "5", "in", ""]);
    assert_eq!(stand.backend(TARGET, "prewarmed").await, "5");
    let green = stand.servers[1].superuser("app").await.unwrap();
    let pids = async || -> BTreeSet<String> {
        let rows = green.rows("SELECT pid FROM pg_stat_activity WHERE usename = 'app'").await.unwrap();
        rows.iter().map(|row| row.get(0).unwrap().to_owned()).collect()
    };
    let prewarmed = pids().await;
    assert_eq!(prewarmed.len(), 5);
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    let held: Vec<_> =
        clients.into_iter().map(|client| sent(client, "SELECT pg_backend_pid(), pg_sleep(0.2)")).collect();
    stand.gate_says("held_clients", "5").await;
    stand.ask(TO_GREEN).await;
    stand.ask("RESUME app").await;
    let mut served = BTreeSet::new();
    for answer in held {
        served.insert(answered(answer).await.unwrap()[0].get(0).unwrap().to_owned());
    }
    assert_eq!((&served, &pids().await), (&prewarmed, &prewarmed), "no login after the pause");
    let blue = stand.servers[0].superuser("app").await.unwrap();
    blue.until("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'app'", crate::armed::LIMIT).await.unwrap();
    let switches = stand.ask("SHOW SWITCHES").await;
    let row = ["from_backend", "to_backend", "how", "held_clients"].map(|column| switches[0].get(column).unwrap());
    assert_eq!(row, ["blue", "green", "force", "5"]);
}

#[tokio::test]
async fn preparing_says_for_each_user_whether_the_target_lets_it_in() {
    let stand = Stand::start(&[17, 17], |options, _| {
        // Nobody listens there: port 1 is never given out.
        options.backend_port("grey", 1);
    })
    .await;
    stand.client().await.run("SELECT 1").await.unwrap();
    stand.proxy.connect(OTHER).await.unwrap().run("SELECT 1").await.unwrap();
    let green = stand.servers[1].superuser("app").await.unwrap();
    green.run("ALTER ROLE other NOLOGIN").await.unwrap();
    let rows = stand.ask("PREPARE SWITCH app TO green").await;
    let verdict = |user: &str, column: &str| {
        rows.iter().find(|row| row.get("user") == Some(user)).unwrap().get(column).unwrap_or("").to_owned()
    };
    assert_eq!((verdict(APP, "status"), verdict(APP, "sqlstate")), ("in".into(), String::new()));
    assert_eq!((verdict(OTHER, "status"), verdict(OTHER, "sqlstate")), ("refused".into(), "28000".into()));
    assert!(verdict(OTHER, "message").contains("not permitted to log in"));
    let rows = stand.ask("PREPARE SWITCH app TO grey").await;
    assert!(rows.iter().all(|row| row.get("status") == Some("unknown") && !row.get("message").unwrap().is_empty()));
    assert_eq!(stand.refused("PREPARE SWITCH app TO red").await.code().code(), "42704");
}

#[tokio::test]
async fn a_switch_that_is_not_safe_is_refused_with_what_to_do() {
    let stand = Stand::start(&[17, 17], |options, _| session_pooled(options, OTHER)).await;
    let client = stand.client().await;
    client.run("BEGIN").await.unwrap();
    let error = stand.refused(TO_GREEN).await;
    assert_eq!((error.code().code(), error.message()), ("55000", "app is not paused"));
    let pausing = stand.begin("PAUSE app").await;
    stand.gate_says("state", "pausing").await;
    let error = stand.refused(TO_GREEN).await;
    assert_eq!((error.code().code(), error.message()), ("55000", "1 transactions of app are open"));
    client.run("COMMIT").await.unwrap();
    answered(pausing).await.unwrap();
    stand.ask("RESUME app").await;
    let keeper = stand.proxy.connect(OTHER).await.unwrap();
    keeper.run("SELECT 1").await.unwrap();
    stand.ask("PAUSE app").await;
    let error = stand.refused(TO_GREEN).await;
    assert_eq!(error.code().code(), "55000");
    assert!(
        error.message().contains("session-pooled") && error.hint().unwrap().contains("SHOW BLOCKERS app"),
        "{error}"
    );
    assert_eq!(stand.gate("backend").await, "blue");
    assert_eq!(stand.refused("SWITCH app TO red WITH (force)").await.code().code(), "42704");
    drop(keeper);
    stand.ask("RESUME app").await;
    client.run("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn the_route_survives_a_crash_and_wins_over_the_configuration() {
    let mut stand = Stand::start(&[13, 17], |_, _| ()).await;
    switch(&stand).await;
    stand.kill_and_restart().await;
    assert_eq!(stand.client().await.number(WHERE).await.unwrap(), stand.port(1));
    let drift = async |stand: &Stand| {
        let mut shown = Vec::new();
        for backend in ["blue", "green"] {
            shown.push((stand.backend(backend, "active").await, stand.backend(backend, "configured").await));
        }
        assert_eq!(shown, [("no".into(), "yes".into()), ("yes".into(), "no".into())]);
    };
    drift(&stand).await;
    stand.ask("RELOAD").await;
    drift(&stand).await;
    assert_eq!(stand.client().await.number(WHERE).await.unwrap(), stand.port(1));
    assert!(stand.logged("differs from the durable route") && stand.logged("differs from the route"));
}

#[tokio::test]
async fn a_route_that_cannot_be_written_is_an_alarm_and_stops_nothing() {
    let stand = Stand::start(&[13, 17], |_, _| ()).await;
    // Nobody writes into a file as into a directory, root neither.
    let state = stand.proxy.dir().join("state");
    let _ = std::fs::remove_dir_all(state.join("routes"));
    std::fs::write(state.join("routes"), "").unwrap();
    switch(&stand).await;
    assert_eq!(stand.client().await.number(WHERE).await.unwrap(), stand.port(1));
    assert!(stand.logged("ALARM"));
    let metrics = page(&stand, "/metrics").await;
    assert!(metrics.lines().any(|line| line == "pgcutover_route_writes_failed_total 1"), "{metrics}");
}

/// The `server_version` that a client is told in an answer.
fn version(messages: &[Message]) -> Option<String> {
    messages.iter().find_map(|message| {
        let Message::ParameterStatus(body) = message else { return None };
        (body.name().unwrap() == "server_version").then(|| body.value().unwrap().to_owned())
    })
}

#[tokio::test]
async fn live_clients_are_told_the_new_servers_version() {
    let stand = Stand::start(&[13, 17], |_, _| ()).await;
    let mut wire = stand.wire().await;
    assert_eq!(version(&wire.query("SELECT 1").await.unwrap().0), None, "it is what the welcome said");
    switch(&stand).await;
    let told = version(&wire.query("SELECT 1").await.unwrap().0);
    assert!(told.is_some_and(|version| version.starts_with("17")));
    assert_eq!(version(&wire.query("SELECT 1").await.unwrap().0), None, "once");
}

#[tokio::test]
async fn a_client_in_the_middle_of_a_pipeline_moves_at_its_next_transaction() {
    let stand = Stand::start(&[13, 17], |_, _| ()).await;
    let mut wire = stand.wire().await;
    send(&mut wire, &["BEGIN", "SELECT pg_sleep(0.3)"]).await;
    stand.runs(1).await;
    let pausing = stand.begin("PAUSE app").await;
    stand.gate_says("state", "pausing").await;
    send(&mut wire, &[WHERE, "COMMIT", WHERE, WHERE]).await;
    answered(pausing).await.unwrap();
    stand.ask(TO_GREEN).await;
    stand.ask("RESUME app").await;
    let mut ports = Vec::new();
    for _ in 0..6 {
        for message in wire.until_ready().await.unwrap().0 {
            if let Message::DataRow(body) = message {
                let range = body.ranges().next().unwrap().unwrap().unwrap();
                ports.push(String::from_utf8(body.buffer()[range].to_vec()).unwrap());
            }
        }
    }
    let [blue, green] = [0, 1].map(|server| stand.port(server).to_string());
    assert_eq!(ports, ["", &blue, &green, &green]);
}

#[tokio::test]
async fn a_cancel_right_after_a_switch_reaches_the_new_server() {
    let stand = Stand::start(&[13, 17], |_, _| ()).await;
    let client = stand.client().await;
    client.run("SELECT 1").await.unwrap();
    let cancel = client.cancel_token();
    stand.ask("PAUSE app").await;
    let running = sent(client, "SELECT pg_sleep(60)");
    stand.gate_says("held_clients", "1").await;
    stand.ask(TO_GREEN).await;
    stand.ask("RESUME app").await;
    stand.runs(1).await;
    let green = stand.servers[1].superuser("app").await.unwrap();
    let sleeps =
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active')";
    green.until(sleeps, crate::armed::LIMIT).await.unwrap();
    cancel.cancel_query(NoTls).await.unwrap();
    assert_eq!(answered(running).await.unwrap_err().code().code(), "57014");
}
