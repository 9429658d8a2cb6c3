//! Everyday traffic: what clients of a server can do, they can do through the proxy.
//!
//! Invariant: real clients (psql, pgbench, the driver, raw bytes), a real server; nothing of one client's session is seen
//! by the next one that gets its server connection.

use std::fs;

use bytes::BytesMut;
use e2e::pair::{APP, DATABASE, OTHER, PairOptions, SOURCE, password};
use e2e::proxy::ProxyOptions;
use e2e::tls::Authority;
use futures_util::{SinkExt, StreamExt, pin_mut};
use postgres_protocol::IsNull;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::house::{
    House, LIMIT, errors, first_cell, message, run, sqlstate, stderr, stdout, table, trusted, until, user_setting,
};

/// One server connection for everybody.
fn one_server(options: &mut ProxyOptions) {
    options.setting("default_pool_size", 1);
}

fn session_pooled(options: &mut ProxyOptions) {
    options.setting("pool_mode", "session");
}

#[tokio::test]
async fn pgbench_runs_in_every_protocol_that_its_pool_mode_allows() {
    let house = House::open(|options| {
        options.setting("default_pool_size", 3);
        user_setting(options, OTHER, "pool_mode", "session");
        user_setting(options, OTHER, "pool_size", 8);
    })
    .await;
    let script = house.proxy.dir().join("script.sql");
    fs::write(
        &script,
        "\\set aid random(1, 1000)\nBEGIN;\nUPDATE accounts SET abalance = abalance + 1 WHERE aid = :aid;\n\
         SELECT abalance FROM accounts WHERE aid = :aid;\nEND;\n",
    )
    .unwrap();
    for (user, protocol) in [(APP, "simple"), (APP, "extended"), (OTHER, "prepared")] {
        let dsn = house.dsn(user);
        let script = script.display().to_string();
        let output =
            run("pgbench", &["-n", "-M", protocol, "-c", "8", "-j", "2", "-t", "50", "-f", &script, &dsn]).await;
        assert!(stdout(&output).contains("number of transactions actually processed: 400/400"), "{output:?}");
    }
    let sum = house.superuser().await.number("SELECT sum(abalance)::bigint FROM accounts").await.unwrap();
    assert_eq!(sum, 1200, "each transaction once");
}

#[tokio::test]
async fn psql_logs_in_by_verifier_md5_and_trust() {
    for method in ["scram-sha-256", "md5", "trust"] {
        let mut house = House::open(|options| options.setting("auth_type", method)).await;
        let superuser = house.superuser().await;
        if method == "md5" {
            let hba = house.server.data().join("pg_hba.conf");
            let rules = fs::read_to_string(&hba).unwrap().replace("scram-sha-256", "md5");
            fs::write(&hba, rules).unwrap();
            superuser.run("SELECT pg_reload_conf()").await.unwrap();
            superuser.run("SET password_encryption = 'md5'; ALTER ROLE app PASSWORD 'app-secret'").await.unwrap();
            let digest = "SELECT rolpassword FROM pg_authid WHERE rolname = 'app'";
            let digest = superuser.text(digest).await.unwrap().unwrap();
            assert!(digest.starts_with("md5"));
            let users = &mut house.proxy.options().users;
            users.retain(|line| !line.starts_with("\"app\""));
            users.push(format!("\"app\" \"{digest}\""));
        }
        if method == "trust" {
            let users = &mut house.proxy.options().users;
            users.retain(|line| !line.starts_with("\"app\""));
            users.push(format!("\"app\" \"{}\"", password(APP)));
        }
        house.proxy.write().unwrap();
        house.proxy.restart().await.unwrap();
        let output = house.psql(&house.dsn(APP), "SELECT current_user || '@' || current_database()").await;
        assert_eq!(stdout(&output).trim(), "app@app", "{method}");
        if method != "trust" {
            let wrong = house.dsn(APP).replace("app-secret", "guess");
            assert!(
                stderr(&house.psql(&wrong, "SELECT 1").await).contains("password authentication failed"),
                "{method}"
            );
        }
    }
}

