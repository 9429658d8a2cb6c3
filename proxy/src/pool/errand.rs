//! What a session is asked to do with the server connection that it keeps, between two of its transactions.
//!
//! Invariant: a client has one errand at most; whoever left it learns of its end, or that it will never be run, by the
//! channel in it. A successor is at rest, restored, and serves nobody; it takes a place only when a session adopts it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::backend::{Alive, ConnectError, ServerConnection};
use crate::client::{Client, Order};
use crate::pool::connection::{Place, Pooled};
use crate::pool::{Kept, Pool, lock, rehomed};
use crate::route::Active;
use crate::transplant::{NotMovable, Snapshot, Survey};

/// Something to do.
pub enum Errand {
    /// Read what the session is made of.
    Probe {
        /// What was found for all sessions of the database.
        survey: Arc<Survey>,
        /// What came of it; dropped when there is nothing to read.
        answer: oneshot::Sender<Probed>,
    },
    /// Go on with this connection and close the other.
    Adopt {
        /// It has all that the session is made of.
        successor: Successor,
        /// Told once that is so.
        answer: oneshot::Sender<()>,
    },
}

/// What reading a session came to.
#[derive(Debug)]
pub struct Probed {
    /// What it is made of, or why it stays.
    pub session: Result<Arc<Snapshot>, NotMovable>,
    /// How long that took; zero where it was known, and the session has said nothing since.
    pub took: Duration,
}

/// Errands by client.
#[derive(Default)]
pub struct Errands {
    left: Mutex<BTreeMap<u64, Errand>>,
}

impl Errands {
    /// Leaves an errand with a client and wakes it. One that was not run yet is dropped.
    pub fn leave(&self, client: &Client, errand: Errand) {
        lock(&self.left).insert(client.who.id, errand);
        client.order(Order::Errand);
    }

    /// Takes a client's errand: to run it, or because nobody waits for it any more.
    pub fn take(&self, client: u64) -> Option<Errand> {
        lock(&self.left).remove(&client)
    }
}

/// A connection that is to take over from the one that a session keeps. Dropped, it is closed.
pub struct Successor {
    pooled: Option<Box<Pooled>>,
    pool: Arc<Pool>,
}

impl Successor {
    /// The connection; `None` never while it is a successor.
    pub fn server(&mut self) -> Option<&mut ServerConnection> {
        self.pooled.as_mut().map(|pooled| &mut pooled.server)
    }

    /// Whether it is still there. What it has said for its client is kept.
    pub fn is_alive(&mut self) -> bool {
        self.server().is_some_and(|server| server.listen() == Alive::Yes)
    }

    /// It becomes a session's own, of the route's present generation and this worker's, with a place: the one that it
    /// replaces gives its place back when it has closed.
    #[must_use]
    pub fn into_kept(mut self, worker: usize) -> Option<Kept> {
        let mut pooled = rehomed(self.pooled.take()?, worker)?;
        pooled.generation = self.pool.site.route.generation();
        pooled.shared.generation.store(pooled.generation, Ordering::Relaxed);
        pooled.reported = Arc::new(pooled.server.parameters.clone());
        pooled.place = self.pool.force_place();
        Some(Kept { pooled, pool: Arc::clone(&self.pool) })
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(pooled) = self.pooled.take() {
            self.pool.dismiss(pooled);
        }
    }
}

impl Pool {
    /// A connection for a successor: a parked one, or else a new one. It takes no place yet.
    ///
    /// Bounded by `server_connect_timeout`. Cancel safe: a connection under way is dropped.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn successor(self: &Arc<Self>, target: &Active) -> Result<Successor, ConnectError> {
        let pooled = match self.unpark_one(&target.backend) {
            Some(pooled) => pooled,
            None => self.connect(target, Place::none(), 0).await?,
        };
        Ok(Successor { pooled: Some(pooled), pool: Arc::clone(self) })
    }
}
