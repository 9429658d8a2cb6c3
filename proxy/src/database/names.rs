//! Answers for the host names of a database's backends: kept fresh, and what follows when one changes.
//!
//! Invariant: after a change connections to the former address serve nobody new: they close when next at rest, and a
//! session-pooled client keeps its own until it leaves. Nothing here waits for anything that settles a lease.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use crate::config::Config;
use crate::database::{Database, lock};
use crate::relay::ShutSignal;
use crate::resolver;
use crate::resolver::{Known, Move, Ttl};

/// At least so often it is looked whether a lookup is due: a changed `dns_max_ttl` has no other sign.
const BEAT: Duration = Duration::from_secs(1);

/// Never more often than this, whatever the times to live are.
const REST: Duration = Duration::from_millis(50);

impl Database {
    /// Ended by the process.
    pub(super) async fn keep_names(&self) {
        // Apart: a lookup that hangs must not keep a move from being followed.
        tokio::join!(self.refresh_names(), self.follow_names());
    }

    async fn refresh_names(&self) {
        loop {
            // Enabled before anything is read: what was frozen is looked up as soon as the gate opens.
            let change = self.site.gate.change();
            tokio::pin!(change);
            change.as_mut().enable();
            let ttl = ttl(&self.process.config.load());
            let names = self.host_names();
            if !self.site.gate.is_shut() {
                let due = |name: &&Arc<resolver::Name>| name.due(ttl).is_some_and(|due| due <= Instant::now());
                join_all(names.iter().map(|(_, name)| name).filter(due).map(|name| name.refresh())).await;
            }
            let now = Instant::now();
            let next = names.iter().filter_map(|(_, name)| name.due(ttl)).min().unwrap_or(now + BEAT);
            let next = if self.site.gate.is_shut() { now + BEAT } else { next.clamp(now + REST, now + BEAT) };
            tokio::select! {
                // reason: an answer's age has no event; ended by the time above, by the gate, else by the process.
                () = tokio::time::sleep_until(next.into()) => {}
                () = &mut change => {}
            }
        }
    }

    async fn follow_names(&self) {
        loop {
            // Ended by a move, else by the process.
            self.registry.told.notified().await;
            for (backend, name) in self.host_names() {
                if let Some(moved) = name.take_move() {
                    self.name_moved(&backend, name.place().0, moved).await;
                }
            }
        }
    }

    async fn name_moved(&self, backend: &str, host: &str, moved: Move) {
        self.process.events.names_moved.count();
        tracing::warn!(database = %self.name(), backend, host, from = %moved.from, to = %moved.to,
            "the address of a backend's host name has changed: a move nobody ordered");
        // Nobody decides over a connection to the former address.
        lock(&self.links).remove(backend);
        let active = self.site.route.retire(backend);
        for pool in self.pools() {
            if active { pool.close_idle() } else { pool.unpark() }
        }
        if !active {
            self.drop_drafts();
        }
        if let Err(error) = self.identify(backend).await {
            tracing::debug!(database = %self.name(), backend, %error, "who is at the new address is not known yet");
        }
    }

    /// The host names of the declared backends; numeric addresses and socket directories are none.
    fn host_names(&self) -> Vec<(String, Arc<resolver::Name>)> {
        let named = |(backend, declared): (&String, &super::Declared)| {
            Some((backend.clone(), declared.endpoint.address.name.clone()?))
        };
        self.declared.load().iter().filter_map(named).collect()
    }

    /// What is known of its backends' host names.
    #[must_use]
    pub fn known_names(&self, config: &Config) -> Vec<Known> {
        let (ttl, now) = (ttl(config), Instant::now());
        self.host_names().iter().filter_map(|(_, name)| name.known(ttl, now)).collect()
    }

    /// Lookups under way.
    #[must_use]
    pub fn lookups_pending(&self) -> usize {
        self.host_names().iter().filter(|(_, name)| name.is_pending()).count()
    }
}

fn ttl(config: &Config) -> Ttl {
    Ttl { answer: config.general.dns_max_ttl, failure: config.general.dns_nxdomain_ttl }
}
