//! What a session is made of moves from one major to another, or stays with its reason.
//!
//! Invariant: no proxy: the parts against real servers, in both directions.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use e2e::binaries::Binaries;
use e2e::cluster::{Cluster, ClusterOptions};
use pgcutover::backend::{self, Address, Asides, Batch, Cleartext, Login, Secret, ServerConnection};
use pgcutover::message::Protocol;
use pgcutover::tls::Connector;
use pgcutover::transplant::{self, Hints, LockCalls, ParseSettings, Reason, RestoreError, Seen, Snapshot, Survey};
use tokio::time::Instant;

/// The same objects on both servers, made in another order, so that OIDs differ.
const OBJECTS: [&str; 2] = [
    "CREATE TYPE mood AS ENUM ('ok', 'bad'); CREATE TABLE things (id bigint, mood mood, note varchar(7)); \
     CREATE ROLE owner; CREATE SEQUENCE counter; CREATE SCHEMA \"it's\"; CREATE SEQUENCE \"it's\".\"o.dd\" INCREMENT -3; \
     CREATE SEQUENCE only_set; CREATE SEQUENCE ahead CACHE 20; GRANT ALL ON ALL SEQUENCES IN SCHEMA public, \"it's\" TO owner; \
     GRANT USAGE ON SCHEMA \"it's\" TO owner",
    "CREATE SCHEMA \"it's\"; CREATE SEQUENCE \"it's\".\"o.dd\" INCREMENT -3; CREATE SEQUENCE only_set; CREATE SEQUENCE counter; \
     CREATE SEQUENCE ahead CACHE 20; CREATE TYPE unlike AS (n int); CREATE ROLE owner; \
     CREATE TYPE mood AS ENUM ('ok', 'bad'); CREATE TABLE things (id bigint, mood mood, note varchar(7)); \
     GRANT ALL ON ALL SEQUENCES IN SCHEMA public, \"it's\" TO owner; GRANT USAGE ON SCHEMA \"it's\" TO owner",
];

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Two servers with the same objects.
async fn servers(majors: [u32; 2]) -> [Cluster; 2] {
    let binaries = Binaries::of(&majors).unwrap();
    let (old, new) = (ClusterOptions::new(majors[0]), ClusterOptions::new(majors[1]));
    let (old, new) = tokio::try_join!(Cluster::start(&binaries, &old), Cluster::start(&binaries, &new)).unwrap();
    for (cluster, objects) in [&old, &new].into_iter().zip(OBJECTS) {
        cluster.superuser("postgres").await.unwrap().run(objects).await.unwrap();
    }
    [old, new]
}

async fn session(cluster: &Cluster) -> ServerConnection {
    let address = Address {
        // The directory of its socket: nobody asks for a password there.
        host: cluster.dir().to_str().unwrap().into(),
        port: cluster.port(),
        name: None,
        dbname: (*b"postgres").into(),
        tls: Connector::disabled(),
        protocol: Protocol::V3_0,
        cleartext: Cleartext::Protected,
    };
    let setting = ((*b"application_name").into(), (*b"moved").into());
    let login = Login { user: (*b"postgres").into(), secret: Secret::None, settings: vec![setting] };
    backend::connect(&address, &login, soon()).await.unwrap()
}

