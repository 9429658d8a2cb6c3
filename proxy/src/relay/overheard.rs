//! What a session's texts tell that no server can be asked for later.
//!
//! Invariant: a hazard that a text may hold is noted, also where it turns out to be none; a text that was not read whole is
//! a hazard itself. Words are compared without regard to case, inside strings and comments too. Pure.

mod locks;
mod resets;
mod unnamed;

pub use resets::Reset;

use std::collections::{BTreeMap, BTreeSet};

use locks::Locks;
use resets::Resets;
use unnamed::Unnamed;

/// Names of settings are kept up to this many.
const NAMES_MAX: usize = 256;

/// Statements that take locks are remembered up to this many.
const TAKERS_MAX: usize = 64;

/// Reported settings that change what the text of a statement means.
const PARSE_SETTINGS: [&[u8]; 4] = [b"standard_conforming_strings", b"DateStyle", b"IntervalStyle", b"TimeZone"];

/// Something that may have left a trace in the server's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hazard {
    /// LOAD.
    Load,
    /// SET SESSION AUTHORIZATION.
    SessionAuthorization,
    /// A FunctionCall message.
    FunctionCall,
    /// setseed.
    RandomSeed,
    /// A setting whose name was not in the text.
    DynamicSetting,
    /// A text too long to be read.
    Unread,
}

/// Whether statements were parsed, and under which settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Parsing {
    /// None yet.
    #[default]
    Nothing,
    /// All under the present settings.
    Settled,
    /// A setting may have changed after the first of them.
    Unsettled,
}

/// Statements with a clause SET of their own.
const CLAUSE_OWNERS: [&[u8]; 5] = [b"update", b"alter", b"merge", b"create", b"conflict"];

/// Whether a SET may belong to another statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clauses {
    None,
    Perhaps,
}

/// Whether a text names a function that takes a session advisory lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Locks,
}

/// What stands before a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// A name, quoted or not.
    Name,
    /// The beginning, or a sign.
    Other,
}

impl Before {
    fn of(last: Self, between: &[u8]) -> Self {
        match between.trim_ascii().last() {
            None => last,
            Some(b'"') => Self::Name,
            Some(_) => Self::Other,
        }
    }
}

/// What was heard since the login.
#[derive(Debug, Clone, Default)]
pub struct Overheard {
    hazards: BTreeSet<Hazard>,
    names: BTreeSet<Box<[u8]>>,
    parsing: Parsing,
    unnamed: Unnamed,
    resets: Resets,
    locks: LockCalls,
}

/// Calls that took a session advisory lock, as far as they were heard.
#[derive(Debug, Clone, Default)]
struct LockCalls {
    count: Tally,
    /// Statements of the protocol that take locks, by name.
    statements: BTreeMap<Box<[u8]>, Locks>,
    /// What the unnamed portal takes each time it runs.
    portal: Locks,
}

/// A count, as long as it is sure.
#[derive(Debug, Clone, Copy)]
enum Tally {
    Sure(u32),
    Unclear,
}

impl Default for Tally {
    fn default() -> Self {
        Self::Sure(0)
    }
}

impl LockCalls {
    fn add(&mut self, locks: Locks) {
        self.count = match (self.count, locks) {
            (Tally::Sure(count), Locks::Calls(calls)) => Tally::Sure(count.saturating_add(calls)),
            (count, Locks::None) => count,
            (Tally::Unclear, Locks::Calls(_)) | (_, Locks::Unclear) => Tally::Unclear,
        };
    }

    fn parsed(&mut self, name: &[u8], locks: Locks) {
        match locks {
            Locks::None => {
                self.statements.remove(name);
            }
            Locks::Calls(_) | Locks::Unclear if self.statements.len() < TAKERS_MAX => {
                self.statements.insert(name.into(), locks);
            }
            Locks::Calls(_) | Locks::Unclear => self.count = Tally::Unclear,
        }
    }

    /// `portal\0statement\0…`, as far as it is here.
    fn bound(&mut self, body: &[u8]) {
        if self.statements.is_empty() {
            self.portal = Locks::None;
            return;
        }
        let mut parts = body.splitn(3, |byte| *byte == 0);
        let (Some(portal), Some(statement), Some(_)) = (parts.next(), parts.next(), parts.next()) else {
            self.count = Tally::Unclear;
            return;
        };
        let locks = self.statements.get(statement).copied().unwrap_or_default();
        match (portal.is_empty(), locks) {
            (true, locks) => self.portal = locks,
            (false, Locks::None) => {}
            // A portal with a name may run any number of times.
            (false, Locks::Calls(_) | Locks::Unclear) => self.count = Tally::Unclear,
        }
    }

