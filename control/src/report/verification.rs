//! What comparing both servers at one moment came to, table by table.
//!
//! Invariant: a table is equal only if all of it was compared; whatever was not says why.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::event::Facts;
use crate::finding::Finding;
use crate::report::html::escape;

/// The observation that carries it.
pub const VERIFICATION: &str = "verification";
/// What findings about it call themselves.
pub const CHECK: &str = "verification";

/// All of it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Verification {
    /// Why nothing was compared, if nothing was.
    pub none: Option<String>,
    /// The tables, those that differ first.
    pub tables: Vec<TableLine>,
    /// The sequences, where a run has set them.
    pub sequences: Option<SequencesLine>,
    /// How long it took, after clients were let go.
    pub ms: f64,
}

/// One table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableLine {
    /// `schema.name`.
    pub table: String,
    /// What came of it.
    pub result: Compared,
    /// How long it took.
    pub ms: f64,
}

/// What came of one table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Compared {
    /// Both sides have exactly the same rows.
    Equal {
        /// So many.
        rows: u64,
    },
    /// They have not.
    Differs(Difference),
    /// Rows were written all the time; those that were looked at twice were equal in the end or still moving.
    Busy {
        /// What was so.
        why: String,
    },
    /// Nothing is known.
    NotCompared {
        /// Why.
        why: String,
    },
}

/// How a table differs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Difference {
    /// Rows on the source.
    pub source_rows: u64,
    /// Rows on the target.
    pub target_rows: u64,
    /// The columns of the key; none where nothing tells rows apart.
    pub key: Vec<String>,
    /// Rows that differ, some of them.
    pub rows: Vec<RowDifference>,
    /// What has to be known of that list: there are more, or why there are none.
    pub note: Option<String>,
}

/// A row that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowDifference {
    /// Its key, as PostgreSQL writes a row: `(17)`.
    pub key: String,
    /// How.
    pub how: How,
}

/// How a row differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// The target lacks it.
    OnlyOnSource,
    /// The source lacks it.
    OnlyOnTarget,
    /// Both have it, with other values.
    Differs,
}

/// The sequences.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequencesLine {
    /// How many were compared.
    pub compared: usize,
    /// Those on the target that stand before the source's, and what is so.
    pub behind: Vec<String>,
}

impl Verification {
    /// Nothing was compared.
    pub fn none(why: impl Into<String>) -> Verification {
        Verification { none: Some(why.into()), ..Verification::default() }
    }

    /// As the observation that carries it.
    pub fn facts(&self) -> Facts {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(map)) => Facts(map),
            Ok(_) | Err(_) => Facts::new(),
        }
    }

    /// Out of the observation; none where it is not one.
    pub fn of(facts: &Facts) -> Option<Verification> {
        serde_json::from_value(serde_json::Value::Object(facts.0.clone())).ok()
    }

    /// Whether anything is not as it has to be.
    pub fn differs(&self) -> bool {
        let behind = self.sequences.as_ref().is_some_and(|sequences| !sequences.behind.is_empty());
        behind || self.tables.iter().any(|line| matches!(line.result, Compared::Differs(_)))
    }

    /// What a person should know of it; `fix` is for what differs.
    pub fn findings(&self, fix: &str) -> Vec<Finding> {
        let mut found = Vec::new();
        for line in &self.tables {
            let object = format!("table {}", line.table);
            match &line.result {
                Compared::Equal { .. } => {}
                Compared::Differs(difference) => found.push(Finding::red(CHECK, object, difference.to_string(), fix)),
                Compared::Busy { why } => {
                    found.push(Finding::yellow(CHECK, object, why, "compare when less is written"))
                }
                Compared::NotCompared { why } => {
                    let then = "compare it by other means if it matters";
                    found.push(Finding::yellow(CHECK, object, format!("was not compared: {why}"), then));
                }
            }
        }
        for behind in self.sequences.iter().flat_map(|sequences| &sequences.behind) {
            let fix = "setval() on the target past what the source has handed out";
            found.push(Finding::red(CHECK, "sequences", behind, fix));
        }
        found
    }

    /// Those of these that have no line yet get one that says why.
    pub fn leave_out<'a>(&mut self, tables: impl Iterator<Item = &'a str>, why: &str) {
        for table in tables {
            if self.tables.iter().all(|line| line.table != table) {
                let result = Compared::NotCompared { why: why.to_owned() };
                self.tables.push(TableLine { table: table.to_owned(), result, ms: 0.0 });
            }
        }
    }

    /// What differs first, then what is not known, each by name.
    pub fn sort(&mut self) {
        let rank = |result: &Compared| match result {
            Compared::Differs(_) => 0,
            Compared::Busy { .. } => 1,
            Compared::NotCompared { .. } => 2,
            Compared::Equal { .. } => 3,
        };
        self.tables.sort_by(|a, b| (rank(&a.result), &a.table).cmp(&(rank(&b.result), &b.table)));
    }

    fn equal(&self) -> (usize, u64) {
        let rows = self.tables.iter().filter_map(|line| match line.result {
            Compared::Equal { rows } => Some(rows),
            Compared::Differs(_) | Compared::Busy { .. } | Compared::NotCompared { .. } => None,
        });
        rows.fold((0, 0), |(tables, all), rows| (tables + 1, all + rows))
    }

    /// In one line.
    pub fn verdict(&self) -> String {
        if let Some(why) = &self.none {
            return format!("not verified: {why}");
        }
        let (equal, rows) = self.equal();
        let rest = self.tables.len() - equal;
        let sequences = match &self.sequences {
            None => String::new(),
            Some(line) if line.behind.is_empty() => format!(", {} sequences not behind", line.compared),
            Some(line) => format!(", {} sequences BEHIND", line.behind.len()),
        };
        let took = self.ms / 1000.0;
        if self.differs() {
            return format!("the servers DIFFER: {equal} tables equal, {rest} not ({took:.1} s){sequences}");
        }
        if equal == 0 && rest > 0 {
            return format!("not verified: none of {rest} tables could be compared{sequences} ({took:.1} s)");
        }
        let left_out = if rest == 0 { String::new() } else { format!(", {rest} not compared") };
        format!("verified: {equal} tables equal, {rows} rows{left_out}{sequences} ({took:.1} s)")
    }

    /// As a part of the page.
    pub fn html(&self) -> String {
        let mut page = format!("<h2>Comparison of both servers</h2>\n<p>{}</p>\n", escape(&self.verdict()));
        if self.tables.is_empty() {
            return page;
        }
        page.push_str("<table><tr><th>Table</th><th>ms</th><th>Result</th></tr>\n");
        for line in &self.tables {
            let class = match line.result {
                Compared::Equal { .. } => "green",
                Compared::Differs(_) => "red",
                Compared::Busy { .. } | Compared::NotCompared { .. } => "yellow",
            };
            let (table, result) = (escape(&line.table), escape(&line.result.to_string()));
            page.push_str(&format!(
                "<tr class=\"{class}\"><td><code>{table}</code></td><td class=\"n\">{:.1}</td><td>{result}</td></tr>\n",
                line.ms
            ));
        }
        page.push_str("</table>\n");
        page
    }
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compared::Equal { rows } => write!(f, "equal, {rows} rows"),
            Compared::Differs(difference) => write!(f, "DIFFERS: {difference}"),
            Compared::Busy { why } => write!(f, "busy: {why}"),
            Compared::NotCompared { why } => write!(f, "not compared: {why}"),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows on the source, {} on the target", self.source_rows, self.target_rows)?;
        for (at, row) in self.rows.iter().enumerate() {
            let how = match row.how {
                How::OnlyOnSource => "only on the source",
                How::OnlyOnTarget => "only on the target",
                How::Differs => "other values",
            };
            let before = if at == 0 { "; by " } else { ", " };
            let key = if at == 0 { format!("{} ", self.key.join(", ")) } else { String::new() };
            write!(f, "{before}{key}{} {how}", row.key)?;
        }
        match &self.note {
            Some(note) => write!(f, "; {note}"),
            None => Ok(()),
        }
    }
}

