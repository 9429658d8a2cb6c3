//! The console over a duplex stream, with a proxy of pretended gates behind it.
//!
//! Invariant: what is tested here is the console's part: what it answers, to whom, and which waits it drops.

use std::time::Duration;

use bytes::BytesMut;
use pgcutover_api::rows::{BlockerRow, GateRow, Row};
use tokio::io::AsyncWriteExt;

use super::*;
use crate::message;
use crate::metrics::page;

mod guest;
mod pretended;

use guest::{Heard, enter, enter_as};
use pretended::Pretended;

/// Every wait of these tests ends here at the latest.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn the_welcome_is_pgbouncers() {
    let (_guest, parameters) = enter_as(&Pretended::new(), Authority::Stats).await;
    let version = format!("{}/bouncer", env!("CARGO_PKG_VERSION"));
    for (name, value) in [("server_version", &*version), ("DateStyle", "ISO"), ("TimeZone", "GMT")] {
        assert!(parameters.contains(&(name.to_owned(), value.to_owned())), "{name}: {parameters:?}");
    }
    assert_eq!(parameters.len(), 7);
}

/// What pgbouncer_exporter sends on each scrape, and what it needs of each answer.
#[tokio::test]
async fn a_scrape_of_pgbouncer_exporter_is_answered() {
    const TEXT: u32 = 25;
    const INT4: u32 = 23;
    const NUMERIC: u32 = 1700;
    let mut guest = enter_as(&Pretended::new(), Authority::Stats).await.0;
    let version = guest.ask("SHOW VERSION").await;
    assert_eq!(version.columns.len(), 1);
    let (oid, values) = version.column("version");
    assert!(oid == TEXT && values[0].unwrap().contains("PgBouncer 1.25"), "{values:?}");
    let lists = guest.ask("SHOW LISTS").await;
    assert_eq!(lists.columns, [("list".to_owned(), TEXT, -1), ("items".to_owned(), INT4, 4)]);
    assert_eq!(lists.rows.len(), 14);
    let config = guest.ask("SHOW CONFIG").await;
    assert_eq!(config.columns.len(), 4);
    assert_eq!(config.column("key").1, [Some("max_client_conn"), Some("max_user_connections")]);
    assert_eq!(config.column("value").1, [Some("1000"), Some("0")]);
    let clients = guest.ask("SHOW CLIENTS").await;
    assert_eq!(clients.column("state").1, [Some("active"), Some("idle"), Some("waiting_cancel_req")]);
    assert_eq!(clients.column("database"), (TEXT, vec![Some("app"); 3]));
    let databases = guest.ask("SHOW DATABASES").await;
    for name in ["pool_size", "reserve_pool_size", "max_connections", "current_connections", "paused", "disabled"] {
        let (oid, values) = databases.column(name);
        assert!(oid == INT4 && values[0].unwrap().parse::<i32>().is_ok(), "{name}");
    }
    assert_eq!(databases.column("force_user").1, [None, None]);
    let totals = guest.ask("SHOW STATS_TOTALS").await;
    assert_eq!(totals.columns.len(), 12);
    for (name, oid, size) in &totals.columns[1..] {
        assert_eq!((*oid, *size), (NUMERIC, -1), "{name}");
    }
    assert_eq!(totals.column("xact_count").1, [Some("30"), Some("10")]);
    let pools = guest.ask("SHOW POOLS").await;
    let expected = ["1", "2", "3", "4", "7", "5", "6", "8", "9", "10", "11", "12", "13"];
    assert_eq!(pools.rows[0][2..15], expected.map(|cell| Some(cell.to_owned())));
    assert!(pools.columns[2..15].iter().all(|(_, oid, _)| *oid == INT4));
    let stats = guest.ask("SHOW STATS").await;
    assert_eq!((stats.columns.len(), stats.tag.as_deref()), (23, Some("SHOW")));
}

