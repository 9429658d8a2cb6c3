//! Limits hold exactly, and waits end when they are said to.
//!
//! Invariant: what counts is what the server sees (pg_stat_activity), not what the proxy says of itself.

use std::time::{Duration, Instant};

use e2e::client::Client;
use e2e::pair::{APP, DATABASE, OTHER, PairOptions};
use e2e::wire::Wire;
use tokio::io::AsyncReadExt;

use crate::house::{House, LIMIT, run, sqlstate, stdout, user_setting};

/// Server connections of a login.
async fn connections(superuser: &Client, login: &str) -> i64 {
    let count = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{login}'");
    superuser.number(&count).await.unwrap()
}

#[tokio::test]
async fn pool_sizes_are_exact_over_all_workers() {
    let house = House::open(|options| {
        options.setting("workers", 4);
        options.setting("default_pool_size", 7);
        user_setting(options, OTHER, "pool_size", 2);
    })
    .await;
    let superuser = house.superuser().await;
    for (login, size) in [(APP, 7), (OTHER, 2)] {
        let script = house.proxy.dir().join("select.sql");
        // Long enough that the pool is full whenever somebody looks.
        std::fs::write(&script, "SELECT pg_sleep(0.005);\n").unwrap();
        let (dsn, script) = (house.dsn(login), script.display().to_string());
        let load = tokio::spawn(async move {
            run("pgbench", &["-n", "-c", "50", "-j", "2", "-t", "20", "-f", &script, &dsn]).await
        });
        let mut most = 0;
        while !load.is_finished() {
            most = most.max(connections(&superuser, login).await);
        }
        assert!(stdout(&load.await.unwrap()).contains("processed: 1000/1000"));
        assert_eq!(most, size, "{login}");
    }
}

#[tokio::test]
async fn too_many_clients_are_told_so_and_places_come_back() {
    let house = House::open(|options| options.setting("max_client_conn", 3)).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(house.connect(APP).await);
    }
    let error = Client::connect(&house.login(APP)).await.unwrap_err();
    assert_eq!(sqlstate(&error), "53300");
    assert_eq!(house.proxy.ask("SHOW VERSION").await.unwrap().len(), 1, "the admin still gets in");
    drop(clients.pop());
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = Client::connect(&house.login(APP)).await {
        assert!(sqlstate(&error) == "53300" && Instant::now() < deadline);
    }
}

#[tokio::test]
async fn a_limit_of_the_database_is_shared_by_its_users() {
    let house = House::open(|options| {
        options.database(DATABASE).insert("max_db_connections".to_owned(), 2.into());
        // Nothing goes because it was idle for too long.
        options.setting("server_idle_timeout", 0);
    })
    .await;
    let superuser = house.superuser().await;
    let (one, two, three) = (house.connect(APP).await, house.connect(APP).await, house.connect(OTHER).await);
    one.run("BEGIN").await.unwrap();
    two.run("BEGIN").await.unwrap();
    let waiting = tokio::spawn(async move { (three.number("SELECT 3").await, three) });
    one.number("SELECT 1").await.unwrap();
    assert_eq!(connections(&superuser, APP).await + connections(&superuser, OTHER).await, 2);
    assert!(!waiting.is_finished());
    // The connection that comes free is of another user: it has to go for the one who waits.
    one.run("COMMIT").await.unwrap();
    let (answer, three) = tokio::time::timeout(LIMIT, waiting).await.expect("a place came free").unwrap();
    assert_eq!(answer.unwrap(), 3);
    // And one that is already at rest goes at once for whoever asks.
    assert_eq!(tokio::time::timeout(LIMIT, one.number("SELECT 1")).await.expect("evicted").unwrap(), 1);
    assert_eq!((connections(&superuser, APP).await, connections(&superuser, OTHER).await), (2, 0));
    two.run("COMMIT").await.unwrap();
    assert_eq!(tokio::time::timeout(LIMIT, three.number("SELECT 3")).await.expect("evicted").unwrap(), 3);
    // One was enough, and it was the one at rest for the longest.
    assert_eq!((connections(&superuser, APP).await, connections(&superuser, OTHER).await), (1, 1));
}

