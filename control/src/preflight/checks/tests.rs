//! Every check against the fault it is there for: red, with the object's name and a fix; and green without it.

use std::time::Duration;

use pgcutover_api::epoch::Epoch;
use pgcutover_api::store::{Gate, GateForm, Identity, Member, Name};

use super::checks;
use crate::clusters::{
    Extent, GateState, Lag, Position, PreparedTransaction, PublishedTable, Receiver, Recovery, Sequence, Setting,
    SlotState, Standby, Subscription, TableFacts, TableKind, TableState,
};
use crate::config::Change;
use crate::config::members::{Address, Unlisted};
use crate::finding::{Finding, Level};
use crate::preflight::attempts::Attempt;
use crate::preflight::definitions::{Definition, Definitions, Part};
use crate::preflight::facts::{
    BouncerFacts, ClusterFacts, Control, Facts, Limits, LoginRole, LoginVerdict, ProxyBackend, ProxyFacts,
    ReplicationFacts, Session, StoreFacts, Verdict, Verifiers, Watched,
};
use crate::preflight::standby::{Holds, Neighbour, StandbyFacts};
use crate::preflight::types::{Kind, Rank, TypeFacts, TypeName, Types};

fn table(name: &str) -> TableFacts {
    TableFacts {
        schema: "public".to_owned(),
        name: name.to_owned(),
        kind: TableKind::Logged,
        parent: None,
        is_identified: true,
        other_owner: None,
        gate: GateState::Missing,
    }
}

fn part(part: Part, name: &str, text: &str, traits: &[&str]) -> Definition {
    let traits = traits.iter().map(|one| (*one).to_owned()).collect();
    Definition { table: "public.accounts".to_owned(), part, name: name.to_owned(), text: text.to_owned(), traits }
}

fn shape() -> Vec<Definition> {
    vec![
        part(Part::Column, "id", "integer", &["NOT NULL", "default"]),
        part(Part::Column, "name", "text", &[]),
        part(Part::Column, "at", "date", &["NOT NULL"]),
        part(Part::Constraint, "accounts_pkey", "PRIMARY KEY (id)", &[]),
        part(Part::Index, "accounts_name", "ON public.accounts USING btree (name)", &[]),
        part(Part::Trigger, "touch", "touch", &[]),
    ]
}

fn sequence(position: Position) -> Sequence {
    Sequence {
        schema: "public".to_owned(),
        name: "ticket".to_owned(),
        start: 1,
        min: 1,
        max: 32_767,
        increment: 1,
        cycles: false,
        position,
        setting: Setting::Allowed,
    }
}

fn session(user: &str, transaction_age_ms: Option<i64>) -> Session {
    Session {
        pid: 4711,
        user: user.to_owned(),
        application: Some("psql".to_owned()),
        address: Some("10.0.0.9".to_owned()),
        backend_type: Some("client backend".to_owned()),
        transaction_age_ms,
    }
}

fn login(name: &str, verifier: &str) -> LoginRole {
    LoginRole { name: name.to_owned(), verifier: Some(verifier.to_owned()), is_administrative: false }
}

fn kind(name: &str, kind: Kind, oid: u32, shape: &str) -> TypeFacts {
    let name = TypeName { schema: "public".to_owned(), name: name.to_owned(), rank: Rank::Itself };
    TypeFacts { name, oid, kind, shape: Some(shape.to_owned()), met_in: Vec::new() }
}

fn mood(oid: u32) -> TypeFacts {
    kind("mood", Kind::Enum, oid, "enum {ok,bad}")
}

fn array(mut of: TypeFacts, oid: u32) -> TypeFacts {
    of.name.rank = Rank::Array;
    TypeFacts { oid, shape: Some("array".to_owned()), ..of }
}

fn types(cluster: &mut ClusterFacts) -> &mut Vec<TypeFacts> {
    match &mut cluster.types {
        Types::Read(types) => types,
        Types::Hidden(words) => panic!("{words}"),
    }
}

