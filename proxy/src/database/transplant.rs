//! TRANSPLANT: copies of live sessions on the backend that traffic is about to go to.
//!
//! Invariant: all sessions that keep a server have a copy, or none has, except those that `session_policy` lets go; copies
//! belong to one drained pause, under which no session can say anything more. They are given to their clients by a switch,
//! and closed with the end of that pause; nobody is let go before the switch. A draft is a copy made ahead of a pause: it
//! is used if its session has not changed since but for the sequences that it has used.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream;
use pgcutover_api::command::{Transplant, Warrant};
use pgcutover_api::store;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::backend::ServerError;
use crate::client::{Client, Look, Order};
use crate::config::SessionPolicy;
use crate::database::refusal::{Refusal, Why};
use crate::database::{Database, lock};
use crate::gate::{Pause, PauseId};
use crate::pool::{Errand, Pool, Probed, Successor};
use crate::route::Active;
use crate::transplant;
use crate::transplant::{NotMovable, Reason, RestoreError, Snapshot, Survey, Ticket};

/// Sessions that are moved at a time: enough that a hundred take a few round trips each, few enough that neither server
/// is flooded while clients are held.
const AT_ONCE: usize = 16;

/// Drafts that are made at a time, while the servers do their work.
const DRAFTS_AT_ONCE: usize = 4;

/// How long one session may take to answer: longer than it gives the server.
const ANSWER: Duration = Duration::from_millis(1200);

/// How long restoring one session may take.
const RESTORE: Duration = Duration::from_secs(2);

/// How long a switch waits for sessions to take their copies over: those that need longer do it before they use a server.
const HAND_OVER: Duration = Duration::from_millis(600);

/// Copies of live sessions.
pub(super) struct Successors {
    pause: PauseId,
    backend: Box<str>,
    of_clients: BTreeMap<u64, Successor>,
    /// Those that the switch disconnects.
    leaving: BTreeSet<u64>,
}

impl Successors {
    fn settles(&self, client: &Client) -> bool {
        self.of_clients.contains_key(&client.who.id) || self.leaving.contains(&client.who.id)
    }
}

/// A copy of a session as it was when it was looked at, without its use of sequences.
pub(super) struct Draft {
    backend: Box<str>,
    made: Arc<Snapshot>,
    successor: Successor,
}

/// Drafts by client.
pub(super) type Drafts = BTreeMap<u64, Draft>;

/// What became of one session that was to be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moved {
    /// Its copy is ready.
    Copied,
    /// It can't be moved, and the switch disconnects it.
    Leaves(String),
    /// It has no copy.
    Refused(String),
}

impl Moved {
    /// Why it has no copy.
    #[must_use]
    pub fn why(&self) -> &str {
        match self {
            Self::Copied => "",
            Self::Leaves(why) | Self::Refused(why) => why,
        }
    }
}

/// What became of one session.
#[derive(Debug, Clone)]
pub struct Transplanted {
    /// Its client.
    pub client: Arc<Client>,
    /// What became of it.
    pub outcome: Moved,
    /// How long reading it took.
    pub probe: Duration,
    /// How long restoring it took.
    pub restore: Duration,
}

impl Transplanted {
    fn new(client: Arc<Client>, outcome: Moved) -> Self {
        Self { client, outcome, probe: Duration::ZERO, restore: Duration::ZERO }
    }
}

