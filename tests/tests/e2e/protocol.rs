//! The newest of the protocol with PostgreSQL's newest clients: 3.2 with its long cancel keys, TLS from the first byte;
//! and the oldest of it, the function call.
//!
//! Invariant: clients are psql 17 and 18 themselves, and bytes that no driver writes any more.

use std::process::Stdio;

use bytes::{BufMut, BytesMut};
use e2e::binaries::{Binaries, Network, tool_of};
use e2e::pair::{APP, DATABASE, PairOptions, SOURCE, TARGET, password, single};
use e2e::proxy::{Proxy, ProxyOptions};
use e2e::tls::Authority;
use e2e::wire::Wire;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;

use crate::house::{House, LIMIT, message, table, until};

/// A server of a major, and a proxy that asks it for the newest protocol.
async fn open(major: u32, change: impl FnOnce(&mut ProxyOptions)) -> House {
    let server = single(&Binaries::of(&[major]).unwrap(), &PairOptions::new(major, major)).await.unwrap();
    let mut options = ProxyOptions::for_backends(&[(SOURCE, server.port())], 1).unwrap();
    options.users.push(format!("\"{APP}\" \"{}\"", password(APP)));
    let backend = table(table(options.database(DATABASE), "backends"), SOURCE);
    backend.insert("max_protocol_version".to_owned(), "3.2".into());
    change(&mut options);
    let proxy = Proxy::start(options).await.unwrap();
    House { proxy, server }
}

