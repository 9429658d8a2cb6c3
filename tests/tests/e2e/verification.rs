//! Both servers compared, whole tables, at the moment at which a run has made them equal: under load, between majors whose
//! settings print everything otherwise. What was changed behind replication's back is named by its key.
//!
//! Invariant: the load's rows are compared while it writes; rows that a test falsifies are none of its own.

use e2e::binaries::Binaries;
use e2e::control::Finished;
use e2e::pair::{DATABASE, PGCUTOVER, PUBLICATION, PairOptions, SUBSCRIPTION, TARGET};
use e2e::stage::Stage;
use serde_json::Value as Json;

use crate::theatre::{LIMIT, Theatre};

/// Exit code of proxyctl, as its help tells it.
const DIFFERS: i32 = 8;

/// What prints otherwise by version or setting.
const TYPES: &str =
    "SET ROLE app_owner; CREATE TYPE mood AS ENUM ('so, so', 'ok'); CREATE TYPE street AS (name text, n float8)";
const COLUMNS: [&str; 23] = [
    "f4 real",
    "f8 double precision",
    "n numeric",
    "j json",
    "jb jsonb",
    "b bytea",
    "tz timestamptz",
    "ts timestamp",
    "d date",
    "iv interval",
    "arr text[]",
    "farr float8[]",
    "m mood",
    "s street",
    "t text",
    "c char(5)",
    "mo money",
    "u uuid",
    "r int4range",
    "p point",
    "ba bit varying",
    "ip inet",
    "\"Odd, \"\"name\" text",
];
const ROWS: &str = "INSERT INTO zoo VALUES (1, 0.1, 1.0/3, 1.500, '{\"b\": 1, \"a\":2}', '{\"bb\": 1, \"a\": [1e2, null]}', '\\x00ff5c', \
      '2024-03-31 02:30+01', '0044-03-15 12:00 BC', 'infinity', '1 year -2 mons +3 days 04:05:06.789', '{a,NULL,\"NULL\",\"x,y\"}', \
      '{0.1,NaN,-0}', 'so, so', ROW('a \"b\", (c)', 2.2), E'tab\\there, (and) \"quotes\" \\\\', 'x', '-12.34', \
      'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '[1,5)', '(0.1,2e300)', B'0101', '10.0.0.0/8', '');
    INSERT INTO zoo (id, t, \"Odd, \"\"name\") VALUES (2, '', NULL), (3, NULL, '');
    INSERT INTO zoo (id, f4, f8, n) VALUES (4, 'NaN', '-Infinity', 'NaN'), (5, '1e-45', '2.2250738585072014e-308', 1e400);
    INSERT INTO zoo (id, t) SELECT n, repeat(md5(n::text), 200) FROM generate_series(6, 1500) n";
/// A server on which everything prints otherwise unless it is told how.
const OTHERWISE: [(&str, &str); 5] = [
    ("DateStyle", "SQL, DMY"),
    ("IntervalStyle", "iso_8601"),
    ("TimeZone", "Asia/Tokyo"),
    ("extra_float_digits", "-3"),
    ("bytea_output", "escape"),
];

/// With a table of all types, its columns in another order on the target, an unlogged one, and 13 to 17 in between.
async fn zoo() -> Theatre {
    let mut options = PairOptions::new(13, 17);
    options.target.settings.extend(OTHERWISE.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let mut stage = Stage::start(&Binaries::of(&[13, 17]).unwrap(), &options, 1).await.unwrap();
    stage.control.set("policy", "accept_oid_change", true);
    stage.control.set("policy", "accept_column_change", true);
    let (source, target) = (&stage.pair.source, &stage.pair.target);
    let (source, target) = (source.superuser(DATABASE).await.unwrap(), target.superuser(DATABASE).await.unwrap());
    let mut turned = COLUMNS;
    turned.reverse();
    for (server, columns) in [(&source, COLUMNS), (&target, turned)] {
        let columns = columns.join(", ");
        let generated = "twice int GENERATED ALWAYS AS (id * 2) STORED";
        let zoo = format!("CREATE TABLE zoo (id int PRIMARY KEY, {columns}, {generated})");
        server.run(&format!("{TYPES}; {zoo}; CREATE UNLOGGED TABLE scratch (a int); RESET ROLE")).await.unwrap();
    }
    source.run(ROWS).await.unwrap();
    let add = format!("SET ROLE {PGCUTOVER}; ALTER PUBLICATION {PUBLICATION} ADD TABLE zoo; RESET ROLE");
    source.run(&add).await.unwrap();
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} REFRESH PUBLICATION")).await.unwrap();
    target.until("SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel", LIMIT).await.unwrap();
    Theatre::on(stage).await
}

/// What the report says of a table.
fn result<'a>(report: &'a Json, table: &str) -> &'a Json {
    let tables = report["verification"]["tables"].as_array().unwrap_or_else(|| panic!("{}", report["verification"]));
    let line = tables.iter().find(|line| line["table"] == table);
    &line.unwrap_or_else(|| panic!("no {table}: {}", report["verification"]))["result"]
}

