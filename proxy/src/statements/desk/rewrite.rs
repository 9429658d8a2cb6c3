//! What goes up in the place of a client's message.
//!
//! Invariant: a message that costs the client an answer is replaced by one that costs one, in the same place.

use std::sync::Arc;

use bytes::{BufMut, BytesMut};

use crate::frame::{HEADER_BYTES, Header};
use crate::message::{put, put_cstring, put_query};
use crate::statements::answers::Awaited;
use crate::statements::concern::{Concern, concern, cstring};
use crate::statements::desk::{Desk, Leaving, Order, Outcome, Rest};
use crate::statements::shelf::{Key, PREFIX, put_server_name};
use crate::statements::sql::{Opening, opening};
use crate::statements::unnamed::Standing;
use crate::statements::{Sight, Statement};
use crate::tracker::Stand;

/// A portal that nobody has: to close it changes nothing and is answered by one CloseComplete.
const NO_PORTAL: &[u8] = b"PGCUTOVER none";

/// What a PREPARE in SQL becomes: the server refuses it in the right place of the order and of the transaction.
const NO_PREPARE: &[u8] = b"DO $pgcutover$BEGIN RAISE EXCEPTION USING ERRCODE = '0A000', \
    MESSAGE = 'PREPARE is not supported in transaction pooling', \
    HINT = 'Use session pooling for this user, or let the driver prepare statements by the protocol.'; END$pgcutover$";

/// What DEALLOCATE of one statement becomes: allowed and refused where that would be, answered alike. The answer to its
/// first half is ours.
const DEALLOCATE_ONE: &[u8] = b"PREPARE \"PGCUTOVER none\" AS SELECT 1; DEALLOCATE \"PGCUTOVER none\"";

/// What goes in the place of a statement that a client gives up by executing DEALLOCATE.
pub(super) const GONE: &[u8] = b"PGCUTOVER gone";

const DEALLOCATE_GONE: &[u8] = b"DEALLOCATE \"PGCUTOVER gone\"";

/// A statement that no server has: to bind it fails in the right place.
const NO_STATEMENT: &[u8] = b"PGCUTOVER none";

