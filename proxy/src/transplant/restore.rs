//! Says a snapshot to a new server, then asks it what it has become.
//!
//! Invariant: a restored session is compared whole: its own probe has to equal the snapshot, but for what servers may
//! differ in.

use std::collections::HashMap;

use tokio::time::Instant;

use crate::backend::Answer;
use crate::backend::Asides;
use crate::backend::Batch;
use crate::backend::ServerConnection;
use crate::backend::ServerError;
use crate::transplant::Reason;
use crate::transplant::RestoreError;
use crate::transplant::Ticket;
use crate::transplant::probe::{self, Failure, Found};
use crate::transplant::ready;
use crate::transplant::snapshot::{Kind, Lock, Mode, Origin, Prepared, Snapshot, TypeName};

const ENCODING: &[u8] = b"client_encoding";

const SET: &str = "SELECT pg_catalog.set_config($1, $2, false)";

/// $1, $2: names and values that the old server has by its own choice: where the new one has chosen otherwise (newer
/// versions have other defaults, extra_float_digits among them) the session keeps what it had.
const PIN: &str = "\
SELECT pg_catalog.count(pg_catalog.set_config(s.name, w.v, false))
 FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) w (n, v)
 JOIN pg_catalog.pg_show_all_settings() s ON s.name OPERATOR(pg_catalog.=) w.n
 WHERE s.context OPERATOR(pg_catalog.=) 'user' AND s.setting OPERATOR(pg_catalog.<>) w.v
  AND s.source OPERATOR(pg_catalog.=) ANY
   ('{default,environment variable,configuration file,command line,override}'::pg_catalog.text[])";

/// $1: schema, $2: name, $3: whether the array over it is meant. One row, or none.
const TYPE_OID: &str = "\
SELECT CASE WHEN $3::pg_catalog.bool THEN t.typarray ELSE t.oid END FROM pg_catalog.pg_type t
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) t.typnamespace
 WHERE n.nspname OPERATOR(pg_catalog.=) $1::pg_catalog.name AND t.typname OPERATOR(pg_catalog.=) $2::pg_catalog.name";

/// Statements of one transaction: each locks its tables until the end of it.
const STATEMENTS_AT_ONCE: usize = 100;

/// Restores, and compares.
pub(super) async fn write(
    server: &mut ServerConnection,
    snapshot: &Snapshot,
    tickets: &[Ticket],
    deadline: Instant,
) -> Result<(), RestoreError> {
    let types = say_state(server, snapshot, tickets, deadline).await?;
    say_statements(server, &snapshot.statements, &types, deadline).await?;
    compare(server, snapshot, deadline).await
}

/// Uses the sequences of a copy that is complete but for them, and compares those.
pub(super) async fn touch_up(
    server: &mut ServerConnection,
    snapshot: &Snapshot,
    tickets: &[Ticket],
    deadline: Instant,
) -> Result<(), RestoreError> {
    let mut batch = Batch::default();
    snapshot.sequences.say(&mut batch, tickets);
    let answers = accepted(server.converse(batch, Asides::Notifications, deadline).await?)?;
    snapshot.sequences.check_said(&answers)
}

/// Makes a copy ready for [`touch_up`] and for its client.
pub(super) async fn get_ready(
    server: &mut ServerConnection,
    snapshot: &Snapshot,
    deadline: Instant,
) -> Result<(), ServerError> {
    let mut batch = Batch::default();
    ready::say(&mut batch, snapshot);
    server.converse(batch, Asides::Notifications, deadline).await.map(drop)
}