fn cluster(system_identifier: u64, version_num: u32) -> ClusterFacts {
    let attempt = |right| Attempt { right, refusal: None };
    ClusterFacts {
        identity: Identity { system_identifier, timeline: Some(1), in_recovery: false, version_num },
        database: "app".to_owned(),
        login: "pgcutover".to_owned(),
        wal_level: "logical".to_owned(),
        synchronous_standby_names: String::new(),
        slots_max: 10,
        slots_used: 1,
        large_objects: 0,
        clock_ahead_ms: 0,
        tables: vec![table("accounts")],
        sequences: vec![sequence(Position::Last(7))],
        foreign_tables: Vec::new(),
        materialized_views: Vec::new(),
        replica_triggers: Vec::new(),
        server_bound: Vec::new(),
        sessions: Vec::new(),
        prepared: Vec::new(),
        logins: vec![login("app", "SCRAM-SHA-256$x"), login("pgcutover_proxy", "SCRAM-SHA-256$p")],
        verifiers: Verifiers::Read,
        types: Types::Read(vec![mood(20_000), array(mood(20_000), 19_999)]),
        definitions: Definitions::Read(shape()),
        store: None,
        attempts: vec![attempt("store"), attempt("event_trigger"), attempt("activity"), attempt("slot")],
    }
}

fn healthy() -> Facts {
    let lag = Lag { applied_bytes: Some(0), durable_bytes: Some(0) };
    let slot = SlotState {
        name: "s".to_owned(),
        is_active: true,
        wal_status: Some("reserved".to_owned()),
        replayed: None,
        lag,
    };
    let subscription = Subscription {
        name: "s".to_owned(),
        is_enabled: true,
        slot: Some("s".to_owned()),
        publications: vec!["p".to_owned()],
    };
    let published = PublishedTable {
        publication: "p".to_owned(),
        table: "public.accounts".to_owned(),
        extent: Extent::Whole,
        is_of_all: false,
    };
    let state = TableState { subscription: "s".to_owned(), table: "public.accounts".to_owned(), state: "r".to_owned() };
    let backend = ProxyBackend { name: "blue".to_owned(), is_active: true, system_identifier: Some(1) };
    Facts {
        db: Name::new("app").unwrap(),
        source: cluster(1, 130_023),
        target: cluster(2, 170_010),
        standby: None,
        replication: ReplicationFacts {
            subscriptions: vec![subscription],
            states: vec![state],
            published: vec![published],
            slots: vec![slot],
            ..ReplicationFacts::default()
        },
        proxies: vec![ProxyFacts {
            name: "p1".to_owned(),
            instance: Some("one".to_owned()),
            origin: "listed".to_owned(),
            control: Control::Given,
            applications: vec!["shop".to_owned(), String::new()],
            server_pids: Vec::new(),
            backends: vec![backend],
            logins: Vec::new(),
        }],
        bouncers: Vec::new(),
        members: Vec::new(),
        limits: Limits {
            lag_bytes_max: 1000,
            transaction_age_max: Duration::from_secs(1),
            gap: 1000,
            way_back: true,
            proxy_role: "pgcutover_proxy".to_owned(),
            source_backend: "blue".to_owned(),
            oid_change: Change::Refused,
            column_change: Change::Refused,
            unlisted: Unlisted::Refuse,
        },
    }
}

fn with(fault: impl FnOnce(&mut Facts)) -> Vec<Finding> {
    let mut facts = healthy();
    fault(&mut facts);
    checks(&facts).into_iter().filter(|finding| finding.level != Level::Green).collect()
}

/// The fault gives exactly one finding: of this level and check, with this in its object, and with a fix.
#[track_caller]
fn gives(level: Level, check: &str, object: &str, fault: impl FnOnce(&mut Facts)) {
    let found = with(fault);
    assert_eq!(found.len(), 1, "{found:#?}");
    let finding = &found[0];
    assert_eq!((finding.level, finding.check.as_str()), (level, check), "{finding}");
    assert!(finding.object.contains(object), "{finding}");
    assert!(!finding.fix.is_empty(), "{finding}");
}

