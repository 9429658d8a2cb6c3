//! The real PgBouncer beside ours: its console's columns, types, tags and SQLSTATEs, and both poolers in one chain.
//!
//! Invariant: what a program knows of PgBouncer's console holds for ours; each exception is listed here with its reason.

use e2e::binaries::Network;
use e2e::bouncer::Bouncer;
use e2e::pair::{APP, OTHER, SOURCE, password};
use e2e::printer::not_checked;
use e2e::proxy::{ADMIN, ProxyOptions};
use e2e::wire::{Report, Wire};
use postgres_protocol::message::backend::Message;
use tokio_postgres::fallible_iterator::FallibleIterator;

use crate::house::{House, LIMIT, run, stdout};

/// Debian's PgBouncer (1.18) has these; what it has, ours has. STATE came later.
const TABLES: [&str; 17] = [
    "VERSION",
    "DATABASES",
    "POOLS",
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
    "DNS_HOSTS",
    "DNS_ZONES",
];

/// Table, column, reason: where ours is not as Debian's is.
const EXCEPTIONS: [(&str, &str, &str); 1] =
    [("DATABASES", "reserve_pool", "called reserve_pool_size since 1.24; pgbouncer_exporter knows both names")];

/// Verbs in an order in which each succeeds, on both.
const VERBS: [&str; 15] = [
    "SHOW VERSION",
    "SHOW POOLS;",
    "show stats",
    "SET query_wait_timeout = 100",
    "SET query_wait_timeout TO '120'",
    "RELOAD",
    "RECONNECT",
    "RECONNECT app",
    "PAUSE",
    "RESUME",
    "PAUSE app",
    "RESUME app",
    "DISABLE app",
    "ENABLE app",
    "WAIT_CLOSE app",
];

/// PgBouncer says 08P01 to all of them, and so do we where the command could be read.
const FAILURES: [&str; 7] = [
    "PAUSE nowhere",
    "RESUME nowhere",
    "RESUME",
    "DISABLE nowhere",
    "ENABLE nowhere",
    "RECONNECT nowhere",
    "SET no_such_key = 1",
];

/// What is no command is a syntax error here (42601): drivers class PgBouncer's 08P01 as a broken connection.
const NO_COMMANDS: [&str; 3] = ["NONSENSE", "SHOW NOTHING", "SELECT 1"];

/// The program, or the words about what is not checked without it.
fn is_missing() -> bool {
    let missing = Bouncer::installed(Network::from_env()).err();
    if let Some(why) = &missing {
        not_checked("our console against the real PgBouncer's, and both in one chain", format_args!("{why:#}"));
    }
    missing.is_some()
}

/// Clients and servers hand each other passwords, not verifiers: a chain of two poolers needs them.
fn passwords(options: &mut ProxyOptions) {
    options.users.retain(|line| ![APP, OTHER].iter().any(|user| line.starts_with(&format!("\"{user}\""))));
    options.users.extend([APP, OTHER].map(|user| format!("\"{user}\" \"{}\"", password(user))));
}

async fn console(port: u16) -> Wire {
    Wire::log_in(port, ADMIN, &password(ADMIN), "pgbouncer").await.unwrap().0
}

/// Names and type OIDs of an answer's columns.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
fn columns(messages: &[Message]) -> Vec<(String, u32)> {
    let described = messages.iter().find_map(|message| match message {
        Message::RowDescription(body) => Some(body),
        _ => None,
    });
    let fields = described.unwrap_or_else(|| panic!("no columns: {:?}", said(messages))).fields();
    fields.map(|field| Ok((field.name().to_owned(), field.type_oid()))).collect().unwrap()
}

/// The tag, or the SQLSTATE of the error.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
fn said(messages: &[Message]) -> Result<String, String> {
    let said = messages.iter().find_map(|message| match message {
        Message::CommandComplete(body) => Some(Ok(body.tag().unwrap().to_owned())),
        Message::ErrorResponse(body) => Some(Err(Report::of(body).sqlstate)),
        _ => None,
    });
    said.expect("an answer")
}

/// What theirs has and ours has not, or has otherwise, but for the exceptions.
fn lacks(table: &str, theirs: &[(String, u32)], ours: &[(String, u32)]) -> Vec<String> {
    let excepted = |name: &str| EXCEPTIONS.iter().any(|(where_, column, _)| (*where_, *column) == (table, name));
    let wanted: Vec<_> = theirs.iter().filter(|(name, _)| !excepted(name)).collect();
    let (shared, complaints): (Vec<_>, Vec<_>) = wanted.iter().partition(|column| ours.contains(column));
    let mut complaints: Vec<_> = complaints.iter().map(|column| format!("{table}: {column:?}")).collect();
    let in_our_order: Vec<_> = ours.iter().filter(|column| shared.contains(&column)).collect();
    if in_our_order.iter().ne(shared.iter().copied()) {
        complaints.push(format!("{table}: not in this order: {shared:?}"));
    }
    complaints
}

