//! Facts in, findings out: what would stop a cutover, what is worth knowing, what was found right.
//!
//! Invariant: pure; every check answers with at least one finding, and a red one names an object and a fix.

mod bouncers;
mod data;
mod definitions;
mod people;
mod replication;
mod servers;
mod standby;
mod types;

use crate::finding::Finding;
use crate::preflight::facts::{ClusterFacts, Facts};

/// Of a physical standby, which is the source's copy in everything that the others compare.
const PHYSICAL: &[fn(&Facts) -> Vec<Finding>] = &[
    servers::versions,
    servers::identity,
    standby::streaming,
    standby::promotion,
    standby::waiting,
    standby::neighbours,
    standby::feeds,
    standby::lag,
    servers::route_name,
    servers::clock_skew,
    servers::own_rights,
    servers::event_trigger,
    servers::store,
    data::table_rights,
    standby::left_behind,
    people::old_transactions,
    people::prepared_transactions,
    people::verifiers,
    people::bypass,
    people::proxies,
    people::members,
];

/// Every check, in the order in which they are read.
pub fn checks(facts: &Facts) -> Vec<Finding> {
    const LOGICAL: &[fn(&Facts) -> Vec<Finding>] = &[
        servers::versions,
        servers::identity,
        servers::wal_level,
        servers::route_name,
        servers::clock_skew,
        servers::synchronous_standby,
        servers::replication_slots,
        servers::own_rights,
        servers::event_trigger,
        servers::store,
        servers::target_gate,
        replication::subscriptions,
        replication::slots,
        replication::publication,
        replication::sentinel,
        replication::lag,
        data::table_rights,
        data::replica_identity,
        data::unreplicated,
        data::large_objects,
        data::sequences,
        data::target_triggers,
        data::server_bound,
        types::type_oids,
        definitions::definitions,
        people::old_transactions,
        people::prepared_transactions,
        people::proxy_role,
        people::verifiers,
        people::bypass,
        people::proxies,
        people::members,
        bouncers::bouncers,
    ];
    let all = if facts.standby.is_some() { PHYSICAL } else { LOGICAL };
    all.iter().flat_map(|check| check(facts)).collect()
}

/// The findings, or one that says that all is well.
fn or_green(check: &str, object: &str, well: &str, found: Vec<Finding>) -> Vec<Finding> {
    if found.is_empty() { vec![Finding::green(check, object, well)] } else { found }
}

/// Both servers, and what they are called.
fn sides(facts: &Facts) -> [(&'static str, &ClusterFacts); 2] {
    [("source", &facts.source), ("target", &facts.target)]
}

/// How a finding is made once its words are owned.
type Make = fn(&str, String, String, String) -> Finding;

/// Red where it stops a cutover, yellow where it is worth a word.
fn red_if(stops: bool) -> Make {
    if stops { Finding::red } else { Finding::yellow }
}

/// Up to five names, and how many more.
fn some<T: AsRef<str>>(names: &[T]) -> String {
    let shown: Vec<&str> = names.iter().take(5).map(T::as_ref).collect();
    match names.len().saturating_sub(shown.len()) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests;
