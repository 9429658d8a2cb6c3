//! One connection that holds one snapshot of a server and answers questions about whole tables as they were then.
//!
//! Invariant: it only reads; a lock on a table lasts no longer than the question about it; the server ends the transaction by
//! itself when its client is gone or asks nothing any more. Everything that changes how a value prints is set the same everywhere.

use std::time::Duration;

use tokio_postgres::Client;

use crate::clusters::{Answer, BadCell, Cells, Cluster, ClusterError, Decode, Role, collect, refusal};
use crate::dial;

/// What these connections call themselves: their transactions hold no row and stand in nobody's way, so looks for old
/// transactions leave them out (by this name, see `calm` and preflight).
pub const VERIFIER: &str = "proxyctl verify";

/// How long one waits for a table that DDL holds. Whoever comes after us in that queue waits too.
const LOCK_MAX: Duration = Duration::from_secs(2);
/// What the server answers at once if it lives.
const SOON: Duration = Duration::from_secs(5);

/// 14 and later notice within this time that their client is gone, others when they next speak to it.
const NOTICED: &str =
    "SELECT set_config(s.name, '5s', false) FROM pg_settings s WHERE s.name = 'client_connection_check_interval'";

const PIN: &str = "BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1 AS pinned";

/// A connection for one snapshot.
#[derive(Debug)]
pub struct Pin {
    role: Role,
    client: Client,
    /// Its server process.
    pub pid: i32,
    /// `server_version_num`.
    pub version_num: u32,
    /// `server_encoding`.
    pub encoding: String,
}

impl Cluster {
    /// Connects, so that pinning takes one round trip. The server ends a pin about which nobody has asked anything for `idle`.
    pub async fn pin_ahead(&self, idle: Duration) -> Result<Pin, ClusterError> {
        const WHAT: &str = "connect for a pin";
        let client = self.dial().await?;
        let settings = format!(
            "SET application_name = '{VERIFIER}'; SET DateStyle = 'ISO, YMD'; SET IntervalStyle = 'postgres'; \
             SET TimeZone = 'UTC'; SET extra_float_digits = 3; SET bytea_output = 'hex'; SET lc_monetary = 'C'; \
             SET quote_all_identifiers = off; SET max_parallel_workers_per_gather = 0; SET jit = off; \
             SET lock_timeout = {}; SET idle_in_transaction_session_timeout = {}; {NOTICED}; \
             SELECT pg_backend_pid() AS pid, current_setting('server_version_num') AS version, \
               current_setting('server_encoding') AS encoding",
            LOCK_MAX.as_millis(),
            idle.as_millis()
        );
        let role = self.role;
        let answer = said(role, &client, WHAT, &settings, SOON).await?;
        let row = answer.rows.last().ok_or_else(|| self.unreadable(WHAT, "no row came"))?;
        let read = |row: &Cells<'_>| Ok((row.number("pid")?, row.number("version")?, row.text("encoding")?));
        let (pid, version_num, encoding) =
            read(&Cells(row)).map_err(|problem: BadCell| self.unreadable(WHAT, problem))?;
        Ok(Pin { role, client, pid, version_num, encoding })
    }

    /// Ends a pin whose question is still under way.
    pub async fn end_pin(&self, pid: i32, limit: Duration) -> Result<(), ClusterError> {
        let sql = format!("SELECT pg_terminate_backend({pid})");
        self.ask("end a pin", &sql, limit).await.map(drop)
    }
}

impl Pin {
    /// Takes the snapshot: one round trip.
    pub async fn take(&self, limit: Duration) -> Result<(), ClusterError> {
        said(self.role, &self.client, "pin a snapshot", PIN, limit).await.map(drop)
    }

    /// Lets the snapshot go; another one may be taken.
    pub async fn release(&self) -> Result<(), ClusterError> {
        said(self.role, &self.client, "let a pin go", "ROLLBACK", SOON).await.map(drop)
    }

    /// One answer of the snapshot; the server gives up after `limit`. The snapshot outlives an error, the locks do not
    /// outlive the answer. A dropped call leaves its question under way: the pin is of no use any more, see
    /// [`Cluster::end_pin`].
    pub async fn ask(&self, what: &'static str, sql: &str, limit: Duration) -> Result<Answer, ClusterError> {
        // By itself: where a message holds several statements, the time of the later ones began with the first.
        let open = format!("SET LOCAL statement_timeout = {}; SAVEPOINT question", limit.as_millis().max(1));
        said(self.role, &self.client, what, &open, SOON).await?;
        let answer = said(self.role, &self.client, what, sql, limit + SOON).await;
        if answer.as_ref().is_err_and(ClusterError::is_absence) {
            return answer;
        }
        let close = "ROLLBACK TO SAVEPOINT question; RELEASE SAVEPOINT question";
        said(self.role, &self.client, what, close, SOON).await?;
        answer
    }

    /// Every row of an answer, decoded.
    pub(crate) async fn list<T>(
        &self,
        what: &'static str,
        sql: &str,
        limit: Duration,
        decode: Decode<T>,
    ) -> Result<Vec<T>, ClusterError> {
        self.ask(what, sql, limit).await?.decoded(self.role, what, decode)
    }
}

async fn said(
    role: Role,
    client: &Client,
    what: &'static str,
    sql: &str,
    limit: Duration,
) -> Result<Answer, ClusterError> {
    match tokio::time::timeout(limit, client.simple_query(sql)).await {
        Ok(Ok(messages)) => Ok(collect(messages)),
        Ok(Err(error)) => Err(refusal(role, what, &error).unwrap_or_else(|| ClusterError::Lost {
            role,
            what,
            message: dial::words(&error),
        })),
        Err(_) => Err(ClusterError::Deadline { role, what, limit }),
    }
}
