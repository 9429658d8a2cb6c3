//! Asks a server what a session is made of.
//!
//! Invariant: nothing that the session's search_path or operators could bend: every name is qualified. The statements
//! work on PostgreSQL 11 to 18 with a plain login's rights, and leave no trace.

use std::collections::HashMap;

use tokio::time::Instant;

use crate::backend::Answer;
use crate::backend::Asides;
use crate::backend::Batch;
use crate::backend::Described;
use crate::backend::Rest;
use crate::backend::Row;
use crate::backend::ServerConnection;
use crate::backend::ServerError;
use crate::transplant::Hints;
use crate::transplant::LockCalls;
use crate::transplant::NotMovable;
use crate::transplant::ParseSettings;
use crate::transplant::Reason;
use crate::transplant::Survey;
use crate::transplant::prepare;
use crate::transplant::sequences;
use crate::transplant::sequences::{Heard, Sequences};
use crate::transplant::snapshot::{Kind, Lock, Mode, Origin, Prepared, Setting, Shape, Snapshot, State, TypeName, Who};
use crate::transplant::still::{self, Said};

/// Rows of a session's state: 10,000 statements, and all else.
const ROWS_MAX: u64 = 12_000;
/// All values and texts of a session's state, in bytes.
const TEXT_BYTES_MAX: u64 = 8 << 20;
/// Statements that are asked for in one transaction: each may lock its tables until the end of it.
const STATEMENTS_AT_ONCE: usize = 100;
/// Custom settings that are asked for at once.
const CUSTOM_SETTINGS_LEN_MAX: usize = 1000;

/// $1: names of custom settings. Columns: kind, three values, bytes and rows of all.
const STATE: &str = "\
SELECT t.k, t.a, CASE WHEN t.bytes OPERATOR(pg_catalog.<=) 8388608 THEN t.b END, t.c, t.d, t.bytes, t.n FROM (
 SELECT u.k, u.a, u.b, u.c, u.d, pg_catalog.count(*) OVER () AS n,
  pg_catalog.sum(coalesce(pg_catalog.octet_length(u.b), 0)) OVER () AS bytes FROM (
  SELECT 'set' AS k, s.name AS a, s.setting AS b, s.source AS c, s.category AS d
   FROM pg_catalog.pg_show_all_settings() s
   WHERE s.context OPERATOR(pg_catalog.=) 'user' OR s.context OPERATOR(pg_catalog.=) 'superuser'
  UNION ALL SELECT 'custom', n, pg_catalog.current_setting(n, true), NULL, NULL
   FROM pg_catalog.unnest($1::pg_catalog.text[]) n
  UNION ALL SELECT 'who', session_user::pg_catalog.text, current_user::pg_catalog.text,
   pg_catalog.current_setting('role'),
   (SELECT pg_catalog.pg_get_userbyid(a.usesysid)::pg_catalog.text
     FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) a)
  UNION ALL SELECT 'loaded', pg_catalog.pg_conf_load_time()::pg_catalog.text, NULL, NULL, NULL
  UNION ALL SELECT 'statement', p.name, p.statement, CASE WHEN p.from_sql THEN 'sql' ELSE 'protocol' END, NULL
   FROM pg_catalog.pg_prepared_statement() p
   WHERE p.name OPERATOR(pg_catalog.<>) ('_pgcutover_' OPERATOR(pg_catalog.||) pg_catalog.chr(1))
  UNION ALL SELECT 'listen', c, NULL, NULL, NULL FROM pg_catalog.pg_listening_channels() c
  UNION ALL SELECT 'cursor', c.name, NULL, NULL, NULL FROM pg_catalog.pg_cursor() c WHERE c.is_holdable
  UNION ALL (SELECT 'temporary', d.objid::pg_catalog.text, NULL, NULL, NULL FROM pg_catalog.pg_depend d
   WHERE d.refclassid OPERATOR(pg_catalog.=) 2615::pg_catalog.oid
    AND d.refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
    AND pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid LIMIT 1)
  UNION ALL SELECT 'lock', l.classid::pg_catalog.text, l.objid::pg_catalog.text, l.objsubid::pg_catalog.text, l.mode
   FROM pg_catalog.pg_lock_status() l WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted
    AND l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
 ) u) t LIMIT 12000";

