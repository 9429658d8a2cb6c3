//! What is prepared on one server connection, under which of our names.
//!
//! Invariant: a serial is never given twice on one connection, so a Parse of ours can't meet a name that is there.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use bytes::BufMut;

use crate::statements::answers::Answers;

/// What our names on servers begin with. A client's own name that begins so is never sent as it is.
pub(super) const PREFIX: &[u8] = b"PGCUTOVER_";

/// A statement under certain settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) id: u64,
    pub(super) seal: u64,
}

/// How it is prepared on this connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prepared {
    pub(super) serial: u64,
    used: u64,
}

/// A server connection's prepared statements, and the answers that it owes for them.
#[derive(Debug, Default)]
pub struct Shelf {
    prepared: HashMap<Key, Prepared>,
    next_serial: u64,
    tick: u64,
    /// Names that stand on the server without being of use: closed before the next statement.
    pub(super) strays: Vec<Box<[u8]>>,
    pub(super) answers: Answers,
    /// The last unnamed Parse of the client of the moment, from the text on; one place for all that come.
    pub(super) unnamed: Vec<u8>,
}

/// The place for unnamed texts that a connection keeps when it rests.
const UNNAMED_KEPT_BYTES: usize = 16 * 1024;

impl Shelf {
    /// How many statements are prepared.
    #[must_use]
    pub fn len(&self) -> usize {
        self.prepared.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.prepared.is_empty()
    }

    /// Forgets everything: the connection was reset behind our back.
    pub fn clear(&mut self) {
        self.prepared.clear();
        self.strays.clear();
        self.answers = Answers::default();
    }

    /// Gives back the room that an uncommonly long text took.
    pub(super) fn trim(&mut self) {
        self.unnamed.clear();
        self.unnamed.shrink_to(UNNAMED_KEPT_BYTES);
    }

    /// The statement's serial if it is prepared; it has been used now.
    pub(super) fn find(&mut self, key: Key) -> Option<u64> {
        self.tick += 1;
        let prepared = self.prepared.get_mut(&key)?;
        prepared.used = self.tick;
        Some(prepared.serial)
    }

    /// Takes a new name for a statement.
    pub(super) fn add(&mut self, key: Key) -> u64 {
        self.tick += 1;
        self.next_serial += 1;
        let serial = self.next_serial;
        self.prepared.insert(key, Prepared { serial, used: self.tick });
        serial
    }

    /// What has to go before `key` can come: its own former self, or the least recently used one if `max` are there.
    pub(super) fn take_victim(&mut self, key: Key, max: usize) -> Option<(Key, Prepared)> {
        let victim = if self.prepared.contains_key(&key) {
            key
        } else if self.prepared.len() < max {
            return None;
        } else {
            // A walk over some hundreds, once for each Parse that a server gets when it is full.
            *self.prepared.iter().min_by_key(|(_, prepared)| prepared.used)?.0
        };
        self.prepared.remove(&victim).map(|prepared| (victim, prepared))
    }

    /// The Parse of this one was never carried out.
    pub(super) fn lose(&mut self, key: Key, serial: u64) {
        if self.prepared.get(&key).is_some_and(|prepared| prepared.serial == serial) {
            self.prepared.remove(&key);
        }
    }

    /// The Close of this one was never carried out.
    pub(super) fn regain(&mut self, key: Key, prepared: Prepared) {
        match self.prepared.entry(key) {
            Entry::Occupied(_) => self.strays.push(server_name(prepared.serial)),
            Entry::Vacant(place) => {
                place.insert(prepared);
            }
        }
    }

    /// The server has dropped everything that it had been told before the messages that `awaited` stands for.
    pub(super) fn keep_only(&mut self, awaited: &HashSet<u64>) {
        self.prepared.retain(|_, prepared| awaited.contains(&prepared.serial));
        self.strays.clear();
    }
}

/// Writes our name for a statement on a server, with its NUL.
pub(super) fn put_server_name(out: &mut impl BufMut, serial: u64) {
    out.put_slice(PREFIX);
    // The digits of a u64, from the last one.
    let (mut digits, mut at, mut left) = ([0_u8; 20], 20, serial);
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(left % 10).unwrap_or_default();
        left /= 10;
        if left == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
    out.put_u8(0);
}

/// Our name for a statement on a server, without its NUL.
pub(super) fn server_name(serial: u64) -> Box<[u8]> {
    let mut name = Vec::with_capacity(PREFIX.len() + 21);
    put_server_name(&mut name, serial);
    name.pop();
    name.into()
}
