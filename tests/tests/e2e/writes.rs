//! PAUSE … WITH (mode writes): reads flow, writes wait, and afterwards everything is as before.
//!
//! Invariant: a write that was held runs once, in its turn; nothing that a connection was told for the pause is seen by a
//! client afterwards.

use std::sync::Arc;

use bytes::BytesMut;
use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::pair::{APP, OTHER, Pair, PairOptions, password};
use e2e::stage::Stage;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio_postgres::{Config, NoTls};

use crate::armed::LIMIT;
use crate::stand::{Stand, WHERE, answered, eventually, hasty, refusal, said, sent, session_pooled};

const HOLD: &str = "PAUSE app WITH (mode writes)";

const MODE: &str = "SHOW transaction_read_only";

const OWN: &str = "SHOW default_transaction_read_only";

fn insert(n: i32) -> String {
    format!("INSERT INTO ledger (client, n, aid, delta) VALUES (1, {n}, 1, 0)")
}

async fn written(stand: &Stand) -> Vec<String> {
    let superuser = stand.servers[0].superuser("app").await.unwrap();
    let rows = superuser.rows("SELECT n FROM ledger ORDER BY id").await.unwrap();
    rows.iter().map(|row| row.get(0).unwrap().to_owned()).collect()
}

/// Settings that a client is told.
fn told(answer: &[Message]) -> usize {
    answer.iter().filter(|message| matches!(message, Message::ParameterStatus(_))).count()
}

async fn own(client: &Client) -> String {
    client.text(OWN).await.unwrap().unwrap()
}

async fn mode(client: &Client) -> String {
    client.text(MODE).await.unwrap().unwrap()
}

#[tokio::test]
async fn reads_flow_while_writes_wait_and_then_run_once_in_order() {
    for major in [13, 17] {
        let stand = Stand::start(&[major], |options, _| {
            options.setting("default_pool_size", 1);
            options.setting("workers", 1);
        })
        .await;
        let (reader, mut zone) = (stand.client().await, stand.wire().await);
        assert_eq!(mode(&reader).await, "off");
        zone.query("SET TimeZone = 'Asia/Tokyo'").await.unwrap();
        stand.ask(HOLD).await;
        assert_eq!(told(&zone.query("SELECT 1").await.unwrap().0), 0, "it has been told of its own doing");
        let gate = ["state", "mode", "drained", "owner"];
        let mut shown = Vec::new();
        for column in gate {
            shown.push(stand.gate(column).await);
        }
        assert_eq!(shown[..3], ["paused", "writes", "yes"]);
        assert!(shown[3].starts_with("admin@"), "{shown:?}");
        // More clients than the pool has connections: whoever waits owns none.
        let mut held = Vec::new();
        for n in 1..=4 {
            held.push(sent(stand.client().await, &insert(n)));
            stand.gate_says("held_clients", &n.to_string()).await;
        }
        let prepared = stand.client().await;
        let select = prepared.prepare("SELECT count(*) FROM ledger").await.unwrap();
        for _ in 0..5 {
            assert_eq!(prepared.query_one(&select, &[]).await.unwrap().get::<_, i64>(0), 0);
            assert_eq!((mode(&reader).await.as_str(), own(&reader).await.as_str()), ("on", "off"));
            assert_eq!(
                told(&zone.query("SELECT 1").await.unwrap().0),
                0,
                "what is done in our name is no client's business"
            );
        }
        // A connection that is opened during the pause, by a user who had none, is in the mode too.
        let other = stand.proxy.connect(OTHER).await.unwrap();
        assert_eq!(mode(&other).await, "on");
        stand.ask("RESUME app").await;
        for answer in held {
            answered(answer).await.unwrap();
        }
        assert_eq!(written(&stand).await, ["1", "2", "3", "4"], "{major}");
        assert_eq!(told(&zone.query("SELECT 1").await.unwrap().0), 0);
        for client in [&reader, &prepared, &other] {
            assert_eq!((mode(client).await.as_str(), own(client).await.as_str()), ("off", "off"), "{major}");
        }
        assert_eq!((stand.gate("state").await, stand.gate("held_clients").await), ("open".into(), "0".into()));
        assert_eq!(stand.refused("RESUME app").await.message(), "database app is not paused");
    }
}

