//! The admin console, visited with psql, with the driver, and as pgbouncer_exporter does.
//!
//! Invariant: a verb that was answered with its tag has done what it says; one that was refused has changed nothing.

use std::fs;
use std::time::Duration;

use e2e::client::Client;
use e2e::pair::{APP, DATABASE, OTHER, password};
use e2e::proxy::{ADMIN, STATS};
use nix::sys::signal::Signal;
use tokio_postgres::error::DbError;

use crate::house::{House, LIMIT, run, sqlstate, stderr, stdout, table, until};

/// Every table that PgBouncer has, but FDS and MEM's like, and ours.
const TABLES: [&str; 24] = [
    "VERSION",
    "STATE",
    "DATABASES",
    "POOLS",
    "PEERS",
    "PEER_POOLS",
    "CLIENTS",
    "SERVERS",
    "SOCKETS",
    "ACTIVE_SOCKETS",
    "USERS",
    "LISTS",
    "CONFIG",
    "STATS",
    "STATS_TOTALS",
    "STATS_AVERAGES",
    "TOTALS",
    "MEM",
    "GATES",
    "BACKENDS",
    "SESSIONS",
    "BLOCKERS",
    "SWITCHES",
    "PAUSES",
];

fn console_dsn(house: &House, user: &str) -> String {
    house.dsn(user).replace("dbname=app", "dbname=pgbouncer")
}

async fn refusal(console: &Client, command: &str) -> DbError {
    match console.simple_query(command).await {
        Ok(_) => panic!("{command} was not refused"),
        Err(error) => error.as_db_error().unwrap_or_else(|| panic!("{command}: {error}")).clone(),
    }
}

#[tokio::test]
async fn psql_shows_every_table_to_those_who_may_look() {
    let house = House::open(|_| ()).await;
    let client = house.connect(APP).await;
    client.run("BEGIN").await.unwrap();
    for user in [ADMIN, STATS] {
        let dsn = console_dsn(&house, user);
        let shows = TABLES.map(|name| format!("SHOW {name};"));
        let mut arguments = vec!["-X", "-v", "ON_ERROR_STOP=1", "-d", &dsn];
        shows.iter().for_each(|show| arguments.extend(["-c", show]));
        let shown = stdout(&run("psql", &arguments).await);
        assert!(shown.matches(" row").count() >= TABLES.len(), "{shown}");
    }
    let console = house.proxy.admin().await.unwrap();
    for name in TABLES {
        console.simple_query(&format!("SHOW {name}")).await.unwrap();
    }
    let blockers = console.rows("SHOW BLOCKERS app").await.unwrap();
    assert_eq!((blockers.len(), blockers[0].get("user"), blockers[0].get("state")), (1, Some(APP), Some("T")));
    assert!(refusal(&console, "SHOW FDS").await.message().len() > 4);
    // The extended protocol is refused with words, and the visit goes on or ends by them.
    let error = console.query("SHOW VERSION", &[]).await.unwrap_err();
    assert!(error.as_db_error().unwrap().message().contains("extended query"), "{error:?}");
}

