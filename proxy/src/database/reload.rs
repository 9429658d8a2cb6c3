//! RELOAD and RECONNECT of one database.
//!
//! Invariant: a [`Change`] that exists can be carried out without failing; dropped instead, nothing has changed. Another
//! address of the active backend is a move that nobody fenced: it happens under a shut and drained gate, so that at least
//! nothing runs on both sides, and never while a run pauses the database.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::MutexGuard;

use crate::config;
use crate::database::switch::{Leap, SwitchedBy};
use crate::database::{Database, Declared, declare, lock};
use crate::gate::{Drained, Intent, Pause, PauseId};
use crate::route::Endpoint;

/// A checked change of a database's configuration.
pub struct Change<'a> {
    database: &'a Database,
    declared: BTreeMap<String, Declared>,
    /// The configuration's `active`.
    configured: String,
    /// Backends that are new, changed or gone.
    changed: Vec<String>,
    /// The active backend's endpoint, if it changes.
    renewed: Option<Arc<Endpoint>>,
    /// If its address does.
    still: Option<Still<'a>>,
    _alone: MutexGuard<'a, ()>,
}

/// The gate, shut and drained.
struct Still<'a> {
    database: &'a Database,
    id: PauseId,
    by: StilledBy,
}

#[derive(PartialEq, Eq)]
enum StilledBy {
    /// This RELOAD: the gate opens when it is over.
    Us,
    /// A pause that was there already, and stays.
    Another,
}

impl Still<'_> {
    /// The pause, if it still holds the gate.
    fn pause(&self) -> Option<Pause> {
        self.database.site.gate.pause().filter(|pause| pause.id == self.id)
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        if self.by == StilledBy::Us
            && let Some(pause) = self.pause()
        {
            self.database.open(&pause);
        }
    }
}

impl Database {
    /// Checks a new configuration of this database, and holds traffic if the active backend's address changes.
    ///
    /// Ended by the drain deadline. Cancel safe: dropped, nothing has changed.
    ///
    /// # Errors
    /// The reason.
    pub async fn consider(&self, settings: &config::Database) -> Result<Change<'_>, String> {
        // Ended by whoever moves the route: those have deadlines.
        let alone = self.moving.lock().await;
        let declared = declare(settings, &self.registry, &self.declared.load())?;
        let active = self.site.route.active();
        let now = declared
            .get(&*active.backend)
            .ok_or_else(|| format!("the active backend '{}' is not declared any more", active.backend))?;
        let before = self.declared.load_full();
        let changed = differences(&before, &declared);
        self.refuse_under_epoch(&changed)?;
        let old = before.get(&*active.backend).map(|declared| &declared.settings);
        let renewed = (old != Some(&now.settings)).then(|| Arc::clone(&now.endpoint));
        let place = |backend: &config::Backend| (backend.host.clone(), backend.port, backend.dbname.clone());
        let still =
            if old.map(place) == Some(place(&now.settings)) { None } else { Some(self.still(&active.backend).await?) };
        let configured = settings.active.clone();
        Ok(Change { database: self, declared, configured, changed, renewed, still, _alone: alone })
    }

    /// RECONNECT: retires the present server connections; those at rest close now.
    pub async fn reconnect(&self) {
        // Ended by whoever moves the route: those have deadlines. A renewal beside a switch could undo it.
        let _alone = self.moving.lock().await;
        let active = self.site.route.active();
        // The declared one is newer where only a file that it names has changed.
        self.site.route.renew(self.endpoint(&active.backend).unwrap_or_else(|| Arc::clone(&active.endpoint)));
        self.pools().iter().for_each(|pool| pool.close_idle());
    }

    fn refuse_under_epoch(&self, changed: &[String]) -> Result<(), String> {
        let Some(epoch) = self.site.gate.pause().and_then(|pause| pause.epoch) else { return Ok(()) };
        match changed.iter().find(|name| **name == epoch.source || **name == epoch.target) {
            Some(name) => Err(format!("the backend '{name}' can't change while {} pauses the database", epoch.claim)),
            None => Ok(()),
        }
    }

    /// Shuts the gate unless a pause holds it, and drains it.
    async fn still(&self, backend: &str) -> Result<Still<'_>, String> {
        let cannot = |why: String| format!("the address of the active backend '{backend}' can't change: {why}");
        let still = match self.site.gate.pause() {
            Some(pause) => Still { database: self, id: pause.id, by: StilledBy::Another },
            None => {
                let intent = Intent { owner: "reload".to_owned(), epoch: None, lease: None };
                let id = self.shut(intent).map_err(|refusal| cannot(refusal.message))?;
                Still { database: self, id, by: StilledBy::Us }
            }
        };
        let drain = self.site.config.load().general.drain_timeout;
        match tokio::time::timeout(drain, self.drain(still.id)).await {
            Ok(Drained::Yes) => {}
            Ok(Drained::Ended) => return Err(cannot("its pause was ended".to_owned())),
            Err(_) => return Err(cannot(format!("transactions were open for {drain:?}"))),
        }
        match self.kept_clients().first() {
            Some(client) => Err(cannot(format!("session-pooled client {} keeps its server", client.who.id))),
            None => Ok(still),
        }
    }
}

/// The names of backends that are not the same in both.
fn differences(before: &BTreeMap<String, Declared>, now: &BTreeMap<String, Declared>) -> Vec<String> {
    let settings =
        |all: &BTreeMap<String, Declared>, name: &str| all.get(name).map(|declared| declared.settings.clone());
    let mut names: Vec<String> = before.keys().chain(now.keys()).cloned().collect();
    names.sort();
    names.dedup();
    names.retain(|name| settings(before, name) != settings(now, name));
    names
}

impl Change<'_> {
    /// Whether what was drained is still held: a pause of another may have ended meanwhile.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.still.as_ref().is_none_or(|still| still.pause().is_some())
    }

    /// Carries it out; held clients go on.
    pub fn carry_out(self) {
        let database = self.database;
        let active = database.site.route.active();
        if let Some(endpoint) = self.renewed {
            database.site.route.renew(endpoint);
            database.pools().iter().for_each(|pool| pool.close_idle());
        }
        if self.still.is_some() {
            tracing::warn!(database = %database.name(), backend = %active.backend,
                "RELOAD changed the address of the active backend: a move that nobody fenced");
            let leap = Leap { to: &active.backend, epoch: active.epoch, run: None, by: SwitchedBy::Reload };
            database.record(&active.backend, &leap);
        }
        if !self.changed.is_empty() {
            // They may be connections to a former address.
            database.pools().iter().for_each(|pool| pool.unpark());
            database.drop_drafts();
            lock(&database.identities).retain(|name, _| !self.changed.contains(name));
        }
        if *active.backend != *self.configured {
            tracing::warn!(database = %database.name(), configured = %self.configured, active = %active.backend,
                "the configuration's `active` differs from the route, which wins");
        }
        // The control login may be another one.
        lock(&database.links).clear();
        database.lookups.close_idle();
        database.declared.store(Arc::new(self.declared));
    }
}