#[tokio::test]
async fn what_a_driver_prepared_before_waits_too_in_either_way_of_pooling() {
    let stand = Stand::start(&[13], |options, _| {
        session_pooled(options, OTHER);
        // Nothing that would take our mode back by itself.
        options.setting("server_reset_query", "SELECT 1");
    })
    .await;
    let sql = "INSERT INTO ledger (client, n, aid, delta) VALUES (1, $1, 1, 0) RETURNING n";
    let mut clients = Vec::new();
    for user in [APP, OTHER] {
        let client = Arc::new(stand.proxy.connect(user).await.unwrap());
        clients.push((client.prepare(sql).await.unwrap(), client));
    }
    stand.ask(HOLD).await;
    let mut held = Vec::new();
    for (n, (statement, client)) in (1_i64..).zip(&clients) {
        let (statement, client) = (statement.clone(), Arc::clone(client));
        held.push(tokio::spawn(
            async move { client.query_one(&statement, &[&n]).await.map(|row| row.get::<_, i64>(0)) },
        ));
        stand.gate_says("held_clients", &n.to_string()).await;
    }
    // One that is not prepared yet, in one batch with its parameters.
    let late = stand.client().await;
    let unnamed =
        tokio::spawn(async move { late.execute_typed(sql, &[(&3_i64, tokio_postgres::types::Type::INT8)]).await });
    stand.gate_says("held_clients", "3").await;
    assert!(written(&stand).await.is_empty());
    let leaver = stand.proxy.connect(OTHER).await.unwrap();
    assert_eq!(mode(&leaver).await, "on");
    drop(leaver);
    let at_rest = async || {
        stand
            .ask("SHOW POOLS")
            .await
            .iter()
            .any(|pool| pool.get("user") == Some(OTHER) && pool.get("sv_idle") == Some("1"))
    };
    eventually("its connection is at rest", at_rest).await;
    stand.ask("RESUME app").await;
    assert_eq!(mode(&stand.proxy.connect(OTHER).await.unwrap()).await, "off");
    for (n, held) in (1_i64..).zip(held) {
        assert_eq!(held.await.unwrap().unwrap(), n);
    }
    assert_eq!(unnamed.await.unwrap().unwrap(), 1);
    let mut all = written(&stand).await;
    all.sort();
    assert_eq!(all, ["1", "2", "3"]);
}

#[tokio::test]
async fn a_write_that_nobody_could_foresee_is_refused_with_advice() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let superuser = stand.servers[0].superuser("app").await.unwrap();
    let body = insert(9);
    superuser
        .run(&format!("CREATE FUNCTION sly() RETURNS int LANGUAGE plpgsql AS $$BEGIN {body}; RETURN 1; END$$"))
        .await
        .unwrap();
    stand.ask(HOLD).await;
    let client = stand.client().await;
    let hinted = |error: tokio_postgres::error::DbError| {
        assert_eq!(error.code().code(), "25006", "{error}");
        let hint = error.hint().unwrap_or_default().to_owned();
        assert!(hint.contains("paused by admin;") && !hint.contains('@'), "{hint}");
    };
    hinted(refusal(&client, "SELECT sly()").await);
    let error = client.query_typed("SELECT sly()", &[]).await.unwrap_err();
    hinted(error.as_db_error().unwrap().clone());
    // A transaction block: what it has read was answered, so it can't be begun again.
    client.run("BEGIN; SELECT 1").await.unwrap();
    hinted(refusal(&client, &insert(1)).await);
    client.run("ROLLBACK").await.unwrap();
    // Who wants to write all the same does: it is a courtesy.
    client.run("BEGIN READ WRITE").await.unwrap();
    client.run(&insert(2)).await.unwrap();
    client.run("COMMIT").await.unwrap();
    assert_eq!(refusal(&client, "SELECT 1 / 0").await.hint(), None);
    assert_eq!(mode(&client).await, "on");
    stand.ask("RESUME app").await;
    client.run("SELECT sly()").await.unwrap();
    assert_eq!(written(&stand).await, ["2", "9"]);
}

