//! Checks of what tables consist of: a target that was not made like the source takes the rows and breaks the application.
//!
//! Invariant: pure; what makes statements fail or write to another column is red, what makes them slow or leaves a rule out
//! is yellow: somebody may have meant it.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::Change;
use crate::finding::Finding;
use crate::preflight::checks::{or_green, some};
use crate::preflight::definitions::{Definition, Definitions, Part};
use crate::preflight::facts::Facts;

const CHECK: &str = "definitions";

/// The parts of one server's tables, by table.
type Tables<'a> = BTreeMap<&'a str, Vec<&'a Definition>>;

pub(super) fn definitions(facts: &Facts) -> Vec<Finding> {
    let (source, target) = match (&facts.source.definitions, &facts.target.definitions) {
        (Definitions::Read(source), Definitions::Read(target)) => (by_table(source), by_table(target)),
        (Definitions::Hidden(words), _) => return vec![hidden("source", &facts.source.login, words)],
        (_, Definitions::Hidden(words)) => return vec![hidden("target", &facts.target.login, words)],
    };
    let mut found = Vec::from_iter(missing(facts, &source, &target));
    for (table, here) in &source {
        if let Some(there) = target.get(table) {
            let (here, there) = (columns(here), columns(there));
            found.extend(lacking(table, &here, &there));
            found.extend(surplus(table, &here, &there));
            found.extend(reordered(facts, table, &here, &there));
            found.extend(retyped(facts, table, &here, &there));
            found.extend(other_traits(table, &here, &there));
        }
    }
    found.extend(invalid(&target));
    for (part, loss) in [
        (Part::Index, "statements that it made fast read the whole table"),
        (Part::Constraint, "rows are let in there that are refused here"),
        (Part::Trigger, "what it does is not done there"),
    ] {
        found.extend(left_out(part, loss, &source, &target));
    }
    or_green(CHECK, "target", &format!("{} tables are made as on the source", source.len()), found)
}

fn by_table(definitions: &[Definition]) -> Tables<'_> {
    let mut tables = Tables::new();
    for definition in definitions {
        tables.entry(&definition.table).or_default().push(definition);
    }
    tables
}

fn columns<'a>(parts: &[&'a Definition]) -> Vec<&'a Definition> {
    parts.iter().filter(|part| part.part == Part::Column).copied().collect()
}

fn hidden(side: &str, login: &str, words: &str) -> Finding {
    let fix = format!(
        "GRANT SELECT ON pg_class, pg_namespace, pg_type, pg_attribute, pg_index, pg_constraint, pg_trigger TO {login}; on the {side}."
    );
    Finding::red(CHECK, format!("{side} role {login}"), format!("may not read the tables' definitions: {words}"), fix)
}

/// Partitions may be cut in another way there.
fn missing(facts: &Facts, here: &Tables<'_>, there: &Tables<'_>) -> Option<Finding> {
    let is_partition = |name: &str| facts.source.tables.iter().any(|t| t.parent.is_some() && t.full_name() == name);
    let names: Vec<&str> =
        here.keys().copied().filter(|name| !there.contains_key(name) && !is_partition(name)).collect();
    if names.is_empty() {
        return None;
    }
    let fix = "Create it there as on the source: statements that use it would fail.";
    Some(Finding::red(CHECK, format!("table {}", some(&names)), "is missing on the target", fix))
}

fn named<'a>(columns: &[&'a Definition], name: &str) -> Option<&'a Definition> {
    columns.iter().find(|column| column.name == name).copied()
}

fn lacking(table: &str, here: &[&Definition], there: &[&Definition]) -> Option<Finding> {
    let names: Vec<&str> = here.iter().map(|c| c.name.as_str()).filter(|name| named(there, name).is_none()).collect();
    if names.is_empty() {
        return None;
    }
    let problem = format!("lacks column {} on the target: statements that name it would fail", some(&names));
    Some(Finding::red(CHECK, format!("table {table}"), problem, "Add it there as on the source."))
}