#[test]
fn a_healthy_pair_is_green_throughout() {
    assert_eq!(with(|_| ()), []);
}

#[test]
fn faults_of_the_servers_are_seen() {
    gives(Level::Red, "versions", "source", |f| f.source.identity.version_num = 100_023);
    gives(Level::Yellow, "versions", "target", |f| f.target.identity.version_num = 190_000);
    gives(Level::Yellow, "versions", "target", |f| f.target.identity.version_num = 110_022);
    gives(Level::Red, "identity", "target", |f| f.target.identity.system_identifier = 1);
    gives(Level::Red, "identity", "target", |f| f.target.identity.in_recovery = true);
    gives(Level::Red, "identity", "p1", |f| f.proxies[0].backends[0].name = "green".to_owned());
    gives(Level::Red, "identity", "p1", |f| f.proxies[0].backends[0].system_identifier = Some(9));
    gives(Level::Red, "wal_level", "source", |f| f.source.wal_level = "replica".to_owned());
    gives(Level::Red, "wal_level", "target", |f| f.target.wal_level = "replica".to_owned());
    gives(Level::Yellow, "wal_level", "target", |f| {
        f.target.wal_level = "replica".to_owned();
        f.limits.way_back = false;
    });
    gives(Level::Yellow, "clock_skew", "target", |f| f.target.clock_ahead_ms = -5000);
    gives(Level::Yellow, "synchronous_standby", "target", |f| f.target.synchronous_standby_names = "*".to_owned());
    gives(Level::Red, "replication_slots", "target", |f| f.target.slots_used = 10);
}

#[test]
fn rights_that_we_lack_are_seen() {
    let refused = |attempt: &mut Attempt| attempt.refusal = Some("permission denied [42501]".to_owned());
    gives(Level::Red, "own_rights", "source role pgcutover", |f| refused(&mut f.source.attempts[0]));
    gives(Level::Yellow, "event_trigger", "pgcutover", |f| refused(&mut f.source.attempts[1]));
    gives(Level::Red, "own_rights", "target role pgcutover", |f| refused(&mut f.target.attempts[2]));
    gives(Level::Red, "own_rights", "target role pgcutover", |f| refused(&mut f.target.attempts[3]));
    gives(Level::Red, "store", "source schema", |f| {
        let lacks = Some("its owner old has not pg_read_all_stats".to_owned());
        f.source.store = Some(StoreFacts { owner: "old".to_owned(), lacks, gates: Vec::new() });
    });
    gives(Level::Red, "table_rights", "public.accounts", |f| f.source.tables[0].other_owner = Some("boss".to_owned()));
    gives(Level::Red, "table_rights", "public.accounts", |f| {
        f.source.tables[0].gate = GateState::Other("gate:x".to_owned())
    });
}

#[test]
fn a_gate_on_the_target_is_seen() {
    let gate = |form, epoch: u64| {
        let gate = Gate { db: "app".to_owned(), form, epoch: Epoch::try_from(epoch).unwrap() };
        move |f: &mut Facts| {
            f.target.store = Some(StoreFacts { owner: "pgcutover".to_owned(), lacks: None, gates: vec![gate] });
        }
    };
    gives(Level::Yellow, "target_gate", "app", gate(Some(GateForm::Fenced), 3));
    gives(Level::Red, "target_gate", "app", gate(None, 0));
    assert_eq!(with(gate(Some(GateForm::Open), 0)), []);
}