/// $1: OIDs. Columns: oid, schema, name, whether the array over that type is meant.
const TYPE_NAMES: &str = "\
SELECT t.oid, n.nspname, coalesce(e.typname, t.typname), (e.oid IS NOT NULL)
 FROM pg_catalog.unnest($1::pg_catalog.oid[]) o
 JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) o
 LEFT JOIN pg_catalog.pg_type e ON e.oid OPERATOR(pg_catalog.=) t.typelem AND e.typarray OPERATOR(pg_catalog.=) t.oid
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) coalesce(e.typnamespace, t.typnamespace)";

/// What keeps state where SQL can't see it, makes names of settings at run time, or takes locks unheard; whether sessions
/// can be told from what they were; all sequences.
const SURVEY: &str = "\
SELECT 'extension', NULL FROM pg_catalog.pg_extension WHERE extname::pg_catalog.text OPERATOR(pg_catalog.=) 'dblink'
UNION ALL SELECT 'extension', NULL FROM pg_catalog.pg_language
 WHERE lanname::pg_catalog.text OPERATOR(pg_catalog.~) '^(plperl|plpython|pltcl|plv8|plr|pllua|pljava)'
UNION ALL SELECT k, NULL FROM (VALUES ('dynamic', 'set_config\\s*\\(\\s*[^''\\s]|execute[^;]*\\mset\\M'),
  ('locks', 'pg_(try_)?advisory_lock')) v (k, pattern)
 WHERE EXISTS (SELECT FROM pg_catalog.pg_proc p
  JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace
  WHERE n.nspname::pg_catalog.text OPERATOR(pg_catalog.!~) '^(pg_catalog|information_schema|pgcutover|pgcutover_subscriber)$'
   AND p.prosrc OPERATOR(pg_catalog.~*) v.pattern)
UNION ALL SELECT 'prints', NULL FROM pg_catalog.pg_proc p
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace
 WHERE n.nspname::pg_catalog.text OPERATOR(pg_catalog.=) 'pgcutover'
  AND p.proname::pg_catalog.text OPERATOR(pg_catalog.=) 'session_print'
UNION ALL (SELECT 'sequence', c.oid::pg_catalog.text FROM pg_catalog.pg_class c
 WHERE c.relkind::pg_catalog.text OPERATOR(pg_catalog.=) 'S' AND c.relpersistence::pg_catalog.text OPERATOR(pg_catalog.<>) 't'
 ORDER BY c.oid LIMIT 5001)";

/// What is so for all sessions of a database.
pub(super) async fn survey(server: &mut ServerConnection, deadline: Instant) -> Result<Survey, ServerError> {
    let mut survey = Survey::default();
    for row in &server.query(SURVEY, &[], deadline).await? {
        match (row.text(0), row.parse(1)) {
            (Some("sequence"), Some(oid)) => survey.sequences.push(oid),
            (Some("dynamic"), _) => survey.reasons.push(Reason::DynamicSetting),
            (Some("locks"), _) => survey.reasons.push(Reason::AdvisoryLocks),
            (Some("prints"), _) => survey.prints = true,
            (_, _) => survey.reasons.push(Reason::Extension),
        }
    }
    if survey.sequences.len() > sequences::LEN_MAX {
        survey.reasons.push(Reason::SequenceState);
        survey.sequences.clear();
    }
    survey.reasons.sort_unstable();
    survey.reasons.dedup();
    Ok(survey)
}

/// Why there is no snapshot.
pub(super) enum Failure {
    /// The session stays where it is.
    Stays(NotMovable),
    /// The connection is lost.
    Lost(ServerError),
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self::Stays(NotMovable::from(reason))
    }
}

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Self {
        match error.sqlstate().map(|code| code.as_str() == "42501") {
            Some(true) => Reason::CatalogueRights.into(),
            Some(false) => Reason::Server.into(),
            None => Self::Lost(error),
        }
    }
}

/// Reads a session and judges it.
pub(super) async fn read(
    server: &mut ServerConnection,
    hints: &Hints,
    before: Option<&Snapshot>,
    deadline: Instant,
) -> Result<Snapshot, Failure> {
    if server.rest != Rest::Idle {
        return Err(Reason::InTransaction.into());
    }
    let found = look(server, hints, before, deadline).await;
    if matches!(found, Err(Failure::Stays(_))) {
        let mut tidy = Batch::default();
        tidy.tidy();
        server.converse(tidy, Asides::All, deadline).await.map_err(Failure::Lost)?;
    }
    found
}

