//! What the fence refuses and what it does not see, on real servers: every row of the protocol's section 3, and R1, R5, R13.

use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::pair::{APP, DATABASE, OTHER, PGCUTOVER, Pair, PairOptions, password};
use pgcutover_api::epoch::{Claim, Epoch, RunId};
use pgcutover_api::store::{self, Name, Outcome, Turn};
use proxyctl::clusters::{BarrierError, Certainty, Cluster, Role, Writer};

use crate::armed::{Armed, LEVELS, LIMIT, MAJORS, as_proxyctl, is_fenced, sqlstate};

const INSERT: &str = "INSERT INTO ledger (client, n, aid, delta) VALUES (1, 1, 1, 1)";
/// Long enough to see a writer, short enough to see several.
const BARRIER: Duration = Duration::from_millis(300);

/// Beside the harness's tables: what the rows of the protocol need.
const MORE: &str = "
SET ROLE app_owner;
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE late (id int PRIMARY KEY);
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO parent VALUES (99); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION late();
CREATE FUNCTION definer() RETURNS void LANGUAGE sql SECURITY DEFINER AS 'INSERT INTO parent VALUES (77)';
CREATE TABLE parts (id int) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
CREATE TABLE heap (n int);
CREATE SEQUENCE stop;
GRANT ALL ON ALL TABLES IN SCHEMA public TO app, other;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app, other;
INSERT INTO parent VALUES (1);
INSERT INTO child VALUES (1, 1);
RESET ROLE;
CREATE EXTENSION dblink;
";

async fn furnished(major: u32) -> Armed {
    let armed = Armed::start(major).await;
    armed.superuser().await.run(MORE).await.unwrap();
    assert_eq!(armed.control.arm_tables(&armed.db, LIMIT).await.unwrap(), []);
    assert_eq!(armed.control.ungated(&armed.db, LIMIT).await.unwrap(), []);
    armed
}

/// Runs `script`, which has to end in the fence; then leaves no transaction behind.
async fn refused(client: &Client, what: &str, script: &str) {
    is_fenced(what, sqlstate(client, script).await);
    client.run("ROLLBACK").await.unwrap();
}

#[tokio::test]
async fn every_kind_of_write_is_refused_at_every_isolation_level() {
    for major in MAJORS {
        let armed = furnished(major).await;
        let (app, superuser) = (armed.app().await, armed.superuser().await);
        // A leaf that is made before the fence but has no gate: through its parent it is fenced all the same.
        superuser.run("CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20)").await.unwrap();
        armed.fence().await;
        for level in LEVELS {
            app.run(&format!("SET default_transaction_isolation = '{level}'")).await.unwrap();
            for sql in [
                INSERT,
                "UPDATE accounts SET abalance = 1 WHERE aid = 1",
                "UPDATE accounts SET abalance = 1 WHERE false",
                "DELETE FROM accounts WHERE aid = 1",
                "TRUNCATE history",
                "INSERT INTO branches VALUES (1) ON CONFLICT DO NOTHING",
                "INSERT INTO branches VALUES (1) ON CONFLICT (bid) DO UPDATE SET bbalance = 1",
                "WITH x AS (UPDATE accounts SET abalance = 1 WHERE aid = 1 RETURNING 1) SELECT * FROM x",
                "SELECT definer()",
                "INSERT INTO parts VALUES (1)",
                "INSERT INTO parts_1 VALUES (1)",
                "INSERT INTO parts VALUES (11)",
                "DO 'BEGIN UPDATE accounts SET abalance = 1; COMMIT; END'",
                "DELETE FROM parent WHERE id = 1",
                "DELETE FROM branches",
            ] {
                refused(&app, sql, sql).await;
            }
            // The server asks for data first; the fence answers before any row is stored.
            let copier = armed.app().await;
            copier.run(&format!("SET default_transaction_isolation = '{level}'")).await.unwrap();
            let copy = copier.copy_in::<_, &[u8]>("COPY branches (bid) FROM STDIN").await.unwrap();
            let error = Box::pin(copy).as_mut().finish().await.unwrap_err();
            is_fenced("COPY FROM", error.code().map(|code| code.code().to_owned()));
            if major >= 15 {
                let merge = "MERGE INTO branches b USING (VALUES (1)) v (id) ON b.bid = v.id WHEN MATCHED THEN DELETE";
                refused(&app, merge, merge).await;
            }
        }
        let dblink = format!(
            "SELECT dblink_exec('host=127.0.0.1 port={} dbname={DATABASE} user={APP} password={}', '{INSERT}')",
            armed.source.port(),
            password(APP)
        );
        refused(&superuser, "dblink", &dblink).await;
        refused(&superuser, "a superuser", INSERT).await;
        refused(&superuser, "as a replica", &format!("SET session_replication_role = replica; {INSERT}")).await;
        assert_eq!(sqlstate(&app, "SELECT count(*) FROM accounts").await, None, "reads go on");
    }
}

