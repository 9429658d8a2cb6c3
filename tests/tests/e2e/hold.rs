//! What a pause means to a client: it waits, and everything else about its connection goes on.
//!
//! Invariant: what a held client has sent is answered once and in order, or refused with a retryable error; its connection
//! lives.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use bytes::BytesMut;
use e2e::binaries::Binaries;
use e2e::errors::tally;
use e2e::ledger::{Sides, audit};
use e2e::pair::{OTHER, Pair, PairOptions};
use e2e::stage::{Serving, Stage};
use e2e::wire::Wire;
use e2e::workload::{Workload, WorkloadOptions};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::NoTls;
use tokio_postgres::fallible_iterator::FallibleIterator;

use crate::armed::LIMIT;
use crate::stand::{Stand, answered, eventually, hasty, refusal, said, sent, session_pooled};

const NO_LIMITS: &str = "PAUSE app WITH (drain '5s', lease '9s')";

async fn sent_raw(wire: &mut Wire, statements: &[&str]) {
    let mut bytes = BytesMut::new();
    statements.iter().for_each(|sql| frontend::query(sql, &mut bytes).unwrap());
    wire.send(&bytes).await.unwrap();
}

/// The first column of the rows of an answer.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
fn values(messages: &[Message]) -> Vec<String> {
    let value = |message: &Message| match message {
        Message::DataRow(body) => {
            let range = body.ranges().next().unwrap().unwrap().unwrap();
            Some(String::from_utf8(body.buffer()[range].to_vec()).unwrap())
        }
        _ => None,
    };
    messages.iter().filter_map(value).collect()
}

#[tokio::test]
async fn a_held_client_that_cancels_is_answered_and_lives_on() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = Arc::new(stand.client().await);
    stand.ask("PAUSE app").await;
    let held = Arc::clone(&client);
    let waiting = tokio::spawn(async move { refusal(&held, "SELECT 1; SELECT 2").await });
    stand.gate_says("held_clients", "1").await;
    client.cancel_token().cancel_query(NoTls).await.unwrap();
    assert_eq!(waiting.await.unwrap().code().code(), "57014");
    assert_eq!(stand.gate("held_clients").await, "0");
    stand.ask("RESUME app").await;
    client.run("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn a_held_client_that_hangs_up_frees_its_place_at_once() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let mut wire = stand.wire().await;
    stand.ask("PAUSE app").await;
    sent_raw(&mut wire, &["SELECT 1"]).await;
    stand.gate_says("held_clients", "1").await;
    drop(wire);
    stand.gate_says("held_clients", "0").await;
    eventually("it is gone", async || stand.ask("SHOW SESSIONS").await.is_empty()).await;
}

#[tokio::test]
async fn a_client_that_is_held_for_too_long_is_told_to_try_again_and_lives_on() {
    let stand = Stand::start(&[17], |options, _| {
        hasty(options);
        options.setting("hold_budget", "900ms");
    })
    .await;
    let mut wire = stand.wire().await;
    stand.ask("PAUSE app").await;
    sent_raw(&mut wire, &["SELECT 1", "SELECT 2"]).await;
    for _ in 0..2 {
        let (answer, status) = wire.until_ready().await.unwrap();
        assert_eq!((said(&answer), status), (vec!["57P03".to_owned()], b'I'));
    }
    stand.ask("RESUME app").await;
    assert_eq!(values(&wire.query("SELECT 3").await.unwrap().0), ["3"]);
}

