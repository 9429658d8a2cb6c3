//! Prepared statements in transaction pooling: clients share servers and each has its statements.
//!
//! Invariant: what a client is answered is what a server of its own would answer.

use std::fs;
use std::process::Command;

use bytes::BytesMut;
use e2e::binaries::tool;
use e2e::pair::{APP, DATABASE, password};
use e2e::proxy::ProxyOptions;
use e2e::wire::Wire;
use postgres_protocol::IsNull;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

use crate::house::{House, errors, first_cell, run, sqlstate, stdout};
use crate::stand::Stand;

// pgbench prepares with blocking calls, so each of its clients gets a thread: one that waits for a server connection would
// keep another one of its thread from ending the transaction that holds it.

/// One server connection that keeps two statements.
fn narrow(options: &mut ProxyOptions) {
    options.setting("default_pool_size", 1);
    options.setting("max_prepared_statements", 2);
}

fn parse(out: &mut BytesMut, name: &str, sql: &str) {
    frontend::parse(name, sql, [], out).unwrap();
}

fn run_it(out: &mut BytesMut, name: &str, value: i32) {
    let text = |value: i32, out: &mut BytesMut| {
        out.extend_from_slice(value.to_string().as_bytes());
        Ok(IsNull::No)
    };
    assert!(frontend::bind("", name, [0], [value], text, [0], out).is_ok());
    frontend::execute("", 0, out).unwrap();
}

/// Sends a batch; gives its answers by letter, an error as its SQLSTATE, a row as its first cell.
async fn batch(wire: &mut Wire, write: impl FnOnce(&mut BytesMut)) -> String {
    let mut out = BytesMut::new();
    write(&mut out);
    frontend::sync(&mut out);
    wire.send(&out).await.unwrap();
    answers(wire).await
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
async fn answers(wire: &mut Wire) -> String {
    let (messages, status) = wire.until_ready().await.unwrap();
    let mut said: Vec<String> = messages
        .iter()
        .map(|message| match message {
            Message::ParseComplete => "1".to_owned(),
            Message::BindComplete => "2".to_owned(),
            Message::CloseComplete => "3".to_owned(),
            Message::DataRow(_) => first_cell(std::slice::from_ref(message)).unwrap(),
            Message::ErrorResponse(_) => {
                let report = errors(std::slice::from_ref(message)).remove(0);
                format!("{} {}", report.sqlstate, report.message)
            }
            Message::CommandComplete(_) => "C".to_owned(),
            Message::ParameterDescription(_) => "t".to_owned(),
            Message::RowDescription(_) => "T".to_owned(),
            Message::NoData => "n".to_owned(),
            _ => "?".to_owned(),
        })
        .collect();
    said.push(char::from(status).to_string());
    said.join(" ")
}

async fn direct(house: &House) -> Wire {
    Wire::log_in(house.server.port(), APP, &password(APP), DATABASE).await.unwrap().0
}

const TWICE: &str = "SELECT $1::int * 2";

#[tokio::test]
async fn every_client_of_one_server_connection_has_its_own_statements() {
    let house = House::open(narrow).await;
    let (mut one, mut two) = (house.wire().await, house.wire().await);
    assert_eq!(batch(&mut one, |out| parse(out, "s", TWICE)).await, "1 I");
    assert_eq!(batch(&mut two, |out| parse(out, "s", "SELECT $1::int + 100")).await, "1 I");
    for n in 1..5 {
        assert_eq!(batch(&mut one, |out| run_it(out, "s", n)).await, format!("2 {} C I", n * 2));
        assert_eq!(batch(&mut two, |out| run_it(out, "s", n)).await, format!("2 {} C I", n + 100));
    }
    let client = house.connect(APP).await;
    assert_eq!(client.number("SELECT 7::bigint").await.unwrap(), 7);
    let statement = client.prepare("SELECT $1::int + 1").await.unwrap();
    for n in 0..3 {
        let row = client.query_one(&statement, &[&n]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), n + 1);
    }
}