#[tokio::test]
async fn what_pgbouncers_tables_have_ours_have_with_the_same_type() {
    if is_missing() {
        return;
    }
    let house = House::open(passwords).await;
    let bouncer = Bouncer::start(house.server.port(), 5).await.unwrap();
    let (mut theirs, mut ours) = (console(bouncer.port()).await, console(house.proxy.port()).await);
    let mut complaints = Vec::new();
    for table in TABLES {
        let show = format!("SHOW {table}");
        let (real, ready) = theirs.query(&show).await.unwrap();
        let (copy, ready_too) = ours.query(&show).await.unwrap();
        assert_eq!((said(&copy), ready_too), (said(&real), ready), "{show}");
        complaints.extend(lacks(table, &columns(&real), &columns(&copy)));
    }
    assert!(complaints.is_empty(), "ours lacks of PgBouncer's:\n{}", complaints.join("\n"));
}

#[tokio::test]
async fn verbs_are_answered_with_pgbouncers_tags_and_failures_with_its_sqlstate() {
    if is_missing() {
        return;
    }
    let house = House::open(passwords).await;
    let bouncer = Bouncer::start(house.server.port(), 5).await.unwrap();
    let (mut theirs, mut ours) = (console(bouncer.port()).await, console(house.proxy.port()).await);
    for verb in VERBS {
        let real = said(&theirs.query(verb).await.unwrap().0);
        assert!(real.is_ok(), "{verb}: {real:?}");
        assert_eq!(said(&ours.query(verb).await.unwrap().0), real, "{verb}");
    }
    for failure in FAILURES {
        let real = said(&theirs.query(failure).await.unwrap().0);
        assert_eq!(real, Err("08P01".to_owned()), "{failure}");
        assert_eq!(said(&ours.query(failure).await.unwrap().0), real, "{failure}");
    }
    for command in NO_COMMANDS {
        let real = said(&theirs.query(command).await.unwrap().0);
        assert_eq!(real, Err("08P01".to_owned()), "{command}");
        assert_eq!(said(&ours.query(command).await.unwrap().0), Err("42601".to_owned()), "{command}");
    }
}

/// Transactions of pgbench through whatever listens on `port`, in the protocols that every pooler bears.
async fn bench(house: &House, port: u16) {
    let script = house.proxy.dir().join("chain.sql");
    let text =
        "\\set aid random(1, 1000)\nBEGIN;\nUPDATE accounts SET abalance = abalance + 1 WHERE aid = :aid;\nEND;\n";
    std::fs::write(&script, text).unwrap();
    let dsn = house.dsn(APP).replace(&format!("port={}", house.proxy.port()), &format!("port={port}"));
    let script = script.display().to_string();
    for protocol in ["simple", "extended"] {
        let options = ["-n", "-M", protocol, "-c", "8", "-j", "2", "-t", "50", "-f", &script, &dsn];
        let output = tokio::time::timeout(LIMIT, run("pgbench", &options)).await.expect("pgbench ends");
        assert!(stdout(&output).contains("number of transactions actually processed: 400/400"), "{output:?}");
    }
    let sum = house.superuser().await.number("SELECT sum(abalance)::bigint FROM accounts").await.unwrap();
    assert_eq!(sum, 800, "each transaction once");
}

#[tokio::test]
async fn pgbouncer_in_front_of_us_serves_its_clients() {
    if is_missing() {
        return;
    }
    let house = House::open(passwords).await;
    let bouncer = Bouncer::start(house.proxy.port(), 5).await.unwrap();
    bench(&house, bouncer.port()).await;
}

#[tokio::test]
async fn pgbouncer_behind_us_serves_ours() {
    if is_missing() {
        return;
    }
    for mode in ["session", "transaction"] {
        let mut house = House::open(passwords).await;
        let lines = format!("pool_mode = {mode}\ndefault_pool_size = 25\n");
        let bouncer = Bouncer::with(house.server.port(), &lines).await.unwrap();
        house.proxy.options().backend_port(SOURCE, bouncer.port());
        house.proxy.write().unwrap();
        house.proxy.kill9();
        house.proxy.restart().await.unwrap();
        bench(&house, house.proxy.port()).await;
        let mut real = console(bouncer.port()).await;
        let (clients, _) = real.query("SHOW CLIENTS").await.unwrap();
        assert!(clients.len() > 3, "nothing went through it");
    }
}