async fn look(
    server: &mut ServerConnection,
    hints: &Hints,
    before: Option<&Snapshot>,
    deadline: Instant,
) -> Result<Snapshot, Failure> {
    if let Some(before) = before
        && let Some(same) = look_again(server, hints, before, deadline).await?
    {
        return Ok(same);
    }
    let mut batch = Batch::default();
    // The block first: it loads PL/pgSQL, whose settings show from then on, and two probes shall see the same.
    let asked = sequences::ask(&mut batch, &hints.survey.sequences);
    ask_state(&mut batch, &hints.custom_settings)?;
    batch.describe(b"");
    batch.sync();
    let mut answers = server.converse(batch, Asides::All, deadline).await?.into_iter();
    let sequences = Sequences::new(&asked, &mut answers);
    let mut next = || answers.next().unwrap_or_default();
    let found = Found::new(next().accepted()?)?;
    let mut reasons = found.reasons.clone();
    let sequences = match sequences {
        Ok(sequences) => sequences,
        Err(Heard::Server(error)) => return Err(error.into()),
        Err(Heard::Stays(reason)) => {
            reasons.push(reason);
            Sequences::default()
        }
    };
    let unnamed = described(next());
    judge(reasons, hints, &found.state, unnamed.is_some(), !found.statements.is_empty())?;
    let mut texts = found.statements;
    texts.sort_by_key(|statement| statement.origin);
    if let (Some(_), Some(text)) = (&unnamed, &hints.seen.unnamed) {
        texts.push(Text { name: Box::default(), text: text.clone(), origin: Origin::Protocol });
    }
    let statements = with_shapes(server, texts, deadline).await?;
    let settings = still::settings_of(&found.state);
    let print = match ask_print(server, hints, &settings, deadline).await? {
        Some(said) => said.into_print(settings, found.loaded.as_deref(), unnamed),
        None => None,
    };
    Ok(Snapshot { state: found.state, sequences, statements, print })
}

/// The session as it was looked at before, with its sequences of now; `None` where something may have changed.
async fn look_again(
    server: &mut ServerConnection,
    hints: &Hints,
    before: &Snapshot,
    deadline: Instant,
) -> Result<Option<Snapshot>, Failure> {
    let Some(print) = &before.print else { return Ok(None) };
    if !still::are_those(&hints.custom_settings, &before.state.custom) {
        return Ok(None);
    }
    let mut batch = Batch::default();
    let asked = still::ask(&mut batch, print.settings(), &hints.survey.sequences);
    batch.describe(b"");
    batch.sync();
    let mut answers = server.converse(batch, Asides::All, deadline).await?;
    let unnamed = answers.split_off(asked.min(answers.len())).pop().and_then(described);
    let Some(said) = Said::new(answers) else { return Ok(None) };
    let Some(sequences) = print.still(&said, unnamed.as_ref(), &before.sequences) else { return Ok(None) };
    let known = before.statements.iter().find(|statement| statement.name.is_empty());
    if known.map(|known| &known.text) != hints.seen.unnamed.as_ref().filter(|_| unnamed.is_some()) {
        return Ok(None);
    }
    let named = before.statements.iter().any(|statement| !statement.name.is_empty());
    judge(Vec::new(), hints, &before.state, unnamed.is_some(), named)?;
    Ok(Some(Snapshot { sequences, ..before.clone() }))
}

/// What its server says of a session that was just looked at.
async fn ask_print(
    server: &mut ServerConnection,
    hints: &Hints,
    settings: &[u8],
    deadline: Instant,
) -> Result<Option<Said>, Failure> {
    if !hints.survey.prints {
        return Ok(None);
    }
    let mut batch = Batch::default();
    still::ask(&mut batch, settings, &hints.survey.sequences);
    Ok(Said::new(server.converse(batch, Asides::All, deadline).await?))
}

/// What a statement looks like, if it is there: the answer to a Describe of it.
fn described(answer: Answer) -> Option<Described> {
    answer.accepted().ok()?.described.pop()
}

