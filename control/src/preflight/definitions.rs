//! What the user's tables consist of on a server: columns, indexes, constraints, triggers.
//!
//! Invariant: one question a server, the same text for all versions from 11 on; nothing in an answer depends on names that
//! PostgreSQL chooses by itself, or on numbers of columns that were dropped.

use std::time::Duration;

use crate::clusters::{BadCell, Cells, Cluster, ClusterError};
use crate::preflight::types::spelt;

/// The definitions of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Definitions {
    /// All of them, table by table; columns in their order.
    Read(Vec<Definition>),
    /// A catalogue was taken from our login; the server's words.
    Hidden(String),
}

/// One part of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// The table, `schema.name`.
    pub table: String,
    /// What it is.
    pub part: Part,
    /// Its name.
    pub name: String,
    /// A column's type; else what it is made of, comparable as text.
    pub text: String,
    /// What else is true of a column (`NOT NULL`, `default`), or of an index (`invalid`); ordered.
    pub traits: Vec<String>,
}

/// What a table consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A column.
    Column,
    /// An index that no constraint made.
    Index,
    /// A key, a check, an exclusion; NOT NULL is a column's.
    Constraint,
    /// A trigger that is not ours.
    Trigger,
}

impl Part {
    /// Its word, in questions and findings.
    pub fn word(self) -> &'static str {
        match self {
            Part::Column => "column",
            Part::Index => "index",
            Part::Constraint => "constraint",
            Part::Trigger => "trigger",
        }
    }

    fn of(word: &str) -> Part {
        [Part::Index, Part::Constraint, Part::Trigger]
            .into_iter()
            .find(|part| part.word() == word)
            .unwrap_or(Part::Column)
    }
}

/// Asks a server for them.
pub(super) async fn of(cluster: &Cluster, limit: Duration) -> Result<Definitions, ClusterError> {
    match cluster.list("definitions", &question(), limit, decode).await {
        Ok(definitions) => Ok(Definitions::Read(definitions)),
        // insufficient_privilege: hidden is a finding, not the end of preflight.
        Err(ClusterError::Refused { sqlstate, message, .. }) if sqlstate == "42501" => Ok(Definitions::Hidden(message)),
        Err(error) => Err(error),
    }
}

fn decode(row: &Cells<'_>) -> Result<Definition, BadCell> {
    Ok(Definition {
        table: row.text("table_name")?,
        part: Part::of(&row.text("part")?),
        name: row.text("name")?,
        text: row.text("text")?,
        traits: row.text("traits")?.lines().map(str::to_owned).collect(),
    })
}

/// `attgenerated` is there from 12 on: read through JSON. Put together from the catalogues' rows: the functions that write an
/// index or a check as SQL lock its table, and would wait for whoever has locked it. So an expression is told from none, not
/// from another, and a check by its name.
fn question() -> String {
    format!(
        "WITH rel AS (SELECT c.oid, n.nspname || '.' || c.relname AS table_name FROM pg_class c \
           JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p') AND c.relpersistence IN ('p', 'u') \
             AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pgcutover')) \
         SELECT rel.table_name, 'column' AS part, a.attnum::int AS position, a.attname::text AS name, {spelt} AS text, \
             concat_ws(E'\\n', CASE WHEN a.attnotnull THEN 'NOT NULL' END, \
               CASE WHEN coalesce(to_jsonb(a) ->> 'attgenerated', '') <> '' THEN 'generated' WHEN a.atthasdef THEN 'default' END, \
               CASE a.attidentity WHEN 'a' THEN 'identity (always)' WHEN 'd' THEN 'identity' END) AS traits \
           FROM rel JOIN pg_attribute a ON a.attrelid = rel.oid WHERE a.attnum > 0 AND NOT a.attisdropped \
         UNION ALL SELECT rel.table_name, 'index', 0, x.relname::text, \
             concat_ws(' ', CASE WHEN i.indisunique THEN 'unique' END, m.amname, (SELECT string_agg(coalesce(a.attname, 'expression'), \
                 ', ' ORDER BY u.place) FROM unnest(i.indkey::int2[]) WITH ORDINALITY u(number, place) \
                 LEFT JOIN pg_attribute a ON u.number > 0 AND a.attrelid = i.indrelid AND a.attnum = u.number), \
               i.indnkeyatts, i.indoption, CASE WHEN i.indpred IS NOT NULL THEN 'partial' END), \
             CASE WHEN i.indisvalid THEN '' ELSE 'invalid' END \
           FROM rel JOIN pg_index i ON i.indrelid = rel.oid JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam \
           WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = x.oid AND k.contype IN ('p', 'u', 'x')) \
         UNION ALL SELECT rel.table_name, 'constraint', 0, k.conname::text, \
             concat_ws(' ', k.contype, CASE WHEN k.contype = 'c' THEN k.conname END, \
               (SELECT string_agg(a.attname, ', ' ORDER BY u.place) FROM unnest(k.conkey) WITH ORDINALITY u(number, place) \
                 JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number), \
               (SELECT fn.nspname || '.' || fc.relname FROM pg_class fc JOIN pg_namespace fn ON fn.oid = fc.relnamespace \
                 WHERE k.contype = 'f' AND fc.oid = k.confrelid), CASE WHEN k.contype = 'f' THEN k.confdeltype END), '' \
           FROM rel JOIN pg_constraint k ON k.conrelid = rel.oid WHERE k.contype IN ('p', 'u', 'x', 'f', 'c') \
         UNION ALL SELECT rel.table_name, 'trigger', 0, t.tgname::text, t.tgname::text, '' \
           FROM rel JOIN pg_trigger t ON t.tgrelid = rel.oid WHERE NOT t.tgisinternal AND t.tgname <> 'pgcutover_gate' \
         ORDER BY 1, 2, 3, 4",
        spelt = spelt("a.atttypid", "a.atttypmod"),
    )
}
