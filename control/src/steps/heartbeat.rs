//! A row of ours that changes ten times a second on the source: how long it takes to arrive predicts the catch-up.
//!
//! Invariant: harmless to stop at any moment; ends when dropped.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pgcutover_api::store::Name;

use crate::clusters::{Cluster, Clusters};
use crate::steps::curve::{Curve, Point};

/// Between two beats.
const EVERY: Duration = Duration::from_millis(100);
/// Between two looks at the target; the resolution of what is measured.
const LOOK: Duration = Duration::from_millis(2);
/// A beat that takes longer is told as having taken this long.
const TRAVEL_MAX: Duration = Duration::from_secs(5);
/// Travels that are remembered: the last three seconds.
const REMEMBERED: usize = 30;

/// The beating, and what it measured.
#[derive(Debug)]
pub struct Heartbeat {
    task: tokio::task::JoinHandle<()>,
    travels: Arc<Mutex<VecDeque<Duration>>>,
    heard: Arc<Mutex<Instant>>,
}

impl Heartbeat {
    /// Begins, on connections of its own; each travel is a point of the curve.
    pub fn start(clusters: &Clusters, database: &Name, curve: Arc<Mutex<Curve>>) -> Heartbeat {
        let travels = Arc::new(Mutex::new(VecDeque::new()));
        let heard = Arc::new(Mutex::new(Instant::now()));
        let beater = Beater {
            source: clusters.source.another(),
            target: clusters.target.another(),
            database: database.clone(),
            travels: travels.clone(),
            heard: heard.clone(),
            curve,
        };
        Heartbeat { task: tokio::spawn(beater.run()), travels, heard }
    }

    /// How long no beat has arrived; those under way count from here too, so one that is missing shows at once.
    pub fn silence(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// The longest of the last travels, once there are `least`.
    pub fn travel_max(&self, least: usize) -> Option<Duration> {
        let travels = self.travels.lock().unwrap_or_else(PoisonError::into_inner);
        if travels.len() < least { None } else { travels.iter().max().copied() }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Beater {
    source: Cluster,
    target: Cluster,
    database: Name,
    travels: Arc<Mutex<VecDeque<Duration>>>,
    heard: Arc<Mutex<Instant>>,
    curve: Arc<Mutex<Curve>>,
}

impl Beater {
    /// Ends when its `Heartbeat` is dropped.
    async fn run(self) {
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Microseconds since 1970: greater than any beat of an earlier run.
        let mut n = i64::try_from(now_us()).unwrap_or_default();
        loop {
            tick.tick().await;
            n += 1;
            let at_us = now_us();
            let travel = self.travel(n).await;
            // A beat that was never sent says nothing of replication.
            if let Some(travel) = travel {
                let lag_us = u64::try_from(travel.as_micros()).unwrap_or(u64::MAX);
                self.curve.lock().unwrap_or_else(PoisonError::into_inner).push(Point { at_us, lag_us });
            }
            let mut travels = self.travels.lock().unwrap_or_else(PoisonError::into_inner);
            travels.push_back(travel.unwrap_or(TRAVEL_MAX));
            if travels.len() > REMEMBERED {
                travels.pop_front();
            }
        }
    }

    /// How long a beat took to arrive; `None` if the source did not take it.
    async fn travel(&self, n: i64) -> Option<Duration> {
        let sent = Instant::now();
        if self.source.beat(&self.database, n, TRAVEL_MAX).await.is_err() {
            return None;
        }
        while sent.elapsed() < TRAVEL_MAX {
            if matches!(self.target.heard(&self.database, TRAVEL_MAX).await, Ok(Some(heard)) if heard >= n) {
                *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                return Some(sent.elapsed());
            }
            // reason: the target tells nobody that the beat has arrived; looked at again within TRAVEL_MAX.
            tokio::time::sleep(LOOK).await;
        }
        Some(TRAVEL_MAX)
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
