//! Checks of the two servers themselves and of our rights on them.
//!
//! Invariant: pure.

use pgcutover_api::store::GateForm;

use crate::finding::Finding;
use crate::preflight::checks::{or_green, red_if, sides};
use crate::preflight::facts::{ClusterFacts, Facts};

/// The versions that the SQL was run on.
const MAJOR_MIN: u32 = 11;
const MAJOR_MAX: u32 = 18;
/// Above this the clocks differ by more than a person expects to see in `now()` defaults.
const CLOCK_SKEW_MS_MAX: i64 = 1000;

fn major(cluster: &ClusterFacts) -> u32 {
    cluster.identity.version_num / 10_000
}

pub(super) fn versions(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "versions";
    let mut found = Vec::new();
    for (side, cluster) in sides(facts) {
        let major = major(cluster);
        if major < MAJOR_MIN {
            let fix = format!("Upgrade it to {MAJOR_MIN} first.");
            found.push(Finding::red(
                CHECK,
                side,
                format!("PostgreSQL {major} is too old: {MAJOR_MIN} to {MAJOR_MAX}"),
                fix,
            ));
        } else if major > MAJOR_MAX {
            let problem = format!("PostgreSQL {major} is newer than what this was tried with ({MAJOR_MAX})");
            found.push(Finding::yellow(CHECK, side, problem, "Rehearse it on a copy first."));
        }
    }
    if major(&facts.target) < major(&facts.source) {
        let problem =
            format!("PostgreSQL {} is older than the source's {}", major(&facts.target), major(&facts.source));
        found.push(Finding::yellow(CHECK, "target", problem, "Make sure that this is meant to be a move back."));
    }
    let well = format!("PostgreSQL {} to {}", major(&facts.source), major(&facts.target));
    or_green(CHECK, facts.db.as_str(), &well, found)
}

pub(super) fn identity(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "identity";
    let source = facts.source.identity.system_identifier;
    let (mut found, well) = match facts.standby {
        None => (two_primaries(facts, CHECK), "source and target are two primaries"),
        Some(_) => (primary_and_standby(facts, CHECK), "the target is a standby of the source"),
    };
    for proxy in &facts.proxies {
        let active = proxy.backends.iter().find(|backend| backend.is_active);
        if let Some(other) = active.filter(|backend| backend.name != facts.limits.source_backend) {
            let problem = format!("serves from {}, not from {}", other.name, facts.limits.source_backend);
            let fix = "Set [source].backend to the active backend, or switch this proxy.";
            found.push(Finding::red(CHECK, format!("proxy {}", proxy.name), problem, fix));
        } else if let Some(seen) = active.and_then(|backend| backend.system_identifier).filter(|seen| *seen != source) {
            let problem = format!("its {} is the server {seen}, our source is {source}", facts.limits.source_backend);
            let fix = "Make [source].dsn and the proxy's backend name the same server.";
            found.push(Finding::red(CHECK, format!("proxy {}", proxy.name), problem, fix));
        }
    }
    or_green(CHECK, facts.db.as_str(), well, found)
}

fn two_primaries(facts: &Facts, check: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for (side, _) in sides(facts).into_iter().filter(|(_, cluster)| cluster.identity.in_recovery) {
        let fix = format!("Name the primary in [{side}].dsn.");
        found.push(Finding::red(check, side, "is a standby (in recovery)", fix));
    }
    let source = facts.source.identity.system_identifier;
    if source == facts.target.identity.system_identifier {
        let problem =
            format!("has the source's system identifier {source}: it is the same server, or its physical copy");
        let fix = "Name another server in [target].dsn; or, if it is a standby to be promoted, set replication.kind = 'physical'.";
        found.push(Finding::red(check, "target", problem, fix));
    }
    found
}

