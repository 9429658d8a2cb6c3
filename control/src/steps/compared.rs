//! Whole tables compared at two snapshots: one digest a table and side first, then only what differs is narrowed to keys.
//!
//! Invariant: only digests and the keys of rows that differ leave the servers, and of those a bounded number; what was not
//! compared to its end is never called equal.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::clusters::digest::{self, Digest, Manner, SHAPES, Shape};
use crate::clusters::pin::Pin;
use crate::clusters::{ClusterError, Deadline, Decode, Extent, PublishedTable, TableFacts, TableKind};
use crate::report::verification::{Compared, Difference, How, RowDifference, TableLine, Verification};
use crate::steps::pinned::Pins;

/// A row that was seen to differ: its hash on either side, where it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspect {
    /// Its key, as PostgreSQL writes a row.
    pub key: String,
    /// On the source, on the target.
    pub hashes: [Option<String>; 2],
}

/// What one look at a table came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// It is known.
    Known(Compared),
    /// It differs.
    Suspects {
        /// Its note says whether in other rows, too.
        difference: Difference,
        /// In these rows.
        suspects: Vec<Suspect>,
        /// Both sides.
        digests: [Digest; 2],
    },
}

/// Rows of one table that are named at most.
const NAMED_MAX: usize = 20;
/// Rows in one part of a table, about.
const PART_ROWS: u64 = 256;
/// Parts of one table at most: their digests travel (some 60 bytes each).
const PARTS_MAX: u64 = 16_384;
/// Rows whose keys and hashes may travel for one table.
const ROWS_MAX: u64 = 50_000;
/// Letters of a key that are told.
const KEY_MAX: usize = 200;

/// Something to compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unit {
    /// A table whose every row is replicated.
    Table(String),
    /// One that is not compared.
    LeftOut {
        /// `schema.name`.
        table: String,
        /// Why.
        why: String,
    },
}

impl Unit {
    /// `schema.name`.
    pub fn table(&self) -> &str {
        match self {
            Unit::Table(table) | Unit::LeftOut { table, .. } => table,
        }
    }
}

/// What there is to compare: what is published, under the name by which it is. Pure.
pub fn units(tables: &[TableFacts], published: &[PublishedTable]) -> Vec<Unit> {
    let parents: BTreeMap<String, &str> =
        tables.iter().filter_map(|table| Some((table.full_name(), table.parent.as_deref()?))).collect();
    let mut units = BTreeMap::new();
    for table in tables.iter().filter(|table| table.kind != TableKind::Parent) {
        let unit = if table.kind == TableKind::Unlogged {
            Unit::LeftOut { table: table.full_name(), why: "it is unlogged, so it is not replicated".to_owned() }
        } else {
            unit(table.full_name(), &parents, published)
        };
        units.insert(unit.table().to_owned(), unit);
    }
    units.into_values().collect()
}

fn unit(table: String, parents: &BTreeMap<String, &str>, published: &[PublishedTable]) -> Unit {
    let line: Vec<&str> = std::iter::successors(Some(table.as_str()), |at| parents.get(*at).copied()).collect();
    let here = |name: &str| published.iter().filter(move |p| p.table == name).collect::<Vec<_>>();
    if let Some(whole) = line.iter().find(|name| here(name).iter().any(|p| p.extent == Extent::Whole)) {
        return Unit::Table((*whole).to_owned());
    }
    let extents: Vec<Extent> = line.iter().flat_map(|name| here(name)).map(|p| p.extent).collect();
    let why = match extents.first() {
        None => "it is in no publication that the target subscribes to",
        Some(Extent::Filtered | Extent::Whole) => "only some of its rows or columns are published",
        Some(Extent::SomeOperations) => "its publication leaves out INSERT, UPDATE, DELETE or TRUNCATE",
    };
    Unit::LeftOut { table, why: why.to_owned() }
}

/// A table on both sides, at the snapshots.
pub struct Pair<'a> {
    pins: &'a Pins,
    manner: Manner,
    /// As it is on the source.
    pub source: Shape,
    target: Shape,
    deadline: &'a Deadline,
}