/// Whether a session of that state, with or without statements, can be moved; `reasons` are what was found besides.
fn judge(mut reasons: Vec<Reason>, hints: &Hints, state: &State, unnamed: bool, named: bool) -> Result<(), Failure> {
    reasons.extend(objections(state.locks.len(), hints));
    if unnamed && hints.seen.unnamed.is_none() {
        reasons.push(Reason::UnnamedStatement);
    }
    if unnamed || named {
        let odd = state.settings.iter().any(Setting::is_parsed_under);
        if odd || hints.seen.parse_settings == ParseSettings::Changed {
            reasons.push(Reason::ParseSettings);
        }
    }
    if reasons.is_empty() {
        return Ok(());
    }
    reasons.sort_unstable();
    reasons.dedup();
    Err(Failure::Stays(NotMovable { reasons }))
}

/// Asks for everything but the statements' shapes: one answer.
pub(super) fn ask_state(batch: &mut Batch, custom: &[Box<[u8]>]) -> Result<(), Reason> {
    let plain = |name: &[u8]| name.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$' | b'.'));
    if custom.len() > CUSTOM_SETTINGS_LEN_MAX || custom.iter().any(|name| name.is_empty() || !plain(name)) {
        return Err(Reason::DynamicSetting);
    }
    let names = [b"{", custom.join(&b","[..]).as_slice(), b"}"].concat();
    batch.run(STATE, [&[&names[..]][..]]);
    batch.sync();
    Ok(())
}

/// A statement before it is described.
pub(super) struct Text {
    name: Box<[u8]>,
    text: Box<[u8]>,
    origin: Origin,
}

/// What a server said of a session.
#[derive(Default)]
pub(super) struct Found {
    pub(super) state: State,
    statements: Vec<Text>,
    /// What can't be moved at all.
    reasons: Vec<Reason>,
    /// When the server process had read its configuration.
    loaded: Option<Box<[u8]>>,
}

impl Found {
    /// From the answer to [`ask_state`].
    pub(super) fn new(answer: Answer) -> Result<Self, Reason> {
        let mut found = Self::default();
        let Some(first) = answer.rows.first() else { return Err(Reason::Server) };
        let (bytes, rows) = (first.parse::<u64>(5), first.parse::<u64>(6));
        if bytes.is_none_or(|n| n > TEXT_BYTES_MAX) || rows.is_none_or(|n| n >= ROWS_MAX) {
            return Err(Reason::TooLarge);
        }
        for row in &answer.rows {
            found.take(row)?;
        }
        found.state.channels.sort_unstable();
        found.state.locks.sort_unstable();
        Ok(found)
    }

    fn take(&mut self, row: &Row) -> Result<(), Reason> {
        let bytes = |column| row.bytes(column).map(Box::<[u8]>::from).ok_or(Reason::Server);
        // A setting's value may be NULL in pg_settings: empty there.
        let or_empty = |column| row.bytes(column).map(Box::<[u8]>::from).unwrap_or_default();
        match row.text(0) {
            Some("set") => self.state.settings.push(Setting {
                name: bytes(1)?,
                value: or_empty(2),
                source: bytes(3)?,
                category: or_empty(4),
            }),
            Some("custom") => self.state.custom.push((bytes(1)?, row.bytes(2).map(Box::from))),
            Some("who") => {
                if row.bytes(1) != row.bytes(4) {
                    self.reasons.push(Reason::SessionAuthorization);
                }
                self.state.who = Who { session: bytes(1)?, current: bytes(2)?, role: bytes(3)? };
            }
            Some("loaded") => self.loaded = Some(bytes(1)?),
            Some("statement") => self.add_statement(bytes(1)?, bytes(2)?, row.text(3)),
            Some("listen") => self.state.channels.push(bytes(1)?),
            Some("cursor") => self.reasons.push(Reason::HeldCursor),
            Some("temporary") => self.reasons.push(Reason::TemporaryObjects),
            Some("lock") => self.state.locks.push(lock(row).ok_or(Reason::AdvisoryLocks)?),
            Some(_) | None => return Err(Reason::Server),
        }
        Ok(())
    }

    fn add_statement(&mut self, name: Box<[u8]>, text: Box<[u8]>, origin: Option<&str>) {
        let origin = if origin == Some("protocol") { Origin::Protocol } else { Origin::Sql };
        if origin == Origin::Sql && !prepare::is_one_prepare(&text, &name) {
            self.reasons.push(Reason::PreparedText);
        }
        self.statements.push(Text { name, text, origin });
    }
}

