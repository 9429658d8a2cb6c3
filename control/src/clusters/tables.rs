//! The tables of a database: which have a gate, which lack one, and whether their definitions have changed.
//!
//! Invariant: the list of what needs a gate is made in one place, [`TABLES`].

use std::fmt;
use std::time::Duration;

use pgcutover_api::store::{self, Name};

use crate::clusters::{BadCell, Cells, Cluster, ClusterError, Deadline};

/// Every table of the user, parents and leaves, with its gate if it has one.
const TABLES: &str = "SELECT n.nspname, c.relname, c.relkind, c.relpersistence, c.relispartition, \
      (SELECT pn.nspname || '.' || pc.relname FROM pg_inherits i JOIN pg_class pc ON pc.oid = i.inhparent \
         JOIN pg_namespace pn ON pn.oid = pc.relnamespace WHERE i.inhrelid = c.oid AND c.relispartition LIMIT 1) AS parent, \
      c.relreplident = 'f' OR EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid \
         AND (c.relreplident = 'd' AND i.indisprimary OR c.relreplident = 'i' AND i.indisreplident)) AS identified, \
      CASE WHEN NOT pg_has_role(c.relowner, 'USAGE') THEN pg_get_userbyid(c.relowner) END AS other_owner, p.proname AS gate, t.tgenabled AS enabled \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname = 'pgcutover_gate' \
    LEFT JOIN pg_proc p ON p.oid = t.tgfoid \
    WHERE c.relkind IN ('r', 'p') AND c.relpersistence IN ('p', 'u') \
      AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pgcutover') \
    ORDER BY n.nspname, c.relname";

/// Any change of a definition changes this: rows of the catalogues with the transaction that wrote them. Not what VACUUM,
/// ANALYZE, TRUNCATE, REINDEX or our own flip write. A few milliseconds for thousands of columns.
const FINGERPRINT: &str = "WITH rel AS (SELECT c.oid, c.relname, n.nspname, c.relkind, c.relpersistence, c.relnatts, \
      c.relchecks, c.relreplident, c.relispartition, c.relrowsecurity, c.relowner FROM pg_class c \
      JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'c') \
      AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pgcutover')) \
    SELECT md5(coalesce(string_agg(u.line, ',' ORDER BY u.line COLLATE \"C\"), '')) AS hash FROM ( \
      SELECT rel::text AS line FROM rel \
      UNION ALL SELECT 'a' || a.attrelid || ' ' || a.attnum || ' ' || a.xmin FROM pg_attribute a JOIN rel ON rel.oid = a.attrelid \
        WHERE a.attnum > 0 \
      UNION ALL SELECT 'c' || k.oid || ' ' || k.xmin FROM pg_constraint k JOIN rel ON rel.oid = k.conrelid \
      UNION ALL SELECT 'i' || i.indexrelid || ' ' || i.xmin FROM pg_index i JOIN rel ON rel.oid = i.indrelid \
      UNION ALL SELECT 't' || t.oid || ' ' || t.xmin FROM pg_trigger t JOIN rel ON rel.oid = t.tgrelid) u";

/// One table of the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFacts {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// What it stores.
    pub kind: TableKind,
    /// The partitioned parent as `schema.name`, for a partition.
    pub parent: Option<String>,
    /// Whether UPDATE and DELETE can be replicated: replica identity full, an index, or a primary key.
    pub is_identified: bool,
    /// Its owner, if our login lacks that role's rights and so can't put an ENABLE ALWAYS trigger on it.
    pub other_owner: Option<String>,
    /// Its gate.
    pub gate: GateState,
}

impl TableFacts {
    /// `schema.name`, unquoted, for people and as a key.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

/// What a table stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// Rows that are replicated: a plain table or a leaf partition.
    Logged,
    /// Rows that are never replicated.
    Unlogged,
    /// Nothing: a partitioned parent.
    Parent,
}

/// The gate trigger of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GateState {
    /// There is none.
    Missing,
    /// It calls another function: another route's gate, or not ours.
    Other(String),
    /// It is there but `session_replication_role` or DISABLE TRIGGER passes it.
    Weak,
    /// It is there, always on, and the route's.
    Armed,
}

/// A table that has no proper gate, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ungated {
    /// `schema.name`.
    pub table: String,
    /// What is so, or the server's words.
    pub reason: String,
}

impl fmt::Display for Ungated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.table, self.reason)
    }
}

impl Cluster {
    /// Every table of the user with its gate for this route.
    pub async fn tables(&self, db: &Name, limit: Duration) -> Result<Vec<TableFacts>, ClusterError> {
        let mut tables = self.list("tables", TABLES, limit, table).await?;
        let own = format!("gate:{db}");
        for table in &mut tables {
            if let GateState::Other(function) = &table.gate
                && *function == own
            {
                table.gate = GateState::Armed;
            }
        }
        Ok(tables)
    }

    /// The tables that lack a proper gate. Empty is what S7 wants.
    pub async fn ungated(&self, db: &Name, limit: Duration) -> Result<Vec<Ungated>, ClusterError> {
        Ok(self.tables(db, limit).await?.iter().filter_map(TableFacts::ungated).collect())
    }