/// Compares everything that the pins are for; each table that was reached has its line, in whatever order. Cancel safe but for
/// the pins, which are of no use afterwards.
pub async fn compare(pins: &Pins, time_max: Duration, into: &mut Verification, tell: &impl Fn(&str)) {
    let deadline = Deadline::after(time_max);
    let mut todo = match pairs(pins, &deadline, into).await {
        Ok(todo) => todo,
        Err(error) => {
            into.leave_out(pins.units.iter().map(Unit::table), &told(&error));
            return;
        }
    };
    // What takes long comes last: it does not take the others' time.
    todo.sort_by_key(|pair| pair.source.pages);
    let count = todo.len();
    for (at, pair) in todo.iter().enumerate() {
        tell(&format!("comparing table {} of {count}: {}", at + 1, pair.source.full_name()));
        let began = deadline.elapsed();
        let result = match pair.look(NAMED_MAX).await {
            Look::Known(result) => result,
            Look::Suspects { difference, suspects, .. } => Compared::Differs(named(difference, suspects)),
        };
        let ms = (deadline.elapsed().saturating_sub(began)).as_secs_f64() * 1000.0;
        into.tables.push(TableLine { table: pair.source.full_name(), result, ms });
    }
}

const NO_TIME: &str = "no time was left: verify.time_max";

/// Nothing is known, because of this.
pub fn not_compared(why: impl Into<String>) -> Compared {
    Compared::NotCompared { why: why.into() }
}

/// The words of an error, for people.
pub fn told(error: &ClusterError) -> String {
    // What statement_timeout says.
    if error.sqlstate() == Some("57014") { NO_TIME.to_owned() } else { error.to_string() }
}

/// Both shapes of each table; what cannot be compared gets its line here.
pub(crate) async fn pairs<'a>(
    pins: &'a Pins,
    deadline: &'a Deadline,
    into: &mut Verification,
) -> Result<Vec<Pair<'a>>, ClusterError> {
    let shapes = |pin: &'a Pin| pin.list("shapes of tables", SHAPES, deadline.left(), digest::shape);
    let (source, target) = tokio::try_join!(shapes(&pins.source), shapes(&pins.target))?;
    let named = |shapes: Vec<Shape>| shapes.into_iter().map(|s| (s.full_name(), s)).collect::<BTreeMap<_, _>>();
    let (mut source, mut target) = (named(source), named(target));
    let mut pairs = Vec::new();
    for unit in &pins.units {
        let why = match unit {
            Unit::LeftOut { why, .. } => why.clone(),
            Unit::Table(table) => match (source.remove(table), target.remove(table)) {
                (Some(source), Some(target)) => {
                    let target = source.stored_as(&target);
                    pairs.push(Pair { pins, manner: pins.manner(), source, target, deadline });
                    continue;
                }
                (None, _) => "the source has no such table any more".to_owned(),
                (Some(_), None) => "the target has no such table".to_owned(),
            },
        };
        into.tables.push(TableLine { table: unit.table().to_owned(), result: not_compared(why), ms: 0.0 });
    }
    Ok(pairs)
}