/// What pgbouncer_exporter sends on a scrape, with the columns that it reads as numbers.
#[tokio::test]
async fn the_queries_of_pgbouncer_exporter_are_answered_with_the_types_it_parses() {
    let house = House::open(|_| ()).await;
    house.connect(APP).await.number("SELECT 1").await.unwrap();
    let console = Client::connect(house.login(STATS).dbname("pgbouncer")).await.unwrap();
    let numbers = [
        ("SHOW LISTS", &["items"][..]),
        (
            "SHOW DATABASES",
            &["pool_size", "reserve_pool_size", "max_connections", "current_connections", "paused", "disabled"],
        ),
        (
            "SHOW STATS_TOTALS",
            &[
                "query_count",
                "query_time",
                "bytes_received",
                "bytes_sent",
                "wait_time",
                "xact_count",
                "xact_time",
                "client_parse_count",
                "server_parse_count",
                "bind_count",
                "server_assignment_count",
            ],
        ),
        (
            "SHOW POOLS",
            &[
                "cl_active",
                "cl_waiting",
                "cl_active_cancel_req",
                "cl_waiting_cancel_req",
                "sv_active",
                "sv_active_cancel",
                "sv_being_canceled",
                "sv_idle",
                "sv_used",
                "sv_tested",
                "sv_login",
                "maxwait",
                "maxwait_us",
            ],
        ),
    ];
    for (command, columns) in numbers {
        let rows = console.rows(command).await.unwrap();
        assert!(!rows.is_empty(), "{command}");
        for row in &rows {
            for column in columns {
                assert!(
                    row.get(*column).is_some_and(|cell| cell.parse::<f64>().is_ok()),
                    "{command}: {column} in {row:?}"
                );
            }
        }
    }
    let version = console.rows("SHOW VERSION").await.unwrap();
    assert_eq!((version.len(), version[0].columns().len(), version[0].columns()[0].name()), (1, 1, "version"));
    let config = console.rows("SHOW CONFIG").await.unwrap();
    for key in ["max_client_conn", "max_user_connections"] {
        let row = config.iter().find(|row| row.get("key") == Some(key)).unwrap_or_else(|| panic!("no {key}"));
        assert!(row.get("value").unwrap().parse::<f64>().is_ok());
    }
    let clients = console.rows("SHOW CLIENTS").await.unwrap();
    assert!(clients.iter().all(|row| ["database", "user", "state"].iter().all(|name| row.get(*name).is_some())));
    let totals = console.rows("SHOW STATS_TOTALS").await.unwrap();
    let ours = totals.iter().find(|row| row.get("database") == Some(DATABASE)).unwrap();
    assert_eq!((ours.get("xact_count"), ours.get("query_count")), (Some("1"), Some("1")));
    console.rows("SHOW STATS").await.unwrap();
}

#[tokio::test]
async fn who_may_look_may_not_touch_and_others_may_not_even_look() {
    let house = House::open(|_| ()).await;
    let stats = Client::connect(house.login(STATS).dbname("pgbouncer")).await.unwrap();
    for command in [
        "PAUSE",
        "RESUME",
        "RELOAD",
        "RECONNECT",
        "KILL app",
        "KILL_CLIENT 1",
        "DISABLE app",
        "ENABLE app",
        "SHUTDOWN",
        "SET default_pool_size = 3",
        "PREPARE SWITCH app TO blue",
        "SWITCH app TO blue WITH (force)",
        "WAIT_CLOSE",
    ] {
        assert_eq!(refusal(&stats, command).await.code().code(), "42501", "{command}");
    }
    let error = Client::connect(house.login(APP).dbname("pgbouncer")).await.unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    let mut wrong = house.login(ADMIN);
    let error = Client::connect(wrong.password("guess").dbname("pgcutover")).await.unwrap_err();
    assert_eq!(sqlstate(&error), "28P01");
}

#[tokio::test]
async fn wrong_commands_are_answered_with_the_right_form() {
    let house = House::open(|_| ()).await;
    let console = house.proxy.admin().await.unwrap();
    for (command, sqlstate, advice) in [
        ("PAUS", "42601", "PAUSE"),
        ("SHOW POOL", "42601", "POOLS"),
        ("PAUSE app WITH (drian '1s')", "42601", "drain"),
        ("SWITCH app blue", "42601", "SWITCH"),
        ("PAUSE nowhere", "08P01", "nowhere"),
        ("RESUME", "08P01", "not paused"),
        ("KILL_CLIENT x", "42601", "KILL_CLIENT"),
        ("SET no_such_key = 1", "08P01", "no_such_key"),
        ("SELECT 1", "42601", ""),
        ("DISABLE", "42601", "DISABLE"),
        ("SHOW BLOCKERS nowhere", "42704", "nowhere"),
    ] {
        let error = refusal(&console, command).await;
        let words = format!("{} {}", error.message(), error.hint().unwrap_or_default());
        assert!(words.to_lowercase().contains(&advice.to_lowercase()), "{command}: {words}");
        let code = error.code().code();
        assert!(code == sqlstate || code == "42601" || code == "08P01" || code == "42704", "{command}: {code} {words}");
    }
    assert_eq!(console.rows("SHOW VERSION").await.unwrap().len(), 1);
}

