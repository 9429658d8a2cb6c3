//! Where a client's messages about prepared statements are turned into what one server connection understands, and the
//! server's answers into what the client waits for.
//!
//! Invariant: [`Desk::look`] changes nothing; [`Desk::rewrite`] and [`Desk::sent`] are called for exactly the messages
//! that go up, in order, [`Desk::back`] for those that come down. A message that costs the client an answer is replaced
//! by one that costs one, so the server's own order, errors and skipping hold for the client.

mod back;
mod rewrite;

use std::sync::Arc;

use bytes::BytesMut;

use crate::frame::{HEADER_BYTES, Header};
use crate::parameters::Settings;
use crate::report::Report;
use crate::statements::answers::Awaited;
use crate::statements::concern::{Concern, concern, cstring};
use crate::statements::sql::{Opening, opening};
use crate::statements::unnamed::{Standing, Unnamed};
use crate::statements::{Cache, Names, Shelf, Sight, Statement};
use crate::tracker::Stand;

/// One client on one server connection.
#[derive(Debug)]
pub struct Desk<'a> {
    names: &'a mut Option<Box<Names>>,
    shelf: &'a mut Shelf,
    cache: &'a Cache,
    settings: &'a Arc<Settings>,
    /// 0: named statements are refused.
    prepared_max: usize,
    out: BytesMut,
    order: Order,
    unnamed: Unnamed,
    /// What a DEALLOCATE under way takes away.
    leaving: Option<Leaving>,
    /// The statement whose parameters the server has just described, so that its result is next.
    described: Option<Arc<Statement>>,
    result: Outcome,
    side_effect: SideEffect,
    counts: Counts,
}

/// Whether we know which answer belongs to which message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Known,
    /// The server has been told to forget statements: what follows waits until it has.
    Forgetting,
    /// A query in the middle of a batch, or a copy of unclear end: nobody can tell.
    Lost,
}

/// The name that a client gives up by SQL.
#[derive(Debug)]
enum Leaving {
    /// In a Query.
    ByQuery(Vec<u8>),
    /// In the unnamed statement: a statement of ours goes in its place when it is executed.
    ByExecute(Vec<u8>),
}

/// What the client can know of the result of its last Bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It prepared the statement just now, or has the result described.
    Known,
    /// Only what it was told when it prepared the statement.
    Recalled,
}

/// What commands have done to the server connection besides their work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum SideEffect {
    None,
    /// Settings were reset: nobody knows which.
    Reset,
    /// Something prepared by SQL is there: the connection must serve nobody else.
    Prepared,
}

/// Messages of one transaction.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Parse messages from the client, named or not.
    pub client_parses: u64,
    /// Parse messages to the server.
    pub server_parses: u64,
    /// Bind messages.
    pub binds: u64,
}

/// What a client's message needs.
#[derive(Debug)]
pub enum Look {
    /// Forwarded as it is, with a word to [`Desk::sent`].
    Plain,
    /// Rewritten.
    Rewrite,
    /// So many bytes of it have to be seen.
    More(usize),
    /// Answers have to come first.
    Wait,
    /// The client has to go.
    Refuse(Box<Report>),
}

/// What becomes of a message after the front that was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// It goes up as it is.
    Send,
    /// It is dropped.
    Drop,
}

/// What becomes of a server's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Back {
    /// Passed on.
    Pass,
    /// Ours.
    Swallow,
    /// Passed on under this tag.
    As(u8),
    /// Replaced by what [`Desk::instead`] gives.
    Instead,
    /// Not what any server answers.
    Nonsense,
}

impl<'a> Desk<'a> {
    /// A desk between a client and a server connection at rest.
    pub fn new(
        names: &'a mut Option<Box<Names>>,
        shelf: &'a mut Shelf,
        cache: &'a Cache,
        settings: &'a Arc<Settings>,
        prepared_max: usize,
    ) -> Self {
        Self {
            names,
            shelf,
            cache,
            settings,
            prepared_max,
            out: BytesMut::new(),
            order: Order::Known,
            unnamed: Unnamed::new(),
            leaving: None,
            described: None,
            result: Outcome::Known,
            side_effect: SideEffect::None,
            counts: Counts::default(),
        }
    }