#[test]
fn faults_of_replication_are_seen() {
    gives(Level::Red, "subscriptions", "nightly", |f| f.replication.missing.push("nightly".to_owned()));
    gives(Level::Red, "subscriptions", "subscription s", |f| f.replication.subscriptions[0].is_enabled = false);
    gives(Level::Red, "subscriptions", "subscription s", |f| f.replication.subscriptions[0].slot = None);
    gives(Level::Red, "slots", "slot s", |f| f.replication.slots.clear());
    gives(Level::Red, "slots", "slot s", |f| f.replication.slots[0].is_active = false);
    gives(Level::Red, "slots", "slot s", |f| f.replication.slots[0].wal_status = Some("lost".to_owned()));
    gives(Level::Red, "publication", "public.accounts", |f| f.replication.published.clear());
    gives(Level::Red, "publication", "public.accounts", |f| f.replication.published[0].extent = Extent::Filtered);
    gives(Level::Red, "lag", "slot s", |f| f.replication.slots[0].lag.applied_bytes = Some(1001));
    gives(Level::Red, "lag", "slot s", |f| f.replication.slots[0].lag.applied_bytes = None);
    gives(Level::Red, "sentinel", "publication p", |f| f.replication.publications_of_others.push("p".to_owned()));
    gives(Level::Red, "sentinel", "subscription s", |f| f.replication.subscriptions_of_others.push("s".to_owned()));
    let found = with(|f| f.replication = ReplicationFacts::default());
    assert!(found.iter().any(|f| f.check == "subscriptions" && f.level == Level::Red), "{found:?}");
    let found = with(|f| f.replication.states[0].state = "d".to_owned());
    assert!(found.iter().any(|f| f.check == "subscriptions" && f.object.contains("public.accounts")), "{found:?}");
}

#[test]
fn faults_of_the_data_are_seen() {
    gives(Level::Red, "replica_identity", "public.accounts", |f| f.source.tables[0].is_identified = false);
    gives(Level::Yellow, "unreplicated", "public.cache", |f| {
        f.source.tables.push(TableFacts { kind: TableKind::Unlogged, is_identified: false, ..table("cache") });
    });
    gives(Level::Yellow, "unreplicated", "public.far", |f| f.source.foreign_tables.push("public.far".to_owned()));
    gives(Level::Yellow, "unreplicated", "public.sums", |f| f.source.materialized_views.push("public.sums".to_owned()));
    gives(Level::Red, "large_objects", "app", |f| f.source.large_objects = 1);
    gives(Level::Red, "sequences", "public.ticket", |f| f.source.sequences[0].position = Position::Hidden);
    gives(Level::Red, "sequences", "public.ticket", |f| f.source.sequences[0].position = Position::Last(32_000));
    gives(Level::Red, "sequences", "public.ticket", |f| f.target.sequences.clear());
    gives(Level::Red, "sequences", "public.ticket", |f| f.target.sequences[0].setting = Setting::Denied);
    gives(Level::Red, "sequences", "public.ticket", |f| f.target.sequences[0].max = 1000);
    gives(Level::Yellow, "target_triggers", "audit", |f| {
        f.target.replica_triggers.push("public.accounts audit".to_owned())
    });
    gives(Level::Yellow, "server_bound", "whoami()", |f| f.source.server_bound.push("whoami()".to_owned()));
}

#[test]
fn types_that_are_not_the_same_are_seen() {
    let check = "type_oids";
    gives(Level::Red, check, "type public.mood", |f| types(&mut f.target).clear());
    gives(Level::Red, check, "type public.mood", |f| {
        types(&mut f.target)[0].shape = Some("enum {bad,ok}".to_owned());
    });
    gives(Level::Red, check, "type public.mood", |f| types(&mut f.target)[0].shape = None);
    gives(Level::Red, check, "source role pgcutover", |f| f.source.types = Types::Hidden("no".to_owned()));
    gives(Level::Red, check, "target role pgcutover", |f| f.target.types = Types::Hidden("no".to_owned()));
    // Only an array that differs alone is named for itself.
    gives(Level::Red, check, "public.mood[]", |f| types(&mut f.target)[1].oid = 30_000);
    let found = with(|f| types(&mut f.target)[1].oid = 30_000);
    assert!(found[0].problem.contains("statements at risk: those that name it (no column or function"), "{found:?}");
    assert_eq!(with(|f| types(&mut f.target).push(kind("more", Kind::Enum, 31_000, "enum {}"))), []);
    // A multirange comes with its range from 14 on, used or not.
    let multirange = kind("spans", Kind::Multirange, 32_000, "multirange");
    gives(Level::Red, check, "public.spans", |f| types(&mut f.source).push(multirange.clone()));
    gives(Level::Yellow, check, "public.spans", |f| {
        types(&mut f.source).push(multirange.clone());
        f.target.identity.version_num = 130_023;
    });
}