#[tokio::test]
async fn disable_kill_client_and_reconnect_do_what_they_say() {
    let house = House::open(|_| ()).await;
    let console = house.proxy.admin().await.unwrap();
    let (one, two) = (house.connect(APP).await, house.connect(OTHER).await);
    let pid = one.number("SELECT pg_backend_pid()").await.unwrap();
    console.simple_query("DISABLE app").await.unwrap();
    let error = Client::connect(&house.login(APP)).await.unwrap_err();
    assert_eq!(sqlstate(&error), "57P03");
    assert_eq!(one.number("SELECT 1").await.unwrap(), 1, "who is inside goes on");
    console.simple_query("ENABLE app").await.unwrap();
    house.connect(APP).await;
    console.simple_query("RECONNECT app").await.unwrap();
    assert_ne!(one.number("SELECT pg_backend_pid()").await.unwrap(), pid);
    let clients = console.rows("SHOW CLIENTS").await.unwrap();
    let id = clients.iter().find(|row| row.get("user") == Some(OTHER)).unwrap().get("id").unwrap().to_owned();
    console.simple_query(&format!("KILL_CLIENT {id}")).await.unwrap();
    until("the killed client is gone", async || two.simple_query("SELECT 1").await.is_err()).await;
    assert_eq!(one.number("SELECT 1").await.unwrap(), 1);
}

#[tokio::test]
async fn a_wrong_file_is_refused_whole_and_a_right_one_applied() {
    let mut house = House::open(|options| options.setting("default_pool_size", 1)).await;
    let console = house.proxy.admin().await.unwrap();
    let client = house.connect(APP).await;
    let right = fs::read_to_string(house.proxy.config_file()).unwrap();
    for (wrong, words) in [
        (right.replace("default_pool_size", "defualt_pool_size"), ["defualt_pool_size", "default_pool_size"]),
        (right.replace("pool_mode = \"transaction\"", "pool_mode = \"statement\""), ["pool_mode", "transaction"]),
        (right.replace("active = \"blue\"", "active = \"bleu\""), ["bleu", "blue"]),
        (right.replace("[pgcutover]", "[pgcutover"), ["pgcutover.toml", ""]),
        (
            right.replace("[pgcutover]", "[pgcutover]\npause_lease = \"1s\"\ndrain_timeout = \"5s\""),
            ["drain_timeout", "pause_lease"],
        ),
    ] {
        assert_ne!(wrong, right, "{words:?}");
        fs::write(house.proxy.config_file(), &wrong).unwrap();
        let error = refusal(&console, "RELOAD").await;
        let said =
            format!("{} {} {}", error.message(), error.detail().unwrap_or_default(), error.hint().unwrap_or_default());
        assert!(words.iter().all(|word| said.contains(word)) && said.contains("pgcutover.toml"), "{words:?}: {said}");
        assert_eq!(client.number("SELECT 1").await.unwrap(), 1);
    }
    // By signal: the log says why, and the running configuration goes on.
    fs::write(house.proxy.config_file(), right.replace("default_pool_size", "defualt_pool_size")).unwrap();
    house.proxy.signal(Signal::SIGHUP).unwrap();
    let log = house.proxy.log();
    until("a refusal in the log", async || fs::read_to_string(&log).unwrap().contains("defualt_pool_size")).await;
    assert_eq!(client.number("SELECT 1").await.unwrap(), 1);
    // A right one: a second database, a larger pool, another user.
    let options = house.proxy.options();
    options.setting("default_pool_size", 2);
    let mut copy = options.database(DATABASE).clone();
    table(table(&mut copy, "backends"), "blue").insert("dbname".to_owned(), DATABASE.into());
    *options.database("second") = copy;
    options.users.push(format!("\"late\" \"{}\"", password("late")));
    house.proxy.reload().unwrap();
    until("the second database serves", async || {
        let mut login = house.login(APP);
        let Ok(second) = Client::connect(login.dbname("second")).await else { return false };
        second.number("SELECT 2").await.unwrap() == 2
    })
    .await;
    let (a, b) = (house.connect(APP).await, house.connect(APP).await);
    a.run("BEGIN").await.unwrap();
    tokio::time::timeout(LIMIT, b.run("BEGIN; COMMIT")).await.expect("a second connection").unwrap();
    a.run("COMMIT").await.unwrap();
    let users = console.rows("SHOW USERS").await.unwrap();
    assert!(users.iter().any(|row| row.get("name") == Some("late")));
}

