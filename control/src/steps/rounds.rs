//! Both servers compared while replication runs and clients write: what differs because a change was under way is looked at again
//! until it is known.
//!
//! Invariant: a table differs if rows of it were different at two moments and neither side had touched them in between, though the
//! target had applied all that the source had; it is equal if each of its rows was equal at one of the moments.

use std::time::Duration;

use crate::clusters::digest::Digest;
use crate::clusters::{ClusterError, Clusters, Deadline, Lsn, Subscription};
use crate::config::{Config, Replication};
use crate::report::verification::{Compared, Difference, TableLine, Verification};
use crate::steps::compared::{Look, Pair, Suspect, named, not_compared, pairs, told, units};
use crate::steps::pinned::{BEFORE_FIRST, PHYSICAL, Pins};
use crate::steps::{STEP_DEADLINE, StepError};

/// A row that is written at each of so many looks is busy.
const ROUNDS: usize = 5;
/// Parts of a table that are looked into; a busy table has a row in flight in many.
const PARTS_MAX: usize = 500;
/// Rows of one table that are looked at again; their keys travel with each look.
const SUSPECTS_MAX: usize = 1000;
/// How long the target may take to apply what the source has.
const BEHIND_MAX: Duration = Duration::from_secs(60);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(5);

/// A table of which it is not known yet.
struct Open<'a, 'b> {
    pair: &'b Pair<'a>,
    seen: Seen,
    /// Those that are known to differ.
    different: Vec<Suspect>,
}

/// How it was at the last look.
enum Seen {
    /// Different in these rows and no other.
    Rows(Difference, Vec<Suspect>),
    /// Different in more than can be looked at by itself.
    Whole(Box<[Digest; 2]>, Box<Difference>),
}

/// Compares all that is replicated.
pub async fn verify(config: &Config, clusters: &Clusters, tell: &impl Fn(&str)) -> Result<Verification, StepError> {
    let subscriptions = match &config.replication {
        Replication::Logical { subscriptions } => subscriptions,
        Replication::Physical => return Ok(Verification::none(PHYSICAL)),
    };
    let began = tokio::time::Instant::now();
    let of = clusters.target.subscriptions(&config.route, subscriptions, STEP_DEADLINE).await?;
    if of.is_empty() {
        return Ok(Verification::none("the target subscribes to nothing"));
    }
    let deadline = Deadline::after(config.verify.time_max);
    let mut pins = Pins::connect(&clusters.source, &clusters.target, config.verify.time_max + BEFORE_FIRST).await?;
    let tables = clusters.source.tables(&config.route, STEP_DEADLINE).await?;
    pins.units = units(&tables, &clusters.source.published(&of, STEP_DEADLINE).await?);
    let mut verification = Verification::default();
    pin(clusters, &pins, &of).await?;
    let pairs = pairs(&pins, &deadline, &mut verification).await?;
    let mut open = Vec::new();
    for pair in &pairs {
        tell(&format!("comparing {}", pair.source.full_name()));
        match seen(pair.look(PARTS_MAX).await) {
            Ok(result) => verification.tables.push(line(pair, result)),
            Err(seen) => open.push(Open { pair, seen, different: Vec::new() }),
        }
    }
    for round in 2..=ROUNDS {
        if open.is_empty() || deadline.is_over() {
            break;
        }
        tell(&format!("{} tables once more, look {round} of {ROUNDS}", open.len()));
        tokio::try_join!(pins.source.release(), pins.target.release())?;
        pin(clusters, &pins, &of).await?;
        let mut left = Vec::new();
        for table in open {
            match table.again().await {
                Ok((pair, result)) => verification.tables.push(line(pair, result)),
                Err(table) => left.push(table),
            }
        }
        open = left;
    }
    verification.tables.extend(open.into_iter().map(|table| line(table.pair, table.given_up())));
    verification.ms = began.elapsed().as_secs_f64() * 1000.0;
    verification.sort();
    Ok(verification)
}

fn line(pair: &Pair<'_>, result: Compared) -> TableLine {
    TableLine { table: pair.source.full_name(), result, ms: 0.0 }
}

/// The source first; then the target, once it has applied all that the source's snapshot holds.
async fn pin(clusters: &Clusters, pins: &Pins, of: &[Subscription]) -> Result<(), StepError> {
    pins.source.take(STEP_DEADLINE).await?;
    let position = clusters.source.position(STEP_DEADLINE).await?;
    applied(clusters, of, position).await?;
    pins.target.take(STEP_DEADLINE).await?;
    Ok(())
}

