//! The answers that a server owes for Parse, Bind, Describe and Close, in order, and what each means for the books.
//!
//! Invariant: the books are kept as if everything sent succeeded; what turns out not to have been carried out is taken
//! back in reverse order, at the end of its batch. A change of the books that is not confirmed yet is never built upon by
//! a later batch: that waits ([`Answers::is_unclear`]).

use std::collections::VecDeque;
use std::sync::Arc;

use crate::statements::Statement;
use crate::statements::shelf::{Key, Prepared};

/// Answers awaited at most. A server that has this many unsent of five bytes each has long flushed the first ones, so
/// waiting for them can't deadlock.
const AWAITED_MAX: usize = 16 * 1024;

/// One message sent and not answered yet.
#[derive(Debug)]
pub(super) enum Awaited {
    /// An answer with this tag that is passed on.
    Pass(u8),
    /// An answer with this tag to a message of ours that concerns nothing.
    Swallow(u8),
    /// BindComplete of a named statement.
    Bound(Arc<Statement>),
    /// CommandComplete, or what else ends an Execute.
    Executed,
    /// The failure of a Bind of a named statement whose result type has changed.
    Retired,
    /// ParameterDescription of a named statement.
    Described(Arc<Statement>),
    /// The answer with this tag to a message that replaces the unnamed statement; `ours` is swallowed.
    Unnamed { serial: u64, tag: u8, ours: bool },
    /// BindComplete of the unnamed statement.
    BoundUnnamed(u64),
    /// ParseComplete; the client's name for it if it asked for it, else it is ours to swallow.
    Parsed { key: Key, serial: u64, name: Option<Box<[u8]>> },
    /// CloseComplete that becomes the client's ParseComplete: the server had the statement.
    Known(Box<[u8]>),
    /// CloseComplete of a statement that had to go.
    Evicted(Key, Prepared),
    /// CloseComplete that is passed on: the client has given up its name for the statement.
    Forgot(Box<[u8]>, Arc<Statement>),
    /// CloseComplete of a stray name.
    Stray(Box<[u8]>),
    /// ReadyForQuery.
    Mark,
}

impl Awaited {
    fn is_change(&self) -> bool {
        match self {
            Awaited::Pass(_)
            | Awaited::Swallow(_)
            | Awaited::Bound(_)
            | Awaited::Described(_)
            | Awaited::Unnamed { .. }
            | Awaited::BoundUnnamed(_)
            | Awaited::Executed
            | Awaited::Retired
            | Awaited::Mark => false,
            Awaited::Parsed { .. }
            | Awaited::Known(_)
            | Awaited::Evicted(..)
            | Awaited::Forgot(..)
            | Awaited::Stray(_) => true,
        }
    }

    /// The tag of its answer, of Execute the usual one.
    pub(super) fn tag(&self) -> u8 {
        match self {
            Awaited::Pass(tag) | Awaited::Swallow(tag) | Awaited::Unnamed { tag, .. } => *tag,
            Awaited::Bound(_) | Awaited::BoundUnnamed(_) | Awaited::Retired => b'2',
            Awaited::Described(_) => b't',
            Awaited::Parsed { .. } => b'1',
            Awaited::Known(_) | Awaited::Evicted(..) | Awaited::Forgot(..) | Awaited::Stray(_) => b'3',
            Awaited::Executed => b'C',
            Awaited::Mark => b'Z',
        }
    }
}

/// The queue of them.
#[derive(Debug, Default)]
pub(super) struct Answers {
    queue: VecDeque<Awaited>,
    marks: usize,
    /// Unconfirmed changes in batches that are complete.
    closed_changes: usize,
    /// Unconfirmed changes since.
    open_changes: usize,
}

impl Answers {
    pub(super) fn push(&mut self, awaited: Awaited) {
        if matches!(awaited, Awaited::Mark) {
            self.marks += 1;
            self.closed_changes += std::mem::take(&mut self.open_changes);
        } else if awaited.is_change() {
            self.open_changes += 1;
        }
        self.queue.push_back(awaited);
    }

    pub(super) fn pop(&mut self) -> Option<Awaited> {
        let first = self.queue.pop_front()?;
        if first.is_change() {
            if self.closed_changes > 0 {
                self.closed_changes -= 1;
            } else {
                self.open_changes -= 1;
            }
        }
        if matches!(first, Awaited::Mark) {
            self.marks -= 1;
        }
        Some(first)
    }

    pub(super) fn first(&self) -> Option<&Awaited> {
        self.queue.front()
    }

    /// ReadyForQuery messages awaited.
    pub(super) fn marks(&self) -> usize {
        self.marks
    }

    pub(super) fn is_full(&self) -> bool {
        self.queue.len() >= AWAITED_MAX
    }

    /// Whether a complete batch may yet change the books in a way that we can't foresee.
    pub(super) fn is_unclear(&self) -> bool {
        self.closed_changes > 0
    }

    /// Whether any change is awaited.
    pub(super) fn has_changes(&self) -> bool {
        self.closed_changes + self.open_changes > 0
    }

    /// Everything awaited, to be changed in place.
    pub(super) fn all(&mut self) -> impl Iterator<Item = &mut Awaited> {
        self.queue.iter_mut()
    }

    /// Counts again after [`Answers::all`] was used to change something.
    pub(super) fn recount(&mut self) {
        let last_mark = self.queue.iter().rposition(|awaited| matches!(awaited, Awaited::Mark)).map_or(0, |at| at + 1);
        let changes = |part: &mut dyn Iterator<Item = &Awaited>| part.filter(|awaited| awaited.is_change()).count();
        self.closed_changes = changes(&mut self.queue.iter().take(last_mark));
        self.open_changes = changes(&mut self.queue.iter().skip(last_mark));
    }
}
