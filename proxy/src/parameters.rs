//! Settings that a client carries from one server connection to the next, and what servers report of theirs.
//!
//! Invariant: a server connection differs from its start by exactly its [`Settings`]; so what has to be said to make it
//! fit another client is the difference of two of them. Names compare without regard to case, as in PostgreSQL. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::message::Pair;

/// Settings that differ from what the server connection started with, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings(Vec<Pair>);

/// What a server reports (ParameterStatus), in the order of first report.
pub type Reported = Vec<Pair>;

/// Reported parameters that no client can set: they belong to the server or the login.
const READ_ONLY: [&[u8]; 7] = [
    b"server_version",
    b"server_encoding",
    b"integer_datetimes",
    b"is_superuser",
    b"session_authorization",
    b"in_hot_standby",
    b"scram_iterations",
];

/// Reported parameters that say how bytes are read and written: a live session keeps what it has when its database moves,
/// because the program at its other end goes on reading and writing so. All others are told as the new server has them.
const KEPT: [&[u8]; 5] =
    [b"client_encoding", b"DateStyle", b"IntervalStyle", b"standard_conforming_strings", b"TimeZone"];

/// What puts a session into read-only mode. Servers report it from 14 on.
pub const READ_ONLY_MODE: &[u8] = b"default_transaction_read_only";

/// Settings that no statement's meaning depends on and in which clients often differ.
const MEANINGLESS: [&[u8]; 5] = [
    b"application_name",
    b"extra_float_digits",
    b"idle_in_transaction_session_timeout",
    b"lock_timeout",
    b"statement_timeout",
];

impl Settings {
    /// From a Startup's settings; the last one of a name wins, as in PostgreSQL.
    #[must_use]
    pub fn new(pairs: impl IntoIterator<Item = Pair>) -> Self {
        let mut settings = Self::default();
        pairs.into_iter().for_each(|(name, value)| settings.set(name, value));
        settings
    }