/// What speaks against a session that holds so many locks, by what is known of its database and of its wire.
fn objections(held: usize, hints: &Hints) -> Vec<Reason> {
    // Of the database it speaks against those only that hold one.
    let mut reasons = [hints.survey.reasons.as_slice(), &hints.seen.reasons].concat();
    let unheard = hints.survey.forbids(Reason::AdvisoryLocks);
    reasons.retain(|reason| *reason != Reason::AdvisoryLocks);
    if !hints.custom_settings.is_empty() {
        // Whoever names them answers for the list.
        reasons.retain(|reason| *reason != Reason::DynamicSetting);
    }
    // A lock that is held twice shows once: each has to have its call, and each call its lock.
    let sure = match hints.seen.lock_calls {
        LockCalls::Counted(calls) => usize::try_from(calls) == Ok(held) && !unheard,
        LockCalls::Unclear => false,
    };
    if held > 0 && !sure {
        reasons.push(Reason::AdvisoryLocks);
    }
    reasons
}

/// The key of a lock as the functions take it.
fn lock(row: &Row) -> Option<Lock> {
    let (high, low) = (row.parse::<u32>(1)?, row.parse::<u32>(2)?);
    let key = match row.text(3)? {
        "1" => vec![((u64::from(high) << 32) | u64::from(low)).cast_signed().to_string()],
        "2" => vec![high.cast_signed().to_string(), low.cast_signed().to_string()],
        _ => return None,
    };
    let mode = match row.text(4)? {
        "ExclusiveLock" => Mode::Exclusive,
        "ShareLock" => Mode::Shared,
        _ => return None,
    };
    Some(Lock { key, mode })
}

async fn with_shapes(
    server: &mut ServerConnection,
    texts: Vec<Text>,
    deadline: Instant,
) -> Result<Vec<Prepared>, Failure> {
    if texts.is_empty() {
        return Ok(Vec::new());
    }
    let mut batch = Batch::default();
    for some in texts.chunks(STATEMENTS_AT_ONCE) {
        some.iter().for_each(|text| batch.describe(&text.name));
        batch.sync();
    }
    let mut described = Vec::new();
    for answer in server.converse(batch, Asides::All, deadline).await? {
        described.extend(answer.accepted()?.described);
    }
    let shapes = shapes(server, &described, Asides::All, deadline).await?;
    if shapes.len() != texts.len() {
        return Err(Reason::Server.into());
    }
    let whole = |(Text { name, text, origin }, shape)| Prepared { name, text, origin, shape };
    Ok(texts.into_iter().zip(shapes).map(whole).collect())
}

/// Descriptions with names in the place of OIDs.
pub(super) async fn shapes(
    server: &mut ServerConnection,
    described: &[Described],
    asides: Asides,
    deadline: Instant,
) -> Result<Vec<Shape>, Failure> {
    let mut oids: Vec<u32> = described.iter().flat_map(Described::types).collect();
    oids.sort_unstable();
    oids.dedup();
    let list = format!("{{{}}}", oids.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
    let mut batch = Batch::default();
    batch.run(TYPE_NAMES, [&[list.as_bytes()][..]]);
    batch.sync();
    let answer = server.converse(batch, asides, deadline).await?.into_iter().next().unwrap_or_default().accepted()?;
    let named = |row: &Row| {
        let kind = if row.text(3)? == "t" { Kind::Array } else { Kind::Plain };
        Some((row.parse::<u32>(0)?, TypeName { schema: row.bytes(1)?.into(), name: row.bytes(2)?.into(), kind }))
    };
    let names: HashMap<u32, TypeName> = answer.rows.iter().filter_map(named).collect();
    let shape = |described: &Described| {
        let name = |oid: &u32| names.get(oid).cloned();
        let column = |c: &crate::backend::Column| Some((c.name.clone(), name(&c.type_oid)?, c.modifier));
        Some(Shape {
            parameters: described.parameters.iter().map(name).collect::<Option<_>>()?,
            columns: described.columns.iter().map(column).collect::<Option<_>>()?,
        })
    };
    described.iter().map(shape).collect::<Option<_>>().ok_or(Reason::TypeMissing.into())
}
