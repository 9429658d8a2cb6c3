//! Our schema off both servers, once nobody needs its memory any more: what stands against it, and doing it.
//!
//! Invariant: nothing is dropped while anybody could act on it or miss it: no epoch is open, no subscription carries our tables,
//! and every proxy goes by its file where it goes now. Without a store a proxy that has lost its state_dir believes its file, and
//! one that finds the old server's commit but cannot write the evidence on the new one holds its clients: so both are dropped, or
//! none. The server that lost goes first: whoever finds only one of them is told the truth by the one that serves.

use std::collections::BTreeMap;
use std::time::Duration;

use pgcutover_api::rows::YesNo;
use pgcutover_api::store::GateForm;

use crate::clusters::{Cluster, ClusterError, Clusters, Role, Ungated};
use crate::config::{Config, Side};
use crate::finding::Finding;
use crate::proxies::{Fleet, Proxy, ProxyError};
use crate::roster;
use crate::steps::{STEP_DEADLINE, reverse};

const CHECK: &str = "objects";
/// Many tables, each with a lock to be had.
const DROP: Duration = Duration::from_secs(60);

/// May the fence of the server that lost fall?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Nobody said so.
    Stays,
    /// The operator did.
    MayFall,
}

/// The servers of a route, by who serves.
pub struct Servers<'a> {
    config: &'a Config,
    serving: (&'a Cluster, &'a Side),
    other: (&'a Cluster, &'a Side),
}

