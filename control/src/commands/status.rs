//! `proxyctl status`: gates, servers, decisions and lag as they are now.
//!
//! Invariant: reads only; what cannot be reached is told and hides nothing else.

use std::fmt;

use pgcutover_api::epoch::Epoch;
use pgcutover_api::rows::GateRow;
use pgcutover_api::store::{GateForm, Member, Name};
use serde::Serialize;

use crate::clusters::{Cluster, ClusterError, Clusters, Role};
use crate::commands::{Context, way_back};
use crate::config::members::BouncerEntry;
use crate::config::{Replication, Side};
use crate::printer::Exit;
use crate::proxies::{Proxy, ProxyError};
use crate::roster;
use crate::steps::reverse::{self, Way};
use crate::steps::{STEP_DEADLINE, armed};

#[derive(Serialize)]
struct Status {
    database: String,
    servers: Vec<Server>,
    proxies: Vec<Gate>,
    /// Who else has enrolled: nobody's entry stands for them.
    unlisted: Vec<Unlisted>,
    subscriptions: Vec<Subscription>,
    /// None where there is none.
    way_back: Option<way_back::State>,
    /// Why it could not be looked at.
    way_back_error: Option<String>,
}

#[derive(Serialize, Default)]
struct Server {
    role: String,
    backend: String,
    address: String,
    error: Option<String>,
    version: Option<String>,
    open_epoch: Option<String>,
    last_decision: Option<String>,
    gate: Option<String>,
}

#[derive(Serialize, Default)]
struct Gate {
    proxy: String,
    origin: Option<String>,
    instance: Option<String>,
    error: Option<String>,
    state: Option<String>,
    owner: Option<String>,
    backend: Option<String>,
    route_epoch: Option<u64>,
    held_clients: Option<u32>,
    open_transactions: Option<u32>,
    lease_ms: Option<u64>,
}

#[derive(Serialize)]
struct Unlisted {
    instance: String,
    address: String,
    backend: String,
    paused_epoch: Option<u64>,
    seen_ms_ago: u64,
    alive: bool,
}

#[derive(Serialize)]
struct Subscription {
    name: String,
    enabled: bool,
    lag_bytes: Option<i64>,
}

/// Asks everybody at the same time and prints.
pub async fn run(context: &Context) -> anyhow::Result<Exit> {
    let config = &context.config;
    let database = config.route.clone();
    let source = Cluster::new(Role::Source, &config.source.endpoint);
    let target = Cluster::new(Role::Target, &config.target.endpoint);
    let (source_again, target_again) = (source.another(), target.another());
    let (of_source, of_target, (proxies, unlisted), subscriptions, way_back) = tokio::join!(
        server(&source, &config.source, &database),
        server(&target, &config.target, &database),
        everybody(context),
        lag(context, &source_again, &target_again),
        back(context),
    );
    let whole =
        of_source.error.is_none() && of_target.error.is_none() && proxies.iter().all(|gate| gate.error.is_none());
    let servers = vec![of_source, of_target];
    let database = config.database.clone();
    let (way_back, way_back_error) =
        way_back.map_or_else(|error| (None, Some(error.to_string())), |state| (state, None));
    context.printer.data(&Status { database, servers, proxies, unlisted, subscriptions, way_back, way_back_error });
    Ok(if whole { Exit::Done } else { Exit::Unexpected })
}

async fn server(cluster: &Cluster, side: &Side, database: &Name) -> Server {
    let mut server = Server {
        role: cluster.role().to_string(),
        backend: side.backend.clone(),
        address: side.endpoint.describe(),
        ..Server::default()
    };
    if let Err(error) = look(cluster, database, &mut server).await {
        server.error = Some(error.to_string());
    }
    server
}

