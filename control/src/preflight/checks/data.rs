//! Checks of what is stored: tables, sequences, large objects.
//!
//! Invariant: pure; a sequence that can't be read is red.

use crate::clusters::{GateState, Position, Sequence, Setting, TableKind};
use crate::finding::Finding;
use crate::preflight::checks::{or_green, some};
use crate::preflight::facts::Facts;

pub(super) fn table_rights(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "table_rights";
    let mut found = Vec::new();
    for table in &facts.source.tables {
        let object = format!("table {}", table.full_name());
        if let (Some(owner), true) = (&table.other_owner, table.gate != GateState::Armed) {
            let fix = format!("GRANT {owner} TO {}; on the source.", facts.source.login);
            found.push(Finding::red(CHECK, object, format!("only its owner {owner} can put a gate on it"), fix));
        } else if let GateState::Other(function) = &table.gate {
            let fix = "Finish or clean up the other route's cutover first: one table has one gate.";
            found.push(Finding::red(CHECK, object, format!("has another gate: {function}"), fix));
        }
    }
    or_green(CHECK, "source", &format!("{} tables can be gated", facts.source.tables.len()), found)
}

pub(super) fn replica_identity(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "replica_identity";
    let bare = facts.source.tables.iter().filter(|table| !table.is_identified && table.kind != TableKind::Unlogged);
    let mut found: Vec<Finding> = bare
        .map(|table| {
            let name = table.full_name();
            let problem = "has no primary key and no replica identity: UPDATE and DELETE fail, or are not replicated";
            let fix = format!("Add a primary key, or ALTER TABLE {name} REPLICA IDENTITY FULL;");
            Finding::red(CHECK, format!("table {name}"), problem, fix)
        })
        .collect();
    if facts.limits.way_back {
        let there =
            |name: &str| facts.source.tables.iter().any(|table| table.is_identified && table.full_name() == name);
        let bare = facts.target.tables.iter().filter(|table| !table.is_identified && there(&table.full_name()));
        found.extend(bare.map(|table| {
            let name = table.full_name();
            let problem = "has no primary key and no replica identity on the target: no way back";
            let fix = format!("ALTER TABLE {name} REPLICA IDENTITY FULL; there, or set [way_back].enabled = false.");
            Finding::red(CHECK, format!("table {name}"), problem, fix)
        }));
    }
    or_green(CHECK, "source", "every table has one", found)
}

pub(super) fn unreplicated(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "unreplicated";
    let unlogged: Vec<String> =
        facts.source.tables.iter().filter(|t| t.kind == TableKind::Unlogged).map(|t| t.full_name()).collect();
    let kinds = [
        ("unlogged tables", &unlogged, "Their rows stay behind: copy them, or make them logged."),
        (
            "foreign tables",
            &facts.source.foreign_tables,
            "Create them on the target; writes through them are not fenced.",
        ),
        ("materialized views", &facts.source.materialized_views, "REFRESH them on the target before the cutover."),
    ];
    let listed = kinds.into_iter().filter(|(_, names, _)| !names.is_empty());
    let found =
        listed.map(|(kind, names, fix)| Finding::yellow(CHECK, some(names), format!("{kind} are not replicated"), fix));
    or_green(CHECK, "source", "nothing that replication leaves out", found.collect())
}

pub(super) fn large_objects(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "large_objects";
    let count = facts.source.large_objects;
    if count == 0 {
        return vec![Finding::green(CHECK, "source", "none")];
    }
    let problem =
        format!("has {count} large objects: logical replication does not carry them, the gate does not see them");
    let fix =
        "Move them into bytea columns, or SELECT lo_unlink(oid) FROM pg_largeobject_metadata; if they are orphans.";
    vec![Finding::red(CHECK, format!("database {}", facts.source.database), problem, fix)]
}

pub(super) fn sequences(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "sequences";
    let found: Vec<Finding> =
        facts.source.sequences.iter().filter_map(|sequence| sequence_of(facts, sequence, CHECK)).collect();
    or_green(CHECK, "source", &format!("{} can be read and set", facts.source.sequences.len()), found)
}

fn sequence_of(facts: &Facts, sequence: &Sequence, check: &str) -> Option<Finding> {
    let name = sequence.full_name();
    let object = format!("sequence {name}");
    let gap = facts.limits.gap;
    if sequence.position == Position::Hidden {
        let fix = format!("GRANT SELECT ON SEQUENCE {name} TO {}; on the source.", facts.source.login);
        return Some(Finding::red(check, object, "may not be read: it would look as if it had never been used", fix));
    }
    if sequence.is_exhausted_by(gap) {
        let problem = format!("a gap of {gap} would use it up: it ends at {}", end_of(sequence));
        let fix = "Lower [sequences].gap, or widen the sequence and its column.";
        return Some(Finding::red(check, object, problem, fix));
    }
    let Some(there) = facts.target.sequences.iter().find(|other| other.full_name() == name) else {
        return Some(Finding::red(check, object, "is missing on the target", "Create it there as on the source."));
    };
    if there.setting == Setting::Denied || there.position == Position::Hidden {
        let fix = format!("GRANT ALL ON SEQUENCE {name} TO {}; on the target.", facts.target.login);
        return Some(Finding::red(check, object, "may not be set on the target", fix));
    }
    let fits = match sequence.planned(gap) {
        Some(Position::Last(value)) => (there.min..=there.max).contains(&value),
        Some(Position::Unused | Position::Hidden) | None => (there.min..=there.max).contains(&sequence.start),
    };
    if fits {
        return None;
    }
    let problem = format!("the target's ends at {}, before the value that has to be set", end_of(there));
    Some(Finding::red(check, object, problem, "Give it the same MINVALUE and MAXVALUE as on the source."))
}

fn end_of(sequence: &Sequence) -> i64 {
    if sequence.increment > 0 { sequence.max } else { sequence.min }
}

pub(super) fn target_triggers(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "target_triggers";
    let names = &facts.target.replica_triggers;
    if names.is_empty() {
        return vec![Finding::green(CHECK, "target", "none fires in apply workers")];
    }
    let problem = "fire for replicated rows too: their effects come twice";
    vec![Finding::yellow(
        CHECK,
        some(names),
        problem,
        "ALTER TABLE ... ENABLE TRIGGER (not ALWAYS, not REPLICA) on the target.",
    )]
}

pub(super) fn server_bound(facts: &Facts) -> Vec<Finding> {
    const CHECK: &str = "server_bound";
    let names = &facts.source.server_bound;
    let problem = "read process ids, transaction ids, log positions or snapshots: where they are kept, they mean nothing \
                   on the target";
    let fix = "See what they keep; what is only used while it is fresh does no harm.";
    let found = (!names.is_empty()).then(|| Finding::yellow(CHECK, some(names), problem, fix));
    or_green(CHECK, "source", "no function reads numbers of one server", found.into_iter().collect())
}