#[tokio::test]
async fn by_policy_writes_are_declined_and_nobody_waits() {
    let stand = Stand::start(&[17], |options, _| {
        options.database("app").insert("writes_policy".to_owned(), "decline".into());
    })
    .await;
    stand.ask(HOLD).await;
    let client = stand.client().await;
    for sql in [&*insert(1), "COPY ledger FROM STDIN", "TRUNCATE ledger", "CREATE TABLE x (a int)"] {
        let error = refusal(&client, sql).await;
        assert_eq!(error.code().code(), "25006", "{sql}: {error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("paused by admin")), "{error:?}");
    }
    assert_eq!(client.number("SELECT count(*) FROM ledger").await.unwrap(), 0);
    stand.ask("RESUME app").await;
    client.run(&insert(1)).await.unwrap();
}

/// A session's own wish about the mode, before, during and after.
#[tokio::test]
async fn a_clients_own_mode_is_respected_and_given_back() {
    for major in [13, 17] {
        let stand = Stand::start(&[major], |options, _| session_pooled(options, OTHER)).await;
        let asks = async |user: &str, wish: &str| {
            let mut config = Config::new();
            config.host("127.0.0.1").port(stand.proxy.port()).user(user).password(password(user)).dbname("app");
            config.options(format!("-c default_transaction_read_only={wish}"));
            Client::connect(&config).await.unwrap()
        };
        let session = stand.proxy.connect(OTHER).await.unwrap();
        session.run("SET default_transaction_read_only = on").await.unwrap();
        let later = stand.proxy.connect(OTHER).await.unwrap();
        let (pooled, kept) = (asks(APP, "yes").await, asks(OTHER, "on").await);
        let plain = stand.client().await;
        for client in [&later, &plain] {
            assert_eq!((mode(client).await.as_str(), own(client).await.as_str()), ("off", "off"));
        }
        stand.ask(HOLD).await;
        for client in [&session, &pooled, &kept, &later, &plain] {
            assert_eq!(mode(client).await, "on", "{major}");
        }
        for (client, wish) in [(&session, "on"), (&pooled, "on"), (&kept, "on"), (&later, "off"), (&plain, "off")] {
            assert_eq!(own(client).await, wish, "{major}: each sees its own");
        }
        // What a session sets meanwhile stays.
        later.run("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY").await.unwrap();
        assert_eq!((mode(&later).await.as_str(), mode(&plain).await.as_str()), ("on", "on"));
        // A change that is rolled back leaves nothing.
        plain.run("BEGIN; SELECT 1").await.unwrap();
        plain.run("SET default_transaction_read_only = off").await.unwrap();
        plain.run("ROLLBACK").await.unwrap();
        stand.ask("RESUME app").await;
        for client in [&session, &pooled, &kept, &later] {
            assert_eq!((mode(client).await.as_str(), own(client).await.as_str()), ("on", "on"), "{major}");
        }
        for client in [&plain, &stand.client().await, &stand.proxy.connect(OTHER).await.unwrap()] {
            assert_eq!((mode(client).await.as_str(), own(client).await.as_str()), ("off", "off"), "{major}");
        }
        later.run("SET default_transaction_read_only = off").await.unwrap();
        later.run(&insert(1)).await.unwrap();
    }
}

/// What a session was told for the pause does not move with it; the pause itself stays where clients go.
#[tokio::test]
async fn a_session_moves_as_its_client_has_made_it() {
    let stand = Stand::start(&[13, 17], |options, _| session_pooled(options, OTHER)).await;
    let (client, wish) = (stand.proxy.connect(OTHER).await.unwrap(), stand.proxy.connect(OTHER).await.unwrap());
    wish.run("SET default_transaction_read_only = on").await.unwrap();
    stand.ask(HOLD).await;
    for client in [&client, &wish] {
        assert_eq!(mode(client).await, "on");
    }
    for command in ["PAUSE app", "TRANSPLANT app TO green WITH (force)", "SWITCH app TO green WITH (force)"] {
        stand.ask(command).await;
    }
    stand.ask("RESUME app WITH (force)").await;
    assert_eq!((stand.gate("mode").await.as_str(), stand.gate("backend").await.as_str()), ("writes", "green"));
    for (client, wanted) in [(&client, "off"), (&wish, "on")] {
        // First of all, before it is put into the mode again.
        assert_eq!((own(client).await.as_str(), mode(client).await.as_str()), (wanted, "on"));
        assert_eq!(client.number(WHERE).await.unwrap(), stand.port(1));
    }
    stand.ask("RESUME app").await;
    assert_eq!((mode(&client).await.as_str(), mode(&wish).await.as_str()), ("off", "on"));
    client.run(&insert(1)).await.unwrap();
}

/// A run knows nothing of it, and whom a person holds goes on being held, on the other server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_comes_and_goes_above_a_pause_of_writes() {
    let pair = Pair::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17)).await.unwrap();
    let mut stage = Stage::with(pair, 1, |options| options.setting("hold_budget", "60s")).await.unwrap();
    // Tests share a machine: what they measure is not the stall.
    stage.control.budget(&[("stall", "10s")]);
    let (reader, writer) = (stage.proxies[0].connect(APP).await.unwrap(), stage.proxies[0].connect(APP).await.unwrap());
    stage.proxies[0].admin().await.unwrap().rows(HOLD).await.unwrap();
    assert_eq!(mode(&reader).await, "on");
    let held = sent(writer, &insert(7));
    let finished = stage.control.run(&["cutover"], LIMIT * 2).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    assert_eq!(reader.number(WHERE).await.unwrap(), i64::from(stage.pair.target.port()));
    assert_eq!((mode(&reader).await.as_str(), held.is_finished()), ("on", false));
    stage.proxies[0].admin().await.unwrap().rows("RESUME app").await.unwrap();
    answered(held).await.unwrap();
    assert_eq!(reader.number("SELECT count(*) FROM ledger WHERE n = 7").await.unwrap(), 1);
    assert_eq!(mode(&reader).await, "off");
}

