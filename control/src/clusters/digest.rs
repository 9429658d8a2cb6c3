//! The questions that make two servers' tables comparable without their rows: digests of a table, of its parts, of its rows.
//!
//! Invariant: pure; equal rows give equal digests on all versions, whatever the order of rows and of the target's columns; NULL and
//! the empty string, and a delimiter inside a value, never look alike (a row's text quotes).

use pgcutover_api::store::{identifier, literal};
use serde::Deserialize;

use crate::clusters::{Answer, BadCell, Cells};

/// Every table: what it stores, its columns in order, and what tells its rows apart.
pub const SHAPES: &str = "SELECT n.nspname, c.relname, c.relkind, c.relpages, \
      coalesce((SELECT json_agg(json_build_array(a.attname, CASE WHEN t.typname IN ('float4', 'float8') THEN t.typname \
           WHEN t.typcategory = 'G' OR t.typtype IN ('c', 'd', 'r', 'm') OR t.typelem <> 0 AND t.typlen = -1 THEN 'made_up' \
           ELSE 'plain' END) ORDER BY a.attnum) \
         FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '[]')::text AS columns, \
      coalesce((SELECT json_agg(a.attname ORDER BY k.at) FROM pg_index i \
         CROSS JOIN unnest(i.indkey) WITH ORDINALITY k (attnum, at) \
         JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum \
         WHERE k.at <= i.indnkeyatts AND i.indexrelid = (SELECT j.indexrelid FROM pg_index j WHERE j.indrelid = c.oid \
           AND (j.indisprimary OR j.indisreplident) ORDER BY j.indisprimary DESC LIMIT 1)), '[]')::text AS key \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pgcutover')";

/// The whole of a table in four numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// How many rows.
    pub rows: u64,
    /// The sum of the first halves of their hashes, and of the second.
    pub sums: [String; 2],
}

/// A table, as far as one has to know it to compare it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Whether its rows are those of its partitions.
    pub is_parent: bool,
    /// Its size in pages, roughly.
    pub pages: i64,
    /// Its columns, in order.
    pub columns: Vec<Column>,
    /// The columns that tell its rows apart; none where nothing does.
    pub key: Vec<String>,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Column(
    /// Its name.
    pub String,
    /// How its values print.
    pub Print,
);

/// How values of a type print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Print {
    /// The same everywhere, once the session's settings are.
    Plain,
    /// With 17 digits before 12, with as few as will do since.
    Float4,
    /// The same.
    Float8,
    /// Of other types, maybe of floats.
    MadeUp,
}

/// In what two servers differ that shows in how values print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Manner {
    /// How floats are compared.
    pub floats: Floats,
    /// How text is.
    pub text: Text,
}

/// How floats are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Floats {
    /// As they print.
    #[default]
    AsPrinted,
    /// By their bits: one server is older than 12.
    ByBits,
}

/// How text is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Text {
    /// As both servers store it.
    #[default]
    AsStored,
    /// In UTF-8: they store it in different encodings.
    InUtf8,
}

impl Shape {
    /// `schema.name`, unquoted, for people and as a key.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// Whether a difference may be one of printing only.
    pub fn may_print_otherwise(&self, manner: Manner) -> bool {
        manner.floats == Floats::ByBits && self.columns.iter().any(|column| column.1 == Print::MadeUp)
    }

    /// This shape's columns and key, read from a table that stores its rows as `other` does.
    #[must_use]
    pub fn stored_as(&self, other: &Shape) -> Shape {
        Shape { is_parent: other.is_parent, ..self.clone() }
    }

    /// The whole table.
    pub fn digest(&self, manner: Manner) -> String {
        format!(
            "SELECT {SUMS} FROM (SELECT {} AS h FROM {} OFFSET 0) d; {}",
            self.hash(manner),
            self.from(),
            self.moved()
        )
    }

    /// The same of each of `count` parts, by key; only parts that have rows answer.
    pub fn parts(&self, manner: Manner, count: u64) -> String {
        format!(
            "SELECT d.part, {SUMS} FROM (SELECT {} AS part, {} AS h FROM {} OFFSET 0) d GROUP BY d.part",
            self.part(manner, count),
            self.hash(manner),
            self.from()
        )
    }

