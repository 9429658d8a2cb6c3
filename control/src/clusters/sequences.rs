//! Sequences, which logical replication does not carry: read on the source, set with a gap on the target, compared.
//!
//! Invariant: a sequence whose position our login may not read is never taken for one that was never used.

use std::time::Duration;

use pgcutover_api::store::{self, Name, Turn, identifier, literal};

use crate::clusters::{BadCell, Cells, Cluster, ClusterError};

/// Every sequence of the user: owned, identity and un-owned alike.
const SEQUENCES: &str = "SELECT s.schemaname, s.sequencename, s.start_value, s.min_value, s.max_value, s.increment_by, s.cycle, \
      s.last_value, has_sequence_privilege(c.oid, 'SELECT, USAGE') AS readable, has_sequence_privilege(c.oid, 'UPDATE') AS settable \
    FROM pg_sequences s JOIN pg_namespace n ON n.nspname = s.schemaname \
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.sequencename AND c.relkind = 'S' \
    WHERE s.schemaname !~ '^pg_' AND s.schemaname NOT IN ('information_schema', 'pgcutover') \
    ORDER BY s.schemaname, s.sequencename";

/// One sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// `START WITH`.
    pub start: i64,
    /// `MINVALUE`.
    pub min: i64,
    /// `MAXVALUE`.
    pub max: i64,
    /// `INCREMENT BY`, never 0.
    pub increment: i64,
    /// Whether it begins again at its end.
    pub cycles: bool,
    /// Where it stands.
    pub position: Position,
    /// The right that our login lacks to set it, if it does.
    pub setting: Setting,
}

/// Whether our login may set a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// It has UPDATE on it.
    Allowed,
    /// It has not.
    Denied,
}

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// Our login may not read it.
    Hidden,
    /// Never used: its first number is `start`.
    Unused,
    /// The last number handed out, or reserved by a session's cache.
    Last(i64),
}

/// A sequence of the target that does not stand where it has to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceDrift {
    /// `schema.name`.
    pub sequence: String,
    /// What is so.
    pub problem: String,
}

impl Sequence {
    /// `schema.name`, unquoted, for people and as a key.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// Where it has to stand on the target: `gap` numbers further in its direction, but never past its end.
    /// None when its position is hidden.
    pub fn planned(&self, gap: u32) -> Option<Position> {
        match self.position {
            Position::Hidden => None,
            Position::Unused => Some(Position::Unused),
            Position::Last(last) => {
                let moved = self.moved(last, gap).clamp(i128::from(self.min), i128::from(self.max));
                Some(Position::Last(i64::try_from(moved).unwrap_or(last)))
            }
        }
    }

    /// Whether no number would be left after the gap, though there is one now.
    pub fn is_exhausted_by(&self, gap: u32) -> bool {
        let Position::Last(last) = self.position else { return false };
        let fits = |value: i128| (i128::from(self.min)..=i128::from(self.max)).contains(&value);
        !self.cycles && fits(self.moved(last, 1)) && !fits(self.moved(last, gap.saturating_add(1)))
    }

    fn moved(&self, last: i64, steps: u32) -> i128 {
        i128::from(last) + i128::from(steps) * i128::from(self.increment)
    }
}

/// Compares the target's sequences with the source's plus the gap. A target may stand further, never less far.
pub fn drift(source: &[Sequence], target: &[Sequence], gap: u32) -> Vec<SequenceDrift> {
    source.iter().filter_map(|sequence| drift_of(sequence, target, gap)).collect()
}

fn drift_of(sequence: &Sequence, target: &[Sequence], gap: u32) -> Option<SequenceDrift> {
    let found = |problem: String| Some(SequenceDrift { sequence: sequence.full_name(), problem });
    let Some(wanted) = sequence.planned(gap) else { return found("may not be read on the source".to_owned()) };
    let Some(there) = target.iter().find(|other| other.schema == sequence.schema && other.name == sequence.name) else {
        return found("is missing on the target".to_owned());
    };
    match (wanted, there.position) {
        (_, Position::Hidden) => found("may not be read on the target".to_owned()),
        (Position::Last(wanted), Position::Last(has)) => {
            let behind = if sequence.increment > 0 { has < wanted } else { has > wanted };
            if behind { found(format!("stands at {has}, {wanted} was to be set")) } else { None }
        }
        (Position::Last(wanted), Position::Unused) => found(format!("was never used, {wanted} was to be set")),
        (Position::Unused | Position::Hidden, Position::Unused | Position::Last(_)) => None,
    }
}

impl Cluster {
    /// Every sequence of the user with its position.
    pub async fn sequences(&self, limit: Duration) -> Result<Vec<Sequence>, ClusterError> {
        self.list("sequences", SEQUENCES, limit, sequence).await
    }

