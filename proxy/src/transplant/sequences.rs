//! currval and lastval: which sequences a session has used, and making another session have used them.
//!
//! Invariant: a value is taken from the sequence itself (nextval), so that the new server's session knows it as the old
//! one's did; the sequence is set to it first, under a lock that all who restore share. Where the sequence is to go on is set
//! after that, by whoever moves the database. A sequence that hands values out in advance (CACHE) can't be restored.

use crate::backend::{Answer, Batch, Row};
use crate::transplant::{Reason, RestoreError};

/// Sequences that are looked at in one transaction: each is locked until the end of it.
const AT_ONCE: usize = 100;

/// Sequences that are looked at for one session.
pub(super) const LEN_MAX: usize = 5000;

/// Columns: kind, and of a used sequence schema, name, value, whether the role may set it, whether it caches.
const FOUND: &str = "\
SELECT 'last', pg_catalog.current_setting('pgcutover.last', true), NULL, NULL, NULL, NULL
UNION ALL SELECT 'used', n.nspname::pg_catalog.text, c.relname::pg_catalog.text, pg_catalog.split_part(e, ':', 2),
  pg_catalog.has_sequence_privilege(c.oid, 'UPDATE')::pg_catalog.text,
  (q.seqcache OPERATOR(pg_catalog.>) 1)::pg_catalog.text
 FROM pg_catalog.unnest(pg_catalog.string_to_array(
   pg_catalog.rtrim(pg_catalog.current_setting('pgcutover.sequences', true), ','), ',')) e
 JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) pg_catalog.split_part(e, ':', 1)::pg_catalog.oid
 JOIN pg_catalog.pg_sequence q ON q.seqrelid OPERATOR(pg_catalog.=) c.oid
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace";

/// Whether some sequence can't be read by the role that was set, and could by the session's own.
const HIDDEN: &str = "\
SELECT EXISTS (SELECT FROM pg_catalog.unnest($1::pg_catalog.oid[]) o
 WHERE NOT pg_catalog.has_sequence_privilege(o, 'USAGE, SELECT')
  AND pg_catalog.has_sequence_privilege(session_user, o, 'USAGE, SELECT'))";

/// Shared by all who restore one sequence, on all proxies.
const LOCK: &str = "SELECT pg_catalog.pg_advisory_xact_lock(1346848567, pg_catalog.hashtext(pg_catalog.concat($1::pg_catalog.text, '.', $2::pg_catalog.text)))";
const SET: &str = "SELECT pg_catalog.setval(pg_catalog.format('%I.%I', $1::pg_catalog.text, $2::pg_catalog.text)::pg_catalog.regclass, $3::pg_catalog.int8, $4::pg_catalog.bool)";
const NEXT: &str = "SELECT pg_catalog.nextval(pg_catalog.format('%I.%I', $1::pg_catalog.text, $2::pg_catalog.text)::pg_catalog.regclass)";
const CURRENT: &str = "SELECT pg_catalog.currval(pg_catalog.format('%I.%I', $1::pg_catalog.text, $2::pg_catalog.text)::pg_catalog.regclass)";
const LAST: &str = "SELECT pg_catalog.lastval()";
const SIT: &str = "SELECT pgcutover.take_seat($1::pg_catalog.uuid)";

/// What stands for [`Seat`]s on the new server: whoever has it may set one sequence to one value, once.
pub type Ticket = String;

/// A sequence that has to be set by somebody with more rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The value that the session has.
    pub value: i64,
}

/// A sequence that a session has used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Used {
    schema: Box<[u8]>,
    name: Box<[u8]>,
    value: i64,
    right: Right,
}

/// Who may set a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    /// The session.
    Own,
    /// Only the owner: it takes a ticket.
    Lent,
}

/// What lastval answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Last {
    /// Nothing: no sequence was used.
    #[default]
    Unused,
    /// The role has no right to know.
    Hidden,
    /// This value, of the last of the sequences.
    Value(i64),
}

/// What a session knows of sequences.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Sequences {
    /// In the order in which they have to be used again.
    used: Vec<Used>,
    last: Last,
}

/// What was asked: how many answers to take.
pub(super) struct Asked(usize);

/// Asks about these sequences.
pub(super) fn ask(batch: &mut Batch, sequences: &[u32]) -> Asked {
    let chunks: Vec<&[u32]> = if sequences.is_empty() { vec![&[]] } else { sequences.chunks(AT_ONCE).collect() };
    for some in &chunks {
        batch.run(&block(&list(some)), [&[][..]]);
        batch.run(FOUND, [&[][..]]);
        batch.sync();
    }
    batch.run(HIDDEN, [&[list(sequences).as_bytes()][..]]);
    batch.sync();
    Asked(chunks.len())
}