    fn executed(&mut self, body: &[u8]) {
        if body.first().is_none_or(|first| *first == 0) {
            self.add(self.portal);
        }
    }
}

impl Overheard {
    /// What may have left a trace.
    pub fn hazards(&self) -> impl Iterator<Item = Hazard> {
        self.hazards.iter().copied()
    }

    /// Custom settings (`myapp.user_id`) that were named.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.names.iter().map(|name| &**name)
    }

    /// See [`Parsing`].
    #[must_use]
    pub fn parsing(&self) -> Parsing {
        self.parsing
    }

    /// The text of the last Parse of the unnamed statement, if it is sure which that was.
    #[must_use]
    pub fn unnamed(&self) -> Option<&[u8]> {
        self.unnamed.text()
    }

    /// Calls that took a session advisory lock each, since none was held; `None`: unclear.
    #[must_use]
    pub fn lock_calls(&self) -> Option<u32> {
        match self.locks.count {
            Tally::Sure(count) => Some(count),
            Tally::Unclear => None,
        }
    }

    /// The server says that the session holds no lock: calls count from here. What was unclear may come again.
    pub fn holds_no_locks(&mut self) {
        if let Tally::Sure(count) = &mut self.locks.count {
            *count = 0;
        }
    }

    /// A message of the client: Query and Parse whole, of others the beginning.
    pub(super) fn request(&mut self, tag: u8, body: &[u8]) {
        match tag {
            b'Q' => {
                let taken = self.locks_in(body);
                self.locks.add(taken);
            }
            b'P' => self.parse(body),
            b'B' => self.locks.bound(body),
            b'E' => self.locks.executed(body),
            b'F' => self.note(Hazard::FunctionCall),
            _ => {}
        }
    }

    /// A text that is too long to be read.
    pub(super) fn unread(&mut self, tag: u8) {
        self.note(Hazard::Unread);
        if tag == b'P' {
            self.unnamed.unread();
        }
    }

    /// The type of a message of the server.
    pub(super) fn answer(&mut self, tag: u8) {
        self.unnamed.answer(tag);
    }

    /// All that was sent is answered: what fails from here on does not undo the last unnamed Parse.
    pub(super) fn answered(&mut self) {
        self.unnamed.answered();
    }

    /// The command tag of a statement that the server has carried out.
    pub(super) fn completed(&mut self, tag: &[u8]) {
        self.resets.completed(tag);
    }

    /// A transaction is over: which settings it has taken back to their start.
    pub fn take_reset(&mut self) -> Reset {
        self.resets.take()
    }

    /// A setting that the server reported.
    pub(super) fn reported(&mut self, name: &[u8]) {
        if name.eq_ignore_ascii_case(b"session_authorization") {
            self.note(Hazard::SessionAuthorization);
        }
        let matters = PARSE_SETTINGS.iter().any(|setting| setting.eq_ignore_ascii_case(name));
        if matters && self.parsing == Parsing::Settled {
            self.parsing = Parsing::Unsettled;
        }
    }

    fn note(&mut self, hazard: Hazard) {
        self.hazards.insert(hazard);
    }

    fn parse(&mut self, body: &[u8]) {
        let mut parts = body.splitn(3, |byte| *byte == 0);
        let (name, text) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        self.parsed();
        self.unnamed.parse(name, text);
        let taken = self.locks_in(text);
        self.locks.parsed(name, taken);
    }

    /// Reads a text; what it does to locks.
    fn locks_in(&mut self, text: &[u8]) -> Locks {
        match self.text(text) {
            Takes::Nothing => Locks::None,
            Takes::Locks => locks::locks_in(text),
        }
    }

    fn parsed(&mut self) {
        if self.parsing == Parsing::Nothing {
            self.parsing = Parsing::Settled;
        }
    }

    fn text(&mut self, text: &[u8]) -> Takes {
        let mut takes = Takes::Nothing;
        let mut rest = text;
        let mut clauses = Clauses::None;
        let mut before = Before::Other;
        while let Some(at) = rest.iter().position(|byte| is_word(*byte)) {
            before = Before::of(before, &rest[..at]);
            rest = &rest[at..];
            let end = rest.iter().position(|byte| !is_word(*byte)).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            if CLAUSE_OWNERS.iter().any(|owner| owner.eq_ignore_ascii_case(word)) {
                clauses = Clauses::Perhaps;
            }
            if word.eq_ignore_ascii_case(b"set") {
                // `UPDATE t SET "a" = 1` sets a column.
                let clause = clauses == Clauses::Perhaps && before == Before::Name;
                self.set(after, clause);
            }
            self.word(word, after);
            if locks::is_taker(word) {
                takes = Takes::Locks;
            }
            before = Before::Name;
            rest = after;
        }
        takes
    }

    fn word(&mut self, word: &[u8], after: &[u8]) {
        let is = |known: &[u8]| word.eq_ignore_ascii_case(known);
        match word.len() {
            4 if is(b"load") => self.note(Hazard::Load),
            5 if is(b"reset") => self.reset(after),
            7 if is(b"prepare") => self.parsed(),
            7 if is(b"setseed") => self.note(Hazard::RandomSeed),
            10 if is(b"set_config") => self.set_config(after),
            13 if is(b"authorization") => self.note(Hazard::SessionAuthorization),
            _ => {}
        }
    }

    /// `SET [SESSION | LOCAL] name …`; in a clause of another statement an odd name is a column's.
    fn set(&mut self, after: &[u8], clause: bool) {
        let mut after = after.trim_ascii_start();
        for scope in [&b"session"[..], b"local"] {
            let follows = after.get(..scope.len()).is_some_and(|start| start.eq_ignore_ascii_case(scope));
            if follows && after.get(scope.len()).is_some_and(|byte| !is_word(*byte) && *byte != b'.') {
                after = after[scope.len()..].trim_ascii_start();
            }
        }
        let end = after.iter().position(|byte| !is_word(*byte) && *byte != b'.').unwrap_or(after.len());
        if !clause && is_default(&after[end..]) {
            self.resets.set_to_default();
        }
        // Quotes, comments, `format('SET %I …')`, `SET a . b`: a name that would have to be parsed.
        let odd = end == 0 || after[end..].trim_ascii_start().first().is_some_and(|byte| b"\".%/|'-".contains(byte));
        if !odd {
            self.name(&after[..end]);
        } else if !clause {
            self.note(Hazard::DynamicSetting);
        }
    }

    /// `RESET name`: a custom setting that was not there is empty from then on.
    fn reset(&mut self, after: &[u8]) {
        let after = after.trim_ascii_start();
        let end = after.iter().position(|byte| !is_word(*byte) && *byte != b'.').unwrap_or(after.len());
        self.resets.reset(&after[..end]);
        if after.get(end) == Some(&b'"') {
            self.note(Hazard::DynamicSetting);
        } else {
            self.name(&after[..end]);
        }
    }

    /// `set_config('name', …)`
    fn set_config(&mut self, after: &[u8]) {
        let after = after.trim_ascii_start();
        // Without a bracket it is no call, or one that can't be read.
        let literal = after.strip_prefix(b"(").map(<[u8]>::trim_ascii_start).and_then(|args| args.strip_prefix(b"'"));
        let Some(literal) = literal else { return self.note(Hazard::DynamicSetting) };
        let end = literal.iter().position(|byte| !is_word(*byte) && *byte != b'.').unwrap_or(literal.len());
        let follows = literal[end..].strip_prefix(b"'").map(<[u8]>::trim_ascii_start);
        match follows {
            Some([b',', ..]) => self.name(&literal[..end]),
            Some(_) | None => self.note(Hazard::DynamicSetting),
        }
    }

    /// A setting that was named. Settings without a dot are the server's own, which it shows.
    fn name(&mut self, name: &[u8]) {
        if !name.contains(&b'.') {
            return;
        }
        if self.names.len() == NAMES_MAX && !self.names.contains(name) {
            return self.note(Hazard::DynamicSetting);
        }
        self.names.insert(name.to_ascii_lowercase().into());
    }
}

