//! Cancel requests: they end the statement of the client that sent them, wherever it waits, and nobody else's.
//!
//! Invariant: a client that never cancels never sees 57014.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use e2e::binaries::Binaries;
use e2e::pair::{APP, DATABASE, PairOptions, SOURCE, TARGET, password, single};
use e2e::proxy::{Proxy, ProxyOptions};
use tokio_postgres::NoTls;
use tokio_util::sync::CancellationToken;

use crate::house::{House, LIMIT, sqlstate, until};

#[tokio::test]
async fn a_running_query_is_cancelled_and_its_client_goes_on() {
    let house = House::open(|options| options.setting("default_pool_size", 1)).await;
    let superuser = house.superuser().await;
    let client = house.connect(APP).await;
    let token = client.cancel_token();
    let canceling = async {
        let active =
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
        superuser.until(active, LIMIT).await.unwrap();
        token.cancel_query(NoTls).await.unwrap();
    };
    let (outcome, ()) = tokio::join!(client.simple_query("SELECT pg_sleep(60)"), canceling);
    assert_eq!(sqlstate(&outcome.unwrap_err()), "57014");
    assert_eq!(client.number("SELECT 1").await.unwrap(), 1);
    // At rest there is nothing to cancel: neither the owner nor the next user of the connection is hit.
    let next = house.connect(APP).await;
    for _ in 0..20 {
        token.cancel_query(NoTls).await.unwrap();
        assert_eq!(next.number("SELECT 1").await.unwrap(), 1);
    }
    assert_eq!(client.number("SELECT 1").await.unwrap(), 1);
}

#[tokio::test]
async fn a_statement_that_waits_for_a_server_connection_is_cancelled_at_once() {
    let house = House::open(|options| options.setting("default_pool_size", 1)).await;
    let owner = house.connect(APP).await;
    owner.run("BEGIN").await.unwrap();
    let waiting = house.connect(APP).await;
    let token = waiting.cancel_token();
    let canceling = async {
        until("a client waits", async || {
            let pools = house.proxy.ask("SHOW POOLS").await.unwrap();
            pools.iter().any(|row| row.get("database") == Some(DATABASE) && row.get("cl_waiting") == Some("1"))
        })
        .await;
        token.cancel_query(NoTls).await.unwrap();
    };
    let (outcome, ()) = tokio::join!(waiting.simple_query("SELECT 1"), canceling);
    assert_eq!(sqlstate(&outcome.unwrap_err()), "57014");
    owner.run("COMMIT").await.unwrap();
    assert_eq!(waiting.number("SELECT 2").await.unwrap(), 2);
    assert_eq!(owner.number("SELECT 3").await.unwrap(), 3);
}

/// What one client sent, and what hit it.
#[derive(Default)]
struct Tally {
    sent: AtomicU32,
    seen: AtomicU32,
}

