//! Preflight against seeded faults on real servers, asked as the least role: each is red (or worth a word) and names the
//! object; without it there is nothing red.

use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::pair::{APP, DATABASE, PGCUTOVER, Pair, PairOptions, password};
use pgcutover_api::epoch::{Epoch, RunId};
use pgcutover_api::store::{self, Member, Name};
use proxyctl::clusters::{Clusters, Role};
use proxyctl::config::Change;
use proxyctl::config::Replication;
use proxyctl::config::members::Unlisted;
use proxyctl::finding::{Finding, Level};
use proxyctl::preflight::{Inquiry, Limits, checks, gather};

use crate::armed::{LIMIT, as_proxyctl};

const PAIRS: [(u32, u32); 2] = [(13, 17), (15, 17)];

pub(crate) fn inquiry() -> Inquiry {
    Inquiry {
        db: Name::new(DATABASE).unwrap(),
        replication: Replication::Logical { subscriptions: Vec::new() },
        reverse_dsn: None,
        proxies: Vec::new(),
        bouncers: Vec::new(),
        limits: Limits {
            lag_bytes_max: 1 << 20,
            transaction_age_max: Duration::from_millis(500),
            gap: 1000,
            way_back: true,
            proxy_role: "pgcutover_proxy".to_owned(),
            source_backend: "blue".to_owned(),
            oid_change: Change::Refused,
            column_change: Change::Refused,
            unlisted: Unlisted::Refuse,
        },
        limit: LIMIT,
    }
}

/// A pair, its superusers, and proxyctl's connections to it.
pub(crate) struct Bench {
    pair: Pair,
    pub(crate) clusters: Clusters,
    pub(crate) source: Client,
    pub(crate) target: Client,
}

impl Bench {
    pub(crate) async fn start(options: &PairOptions) -> Bench {
        let binaries = Binaries::of(&[options.source.major, options.target.major]).unwrap();
        let pair = Pair::start(&binaries, options).await.unwrap();
        let (source, target) =
            (pair.source.superuser(DATABASE).await.unwrap(), pair.target.superuser(DATABASE).await.unwrap());
        let clusters = Clusters {
            source: as_proxyctl(Role::Source, &pair.source),
            target: as_proxyctl(Role::Target, &pair.target),
        };
        Bench { pair, clusters, source, target }
    }

    async fn findings(&self) -> Vec<Finding> {
        let reverse_dsn = Some(self.pair.target.dsn(PGCUTOVER, &password(PGCUTOVER), DATABASE));
        checks(&gather(&self.clusters, &Inquiry { reverse_dsn, ..inquiry() }).await.unwrap())
    }

    /// Asks until preflight says this, or no longer does; what it said last if it never does.
    async fn until(&self, what: &str, holds: impl Fn(&[Finding]) -> bool) {
        let start = std::time::Instant::now();
        loop {
            let found = self.findings().await;
            if holds(&found) {
                return;
            }
            let red: Vec<&Finding> = found.iter().filter(|finding| finding.level == Level::Red).collect();
            assert!(start.elapsed() < LIMIT, "{what}: preflight never said so; red is {red:#?}");
        }
    }

    async fn becomes(&self, level: Level, check: &str, object: &str) {
        let what = format!("{level:?} {check} {object}");
        let says = |f: &Finding| f.level == level && f.check == check && f.object.contains(object) && !f.fix.is_empty();
        self.until(&what, |found| found.iter().any(says)).await;
    }

    async fn heals(&self) {
        self.until("healed", |found| found.iter().all(|f| f.level != Level::Red)).await;
    }
}

/// What is wrong, where it is seeded, and how it is undone. SQL of superusers; empty for nothing.
struct Fault {
    level: Level,
    check: &'static str,
    object: &'static str,
    source: &'static str,
    target: &'static str,
    heal_source: &'static str,
    heal_target: &'static str,
}

macro_rules! fault {
    ($level:ident $check:literal $object:literal; source $source:literal, $heal_source:literal; target $target:literal, $heal_target:literal) => {
        Fault {
            level: Level::$level,
            check: $check,
            object: $object,
            source: $source,
            target: $target,
            heal_source: $heal_source,
            heal_target: $heal_target,
        }
    };
}

