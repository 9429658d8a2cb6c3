//! Live sessions move with a switch: the client keeps its connection and all that its session is made of.
//!
//! Invariant: all sessions of a database move, or all stay where they were and work there.

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::pair::{APP, Pair, PairOptions, TARGET};
use e2e::stage::Stage;
use futures_util::StreamExt;
use pgcutover_api::store::Outcome;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_postgres::{AsyncMessage, Config, NoTls, Statement};

use crate::armed::LIMIT;
use crate::stand::{Answer, Stand, WHERE, answered, claim, eventually, pause, sent, session_pooled};

const TRANSPLANT: &str = "TRANSPLANT app TO green WITH (force)";
const TO_GREEN: &str = "SWITCH app TO green WITH (force)";

async fn stand() -> Stand {
    stand_with("refuse").await
}

async fn stand_with(policy: &str) -> Stand {
    let stand = Stand::start(&[13, 17], |options, _| {
        session_pooled(options, APP);
        options.setting("default_pool_size", 60);
        options.database("app").insert("session_policy".to_owned(), policy.into());
    })
    .await;
    for server in &stand.servers {
        let setup = "CREATE ROLE worker; GRANT worker TO app; CREATE TABLE IF NOT EXISTS words (n int, word text)";
        server
            .superuser("app")
            .await
            .unwrap()
            .run(&format!("{setup}; GRANT ALL ON words TO app, worker"))
            .await
            .unwrap();
    }
    stand
}

/// Draws from two sequences, one of them an identity column's.
const INSERT: &str = "INSERT INTO ledger (client, n, aid, delta) VALUES ($1, 1, 1, 0)";

/// What a session knows of the sequences that it has used.
const DRAWN: &str = "SELECT concat_ws(' ', lastval(), currval('ticket'), currval('ledger_id_seq'))";

/// A client, and what notifications it gets.
async fn listener(port: u16) -> (tokio_postgres::Client, UnboundedReceiver<String>) {
    let mut config = Config::new();
    config.host("127.0.0.1").port(port).user(APP).password(e2e::pair::password(APP)).dbname("app");
    let (client, mut connection) = config.connect(NoTls).await.unwrap();
    let (notes, heard) = tokio::sync::mpsc::unbounded_channel();
    let messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
    // Ends with the client.
    tokio::spawn(messages.for_each(move |message| {
        if let Ok(AsyncMessage::Notification(note)) = message {
            let _ = notes.send(note.payload().to_owned());
        }
        std::future::ready(())
    }));
    (client, heard)
}

/// Gives a session some of everything, without a sequence and without anything temporary.
async fn furnish(client: &tokio_postgres::Client) -> Statement {
    client.batch_execute("SET work_mem = '7MB'; SET my.tenant = 'seven'; LISTEN news").await.unwrap();
    client.batch_execute("PREPARE twice AS SELECT $1::int * 2").await.unwrap();
    client.prepare("SELECT count(*) FROM accounts WHERE bid < $1").await.unwrap()
}

/// The session is what it was, on the server with this port.
async fn is_furnished(client: &tokio_postgres::Client, statement: &Statement, port: i64) {
    let settings = "SELECT inet_server_port(), current_setting('work_mem'), current_setting('my.tenant')";
    let row = client.query_one(settings, &[]).await.unwrap();
    assert_eq!((i64::from(row.get::<_, i32>(0)), row.get(1), row.get(2)), (port, "7MB", "seven"));
    assert_eq!(client.query_one(statement, &[&99_i32]).await.unwrap().get::<_, i64>(0), 1000);
    assert_eq!(client.query_one("EXECUTE twice(21)", &[]).await.unwrap().get::<_, i32>(0), 42);
}

/// Verdict and reason of each session.
async fn transplant(stand: &Stand) -> Vec<(String, String)> {
    let rows = stand.ask(TRANSPLANT).await;
    let cell = |row: &tokio_postgres::SimpleQueryRow, name| row.get(name).unwrap_or_default().to_owned();
    rows.iter().map(|row| (cell(row, "verdict"), cell(row, "reason"))).collect()
}