fn primary_and_standby(facts: &Facts, check: &str) -> Vec<Finding> {
    let (source, target) = (&facts.source.identity, &facts.target.identity);
    let mut found = Vec::new();
    if source.in_recovery {
        let fix = "Name the primary in [source].dsn.";
        found.push(Finding::red(check, "source", "is a standby (in recovery)", fix));
    }
    if source.system_identifier != target.system_identifier {
        let problem = format!(
            "is the server {}, the source {}: it can't be a standby of it",
            target.system_identifier, source.system_identifier
        );
        let fix = "Name the source's standby in [target].dsn, or set replication.kind = 'logical'.";
        found.push(Finding::red(check, "target", problem, fix));
    } else if !target.in_recovery {
        let problem = "is no standby (not in recovery): it is the source itself, or was promoted";
        let fix = "Rebuild it as a standby of the source (pg_rewind, or pg_basebackup), or name the right server.";
        found.push(Finding::red(check, "target", problem, fix));
    }
    found
}

pub(super) fn wal_level(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "wal_level";
    const FIX: &str = "ALTER SYSTEM SET wal_level = logical; then restart the server.";
    let mut found = Vec::new();
    if facts.source.wal_level != "logical" {
        found.push(Finding::red(CHECK, "source", format!("is {}", facts.source.wal_level), FIX));
    }
    if facts.target.wal_level != "logical" {
        let problem = format!("is {}: there would be no way back", facts.target.wal_level);
        let level = red_if(facts.limits.way_back);
        found.push(level(CHECK, "target".into(), problem, FIX.into()));
    }
    or_green(CHECK, facts.db.as_str(), "logical on both sides", found)
}

pub(super) fn route_name(facts: &Facts) -> Vec<Finding> {
    // The type has refused longer ones; this says so in the report.
    vec![Finding::green("route_name", facts.db.as_str(), format!("{} bytes", facts.db.as_str().len()))]
}

pub(super) fn clock_skew(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "clock_skew";
    let apart_ms = facts.target.clock_ahead_ms - facts.source.clock_ahead_ms;
    if apart_ms.abs() <= CLOCK_SKEW_MS_MAX {
        return vec![Finding::green(CHECK, "target", format!("{apart_ms} ms ahead of the source"))];
    }
    let problem = format!("its clock is {apart_ms} ms ahead of the source's: now() will jump");
    vec![Finding::yellow(CHECK, "target", problem, "Synchronise the clocks (NTP).")]
}

pub(super) fn synchronous_standby(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "synchronous_standby";
    let names = &facts.target.synchronous_standby_names;
    if names.is_empty() {
        return vec![Finding::green(CHECK, "target", "commits wait for no standby")];
    }
    let problem =
        format!("synchronous_standby_names = '{names}': each commit waits for a standby, the durable one too");
    vec![Finding::yellow(CHECK, "target", problem, "Make sure that the standby is up during the cutover.")]
}

pub(super) fn replication_slots(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "replication_slots";
    let target = &facts.target;
    let room = format!("{} of {} replication slots are used", target.slots_used, target.slots_max);
    if target.slots_used < target.slots_max {
        return vec![Finding::green(CHECK, "target", room)];
    }
    let fix = "Raise max_replication_slots on the target and restart it, or drop a slot that nobody reads.";
    let level = red_if(facts.limits.way_back);
    vec![level(CHECK, "target".into(), format!("{room}: no room for a way back"), fix.into())]
}

