//! Whether what a client is about to send writes, told from its texts before any of it is sent.
//!
//! Invariant: a guess, and harmless whichever way it is wrong: what is taken for a write waits for the end of a pause and
//! then runs, once; what is not is refused by the server, which has been told to. Never asks for more bytes than it bounds.
//! Pure.

use crate::frame;
use crate::frame::HEADER_BYTES;
use crate::parameters::READ_ONLY_MODE;
use crate::statements::Names;
use crate::statements::concern::cstring;
use crate::statements::sql::{skip_blank, skip_comment, word};

/// How far a batch is read for a write that is not in sight: several times what an ordinary one has.
pub const BATCH_BYTES_MAX: usize = 64 * 1024;

/// What a client is about to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Beginning {
    /// As far as can be told it reads.
    Reads,
    /// It writes.
    Writes,
    /// It speaks of the read-only mode itself, or resets settings.
    Settings,
    /// More of it has to be seen.
    More,
    /// It executes a statement of this name, whose text is not known here.
    Unknown(Vec<u8>),
}

/// Where the texts of a client's statements are.
#[derive(Debug)]
pub enum Prepared<'a> {
    /// The client shares servers: we keep its texts.
    Shared(Option<&'a Names>),
    /// Its server has them: what was asked there so far, and the unnamed one as it was overheard.
    Kept(&'a [(Vec<u8>, Vec<u8>)], Option<&'a [u8]>),
}

impl Prepared<'_> {
    fn of(&self, name: &[u8]) -> Result<Beginning, Vec<u8>> {
        let text = match self {
            Prepared::Shared(None) => None,
            Prepared::Shared(Some(names)) if name.is_empty() => names.unnamed.as_ref().map(|known| &*known.tail),
            Prepared::Shared(Some(names)) => names.by_name.get(name).map(|known| &*known.tail),
            Prepared::Kept(_, unnamed) if name.is_empty() => *unnamed,
            Prepared::Kept(asked, _) => match asked.iter().find(|(known, _)| known == name) {
                Some((_, text)) => Some(&**text),
                None => return Err(name.to_vec()),
            },
        };
        Ok(text.map_or(Beginning::Reads, |text| of_text(cstring(text).map_or(text, |(text, _)| text))))
    }
}

/// What the messages at hand begin: a Query, or a batch up to its Sync or Flush.
#[must_use]
pub fn beginning(pending: &[u8], texts: &Prepared<'_>) -> Beginning {
    let more = if pending.len() < BATCH_BYTES_MAX { Beginning::More } else { Beginning::Reads };
    let mut rest = pending;
    let mut so_far = Beginning::Reads;
    // Names that this batch prepares: what they stand for has been seen.
    let mut parsed: Vec<&[u8]> = Vec::new();
    loop {
        let header = match frame::header(rest) {
            Ok(Some(header)) => header,
            Ok(None) => return more,
            // Whoever sends it on says what is wrong with it.
            Err(_) => return so_far,
        };
        let body = &rest[HEADER_BYTES..rest.len().min(header.total_bytes)];
        let found = match header.tag {
            b'Q' => of_text(body.strip_suffix(b"\0").unwrap_or(body)),
            b'P' => match cstring(body) {
                Some((name, tail)) => {
                    parsed.push(name);
                    of_text(cstring(tail).map_or(tail, |(text, _)| text))
                }
                None => Beginning::Reads,
            },
            b'B' => match cstring(body).and_then(|(_, rest)| cstring(rest)) {
                Some((name, _)) if !parsed.contains(&name) => match texts.of(name) {
                    Ok(found) => found,
                    Err(name) => return Beginning::Unknown(name),
                },
                Some(_) | None => Beginning::Reads,
            },
            b'D' | b'C' | b'E' => Beginning::Reads,
            // Sync and Flush, after which answers come; and what begins nothing that could wait.
            _ => return so_far,
        };
        match found {
            Beginning::Writes => return found,
            Beginning::Settings => so_far = found,
            Beginning::Reads | Beginning::More | Beginning::Unknown(_) => {}
        }
        if rest.len() < header.total_bytes {
            return more;
        }
        if header.tag == b'Q' {
            return so_far;
        }
        rest = &rest[header.total_bytes..];
    }
}