async fn servers_of_app(stand: &Stand, server: usize) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    stand.servers[server].superuser("postgres").await.unwrap().number(count).await.unwrap()
}

#[tokio::test]
async fn a_session_with_all_its_state_moves_to_the_new_server() {
    let stand = stand().await;
    let (client, mut heard) = listener(stand.proxy.port()).await;
    client.batch_execute("SET work_mem = '7MB'; SET ROLE worker; SET my.tenant = 'seven'; LISTEN news").await.unwrap();
    client.batch_execute("PREPARE twice AS SELECT $1::int * 2").await.unwrap();
    let longer = client.prepare("SELECT word || $1 FROM words WHERE n < $2").await.unwrap();
    client.query(&longer, &[&"!", &1_i32]).await.unwrap();
    stand.ask("PREPARE SWITCH app TO green").await;
    let sessions = stand.ask("SHOW SESSIONS").await;
    assert_eq!((sessions[0].get("movable"), sessions[0].get("reason")), (Some("yes"), Some("")));
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    assert_eq!(transplant(&stand).await, [("moved".to_owned(), String::new())]);
    let blue = stand.servers[0].superuser("app").await.unwrap();
    blue.run("NOTIFY news, 'the last of the old'").await.unwrap();
    stand.ask(TO_GREEN).await;
    stand.ask("RESUME app").await;
    assert_eq!(heard.recv().await.unwrap(), "the last of the old");
    let row = client
        .query_one(
            "SELECT inet_server_port(), current_setting('work_mem'), current_user::text, current_setting('my.tenant')",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(i64::from(row.get::<_, i32>(0)), stand.port(1));
    assert_eq!((row.get::<_, &str>(1), row.get::<_, &str>(2), row.get::<_, &str>(3)), ("7MB", "worker", "seven"));
    client.execute("INSERT INTO words VALUES (1, 'hello')", &[]).await.unwrap();
    assert_eq!(client.query_one(&longer, &[&"!", &2_i32]).await.unwrap().get::<_, &str>(0), "hello!");
    assert_eq!(client.query_one("EXECUTE twice(21)", &[]).await.unwrap().get::<_, i32>(0), 42);
    let green = stand.servers[1].superuser("app").await.unwrap();
    green.run("NOTIFY news, 'the first of the new'").await.unwrap();
    assert_eq!(heard.recv().await.unwrap(), "the first of the new");
    eventually("the old connections close", async || servers_of_app(&stand, 0).await == 0).await;
}

#[tokio::test]
async fn one_session_that_cannot_move_keeps_all_where_they_are() {
    let stand = stand().await;
    let mut clients: Vec<Client> = Vec::new();
    for _ in 0..20 {
        clients.push(stand.client().await);
    }
    for client in &clients {
        client.run("SET work_mem = '7MB'").await.unwrap();
    }
    clients[7].run("CREATE TEMP TABLE mine (n int)").await.unwrap();
    stand.ask("PREPARE SWITCH app TO green").await;
    let sessions = stand.ask("SHOW SESSIONS").await;
    let stays: Vec<_> = sessions.iter().filter(|row| row.get("movable") == Some("no")).collect();
    assert_eq!(stays.len(), 1);
    assert!(stays[0].get("reason").unwrap().contains("temporary objects"));
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    let verdicts = transplant(&stand).await;
    assert_eq!(verdicts.len(), 20);
    assert!(verdicts.iter().all(|(verdict, _)| verdict == "refused"));
    assert_eq!(verdicts.iter().filter(|(_, reason)| reason.contains("temporary objects")).count(), 1);
    assert_eq!(stand.refused(TO_GREEN).await.code().code(), "55000");
    stand.ask("RESUME app").await;
    for client in &clients {
        assert_eq!(client.number(WHERE).await.unwrap(), stand.port(0));
        assert_eq!(client.text("SHOW work_mem").await.unwrap().unwrap(), "7MB");
    }
    clients[7].run("INSERT INTO mine VALUES (1)").await.unwrap();
}

#[tokio::test]
async fn a_held_session_moves_and_its_statement_runs_on_the_new_server() {
    let stand = stand().await;
    let client = stand.client().await;
    client.run("SET work_mem = '7MB'").await.unwrap();
    let cancel = client.cancel_token();
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    let running: Answer = sent(client, "SELECT inet_server_port(), current_setting('work_mem'); SELECT pg_sleep(60)");
    stand.gate_says("held_clients", "1").await;
    assert_eq!(transplant(&stand).await, [("moved".to_owned(), String::new())]);
    assert_eq!(transplant(&stand).await, [("moved".to_owned(), String::new())], "again: as it was");
    stand.ask(TO_GREEN).await;
    stand.ask("RESUME app").await;
    let green = stand.servers[1].superuser("app").await.unwrap();
    let sleeps =
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)' AND wait_event = 'PgSleep')";
    green.until(sleeps, crate::armed::LIMIT).await.unwrap();
    cancel.cancel_query(NoTls).await.unwrap();
    assert_eq!(answered(running).await.unwrap_err().code().code(), "57014");
}