/// A cascade reaches its table through the fence of that table, and a deferred trigger fires at COMMIT.
#[tokio::test]
async fn cascades_and_deferred_triggers_meet_the_fence_of_the_table_they_write() {
    for major in MAJORS {
        let armed = furnished(major).await;
        let (app, superuser) = (armed.app().await, armed.superuser().await);
        armed.fence().await;
        // The referenced table's own fence would answer first.
        superuser.run("ALTER TABLE parent DISABLE TRIGGER pgcutover_gate").await.unwrap();
        refused(&app, "cascading delete", "DELETE FROM parent WHERE id = 1").await;
        refused(&app, "cascading update", "UPDATE parent SET id = 5 WHERE id = 1").await;
        let armed = furnished(major).await;
        let app = armed.app().await;
        app.run("BEGIN; INSERT INTO late VALUES (1)").await.unwrap();
        armed.fence().await;
        is_fenced("deferred trigger at COMMIT", sqlstate(&app, "COMMIT").await);
        assert_eq!(app.number("SELECT count(*) FROM late").await.unwrap(), 0);
    }
}

/// R1: no snapshot, however old, opens it: not after a commit, and not after an abort either, until a new one is taken.
#[tokio::test]
async fn transactions_that_began_before_the_flip_are_refused_whatever_is_decided() {
    for major in MAJORS {
        for want in [Outcome::Commit, Outcome::Abort] {
            let armed = Armed::start(major).await;
            let mut old = Vec::new();
            for level in LEVELS {
                let client = armed.app().await;
                client
                    .run(&format!("BEGIN ISOLATION LEVEL {level}; SELECT count(*) FROM ledger; {INSERT}"))
                    .await
                    .unwrap();
                let reader = armed.app().await;
                reader.run(&format!("BEGIN ISOLATION LEVEL {level}; SELECT count(*) FROM ledger")).await.unwrap();
                old.extend([(level, client), (level, reader)]);
            }
            let turn = armed.fence().await;
            assert_eq!(armed.decide(&turn, want).await, want);
            for (level, client) in &old {
                // Only READ COMMITTED sees the abort; everything else is refused.
                let sees = want == Outcome::Abort && *level == "read committed";
                let expected = if sees { None } else { Some(store::SQLSTATE_FENCED.to_owned()) };
                assert_eq!(sqlstate(client, INSERT).await, expected, "{major}, {level}, {want}");
                client.run("ROLLBACK").await.unwrap();
                let again = sqlstate(client, INSERT).await;
                assert_eq!(again.is_none(), want == Outcome::Abort, "{major}, {level}, {want}: {again:?}");
            }
        }
    }
}

/// The fence has no clock: a year after the commit, after a crash, and with the proxies gone it refuses all the same.
#[tokio::test]
async fn a_commit_is_for_ever() {
    for major in MAJORS {
        let mut armed = Armed::start(major).await;
        let turn = armed.fence().await;
        armed.decide(&turn, Outcome::Commit).await;
        let past = "now() - interval '1 year'";
        let superuser = armed.superuser().await;
        superuser
            .run(&format!("UPDATE pgcutover.state SET at = {past}; UPDATE pgcutover.decision SET at = {past}"))
            .await
            .unwrap();
        superuser.run("TRUNCATE pgcutover.member; DELETE FROM pgcutover.heartbeat").await.unwrap();
        armed.source.kill9().await.unwrap();
        armed.source.restart().await.unwrap();
        let app = armed.app().await;
        for level in LEVELS {
            refused(&app, level, &format!("BEGIN ISOLATION LEVEL {level}; {INSERT}")).await;
        }
    }
}