impl Pair<'_> {
    /// Compares it; looks into `parts_max` parts that differ at most.
    pub async fn look(&self, parts_max: usize) -> Look {
        if self.deadline.is_over() {
            return Look::Known(not_compared(NO_TIME));
        }
        let (source, target) =
            tokio::join!(self.digest(&self.pins.source, &self.source), self.digest(&self.pins.target, &self.target));
        let (source, target) = match (source, target) {
            (Ok(source), Ok(target)) => (source, target),
            (Err(why), _) | (Ok(_), Err(why)) => return Look::Known(not_compared(why)),
        };
        if source == target {
            return Look::Known(Compared::Equal { rows: source.rows });
        }
        if self.source.may_print_otherwise(self.manner) {
            let why = "its digests differ, but floats within other types print otherwise before 12";
            return Look::Known(not_compared(why));
        }
        let mut difference = Difference {
            source_rows: source.rows,
            target_rows: target.rows,
            key: self.source.key.clone(),
            ..Difference::default()
        };
        if self.source.key.is_empty() {
            difference.note = Some("without a key its rows cannot be named".to_owned());
            return Look::Suspects { difference, suspects: Vec::new(), digests: [source, target] };
        }
        let suspects = self.narrow(&mut difference, parts_max).await.unwrap_or_else(|error| {
            difference.note = Some(format!("which rows was not found out: {}", told(&error)));
            Vec::new()
        });
        Look::Suspects { difference, suspects, digests: [source, target] }
    }

    /// The same rows at the snapshots of now.
    pub async fn again(&self, suspects: &[Suspect]) -> Result<Vec<Suspect>, ClusterError> {
        let keys: Vec<&str> = suspects.iter().map(|suspect| suspect.key.as_str()).collect();
        let (source, target) = self.both("rows", |shape| shape.rows_of(self.manner, &keys), digest::row).await?;
        let (source, target): (BTreeMap<_, _>, BTreeMap<_, _>) =
            (source.into_iter().collect(), target.into_iter().collect());
        let now = |key: &String| [source.get(key).cloned(), target.get(key).cloned()];
        Ok(suspects.iter().map(|suspect| Suspect { key: suspect.key.clone(), hashes: now(&suspect.key) }).collect())
    }

    async fn digest(&self, pin: &Pin, shape: &Shape) -> Result<Digest, String> {
        const WHAT: &str = "digest of a table";
        let answer = pin.ask(WHAT, &shape.digest(self.manner), self.deadline.left()).await;
        let answer = answer.map_err(|error| told(&error))?;
        let (digest, moved) = digest::of_table(&answer).map_err(|problem| format!("{WHAT}: {problem}"))?;
        if moved {
            return Err(
                "it was truncated or rewritten after the moment at which it would have been compared".to_owned()
            );
        }
        Ok(digest)
    }

    /// First the parts that differ, then the rows in some of them.
    async fn narrow(&self, difference: &mut Difference, parts_max: usize) -> Result<Vec<Suspect>, ClusterError> {
        let rows = difference.source_rows.max(difference.target_rows);
        let count = (rows / PART_ROWS).clamp(1, PARTS_MAX);
        let mut parts = vec![0];
        let mut others = 0;
        if count > 1 {
            let sql = |shape: &Shape| shape.parts(self.manner, count);
            let (source, target) = self.both("digests of parts", sql, digest::part).await?;
            let different = different_parts(source, target);
            let taken = fitting(&different, parts_max);
            others = different.len() - taken.len();
            parts = taken;
        }
        if parts.is_empty() {
            difference.note = Some("more rows differ than can be looked at one by one".to_owned());
            return Ok(Vec::new());
        }
        let sql = |shape: &Shape| shape.rows(self.manner, count, &parts, ROWS_MAX * 2);
        let (source, target) = self.both("rows of parts", sql, digest::row).await?;
        if others > 0 {
            difference.note = Some(MORE.to_owned());
        }
        Ok(different_rows(&source.into_iter().collect(), &target.into_iter().collect()))
    }

    /// The same question to both.
    async fn both<T>(
        &self,
        what: &'static str,
        sql: impl Fn(&Shape) -> String,
        decode: Decode<T>,
    ) -> Result<(Vec<T>, Vec<T>), ClusterError> {
        let (on_source, on_target) = (sql(&self.source), sql(&self.target));
        let left = self.deadline.left();
        let (source, target) = tokio::join!(
            self.pins.source.list(what, &on_source, left, decode),
            self.pins.target.list(what, &on_target, left, decode)
        );
        Ok((source?, target?))
    }
}

/// The parts whose digests differ, with how many rows looking into them costs.
fn different_parts(source: Vec<(u64, Digest)>, target: Vec<(u64, Digest)>) -> Vec<(u64, u64)> {
    let (source, target): (BTreeMap<_, _>, BTreeMap<_, _>) =
        (source.into_iter().collect(), target.into_iter().collect());
    let parts: BTreeSet<u64> = source.keys().chain(target.keys()).copied().collect();
    let rows = |digest: Option<&Digest>| digest.map_or(0, |digest| digest.rows);
    let differ = parts.into_iter().filter(|part| source.get(part) != target.get(part));
    differ.map(|part| (part, rows(source.get(&part)).max(rows(target.get(&part))))).collect()
}

/// As many of them as may be looked into.
fn fitting(parts: &[(u64, u64)], parts_max: usize) -> Vec<u64> {
    let mut left = ROWS_MAX;
    let mut taken = Vec::new();
    for (part, rows) in parts.iter().take(parts_max) {
        if *rows <= left {
            left -= rows;
            taken.push(*part);
        }
    }
    taken
}

/// Which rows differ.
fn different_rows(source: &BTreeMap<String, String>, target: &BTreeMap<String, String>) -> Vec<Suspect> {
    let keys: BTreeSet<&String> = source.keys().chain(target.keys()).collect();
    let differ = keys.into_iter().filter(|key| source.get(*key) != target.get(*key));
    let hashes = |key: &String| [source.get(key).cloned(), target.get(key).cloned()];
    differ.map(|key| Suspect { key: key.clone(), hashes: hashes(key) }).collect()
}

/// More than the rows that were looked at.
const MORE: &str = "more rows differ";

