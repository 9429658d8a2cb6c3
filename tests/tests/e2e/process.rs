//! The process: how it starts, what it shows, how it ends.
//!
//! Invariant: exit codes are those of `--help`: 0 orderly, 1 could not run, 2 wrong configuration or usage.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use e2e::client::Client;
use e2e::pair::{APP, DATABASE, password};
use e2e::product::Product;
use e2e::wire::Wire;
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::house::{House, LIMIT, until};

/// Status and body of a page.
async fn page(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

#[tokio::test]
async fn sigterm_lets_an_open_transaction_finish_and_then_exits_in_order() {
    let mut house = House::open(|_| ()).await;
    let superuser = house.superuser().await;
    let (busy, idle) = (house.connect(APP).await, house.connect(APP).await);
    idle.number("SELECT 1").await.unwrap();
    busy.run("BEGIN; UPDATE accounts SET abalance = 5 WHERE aid = 1").await.unwrap();
    house.proxy.signal(Signal::SIGTERM).unwrap();
    until("the idle client is told to go", async || idle.simple_query("SELECT 1").await.is_err()).await;
    until("no new client gets in", async || Client::connect(&house.login(APP)).await.is_err()).await;
    assert_eq!(page(house.proxy.http_port(), "/readyz").await.map(|page| page.0), Some(503), "red while draining");
    assert_eq!(page(house.proxy.http_port(), "/livez").await.map(|page| page.0), Some(200));
    busy.run("UPDATE accounts SET abalance = 6 WHERE aid = 1").await.unwrap();
    busy.run("COMMIT").await.unwrap();
    assert_eq!(house.proxy.wait(LIMIT).await.unwrap().code(), Some(0));
    assert_eq!(superuser.number("SELECT abalance FROM accounts WHERE aid = 1").await.unwrap(), 6);
    superuser.until("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'app'", LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_paused_proxy_is_alive_and_ready_and_its_metrics_parse() {
    let house = House::open(|_| ()).await;
    let http = house.proxy.http_port();
    house.connect(APP).await.number("SELECT 1").await.unwrap();
    assert_eq!(page(http, "/readyz").await.unwrap().0, 200);
    house.proxy.ask("PAUSE app").await.unwrap();
    assert_eq!((page(http, "/readyz").await.unwrap().0, page(http, "/livez").await.unwrap().0), (200, 200));
    let (status, text) = page(http, "/metrics").await.unwrap();
    assert_eq!(status, 200);
    let mut typed = BTreeSet::new();
    let mut samples = 0;
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# TYPE ") {
            assert!(typed.insert(comment.split(' ').next().unwrap().to_owned()), "twice: {line}");
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
        let name = series.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(typed.contains(name) || typed.contains(family), "no TYPE before {line}");
        assert!(!series.contains('{') || series.ends_with('}'), "{line}");
        samples += 1;
    }
    assert!(samples > 20 && text.contains(&format!("database=\"{DATABASE}\"")), "{text}");
    house.proxy.ask("RESUME app").await.unwrap();
}

#[tokio::test]
async fn a_damaged_route_file_stops_the_start_and_is_named() {
    let mut house = House::open(|_| ()).await;
    house.proxy.signal(Signal::SIGTERM).unwrap();
    assert_eq!(house.proxy.wait(LIMIT).await.unwrap().code(), Some(0));
    let file = house.proxy.dir().join("state/routes").join(format!("{DATABASE}.toml"));
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "epoch = \"nonsense").unwrap();
    let error = format!("{:#}", house.proxy.restart().await.unwrap_err());
    assert!(error.contains(&file.display().to_string()), "{error}");
    assert!(!house.proxy.runs());
}

#[tokio::test]
async fn exit_codes_tell_wrong_configurations_from_what_could_not_run() {
    let house = House::open(|_| ()).await;
    let program = &Product::build().unwrap().pgcutover;
    let file = house.proxy.config_file();
    let text = fs::read_to_string(&file).unwrap();
    let wrong = house.proxy.dir().join("wrong.toml");
    fs::write(&wrong, text.replace("auth_type", "auth_tpye")).unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.stdout.is_empty() || arguments == ["--help"], "stdout stays empty");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (file, wrong) = (file.display().to_string(), wrong.display().to_string());
    assert_eq!(run(&["--help"]).0, Some(0));
    assert_eq!(run(&["--check", &file]), (Some(0), String::new()));
    let (code, said) = run(&["--check", &wrong]);
    assert!(
        code == Some(2) && said.contains("wrong.toml") && said.contains("auth_tpye") && said.contains("auth_type"),
        "{said}"
    );
    assert_eq!(run(&[&wrong]).0, Some(2));
    assert_eq!(run(&["--no-such-flag", &file]).0, Some(2));
    assert_eq!(run(&["/nowhere/pgcutover.toml"]).0, Some(2));
    // The port is taken: by the proxy that runs.
    let (code, said) = run(&[&file]);
    assert!(code == Some(1) && said.contains("127.0.0.1"), "{code:?} {said}");
    assert_eq!(house.connect(APP).await.number("SELECT 1").await.unwrap(), 1, "the one that runs is not disturbed");
}

/// Resident memory of a process, in kB.
fn resident_kb(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The figure is told, not asserted: the size of the future is (in the proxy's own tests).
#[tokio::test]
async fn five_hundred_idle_clients_are_held_and_cost_little() {
    const CLIENTS: u64 = 500;
    let house = House::open(|options| options.setting("max_client_conn", 1000)).await;
    let pid = house.proxy.pid().unwrap();
    let mut wires = vec![house.wire().await];
    let before = resident_kb(pid);
    for _ in 0..CLIENTS {
        wires.push(Wire::log_in(house.proxy.port(), APP, &password(APP), DATABASE).await.unwrap().0);
    }
    let after = resident_kb(pid);
    let each_bytes = (after - before) * 1024 / CLIENTS;
    writeln_figure(&format!("{CLIENTS} idle clients: {each_bytes} bytes of resident memory each"));
    for wire in &mut wires {
        assert_eq!(wire.query("SELECT 1").await.unwrap().1, b'I');
    }
}

fn writeln_figure(figure: &str) {
    use std::io::Write;
    // To the test's own output, past the house rule against printing: a figure to read.
    let _ = writeln!(std::io::stderr(), "{figure}");
}
