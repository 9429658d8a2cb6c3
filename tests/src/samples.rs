//! What a client waited, and what of it was stall.
//!
//! A stall is the longest time from sending a statement (open loop: from when it was to be sent) to its answer, less
//! the client's own median.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Microseconds since 1970, the clock of journals and samples.
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Did the statement only read?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A statement outside a writing transaction that changes nothing.
    Read,
    /// Any statement of a writing transaction.
    Write,
}

/// One statement's wait.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When it was sent, or (open loop) was to be sent.
    pub at_us: i64,
    /// Until its answer.
    pub latency_us: u64,
    /// Read or write.
    pub kind: Kind,
}

/// All waits of one client.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    all: Vec<Sample>,
}

impl Samples {
    /// Adds one.
    pub fn add(&mut self, at_us: i64, latency: Duration, kind: Kind) {
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.all.push(Sample { at_us, latency_us, kind });
    }

    /// All of them, in the order of their answers.
    pub fn all(&self) -> &[Sample] {
        &self.all
    }

    /// The middle one of the waits of this kind (all kinds: `None`); 0 without any.
    pub fn median_us(&self, kind: Option<Kind>) -> u64 {
        let mut waits: Vec<u64> =
            self.all.iter().filter(|one| kind.is_none_or(|kind| one.kind == kind)).map(|one| one.latency_us).collect();
        waits.sort_unstable();
        quantile(&waits, 0.5)
    }

    /// The longest wait that began within `window` (µs since 1970), less the median over all; `None` if there was no
    /// statement of this kind in it.
    pub fn stall_us(&self, kind: Option<Kind>, window: (i64, i64)) -> Option<u64> {
        let within = self.all.iter().filter(|one| (window.0..=window.1).contains(&one.at_us));
        let longest = within.filter(|one| kind.is_none_or(|kind| one.kind == kind)).map(|one| one.latency_us).max()?;
        Some(longest.saturating_sub(self.median_us(kind)))
    }
}

/// The window that holds every sample.
pub const ALWAYS: (i64, i64) = (i64::MIN, i64::MAX);

/// The stalls of many clients: quantiles over the clients, each with its longest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Stalls {
    /// Half of the clients stalled no longer.
    pub p50: f64,
    /// 99 of 100 clients stalled no longer.
    pub p99: f64,
    /// The longest stall of all.
    pub max: f64,
}

impl Stalls {
    /// Of these clients, in milliseconds.
    pub fn over<'a>(clients: impl IntoIterator<Item = &'a Samples>, kind: Option<Kind>, window: (i64, i64)) -> Stalls {
        Stalls::of_us(clients.into_iter().filter_map(|one| one.stall_us(kind, window)).collect())
    }

    /// Of these, given in milliseconds.
    pub fn of_ms(stalls: impl Iterator<Item = f64>) -> Stalls {
        let us = |ms: f64| u64::try_from(Duration::from_secs_f64(ms.max(0.0) / 1e3).as_micros()).unwrap_or(u64::MAX);
        Stalls::of_us(stalls.map(us).collect())
    }

    /// Of these, given in microseconds.
    pub fn of_us(mut stalls: Vec<u64>) -> Stalls {
        stalls.sort_unstable();
        let ms = |quantile_us: u64| Duration::from_micros(quantile_us).as_secs_f64() * 1e3;
        Stalls { p50: ms(quantile(&stalls, 0.5)), p99: ms(quantile(&stalls, 0.99)), max: ms(quantile(&stalls, 1.0)) }
    }
}

/// Lines `client,at_us,stall_us` for proxyctl's report: of each client the longest wait of every 50 ms, less its median.
pub fn csv<'a>(clients: impl IntoIterator<Item = (i32, &'a Samples)>) -> String {
    const SLOT_US: i64 = 50_000;
    let mut text = String::from("client,at_us,stall_us\n");
    for (client, samples) in clients {
        let median_us = samples.median_us(None);
        let mut slots = std::collections::BTreeMap::new();
        for sample in samples.all() {
            let longest = slots.entry(sample.at_us / SLOT_US).or_insert(*sample);
            if sample.latency_us > longest.latency_us {
                *longest = *sample;
            }
        }
        for sample in slots.values() {
            let stall_us = sample.latency_us.saturating_sub(median_us);
            // Writing to a String does not fail.
            let _ = writeln!(text, "{client},{},{stall_us}", sample.at_us);
        }
    }
    text
}

/// Nearest rank; 0 without values.
fn quantile(sorted: &[u64], q: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a rank")]
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_the_longest_wait_less_the_median() {
        let mut samples = Samples::default();
        for (at, ms) in [(1, 2), (2, 2), (3, 90), (4, 3), (5, 2)] {
            samples.add(at, Duration::from_millis(ms), Kind::Write);
        }
        assert_eq!(samples.stall_us(None, ALWAYS), Some(88_000));
        assert_eq!(samples.stall_us(None, (4, 9)), Some(1_000));
        assert_eq!(samples.stall_us(Some(Kind::Read), ALWAYS), None);
        let other = Samples::default();
        let stalls = Stalls::over([&samples, &other], None, ALWAYS);
        assert_eq!((stalls.p50, stalls.max), (88.0, 88.0));
    }
}