    /// Puts the gate on every table that lacks it: one short transaction each, those that are busy again and again until
    /// `limit`. What is left over is the answer.
    pub async fn arm_tables(&self, db: &Name, limit: Duration) -> Result<Vec<Ungated>, ClusterError> {
        let deadline = Deadline::after(limit);
        let mut todo: Vec<TableFacts> =
            self.tables(db, limit).await?.into_iter().filter(|table| table.gate != GateState::Armed).collect();
        loop {
            let mut left = Vec::new();
            let mut busy = Vec::new();
            for table in todo {
                match self.arm_table(db, &table, &deadline).await? {
                    Armed::Yes => {}
                    Armed::Busy(why) => busy.push((table, why)),
                    Armed::Never(ungated) => left.push(ungated),
                }
            }
            if !left.is_empty() || busy.is_empty() || deadline.is_over() {
                left.extend(busy.into_iter().map(|(table, reason)| Ungated { table: table.full_name(), reason }));
                return Ok(left);
            }
            todo = busy.into_iter().map(|(table, _)| table).collect();
        }
    }

    async fn arm_table(&self, db: &Name, table: &TableFacts, deadline: &Deadline) -> Result<Armed, ClusterError> {
        // The server gives up on the lock after 300 ms; a busy server may need longer to say so.
        let limit = deadline.left().max(Duration::from_millis(600));
        let error = match self.ask("arm a table", &store::arm_table(db, &table.schema, &table.name), limit).await {
            Ok(_) => return Ok(Armed::Yes),
            Err(error) => error,
        };
        let never = |reason: String| Armed::Never(Ungated { table: table.full_name(), reason });
        match (error.sqlstate(), &error) {
            (Some("55P03" | "40P01"), _) => {
                Ok(Armed::Busy("its lock could not be had in 300 ms: a writer holds it".to_owned()))
            }
            // Dropped since it was listed.
            (Some("42P01"), _) => Ok(Armed::Yes),
            (Some(_), ClusterError::Refused { message, .. }) => Ok(never(message.clone())),
            (Some(_) | None, _) => Err(error),
        }
    }

    /// Takes the route's gate off every table and drops it, unless it holds by a commit or an open epoch.
    pub async fn disarm(&self, db: &Name, limit: Duration) -> Result<Vec<Ungated>, ClusterError> {
        let deadline = Deadline::after(limit);
        let left = self.disarm_tables(db, limit).await?;
        if left.is_empty() {
            self.ask("disarm", &store::disarm(db), deadline.left().max(Duration::from_millis(300))).await?;
        }
        Ok(left)
    }

    /// The first half of that: no table has the gate any more. What is left over is the answer.
    pub async fn disarm_tables(&self, db: &Name, limit: Duration) -> Result<Vec<Ungated>, ClusterError> {
        let deadline = Deadline::after(limit);
        let mut left = Vec::new();
        for table in self.tables(db, limit).await? {
            if table.gate == GateState::Missing {
                continue;
            }
            let sql = store::disarm_table(db, &table.schema, &table.name);
            while let Err(error) = self.ask("disarm a table", &sql, deadline.left()).await {
                if error.sqlstate() != Some("55P03") {
                    return Err(error);
                }
                if deadline.is_over() {
                    left.push(Ungated { table: table.full_name(), reason: error.to_string() });
                    break;
                }
            }
        }
        Ok(left)
    }

    /// A hash that any DDL on the user's tables changes: for servers on which an event trigger may not be created.
    pub async fn fingerprint(&self, limit: Duration) -> Result<String, ClusterError> {
        self.one("catalogue fingerprint", FINGERPRINT, limit, |row| row.text("hash")).await
    }
}

enum Armed {
    Yes,
    Busy(String),
    Never(Ungated),
}

impl TableFacts {
    /// One of the schema `public` with nothing odd about it.
    #[cfg(test)]
    pub fn plain(name: &str, kind: TableKind, parent: Option<&str>) -> TableFacts {
        TableFacts {
            schema: "public".to_owned(),
            name: name.to_owned(),
            kind,
            parent: parent.map(str::to_owned),
            is_identified: true,
            other_owner: None,
            gate: GateState::Armed,
        }
    }

    /// What is wrong with its gate, if anything.
    pub fn ungated(&self) -> Option<Ungated> {
        let reason = match &self.gate {
            GateState::Armed => return None,
            GateState::Missing => "has no gate".to_owned(),
            GateState::Other(function) => format!("has the gate function {function}, which is not this route's"),
            GateState::Weak => "its gate is not ENABLE ALWAYS".to_owned(),
        };
        Some(Ungated { table: self.full_name(), reason })
    }
}

fn table(row: &Cells<'_>) -> Result<TableFacts, BadCell> {
    let gate = match (row.maybe("gate"), row.maybe("enabled")) {
        (None, _) => GateState::Missing,
        (Some(_), enabled) if enabled != Some("A") => GateState::Weak,
        (Some(function), _) => GateState::Other(function.to_owned()),
    };
    Ok(TableFacts {
        schema: row.text("nspname")?,
        name: row.text("relname")?,
        kind: match (row.maybe("relkind"), row.maybe("relpersistence")) {
            (Some("p"), _) => TableKind::Parent,
            (_, Some("u")) => TableKind::Unlogged,
            (_, _) => TableKind::Logged,
        },
        parent: row.maybe_text("parent"),
        is_identified: row.flag("identified")?,
        other_owner: row.maybe_text("other_owner"),
        gate,
    })
}
