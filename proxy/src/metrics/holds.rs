//! How long one pause held its clients.
//!
//! Invariant: its size is fixed, and nobody waits for it: clients that are let go by the thousand only add to counters.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// From 4 µs to a minute, four to an octave: a figure is told to within an eighth, and longer holds than a minute are none
/// (`hold_budget`).
const BUCKETS: usize = 96;
const SHORTEST_US: u64 = 4;
const LONGEST_US: u64 = (1 << 26) - 1;

/// Holds by their length.
#[derive(Debug)]
pub struct Holds {
    buckets: [AtomicU32; BUCKETS],
    longest_us: AtomicU64,
}

/// What became of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Felt {
    /// How many there were.
    pub count: u32,
    /// Half of them were no longer than this, to within an eighth.
    pub p50: Duration,
    /// The longest.
    pub longest: Duration,
}

impl Default for Holds {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| AtomicU32::new(0)), longest_us: AtomicU64::new(0) }
    }
}

impl Holds {
    /// A client was held for so long, from its statement's arrival on.
    pub fn observe(&self, held: Duration) {
        let held_us = u64::try_from(held.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(held_us)].fetch_add(1, Relaxed);
        self.longest_us.fetch_max(held_us, Relaxed);
    }

    /// What they were so far; nothing if nobody was held.
    #[must_use]
    pub fn felt(&self) -> Option<Felt> {
        let buckets = self.buckets.each_ref().map(|bucket| bucket.load(Relaxed));
        let count = buckets.iter().fold(0_u32, |sum, bucket| sum.saturating_add(*bucket));
        let mut up_to = 0_u32;
        let at = buckets.iter().position(|bucket| {
            up_to = up_to.saturating_add(*bucket);
            up_to > 0 && up_to >= count.div_ceil(2)
        })?;
        let longest_us = self.longest_us.load(Relaxed);
        let p50 = Duration::from_micros(middle_us(at).min(longest_us));
        Some(Felt { count, p50, longest: Duration::from_micros(longest_us) })
    }
}

fn bucket(held_us: u64) -> usize {
    let held_us = held_us.clamp(SHORTEST_US, LONGEST_US);
    let octave = held_us.ilog2() - SHORTEST_US.ilog2();
    // The two bits below the highest one.
    let quarter = (held_us >> octave) % 4;
    octave as usize * 4 + quarter as usize
}

fn middle_us(bucket: usize) -> u64 {
    let (octave, quarter) = (bucket / 4, bucket as u64 % 4);
    let width_us = 1 << octave;
    (4 + quarter) * width_us + width_us / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_holds_are_no_longer_than_the_median_and_none_than_the_longest() {
        let holds = Holds::default();
        assert_eq!(holds.felt(), None);
        for ms in [3, 40, 41, 42, 180] {
            holds.observe(Duration::from_millis(ms));
        }
        let felt = holds.felt().unwrap();
        assert_eq!((felt.count, felt.longest), (5, Duration::from_millis(180)));
        assert!(felt.p50.abs_diff(Duration::from_millis(41)) < Duration::from_millis(6), "{felt:?}");
    }

    #[test]
    fn every_length_has_a_bucket_whose_middle_is_within_an_eighth() {
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS - 1));
        for held_us in (0..26).flat_map(|bit| [1_u64 << bit, 3 << bit]).filter(|us| (8..LONGEST_US).contains(us)) {
            let middle_us = middle_us(bucket(held_us));
            assert!(middle_us.abs_diff(held_us) * 8 <= held_us, "{held_us}: {middle_us}");
        }
    }
}