#[tokio::test]
async fn a_held_write_is_cancelled_shed_and_forgotten_like_any_held_client() {
    let stand = Stand::start(&[17], |options, _| {
        hasty(options);
        options.setting("hold_budget", "1500ms");
    })
    .await;
    stand.ask(HOLD).await;
    let client = Arc::new(stand.client().await);
    let held = Arc::clone(&client);
    let waiting = tokio::spawn(async move { refusal(&held, &insert(1)).await });
    stand.gate_says("held_clients", "1").await;
    client.cancel_token().cancel_query(NoTls).await.unwrap();
    assert_eq!(waiting.await.unwrap().code().code(), "57014");
    assert_eq!(mode(&client).await, "on", "it lives on");
    let mut wire = stand.wire().await;
    let mut bytes = BytesMut::new();
    frontend::query(&insert(2), &mut bytes).unwrap();
    // In two pieces: the verb has to be seen first.
    wire.send(&bytes[..8]).await.unwrap();
    wire.send(&bytes[8..]).await.unwrap();
    stand.gate_says("held_clients", "1").await;
    drop(wire);
    stand.gate_says("held_clients", "0").await;
    assert_eq!(refusal(&client, &insert(3)).await.code().code(), "57P03");
    let mut wire = stand.wire().await;
    let mut bytes = BytesMut::new();
    for sql in ["SELECT 1", &insert(4), "SELECT 2"] {
        frontend::query(sql, &mut bytes).unwrap();
    }
    // Pipelined: each has its own turn.
    wire.send(&bytes).await.unwrap();
    assert_eq!(said(&wire.until_ready().await.unwrap().0), ["SELECT 1"]);
    stand.gate_says("held_clients", "1").await;
    stand.ask("RESUME app").await;
    assert_eq!(said(&wire.until_ready().await.unwrap().0), ["INSERT 0 1"]);
    assert_eq!(said(&wire.until_ready().await.unwrap().0), ["SELECT 1"]);
    assert_eq!(written(&stand).await, ["4"]);
}