#[tokio::test]
async fn tls_is_spoken_to_clients_and_to_servers_and_names_are_verified() {
    let authority = Authority::create().unwrap();
    let mut pair = PairOptions::new(17, 17);
    pair.source.tls = Some(authority.sign("server", &["localhost"]).unwrap());
    let own = authority.sign("proxy", &["localhost"]).unwrap();
    let root = authority.certificate().display().to_string();
    let mut house = House::with(pair, |options| {
        options.setting("client_tls_sslmode", "require");
        options.setting("client_tls_cert_file", own.certificate.display().to_string());
        options.setting("client_tls_key_file", own.key.display().to_string());
        let backend = table(table(options.database(DATABASE), "backends"), SOURCE);
        backend.insert("host".to_owned(), "localhost".into());
        backend.insert("sslmode".to_owned(), "verify-full".into());
        backend.insert("sslrootcert".to_owned(), root.clone().into());
    })
    .await;
    let dsn = house.dsn(APP).replace("host=127.0.0.1", "host=localhost hostaddr=127.0.0.1");
    let verified = format!("{dsn} sslmode=verify-full sslrootcert={root}");
    let ssl = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert_eq!(stdout(&house.psql(&verified, ssl).await).trim(), "t");
    let sum = "SELECT length(string_agg(n::text, '')) FROM generate_series(1, 200000) n";
    assert_eq!(stdout(&house.psql(&verified, sum).await).trim(), "1088895");
    assert!(stderr(&house.psql(&format!("{dsn} sslmode=disable"), "SELECT 1").await).contains("TLS"));
    let wrong_name = house.dsn(APP) + &format!(" sslmode=verify-full sslrootcert={root}");
    stderr(&house.psql(&wrong_name, "SELECT 1").await);
    // The server's certificate is not for this name: no client may be let through to it.
    let backend = table(table(house.proxy.options().database(DATABASE), "backends"), SOURCE);
    backend.insert("host".to_owned(), "127.0.0.1".into());
    house.proxy.write().unwrap();
    house.proxy.restart().await.unwrap();
    let complaint = stderr(&house.psql(&verified, "SELECT 1").await);
    assert!(complaint.contains("not available") && !complaint.contains("127.0.0.1\" is"), "{complaint}");
}

#[tokio::test]
async fn settings_follow_their_client_over_one_server_connection() {
    let house = House::open(|options| {
        one_server(options);
        options.setting("auth_type", "trust");
        options.users.retain(|line| !line.starts_with("\"app\""));
        options.users.push(format!("\"app\" \"{}\"", password(APP)));
    })
    .await;
    let port = house.proxy.port();
    let common = [("user", APP), ("database", DATABASE)];
    let first = [
        ("client_encoding", "LATIN1"),
        ("DateStyle", "German, DMY"),
        ("TimeZone", "Asia/Tokyo"),
        ("application_name", "it's \\ first"),
        ("options", "-c work_mem=7MB -c app.tenant=one"),
        ("statement_timeout", "54321"),
    ];
    let (mut one, _) = trusted(port, &[&common[..], &first].concat()).await.unwrap();
    let (mut two, _) = trusted(port, &common).await.unwrap();
    let seen = "SELECT concat_ws('|', current_setting('client_encoding'), current_setting('DateStyle'), \
        current_setting('TimeZone'), current_setting('application_name'), current_setting('work_mem'), \
        current_setting('app.tenant', true), current_setting('statement_timeout'), pg_backend_pid())";
    let mut pids = Vec::new();
    for _ in 0..3 {
        let (messages, _) = one.query(seen).await.unwrap();
        let told = first_cell(&messages).unwrap();
        let (told, pid) = told.rsplit_once('|').unwrap();
        pids.push(pid.to_owned());
        assert_eq!(told, "LATIN1|German, DMY|Asia/Tokyo|it's \\ first|7MB|one|54321ms");
        let (messages, _) = two.query(seen).await.unwrap();
        let told = first_cell(&messages).unwrap();
        let (told, pid) = told.rsplit_once('|').unwrap();
        pids.push(pid.to_owned());
        assert!(told.starts_with("UTF8|ISO, MDY|UTC||4MB|"), "{told}");
        assert!(!told.contains("one") && told.ends_with("|0"), "{told}");
    }
    pids.dedup();
    assert_eq!(pids.len(), 1, "one server connection served both");
    // What a client SETs of the reported settings follows it, too, and does not stay behind.
    let (messages, _) = two.query("SET TimeZone = 'America/Lima'").await.unwrap();
    assert!(messages.iter().any(|message| matches!(message, Message::ParameterStatus(_))));
    assert_eq!(first_cell(&one.query("SHOW TimeZone").await.unwrap().0).unwrap(), "Asia/Tokyo");
    assert_eq!(first_cell(&two.query("SHOW TimeZone").await.unwrap().0).unwrap(), "America/Lima");
    let nonsense = [&common[..], &[("no_such_setting", "1")]].concat();
    let refused = match trusted(port, &nonsense).await {
        Err(report) => report,
        Ok((mut wire, _)) => {
            let output = {
                let mut output = BytesMut::new();
                frontend::query("SELECT 1", &mut output).unwrap();
                output
            };
            wire.send(&output).await.unwrap();
            errors(&[wire.message().await.unwrap()]).remove(0)
        }
    };
    assert!(refused.severity == "FATAL" && refused.message.contains("no_such_setting"), "{refused}");
    assert_eq!(first_cell(&one.query("SHOW TimeZone").await.unwrap().0).unwrap(), "Asia/Tokyo");
}

