//! The decision store as text: every statement that the proxies and proxyctl send to it; what its rows mean is in `rows`.
//!
//! Invariant: no IO, and nothing is a parameter: each function returns a whole simple Query, safe for any name under any
//! `standard_conforming_strings`. A writing text is one message `BEGIN …; SELECT …; COMMIT`, so that a caller who dies
//! leaves no transaction open at which the others would wait, and so that the role's default isolation or read-only
//! setting does not matter (R11). Its result counts only once the whole message is acknowledged; after an error send
//! [`ROLLBACK`] or close the connection.

mod rows;
mod seat;
mod standby;

use std::fmt::{self, Display, Write};
use std::str::FromStr;

use thiserror::Error;

use crate::epoch::Claim;
use crate::epoch::Epoch;
use crate::epoch::RunId;

pub use rows::{BadRow, Decision, Gate, GateForm, Identity, Member, OpenEpoch, StoreView};
pub use rows::{decode_bool, decode_epoch, decode_outcome};
pub use seat::{Seat, seats};
pub use standby::{bind, promote};

/// Tables, functions and the gates view; idempotent. Run it on the target first, then on the source.
pub const OBJECTS: &str = include_str!("../sql/objects.sql");
/// The roles and the rights that a cutover needs, for the operator to read and run.
pub const ROLES: &str = include_str!("../sql/roles.sql");
/// What a superuser has to run on servers before 16 for the way back. No psql syntax in it.
pub const SUBSCRIBER: &str = include_str!("../sql/subscriber.sql");
/// How each transaction on the store begins.
pub const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE";
/// Ends a transaction that an error has left open.
pub const ROLLBACK: &str = "ROLLBACK";

/// What the fence answers a write with: read-only transaction.
pub const SQLSTATE_FENCED: &str = "25006";
/// The wrong state, epoch or run: the message came too late or from someone else.
pub const SQLSTATE_WRONG_EPOCH: &str = "55000";
/// `open()`: the last epoch is undecided.
pub const SQLSTATE_UNDECIDED: &str = "55006";
/// A writing function was called in another isolation level than READ COMMITTED.
pub const SQLSTATE_ISOLATION: &str = "25001";

/// The identity of a server: four text columns for [`Identity::decode`]. Works on a primary and in recovery.
pub const IDENTITY: &str = "SELECT (SELECT c.system_identifier FROM pg_catalog.pg_control_system() c), \
     CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL \
     ELSE pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) END, \
     pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('server_version_num')";

/// The name of a database (route) or of a backend: 1 to 50 bytes, so that every object name made from it fits in 63.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// Why a text is no [`Name`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no name here: 1 to 50 bytes without control characters")]
pub struct BadName(String);

impl Name {
    /// The longest name, in bytes.
    pub const BYTES_MAX: usize = 50;

    /// Checks the length; refuses control characters (a NUL would end the message).
    pub fn new(text: &str) -> Result<Self, BadName> {
        let fits = (1..=Self::BYTES_MAX).contains(&text.len());
        if fits && !text.chars().any(char::is_control) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadName(text.to_owned()))
        }
    }

    /// The name as it is.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        Self::new(text)
    }
}

/// How an epoch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Traffic goes to the target.
    Commit,
    /// Traffic stays on the source.
    Abort,
}

impl Outcome {
    /// The word in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Abort => "abort",
        }
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Outcome {
    type Err = BadRow;
    fn from_str(word: &str) -> Result<Self, BadRow> {
        match word {
            "commit" => Ok(Self::Commit),
            "abort" => Ok(Self::Abort),
            _ => Err(BadRow::value("outcome", word)),
        }
    }
}

/// One epoch of one run: what every conditional function of the store checks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Turn {
    /// The route.
    pub db: Name,
    /// Whose epoch it is.
    pub claim: Claim,
}