fn list(oids: &[u32]) -> String {
    format!("{{{}}}", oids.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
}

/// Tries them; an error that nobody caught would be logged by the server.
fn block(list: &str) -> String {
    format!(
        "DO $pgcutover$ DECLARE s pg_catalog.oid; used pg_catalog.text := ''; BEGIN
 BEGIN PERFORM pg_catalog.set_config('pgcutover.last', pg_catalog.lastval()::pg_catalog.text, true);
 EXCEPTION WHEN SQLSTATE '55000' THEN PERFORM pg_catalog.set_config('pgcutover.last', 'unused', true);
  WHEN SQLSTATE '42501' THEN PERFORM pg_catalog.set_config('pgcutover.last', 'hidden', true); END;
 FOREACH s IN ARRAY '{list}'::pg_catalog.oid[] LOOP
  BEGIN used := pg_catalog.concat(used, s, ':', pg_catalog.currval(s::pg_catalog.regclass), ',');
  EXCEPTION WHEN SQLSTATE '55000' OR SQLSTATE '42501' OR SQLSTATE '42P01' THEN NULL; END;
 END LOOP;
 PERFORM pg_catalog.set_config('pgcutover.sequences', used, true);
END$pgcutover$"
    )
}

impl Sequences {
    /// From the answers to [`ask`]: takes them all.
    pub(super) fn new(asked: &Asked, answers: &mut impl Iterator<Item = Answer>) -> Result<Self, Heard> {
        let answers: Vec<Answer> = answers.take(asked.0 + 1).collect();
        let mut answers =
            answers.into_iter().map(Answer::accepted).collect::<Result<Vec<_>, _>>().map_err(Heard::Server)?;
        let hidden = answers.pop().unwrap_or_default();
        let hides = hidden.rows.first().and_then(|row| row.text(0)) != Some("f");
        let mut found = Self::default();
        let mut last = None;
        for row in answers.iter().flat_map(|answer| &answer.rows) {
            match row.text(0) {
                Some("last") => last = row.text(1).map(str::to_owned),
                Some(_) | None => found.used.push(used(row)?),
            }
        }
        found.last = match last.as_deref() {
            Some("unused") => Last::Unused,
            Some(_) | None if hides => return Err(Heard::Stays(Reason::SequenceState)),
            Some("hidden") => Last::Hidden,
            Some(value) => Last::Value(value.parse().map_err(|_| Heard::Stays(Reason::SequenceState))?),
            None => return Err(Heard::Stays(Reason::SequenceState)),
        };
        found.put_last_one_last()?;
        Ok(found)
    }

    fn put_last_one_last(&mut self) -> Result<(), Heard> {
        if let Last::Value(value) = self.last {
            let at = self.used.iter().position(|used| used.value == value);
            let last = self.used.remove(at.ok_or(Heard::Stays(Reason::SequenceState))?);
            self.used.push(last);
        }
        // Whoever set it without using it had the right to.
        let odd = !matches!(self.last, Last::Value(_)) && self.used.iter().any(|used| used.right == Right::Lent);
        if odd { Err(Heard::Stays(Reason::SequenceState)) } else { Ok(()) }
    }

    /// Those for which a ticket is needed, in the order of the tickets.
    pub(super) fn seats(&self) -> Option<Vec<Seat>> {
        let text = |bytes: &[u8]| bytes.is_ascii().then(|| String::from_utf8_lossy(bytes).into_owned());
        let lent = self.used.iter().filter(|used| used.right == Right::Lent);
        lent.map(|used| Some(Seat { schema: text(&used.schema)?, name: text(&used.name)?, value: used.value }))
            .collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.used.is_empty()
    }

    /// Uses them again. One answer for each.
    pub(super) fn say(&self, batch: &mut Batch, tickets: &[Ticket]) {
        let mut tickets = tickets.iter();
        for used in &self.used {
            let value = used.value.to_string();
            let name = [&*used.schema, &*used.name];
            let is_used = matches!(self.last, Last::Value(_));
            match used.right {
                Right::Own => {
                    let called: &[u8] = if is_used { b"f" } else { b"t" };
                    batch.run(LOCK, [&name[..]]);
                    batch.run(SET, [&[name[0], name[1], value.as_bytes(), called][..]]);
                }
                Right::Lent => {
                    let ticket = tickets.next().map(String::as_str).unwrap_or_default();
                    batch.run(SIT, [&[ticket.as_bytes()][..]]);
                }
            }
            if is_used {
                batch.run(NEXT, [&name[..]]);
            }
            batch.sync();
        }
    }

    /// Asks what came of it. One answer for each, and one for lastval.
    pub(super) fn ask_again(&self, batch: &mut Batch) {
        for used in &self.used {
            batch.run(CURRENT, [&[&*used.schema, &*used.name][..]]);
            batch.sync();
        }
        if let Last::Value(_) = self.last {
            batch.run(LAST, [&[][..]]);
            batch.sync();
        }
    }

    /// Compares the answers to [`ask_again`](Self::ask_again).
    pub(super) fn check(&self, answers: &mut impl Iterator<Item = Answer>) -> Result<(), RestoreError> {
        let last = match self.last {
            Last::Value(value) => Some((value, "lastval".into())),
            Last::Unused | Last::Hidden => None,
        };
        let each = self.used.iter().map(|used| (used.value, String::from_utf8_lossy(&used.name)));
        for (value, what) in each.chain(last) {
            let found: Option<i64> =
                answers.next().unwrap_or_default().accepted()?.rows.first().and_then(|row| row.parse(0));
            if found != Some(value) {
                let detail = format!("{what}: {value} here, {found:?} there");
                return Err(RestoreError::Differs { reason: Reason::SequenceState, detail });
            }
        }
        Ok(())
    }
}

/// Why it is not known.
pub(super) enum Heard {
    /// The session stays.
    Stays(Reason),
    /// The server refused.
    Server(crate::backend::ServerError),
}

fn used(row: &Row) -> Result<Used, Heard> {
    let bytes = |column| row.bytes(column).map(Box::<[u8]>::from).ok_or(Heard::Stays(Reason::SequenceState));
    if row.text(5) != Some("false") {
        return Err(Heard::Stays(Reason::SequenceCache));
    }
    Ok(Used {
        schema: bytes(1)?,
        name: bytes(2)?,
        value: row.parse(3).ok_or(Heard::Stays(Reason::SequenceState))?,
        right: if row.text(4) == Some("true") { Right::Own } else { Right::Lent },
    })
}
