//! The types that a client may know by number: which they are on a server, what they are made of.
//!
//! Invariant: one question a server, the same text for all versions from 11 on; nothing in an answer depends on a version's
//! list of keywords or on the names that PostgreSQL gives to array types.

use std::fmt;
use std::time::Duration;

use crate::clusters::{BadCell, Cells, Cluster, ClusterError};

/// The types of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Types {
    /// Every one that counts.
    Read(Vec<TypeFacts>),
    /// A catalogue was taken from our login; the server's words.
    Hidden(String),
}

/// One type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeFacts {
    /// Under which name clients of either server find it.
    pub name: TypeName,
    /// The number by which the wire protocol and drivers know it.
    pub oid: u32,
    /// What it is; of an array, what its elements are.
    pub kind: Kind,
    /// What it is made of, comparable as text; none if our login may not see all of it.
    pub shape: Option<String>,
    /// Columns and functions by which statements meet it (`column public.person.feeling`), ordered.
    pub met_in: Vec<String>,
}

/// A name that means the same on both servers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeName {
    /// Its schema.
    pub schema: String,
    /// Its own name; of an array, its elements'.
    pub name: String,
    /// An array's own name (`_mood`, `__mood`) depends on what was there when it was made.
    pub rank: Rank,
}

/// Whether it is a type or its array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// The type itself.
    Itself,
    /// The array that PostgreSQL made beside it.
    Array,
}

impl fmt::Display for TypeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brackets = match self.rank {
            Rank::Itself => "",
            Rank::Array => "[]",
        };
        write!(f, "{}.{}{brackets}", self.schema, self.name)
    }
}

/// What a type is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A base type, as extensions bring them.
    Base,
    /// An enum.
    Enum,
    /// A composite type of its own, or a table's row type that something uses as a type.
    Composite,
    /// A domain.
    Domain,
    /// A range.
    Range,
    /// The multirange of a range; from 14 on.
    Multirange,
}

impl Kind {
    /// From `pg_type.typtype`; the question asks for no other letters.
    fn of(letter: &str) -> Kind {
        match letter {
            "e" => Kind::Enum,
            "c" => Kind::Composite,
            "d" => Kind::Domain,
            "r" => Kind::Range,
            "m" => Kind::Multirange,
            _ => Kind::Base,
        }
    }
}

/// Asks a server for its types.
pub(super) async fn of(cluster: &Cluster, limit: Duration) -> Result<Types, ClusterError> {
    match cluster.list("types", &question(), limit, decode).await {
        Ok(types) => Ok(Types::Read(types)),
        // insufficient_privilege: hidden is a finding, not the end of preflight.
        Err(ClusterError::Refused { sqlstate, message, .. }) if sqlstate == "42501" => Ok(Types::Hidden(message)),
        Err(error) => Err(error),
    }
}

fn decode(row: &Cells<'_>) -> Result<TypeFacts, BadCell> {
    let rank = if row.flag("is_array")? { Rank::Array } else { Rank::Itself };
    Ok(TypeFacts {
        name: TypeName { schema: row.text("schema")?, name: row.text("name")?, rank },
        oid: row.number("oid")?,
        kind: Kind::of(&row.text("kind")?),
        shape: row.maybe_text("shape"),
        met_in: row.maybe_text("met_in").map(|lines| lines.lines().map(str::to_owned).collect()).unwrap_or_default(),
    })
}