async fn look(cluster: &Cluster, database: &Name, server: &mut Server) -> Result<(), ClusterError> {
    server.version = Some(armed::version(cluster.identity(STEP_DEADLINE).await?.version_num));
    if !cluster.installed(STEP_DEADLINE).await? {
        return Ok(());
    }
    let view = cluster.view(database, STEP_DEADLINE).await?;
    server.open_epoch = view.open.map(|open| format!("{} of run {} to {}", open.epoch, open.run, open.target));
    server.last_decision = view.last.map(|last| format!("{} of epoch {} to {}", last.outcome, last.epoch, last.target));
    let gates = cluster.gates(STEP_DEADLINE).await?;
    let gate = gates.iter().find(|gate| gate.db == database.as_str());
    server.gate = gate.map(|gate| match gate.form {
        Some(GateForm::Open) => "open".to_owned(),
        Some(GateForm::Fenced) => format!("fenced by epoch {}", gate.epoch),
        Some(GateForm::Target) => format!("shut until evidence of epoch {}", gate.epoch),
        None => "not one of ours".to_owned(),
    });
    Ok(())
}

/// The gate of each proxy that an entry stands for, and who else there is.
async fn everybody(context: &Context) -> (Vec<Gate>, Vec<Unlisted>) {
    let config = &context.config;
    let (fleet, absent) = context.fleet().await;
    let answers = fleet.each(|proxy| proxy.gate(&config.database)).await;
    let mut gates: Vec<Gate> = fleet.iter().zip(answers).map(|(proxy, (_, answer))| gate(proxy, answer)).collect();
    // A proxy enrols itself on the server that it serves: of two rows the newer is true.
    let source = Cluster::new(Role::Source, &config.source.endpoint);
    let target = Cluster::new(Role::Target, &config.target.endpoint);
    let (of_source, of_target) = tokio::join!(roster::members(&source, config), roster::members(&target, config));
    let mut members: Vec<Member> = of_source.unwrap_or_default();
    members.extend(of_target.unwrap_or_default());
    members.sort_by(|a, b| (&a.instance, a.seen_ms_ago).cmp(&(&b.instance, b.seen_ms_ago)));
    members.dedup_by(|later, first| later.instance == first.instance);
    gates.extend(config.bouncers.iter().map(|entry| bouncer(entry, &members)));
    let absent = absent.into_iter().map(|error| roster::last_seen(error, &members));
    gates.extend(absent.map(|error| Gate { proxy: error.proxy, error: Some(error.message), ..Gate::default() }));
    members.retain(|member| !gates.iter().any(|gate| gate.is_of(member)));
    (gates, members.into_iter().map(Unlisted::from).collect())
}

/// A PgBouncer is what its keeper says it is.
fn bouncer(entry: &BouncerEntry, members: &[Member]) -> Gate {
    let gate = Gate {
        proxy: entry.name.clone(),
        origin: Some("PgBouncer, by its keeper".to_owned()),
        instance: Some(entry.name.clone()),
        ..Gate::default()
    };
    match members.iter().find(|member| member.instance == entry.name) {
        Some(member) if roster::is_alive(member) => Gate {
            state: Some(if member.paused_epoch.is_some() { "paused" } else { "open" }.to_owned()),
            backend: Some(member.backend.clone()),
            route_epoch: Some(member.route_epoch.as_u64()),
            ..gate
        },
        Some(member) => Gate {
            error: Some(format!("nobody keeps it; its keeper was last seen {} ms ago", member.seen_ms_ago)),
            ..gate
        },
        None => Gate { error: Some("nobody keeps it".to_owned()), ..gate },
    }
}

impl Gate {
    fn is_of(&self, member: &Member) -> bool {
        self.instance.as_ref() == Some(&member.instance) || (self.error.is_some() && self.proxy == member.instance)
    }
}

impl From<Member> for Unlisted {
    fn from(member: Member) -> Unlisted {
        Unlisted {
            alive: roster::is_alive(&member),
            paused_epoch: member.paused_epoch.map(Epoch::as_u64),
            seen_ms_ago: member.seen_ms_ago,
            instance: member.instance,
            address: member.address,
            backend: member.backend,
        }
    }
}