/// The gate runs with its owner's rights: the application has none on the store and writes as soon as the abort is there.
#[tokio::test]
async fn after_an_abort_the_application_writes_before_and_after_the_fence_is_taken_down() {
    for major in MAJORS {
        let armed = furnished(major).await;
        armed.fence_ddl().await;
        let (app, superuser) = (armed.app().await, armed.superuser().await);
        let turn = armed.fence().await;
        refused(&app, "fenced", INSERT).await;
        refused(&superuser, "fenced DDL", "CREATE TABLE anew (a int)").await;
        armed.decide(&turn, Outcome::Abort).await;
        for level in LEVELS {
            let sql = format!("BEGIN ISOLATION LEVEL {level}; {INSERT}; COMMIT");
            assert_eq!(sqlstate(&app, &sql).await, None, "{major}, {level}: open by the abort");
        }
        assert_eq!(sqlstate(&app, "CREATE TEMP TABLE anew (a int)").await, None);
        armed.control.unfence(&turn, LIMIT).await.unwrap();
        assert_eq!(sqlstate(&app, INSERT).await, None, "{major}: taken down");
        assert_eq!(sqlstate(&superuser, "CREATE TABLE anew (a int); DROP TABLE anew").await, None);
    }
}

/// Writers that race the flip: whoever got through is waited for; after the barrier not one row comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_flip_and_barrier_not_one_row_comes_from_racing_writers() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let mut writers = Vec::new();
        for n in 0..8 {
            let (client, level) = (armed.app().await, LEVELS[n % 3]);
            writers.push(tokio::spawn(async move {
                client.run(&format!("SET default_transaction_isolation = '{level}'")).await.unwrap();
                client.run(&format!("PREPARE w AS {INSERT}")).await.unwrap();
                let mut acknowledged = 0;
                // Ends at the fence.
                while sqlstate(&client, "BEGIN; EXECUTE w; EXECUTE w; COMMIT").await.is_none() {
                    acknowledged += 2;
                }
                let _ = client.run("ROLLBACK").await;
                for _ in 0..20 {
                    let _ = client.run("EXECUTE w").await;
                }
                acknowledged
            }));
        }
        let superuser = armed.superuser().await;
        superuser.until("SELECT count(*) > 200 FROM ledger", LIMIT).await.unwrap();
        let turn = armed.fence().await;
        armed.control.barrier(LIMIT).await.unwrap();
        let at_barrier = superuser.number("SELECT count(*) FROM ledger").await.unwrap();
        armed.decide(&turn, Outcome::Commit).await;
        let mut acknowledged = 0;
        for writer in writers {
            acknowledged += writer.await.unwrap();
        }
        assert_eq!(superuser.number("SELECT count(*) FROM ledger").await.unwrap(), at_barrier, "{major}");
        assert_eq!(acknowledged, at_barrier, "{major}: what was acknowledged is there");
    }
}

/// A loop in one statement; ends when the sequence `stop` is set. Into a table without an index: with one, each INSERT
/// locks the index anew, learns of the flip by that, and is refused (measured on 13, 15 and 17).
const ENDLESS: &str = "DO 'BEGIN WHILE NOT (SELECT is_called FROM stop) LOOP INSERT INTO heap VALUES (1); \
    PERFORM pg_sleep(0.005); END LOOP; END'";

/// True once such a loop has settled: its first rounds still look into the catalogues, and so notice the flip.
fn loops(pid: i64) -> String {
    format!("SELECT clock_timestamp() - xact_start > interval '300 ms' FROM pg_stat_activity WHERE pid = {pid}")
}

/// The barrier must not pass; returns who it waited for.
async fn held_up(control: &Cluster, what: &str) -> Vec<Writer> {
    match control.barrier(BARRIER).await {
        Err(BarrierError::Writers { writers, .. }) => writers,
        other => panic!("{what}: {other:?}"),
    }
}

