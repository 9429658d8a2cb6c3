//! Checks of a physical move: the standby, the right to promote it, who waits for it, and what else the cluster holds.
//!
//! Invariant: pure; asked only where the target is to be a standby.

use crate::clusters::{Receiver, Recovery, TableKind};
use crate::finding::Finding;
use crate::preflight::checks::{or_green, some};
use crate::preflight::facts::Facts;
use crate::preflight::standby::{Holds, StandbyFacts};

/// pg_promote() comes with it.
const PROMOTES: u32 = 12;

fn of(facts: &Facts, judge: fn(&Facts, &StandbyFacts) -> Vec<Finding>) -> Vec<Finding> {
    facts.standby.as_ref().map(|standby| judge(facts, standby)).unwrap_or_default()
}

/// It streams from this source, on its timeline, and replays at once.
pub(super) fn streaming(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "streaming";
    of(facts, |facts, of| {
        let mut found = Vec::new();
        let (there, here) = (facts.target.identity.version_num / 10_000, facts.source.identity.version_num / 10_000);
        if there != here {
            let problem = format!("is PostgreSQL {there}, the source {here}: no standby of it");
            found.push(Finding::red(CHECK, "target", problem, "Move logically between majors (replication.kind)."));
        }
        if of.standby.recovery == Recovery::Paused {
            let fix = "SELECT pg_wal_replay_resume(); on the target.";
            found.push(Finding::red(CHECK, "target", "its replay is paused", fix));
        }
        if of.standby.delay_ms > 0 {
            let problem =
                format!("recovery_min_apply_delay = {} ms: every cutover would wait for it", of.standby.delay_ms);
            let fix = "ALTER SYSTEM SET recovery_min_apply_delay = 0; SELECT pg_reload_conf(); on the target.";
            found.push(Finding::red(CHECK, "target", problem, fix));
        }
        // Of a primary `identity` tells already.
        if of.standby.recovery != Recovery::Over {
            found.extend(receiver(CHECK, facts, of.standby.receiver.as_ref()));
        }
        or_green(CHECK, "target", "streams and replays at once", found)
    })
}

fn receiver(check: &str, facts: &Facts, receiver: Option<&Receiver>) -> Option<Finding> {
    let Some(receiver) = receiver else {
        let fix = "Set primary_conninfo there and see its log; let our login see it: GRANT pg_monitor.";
        return Some(Finding::red(check, "target", "no WAL streams to it", fix));
    };
    if receiver.status.as_deref() != Some("streaming") {
        let problem = format!("its WAL receiver is {}", receiver.status.as_deref().unwrap_or("hidden"));
        return Some(Finding::red(check, "target", problem, "See its log; wait until it streams."));
    }
    if receiver.timeline != facts.source.identity.timeline {
        let problem =
            format!("receives timeline {:?}, the source is on {:?}", receiver.timeline, facts.source.identity.timeline);
        let fix = "Rebuild it as a standby of this source (pg_rewind, or pg_basebackup).";
        return Some(Finding::red(check, "target", problem, fix));
    }
    receiver.slot.is_none().then(|| {
        let fix = "Give it one (primary_slot_name), so that the source keeps WAL for it.";
        Finding::yellow(check, "target", "streams without a slot", fix)
    })
}

pub(super) fn promotion(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "promotion";
    of(facts, |facts, of| {
        let login = &facts.target.login;
        let object = format!("target role {login}");
        let mut found = Vec::new();
        if facts.target.identity.version_num / 10_000 < PROMOTES {
            let problem = format!("PostgreSQL before {PROMOTES} has no pg_promote()");
            found.push(Finding::red(CHECK, "target", problem, "Move logically (replication.kind)."));
        } else if !of.standby.may_promote {
            let fix = format!(
                "GRANT EXECUTE ON FUNCTION pg_catalog.pg_promote(boolean, integer) TO {login}; on the source, in database {}.",
                facts.source.database
            );
            found.push(Finding::red(CHECK, object, "may not promote the standby", fix));
        }
        or_green(CHECK, "target", "may be promoted by our login", found)
    })
}

