//! Named prepared statements of the extended protocol where clients share server connections.
//!
//! A client's names stand for texts; each server connection has a bounded set of them prepared under names of ours. The
//! [`Desk`] rewrites a client's messages on the way up and takes what they were turned into off the way down.
//!
//! Invariant: a client is answered as a server of its own would have answered it, but for the statement names in the
//! words of some errors; what can't be answered so is refused loudly. No more than one answer comes down for each message
//! that went up, in order. Everything is bounded: the texts kept, a client's names, a server's set, the answers awaited.
//!
//! Limits: a text is analysed anew under the settings of its user of the moment. A statement whose result type changed
//! while no server connection had it is prepared with its new type; one that a connection had is refused by the server
//! (0A000), and from then on by us until the client has seen the new type: by preparing or describing it again, or
//! because it has each result described, as libpq does. An unnamed statement that has been bound once does not live on
//! in the next transaction. Pure: no IO, no clock.

mod answers;
mod concern;
mod desk;
mod shelf;
mod sql;
#[cfg(test)]
mod tests;
mod unnamed;
mod writes;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use desk::{Back, Counts, Desk, Look, Rest};
pub use shelf::Shelf;
pub use writes::{BATCH_BYTES_MAX, Beginning, Prepared, beginning};

use crate::parameters::Settings;

/// Texts that nobody uses and that are kept in case somebody prepares them again.
const CACHE_LEN_MIN: usize = 4096;

/// Their bytes.
const CACHE_BYTES_MIN: usize = 64 * 1024 * 1024;

/// Bytes of all texts of the process: far more than applications have, and what a proxy can spare.
const PROCESS_BYTES_MAX: usize = 512 * 1024 * 1024;

/// Statements that one client may have: several times what drivers keep, few enough that a thousand clients fit.
const NAMES_MAX: usize = 16 * 1024;

/// Bytes of their names and texts together.
const NAMES_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A text and the types of its parameters: all that a Parse says besides its name.
#[derive(Debug)]
pub struct Statement {
    id: u64,
    /// Its result type has changed. Who has a name for it goes on being refused, as by a server of its own; who prepares
    /// the text again gets another statement.
    retired: AtomicBool,
    /// Text, NUL, number of types, types: the Parse message from the text on.
    tail: Box<[u8]>,
}

/// Bytes of the texts of all databases.
pub type Budget = Arc<AtomicUsize>;

/// The statements of a database: one text is kept once, however many clients and servers have it. Their number and bytes
/// are bounded together with those of the other databases of the process.
#[derive(Debug, Default)]
pub struct Cache {
    all: Mutex<Texts>,
    hasher: RandomState,
    budget: Budget,
}

#[derive(Debug, Default)]
struct Texts {
    by_hash: HashMap<u64, Vec<Arc<Statement>>>,
    len: usize,
    bytes: usize,
    next_id: u64,
    /// Where the unused ones are next dropped.
    sweep: Option<(usize, usize)>,
}

impl Cache {
    /// An empty one.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        Self { all: Mutex::default(), hasher: RandomState::new(), budget }
    }

    /// Whether a text more may be kept. It may be exceeded by what all workers take in at the same moment.
    fn has_room(&self, tail: &[u8]) -> bool {
        let fits = || self.budget.load(Ordering::Relaxed) + tail.len() <= PROCESS_BYTES_MAX;
        if fits() {
            return true;
        }
        self.lock().sweep(&self.budget);
        fits()
    }

    fn lock(&self) -> MutexGuard<'_, Texts> {
        // Nothing under this lock panics half way through a change.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The statement with this tail.
    #[must_use]
    pub fn intern(&self, tail: &[u8]) -> Arc<Statement> {
        let hash = self.hasher.hash_one(tail);
        let mut all = self.lock();
        let known = all.by_hash.get(&hash).and_then(|same| same.iter().find(|statement| &*statement.tail == tail));
        if let Some(statement) = known {
            return Arc::clone(statement);
        }
        if all.is_due() {
            all.sweep(&self.budget);
        }
        all.next_id += 1;
        let statement = Arc::new(Statement { id: all.next_id, retired: AtomicBool::new(false), tail: tail.into() });
        all.len += 1;
        all.bytes += tail.len();
        self.budget.fetch_add(tail.len(), Ordering::Relaxed);
        all.by_hash.entry(hash).or_default().push(Arc::clone(&statement));
        statement
    }

    /// From here on the text is another statement.
    fn retire(&self, statement: &Arc<Statement>) {
        statement.retired.store(true, Ordering::Relaxed);
        let hash = self.hasher.hash_one(&*statement.tail);
        let mut all = self.lock();
        let Some(same) = all.by_hash.get_mut(&hash) else { return };
        let before = same.len();
        same.retain(|known| !Arc::ptr_eq(known, statement));
        if same.len() < before {
            all.len -= 1;
            all.bytes -= statement.tail.len();
            self.budget.fetch_sub(statement.tail.len(), Ordering::Relaxed);
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.budget.fetch_sub(self.lock().bytes, Ordering::Relaxed);
    }
}