/// Names the first few by key, and says how many more there are.
pub fn named(mut difference: Difference, suspects: Vec<Suspect>) -> Difference {
    let more = suspects.len().saturating_sub(NAMED_MAX);
    let told = suspects.into_iter().take(NAMED_MAX).map(|Suspect { key, hashes }| RowDifference {
        key: key.chars().take(KEY_MAX).collect(),
        how: match hashes {
            [_, None] => How::OnlyOnSource,
            [None, Some(_)] => How::OnlyOnTarget,
            [Some(_), Some(_)] => How::Differs,
        },
    });
    difference.rows = told.collect();
    if more > 0 && difference.note.is_none() {
        difference.note = Some(format!("{more} {MORE}"));
    }
    difference
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(table: &str, extent: Extent) -> PublishedTable {
        PublishedTable { publication: "p".to_owned(), table: table.to_owned(), extent, is_of_all: false }
    }

    fn digest_of(rows: u64, sum: &str) -> Digest {
        Digest { rows, sums: [sum.to_owned(), sum.to_owned()] }
    }

    #[test]
    fn a_table_is_compared_under_the_name_by_which_it_is_published() {
        let tables = [
            TableFacts::plain("a", TableKind::Logged, None),
            TableFacts::plain("p", TableKind::Parent, None),
            TableFacts::plain("p1", TableKind::Logged, Some("public.p")),
            TableFacts::plain("p2", TableKind::Logged, Some("public.p")),
        ];
        let of = |names: &[&str]| {
            let published: Vec<_> = names.iter().map(|name| published(name, Extent::Whole)).collect();
            units(&tables, &published).into_iter().map(|unit| unit.table().to_owned()).collect::<Vec<_>>()
        };
        // Through the root, each of its partitions once; else each by itself.
        assert_eq!(of(&["public.a", "public.p"]), ["public.a", "public.p"]);
        assert_eq!(of(&["public.a", "public.p1", "public.p2"]), ["public.a", "public.p1", "public.p2"]);
    }

    #[test]
    fn what_is_not_replicated_whole_is_named_with_its_reason() {
        let tables = [
            TableFacts::plain("f", TableKind::Logged, None),
            TableFacts::plain("n", TableKind::Logged, None),
            TableFacts::plain("o", TableKind::Logged, None),
            TableFacts::plain("u", TableKind::Unlogged, None),
        ];
        let published = [published("public.f", Extent::Filtered), published("public.o", Extent::SomeOperations)];
        let whys: Vec<String> = units(&tables, &published)
            .into_iter()
            .map(|unit| match unit {
                Unit::LeftOut { why, .. } => why,
                Unit::Table(table) => panic!("{table} would be compared"),
            })
            .collect();
        for (why, word) in whys.iter().zip(["rows or columns", "no publication", "TRUNCATE", "unlogged"]) {
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn parts_that_one_side_lacks_differ_too_and_no_more_is_looked_into_than_fits() {
        let source = vec![(1, digest_of(5, "7")), (2, digest_of(6, "8")), (3, digest_of(4, "9"))];
        let target = vec![(1, digest_of(5, "7")), (2, digest_of(7, "8")), (4, digest_of(1, "1"))];
        let different = different_parts(source, target);
        assert_eq!(different, [(2, 7), (3, 4), (4, 1)]);
        assert_eq!(fitting(&different, NAMED_MAX), [2, 3, 4]);
        assert_eq!(fitting(&[(1, ROWS_MAX + 1), (2, 10)], NAMED_MAX), [2]);
        let many: Vec<(u64, u64)> = (0..100).map(|part| (part, 1)).collect();
        assert_eq!(fitting(&many, NAMED_MAX).len(), NAMED_MAX);
    }

    #[test]
    fn rows_are_told_by_key_and_side_and_no_more_than_a_few() {
        let map = |rows: &[(&str, &str)]| {
            rows.iter().map(|(key, hash)| ((*key).to_owned(), (*hash).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let tell = |suspects| named(Difference::default(), suspects);
        let found = tell(different_rows(
            &map(&[("(1)", "a"), ("(2)", "b"), ("(3)", "c")]),
            &map(&[("(1)", "a"), ("(2)", "x"), ("(4)", "d")]),
        ));
        let told: Vec<(&str, How)> = found.rows.iter().map(|row| (row.key.as_str(), row.how)).collect();
        assert_eq!(told, [("(2)", How::Differs), ("(3)", How::OnlyOnSource), ("(4)", How::OnlyOnTarget)]);
        assert_eq!(found.note, None);
        let many: BTreeMap<String, String> = (0..50).map(|n| (format!("({n})"), String::new())).collect();
        let found = tell(different_rows(&many, &BTreeMap::new()));
        assert_eq!((found.rows.len(), found.note.as_deref()), (NAMED_MAX, Some("30 more rows differ")));
    }
}