#[tokio::test]
async fn a_paused_proxy_welcomes_logins_and_is_ready() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    stand.gate_says("control", "yes").await;
    stand.ask("PAUSE app").await;
    // Nobody has logged in before: the control login has learnt the welcome.
    let client = stand.client().await;
    // Its welcome may reach it before it is listed.
    let idle = async || stand.ask("SHOW SESSIONS").await.first().is_some_and(|row| row.get("state") == Some("idle"));
    eventually("its session is listed", idle).await;
    let mut http = tokio::net::TcpStream::connect(("127.0.0.1", stand.proxy.http_port())).await.unwrap();
    http.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").await.unwrap();
    let mut page = String::new();
    http.read_to_string(&mut page).await.unwrap();
    assert!(page.lines().next().unwrap().contains("200"), "{page}");
    let held = sent(client, "SELECT 1");
    stand.gate_says("held_clients", "1").await;
    stand.ask("RESUME app").await;
    answered(held).await.unwrap();
}

#[tokio::test]
async fn a_held_session_whose_lock_an_open_transaction_waits_for_is_let_through() {
    let stand = Stand::start(&[17], |options, _| session_pooled(options, OTHER)).await;
    let owner = stand.proxy.connect(OTHER).await.unwrap();
    owner.run("SELECT pg_advisory_lock(1)").await.unwrap();
    let waiting = sent(stand.client().await, "BEGIN; SELECT pg_advisory_lock(1); SELECT pg_advisory_unlock(1); COMMIT");
    let superuser = stand.servers[0].superuser("app").await.unwrap();
    superuser.until("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)", LIMIT).await.unwrap();
    let pausing = stand.begin(NO_LIMITS).await;
    stand.gate_says("state", "pausing").await;
    let unlocking = sent(owner, "SELECT pg_advisory_unlock(1)");
    answered(unlocking).await.unwrap();
    answered(waiting).await.unwrap();
    answered(pausing).await.unwrap();
    assert_eq!(stand.gate("drained").await, "yes");
    // From here on nobody is let through any more.
    let late = sent(stand.client().await, "SELECT 1");
    stand.gate_says("held_clients", "1").await;
    stand.ask("RESUME app").await;
    answered(late).await.unwrap();
}

#[tokio::test]
async fn an_open_transaction_goes_on_statement_by_statement_to_its_commit() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let client = stand.client().await;
    client.run("BEGIN").await.unwrap();
    client.run("INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 1)").await.unwrap();
    let pausing = stand.begin("PAUSE app").await;
    stand.gate_says("state", "pausing").await;
    client.run("UPDATE accounts SET abalance = 1 WHERE aid = 1").await.unwrap();
    assert_eq!(client.query_typed("SELECT n FROM ledger", &[]).await.unwrap().len(), 1);
    client.run("SAVEPOINT a; ROLLBACK TO a").await.unwrap();
    assert!(!pausing.is_finished());
    client.run("COMMIT").await.unwrap();
    answered(pausing).await.unwrap();
    let next = sent(client, "BEGIN");
    stand.gate_says("held_clients", "1").await;
    stand.ask("RESUME app").await;
    answered(next).await.unwrap();
}

#[tokio::test]
async fn what_is_pipelined_into_a_transaction_ends_it_and_what_follows_is_held() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let mut wire = stand.wire().await;
    sent_raw(&mut wire, &["BEGIN", "SELECT 1", "SELECT pg_sleep(0.3)"]).await;
    stand.runs(1).await;
    let pausing = stand.begin("PAUSE app").await;
    stand.gate_says("state", "pausing").await;
    // One write: from here on they pass one by one.
    sent_raw(&mut wire, &["SELECT 2", "COMMIT", "SELECT 3", "SELECT 4"]).await;
    answered(pausing).await.unwrap();
    stand.gate_says("held_clients", "1").await;
    let mut seen = Vec::new();
    for status in [b'T', b'T', b'T', b'T', b'I'] {
        let (answer, at) = wire.until_ready().await.unwrap();
        assert_eq!(at, status);
        seen.extend(values(&answer));
    }
    stand.ask("RESUME app").await;
    for _ in 0..2 {
        seen.extend(values(&wire.until_ready().await.unwrap().0));
    }
    assert_eq!(seen, ["1", "", "2", "3", "4"]);
}

