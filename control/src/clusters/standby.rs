//! A physical standby as a target: how it follows, and its promotion.
//!
//! Invariant: a standby is promoted only where the standby itself finds the fence of this very epoch and no decision; what was
//! opened before the promotion is never decided after it on the promoted side (`pgcutover.bind`).

use std::time::Duration;

use pgcutover_api::store::{self, Turn};

use crate::clusters::{BadCell, Cells, Cluster, ClusterError, Clusters, Deadline, Lsn};

/// Everything of a standby that decides whether it can take over. pg_promote() comes with 12.
const STANDBY: &str = "SELECT pg_is_in_recovery() AS in_recovery, \
      CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END AS paused, pg_last_wal_replay_lsn() AS replayed, \
      coalesce((SELECT s.setting::bigint FROM pg_settings s WHERE s.name = 'recovery_min_apply_delay'), 0) AS delay_ms, \
      (SELECT p.oid IS NOT NULL AND has_function_privilege(p.oid, 'EXECUTE') FROM (SELECT \
        to_regprocedure('pg_catalog.pg_promote(boolean, integer)')) p (oid)) AS may_promote, \
      (SELECT count(*) FROM pg_stat_replication) AS followers, \
      r.status, r.slot_name, r.received_tli \
    FROM (SELECT) one LEFT JOIN pg_stat_wal_receiver r ON true";

/// Whether and how the standby is waited for by commits of its source, by the slot that it reads.
const SYNC_STATE: &str = "SELECT r.sync_state FROM pg_replication_slots s JOIN pg_stat_replication r ON r.pid = s.active_pid \
    WHERE s.slot_type = 'physical' AND s.slot_name = ";

/// Between two looks at a server that is being promoted.
const LOOK: Duration = Duration::from_millis(2);

/// A standby as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standby {
    /// Whether it is one, and how it replays.
    pub recovery: Recovery,
    /// How far it has replayed; none where nothing was ever replayed.
    pub replayed: Option<Lsn>,
    /// `recovery_min_apply_delay`, ms.
    pub delay_ms: u64,
    /// Whether our login may promote it; never before PostgreSQL 12.
    pub may_promote: bool,
    /// Standbys that follow it.
    pub followers: u32,
    /// What it receives by; none while nothing streams.
    pub receiver: Option<Receiver>,
}

/// Whether a server is in recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// It is a primary.
    Over,
    /// It replays.
    Replaying,
    /// Somebody has paused its replay.
    Paused,
}

/// A WAL receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receiver {
    /// `streaming`, or what else; none without pg_read_all_stats.
    pub status: Option<String>,
    /// The slot on its source; none if it has none.
    pub slot: Option<String>,
    /// The timeline that it receives.
    pub timeline: Option<u32>,
}

/// What a promotion took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promotion {
    /// From the order to the end of recovery.
    pub took: Duration,
}

impl Cluster {
    /// How it follows (target).
    pub async fn standby(&self, limit: Duration) -> Result<Standby, ClusterError> {
        self.one("standby", STANDBY, limit, standby).await
    }

    /// How far it has replayed (target).
    pub async fn replayed(&self, limit: Duration) -> Result<Option<Lsn>, ClusterError> {
        let sql = "SELECT pg_last_wal_replay_lsn() AS replayed";
        self.one("replayed position", sql, limit, |row| row.maybe_number("replayed")).await
    }

    /// How the reader of a physical slot stands with synchronous commits: `async`, `sync`, `quorum`, `potential`; none if
    /// nobody reads it (source).
    pub async fn sync_state(&self, slot: &str, limit: Duration) -> Result<Option<String>, ClusterError> {
        let sql = format!("{SYNC_STATE}{}", store::literal(slot));
        Ok(self.list("synchronous standby", &sql, limit, |row| row.text("sync_state")).await?.pop())
    }

    /// Ties the open epoch to the timeline of the server that opened it (source).
    pub async fn bind(&self, turn: &Turn, limit: Duration) -> Result<(), ClusterError> {
        self.ask("bind the epoch", &store::bind(turn), limit).await.map(drop)
    }

    /// Promotes it and waits for the end of recovery (target).
    pub async fn promote(&self, turn: &Turn, limit: Duration) -> Result<Promotion, ClusterError> {
        let deadline = Deadline::after(limit);
        if self.ask("promote", &store::promote(turn), deadline.left()).await?.rows.is_empty() {
            let problem =
                format!("does not promote: it is no standby, or it has not replayed the fence of {}", turn.claim);
            return Err(self.unreadable("promote", problem));
        }
        while self.is_in_recovery(deadline.left().max(LOOK)).await? {
            if deadline.is_over() {
                return Err(ClusterError::Deadline { role: self.role(), what: "promote", limit });
            }
            // reason: the end of recovery is told to nobody; asked again within the deadline.
            tokio::time::sleep(LOOK).await;
        }
        Ok(Promotion { took: deadline.elapsed() })
    }

    /// Whether it is a standby.
    pub async fn is_in_recovery(&self, limit: Duration) -> Result<bool, ClusterError> {
        self.one("recovery", "SELECT pg_is_in_recovery() AS yes", limit, |row| row.flag("yes")).await
    }
}

impl Clusters {
    /// Bytes of WAL that the source has written and the standby has not replayed.
    pub async fn standby_lag(&self, limit: Duration) -> Result<u64, ClusterError> {
        let sql = "SELECT pg_current_wal_lsn() AS at";
        // The standby first: a lag is never told too small.
        let replayed = self.target.replayed(limit).await?;
        let at: Lsn = self.source.one("position", sql, limit, |row| row.number("at")).await?;
        Ok(replayed.map_or(u64::MAX, |replayed| at.bytes_after(replayed)))
    }
}

fn standby(row: &Cells<'_>) -> Result<Standby, BadCell> {
    let recovery = match (row.flag("in_recovery")?, row.flag("paused")?) {
        (false, _) => Recovery::Over,
        (true, false) => Recovery::Replaying,
        (true, true) => Recovery::Paused,
    };
    let (status, timeline) = (row.maybe_text("status"), row.maybe_number("received_tli")?);
    let receiver = (status.is_some() || timeline.is_some()).then(|| Receiver {
        status,
        slot: row.maybe_text("slot_name"),
        timeline,
    });
    Ok(Standby {
        recovery,
        replayed: row.maybe_number("replayed")?,
        delay_ms: row.number("delay_ms")?,
        may_promote: row.flag("may_promote")?,
        followers: row.number("followers")?,
        receiver,
    })
}
