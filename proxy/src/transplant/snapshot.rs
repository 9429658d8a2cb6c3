//! What a session is made of, as its server says it, and whether two servers say the same.
//!
//! Invariant: pure data; texts are bytes in the session's client_encoding; all of it is bounded by the probe.

use crate::transplant::Reason;
use crate::transplant::sequences::{Seat, Sequences};
use crate::transplant::still::Print;

/// A session between two transactions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    pub(super) state: State,
    pub(super) sequences: Sequences,
    /// In the order of the server's list, statements of SQL first, the unnamed one last.
    pub(super) statements: Vec<Prepared>,
    /// To be recognised by, where its server can say that.
    pub(super) print: Option<Print>,
}

impl Snapshot {
    /// Whether it holds a session advisory lock.
    #[must_use]
    pub fn holds_locks(&self) -> bool {
        !self.state.locks.is_empty()
    }

    /// Whether only sequences tell them apart, if anything does.
    #[must_use]
    pub fn differs_in_sequences_only(&self, other: &Snapshot) -> bool {
        self.state == other.state && self.statements == other.statements
    }

    /// Without what the session knows of sequences.
    #[must_use]
    pub fn without_sequences(&self) -> Snapshot {
        Snapshot { sequences: Sequences::default(), ..self.clone() }
    }

    /// Sequences that the session may not set itself: each needs a ticket on the new server. `None`: some has a name that
    /// can't be said in another encoding.
    #[must_use]
    pub fn seats(&self) -> Option<Vec<Seat>> {
        self.sequences.seats()
    }
}

/// What a session is made of besides its statements.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct State {
    pub(super) who: Who,
    /// All settings that a user or superuser may change.
    pub(super) settings: Vec<Setting>,
    /// Custom settings asked for.
    pub(super) custom: Vec<Custom>,
    /// Sorted.
    pub(super) channels: Vec<Box<[u8]>>,
    /// Sorted.
    pub(super) locks: Vec<Lock>,
}

/// Name and value of a custom setting; no value: it is not defined.
pub(super) type Custom = (Box<[u8]>, Option<Box<[u8]>>);

/// Who the session is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Who {
    pub(super) session: Box<[u8]>,
    pub(super) current: Box<[u8]>,
    /// `none`, or the role that was set.
    pub(super) role: Box<[u8]>,
}

/// A setting as pg_settings has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) name: Box<[u8]>,
    pub(super) value: Box<[u8]>,
    pub(super) source: Box<[u8]>,
    pub(super) category: Box<[u8]>,
}

/// A session advisory lock.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lock {
    /// The arguments that take it, as text: one bigint, or two integers.
    pub(super) key: Vec<String>,
    pub(super) mode: Mode,
}

/// How a lock is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mode {
    Exclusive,
    Shared,
}

/// How a statement was prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// PREPARE: the text is the whole of it.
    Sql,
    /// Parse.
    Protocol,
}

/// A prepared statement; an empty name is the unnamed one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prepared {
    pub(super) name: Box<[u8]>,
    pub(super) text: Box<[u8]>,
    pub(super) origin: Origin,
    pub(super) shape: Shape,
}

/// What a statement takes and gives, without OIDs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Shape {
    pub(super) parameters: Vec<TypeName>,
    /// Name, type, modifier.
    pub(super) columns: Vec<(Box<[u8]>, TypeName, i32)>,
}

/// A type's name; an array's is that of its elements, because servers make up the names of array types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TypeName {
    pub(super) schema: Box<[u8]>,
    pub(super) name: Box<[u8]>,
    pub(super) kind: Kind,
}

/// Whether the array over a type is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Plain,
    Array,
}

/// Where a value comes from that an operator of the server chose, and no session, user or database.
const SERVERS_OWN: [&[u8]; 5] =
    [b"default", b"environment variable", b"configuration file", b"command line", b"override"];

/// Settings of a transaction: between two they mean nothing.
const OF_A_TRANSACTION: [&[u8]; 3] = [b"transaction_deferrable", b"transaction_isolation", b"transaction_read_only"];

/// Categories in which servers may differ: speed, logs and bookkeeping, not answers.
const MAY_DIFFER_CATEGORIES: [&[u8]; 6] =
    [b"Query Tuning", b"Resource Usage", b"Reporting and Logging", b"Statistics", b"Write-Ahead Log", b"Process Title"];

/// Settings in which servers may differ, and why.
const MAY_DIFFER: [&[u8]; 5] = [
    b"client_connection_check_interval", // when a lost client is noticed
    b"deadlock_timeout",                 // when a deadlock is looked for
    b"lc_messages",                      // words of errors, not their codes
    b"password_encryption",              // md5 up to 13; only how new passwords are stored
    b"update_process_title",             // for ps
];

/// Settings in such a category that still have to be equal.
const MUST_NOT_DIFFER: [&[u8]; 1] = [
    b"synchronous_commit", // whether an acknowledged write survives a crash
];

/// Settings that change what a statement's text means when it is parsed, and that no server reports when they change.
const PARSED_UNDER: [&[u8]; 7] = [
    b"array_nulls",
    b"backslash_quote",
    b"lc_monetary",
    b"operator_precedence_warning",
    b"timezone_abbreviations",
    b"transform_null_equals",
    b"xmloption",
];

