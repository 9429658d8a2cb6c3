//! The end of a pause that many clients waited in: they are let go in order, and open no more connections than a pool has.
//!
//! Invariant: what counts is what the server saw: its log of logins, and the numbers that it dealt out.

use e2e::client::Client;
use e2e::pair::{APP, PairOptions};

use crate::house::{House, until};

/// Logins that the server has accepted.
fn logins(house: &House) -> usize {
    let log = std::fs::read_to_string(house.server.log()).unwrap();
    log.lines().filter(|line| line.contains("connection authorized") && line.contains(&format!("user={APP} "))).count()
}

async fn held(admin: &Client) -> String {
    admin.rows("SHOW GATES").await.unwrap()[0].get("held_clients").unwrap_or_default().to_owned()
}

/// So many clients of two workers are held, one after the other, and let go; the places at which they were served.
async fn released(house: &House, clients: usize, statement: &'static str) -> Vec<usize> {
    house.superuser().await.run("CREATE SEQUENCE turn; GRANT USAGE ON SEQUENCE turn TO PUBLIC").await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..clients {
        waiting.push(house.connect(APP).await);
    }
    // PgBouncer's PAUSE closes what is at rest: every connection after it is a new one.
    let admin = house.proxy.admin().await.unwrap();
    admin.run("PAUSE app").await.unwrap();
    let mut sent = Vec::new();
    for (at, client) in waiting.into_iter().enumerate() {
        sent.push(tokio::spawn(async move { (client.number(statement).await, client) }));
        until("it is held", || async { held(&admin).await == (at + 1).to_string() }).await;
    }
    admin.run("RESUME app").await.unwrap();
    let mut places = Vec::new();
    for answer in sent {
        let (place, _client) = answer.await.unwrap();
        places.push(usize::try_from(place.unwrap()).unwrap() - 1);
    }
    places
}

async fn house(pool: i64) -> House {
    let mut options = PairOptions::new(17, 17);
    options.source.settings.push(("log_connections".to_owned(), "on".to_owned()));
    House::with(options, |options| {
        options.setting("default_pool_size", pool);
        options.setting("max_client_conn", 1000);
        options.setting("workers", 2);
        options.setting("hold_budget", "60s");
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_held_clients_open_one_pool_of_connections() {
    let house = house(20).await;
    // A statement that lasts: whoever comes later finds the pool in use.
    let places = released(&house, 500, "SELECT nextval('turn')::bigint FROM pg_sleep(0.002)").await;
    assert_eq!(places.len(), 500);
    // The first login of all, before the pause, told what a welcome says.
    let opened = logins(&house);
    assert!((1..=21).contains(&opened), "{opened} connections were opened for a pool of 20");
}

/// With one connection the order of service is the server's own. Woken on two threads, one half would come before the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_clients_are_served_in_the_order_in_which_they_came() {
    let house = house(1).await;
    let places = released(&house, 100, "SELECT nextval('turn')::bigint FROM pg_sleep(0.005)").await;
    let furthest = places.iter().enumerate().map(|(came, served)| served.abs_diff(came)).max();
    // A waiter of the worker that gives the connection back may overtake four; a thread that wakes late costs a few places.
    assert!(furthest < Some(25), "somebody was served {furthest:?} places from where it stood: {places:?}");
}