impl Turn {
    fn arguments(&self) -> String {
        format!("{}, {}, '{}'", literal(self.db.as_str()), self.claim.epoch, self.claim.run)
    }
}

/// A string as SQL reads it back, whatever `standard_conforming_strings` says. NULs, which no server can store, are left out.
pub fn literal(text: &str) -> String {
    let backslash = text.contains('\\');
    let mut out = String::with_capacity(text.len() + 4);
    out.push_str(if backslash { " E'" } else { "'" });
    for c in text.chars().filter(|&c| c != '\0') {
        if c == '\'' || c == '\\' {
            out.push(c);
        }
        out.push(c);
    }
    out.push('\'');
    out
}

/// A quoted identifier. NULs are left out.
pub fn identifier(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 2);
    out.push('"');
    for c in name.chars().filter(|&c| c != '\0') {
        if c == '"' {
            out.push('"');
        }
        out.push(c);
    }
    out.push('"');
    out
}

/// `statement` (one or more, `;` between) as one message and one transaction.
pub fn transaction(statement: &str) -> String {
    format!("{BEGIN}; {statement}; COMMIT")
}

fn call(function: &str, arguments: &str) -> String {
    transaction(&format!("SELECT pgcutover.{function}({arguments})"))
}

/// The rights of the proxies' control login on the store.
pub fn grants(role: &str) -> String {
    include_str!("../sql/grants.sql").replace("{role}", &identifier(role))
}

/// The rows that are only UPDATEd afterwards, on both sides.
pub fn seed(db: &Name) -> String {
    let db = literal(db.as_str());
    transaction(&format!(
        "INSERT INTO pgcutover.heartbeat (db, n, at) VALUES ({db}, 0, pg_catalog.now()) ON CONFLICT (db) DO NOTHING; \
         INSERT INTO pgcutover.sentinel (db, token) VALUES ({db}, '') ON CONFLICT (db) DO NOTHING"
    ))
}

/// Opens the next epoch above everything known and above `floor` (the proxies' greatest). One row, one column: the epoch,
/// for [`decode_epoch`]. Errors: [`SQLSTATE_UNDECIDED`].
pub fn open(db: &Name, run: RunId, target: &Name, floor: Epoch) -> String {
    call("open", &format!("{}, '{run}', {}, {floor}", literal(db.as_str()), literal(target.as_str())))
}

/// Records `want` unless an outcome is there, and answers the outcome: one row, one column, for [`Outcome::from_str`].
/// Errors: [`SQLSTATE_WRONG_EPOCH`] for another run or an unknown epoch; never an outcome then.
pub fn decide(turn: &Turn, want: Outcome) -> String {
    call("decide", &format!("{}, '{want}'", turn.arguments()))
}

/// Writes the evidence of a commit on the target; answers `commit`. Errors: [`SQLSTATE_WRONG_EPOCH`].
pub fn witness(turn: &Turn, target: &Name) -> String {
    call("witness", &format!("{}, {}", turn.arguments(), literal(target.as_str())))
}

/// Fences the source (R3). Errors: [`SQLSTATE_WRONG_EPOCH`] when the epoch is over.
pub fn flip(turn: &Turn) -> String {
    call("flip", &turn.arguments())
}

/// Opens the fence of an aborted epoch (R3). Errors: [`SQLSTATE_WRONG_EPOCH`] when it is not aborted.
pub fn unfence(turn: &Turn) -> String {
    call("unfence", &turn.arguments())
}

/// Puts the target's form on a target that has a gate (R10); answers `t`, or `f` if there is none.
/// Errors: [`SQLSTATE_WRONG_EPOCH`] when something newer is known there.
pub fn guard(turn: &Turn) -> String {
    call("guard", &turn.arguments())
}

/// Replaces the target's form by the no-op, once the evidence of the epoch is there.
pub fn settle(turn: &Turn) -> String {
    call("settle", &turn.arguments())
}