/// R5: the writers that counting sessions misses, as a role that may not see sessions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_barrier_sees_every_writer_that_passed_the_gate_before() {
    for major in MAJORS {
        let armed = furnished(major).await;
        let superuser = armed.superuser().await;
        superuser.run(&format!("ALTER ROLE {APP} SET track_activities = off")).await.unwrap();
        let (slow, idle, prepared) = (armed.app().await, armed.app().await, armed.app().await);
        let looping = armed.source.connect(OTHER, &password(OTHER), DATABASE).await.unwrap();
        let pid = async |client: &Client| client.number("SELECT pg_backend_pid()").await.unwrap();
        let (slow_pid, loop_pid, idle_pid) = (pid(&slow).await, pid(&looping).await, pid(&idle).await);
        let slow = tokio::spawn(async move {
            sqlstate(&slow, "UPDATE accounts SET abalance = 1 FROM pg_sleep(600) WHERE aid = 1").await
        });
        let looping = tokio::spawn(async move { sqlstate(&looping, ENDLESS).await });
        idle.run("BEGIN; INSERT INTO parent VALUES (500)").await.unwrap();
        prepared.run("BEGIN; INSERT INTO parent VALUES (600); PREPARE TRANSACTION 'gid-600'").await.unwrap();
        let locked = "SELECT count(*) >= 3 FROM pg_locks WHERE mode = 'RowExclusiveLock' AND pid IN";
        superuser.until(&format!("{locked} ({slow_pid}, {loop_pid}, {idle_pid})"), LIMIT).await.unwrap();
        superuser.until(&loops(loop_pid), LIMIT).await.unwrap();
        armed.fence().await;
        superuser.run(&format!("REVOKE pg_monitor FROM {PGCUTOVER}")).await.unwrap();
        let writers = held_up(&armed.control, "three sessions and a prepared transaction").await;
        let sees = |pid: i64| writers.iter().any(|writer| writer.pid.map(i64::from) == Some(pid));
        assert!(sees(slow_pid) && sees(loop_pid) && sees(idle_pid), "{major}: {writers:?}");
        assert!(writers.iter().any(|writer| writer.pid.is_none()), "{major}: the prepared one: {writers:?}");
        for pid in [slow_pid, loop_pid, idle_pid] {
            superuser.run(&format!("SELECT pg_terminate_backend({pid}::int)")).await.unwrap();
        }
        assert!(slow.await.unwrap().is_some() && looping.await.unwrap().is_some());
        superuser
            .until(
                &format!("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid IN ({slow_pid}, {loop_pid}, {idle_pid})"),
                LIMIT,
            )
            .await
            .unwrap();
        let left = armed.control.barrier(BARRIER).await;
        assert!(matches!(&left, Err(BarrierError::Prepared(gids)) if gids[0].gid == "gid-600"), "{major}: {left:?}");
        // COMMIT PREPARED passes the fence: that is why it has to be gone first.
        superuser.run("COMMIT PREPARED 'gid-600'").await.unwrap();
        assert_eq!(superuser.number("SELECT count(*) FROM parent WHERE id = 600").await.unwrap(), 1);
        armed.control.barrier(BARRIER).await.unwrap();
    }
}