#[tokio::test]
async fn every_table_has_as_many_cells_as_columns() {
    let mut guest = enter(&Pretended::new()).await;
    let with_rows = Table::ALL.iter().filter(|table| !matches!(table, Table::Help | Table::Fds));
    for table in with_rows {
        let heard = guest.ask(&format!("SHOW {table}")).await;
        assert!(!heard.columns.is_empty() && heard.error.is_none(), "{table}: {heard:?}");
        assert!(heard.rows.iter().all(|row| row.len() == heard.columns.len()), "{table}: {heard:?}");
        assert_eq!(heard.tag.as_deref(), Some("SHOW"), "{table}");
    }
    assert_eq!(guest.ask("SHOW HELP").await.tags, "NCZ");
    let fds = guest.ask("SHOW FDS").await;
    assert!(fds.error('C') == "0A000" && fds.error('H').contains("SHOW SOCKETS"), "{fds:?}");
}

#[tokio::test]
async fn sockets_and_clients_have_their_own_words_for_states() {
    let mut guest = enter(&Pretended::new()).await;
    let sockets = guest.ask("SHOW SOCKETS").await;
    assert_eq!(sockets.column("state").1, [Some("cl_active"), Some("cl_active"), Some("cl_login"), Some("sv_login")]);
    assert_eq!(sockets.columns.len(), 28);
    let servers = guest.ask("SHOW SERVERS").await;
    assert_eq!(servers.column("state").1, [Some("new")]);
    assert_eq!(servers.columns.len(), 21);
    assert_eq!(servers.column("connect_time").1, [Some("2023-11-14 22:13:20 UTC")]);
    assert_eq!(servers.column("request_time").1, [None]);
    assert_eq!(servers.column("addr").1, [Some("127.0.0.1")]);
    assert_eq!(servers.column("local_addr").1, [Some("unix")]);
    let busy = guest.ask("SHOW ACTIVE_SOCKETS").await;
    assert_eq!(busy.rows.len(), 3, "the idle client is left out");
}

#[tokio::test]
async fn our_tables_have_the_columns_of_the_vocabulary() {
    let mut guest = enter(&Pretended::new()).await;
    let heard = guest.ask("SHOW GATES").await;
    let columns = heard.columns.iter().map(|(name, oid, _)| (&**name, *oid));
    assert!(columns.eq(GateRow::COLUMNS.iter().map(|column| (column.name, column.kind.oid()))));
    let prepared = guest.ask("PREPARE SWITCH app TO green WITH (connections 4)").await;
    assert_eq!(prepared.column("status").1, [Some("refused"), Some("unknown")]);
    assert_eq!((prepared.column("wanted").1[0], prepared.tag.as_deref()), (Some("4"), Some("PREPARE")));
    let moved = guest.ask("TRANSPLANT app TO green WITH (force)").await;
    assert_eq!((moved.column("verdict").1, moved.tag.as_deref()), (vec![Some("refused"); 2], Some("TRANSPLANT")));
    assert_eq!(guest.ask("SHOW BLOCKERS nowhere").await.error('C'), "42704");
    assert_eq!(guest.ask("SHOW BLOCKERS app").await.columns.len(), BlockerRow::COLUMNS.len());
}

#[tokio::test]
async fn totals_weigh_the_means_of_databases() {
    let mut guest = enter(&Pretended::new()).await;
    let totals = guest.ask("SHOW TOTALS").await;
    let value = |name: &str| {
        let at = totals.column("name").1.iter().position(|cell| *cell == Some(name)).unwrap();
        totals.column("value").1[at].unwrap().to_owned()
    };
    assert_eq!((&*value("total_xact_count"), &*value("avg_xact_count")), ("40", "4"));
    assert_eq!(value("avg_xact_time"), "200", "(3 x 100 + 1 x 500) / 4");
    assert_eq!(totals.rows.len(), 22);
}

#[tokio::test]
async fn tags_are_pgbouncers() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    for (query, tag) in [
        ("SET log_level = 'debug'", "SET log_level=debug"),
        ("set client_encoding to utf8", "SET"),
        ("reconnect app;", "RECONNECT"),
        ("WAIT_CLOSE", "WAIT_CLOSE"),
        ("KILL_CLIENT 7", "KILL_CLIENT"),
        ("disable app", "DISABLE"),
        ("ENABLE app", "ENABLE"),
        ("PAUSE app", "PAUSE"),
        ("RESUME app", "RESUME"),
        ("KILL app", "KILL"),
        ("SHUTDOWN WAIT_FOR_CLIENTS", "SHUTDOWN"),
        ("SELECT version", "SHOW"),
        ("SHOW datestyle", "SHOW"),
    ] {
        assert_eq!(guest.ask(query).await.tag.as_deref(), Some(tag), "{query}");
    }
    let calls = proxy.calls();
    for call in ["set log_level debug", "admits app no", "kill_client 7", "pause app by admin@127.0.0.1:9"] {
        assert!(calls.iter().any(|made| made == call), "{call}: {calls:?}");
    }
    assert!(!calls.iter().any(|call| call.contains("client_encoding")));
    let empty = guest.ask(" ; -- ping").await;
    assert_eq!(empty.tags, "IZ");
}