impl Database {
    /// TRANSPLANT: reads every session that keeps a server and restores it on the backend; all or none. Again under the
    /// same pause it answers what it has done.
    ///
    /// Bounded by the deadlines of each session. Cancel safe: copies made so far are closed.
    ///
    /// # Errors
    /// [`Refusal`]; a session that can't be moved is no error but an outcome.
    pub async fn transplant(&self, transplant: &Transplant) -> Result<Vec<Transplanted>, Refusal> {
        // Ended by whoever moves the route: those have deadlines.
        let _alone = self.moving.lock().await;
        let endpoint = self.endpoint(&transplant.backend).ok_or_else(|| self.unknown_backend(&transplant.backend))?;
        let pause = self.drained_pause()?;
        self.check_warrant(transplant, &pause)?;
        let clients = self.kept_clients();
        if let Some(done) = self.done_before(&pause, &transplant.backend, &clients) {
            return Ok(done);
        }
        drop(lock(&self.successors).take());
        if clients.is_empty() {
            return Ok(Vec::new());
        }
        let now = self.site.route.active();
        let survey = Arc::new(self.survey(&now.backend).await.map_err(|error| self.silent(&error))?);
        let backend = transplant.backend.as_str().into();
        let target = Active { backend, endpoint, epoch: now.epoch, generation: now.generation };
        let moves = clients.into_iter().map(|client| self.move_one(client, &target, &survey));
        let mut moved: Vec<_> = stream::iter(moves).buffer_unordered(AT_ONCE).collect().await;
        // Whoever has left meanwhile holds nobody up.
        moved.retain(|(of, _)| of.client.linked().is_some());
        self.keep_all_or_none(moved, &pause, &target.backend)
    }

    fn check_warrant(&self, transplant: &Transplant, pause: &Pause) -> Result<(), Refusal> {
        if *self.site.route.active().backend == *transplant.backend {
            let message = format!("{} is on backend '{}' already", self.name(), transplant.backend);
            return Err(Refusal::new(Why::WrongState, message));
        }
        let Warrant::Claim(claim) = transplant.warrant else { return Ok(()) };
        let ours = pause.epoch.as_ref().is_some_and(|e| e.claim == claim && e.target == transplant.backend);
        if ours {
            return Ok(());
        }
        let owner = pause.claim().map_or(pause.owner.clone(), |owner| owner.to_string());
        Err(Refusal::new(Why::WrongState, format!("{} is paused by {owner}", self.name())))
    }

    /// What was done under this very pause, if nothing of it is missing.
    fn done_before(&self, pause: &Pause, backend: &str, clients: &[Arc<Client>]) -> Option<Vec<Transplanted>> {
        let mut successors = lock(&self.successors);
        let ready = successors.as_mut().filter(|s| s.pause == pause.id && *s.backend == *backend)?;
        let whole = clients.iter().all(|client| ready.settles(client));
        // A copy whose server has gone is none: all are made again.
        if !whole || !ready.of_clients.values_mut().all(Successor::is_alive) {
            return None;
        }
        let fate = |client: &Arc<Client>| match (ready.of_clients.contains_key(&client.who.id), client.look()) {
            (true, _) => Moved::Copied,
            (false, Look::Stays(why) | Look::Missed(why)) => Moved::Leaves(why.into()),
            (false, Look::None | Look::Movable) => Moved::Leaves(String::new()),
        };
        Some(clients.iter().map(|client| Transplanted::new(Arc::clone(client), fate(client))).collect())
    }

    fn keep_all_or_none(
        &self,
        moved: Vec<(Transplanted, Option<Successor>)>,
        pause: &Pause,
        backend: &str,
    ) -> Result<Vec<Transplanted>, Refusal> {
        let all = !moved.iter().any(|(outcome, _)| matches!(outcome.outcome, Moved::Refused(_)));
        let (mut outcomes, mut of_clients, mut leaving) = (Vec::new(), BTreeMap::new(), BTreeSet::new());
        for (mut outcome, successor) in moved {
            match successor {
                Some(successor) if all => {
                    of_clients.insert(outcome.client.who.id, successor);
                }
                Some(_) => outcome.outcome = Moved::Refused("another session can't be moved".to_owned()),
                None => {
                    leaving.insert(outcome.client.who.id);
                }
            }
            outcomes.push(outcome);
        }
        if all {
            let backend = backend.into();
            *lock(&self.successors) = Some(Successors { pause: pause.id, backend, of_clients, leaving });
            // After they are there: the end of the pause either finds them or is seen here.
            if self.abandon_outlived() {
                let message = format!("the pause of {} ended while its sessions were being moved", self.name());
                return Err(Refusal::new(Why::WrongState, message));
            }
        }
        Ok(outcomes)
    }

