//! Tickets for sessions that have to draw a value from a sequence which they may not set.
//!
//! Invariant: only text that is quoted goes into the statement.

use uuid::Uuid;

use crate::store::literal;

/// A ticket for a session that has to draw a value from a sequence: [`seats`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat<'a> {
    /// What the session shows for it.
    pub ticket: Uuid,
    /// The sequence's schema.
    pub schema: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The value that the session is to draw.
    pub value: i64,
}

/// Makes tickets, at least one.
pub fn seats(seats: &[Seat<'_>]) -> String {
    let row = |seat: &Seat<'_>| {
        format!("('{}', {}, {}, {})", seat.ticket, literal(seat.schema), literal(seat.name), seat.value)
    };
    let rows: Vec<String> = seats.iter().map(row).collect();
    format!("INSERT INTO pgcutover.seat (ticket, sequence_schema, sequence_name, value) VALUES {}", rows.join(", "))
}