/// Settings, role, channels, sequences, locks; gives the OIDs of the statements' types.
async fn say_state<'a>(
    server: &mut ServerConnection,
    snapshot: &'a Snapshot,
    tickets: &[Ticket],
    deadline: Instant,
) -> Result<HashMap<&'a TypeName, u32>, RestoreError> {
    let mut batch = Batch::default();
    say_encoding(&mut batch, snapshot);
    // Before settings that could make the session read-only or impatient, and as the role that has used them.
    let role = &snapshot.state.who.role;
    if !snapshot.sequences.is_empty() && **role != *b"none" {
        say_role(&mut batch, role);
        snapshot.sequences.say(&mut batch, tickets);
        say_role(&mut batch, b"none");
    } else {
        snapshot.sequences.say(&mut batch, tickets);
    }
    say_settings(&mut batch, snapshot);
    let listen: Vec<u8> = snapshot.state.channels.iter().flat_map(|name| listen(name)).collect();
    if !listen.is_empty() {
        batch.query(&listen);
    }
    snapshot.state.locks.iter().for_each(|lock| say_lock(&mut batch, lock));
    let mut wanted: Vec<&TypeName> = snapshot.statements.iter().flat_map(|s| &s.shape.parameters).collect();
    wanted.sort_unstable_by_key(|name| (&name.schema, &name.name, name.kind == Kind::Array));
    wanted.dedup();
    for name in &wanted {
        let array: &[u8] = if name.kind == Kind::Array { b"t" } else { b"f" };
        batch.run(TYPE_OID, [&[&name.schema, &name.name, array][..]]);
        batch.sync();
    }
    let mut answers = accepted(server.converse(batch, Asides::Notifications, deadline).await?)?;
    let found = answers.split_off(answers.len().saturating_sub(wanted.len()));
    let locks = answers.split_off(answers.len().saturating_sub(snapshot.state.locks.len()));
    if let Some((_, lock)) = locks.iter().zip(&snapshot.state.locks).find(|(answer, _)| first(answer) != Some("t")) {
        return Err(RestoreError::Differs { reason: Reason::LockTaken, detail: lock.key.join(", ") });
    }
    let oid = |(name, answer): (&'a TypeName, &Answer)| match first(answer).and_then(|text| text.parse().ok()) {
        Some(oid @ 1u32..) => Ok((name, oid)),
        Some(0) | None => Err(RestoreError::Differs { reason: Reason::TypeMissing, detail: display(name) }),
    };
    wanted.into_iter().zip(&found).map(oid).collect()
}

/// For itself: all that follows is sent in it.
fn say_encoding(batch: &mut Batch, snapshot: &Snapshot) {
    let mut set = snapshot.state.settings.iter().filter(|setting| setting.has_to_be_set());
    if let Some(encoding) = set.find(|setting| *setting.name == *ENCODING) {
        batch.run(SET, [&[&encoding.name[..], &encoding.value][..]]);
        batch.sync();
    }
}

fn say_role(batch: &mut Batch, role: &[u8]) {
    batch.run(SET, [&[&b"role"[..], role][..]]);
    batch.sync();
}

fn say_settings(batch: &mut Batch, snapshot: &Snapshot) {
    let set = snapshot.state.settings.iter().filter(|setting| setting.has_to_be_set() && *setting.name != *ENCODING);
    let others = set.map(|setting| [&*setting.name, &*setting.value]);
    let [names, values] = pins(snapshot);
    batch.run(PIN, [&[names.as_bytes(), values.as_bytes()][..]]);
    batch.sync();
    let custom = snapshot.state.custom.iter().filter_map(|(name, value)| Some([&**name, value.as_deref()?]));
    let who = &snapshot.state.who;
    // The role last: it may not have the right to the others.
    let role = (*who.role != *b"none").then_some([&b"role"[..], &who.role]);
    let pairs: Vec<_> = others.chain(custom).chain(role).collect();
    if !pairs.is_empty() {
        batch.run(SET, pairs.iter().map(|pair| &pair[..]));
        batch.sync();
    }
}

/// Names and values of what the old server chose and a session may set, as arrays.
fn pins(snapshot: &Snapshot) -> [String; 2] {
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for setting in snapshot.state.settings.iter().filter(|setting| setting.may_be_pinned()) {
        // In another encoding a byte could mean a quote.
        if let (true, Ok(name), Ok(value)) =
            (setting.value.is_ascii(), str::from_utf8(&setting.name), str::from_utf8(&setting.value))
        {
            names.push(element(name));
            values.push(element(value));
        }
    }
    [names, values].map(|elements| format!("{{{}}}", elements.join(",")))
}

