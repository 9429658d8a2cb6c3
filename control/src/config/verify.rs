//! `[verify]`: whether both servers are compared at the moment at which a run has made them equal.
//!
//! Invariant: however much there is to compare, the snapshots are let go after `time_max`.

use std::time::Duration;

use crate::config::section::{Checked, Section, wrong};

/// Whether and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verify {
    /// If so, `cutover`, `rollback` and `rehearse` compare whole tables after clients were let go.
    pub enabled: bool,
    /// After this what is left is not compared. So long VACUUM keeps dead rows on both servers.
    pub time_max: Duration,
}

/// PostgreSQL's timeouts are 31-bit milliseconds; nobody wants a snapshot of more than a day.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Reads the section. On unless it says otherwise: nobody waits for it, and who looks later has no moment to compare at.
pub(super) fn verify(section: Option<Section>) -> Checked<Verify> {
    let default = Verify { enabled: true, time_max: Duration::from_secs(600) };
    let Some(mut section) = section else { return Ok(default) };
    let verify = Verify {
        enabled: section.flag("enabled")?.unwrap_or(default.enabled),
        time_max: section.duration("time_max")?.unwrap_or(default.time_max),
    };
    if verify.time_max.is_zero() || verify.time_max > LONGEST {
        return Err(wrong(section.key("time_max"), "must be more than nothing and at most a day"));
    }
    section.finish()?;
    Ok(verify)
}
