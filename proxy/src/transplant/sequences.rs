//! currval and lastval: which sequences a session has used, and making another session have used them.
//!
//! Invariant: the new server's session draws some value, which makes the sequence its last one, and sets it to the right one
//! after that, which is its own from then on, whatever others who restore do to the sequence meanwhile. Where the sequence
//! is to go on is set later, by whoever moves the database; values that a session had in advance (CACHE) are left out.

use crate::backend::{Answer, Batch, Row};
use crate::transplant::{Reason, RestoreError};

/// Sequences that are looked at in one transaction: each is locked until the end of it.
const AT_ONCE: usize = 100;

/// Sequences that are looked at for one session.
pub(super) const LEN_MAX: usize = 5000;

/// Columns: kind, and of a used sequence schema, name, value, whether the role may set it, OID.
const FOUND: &str = "\
SELECT 'last', pg_catalog.current_setting('pgcutover.last', true), NULL, NULL, NULL, NULL
UNION ALL SELECT 'used', n.nspname::pg_catalog.text, c.relname::pg_catalog.text, pg_catalog.split_part(e, ':', 2),
  pg_catalog.has_sequence_privilege(c.oid, 'UPDATE')::pg_catalog.text,
  c.oid::pg_catalog.text
 FROM pg_catalog.unnest(pg_catalog.string_to_array(
   pg_catalog.rtrim(pg_catalog.current_setting('pgcutover.sequences', true), ','), ',')) e
 JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) pg_catalog.split_part(e, ':', 1)::pg_catalog.oid
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace";

/// Whether some sequence can't be read by the role that was set, and could by the session's own.
const HIDDEN: &str = "\
SELECT EXISTS (SELECT FROM pg_catalog.unnest($1::pg_catalog.oid[]) o
 WHERE NOT pg_catalog.has_sequence_privilege(o, 'USAGE, SELECT')
  AND pg_catalog.has_sequence_privilege(session_user, o, 'USAGE, SELECT'))";

/// $1: schema, $2: name, $3: value, of a sequence that the session may set; makes that its last value. Each part is done
/// before the next, which reads from it. What is written is not waited for, but flushed by S5.
const DRAW: &str = "\
WITH named AS (SELECT pg_catalog.set_config('synchronous_commit', 'off', true),
  pg_catalog.format('%I.%I', $1::pg_catalog.text, $2::pg_catalog.text)::pg_catalog.regclass AS sequence),
 placed AS (SELECT pg_catalog.setval(sequence, $3::pg_catalog.int8, false), sequence FROM named),
 drawn AS (SELECT pg_catalog.nextval(sequence) AS drawn, sequence FROM placed)
SELECT pg_catalog.setval(sequence, $3::pg_catalog.int8, true), drawn FROM drawn";
/// The same where the session has set the sequence and drawn nothing.
const SET: &str = "SELECT pg_catalog.setval(pg_catalog.format('%I.%I', $1::pg_catalog.text, $2::pg_catalog.text)::pg_catalog.regclass, $3::pg_catalog.int8, true)";
const CURRENT: &str = "SELECT pg_catalog.currval(pg_catalog.format('%I.%I', $1::pg_catalog.text, $2::pg_catalog.text)::pg_catalog.regclass)";
const LAST: &str = "SELECT pg_catalog.lastval()";
const SIT: &str = "SELECT pgcutover.draw($1::pg_catalog.uuid)";
const GET_READY: &str = "SELECT pgcutover.draw(NULL)";

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
    /// On the server where it was used.
    oid: u32,
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
    let mut asked = 0;
    for some in chunks(sequences) {
        batch.run(&block(&list(some)), [&[][..]]);
        batch.run(FOUND, [&[][..]]);
        batch.sync();
        asked += 1;
    }
    batch.run(HIDDEN, [&[list(sequences).as_bytes()][..]]);
    batch.sync();
    Asked(asked)
}

/// What is looked at in one transaction each; one of none where there are none.
pub(super) fn chunks(sequences: &[u32]) -> impl Iterator<Item = &[u32]> {
    let none = sequences.is_empty().then_some(sequences);
    none.into_iter().chain(sequences.chunks(AT_ONCE))
}

/// As an array.
pub(super) fn list(oids: &[u32]) -> String {
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

    /// These sequences with their values of now, `used` and `last` being what session_print() says of them; `None` where it
    /// is not as plain as that.
    pub(super) fn moved_on(&self, used: &str, last: &str) -> Option<Sequences> {
        let last = match (last, self.last) {
            ("unused", Last::Unused) => Last::Unused,
            ("hidden", Last::Hidden) => Last::Hidden,
            (value, Last::Value(_)) => Last::Value(value.parse().ok()?),
            (_, Last::Unused | Last::Hidden) => return None,
        };
        let mut now = Sequences { used: Vec::new(), last };
        for pair in used.split_terminator(',') {
            let (oid, value) = pair.split_once(':')?;
            let (oid, value): (u32, i64) = (oid.parse().ok()?, value.parse().ok()?);
            let known = self.used.iter().find(|used| used.oid == oid)?;
            now.used.push(Used { value, ..known.clone() });
        }
        (now.used.len() == self.used.len()).then_some(())?;
        now.put_last_one_last().ok()?;
        Some(now)
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
            let arguments = [&*used.schema, &*used.name, value.as_bytes()];
            match (used.right, self.last) {
                (Right::Own, Last::Value(_)) => batch.run(DRAW, [&arguments[..]]),
                (Right::Own, Last::Unused | Last::Hidden) => batch.run(SET, [&arguments[..]]),
                (Right::Lent, _) => {
                    let ticket = tickets.next().map(String::as_str).unwrap_or_default();
                    batch.run(SIT, [&[ticket.as_bytes()][..]]);
                }
            }
            batch.sync();
        }
    }

    /// Compares the answers to [`say`](Self::say): each value was used by the session itself, the last one last.
    pub(super) fn check_said(&self, answers: &[Answer]) -> Result<(), RestoreError> {
        for (at, used) in self.used.iter().enumerate() {
            let last = answers.get(at).and_then(|answer| answer.rows.last());
            let found: Option<i64> = last.and_then(|row| row.parse(0));
            if found != Some(used.value) {
                return Err(differs(used.value, found, &String::from_utf8_lossy(&used.name)));
            }
        }
        Ok(())
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
                return Err(differs(value, found, &what));
            }
        }
        Ok(())
    }
}

/// Makes the new server's session ready to use sequences, before it is known which values: what is planned once, and found
/// in catalogues, is there when clients wait.
pub(super) fn get_ready(batch: &mut Batch) {
    batch.run(GET_READY, [&[][..]]);
    batch.sync();
}

fn differs(value: i64, found: Option<i64>, what: &str) -> RestoreError {
    let detail = format!("{what}: {value} here, {found:?} there");
    RestoreError::Differs { reason: Reason::SequenceState, detail }
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
    Ok(Used {
        oid: row.parse(5).ok_or(Heard::Stays(Reason::SequenceState))?,
        schema: bytes(1)?,
        name: bytes(2)?,
        value: row.parse(3).ok_or(Heard::Stays(Reason::SequenceState))?,
        right: if row.text(4) == Some("true") { Right::Own } else { Right::Lent },
    })
}
