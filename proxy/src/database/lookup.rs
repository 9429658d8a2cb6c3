//! auth_query: what the active backend knows of a user.
//!
//! Invariant: the question goes to the backend that is active now, over connections of its own that take no pass and can
//! only read, so it is no way around the gate; the user's name is a parameter of it, and nothing else of a client's is.
//! An answer that is remembered serves only while the gate is shut and no server answers.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use crate::backend;
use crate::backend::{ConnectError, ConnectFailure, Login, Rest, Row, Secret, ServerConnection, ServerError};
use crate::database::{Database, lock};
use crate::relay::ShutSignal;
use crate::report::{Report, SqlState};
use crate::stream::Arrived;

/// Questions that one database asks at a time: so many connections beside its pools. Enough for hundreds of logins a
/// second, few enough that strangers with invented names can't flood a server.
const AT_ONCE: usize = 4;

/// How long one question may take, the connection for it included: a slow one must not eat up the login timeout.
const ANSWER: Duration = Duration::from_secs(5);

/// The same for the server, which otherwise would go on with a question that nobody waits for any more.
const ANSWER_ON_SERVER: &[u8] = b"5s";

/// How soon a question that nobody answered during a pause is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Users that are remembered: as many as log in to one database within the time below.
const REMEMBERED_MAX: usize = 1000;

/// How long an answer is remembered: longer than a server's restart, short enough that a user who was dropped yesterday
/// is not let in today.
const REMEMBERED_FOR: Duration = Duration::from_secs(3600);

/// Who asks what.
pub struct Question {
    /// `auth_user`.
    pub user: Box<str>,
    /// Its secret.
    pub secret: Secret,
    /// `auth_query`.
    pub sql: Box<str>,
}

/// What one database keeps between two questions.
pub(super) struct Lookups {
    turns: Semaphore,
    idle: Mutex<Vec<Idle>>,
    remembered: Mutex<HashMap<Box<[u8]>, Remembered>>,
}

/// A connection at rest.
struct Idle {
    generation: u64,
    user: Box<str>,
    connection: ServerConnection,
}

struct Remembered {
    secret: Box<[u8]>,
    since: Instant,
}

/// Why there is no answer.
enum NoAnswer {
    /// Nobody answered: later somebody may.
    Silence(String),
    /// The question, or the login for it, was refused: it will be again.
    Refused(String),
}

impl Default for Lookups {
    fn default() -> Self {
        Self { turns: Semaphore::new(AT_ONCE), idle: Mutex::default(), remembered: Mutex::default() }
    }
}

impl Database {
    /// What the active backend knows of a user: its secret, which is empty if it has none that is valid; `None` for nobody.
    ///
    /// Ended by the answer, by its time limit, and during a pause in which no server answers by the hold budget. Cancel
    /// safe: a connection in the middle of a question is closed.
    ///
    /// # Errors
    /// What to tell the client; the cause is logged.
    pub async fn look_up(&self, user: &[u8], question: &Question) -> Result<Option<Box<[u8]>>, Report> {
        // A server that stores names in another encoding than UTF-8 may know it; it can't be asked.
        let Ok(name) = std::str::from_utf8(user) else { return Ok(None) };
        let shed_at = Instant::now() + self.site.config.load().general.hold_budget;
        loop {
            // Looked at before the question: it may find no server, and the pause end before that is known.
            let was_shut = self.site.gate.is_shut();
            match self.ask_for(name, question).await {
                Ok(secret) => {
                    self.lookups.remember(user, secret.as_deref());
                    return Ok(secret);
                }
                Err(NoAnswer::Refused(why)) => {
                    tracing::warn!(database = %self.name(), auth_user = %question.user, why, "auth_query failed");
                    return Err(Report::user_lookup_failed());
                }
                Err(NoAnswer::Silence(why)) => {
                    tracing::warn!(database = %self.name(), auth_user = %question.user, why, "no answer to auth_query");
                }
            }
            if !was_shut && !self.site.gate.is_shut() {
                return Err(Report::user_lookup_unanswered());
            }
            if self.site.gate.is_shut()
                && let Some(secret) = self.lookups.recall(user)
            {
                return Ok(Some(secret));
            }
            if Instant::now() >= shed_at {
                return Err(Report::held_too_long());
            }
            // The end of the pause is a moment to ask at once; missed, it only costs this wait.
            let _ = timeout(ASK_AGAIN, self.site.gate.change()).await;
        }
    }

    /// Asks once; over a connection that turns out to be dead, a second time over a new one.
    async fn ask_for(&self, name: &str, question: &Question) -> Result<Option<Box<[u8]>>, NoAnswer> {
        let deadline = Instant::now() + ANSWER;
        let turn = timeout_at(deadline, self.lookups.turns.acquire()).await;
        let _turn = turn.map_err(|_| NoAnswer::Silence("too many others ask".to_owned()))?;
        loop {
            let active = self.site.route.active();
            let idle = self.lookups.take(active.generation, &question.user);
            let is_used = idle.is_some();
            let mut connection = match idle {
                Some(connection) => connection,
                None => {
                    let login = question.login();
                    backend::connect(&active.endpoint.address, &login, deadline).await.map_err(NoAnswer::from)?
                }
            };
            match connection.query(&question.sql, &[Some(name)], deadline).await {
                Err(ServerError::Broken(_)) if is_used => {}
                answer => {
                    if connection.rest == Rest::Idle {
                        self.lookups.keep(Idle {
                            generation: active.generation,
                            user: question.user.clone(),
                            connection,
                        });
                    }
                    return secret_of(name, &answer?);
                }
            }
        }
    }
}