#[test]
fn tables_that_are_not_made_alike_are_seen() {
    fn of(cluster: &mut ClusterFacts) -> &mut Vec<Definition> {
        match &mut cluster.definitions {
            Definitions::Read(definitions) => definitions,
            Definitions::Hidden(_) => panic!("read"),
        }
    }
    let (check, table) = ("definitions", "table public.accounts");
    gives(Level::Red, check, table, |f| of(&mut f.target).clear());
    gives(Level::Red, check, table, |f| drop(of(&mut f.target).remove(1)));
    gives(Level::Red, check, "source role pgcutover", |f| f.source.definitions = Definitions::Hidden("no".to_owned()));
    gives(Level::Red, check, "target role pgcutover", |f| f.target.definitions = Definitions::Hidden("no".to_owned()));
    // Another order and another type: red until somebody accepts them.
    for (accepted, level) in [(Change::Refused, Level::Red), (Change::Accepted, Level::Yellow)] {
        gives(level, check, table, |f| {
            of(&mut f.target).swap(0, 1);
            f.limits.column_change = accepted;
        });
        gives(level, check, table, |f| {
            of(&mut f.target)[0].text = "bigint".to_owned();
            f.limits.column_change = accepted;
        });
    }
    // A column more: red where an INSERT that does not know it fails.
    for (traits, level) in
        [(&["NOT NULL"][..], Level::Red), (&["NOT NULL", "default"], Level::Yellow), (&[], Level::Yellow)]
    {
        gives(level, check, table, |f| of(&mut f.target).insert(3, part(Part::Column, "more", "text", traits)));
    }
    gives(Level::Yellow, check, table, |f| of(&mut f.target)[2].traits.clear());
    gives(Level::Yellow, check, "index accounts_name", |f| of(&mut f.target)[4].traits.push("invalid".to_owned()));
    for (at, object) in [(3, "constraint accounts_pkey"), (4, "index accounts_name"), (5, "trigger touch")] {
        gives(Level::Yellow, check, object, |f| drop(of(&mut f.target).remove(at)));
    }
    // Names of keys and indexes are anybody's choice; what the target has besides is no loss.
    let others = |f: &mut Facts| {
        of(&mut f.target)[4].name = "other".to_owned();
        of(&mut f.target).push(part(Part::Index, "more", "ON public.accounts USING hash (name)", &[]));
    };
    assert_eq!(with(others), []);
}

#[test]
fn types_of_other_numbers_are_red_until_accepted_and_name_the_drivers() {
    let driver = |kind_of: Kind, word: &str, accepted: Change| {
        let found = with(|f| {
            let met_in = vec!["column public.t.x".to_owned(), "function public.f".to_owned()];
            types(&mut f.source).push(TypeFacts { met_in, ..kind("thing", kind_of, 40_000, "same") });
            types(&mut f.target).push(kind("thing", kind_of, 40_001, "same"));
            f.limits.oid_change = accepted;
        });
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].object.contains("public.thing") && !found[0].fix.is_empty(), "{found:?}");
        assert!(found[0].problem.contains(word) && found[0].problem.ends_with("connected now: shop"), "{found:?}");
        let statements = "statements at risk: those with column public.t.x, function public.f;";
        assert!(found[0].problem.contains(statements), "{found:?}");
        found[0].level
    };
    for (kind, word) in [
        (Kind::Composite, "OutdatedSchemaCacheError"),
        (Kind::Enum, "not asyncpg"),
        (Kind::Domain, "by hand"),
        (Kind::Base, "by hand"),
    ] {
        assert_eq!(driver(kind, word, Change::Refused), Level::Red);
        assert_eq!(driver(kind, word, Change::Accepted), Level::Yellow);
    }
}