    /// The value of a setting.
    #[must_use]
    pub fn value(&self, name: &[u8]) -> Option<&[u8]> {
        self.find(name).ok().map(|index| &*self.0[index].1)
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|(name, _)| &**name)
    }

    /// Sets one.
    pub fn set(&mut self, name: Box<[u8]>, value: Box<[u8]>) {
        match self.find(&name) {
            Ok(index) => self.0[index].1 = value,
            Err(index) => self.0.insert(index, (name, value)),
        }
    }

    /// Takes note of what a server reported while it served this client.
    pub fn follow(&mut self, initial: &Reported, name: &[u8], value: &[u8]) {
        if READ_ONLY.iter().any(|fixed| fixed.eq_ignore_ascii_case(name)) {
            return;
        }
        if reported(initial, name) == Some(value) {
            if let Ok(index) = self.find(name) {
                self.0.remove(index);
            }
        } else {
            self.set(name.into(), value.into());
        }
    }

    /// With what a session that was `told` so keeps on another server that starts with `initial`; `None` if the two agree.
    #[must_use]
    pub fn carried(&self, told: &Reported, initial: &Reported) -> Option<Settings> {
        let mut carried = None;
        for name in KEPT {
            let (Some(had), Some(has)) = (reported(told, name), reported(initial, name)) else { continue };
            if had != has && self.value(name).is_none() {
                carried.get_or_insert_with(|| self.clone()).set(name.into(), had.into());
            }
        }
        carried
    }

    /// The Query that turns a server connection with these settings into one with `wanted`; `None` if nothing differs.
    #[must_use]
    pub fn query_to(&self, wanted: &Settings) -> Option<Vec<u8>> {
        let mut query = Vec::new();
        for (name, _) in self.0.iter().filter(|(name, _)| wanted.value(name).is_none()) {
            query.extend_from_slice(b"RESET ");
            put_name(&mut query, name);
            query.extend_from_slice(b"; ");
        }
        let changed = wanted.0.iter().filter(|(name, value)| self.value(name) != Some(value));
        for (index, (name, value)) in changed.enumerate() {
            query.extend_from_slice(if index == 0 { b"SELECT " } else { b", " });
            query.extend_from_slice(b"pg_catalog.set_config(");
            put_literal(&mut query, name);
            query.extend_from_slice(b", ");
            put_literal(&mut query, value);
            query.extend_from_slice(b", false)");
        }
        (!query.is_empty()).then_some(query)
    }

    /// The Query that gives a server connection these settings, whatever it has.
    #[must_use]
    pub fn query_from_start(&self) -> Vec<u8> {
        let mut query = b"RESET ALL; ".to_vec();
        query.extend_from_slice(&Settings::default().query_to(self).unwrap_or_default());
        query
    }

    /// The same in read-only mode.
    #[must_use]
    pub fn read_only(&self) -> Settings {
        self.with(READ_ONLY_MODE, Some(b"on"))
    }

    /// The same with another value of one, or without it.
    #[must_use]
    pub fn with(&self, name: &[u8], value: Option<&[u8]>) -> Settings {
        let mut settings = self.clone();
        match (value, settings.find(name)) {
            (Some(value), _) => settings.set(name.into(), value.into()),
            (None, Ok(index)) => drop(settings.0.remove(index)),
            (None, Err(_)) => {}
        }
        settings
    }

    /// What a server that starts with `initial` would report of read-only mode with these settings; `None` where it does
    /// not.
    #[must_use]
    pub fn own_mode<'a>(&self, initial: &'a Reported) -> Option<&'a [u8]> {
        let start = reported(initial, READ_ONLY_MODE)?;
        // As PostgreSQL reads a boolean, which may be cut short.
        let is_on = |value: &[u8]| matches!(*value.to_ascii_lowercase(), [b'1'] | [b'o', b'n'] | [b't' | b'y', ..]);
        Some(self.value(READ_ONLY_MODE).map_or(start, |own| if is_on(own) { b"on" } else { b"off" }))
    }

    /// With those of `start` that are not among them.
    #[must_use]
    pub fn completed(&self, start: &Settings) -> Settings {
        let mut completed = self.clone();
        for (name, value) in &start.0 {
            if self.value(name).is_none() {
                completed.set(name.clone(), value.clone());
            }
        }
        completed
    }

    /// A number that differs where a text may be analysed differently under these settings.
    #[must_use]
    pub fn seal(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let meaning = self.0.iter().filter(|(name, _)| !MEANINGLESS.iter().any(|m| m.eq_ignore_ascii_case(name)));
        meaning.for_each(|(name, value)| (name.to_ascii_lowercase(), value).hash(&mut hasher));
        hasher.finish()
    }

    fn find(&self, name: &[u8]) -> Result<usize, usize> {
        let lower = |bytes: &[u8]| bytes.to_ascii_lowercase();
        let wanted = lower(name);
        self.0.binary_search_by(|(known, _)| lower(known).cmp(&wanted))
    }
}

/// The value of a reported parameter.
#[must_use]
pub fn reported<'a>(all: &'a Reported, name: &[u8]) -> Option<&'a [u8]> {
    all.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
}

/// Takes note of a report.
pub fn report(all: &mut Reported, name: &[u8], value: &[u8]) {
    match all.iter_mut().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
        Some((_, known)) => *known = value.into(),
        None => all.push((name.into(), value.into())),
    }
}

/// What a client that was told `told` has to be told when it meets a server that reports `now`.
pub fn differences<'a>(told: &'a Reported, now: &'a Reported) -> impl Iterator<Item = &'a Pair> {
    now.iter().filter(|(name, value)| reported(told, name) != Some(value))
}

/// A string literal that reads the same whatever standard_conforming_strings says.
fn put_literal(query: &mut Vec<u8>, text: &[u8]) {
    query.extend_from_slice(b" E'");
    for byte in text {
        if matches!(byte, b'\'' | b'\\') {
            query.push(*byte);
        }
        query.push(*byte);
    }
    query.push(b'\'');
}