impl Texts {
    /// Whether there is twice as much as was in use the last time.
    fn is_due(&self) -> bool {
        let (len_max, bytes_max) = self.sweep.unwrap_or((CACHE_LEN_MIN, CACHE_BYTES_MIN));
        self.len >= len_max || self.bytes >= bytes_max
    }

    /// Drops what no client has a name for.
    fn sweep(&mut self, budget: &AtomicUsize) {
        let (mut len, mut bytes) = (0, 0);
        self.by_hash.retain(|_, same| {
            same.retain(|statement| Arc::strong_count(statement) > 1);
            len += same.len();
            bytes += same.iter().map(|statement| statement.tail.len()).sum::<usize>();
            !same.is_empty()
        });
        budget.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        (self.len, self.bytes) = (len, bytes);
        self.sweep = Some((CACHE_LEN_MIN.max(2 * len), CACHE_BYTES_MIN.max(2 * bytes)));
    }
}

impl Statement {
    fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }
}

/// A client's statements by its names for them. None of a client that has never prepared one.
#[derive(Debug, Default)]
pub struct Names {
    by_name: HashMap<Box<[u8]>, Arc<Statement>>,
    bytes: usize,
    seal: Option<(Arc<Settings>, u64)>,
    /// Its unnamed statement while that is on no server connection of its own.
    unnamed: Option<Arc<Statement>>,
    sight: Sight,
}

/// Whether a client learns the type of each result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Sight {
    /// So far it had each described.
    #[default]
    Sees,
    /// It relies on what it was told when it prepared.
    Recalls,
}

impl Names {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    fn find(&self, name: &[u8]) -> Option<Arc<Statement>> {
        self.by_name.get(name).map(Arc::clone)
    }

    fn has_room(&self, name: &[u8], tail: &[u8]) -> bool {
        self.by_name.len() < NAMES_MAX && self.bytes + name.len() + tail.len() <= NAMES_BYTES_MAX
    }

    fn insert(&mut self, name: &[u8], statement: Arc<Statement>) {
        self.bytes += name.len() + statement.tail.len();
        if let Some(former) = self.by_name.insert(name.into(), statement) {
            self.bytes -= name.len() + former.tail.len();
        }
    }

    fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let statement = self.by_name.remove(name)?;
        self.bytes -= name.len() + statement.tail.len();
        Some(statement)
    }

    fn retain(&mut self, keep: impl Fn(&[u8]) -> bool) {
        let gone: Vec<Box<[u8]>> = self.by_name.keys().filter(|name| !keep(name)).cloned().collect();
        gone.iter().for_each(|name| {
            self.remove(name);
        });
    }

    /// Stands for the settings that decide what a text means: a statement analysed under others is another one.
    fn seal(&mut self, settings: &Arc<Settings>) -> u64 {
        if let Some((known, seal)) = &self.seal
            && Arc::ptr_eq(known, settings)
        {
            return *seal;
        }
        let seal = settings.seal();
        self.seal = Some((Arc::clone(settings), seal));
        seal
    }
}