/// Statements that PostgreSQL refuses in a read-only transaction, whatever they are about.
const WRITERS: [&[u8]; 12] = [
    b"insert",
    b"update",
    b"delete",
    b"merge",
    b"truncate",
    b"create",
    b"alter",
    b"drop",
    b"grant",
    b"revoke",
    b"comment",
    b"refresh",
];

/// Statements inside WITH.
const INNER: [&[u8]; 4] = [b"insert", b"update", b"delete", b"merge"];

/// A statement as far as it was read.
struct Statement<'a> {
    /// Its first word.
    verb: &'a [u8],
    /// The word before, or the sign that came after that.
    before: &'a [u8],
}

/// What a text is about. Strings, quoted names and comments are passed over.
fn of_text(text: &[u8]) -> Beginning {
    let mut rest = text;
    let mut statement: Option<Statement<'_>> = None;
    let mut settings = false;
    while let Some(first) = rest.first() {
        let (token, after) = match first {
            b'\'' | b'"' => (&b"'"[..], after_quote(rest)),
            b'$' => (&b"'"[..], after_dollar(rest)),
            b'-' | b'/' | b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c => match after_blank(rest) {
                Some(after) => {
                    rest = after;
                    continue;
                }
                None => (&rest[..1], &rest[1..]),
            },
            b';' => {
                statement = None;
                rest = &rest[1..];
                continue;
            }
            byte if is_letter(*byte) => identifier(rest),
            _ => (&rest[..1], &rest[1..]),
        };
        rest = after;
        match &mut statement {
            None => {
                if among(token, &WRITERS) {
                    return Beginning::Writes;
                }
                settings |= among(token, &[b"reset", b"discard"]);
                statement = Some(Statement { verb: token, before: token });
            }
            Some(statement) => {
                if statement.writes_with(token, rest) {
                    return Beginning::Writes;
                }
                // What is copied from a query is read.
                if token == b"(" && is(statement.verb, b"copy") && is(statement.before, b"copy") {
                    statement.verb = token;
                }
                settings |= is(token, READ_ONLY_MODE) || (is(statement.verb, b"set") && is(token, b"characteristics"));
                statement.before = token;
            }
        }
    }
    // Its name may stand in a string: set_config.
    if settings || text.windows(READ_ONLY_MODE.len()).any(|window| is(window, READ_ONLY_MODE)) {
        return Beginning::Settings;
    }
    Beginning::Reads
}

impl Statement<'_> {
    /// Whether this word makes it a write.
    fn writes_with(&self, token: &[u8], rest: &[u8]) -> bool {
        let in_front = |sign: u8| skip_blank(rest).is_some_and(|rest| rest.first() == Some(&sign));
        if is(self.verb, b"copy") {
            return is(token, b"from");
        }
        if is(self.verb, b"with") && among(token, &INNER) {
            return matches!(self.before, b"(" | b")");
        }
        let locks = is(self.before, b"for") && among(token, &[b"update", b"share", b"no", b"key"]);
        let counts = among(token, &[b"nextval", b"setval"]) && in_front(b'(');
        among(self.verb, &[b"select", b"with", b"values", b"("]) && (locks || counts)
    }
}

fn is(token: &[u8], word: &[u8]) -> bool {
    token.eq_ignore_ascii_case(word)
}

fn among(token: &[u8], words: &[&[u8]]) -> bool {
    words.iter().any(|word| is(token, word))
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

/// A name or a keyword, and what follows it. A string with a letter before it is one of the quoted pieces.
fn identifier(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| !is_letter(*byte) && !byte.is_ascii_digit() && *byte != b'$');
    let (name, rest) = text.split_at(end.unwrap_or(text.len()));
    if is(name, b"e") && rest.first() == Some(&b'\'') { (b"'", after_escapes(rest)) } else { (name, rest) }
}