#[test]
fn a_number_of_two_types_is_red_whatever_is_accepted() {
    let found = with(|f| {
        f.limits.oid_change = Change::Accepted;
        types(&mut f.target)[0].oid = 20_001;
        types(&mut f.target).push(kind("other", Kind::Composite, 20_000, "composite {}"));
    });
    let red: Vec<&Finding> = found.iter().filter(|f| f.level == Level::Red).collect();
    assert_eq!(red.len(), 1, "{found:?}");
    assert!(red[0].problem.contains("20000 is public.mood here and public.other there"), "{found:?}");
    // Its own array's number counts as another type too.
    let found = with(|f| {
        f.limits.oid_change = Change::Accepted;
        types(&mut f.target)[0].oid = 20_002;
        types(&mut f.target)[1].oid = 20_000;
    });
    assert!(found.iter().any(|f| f.level == Level::Red && f.problem.contains("public.mood[] there")), "{found:?}");
}

#[test]
fn old_and_prepared_transactions_are_seen_on_both_sides() {
    gives(Level::Red, "old_transactions", "source pid 4711", |f| {
        f.source.sessions.push(session("app", Some(1001)));
        f.proxies[0].server_pids.push(4711);
    });
    gives(Level::Red, "old_transactions", "target pid 4711", |f| f.target.sessions.push(session("app", Some(1001))));
    assert_eq!(with(|f| f.target.sessions.push(session("app", Some(999)))), []);
    let comparison = || Session { application: Some("proxyctl verify".to_owned()), ..session("pgcutover", Some(9999)) };
    assert_eq!(with(|f| f.source.sessions.push(comparison())), []);
    assert_eq!(with(|f| f.target.sessions.push(comparison())), []);
    for side in ["source", "target"] {
        let prepared = PreparedTransaction { gid: "gid-1".to_owned(), owner: "app".to_owned(), age_ms: 5 };
        gives(Level::Red, "prepared_transactions", side, |f| {
            if side == "source" { &mut f.source } else { &mut f.target }.prepared.push(prepared);
        });
    }
}

#[test]
fn logins_that_would_fail_on_the_target_are_seen() {
    let verdict = |verdict| LoginVerdict { user: "app".to_owned(), verdict };
    gives(Level::Red, "verifiers", "role app", |f| f.target.logins[0].verifier = Some("SCRAM-SHA-256$y".to_owned()));
    gives(Level::Red, "verifiers", "role app", |f| f.target.logins.retain(|role| role.name != "app"));
    gives(Level::Red, "proxy_role", "source role", |f| f.source.logins.retain(|role| role.name == "app"));
    gives(Level::Red, "proxy_role", "target role", |f| f.target.logins.retain(|role| role.name == "app"));
    gives(Level::Red, "verifiers", "role app", |f| f.source.verifiers = Verifiers::Hidden);
    gives(Level::Red, "verifiers", "role app", |f| f.target.verifiers = Verifiers::Hidden);
    gives(Level::Red, "verifiers", "role app", |f| {
        f.proxies[0].logins.push(verdict(Verdict::Refused("no".to_owned())))
    });
    gives(Level::Yellow, "verifiers", "role app", |f| {
        f.source.logins[0].is_administrative = true;
        f.target.logins.retain(|role| role.name != "app");
    });
    let proved = with(|f| {
        f.target.verifiers = Verifiers::Hidden;
        f.proxies[0].logins.push(verdict(Verdict::In));
    });
    assert_eq!(proved, []);
    let not_proved = with(|f| {
        f.target.verifiers = Verifiers::Hidden;
        f.proxies[0].logins.push(verdict(Verdict::In));
        f.proxies.push(ProxyFacts {
            instance: Some("two".to_owned()),
            logins: vec![verdict(Verdict::Unknown)],
            ..f.proxies[0].clone()
        });
    });
    assert_eq!(not_proved.len(), 1);
}