impl Desk<'_> {
    /// What goes up in the place of the first bytes of a message that has to be rewritten: how many, what becomes of the
    /// others, and the bytes.
    pub fn rewrite(&mut self, header: Header, pending: &[u8], failed: bool) -> (usize, Rest, &[u8]) {
        self.out.clear();
        let body = &pending[HEADER_BYTES..pending.len().min(header.total_bytes)];
        self.strays();
        let (front, rest) = match (header.tag, concern(header, body, pending.len() >= header.total_bytes)) {
            (b'Q', Concern::DeallocatesBySql(name)) if self.find(&name).is_some() => {
                put_query(&mut self.out, DEALLOCATE_ONE);
                (self.order, self.leaving) = (Order::Forgetting, Some(Leaving::ByQuery(name)));
                self.query();
                (0, Rest::Drop)
            }
            (b'P', Concern::DeallocatesBySql(name)) if self.leaving.is_none() && self.find(&name).is_some() => {
                self.counts.client_parses += 1;
                self.counts.server_parses += 2;
                put_parse(&mut self.out, GONE, &tail_of(b""));
                self.push(Awaited::Swallow(b'1'));
                put_parse(&mut self.out, b"", &tail_of(DEALLOCATE_GONE));
                self.replace_unnamed(b'1', None);
                (self.order, self.leaving) = (Order::Forgetting, Some(Leaving::ByExecute(name)));
                (0, Rest::Drop)
            }
            (b'Q', Concern::PreparesBySql) => {
                put_query(&mut self.out, NO_PREPARE);
                self.query();
                (0, Rest::Drop)
            }
            (b'P', Concern::PreparesBySql) => {
                self.counts.client_parses += 1;
                self.counts.server_parses += 1;
                put_parse(&mut self.out, b"", &tail_of(NO_PREPARE));
                self.replace_unnamed(b'1', None);
                (0, Rest::Drop)
            }
            (b'B' | b'D', Concern::Unnamed) if self.unnamed.standing() == Standing::Foreign => {
                self.bring_unnamed();
                // What it is about has come: it goes up as it is.
                let _in_order = self.sent(header, pending, Stand::Batch);
                (0, Rest::Send)
            }
            (b'B', Concern::Named) => (self.bind(header, body), Rest::Send),
            (tag, Concern::Named) => {
                match (tag, cstring(body), body.split_first().and_then(|(_, rest)| cstring(rest))) {
                    (b'P', Some((name, tail)), _) => self.parse(name, tail, failed),
                    (b'D', _, Some((name, _))) => self.describe(name),
                    (_, _, Some((name, _))) => self.close(name),
                    // Looked at before: there is a name.
                    (_, _, None) => {}
                }
                (header.total_bytes, Rest::Send)
            }
            // Behind the end of the strays it goes up as it is, a Query between batches only.
            _ => {
                let _in_order = self.sent(header, pending, Stand::Between);
                (0, Rest::Send)
            }
        };
        (front, rest, &self.out)
    }

    /// Puts the client's unnamed statement in the place of whatever the server has; if it has none, none.
    fn bring_unnamed(&mut self) {
        let serial = self.unnamed.replace(false);
        let kept = self.names.as_ref().and_then(|names| names.unnamed.as_ref());
        let tag = if let Some(statement) = kept {
            self.counts.server_parses += 1;
            put_parse(&mut self.out, b"", &statement.tail);
            b'1'
        } else {
            put_close(&mut self.out, |out| out.put_u8(0));
            b'3'
        };
        self.push(Awaited::Unnamed { serial, tag, ours: true });
    }

    fn parse(&mut self, name: &[u8], tail: &[u8], failed: bool) {
        self.counts.client_parses += 1;
        if self.find(name).is_some() {
            // The server says itself that there is one of that name.
            let foreign = foreign(name);
            put_parse(&mut self.out, &foreign, &tail_of(b""));
            self.push(Awaited::Swallow(b'1'));
            put_parse(&mut self.out, &foreign, tail);
            self.push(Awaited::Pass(b'1'));
            self.shelf.strays.push(foreign.into());
            return;
        }
        let statement = match opening(tail, true) {
            Opening::Prepare => self.cache.intern(&tail_of(NO_PREPARE)),
            Opening::Other | Opening::Forgets | Opening::Unknown => self.cache.intern(tail),
        };
        let key = self.key(&statement);
        // In a transaction that has failed, or may yet fail, the server has to decide whether it takes this statement.
        let may_fail = failed || self.shelf.answers.marks() > 0;
        if !may_fail && self.shelf.find(key).is_some() {
            self.put_close_nothing();
            self.push(Awaited::Known(name.into()));
        } else {
            self.prepare(key, &statement, Some(name));
        }
        self.names.get_or_insert_default().insert(name, statement);
    }

    /// Brings the statement to the server, under a new name of ours.
    fn prepare(&mut self, key: Key, statement: &Statement, name: Option<&[u8]>) -> u64 {
        while let Some((victim, prepared)) = self.shelf.take_victim(key, self.prepared_max) {
            put_close(&mut self.out, |out| put_server_name(out, prepared.serial));
            self.push(Awaited::Evicted(victim, prepared));
        }
        let serial = self.shelf.add(key);
        self.counts.server_parses += 1;
        put(&mut self.out, b'P', |out| {
            put_server_name(out, serial);
            out.put_slice(&statement.tail);
        });
        self.push(Awaited::Parsed { key, serial, name: name.map(Into::into) });
        serial
    }

    fn bind(&mut self, header: Header, body: &[u8]) -> usize {
        self.counts.binds += 1;
        let Some((portal, rest)) = cstring(body) else { return 0 };
        let Some((name, _)) = cstring(rest) else { return 0 };
        let statement = self.wanted(name, Sight::Recalls);
        let is_retired = statement.as_ref().is_some_and(|statement| statement.is_retired());
        let serial = statement.as_ref().filter(|_| !is_retired).map(|statement| self.on_server(statement));
        let length_at = self.out.len() + 1;
        self.out.put_u8(b'B');
        self.out.put_i32(0);
        put_cstring(&mut self.out, portal);
        put_statement_name(&mut self.out, serial, if is_retired { NO_STATEMENT } else { name });
        let front = HEADER_BYTES + portal.len() + name.len() + 2;
        let length = self.out.len() - length_at + header.total_bytes - front;
        // A message whose length was an i32 and that grows beyond it is refused by the server.
        let length = i32::try_from(length).unwrap_or(i32::MAX);
        self.out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
        self.result = if statement.is_some() { Outcome::Recalled } else { Outcome::Known };
        self.push(match statement {
            Some(_) if is_retired => Awaited::Retired,
            Some(statement) => Awaited::Bound(statement),
            None => Awaited::Pass(b'2'),
        });
        front
    }

    fn describe(&mut self, name: &[u8]) {
        let statement = self.wanted(name, Sight::Sees);
        let serial = statement.as_ref().map(|statement| self.on_server(statement));
        put(&mut self.out, b'D', |out| {
            out.put_u8(b'S');
            put_statement_name(out, serial, name);
        });
        self.push(statement.map_or(Awaited::Pass(b't'), Awaited::Described));
    }

    fn close(&mut self, name: &[u8]) {
        self.put_close_nothing();
        let forgotten = self.names.as_mut().and_then(|names| names.remove(name));
        self.push(match forgotten {
            Some(statement) => Awaited::Forgot(name.into(), statement),
            None => Awaited::Pass(b'3'),
        });
    }

    /// The client's statement of this name; anew if its result type has changed and the client is going to see that.
    fn wanted(&mut self, name: &[u8], sight: Sight) -> Option<Arc<Statement>> {
        let statement = self.find(name)?;
        let names = self.names.as_mut()?;
        if !statement.is_retired() || (sight == Sight::Recalls && names.sight == Sight::Recalls) {
            return Some(statement);
        }
        let renewed = self.cache.intern(&statement.tail);
        names.insert(name, Arc::clone(&renewed));
        Some(renewed)
    }

    /// The serial of the statement on the server, where it is now if it was not.
    fn on_server(&mut self, statement: &Statement) -> u64 {
        let key = self.key(statement);
        self.shelf.find(key).unwrap_or_else(|| self.prepare(key, statement, None))
    }

    fn key(&mut self, statement: &Statement) -> Key {
        let seal = self.names.get_or_insert_default().seal(self.settings);
        Key { id: statement.id, seal }
    }

    /// Closes what stands on the server without being of use.
    fn strays(&mut self) {
        for name in std::mem::take(&mut self.shelf.strays) {
            put_close(&mut self.out, |out| put_cstring(out, &name));
            self.push(Awaited::Stray(name));
        }
    }

    fn put_close_nothing(&mut self) {
        put(&mut self.out, b'C', |out| {
            out.put_u8(b'P');
            put_cstring(out, NO_PORTAL);
        });
    }
}

/// A name that stands for nothing on the server, as the client wrote it, unless it looks like one of ours.
fn foreign(name: &[u8]) -> Vec<u8> {
    let mut foreign = if name.starts_with(PREFIX) { b"?".to_vec() } else { Vec::new() };
    foreign.extend_from_slice(name);
    foreign
}

fn put_statement_name(out: &mut BytesMut, serial: Option<u64>, name: &[u8]) {
    match serial {
        Some(serial) => put_server_name(out, serial),
        None => put_cstring(out, &foreign(name)),
    }
}

/// What a Parse of this text without types says after its name.
fn tail_of(text: &[u8]) -> Vec<u8> {
    let mut tail = text.to_vec();
    tail.extend_from_slice(&[0, 0, 0]);
    tail
}

fn put_parse(out: &mut BytesMut, name: &[u8], tail: &[u8]) {
    put(out, b'P', |out| {
        put_cstring(out, name);
        out.put_slice(tail);
    });
}

/// Close of a statement whose name `write` writes.
fn put_close(out: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    put(out, b'C', |out| {
        out.put_u8(b'S');
        write(out);
    });
}
