//! Replication connections through the proxy: PostgreSQL's own tools do their work, and a cutover knows of them.
//!
//! Invariant: the tools are Debian's (PostgreSQL 15 or newer), which can follow a server of 13.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::binaries::{Binaries, tool};
use e2e::pair::{APP, PGCUTOVER, PairOptions, SOURCE, password, single};
use e2e::process::Process;
use e2e::proxy::{Proxy, ProxyOptions};
use nix::sys::signal::Signal;

use crate::house::{House, LIMIT, sqlstate, stderr, stdout, until};

/// A proxy in front of a 13, that knows the login which may replicate.
async fn open() -> House {
    let server = single(&Binaries::of(&[13]).unwrap(), &PairOptions::new(13, 13)).await.unwrap();
    let mut options = ProxyOptions::for_backends(&[(SOURCE, server.port())], 1).unwrap();
    for user in [APP, PGCUTOVER] {
        options.users.push(format!("\"{user}\" \"{}\"", password(user)));
    }
    let proxy = Proxy::start(options).await.unwrap();
    House { proxy, server }
}

fn dsn(house: &House, more: &str) -> String {
    format!("{} {more}", house.dsn(PGCUTOVER))
}

/// Runs a tool to its end, or kills it at the limit.
async fn follow(name: &str, arguments: &[&str]) -> Result<(), String> {
    let mut command = tokio::process::Command::new(tool(name).unwrap());
    command.args(arguments).env("LC_ALL", "C").kill_on_drop(true).stdin(Stdio::null());
    let output = tokio::time::timeout(LIMIT, command.output()).await.map_err(|_| format!("{name} goes on"))?.unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// A tool that streams until it is told to stop.
fn start(house: &House, name: &str, arguments: &[&str]) -> Process {
    let mut command = Command::new(tool(name).unwrap());
    command.args(arguments).env("LC_ALL", "C");
    Process::spawn(command, name, &house.proxy.dir().join(format!("{name}.log")), Signal::SIGINT).unwrap()
}

/// Sessions that replicate, as SHOW CLIENTS and SHOW BLOCKERS know them.
async fn known(house: &House) -> (Vec<String>, Vec<String>) {
    let clients = house.proxy.ask("SHOW CLIENTS").await.unwrap();
    let kinds = clients.iter().filter_map(|row| row.get("replication")).filter(|kind| *kind != "none");
    let blockers = house.proxy.ask("SHOW BLOCKERS").await.unwrap();
    let reasons = blockers.iter().filter_map(|row| row.get("reason"));
    (kinds.map(str::to_owned).collect(), reasons.map(str::to_owned).collect())
}

#[tokio::test]
async fn pg_receivewal_streams_through_the_proxy() {
    let house = open().await;
    let superuser = house.superuser().await;
    superuser.run("CREATE TABLE filler AS SELECT generate_series(1, 1000) n; SELECT pg_switch_wal()").await.unwrap();
    superuser.run("INSERT INTO filler SELECT generate_series(1, 1000)").await.unwrap();
    let end = superuser.text("SELECT pg_current_wal_flush_lsn()").await.unwrap().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let into = directory.path().to_str().unwrap();
    // It names the database "replication", whatever the connection string says.
    follow("pg_receivewal", &["-d", &dsn(&house, ""), "-D", into, "-E", &end, "--no-loop"]).await.unwrap();
    let files: Vec<_> = std::fs::read_dir(directory.path()).unwrap().flatten().collect();
    let is_segment = |name: &str| name.len() == 24 || name.ends_with(".partial");
    assert!(files.iter().any(|file| is_segment(&file.file_name().to_string_lossy())), "{files:?}");
    assert!(files.iter().map(|file| file.metadata().unwrap().len()).sum::<u64>() > 0);
}

#[tokio::test]
async fn pg_recvlogical_gets_the_changes_of_other_clients() {
    let house = open().await;
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("changes");
    let base = dsn(&house, "");
    follow("pg_recvlogical", &["-d", &base, "-S", "s", "-P", "test_decoding", "--create-slot"]).await.unwrap();
    house.connect(APP).await.run("INSERT INTO branches VALUES (4711, 1)").await.unwrap();
    let end = house.superuser().await.text("SELECT pg_current_wal_flush_lsn()").await.unwrap().unwrap();
    let out_text = out.to_str().unwrap();
    follow("pg_recvlogical", &["-d", &base, "-S", "s", "--start", "-E", &end, "-f", out_text, "--no-loop"])
        .await
        .unwrap();
    let changes = std::fs::read_to_string(&out).unwrap();
    assert!(changes.contains("table public.branches: INSERT: bid[integer]:4711"), "{changes}");
    follow("pg_recvlogical", &["-d", &base, "-S", "s", "--drop-slot"]).await.unwrap();
}

#[tokio::test]
async fn pg_basebackup_copies_the_server_over_two_connections() {
    let house = open().await;
    let directory = tempfile::tempdir().unwrap();
    let into = directory.path().join("copy");
    follow("pg_basebackup", &["-d", &dsn(&house, ""), "-D", into.to_str().unwrap(), "-X", "stream", "-c", "fast"])
        .await
        .unwrap();
    assert_eq!(std::fs::read_to_string(into.join("PG_VERSION")).unwrap().trim(), "13");
    assert!(is_there(&into.join("backup_label")) && is_there(&into.join("backup_manifest")));
}

fn is_there(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.len() > 0)
}