/// Creates the gate and the event trigger's function as no-ops, unless they are there.
pub fn arm(db: &Name) -> String {
    call("arm", &literal(db.as_str()))
}

/// Puts the gate on one table; answers whether it is new. `lock_timeout` 300 ms: while CREATE TRIGGER queues behind an open
/// writer, it makes all later writers wait. Errors: 55P03, to be retried.
pub fn arm_table(db: &Name, schema: &str, table: &str) -> String {
    one_table("arm_table", db, schema, table)
}

/// Takes the gate off one table; answers whether it was there. Errors: 55P03, to be retried; 55000 while the gate holds.
pub fn disarm_table(db: &Name, schema: &str, table: &str) -> String {
    one_table("disarm_table", db, schema, table)
}

fn one_table(function: &str, db: &Name, schema: &str, table: &str) -> String {
    let table = literal(&format!("{}.{}", identifier(schema), identifier(table)));
    let db = literal(db.as_str());
    transaction(&format!(
        "SET LOCAL lock_timeout = 300; SELECT pgcutover.{function}({db}, {table}::pg_catalog.regclass)"
    ))
}

/// Drops the gate's functions after its tables are disarmed; never a gate that holds (55000).
pub fn disarm(db: &Name) -> String {
    call("disarm", &literal(db.as_str()))
}

/// Takes the whole store with every gate, whatever it holds: only where nobody needs its memory any more. Errors: 55P03, to be
/// retried.
pub fn drop_objects() -> String {
    transaction("SET LOCAL lock_timeout = 300; DROP SCHEMA IF EXISTS pgcutover CASCADE")
}

/// The routes that have anything in this store: one text a row.
pub const ROUTES: &str = "SELECT s.db AS route FROM pgcutover.sentinel s ORDER BY 1";

/// Creates the event trigger of an armed route, always on. Errors: 42501 for all but superusers: warn then.
pub fn event_trigger(db: &Name) -> String {
    let name = format!("pgcutover_ddl_{db}");
    let (quoted, function) = (identifier(&name), identifier(&format!("ddl:{db}")));
    let create = format!("CREATE EVENT TRIGGER {quoted} ON ddl_command_start EXECUTE FUNCTION pgcutover.{function}()");
    let body = format!(
        "BEGIN IF NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger e WHERE e.evtname = {}) THEN {create}; END IF; \
         IF NOT {there} THEN ALTER EVENT TRIGGER {quoted} ENABLE ALWAYS; END IF; END",
        literal(&name),
        there = event_trigger_stands(db),
    );
    transaction(&format!("DO LANGUAGE plpgsql{}", spaced_literal(&body)))
}

/// A condition: the event trigger of a route is there and always on. Whoever may not create one uses another's.
pub fn event_trigger_stands(db: &Name) -> String {
    format!(
        "EXISTS (SELECT FROM pg_catalog.pg_event_trigger e WHERE e.evtname = {} AND e.evtenabled = 'A')",
        literal(&format!("pgcutover_ddl_{db}"))
    )
}

fn spaced_literal(text: &str) -> String {
    format!(" {}", literal(text).trim_start())
}

/// State, newest decision and newest commit of one database in one statement: one row for [`StoreView::decode`].
pub fn view(db: &Name) -> String {
    let db = literal(db.as_str());
    let newest = |condition: &str| {
        format!(
            "(SELECT * FROM (SELECT d.epoch, d.run, d.outcome, d.target FROM pgcutover.decision d \
             WHERE d.db OPERATOR(pg_catalog.=) q.db UNION ALL \
             SELECT e.epoch, e.run, e.outcome, e.target FROM pgcutover.evidence e WHERE e.db OPERATOR(pg_catalog.=) q.db) u \
             {condition} ORDER BY u.epoch DESC, u.outcome DESC LIMIT 1)"
        )
    };
    let any = newest("");
    let commit = newest("WHERE u.outcome OPERATOR(pg_catalog.=) 'commit'");
    format!(
        "SELECT s.epoch, s.run, s.target, \
         (EXISTS (SELECT FROM pgcutover.decision d WHERE d.db OPERATOR(pg_catalog.=) s.db AND d.epoch OPERATOR(pg_catalog.=) s.epoch) \
         OR EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db OPERATOR(pg_catalog.=) s.db AND e.epoch OPERATOR(pg_catalog.=) s.epoch)), \
         l.epoch, l.run, l.outcome, l.target, c.epoch, c.run, c.outcome, c.target \
         FROM (SELECT{}::pg_catalog.text AS db) q \
         LEFT JOIN pgcutover.state s ON s.db OPERATOR(pg_catalog.=) q.db \
         LEFT JOIN LATERAL {any} l ON true LEFT JOIN LATERAL {commit} c ON true",
        if db.starts_with(' ') { db } else { format!(" {db}") }
    )
}