/// What the barrier is for: a loop goes on writing through a shut gate, and DDL that waits has passed the event trigger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_that_run_at_the_flip_go_on_and_waiting_ddl_counts() {
    for major in MAJORS {
        let armed = furnished(major).await;
        armed.fence_ddl().await;
        let (superuser, looping, reader, ddl) =
            (armed.superuser().await, armed.app().await, armed.app().await, armed.superuser().await);
        let loop_pid = looping.number("SELECT pg_backend_pid()").await.unwrap();
        let looping = tokio::spawn(async move { sqlstate(&looping, ENDLESS).await });
        reader.run("BEGIN; SELECT count(*) FROM child").await.unwrap();
        let ddl_pid = ddl.number("SELECT pg_backend_pid()").await.unwrap();
        let altering = tokio::spawn(async move { sqlstate(&ddl, "ALTER TABLE child ADD COLUMN more int").await });
        let waits = format!("SELECT count(*) > 0 FROM pg_locks WHERE pid = {ddl_pid} AND NOT granted");
        superuser.until(&waits, LIMIT).await.unwrap();
        superuser.until(&loops(loop_pid), LIMIT).await.unwrap();
        armed.fence().await;
        let writers = held_up(&armed.control, "a loop and waiting DDL").await;
        assert!(writers.iter().any(|writer| writer.table == "public.heap"), "{major}: {writers:?}");
        assert!(writers.iter().any(|writer| writer.lock.contains("waiting")), "{major}: {writers:?}");
        superuser.run("SELECT setval('stop', 1)").await.unwrap();
        assert_eq!(looping.await.unwrap(), None, "{major}: it passed a gate that it had checked before");
        reader.run("COMMIT").await.unwrap();
        assert_eq!(altering.await.unwrap(), None, "{major}: it had passed the event trigger");
        armed.control.barrier(LIMIT).await.unwrap();
        assert!(superuser.number("SELECT count(*) FROM heap").await.unwrap() > 20);
    }
}

/// R13: what statement triggers can't see; the event trigger sees the DDL among it, the fingerprint what is left.
#[tokio::test]
async fn what_the_gate_does_not_see_is_known() {
    for major in MAJORS {
        let armed = furnished(major).await;
        armed.fence().await;
        let superuser = armed.superuser().await;
        let before = armed.control.fingerprint(LIMIT).await.unwrap();
        for sql in [
            "SELECT nextval('ticket'), setval('ticket', 500)",
            "SELECT lo_create(0)",
            "NOTIFY somebody",
            "SELECT count(*) FROM accounts",
            "ANALYZE accounts",
            "VACUUM accounts",
            "REINDEX TABLE accounts",
        ] {
            assert_eq!(sqlstate(&superuser, sql).await, None, "{major}: {sql}");
            assert_eq!(armed.control.fingerprint(LIMIT).await.unwrap(), before, "{major}: {sql} is no DDL");
        }
        let mut last = before;
        for sql in [
            "ALTER TABLE late DISABLE TRIGGER pgcutover_gate",
            "CREATE TABLE copied AS SELECT 1 AS a",
            "ALTER TABLE accounts ADD COLUMN more int",
            "ALTER TABLE accounts ADD CHECK (more = 1) NOT VALID",
            "CREATE TABLE parts_3 PARTITION OF parts FOR VALUES FROM (20) TO (30)",
            "CREATE INDEX ON accounts (bid)",
            "DROP TABLE copied",
            "CREATE TABLE fresh (a int)",
        ] {
            assert_eq!(sqlstate(&superuser, sql).await, None, "{major}: {sql}");
            let now = armed.control.fingerprint(LIMIT).await.unwrap();
            assert_ne!(now, last, "{major}: {sql} must be noticed");
            last = now;
        }
        assert_eq!(sqlstate(&superuser, "INSERT INTO parts_3 VALUES (21); INSERT INTO fresh VALUES (1)").await, None);
        let ungated: Vec<String> =
            armed.control.ungated(&armed.db, LIMIT).await.unwrap().into_iter().map(|table| table.table).collect();
        assert_eq!(ungated, ["public.fresh", "public.late", "public.parts_3"], "{major}: S7 sees them");
    }
}

