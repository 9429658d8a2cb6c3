//! Our tables, functions, rights and seeds on both servers.
//!
//! Invariant: the target first (a standby gets them by WAL): under FOR ALL TABLES the first row of a table that the target
//! lacks stops replication for good. Installing again changes nothing that exists.

use crate::clusters::{ClusterError, Clusters};
use crate::config::{Config, Replication};
use crate::finding::Finding;
use crate::steps::{STEP_DEADLINE, StepError};

/// Installs.
pub async fn install(config: &Config, clusters: &Clusters) -> Result<(), StepError> {
    let database = config.route.clone();
    let servers = match &config.replication {
        Replication::Logical { .. } => vec![&clusters.target, &clusters.source],
        Replication::Physical => vec![&clusters.source],
    };
    for cluster in servers {
        let role = cluster.role().to_string();
        cluster.install(STEP_DEADLINE).await.map_err(|error| {
            refused(
                &role,
                &error,
                "let proxyctl's role create the schema pgcutover: GRANT CREATE ON DATABASE; see 'proxyctl objects sql'",
            )
        })?;
        cluster.grant(&config.policy.proxy_role, STEP_DEADLINE).await.map_err(|error| {
            let fix = format!(
                "create the role '{}' on both servers, or name the right one in policy.proxy_role",
                config.policy.proxy_role
            );
            refused(&role, &error, &fix)
        })?;
        cluster.seed(&database, STEP_DEADLINE).await?;
    }
    Ok(())
}

fn refused(role: &str, error: &ClusterError, fix: &str) -> StepError {
    StepError::found(error.to_string(), vec![Finding::red("armed", role, error.to_string(), fix)])
}
