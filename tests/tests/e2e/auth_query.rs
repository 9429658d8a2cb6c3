//! Users that the user file does not name are looked up on the active backend, and their own proof opens it.
//!
//! Invariant: the proxy's user file holds the console's users and whoever asks; a client's password is on servers only.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Error;
use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::cluster::Cluster;
use e2e::pair::{APP, DATABASE, OTHER, PROXY, PairOptions, SOURCE, TARGET, password, single};
use e2e::proxy::{Proxy, ProxyOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_postgres::Config;

use crate::house::{House, LIMIT, run, sqlstate, stderr, stdout, until};

/// Who asks.
const ASKER: &str = "asker";

/// What an asker needs; the README says so.
async fn allow_asker(server: &Cluster) {
    let superuser = server.superuser(DATABASE).await.unwrap();
    let rights = "SELECT (rolname, rolpassword, rolvaliduntil, rolcanlogin) ON pg_catalog.pg_authid";
    superuser
        .run(&format!("CREATE ROLE {ASKER} LOGIN PASSWORD '{}'; GRANT {rights} TO {ASKER}", password(ASKER)))
        .await
        .unwrap();
}

/// The console's users and the asker are all that the proxy knows.
fn only_asker(options: &mut ProxyOptions) {
    options.users.retain(|line| !line.starts_with(&format!("\"{APP}\"")) && !line.starts_with(&format!("\"{OTHER}\"")));
    options.users.push(format!("\"{ASKER}\" \"{}\"", password(ASKER)));
    options.setting("auth_user", ASKER);
}

async fn open(change: impl FnOnce(&mut ProxyOptions)) -> House {
    let house = House::open(|options| {
        only_asker(options);
        change(options);
    })
    .await;
    allow_asker(&house.server).await;
    house
}

fn login(proxy: &Proxy, user: &str, secret: &str) -> Config {
    let mut config = Config::new();
    config.host("127.0.0.1").port(proxy.port()).user(user).password(secret).dbname(DATABASE).connect_timeout(LIMIT);
    config
}

/// Logs in and asks who it is.
async fn enter(proxy: &Proxy, user: &str, secret: &str) -> Result<String, Error> {
    let client = Client::connect(&login(proxy, user, secret)).await?;
    Ok(client.text("SELECT current_user").await?.unwrap_or_default())
}

async fn refused(proxy: &Proxy, user: &str, secret: &str) -> String {
    let error = Client::connect(&login(proxy, user, secret)).await.unwrap_err();
    sqlstate(&error).to_owned()
}

#[tokio::test]
async fn whoever_may_log_in_to_the_server_may_log_in_here_and_nobody_else() {
    let house = open(|_| ()).await;
    let superuser = house.superuser().await;
    let odd = "we\"ird'; DROP ROLE app; -- $1";
    superuser
        .run(&format!(
            "CREATE ROLE \"{}\" LOGIN PASSWORD 'odd'; GRANT CONNECT ON DATABASE app TO PUBLIC;
             CREATE ROLE barred NOLOGIN PASSWORD 'secret';
             CREATE ROLE expired LOGIN PASSWORD 'secret' VALID UNTIL '2001-01-01';
             CREATE ROLE valid LOGIN PASSWORD 'secret' VALID UNTIL '2101-01-01';
             CREATE ROLE passwordless LOGIN",
            odd.replace('"', "\"\"")
        ))
        .await
        .unwrap();
    for (user, secret) in [(APP, password(APP)), (odd, "odd".to_owned()), ("valid", "secret".to_owned())] {
        assert_eq!(enter(&house.proxy, user, &secret).await.unwrap(), user);
    }
    for (user, secret) in [
        (APP, "wrong"),
        ("stranger", "secret"),
        ("barred", "secret"),
        ("expired", "secret"),
        ("passwordless", ""),
        ("App", "app-secret"),
        ("' OR true --", "secret"),
    ] {
        assert_eq!(refused(&house.proxy, user, secret).await, "28P01", "{user}");
    }
    assert_eq!(superuser.number("SELECT count(*) FROM pg_roles WHERE rolname = 'app'").await.unwrap(), 1);
}

#[tokio::test]
async fn a_change_of_a_user_counts_at_its_next_login() {
    let house = open(|_| ()).await;
    let superuser = house.superuser().await;
    superuser.run("CREATE ROLE passing LOGIN PASSWORD 'first'").await.unwrap();
    let early = Client::connect(&login(&house.proxy, "passing", "first")).await.unwrap();
    early.run("SELECT 1").await.unwrap();

    superuser.run("ALTER ROLE passing PASSWORD 'second'").await.unwrap();
    assert_eq!(refused(&house.proxy, "passing", "first").await, "28P01");
    assert_eq!(enter(&house.proxy, "passing", "second").await.unwrap(), "passing");
    // A pool whose key is the former one learns the new one with the login: its next connection uses it.
    house.proxy.ask("RECONNECT").await.unwrap();
    assert_eq!(enter(&house.proxy, "passing", "second").await.unwrap(), "passing");

    superuser.run("ALTER ROLE passing NOLOGIN").await.unwrap();
    assert_eq!(refused(&house.proxy, "passing", "second").await, "28P01");
    drop(early);
    superuser.run("DROP ROLE passing").await.unwrap();
    assert_eq!(refused(&house.proxy, "passing", "second").await, "28P01");
}

#[tokio::test]
async fn the_user_file_wins_over_the_server() {
    let house = open(|options| options.users.push(format!("\"{APP}\" \"from the file\""))).await;
    assert_eq!(refused(&house.proxy, APP, &password(APP)).await, "28P01");
    // Its proof is right here; the server is shown the file's password and knows another.
    let error = match Client::connect(&login(&house.proxy, APP, "from the file")).await {
        Ok(client) => client.simple_query("SELECT 1").await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(sqlstate(&error), "28P01");
    assert_eq!(enter(&house.proxy, OTHER, &password(OTHER)).await.unwrap(), OTHER);
}

/// The asker's own connection must be what the operator made it: a search_path of a client's would let the client choose
/// what the question's names mean.
#[tokio::test]
async fn nothing_of_a_client_but_its_name_reaches_the_question() {
    let house = open(|options| {
        let query = "SELECT rolname, CASE WHEN current_setting('search_path') = '\"$user\", public' \
                     AND current_setting('work_mem') = '4MB' AND current_setting('application_name') = 'pgcutover auth_query' \
                     AND current_setting('transaction_read_only') = 'on' AND current_user = 'asker' \
                     THEN rolpassword END FROM pg_authid WHERE rolname = $1";
        options.setting("auth_query", query);
    })
    .await;
    for _ in 0..2 {
        let dsn = format!("{} options='-c search_path=evil -c work_mem=9MB' application_name=mine", house.dsn(APP));
        let said =
            stdout(&house.psql(&dsn, "SELECT current_setting('search_path') || current_setting('work_mem')").await);
        assert_eq!(said.trim(), "evil9MB");
    }
}

#[tokio::test]
async fn a_question_that_fails_is_told_at_once_and_logged() {
    let mut house = House::open(only_asker).await;
    let log = house.proxy.log();
    let mut wrong = Vec::new();
    // Nobody of that name, then no right, then questions that make no sense.
    wrong.push(refused(&house.proxy, APP, &password(APP)).await);
    allow_asker(&house.server).await;
    let superuser = house.superuser().await;
    superuser.run(&format!("REVOKE ALL ON pg_catalog.pg_authid FROM {ASKER}")).await.unwrap();
    wrong.push(refused(&house.proxy, APP, &password(APP)).await);
    for query in [
        "SELECT rolname FROM pg_roles WHERE rolname = $1",
        "SELECT $1::text, 'x' FROM generate_series(1, 2)",
        "SELECT $1::text, 'SCRAM-SHA-256$nonsense'",
        "CREATE TABLE mine AS SELECT $1::text, 'x'",
        "SELECT no_such_column FROM pg_roles WHERE rolname = $1",
    ] {
        house.proxy.options().setting("auth_query", query);
        house.proxy.reload().unwrap();
        until("the question is taken over", async || {
            let rows = house.proxy.ask("SHOW CONFIG").await.unwrap();
            rows.iter().any(|row| row.get("key") == Some("auth_query") && row.get("value") == Some(query))
        })
        .await;
        wrong.push(refused(&house.proxy, APP, &password(APP)).await);
    }
    assert_eq!(wrong, ["28000"; 7]);
    let log = fs::read_to_string(log).unwrap();
    for words in ["permission denied for table pg_authid", "two columns", "more than one row", "malformed", "no_such"] {
        assert!(log.contains(words), "{words}: {log}");
    }
}

#[tokio::test]
async fn a_slow_question_ends_by_its_own_limit_and_keeps_nobody_else_out() {
    let house = open(|options| {
        let query = "SELECT $1::text, rolpassword FROM pg_authid, \
                     LATERAL (SELECT pg_sleep(CASE $1 WHEN 'app' THEN 60 ELSE 0 END)) s WHERE rolname = $1";
        options.setting("auth_query", query);
    })
    .await;
    let began = Instant::now();
    let (app, other) = (password(APP), password(OTHER));
    let slow = refused(&house.proxy, APP, &app);
    let quick = async {
        let who = enter(&house.proxy, OTHER, &other).await.unwrap();
        (who, began.elapsed())
    };
    let (sqlstate, (who, took)) = tokio::join!(slow, quick);
    assert_eq!((sqlstate.as_str(), who.as_str()), ("57P03", OTHER));
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    // The server does not go on with it either.
    let left = "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'asker' AND state = 'active'";
    house.superuser().await.until(left, LIMIT).await.unwrap();
}

#[tokio::test]
async fn during_a_pause_users_log_in_and_are_held_even_if_the_server_is_away() {
    let mut house = open(|_| ()).await;
    assert_eq!(enter(&house.proxy, APP, &password(APP)).await.unwrap(), APP);
    let admin = house.proxy.admin().await.unwrap();
    admin.run("PAUSE app").await.unwrap();
    // The gate is shut; the question is none that it holds. What follows it is.
    let held = Client::connect(&login(&house.proxy, OTHER, &password(OTHER))).await.unwrap();
    assert_eq!(refused(&house.proxy, OTHER, "wrong").await, "28P01");
    house.server.stop(e2e::cluster::Stop::Fast);
    // Known from before.
    let away = Client::connect(&login(&house.proxy, APP, &password(APP))).await.unwrap();
    assert_eq!(refused(&house.proxy, APP, "wrong").await, "28P01");
    // Not known: waits for the server.
    let proxy = &house.proxy;
    let unanswered = || fs::read_to_string(proxy.log()).unwrap().matches("no answer to auth_query").count();
    let before = unanswered();
    let late = async {
        let fresh = Client::connect(&login(proxy, PROXY, &password(PROXY))).await.unwrap();
        fresh.text("SELECT current_user").await.unwrap().unwrap_or_default()
    };
    let server = &mut house.server;
    let back = async {
        until("a question finds no server", async || unanswered() > before).await;
        server.restart().await.unwrap();
        admin.run("RESUME app").await.unwrap();
        (held.text("SELECT current_user").await.unwrap(), away.text("SELECT current_user").await.unwrap())
    };
    let (late, (held, away)) = tokio::join!(late, back);
    assert_eq!((late.as_str(), held.as_deref(), away.as_deref()), (PROXY, Some(OTHER), Some(APP)));
}

/// A connection that says it is the asker's: a question. Others find nobody.
async fn question(port: &TcpListener) -> TcpStream {
    let asked = async {
        loop {
            let (mut socket, _) = port.accept().await.unwrap();
            let mut startup = vec![0; 1024];
            let mut length = socket.read(&mut startup).await.unwrap();
            // An SSLRequest.
            if length == 8 {
                socket.write_all(b"N").await.unwrap();
                length = socket.read(&mut startup).await.unwrap();
            }
            if startup[..length].windows(ASKER.len() + 1).any(|bytes| bytes == format!("{ASKER}\0").as_bytes()) {
                return socket;
            }
        }
    };
    tokio::time::timeout(LIMIT, asked).await.expect("nobody asks")
}

#[tokio::test]
async fn a_question_that_breaks_when_its_pause_is_over_is_asked_again() {
    let mut house = open(|_| ()).await;
    assert_eq!(enter(&house.proxy, APP, &password(APP)).await.unwrap(), APP);
    let admin = house.proxy.admin().await.unwrap();
    admin.run("PAUSE app").await.unwrap();
    house.server.stop(e2e::cluster::Stop::Fast);
    // In the server's place somebody who never answers.
    let port = TcpListener::bind(("127.0.0.1", house.server.port())).await.unwrap();
    let secret = password(OTHER);
    let login = refused(&house.proxy, OTHER, &secret);
    let questions = async {
        let first = question(&port).await;
        admin.run("RESUME app").await.unwrap();
        drop(first);
        // This one was not asked in a pause: it is the last.
        drop(question(&port).await);
        drop(port);
    };
    let (sqlstate, ()) = tokio::join!(login, questions);
    assert_eq!(sqlstate, "57P03");
}

/// Two servers that know the user by different passwords: the one that is active is asked.
#[tokio::test]
async fn after_a_switch_the_new_server_is_asked() {
    let (binaries, options) = (Binaries::of(&[17]).unwrap(), PairOptions::new(17, 17));
    let (blue, green) = tokio::try_join!(single(&binaries, &options), single(&binaries, &options)).unwrap();
    allow_asker(&blue).await;
    allow_asker(&green).await;
    green.superuser(DATABASE).await.unwrap().run(&format!("ALTER ROLE {APP} PASSWORD 'green'")).await.unwrap();
    let mut options = ProxyOptions::for_backends(&[(SOURCE, blue.port()), (TARGET, green.port())], 1).unwrap();
    only_asker(&mut options);
    let proxy = Proxy::start(options).await.unwrap();
    assert_eq!(enter(&proxy, APP, &password(APP)).await.unwrap(), APP);
    assert_eq!(refused(&proxy, APP, "green").await, "28P01");

    let admin = proxy.admin().await.unwrap();
    admin.run("PAUSE app").await.unwrap();
    admin.run("SWITCH app TO green WITH (force)").await.unwrap();
    // Still held, and the route has moved.
    let held = Client::connect(&login(&proxy, APP, "green")).await.unwrap();
    admin.run("RESUME app").await.unwrap();
    held.run("SELECT 1").await.unwrap();
    assert_eq!(enter(&proxy, APP, "green").await.unwrap(), APP);
    assert_eq!(refused(&proxy, APP, &password(APP)).await, "28P01");
    let asks = format!("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = '{ASKER}'");
    blue.superuser(DATABASE).await.unwrap().until(&asks, LIMIT).await.unwrap();
}

#[tokio::test]
async fn another_database_can_be_asked_and_the_control_login_can_ask() {
    let house = House::open(|options| {
        only_asker(options);
        options.users.retain(|line| !line.starts_with("\"asker\""));
        // The control login of the database that is asked, whose password the configuration has.
        options.setting("auth_user", PROXY);
        options.setting("auth_dbname", DATABASE);
        let twin = options.database(DATABASE).clone();
        *options.database("twin") = twin;
        let twin = options.database("twin");
        twin.remove("control_user");
        twin.remove("control_password");
        let backends = twin["backends"].as_table_mut().unwrap();
        backends[SOURCE].as_table_mut().unwrap().insert("dbname".to_owned(), DATABASE.into());
    })
    .await;
    let rights = "SELECT (rolname, rolpassword, rolvaliduntil, rolcanlogin) ON pg_catalog.pg_authid";
    house.superuser().await.run(&format!("GRANT {rights} TO {PROXY}")).await.unwrap();
    assert_eq!(enter(&house.proxy, APP, &password(APP)).await.unwrap(), APP);
    let dsn = house.dsn(OTHER).replace("dbname=app", "dbname=twin");
    assert_eq!(stdout(&house.psql(&dsn, "SELECT current_user").await).trim(), OTHER);
    // The console's users are in the file, or nowhere.
    let console = house.dsn(OTHER).replace("dbname=app", "dbname=pgcutover");
    let error = stderr(&run("psql", &["-X", "-w", "-d", &console, "-c", "SHOW VERSION"]).await);
    assert!(error.contains("password authentication failed"), "{error}");
}
