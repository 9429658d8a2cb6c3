//! What becomes of a server's answers on their way down.
//!
//! Invariant: the books say what the server has once everything sent is answered; what was skipped is taken back in
//! reverse order.

use std::collections::HashSet;

use bytes::BufMut;

use crate::frame::{HEADER_BYTES, Header};
use crate::message::{put, put_cstring};
use crate::statements::answers::Awaited;
use crate::statements::concern::FRONT_BYTES_MAX;
use crate::statements::desk::rewrite::GONE;
use crate::statements::desk::{Back, Desk, Leaving, Order, SideEffect};

/// Tags of commands that matter here.
const COMMANDS: [&str; 5] = ["RESET", "PREPARE", "DEALLOCATE", "DISCARD ALL", "DEALLOCATE ALL"];

/// Whether an error says that a statement's result type has changed.
fn is_stale(body: &[u8]) -> bool {
    body.windows(STALE.len()).any(|window| window == STALE)
}

/// What the client is told where its statement's result type has changed: the words of PostgreSQL, which drivers know.
const RETIRED: &[(u8, &[u8])] = &[
    (b'S', b"ERROR"),
    (b'V', b"ERROR"),
    (b'C', b"0A000"),
    (b'M', b"cached plan must not change result type"),
    (b'F', b"plancache.c"),
    (b'R', b"RevalidateCachedQuery"),
];

/// Where in PostgreSQL's source a stale result type is found: the words may be translated, this is not.
const STALE: &[u8] = b"RRevalidateCachedQuery\0";

