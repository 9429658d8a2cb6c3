//! Who a drain waits for, or would wait for.
//!
//! Invariant: the list is complete without the server; what the server adds (query, lock waits) is best effort.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::client::{Client, State};
use crate::config::PoolMode;
use crate::database::Database;
use crate::gate::PauseId;

/// One of them.
#[derive(Debug, Clone)]
pub struct Blocker {
    /// The client.
    pub client: Arc<Client>,
    /// The server process that serves it.
    pub pid: Option<i32>,
    /// Open transaction, or a session that keeps its server between transactions.
    pub in_transaction: bool,
    /// For how long.
    pub since: Duration,
    /// What the server says of it.
    pub activity: Activity,
    /// The server process whose lock it waits for, and whether that one's client is held.
    pub waits_for: Option<(i32, bool)>,
}

/// A server process as pg_stat_activity shows it.
#[derive(Debug, Clone, Default)]
pub struct Activity {
    /// `active`, `idle in transaction`, …; empty if unknown.
    pub state: String,
    /// Its last statement, cut.
    pub query: String,
    waits_for: Option<i32>,
}

impl Database {
    /// Open transactions, and session-pooled clients that keep a server. While only writes are held those that this waits
    /// for: transactions that began before.
    pub async fn blockers(&self) -> Vec<Blocker> {
        let clients = self.clients();
        let held_since = self.only_writes_held_since();
        let open: Vec<_> = clients
            .iter()
            .filter_map(|client| {
                let in_transaction = client.state() == State::Active;
                let keeps = client.who.pool_mode == PoolMode::Session && client.linked().is_some();
                let blocks = match held_since {
                    Some(since) => in_transaction && client.state_since() < since,
                    None => in_transaction || keeps,
                };
                blocks.then(|| (Arc::clone(client), client.linked().map(|s| s.pid), in_transaction))
            })
            .collect();
        let pids: Vec<i32> = open.iter().filter_map(|(_, pid, _)| *pid).collect();
        let mut activity = self.activity(&pids).await;
        open.into_iter()
            .map(|(client, pid, in_transaction)| {
                let activity = pid.and_then(|pid| activity.remove(&pid)).unwrap_or_default();
                let held = |pid: i32| held_owner(&clients, pid).is_some();
                Blocker {
                    since: client.state_since().elapsed(),
                    waits_for: activity.waits_for.map(|pid| (pid, held(pid))),
                    client,
                    pid,
                    in_transaction,
                    activity,
                }
            })
            .collect()
    }

    /// Lets held sessions through whose locks open transactions wait for: one transaction at a time.
    pub(super) async fn let_lock_owners_through(&self, id: PauseId) {
        let clients = self.clients();
        // Only a session that keeps its server can own a lock while it is held.
        if !clients.iter().any(|client| client.who.pool_mode == PoolMode::Session && client.state() == State::Held) {
            return;
        }
        let active = clients.iter().filter(|client| client.state() == State::Active);
        let pids: Vec<i32> = active.filter_map(|client| client.linked().map(|server| server.pid)).collect();
        for waits_for in self.activity(&pids).await.into_values().filter_map(|activity| activity.waits_for) {
            if let Some(owner) = held_owner(&clients, waits_for) {
                tracing::info!(database = %self.name(), client = owner.who.id, "a held session owns a lock that the drain waits for: let through");
                self.site.gate.admit(id, owner.who.id);
            }
        }
    }

    async fn activity(&self, pids: &[i32]) -> BTreeMap<i32, Activity> {
        if pids.is_empty() {
            return BTreeMap::new();
        }
        let list: Vec<String> = pids.iter().map(i32::to_string).collect();
        let sql = format!(
            "SELECT p.pid, a.state, pg_catalog.left(a.query, 200), (pg_catalog.pg_blocking_pids(p.pid))[1] \
             FROM pg_catalog.unnest(ARRAY[{}]::pg_catalog.int4[]) p(pid) \
             LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) p.pid",
            list.join(",")
        );
        let active = self.site.route.active();
        match self.run(&active.backend, &sql).await {
            Ok(rows) => rows
                .iter()
                .filter_map(|row| {
                    let text = |column: usize| row.text(column).unwrap_or_default().to_owned();
                    let activity = Activity { state: text(1), query: text(2), waits_for: row.parse(3) };
                    Some((row.parse(0)?, activity))
                })
                .collect(),
            Err(silence) => {
                tracing::debug!(database = %self.name(), %silence, "no activity");
                BTreeMap::new()
            }
        }
    }
}

fn held_owner(clients: &[Arc<Client>], pid: i32) -> Option<&Arc<Client>> {
    clients
        .iter()
        .find(|client| client.state() == State::Held && client.linked().is_some_and(|server| server.pid == pid))
}
