//! Checks of native logical replication.
//!
//! Invariant: pure; a lag that can't be seen is red.

use crate::clusters::{uncovered, way_back};
use crate::finding::Finding;
use crate::preflight::checks::or_green;
use crate::preflight::facts::Facts;

pub(super) fn subscriptions(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "subscriptions";
    let of = &facts.replication;
    let mut found = Vec::new();
    for name in &of.missing {
        let object = format!("subscription {name}");
        if way_back::epoch_of(&facts.db, name).is_some() {
            let fix = "proxyctl way-back attach; if the move there was made with [way_back].enabled = false, or the way back \
                       was dropped, only a new copy leads back.";
            found.push(Finding::red(CHECK, object, "is not there: nothing leads back", fix));
            continue;
        }
        let fix = "Correct [replication].subscriptions, or create it.";
        found.push(Finding::red(CHECK, object, "is not in the target database", fix));
    }
    if of.subscriptions.is_empty() {
        let problem = format!("database {} has no subscription", facts.target.database);
        found.push(Finding::red(
            CHECK,
            "target",
            problem,
            "CREATE SUBSCRIPTION on the target, and let it copy the tables.",
        ));
    }
    for subscription in &of.subscriptions {
        let object = format!("subscription {}", subscription.name);
        if !subscription.is_enabled {
            let fix = format!("ALTER SUBSCRIPTION {} ENABLE; on the target.", subscription.name);
            found.push(Finding::red(CHECK, object.clone(), "is disabled", fix));
        }
        if subscription.slot.is_none() {
            let fix = format!("ALTER SUBSCRIPTION {} SET (slot_name = ...); on the target.", subscription.name);
            found.push(Finding::red(CHECK, object, "has no slot", fix));
        }
    }
    for state in of.states.iter().filter(|state| state.state != "r") {
        let object = format!("table {}", state.table);
        let problem = format!("its copy by {} has not ended (state {})", state.subscription, state.state);
        let fix = "Wait for it; look into the target's log if it does not end (a duplicate key stops it for good).";
        found.push(Finding::red(CHECK, object, problem, fix));
    }
    or_green(CHECK, "target", &format!("{} enabled, every table ready", of.subscriptions.len()), found)
}

pub(super) fn slots(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "slots";
    let of = &facts.replication;
    let mut found = Vec::new();
    for subscription in &of.subscriptions {
        let Some(name) = &subscription.slot else { continue };
        let object = format!("slot {name}");
        let Some(slot) = of.slots.iter().find(|slot| slot.name == *name) else {
            let problem = format!("is not on the source, but subscription {} reads it", subscription.name);
            let fix = "Make the subscription's connection and [source].dsn name the same server and database.";
            found.push(Finding::red(CHECK, object, problem, fix));
            continue;
        };
        if !slot.is_active {
            let fix = format!("Look why {} is not running: enabled? the target's log?", subscription.name);
            found.push(Finding::red(CHECK, object.clone(), "nobody reads it", fix));
        }
        if let Some(status @ ("unreserved" | "lost")) = slot.wal_status.as_deref() {
            let fix = "Raise max_slot_wal_keep_size; a lost slot needs a new copy.";
            found.push(Finding::red(CHECK, object, format!("its WAL is {status}"), fix));
        }
    }
    or_green(CHECK, "source", &format!("{} active", of.slots.len()), found)
}

pub(super) fn publication(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "publication";
    let of = &facts.replication;
    // Before S0 the store's own two tables need not be there: it is S0 that publishes them.
    let missing = uncovered(&facts.source.tables, &of.published, &of.states);
    let users = missing.into_iter().filter(|table| !table.table.starts_with("pgcutover."));
    let found: Vec<Finding> = users
        .map(|coverage| {
            let fix = "ALTER PUBLICATION ... ADD TABLE on the source, then ALTER SUBSCRIPTION ... REFRESH PUBLICATION on the target.";
            Finding::red(CHECK, format!("table {}", coverage.table), coverage.problem, fix)
        })
        .collect();
    or_green(CHECK, "source", "every table is published and subscribed, whole", found)
}

/// Whether S0 can have its sentinel published and subscribed, where it is not yet.
pub(super) fn sentinel(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "sentinel";
    let of = &facts.replication;
    let own = ["pgcutover.heartbeat", "pgcutover.sentinel"];
    let mut found = Vec::new();
    for subscription in &of.subscriptions {
        let publishes = |table: &str| {
            of.published.iter().any(|p| p.table == table && subscription.publications.contains(&p.publication))
        };
        let is_of_all = of.published.iter().any(|p| p.is_of_all && subscription.publications.contains(&p.publication));
        let knows = |table: &str| of.states.iter().any(|s| s.table == table && s.subscription == subscription.name);
        let foreign = subscription.publications.iter().find(|name| of.publications_of_others.contains(name));
        if let (Some(publication), false) = (foreign, is_of_all || own.iter().all(|table| publishes(table))) {
            let fix = format!(
                "proxyctl objects, then as its owner: ALTER PUBLICATION {publication} ADD TABLE {};",
                own.join(", ")
            );
            found.push(Finding::red(
                CHECK,
                format!("publication {publication}"),
                "our login may not add the sentinel to it",
                fix,
            ));
        }
        if of.subscriptions_of_others.contains(&subscription.name) && !own.iter().all(|table| knows(table)) {
            let name = &subscription.name;
            let fix = format!(
                "proxyctl objects, then as its owner: ALTER SUBSCRIPTION {name} REFRESH PUBLICATION WITH (copy_data = false);"
            );
            found.push(Finding::red(
                CHECK,
                format!("subscription {name}"),
                "our login may not refresh it to carry the sentinel",
                fix,
            ));
        }
    }
    or_green(CHECK, "target", "is carried, or can be made so", found)
}

pub(super) fn lag(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "lag";
    let max = facts.limits.lag_bytes_max;
    let mut found = Vec::new();
    let mut worst: i64 = 0;
    for slot in facts.replication.slots.iter().filter(|slot| slot.is_active) {
        let object = format!("slot {}", slot.name);
        match slot.lag.applied_bytes {
            None => {
                let fix = format!("GRANT pg_monitor TO {}; on the source.", facts.source.login);
                found.push(Finding::red(CHECK, object, "how far the target is can't be seen", fix));
            }
            Some(bytes) if bytes > 0 && bytes.unsigned_abs() > max => {
                let fix = "Wait until the target has caught up, or find what holds its apply worker up.";
                found.push(Finding::red(CHECK, object, format!("{bytes} bytes behind, the limit is {max}"), fix));
            }
            Some(bytes) => worst = worst.max(bytes),
        }
    }
    or_green(CHECK, "target", &format!("{worst} bytes behind"), found)
}
