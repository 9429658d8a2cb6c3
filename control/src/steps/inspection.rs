//! What preflight wants to know of the proxies, and its findings.
//!
//! Invariant: changes nothing, but for the connections that proxies open to the target: a login is proved by doing it.

use std::time::Duration;

use pgcutover_api::command::{Command, PrepareSwitch};
use pgcutover_api::rows::{BackendRow, PrepareRow, Verdict as Answer};

use crate::clusters::{ClusterError, Clusters};
use crate::config::{Config, Replication};
use crate::finding::Finding;
use crate::preflight::{self, Control, Inquiry, Limits, LoginVerdict, ProxyBackend, ProxyFacts, Verdict};
use crate::proxies::{Fleet, Proxy, ProxyError, SHOW_DEADLINE};
use crate::steps::{StepError, kept, paused, transplanted};

/// One question of preflight: catalogues of thousands of tables take a second.
const QUESTION: Duration = Duration::from_secs(15);

/// Opening connections on a busy target.
const PREPARE: Duration = Duration::from_secs(20);

/// Asks everybody and judges.
pub async fn inspect(config: &Config, clusters: &Clusters, fleet: &Fleet) -> Result<Vec<Finding>, StepError> {
    let proxies = fleet.all(|proxy| of_proxy(config, proxy)).await?;
    let inquiry = Inquiry {
        db: config.route.clone(),
        replication: config.replication.clone(),
        reverse_dsn: config.way_back.enabled.then(|| config.target.conninfo()),
        proxies: proxies.into_iter().map(|(_, facts)| facts).collect(),
        bouncers: kept::facts(config, &clusters.source).await,
        limits: Limits {
            lag_bytes_max: config.budgets.lag_bytes_max,
            transaction_age_max: config.budgets.transaction_age_max,
            gap: config.sequences.gap,
            way_back: config.way_back.enabled,
            proxy_role: config.policy.proxy_role.clone(),
            source_backend: config.source.backend.clone(),
            oid_change: config.policy.oid_change,
            column_change: config.policy.column_change,
            unlisted: config.policy.unlisted,
        },
        limit: QUESTION,
    };
    let facts = preflight::gather(clusters, &inquiry).await?;
    let mut findings = preflight::checks(&facts);
    findings.extend(somebody_at_work(config, clusters).await?);
    // PREPARE SWITCH has looked at them.
    for (proxy, sessions) in fleet.all(|proxy| proxy.sessions(&config.database)).await? {
        findings.extend(match config.replication {
            Replication::Logical { .. } => transplanted::tied(proxy, &sessions),
            Replication::Physical => transplanted::kept(proxy, &sessions),
        });
    }
    Ok(findings)
}

/// The store is the lock that counts, also between machines: while an epoch is open nobody opens another.
async fn somebody_at_work(config: &Config, clusters: &Clusters) -> Result<Option<Finding>, ClusterError> {
    if !clusters.source.installed(QUESTION).await? {
        return Ok(None);
    }
    let view = clusters.source.view(&config.route, QUESTION).await?;
    Ok(view.open.map(|open| {
        let problem = format!(
            "epoch {} of run {} to {} is open: a cutover is under way, or its proxyctl died",
            open.epoch, open.run, open.target
        );
        Finding::red("lock", &config.database, problem, paused::OPEN_FIX)
    }))
}

async fn of_proxy(config: &Config, proxy: &Proxy) -> Result<ProxyFacts, ProxyError> {
    let database = &config.database;
    let gate = proxy.gate(database).await?;
    let backends = proxy.backends(database).await?;
    Ok(ProxyFacts {
        name: proxy.name().to_owned(),
        instance: Some(proxy.instance().to_owned()).filter(|instance| !instance.is_empty()),
        origin: proxy.origin().to_string(),
        control: if bool::from(gate.control) { Control::Given } else { Control::Missing },
        applications: proxy.sessions(database).await?.into_iter().map(|row| row.application_name).collect(),
        server_pids: proxy.server_pids(database).await?,
        backends: backends.iter().map(backend).collect(),
        logins: prepare(config, proxy).await?.into_iter().map(login).collect(),
    })
}

/// The proxy opens connections to the target, and says for each user what became of it.
pub async fn prepare(config: &Config, proxy: &Proxy) -> Result<Vec<PrepareRow>, ProxyError> {
    let command = Command::PrepareSwitch(PrepareSwitch {
        database: config.database.clone(),
        backend: config.target.backend.clone(),
        connections: Some(config.policy.prewarm),
    });
    proxy.rows(&command, PREPARE).await
}

/// The proxy closes what it opened to the target: nobody is going there now.
pub async fn let_go(config: &Config, proxy: &Proxy) -> Result<(), ProxyError> {
    let database = config.database.clone();
    let backends = proxy.backends(&database).await?;
    let Some(active) = backends.into_iter().find(|row| bool::from(row.active)) else { return Ok(()) };
    let command = Command::PrepareSwitch(PrepareSwitch { database, backend: active.backend, connections: None });
    proxy.order_aside(&command, SHOW_DEADLINE).await.map(drop)
}

fn login(row: PrepareRow) -> LoginVerdict {
    let verdict = match row.status {
        Answer::In => Verdict::In,
        Answer::Refused => Verdict::Refused(format!("{} [{}]", row.message, row.sqlstate)),
        Answer::Unknown => Verdict::Unknown,
    };
    LoginVerdict { user: row.user, verdict }
}

fn backend(row: &BackendRow) -> ProxyBackend {
    ProxyBackend {
        name: row.backend.clone(),
        is_active: bool::from(row.active),
        system_identifier: row.system_identifier.parse().ok(),
    }
}