    /// Reads one session and restores it on a connection of its own.
    async fn move_one(
        &self,
        client: Arc<Client>,
        target: &Active,
        survey: &Arc<Survey>,
    ) -> (Transplanted, Option<Successor>) {
        let refused = |client, why: String| (Transplanted::new(client, Moved::Refused(why)), None);
        let Some(pool) = self.pools().into_iter().find(|pool| pool.user == client.who.user) else {
            return refused(client, "its user has no pool".to_owned());
        };
        let draft = lock(&self.drafts).remove(&client.who.id).filter(|draft| draft.backend == target.backend);
        let asked = self.ask_session(Arc::clone(&client), survey).await;
        let (snapshot, probe) = match asked {
            Ok(Probed { session: Ok(snapshot), took }) => (snapshot, took),
            Ok(Probed { session: Err(stays), took }) => {
                let outcome = Transplanted::new(client, self.stays(words(&stays.reasons)));
                return (Transplanted { probe: took, ..outcome }, None);
            }
            Err(why) => return refused(client, why),
        };
        let began = Instant::now();
        let restored = match self.finished(draft, &snapshot).await {
            Some(successor) => Ok(Ok(successor)),
            None => self.copy(&pool, target, &snapshot).await,
        };
        let times = Transplanted { probe, restore: began.elapsed(), ..Transplanted::new(client, Moved::Copied) };
        match restored {
            Ok(Ok(successor)) => (times, Some(successor)),
            Err(why) => (Transplanted { outcome: Moved::Refused(why), ..times }, None),
            Ok(Err(error)) => {
                let why = error.to_string();
                times.client.looked(Look::Stays(why.as_str().into()));
                let outcome = if is_of_session(&error) { self.stays(why) } else { Moved::Refused(why) };
                (Transplanted { outcome, ..times }, None)
            }
        }
    }

    /// A draft brought up to what its session is now; `None` where it has to be made anew.
    async fn finished(&self, draft: Option<Draft>, snapshot: &Snapshot) -> Option<Successor> {
        let Draft { backend, made, mut successor } =
            draft.filter(|draft| draft.made.differs_in_sequences_only(snapshot))?;
        let tickets = self.tickets(snapshot, &backend).await.ok()?;
        let deadline = tokio::time::Instant::now() + RESTORE;
        match transplant::touch_up(successor.server()?, &made, snapshot, &tickets, deadline).await {
            Ok(true) => Some(successor),
            Ok(false) | Err(_) => None,
        }
    }

    /// A copy on a connection of its own. The outer error is none of the session's.
    async fn copy(
        &self,
        pool: &Arc<Pool>,
        target: &Active,
        snapshot: &Snapshot,
    ) -> Result<Result<Successor, RestoreError>, String> {
        let connected = pool.successor(target).await;
        let mut successor = connected.map_err(|error| format!("no connection to '{}': {error}", target.backend))?;
        let tickets = self.tickets(snapshot, &target.backend).await?;
        let server = successor.server().ok_or("no connection")?;
        let deadline = tokio::time::Instant::now() + RESTORE;
        let restored = Box::pin(transplant::restore(server, snapshot, &tickets, deadline)).await;
        Ok(restored.map(|()| successor))
    }

    /// Tickets on the target for sequences that the session may not set itself.
    async fn tickets(&self, snapshot: &Snapshot, backend: &str) -> Result<Vec<Ticket>, String> {
        let seats = snapshot.seats().ok_or("it has used a sequence whose name is not ASCII, and may not set it")?;
        if seats.is_empty() {
            return Ok(Vec::new());
        }
        let tickets: Vec<Uuid> = seats.iter().map(|_| Uuid::new_v4()).collect();
        let rows = seats.iter().zip(&tickets);
        let rows: Vec<_> = rows
            .map(|(seat, ticket)| store::Seat {
                ticket: *ticket,
                schema: &seat.schema,
                name: &seat.name,
                value: seat.value,
            })
            .collect();
        match self.run(backend, &store::seats(&rows)).await {
            Ok(_) => Ok(tickets.iter().map(Uuid::to_string).collect()),
            Err(silence) => Err(format!("the sequences that it has used can't be set on '{backend}': {silence}")),
        }
    }

    /// What becomes of a session that can't be moved.
    fn stays(&self, why: String) -> Moved {
        match self.site.config.load().session_policy(self.name()) {
            SessionPolicy::Refuse | SessionPolicy::Wait => Moved::Refused(why),
            SessionPolicy::Disconnect => Moved::Leaves(why),
        }
    }