/// An array's element, quoted.
fn element(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn say_lock(batch: &mut Batch, lock: &Lock) {
    let function = match lock.mode {
        Mode::Exclusive => "pg_try_advisory_lock",
        Mode::Shared => "pg_try_advisory_lock_shared",
    };
    let arguments =
        if lock.key.len() == 1 { "$1::pg_catalog.int8" } else { "$1::pg_catalog.int4, $2::pg_catalog.int4" };
    let key: Vec<&[u8]> = lock.key.iter().map(String::as_bytes).collect();
    batch.run(&format!("SELECT pg_catalog.{function}({arguments})"), [&key[..]]);
    batch.sync();
}

/// `LISTEN "name";`
fn listen(channel: &[u8]) -> Vec<u8> {
    let mut sql = b"LISTEN \"".to_vec();
    for byte in channel {
        if *byte == b'"' {
            sql.push(b'"');
        }
        sql.push(*byte);
    }
    sql.extend_from_slice(b"\";");
    sql
}

/// Prepares and describes; the unnamed statement comes last, because a simple query ends it.
async fn say_statements(
    server: &mut ServerConnection,
    statements: &[Prepared],
    types: &HashMap<&TypeName, u32>,
    deadline: Instant,
) -> Result<(), RestoreError> {
    if statements.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::default();
    for some in statements.chunks(STATEMENTS_AT_ONCE) {
        for statement in some {
            match statement.origin {
                Origin::Sql => batch.query(&statement.text),
                Origin::Protocol => {
                    let oids: Vec<u32> =
                        statement.shape.parameters.iter().filter_map(|name| types.get(name).copied()).collect();
                    batch.parse(&statement.name, &statement.text, &oids);
                }
            }
            batch.describe(&statement.name);
        }
        batch.sync();
    }
    let answers = accepted(server.converse(batch, Asides::Notifications, deadline).await?)?;
    let described: Vec<_> = answers.into_iter().flat_map(|answer| answer.described).collect();
    let shapes =
        probe::shapes(server, &described, Asides::Notifications, deadline).await.map_err(RestoreError::from)?;
    let drifted = statements.iter().enumerate().find(|(at, old)| shapes.get(*at) != Some(&old.shape));
    match drifted {
        None => Ok(()),
        Some((_, statement)) => {
            let detail = String::from_utf8_lossy(&statement.name).into_owned();
            Err(RestoreError::Differs { reason: Reason::StatementDrift, detail })
        }
    }
}

async fn compare(server: &mut ServerConnection, snapshot: &Snapshot, deadline: Instant) -> Result<(), RestoreError> {
    let names: Vec<_> = snapshot.state.custom.iter().map(|(name, _)| name.clone()).collect();
    let mut batch = Batch::default();
    probe::ask_state(&mut batch, &names).map_err(Failure::from)?;
    snapshot.sequences.ask_again(&mut batch);
    let mut answers = server.converse(batch, Asides::Notifications, deadline).await?.into_iter();
    let found = Found::new(answers.next().unwrap_or_default().accepted()?).map_err(Failure::from)?;
    snapshot.sequences.check(&mut answers)?;
    match snapshot.state.difference(&found.state) {
        None => Ok(()),
        Some((reason, detail)) => Err(RestoreError::Differs { reason, detail }),
    }
}

fn accepted(answers: Vec<Answer>) -> Result<Vec<Answer>, ServerError> {
    answers.into_iter().map(Answer::accepted).collect()
}

fn first(answer: &Answer) -> Option<&str> {
    answer.rows.first()?.text(0)
}

fn display(name: &TypeName) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}.{}{}", text(&name.schema), text(&name.name), if name.kind == Kind::Array { "[]" } else { "" })
}

impl From<Failure> for RestoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Lost(error) => Self::Server(error),
            Failure::Stays(why) => {
                let reason = why.reasons.first().copied().unwrap_or(Reason::Server);
                Self::Differs { reason, detail: why.words() }
            }
        }
    }
}
