//! What a move to a physical standby says besides: the epoch is tied to the timeline of its source, and the standby promoted.
//!
//! Invariant: a promoted copy of the store never decides what was opened before its promotion.

use crate::store::{Turn, call, literal};

/// A physical move: the epoch is decided on the timeline on which it was opened, and on no promoted copy (R14).
/// Errors: [`SQLSTATE_WRONG_EPOCH`](crate::store::SQLSTATE_WRONG_EPOCH).
pub fn bind(turn: &Turn) -> String {
    call("bind", &turn.arguments())
}

/// Promotes a standby, if it holds the fence of this very epoch, undecided and bound: one row if it does, none if not. The
/// server looks and acts in one statement, so that a message that comes late finds the abort (R3).
pub fn promote(turn: &Turn) -> String {
    let db = literal(turn.db.as_str());
    let (epoch, run) = (turn.claim.epoch, turn.claim.run);
    format!(
        "SELECT pg_catalog.pg_promote(false) WHERE pg_catalog.pg_is_in_recovery() \
         AND EXISTS (SELECT FROM pgcutover.state s WHERE s.db = {db} AND s.epoch = {epoch} AND s.run = '{run}' \
           AND s.timeline IS NOT NULL) \
         AND EXISTS (SELECT FROM pgcutover.gates g WHERE g.db = {db} AND g.form = 'fenced' AND g.epoch = {epoch}) \
         AND NOT EXISTS (SELECT FROM pgcutover.decision d WHERE d.db = {db} AND d.epoch = {epoch})"
    )
}