    /// Asks a session to read itself; remembers what it found.
    async fn ask_session(&self, client: Arc<Client>, survey: &Arc<Survey>) -> Result<Probed, String> {
        if client.who.replicates() {
            client.looked(Look::Stays(Reason::Replication.text().into()));
            return Ok(Probed { session: Err(NotMovable::from(Reason::Replication)), took: Duration::ZERO });
        }
        let (answer, answered) = oneshot::channel();
        self.site.errands.leave(&client, Errand::Probe { survey: Arc::clone(survey), answer });
        match tokio::time::timeout(ANSWER, answered).await {
            Ok(Ok(probed)) => {
                client.looked(match &probed.session {
                    Ok(_) => Look::Movable,
                    Err(stays) => Look::Stays(words(&stays.reasons).into()),
                });
                Ok(probed)
            }
            Ok(Err(_)) => Err("it is leaving".to_owned()),
            Err(_) => {
                // Not to be run when nobody waits for it any more.
                drop(self.site.errands.take(client.who.id));
                client.looked(Look::Missed("it was busy when it was looked at".into()));
                Err(format!("it gave no answer within {ANSWER:?}"))
            }
        }
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
        stream::iter(looks).buffer_unordered(DRAFTS_AT_ONCE).for_each(|()| std::future::ready(())).await;
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
            lock(&self.drafts).insert(id, draft);
            return;
        }
        if !worth_it {
            return;
        }
        let made = Arc::new(snapshot.without_sequences());
        match self.copy(&pool, target, &made).await {
            Ok(Ok(successor)) => {
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

    /// Closes the drafts: the backends are others.
    pub(super) fn drop_drafts(&self) {
        lock(&self.drafts).clear();
    }

    /// Those of these clients that a switch to that backend can't take along, nor disconnect.
    pub(super) fn without_successor(&self, backend: &str, mut clients: Vec<Arc<Client>>) -> Vec<Arc<Client>> {
        let pause = self.site.gate.pause().map(|pause| pause.id);
        let successors = lock(&self.successors);
        let ready = successors.as_ref().filter(|s| Some(s.pause) == pause && *s.backend == *backend);
        clients.retain(|client| !ready.is_some_and(|ready| ready.settles(client)));
        clients
    }

    /// Gives every client its copy, once the route has moved.
    pub(super) async fn hand_over(&self) {
        lock(&self.drafts).clear();
        let Some(successors) = lock(&self.successors).take() else { return };
        for leaving in successors.leaving.iter().filter_map(|id| self.process.clients.find(*id)) {
            tracing::warn!(database = %self.name(), client = leaving.who.id, "disconnected: its session can't be moved");
            leaving.order(Order::Leave);
        }
        let mut waits = Vec::new();
        for (id, successor) in successors.of_clients {
            // Whoever has left needs none.
            let Some(client) = self.process.clients.find(id) else { continue };
            let (answer, answered) = oneshot::channel();
            self.site.errands.leave(&client, Errand::Adopt { successor, answer });
            waits.push(answered);
        }
        if tokio::time::timeout(HAND_OVER, futures_util::future::join_all(waits)).await.is_err() {
            tracing::warn!(database = %self.name(), "some sessions take their new server over later");
        }
    }

    /// Closes the copies if their pause is over; whether it was.
    pub(super) fn abandon_outlived(&self) -> bool {
        let pause = self.site.gate.pause().map(|pause| pause.id);
        let outlived = lock(&self.successors).take_if(|successors| Some(successors.pause) != pause);
        outlived.is_some()
    }
}

/// Whether the session can't be restored, and not merely its server has trouble.
fn is_of_session(error: &RestoreError) -> bool {
    match error {
        RestoreError::Differs { .. } | RestoreError::Server(ServerError::Refused { .. }) => true,
        RestoreError::Server(ServerError::Broken(_) | ServerError::Timeout) => false,
    }
}

fn words(reasons: &[Reason]) -> String {
    reasons.iter().map(|reason| reason.text()).collect::<Vec<_>>().join("; ")
}