#[tokio::test]
async fn a_pause_that_ends_on_the_source_closes_the_copies() {
    let stand = stand().await;
    let client = stand.client().await;
    client.run("SET work_mem = '7MB'").await.unwrap();
    assert_eq!(stand.refused(TRANSPLANT).await.code().code(), "55000", "not paused");
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    assert_eq!(stand.refused("TRANSPLANT app TO red WITH (force)").await.code().code(), "42704");
    assert_eq!(transplant(&stand).await.len(), 1);
    assert_eq!(servers_of_app(&stand, 1).await, 1);
    stand.ask("RESUME app").await;
    eventually("the copies close", async || servers_of_app(&stand, 1).await == 0).await;
    assert_eq!(client.number(WHERE).await.unwrap(), stand.port(0));
    assert_eq!(client.text("SHOW work_mem").await.unwrap().unwrap(), "7MB");
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    assert_eq!(stand.refused(TO_GREEN).await.code().code(), "55000", "copies of a former pause are none");
}

#[tokio::test]
async fn a_session_goes_through_a_whole_cutover() {
    let pair = Pair::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17)).await.unwrap();
    let mut stage = Stage::with(pair, 2, |options| session_pooled(options, APP)).await.unwrap();
    // Tests share a machine: what they measure is not the stall.
    stage.control.budget(&[("stall", "10s")]);
    let mut sessions = Vec::new();
    for n in 0..6 {
        let (client, heard) = listener(stage.proxies[n % 2].port()).await;
        let statement = furnish(&client).await;
        // Its role may use the sequences, and not set them.
        client.execute(INSERT, &[&i32::try_from(n).unwrap()]).await.unwrap();
        let drawn: String = client.query_one(DRAWN, &[]).await.unwrap().get(0);
        sessions.push((client, statement, heard, drawn));
    }
    let source = stage.pair.source.superuser("app").await.unwrap();
    source.run("NOTIFY news, 'from the old'").await.unwrap();
    let finished = stage.control.run(&["cutover"], LIMIT * 2).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    let target = stage.pair.target.superuser("app").await.unwrap();
    target.run("NOTIFY news, 'from the new'").await.unwrap();
    for (client, statement, heard, drawn) in &mut sessions {
        is_furnished(client, statement, i64::from(stage.pair.target.port())).await;
        assert_eq!(client.query_one(DRAWN, &[]).await.unwrap().get::<_, &str>(0), drawn);
        // A number that was drawn before would not be unique.
        client.execute(INSERT, &[&99_i32]).await.unwrap();
        assert_eq!(heard.recv().await.unwrap(), "from the old");
        assert_eq!(heard.recv().await.unwrap(), "from the new");
    }
    let report = finished.json().unwrap();
    let steps = report["steps"].as_array().unwrap();
    assert!(steps.iter().any(|step| step["name"] == "transplanted"), "{report}");
    let journal = std::fs::read_to_string(report["journal"].as_str().unwrap()).unwrap();
    assert!(journal.contains("\"sessions_moved\":6"), "{journal}");
}