async fn applied(clusters: &Clusters, of: &[Subscription], position: Lsn) -> Result<(), StepError> {
    let deadline = Deadline::after(BEHIND_MAX);
    loop {
        let slots = clusters.source.slots(of, STEP_DEADLINE).await?;
        let is_there = |subscription: &Subscription| {
            let mut slots = slots.iter().filter(|slot| Some(&slot.name) == subscription.slot.as_ref());
            slots.any(|slot| slot.replayed >= Some(position))
        };
        let missing: Vec<&str> = of.iter().filter(|s| !is_there(s)).map(|s| s.name.as_str()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        if deadline.is_over() {
            let why = format!("{} has not applied {position} within {BEHIND_MAX:?}", missing.join(", "));
            return Err(StepError::plain(why));
        }
        // reason: the target tells nobody when it has applied; asked again within BEHIND_MAX.
        tokio::time::sleep(LOOK).await;
    }
}

/// What a look came to, or what has to be looked at again.
fn seen(look: Look) -> Result<Compared, Seen> {
    match look {
        Look::Known(result) => Ok(result),
        Look::Suspects { difference, suspects, .. }
            if difference.note.is_none() && (1..=SUSPECTS_MAX).contains(&suspects.len()) =>
        {
            Err(Seen::Rows(difference, suspects))
        }
        Look::Suspects { difference, suspects, digests } => {
            Err(Seen::Whole(Box::new(digests), Box::new(named(difference, suspects))))
        }
    }
}

impl<'a, 'b> Open<'a, 'b> {
    /// One more look; the table is returned as long as it is not known.
    async fn again(mut self) -> Result<(&'b Pair<'a>, Compared), Open<'a, 'b>> {
        match self.seen {
            Seen::Whole(before, _) => match self.pair.look(PARTS_MAX).await {
                Look::Suspects { difference, suspects, digests } if digests == *before => {
                    Ok((self.pair, Compared::Differs(named(difference, suspects))))
                }
                look @ (Look::Known(_) | Look::Suspects { .. }) => match seen(look) {
                    Ok(result) => Ok((self.pair, result)),
                    Err(seen) => Err(Open { seen, ..self }),
                },
            },
            Seen::Rows(difference, before) => {
                let now = match self.pair.again(&before).await {
                    Ok(now) => now,
                    Err(error) => return Ok((self.pair, unknown(difference, self.different, &error))),
                };
                let (different, moving) = settled(before, now);
                self.different.extend(different);
                if !moving.is_empty() {
                    return Err(Open { seen: Seen::Rows(difference, moving), ..self });
                }
                if !self.different.is_empty() {
                    return Ok((self.pair, Compared::Differs(named(difference, self.different))));
                }
                Ok((self.pair, Compared::Equal { rows: difference.source_rows }))
            }
        }
    }

    /// After the last look.
    fn given_up(self) -> Compared {
        match self.seen {
            Seen::Rows(difference, _) if !self.different.is_empty() => {
                Compared::Differs(named(difference, self.different))
            }
            Seen::Rows(_, moving) => {
                let keys = moving.iter().take(5).map(|row| row.key.as_str()).collect::<Vec<_>>().join(", ");
                Compared::Busy { why: format!("{} rows were written at each look, such as {keys}", moving.len()) }
            }
            Seen::Whole(_, difference) => Compared::Busy { why: format!("it was written at each look: {difference}") },
        }
    }
}

/// What is known to differ is told, whatever came after.
fn unknown(difference: Difference, different: Vec<Suspect>, error: &ClusterError) -> Compared {
    if different.is_empty() { not_compared(told(error)) } else { Compared::Differs(named(difference, different)) }
}

/// Which rows differ for good, and which have been written in between. Pure.
fn settled(before: Vec<Suspect>, now: Vec<Suspect>) -> (Vec<Suspect>, Vec<Suspect>) {
    let different = |row: &Suspect| row.hashes[0] != row.hashes[1];
    now.into_iter().filter(different).partition(|row| before.contains(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(key: &str, source: &str, target: &str) -> Suspect {
        let hash = |hash: &str| (!hash.is_empty()).then(|| hash.to_owned());
        Suspect { key: key.to_owned(), hashes: [hash(source), hash(target)] }
    }

    #[test]
    fn a_row_differs_only_if_neither_side_has_touched_it() {
        let before = vec![row("(1)", "a", "b"), row("(2)", "a", ""), row("(3)", "a", "b"), row("(4)", "", "b")];
        let now = vec![row("(1)", "a", "b"), row("(2)", "a", "a"), row("(3)", "c", "b"), row("(4)", "", "")];
        let (different, moving) = settled(before, now);
        assert_eq!(different, [row("(1)", "a", "b")]);
        assert_eq!(moving, [row("(3)", "c", "b")]);
    }

    #[test]
    fn what_cannot_be_looked_at_row_by_row_is_looked_at_whole() {
        let digest = || Digest { rows: 1, sums: [String::new(), String::new()] };
        let look = |note: Option<&str>, suspects: Vec<Suspect>| {
            let difference = Difference { note: note.map(str::to_owned), ..Difference::default() };
            seen(Look::Suspects { difference, suspects, digests: [digest(), digest()] })
        };
        let rows = || vec![row("(1)", "a", "b")];
        assert!(matches!(look(None, rows()), Err(Seen::Rows(..))));
        assert!(matches!(look(Some("more"), rows()), Err(Seen::Whole(..))));
        assert!(matches!(look(None, Vec::new()), Err(Seen::Whole(..))));
    }
}