fn gate(proxy: &Proxy, answer: Result<GateRow, ProxyError>) -> Gate {
    let gate = Gate {
        proxy: proxy.name().to_owned(),
        origin: Some(proxy.origin().to_string()),
        instance: Some(proxy.instance().to_owned()),
        ..Gate::default()
    };
    match answer {
        Ok(row) => Gate {
            state: Some(row.state.to_string()),
            owner: Some(row.owner).filter(|owner| !owner.is_empty()),
            backend: Some(row.backend),
            route_epoch: Some(row.route_epoch.as_u64()),
            held_clients: Some(row.held_clients),
            open_transactions: Some(row.open_transactions),
            lease_ms: row.lease_ms.and_then(|lease| u64::try_from(lease.as_millis()).ok()),
            ..gate
        },
        Err(error) => Gate { error: Some(error.message), ..gate },
    }
}

async fn lag(context: &Context, source: &Cluster, target: &Cluster) -> Vec<Subscription> {
    let named = match &context.config.replication {
        Replication::Logical { subscriptions } => subscriptions,
        Replication::Physical => return Vec::new(),
    };
    let Ok(subscriptions) = target.subscriptions(&context.config.route, named, STEP_DEADLINE).await else {
        return Vec::new();
    };
    let slots = source.slots(&subscriptions, STEP_DEADLINE).await.unwrap_or_default();
    let line = |subscription: crate::clusters::Subscription| {
        let slot = slots.iter().find(|slot| Some(&slot.name) == subscription.slot.as_ref());
        let lag_bytes = slot.and_then(|slot| slot.lag.applied_bytes);
        Subscription { lag_bytes, enabled: subscription.is_enabled, name: subscription.name }
    };
    subscriptions.into_iter().map(line).collect()
}

async fn back(context: &Context) -> Result<Option<way_back::State>, ClusterError> {
    let config = &context.config;
    let clusters = Clusters::unconnected(&config.source.endpoint, &config.target.endpoint);
    let Some(served) = reverse::served(config, &clusters).await? else { return Ok(None) };
    let state = way_back::State::of(&Way::of(config, &clusters, served)).await?;
    Ok(state.name.is_some().then_some(state))
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let none = "-";
        writeln!(f, "database {}", self.database)?;
        for server in &self.servers {
            let version = server.version.as_deref().unwrap_or(none);
            writeln!(f, "{} {} ({}) PostgreSQL {version}", server.role, server.backend, server.address)?;
            for (name, value) in [
                ("gate", &server.gate),
                ("open epoch", &server.open_epoch),
                ("last decision", &server.last_decision),
                ("ERROR", &server.error),
            ] {
                value.iter().try_for_each(|value| writeln!(f, "  {name}: {value}"))?;
            }
        }
        for gate in &self.proxies {
            match (&gate.error, &gate.state) {
                (Some(error), _) => writeln!(f, "proxy {}: ERROR: {error}", gate.proxy)?,
                (None, state) => writeln!(
                    f,
                    "proxy {} ({}): {}, routes to {} (epoch {}), clients held: {}, transactions open: {}",
                    gate.proxy,
                    gate.origin.as_deref().unwrap_or(none),
                    state.as_deref().unwrap_or(none),
                    gate.backend.as_deref().unwrap_or(none),
                    gate.route_epoch.unwrap_or_default(),
                    gate.held_clients.unwrap_or_default(),
                    gate.open_transactions.unwrap_or_default()
                )?,
            }
        }
        for member in &self.unlisted {
            let Unlisted { instance, address, backend, seen_ms_ago, .. } = member;
            let state = if member.alive { "holds and follows by itself" } else { "GONE" };
            writeln!(
                f,
                "proxy instance {instance} (not listed): {state}, at {address}, on {backend}, seen {seen_ms_ago} ms ago"
            )?;
        }
        for subscription in &self.subscriptions {
            let enabled = if subscription.enabled { "enabled" } else { "DISABLED" };
            let lag = subscription.lag_bytes.map_or("unknown".to_owned(), |lag_bytes| format!("{lag_bytes} bytes"));
            writeln!(f, "subscription {}: {enabled}, lag {lag}", subscription.name)?;
        }
        self.way_back.iter().try_for_each(|way_back| writeln!(f, "{way_back}"))?;
        self.way_back_error.iter().try_for_each(|error| writeln!(f, "way back: ERROR: {error}"))
    }
}