    /// Key and hash of each row in these of `count` parts, `limit` rows at most.
    pub fn rows(&self, manner: Manner, count: u64, parts: &[u64], limit: u64) -> String {
        let parts = parts.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        format!(
            "SELECT {} AS key, {} AS h FROM {} WHERE {} IN ({parts}) LIMIT {limit}",
            self.key_text(manner),
            self.hash(manner),
            self.from(),
            self.part(manner, count)
        )
    }

    /// Key and hash of the rows with these keys.
    pub fn rows_of(&self, manner: Manner, keys: &[&str]) -> String {
        let keys = keys.iter().map(|key| literal(key)).collect::<Vec<_>>().join(", ");
        let key = self.key_text(manner);
        format!("SELECT {key} AS key, {} AS h FROM {} WHERE {key} IN ({keys})", self.hash(manner), self.from())
    }

    /// Whether rows may have gone from under the snapshot: TRUNCATE and rewriting DDL replace the files that it sees. The
    /// server looks up the file of now, our snapshot has that of then; the lock of the question before keeps it so.
    fn moved(&self) -> String {
        let of = literal(&format!("{}.{}", identifier(&self.schema), identifier(&self.name)));
        format!(
            "WITH RECURSIVE tree (oid) AS (SELECT {of}::regclass::oid UNION ALL \
               SELECT i.inhrelid FROM pg_inherits i JOIN tree t ON t.oid = i.inhparent WHERE {}) \
             SELECT coalesce(bool_or(c.relkind = 'r' AND pg_relation_filenode(c.oid) IS DISTINCT FROM c.relfilenode), true) AS moved \
             FROM tree t JOIN pg_class c ON c.oid = t.oid",
            self.is_parent
        )
    }

    fn from(&self) -> String {
        // Children of a plain table are tables of their own; a partitioned one is its partitions.
        let only = if self.is_parent { "" } else { "ONLY " };
        format!("{only}{}.{}", identifier(&self.schema), identifier(&self.name))
    }

    fn hash(&self, manner: Manner) -> String {
        let values: Vec<String> = self.columns.iter().map(|Column(name, print)| value(name, *print, manner)).collect();
        let row = format!("ROW({})::text", values.join(", "));
        format!("md5({})", bytes(row, manner))
    }

    fn key_text(&self, manner: Manner) -> String {
        let print = |name: &String| self.columns.iter().find(|column| column.0 == *name).map_or(Print::Plain, |c| c.1);
        let values: Vec<String> = self.key.iter().map(|name| value(name, print(name), manner)).collect();
        format!("ROW({})::text", values.join(", "))
    }

    /// 28 bits of the key's hash are never negative and more than there are parts.
    fn part(&self, manner: Manner, count: u64) -> String {
        let key = self.key_text(manner);
        let bytes = bytes(key, manner);
        format!("(('x' || substr(md5({bytes}), 1, 7))::bit(28)::int % {count})")
    }
}

/// Sums do not ask for an order, and unlike XOR they see a row that is there twice.
const SUMS: &str = "count(*) AS n, coalesce(sum(('x' || substr(d.h, 1, 16))::bit(64)::bigint), 0)::text AS a, \
    coalesce(sum(('x' || substr(d.h, 17, 16))::bit(64)::bigint), 0)::text AS b";

fn bytes(text: String, manner: Manner) -> String {
    match manner.text {
        Text::AsStored => text,
        Text::InUtf8 => format!("convert_to({text}, 'UTF8')"),
    }
}

fn value(name: &str, print: Print, manner: Manner) -> String {
    let name = identifier(name);
    match (print, manner.floats) {
        // NaN has many bit patterns.
        (Print::Float4, Floats::ByBits) => format!("CASE {name} WHEN 'NaN' THEN '' ELSE float4send({name}) END"),
        (Print::Float8, Floats::ByBits) => format!("CASE {name} WHEN 'NaN' THEN '' ELSE float8send({name}) END"),
        (Print::Plain | Print::MadeUp, Floats::ByBits) | (_, Floats::AsPrinted) => name,
    }
}