/// Keeps a hundred simple queries in flight; each answer has to be the next one's.
async fn pipeline(mut wire: Wire, stop: Arc<AtomicBool>, done: Arc<AtomicI64>) -> i64 {
    let mut in_flight = VecDeque::new();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) || !in_flight.is_empty() {
        let mut bytes = BytesMut::new();
        while in_flight.len() < 100 && !stop.load(Ordering::Relaxed) {
            n += 1;
            in_flight.push_back(n);
            let sql = format!("INSERT INTO ledger (client, n, aid, delta) VALUES (7, {n}, 1, 0) RETURNING n");
            frontend::query(&sql, &mut bytes).unwrap();
        }
        wire.send(&bytes).await.unwrap();
        let (answer, _) = wire.until_ready().await.unwrap();
        assert_eq!(values(&answer), [in_flight.pop_front().unwrap().to_string()], "{:?}", said(&answer));
        done.fetch_add(1, Ordering::Relaxed);
    }
    n
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_always_has_a_hundred_requests_in_flight_drains_and_loses_none() {
    let stand = Stand::start(&[17], |_, _| ()).await;
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let simple = tokio::spawn(pipeline(stand.wire().await, Arc::clone(&stop), Arc::clone(&done)));
    let mut options = WorkloadOptions::new(vec![stand.proxy.port()], 0);
    (options.probes, options.pipelining) = (0, (1, 100));
    let extended = Workload::start(&options).await.unwrap();
    for _ in 0..5 {
        let before = done.load(Ordering::Relaxed);
        extended.acknowledges(300, LIMIT).await.unwrap();
        eventually("simple requests are answered", async || done.load(Ordering::Relaxed) > before + 300).await;
        stand.ask("PAUSE app WITH (drain '2s', lease '4s')").await;
        assert_eq!((stand.gate("drained").await, stand.gate("open_transactions").await), ("yes".into(), "0".into()));
        stand.gate_says("held_clients", "2").await;
        stand.ask("RESUME app").await;
    }
    stop.store(true, Ordering::Relaxed);
    let sent = simple.await.unwrap();
    let outcome = extended.stop().await.unwrap();
    assert!(outcome.errors().is_empty(), "{:?}", tally(&outcome.errors()));
    let superuser = stand.servers[0].superuser("app").await.unwrap();
    let rows = "SELECT count(*) || ' ' || count(DISTINCT n) || ' ' || max(n) FROM ledger WHERE client = 7";
    assert_eq!(superuser.text(rows).await.unwrap(), Some(format!("{sent} {sent} {sent}")));
    superuser.run("DELETE FROM ledger WHERE client = 7").await.unwrap();
    let sides = Sides { serving: &superuser, other: None, moves: 0 };
    let audit = audit(&outcome.notes(), sides).await.unwrap();
    assert!(audit.is_clean(), "{audit}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_idle_and_fifty_active_clients_hold_through_a_cutover() {
    let pair = Pair::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17)).await.unwrap();
    let mut stage = Stage::with(pair, 1, |options| options.setting("max_client_conn", 1000)).await.unwrap();
    // Tests share a machine: what they measure is not the stall.
    stage.control.budget(&[("stall", "10s")]);
    let mut options = WorkloadOptions::new(stage.ports(), 50);
    (options.idle, options.probes) = (500, 0);
    let load = Workload::start(&options).await.unwrap();
    load.acknowledges(300, LIMIT).await.unwrap();
    let finished = stage.control.run(&["cutover"], LIMIT * 2).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    load.acknowledges(300, LIMIT).await.unwrap();
    let outcome = load.stop().await.unwrap();
    assert!(outcome.errors().is_empty(), "{:?}", tally(&outcome.errors()));
    assert_eq!(outcome.records.len(), 550);
    let audit = stage.audit(&outcome.notes(), Serving::Target).await.unwrap();
    assert!(audit.is_clean(), "{audit}");
}