    /// Whether the server connection must serve nobody else.
    #[must_use]
    pub fn is_spoiled(&self) -> bool {
        self.side_effect == SideEffect::Prepared
    }

    /// Whether the client has reset settings.
    #[must_use]
    pub fn has_reset(&self) -> bool {
        self.side_effect >= SideEffect::Reset
    }

    /// At the end of the transaction: keeps what the client may want from its next server connection.
    pub fn part(&mut self) -> Counts {
        self.keep_unnamed();
        self.shelf.trim();
        self.counts
    }

    /// What the message at hand needs; `pending` begins with it.
    #[must_use]
    pub fn look(&self, header: Header, pending: &[u8], stand: Stand) -> Look {
        let whole = pending.len() >= header.total_bytes;
        let body = &pending[HEADER_BYTES..pending.len().min(header.total_bytes)];
        if !matches!(header.tag, b'Q' | b'P' | b'B' | b'D' | b'C') {
            return Look::Plain;
        }
        let about = concern(header, body, whole);
        let is_free = self.order != Order::Lost && stand != Stand::Copy;
        let must_wait =
            self.shelf.answers.is_full() || (self.order == Order::Forgetting && self.shelf.answers.marks() > 0);
        let look = match about {
            Concern::More(bytes) => Look::More(bytes),
            Concern::TooLong(report) => Look::Refuse(report),
            Concern::Nothing | Concern::Unnamed | Concern::Named | Concern::PreparesBySql if is_free && must_wait => {
                Look::Wait
            }
            Concern::Nothing => Look::Plain,
            Concern::Unnamed => self.look_at_unnamed(header.tag, stand),
            Concern::PreparesBySql if header.tag == b'Q' => self.in_order(stand != Stand::Batch),
            Concern::PreparesBySql => self.in_order(self.order != Order::Lost),
            Concern::Named if header.tag == b'P' && self.prepared_max == 0 => {
                Look::Refuse(Box::new(Report::named_statement()))
            }
            Concern::Named if is_free && self.shelf.answers.is_unclear() => Look::Wait,
            Concern::Named if header.tag == b'P' && is_free => self.admit(body),
            Concern::Named => self.in_order(self.order != Order::Lost),
            // What is not answered yet may have to do with that name.
            Concern::DeallocatesBySql(_) if is_free && (must_wait || self.shelf.answers.marks() > 0) => Look::Wait,
            Concern::DeallocatesBySql(name) if header.tag == b'P' => {
                let is_clear = is_free && self.leaving.is_none() && self.find(&name).is_some();
                if is_clear { Look::Rewrite } else { self.look_at_unnamed(header.tag, stand) }
            }
            Concern::DeallocatesBySql(name) if self.find(&name).is_none() || stand == Stand::Copy => Look::Plain,
            Concern::DeallocatesBySql(_) => self.in_order(stand != Stand::Batch && self.order != Order::Lost),
        };
        let may_close = is_free && !(header.tag == b'Q' && stand == Stand::Batch);
        if matches!(look, Look::Plain) && may_close && !self.shelf.strays.is_empty() { Look::Rewrite } else { look }
    }

    fn in_order(&self, is_known: bool) -> Look {
        if is_known { Look::Rewrite } else { Look::Refuse(Box::new(Report::statements_out_of_order())) }
    }

    fn look_at_unnamed(&self, tag: u8, stand: Stand) -> Look {
        let replaces = matches!(tag, b'P' | b'C');
        match self.unnamed.standing() {
            _ if stand == Stand::Copy => Look::Plain,
            Standing::Unclear if !replaces || self.unnamed.is_spare() => Look::Wait,
            Standing::Foreign if !replaces => self.in_order(self.order != Order::Lost),
            Standing::Foreign | Standing::Sent | Standing::Unclear | Standing::Own => Look::Plain,
        }
    }