/// One line when all is equal, else a line for each table that is not.
impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.verdict())?;
        for line in self.tables.iter().filter(|line| !matches!(line.result, Compared::Equal { .. })) {
            writeln!(f, "  {}: {}", line.table, line.result)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(table: &str, result: Compared) -> TableLine {
        TableLine { table: table.to_owned(), result, ms: 1.0 }
    }

    fn different() -> Compared {
        let rows = vec![
            RowDifference { key: "(17)".to_owned(), how: How::Differs },
            RowDifference { key: "(18)".to_owned(), how: How::OnlyOnSource },
        ];
        let key = vec!["aid".to_owned()];
        Compared::Differs(Difference { source_rows: 3, target_rows: 2, key, rows, note: None })
    }

    #[test]
    fn one_line_when_all_is_equal_else_one_for_each_table_that_is_not() {
        let equal = line("public.a", Compared::Equal { rows: 7 });
        let mut told = Verification { tables: vec![equal.clone(), equal], ms: 1500.0, ..Verification::default() };
        assert_eq!(told.to_string(), "verified: 2 tables equal, 14 rows (1.5 s)\n");
        told.tables.push(line("public.u", Compared::NotCompared { why: "is unlogged".to_owned() }));
        assert!(
            told.to_string().contains("1 not compared") && told.to_string().contains("  public.u: not compared: is")
        );
        assert!(!told.differs());
        told.tables.push(line("public.b", different()));
        assert!(told.differs());
        let text = told.to_string();
        assert!(text.contains("DIFFER: 2 tables equal, 2 not"), "{text}");
        assert!(text.contains("by aid (17) other values, (18) only on the source"), "{text}");
    }

    #[test]
    fn what_was_not_compared_is_never_called_equal() {
        let none = Verification::none("proxyctl was away");
        assert_eq!(none.verdict(), "not verified: proxyctl was away");
        let only = Verification {
            tables: vec![line("public.u", Compared::NotCompared { why: "no time".to_owned() })],
            ..Verification::default()
        };
        assert!(only.verdict().starts_with("not verified: none of 1 tables"), "{}", only.verdict());
        assert_eq!(only.findings("f")[0].level, crate::finding::Level::Yellow);
    }

    #[test]
    fn it_is_read_back_from_the_observation_and_its_page_holds_no_markup_of_others() {
        let sequences = Some(SequencesLine { compared: 2, behind: vec!["public.s stands at 3".to_owned()] });
        let told = Verification { tables: vec![line("public.<b>", different())], sequences, ..Verification::default() };
        assert_eq!(Verification::of(&told.facts()), Some(told.clone()));
        assert!(told.html().contains("public.&lt;b&gt;") && !told.html().contains("<b>"));
        assert_eq!(told.findings("f").len(), 2);
    }
}