/// Writes a proxy's row in `member`.
pub fn enroll(db: &Name, member: &Member) -> String {
    let texts = [literal(db.as_str()), literal(&member.instance), reachable(&member.address), literal(&member.backend)];
    let mut values = texts.join(", ") + ", ";
    let paused = member.paused_epoch.map_or("NULL".to_owned(), |epoch| epoch.to_string());
    let written = write!(values, "{}, {paused}, pg_catalog.clock_timestamp()", member.route_epoch);
    debug_assert!(written.is_ok(), "a String takes any text");
    transaction(&format!(
        "INSERT INTO pgcutover.member (db, instance, address, backend, route_epoch, paused_epoch, seen_at) VALUES ({values}) \
         ON CONFLICT (db, instance) DO UPDATE SET address = excluded.address, backend = excluded.backend, \
         route_epoch = excluded.route_epoch, paused_epoch = excluded.paused_epoch, seen_at = excluded.seen_at"
    ))
}

/// A proxy that listens everywhere is where the server sees it come from: an address that nobody could connect to helps nobody.
fn reachable(address: &str) -> String {
    let Some(port) = address.strip_prefix("0.0.0.0:").or_else(|| address.strip_prefix("[::]:")) else {
        return literal(address);
    };
    let from = "pg_catalog.inet_client_addr()";
    format!(
        "CASE WHEN pg_catalog.family({from}) OPERATOR(pg_catalog.=) 6 \
         THEN pg_catalog.concat('[', pg_catalog.host({from}), ']:', {0}) \
         ELSE pg_catalog.concat(coalesce(pg_catalog.host({from}), '127.0.0.1'), ':', {0}) END",
        literal(port)
    )
}

/// Every member of a database, living or not: rows for [`Member::decode`].
///
/// A run that lives says so in a row of its own ([`sign_of_life`]), which no proxy could have.
pub fn members(db: &Name) -> String {
    format!(
        "SELECT m.instance, m.address, m.backend, m.route_epoch, m.paused_epoch, \
         GREATEST(0, pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) m.seen_at) \
         OPERATOR(pg_catalog.*) 1000)::pg_catalog.int8 \
         FROM pgcutover.member m WHERE m.db OPERATOR(pg_catalog.=) {} ORDER BY m.instance",
        literal(db.as_str())
    )
}

/// The address in the row by which a run says that it lives: its instance is the run, its epoch the one that it holds for.
pub const CONTROLLER: &str = "proxyctl";

/// How long ago the run of this claim last said that it lives, in milliseconds; `None` if it does not hold for this epoch.
pub fn sign_of_life(members: impl IntoIterator<Item = Member>, claim: Claim) -> Option<u64> {
    let run = claim.run.to_string();
    let said = |member: &Member| {
        member.address == CONTROLLER && member.instance == run && member.paused_epoch == Some(claim.epoch)
    };
    members.into_iter().find(said).map(|member| member.seen_ms_ago)
}

/// Every gate of the server's database: rows for [`Gate::decode`].
pub const GATES: &str = "SELECT g.db, g.form, g.epoch FROM pgcutover.gates g ORDER BY g.db";