    /// Whether the client may have one statement more.
    fn admit(&self, body: &[u8]) -> Look {
        let Some((name, tail)) = cstring(body) else { return Look::Plain };
        let has_room = self.names.as_ref().is_none_or(|names| names.has_room(name, tail)) && self.cache.has_room(tail);
        if has_room { Look::Rewrite } else { Look::Refuse(Box::new(Report::too_many_statements())) }
    }

    /// Takes note of a message that goes up as it is; `false` if answers can't be told apart from here on and some of
    /// them matter.
    #[must_use]
    pub fn sent(&mut self, header: Header, pending: &[u8], stand: Stand) -> bool {
        if matches!(header.tag, b'Q' | b'F') && stand == Stand::Batch {
            return self.lose_order();
        }
        let body = &pending[HEADER_BYTES..pending.len().min(header.total_bytes)];
        match header.tag {
            b'Q' => {
                if opening(body, true) == Opening::Forgets && self.order == Order::Known {
                    self.order = Order::Forgetting;
                }
                self.query();
            }
            b'S' | b'F' => self.mark(),
            b'P' => {
                self.counts.client_parses += 1;
                self.counts.server_parses += 1;
                self.parse_unnamed(body, pending.len() >= header.total_bytes);
            }
            b'B' => {
                self.counts.binds += 1;
                self.bind_unnamed();
            }
            b'D' if body.first() == Some(&b'S') => self.push(Awaited::Pass(b't')),
            b'D' => self.result = Outcome::Known,
            b'C' if body.starts_with(b"S\0") => self.replace_unnamed(b'3', None),
            b'C' => self.push(Awaited::Pass(b'3')),
            b'E' => {
                if self.result == Outcome::Recalled {
                    self.names.get_or_insert_default().sight = Sight::Recalls;
                }
                self.push(Awaited::Executed);
            }
            _ => {}
        }
        true
    }

    /// From here on answers can't be told apart; `false` if some of them matter.
    #[must_use]
    pub fn lose_order(&mut self) -> bool {
        self.order = Order::Lost;
        let mattered = self.shelf.answers.has_changes();
        while self.shelf.answers.pop().is_some() {}
        self.unnamed.forget();
        !mattered
    }

    fn push(&mut self, awaited: Awaited) {
        if self.order != Order::Lost {
            self.shelf.answers.push(awaited);
        }
    }

    fn mark(&mut self) {
        self.push(Awaited::Mark);
        self.unnamed.close_batch();
    }

    /// A Query: it leaves no unnamed statement.
    fn query(&mut self) {
        self.unnamed.vanish();
        if let Some(names) = self.names.as_mut() {
            names.unnamed = None;
        }
        self.mark();
    }

    fn parse_unnamed(&mut self, body: &[u8], whole: bool) {
        let text = body.split_first().and_then(|(name, text)| (*name == 0 && whole).then_some(text));
        self.replace_unnamed(b'1', text);
    }

    /// A message goes up that replaces the unnamed statement, by this one if it can be kept; `tag` answers it.
    fn replace_unnamed(&mut self, tag: u8, text: Option<&[u8]>) {
        self.keep_unnamed();
        if let Some(text) = text {
            self.shelf.unnamed.clear();
            self.shelf.unnamed.extend_from_slice(text);
        }
        let serial = self.unnamed.replace(text.is_some());
        self.push(Awaited::Unnamed { serial, tag, ours: false });
    }

    /// Keeps the unnamed statement if it stands and waits to be bound.
    fn keep_unnamed(&mut self) {
        if self.unnamed.is_spare() && self.unnamed.standing() == Standing::Own {
            let text = &self.shelf.unnamed;
            let statement = self.cache.has_room(text).then(|| self.cache.intern(text));
            self.names.get_or_insert_default().unnamed = statement;
        }
    }

    fn bind_unnamed(&mut self) {
        self.result = Outcome::Known;
        self.push(Awaited::BoundUnnamed(self.unnamed.serial()));
    }

    fn find(&self, name: &[u8]) -> Option<Arc<Statement>> {
        self.names.as_ref()?.find(name)
    }
}