/// What [`Shape::digest`] answers: the digest, and whether the table is another one by now.
pub(crate) fn of_table(answer: &Answer) -> Result<(Digest, bool), BadCell> {
    let missing = BadCell { column: "moved", value: None, wanted: "a row" };
    let [whole, moved] = answer.rows.as_slice() else { return Err(missing) };
    Ok((digest(&Cells(whole))?, Cells(moved).flag("moved")?))
}

pub(crate) fn digest(row: &Cells<'_>) -> Result<Digest, BadCell> {
    Ok(Digest { rows: row.number("n")?, sums: [row.text("a")?, row.text("b")?] })
}

pub(crate) fn part(row: &Cells<'_>) -> Result<(u64, Digest), BadCell> {
    Ok((row.number("part")?, digest(row)?))
}

pub(crate) fn row(row: &Cells<'_>) -> Result<(String, String), BadCell> {
    Ok((row.text("key")?, row.text("h")?))
}

pub(crate) fn shape(row: &Cells<'_>) -> Result<Shape, BadCell> {
    let bad = |column: &'static str, value: String| BadCell { column, value: Some(value), wanted: "a list" };
    let (columns, key) = (row.text("columns")?, row.text("key")?);
    Ok(Shape {
        schema: row.text("nspname")?,
        name: row.text("relname")?,
        is_parent: row.maybe("relkind") == Some("p"),
        pages: row.number("relpages")?,
        columns: serde_json::from_str(&columns).map_err(|_| bad("columns", columns))?,
        key: serde_json::from_str(&key).map_err(|_| bad("key", key))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            schema: "public".to_owned(),
            name: "Odd \"table\"".to_owned(),
            is_parent: false,
            pages: 1,
            columns: vec![
                Column("id".to_owned(), Print::Plain),
                Column("x".to_owned(), Print::Float8),
                Column("p".to_owned(), Print::MadeUp),
            ],
            key: vec!["id".to_owned()],
        }
    }

    #[test]
    fn columns_are_named_in_the_sources_order_and_names_are_quoted() {
        let sql = shape().digest(Manner::default());
        assert!(sql.contains("md5(ROW(\"id\", \"x\", \"p\")::text)"), "{sql}");
        assert!(sql.contains("FROM ONLY \"public\".\"Odd \"\"table\"\"\" OFFSET 0"), "{sql}");
        assert!(sql.contains("'\"public\".\"Odd \"\"table\"\"\"'::regclass"), "{sql}");
    }

    #[test]
    fn a_parent_is_its_partitions_wherever_the_other_side_keeps_its_rows() {
        let parent = Shape { is_parent: true, ..shape() };
        assert!(!parent.digest(Manner::default()).contains("ONLY"));
        assert!(parent.stored_as(&shape()).digest(Manner::default()).contains("ONLY"));
    }

    #[test]
    fn floats_are_compared_by_their_bits_where_one_side_prints_them_the_old_way() {
        let old = Manner { floats: Floats::ByBits, text: Text::AsStored };
        let sql = shape().digest(old);
        assert!(sql.contains("float8send(\"x\")") && !shape().digest(Manner::default()).contains("send"), "{sql}");
        assert!(shape().may_print_otherwise(old) && !shape().may_print_otherwise(Manner::default()));
    }

    #[test]
    fn encodings_that_differ_are_compared_in_utf_8() {
        let sql = shape().digest(Manner { floats: Floats::AsPrinted, text: Text::InUtf8 });
        assert!(sql.contains("md5(convert_to(ROW("), "{sql}");
    }

    #[test]
    fn parts_go_by_the_key_alone() {
        let sql = shape().rows(Manner::default(), 16, &[3, 9], 100);
        let part = "(('x' || substr(md5(ROW(\"id\")::text), 1, 7))::bit(28)::int % 16) IN (3, 9) LIMIT 100";
        assert!(sql.ends_with(part), "{sql}");
        assert!(shape().rows_of(Manner::default(), &["(it's)"]).ends_with("IN ('(it''s)')"));
    }
}
