//! The scrape of pgbouncer_exporter, replayed over a driver that decodes each value by the type its column declares.
//!
//! Invariant: columns, their order and their types are PgBouncer 1.25's: what the exporter reads as a number is one.

use std::collections::BTreeMap;

use e2e::binaries::Network;
use e2e::drivers::kits::{Kit, Language};
use e2e::pair::{APP, DATABASE};
use e2e::printer::not_checked;
use e2e::proxy::STATS;
use serde::Deserialize;
use tokio_postgres::types::Type;

use crate::house::{House, errors, stdout, trusted};

/// What the driver made of one answer.
#[derive(Debug, Deserialize)]
struct Answer {
    tag: String,
    /// Name and type OID.
    columns: Vec<(String, u32)>,
    /// Python's type and text of each value.
    rows: Vec<Vec<Option<(String, String)>>>,
}

impl Answer {
    /// Its columns are these, in this order, with these types, and the driver has made a value of each one's type.
    fn has(&self, name: &str, letters: &str, columns: &str) {
        let wanted: Vec<_> = columns.split_whitespace().map(str::to_owned).zip(letters.chars().map(oid)).collect();
        assert_eq!(columns.split_whitespace().count(), letters.len(), "the table of this test: {name}");
        assert_eq!(self.columns, wanted, "{name}");
        assert_eq!(self.tag, "SHOW", "{name}");
        for row in &self.rows {
            assert_eq!(row.len(), letters.len(), "{name}: {row:?}");
            for ((value, letter), (column, _)) in row.iter().zip(letters.chars()).zip(&self.columns) {
                let made = value.as_ref().map_or(python_type(letter), |(made, _)| made);
                assert_eq!(made, python_type(letter), "{name}.{column}: {value:?}");
            }
        }
    }

    fn text(&self, row: &[Option<(String, String)>], column: &str) -> String {
        let at = self.columns.iter().position(|(name, _)| name == column).unwrap_or_else(|| panic!("no {column}"));
        row[at].as_ref().unwrap_or_else(|| panic!("{column} is null in {row:?}")).1.clone()
    }

    /// The value of a column in the row whose first column says `key`.
    fn at(&self, key: &str, column: &str) -> String {
        let row = self.rows.iter().find(|row| row[0].as_ref().is_some_and(|(_, text)| text == key));
        self.text(row.unwrap_or_else(|| panic!("no row {key}")), column)
    }

    /// What the exporter maps to metrics is a number in every row.
    fn numbers(&self, columns: &str) {
        assert!(!self.rows.is_empty());
        for (row, column) in self.rows.iter().flat_map(|row| columns.split_whitespace().map(move |name| (row, name))) {
            let text = self.text(row, column);
            assert!(text.parse::<f64>().is_ok(), "{column} = {text}");
        }
    }
}

/// PgBouncer's type letters.
fn oid(letter: char) -> u32 {
    match letter {
        's' | 'T' => 25,
        'i' => 23,
        'q' => 20,
        'N' => 1700,
        other => panic!("no type letter: {other}"),
    }
}

/// What psycopg2 makes of the type.
fn python_type(letter: char) -> &'static str {
    match letter {
        's' | 'T' => "str",
        'i' | 'q' => "int",
        'N' => "Decimal",
        other => panic!("no type letter: {other}"),
    }
}

async fn traffic(house: &House) {
    let client = house.connect(APP).await;
    client.run("BEGIN; UPDATE accounts SET abalance = 1 WHERE aid = 1; COMMIT").await.unwrap();
    for n in 0..10_i32 {
        let rows = client.query_typed("SELECT $1::int4", &[(&n, Type::INT4)]).await.unwrap();
        assert_eq!(rows[0].get::<_, i32>(0), n);
    }
}

async fn scrape(python: &Kit, dsn: &str) -> BTreeMap<String, Answer> {
    let mut command = python.program("exporter.py");
    command.arg(dsn);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    serde_json::from_str(&stdout(&output)).unwrap()
}