async fn run(server: &mut ServerConnection, sql: &str) {
    server.simple(sql, soon()).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn ask(server: &mut ServerConnection, sql: &str) -> String {
    let rows = server.simple(sql, soon()).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    rows.iter().map(|row| row.text(0).unwrap_or("NULL").to_owned()).collect::<Vec<_>>().join("|")
}

/// Parses for the client.
async fn parse(server: &mut ServerConnection, statements: &[(String, &str)]) {
    let mut batch = Batch::default();
    statements.iter().for_each(|(name, sql)| batch.parse(name.as_bytes(), sql.as_bytes(), &[]));
    batch.sync();
    for answer in server.converse(batch, Asides::All, soon()).await.unwrap() {
        answer.accepted().unwrap();
    }
}

async fn probed(server: &mut ServerConnection, hints: &Hints) -> Result<Snapshot, Vec<Reason>> {
    transplant::probe(server, hints, None, soon()).await.unwrap().map_err(|why| why.reasons)
}

fn hints() -> Hints {
    let seen = Seen { lock_calls: LockCalls::Counted(4), unnamed: Some((*UNNAMED).into()), ..Seen::default() };
    Hints { custom_settings: vec![(*b"myapp.tenant").into(), (*b"myapp.unset").into()], seen, ..Hints::default() }
}

const UNNAMED: &[u8] = b"SELECT note FROM things WHERE mood = $1";

/// Everything of the first slice, with quotes and newlines.
async fn furnish(server: &mut ServerConnection) {
    for sql in [
        "SET search_path = \"it's\", public; SET work_mem = '7MB'; SET TimeZone = '<-08>+08'; SET statement_timeout = '9s'",
        "SELECT set_config('myapp.tenant', E'a''\"\\\\\\nb{,}\\u00e9', false)",
        "PREPARE by_sql(mood) AS SELECT id, note FROM things WHERE mood = $1;",
        "LISTEN \"Ch \"\"2\"; LISTEN plain",
        "SELECT nextval('\"it''s\".\"o.dd\"'), nextval('counter'), nextval('counter'), setval('only_set', 77)",
        "SET default_transaction_read_only = on; SET default_transaction_isolation = 'serializable'",
        "SELECT pg_advisory_lock(-5), pg_advisory_lock_shared(1 << 40), pg_advisory_lock(-1, 2)",
        "SELECT pg_advisory_lock_shared(3, -4)",
        "SET ROLE owner",
    ] {
        run(server, sql).await;
    }
    let statements = [
        ("by \"wire\"".to_owned(), "SELECT $1::mood[] AS moods, note, $2::numeric(9,2) FROM things"),
        ("writes".to_owned(), "INSERT INTO things VALUES ($1, $2, $3)"),
        (String::new(), "SELECT note FROM things WHERE mood = $1"),
    ];
    parse(server, &statements).await;
}

async fn grant(clusters: &[Cluster; 2]) {
    for cluster in clusters {
        cluster.superuser("postgres").await.unwrap().run("GRANT ALL ON things TO owner").await.unwrap();
    }
}

async fn moves(majors: [u32; 2]) {
    let clusters = servers(majors).await;
    grant(&clusters).await;
    let (mut old, mut new) = (session(&clusters[0]).await, session(&clusters[1]).await);
    furnish(&mut old).await;
    let survey = Arc::new(transplant::survey(&mut session(&clusters[0]).await, soon()).await.unwrap());
    let hints = || Hints { survey: Arc::clone(&survey), ..hints() };
    let snapshot = probed(&mut old, &hints()).await.unwrap();
    // The probe has left the unnamed statement alive, so a second one finds the same.
    assert_eq!(probed(&mut old, &hints()).await.unwrap(), snapshot);
    transplant::restore(&mut new, &snapshot, &[], soon()).await.unwrap();
    // The unnamed statement has moved too: without its text the new session would have to stay where it is.
    let there = Arc::new(transplant::survey(&mut session(&clusters[1]).await, soon()).await.unwrap());
    let untold = Hints { survey: there, seen: Seen { unnamed: None, ..hints().seen }, ..hints() };
    assert_eq!(probed(&mut new, &untold).await, Err(vec![Reason::UnnamedStatement]));
    for sql in [
        "SELECT current_user || session_user || current_setting('role')",
        "SELECT current_setting('search_path') || current_setting('work_mem') || current_setting('TimeZone')",
        "SELECT current_setting('myapp.tenant') || coalesce(current_setting('myapp.unset', true), 'NULL')",
        "SELECT string_agg(name, ',' ORDER BY name) FROM pg_prepared_statements",
        "SELECT string_agg(c, ',' ORDER BY c) FROM pg_listening_channels() c",
        "SELECT string_agg(concat_ws(',', classid, objid, objsubid, mode), ' ' ORDER BY classid, objid) \
         FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        "SELECT concat_ws(' ', lastval(), currval('counter'), currval('\"it''s\".\"o.dd\"'), currval('only_set'))",
        "EXECUTE by_sql('ok')",
    ] {
        assert_eq!(ask(&mut new, sql).await, ask(&mut old, sql).await, "{sql}");
    }
}

#[tokio::test]
async fn a_session_moves_up() {
    moves([13, 17]).await;
}

#[tokio::test]
async fn a_session_moves_down() {
    moves([17, 13]).await;
}

/// What is said to the session while it is read or restored is for its client.
#[tokio::test]
async fn notifications_during_a_move_are_kept() {
    let clusters = servers([13, 17]).await;
    let (mut old, mut new) = (session(&clusters[0]).await, session(&clusters[1]).await);
    let has = |server: &ServerConnection, text: &[u8]| server.asides.windows(text.len()).any(|bytes| bytes == text);
    run(&mut old, "LISTEN plain").await;
    clusters[0].superuser("postgres").await.unwrap().run("NOTIFY plain, 'to the old'").await.unwrap();
    let snapshot = probed(&mut old, &hints()).await.unwrap();
    assert!(has(&old, b"to the old"));
    old.asides = BytesMut::new();
    transplant::restore(&mut new, &snapshot, &[], soon()).await.unwrap();
    assert!(new.asides.is_empty());
    clusters[1].superuser("postgres").await.unwrap().run("NOTIFY plain, 'to the new'").await.unwrap();
    probed(&mut new, &hints()).await.unwrap();
    assert!(has(&new, b"to the new"));
}

#[tokio::test]
async fn what_can_not_be_restored_stays_with_its_reason() {
    let [old, _] = servers([13, 17]).await;
    let none = Hints::default;
    let seen = |seen: Seen| Hints { seen, ..Hints::default() };
    let changed = seen(Seen { parse_settings: ParseSettings::Changed, ..Seen::default() });
    let once = seen(Seen { lock_calls: LockCalls::Counted(1), ..Seen::default() });
    let twice = seen(Seen { lock_calls: LockCalls::Counted(2), ..Seen::default() });
    let of_database = |reason| Arc::new(Survey { reasons: vec![reason], ..Survey::default() });
    let dynamic = || of_database(Reason::DynamicSetting);
    let named = Hints { custom_settings: vec![(*b"a.b").into()], survey: dynamic(), ..none() };
    let surveyed = Arc::new(transplant::survey(&mut session(&old).await, soon()).await.unwrap());
    let surveyed = Hints { survey: surveyed, ..none() };
    let unheard = Hints { survey: of_database(Reason::AdvisoryLocks), ..once.clone() };
    let cases = [
        ("SELECT 1", none(), None),
        ("BEGIN", none(), Some(Reason::InTransaction)),
        ("CREATE TEMP TABLE t (n int)", none(), Some(Reason::TemporaryObjects)),
        ("CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'", none(), Some(Reason::TemporaryObjects)),
        ("CREATE TEMP TABLE t (n int); DROP TABLE t", none(), None),
        ("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1; COMMIT", none(), Some(Reason::HeldCursor)),
        ("SELECT nextval('counter')", none(), Some(Reason::SequenceState)),
        ("SELECT nextval('counter')", surveyed.clone(), None),
        ("SELECT setval('counter', 5)", surveyed.clone(), None),
        ("SELECT nextval('ahead')", surveyed.clone(), None),
        ("CREATE TEMP SEQUENCE s; SELECT nextval('s'); DROP SEQUENCE s", surveyed, None),
        ("SELECT 1", unheard.clone(), None),
        ("SELECT pg_advisory_lock(1)", unheard, Some(Reason::AdvisoryLocks)),
        ("SET SESSION AUTHORIZATION owner", none(), Some(Reason::SessionAuthorization)),
        ("SELECT 1; PREPARE ms AS SELECT 2", none(), Some(Reason::PreparedText)),
        ("PREPARE ms AS SELECT 2", changed.clone(), Some(Reason::ParseSettings)),
        ("SELECT 1", changed, None),
        ("SET array_nulls = off", none(), None),
        ("PREPARE p AS SELECT 1; ", none(), None),
        ("SELECT pg_advisory_lock(1)", none(), Some(Reason::AdvisoryLocks)),
        ("SELECT pg_advisory_lock(1)", once, None),
        ("SELECT pg_advisory_lock(1), pg_advisory_lock(1)", twice, Some(Reason::AdvisoryLocks)),
        ("SELECT 1", Hints { survey: dynamic(), ..none() }, Some(Reason::DynamicSetting)),
        ("SELECT 1", named, None),
    ];
    for (sql, hints, reason) in cases {
        let mut server = session(&old).await;
        run(&mut server, sql).await;
        let expected = reason.map_or(Ok(()), |reason| Err(vec![reason]));
        assert_eq!(probed(&mut server, &hints).await.map(|_| ()), expected, "{sql}");
        // Refused or not, the session goes on and nothing of ours is in it.
        assert_eq!(
            ask(&mut server, "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE '%pgcut%'").await,
            "0"
        );
    }
}

/// What the new server lacks or has otherwise is an error of the restore; the old session has lost nothing.
#[tokio::test]
async fn a_target_that_differs_is_refused() {
    let clusters = servers([13, 17]).await;
    let target = clusters[1].superuser("postgres").await.unwrap();
    let once = Hints { seen: Seen { lock_calls: LockCalls::Counted(1), ..Seen::default() }, ..Hints::default() };
    let cases = [
        ("SELECT 1", "ALTER DATABASE postgres SET work_mem = '9MB'", Some(Reason::SettingDiffers)),
        ("SET work_mem = '5MB'", "SELECT 1", None),
        ("SELECT 1", "ALTER DATABASE postgres RESET work_mem", None),
        ("SELECT 1", "ALTER DATABASE postgres SET bytea_output = 'escape'", Some(Reason::SettingDiffers)),
        ("SELECT 1", "ALTER DATABASE postgres RESET bytea_output", None),
        ("SET operator_precedence_warning = on", "SELECT 1", Some(Reason::Server)),
        ("SELECT pg_advisory_lock(7)", "SELECT pg_advisory_lock(7)", Some(Reason::LockTaken)),
        ("SET ROLE owner", "ALTER ROLE owner RENAME TO other", Some(Reason::Server)),
        ("PREPARE p AS SELECT note FROM things", "ALTER TABLE things ALTER note TYPE varchar(9)", Some(DRIFT)),
        ("PREPARE p AS SELECT id FROM things", "ALTER TABLE things ALTER id TYPE numeric", Some(DRIFT)),
        ("PREPARE p AS SELECT 1 AS x", "SELECT 1", None),
        ("PREPARE p(mood) AS SELECT 1", "ALTER TYPE mood RENAME TO temper", Some(Reason::TypeMissing)),
    ];
    for (sql, change, reason) in cases {
        target.run(change).await.unwrap();
        let (mut old, mut new) = (session(&clusters[0]).await, session(&clusters[1]).await);
        run(&mut old, sql).await;
        let snapshot = probed(&mut old, &once).await.unwrap();
        let refused =
            transplant::restore(&mut new, &snapshot, &[], soon()).await.map_err(|error: RestoreError| error.reason());
        assert_eq!(refused, reason.map_or(Ok(()), Err), "{sql} / {change}");
        assert_eq!(probed(&mut old, &once).await.unwrap(), snapshot, "{sql}");
    }
}

const DRIFT: Reason = Reason::StatementDrift;

/// More than any socket holds goes through, and what is too much is refused before it is read.
#[tokio::test]
async fn ten_thousand_statements_and_a_long_setting_move() {
    let clusters = servers([13, 17]).await;
    let (mut old, mut new) = (session(&clusters[0]).await, session(&clusters[1]).await);
    let statements: Vec<_> = (0..10_000).map(|n| (format!("s{n}"), "SELECT id, mood, note FROM things")).collect();
    parse(&mut old, &statements).await;
    run(&mut old, "SELECT length(set_config('myapp.tenant', repeat(E'\\n''\"', 340000), false))").await;
    let (begun, snapshot) = (Instant::now(), probed(&mut old, &hints()).await.unwrap());
    let probed_ms = begun.elapsed().as_millis();
    transplant::restore(&mut new, &snapshot, &[], soon()).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{probed_ms} ms of it the probe");
    assert_eq!(ask(&mut new, "SELECT count(*) FROM pg_prepared_statements").await, "10000");
    assert_eq!(ask(&mut new, "SELECT length(current_setting('myapp.tenant'))").await, "1020000");
    run(&mut old, "SELECT length(set_config('myapp.tenant', repeat('x', 9000000), false))").await;
    assert_eq!(probed(&mut old, &hints()).await, Err(vec![Reason::TooLarge]));
    assert_eq!(ask(&mut old, "SELECT 1").await, "1");
}

/// A role that may not read its session's state can't be moved, and goes on.
#[tokio::test]
async fn revoked_rights_are_a_reason() {
    let [old, _] = servers([13, 17]).await;
    let admin = old.superuser("postgres").await.unwrap();
    admin.run("REVOKE EXECUTE ON FUNCTION pg_catalog.pg_lock_status() FROM public").await.unwrap();
    let mut server = session(&old).await;
    run(&mut server, "SET ROLE owner").await;
    assert_eq!(probed(&mut server, &Hints::default()).await, Err(vec![Reason::CatalogueRights]));
    assert_eq!(ask(&mut server, "SELECT 1").await, "1");
}

/// What is so for every session of a database is found once.
#[tokio::test]
async fn a_survey_finds_sequences_and_what_functions_hide() {
    let [old, _] = servers([13, 17]).await;
    let admin = old.superuser("postgres").await.unwrap();
    let mut server = session(&old).await;
    let before = transplant::survey(&mut server, soon()).await.unwrap();
    assert_eq!((before.reasons, before.sequences.len()), (vec![], 4));
    for (function, reasons) in [
        ("f() RETURNS text LANGUAGE sql AS $$SELECT set_config('a.b', 'x', false)$$", vec![]),
        ("f() RETURNS text LANGUAGE sql AS $$SELECT pg_advisory_xact_lock(1)::text$$", vec![]),
        ("f() RETURNS text LANGUAGE sql AS $$SELECT pg_advisory_lock(1)::text$$", vec![Reason::AdvisoryLocks]),
    ] {
        admin.run(&format!("CREATE OR REPLACE FUNCTION {function}")).await.unwrap();
        assert_eq!(transplant::survey(&mut server, soon()).await.unwrap().reasons, reasons, "{function}");
    }
    let dynamic = "CREATE FUNCTION g(n text) RETURNS text LANGUAGE sql AS $$SELECT set_config(n, 'x', false)$$";
    admin.run(dynamic).await.unwrap();
    let both = vec![Reason::DynamicSetting, Reason::AdvisoryLocks];
    assert_eq!(transplant::survey(&mut server, soon()).await.unwrap().reasons, both);
}

/// What servers have by their own choice stays as it was, where a session may choose.
#[tokio::test]
async fn other_defaults_do_not_reach_a_session_that_moves() {
    let clusters = servers([13, 17]).await;
    let target = clusters[1].superuser("postgres").await.unwrap();
    for setting in ["extra_float_digits = 0", "DateStyle = 'German'", "bytea_output = 'escape'", "work_mem = '9MB'"] {
        target.run(&format!("ALTER SYSTEM SET {setting}")).await.unwrap();
    }
    target.run("SELECT pg_reload_conf()").await.unwrap();
    target.until("SELECT current_setting('work_mem') = '9MB'", Duration::from_secs(20)).await.unwrap();
    let (mut old, mut new) = (session(&clusters[0]).await, session(&clusters[1]).await);
    assert_eq!(ask(&mut new, "SHOW extra_float_digits").await, "0");
    let snapshot = probed(&mut old, &Hints::default()).await.unwrap();
    transplant::restore(&mut new, &snapshot, &[], soon()).await.unwrap();
    for (setting, value) in
        [("extra_float_digits", "1"), ("DateStyle", "ISO, MDY"), ("bytea_output", "hex"), ("work_mem", "9MB")]
    {
        assert_eq!(ask(&mut new, &format!("SHOW {setting}")).await, value, "{setting}");
    }
}
