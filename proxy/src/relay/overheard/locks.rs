//! How many session advisory locks a text takes each time it runs.
//!
//! Invariant: a number only for texts that can do nothing else than call the functions once each, with keys that are no
//! OIDs; for all others that name one of the functions it is unclear. Pure.

use super::is_word;

/// The functions that take a lock for the session.
const TAKERS: [&[u8]; 4] =
    [b"pg_advisory_lock", b"pg_advisory_lock_shared", b"pg_try_advisory_lock", b"pg_try_advisory_lock_shared"];

/// Words that may stand beside them. `hashtext` makes a key of a name: the same on every server.
const HARMLESS: [&[u8]; 13] = [
    b"select",
    b"pg_catalog",
    b"pg_advisory_unlock",
    b"bigint",
    b"int",
    b"integer",
    b"int4",
    b"int8",
    b"text",
    b"varchar",
    b"cast",
    b"hashtext",
    b"hashtextextended",
];

/// What a text does to the locks of its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Locks {
    /// It takes none.
    #[default]
    None,
    /// It takes one by each of so many calls.
    Calls(u32),
    /// It may take any number.
    Unclear,
}

/// Whether a word is one of the functions.
pub(super) fn is_taker(word: &[u8]) -> bool {
    TAKERS.iter().any(|taker| taker.eq_ignore_ascii_case(word))
}

/// What a text does.
pub(super) fn locks_in(text: &[u8]) -> Locks {
    let mut rest = text;
    let (mut calls, mut clear) = (0, true);
    let mut alias = false;
    while let Some((&first, after)) = rest.split_first() {
        if !is_word(first) {
            match skip(rest) {
                Some(after) => rest = after,
                None => (rest, clear) = (after, false),
            }
            continue;
        }
        let end = rest.iter().position(|byte| !is_word(*byte)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        let among = |words: &[&[u8]]| words.iter().any(|known| known.eq_ignore_ascii_case(word));
        if is_taker(word) {
            calls += 1;
        } else if !(alias || among(&HARMLESS) || among(&[b"as"]) || word.iter().all(u8::is_ascii_digit)) {
            clear = false;
        }
        alias = among(&[b"as"]);
    }
    match (calls, clear) {
        (0, _) => Locks::None,
        (calls, true) => Locks::Calls(calls),
        (_, false) => Locks::Unclear,
    }
}

/// What follows a sign, a string or a comment; `None` where that can be read in two ways.
fn skip(rest: &[u8]) -> Option<&[u8]> {
    match rest {
        [b'\'', inside @ ..] => {
            let end = inside.iter().position(|byte| matches!(byte, b'\'' | b'\\'))?;
            // A doubled quote begins the next string at once.
            (inside[end] == b'\'').then(|| &inside[end + 1..])
        }
        [b'/', b'*', inside @ ..] => {
            let end = inside.windows(2).position(|pair| pair == b"*/" || pair == b"/*")?;
            (inside[end] == b'*').then(|| &inside[end + 2..])
        }
        [b'-', b'-', ..] | [b'"', ..] => None,
        // A cast, a parameter, arithmetic on numbers.
        [_, after @ ..] => Some(after),
        [] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Locks, locks_in};

    #[test]
    fn only_plain_calls_are_counted() {
        for (text, locks) in [
            ("SELECT 1", Locks::None),
            ("SELECT pg_advisory_xact_lock(1), pg_advisory_unlock(2) FROM t", Locks::None),
            ("select PG_ADVISORY_LOCK(42)", Locks::Calls(1)),
            ("SELECT pg_catalog.pg_try_advisory_lock($1::bigint) AS locked;", Locks::Calls(1)),
            ("SELECT pg_advisory_lock(hashtext('from ''regclass''')), pg_advisory_lock_shared(-1, 2)", Locks::Calls(2)),
            ("SELECT pg_advisory_lock(1) /* app:jobs */", Locks::Calls(1)),
            ("SELECT pg_advisory_lock(id) FROM t", Locks::Unclear),
            ("SELECT pg_advisory_lock('t'::regclass::int)", Locks::Unclear),
            ("DO $$BEGIN PERFORM pg_advisory_lock(1); END$$", Locks::Unclear),
            ("PREPARE l AS SELECT pg_advisory_lock(1)", Locks::Unclear),
            ("SELECT pg_advisory_lock(1) -- once", Locks::Unclear),
            ("SELECT pg_advisory_lock(E'1')", Locks::Unclear),
            ("SELECT pg_advisory_lock('a\\'::regclass)", Locks::Unclear),
            ("SELECT pg_advisory_lock(generate_series(1,2))", Locks::Unclear),
            ("SELECT pg_advisory_lock(1) WHERE pg_try_advisory_lock(2)", Locks::Unclear),
        ] {
            assert_eq!(locks_in(text.as_bytes()), locks, "{text}");
        }
    }
}
