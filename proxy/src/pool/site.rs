//! What the pools of one database share: its gate, its route, its server connections.
//!
//! Invariant: a server connection is listed here from its opening until it is dropped, whoever has it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use arc_swap::ArcSwap;
use tokio_util::task::TaskTracker;

use crate::client::Server;
use crate::config::Config;
use crate::gate::Gate;
use crate::metrics::Events;
use crate::metrics::Holds;
use crate::pool::{Errands, Leaving, Tally, lock};
use crate::route::Route;
use crate::statements::Cache;

/// What all pools of one database share.
pub struct Site {
    /// The route's name.
    pub database: Box<str>,
    /// Which backend is active.
    pub route: Route,
    /// Whether transactions may begin.
    pub gate: Arc<Gate>,
    /// The running configuration.
    pub config: Arc<ArcSwap<Config>>,
    /// Where tasks are spawned, so that a shutdown can wait for them.
    pub tasks: TaskTracker,
    /// The next id of a client or server.
    pub ids: Arc<AtomicU64>,
    /// What happened, for the exporter.
    pub events: Arc<Events>,
    /// Server connections of the database, over all its pools.
    pub connections: Arc<Tally>,
    /// Every server connection, for SHOW SERVERS.
    pub servers: Mutex<BTreeMap<u64, Weak<Server>>>,
    /// What sessions are asked to do.
    pub errands: Errands,
    /// Connections that sessions have left.
    pub leaving: Leaving,
    /// Texts of the named statements of its transaction-pooled clients.
    pub statements: Cache,
    /// How long the pause in force has held clients; the next one begins anew.
    pub holds: ArcSwap<Holds>,
    /// Transactions that were begun on connections that are gone, by backend.
    pub begun: Mutex<BTreeMap<Box<str>, Arc<AtomicU64>>>,
}

impl Site {
    /// Every server connection that is still there.
    pub fn servers(&self) -> Vec<Arc<Server>> {
        let mut servers = lock(&self.servers);
        servers.retain(|_, server| server.strong_count() > 0);
        servers.values().filter_map(Weak::upgrade).collect()
    }

    /// Server connections of a former generation: each closes when next at rest.
    pub fn retired(&self) -> Vec<Arc<Server>> {
        let now = self.route.generation();
        let mut servers = self.servers();
        servers.retain(|server| server.generation.load(Ordering::Relaxed) < now);
        servers
    }

    /// Where connections to a backend leave the number of their transactions.
    pub fn begun_on(&self, backend: &str) -> Arc<AtomicU64> {
        Arc::clone(lock(&self.begun).entry(backend.into()).or_default())
    }
}