/// What psql of a major said: its stdout, or its stderr.
async fn psql(major: u32, dsn: &str, commands: &[&str]) -> Result<String, String> {
    let output = start(major, dsn, commands).await.wait_with_output();
    let output = tokio::time::timeout(LIMIT, output).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

async fn start(major: u32, dsn: &str, commands: &[&str]) -> tokio::process::Child {
    let psql = tokio::task::spawn_blocking(move || tool_of(major, "psql", Network::from_env())).await.unwrap().unwrap();
    let mut command = tokio::process::Command::new(psql);
    command.args(["-X", "-A", "-t", "-d", dsn]).env("LC_ALL", "C").kill_on_drop(true);
    command.args(commands.iter().flat_map(|sql| ["-c", sql]));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Presses ^C in psql while its statement runs; what it said then.
async fn interrupted(house: &House, major: u32, dsn: &str) -> String {
    let psql = start(major, dsn, &["SELECT pg_sleep(60)"]).await;
    let running = "SELECT count(*) = 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'";
    house.superuser().await.until(running, LIMIT).await.unwrap();
    kill(Pid::from_raw(psql.id().unwrap().cast_signed()), Signal::SIGINT).unwrap();
    let output = tokio::time::timeout(LIMIT, psql.wait_with_output()).await.unwrap().unwrap();
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const ONLY_3_2: &str = "min_protocol_version=3.2 max_protocol_version=3.2";

#[tokio::test]
async fn protocol_3_2_reaches_from_psql_18_to_a_server_of_18() {
    let house = open(18, |_| ()).await;
    let dsn = format!("{} {ONLY_3_2}", house.dsn(APP));
    let said = psql(18, &dsn, &["SELECT current_user", "\\conninfo"]).await.unwrap();
    assert!(said.starts_with(APP) && said.contains("Protocol Version|3.2"), "{said}");
    // The key that psql sends has 32 bytes, and so has the one that the server gets.
    let error = interrupted(&house, 18, &dsn).await;
    assert!(error.contains("canceling statement due to user request"), "{error}");
    let old = format!("{} max_protocol_version=3.0", house.dsn(APP));
    assert!(interrupted(&house, 18, &old).await.contains("canceling statement due to user request"));
}

#[tokio::test]
async fn each_leg_speaks_its_own_protocol() {
    // A server that knows 3.0 only says so, and is taken at its word.
    let house = open(13, |_| ()).await;
    let dsn = format!("{} {ONLY_3_2}", house.dsn(APP));
    assert_eq!(psql(18, &dsn, &["SELECT current_user"]).await.unwrap(), APP);
    let error = interrupted(&house, 18, &dsn).await;
    assert!(error.contains("canceling statement due to user request"), "{error}");
}

#[tokio::test]
async fn tls_from_the_first_byte_serves_queries_and_cancels() {
    let authority = Authority::create().unwrap();
    let own = authority.sign("front", &["localhost"]).unwrap();
    let house = open(17, |options| {
        options.setting("client_tls_sslmode", "require");
        options.setting("client_tls_cert_file", own.certificate.display().to_string());
        options.setting("client_tls_key_file", own.key.display().to_string());
    })
    .await;
    let ca = authority.certificate().display().to_string();
    let dsn = house.dsn(APP).replace("host=127.0.0.1", "host=localhost");
    let dsn = format!("{dsn} sslmode=verify-full sslrootcert={ca} sslnegotiation=direct channel_binding=require");
    assert_eq!(psql(17, &dsn, &["SELECT current_user"]).await.unwrap(), APP);
    // Since 17 the cancel request goes the same way: TLS first.
    let error = interrupted(&house, 17, &dsn).await;
    assert!(error.contains("canceling statement due to user request"), "{error}");
}

/// int4pl(a, b), called by its number.
fn sum(a: i32, b: i32) -> BytesMut {
    let mut body = BytesMut::new();
    body.put_u32(177);
    // Formats: one for all, binary. Two arguments of four bytes; the result in binary too.
    body.put_slice(&[0, 1, 0, 1, 0, 2]);
    for argument in [a, b] {
        body.put_i32(4);
        body.put_i32(argument);
    }
    body.put_i16(1);
    message(b'F', &body)
}

/// The result of a function call, up to its ReadyForQuery.
async fn result(wire: &mut Wire) -> i32 {
    let stream = wire.stream();
    loop {
        let tag = stream.read_u8().await.unwrap();
        let mut body = vec![0; usize::try_from(stream.read_u32().await.unwrap() - 4).unwrap()];
        stream.read_exact(&mut body).await.unwrap();
        match tag {
            b'V' => {
                assert_eq!(stream.read_u8().await.unwrap(), b'Z');
                stream.read_exact(&mut [0; 5]).await.unwrap();
                return i32::from_be_bytes(body[4..].try_into().unwrap());
            }
            // What the new server reports of itself.
            b'S' => {}
            other => panic!("{}: {}", char::from(other), String::from_utf8_lossy(&body)),
        }
    }
}

#[tokio::test]
async fn a_function_call_is_held_and_answered_by_the_new_server() {
    let (binaries, options) = (Binaries::of(&[13, 17]).unwrap(), [PairOptions::new(13, 13), PairOptions::new(17, 17)]);
    let (blue, green) = tokio::try_join!(single(&binaries, &options[0]), single(&binaries, &options[1])).unwrap();
    let mut options = ProxyOptions::for_backends(&[(SOURCE, blue.port()), (TARGET, green.port())], 1).unwrap();
    options.users.push(format!("\"{APP}\" \"{}\"", password(APP)));
    let proxy = Proxy::start(options).await.unwrap();
    let (mut wire, _) = Wire::log_in(proxy.port(), APP, &password(APP), DATABASE).await.unwrap();
    wire.query("SELECT 1").await.unwrap();
    wire.send(&sum(40, 2)).await.unwrap();
    assert_eq!(result(&mut wire).await, 42);

    let admin = proxy.admin().await.unwrap();
    admin.run("PAUSE app").await.unwrap();
    wire.send(&sum(-1, 2)).await.unwrap();
    until("it is held", async || {
        let gates = proxy.ask("SHOW GATES").await.unwrap();
        gates.iter().any(|row| row.get("held_clients") == Some("1"))
    })
    .await;
    admin.run("SWITCH app TO green WITH (force)").await.unwrap();
    admin.run("RESUME app").await.unwrap();
    assert_eq!(result(&mut wire).await, 1);
    let calls = "SELECT count(*) = 1 FROM pg_stat_activity WHERE usename = 'app' AND datname = 'app'";
    green.superuser(DATABASE).await.unwrap().until(calls, LIMIT).await.unwrap();
}