/// The same messages to a server and to the proxy bring the same answers, with more statements than a server keeps.
#[tokio::test]
async fn batches_of_all_kinds_are_answered_as_by_a_server() {
    let house = House::open(narrow).await;
    let (mut server, mut proxy) = (direct(&house).await, house.wire().await);
    type Write = fn(&mut BytesMut);
    let script: [Write; 16] = [
        |out| (0..6).for_each(|n| parse(out, &format!("s{n}"), &format!("SELECT $1::int + {n}"))),
        |out| (0..6).for_each(|n| run_it(out, &format!("s{n}"), n)),
        |out| (0..6).rev().for_each(|n| frontend::describe(b'S', &format!("s{n}"), out).unwrap()),
        |out| parse(out, "s1", "SELECT 1"),
        |out| run_it(out, "s1", 5),
        |out| run_it(out, "none", 5),
        |out| frontend::describe(b'S', "none", out).unwrap(),
        |out| frontend::close(b'S', "none", out).unwrap(),
        |out| {
            parse(out, "a", TWICE);
            parse(out, "broken", "SELEC");
            parse(out, "b", TWICE);
        },
        |out| run_it(out, "a", 4),
        |out| run_it(out, "b", 4),
        |out| {
            frontend::close(b'S', "s1", out).unwrap();
            parse(out, "s1", "SELECT $1::int - 1");
            run_it(out, "s1", 5);
        },
        |out| {
            frontend::close(b'S', "s2", out).unwrap();
            run_it(out, "s2", 5);
            parse(out, "s2", TWICE);
        },
        |out| run_it(out, "s2", 5),
        |out| {
            parse(out, "", "SELECT $1::int / 0");
            run_it(out, "", 5);
            run_it(out, "s3", 5);
            frontend::close(b'S', "s3", out).unwrap();
        },
        |out| run_it(out, "s3", 5),
    ];
    for (at, write) in script.into_iter().enumerate() {
        let wanted = batch(&mut server, write).await;
        assert_eq!(batch(&mut proxy, write).await, wanted, "step {at}");
    }
    // All at once: a pipeline of batches, answered in order.
    let (mut server, mut proxy) = (direct(&house).await, house.wire().await);
    let mut out = BytesMut::new();
    for write in script {
        write(&mut out);
        frontend::sync(&mut out);
    }
    server.send(&out).await.unwrap();
    proxy.send(&out).await.unwrap();
    for at in 0..script.len() {
        assert_eq!(answers(&mut proxy).await, answers(&mut server).await, "pipelined step {at}");
    }
}

#[tokio::test]
async fn portals_outlive_the_eviction_of_their_statements_and_a_failed_transaction_stays_one() {
    let house = House::open(narrow).await;
    let (mut server, mut proxy) = (direct(&house).await, house.wire().await);
    for wire in [&mut server, &mut proxy] {
        let open = batch(wire, |out| {
            parse(out, "", "BEGIN");
            run_nothing(out, "");
            parse(out, "s", "SELECT 41 + 1");
            bind_portal(out, "p", "s");
            (0..4).for_each(|n| parse(out, &format!("s{n}"), &format!("SELECT $1::int + {n}")));
            (0..4).for_each(|n| run_it(out, &format!("s{n}"), n));
            frontend::execute("p", 0, out).unwrap();
        });
        assert!(open.await.ends_with("42 C T"));
        assert!(batch(wire, |out| parse(out, "bad", "SELECT nothing")).await.starts_with("42703"));
        assert!(batch(wire, |out| run_it(out, "s1", 1)).await.starts_with("25P02"));
        assert!(batch(wire, |out| parse(out, "s9", TWICE)).await.starts_with("25P02"));
        assert_eq!(batch(wire, |out| parse(out, "end", "ROLLBACK")).await, "1 E");
        assert_eq!(batch(wire, |out| run_nothing(out, "end")).await, "2 C I");
        assert!(batch(wire, |out| run_it(out, "s9", 1)).await.starts_with("26000"));
        assert_eq!(batch(wire, |out| run_it(out, "s1", 1)).await, "2 2 C I");
    }
}

fn bind_portal(out: &mut BytesMut, portal: &str, name: &str) {
    let none = |(): (), _: &mut BytesMut| Ok(IsNull::No);
    assert!(frontend::bind(portal, name, [], [(); 0], none, [0], out).is_ok());
}

fn run_nothing(out: &mut BytesMut, name: &str) {
    bind_portal(out, "", name);
    frontend::execute("", 0, out).unwrap();
}

