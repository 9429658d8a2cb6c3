//! Moves frames between a client and its server connection until the transaction rests: the hot path.
//!
//! Invariant: a byte is forwarded once, in order, and only after the tracker has seen its message; nothing new is
//! forwarded once the session rests or while the gate is shut and an answer is outstanding. No allocation, lock, timer
//! or task per message; one write per readable batch.

mod buffer;
mod overheard;

use buffer::WHOLE_BYTES_MAX;
pub use buffer::{Buffer, Read};
pub use overheard::{Hazard, Overheard, Parsing, Reset};

use std::io;
use std::task::{Context, Poll};

use crate::frame::{HEADER_BYTES, Header};
use crate::message;
use crate::message::Pair;
use crate::report;
use crate::report::Report;
use crate::statements::{Back, Counts, Desk, Look, Rest};
use crate::stream::Stream;
use crate::tracker::{Front, Shut, Stand, Status, Tracker};

/// The longest CommandComplete of a statement that takes settings back to their start: DISCARD ALL.
const RESETTING_BYTES_MAX: usize = HEADER_BYTES + 12;

/// The longest refusal that advice is added to: the server's own are a few hundred bytes.
const ADVISED_BYTES_MAX: usize = 8 * 1024;

/// What becomes of named statements: the rules of the pool mode.
#[derive(Debug)]
pub enum Statements<'a> {
    /// The client keeps its server: named statements are its own affair.
    Kept,
    /// The client's names stand for what each server has under names of ours.
    Shared(Desk<'a>),
}

/// Tells whether new statements have to wait; asked per batch of frames.
pub trait ShutSignal {
    /// Whether they have to.
    fn is_shut(&self) -> bool;
}

/// Both ends of one transaction.
#[derive(Debug)]
pub struct Relay<'a, S> {
    /// The client's socket.
    pub client: &'a mut Stream,
    /// Client to server.
    pub up: &'a mut Buffer,
    /// The server's socket.
    pub server: &'a mut Stream,
    /// Server to client.
    pub down: &'a mut Buffer,
    /// Whether the session rests.
    pub tracker: &'a mut Tracker,
    /// Whether new statements have to wait.
    pub shut: &'a S,
    /// Takes note of what a session is made of; for a client that keeps its server.
    pub overheard: Option<&'a mut Overheard>,
    /// What may pass.
    pub statements: Statements<'a>,
    /// What a client is told beside the server's refusal to write; `None` unless a pause holds writes.
    pub advice: Option<Box<str>>,
    /// Settings that the server reported on the way, in order.
    pub reported: Vec<Pair>,
    /// Bytes moved.
    pub moved: Moved,
}

/// Bytes moved in one transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moved {
    /// From the client to the server.
    pub up_bytes: u64,
    /// From the server to the client.
    pub down_bytes: u64,
    /// Statements forwarded (Query, Execute, FunctionCall).
    pub queries: u64,
    /// Answers to messages of ours, withheld.
    pub withheld: u64,
}

/// How a transaction ended.
#[derive(Debug)]
pub enum End {
    /// At rest: the server connection may serve somebody else. The client's buffer may hold its next statement.
    Rest,
    /// At rest, but the server connection must serve nobody else, and the client has to be told.
    Spoiled(Box<Report>),
    /// The client said goodbye.
    Terminated,
    /// The client's connection broke.
    ClientGone(io::Error),
    /// The server's connection broke; what it had said was passed on.
    ServerGone(io::Error),
    /// The client sent what no client may send, or what this pool can't keep safe.
    Refused(Box<Report>),
    /// The server sent what no server may send.
    ServerNonsense(String),
}

/// What a scan came to.
enum Scan {
    /// Nothing more can be forwarded before more bytes or an answer come.
    Dry,
    /// The rest waits for an answer or for the gate.
    Held,
    /// Over.
    End(End),
}

/// What is known of a client's message before the tracker decides about it.
enum Known {
    /// It goes as it is, as far as statements are concerned.
    Plain,
    /// It has to be rewritten.
    Rewrite,
    /// It does not go now.
    Not(Scan),
}