#[tokio::test]
async fn the_event_trigger_refuses_ddl_and_only_a_superuser_can_make_it() {
    for major in MAJORS {
        let armed = furnished(major).await;
        assert_eq!(armed.control.arm(&armed.db, LIMIT).await.unwrap(), Certainty::Watched, "pgcutover is no superuser");
        armed.fence_ddl().await;
        armed.fence_ddl().await;
        let superuser = armed.superuser().await;
        superuser.run("CREATE TABLE before_it (a int)").await.unwrap();
        let turn = armed.fence().await;
        for sql in [
            "ALTER TABLE late DISABLE TRIGGER pgcutover_gate",
            "CREATE TABLE copied AS SELECT 1 AS a",
            "SELECT 1 AS a INTO copied",
            "ALTER TABLE accounts ADD COLUMN more int",
            "DROP TABLE before_it",
            "CREATE TABLE parts_3 PARTITION OF parts FOR VALUES FROM (20) TO (30)",
            "CREATE OR REPLACE FUNCTION definer() RETURNS void LANGUAGE sql AS 'SELECT'",
            "SET session_replication_role = replica; DROP TABLE before_it",
        ] {
            refused(&superuser, sql, sql).await;
        }
        for level in LEVELS {
            refused(&superuser, level, &format!("BEGIN ISOLATION LEVEL {level}; CREATE TABLE x (a int)")).await;
        }
        armed.decide(&turn, Outcome::Commit).await;
        refused(&superuser, "after the commit", "DROP TABLE before_it").await;
        // The store's owner is not stopped by its own fence: it installs again, and could not unfence otherwise.
        armed.control.install(LIMIT).await.unwrap();
    }
}

/// Replication into a gated server: rows do not fire the gate, TRUNCATE does, and must pass, else apply would crash for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apply_workers_pass_the_gate_that_clients_do_not() {
    for (from, to) in [(15, 13), (13, 15), (15, 17)] {
        let pair = Pair::start(&Binaries::of(&[from, to]).unwrap(), &PairOptions::new(from, to)).await.unwrap();
        let (target, db) = (as_proxyctl(Role::Target, &pair.target), Name::new(DATABASE).unwrap());
        target.install(LIMIT).await.unwrap();
        target.arm(&db, LIMIT).await.unwrap();
        assert_eq!(target.arm_tables(&db, LIMIT).await.unwrap(), []);
        let turn = Turn { db, claim: Claim { run: RunId::random(), epoch: Epoch::try_from(1_u64).unwrap() } };
        assert!(target.guard(&turn, LIMIT).await.unwrap());
        let app = pair.source.connect(APP, &password(APP), DATABASE).await.unwrap();
        app.run(&format!("{INSERT}; TRUNCATE history; TRUNCATE accounts; {INSERT}; DELETE FROM ledger WHERE id = 1"))
            .await
            .unwrap();
        pair.in_step().await.unwrap();
        let there = pair.target.connect(APP, &password(APP), DATABASE).await.unwrap();
        assert_eq!(there.number("SELECT count(*) FROM ledger").await.unwrap(), 1, "{from} to {to}");
        assert_eq!(there.number("SELECT count(*) FROM accounts").await.unwrap(), 0, "{from} to {to}");
        refused(&there, "a client of the target", INSERT).await;
        target.witness(&turn, &Name::new("green").unwrap(), LIMIT).await.unwrap();
        assert_eq!(sqlstate(&there, "INSERT INTO branches VALUES (500)").await, None, "{from} to {to}: serves now");
    }
}

/// S0 on a busy table: the trigger waits behind a writer, gives up in time for everyone else, and comes through later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn arming_never_blocks_writers_for_longer_than_a_lock_attempt() {
    for major in MAJORS {
        let armed = Armed::start(major).await;
        let superuser = armed.superuser().await;
        superuser.run("SET ROLE app_owner; CREATE TABLE busy (a int); GRANT ALL ON busy TO app").await.unwrap();
        let (holder, other) = (armed.app().await, armed.app().await);
        holder.run("BEGIN; INSERT INTO busy VALUES (1)").await.unwrap();
        let (control, db) = (armed.control.another(), armed.db.clone());
        let left = control.arm_tables(&db, Duration::from_millis(700)).await.unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(left[0].table, "public.busy");
        let arming = tokio::spawn(async move { control.arm_tables(&db, LIMIT).await.unwrap() });
        let waits = "SELECT count(*) > 0 FROM pg_locks WHERE relation = 'busy'::regclass AND NOT granted";
        superuser.until(waits, LIMIT).await.unwrap();
        let start = std::time::Instant::now();
        other.run("INSERT INTO busy VALUES (2)").await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(2), "{major}: a writer waited {:?}", start.elapsed());
        holder.run("COMMIT").await.unwrap();
        assert_eq!(arming.await.unwrap(), []);
        assert_eq!(armed.control.ungated(&armed.db, LIMIT).await.unwrap(), []);
    }
}
