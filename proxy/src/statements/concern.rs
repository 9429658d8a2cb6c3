//! What a client's message has to do with prepared statements, told from as much of it as has come.
//!
//! Invariant: never asks for more bytes than it bounds; a message that is malformed concerns nothing of ours, and the
//! server says what is wrong with it.

use crate::frame::{HEADER_BYTES, Header};
use crate::report::Report;
use crate::statements::sql::{Opening, deallocated, opening};

/// The longest named Parse; it has to be seen whole.
const PARSE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The longest unnamed Parse whose text is kept for a Bind in another transaction.
const UNNAMED_BYTES_MAX: usize = 1024 * 1024;

/// How far names, and what stands before a text's first keyword, are looked for: half a buffer, so there is always room.
pub(super) const FRONT_BYTES_MAX: usize = 8 * 1024;

/// What a message is about.
#[derive(Debug)]
pub(super) enum Concern {
    /// No statement, or one that nobody has to know about.
    Nothing,
    /// The unnamed statement.
    Unnamed,
    /// A named one.
    Named,
    /// PREPARE.
    PreparesBySql,
    /// DEALLOCATE of the one of this name.
    DeallocatesBySql(Vec<u8>),
    /// So many bytes of it have to be seen first.
    More(usize),
    /// Longer than can be taken.
    TooLong(Box<Report>),
}

/// What the message at hand is about; `body` is what has come of it.
pub(super) fn concern(header: Header, body: &[u8], whole: bool) -> Concern {
    match header.tag {
        b'Q' => of_query(header, body, whole),
        b'P' => of_parse(header, body, whole),
        b'B' => of_bind(body, whole),
        b'D' | b'C' => of_target(header, body, whole),
        _ => Concern::Nothing,
    }
}

fn of_query(header: Header, body: &[u8], whole: bool) -> Concern {
    match opening(body, whole || body.len() > FRONT_BYTES_MAX) {
        Opening::Forgets if whole => deallocated(body).map_or(Concern::Nothing, Concern::DeallocatesBySql),
        Opening::Forgets if header.total_bytes <= FRONT_BYTES_MAX => Concern::More(header.total_bytes),
        Opening::Other | Opening::Forgets => Concern::Nothing,
        Opening::Prepare => Concern::PreparesBySql,
        Opening::Unknown => Concern::More(HEADER_BYTES + body.len() + 1),
    }
}

fn of_parse(header: Header, body: &[u8], whole: bool) -> Concern {
    match body.split_first() {
        None if whole => Concern::Nothing,
        None => Concern::More(HEADER_BYTES + 1),
        Some((0, _)) if !whole && header.total_bytes <= UNNAMED_BYTES_MAX => Concern::More(header.total_bytes),
        Some((0, rest)) => match opening(rest, whole || rest.len() > FRONT_BYTES_MAX) {
            Opening::Forgets if whole => match cstring(rest).and_then(|(text, _)| deallocated(text)) {
                Some(name) => Concern::DeallocatesBySql(name),
                None => Concern::Unnamed,
            },
            Opening::Other | Opening::Forgets => Concern::Unnamed,
            Opening::Prepare => Concern::PreparesBySql,
            Opening::Unknown => Concern::More(HEADER_BYTES + body.len() + 1),
        },
        Some(_) if header.total_bytes > PARSE_BYTES_MAX => {
            Concern::TooLong(Box::new(Report::statement_too_long(PARSE_BYTES_MAX)))
        }
        Some(_) if !whole => Concern::More(header.total_bytes),
        Some(_) => cstring(body).and_then(|(_, tail)| cstring(tail)).map_or(Concern::Nothing, |_| Concern::Named),
    }
}

fn of_bind(body: &[u8], whole: bool) -> Concern {
    let name = cstring(body).and_then(|(_, rest)| cstring(rest));
    match name {
        Some(([], _)) => Concern::Unnamed,
        Some(_) => Concern::Named,
        None if whole => Concern::Nothing,
        None if body.len() > FRONT_BYTES_MAX => names_too_long(),
        None => Concern::More(HEADER_BYTES + body.len() + 1),
    }
}

fn of_target(header: Header, body: &[u8], whole: bool) -> Concern {
    match body {
        // Exactly one string, or the server says what is wrong with it.
        [b'S', name @ ..] if whole => match cstring(name) {
            Some((b"", b"")) => Concern::Unnamed,
            Some((_, b"")) => Concern::Named,
            Some(_) | None => Concern::Nothing,
        },
        [b'S', ..] | [] if header.total_bytes > FRONT_BYTES_MAX => names_too_long(),
        [b'S', ..] => Concern::More(header.total_bytes),
        [] if whole => Concern::Nothing,
        [] => Concern::More(HEADER_BYTES + 1),
        [_, ..] => Concern::Nothing,
    }
}

fn names_too_long() -> Concern {
    let report = Report::protocol_violation("the names in an extended-protocol message are too long");
    Concern::TooLong(Box::new(report))
}

/// The string at the front and what follows its NUL.
pub(super) fn cstring(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let nul = bytes.iter().position(|byte| *byte == 0)?;
    Some((&bytes[..nul], &bytes[nul + 1..]))
}