#[tokio::test]
async fn what_sql_does_to_statements_is_followed_or_refused() {
    let house = House::open(narrow).await;
    let (mut wire, mut other) = (house.wire().await, house.wire().await);
    for forget in ["DEALLOCATE ALL", "DISCARD ALL"] {
        for each in [&mut wire, &mut other] {
            assert_eq!(batch(each, |out| parse(out, "s", TWICE)).await, "1 I");
        }
        assert!(errors(&wire.query(forget).await.unwrap().0).is_empty());
        assert_eq!(
            batch(&mut wire, |out| run_it(out, "s", 4)).await,
            "26000 prepared statement \"s\" does not exist I"
        );
        assert_eq!(batch(&mut other, |out| run_it(out, "s", 4)).await, "2 8 C I");
        assert_eq!(batch(&mut other, |out| frontend::close(b'S', "s", out).unwrap()).await, "3 I");
    }
    // Pipelined: what comes after it is prepared anew.
    let mut out = BytesMut::new();
    parse(&mut out, "s", TWICE);
    frontend::sync(&mut out);
    frontend::query("DEALLOCATE ALL", &mut out).unwrap();
    parse(&mut out, "s", TWICE);
    run_it(&mut out, "s", 3);
    frontend::sync(&mut out);
    wire.send(&out).await.unwrap();
    assert_eq!(answers(&mut wire).await, "1 I");
    assert_eq!(answers(&mut wire).await, "C I");
    assert_eq!(answers(&mut wire).await, "1 2 6 C I");
    // By SQL: refused in place, the connection lives on.
    let refused = "0A000 PREPARE is not supported in transaction pooling";
    let said = wire.query("/* x */ PREPARE p AS SELECT 1").await.unwrap();
    assert_eq!((errors(&said.0)[0].sqlstate.as_str(), said.1), ("0A000", b'I'));
    let said = batch(&mut wire, |out| {
        parse(out, "", "prepare p as select 1");
        run_nothing(out, "");
    });
    assert!(said.await.contains(refused));
    let said = batch(&mut wire, |out| {
        parse(out, "p", "prepare p as select 1");
        run_nothing(out, "p");
    });
    assert!(said.await.contains(refused));
    assert_eq!(batch(&mut wire, |out| run_it(out, "s", 3)).await, "2 6 C I");
    // Behind something else: nobody else gets that connection, and the client is told.
    let (messages, _) = wire.query("SELECT 1; PREPARE p AS SELECT 1").await.unwrap();
    assert!(errors(&messages).is_empty());
    let end = errors(&[wire.message().await.unwrap()]).remove(0);
    assert_eq!((end.severity.as_str(), end.sqlstate.as_str()), ("FATAL", "0A000"));
    let left = "SELECT count(*) FROM pg_prepared_statements WHERE name = 'p'";
    assert_eq!(first_cell(&other.query(left).await.unwrap().0).unwrap(), "0");
}

/// Rails and psycopg deallocate by SQL the statements that they prepared by the protocol.
#[tokio::test]
async fn a_statement_deallocated_by_sql_is_gone_for_its_client_alone() {
    let house = House::open(narrow).await;
    let (mut server, mut proxy, mut other) = (direct(&house).await, house.wire().await, house.wire().await);
    assert_eq!(batch(&mut other, |out| parse(out, "S 1", TWICE)).await, "1 I");
    for wire in [&mut server, &mut proxy] {
        assert_eq!(batch(wire, |out| parse(out, "S 1", TWICE)).await, "1 I");
        assert_eq!(query(wire, "DEALLOCATE PREPARE \"S 1\"; -- gone").await, "C I");
        assert_eq!(batch(wire, |out| run_it(out, "S 1", 1)).await, "26000 prepared statement \"S 1\" does not exist I");
        assert_eq!(query(wire, "DEALLOCATE s1").await, "26000 prepared statement \"s1\" does not exist I");
        assert_eq!(batch(wire, |out| parse(out, "s1", TWICE)).await, "1 I");
        assert_eq!(query(wire, "BEGIN").await, "C T");
        assert_eq!(query(wire, "DEALLOCATE S1").await, "C T");
        assert!(query(wire, "SELECT nothing").await.starts_with("42703"));
        assert_eq!(query(wire, "ROLLBACK").await, "C I");
        assert_eq!(batch(wire, |out| parse(out, "s1", TWICE)).await, "1 I");
        assert_eq!(query(wire, "BEGIN").await, "C T");
        assert!(query(wire, "SELECT nothing").await.starts_with("42703"));
        assert!(query(wire, "DEALLOCATE s1").await.starts_with("25P02"));
        assert_eq!(query(wire, "ROLLBACK").await, "C I");
        assert_eq!(batch(wire, |out| run_it(out, "s1", 3)).await, "2 6 C I");
        // By the extended protocol, as psycopg does in a pipeline; what is prepared only takes nothing away.
        let deallocate = |out: &mut BytesMut| parse(out, "", "deallocate S1");
        assert_eq!(batch(wire, deallocate).await, "1 I");
        assert_eq!(batch(wire, |out| run_it(out, "s1", 3)).await, "2 6 C I");
        let gone = "26000 prepared statement \"s1\" does not exist I";
        for answer in ["1 2 C I".to_owned(), format!("1 2 {gone}")] {
            let said = batch(wire, |out| {
                deallocate(out);
                run_nothing(out, "");
            });
            assert_eq!(said.await, answer);
            assert_eq!(batch(wire, |out| run_it(out, "s1", 3)).await, gone);
        }
    }
    assert_eq!(batch(&mut other, |out| run_it(out, "S 1", 4)).await, "2 8 C I");
}