fn member(instance: &str, seen_ms_ago: u64) -> Member {
    Member {
        instance: instance.to_owned(),
        address: "10.0.0.7:6432".to_owned(),
        backend: "blue".to_owned(),
        route_epoch: Epoch::ZERO,
        paused_epoch: None,
        seen_ms_ago,
    }
}

#[test]
fn a_pgbouncer_points_at_the_source_and_is_kept() {
    let address = |port| Address { host: "10.0.0.1".to_owned(), port, dbname: "app".to_owned() };
    let bouncer = BouncerFacts {
        name: "b1".to_owned(),
        points_at: Ok(address(5432)),
        source: address(5432),
        pool_mode: "transaction".to_owned(),
        server_pids: vec![4711],
        watched: Watched::ByItsKeeper,
    };
    let put = |bouncer: BouncerFacts| move |f: &mut Facts| f.bouncers.push(bouncer.clone());
    assert_eq!(with(put(bouncer.clone())), []);
    assert_eq!(with(|f| f.members.push(member("b1", 900)))[0].level, Level::Red);
    let enrolled = |f: &mut Facts| {
        f.bouncers.push(bouncer.clone());
        f.members.push(member("b1", 900));
        f.source.sessions.push(session("app", None));
    };
    assert_eq!(with(enrolled), [], "neither a stranger nor past the proxies");
    let away = BouncerFacts { points_at: Err("no answer".to_owned()), ..bouncer.clone() };
    gives(Level::Red, "pgbouncer", "b1", put(away));
    gives(Level::Red, "pgbouncer", "b1", put(BouncerFacts { points_at: Ok(address(5433)), ..bouncer.clone() }));
    gives(Level::Red, "pgbouncer", "b1", put(BouncerFacts { watched: Watched::ByNobody, ..bouncer.clone() }));
    gives(Level::Yellow, "pgbouncer", "b1", put(BouncerFacts { watched: Watched::ByThisRun, ..bouncer.clone() }));
    gives(Level::Yellow, "pgbouncer", "b1", put(BouncerFacts { pool_mode: "session".to_owned(), ..bouncer.clone() }));
}

#[test]
fn strangers_and_proxies_that_could_not_follow_are_seen() {
    gives(Level::Yellow, "bypass", "4711 (app, psql, 10.0.0.9)", |f| f.source.sessions.push(session("app", None)));
    let known = with(|f| {
        f.source.sessions.push(session("app", None));
        f.source.sessions.push(Session { pid: 5, ..session("pgcutover_proxy", None) });
        f.proxies[0].server_pids.push(4711);
    });
    assert_eq!(known, []);
    gives(Level::Red, "proxies", "p1", |f| f.proxies[0].control = Control::Missing);
    gives(Level::Red, "members", "two", |f| f.members.push(member("two", 900)));
    gives(Level::Yellow, "members", "two", |f| {
        f.limits.unlisted = Unlisted::Follow;
        f.members.push(member("two", 900));
    });
    let namesakes = with(|f| f.proxies.push(f.proxies[0].clone()));
    assert_eq!(
        namesakes.iter().map(|found| (found.level, found.check.as_str())).collect::<Vec<_>>(),
        [(Level::Red, "members"); 2]
    );
    assert_eq!(with(|f| f.members.extend([member("two", 60_000), member("one", 900)])), []);
}