#[tokio::test]
async fn a_session_pooled_client_keeps_its_session_and_leaves_nothing_behind() {
    let house = House::open(|options| {
        one_server(options);
        session_pooled(options);
    })
    .await;
    let mut wire = house.wire().await;
    for sql in
        ["SET work_mem = '9MB'", "CREATE TEMP TABLE mine AS SELECT 42 AS n", "LISTEN news", "PREPARE p AS SELECT 7"]
    {
        assert!(errors(&wire.query(sql).await.unwrap().0).is_empty(), "{sql}");
    }
    let pid = first_cell(&wire.query("SELECT pg_backend_pid()").await.unwrap().0).unwrap();
    assert_eq!(first_cell(&wire.query("SELECT n FROM mine").await.unwrap().0).unwrap(), "42");
    assert_eq!(first_cell(&wire.query("SHOW work_mem").await.unwrap().0).unwrap(), "9MB");
    assert_eq!(first_cell(&wire.query("EXECUTE p").await.unwrap().0).unwrap(), "7");
    // A notification reaches a client that says nothing.
    house.superuser().await.run("NOTIFY news, 'hello'").await.unwrap();
    let Message::NotificationResponse(news) = wire.message().await.unwrap() else { panic!("no notification") };
    assert_eq!((news.channel().unwrap(), news.message().unwrap()), ("news", "hello"));
    let mut goodbye = BytesMut::new();
    frontend::terminate(&mut goodbye);
    wire.send(&goodbye).await.unwrap();
    let mut next = house.wire().await;
    assert_eq!(first_cell(&next.query("SELECT pg_backend_pid()").await.unwrap().0).unwrap(), pid);
    assert_eq!(first_cell(&next.query("SHOW work_mem").await.unwrap().0).unwrap(), "4MB");
    let left = "SELECT (SELECT count(*) FROM pg_listening_channels()) + (SELECT count(*) FROM pg_prepared_statements) \
        + (SELECT count(*) FROM pg_class WHERE relname = 'mine')";
    assert_eq!(first_cell(&next.query(left).await.unwrap().0).unwrap(), "0");
}

#[tokio::test]
async fn a_database_may_have_another_name_and_another_user_on_the_server() {
    let house = House::open(|options| {
        let port = options.config["databases"][DATABASE]["backends"][SOURCE]["port"].clone();
        let alias = options.database("alias");
        alias.insert("active".to_owned(), SOURCE.into());
        let backend = table(table(alias, "backends"), SOURCE);
        backend.insert("host".to_owned(), "127.0.0.1".into());
        backend.insert("port".to_owned(), port);
        backend.insert("dbname".to_owned(), DATABASE.into());
        backend.insert("user".to_owned(), OTHER.into());
        backend.insert("password".to_owned(), password(OTHER).into());
    })
    .await;
    let dsn = house.dsn(APP).replace("dbname=app", "dbname=alias");
    let output = house.psql(&dsn, "SELECT current_user || '@' || current_database()").await;
    assert_eq!(stdout(&output).trim(), "other@app");
}