async fn query(wire: &mut Wire, sql: &str) -> String {
    let mut out = BytesMut::new();
    frontend::query(sql, &mut out).unwrap();
    wire.send(&out).await.unwrap();
    answers(wire).await
}

/// Some drivers prepare the unnamed statement, read its description, and bind it in a batch of its own: by then another
/// client may have had the server connection.
#[tokio::test]
async fn an_unnamed_statement_is_never_another_clients() {
    let house = House::open(narrow).await;
    let (mut one, mut two) = (house.wire().await, house.wire().await);
    for n in 1..4 {
        assert_eq!(batch(&mut one, |out| parse(out, "", TWICE)).await, "1 I");
        assert_eq!(batch(&mut two, |out| parse(out, "", "SELECT $1::int + 100")).await, "1 I");
        assert_eq!(batch(&mut one, |out| frontend::describe(b'S', "", out).unwrap()).await, "t T I");
        assert_eq!(batch(&mut two, |out| run_it(out, "", n)).await, format!("2 {} C I", n + 100));
        assert_eq!(batch(&mut one, |out| run_it(out, "", n)).await, format!("2 {} C I", n * 2));
        // Bound and run: it is not kept for ever.
        let gone = "26000 unnamed prepared statement does not exist I";
        assert_eq!(batch(&mut one, |out| run_it(out, "", n)).await, gone);
    }
    assert_eq!(batch(&mut one, |out| parse(out, "", TWICE)).await, "1 I");
    assert_eq!(query(&mut one, "SELECT 1").await, "T 1 C I");
    let gone = "26000 unnamed prepared statement does not exist I";
    assert_eq!(batch(&mut one, |out| run_it(out, "", 1)).await, gone, "as everywhere after a Query");
    // A text longer than a buffer is kept too.
    let long = format!("SELECT $1::int + length('{}')", "x".repeat(100_000));
    assert_eq!(batch(&mut one, |out| parse(out, "", &long)).await, "1 I");
    assert_eq!(batch(&mut two, |out| parse(out, "", TWICE)).await, "1 I");
    assert_eq!(batch(&mut one, |out| run_it(out, "", 5)).await, "2 100005 C I");
}

#[tokio::test]
async fn a_changed_result_type_is_refused_until_the_client_can_know_of_it() {
    let house = House::open(|options| options.setting("default_pool_size", 2)).await;
    let superuser = house.superuser().await;
    let table = "CREATE TABLE changing (a int); GRANT ALL ON changing TO app; INSERT INTO changing VALUES (5)";
    superuser.run(table).await.unwrap();
    let (mut blind, mut sees) = (house.wire().await, house.wire().await);
    let (mut other, mut third) = (house.wire().await, house.wire().await);
    let all = "SELECT * FROM changing";
    let see = |out: &mut BytesMut| {
        bind_portal(out, "", "s");
        frontend::describe(b'P', "", out).unwrap();
        frontend::execute("", 0, out).unwrap();
    };
    // One server connection is kept away: what is prepared is prepared on the other one.
    assert_eq!(query(&mut other, "BEGIN").await, "C T");
    for wire in [&mut blind, &mut sees] {
        assert_eq!(batch(wire, |out| parse(out, "s", all)).await, "1 I");
    }
    assert_eq!(batch(&mut blind, |out| run_nothing(out, "s")).await, "2 5 C I");
    assert_eq!(batch(&mut sees, see).await, "2 T 5 C I");
    superuser.run("ALTER TABLE changing ADD b int").await.unwrap();
    let stale = "0A000 cached plan must not change result type I";
    // Who relies on the old description is refused as by PostgreSQL,
    for _ in 0..3 {
        assert_eq!(batch(&mut blind, |out| run_nothing(out, "s")).await, stale);
    }
    // also where the statement would be prepared anew.
    assert_eq!(query(&mut third, "BEGIN").await, "C T");
    assert_eq!(query(&mut other, "COMMIT").await, "C I");
    for _ in 0..3 {
        assert_eq!(batch(&mut blind, |out| run_nothing(out, "s")).await, stale);
    }
    assert_eq!(query(&mut third, "COMMIT").await, "C I");
    // Who has each result described need not know; nor who describes it or prepares it again.
    assert_eq!(batch(&mut sees, see).await, "2 T 5 C I");
    assert_eq!(batch(&mut blind, |out| parse(out, "t", all)).await, "1 I");
    assert_eq!(batch(&mut blind, |out| run_nothing(out, "t")).await, "2 5 C I");
    assert_eq!(batch(&mut blind, |out| frontend::describe(b'S', "s", out).unwrap()).await, "t T I");
    assert_eq!(batch(&mut blind, |out| run_nothing(out, "s")).await, "2 5 C I");
}