fn equal(run: &Finished, tables: &[&str]) -> Json {
    let report = run.json().unwrap();
    for table in tables {
        assert_eq!(result(&report, table)["is"], "equal", "{table}: {}", report["verification"]);
    }
    report
}

/// The three rows that the test changes on the target, and no others.
fn falsified(report: &Json) {
    let zoo = result(report, "public.zoo");
    assert_eq!((&zoo["source_rows"], &zoo["target_rows"]), (&1500.into(), &1499.into()), "{zoo}");
    let cell = |row: &Json, name: &str| row[name].as_str().unwrap().to_owned();
    let rows: Vec<[String; 2]> =
        zoo["rows"].as_array().unwrap().iter().map(|row| ["key", "how"].map(|name| cell(row, name))).collect();
    assert_eq!(rows, [["(1)", "differs"], ["(1200)", "only_on_source"], ["(2)", "differs"]], "{zoo}");
}

const OF_THE_LOAD: [&str; 5] =
    ["public.accounts", "public.branches", "public.history_0", "public.history_1", "public.ledger"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_servers_are_compared_when_they_are_equal_and_a_row_that_is_not_is_named() {
    let theatre = zoo().await;
    let target = theatre.stage.pair.target.superuser(DATABASE).await.unwrap();

    let rehearsal = theatre.stage.control.run(&["rehearse"], LIMIT).await.unwrap();
    assert_eq!(rehearsal.code, Some(0), "{}", rehearsal.story());
    let report = equal(&rehearsal, &OF_THE_LOAD);
    assert_eq!(*result(&report, "public.zoo"), serde_json::json!({"is": "equal", "rows": 1500}));
    assert!(result(&report, "public.accounts")["rows"].as_u64() >= Some(1000));
    let scratch = result(&report, "public.scratch");
    assert!(scratch["is"] == "not_compared" && scratch["why"].as_str().unwrap().contains("unlogged"), "{scratch}");
    assert!(report["verification"]["sequences"].is_null(), "a rehearsal sets none");

    // The same while clients write: what is under way is looked at again.
    let seen = theatre.stage.control.run(&["verify"], LIMIT).await.unwrap();
    assert_eq!(seen.code, Some(0), "{}", seen.story());
    let seen = serde_json::json!({"verification": seen.json().unwrap()});
    for table in OF_THE_LOAD.into_iter().chain(["public.zoo"]) {
        assert_eq!(result(&seen, table)["is"], "equal", "{table}: {seen}");
    }

    // Equal but for what only an exact comparison sees.
    let falsify = "UPDATE zoo SET t = NULL WHERE id = 2; UPDATE zoo SET f8 = f8 + 1e-16 WHERE id = 1; DELETE FROM zoo WHERE id = 1200";
    target.run(falsify).await.unwrap();
    let seen = theatre.stage.control.run(&["verify"], LIMIT).await.unwrap();
    assert_eq!(seen.code, Some(DIFFERS), "{}", seen.story());
    falsified(&serde_json::json!({"verification": seen.json().unwrap()}));
    let cutover = theatre.stage.control.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(cutover.code, Some(DIFFERS), "{}", cutover.story());
    let report = equal(&cutover, &OF_THE_LOAD);
    assert_eq!(report["outcome"], "committed");
    falsified(&report);
    let sequences = &report["verification"]["sequences"];
    assert!(sequences["compared"].as_u64() >= Some(3) && sequences["behind"].as_array().unwrap().is_empty());
    let red = report["findings"].as_array().unwrap().iter().find(|finding| finding["level"] == "red").unwrap();
    assert!(red["problem"].as_str().unwrap().contains("(1200) only on the source"), "{red}");
    // Nobody is left that holds a snapshot.
    let pinned = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'proxyctl verify'";
    target.until(pinned, LIMIT).await.unwrap();
    drop(target);
    theatre.ends_without_error_on(TARGET).await;
}
