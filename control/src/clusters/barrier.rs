//! R5: after the flip, the writers that had passed the gate before it must have ended.
//!
//! Invariant: what is counted is locks, of every session whatever its user, address or kind, then prepared transactions;
//! never rows of pg_stat_activity, which hides writers from whoever lacks rights.

use std::fmt;
use std::time::Duration;

use crate::clusters::{BadCell, Cells, Cluster, ClusterError, Deadline, Lsn};

/// Writers by their locks on gated tables. Waiting ones count too: DDL that waits has passed the event trigger already.
/// Only apply workers are excepted; where their kind can't be read they count, which errs on the safe side.
const WRITERS: &str = "SELECT l.pid, l.mode, l.granted, n.nspname, c.relname, a.usename, a.application_name, \
      host(a.client_addr) AS client_addr, a.backend_type, left(a.query, 200) AS query, \
      (extract(epoch FROM clock_timestamp() - a.xact_start) * 1000)::bigint AS age_ms \
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace \
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'relation' AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) \
      AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') \
      AND l.pid IS DISTINCT FROM pg_backend_pid() \
      AND EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = l.relation AND t.tgname = 'pgcutover_gate') \
      AND NOT coalesce(a.backend_type LIKE 'logical replication%', false) \
    ORDER BY l.pid, n.nspname, c.relname LIMIT 100";

const PREPARED: &str = "SELECT p.gid, p.owner, (extract(epoch FROM clock_timestamp() - p.prepared) * 1000)::bigint AS age_ms \
    FROM pg_prepared_xacts p WHERE p.database = current_database() ORDER BY p.prepared LIMIT 100";

/// The position behind the flip, which is on disk; it comes with the first look.
const POSITION: &str = "SELECT pg_current_wal_flush_lsn() AS position";

/// How often the locks are looked at: a look costs a fraction of this.
const EVERY: Duration = Duration::from_millis(1);

/// A session that holds, or waits for, a writer's lock on a gated table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writer {
    /// Its server process; none for a prepared transaction.
    pub pid: Option<i32>,
    /// The table as `schema.name`.
    pub table: String,
    /// The lock mode, and whether it is waited for.
    pub lock: String,
    /// User, application and address, as far as our login may see them.
    pub who: String,
    /// Age of its transaction, ms.
    pub age_ms: Option<i64>,
    /// The beginning of its statement.
    pub query: Option<String>,
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "pid {pid} ({})", self.who)?,
            None => write!(f, "a prepared transaction")?,
        }
        write!(f, ", {} on {}", self.lock, self.table)?;
        if let Some(age_ms) = self.age_ms {
            write!(f, ", transaction {age_ms} ms old")?;
        }
        Ok(())
    }
}

/// A transaction that waits for its second phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedTransaction {
    /// Its global identifier.
    pub gid: String,
    /// Who prepared it.
    pub owner: String,
    /// How long ago, ms.
    pub age_ms: i64,
}

/// The barrier is behind us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// How long writers were waited for.
    pub waited: Duration,
    /// The source's position when the fence was up.
    pub position: Lsn,
}

/// Why the barrier was not passed.
#[derive(Debug, thiserror::Error)]
pub enum BarrierError {
    /// Writers that did not end in time.
    #[error("writers that passed the gate before the fence did not end within {limit:?}: {}", listed(.writers))]
    Writers {
        /// How long was waited.
        limit: Duration,
        /// Those of the last look.
        writers: Vec<Writer>,
    },
    /// Prepared transactions: they can be committed at any time, and pass every gate.
    #[error("prepared transactions: {}", .0.iter().map(|p| p.gid.as_str()).collect::<Vec<_>>().join(", "))]
    Prepared(Vec<PreparedTransaction>),
    /// The source did not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

fn listed(writers: &[Writer]) -> String {
    writers.iter().map(Writer::to_string).collect::<Vec<_>>().join("; ")
}

impl Cluster {
    /// Waits until no other session has a writer's lock on a gated table, then demands that no transaction is prepared.
    /// Call it after the flip is acknowledged.
    pub async fn barrier(&self, limit: Duration) -> Result<Passed, BarrierError> {
        let deadline = Deadline::after(limit);
        let (position, mut writers) = self.first_look(deadline.left().max(EVERY * 100)).await?;
        loop {
            let prepared_only = writers.iter().all(|writer| writer.pid.is_none());
            if prepared_only {
                let prepared = self.prepared_transactions(deadline.left().max(EVERY * 100)).await?;
                if !prepared.is_empty() {
                    return Err(BarrierError::Prepared(prepared));
                }
            }
            if writers.is_empty() {
                return Ok(Passed { waited: deadline.elapsed(), position });
            }
            if deadline.is_over() {
                return Err(BarrierError::Writers { limit, writers });
            }
            // reason: pg_locks tells nobody when it changes; asked again within the deadline.
            tokio::time::sleep(EVERY).await;
            // One more look is always taken, however late it is.
            writers = self.writers(deadline.left().max(EVERY * 100)).await?;
        }
    }

    async fn first_look(&self, limit: Duration) -> Result<(Lsn, Vec<Writer>), ClusterError> {
        const WHAT: &str = "barrier";
        let answer = self.ask(WHAT, &format!("{POSITION}; {WRITERS}"), limit).await?;
        let mut rows = answer.rows.iter().map(Cells);
        let first = rows.next().ok_or_else(|| self.unreadable(WHAT, "no row came"))?;
        let position = first.number("position").map_err(|problem| self.unreadable(WHAT, problem))?;
        let writers = rows.map(|row| writer(&row)).collect::<Result<_, BadCell>>();
        Ok((position, writers.map_err(|problem| self.unreadable(WHAT, problem))?))
    }

    /// Who has a writer's lock on a gated table now.
    pub async fn writers(&self, limit: Duration) -> Result<Vec<Writer>, ClusterError> {
        self.list("barrier", WRITERS, limit, writer).await
    }

    /// The prepared transactions of this database.
    pub async fn prepared_transactions(&self, limit: Duration) -> Result<Vec<PreparedTransaction>, ClusterError> {
        self.list("prepared transactions", PREPARED, limit, prepared).await
    }
}

fn writer(row: &Cells<'_>) -> Result<Writer, BadCell> {
    let lock = row.text("mode")?;
    let who: Vec<String> = ["usename", "application_name", "client_addr", "backend_type"]
        .into_iter()
        .filter_map(|column| row.maybe_text(column))
        .filter(|text| !text.is_empty())
        .collect();
    Ok(Writer {
        pid: row.maybe_number("pid")?,
        table: format!("{}.{}", row.text("nspname")?, row.text("relname")?),
        lock: if row.flag("granted")? { lock } else { format!("{lock} (waiting)") },
        who: if who.is_empty() { "may not be seen by our login".to_owned() } else { who.join(", ") },
        age_ms: row.maybe_number("age_ms")?,
        query: row.maybe_text("query"),
    })
}

fn prepared(row: &Cells<'_>) -> Result<PreparedTransaction, BadCell> {
    Ok(PreparedTransaction { gid: row.text("gid")?, owner: row.text("owner")?, age_ms: row.number("age_ms")? })
}