impl Setting {
    /// Whether the session itself has set it.
    pub(super) fn is_of_session(&self) -> bool {
        *self.source == *b"session"
    }

    /// Whether it has to be said to the new server.
    pub(super) fn has_to_be_set(&self) -> bool {
        self.is_of_session() && !OF_A_TRANSACTION.contains(&&*self.name)
    }

    /// Whether statements prepared before it was set would mean something else now.
    pub(super) fn is_parsed_under(&self) -> bool {
        self.is_of_session() && PARSED_UNDER.contains(&&*self.name)
    }

    /// Whether it is the server's own choice, would be missed, and can be set for a session.
    pub(super) fn may_be_pinned(&self) -> bool {
        let odd: [&[u8]; 3] = [b"client_encoding", b"role", b"session_authorization"];
        self.is_servers_own()
            && !self.may_differ()
            && !OF_A_TRANSACTION.contains(&&*self.name)
            && !odd.contains(&&*self.name)
    }

    fn is_servers_own(&self) -> bool {
        SERVERS_OWN.contains(&&*self.source)
    }

    /// Why `new` can't stand for it.
    fn objection(&self, new: Option<&Setting>) -> Option<Reason> {
        if OF_A_TRANSACTION.contains(&&*self.name) {
            return None;
        }
        match new {
            // Gone, and never touched: nothing depended on it. Libraries that load when first used bring theirs again.
            None if *self.source == *b"default" => None,
            None => Some(Reason::SettingGone),
            Some(new) if new.value == self.value => None,
            Some(new) if self.is_servers_own() && new.is_servers_own() && self.may_differ() => None,
            Some(_) => Some(Reason::SettingDiffers),
        }
    }

    fn may_differ(&self) -> bool {
        let category = || MAY_DIFFER_CATEGORIES.iter().any(|start| self.category.starts_with(start));
        !MUST_NOT_DIFFER.contains(&&*self.name) && (MAY_DIFFER.contains(&&*self.name) || category())
    }
}

impl State {
    /// The first thing in which a restored session's state is not this one; the text names it.
    pub(super) fn difference(&self, restored: &State) -> Option<(Reason, String)> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if self.who != restored.who {
            return Some((Reason::UserDiffers, text(&restored.who.current)));
        }
        let known: std::collections::HashMap<_, _> = restored.settings.iter().map(|new| (&new.name, new)).collect();
        for old in &self.settings {
            let new = known.get(&old.name).copied();
            if let Some(reason) = old.objection(new) {
                let new = new.map_or_else(|| "missing".to_owned(), |new| text(&new.value));
                return Some((reason, format!("{}: {} here, {new} there", text(&old.name), text(&old.value))));
            }
        }
        let differing = self.custom.iter().find(|pair| !restored.custom.contains(pair));
        if let Some((name, _)) = differing {
            return Some((Reason::SettingDiffers, text(name)));
        }
        if self.channels != restored.channels {
            return Some((Reason::Server, "channels".to_owned()));
        }
        (self.locks != restored.locks).then(|| (Reason::LockTaken, "advisory locks".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(name: &str, value: &str, source: &str, category: &str) -> Setting {
        let bytes = |text: &str| text.as_bytes().into();
        Setting { name: bytes(name), value: bytes(value), source: bytes(source), category: bytes(category) }
    }

    #[test]
    fn servers_may_differ_in_speed_and_not_in_answers() {
        let objection = |name: &str, category: &str, old: (&str, &str), new: Option<(&str, &str)>| {
            let there = new.map(|(value, source)| setting(name, value, source, category));
            setting(name, old.0, old.1, category).objection(there.as_ref())
        };
        let tuning = "Query Tuning / Planner Cost Constants";
        let (differs, gone) = (Some(Reason::SettingDiffers), Some(Reason::SettingGone));
        assert_eq!(objection("seq_page_cost", tuning, ("1", "default"), Some(("2", "configuration file"))), None);
        assert_eq!(objection("seq_page_cost", tuning, ("1", "session"), Some(("2", "session"))), differs);
        assert_eq!(objection("seq_page_cost", tuning, ("1", "user"), Some(("2", "default"))), differs);
        assert_eq!(objection("seq_page_cost", tuning, ("1", "default"), Some(("2", "database"))), differs);
        let wal = "Write-Ahead Log / Settings";
        assert_eq!(objection("synchronous_commit", wal, ("on", "default"), Some(("off", "default"))), differs);
        let format = "Client Connection Defaults / Locale and Formatting";
        assert_eq!(objection("extra_float_digits", format, ("0", "default"), Some(("1", "default"))), differs);
        assert_eq!(objection("extra_float_digits", format, ("0", "default"), Some(("0", "database"))), None);
        assert_eq!(objection("password_encryption", "", ("md5", "default"), Some(("scram-sha-256", "default"))), None);
        assert_eq!(objection("default_with_oids", "", ("off", "default"), None), None);
        assert_eq!(objection("default_with_oids", "", ("on", "session"), None), gone);
        assert_eq!(objection("default_with_oids", "", ("on", "configuration file"), None), gone);
        assert_eq!(objection("transaction_isolation", "", ("x", "override"), Some(("y", "session"))), None);
    }
}