impl Desk<'_> {
    /// Whether this message of the server has to be seen whole.
    #[must_use]
    pub fn wants(header: Header) -> bool {
        let tag_bytes = header.total_bytes.saturating_sub(HEADER_BYTES + 1);
        match header.tag {
            b'C' => COMMANDS.iter().any(|command| command.len() == tag_bytes),
            b'E' => header.total_bytes <= FRONT_BYTES_MAX,
            _ => false,
        }
    }

    /// What becomes of a server's message; `body` is whole if it is wanted.
    pub fn back(&mut self, tag: u8, body: &[u8]) -> Back {
        match tag {
            b'1' | b'2' | b'3' | b't' if self.order != Order::Lost => self.answer(tag),
            b'T' | b'n' => {
                self.described = None;
                Back::Pass
            }
            b'E' => self.failure(body),
            b'C' => {
                self.executed();
                self.command(body.strip_suffix(b"\0").unwrap_or_default())
            }
            b'I' | b's' => {
                self.executed();
                Back::Pass
            }
            _ => Back::Pass,
        }
    }

    /// An answer to one message; of those that a message of its kind can have, the one that is next.
    fn answer(&mut self, tag: u8) -> Back {
        if self.shelf.answers.first().is_none_or(|first| first.tag() != tag) {
            return Back::Nonsense;
        }
        match self.shelf.answers.pop() {
            Some(Awaited::Known(_)) => Back::As(b'1'),
            Some(
                Awaited::Swallow(_) | Awaited::Evicted(..) | Awaited::Stray(_) | Awaited::Parsed { name: None, .. },
            ) => Back::Swallow,
            Some(Awaited::Unnamed { serial, ours, tag: _ }) => {
                self.unnamed.confirm(serial);
                if ours {
                    return Back::Swallow;
                }
                self.drop_unnamed();
                Back::Pass
            }
            Some(Awaited::BoundUnnamed(serial)) => {
                self.unnamed.spend(serial);
                self.drop_unnamed();
                Back::Pass
            }
            Some(Awaited::Described(statement)) => {
                self.described = Some(statement);
                Back::Pass
            }
            Some(
                Awaited::Pass(_)
                | Awaited::Bound(_)
                | Awaited::Forgot(..)
                | Awaited::Parsed { name: Some(_), .. }
                | Awaited::Executed
                | Awaited::Retired
                | Awaited::Mark,
            )
            | None => Back::Pass,
        }
    }

    /// The unnamed statement that was kept is of no use any more.
    fn drop_unnamed(&mut self) {
        if let Some(names) = self.names.as_mut() {
            names.unnamed = None;
        }
    }

    fn failure(&mut self, body: &[u8]) -> Back {
        let described = self.described.take();
        match self.shelf.answers.first() {
            Some(Awaited::Retired) if body.windows(7).any(|window| window == b"C26000\0") => return Back::Instead,
            // The server drops the old one before it reads the text of the new one.
            Some(Awaited::Unnamed { ours: false, .. }) => self.drop_unnamed(),
            Some(Awaited::Bound(statement)) if is_stale(body) => self.cache.retire(statement),
            Some(_) | None => {}
        }
        if let Some(statement) = described.filter(|_| is_stale(body)) {
            self.cache.retire(&statement);
        }
        Back::Pass
    }

    /// The error in the place of one that is about a statement of ours.
    pub fn instead(&mut self) -> &[u8] {
        self.out.clear();
        put(&mut self.out, b'E', |out| {
            for (field, text) in RETIRED {
                out.put_u8(*field);
                put_cstring(out, text);
            }
            out.put_u8(0);
        });
        &self.out
    }

    /// An Execute, or one command of a Query, has ended.
    fn executed(&mut self) {
        if let Some(Awaited::Executed) = self.shelf.answers.first() {
            self.shelf.answers.pop();
        }
    }

    fn command(&mut self, command: &[u8]) -> Back {
        match (command, &self.leaving) {
            (b"PREPARE", Some(Leaving::ByQuery(_))) => return Back::Swallow,
            (b"PREPARE", Some(Leaving::ByExecute(_)) | None) => self.side_effect = SideEffect::Prepared,
            (b"RESET", _) => self.side_effect = self.side_effect.max(SideEffect::Reset),
            (b"DEALLOCATE", Some(Leaving::ByQuery(name) | Leaving::ByExecute(name))) => {
                if let Some(names) = self.names.as_mut() {
                    names.remove(name);
                }
            }
            (b"DEALLOCATE ALL", _) => self.forget_all(),
            (b"DISCARD ALL", _) => {
                self.side_effect = self.side_effect.max(SideEffect::Reset);
                self.forget_all();
            }
            (_, _) => {}
        }
        Back::Pass
    }

    /// The session awaits only so many ReadyForQuery now: what was sent before the others and has not been answered was
    /// skipped by the server, and is taken back.
    pub fn settle(&mut self, marks: usize) {
        while self.order != Order::Lost && self.shelf.answers.marks() > marks {
            let mut skipped = Vec::new();
            while let Some(awaited) = self.shelf.answers.pop() {
                if matches!(awaited, Awaited::Mark) {
                    break;
                }
                skipped.push(awaited);
            }
            skipped.into_iter().rev().for_each(|awaited| self.take_back(awaited));
        }
        if marks > 0 {
            return;
        }
        if self.order == Order::Forgetting {
            self.order = Order::Known;
        }
        if let Some(Leaving::ByExecute(_)) = self.leaving.take() {
            // It may not have been executed.
            self.shelf.strays.push(GONE.into());
        }
    }

    fn take_back(&mut self, awaited: Awaited) {
        match awaited {
            Awaited::Pass(_)
            | Awaited::Swallow(_)
            | Awaited::Bound(_)
            | Awaited::Described(_)
            | Awaited::BoundUnnamed(_)
            | Awaited::Executed
            | Awaited::Retired
            | Awaited::Mark => {}
            Awaited::Unnamed { serial, .. } => self.unnamed.lose(serial),
            Awaited::Parsed { key, serial, name } => {
                self.shelf.lose(key, serial);
                if let Some(name) = name {
                    self.names.get_or_insert_default().remove(&name);
                }
            }
            Awaited::Known(name) => {
                self.names.get_or_insert_default().remove(&name);
            }
            Awaited::Evicted(key, prepared) => self.shelf.regain(key, prepared),
            Awaited::Forgot(name, statement) => self.names.get_or_insert_default().insert(&name, statement),
            Awaited::Stray(name) => self.shelf.strays.push(name),
        }
    }

    /// The server has dropped every statement that it has confirmed.
    fn forget_all(&mut self) {
        let (mut serials, mut kept_names) = (HashSet::new(), HashSet::new());
        for awaited in self.shelf.answers.all() {
            match awaited {
                Awaited::Parsed { serial, name, .. } => {
                    serials.insert(*serial);
                    kept_names.extend(name.clone());
                }
                Awaited::Known(name) => {
                    kept_names.insert(name.clone());
                }
                Awaited::Evicted(..) | Awaited::Stray(_) => *awaited = Awaited::Swallow(b'3'),
                Awaited::Forgot(..) => *awaited = Awaited::Pass(b'3'),
                Awaited::Pass(_)
                | Awaited::Swallow(_)
                | Awaited::Bound(_)
                | Awaited::Described(_)
                | Awaited::Unnamed { .. }
                | Awaited::BoundUnnamed(_)
                | Awaited::Executed
                | Awaited::Retired
                | Awaited::Mark => {}
            }
        }
        self.shelf.answers.recount();
        self.shelf.keep_only(&serials);
        if let Some(names) = self.names.as_mut() {
            names.retain(|name| kept_names.contains(name));
        }
    }
}