#[tokio::test]
async fn set_changes_a_running_setting_and_refuses_what_cannot_change() {
    let house = House::open(|_| ()).await;
    let console = house.proxy.admin().await.unwrap();
    console.simple_query("SET query_wait_timeout = 7").await.unwrap();
    let config = console.rows("SHOW CONFIG").await.unwrap();
    let row = config.iter().find(|row| row.get("key") == Some("query_wait_timeout")).unwrap();
    assert_eq!((row.get("value"), row.get("changeable")), (Some("7"), Some("yes")));
    for wrong in ["SET query_wait_timeout = 'soon'", "SET listen_port = 1", "SET state_dir = '/nowhere'"] {
        refusal(&console, wrong).await;
    }
    let fixed = config.iter().find(|row| row.get("key") == Some("listen_port")).unwrap();
    assert_eq!(fixed.get("changeable"), Some("no"));
}

#[tokio::test]
async fn our_own_user_gets_in_over_the_unix_socket_without_a_password() {
    let house = House::open(|_| ()).await;
    let (dir, port) = (house.proxy.dir().display(), house.proxy.port());
    for name in ["pgbouncer", "pgcutover"] {
        let dsn = format!("host={dir} port={port} user={name} dbname={name}");
        assert!(stdout(&house.psql(&dsn, "SHOW GATES").await).starts_with("app|open"));
    }
    // Over TCP the same name is a stranger's.
    let dsn = format!("host=127.0.0.1 port={port} user=pgbouncer dbname=pgbouncer password=x");
    assert!(stderr(&house.psql(&dsn, "SHOW GATES").await).contains("password authentication failed"));
    // Clients may use the socket like any other.
    let dsn = house.dsn(APP).replace("host=127.0.0.1", &format!("host={dir}"));
    assert_eq!(stdout(&house.psql(&dsn, "SELECT 1").await).trim(), "1");
}

#[tokio::test]
async fn shutdown_ends_the_process_in_the_way_it_was_asked_for() {
    for (command, waits) in
        [("SHUTDOWN", false), ("SHUTDOWN WAIT_FOR_SERVERS", true), ("SHUTDOWN WAIT_FOR_CLIENTS", true)]
    {
        let mut house = House::open(|_| ()).await;
        let client = house.connect(APP).await;
        client.run("BEGIN").await.unwrap();
        let console = house.proxy.admin().await.unwrap();
        let _ = tokio::time::timeout(Duration::from_secs(2), console.simple_query(command)).await.unwrap();
        if waits {
            until("new clients are turned away", async || Client::connect(&house.login(APP)).await.is_err()).await;
            assert_eq!(client.number("SELECT 1").await.unwrap(), 1, "{command}: the transaction goes on");
            client.run("COMMIT").await.unwrap();
            assert!(house.proxy.runs() || command.ends_with("SERVERS"));
            drop(client);
        } else {
            until("the client is gone", async || client.simple_query("SELECT 1").await.is_err()).await;
        }
        drop(console);
        let status = house.proxy.wait(LIMIT).await.unwrap();
        assert_eq!(status.code(), Some(0), "{command}");
    }
}
