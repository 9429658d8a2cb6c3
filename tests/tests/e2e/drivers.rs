//! Real drivers at real work across a real cutover: each keeps its connection, its statements and its settings.
//!
//! Invariant: a driver that was not tried says so loudly; one that was tried has seen no error, has written on both servers,
//! and each of its acknowledged writes is on the new server exactly once.

use std::collections::BTreeSet;

use e2e::binaries::Network;
use e2e::crossing::{Crossing, Report};
use e2e::drivers::course::{Pooling, Types};
use e2e::drivers::ways::{WAYS, Way};
use e2e::printer::{not_checked, say};
use tokio::sync::OnceCell;

/// One cutover serves the tests of all drivers.
type Once = OnceCell<Result<Report, String>>;

async fn crossed(
    once: &'static Once,
    pooling: Pooling,
    (from, to): (u32, u32),
    ways: Vec<&'static Way>,
) -> &'static Report {
    let run = async || {
        let crossing = Crossing { from, to, pooling, types: Types::BuiltIn, ways };
        let report = crossing.run(Network::from_env()).await.map_err(|error| format!("{error:#}"));
        report.inspect(|report| say(report))
    };
    once.get_or_init(run).await.as_ref().unwrap_or_else(|error| panic!("{error}"))
}

/// This way noticed nothing but a wait.
#[track_caller]
fn survived(report: &Report, way: &str) {
    let verdict = report.of(way).unwrap();
    if let Some(why) = &verdict.untried {
        return not_checked(&format!("{way} in {} pooling", report.pooling.word()), why);
    }
    assert!(verdict.survived(), "{verdict:#?}\n{report}");
    assert!(report.holds(), "{report}");
}

/// Reversed and with 18, a driver of each kind: named, binary, pipelined, simple.
const SOME: [&str; 8] = [
    "pgbench-prepared",
    "psycopg2",
    "psycopg-pipeline",
    "asyncpg-cache",
    "postgres.js",
    "pgjdbc",
    "pgx",
    "tokio-postgres",
];

async fn some_survive(once: &'static Once, pooling: Pooling, pair: (u32, u32)) {
    let report = crossed(once, pooling, pair, SOME.iter().map(|id| Way::of(id).unwrap()).collect()).await;
    SOME.iter().for_each(|way| survived(report, way));
}

macro_rules! a_test_for_each_way {
    ($($test:ident: $way:literal,)*) => {
        const TESTED: &[&str] = &[$($way),*];

        mod in_transaction_pooling {
            use super::*;
            static ONCE: Once = Once::const_new();
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                survived(crossed(&ONCE, Pooling::Transaction, (13, 17), WAYS.iter().collect()).await, $way);
            })*
        }

        mod in_session_pooling {
            use super::*;
            static ONCE: Once = Once::const_new();
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                survived(crossed(&ONCE, Pooling::Session, (13, 17), WAYS.iter().collect()).await, $way);
            })*
        }
    };
}

a_test_for_each_way! {
    psql_survives: "psql",
    pgbench_survives: "pgbench-simple",
    pgbench_extended_survives: "pgbench-extended",
    pgbench_prepared_survives: "pgbench-prepared",
    psycopg2_survives: "psycopg2",
    psycopg_survives: "psycopg-plain",
    psycopg_prepared_survives: "psycopg-prepared",
    psycopg_binary_survives: "psycopg-binary",
    psycopg_in_pipeline_mode_survives: "psycopg-pipeline",
    asyncpg_with_its_cache_survives: "asyncpg-cache",
    asyncpg_without_its_cache_survives: "asyncpg-no-cache",
    node_postgres_survives: "node-postgres",
    node_postgres_with_named_statements_survives: "node-postgres-named",
    postgres_js_survives: "postgres.js",
    postgres_js_unprepared_survives: "postgres.js-unprepared",
    pgjdbc_with_server_side_statements_survives: "pgjdbc",
    pgjdbc_without_server_side_statements_survives: "pgjdbc-client",
    ruby_pg_survives: "ruby-pg",
    ruby_pg_prepared_survives: "ruby-pg-prepared",
    lib_pq_survives: "lib-pq",
    lib_pq_with_binary_parameters_survives: "lib-pq-binary",
    lib_pq_prepared_survives: "lib-pq-prepared",
    pgx_survives: "pgx",
    pgx_that_describes_survives: "pgx-describe",
    pgx_with_simple_queries_survives: "pgx-simple",
    tokio_postgres_survives: "tokio-postgres",
    tokio_postgres_unnamed_survives: "tokio-postgres-typed",
    sqlx_survives: "sqlx",
    sqlx_unprepared_survives: "sqlx-unprepared",
}

#[test]
fn every_way_of_every_driver_has_its_tests() {
    assert_eq!(TESTED.iter().copied().collect::<BTreeSet<_>>(), WAYS.iter().map(|way| way.id).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_of_each_kind_survives_the_way_down_in_transaction_pooling() {
    static ONCE: Once = Once::const_new();
    some_survive(&ONCE, Pooling::Transaction, (17, 13)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_of_each_kind_survives_the_way_down_in_session_pooling() {
    static ONCE: Once = Once::const_new();
    some_survive(&ONCE, Pooling::Session, (17, 13)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_of_each_kind_survives_the_way_to_18_in_transaction_pooling() {
    static ONCE: Once = Once::const_new();
    some_survive(&ONCE, Pooling::Transaction, (16, 18)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_of_each_kind_survives_the_way_to_18_in_session_pooling() {
    static ONCE: Once = Once::const_new();
    some_survive(&ONCE, Pooling::Session, (16, 18)).await;
}
