//! What careful people do by hand when a database moves by logical replication, whatever holds its clients meanwhile.
//!
//! Kind to whoever writes such scripts: connections are open before anybody is held, replies are awaited on them every 20 ms,
//! and "caught up" means applied (`replay_lsn`), not yet flushed: setting the sequences flushes it.
//!
//! Invariant: once [`Script::caught_up`] returns, whatever the source acknowledged to a client is on the target.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::client::Client;
use crate::control::StepTime;
use crate::pair::{APP, DATABASE, OTHER, Pair, SUBSCRIPTION};

/// Nobody would hold clients longer for one of these.
const STEP_LIMIT: Duration = Duration::from_secs(30);

/// Values left out on the target, as proxyctl does by default.
const GAP: u32 = 1000;

/// Two open connections and a watch.
pub(super) struct Script {
    source: Client,
    target: Client,
    began: Instant,
    last: Instant,
    parts: Vec<StepTime>,
}

impl Script {
    /// Connects, and waits until the target follows closely: nobody is held yet.
    pub(super) async fn ready(pair: &Pair) -> Result<Script> {
        let (source, target) = tokio::try_join!(pair.source.superuser(DATABASE), pair.target.superuser(DATABASE))?;
        source
            .until(&follows("pg_current_wal_lsn()", 1 << 20), STEP_LIMIT)
            .await
            .context("the target does not keep up")?;
        let now = Instant::now();
        Ok(Script { source, target, began: now, last: now, parts: Vec::new() })
    }

    /// From now on clients wait.
    pub(super) fn begin(&mut self) {
        self.began = Instant::now();
        self.last = self.began;
    }

    /// A part of the work is done.
    pub(super) fn done(&mut self, name: &str) {
        let ms = self.last.elapsed().as_secs_f64() * 1e3;
        self.parts.push(StepTime { name: name.to_owned(), ms });
        self.last = Instant::now();
    }

    /// How long clients waited for it all, and for each part.
    pub(super) fn end(self) -> (f64, Vec<StepTime>) {
        (self.last.duration_since(self.began).as_secs_f64() * 1e3, self.parts)
    }

    /// New transactions on the source only read, and every session of an application that began before is ended.
    pub(super) async fn read_only(&mut self) -> Result<()> {
        self.source.run("ALTER SYSTEM SET default_transaction_read_only = on").await?;
        self.source.run("SELECT pg_reload_conf()").await?;
        // The postmaster reads the file before it tells our session to: what connects later has it as well.
        self.source.until("SELECT current_setting('default_transaction_read_only') = 'on'", STEP_LIMIT).await?;
        let now = self.source.text("SELECT clock_timestamp()").await?.context("no time")?;
        let sessions = format!("pg_stat_activity WHERE usename IN ('{APP}', '{OTHER}') AND backend_start < '{now}'");
        self.source.run(&format!("SELECT pg_terminate_backend(pid) FROM {sessions}")).await?;
        self.source.until(&format!("SELECT count(*) = 0 FROM {sessions}"), STEP_LIMIT).await?;
        self.done("read only");
        Ok(())
    }

    /// The target has applied all there is.
    pub(super) async fn caught_up(&mut self) -> Result<()> {
        let position = self.source.text("SELECT pg_current_wal_lsn()").await?.context("no WAL position")?;
        let reached = follows(&format!("'{position}'"), 0);
        self.source.until(&reached, STEP_LIMIT).await.context("the target does not catch up")?;
        self.done("caught up");
        Ok(())
    }

    /// Sets every sequence of the target beyond the source's; the commit flushes all that was applied before.
    pub(super) async fn sequences(&mut self) -> Result<()> {
        let calls = format!(
            "SELECT string_agg(format('SELECT setval(%L, %s)', format('%I.%I', schemaname, sequencename),
                    last_value + {GAP} * increment_by), '; ')
               FROM pg_sequences WHERE last_value IS NOT NULL"
        );
        let calls = self.source.text(&calls).await?.unwrap_or_default();
        self.target.run(&calls).await?;
        self.done("sequences");
        Ok(())
    }
}

/// Whether the target's apply has come within so many bytes of a position of the source.
fn follows(position: &str, bytes: u32) -> String {
    format!(
        "SELECT {position}::pg_lsn - replay_lsn <= {bytes} FROM pg_stat_replication WHERE application_name = '{SUBSCRIPTION}'"
    )
}