pub(super) fn own_rights(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "own_rights";
    let mut found = Vec::new();
    for (side, cluster) in sides(facts) {
        for attempt in &cluster.attempts {
            let Some(refusal) = &attempt.refusal else { continue };
            let (problem, fix) = match attempt.right {
                "store" => (
                    "may not create a schema, a table and a gate",
                    format!("GRANT CREATE ON DATABASE {} TO {};", cluster.database, cluster.login),
                ),
                "activity" => {
                    ("may not see what kind others' sessions are", format!("GRANT pg_monitor TO {};", cluster.login))
                }
                "slot" => ("may not create a replication slot", format!("ALTER ROLE {} REPLICATION;", cluster.login)),
                "subscribe" => ("can't subscribe to the target: no way back", subscribing(cluster)),
                "detach" => ("may not disable the subscription that leads there: no way back", detaching(cluster)),
                // Its absence can be lived with: see event_trigger().
                _ => continue,
            };
            let object = format!("{side} role {}", cluster.login);
            found.push(Finding::red(CHECK, object, format!("{problem}: {refusal}"), fix));
        }
    }
    or_green(CHECK, facts.db.as_str(), "tried on both sides and rolled back", found)
}

/// From this on whoever has the right may own a subscription.
const SUBSCRIPTIONS_GRANTED: u32 = 16;
const SUPERUSER_SQL: &str =
    "let a superuser run the part of `proxyctl objects sql` about pgcutover_subscriber in the database";

fn subscribing(cluster: &ClusterFacts) -> String {
    let right = if major(cluster) >= SUBSCRIPTIONS_GRANTED {
        format!("GRANT pg_create_subscription TO {};", cluster.login)
    } else {
        format!("before 16 {SUPERUSER_SQL};")
    };
    format!(
        "If rights are missing: {right} if it does not get there: let it log in from there (pg_hba.conf of the target, with \
         a password), or say in [target].replication_dsn how; or set [way_back].enabled = false."
    )
}

fn detaching(cluster: &ClusterFacts) -> String {
    let right = if major(cluster) >= SUBSCRIPTIONS_GRANTED {
        format!("ALTER SUBSCRIPTION ... OWNER TO {};", cluster.login)
    } else {
        format!("Before 16 {SUPERUSER_SQL};")
    };
    format!("{right} or set [way_back].enabled = false.")
}

pub(super) fn event_trigger(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "event_trigger";
    let attempt = facts.source.attempts.iter().find(|attempt| attempt.right == "event_trigger");
    let Some(refusal) = attempt.and_then(|attempt| attempt.refusal.as_ref()) else {
        return vec![Finding::green(CHECK, "source", "DDL can be fenced")];
    };
    let problem = format!("DDL can't be fenced, only noticed: {refusal}");
    let fix = "Let nobody change the schema during the cutover, or let a superuser run the CREATE EVENT TRIGGER that `proxyctl objects` prints.";
    vec![Finding::yellow(CHECK, format!("source role {}", facts.source.login), problem, fix)]
}

pub(super) fn store(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "store";
    let mut found = Vec::new();
    for (side, cluster) in sides(facts) {
        let Some(store) = &cluster.store else { continue };
        if let Some(lacks) = &store.lacks {
            let fix = format!("GRANT {0} TO {1}; GRANT pg_monitor TO {0};", store.owner, cluster.login);
            found.push(Finding::red(CHECK, format!("{side} schema pgcutover"), lacks.clone(), fix));
        }
    }
    or_green(CHECK, facts.db.as_str(), "is ours, or will be created", found)
}

pub(super) fn target_gate(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "target_gate";
    let gates = facts.target.store.iter().flat_map(|store| &store.gates);
    let mut found = Vec::new();
    for gate in gates.filter(|gate| gate.db == facts.db.as_str()) {
        let object = format!("target gate of {}", gate.db);
        found.push(match gate.form {
            None => {
                Finding::red(CHECK, object, "is not one of ours: its body was changed", "Restore it: proxyctl objects.")
            }
            Some(GateForm::Open) => {
                Finding::green(CHECK, object, "is there and open; it will be shut until the commit")
            }
            Some(GateForm::Fenced | GateForm::Target) => Finding::yellow(
                CHECK,
                object,
                format!("refuses writes since epoch {}: it opens with this cutover's commit", gate.epoch),
                "Nothing, if this server was a source before.",
            ),
        });
    }
    or_green(CHECK, "target", "none", found)
}