/// A setting's name, each part of it quoted (`"myapp"."user_id"`).
fn put_name(query: &mut Vec<u8>, name: &[u8]) {
    for (index, part) in name.split(|byte| *byte == b'.').enumerate() {
        if index > 0 {
            query.push(b'.');
        }
        query.push(b'"');
        part.iter().filter(|byte| **byte != b'"').for_each(|byte| query.push(*byte));
        query.push(b'"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, value: &str) -> Pair {
        (name.as_bytes().into(), value.as_bytes().into())
    }

    fn query(from: &[(&str, &str)], to: &[(&str, &str)]) -> Option<String> {
        let settings = |pairs: &[(&str, &str)]| Settings::new(pairs.iter().map(|(n, v)| pair(n, v)));
        settings(from).query_to(&settings(to)).map(|query| String::from_utf8(query).unwrap())
    }

    #[test]
    fn only_differences_are_said() {
        assert_eq!(query(&[("TimeZone", "UTC")], &[("timezone", "UTC")]), None);
        assert_eq!(
            query(&[("a.b", "1"), ("x", "1")], &[("x", "it's \\"), ("y", "2")]).unwrap(),
            "RESET \"a\".\"b\"; SELECT pg_catalog.set_config( E'x',  E'it''s \\\\', false), \
             pg_catalog.set_config( E'y',  E'2', false)"
        );
    }

    #[test]
    fn a_setting_that_is_back_at_its_start_is_no_setting() {
        let initial = vec![pair("TimeZone", "UTC"), pair("server_version", "13")];
        let mut settings = Settings::default();
        settings.follow(&initial, b"TimeZone", b"CET");
        assert_eq!(settings.value(b"timezone"), Some(&b"CET"[..]));
        settings.follow(&initial, b"TimeZone", b"UTC");
        settings.follow(&initial, b"server_version", b"17");
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn read_only_mode_is_put_on_and_taken_off_again() {
        let own = Settings::new([pair("TimeZone", "CET")]);
        let on = own.query_to(&own.read_only()).unwrap();
        assert!(String::from_utf8(on).unwrap().contains("E'default_transaction_read_only',  E'on'"));
        assert_eq!(own.read_only().query_to(&own).unwrap(), b"RESET \"default_transaction_read_only\"; ");
        let reads = Settings::new([pair("Default_Transaction_Read_Only", "on")]);
        assert_eq!(reads.query_to(&reads.read_only()), None, "its own wish");
        let off = Settings::new([pair("default_transaction_read_only", "off")]);
        assert!(String::from_utf8(off.read_only().query_to(&off).unwrap()).unwrap().ends_with("E'off', false)"));
        let initial = vec![pair("default_transaction_read_only", "off")];
        assert_eq!(own.own_mode(&initial), Some(&b"off"[..]));
        for (wish, told) in [("TRUE", "on"), ("1", "on"), ("y", "on"), ("of", "off"), ("0", "off"), ("false", "off")] {
            let own = Settings::new([pair("default_transaction_read_only", wish)]);
            assert_eq!(own.own_mode(&initial), Some(told.as_bytes()), "{wish}");
        }
        assert_eq!(reads.own_mode(&Vec::new()), None, "a server before 14");
    }

    #[test]
    fn a_session_that_moves_keeps_how_it_reads_and_is_told_the_rest() {
        let old = vec![pair("server_version", "13"), pair("TimeZone", "UTC"), pair("DateStyle", "ISO, MDY")];
        let new = vec![
            pair("server_version", "17"),
            pair("in_hot_standby", "off"),
            pair("TimeZone", "CET"),
            pair("DateStyle", "German, DMY"),
        ];
        let own = Settings::new([pair("datestyle", "SQL, DMY")]);
        let carried = own.carried(&old, &new).unwrap();
        assert_eq!(carried, Settings::new([pair("datestyle", "SQL, DMY"), pair("TimeZone", "UTC")]));
        assert_eq!(own.carried(&old, &old), None);
        let told: Vec<_> = differences(&old, &new).map(|(name, _)| String::from_utf8_lossy(name)).collect();
        assert_eq!(told, ["server_version", "in_hot_standby", "TimeZone", "DateStyle"], "before it is set back");
    }
}
