//! Checks of types that clients know by number: same names, same shapes, same numbers.
//!
//! Invariant: pure; a number that means two types is red whatever the configuration says, for that no driver can notice.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::Change;
use crate::finding::Finding;
use crate::preflight::checks::{or_green, some};
use crate::preflight::facts::Facts;
use crate::preflight::types::{Kind, Rank, TypeFacts, TypeName, Types};

const CHECK: &str = "type_oids";

/// The first version with multiranges.
const MULTIRANGES_FROM: u32 = 140_000;

pub(super) fn type_oids(facts: &Facts) -> Vec<Finding> {
    let (source, target) = match (&facts.source.types, &facts.target.types) {
        (Types::Read(source), Types::Read(target)) => (source, target),
        (Types::Hidden(words), _) => return vec![hidden("source", &facts.source.login, words)],
        (_, Types::Hidden(words)) => return vec![hidden("target", &facts.target.login, words)],
    };
    let there: BTreeMap<&TypeName, &TypeFacts> = target.iter().map(|there| (&there.name, there)).collect();
    let pairs: Vec<Pair<'_>> =
        source.iter().filter_map(|here| Some(Pair { here, there: there.get(&here.name)? })).collect();
    let lacking: Vec<&TypeFacts> = source.iter().filter(|here| !there.contains_key(&here.name)).collect();
    let mut found = missing(facts, &lacking);
    found.extend(pairs.iter().filter_map(Pair::other_shape));
    found.extend(collisions(source, target));
    found.extend(moved(facts, &pairs));
    or_green(CHECK, "target", &format!("{} types have the same shapes and numbers", source.len()), found)
}

/// A type on both sides.
struct Pair<'a> {
    here: &'a TypeFacts,
    there: &'a TypeFacts,
}

impl Pair<'_> {
    fn other_shape(&self) -> Option<Finding> {
        let object = format!("type {}", self.here.name);
        match (&self.here.shape, &self.there.shape) {
            (Some(here), Some(there)) if here == there => None,
            (Some(here), Some(there)) => {
                let problem = format!("is {here} on the source and {there} on the target");
                Some(Finding::red(CHECK, object, problem, "Make it on the target as it is on the source."))
            }
            (None, _) | (_, None) => {
                let fix = "Grant our login SELECT on pg_type, pg_namespace, pg_enum, pg_attribute and pg_range.";
                Some(Finding::red(CHECK, object, "could not be read whole: it can't be compared", fix))
            }
        }
    }

    fn is_moved(&self) -> bool {
        self.here.oid != self.there.oid
    }
}

fn hidden(side: &str, login: &str, words: &str) -> Finding {
    let fix = format!(
        "GRANT SELECT ON pg_type, pg_namespace, pg_class, pg_depend, pg_proc, pg_enum, pg_attribute, pg_range TO {login}; on the {side}."
    );
    Finding::red(CHECK, format!("{side} role {login}"), format!("may not read the types: {words}"), fix)
}

/// An array lives and dies with its elements' type: it is not named again.
fn missing(facts: &Facts, lacking: &[&TypeFacts]) -> Vec<Finding> {
    let knows_multiranges = facts.target.identity.version_num >= MULTIRANGES_FROM;
    let (impossible, possible): (Vec<&TypeFacts>, Vec<&TypeFacts>) =
        lacking.iter().partition(|t| t.kind == Kind::Multirange && !knows_multiranges);
    let mut found = Vec::new();
    let names = elements(&possible);
    if !names.is_empty() {
        let fix = "Create them there as on the source: statements that use them would fail.";
        found.push(Finding::red(CHECK, format!("type {}", some(&names)), "is missing on the target", fix));
    }
    let names = elements(&impossible);
    if !names.is_empty() {
        let problem = "is missing on the target, whose version has no multiranges";
        let fix = "See that no statement uses them before the cutover.";
        found.push(Finding::yellow(CHECK, format!("type {}", some(&names)), problem, fix));
    }
    found
}

/// The names of the types, an array's only where its elements' is not among them.
fn elements(types: &[&TypeFacts]) -> Vec<String> {
    let themselves: BTreeSet<(&str, &str)> = types
        .iter()
        .filter(|t| t.name.rank == Rank::Itself)
        .map(|t| (t.name.schema.as_str(), t.name.name.as_str()))
        .collect();
    let counts = |t: &&&TypeFacts| {
        t.name.rank == Rank::Itself || !themselves.contains(&(t.name.schema.as_str(), t.name.name.as_str()))
    };
    types.iter().filter(counts).map(|t| t.name.to_string()).collect()
}

