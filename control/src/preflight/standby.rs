//! What a physical move has to know besides: the target as a standby, and what else the cluster holds.
//!
//! Invariant: changes nothing; a database that could not be looked into says so.

use std::time::Duration;

use crate::clusters::{Cluster, ClusterError, Clusters, Standby};

/// Databases that clients may be in; each moves too (R16).
const NEIGHBOURS: &str = "SELECT d.datname AS name FROM pg_database d WHERE d.datallowconn AND NOT d.datistemplate \
    AND d.datname <> current_database() ORDER BY 1";

/// What a gate would have to stand on there.
const HELD: &str = "SELECT (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
      WHERE c.relkind IN ('r', 'p', 'm', 'S') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema') \
    + (SELECT count(*) FROM pg_largeobject_metadata) AS held";

/// Of every database of the cluster: a promoted copy would read the same slots as the old server.
const SUBSCRIPTIONS: &str = "SELECT d.datname || '.' || s.subname AS name FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid \
     WHERE s.subenabled ORDER BY 1";

const LOGICAL_SLOTS: &str = "SELECT s.slot_name AS name FROM pg_replication_slots s WHERE s.slot_type = 'logical' AND NOT s.temporary ORDER BY 1";

/// The target as a standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandbyFacts {
    /// How it follows.
    pub standby: Standby,
    /// Bytes that it has not replayed.
    pub lag_bytes: u64,
    /// Whether commits of the source wait for it, by its slot: `async`, or what else; none where that is not known.
    pub sync_state: Option<String>,
    /// The cluster's other databases.
    pub neighbours: Vec<Neighbour>,
    /// Enabled subscriptions of the source, `database.name`.
    pub subscriptions: Vec<String>,
    /// Logical slots of the source.
    pub logical_slots: Vec<String>,
}

/// Another database of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name.
    pub name: String,
    /// What is in it.
    pub holds: Holds,
}

/// What a database holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holds {
    /// Nothing of a user's.
    Nothing,
    /// So many tables, sequences and large objects.
    Objects(u64),
    /// Our login may not look; the words.
    Hidden(String),
}

pub(super) async fn gather(clusters: &Clusters, limit: Duration) -> Result<StandbyFacts, ClusterError> {
    let (source, target) = (&clusters.source, &clusters.target);
    let standby = target.standby(limit).await?;
    let slot = standby.receiver.as_ref().and_then(|receiver| receiver.slot.clone());
    let sync_state = match slot {
        Some(slot) => source.sync_state(&slot, limit).await?,
        None => None,
    };
    let mut neighbours = Vec::new();
    for name in source.list("databases", NEIGHBOURS, limit, |row| row.text("name")).await? {
        let holds = held(&source.of_database(&name), limit).await;
        neighbours.push(Neighbour { name, holds });
    }
    Ok(StandbyFacts {
        standby,
        lag_bytes: clusters.standby_lag(limit).await?,
        sync_state,
        neighbours,
        subscriptions: source.list("subscriptions", SUBSCRIPTIONS, limit, |row| row.text("name")).await?,
        logical_slots: source.list("slots", LOGICAL_SLOTS, limit, |row| row.text("name")).await?,
    })
}

async fn held(database: &Cluster, limit: Duration) -> Holds {
    match database.list("objects", HELD, limit, |row| row.number("held")).await.as_deref() {
        Ok([0]) => Holds::Nothing,
        Ok(counts) => Holds::Objects(counts.iter().sum()),
        Err(error) => Holds::Hidden(error.to_string()),
    }
}