/// `TO DEFAULT`, `= DEFAULT`, `ZONE DEFAULT`, `ZONE LOCAL`.
fn is_default(rest: &[u8]) -> bool {
    let next = |rest: &[u8]| rest.iter().position(|byte| !is_word(*byte)).unwrap_or(rest.len());
    let rest = rest.trim_ascii_start();
    let skipped = rest.strip_prefix(b"=").unwrap_or_else(|| &rest[next(rest)..]).trim_ascii_start();
    let value = &skipped[..next(skipped)];
    value.eq_ignore_ascii_case(b"default") || value.eq_ignore_ascii_case(b"local")
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(texts: &[&str]) -> Overheard {
        let mut overheard = Overheard::default();
        texts.iter().for_each(|text| overheard.request(b'Q', format!("{text}\0").as_bytes()));
        overheard
    }

    fn hazards(text: &str) -> Vec<Hazard> {
        heard(&[text]).hazards().collect()
    }

    #[test]
    fn what_leaves_a_trace_is_noted_wherever_it_stands() {
        assert_eq!(hazards("SELECT 1; load 'auto_explain'"), [Hazard::Load]);
        assert_eq!(hazards("DO $$BEGIN PERFORM pg_catalog.SetSeed(0.5); END$$"), [Hazard::RandomSeed]);
        assert_eq!(
            hazards("SET SESSION /* */ AUTHORIZATION x"),
            [Hazard::SessionAuthorization, Hazard::DynamicSetting]
        );
        assert_eq!(hazards("SELECT payload, reset, loaded FROM uploads"), []);
    }

    #[test]
    fn names_of_settings_are_heard_or_it_is_said_that_they_were_not() {
        let names = |text: &str| {
            let heard = heard(&[text]);
            assert_eq!(heard.hazards().count(), 0, "{text}");
            heard.names().map(|name| String::from_utf8(name.to_vec()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(names("SET session MyApp.User = '1'; set local a.b to 2; SET work_mem = 3"), ["a.b", "myapp.user"]);
        assert_eq!(names("SELECT set_config('app.tenant' , $1, false)"), ["app.tenant"]);
        assert_eq!(names("RESET My.Unset; RESET ALL; SELECT reset, 1"), ["my.unset"]);
        assert_eq!(
            names("UPDATE \"t\" SET \"x\" = 1; SELECT set_config('work_mem', '1MB', true)"),
            Vec::<String>::new()
        );
        for text in [
            "SELECT set_config($1, $2, false)",
            "SELECT set_config('a.' || 'b', '1', false)",
            "SELECT set_config(E'a.b', '1', false)",
            "SET \"a.b\" = 1",
            "SET a.\"b\" = 1",
            "RESET \"a\".\"b\"",
            "DO $$BEGIN EXECUTE format('SET %I = 1', n); END$$",
            "UPDATE t SET \"a\" = 1; SET \"a.b\" = 2",
        ] {
            assert_eq!(hazards(text), [Hazard::DynamicSetting], "{text}");
        }
    }

    #[test]
    fn a_set_to_default_is_a_reset_and_others_are_none() {
        let reset = |text: &str| {
            let mut heard = heard(&[text]);
            heard.completed(b"SET\0");
            heard.take_reset()
        };
        for text in ["SET work_mem TO DEFAULT", "set a.b=default", "SET LOCAL x = DEFAULT;", "SET TIME ZONE local"] {
            assert_eq!(reset(text), Reset::Some, "{text}");
        }
        for text in ["SET x TO 1", "UPDATE t SET a = DEFAULT", "INSERT INTO t DEFAULT VALUES; SET x = 'default'", "SET"]
        {
            assert_eq!(reset(text), Reset::Nothing, "{text}");
        }
    }

    #[test]
    fn lock_calls_are_counted_as_they_run() {
        let mut overheard = heard(&["SELECT pg_advisory_lock(1)", "SELECT 1"]);
        assert_eq!(overheard.lock_calls(), Some(1));
        overheard.request(b'P', b"l\0SELECT pg_advisory_lock($1)\0\0\0");
        assert_eq!(overheard.lock_calls(), Some(1), "prepared only");
        for _ in 0..2 {
            overheard.request(b'B', b"\0l\0\0\0");
            overheard.request(b'E', b"\0\0\0\0\0");
        }
        assert_eq!(overheard.lock_calls(), Some(3));
        overheard.request(b'B', b"\0other\0\0\0");
        overheard.request(b'E', b"\0\0\0\0\0");
        assert_eq!(overheard.lock_calls(), Some(3));
        overheard.holds_no_locks();
        assert_eq!(overheard.lock_calls(), Some(0));
        for (tag, body) in [
            (b'B', &b"portal\0l\0\0\0"[..]),
            (b'B', b"port"),
            (b'Q', b"DO $$ BEGIN PERFORM pg_advisory_lock(1); END $$\0"),
        ] {
            let mut overheard = overheard.clone();
            overheard.request(tag, body);
            overheard.holds_no_locks();
            assert_eq!(overheard.lock_calls(), None, "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn a_parse_setting_matters_only_after_a_parse() {
        let mut overheard = heard(&["SELECT 1"]);
        overheard.reported(b"TimeZone");
        assert_eq!(overheard.parsing(), Parsing::Nothing);
        overheard.request(b'P', b"s\0SELECT 1\0\0\0");
        assert_eq!((overheard.parsing(), overheard.unnamed()), (Parsing::Settled, None));
        overheard.reported(b"application_name");
        assert_eq!(overheard.parsing(), Parsing::Settled);
        overheard.reported(b"timezone");
        assert_eq!(overheard.parsing(), Parsing::Unsettled);
    }
}