/// Once the standby is promoted nobody confirms its part: commits that wait for it, the decision's too, would wait for ever.
pub(super) fn waiting(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "synchronous_standby";
    of(facts, |facts, of| {
        let mut found = Vec::new();
        let names = &facts.source.synchronous_standby_names;
        if !names.is_empty() && of.sync_state.as_deref() != Some("async") {
            let state = of.sync_state.as_deref().unwrap_or("not known: it has no slot");
            let problem = format!(
                "synchronous_standby_names = '{names}', and the target's state is {state}: once it is promoted the decision \
                 would wait for it for ever"
            );
            let fix =
                "Take the target out of it on the source for the cutover (ALTER SYSTEM, SELECT pg_reload_conf();).";
            found.push(Finding::red(CHECK, "source", problem, fix));
        }
        let names = &facts.target.synchronous_standby_names;
        if !names.is_empty() && of.standby.followers == 0 {
            let problem = format!(
                "synchronous_standby_names = '{names}', and nobody follows it: once promoted its commits would wait for ever"
            );
            let fix = "ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf(); on the target.";
            found.push(Finding::red(CHECK, "target", problem, fix));
        }
        or_green(CHECK, facts.db.as_str(), "no commit waits for the standby, or after it for nobody", found)
    })
}

/// R16: a physical move takes the whole cluster; what no gate stands on would be written on the old server after it.
pub(super) fn neighbours(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "neighbours";
    of(facts, |_, of| {
        let told = of.neighbours.iter().filter_map(|neighbour| {
            let (problem, fix) = match &neighbour.holds {
                Holds::Nothing => return None,
                Holds::Objects(count) => (
                    format!(
                        "holds {count} tables, sequences or large objects: it would move too, without gate and route"
                    ),
                    "Move this cluster logically, database by database; or drop or empty this one.".to_owned(),
                ),
                Holds::Hidden(words) => (
                    format!("could not be looked into: {words}"),
                    format!(
                        "Let our login in there (CONNECT, pg_hba.conf); or ALTER DATABASE {} ALLOW_CONNECTIONS false;",
                        neighbour.name
                    ),
                ),
            };
            Some(Finding::red(CHECK, format!("database {}", neighbour.name), problem, fix))
        });
        or_green(CHECK, "source", "no other database of the cluster holds anything", told.collect())
    })
}

/// What both servers would do after the promotion, and what the new one would not.
pub(super) fn feeds(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "feeds";
    of(facts, |_, of| {
        let mut found = Vec::new();
        for name in &of.subscriptions {
            let problem = "is enabled: the promoted copy would read its slot as well as the old server";
            let fix = "Disable it for the cutover, and enable it on the new server only.";
            found.push(Finding::red(CHECK, format!("subscription {name}"), problem, fix));
        }
        if !of.logical_slots.is_empty() {
            let problem = "logical slots do not move along: whoever reads them has to begin anew";
            let fix = "Make them again on the new server before its readers follow it.";
            found.push(Finding::yellow(CHECK, some(&of.logical_slots), problem, fix));
        }
        or_green(CHECK, "source", "no subscriptions, no logical slots", found)
    })
}

pub(super) fn left_behind(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "unreplicated";
    of(facts, |facts, _| {
        let unlogged = facts.source.tables.iter().filter(|table| table.kind == TableKind::Unlogged);
        let unlogged: Vec<String> = unlogged.map(crate::clusters::TableFacts::full_name).collect();
        let mut found = Vec::new();
        if !unlogged.is_empty() {
            let fix = "ALTER TABLE ... SET LOGGED, if their rows matter.";
            found.push(Finding::yellow(CHECK, some(&unlogged), "unlogged tables are empty on a promoted standby", fix));
        }
        if facts.source.large_objects > 0 {
            let problem =
                format!("has {} large objects: they move, but the gate does not see them", facts.source.large_objects);
            let fix = "Let nobody write large objects past the proxies during the cutover.";
            found.push(Finding::yellow(CHECK, format!("database {}", facts.source.database), problem, fix));
        }
        or_green(CHECK, "source", "nothing that WAL leaves out", found)
    })
}

pub(super) fn lag(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "lag";
    of(facts, |facts, of| {
        let max = facts.limits.lag_bytes_max;
        if of.lag_bytes <= max {
            return vec![Finding::green(CHECK, "target", format!("{} bytes behind", of.lag_bytes))];
        }
        let problem = format!("has not replayed the last {} bytes, limit {max}", of.lag_bytes);
        vec![Finding::red(CHECK, "target", problem, "Wait for it, or raise [budgets].lag_bytes_max.")]
    })
}