#[tokio::test]
async fn errors_carry_the_code_of_whose_verb_it_was() {
    let mut guest = enter(&Pretended::new()).await;
    let run = "run '8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f', epoch 7";
    for (query, code, message) in [
        ("PUASE", "42601", "no command"),
        ("PAUSE nowhere", "08P01", "no such database: nowhere"),
        ("RESUME", "08P01", "not paused"),
        ("RELOAD", "F0000", "pgcutover.toml"),
        ("SUSPEND", "0A000", "SUSPEND"),
        ("PAUSE app WITH (drain '2s')", "55P03", "still open"),
        ("SWITCH app TO green WITH (force)", "42704", "no such backend"),
        (&format!("RESUME app WITH ({run})"), "55000", "another run"),
        (&format!("RENEW app WITH ({run}, lease '3s')"), "57P03", "not decided"),
    ] {
        let heard = guest.ask(query).await;
        assert_eq!((heard.error('C'), heard.error('S'), &*heard.tags), (code, "ERROR", "EZ"), "{query}");
        assert!(heard.error('M').contains(message), "{query}: {}", heard.error('M'));
    }
    assert!(guest.ask("PUASE").await.error('H').contains("PAUSE"));
}

#[tokio::test]
async fn statistics_users_may_only_show() {
    let proxy = Pretended::new();
    let mut guest = enter_as(&proxy, Authority::Stats).await.0;
    for query in [
        "PAUSE",
        "RESUME app",
        "RELOAD",
        "KILL",
        "KILL_CLIENT 1",
        "DISABLE app",
        "SHUTDOWN",
        "SET log_level = x",
        "SHOW FDS",
        "RECONNECT",
        "WAIT_CLOSE",
        "SWITCH app TO green WITH (force)",
        "PREPARE SWITCH app TO green",
        "SUSPEND",
    ] {
        assert_eq!(guest.ask(query).await.error('C'), "42501", "{query}");
    }
    assert_eq!(proxy.calls(), Vec::<String>::new());
    assert_eq!(guest.ask("SHOW STATS").await.tag.as_deref(), Some("SHOW"));
    assert_eq!(guest.ask("SET datestyle = 'ISO'").await.tag.as_deref(), Some("SET"));
}

/// PgBouncer: one WAIT_CLOSE answers every later PAUSE at once; two PAUSEs of different databases complete together.
#[tokio::test]
async fn each_waiting_command_is_answered_to_its_own_admin_alone() {
    let proxy = Pretended::new();
    let (mut first, mut second) = (enter(&proxy).await, enter(&proxy).await);
    assert_eq!(first.ask("WAIT_CLOSE app").await.tag.as_deref(), Some("WAIT_CLOSE"));
    proxy.set("app", |gate| gate.open_transactions = 1);
    proxy.set("other", |gate| gate.open_transactions = 1);
    first.say("PAUSE app").await;
    second.say("PAUSE other").await;
    proxy.until("both pauses began", |proxy| proxy.is_paused("app") && proxy.is_paused("other")).await;
    proxy.set("other", |gate| gate.open_transactions = 0);
    assert_eq!(second.hear().await.tag.as_deref(), Some("PAUSE"));
    // The second's own next answer is not the first's, and the first has heard nothing.
    assert_eq!(second.ask("SHOW VERSION").await.tags, "TDCZ");
    assert!(first.inbox.is_empty() && !first.served.is_finished());
    proxy.set("app", |gate| gate.open_transactions = 0);
    assert_eq!(first.hear().await.tag.as_deref(), Some("PAUSE"));
}

