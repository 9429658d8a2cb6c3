//! What the configuration declares against what is: routes, servers, gates, subscriptions.
//!
//! Invariant: reads only. It says what differs, not whether a cutover would work: that is preflight's.

use pgcutover_api::rows::BackendRow;
use pgcutover_api::store::{GateForm, Identity};

use crate::clusters::{Cluster, ClusterError, Clusters, Recovery};
use crate::config::{Config, Replication, Side};
use crate::finding::Finding;
use crate::proxies::{Fleet, ProxyError};
use crate::roster;
use crate::steps::STEP_DEADLINE;

/// Looks at everything that is declared. A server that does not answer is an error, a proxy that does not is a finding.
pub async fn look(config: &Config) -> Result<Vec<Finding>, ClusterError> {
    let clusters = Clusters::connect(&config.source.endpoint, &config.target.endpoint).await?;
    let (source, target) =
        tokio::try_join!(clusters.source.identity(STEP_DEADLINE), clusters.target.identity(STEP_DEADLINE))?;
    let proxies = roster::assemble_some(config, &clusters.source).await;
    let sides = [(&config.source, &source), (&config.target, &target)];
    let mut found = of_proxies(config, &sides, proxies).await;
    found.extend(of_source(config, &clusters.source).await?);
    found.extend(of_replication(config, &clusters.target).await?);
    Ok(found)
}

async fn of_proxies(
    config: &Config,
    sides: &[(&Side, &Identity)],
    (fleet, unreached): (Fleet, Vec<ProxyError>),
) -> Vec<Finding> {
    let answers = fleet.each(|proxy| proxy.backends(&config.database)).await;
    let mut found = Vec::new();
    let mut failed = unreached;
    for (proxy, answer) in answers {
        match answer {
            Ok(backends) => {
                found.extend(route(config, proxy, &backends));
                found.extend(sides.iter().filter_map(|(side, identity)| server(proxy, &backends, side, identity)));
            }
            Err(error) => failed.push(error),
        }
    }
    let fix = "start the proxy, or take it out of [[proxies]]";
    found.extend(failed.iter().map(|error| Finding::red("proxies", &error.proxy, &error.message, fix)));
    found
}

/// Where it routes: to the declared source, and by its own configuration too.
fn route(config: &Config, proxy: &str, backends: &[BackendRow]) -> Option<Finding> {
    let named = |of: fn(&BackendRow) -> bool| backends.iter().find(|row| of(row)).map(|row| row.backend.as_str());
    let active = named(|row| bool::from(row.active)).unwrap_or("nowhere");
    let configured = named(|row| bool::from(row.configured)).unwrap_or("nowhere");
    if active != config.source.backend {
        let problem = format!("routes to {active}; [source] declares {}", config.source.backend);
        let fix = "the source of a run is where clients are: swap [source] and [target], or run 'proxyctl resume-run'";
        return Some(Finding::red("route", proxy, problem, fix));
    }
    (configured != active).then(|| {
        let problem = format!("routes to {active}; its own file says active = \"{configured}\"");
        Finding::yellow(
            "route",
            proxy,
            problem,
            format!("write active = \"{active}\" there: it only counts for a new proxy"),
        )
    })
}

/// Whether its backend of that name is the server that the configuration means.
fn server(proxy: &str, backends: &[BackendRow], side: &Side, identity: &Identity) -> Option<Finding> {
    let object = format!("{proxy}: backend {}", side.backend);
    let Some(row) = backends.iter().find(|row| row.backend == side.backend) else {
        return Some(Finding::red(
            "backend",
            object,
            "the proxy declares no such backend",
            "declare it there, and RELOAD",
        ));
    };
    // Not known before it was first connected to.
    let seen = row.system_identifier.parse::<u64>().ok()?;
    (seen != identity.system_identifier).then(|| {
        let problem =
            format!("is another server ({seen}) than {} ({})", side.endpoint.describe(), identity.system_identifier);
        Finding::red("backend", object, problem, "correct host and port there, or the dsn here")
    })
}

async fn of_source(config: &Config, source: &Cluster) -> Result<Vec<Finding>, ClusterError> {
    let backend = &config.source.backend;
    if !source.installed(STEP_DEADLINE).await? {
        return Ok(vec![Finding::yellow("gates", backend, "our tables are not installed", "proxyctl objects")]);
    }
    let mut found = Vec::new();
    let gates = source.gates(STEP_DEADLINE).await?;
    match gates.iter().find(|gate| gate.db == config.route.as_str()).map(|gate| (gate.form, gate.epoch)) {
        None => {
            found.push(Finding::yellow("gates", backend, "no gate is armed", "proxyctl objects; a cutover arms it too"))
        }
        Some((Some(GateForm::Open), _)) => {}
        Some((form, epoch)) => {
            let problem = match form {
                Some(GateForm::Target) => format!("its gate is shut until evidence of epoch {epoch}"),
                Some(GateForm::Open | GateForm::Fenced) => format!("it is fenced by epoch {epoch}"),
                None => "its gate is not one of ours".to_owned(),
            };
            let fix = "'proxyctl status' says how that epoch ended; 'proxyctl resume-run' ends what is left of it";
            found.push(Finding::red("gates", backend, problem, fix));
        }
    }
    if !found.is_empty() {
        return Ok(found);
    }
    let ungated = source.ungated(&config.route, STEP_DEADLINE).await?;
    let fix = "a cutover gates it when it is armed; until then DDL has been at work since the last one";
    found.extend(ungated.iter().map(|table| Finding::yellow("gates", &table.table, &table.reason, fix)));
    Ok(found)
}

async fn of_replication(config: &Config, target: &Cluster) -> Result<Vec<Finding>, ClusterError> {
    let named = match &config.replication {
        Replication::Logical { subscriptions } => subscriptions,
        Replication::Physical => return of_standby(config, target).await,
    };
    let there = target.subscriptions(&config.route, named, STEP_DEADLINE).await?;
    let missing = named.iter().filter(|name| !there.iter().any(|subscription| subscription.name == **name));
    let fix = "CREATE SUBSCRIPTION on the target, or correct replication.subscriptions";
    let mut found: Vec<Finding> =
        missing.map(|name| Finding::red("subscription", name, "is declared and not there", fix)).collect();
    if named.is_empty() && there.is_empty() {
        found.push(Finding::red("subscription", &config.target.backend, "the target subscribes to nothing", fix));
    }
    for subscription in there.iter().filter(|subscription| !subscription.is_enabled) {
        let fix = format!("on the target: ALTER SUBSCRIPTION {} ENABLE", subscription.name);
        found.push(Finding::red("subscription", &subscription.name, "is disabled", fix));
    }
    Ok(found)
}

async fn of_standby(config: &Config, target: &Cluster) -> Result<Vec<Finding>, ClusterError> {
    let standby = target.standby(STEP_DEADLINE).await?;
    let problem = match standby.recovery {
        Recovery::Over => "is declared a physical standby and is none",
        Recovery::Paused => "is a standby whose replay is paused",
        Recovery::Replaying if standby.receiver.is_none() => "is a standby to which nothing streams",
        Recovery::Replaying => return Ok(Vec::new()),
    };
    let fix = "rebuild it as a standby, or mend its replication; or correct replication.kind";
    Ok(vec![Finding::red("standby", &config.target.backend, problem, fix)])
}