const FAULTS: &[Fault] = &[
    fault!(Red "subscriptions" "app_sub"; source "", "";
        target "ALTER SUBSCRIPTION app_sub DISABLE", "ALTER SUBSCRIPTION app_sub ENABLE"),
    fault!(Red "slots" "app_sub"; source "", "";
        target "ALTER SUBSCRIPTION app_sub DISABLE", "ALTER SUBSCRIPTION app_sub ENABLE"),
    fault!(Red "subscriptions" "public.clash";
        source "CREATE TABLE clash (a int PRIMARY KEY); INSERT INTO clash VALUES (1); ALTER TABLE clash OWNER TO app_owner; \
                GRANT SELECT ON clash TO pgcutover; ALTER PUBLICATION app_pub ADD TABLE clash",
        "ALTER PUBLICATION app_pub DROP TABLE clash; DROP TABLE clash";
        target "CREATE TABLE clash (a int PRIMARY KEY); INSERT INTO clash VALUES (1); ALTER SUBSCRIPTION app_sub REFRESH PUBLICATION",
        "TRUNCATE clash"),
    fault!(Red "definitions" "public.made"; source "CREATE TABLE made (a int PRIMARY KEY, b text)", "DROP TABLE made";
        target "CREATE TABLE made (b text, a int PRIMARY KEY)", "DROP TABLE made"),
    fault!(Yellow "definitions" "by %s of public.accounts";
        source "CREATE INDEX \"by %s\" ON accounts (bid)", "DROP INDEX \"by %s\""; target "", ""),
    fault!(Yellow "server_bound" "whoami()";
        source "CREATE FUNCTION whoami() RETURNS int LANGUAGE sql AS 'SELECT pg_backend_pid()'", "DROP FUNCTION whoami()";
        target "", ""),
    fault!(Red "publication" "public.unpublished";
        source "CREATE TABLE unpublished (a int PRIMARY KEY); ALTER TABLE unpublished OWNER TO app_owner", "DROP TABLE unpublished";
        target "", ""),
    fault!(Red "publication" "public.accounts";
        source "ALTER PUBLICATION app_pub SET (publish = 'insert, update, delete')",
        "ALTER PUBLICATION app_pub SET (publish = 'insert, update, delete, truncate')";
        target "", ""),
    fault!(Red "replica_identity" "public.bare";
        source "CREATE TABLE bare (a int); ALTER TABLE bare OWNER TO app_owner", "DROP TABLE bare";
        target "", ""),
    fault!(Red "table_rights" "public.foreign_to_us";
        source "CREATE TABLE foreign_to_us (a int PRIMARY KEY); ALTER TABLE foreign_to_us OWNER TO other", "DROP TABLE foreign_to_us";
        target "", ""),
    fault!(Yellow "unreplicated" "public.cache";
        source "CREATE UNLOGGED TABLE cache (a int); ALTER TABLE cache OWNER TO app_owner", "DROP TABLE cache";
        target "", ""),
    fault!(Yellow "unreplicated" "public.sums";
        source "CREATE MATERIALIZED VIEW sums AS SELECT 1 AS a", "DROP MATERIALIZED VIEW sums"; target "", ""),
    fault!(Yellow "unreplicated" "public.far";
        source "CREATE EXTENSION postgres_fdw; CREATE SERVER away FOREIGN DATA WRAPPER postgres_fdw; \
                CREATE FOREIGN TABLE far (a int) SERVER away",
        "DROP EXTENSION postgres_fdw CASCADE";
        target "", ""),
    fault!(Red "large_objects" "app"; source "SELECT lo_create(424242)", "SELECT lo_unlink(424242)"; target "", ""),
    // Without SELECT the view pg_sequences answers NULL, as if the sequence had never been used.
    fault!(Red "sequences" "public.hidden";
        source "CREATE SEQUENCE hidden; SELECT nextval('hidden')", "DROP SEQUENCE hidden";
        target "CREATE SEQUENCE hidden", "DROP SEQUENCE hidden"),
    fault!(Red "sequences" "public.small";
        source "CREATE SEQUENCE small MAXVALUE 100; SELECT nextval('small'); ALTER SEQUENCE small OWNER TO app_owner",
        "DROP SEQUENCE small";
        target "CREATE SEQUENCE small; ALTER SEQUENCE small OWNER TO app_owner", "DROP SEQUENCE small"),
    fault!(Red "sequences" "public.only_here";
        source "CREATE SEQUENCE only_here; ALTER SEQUENCE only_here OWNER TO app_owner", "DROP SEQUENCE only_here"; target "", ""),
    fault!(Red "sequences" "public.not_ours";
        source "CREATE SEQUENCE not_ours; ALTER SEQUENCE not_ours OWNER TO app_owner", "DROP SEQUENCE not_ours";
        target "CREATE SEQUENCE not_ours; GRANT SELECT ON not_ours TO pgcutover", "DROP SEQUENCE not_ours"),
    fault!(Yellow "target_triggers" "public.accounts twice"; source "", "";
        target "CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
                CREATE TRIGGER twice AFTER INSERT ON accounts FOR EACH ROW EXECUTE FUNCTION twice(); \
                ALTER TABLE accounts ENABLE ALWAYS TRIGGER twice",
        "DROP FUNCTION twice CASCADE"),
    fault!(Red "type_oids" "public.other_one";
        source "CREATE TYPE other_one AS ENUM ('a'); CREATE TYPE mood AS ENUM ('ok')", "DROP TYPE mood, other_one";
        target "CREATE TYPE mood AS ENUM ('ok')", "DROP TYPE mood"),
    fault!(Red "prepared_transactions" "source transaction 'gid 1'";
        source "BEGIN; DELETE FROM branches WHERE bid = 1; PREPARE TRANSACTION 'gid 1'", "ROLLBACK PREPARED 'gid 1'";
        target "", ""),
    fault!(Red "prepared_transactions" "target transaction 'gid 2'"; source "", "";
        target "BEGIN; SELECT pg_current_wal_lsn(); CREATE TABLE x (a int); PREPARE TRANSACTION 'gid 2'", "ROLLBACK PREPARED 'gid 2'"),
    fault!(Red "verifiers" "role newcomer";
        source "CREATE ROLE newcomer LOGIN PASSWORD 'x'", "DROP ROLE newcomer"; target "", ""),
    fault!(Red "verifiers" "role app"; source "", "";
        target "REVOKE SELECT (rolname, rolpassword) ON pg_authid FROM pgcutover",
        "GRANT SELECT (rolname, rolpassword) ON pg_authid TO pgcutover"),
    fault!(Red "verifiers" "role app";
        source "REVOKE SELECT (rolname, rolpassword) ON pg_authid FROM pgcutover",
        "GRANT SELECT (rolname, rolpassword) ON pg_authid TO pgcutover";
        target "", ""),
    fault!(Red "verifiers" "role other"; source "", "";
        target "CREATE TABLE kept AS SELECT rolpassword FROM pg_authid WHERE rolname = 'other'; ALTER ROLE other PASSWORD 'not the same'",
        "DO $$ BEGIN EXECUTE format('ALTER ROLE other PASSWORD %L', (SELECT rolpassword FROM kept)); END $$; DROP TABLE kept"),
    fault!(Red "own_rights" "source role pgcutover";
        source "ALTER DATABASE app OWNER TO postgres; REVOKE CREATE ON DATABASE app FROM pgcutover",
        "ALTER DATABASE app OWNER TO app_owner; GRANT CREATE ON DATABASE app TO pgcutover";
        target "", ""),
    fault!(Red "own_rights" "target role pgcutover"; source "", "";
        target "REVOKE pg_monitor FROM pgcutover", "GRANT pg_monitor TO pgcutover"),
    fault!(Red "lag" "slot app_sub";
        source "REVOKE pg_monitor FROM pgcutover", "GRANT pg_monitor TO pgcutover"; target "", ""),
    fault!(Red "own_rights" "target role pgcutover"; source "", "";
        target "ALTER ROLE pgcutover NOREPLICATION", "ALTER ROLE pgcutover REPLICATION"),
    fault!(Red "replication_slots" "target"; source "", "";
        target "SELECT pg_create_physical_replication_slot('full_' || n) FROM generate_series(1, \
                (SELECT current_setting('max_replication_slots')::int - count(*)::int FROM pg_replication_slots)) n",
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'full%'"),
    fault!(Red "sentinel" "subscription app_sub"; source "", "";
        target "ALTER SUBSCRIPTION app_sub OWNER TO postgres", "ALTER SUBSCRIPTION app_sub OWNER TO pgcutover"),
    fault!(Red "sentinel" "publication app_pub";
        source "ALTER PUBLICATION app_pub OWNER TO postgres", "ALTER PUBLICATION app_pub OWNER TO pgcutover"; target "", ""),
    fault!(Yellow "synchronous_standby" "target"; source "", "";
        target "ALTER SYSTEM SET synchronous_standby_names = 'nobody'; SELECT pg_reload_conf()",
        "ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf()"),
];

async fn each(client: &Client, script: &str) {
    // Statement by statement: some may not stand in one transaction.
    let (mut rest, mut statements) = (script, Vec::new());
    while let Some(at) = rest.find("; ").filter(|_| !rest.starts_with("CREATE FUNCTION") && !rest.starts_with("DO ")) {
        statements.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    statements.push(rest);
    for statement in statements.into_iter().filter(|statement| !statement.is_empty()) {
        client.run(statement).await.unwrap();
    }
}

/// One pair takes all faults in turn: preflight changes nothing, so what is healed is green again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_seeded_fault_is_named_and_gone_when_it_is_healed() {
    for (from, to) in PAIRS {
        let bench = Bench::start(&PairOptions::new(from, to)).await;
        bench.heals().await;
        for fault in FAULTS {
            each(&bench.source, fault.source).await;
            each(&bench.target, fault.target).await;
            bench.becomes(fault.level, fault.check, fault.object).await;
            each(&bench.target, fault.heal_target).await;
            each(&bench.source, fault.heal_source).await;
            if fault.object == "public.clash" {
                each(&bench.target, "ALTER SUBSCRIPTION app_sub REFRESH PUBLICATION").await;
            }
            bench.heals().await;
        }
        // The functions that let us subscribe before 16 are the superuser's.
        let left =
            "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'pgcutover%' AND nspname <> 'pgcutover_subscriber'";
        assert_eq!(bench.source.number(left).await.unwrap(), 0, "preflight leaves nothing behind");
        assert_eq!(bench.target.number(left).await.unwrap(), 0);
    }
}

/// Faults that are sessions: they live as long as their connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_transactions_lag_and_strangers_are_named() {
    for (from, to) in PAIRS {
        let bench = Bench::start(&PairOptions::new(from, to)).await;
        for cluster in [&bench.pair.source, &bench.pair.target] {
            let client = cluster.connect(APP, &password(APP), DATABASE).await.unwrap();
            let pid = client.number("SELECT pg_backend_pid()").await.unwrap();
            client.run("BEGIN; SELECT count(*) FROM accounts").await.unwrap();
            bench.becomes(Level::Red, "old_transactions", &format!("pid {pid} (app")).await;
            client.run("ROLLBACK").await.unwrap();
            bench.heals().await;
        }
        let stranger = bench.pair.source.connect(APP, &password(APP), DATABASE).await.unwrap();
        stranger.run("SET application_name = 'nightly job'").await.unwrap();
        bench.becomes(Level::Yellow, "bypass", "nightly job").await;
        // The apply worker waits for a lock of ours: the lag grows.
        bench.target.run("BEGIN; LOCK TABLE accounts").await.unwrap();
        stranger.run("INSERT INTO accounts (bid) SELECT 1 FROM generate_series(1, 20000)").await.unwrap();
        bench.becomes(Level::Red, "lag", "slot app_sub").await;
        bench.target.run("ROLLBACK").await.unwrap();
        bench.heals().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_servers_and_wal_levels_are_named() {
    let mut options = PairOptions::new(13, 17);
    options.target.settings.push(("wal_level".to_owned(), "replica".to_owned()));
    let bench = Bench::start(&options).await;
    bench.becomes(Level::Red, "wal_level", "target").await;
    let twice = Clusters {
        source: as_proxyctl(Role::Source, &bench.pair.source),
        target: as_proxyctl(Role::Target, &bench.pair.source),
    };
    let found = checks(&gather(&twice, &inquiry()).await.unwrap());
    assert!(found.iter().any(|f| f.level == Level::Red && f.check == "identity" && f.object == "target"), "{found:?}");
    let replication = Replication::Logical { subscriptions: vec!["nightly".to_owned()] };
    let named = Inquiry { replication, ..inquiry() };
    let found = checks(&gather(&bench.clusters, &named).await.unwrap());
    let missing =
        |f: &Finding| f.level == Level::Red && f.check == "subscriptions" && f.object == "subscription nightly";
    assert!(found.iter().any(missing), "{found:?}");
}

/// With the store there: someone else's, a gate that holds, a proxy that nobody told us of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_the_store_are_named() {
    for (from, to) in PAIRS {
        let bench = Bench::start(&PairOptions::new(from, to)).await;
        let db = Name::new(DATABASE).unwrap();
        bench.source.run(&store::transaction(store::OBJECTS)).await.unwrap();
        bench.becomes(Level::Red, "store", "source schema pgcutover").await;
        bench.source.run("DROP SCHEMA pgcutover CASCADE").await.unwrap();
        for cluster in [&bench.clusters.target, &bench.clusters.source] {
            cluster.install(LIMIT).await.unwrap();
            cluster.arm(&db, LIMIT).await.unwrap();
        }
        bench.heals().await;
        let member = Member {
            instance: "forgotten".to_owned(),
            address: "10.0.0.7:6432".to_owned(),
            backend: "blue".to_owned(),
            route_epoch: Epoch::ZERO,
            paused_epoch: None,
            seen_ms_ago: 0,
        };
        bench.source.run(&store::enroll(&db, &member)).await.unwrap();
        bench.becomes(Level::Red, "members", "forgotten").await;
        bench.source.run("UPDATE pgcutover.member SET seen_at = now() - interval '1 hour'").await.unwrap();
        bench.heals().await;
        let run = RunId::random();
        let epoch = bench.clusters.target.open(&db, run, &Name::new("blue").unwrap(), Epoch::ZERO).await.unwrap();
        bench.target.run(&format!("SELECT pgcutover.flip('app', {epoch}, '{run}')")).await.unwrap();
        bench.becomes(Level::Yellow, "target_gate", "app").await;
        // The gates act in the owner's name: without the right to see backend types they would stop apply workers.
        bench.source.run(&format!("REVOKE pg_monitor FROM {PGCUTOVER}")).await.unwrap();
        bench.becomes(Level::Red, "store", "source schema pgcutover").await;
    }
}