#[tokio::test]
async fn show_tells_how_many_there_are() {
    let house = House::open(narrow).await;
    let mut wire = house.wire().await;
    assert_eq!(batch(&mut wire, |out| (0..5).for_each(|n| parse(out, &format!("s{n}"), TWICE))).await, "1 1 1 1 1 I");
    assert_eq!(batch(&mut wire, |out| parse(out, "t", "SELECT 1")).await, "1 I");
    let admin = house.proxy.admin().await.unwrap();
    for (table, wanted) in [("CLIENTS", "6"), ("SERVERS", "2")] {
        let rows = admin.rows(&format!("SHOW {table}")).await.unwrap();
        let row = rows.iter().find(|row| row.get("user") == Some(APP)).unwrap();
        assert_eq!(row.get("prepared_statements"), Some(wanted), "{table}");
    }
    let config = admin.rows("SHOW CONFIG").await.unwrap();
    let row = config.iter().find(|row| row.get("key") == Some("max_prepared_statements")).unwrap();
    assert_eq!((row.get("value"), row.get("default")), (Some("2"), Some("200")));
}

#[tokio::test]
async fn pgbench_prepares_with_more_clients_than_servers_and_more_statements_than_they_keep() {
    let house = House::open(|options| {
        options.setting("default_pool_size", 2);
        options.setting("max_prepared_statements", 3);
    })
    .await;
    let script = house.proxy.dir().join("script.sql");
    let statements = "\\set aid random(1, 1000)\nBEGIN;\nUPDATE accounts SET abalance = abalance + 1 WHERE aid = :aid;\n\
         SELECT abalance FROM accounts WHERE aid = :aid;\nSELECT :aid + 1;\nSELECT :aid + 2;\nEND;\n";
    fs::write(&script, statements).unwrap();
    let (script, dsn) = (script.display().to_string(), house.dsn(APP));
    let arguments = ["-n", "-M", "prepared", "-c", "16", "-j", "16", "-t", "100", "-f", &script, &dsn];
    let output = run("pgbench", &arguments).await;
    assert!(stdout(&output).contains("number of transactions actually processed: 1600/1600"), "{output:?}");
    let sum = house.superuser().await.number("SELECT sum(abalance)::bigint FROM accounts").await.unwrap();
    assert_eq!(sum, 1600, "each transaction once");
}

#[tokio::test]
async fn pgbench_prepares_across_switches_without_an_error() {
    let stand = Stand::start(&[13, 17], |options, _| {
        options.setting("default_pool_size", 2);
        options.setting("max_prepared_statements", 3);
    })
    .await;
    let script = stand.proxy.dir().join("script.sql");
    fs::write(&script, "\\set n random(1, 9)\nSELECT :n;\nBEGIN;\nSELECT :n + 1;\nSELECT :n + 2;\nEND;\n").unwrap();
    let dsn = format!("host=127.0.0.1 port={} user={APP} password={} dbname=app", stand.proxy.port(), password(APP));
    let mut command = Command::new(tool("pgbench").unwrap());
    command.args(["-n", "-M", "prepared", "-c", "16", "-j", "16", "-t", "400", "-f"]).arg(&script).arg(dsn);
    let running = tokio::task::spawn_blocking(move || command.env("LC_ALL", "C").output().unwrap());
    let mut switches = 0;
    while !running.is_finished() && switches < 6 {
        let target = if switches % 2 == 0 { "green" } else { "blue" };
        stand.ask("PAUSE app WITH (drain '2s', lease '9s')").await;
        stand.ask(&format!("SWITCH app TO {target} WITH (force)")).await;
        stand.ask("RESUME app").await;
        switches += 1;
    }
    let output = running.await.unwrap();
    assert!(stdout(&output).contains("number of transactions actually processed: 6400/6400"), "{output:?}");
    assert!(switches >= 2, "only {switches} switches under load");
}

#[tokio::test]
async fn they_can_be_switched_off() {
    let house = House::open(|options| options.setting("max_prepared_statements", 0)).await;
    let error = house.connect(APP).await.prepare("SELECT 1").await.unwrap_err();
    assert_eq!(sqlstate(&error), "0A000");
}