    /// S5 on the target, in one transaction that is on disk when this returns: sets every sequence with its gap and always
    /// writes a row of ours, sequences or not (R6). Those whose position is hidden are an error, nothing is set then.
    pub async fn make_durable(
        &self,
        turn: &Turn,
        sequences: &[Sequence],
        gap: u32,
        limit: Duration,
    ) -> Result<usize, ClusterError> {
        let mut values = Vec::new();
        for sequence in sequences {
            let position = sequence.planned(gap).ok_or_else(|| {
                self.unreadable("sequences", format!("{} may not be read on the source", sequence.full_name()))
            })?;
            let (value, called) = match position {
                Position::Last(value) => (value, true),
                Position::Unused | Position::Hidden => (sequence.start, false),
            };
            let name = format!("{}.{}", identifier(&sequence.schema), identifier(&sequence.name));
            values.push(format!("({}, {value}::bigint, {called})", literal(&name)));
        }
        let set = if values.is_empty() {
            String::new()
        } else {
            let values = values.join(", ");
            format!(
                "SELECT count(setval(q.name::regclass, q.value, q.called)) FROM (VALUES {values}) q (name, value, called); "
            )
        };
        let script = format!("SET LOCAL synchronous_commit = on; {set}{}", durable_row(&turn.db, turn));
        self.ask("sequences and durable row", &store::transaction(&script), limit).await?;
        Ok(values.len())
    }
}

fn durable_row(db: &Name, turn: &Turn) -> String {
    format!(
        "INSERT INTO pgcutover.durable (db, epoch, run, at) VALUES ({}, {}, '{}', clock_timestamp()) \
         ON CONFLICT (db) DO UPDATE SET epoch = excluded.epoch, run = excluded.run, at = excluded.at",
        literal(db.as_str()),
        turn.claim.epoch,
        turn.claim.run
    )
}

fn sequence(row: &Cells<'_>) -> Result<Sequence, BadCell> {
    let position = match (row.flag("readable")?, row.maybe_number("last_value")?) {
        (false, _) => Position::Hidden,
        (true, None) => Position::Unused,
        (true, Some(last)) => Position::Last(last),
    };
    Ok(Sequence {
        schema: row.text("schemaname")?,
        name: row.text("sequencename")?,
        start: row.number("start_value")?,
        min: row.number("min_value")?,
        max: row.number("max_value")?,
        increment: row.number("increment_by")?,
        cycles: row.flag("cycle")?,
        position,
        setting: if row.flag("settable")? { Setting::Allowed } else { Setting::Denied },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(increment: i64, last: Option<i64>) -> Sequence {
        let (min, max) = if increment > 0 { (1, 32_767) } else { (-32_768, -1) };
        let position = last.map_or(Position::Unused, Position::Last);
        let (schema, name) = ("public".to_owned(), "s".to_owned());
        let start = if increment > 0 { 1 } else { -1 };
        Sequence { schema, name, start, min, max, increment, cycles: false, position, setting: Setting::Allowed }
    }

    #[test]
    fn the_gap_goes_in_the_direction_of_the_sequence_and_stops_at_its_end() {
        assert_eq!(sequence(1, Some(10)).planned(1000), Some(Position::Last(1010)));
        assert_eq!(sequence(-5, Some(-10)).planned(10), Some(Position::Last(-60)));
        assert_eq!(sequence(1, Some(32_700)).planned(1000), Some(Position::Last(32_767)));
        assert_eq!(sequence(1, None).planned(1000), Some(Position::Unused));
        let hidden = Sequence { position: Position::Hidden, ..sequence(1, None) };
        assert_eq!(hidden.planned(0), None);
        let widest = Sequence { min: i64::MIN, max: i64::MAX, increment: i64::MAX, ..sequence(1, Some(i64::MAX - 1)) };
        assert_eq!(widest.planned(u32::MAX), Some(Position::Last(i64::MAX)));
    }

    #[test]
    fn a_gap_that_would_use_up_a_sequence_is_seen_before_it_does() {
        assert!(sequence(1, Some(32_000)).is_exhausted_by(1000));
        assert!(sequence(1, Some(31_767)).is_exhausted_by(1000), "the gap ends exactly on the last number");
        assert!(!sequence(1, Some(31_766)).is_exhausted_by(1000));
        assert!(!sequence(1, Some(32_767)).is_exhausted_by(1000), "was at its end before");
        assert!(!Sequence { cycles: true, ..sequence(1, Some(32_000)) }.is_exhausted_by(1000));
        assert!(sequence(-1, Some(-32_000)).is_exhausted_by(1000));
    }

    #[test]
    fn a_target_that_stands_less_far_or_can_not_be_read_is_drift() {
        let source = [sequence(1, Some(10))];
        let at = |last| [sequence(1, last)];
        assert_eq!(drift(&source, &at(Some(1010)), 1000), []);
        assert_eq!(drift(&source, &at(Some(2000)), 1000), []);
        assert_eq!(drift(&source, &at(Some(43)), 1000).len(), 1);
        assert_eq!(drift(&source, &at(None), 1000).len(), 1);
        assert_eq!(drift(&source, &[], 1000)[0].problem, "is missing on the target");
        let hidden = [Sequence { position: Position::Hidden, ..sequence(1, None) }];
        assert_eq!(drift(&source, &hidden, 0).len(), 1);
        assert_eq!(drift(&hidden, &at(Some(5)), 0).len(), 1);
    }
}
