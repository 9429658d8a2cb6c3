//! Drafts: copies of live sessions made ahead of a pause, so that little is left to do under it.
//!
//! Invariant: a draft is used only if its session has not changed since but for the sequences that it has used; it holds
//! nothing that its session could miss. Nothing waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;

use crate::backend::ServerError;
use crate::client::{Client, Look};
use crate::database::{Database, lock};
use crate::pool::{Pool, Successor};
use crate::route::Active;
use crate::transplant;
use crate::transplant::{RestoreError, Snapshot, Survey, Ticket};

/// Drafts that are made at a time, while the servers do their work: more would be felt by clients.
const AT_ONCE: usize = 2;

/// How long restoring one session may take.
const RESTORE: Duration = Duration::from_secs(2);

/// How long a copy may take to make itself ready.
const READY: Duration = Duration::from_secs(1);

/// A copy of a session as it was when it was looked at, without its use of sequences.
pub(super) struct Draft {
    backend: Box<str>,
    made: Arc<Snapshot>,
    successor: Successor,
}

/// Drafts by client.
pub(super) type Drafts = BTreeMap<u64, Draft>;

impl Database {
    /// The draft of a session on a backend, if there is one.
    pub(super) fn draft_of(&self, client: &Client, backend: &str) -> Option<Draft> {
        lock(&self.drafts).remove(&client.who.id).filter(|draft| *draft.backend == *backend)
    }

    /// Looks at every session that keeps a server, for SHOW SESSIONS, and makes drafts of them, so that little is left to
    /// do under a pause; nothing is held for it.
    pub(super) async fn look_at_sessions(&self, target: &Active) {
        let clients = self.kept_clients();
        if clients.is_empty() {
            return;
        }
        let active = self.site.route.active();
        let survey = match self.survey(&active.backend).await {
            Ok(survey) => Arc::new(survey),
            Err(silence) => {
                let why: Box<str> = format!("the catalogue could not be read: {silence}").into();
                return clients.iter().for_each(|client| client.looked(Look::Stays(why.clone())));
            }
        };
        let looks = clients.into_iter().map(|client| self.draft(client, target, &survey));
        stream::iter(looks).buffer_unordered(AT_ONCE).for_each(|()| std::future::ready(())).await;
    }

    /// Looks at one session and makes its draft, unless there is one that is still right.
    async fn draft(&self, client: Arc<Client>, target: &Active, survey: &Arc<Survey>) {
        let id = client.who.id;
        let pool = self.pools().into_iter().find(|pool| pool.user == client.who.user);
        let (Ok(probed), Some(pool)) = (self.ask_session(Arc::clone(&client), survey).await, pool) else { return };
        let Ok(snapshot) = probed.session else { return };
        // Whoever gives a lock away must not find it taken by a draft of its own.
        let worth_it = !snapshot.holds_locks();
        let right = |draft: &mut Draft| {
            let fits = draft.backend == target.backend && draft.made.differs_in_sequences_only(&snapshot);
            worth_it && fits && draft.successor.is_alive()
        };
        let present = lock(&self.drafts).remove(&id).filter(|_| worth_it);
        if let Some(mut draft) = present
            && right(&mut draft)
        {
            // Since it was made the backend's schema may have changed, and its server process has to plan anew.
            get_ready(&mut draft.successor, &snapshot).await;
            lock(&self.drafts).insert(id, draft);
            return;
        }
        if !worth_it {
            return;
        }
        let made = Arc::new(snapshot.without_sequences());
        match copy(&pool, target, &made, &[]).await {
            Ok(Ok(mut successor)) => {
                get_ready(&mut successor, &snapshot).await;
                let draft = Draft { backend: target.backend.clone(), made, successor };
                lock(&self.drafts).insert(id, draft);
            }
            Ok(Err(error)) if is_of_session(&error) => client.looked(Look::Stays(error.to_string().into())),
            // Tried again under the pause.
            Ok(Err(_)) | Err(_) => {}
        }
    }

    /// Closes the drafts of clients that are gone.
    pub(super) fn sift_drafts(&self) {
        let mut drafts = lock(&self.drafts);
        if !drafts.is_empty() {
            drafts.retain(|id, _| self.process.clients.find(*id).is_some());
        }
    }

    /// How many sessions keep a server of a pool, and how many of them have a draft on a backend.
    pub(super) fn kept_of(&self, pool: &Pool, backend: &str) -> (usize, usize) {
        let mut kept = self.kept_clients();
        kept.retain(|client| client.who.user == pool.user);
        let drafts = lock(&self.drafts);
        let drafted =
            |client: &&Arc<Client>| drafts.get(&client.who.id).is_some_and(|draft| *draft.backend == *backend);
        (kept.len(), kept.iter().filter(drafted).count())
    }

    /// Closes the drafts: the backends are others, or no switch is to come.
    pub(super) fn drop_drafts(&self) {
        lock(&self.drafts).clear();
    }
}

/// What a session will need of its server is there when clients wait for it.
async fn get_ready(successor: &mut Successor, snapshot: &Snapshot) {
    let deadline = tokio::time::Instant::now() + READY;
    if let Some(server) = successor.server()
        && let Err(error) = transplant::get_ready(server, snapshot, deadline).await
    {
        // A broken connection is found when the draft is wanted.
        tracing::debug!(%error, "a copy was lost while it was made ready");
    }
}

/// A copy on a connection of its own. The outer error is none of the session's.
pub(super) async fn copy(
    pool: &Arc<Pool>,
    target: &Active,
    snapshot: &Snapshot,
    tickets: &[Ticket],
) -> Result<Result<Successor, RestoreError>, String> {
    let connected = pool.successor(target).await;
    let mut successor = connected.map_err(|error| format!("no connection to '{}': {error}", target.backend))?;
    let server = successor.server().ok_or("no connection")?;
    let deadline = tokio::time::Instant::now() + RESTORE;
    let restored = Box::pin(transplant::restore(server, snapshot, tickets, deadline)).await;
    Ok(restored.map(|()| successor))
}

/// A draft brought up to what its session is now; `None` where it has to be made anew.
pub(super) async fn finished(draft: Option<Draft>, snapshot: &Snapshot, tickets: &[Ticket]) -> Option<Successor> {
    let Draft { made, mut successor, .. } = draft?;
    let deadline = tokio::time::Instant::now() + RESTORE;
    match transplant::touch_up(successor.server()?, &made, snapshot, tickets, deadline).await {
        Ok(true) => Some(successor),
        Ok(false) | Err(_) => None,
    }
}

/// Whether the session can't be restored, and not merely its server has trouble.
pub(super) fn is_of_session(error: &RestoreError) -> bool {
    match error {
        RestoreError::Differs { .. } | RestoreError::Server(ServerError::Refused { .. }) => true,
        RestoreError::Server(ServerError::Broken(_) | ServerError::Timeout) => false,
    }
}