/// A proxy that nobody tells of the decision reads it, and gives its sessions the copies that it has.
#[tokio::test]
async fn a_proxy_that_follows_takes_its_sessions_along() {
    let stand = Stand::armed([13, 17], |options, _| session_pooled(options, APP)).await;
    let (client, mut heard) = listener(stand.proxy.port()).await;
    let statement = furnish(&client).await;
    stand.ask("PREPARE SWITCH app TO green").await;
    let turn = stand.open().await;
    // Longer than moving takes, and as long as the hold budget lets it be.
    stand.ask(&pause(&turn).replace("600ms", "1700ms")).await;
    let moved = stand.ask(&format!("TRANSPLANT app TO green WITH ({})", claim(&turn))).await;
    assert_eq!((moved.len(), moved[0].get("verdict")), (1, Some("moved")));
    assert_eq!(stand.blue().decide(&turn, Outcome::Commit, LIMIT).await.unwrap(), Outcome::Commit);
    eventually("it follows", async || stand.gate("backend").await == TARGET).await;
    stand.gate_says("state", "open").await;
    assert_eq!(stand.ask("SHOW SWITCHES").await[0].get("how"), Some("followed"));
    stand.servers[1].superuser("app").await.unwrap().run("NOTIFY news, 'from the new'").await.unwrap();
    is_furnished(&client, &statement, stand.port(1)).await;
    assert_eq!(heard.recv().await.unwrap(), "from the new");
}

/// Whoever can't move is let go where the operator has said so, but not before all else is done.
#[tokio::test]
async fn a_session_that_may_be_let_go_goes_with_the_switch_and_not_before() {
    let stand = stand_with("disconnect").await;
    let (stuck, moving) = (stand.client().await, stand.client().await);
    stuck.run("CREATE TEMP TABLE mine (n int)").await.unwrap();
    moving.run("SET work_mem = '7MB'").await.unwrap();
    stand.ask("PREPARE SWITCH app TO green").await;
    let verdicts = async || {
        let mut rows: Vec<_> = stand.ask("SHOW SESSIONS").await;
        rows.retain(|row| row.get("user") == Some(APP));
        let mut verdicts: Vec<_> = rows.iter().map(|row| row.get("verdict").unwrap().to_owned()).collect();
        verdicts.sort();
        verdicts
    };
    assert_eq!(verdicts().await, ["leaves", "moves"]);
    for switches in [false, true] {
        stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
        let mut moved = transplant(&stand).await;
        moved.sort();
        assert_eq!((moved[0].0.as_str(), moved[1].0.as_str()), ("leaves", "moved"));
        assert!(moved[0].1.contains("temporary objects"), "{moved:?}");
        if switches {
            stand.ask(TO_GREEN).await;
        }
        stand.ask("RESUME app").await;
        if !switches {
            stuck.run("INSERT INTO mine VALUES (1)").await.unwrap();
        }
    }
    let error = stuck.simple_query("SELECT 1").await.unwrap_err();
    assert!(error.is_closed() || error.code().is_some_and(|code| code.code() == "57P01"), "{error}");
    assert_eq!(moving.number(WHERE).await.unwrap(), stand.port(1));
    assert_eq!(moving.text("SHOW work_mem").await.unwrap().unwrap(), "7MB");
}

