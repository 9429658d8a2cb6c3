//! What a copy will need when its client comes back, fetched while nobody waits for it: plans, and what its server looks up
//! for them. The first statement of a fresh server process takes several times as long as its tenth.
//!
//! Invariant: nothing is executed, and nothing changes that the session could see but how often its statements were planned.
//! Where the server refuses or a table is locked, the client's first statement takes the time that is saved otherwise.

use crate::backend::Batch;
use crate::transplant::sequences;
use crate::transplant::snapshot::{Prepared, Snapshot};

/// Statements that are planned ahead for one session; those that were prepared last are the likelier ones.
const STATEMENTS_MAX: usize = 64;

/// Until the next Sync. Whoever holds a table may be anybody, and all other sessions wait for their turn.
const NO_WAITING: &str = "SELECT pg_catalog.set_config('lock_timeout', '20ms', true)";

/// What can be explained; anything else is not planned.
const PLANNED: [&str; 7] = ["select", "insert", "update", "delete", "with", "values", "merge"];

/// Asks for all that; the answers say nothing.
pub(super) fn say(batch: &mut Batch, snapshot: &Snapshot) {
    if !snapshot.sequences.is_empty() {
        sequences::get_ready(batch);
    }
    let plans: Vec<String> = snapshot.statements.iter().rev().filter_map(explained).take(STATEMENTS_MAX).collect();
    if plans.is_empty() {
        return;
    }
    batch.run(NO_WAITING, [&[][..]]);
    plans.iter().for_each(|plan| batch.run(plan, [&[][..]]));
    batch.sync();
}

/// The statement that has another one planned: `None` where it can't be said in every encoding, or nothing is planned for
/// it. What a SQL-level PREPARE prepares is not looked for in its text; the server is asked, and may refuse.
fn explained(statement: &Prepared) -> Option<String> {
    // The unnamed one is planned by the Bind that executes it.
    let name = str::from_utf8(&statement.name).ok().filter(|name| !name.is_empty() && name.is_ascii())?;
    let text = statement.text.trim_ascii_start();
    let opens = |word: &str| text.get(..word.len()).is_some_and(|head| head.eq_ignore_ascii_case(word.as_bytes()));
    PLANNED.iter().any(|word| opens(word)).then_some(())?;
    let arguments = vec!["NULL"; statement.shape.parameters.len()].join(", ");
    let arguments = if arguments.is_empty() { arguments } else { format!("({arguments})") };
    Some(format!("EXPLAIN (COSTS off) EXECUTE \"{}\"{arguments}", name.replace('"', "\"\"")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transplant::snapshot::{Kind, Origin, Shape, TypeName};

    fn prepared(name: &str, text: &str, parameters: usize) -> Prepared {
        let int = TypeName { schema: (*b"pg_catalog").into(), name: (*b"int4").into(), kind: Kind::Plain };
        Prepared {
            name: name.as_bytes().into(),
            text: text.as_bytes().into(),
            origin: Origin::Protocol,
            shape: Shape { parameters: vec![int; parameters], columns: Vec::new() },
        }
    }

    #[test]
    fn what_has_a_plan_is_planned_without_arguments() {
        let plan = |name, text, parameters| explained(&prepared(name, text, parameters));
        assert_eq!(plan("q", " SELECT 1", 0).as_deref(), Some("EXPLAIN (COSTS off) EXECUTE \"q\""));
        assert_eq!(
            plan("a\"b", "insert into t values ($1, $2)", 2).as_deref(),
            Some("EXPLAIN (COSTS off) EXECUTE \"a\"\"b\"(NULL, NULL)")
        );
        for (name, text) in [("", "SELECT 1"), ("q", "LISTEN x"), ("q", ""), ("ä", "SELECT 1"), ("q", "-- SELECT")] {
            assert_eq!(plan(name, text, 0), None, "{text}");
        }
    }
}