/// Two users, each with more clients than the limit: whoever rests has to make room, and nobody gets past it. The server
/// itself refuses one too many: it counts at one moment, which a look at its sessions does not.
#[tokio::test]
async fn a_limit_of_the_database_holds_while_its_users_evict_each_other() {
    let mut options = PairOptions::new(17, 17);
    // Its workers would count.
    options.source.settings.push(("autovacuum".to_owned(), "off".to_owned()));
    let house = House::with(options, |options| {
        options.setting("workers", 4);
        options.setting("server_idle_timeout", 0);
        let database = options.database(DATABASE);
        database.insert("max_db_connections".to_owned(), 5.into());
        // The control login would count, too.
        database.remove("control_user");
        database.remove("control_password");
    })
    .await;
    let superuser = house.server.superuser("postgres").await.unwrap();
    superuser.run(&format!("ALTER DATABASE {DATABASE} CONNECTION LIMIT 5")).await.unwrap();
    let script = house.proxy.dir().join("think.sql");
    // Clients that think between two transactions: connections come to rest all the time.
    std::fs::write(&script, "SELECT pg_sleep(0.002);\n\\sleep 5 ms\n").unwrap();
    let script = script.display().to_string();
    let load = [APP, OTHER].map(|login| {
        let (dsn, script) = (house.dsn(login), script.clone());
        tokio::spawn(async move { run("pgbench", &["-n", "-c", "8", "-t", "60", "-f", &script, &dsn]).await })
    });
    for load in load {
        assert!(stdout(&load.await.unwrap()).contains("processed: 480/480"));
    }
    let log = std::fs::read_to_string(house.proxy.log()).unwrap();
    assert!(!log.contains("no server connection"), "{log}");
    let server_log = std::fs::read_to_string(house.server.log()).unwrap();
    assert!(!server_log.contains("too many connections"), "the limit was overrun");
}

#[tokio::test]
async fn a_limit_of_a_user_is_shared_by_the_databases() {
    let house = House::open(|options| {
        options.setting("server_idle_timeout", 0);
        user_setting(options, APP, "max_user_connections", 1);
        let app = options.database(DATABASE).clone();
        *options.database("second") = app;
        for backend in options.database("second")["backends"].as_table_mut().unwrap().iter_mut() {
            backend.1.as_table_mut().unwrap().insert("dbname".to_owned(), DATABASE.into());
        }
    })
    .await;
    let superuser = house.superuser().await;
    let second = Client::connect(house.login(APP).dbname("second")).await.unwrap();
    let (first, other) = (house.connect(APP).await, house.connect(OTHER).await);
    other.number("SELECT 3").await.unwrap();
    for _ in 0..3 {
        for client in [&first, &second] {
            let answer = tokio::time::timeout(LIMIT, client.number("SELECT 1")).await;
            assert_eq!(answer.expect("the other database's connection went").unwrap(), 1);
            assert_eq!(connections(&superuser, APP).await, 1);
        }
    }
    first.run("BEGIN").await.unwrap();
    let waiting = tokio::spawn(async move { second.number("SELECT 2").await });
    first.number("SELECT 1").await.unwrap();
    assert!(!waiting.is_finished(), "one in use is not taken away");
    first.run("COMMIT").await.unwrap();
    assert_eq!(tokio::time::timeout(LIMIT, waiting).await.expect("a place came free").unwrap().unwrap(), 2);
    assert_eq!(connections(&superuser, OTHER).await, 1, "a connection of another user frees nothing: it stays");
}

#[tokio::test]
async fn whoever_waits_too_long_for_a_server_is_told_and_may_retry() {
    let house = House::open(|options| {
        options.setting("default_pool_size", 1);
        options.setting("query_wait_timeout", "300ms");
    })
    .await;
    let (one, two) = (house.connect(APP).await, house.connect(APP).await);
    one.run("BEGIN").await.unwrap();
    let asked_at = Instant::now();
    let error = two.simple_query("SELECT 1").await.unwrap_err();
    assert_eq!(sqlstate(&error), "57P03");
    assert!(asked_at.elapsed() >= Duration::from_millis(300));
    one.run("COMMIT").await.unwrap();
    assert_eq!(two.number("SELECT 1").await.unwrap(), 1);
}