#[tokio::test]
async fn copy_goes_both_ways_and_an_error_in_the_middle_costs_one_statement() {
    let house = House::open(one_server).await;
    house.superuser().await.run("CREATE TABLE copied (n int); GRANT ALL ON copied TO app").await.unwrap();
    let mut wire = house.wire().await;
    let mut output = BytesMut::new();
    frontend::query("COPY copied FROM STDIN", &mut output).unwrap();
    wire.send(&output).await.unwrap();
    assert!(matches!(wire.message().await.unwrap(), Message::CopyInResponse(_)));
    for n in 0..10_000 {
        wire.send(&message(b'd', format!("{n}\n").as_bytes())).await.unwrap();
    }
    wire.send(&message(b'c', b"")).await.unwrap();
    let (before, status) = wire.until_ready().await.unwrap();
    assert!(errors(&before).is_empty() && status == b'I');
    // An error in the middle: the client does not know yet and sends on.
    wire.send(&output).await.unwrap();
    assert!(matches!(wire.message().await.unwrap(), Message::CopyInResponse(_)));
    wire.send(&message(b'd', b"nonsense\n")).await.unwrap();
    wire.send(&message(b'd', &b"1\n".repeat(10_000))).await.unwrap();
    let (before, status) = wire.until_ready().await.unwrap();
    assert_eq!((errors(&before)[0].sqlstate.as_str(), status), ("22P02", b'I'));
    for _ in 0..50 {
        wire.send(&message(b'd', b"2\n")).await.unwrap();
    }
    wire.send(&message(b'c', b"")).await.unwrap();
    assert_eq!(first_cell(&wire.query("SELECT count(*) FROM copied").await.unwrap().0).unwrap(), "10000");
    // Late CopyData has cost nobody the one server connection.
    let mut next = house.wire().await;
    let (copied, status) = next.query("COPY copied TO STDOUT").await.unwrap();
    let rows = copied.iter().filter(|message| matches!(message, Message::CopyData(_))).count();
    assert_eq!((rows, status), (10_000, b'I'));
    // By the driver, in a transaction of its own, extended protocol: named statements need session pooling.
    let session = House::open(session_pooled).await;
    session.superuser().await.run("CREATE TABLE copied (n int); GRANT ALL ON copied TO app").await.unwrap();
    let client = session.connect(APP).await;
    let sink = client.copy_in("COPY copied FROM STDIN").await.unwrap();
    pin_mut!(sink);
    sink.send(bytes::Bytes::from_static(b"1\n2\n3\n")).await.unwrap();
    assert_eq!(sink.finish().await.unwrap(), 3);
    let stream = client.copy_out("COPY copied TO STDOUT").await.unwrap();
    assert_eq!(stream.count().await, 3);
}

#[tokio::test]
async fn a_row_and_a_query_of_a_hundred_megabytes_pass() {
    const BYTES: usize = 100 * 1024 * 1024;
    let house = House::open(one_server).await;
    let mut wire = house.wire().await;
    let mut output = BytesMut::new();
    frontend::query(&format!("SELECT repeat('x', {BYTES})"), &mut output).unwrap();
    wire.send(&output).await.unwrap();
    let (messages, status) = wire.until_ready().await.unwrap();
    let row = messages.iter().find_map(|m| if let Message::DataRow(row) = m { Some(row.buffer().len()) } else { None });
    assert_eq!((row, status), (Some(BYTES + 4), b'I'));
    drop(messages);
    let (messages, _) = wire.query(&format!("SELECT length('{}')", "y".repeat(BYTES))).await.unwrap();
    assert_eq!(first_cell(&messages).unwrap(), BYTES.to_string());
}

#[tokio::test]
async fn a_thousand_pipelined_statements_get_a_thousand_answers_in_order() {
    const COUNT: usize = 1000;
    let house = House::open(one_server).await;
    for extended in [true, false] {
        let mut output = BytesMut::new();
        for n in 0..COUNT {
            if extended {
                frontend::parse("", "SELECT $1::int", [23], &mut output).unwrap();
                let text = |value: String, buffer: &mut BytesMut| {
                    buffer.extend_from_slice(value.as_bytes());
                    Ok(IsNull::No)
                };
                frontend::bind("", "", [0], [n.to_string()], text, [0], &mut output).map_err(|_error| n).unwrap();
                frontend::execute("", 0, &mut output).unwrap();
                frontend::sync(&mut output);
            } else {
                frontend::query(&format!("SELECT {n}"), &mut output).unwrap();
            }
        }
        let mut wire = house.wire().await;
        // Two batches in flight at once: one is read while the other one is written.
        wire.send(&output).await.unwrap();
        for n in 0..COUNT {
            let (messages, status) = wire.until_ready().await.unwrap();
            assert_eq!((first_cell(&messages), status), (Some(n.to_string()), b'I'), "extended: {extended}");
        }
    }
}