/// The same cluster, followed by a standby.
fn standing_by(fault: impl FnOnce(&mut Facts, &mut StandbyFacts)) -> impl FnOnce(&mut Facts) {
    move |facts| {
        let receiver =
            Receiver { status: Some("streaming".to_owned()), slot: Some("standby".to_owned()), timeline: Some(1) };
        let standby = Standby {
            recovery: Recovery::Replaying,
            replayed: None,
            delay_ms: 0,
            may_promote: true,
            followers: 0,
            receiver: Some(receiver),
        };
        let mut of = StandbyFacts {
            standby,
            lag_bytes: 0,
            sync_state: Some("async".to_owned()),
            neighbours: vec![Neighbour { name: "postgres".to_owned(), holds: Holds::Nothing }],
            subscriptions: Vec::new(),
            logical_slots: Vec::new(),
        };
        facts.target = cluster(1, 130_023);
        (facts.target.identity.in_recovery, facts.target.identity.timeline) = (true, None);
        facts.limits.way_back = false;
        fault(facts, &mut of);
        facts.standby = Some(of);
    }
}

#[test]
fn a_standby_that_could_not_take_over_is_seen() {
    assert_eq!(with(standing_by(|_, _| ())), []);
    let seen = |level, check, object, fault: fn(&mut Facts, &mut StandbyFacts)| {
        gives(level, check, object, standing_by(fault));
    };
    seen(Level::Red, "identity", "source", |f, _| f.source.identity.in_recovery = true);
    seen(Level::Red, "identity", "target", |f, _| f.target.identity.system_identifier = 2);
    seen(Level::Red, "identity", "target", |f, of| {
        f.target.identity.in_recovery = false;
        of.standby.recovery = Recovery::Over;
    });
    seen(Level::Red, "streaming", "target", |f, _| f.target.identity.version_num = 140_001);
    seen(Level::Red, "streaming", "target", |_, of| of.standby.receiver = None);
    seen(Level::Red, "streaming", "target", |_, of| of.standby.recovery = Recovery::Paused);
    seen(Level::Red, "streaming", "target", |_, of| of.standby.delay_ms = 1);
    seen(Level::Red, "streaming", "target", |_, of| {
        of.standby.receiver = of.standby.receiver.take().map(|receiver| Receiver { timeline: Some(2), ..receiver });
    });
    seen(Level::Yellow, "streaming", "target", |_, of| {
        of.standby.receiver = of.standby.receiver.take().map(|receiver| Receiver { slot: None, ..receiver });
    });
    seen(Level::Red, "promotion", "role pgcutover", |_, of| of.standby.may_promote = false);
    seen(Level::Red, "lag", "target", |_, of| of.lag_bytes = 1001);
}

#[test]
fn what_a_promotion_would_leave_waiting_written_or_read_on_both_sides_is_seen() {
    let seen = |level, check, object, fault: fn(&mut Facts, &mut StandbyFacts)| {
        gives(level, check, object, standing_by(fault));
    };
    let waits: fn(&mut Facts) = |f| "standby".clone_into(&mut f.source.synchronous_standby_names);
    assert_eq!(with(standing_by(|f, _| waits(f))), [], "commits that wait for another one");
    for state in [None, Some("sync"), Some("quorum"), Some("potential")] {
        gives(
            Level::Red,
            "synchronous_standby",
            "source",
            standing_by(|f, of| {
                waits(f);
                of.sync_state = state.map(str::to_owned);
            }),
        );
    }
    seen(Level::Red, "synchronous_standby", "target", |f, _| "x".clone_into(&mut f.target.synchronous_standby_names));
    seen(Level::Red, "neighbours", "postgres", |_, of| of.neighbours[0].holds = Holds::Objects(1));
    seen(Level::Red, "neighbours", "postgres", |_, of| of.neighbours[0].holds = Holds::Hidden("no".to_owned()));
    seen(Level::Red, "feeds", "app.s", |_, of| of.subscriptions.push("app.s".to_owned()));
    seen(Level::Yellow, "feeds", "cdc", |_, of| of.logical_slots.push("cdc".to_owned()));
    seen(Level::Yellow, "unreplicated", "accounts", |f, _| f.source.tables[0].kind = TableKind::Unlogged);
    seen(Level::Yellow, "unreplicated", "app", |f, _| f.source.large_objects = 1);
}