/// Row types of tables, and their arrays, only where something depends on them as types: a function, a column, a domain.
/// Every table has a row type, and drivers that learn types by number hardly ever meet those.
fn question() -> String {
    format!(
        "WITH named AS (SELECT t.oid, t.typtype, t.typrelid, t.typbasetype, t.typtypmod, t.typlen, n.nspname AS schema, \
             coalesce(e.typname, t.typname) AS name, e.oid IS NOT NULL AS is_array, coalesce(e.oid, t.oid) AS element, \
             coalesce(e.typtype, t.typtype) AS kind, coalesce(e.typrelid, t.typrelid) AS relation \
           FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace \
           LEFT JOIN pg_type e ON e.oid = t.typelem AND e.typarray = t.oid \
           WHERE t.typisdefined AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pgcutover')), \
         used AS (SELECT DISTINCT s.element FROM named s JOIN pg_depend d ON d.refobjid = s.oid \
           WHERE d.refclassid = 'pg_type'::regclass AND d.deptype <> 'i'), \
         meets AS ({MEETS}) \
         SELECT s.oid, s.schema, s.name, s.is_array, s.kind, CASE WHEN s.is_array THEN 'array' ELSE CASE s.typtype \
             WHEN 'e' THEN 'enum ' || coalesce((SELECT array_agg(l.enumlabel ORDER BY l.enumsortorder)::text \
               FROM pg_enum l WHERE l.enumtypid = s.oid), '{{}}') \
             WHEN 'c' THEN 'composite ' || coalesce((SELECT array_agg(a.attname || ': ' || {attribute} ORDER BY a.attnum)::text \
               FROM pg_attribute a WHERE a.attrelid = s.typrelid AND a.attnum > 0 AND NOT a.attisdropped), '{{}}') \
             WHEN 'd' THEN 'domain over ' || {base} \
             WHEN 'r' THEN 'range of ' || (SELECT {subtype} FROM pg_range r WHERE r.rngtypid = s.oid) \
             WHEN 'm' THEN 'multirange' \
             ELSE 'base type of length ' || s.typlen END END AS shape, \
           (SELECT string_agg(DISTINCT m.place, E'\\n') FROM meets m WHERE m.type = s.oid) AS met_in \
         FROM named s LEFT JOIN pg_class c ON c.oid = s.relation \
         WHERE s.kind IN ('b', 'e', 'd', 'r', 'm') \
           OR s.kind = 'c' AND (c.relkind = 'c' OR s.element IN (SELECT u.element FROM used u)) \
         ORDER BY 2, 3, 4",
        attribute = spelt("a.atttypid", "a.atttypmod"),
        base = spelt("s.typbasetype", "s.typtypmod"),
        subtype = spelt("r.rngsubtype", "-1"),
    )
}

/// Where statements meet a type. Of a domain they are told the type below it. Functions that an extension brought, or a range
/// for itself, are as many as they are unlikely to be called for their types.
const MEETS: &str = "SELECT p.place, m.type FROM \
       (SELECT 'column ' || n.nspname || '.' || c.relname || '.' || a.attname AS place, n.nspname, ARRAY[a.atttypid] AS types \
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition \
        UNION ALL SELECT 'function ' || n.nspname || '.' || f.proname, n.nspname, \
          array_append(coalesce(f.proallargtypes, f.proargtypes::oid[]), f.prorettype) \
        FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace WHERE NOT EXISTS (SELECT FROM pg_depend d \
          WHERE d.classid = 'pg_proc'::regclass AND d.objid = f.oid AND d.deptype IN ('e', 'i'))) p, \
       unnest(p.types) u(oid) JOIN pg_type b ON b.oid = u.oid, unnest(ARRAY[b.oid, b.typbasetype]) m(type) \
     WHERE p.nspname !~ '^pg_' AND p.nspname NOT IN ('information_schema', 'pgcutover') AND m.type >= 16384";

/// A type's name with its modifier, the same on every version: `format_type` would quote what is a keyword there.
pub(super) fn spelt(oid: &str, modifier: &str) -> String {
    format!(
        "(SELECT CASE WHEN xn.nspname = 'pg_catalog' THEN format_type(x.oid, {modifier}) \
           ELSE xn.nspname || '.' || coalesce(xe.typname || '[]', x.typname) \
             || CASE WHEN {modifier} >= 0 THEN '(' || {modifier} || ')' ELSE '' END END \
         FROM pg_type x JOIN pg_namespace xn ON xn.oid = x.typnamespace \
         LEFT JOIN pg_type xe ON xe.oid = x.typelem AND xe.typarray = x.oid WHERE x.oid = {oid})"
    )
}
