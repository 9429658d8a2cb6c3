//! The harness keeps its own promises.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::cluster::{Cluster, ClusterOptions};
use e2e::faults::{Cut, Direction, Fault, FaultProxy};
use e2e::ledger::{Audit, Notes, Sides, audit};
use e2e::pair::{APP, DATABASE, Pair, PairOptions, Publication, password};
use e2e::tls::Authority;
use e2e::workload::{Workload, WorkloadOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_cluster_starts_recovers_from_a_power_cut_and_keeps_its_port() {
    let mut cluster = Cluster::start(&Binaries::of(&[17]).unwrap(), &ClusterOptions::new(17)).await.unwrap();
    let port = cluster.port();
    cluster.superuser("postgres").await.unwrap().run("CREATE TABLE kept (n int)").await.unwrap();
    cluster.kill9().await.unwrap();
    cluster.restart().await.unwrap();
    let client = cluster.superuser("postgres").await.unwrap();
    assert_eq!(client.number("SELECT count(*) FROM kept").await.unwrap(), 0);
    assert_eq!(cluster.port(), port);
    let dir = cluster.dir().to_owned();
    drop(cluster);
    assert!(!dir.exists());
}

#[tokio::test]
async fn a_pair_replicates_as_the_least_role() {
    let pair = Pair::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17)).await.unwrap();
    let app = pair.source.connect(APP, &password(APP), DATABASE).await.unwrap();
    app.run("INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 5)").await.unwrap();
    app.run("INSERT INTO history (client, n, aid, delta) SELECT n, 1, 1, 5 FROM generate_series(1, 9) n")
        .await
        .unwrap();
    pair.in_step().await.unwrap();
    let on_target = pair.target.connect(APP, &password(APP), DATABASE).await.unwrap();
    assert_eq!(on_target.number("SELECT count(*) FROM ledger").await.unwrap(), 1);
    assert_eq!(on_target.number("SELECT count(*) FROM history").await.unwrap(), 9);
    assert_eq!(on_target.number("SELECT count(*) FROM accounts").await.unwrap(), 1000);
    assert_eq!(on_target.number("SELECT port FROM ledger").await.unwrap(), i64::from(pair.source.port()));
}

/// Every kind of client straight at the source through a network that breaks: what was acknowledged is there, and what
/// is unknown is noted as such.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_balances_over_broken_connections_and_a_power_cut() {
    let mut options = PairOptions::new(16, 18);
    options.publication = Publication::AllTables;
    let mut pair = Pair::start(&Binaries::of(&[16, 18]).unwrap(), &options).await.unwrap();
    let network = FaultProxy::start(pair.source.port()).await.unwrap();
    let mut options = WorkloadOptions::new(vec![network.port()], 16);
    (options.pipelining, options.idle) = ((1, 20), 3);
    let workload = Workload::start(&options).await.unwrap();
    workload.acknowledges(500, LIMIT).await.unwrap();
    network.cut(Cut::Reset);
    workload.acknowledges(500, LIMIT).await.unwrap();
    pair.source.kill9().await.unwrap();
    pair.source.restart().await.unwrap();
    workload.acknowledges(500, LIMIT).await.unwrap();
    let outcome = workload.stop().await.unwrap();

    assert_eq!(outcome.records.len(), 16 + 2 + 1 + 3);
    assert!(outcome.errors().iter().filter(|error| error.text.starts_with("idle")).count() == 3);
    pair.in_step().await.unwrap();
    let (serving, other) =
        (pair.target.superuser(DATABASE).await.unwrap(), pair.source.superuser(DATABASE).await.unwrap());
    let sides = Sides { serving: &serving, other: Some(&other), moves: 0 };
    let audit = audit(&outcome.notes(), sides).await.unwrap();
    assert!(audit.is_clean(), "{audit}");
    assert!(audit.acknowledged >= 1500 && audit.stored >= audit.acknowledged, "{audit}");
}

/// A held network is a stall of every client and of the probes, and no error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_holds_is_a_stall_and_no_error() {
    let cluster = one_sided().await;
    let network = FaultProxy::start(cluster.port()).await.unwrap();
    let workload = Workload::start(&WorkloadOptions::new(vec![network.port()], 8)).await.unwrap();
    workload.acknowledges(300, LIMIT).await.unwrap();
    network.set(Direction::Down, Fault::Hold);
    tokio::time::sleep(Duration::from_millis(300)).await; // reason: the length of the stall that is measured
    network.set(Direction::Down, Fault::Pass);
    workload.acknowledges(300, LIMIT).await.unwrap();
    let outcome = workload.stop().await.unwrap();
    assert_eq!(outcome.errors().len(), 0, "{:?}", outcome.errors());
    let stalls = e2e::samples::Stalls::over(outcome.samples().map(|(_, samples)| samples), None, e2e::samples::ALWAYS);
    // Every client had a statement under way within its think time of about 12 ms, less its own median.
    assert!(stalls.p50 > 200.0, "{stalls:?}");
}