#[tokio::test]
async fn function_calls_notices_errors_and_empty_queries_pass() {
    let house = House::open(one_server).await;
    let mut wire = house.wire().await;
    // textlen(text), OID 1257, text in, text out.
    let mut call = vec![0, 0, 4, 233, 0, 0, 0, 1, 0, 0, 0, 3];
    call.extend_from_slice(b"ABC");
    call.extend_from_slice(&[0, 0]);
    wire.send(&message(b'F', &call)).await.unwrap();
    let mut answer = [0; 10];
    wire.stream().read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"V\0\0\0\x09\0\0\0\x013");
    assert_eq!(wire.until_ready().await.unwrap().1, b'I');
    let (messages, status) = wire.query("DO $$BEGIN RAISE NOTICE 'look'; END$$").await.unwrap();
    assert!(messages.iter().any(|m| matches!(m, Message::NoticeResponse(_))) && status == b'I');
    let (messages, status) = wire.query("SELECT 1; SELECT 1/0; SELECT 2").await.unwrap();
    assert_eq!((errors(&messages)[0].sqlstate.as_str(), status), ("22012", b'I'));
    let (messages, status) = wire.query("").await.unwrap();
    assert!(matches!(messages[..], [Message::EmptyQueryResponse]) && status == b'I');
    let (messages, status) = wire.query("BEGIN; SELECT nonsense").await.unwrap();
    assert_eq!((errors(&messages)[0].sqlstate.as_str(), status), ("42703", b'E'));
    assert_eq!(wire.query("ROLLBACK").await.unwrap().1, b'I');
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_transaction_rolls_back_and_the_next_one_is_served_at_once() {
    let house = House::open(one_server).await;
    let superuser = house.superuser().await;
    for busy in [false, true] {
        let mut vanishing = house.wire().await;
        assert_eq!(
            vanishing.query("BEGIN; UPDATE accounts SET abalance = 99; SET work_mem = '8MB'").await.unwrap().1,
            b'T'
        );
        if busy {
            let mut output = BytesMut::new();
            frontend::query("SELECT pg_sleep(60)", &mut output).unwrap();
            vanishing.send(&output).await.unwrap();
            let active =
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
            superuser.until(active, LIMIT).await.unwrap();
        }
        // Somebody waits for the only server connection already.
        let next = house.connect(APP).await;
        let waiting = tokio::spawn(async move {
            next.text("SELECT current_setting('work_mem') || (SELECT sum(abalance) FROM accounts)").await
        });
        until("a client waits", async || {
            let rows = house.proxy.ask("SHOW POOLS").await.unwrap();
            rows.iter().any(|row| row.get("database") == Some(DATABASE) && row.get("cl_waiting") == Some("1"))
        })
        .await;
        vanishing.stream().set_zero_linger().unwrap();
        drop(vanishing);
        let seen = tokio::time::timeout(LIMIT, waiting).await.expect("the waiting client is served").unwrap();
        assert_eq!(seen.unwrap().unwrap(), "4MB0", "busy: {busy}");
    }
}

#[tokio::test]
async fn a_named_statement_where_they_are_switched_off_is_refused_loudly() {
    let house = House::open(|options| {
        one_server(options);
        options.setting("max_prepared_statements", 0);
    })
    .await;
    let client = house.connect(APP).await;
    let error = client.prepare("SELECT 1").await.unwrap_err();
    assert_eq!(sqlstate(&error), "0A000");
    let hint = error.as_db_error().unwrap().hint().unwrap().to_owned();
    assert!(hint.contains("session pooling"), "{hint}");
    // Also if its name comes in a packet of its own.
    let mut wire = house.wire().await;
    let mut parse = BytesMut::new();
    frontend::parse("name", "SELECT 1", [], &mut parse).unwrap();
    wire.send(&parse[..5]).await.unwrap();
    wire.stream().flush().await.unwrap();
    wire.send(&parse[5..]).await.unwrap();
    assert_eq!(errors(&[wire.message().await.unwrap()])[0].sqlstate, "0A000");
    assert!(house.connect(APP).await.number("SELECT 1").await.is_ok());
}

#[tokio::test]
async fn what_the_server_reports_at_a_login_is_what_its_clients_are_told() {
    let house = House::open(|_| ()).await;
    let mut pairs = Vec::new();
    for port in [house.server.port(), house.proxy.port()] {
        let (_, welcome) = e2e::wire::Wire::log_in(port, APP, &password(APP), DATABASE).await.unwrap();
        let mut told: Vec<(String, String)> = Vec::new();
        for message in welcome {
            if let Message::ParameterStatus(body) = message {
                told.push((body.name().unwrap().to_owned(), body.value().unwrap().to_owned()));
            }
        }
        // Of the user itself, and known only once a server has let it in.
        told.retain(|(name, _)| name != "is_superuser");
        told.sort();
        pairs.push(told);
    }
    assert!(pairs[0].len() > 10);
    assert_eq!(pairs[0], pairs[1]);
}