/// A restore that fails on one of many leaves all of them where they were, with all that they had.
#[tokio::test]
async fn a_restore_that_fails_on_one_of_many_leaves_all_working() {
    let stand = stand().await;
    let green = stand.servers[1].superuser("app").await.unwrap();
    let mut clients = Vec::new();
    for n in 0..40_i64 {
        let client = stand.client().await;
        client.query("SELECT pg_advisory_lock($1)", &[&n]).await.unwrap();
        client.run(&format!("PREPARE mine AS SELECT {n}")).await.unwrap();
        client.run(&format!("SET my.n = '{n}'")).await.unwrap();
        clients.push(client);
    }
    stand.ask("PREPARE SWITCH app TO green WITH (connections 2)").await;
    green.run("SELECT pg_advisory_lock(39)").await.unwrap();
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    let verdicts = transplant(&stand).await;
    assert!(verdicts.iter().all(|(verdict, _)| verdict == "refused"), "{verdicts:?}");
    assert_eq!(verdicts.iter().filter(|(_, reason)| reason.contains("an advisory lock is taken")).count(), 1);
    stand.ask("RESUME app").await;
    let holds = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
    for (n, client) in clients.iter().enumerate() {
        assert_eq!(client.number(WHERE).await.unwrap(), stand.port(0));
        assert_eq!(client.number("EXECUTE mine").await.unwrap(), i64::try_from(n).unwrap());
        assert_eq!(client.text("SHOW my.n").await.unwrap().unwrap(), n.to_string());
        assert_eq!(client.number(holds).await.unwrap(), 1);
    }
    green.run("SELECT pg_advisory_unlock(39)").await.unwrap();
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    assert!(transplant(&stand).await.iter().all(|(verdict, _)| verdict == "moved"));
    stand.ask(TO_GREEN).await;
    stand.ask("RESUME app").await;
    for client in &clients {
        assert_eq!(client.number(WHERE).await.unwrap(), stand.port(1));
        assert_eq!(client.number(holds).await.unwrap(), 1);
        assert_eq!(client.number(&holds.replace("pid =", "pid <>")).await.unwrap(), 39);
    }
}

/// Everything that looks movable and is not.
#[tokio::test]
async fn what_only_the_wire_has_seen_is_a_reason_to_stay() {
    let stand = stand().await;
    let cases = [
        ("SELECT pg_advisory_lock(1), pg_advisory_lock(1)", "advisory locks"),
        ("SELECT pg_advisory_lock(2); SELECT pg_advisory_lock('accounts'::regclass::bigint)", "advisory locks"),
        ("DO $$BEGIN PERFORM pg_advisory_lock(3); END$$", "advisory locks"),
        ("SELECT setseed(0.5)", "setseed"),
        ("SELECT set_config('my.' || 'x', '1', false)", "made at run time"),
        ("SELECT 1; PREPARE second AS SELECT 2", "together with other statements"),
        ("PREPARE p AS SELECT '1 Jan 2020'::date; SET DateStyle = 'German'", "parsed under"),
        ("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1; COMMIT", "cursor WITH HOLD"),
        ("SET SESSION AUTHORIZATION DEFAULT", "SESSION AUTHORIZATION"),
        ("CREATE TEMP VIEW v AS SELECT 1", "temporary objects"),
    ];
    let mut clients = Vec::new();
    for (sql, _) in cases {
        let client = stand.client().await;
        client.simple_query(sql).await.unwrap();
        client.run(&format!("SET application_name = '{}'", clients.len())).await.unwrap();
        clients.push(client);
    }
    stand.ask("PREPARE SWITCH app TO green").await;
    let sessions = stand.ask("SHOW SESSIONS").await;
    for (n, (sql, reason)) in cases.iter().enumerate() {
        let name = n.to_string();
        let row = sessions.iter().find(|row| row.get("application_name") == Some(&name)).unwrap();
        assert_eq!((row.get("movable"), row.get("verdict")), (Some("no"), Some("refuses")), "{sql}");
        assert!(row.get("reason").unwrap().contains(reason), "{sql}: {:?}", row.get("reason"));
    }
}

async fn notify(server: &Client, note: &str, sent: &mut Vec<String>) {
    for n in 0..50 {
        server.run(&format!("NOTIFY news, '{note} {n}'")).await.unwrap();
        sent.push(format!("{note} {n}"));
    }
}