#[tokio::test]
async fn a_scrape_gets_every_column_with_pgbouncers_name_place_and_type() {
    let python = match Kit::find(Language::Python, Network::from_env()) {
        Ok(kit) => kit,
        Err(why) => return not_checked("the types of pgbouncer_exporter's scrape", format_args!("{why:#}")),
    };
    let house = House::open(|_| ()).await;
    traffic(&house).await;
    let idle = house.connect(APP).await;
    idle.run("SELECT 1").await.unwrap();
    let answers = scrape(&python, &house.dsn(STATS).replace("dbname=app", "dbname=pgbouncer")).await;
    for (name, letters, columns) in TABLES {
        answers[name].has(name, letters, columns);
    }
    for (name, columns) in MAPPED {
        answers[name].numbers(columns);
    }
    assert_eq!(answers["VERSION"].rows.len(), 1);
    for key in ["max_client_conn", "max_user_connections"] {
        let value = answers["CONFIG"].at(key, "value");
        assert!(value.parse::<f64>().is_ok(), "{key} = {value}");
    }
    for key in ["databases", "users", "pools", "free_clients", "used_clients", "login_clients", "used_servers"] {
        answers["LISTS"].at(key, "items");
    }
    // The figures are those of the traffic, not only of its type.
    let totals = &answers["STATS_TOTALS"];
    assert_eq!(totals.at(DATABASE, "xact_count").parse::<u32>().unwrap(), 12, "{totals:?}");
    assert!(totals.at(DATABASE, "bytes_sent").parse::<u32>().unwrap() > 0, "{totals:?}");
    assert_eq!(answers["STATS"].at(DATABASE, "total_xact_count"), totals.at(DATABASE, "xact_count"));
    let states = &answers["CLIENTS"];
    let ours: Vec<_> = states.rows.iter().filter(|row| states.text(row, "database") == DATABASE).collect();
    assert_eq!(ours.iter().map(|row| states.text(row, "state")).collect::<Vec<_>>(), ["idle"], "{states:?}");
    assert_eq!(answers["DATABASES"].at(DATABASE, "paused"), "0");
}

/// lib/pq says these in its Startup; PgBouncer itself has to be told to bear the last one.
#[tokio::test]
async fn the_console_lets_the_exporters_driver_in() {
    let house = House::open(|options| options.setting("auth_type", "trust")).await;
    let parameters = [
        ("user", STATS),
        ("database", "pgbouncer"),
        ("client_encoding", "UTF8"),
        ("datestyle", "ISO, MDY"),
        ("extra_float_digits", "2"),
    ];
    let (mut wire, _) = trusted(house.proxy.port(), &parameters).await.unwrap();
    // lib/pq pings with an empty statement.
    for ping in [";", "SHOW VERSION"] {
        let (messages, status) = wire.query(ping).await.unwrap();
        assert!(errors(&messages).is_empty() && status == b'I', "{ping}: {:?}", errors(&messages));
    }
}

/// What the exporter turns into metrics.
const MAPPED: [(&str, &str); 3] = [
    (
        "DATABASES",
        "port pool_size reserve_pool_size max_connections current_connections max_client_connections \
         current_client_connections paused disabled",
    ),
    (
        "STATS_TOTALS",
        "query_count query_time bytes_received bytes_sent wait_time xact_count xact_time client_parse_count \
         server_parse_count bind_count server_assignment_count",
    ),
    (
        "POOLS",
        "cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active sv_active_cancel sv_being_canceled \
         sv_idle sv_used sv_tested sv_login maxwait maxwait_us",
    ),
];

/// Table, PgBouncer's type letters (s and T text, i int4, q int8, N numeric), columns.
const TABLES: [(&str, &str, &str); 8] = [
    ("VERSION", "s", "version"),
    ("LISTS", "si", "list items"),
    ("CONFIG", "ssss", "key value default changeable"),
    (
        "CLIENTS",
        "ssssssisiTTiiississii",
        "type user database replication state addr port local_addr local_port connect_time request_time wait wait_us \
         close_needed ptr link remote_pid tls application_name prepared_statements id",
    ),
    (
        "DATABASES",
        "ssissiiiissiiiiii",
        "name host port database force_user pool_size min_pool_size reserve_pool_size server_lifetime pool_mode \
         load_balance_hosts max_connections current_connections max_client_connections current_client_connections \
         paused disabled",
    ),
    (
        "POOLS",
        "ssiiiiiiiiiiiiiss",
        "database user cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active sv_active_cancel \
         sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait maxwait_us pool_mode load_balance_hosts",
    ),
    (
        "STATS_TOTALS",
        "sNNNNNNNNNNN",
        "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time \
         wait_time client_parse_count server_parse_count bind_count",
    ),
    (
        "STATS",
        "sNNNNNNNNNNNNNNNNNNNNNN",
        "database total_server_assignment_count total_xact_count total_query_count total_received total_sent \
         total_xact_time total_query_time total_wait_time total_client_parse_count total_server_parse_count \
         total_bind_count avg_server_assignment_count avg_xact_count avg_query_count avg_recv avg_sent avg_xact_time \
         avg_query_time avg_wait_time avg_client_parse_count avg_server_parse_count avg_bind_count",
    ),
];