/// White space and comments; `None` where it is a sign, or a comment has no end.
fn after_blank(text: &[u8]) -> Option<&[u8]> {
    match text {
        [b'-', b'-', rest @ ..] => {
            Some(&rest[rest.iter().position(|b| matches!(b, b'\n' | b'\r')).unwrap_or(rest.len())..])
        }
        [b'/', b'*', rest @ ..] => Some(skip_comment(rest).unwrap_or_default()),
        [b'-' | b'/', ..] => None,
        [_, rest @ ..] => Some(rest),
        [] => None,
    }
}

/// After a quoted piece; a doubled quote begins another one, which comes to the same.
fn after_quote(text: &[u8]) -> &[u8] {
    let end = text[1..].iter().position(|byte| *byte == text[0]).map_or(text.len(), |at| at + 2);
    &text[end..]
}

/// After a string in which a backslash hides a quote.
fn after_escapes(text: &[u8]) -> &[u8] {
    let mut at = 1;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            b'\'' => return &text[at + 1..],
            _ => at += 1,
        }
    }
    &[]
}

/// After `$tag$…$tag$`, or after the `$` that is none.
fn after_dollar(text: &[u8]) -> &[u8] {
    let (tag, rest) = word(&text[1..]);
    if rest.first() != Some(&b'$') || tag.first().is_some_and(u8::is_ascii_digit) {
        return &text[1..];
    }
    let mark = &text[..tag.len() + 2];
    let inside = &text[mark.len()..];
    match inside.windows(mark.len()).position(|window| window == mark) {
        Some(at) => &inside[at + mark.len()..],
        None => &[],
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::prelude::*;

    use super::*;
    use crate::message::{put, put_cstring, put_query};

    #[test]
    fn writes_are_told_from_reads() {
        for text in [
            "INSERT INTO t VALUES (1)",
            " -- first\n/* a /* b */ */ update t SET a = now()",
            "SELECT 1; DELETE FROM t",
            "BEGIN; INSERT INTO t VALUES ('a;b'); COMMIT",
            "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
            "WITH x AS MATERIALIZED (DELETE FROM t RETURNING *) SELECT * FROM x",
            "with x as ( /* c */ update t set a = 1 returning a) select * from x",
            "COPY t FROM STDIN",
            "copy t (a, b) from stdin with (format csv)",
            "COPY \"from\" FROM '/x'",
            "SELECT * FROM t FOR UPDATE",
            "(SELECT * FROM t) FOR NO KEY UPDATE",
            "SELECT nextval ('s')",
            "CREATE TEMP TABLE x (a int)",
            "TRUNCATE t",
            "SELECT $$a;$$; DROP TABLE t",
            "SELECT E'\\';', 1; DELETE FROM t",
        ] {
            assert_eq!(of_text(text.as_bytes()), Beginning::Writes, "{text}");
        }
        for text in [
            "",
            ";;",
            "SELECT 'x; INSERT INTO t'",
            "SELECT E'\\'; INSERT INTO t'",
            "SELECT $a$; INSERT $a$, $1",
            "SELECT \"; insert\" FROM \"update\"",
            "SELECT 1 -- ; DELETE FROM t",
            "SELECT update, \"delete\" FROM t",
            "WITH x AS (SELECT 1 AS insert) SELECT * FROM x",
            "COPY t TO STDOUT",
            "COPY (SELECT a FROM t) TO STDOUT",
            "SELECT substring('abc' from 2 for 1)",
            "BEGIN",
            "START TRANSACTION",
            "SELECT nextval FROM t",
            "EXPLAIN INSERT INTO t VALUES (1)",
            "SET search_path = a",
            "SHOW transaction_read_only",
            "SELECT a - 1 / 2 FROM t",
            "SELECT 'open",
        ] {
            assert_eq!(of_text(text.as_bytes()), Beginning::Reads, "{text}");
        }
        for text in [
            "SET default_transaction_read_only = off",
            "SHOW Default_Transaction_Read_Only",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SELECT set_config('default_transaction_read_only', 'on', false)",
            "RESET ALL",
            "DISCARD ALL",
        ] {
            assert_eq!(of_text(text.as_bytes()), Beginning::Settings, "{text}");
        }
    }

    fn query(text: &str) -> Vec<u8> {
        let mut out = BytesMut::new();
        put_query(&mut out, text.as_bytes());
        out.to_vec()
    }

    fn message(tag: u8, strings: &[&str]) -> Vec<u8> {
        let mut out = BytesMut::new();
        put(&mut out, tag, |out| strings.iter().for_each(|text| put_cstring(out, text.as_bytes())));
        out.to_vec()
    }

    #[test]
    fn a_batch_is_read_to_its_sync() {
        let none = Prepared::Shared(None);
        let sync = message(b'S', &[]);
        let insert = [message(b'C', &["S"]), message(b'P', &["", "INSERT INTO t VALUES ($1)"])].concat();
        assert_eq!(beginning(&insert, &none), Beginning::Writes, "whatever follows");
        let select = [message(b'P', &["", "SELECT 1"]), message(b'B', &["", ""]), message(b'E', &[""])].concat();
        assert_eq!(beginning(&select, &none), Beginning::More);
        let then = [select, sync, insert].concat();
        assert_eq!(beginning(&then, &none), Beginning::Reads, "the next batch waits for its own turn");
        for cut in 0..then.len() {
            let part = beginning(&then[..cut], &none);
            assert!(matches!(part, Beginning::More | Beginning::Reads), "cut at {cut}: {part:?}");
        }
        let long = query(&format!("INSERT INTO t VALUES ('{}')", "x".repeat(BATCH_BYTES_MAX)));
        assert_eq!(beginning(&long[..100], &none), Beginning::Writes, "the verb is enough");
        let long = query(&format!("SELECT '{}'", "x".repeat(BATCH_BYTES_MAX)));
        assert_eq!(beginning(&long[..BATCH_BYTES_MAX - 1], &none), Beginning::More);
        assert_eq!(beginning(&long[..BATCH_BYTES_MAX], &none), Beginning::Reads);
    }

    #[test]
    fn a_statement_prepared_before_is_known_by_its_text() {
        let run = [message(b'B', &["", "w"]), message(b'E', &[""]), message(b'S', &[])].concat();
        assert_eq!(beginning(&run, &Prepared::Kept(&[], None)), Beginning::Unknown(b"w".to_vec()));
        let asked = [(b"w".to_vec(), b"DELETE FROM t".to_vec())];
        assert_eq!(beginning(&run, &Prepared::Kept(&asked, None)), Beginning::Writes);
        let unnamed = [message(b'B', &["", ""]), message(b'S', &[])].concat();
        assert_eq!(beginning(&unnamed, &Prepared::Kept(&[], Some(b"TRUNCATE t"))), Beginning::Writes);
        assert_eq!(beginning(&unnamed, &Prepared::Kept(&[], None)), Beginning::Reads);
        let anew = [message(b'P', &["w", "SELECT 1"]), run].concat();
        assert_eq!(beginning(&anew, &Prepared::Kept(&[], None)), Beginning::Reads, "prepared in this batch");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes: Vec<u8>, tag in prop::sample::select(b"QPBDCESHFdcfX".to_vec())) {
            let _ = of_text(&bytes);
            let mut framed = vec![tag];
            framed.extend_from_slice(&u32::try_from(bytes.len() + 4).unwrap().to_be_bytes());
            framed.extend_from_slice(&bytes);
            let _ = beginning(&framed, &Prepared::Kept(&[], None));
            let _ = beginning(&bytes, &Prepared::Shared(None));
        }

        #[test]
        fn whatever_is_in_quotes_is_no_verb(inside in "[a-z; ]{0,40}") {
            for text in [format!("SELECT '{inside}'"), format!("SELECT $q${inside}$q$"), format!("SELECT /*{inside}*/ 1")] {
                prop_assert_eq!(of_text(text.as_bytes()), Beginning::Reads, "{}", text);
            }
        }
    }
}