#[tokio::test]
async fn it_waits_for_what_began_before_and_for_nothing_else() {
    let stand = Stand::start(&[17], |options, _| session_pooled(options, OTHER)).await;
    let (open, idle) = (stand.client().await, stand.proxy.connect(OTHER).await.unwrap());
    idle.run("SELECT 1").await.unwrap();
    open.run("BEGIN").await.unwrap();
    let pausing = stand.begin("PAUSE app WITH (mode writes, drain '5s')").await;
    stand.gate_says("state", "pausing").await;
    let reader = stand.client().await;
    reader.run("BEGIN; SELECT 1").await.unwrap();
    let blockers = stand.ask("SHOW BLOCKERS app").await;
    assert_eq!((blockers.len(), blockers[0].get("reason")), (1, Some("transaction")), "{blockers:?}");
    open.run(&insert(1)).await.unwrap();
    assert!(!pausing.is_finished());
    open.run("COMMIT").await.unwrap();
    answered(pausing).await.unwrap();
    assert_eq!(mode(&open).await, "on");
    // Who reads meanwhile is no blocker, but is one of a pause of everything, which both need not wait for each other.
    assert!(stand.ask("SHOW BLOCKERS app").await.is_empty());
    let all = stand.begin("PAUSE app").await;
    stand.gate_says("mode", "all").await;
    reader.run("COMMIT").await.unwrap();
    answered(all).await.unwrap();
    stand.ask("RESUME app").await;
    assert_eq!((stand.gate("state").await, mode(&open).await), ("open".into(), "off".into()));
    // What does not end in time: nothing is held then, and only what began before is ended.
    open.run("BEGIN").await.unwrap();
    assert_eq!(stand.refused("PAUSE app WITH (mode writes, drain '100ms')").await.code().code(), "55P03");
    assert_eq!((stand.gate("state").await, mode(&idle).await), ("open".into(), "off".into()));
    let ending = stand.begin("PAUSE app WITH (mode writes, drain '1s', on_timeout terminate)").await;
    stand.gate_says("state", "pausing").await;
    let reader = stand.client().await;
    reader.run("BEGIN; SELECT 1").await.unwrap();
    answered(ending).await.unwrap();
    assert!(open.simple_query("SELECT 1").await.is_err());
    reader.run("COMMIT").await.unwrap();
}

#[tokio::test]
async fn it_ends_by_its_lease_or_with_an_admin_who_goes_before_it_is_complete() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = stand.client().await;
    client.run("BEGIN").await.unwrap();
    let mut console = stand.console().await;
    let mut query = BytesMut::new();
    frontend::query("PAUSE app WITH (mode writes, drain '9s')", &mut query).unwrap();
    console.send(&query).await.unwrap();
    stand.gate_says("state", "pausing").await;
    drop(console);
    stand.gate_says("state", "open").await;
    client.run(&format!("{}; COMMIT", insert(1))).await.unwrap();
    // Complete, it stays when its admin goes; it has the lease that it was given.
    stand.proxy.admin().await.unwrap().rows("PAUSE app WITH (mode writes, lease '2500ms')").await.unwrap();
    let held = sent(client, &insert(2));
    stand.gate_says("held_clients", "1").await;
    assert_eq!(stand.refused(HOLD).await.code().code(), "55000", "there is one already");
    answered(held).await.unwrap();
    stand.gate_says("state", "open").await;
    assert_eq!(written(&stand).await, ["1", "2"]);
    let run = "run '8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f', epoch 7, source 'blue', target 'green'";
    let error = stand.refused(&format!("PAUSE app WITH ({run}, mode writes)")).await;
    assert!(error.message().contains("a run pauses everything"), "{error}");
    eventually("nothing is held", async || stand.gate("held_clients").await == "0").await;
    assert!(
        stand.proxy.admin().await.unwrap().rows("PAUSE app WITH (mode writes, drain '2s', lease '1s')").await.is_err()
    );
}