impl<'a> Servers<'a> {
    /// Asks both stores; where nothing was ever committed the source serves.
    pub async fn of(config: &'a Config, clusters: &'a Clusters) -> Result<Servers<'a>, ClusterError> {
        let by = reverse::served(config, clusters).await?.map_or(Role::Source, |served| served.by);
        let (source, target) = ((&clusters.source, &config.source), (&clusters.target, &config.target));
        let (serving, other) = if by == Role::Source { (source, target) } else { (target, source) };
        Ok(Servers { config, serving, other })
    }

    /// Those that have a store of their own, the one that serves last.
    async fn stores(&self) -> Result<Vec<(&'a Cluster, &'a Side)>, ClusterError> {
        let mut stores = Vec::new();
        for (cluster, side) in [self.other, self.serving] {
            // A standby loses what its primary loses.
            if !cluster.is_in_recovery(STEP_DEADLINE).await? && cluster.installed(STEP_DEADLINE).await? {
                stores.push((cluster, side));
            }
        }
        Ok(stores)
    }

    /// What stands against it.
    pub async fn hindrances(
        &self,
        fleet: &Fleet,
        absent: &[ProxyError],
        fence: Fence,
    ) -> Result<Vec<Finding>, ClusterError> {
        let stores = self.stores().await?;
        // One that has just moved is still in the other store, too.
        let (mut found, mut strangers) = (Vec::new(), BTreeMap::new());
        if stores.is_empty() {
            return Ok(found);
        }
        for (cluster, side) in stores {
            found.extend(self.needed(cluster, side).await?);
            if side.backend == self.other.1.backend && fence == Fence::Stays {
                found.extend(self.fenced(cluster, side).await?);
            }
            for member in roster::unmet(fleet, cluster, self.config).await? {
                strangers.insert(member.instance, side.backend.as_str());
            }
        }
        found.extend(strangers.into_iter().map(|(instance, backend)| {
            let problem = format!("goes by the store of {backend}, and nobody listed it");
            Finding::red(CHECK, format!("proxy {instance}"), problem, "list it in the configuration, or stop it")
        }));
        let rows = fleet.each(|proxy| self.goes_elsewhere(proxy)).await;
        for (proxy, answer) in rows {
            match answer {
                Ok(finding) => found.extend(finding),
                Err(error) => found.push(unknown(proxy, &error.message)),
            }
        }
        found.extend(absent.iter().map(|error| unknown(&error.proxy, &error.message)));
        found.extend(self.config.bouncers.iter().map(|entry| {
            let fix = "end its keeper (watch-pgbouncer) and take it out of the configuration";
            Finding::red(CHECK, format!("PgBouncer {}", entry.name), "its keeper goes by the store", fix)
        }));
        Ok(found)
    }

    /// What on this server is not over.
    async fn needed(&self, cluster: &Cluster, side: &Side) -> Result<Vec<Finding>, ClusterError> {
        let mut found = Vec::new();
        let here = format!("{} {}", cluster.role(), side.backend);
        if let Some(open) = cluster.view(&self.config.route, STEP_DEADLINE).await?.open {
            let problem = format!("epoch {} of run {} is open", open.epoch, open.run);
            found.push(Finding::red(CHECK, &here, problem, "end it first: 'proxyctl resume-run', or 'proxyctl abort'"));
        }
        let subscriptions = cluster.all_subscriptions(STEP_DEADLINE).await?;
        for table in cluster.table_states(&subscriptions, STEP_DEADLINE).await? {
            if table.table != "pgcutover.sentinel" {
                continue;
            }
            let name = table.subscription;
            let fix = "if it is the way back: 'proxyctl way-back drop'; if it is yours: drop it, or take pgcutover.heartbeat and \
                       pgcutover.sentinel out of its publication and REFRESH it";
            let problem = format!("subscription {name} carries our tables, and would stop for good without them");
            found.push(Finding::red(CHECK, &here, problem, fix));
        }
        for offer in cluster.offers(&self.config.route, STEP_DEADLINE).await? {
            let problem = format!("slot {} keeps WAL for a way back", offer.slot);
            found.push(Finding::red(CHECK, &here, problem, "'proxyctl way-back drop'"));
        }
        let own = self.config.route.as_str();
        for route in cluster.routes(STEP_DEADLINE).await?.iter().filter(|route| *route != own) {
            let problem = format!("the store is also that of '{route}'");
            let fix =
                "'proxyctl objects remove' takes the gates of one database away; the store goes with the last one";
            found.push(Finding::red(CHECK, &here, problem, fix));
        }
        Ok(found)
    }

    /// The fence of a commit, on the server that lost.
    async fn fenced(&self, cluster: &Cluster, side: &Side) -> Result<Option<Finding>, ClusterError> {
        let gates = cluster.gates(STEP_DEADLINE).await?;
        let gate = gates.iter().find(|gate| gate.db == self.config.route.as_str());
        let holds = |form: Option<GateForm>| matches!(form, Some(GateForm::Fenced | GateForm::Target));
        Ok(gate.filter(|gate| holds(gate.form)).map(|gate| {
            let backend = &side.backend;
            let problem =
                format!("is fenced by epoch {}: without our objects it takes writes from whoever connects", gate.epoch);
            let fix = format!("make sure that nobody is led to {backend} any more, then say --unfence");
            Finding::red(CHECK, format!("{} {backend}", cluster.role()), problem, fix)
        }))
    }

    /// Whether a proxy goes, now or by its file, anywhere but to the server that serves.
    async fn goes_elsewhere(&self, proxy: &Proxy) -> Result<Option<Finding>, ProxyError> {
        let database = &self.config.database;
        let serving = &self.serving.1.backend;
        let backends = proxy.backends(database).await?;
        let of = |said: fn(&pgcutover_api::rows::BackendRow) -> YesNo| {
            backends.iter().find(|row| bool::from(said(row))).map(|row| row.backend.clone()).unwrap_or_default()
        };
        let (active, configured) = (of(|row| row.active), of(|row| row.configured));
        let name = format!("proxy {}", proxy.name());
        if active != *serving {
            let problem = format!("routes to '{active}', but {serving} serves");
            return Ok(Some(Finding::red(CHECK, name, problem, "'proxyctl status' tells where everything stands")));
        }
        if configured != *serving {
            let problem = format!(
                "its file says active = \"{configured}\": without our objects it would go there if it lost its state_dir"
            );
            let fix = format!("say active = \"{serving}\" under [databases.{database}] of its file, then RELOAD");
            return Ok(Some(Finding::red(CHECK, name, problem, fix)));
        }
        Ok(None)
    }

    /// Drops; what went, and the tables whose gate could not be had off.
    pub async fn drop_stores(&self) -> Result<(Vec<String>, Vec<Ungated>), ClusterError> {
        let (mut dropped, mut left) = (Vec::new(), Vec::new());
        for (cluster, side) in self.stores().await? {
            if side.backend == self.serving.1.backend {
                // Table by table, so that clients wait for one lock at a time.
                left = cluster.disarm_tables(&self.config.route, DROP).await?;
                if !left.is_empty() {
                    break;
                }
            }
            cluster.uninstall(DROP).await?;
            dropped.push(format!("schema pgcutover of {}", side.backend));
        }
        Ok((dropped, left))
    }

    /// Backend names: who serves, and the other one.
    pub fn names(&self) -> (&'a str, &'a str) {
        (&self.serving.1.backend, &self.other.1.backend)
    }
}

fn unknown(proxy: &str, message: &str) -> Finding {
    let problem = format!("where its file leads is not known: {message}");
    Finding::red(
        CHECK,
        format!("proxy {proxy}"),
        problem,
        "start it, or take it out of the configuration if it is gone for good",
    )
}
