//! The first keyword of a text: what touches prepared statements by SQL.
//!
//! Invariant: looks at the text up to its first keyword and one word more, never further than it has come.

/// What a text begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    /// Nothing of interest.
    Other,
    /// PREPARE name: it would stay on a server connection that the client loses.
    Prepare,
    /// DEALLOCATE or DISCARD: the server may forget what we prepared.
    Forgets,
    /// More of the text is needed.
    Unknown,
}

/// Reads the beginning of a text; `whole` says that no more of it comes.
pub(super) fn opening(text: &[u8], whole: bool) -> Opening {
    let more = if whole { Opening::Other } else { Opening::Unknown };
    let Some(text) = skip_blank(text) else { return more };
    // Nearly every text is told by its first letter.
    match text.first() {
        Some(b'p' | b'P' | b'd' | b'D') => {}
        Some(_) => return Opening::Other,
        None => return more,
    }
    let (word, rest) = word(text);
    if rest.is_empty() && !whole {
        return Opening::Unknown;
    }
    if word.eq_ignore_ascii_case(b"deallocate") || word.eq_ignore_ascii_case(b"discard") {
        return Opening::Forgets;
    }
    if !word.eq_ignore_ascii_case(b"prepare") {
        return Opening::Other;
    }
    let Some(rest) = skip_blank(rest) else { return more };
    let (next, rest) = self::word(rest);
    if rest.is_empty() && !whole {
        return Opening::Unknown;
    }
    if !next.eq_ignore_ascii_case(b"transaction") {
        return Opening::Prepare;
    }
    // PREPARE transaction AS … prepares a statement of that name.
    let Some(rest) = skip_blank(rest) else { return more };
    match rest.first() {
        None if !whole => Opening::Unknown,
        Some(b'a' | b'A' | b'(') => Opening::Prepare,
        None | Some(_) => Opening::Other,
    }
}

/// The longest name PostgreSQL has; what is longer is cut.
const NAME_BYTES_MAX: usize = 63;

/// The name in a text that is nothing but DEALLOCATE of one statement.
pub(super) fn deallocated(text: &[u8]) -> Option<Vec<u8>> {
    // A comment may be the end of it.
    let text = [text.strip_suffix(b"\0").unwrap_or(text), b"\n"].concat();
    let (command, rest) = word(skip_blank(&text)?);
    if !command.eq_ignore_ascii_case(b"deallocate") {
        return None;
    }
    let (name, is_quoted, rest) = identifier(skip_within(rest)?)?;
    let (name, is_quoted, rest) = match skip_within(rest).and_then(identifier) {
        Some(second) if !is_quoted && name == b"prepare" => second,
        Some(_) | None => (name, is_quoted, rest),
    };
    let is_all = !is_quoted && name == b"all";
    (!is_all && skip_blank(rest)?.is_empty()).then_some(name)
}

/// As [`skip_blank`], but the statement does not end.
fn skip_within(text: &[u8]) -> Option<&[u8]> {
    let rest = skip_blank(text)?;
    (!text[..text.len() - rest.len()].contains(&b';')).then_some(rest)
}

/// The identifier at the front, whether it is quoted, and what follows.
fn identifier(text: &[u8]) -> Option<(Vec<u8>, bool, &[u8])> {
    let Some(mut rest) = text.strip_prefix(b"\"") else {
        let end = text.iter().position(|b| !b.is_ascii_alphanumeric() && !matches!(b, b'_' | b'$' | 0x80..));
        let (name, rest) = text.split_at(end.unwrap_or(text.len()));
        let name = name[..name.len().min(NAME_BYTES_MAX)].to_ascii_lowercase();
        return name.first().is_some_and(|b| !b.is_ascii_digit() && *b != b'$').then_some((name, false, rest));
    };
    let mut name = Vec::new();
    loop {
        let end = rest.iter().position(|byte| *byte == b'"')?;
        name.extend_from_slice(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix(b"\"") {
            Some(more) => {
                name.push(b'"');
                rest = more;
            }
            None => break,
        }
    }
    name.truncate(NAME_BYTES_MAX);
    Some((name, true, rest))
}

/// Letters and digits at the front, and what follows them.
pub(super) fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_').unwrap_or(text.len());
    text.split_at(end)
}

/// Without white space, comments and empty statements at the front; `None` if a comment has no end here.
pub(super) fn skip_blank(mut text: &[u8]) -> Option<&[u8]> {
    loop {
        match text {
            [b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c | b';', rest @ ..] => text = rest,
            [b'-', b'-', rest @ ..] => {
                let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'))?;
                text = &rest[end..];
            }
            [b'/', b'*', rest @ ..] => text = skip_comment(rest)?,
            [b'-' | b'/'] => return None,
            _ => return Some(text),
        }
    }
}

/// PostgreSQL's comments nest.
pub(super) fn skip_comment(mut text: &[u8]) -> Option<&[u8]> {
    let mut depth = 1;
    while depth > 0 {
        match text {
            [b'*', b'/', rest @ ..] => {
                depth -= 1;
                text = rest;
            }
            [b'/', b'*', rest @ ..] => {
                depth += 1;
                text = rest;
            }
            [_, rest @ ..] => text = rest,
            [] => return None,
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prepares_is_told_from_what_looks_like_it() {
        for (text, wanted) in [
            ("PREPARE p AS SELECT 1", Opening::Prepare),
            (" ;\n-- note\n/* a /* b */ c */prepare p(int) as select $1", Opening::Prepare),
            ("PREPARE \"p\" AS SELECT 1", Opening::Prepare),
            ("prepare/**/p as select 1", Opening::Prepare),
            ("PREPARE TRANSACTION 'gid'", Opening::Other),
            ("PREPARE transaction AS SELECT 1", Opening::Prepare),
            ("PREPARE TRANSACTION E'gid'", Opening::Other),
            ("PREPARED", Opening::Other),
            ("SELECT 1; PREPARE p AS SELECT 1", Opening::Other),
            ("deallocate all", Opening::Forgets),
            ("DISCARD ALL", Opening::Forgets),
            ("DELETE FROM t", Opening::Other),
            ("", Opening::Other),
            ("-- only a comment", Opening::Other),
        ] {
            assert_eq!(opening(text.as_bytes(), true), wanted, "{text}");
            // In pieces: never another answer than "more", and the same one in the end.
            for cut in 0..text.len() {
                let part = opening(&text.as_bytes()[..cut], false);
                assert!(part == Opening::Unknown || part == wanted, "{text} cut at {cut}: {part:?}");
            }
        }
    }
    #[test]
    fn the_name_that_is_deallocated_is_read_as_postgresql_reads_it() {
        for (text, wanted) in [
            ("DEALLOCATE s1", Some("s1")),
            ("deallocate Prepare S1 ; ", Some("s1")),
            ("DEALLOCATE \"_pg3_0\"", Some("_pg3_0")),
            ("DEALLOCATE \"A \"\"b\"/* x */;", Some("A \"b")),
            ("DEALLOCATE \"all\" -- gone", Some("all")),
            ("DEALLOCATE prepare", Some("prepare")),
            ("DEALLOCATE ALL", None),
            ("DEALLOCATE PREPARE ALL", None),
            ("DEALLOCATE a; SELECT 1", None),
            ("DEALLOCATE; a", None),
            ("DEALLOCATE a b", None),
            ("DEALLOCATE 1", None),
            ("DEALLOCATE \"a", None),
            ("DISCARD ALL", None),
        ] {
            assert_eq!(deallocated(text.as_bytes()), wanted.map(|name| name.as_bytes().to_vec()), "{text}");
        }
    }
}