#[tokio::test]
async fn the_ledger_finds_what_is_tampered_with() {
    let cluster = one_sided().await;
    let client = cluster.superuser(DATABASE).await.unwrap();
    client
        .run("INSERT INTO ledger (client, n, aid, delta, port) SELECT 1, n, 1, 0, 1 FROM generate_series(1, 9) n")
        .await
        .unwrap();
    let told = || Notes { client: 1, acknowledged: (1..=9).collect(), ..Notes::default() };
    let found = async |sql: &str, notes: Notes| tampered(&client, sql, notes).await;

    assert!(found("SELECT", told()).await.is_clean());
    assert_eq!(found("DELETE FROM ledger WHERE n = 4", told()).await.lost, [(1, 4)]);
    let double = "INSERT INTO ledger (client, n, aid, delta, port) VALUES (1, 5, 1, 0, 1)";
    assert_eq!(found(double, told()).await.doubled, [(1, 5)]);
    let refused = Notes { acknowledged: (1..=8).collect(), refused: vec![9], ..told() };
    assert_eq!(found("SELECT", refused).await.phantom, [(1, 9)]);
    let unknown = Notes { acknowledged: (1..=8).collect(), unknown: vec![9], ..told() };
    assert!(found("SELECT", unknown.clone()).await.is_clean());
    assert!(found("DELETE FROM ledger WHERE n = 9", unknown).await.is_clean());
    assert_eq!(found("UPDATE ledger SET delta = 7 WHERE n = 2", told()).await.imbalance, 7);
    assert!(found("UPDATE ledger SET port = 2 WHERE n > 4", told()).await.is_clean());
    assert_eq!(found("UPDATE ledger SET port = 2 WHERE n BETWEEN 4 AND 6", told()).await.split, [(1, 7)]);
    let orphan = "INSERT INTO history (client, n, aid, delta) VALUES (1, 99, 1, 0)";
    assert_eq!(found(orphan, told()).await.orphaned, 1);
}

#[tokio::test]
async fn the_ledger_finds_what_is_stranded_on_the_other_side() {
    let (serving, other) = tokio::join!(one_sided(), one_sided());
    let (serving, other) = (serving.superuser(DATABASE).await.unwrap(), other.superuser(DATABASE).await.unwrap());
    let write = "INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 0)";
    other.run(write).await.unwrap();
    let sides = Sides { serving: &serving, other: Some(&other), moves: 1 };
    let found = audit(&[Notes { client: 1, acknowledged: vec![1], ..Notes::default() }], sides).await.unwrap();
    assert_eq!((found.stranded, found.lost), (vec![(1, 1)], vec![(1, 1)]));
}

/// Audits what a change would make of the ledger, and takes the change back.
async fn tampered(client: &Client, sql: &str, notes: Notes) -> Audit {
    client.run(&format!("BEGIN; {sql}")).await.unwrap();
    let found = audit(&[notes], Sides { serving: client, other: None, moves: 1 }).await.unwrap();
    client.run("ROLLBACK").await.unwrap();
    found
}

/// A cluster with the pair's tables and nobody to follow it.
async fn one_sided() -> Cluster {
    let options = PairOptions::new(17, 17);
    e2e::pair::single(&Binaries::of(&[17]).unwrap(), &options).await.unwrap()
}

#[tokio::test]
async fn a_cluster_offers_tls_with_the_certificate_it_was_given() {
    let authority = Authority::create().unwrap();
    let mut options = ClusterOptions::new(17);
    options.tls = Some(authority.sign("server", &["localhost", "127.0.0.1"]).unwrap());
    let cluster = Cluster::start(&Binaries::of(&[17]).unwrap(), &options).await.unwrap();
    let mut wire = e2e::wire::Wire::connect(cluster.port()).await.unwrap();
    wire.send(&[0, 0, 0, 8, 4, 210, 22, 47]).await.unwrap(); // SSLRequest
    let mut answer = [0; 1];
    tokio::io::AsyncReadExt::read_exact(wire.stream(), &mut answer).await.unwrap();
    assert_eq!(answer, *b"S");
}

#[test]
fn nothing_is_left_after_a_panic_ctrl_c_sigterm_or_sigkill() {
    for end in [None, Some(Signal::SIGINT), Some(Signal::SIGTERM), Some(Signal::SIGKILL)] {
        let (mut child, dir, pid) = victim(end.is_none());
        // The one that panics may be done with it already.
        if let Some(signal) = end {
            assert!(alive(pid), "the victim's server does not run");
            kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        }
        child.wait().unwrap();
        let deadline = Instant::now() + LIMIT;
        while dir.exists() || alive(pid) {
            assert!(Instant::now() < deadline, "after {end:?}: {} or server {pid} is still there", dir.display());
            std::thread::sleep(Duration::from_millis(20)); // reason: between two looks, up to the deadline
        }
    }
}

/// Runs the test below in a process of its own; gives its directory and the pid of its server.
fn victim(panics: bool) -> (Child, PathBuf, u32) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "harness::victim_of_the_test_above", "--ignored", "--nocapture"]);
    command.env("PGCUTOVER_VICTIM", if panics { "panics" } else { "waits" });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).stdin(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said = lines.find_map(|line| line.unwrap().split_once("victim: ").map(|(_, words)| words.to_owned())).unwrap();
    let (pid, dir) = said.split_once(' ').unwrap();
    (child, PathBuf::from(dir), pid.parse().unwrap())
}

fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

#[tokio::test]
#[ignore = "run by nothing_is_left_after_a_panic_ctrl_c_sigterm_or_sigkill"]
async fn victim_of_the_test_above() {
    let Ok(what) = std::env::var("PGCUTOVER_VICTIM") else { return };
    let cluster = Cluster::start(&Binaries::of(&[17]).unwrap(), &ClusterOptions::new(17)).await.unwrap();
    let dir = e2e::run_dir::RunDir::current().unwrap().path();
    e2e::printer::result(format_args!("victim: {} {}", cluster.pid().unwrap(), dir.display()));
    assert_eq!(what, "waits", "the panic that was asked for");
    // Ended by the test that started it: by a signal, or by closing our stdin.
    let _ = std::io::stdin().lines().next();
}