/// PgBouncer: the PAUSE never returns (issue 715).
#[tokio::test]
async fn resume_answers_a_waiting_pause_with_an_error() {
    let proxy = Pretended::new();
    let (mut first, mut second) = (enter(&proxy).await, enter(&proxy).await);
    proxy.set("app", |gate| gate.open_transactions = 1);
    first.say("PAUSE app").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    assert_eq!(second.ask("RESUME app").await.tag.as_deref(), Some("RESUME"));
    let heard = first.hear().await;
    assert!(heard.error('M').contains("ended by RESUME"), "{heard:?}");
    assert_eq!((heard.error('C'), &*heard.tags), ("08P01", "EZ"));
}

/// PgBouncer: `PAUSE db` stays paused after Ctrl-C.
#[tokio::test]
async fn a_cancel_undoes_the_pause_that_waits_and_the_console_goes_on() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    // One that comes while nothing waits is lost.
    guest.cancels.notify_waiters();
    proxy.set("app", |gate| gate.open_transactions = 1);
    guest.say("PAUSE app").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    guest.cancels.notify_waiters();
    let heard = guest.hear().await;
    assert_eq!((heard.error('C'), &*heard.tags), ("57014", "EZ"));
    assert!(heard.error('D').contains("undone"));
    assert!(!proxy.is_paused("app") && proxy.calls().contains(&"undo app".to_owned()));
    proxy.set("app", |gate| gate.open_transactions = 0);
    assert_eq!(guest.ask("PAUSE app").await.tag.as_deref(), Some("PAUSE"));
    assert!(proxy.is_paused("app"), "a complete pause stays");
}

#[tokio::test]
async fn a_cancel_of_an_epoch_pause_says_that_it_stays() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    proxy.set("app", |gate| gate.open_transactions = 1);
    let options = "run '8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f', epoch 7, source blue, target green";
    guest.say(&format!("PAUSE app WITH ({options})")).await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    guest.cancels.notify_waiters();
    let heard = guest.hear().await;
    assert!(heard.error('C') == "57014" && heard.error('D').contains("stays"), "{heard:?}");
    assert!(proxy.is_paused("app"));
}

/// PgBouncer: stays paused for ever.
#[tokio::test]
async fn an_admin_that_hangs_up_while_its_pause_waits_undoes_it() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    proxy.set("app", |gate| gate.open_transactions = 1);
    guest.say("PAUSE").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    // Sent ahead, and not a sign of life of somebody who then leaves.
    guest.say("SHOW VERSION").await;
    drop(guest.stream);
    proxy.until("the pause is undone", |proxy| !proxy.is_paused("app") && !proxy.is_paused("other")).await;
    tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_complete_pause_outlives_its_admin() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    assert_eq!(guest.ask("PAUSE app").await.tag.as_deref(), Some("PAUSE"));
    drop(guest.stream);
    tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
    assert!(proxy.is_paused("app"));
}

#[tokio::test]
async fn queries_sent_ahead_wait_for_the_pause_before_them() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    proxy.set("app", |gate| gate.open_transactions = 1);
    guest.say("PAUSE app").await;
    guest.say("SHOW STATE").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    proxy.set("app", |gate| gate.open_transactions = 0);
    assert_eq!(guest.hear().await.tag.as_deref(), Some("PAUSE"));
    assert_eq!(guest.hear().await.tag.as_deref(), Some("SHOW"));
}

/// PgBouncer: after KILL of all, SHOW STATE says active.
#[tokio::test]
async fn state_says_paused_when_every_gate_is_shut() {
    let mut guest = enter(&Pretended::new()).await;
    let values = |heard: Heard| heard.rows.into_iter().map(|row| row[1].clone().unwrap()).collect::<Vec<_>>();
    assert_eq!(values(guest.ask("SHOW STATE").await), ["yes", "no", "no"]);
    guest.ask("PAUSE app").await;
    assert_eq!(values(guest.ask("SHOW STATE").await), ["yes", "no", "no"]);
    assert_eq!(guest.ask("SHOW DATABASES").await.column("paused").1, [Some("1"), Some("0")]);
    guest.ask("KILL").await;
    assert_eq!(values(guest.ask("SHOW STATE").await), ["no", "yes", "no"]);
    assert_eq!(guest.ask("SHOW DATABASES").await.column("paused").1, [Some("1"), Some("1")]);
    assert_eq!(guest.ask("RESUME").await.tag.as_deref(), Some("RESUME"));
    assert_eq!(values(guest.ask("SHOW STATE").await), ["yes", "no", "no"]);
}