#[tokio::test]
async fn of_many_clients_only_those_that_cancel_are_cancelled() {
    const CLIENTS: usize = 16;
    const HITS: u32 = 60;
    let house = House::open(|options| options.setting("default_pool_size", 3)).await;
    let stop = CancellationToken::new();
    let tallies: Arc<Vec<Tally>> = Arc::new((0..CLIENTS).map(|_| Tally::default()).collect());
    let mut tasks = Vec::new();
    for index in 0..CLIENTS {
        let client = house.connect(APP).await;
        let token = client.cancel_token();
        let (stop, tallies) = (stop.clone(), Arc::clone(&tallies));
        tasks.push(tokio::spawn(async move {
            let tally = &tallies[index];
            while !stop.is_cancelled() {
                // Every other client cancels, sometimes while it is served, sometimes while it waits, sometimes too late.
                let cancels = index % 2 == 0;
                let canceling = async {
                    if cancels {
                        tally.sent.fetch_add(1, Ordering::Relaxed);
                        token.cancel_query(NoTls).await.unwrap();
                    }
                };
                let (outcome, ()) = tokio::join!(client.simple_query("SELECT pg_sleep(0.004)"), canceling);
                if let Err(error) = outcome {
                    assert_eq!(sqlstate(&error), "57014");
                    tally.seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
    }
    until("cancels have hit", async || {
        tallies.iter().map(|tally| tally.seen.load(Ordering::Relaxed)).sum::<u32>() >= HITS
            || tasks.iter().any(|task| task.is_finished())
    })
    .await;
    stop.cancel();
    for task in tasks {
        task.await.unwrap();
    }
    for (index, tally) in tallies.iter().enumerate() {
        let (sent, seen) = (tally.sent.load(Ordering::Relaxed), tally.seen.load(Ordering::Relaxed));
        assert!(seen <= sent, "client {index} sent {sent} cancels and was hit {seen} times");
    }
}

/// Connections change hands all the time, and the database its server: whoever does not cancel is never hit.
#[tokio::test]
async fn no_cancel_hits_a_stranger_while_the_database_goes_back_and_forth() {
    const CLIENTS: usize = 12;
    const MOVES: u32 = 24;
    const ENOUGH: u32 = 100;
    let (binaries, options) = (Binaries::of(&[17]).unwrap(), PairOptions::new(17, 17));
    let (blue, green) = tokio::try_join!(single(&binaries, &options), single(&binaries, &options)).unwrap();
    let mut options = ProxyOptions::for_backends(&[(SOURCE, blue.port()), (TARGET, green.port())], 1).unwrap();
    options.users.push(format!("\"{APP}\" \"{}\"", password(APP)));
    options.setting("default_pool_size", 2);
    let proxy = Proxy::start(options).await.unwrap();
    let stop = CancellationToken::new();
    let counts: Arc<[AtomicU32; 2]> = Arc::default();
    let mut tasks = Vec::new();
    for index in 0..CLIENTS {
        let client = proxy.connect(APP).await.unwrap();
        let (stop, token, counts) = (stop.clone(), client.cancel_token(), Arc::clone(&counts));
        let cancels = index % 2 == 0;
        tasks.push(tokio::spawn(async move {
            while !stop.is_cancelled() {
                // Some cancels come while it is held or waits, some while it is served, some when its server serves another.
                let canceling = async {
                    if cancels {
                        token.cancel_query(NoTls).await.unwrap();
                    }
                };
                match tokio::join!(client.simple_query("SELECT pg_sleep(0.002)"), canceling).0 {
                    Ok(_) if cancels => {}
                    Ok(_) => {
                        counts[0].fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) if sqlstate(&error) == "57014" && cancels => {
                        counts[1].fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => panic!("client {index}: {error}"),
                }
            }
        }));
    }
    let admin = proxy.admin().await.unwrap();
    let moves = AtomicU32::new(0);
    until("strangers were served and cancels have hit, over many moves", async || {
        let turn = moves.fetch_add(1, Ordering::Relaxed);
        let backend = if turn.is_multiple_of(2) { TARGET } else { SOURCE };
        admin.run("PAUSE app").await.unwrap();
        admin.run(&format!("SWITCH app TO {backend} WITH (force)")).await.unwrap();
        admin.run("RESUME app").await.unwrap();
        let enough = counts.iter().all(|count| count.load(Ordering::Relaxed) >= ENOUGH);
        (enough && turn >= MOVES) || tasks.iter().any(tokio::task::JoinHandle::is_finished)
    })
    .await;
    stop.cancel();
    for task in tasks {
        task.await.unwrap();
    }
}

/// The server's answer to a cancel request is lost: nobody knows whether the signal is still to come, so the connection
/// serves its client to the end and nobody after it.
#[tokio::test]
async fn a_server_that_a_cancel_may_still_hit_serves_nobody_else() {
    let house = House::open(|options| options.setting("default_pool_size", 1)).await;
    let client = house.connect(APP).await;
    let pid = "SELECT pg_backend_pid()";
    let before = client.number(pid).await.unwrap();
    assert_eq!(client.number(pid).await.unwrap(), before);
    let token = client.cancel_token();
    client.run("BEGIN").await.unwrap();
    // The postmaster answers nobody; the session goes on.
    let postmaster = nix::unistd::Pid::from_raw(house.server.pid().unwrap().cast_signed());
    nix::sys::signal::kill(postmaster, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let canceling = token.cancel_query(NoTls);
    let working = async {
        until("the cancel request was given up", async || {
            std::fs::read_to_string(house.proxy.log()).unwrap().contains("nobody knows whether a cancel request")
        })
        .await;
        client.run("COMMIT").await
    };
    let (_, committed) = tokio::join!(canceling, working);
    nix::sys::signal::kill(postmaster, nix::sys::signal::Signal::SIGCONT).unwrap();
    committed.unwrap();
    assert_ne!(client.number(pid).await.unwrap(), before);
}
