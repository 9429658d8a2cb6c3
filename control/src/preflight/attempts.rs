//! Rights, each tried as it is used.
//!
//! Invariant: what is tried is tried in a transaction that is rolled back, or waits for nobody and is dropped.

use std::time::Duration;

use pgcutover_api::store;
use pgcutover_api::store::{Name, literal};
use uuid::Uuid;

use crate::clusters::{Cluster, ClusterError, Role};
use crate::config::Replication;
use crate::preflight::facts::Inquiry;

/// One right, tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Which right: `store`, `event_trigger`, `activity`, `slot`, `subscribe`, `detach`.
    pub right: &'static str,
    /// The server's words if it refused.
    pub refusal: Option<String>,
}

pub(super) async fn attempts(cluster: &Cluster, inquiry: &Inquiry) -> Result<Vec<Attempt>, ClusterError> {
    // Nothing can be tried on a standby, and all that we need there comes from the source, but for the right to promote.
    if cluster.role() == Role::Target && inquiry.replication == Replication::Physical {
        return Ok(Vec::new());
    }
    let scratch = format!("pgcutover_probe_{}", Uuid::new_v4().simple());
    let limit = inquiry.limit;
    let mut attempts = vec![
        attempt(cluster, "store", &scratch_store(&scratch), limit).await?,
        attempt(cluster, "event_trigger", &scratch_event_trigger(&scratch, &inquiry.db), limit).await?,
        attempt(cluster, "activity", ACTIVITY, limit).await?,
    ];
    if inquiry.limits.way_back {
        attempts.push(attempt(cluster, "slot", &scratch_slot(&scratch), limit).await?);
    }
    // What was tried has a name that nobody can look up any more.
    let words = |words: String| words.replace(&format!(" \"{scratch}\""), "");
    attempts.iter_mut().for_each(|attempt| attempt.refusal = attempt.refusal.take().map(words));
    Ok(attempts)
}

/// What a server said to something that was tried and taken back; one that says nothing in time says no.
pub(super) fn tried(right: &'static str, answer: Result<(), ClusterError>) -> Result<Attempt, ClusterError> {
    match answer {
        Ok(()) => Ok(Attempt { right, refusal: None }),
        Err(error @ (ClusterError::Refused { .. } | ClusterError::Deadline { .. })) => {
            Ok(Attempt { right, refusal: Some(error.to_string()) })
        }
        Err(error) => Err(error),
    }
}

async fn attempt(cluster: &Cluster, right: &'static str, sql: &str, limit: Duration) -> Result<Attempt, ClusterError> {
    match cluster.ask(right, sql, limit).await {
        Ok(_) => Ok(Attempt { right, refusal: None }),
        // No room is not a lack of rights: it has a check of its own.
        Err(ClusterError::Refused { sqlstate, .. }) if right == "slot" && sqlstate == "53400" => {
            Ok(Attempt { right, refusal: None })
        }
        Err(ClusterError::Refused { message, sqlstate, .. }) => {
            Ok(Attempt { right, refusal: Some(format!("{message} [{sqlstate}]")) })
        }
        Err(error) => Err(error),
    }
}

/// The gate's trigger checked as the gate is used: an always-on statement trigger whose function is replaced.
fn scratch_store(schema: &str) -> String {
    format!(
        "BEGIN; SET LOCAL lock_timeout = 500; CREATE SCHEMA {schema}; CREATE TABLE {schema}.t (a int PRIMARY KEY); \
         CREATE FUNCTION {schema}.gate() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
         CREATE TRIGGER gate BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {schema}.t \
         FOR EACH STATEMENT EXECUTE FUNCTION {schema}.gate(); ALTER TABLE {schema}.t ENABLE ALWAYS TRIGGER gate; \
         CREATE OR REPLACE FUNCTION {schema}.gate() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER \
         SET search_path = pg_catalog AS 'BEGIN RETURN NULL; END'; INSERT INTO {schema}.t VALUES (1); ROLLBACK"
    )
}

/// One that a superuser has put there counts as much as one that we may create.
fn scratch_event_trigger(name: &str, db: &Name) -> String {
    let body = format!(
        "BEGIN IF NOT {} THEN CREATE EVENT TRIGGER {name} ON ddl_command_start EXECUTE FUNCTION {name}.ddl(); \
         ALTER EVENT TRIGGER {name} ENABLE ALWAYS; END IF; END",
        store::event_trigger_stands(db)
    );
    format!(
        "BEGIN; SET LOCAL lock_timeout = 500; CREATE SCHEMA {name}; \
         CREATE FUNCTION {name}.ddl() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RETURN; END'; \
         DO LANGUAGE plpgsql {}; ROLLBACK",
        literal(&body)
    )
}

/// Auxiliary processes belong to nobody: their kind is shown only to those who may see everyone's.
const ACTIVITY: &str = "DO 'BEGIN IF EXISTS (SELECT FROM pg_stat_activity a WHERE a.backend_type IS NULL) THEN \
    RAISE EXCEPTION USING ERRCODE = ''42501'', MESSAGE = ''the kind of other roles'''' sessions is hidden''; END IF; END'";

/// A temporary physical slot proves the right and the room, and waits for nobody.
fn scratch_slot(name: &str) -> String {
    let name = literal(name);
    format!("SELECT pg_create_physical_replication_slot({name}, false, true); SELECT pg_drop_replication_slot({name})")
}