#[tokio::test]
async fn the_extended_protocol_gets_one_error_and_goes_on_after_sync() {
    let mut guest = enter(&Pretended::new()).await;
    let mut out = BytesMut::new();
    message::put_statement(&mut out, b"SHOW POOLS", &[]);
    guest.send(&out).await;
    let heard = guest.hear().await;
    assert_eq!((heard.error('C'), &*heard.tags), ("0A000", "EZ"));
    assert_eq!(guest.ask("SHOW VERSION").await.tags, "TDCZ");
    // A sequence given up without Sync.
    guest.send(b"P\0\0\0\x08\0\0\0\0").await;
    assert_eq!(guest.message().await.unwrap().0, b'E');
    assert_eq!(guest.ask("SHOW VERSION").await.tags, "TDCZ");
    guest.send(b"F\0\0\0\x0a\0\0\0\0\0\0").await;
    assert_eq!(guest.hear().await.tags, "EZ");
}

#[tokio::test]
async fn bytes_that_are_no_message_end_the_visit_with_a_fatal() {
    for bytes in [
        &b"z\0\0\0\x04"[..],
        b"Q\0\0\0\x03",
        b"Q\xff\xff\xff\xff",
        b"Q\0\x01\0\0",
        b"Q\0\0\0\x04",
        b"Q\0\0\0\x05x",
        b"Q\0\0\0\x07a\0\0",
        b"p\0\0\0\x04",
    ] {
        let mut guest = enter(&Pretended::new()).await;
        guest.send(bytes).await;
        let heard = guest.hear().await;
        assert_eq!((heard.error('S'), heard.error('C'), &*heard.tags), ("FATAL", "08P01", "E"), "{bytes:?}");
        tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_stream_that_ends_within_a_message_ends_the_visit_without_a_word() {
    let mut guest = enter(&Pretended::new()).await;
    guest.send(b"Q\0\0\0\x20SHOW").await;
    guest.stream.shutdown().await.unwrap();
    assert_eq!(guest.hear().await.tags, "");
    tokio::time::timeout(DEADLINE, guest.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn too_long_a_command_is_an_error_and_not_the_end() {
    let mut guest = enter(&Pretended::new()).await;
    let heard = guest.ask(&format!("PAUSE {}", "x".repeat(50_000))).await;
    assert_eq!((heard.error('C'), &*heard.tags), ("42601", "EZ"));
    assert_eq!(guest.ask("SHOW VERSION").await.tags, "TDCZ");
    let mut out = BytesMut::new();
    message::put_query(&mut out, b"PAUSE \xff");
    guest.send(&out).await;
    assert_eq!(guest.hear().await.error('C'), "42601");
}

#[tokio::test]
async fn closing_ends_an_idle_visit_and_a_waiting_pause() {
    let proxy = Pretended::new();
    let (mut idle, mut waiting) = (enter(&proxy).await, enter(&proxy).await);
    idle.closing.cancel();
    assert_eq!(idle.hear().await.error('C'), "57P01");
    proxy.set("app", |gate| gate.open_transactions = 1);
    waiting.say("PAUSE app").await;
    proxy.until("the pause began", |proxy| proxy.is_paused("app")).await;
    waiting.closing.cancel();
    assert_eq!(waiting.hear().await.error('C'), "57P01");
    proxy.until("the pause is undone", |proxy| !proxy.is_paused("app")).await;
    tokio::time::timeout(DEADLINE, waiting.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn the_metrics_page_shows_a_pause() {
    let proxy = Pretended::new();
    let mut guest = enter(&proxy).await;
    guest.ask("PAUSE app").await;
    let page = page(readings(&*proxy).await);
    for line in [
        "# TYPE pgcutover_gate_shut gauge",
        "pgcutover_gate_shut{database=\"app\"} 1",
        "pgcutover_gate_shut{database=\"other\"} 0",
        "# TYPE pgcutover_transactions_total counter",
        "pgcutover_transactions_total{database=\"app\"} 30",
        "pgcutover_pool_servers{database=\"app\",user=\"alice\",state=\"login\"} 11",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\n{page}");
    }
}