#[tokio::test]
async fn a_client_that_never_logs_in_is_gone_after_the_login_timeout() {
    let house = House::open(|options| options.setting("client_login_timeout", "400ms")).await;
    // Nothing; half a length; a request for TLS; a Startup and then silence at the password.
    let startup = {
        let mut out = bytes::BytesMut::new();
        postgres_protocol::message::frontend::startup_message([("user", APP), ("database", DATABASE)], &mut out)
            .unwrap();
        out
    };
    for said in [&b""[..], &[0, 0], &[0, 0, 0, 8, 4, 210, 22, 47], &startup[..]] {
        let mut wire = Wire::connect(house.proxy.port()).await.unwrap();
        wire.send(said).await.unwrap();
        let mut heard = Vec::new();
        tokio::time::timeout(LIMIT, wire.stream().read_to_end(&mut heard)).await.expect("it is closed").unwrap();
    }
    let rows = house.proxy.ask("SHOW LISTS").await.unwrap();
    let login_clients = rows.iter().find(|row| row.get("list") == Some("login_clients")).unwrap();
    assert_eq!(login_clients.get("items"), Some("0"));
}

#[tokio::test]
async fn idle_and_old_server_connections_are_closed_and_a_floor_is_kept() {
    let mut house = House::open(|options| {
        options.setting("server_idle_timeout", 1);
        options.setting("server_lifetime", 3600);
    })
    .await;
    let superuser = house.superuser().await;
    let none = "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'app'";
    let client = house.connect(APP).await;
    client.number("SELECT 1").await.unwrap();
    assert_eq!(connections(&superuser, APP).await, 1);
    superuser.until(none, LIMIT).await.unwrap();
    // By age: a connection in use is replaced between two transactions.
    house.proxy.options().setting("server_idle_timeout", 600);
    house.proxy.options().setting("server_lifetime", 1);
    house.proxy.write().unwrap();
    house.proxy.ask("RELOAD").await.unwrap();
    let pid = client.number("SELECT pg_backend_pid()").await.unwrap();
    let deadline = Instant::now() + LIMIT;
    while client.number("SELECT pg_backend_pid()").await.unwrap() == pid {
        assert!(Instant::now() < deadline, "a connection older than server_lifetime still serves");
    }
    house.proxy.options().setting("server_lifetime", 3600);
    house.proxy.options().setting("min_pool_size", 3);
    house.proxy.write().unwrap();
    house.proxy.ask("RELOAD").await.unwrap();
    superuser.until("SELECT count(*) = 3 FROM pg_stat_activity WHERE usename = 'app'", LIMIT).await.unwrap();
}

/// The only connection of a full pool grew too old while somebody waited for it: nobody opened its successor.
#[tokio::test]
async fn an_old_connection_that_comes_back_is_replaced_for_whoever_waits() {
    let house = House::open(|options| {
        options.setting("default_pool_size", 1);
        options.setting("server_lifetime", "200ms");
    })
    .await;
    let (one, two) = (house.connect(APP).await, house.connect(APP).await);
    for _ in 0..3 {
        one.run("BEGIN").await.unwrap();
        let waiting = async { two.number("SELECT 2").await.unwrap() };
        let ending = async { one.run("SELECT pg_sleep(0.3); COMMIT").await.unwrap() };
        let both = async { tokio::join!(waiting, ending) };
        tokio::time::timeout(LIMIT, both).await.expect("the one who waits is served");
    }
}

#[tokio::test]
async fn a_server_that_ends_connections_at_rest_is_not_noticed_and_in_use_gives_one_clean_error() {
    let mut house = House::open(|_| ()).await;
    let superuser = house.superuser().await;
    let client = house.connect(APP).await;
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app'";
    for _ in 0..5 {
        client.number("SELECT 1").await.unwrap();
        assert_eq!(superuser.number(kill).await.unwrap(), 1);
        superuser.until("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'app'", LIMIT).await.unwrap();
    }
    assert_eq!(client.number("SELECT 1").await.unwrap(), 1);
    // In use: the server's own words arrive.
    let busy = house.connect(APP).await;
    let killing = async {
        let active =
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
        superuser.until(active, LIMIT).await.unwrap();
        superuser.number(kill).await.unwrap()
    };
    let (outcome, _) = tokio::join!(busy.simple_query("SELECT pg_sleep(60)"), killing);
    assert_eq!(sqlstate(&outcome.unwrap_err()), "57P01");
    assert_eq!(client.number("SELECT 1").await.unwrap(), 1);
    // A server that restarts while nobody asks is not noticed.
    let others = [house.connect(APP).await, house.connect(OTHER).await];
    for other in &others {
        other.number("SELECT 1").await.unwrap();
    }
    house.server.restart().await.unwrap();
    for other in &others {
        assert_eq!(other.number("SELECT 1").await.unwrap(), 1);
    }
    assert_eq!(client.number("SELECT 1").await.unwrap(), 1);
}