fn collisions(source: &[TypeFacts], target: &[TypeFacts]) -> Option<Finding> {
    let there: BTreeMap<u32, &TypeName> = target.iter().map(|there| (there.oid, &there.name)).collect();
    let meant: Vec<(&TypeFacts, &&TypeName)> = source
        .iter()
        .filter_map(|here| Some((here, there.get(&here.oid)?)))
        .filter(|(here, name)| here.name != ***name)
        .collect();
    if meant.is_empty() {
        return None;
    }
    let names: Vec<String> = meant.iter().map(|(here, _)| here.name.to_string()).collect();
    let numbers: Vec<String> =
        meant.iter().map(|(here, name)| format!("{} is {} here and {name} there", here.oid, here.name)).collect();
    let problem = format!(
        "the same number means another type on the target ({}): a driver that remembers it takes one for the other, and \
         nothing tells it",
        some(&numbers)
    );
    let fix =
        "Build the target with equal oids, or load its schema only after its counter has passed the source's (README).";
    Some(Finding::red(CHECK, format!("type {}", some(&names)), problem, fix))
}

/// Types of the same name with another number: which, for which drivers, and who is connected.
fn moved(facts: &Facts, pairs: &[Pair<'_>]) -> Vec<Finding> {
    const RISKS: [(&[Kind], &str); 3] = [
        (
            &[Kind::Composite],
            "asyncpg (OutdatedSchemaCacheError), psycopg2 and psycopg 3 where it is registered (text or bytes, without an \
             error), postgres.js, pgJDBC, pgx, tokio-postgres and sqlx (errors)",
        ),
        (
            &[Kind::Enum],
            "psycopg 3 where it is registered and read in binary (bytes, without an error), psycopg2 for its arrays, \
             postgres.js, pgJDBC, pgx, tokio-postgres and sqlx (errors); not asyncpg",
        ),
        (
            &[Kind::Base, Kind::Domain, Kind::Range, Kind::Multirange],
            "those that an application has told the number by hand; not asyncpg for domains and base types",
        ),
    ];
    let others: Vec<&TypeFacts> = pairs.iter().filter(|pair| pair.is_moved()).map(|pair| pair.here).collect();
    let mut found = Vec::new();
    for (kinds, risk) in RISKS {
        let of_these: Vec<&TypeFacts> = others.iter().filter(|t| kinds.contains(&t.kind)).copied().collect();
        let names = elements(&of_these);
        if names.is_empty() {
            continue;
        }
        let object = format!("type {}", some(&names));
        let problem = format!(
            "has another oid on the target; statements at risk: {}; drivers at risk: {risk}; connected now: {}",
            statements(&of_these),
            applications(facts)
        );
        found.push(match facts.limits.oid_change {
            Change::Refused => {
                let fix = "Build the target with equal oids (README), or say accept_oid_change = true under [policy].";
                Finding::red(CHECK, object, problem, fix)
            }
            Change::Accepted => {
                Finding::yellow(CHECK, object, problem, "Let clients with such a driver reconnect after the cutover.")
            }
        });
    }
    found
}

/// By which columns and functions statements get to know these types; of texts that cast to them no catalogue knows.
fn statements(types: &[&TypeFacts]) -> String {
    let places: BTreeSet<&str> = types.iter().flat_map(|t| t.met_in.iter().map(String::as_str)).collect();
    let places: Vec<&str> = places.into_iter().collect();
    if places.is_empty() {
        "those that name it (no column or function has it)".to_owned()
    } else {
        format!("those with {}", some(&places))
    }
}

/// Who is connected, as far as anybody says so: clients of the proxies, and sessions beside them.
fn applications(facts: &Facts) -> String {
    let through = facts.proxies.iter().flat_map(|proxy| proxy.applications.iter().cloned());
    let ours = facts.source.login.as_str();
    let beside = facts.source.sessions.iter().filter(|session| {
        session.backend_type.as_deref() == Some("client backend")
            && session.user != ours
            && session.user != facts.limits.proxy_role
    });
    let names: BTreeSet<String> = through.chain(beside.filter_map(|session| session.application.clone())).collect();
    let names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).collect();
    if names.is_empty() { "nobody that gives an application_name".to_owned() } else { some(&names) }
}