fn surplus(table: &str, here: &[&Definition], there: &[&Definition]) -> Option<Finding> {
    let more: Vec<&&Definition> = there.iter().filter(|column| named(here, &column.name).is_none()).collect();
    let demands = |column: &&&&Definition| column.traits == ["NOT NULL"];
    let object = format!("table {table}");
    let demanding: Vec<&str> = more.iter().filter(demands).map(|column| column.name.as_str()).collect();
    if !demanding.is_empty() {
        let problem = format!("must have a value in {} on the target, which no INSERT gives", some(&demanding));
        return Some(Finding::red(CHECK, object, problem, "Give it a default there, or drop it."));
    }
    let names: Vec<&str> = more.iter().map(|column| column.name.as_str()).collect();
    let problem = format!("has {} on the target only: SELECT * gives it too", some(&names));
    (!names.is_empty()).then(|| Finding::yellow(CHECK, object, problem, "Drop it there unless it is meant."))
}

fn reordered(facts: &Facts, table: &str, here: &[&Definition], there: &[&Definition]) -> Option<Finding> {
    let common = |these: &[&Definition], others: &[&Definition]| -> Vec<String> {
        these.iter().map(|column| column.name.clone()).filter(|name| named(others, name).is_some()).collect()
    };
    let (order_here, order_there) = (common(here, there), common(there, here));
    if order_here == order_there {
        return None;
    }
    let problem = format!(
        "has its columns in another order on the target ({} here, {} there): INSERT and COPY without a list of columns write \
         to others, SELECT * and what drivers have prepared read others",
        some(&order_here),
        some(&order_there)
    );
    Some(change(facts, format!("table {table}"), problem))
}

fn retyped(facts: &Facts, table: &str, here: &[&Definition], there: &[&Definition]) -> Option<Finding> {
    let others: Vec<String> = here
        .iter()
        .filter_map(|column| Some((*column, named(there, &column.name)?)))
        .filter(|(here, there)| here.text != there.text)
        .map(|(here, there)| format!("{} is {} here and {} there", here.name, here.text, there.text))
        .collect();
    if others.is_empty() {
        return None;
    }
    let problem =
        format!("has other types on the target ({}): drivers decode what they were told before", some(&others));
    Some(change(facts, format!("table {table}"), problem))
}

/// Red until somebody says that clients don't mind.
fn change(facts: &Facts, object: String, problem: String) -> Finding {
    match facts.limits.column_change {
        Change::Refused => {
            let fix = "Make the table there as on the source, or say accept_column_change = true under [policy].";
            Finding::red(CHECK, object, problem, fix)
        }
        Change::Accepted => {
            Finding::yellow(CHECK, object, problem, "Let clients with prepared statements reconnect after the cutover.")
        }
    }
}

fn other_traits(table: &str, here: &[&Definition], there: &[&Definition]) -> Option<Finding> {
    let said =
        |column: &Definition| if column.traits.is_empty() { "plain".to_owned() } else { column.traits.join(", ") };
    let others: Vec<String> = here
        .iter()
        .filter_map(|column| Some((*column, named(there, &column.name)?)))
        .filter(|(here, there)| here.traits != there.traits)
        .map(|(here, there)| format!("{}: {} here, {} there", here.name, said(here), said(there)))
        .collect();
    let problem = format!("has columns with other rules on the target ({})", some(&others));
    let fix = "ALTER TABLE there, unless it is meant.";
    (!others.is_empty()).then(|| Finding::yellow(CHECK, format!("table {table}"), problem, fix))
}

fn invalid(there: &Tables<'_>) -> Option<Finding> {
    let broken = there.values().flatten().filter(|part| part.traits == ["invalid"]);
    let names: Vec<String> = broken.map(|index| format!("{} of {}", index.name, index.table)).collect();
    let fix = "REINDEX it there, or drop it and create it again.";
    (!names.is_empty()).then(|| {
        Finding::yellow(CHECK, format!("index {}", some(&names)), "is invalid on the target: no statement uses it", fix)
    })
}

/// What tables of both sides have here only, whatever it is called there.
fn left_out(part: Part, loss: &str, source: &Tables<'_>, target: &Tables<'_>) -> Option<Finding> {
    let mut names = Vec::new();
    for (table, here) in source {
        let Some(there) = target.get(table) else { continue };
        let known: BTreeSet<&str> = there.iter().filter(|t| t.part == part).map(|t| t.text.as_str()).collect();
        let here = here.iter().filter(|t| t.part == part && !known.contains(t.text.as_str()));
        names.extend(here.map(|t| format!("{} of {table}", t.name)));
    }
    let object = format!("{} {}", part.word(), some(&names));
    let problem = format!("is not on the target: {loss}");
    (!names.is_empty()).then(|| {
        Finding::yellow(CHECK, object, problem, "Create it there as on the source, unless it is left out on purpose.")
    })
}