/// Exactly one row with the very name is that user.
fn secret_of(name: &str, rows: &[Row]) -> Result<Option<Box<[u8]>>, NoAnswer> {
    let [row] = rows else {
        let refused = |why: &str| Err(NoAnswer::Refused(why.to_owned()));
        return if rows.is_empty() { Ok(None) } else { refused("it gave more than one row for one user") };
    };
    if row.columns() < 2 {
        return Err(NoAnswer::Refused("it has to give two columns, name and secret".to_owned()));
    }
    if row.bytes(0) != Some(name.as_bytes()) {
        tracing::info!(user = name, "auth_query gave another user than it was asked for: nobody");
        return Ok(None);
    }
    Ok(Some(row.bytes(1).unwrap_or_default().into()))
}

impl Question {
    /// Nothing of a client's is in it. It can only read, and ends by itself.
    fn login(&self) -> Login {
        let setting = |name: &[u8], value: &[u8]| (name.into(), value.into());
        Login {
            user: self.user.as_bytes().into(),
            secret: self.secret.clone(),
            settings: vec![
                setting(b"application_name", b"pgcutover auth_query"),
                setting(b"client_encoding", b"UTF8"),
                setting(b"default_transaction_read_only", b"on"),
                setting(b"statement_timeout", ANSWER_ON_SERVER),
            ],
        }
    }
}

impl Lookups {
    /// A connection of this generation and user that is still there; others are closed.
    fn take(&self, generation: u64, user: &str) -> Option<ServerConnection> {
        let mut idle = lock(&self.idle);
        idle.retain(|idle| idle.generation == generation && *idle.user == *user);
        loop {
            let mut connection = idle.pop()?.connection;
            // Nothing that may come at rest is worth keeping it.
            if connection.stream.arrived(&mut BytesMut::new()) == Arrived::Nothing {
                return Some(connection);
            }
        }
    }

    fn keep(&self, idle: Idle) {
        lock(&self.idle).push(idle);
    }

    /// Closes what is at rest: the backend, or who asks it, has changed.
    pub(super) fn close_idle(&self) {
        lock(&self.idle).clear();
    }

    fn remember(&self, user: &[u8], secret: Option<&[u8]>) {
        let mut remembered = self.remembered();
        let Some(secret) = secret else {
            remembered.remove(user);
            return;
        };
        if remembered.len() >= REMEMBERED_MAX && !remembered.contains_key(user) {
            let oldest = remembered.iter().min_by_key(|(_, known)| known.since).map(|(user, _)| user.clone());
            oldest.map(|user| remembered.remove(&user));
        }
        remembered.insert(user.into(), Remembered { secret: secret.into(), since: Instant::now() });
    }

    fn recall(&self, user: &[u8]) -> Option<Box<[u8]>> {
        let remembered = self.remembered();
        remembered.get(user).filter(|known| known.since.elapsed() < REMEMBERED_FOR).map(|known| known.secret.clone())
    }

    fn remembered(&self) -> MutexGuard<'_, HashMap<Box<[u8]>, Remembered>> {
        lock(&self.remembered)
    }
}

impl From<ConnectError> for NoAnswer {
    fn from(error: ConnectError) -> Self {
        let why = format!("no connection: {error}");
        match error.failure {
            ConnectFailure::Network | ConnectFailure::Unavailable | ConnectFailure::Timeout => Self::Silence(why),
            ConnectFailure::Tls | ConnectFailure::Refused | ConnectFailure::Protocol => Self::Refused(why),
        }
    }
}

impl From<ServerError> for NoAnswer {
    fn from(error: ServerError) -> Self {
        let why = error.to_string();
        match error.sqlstate() {
            // Ended by its time limit, or by somebody: not the question's fault.
            Some(SqlState::QUERY_CANCELED | SqlState::ADMIN_SHUTDOWN) | None => Self::Silence(why),
            Some(_) => Self::Refused(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn so_many_users_are_remembered_and_for_so_long() {
        let lookups = Lookups::default();
        for number in 0..REMEMBERED_MAX {
            lookups.remember(number.to_string().as_bytes(), Some(b"secret"));
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        lookups.remember(b"one more", Some(b"new"));
        assert_eq!(lookups.remembered().len(), REMEMBERED_MAX);
        assert_eq!((lookups.recall(b"0"), lookups.recall(b"1").as_deref()), (None, Some(&b"secret"[..])));
        lookups.remember(b"1", None);
        assert_eq!((lookups.recall(b"1"), lookups.recall(b"one more").as_deref()), (None, Some(&b"new"[..])));
        tokio::time::advance(REMEMBERED_FOR).await;
        assert_eq!(lookups.recall(b"one more"), None);
    }
}