/// Every notification arrives, once and in order: those of the old server first.
#[tokio::test]
async fn no_notification_is_lost_across_a_switch() {
    let stand = stand().await;
    let (client, mut heard) = listener(stand.proxy.port()).await;
    client.batch_execute("LISTEN news").await.unwrap();
    let [blue, green] = [0, 1].map(|server| stand.servers[server].superuser("app"));
    let (blue, green) = (blue.await.unwrap(), green.await.unwrap());
    let mut sent = Vec::new();
    notify(&blue, "at rest", &mut sent).await;
    stand.ask("PREPARE SWITCH app TO green").await;
    notify(&blue, "looked at", &mut sent).await;
    stand.ask("PAUSE app WITH (drain '1s', lease '9s')").await;
    notify(&blue, "paused", &mut sent).await;
    assert_eq!(transplant(&stand).await.len(), 1);
    notify(&blue, "transplanted", &mut sent).await;
    // Nobody writes there yet in a cutover; it is kept all the same, behind what the old server still has to say.
    notify(&green, "early", &mut sent).await;
    assert_eq!(transplant(&stand).await, [("moved".to_owned(), String::new())]);
    notify(&blue, "the last", &mut sent).await;
    let early: Vec<String> = sent.extract_if(.., |note| note.starts_with("early")).collect();
    sent.extend(early);
    stand.ask(TO_GREEN).await;
    notify(&green, "switched", &mut sent).await;
    stand.ask("RESUME app").await;
    notify(&green, "resumed", &mut sent).await;
    let mut got = Vec::new();
    while got.len() < sent.len() {
        got.push(tokio::time::timeout(LIMIT, heard.recv()).await.expect("a notification is missing").unwrap());
    }
    assert_eq!(got, sent);
    assert_eq!(client.query_one("SELECT 1", &[]).await.unwrap().get::<_, i32>(0), 1);
    assert!(heard.try_recv().is_err(), "nothing twice");
}

/// What can't move is named before anybody is held; what may be waited for is.
#[tokio::test]
async fn proxyctl_names_what_cannot_move_and_waits_for_what_may() {
    let pair = Pair::start(&Binaries::of(&[13, 17]).unwrap(), &PairOptions::new(13, 17)).await.unwrap();
    let mut stage = Stage::with(pair, 1, |options| session_pooled(options, APP)).await.unwrap();
    stage.control.budget(&[("stall", "10s"), ("drain", "5s"), ("lease", "6s")]);
    let stuck = stage.proxies[0].connect(APP).await.unwrap();
    stuck.run("SET application_name = 'reports'; CREATE TEMP TABLE mine (n int)").await.unwrap();
    let sessions = stage.control.run(&["sessions", "--look"], LIMIT).await.unwrap();
    let listed = &sessions.json().unwrap()["sessions"];
    assert_eq!((sessions.code, listed.as_array().unwrap().len()), (Some(0), 1), "{}", sessions.story());
    let line = &listed[0];
    assert_eq!((&line["verdict"], &line["user"]), (&"refuses".into(), &APP.into()));
    assert_eq!((&line["application_name"], &line["reason"]), (&"reports".into(), &"temporary objects exist".into()));
    let refused = stage.control.run(&["cutover"], LIMIT * 2).await.unwrap();
    assert_eq!(refused.code, Some(3), "{}", refused.story());
    assert!(refused.stdout.contains("reports") && refused.stdout.contains("temporary objects"), "{}", refused.story());
    stage.proxies[0].options().database("app").insert("session_policy".to_owned(), "wait".into());
    stage.proxies[0].write().unwrap();
    stage.proxies[0].admin().await.unwrap().run("RELOAD").await.unwrap();
    let running = stage.control.spawn(&["cutover"]).unwrap();
    let admin = stage.proxies[0].admin().await.unwrap();
    let waits = async || {
        let rows = admin.rows("SHOW SESSIONS").await.unwrap();
        rows.iter().any(|row| row.get("verdict") == Some("waits"))
    };
    eventually("it is waited for", waits).await;
    stuck.run("DROP TABLE mine").await.unwrap();
    let finished = running.wait(LIMIT * 2).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    assert_eq!(stuck.number(WHERE).await.unwrap(), i64::from(stage.pair.target.port()));
}
