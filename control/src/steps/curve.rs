//! The lag of replication over time, in as few points as a picture needs.
//!
//! Invariant: bounded, however long a run takes; of beats that share a point the latest arrival is the one that is kept.

/// More than a screen has pixels to show, and some kilobytes of journal.
const POINTS_MAX: usize = 300;

/// Beats by when they were sent.
#[derive(Debug, Default)]
pub struct Curve {
    points: Vec<Point>,
    /// Beats to a full point, as a power of two.
    doublings: u32,
    /// Beats in the last point.
    gathered: u32,
    beats: u64,
}

/// One or more beats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// When the latest of them was sent, microseconds since 1970.
    pub at_us: u64,
    /// How long the slowest took to arrive.
    pub lag_us: u64,
}

impl Point {
    fn with(self, other: Point) -> Point {
        Point { at_us: self.at_us.max(other.at_us), lag_us: self.lag_us.max(other.lag_us) }
    }
}

impl Curve {
    /// One more beat.
    pub fn push(&mut self, beat: Point) {
        self.beats += 1;
        if let Some(last) = self.points.last_mut().filter(|_| self.gathered < 1 << self.doublings) {
            *last = last.with(beat);
            self.gathered += 1;
            return;
        }
        if self.points.len() == POINTS_MAX {
            let halved = self.points.chunks(2).map(|pair| pair.iter().copied().reduce(Point::with).unwrap_or(pair[0]));
            self.points = halved.collect();
            self.doublings += 1;
        }
        self.points.push(beat);
        self.gathered = 1;
    }

    /// The points so far, and how many beats they stand for.
    pub fn points(&self) -> (&[Point], u64) {
        (&self.points, self.beats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_of_beats_is_a_few_hundred_points_in_order_and_loses_no_peak() {
        let mut curve = Curve::default();
        let beat = |n: u64| Point { at_us: n * 100_000, lag_us: if n == 17_003 { 900_000 } else { 3_000 + n % 7 } };
        for n in 0..36_000 {
            curve.push(beat(n));
            assert!(curve.points().0.len() <= POINTS_MAX);
        }
        let (points, beats) = curve.points();
        assert!(points.len() > POINTS_MAX / 4, "{}", points.len());
        assert!(points.is_sorted_by_key(|point| point.at_us));
        assert_eq!((points.last().unwrap().at_us, beats), (3_599_900_000, 36_000));
        let peak = points.iter().find(|point| point.lag_us == 900_000).unwrap();
        assert!(peak.at_us.abs_diff(1_700_300_000) < 30_000_000, "{peak:?}");
    }

    #[test]
    fn few_beats_are_all_there() {
        let mut curve = Curve::default();
        (0..40).for_each(|n| curve.push(Point { at_us: n, lag_us: n }));
        assert_eq!(curve.points().0.len(), 40);
    }
}