/// Whether this database has the store: one boolean.
pub const INSTALLED: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n \
     ON n.oid OPERATOR(pg_catalog.=) p.pronamespace \
     WHERE n.nspname OPERATOR(pg_catalog.=) 'pgcutover' AND p.proname OPERATOR(pg_catalog.=) 'decide')";

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "6f1c3b62-6a53-4b52-9a0e-0d6d3f0b8f11";

    #[test]
    fn literals_survive_quotes_and_backslashes() {
        assert_eq!(literal("o'clock"), "'o''clock'");
        assert_eq!(literal("a\\b'c"), " E'a\\\\b''c'");
        assert_eq!(literal("nul\0byte"), "'nulbyte'");
        assert_eq!(identifier("we\"ird"), "\"we\"\"ird\"");
    }

    #[test]
    fn names_have_1_to_50_bytes_and_no_control_characters() {
        assert!(Name::new("app").is_ok());
        assert!(Name::new("ä \"b\" 'c' \\d").is_ok());
        for bad in ["", "a\0b", "a\nb", &"x".repeat(51), &"é".repeat(26)] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_decision_is_one_message_that_ends_its_transaction() {
        let claim = Claim { epoch: 7_u64.try_into().unwrap(), run: RUN.parse().unwrap() };
        let turn = Turn { db: Name::new("app").unwrap(), claim };
        assert_eq!(
            decide(&turn, Outcome::Abort),
            format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
                 SELECT pgcutover.decide('app', 7, '{RUN}', 'abort'); COMMIT"
            )
        );
    }

    #[test]
    fn an_empty_store_has_nothing_open_and_nothing_decided() {
        let row = [None, None, None, Some("f"), None, None, None, None, None, None, None, None];
        assert_eq!(StoreView::decode(&row), Ok(StoreView::default()));
    }

    #[test]
    fn an_epoch_is_open_until_it_is_decided() {
        let mut row = [None; 12];
        row[..4].copy_from_slice(&[Some("8"), Some(RUN), Some("green"), Some("f")]);
        row[4..8].copy_from_slice(&[Some("7"), Some(RUN), Some("abort"), Some("green")]);
        row[8..].copy_from_slice(&[Some("6"), Some(RUN), Some("commit"), Some("blue")]);
        let view = StoreView::decode(&row).unwrap();
        assert_eq!(view.open.unwrap().epoch.as_u64(), 8);
        assert_eq!(view.last.unwrap().outcome, Outcome::Abort);
        assert_eq!(view.last_commit.unwrap().target, "blue");
        row[3] = Some("t");
        assert_eq!(StoreView::decode(&row).unwrap().open, None);
    }

    #[test]
    fn bad_rows_are_named_and_never_become_an_outcome() {
        assert_eq!(StoreView::decode(&[None; 3]), Err(BadRow::Columns { wanted: 12, found: 3 }));
        assert_eq!(decode_outcome(&[None]), Err(BadRow::Null("outcome")));
        assert_eq!(decode_outcome(&[Some("Commit")]), Err(BadRow::value("outcome", "Commit")));
        assert_eq!(decode_epoch(&[Some("-1")]), Err(BadRow::value("epoch", "-1")));
        assert_eq!(Gate::decode(&[Some("app"), Some("ajar"), Some("1")]), Err(BadRow::value("form", "ajar")));
    }

    #[test]
    fn identity_reads_a_primary_and_a_standby() {
        let primary =
            Identity::decode(&[Some("7301234567890123456"), Some("0000000A"), Some("f"), Some("130023")]).unwrap();
        assert_eq!(primary.timeline, Some(10));
        let standby = Identity::decode(&[Some("-1"), None, Some("t"), Some("170010")]).unwrap();
        assert_eq!((standby.system_identifier, standby.timeline), (u64::MAX, None));
    }
}
