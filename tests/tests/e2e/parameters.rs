//! What live clients hear of their server's parameters when their database moves to another major.
//!
//! Invariant: the rule per parameter is the table in README.md.

use std::collections::BTreeMap;

use e2e::faults::{Cut, Fault, FaultProxy};
use e2e::pair::{APP, DATABASE, SOURCE, TARGET, password};
use e2e::wire::Wire;
use postgres_protocol::message::backend::Message;
use tokio_postgres::NoTls;

use crate::house::{House, errors, first_cell};
use crate::stand::{Stand, answered, eventually, sent};

/// A query's answer and the parameters that were reported on the way.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; only reports are asked for")]
async fn ask(wire: &mut Wire, sql: &str) -> (String, BTreeMap<String, String>) {
    let (messages, _) = wire.query(sql).await.unwrap();
    assert!(errors(&messages).is_empty(), "{:?}", errors(&messages));
    let reports = messages.iter().filter_map(|message| match message {
        Message::ParameterStatus(body) => Some((body.name().unwrap().to_owned(), body.value().unwrap().to_owned())),
        _ => None,
    });
    let reports = reports.collect();
    let rows: Vec<Message> = messages.into_iter().filter(|m| matches!(m, Message::DataRow(_))).collect();
    (first_cell(&rows).unwrap_or_default(), reports)
}

async fn switch(stand: &Stand, target: &str) {
    stand.ask("PAUSE app WITH (drain '5s', lease '9s')").await;
    stand.ask(&format!("SWITCH app TO {target} WITH (force)")).await;
    stand.ask("RESUME app").await;
}

/// Both ways between two majors: facts of the server are told, a session's own way of reading and writing stays.
async fn moves(majors: [u32; 2], news: &[&str]) {
    let stand = Stand::start(&majors, |_, _| {}).await;
    for (server, settings) in
        stand.servers.iter().zip([["UTC", "ISO", "iso_8601"], ["Asia/Tokyo", "German", "postgres"]])
    {
        let superuser = server.superuser(DATABASE).await.unwrap();
        for (name, value) in ["TimeZone", "DateStyle", "IntervalStyle"].into_iter().zip(settings) {
            superuser.run(&format!("ALTER ROLE {APP} SET {name} = '{value}'")).await.unwrap();
        }
    }
    let log_in = async || Wire::log_in(stand.proxy.port(), APP, &password(APP), DATABASE).await.unwrap().0;
    let (mut live, mut idle) = (log_in().await, log_in().await);
    ask(&mut live, "SELECT 1").await;
    ask(&mut live, "SET application_name = 'lives on'").await;
    ask(&mut live, "SET default_transaction_read_only = on; SET DateStyle = 'SQL'").await;
    let shown = "SELECT concat_ws('|', current_setting('TimeZone'), current_setting('DateStyle'), \
                 current_setting('IntervalStyle'), current_setting('application_name'))";
    let own = ask(&mut live, shown).await.0;
    assert_eq!(own, "UTC|SQL, MDY|iso_8601|lives on");
    for (target, version, other) in [(TARGET, majors[1], majors[0]), (SOURCE, majors[0], majors[1])] {
        switch(&stand, target).await;
        let (now, heard) = ask(&mut live, shown).await;
        assert_eq!(now, own, "on {version}");
        assert!(heard["server_version"].starts_with(&version.to_string()), "{heard:?}");
        for kept in ["TimeZone", "DateStyle", "IntervalStyle", "client_encoding", "application_name"] {
            assert!(!heard.contains_key(kept), "{kept}: {heard:?}");
        }
        if version > other {
            for name in news {
                assert!(heard.contains_key(*name), "{name}: {heard:?}");
            }
        }
        assert!(ask(&mut live, "SELECT 1").await.1.is_empty(), "told once");
    }
    // Who has never met a server has nothing to keep.
    switch(&stand, TARGET).await;
    let (zone, heard) = ask(&mut idle, "SHOW TimeZone").await;
    assert_eq!((zone.as_str(), heard["TimeZone"].as_str()), ("Asia/Tokyo", "Asia/Tokyo"));
}

/// asyncpg's pool says RESET ALL, Npgsql's DISCARD ALL: on a server of one's own that leaves what the Startup asked for.
#[tokio::test]
async fn reset_takes_a_client_back_to_its_startup_and_nobody_else_anywhere() {
    let house = House::open(|options| options.setting("default_pool_size", 1)).await;
    let shown = "SELECT concat_ws('|', current_setting('TimeZone'), current_setting('search_path'), \
                 current_setting('work_mem'))";
    let other = house.connect(APP).await;
    let plain = other.text(shown).await.unwrap();
    let mut login = house.login(APP);
    let login = login.options("-c TimeZone=Asia/Tokyo -c search_path=pg_catalog -c work_mem=7MB");
    let (client, connection) = login.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    for reset in ["SET TimeZone = 'CET'; RESET ALL", "DISCARD ALL", "RESET TimeZone", "RESET search_path"] {
        client.batch_execute(reset).await.unwrap();
        let row = client.query_one(shown, &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), "Asia/Tokyo|pg_catalog|7MB", "{reset}");
        client.batch_execute(reset).await.unwrap();
        assert_eq!(other.text(shown).await.unwrap(), plain, "{reset}");
    }
}

/// Nothing of its transaction was sent, and what it had asked for was right: it may try again.
#[tokio::test]
async fn a_server_that_dies_while_settings_are_said_again_is_an_error_that_can_be_retried() {
    let mut stand = Stand::start(&[17], |options, _| options.setting("default_pool_size", 1)).await;
    let relay = FaultProxy::start(stand.servers[0].port()).await.unwrap();
    stand.proxy.options().backend_port(SOURCE, relay.port());
    stand.proxy.write().unwrap();
    stand.ask("RELOAD").await;
    let (client, other) = (stand.client().await, stand.client().await);
    client.run("SET TimeZone = 'CET'").await.unwrap();
    assert_ne!(other.text("SHOW TimeZone").await.unwrap().unwrap(), "CET");
    relay.set_both(Fault::Hold);
    let answer = sent(client, "SELECT 1");
    let serves = async || {
        let pools = stand.ask("SHOW POOLS").await;
        pools.iter().any(|pool| pool.get("user") == Some(APP) && pool.get("sv_active") == Some("1"))
    };
    eventually("the client has a server", serves).await;
    relay.cut(Cut::Reset);
    let error = answered(answer).await.unwrap_err();
    assert_eq!((error.severity(), error.code().code()), ("FATAL", "08006"), "{error}");
}

#[tokio::test]
async fn live_clients_of_13_hear_what_is_different_on_17() {
    moves([13, 17], &["in_hot_standby", "default_transaction_read_only", "scram_iterations"]).await;
}

#[tokio::test]
async fn live_clients_of_17_hear_what_is_different_on_18() {
    moves([17, 18], &["search_path"]).await;
}