impl<S: ShutSignal> Relay<'_, S> {
    /// Moves what can be moved; ready at the end. No byte is lost when nobody polls again, but the connection is then in
    /// the middle of things: whoever drops this closes the server connection.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            let before = self.moved;
            if let Some(end) = self.poll_up(cx) {
                return Poll::Ready(end);
            }
            if let Some(end) = self.poll_down(cx) {
                return Poll::Ready(end);
            }
            if self.is_done() {
                return Poll::Ready(self.rest());
            }
            if before == self.moved {
                return Poll::Pending;
            }
        }
    }

    fn rest(&self) -> End {
        match &self.statements {
            Statements::Shared(desk) if desk.is_spoiled() => End::Spoiled(Box::new(Report::prepared_by_sql())),
            Statements::Shared(_) | Statements::Kept => End::Rest,
        }
    }

    /// Whether a client that shares the server has reset settings there.
    pub fn has_reset(&self) -> bool {
        match &self.statements {
            Statements::Shared(desk) => desk.has_reset(),
            Statements::Kept => false,
        }
    }

    /// After the end: settles what the statements leave behind; the messages about them that went through.
    pub fn part(&mut self) -> Counts {
        match &mut self.statements {
            Statements::Shared(desk) => desk.part(),
            Statements::Kept => Counts::default(),
        }
    }

    fn is_done(&self) -> bool {
        self.moved.up_bytes > 0 && self.tracker.at_rest() && !self.down.has_cleared() && !self.up.has_cleared()
    }

    /// Client to server until one of the two would block.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Option<End> {
        loop {
            match self.scan_up() {
                Scan::End(end) => return Some(end),
                Scan::Held | Scan::Dry if self.up.has_cleared() => match self.up.poll_write(self.server, cx) {
                    Poll::Ready(Ok(count)) => {
                        self.moved.up_bytes += count as u64;
                        continue;
                    }
                    // The server may have said why before it closed: poll_down reads that and the end.
                    Poll::Ready(Err(_)) => self.up.forget_cleared(),
                    Poll::Pending => return None,
                },
                Scan::Held => return None,
                Scan::Dry => {}
            }
            if self.is_done() {
                return None;
            }
            match self.up.poll_read(self.client, cx) {
                Poll::Ready(Ok(Read::Some)) => {}
                Poll::Ready(Ok(Read::Full)) | Poll::Pending => return None,
                Poll::Ready(Ok(Read::End)) => return Some(End::ClientGone(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Err(error)) => return Some(End::ClientGone(error)),
            }
        }
    }

    /// Clears what the client may send now.
    fn scan_up(&mut self) -> Scan {
        let shut = if self.shut.is_shut() { Shut::Yes } else { Shut::No };
        loop {
            // At rest the next statement needs a new pass, unless it is the first under this one.
            let begun = self.moved.up_bytes > 0 || self.up.has_cleared();
            if begun && self.tracker.at_rest() {
                return Scan::Dry;
            }
            let header = match self.up.next_header() {
                Ok(Some(header)) => header,
                Ok(None) => return Scan::Dry,
                Err(error) => return Scan::End(refused(Report::protocol_violation(error.to_string()))),
            };
            let stand = self.tracker.stand();
            let known = self.know(header, stand);
            if let Known::Not(scan) = known {
                return scan;
            }
            if !self.overhears(header) {
                return Scan::Dry;
            }
            match self.tracker.frontend(header.tag, shut) {
                Front::Forward => {
                    self.overhear(header);
                    self.moved.queries += u64::from(matches!(header.tag, b'Q' | b'E' | b'F'));
                    if let Some(end) = self.forward(header, stand, matches!(known, Known::Rewrite)) {
                        return Scan::End(end);
                    }
                }
                Front::Drop => self.up.discard(header),
                Front::Hold => return Scan::Held,
                Front::Terminate => return Scan::End(End::Terminated),
                Front::Illegal => {
                    let what = format!("invalid frontend message type {}", header.tag);
                    return Scan::End(refused(Report::protocol_violation(what)));
                }
            }
        }
    }

    /// What the message at hand is to the statements.
    fn know(&mut self, header: Header, stand: Stand) -> Known {
        match &self.statements {
            Statements::Kept => Known::Plain,
            Statements::Shared(desk) => match desk.look(header, self.up.pending(), stand) {
                Look::Plain => Known::Plain,
                Look::Rewrite => Known::Rewrite,
                Look::More(bytes) => {
                    self.up.holds(bytes, usize::MAX); // Bounded by the desk.
                    Known::Not(Scan::Dry)
                }
                Look::Wait => Known::Not(Scan::Held),
                Look::Refuse(report) => Known::Not(Scan::End(End::Refused(report))),
            },
        }
    }

    fn forward(&mut self, header: Header, stand: Stand, rewritten: bool) -> Option<End> {
        if let Statements::Shared(desk) = &mut self.statements {
            if rewritten {
                let failed = self.tracker.status() == Status::Failed;
                let (front_bytes, rest, bytes) = desk.rewrite(header, self.up.pending(), failed);
                self.up.replace(header, front_bytes, bytes, rest);
                return None;
            }
            if !desk.sent(header, self.up.pending(), stand) {
                return Some(refused(Report::statements_out_of_order()));
            }
        }
        self.up.send(header);
        None
    }

    /// Whether the message is here as far as it has to be overheard. A server, too, acts on it only when it is whole.
    fn overhears(&mut self, header: Header) -> bool {
        let text = matches!(header.tag, b'Q' | b'P') && header.total_bytes <= WHOLE_BYTES_MAX;
        self.overheard.is_none() || !text || self.up.holds(header.total_bytes, WHOLE_BYTES_MAX)
    }

    fn overhear(&mut self, header: Header) {
        let Some(overheard) = self.overheard.as_mut() else { return };
        match self.up.pending().get(HEADER_BYTES..header.total_bytes) {
            Some(body) => overheard.request(header.tag, body),
            // Too long for a text; of any other message the type says enough.
            None if matches!(header.tag, b'Q' | b'P') => overheard.unread(header.tag),
            // The names in a Bind come first.
            None => overheard.request(header.tag, self.up.pending().get(HEADER_BYTES..).unwrap_or_default()),
        }
    }

    /// Server to client until one of the two would block.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Option<End> {
        loop {
            if let Scan::End(end) = self.scan_down() {
                return Some(end);
            }
            if self.down.has_cleared() {
                match self.down.poll_write(self.client, cx) {
                    Poll::Ready(Ok(count)) => self.moved.down_bytes += count as u64,
                    Poll::Ready(Err(error)) => return Some(End::ClientGone(error)),
                    Poll::Pending => return None,
                }
                continue;
            }
            if self.is_done() {
                return None;
            }
            match self.down.poll_read(self.server, cx) {
                Poll::Ready(Ok(Read::Some)) => {}
                Poll::Ready(Ok(Read::Full)) | Poll::Pending => return None,
                Poll::Ready(Ok(Read::End)) => return Some(End::ServerGone(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Err(error)) => return Some(End::ServerGone(error)),
            }
        }
    }

    /// Clears what the server has sent. A message that is not cleared is withheld: that is where an answer's first
    /// frame can be kept back.
    fn scan_down(&mut self) -> Scan {
        loop {
            let header = match self.down.next_header() {
                Ok(Some(header)) => header,
                Ok(None) => return Scan::Dry,
                Err(error) => return Scan::End(End::ServerNonsense(error.to_string())),
            };
            // What comes after the last answer belongs to no statement: not to be cut off in the middle by the end.
            if self.tracker.at_rest() {
                return Scan::Dry;
            }
            if header.tag == b'E' && self.advice.is_some() && header.total_bytes <= ADVISED_BYTES_MAX {
                if !self.down.holds(header.total_bytes, WHOLE_BYTES_MAX) {
                    return Scan::Dry;
                }
                if self.advise(header) {
                    continue;
                }
            }
            if matches!(header.tag, b'1' | b'E' | b'Z')
                && let Some(overheard) = self.overheard.as_mut()
            {
                overheard.answer(header.tag);
            }
            let wanted = matches!(self.statements, Statements::Shared(_)) && Desk::wants(header);
            match header.tag {
                b'S' if header.total_bytes > WHOLE_BYTES_MAX => {
                    return Scan::End(End::ServerNonsense("ParameterStatus without end".to_owned()));
                }
                b'Z' if header.total_bytes != HEADER_BYTES + 1 => {
                    return Scan::End(End::ServerNonsense("ReadyForQuery of the wrong length".to_owned()));
                }
                b'Z' | b'S' if !self.down.holds(header.total_bytes, WHOLE_BYTES_MAX) => return Scan::Dry,
                _ if wanted && !self.down.holds(header.total_bytes, WHOLE_BYTES_MAX) => return Scan::Dry,
                b'Z' => {
                    self.tracker.backend(b'Z', self.down.pending()[HEADER_BYTES]);
                    if !self.tracker.is_busy()
                        && let Some(overheard) = self.overheard.as_mut()
                    {
                        overheard.answered();
                    }
                }
                b'C' if header.total_bytes <= RESETTING_BYTES_MAX && self.overheard.is_some() => {
                    if !self.down.holds(header.total_bytes, WHOLE_BYTES_MAX) {
                        return Scan::Dry;
                    }
                    if let Some(overheard) = self.overheard.as_mut() {
                        overheard.completed(&self.down.pending()[HEADER_BYTES..header.total_bytes]);
                    }
                    self.tracker.backend(b'C', 0);
                }
                b'S' => {
                    let body = &self.down.pending()[HEADER_BYTES..header.total_bytes];
                    match message::parameter_status(body) {
                        Ok((name, value)) => {
                            if let Some(overheard) = self.overheard.as_mut() {
                                overheard.reported(name);
                            }
                            self.reported.push((name.into(), value.into()));
                        }
                        Err(error) => return Scan::End(End::ServerNonsense(error.to_string())),
                    }
                }
                tag => self.tracker.backend(tag, 0),
            }
            if let Err(end) = self.pass_down(header, wanted) {
                return Scan::End(end);
            }
        }
    }

    /// Adds the advice to a refusal to write that has none; whether it did.
    fn advise(&mut self, header: Header) -> bool {
        let body = &self.down.pending()[HEADER_BYTES..header.total_bytes];
        let Some(advised) = self.advice.as_deref().and_then(|advice| report::advised(body, advice)) else {
            return false;
        };
        self.down.rewrite(header, &advised);
        true
    }

    /// Clears, withholds or renames a server's message that the tracker has seen.
    fn pass_down(&mut self, header: Header, wanted: bool) -> Result<(), End> {
        let Statements::Shared(desk) = &mut self.statements else {
            self.down.send(header);
            return Ok(());
        };
        let body = if wanted { &self.down.pending()[HEADER_BYTES..header.total_bytes] } else { &[] };
        match desk.back(header.tag, body) {
            Back::Pass => self.down.send(header),
            Back::Swallow => {
                self.moved.withheld += 1;
                self.down.discard(header);
            }
            Back::Instead => self.down.replace(header, header.total_bytes, desk.instead(), Rest::Drop),
            Back::As(tag) => {
                self.down.retag(tag);
                self.down.send(header);
            }
            Back::Nonsense => {
                return Err(End::ServerNonsense(format!("answer {} to no message of ours", char::from(header.tag))));
            }
        }
        if matches!(header.tag, b'Z' | b'G') {
            if self.tracker.stand() == Stand::Lost {
                if !desk.lose_order() {
                    return Err(refused(Report::statements_out_of_order()));
                }
            } else {
                desk.settle(self.tracker.owed());
            }
        }
        Ok(())
    }
}

fn refused(report: Report) -> End {
    End::Refused(Box::new(report))
}