#[tokio::test]
async fn a_server_connection_for_replication_serves_its_client_and_ends_with_it() {
    let house = open().await;
    let superuser = house.superuser().await;
    // A walsender that is bound to a database takes SQL; its settings are the client's own from the start.
    let logical = dsn(&house, "replication=database options='-c work_mem=7MB' application_name=mine");
    let said = house.psql(&logical, "SELECT current_setting('work_mem') || current_setting('application_name')").await;
    assert_eq!(stdout(&said).trim(), "7MBmine");
    assert!(stdout(&house.psql(&logical, "IDENTIFY_SYSTEM").await).contains("app"));
    let physical = dsn(&house, "replication=true").replace("dbname=app", "dbname=any");
    assert!(stdout(&house.psql(&physical, "IDENTIFY_SYSTEM").await).contains('|'));
    // Whoever may not is told by the server, at the login.
    let barred = format!("{} replication=database", house.dsn(APP));
    let error = stderr(&house.psql(&barred, "IDENTIFY_SYSTEM").await);
    assert!(error.contains("must be superuser or replication role to start walsender"), "{error}");

    let gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'walsender' OR usename = 'pgcutover'";
    superuser.until(gone, LIMIT).await.unwrap();
    // The pool of the same user is another one.
    let plain = house.connect(PGCUTOVER).await;
    assert_eq!(
        plain.text("SELECT backend_type FROM pg_stat_activity WHERE pid = pg_backend_pid()").await.unwrap().unwrap(),
        "client backend"
    );
}

#[tokio::test]
async fn a_stream_is_listed_stands_in_a_pauses_way_and_can_be_ended() {
    let house = open().await;
    let directory = tempfile::tempdir().unwrap();
    let (base, into) = (dsn(&house, ""), directory.path().to_str().unwrap().to_owned());
    let streaming = start(&house, "pg_receivewal", &["-d", &base, "-D", &into, "--no-loop"]);
    until("the stream is known", async || known(&house).await == (vec!["physical".into()], vec!["replication".into()]))
        .await;
    let sessions = house.proxy.ask("SHOW SESSIONS").await.unwrap();
    let row = sessions.iter().find(|row| row.get("user") == Some(PGCUTOVER)).unwrap();
    assert_eq!(row.get("movable"), Some("no"));
    assert!(row.get("reason").unwrap().contains("replication"), "{row:?}");

    let admin = house.proxy.admin().await.unwrap();
    let app = house.connect(APP).await;
    let began = Instant::now();
    let refused = admin.simple_query("PAUSE app WITH (drain '300ms', lease '2s')").await.unwrap_err();
    assert_eq!(sqlstate(&refused), "55P03");
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(app.number("SELECT 1").await.unwrap(), 1);

    // Ordered to go it goes, in the middle of its stream.
    admin.run(&format!("KILL_CLIENT {}", row.get("client_id").unwrap())).await.unwrap();
    until("the stream is over", async || known(&house).await == (Vec::new(), Vec::new())).await;
    admin.run("PAUSE app WITH (drain '2s', lease '3s')").await.unwrap();
    admin.run("RESUME app").await.unwrap();
    drop(streaming);
}

/// SQL of a walsender writes like any other, so it is held like any other.
#[tokio::test]
async fn sql_of_a_replication_connection_is_held_by_a_pause() {
    let house = open().await;
    let admin = house.proxy.admin().await.unwrap();
    let logical = dsn(&house, "replication=database");
    // Its first statement waits in psql until it is told to go on.
    let arguments = ["-X", "-A", "-t", "-d", &logical, "-c", "SELECT 1", "-c", "\\! read line", "-c", "SELECT 2"];
    let mut command = tokio::process::Command::new(tool("psql").unwrap());
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut psql = command.spawn().unwrap();
    until("it is served", async || known(&house).await.0 == ["logical"]).await;
    until("it rests", async || {
        let sessions = house.proxy.ask("SHOW SESSIONS").await.unwrap();
        sessions.iter().any(|row| row.get("user") == Some(PGCUTOVER) && row.get("state") == Some("idle"))
    })
    .await;
    admin.run("PAUSE app WITH (drain '2s', lease '10s')").await.unwrap();
    drop(psql.stdin.take());
    until("its statement is held", async || {
        let sessions = house.proxy.ask("SHOW SESSIONS").await.unwrap();
        sessions.iter().any(|row| row.get("user") == Some(PGCUTOVER) && row.get("state") == Some("held"))
    })
    .await;
    let refused = admin.simple_query("SWITCH app TO blue WITH (force)").await.unwrap_err();
    assert_eq!(sqlstate(&refused), "55000");
    assert!(format!("{refused:?}").contains("keep their server"), "{refused:?}");
    admin.run("RESUME app").await.unwrap();
    let output = tokio::time::timeout(LIMIT, psql.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>(), ["1", "2"]);
}
