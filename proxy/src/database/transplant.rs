//! TRANSPLANT: copies of live sessions on the backend that traffic is about to go to.
//!
//! Invariant: all sessions that keep a server have a copy, or none has; copies belong to one drained pause, under which no
//! session can say anything more. They are given to their clients by a switch, and closed with the end of that pause.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream;
use pgcutover_api::command::{Transplant, Warrant};
use tokio::sync::oneshot;

use crate::client::{Client, Look};
use crate::database::refusal::{Refusal, Why};
use crate::database::{Database, lock};
use crate::gate::{Pause, PauseId};
use crate::pool::{Errand, Pool, Probed, Successor};
use crate::route::Active;
use crate::transplant;
use crate::transplant::{NotMovable, Reason};

/// Sessions that are moved at a time: enough that a hundred take a few round trips each, few enough that neither server
/// is flooded while clients are held.
const AT_ONCE: usize = 16;

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
}

/// What became of one session.
#[derive(Debug, Clone)]
pub struct Transplanted {
    /// Its client.
    pub client: Arc<Client>,
    /// Why it has no copy.
    pub outcome: Result<(), String>,
    /// How long reading it took.
    pub probe: Duration,
    /// How long restoring it took.
    pub restore: Duration,
}

impl Transplanted {
    fn new(client: Arc<Client>, outcome: Result<(), String>) -> Self {
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
        if self.has_successors(&pause, &transplant.backend, &clients) {
            return Ok(clients.into_iter().map(|client| Transplanted::new(client, Ok(()))).collect());
        }
        self.abandon();
        if clients.is_empty() {
            return Ok(Vec::new());
        }
        let now = self.site.route.active();
        let speaks_against = Arc::new(self.survey(&now.backend).await.map_err(|error| self.silent(&error))?);
        let backend = transplant.backend.as_str().into();
        let target = Active { backend, endpoint, epoch: now.epoch, generation: now.generation };
        let moves = clients.into_iter().map(|client| self.move_one(client, &target, &speaks_against));
        let moved: Vec<_> = stream::iter(moves).buffer_unordered(AT_ONCE).collect().await;
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

    fn keep_all_or_none(
        &self,
        moved: Vec<(Transplanted, Option<Successor>)>,
        pause: &Pause,
        backend: &str,
    ) -> Result<Vec<Transplanted>, Refusal> {
        let all = moved.iter().all(|(_, successor)| successor.is_some());
        let (mut outcomes, mut of_clients) = (Vec::new(), BTreeMap::new());
        for (mut outcome, successor) in moved {
            match successor {
                Some(successor) if all => {
                    of_clients.insert(outcome.client.who.id, successor);
                }
                Some(_) => outcome.outcome = Err("another session can't be moved".to_owned()),
                None => {}
            }
            outcomes.push(outcome);
        }
        if all {
            *lock(&self.successors) = Some(Successors { pause: pause.id, backend: backend.into(), of_clients });
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
        speaks_against: &Arc<Vec<Reason>>,
    ) -> (Transplanted, Option<Successor>) {
        let refused = |client, why: String| (Transplanted::new(client, Err(why)), None);
        let Some(pool) = self.pools().into_iter().find(|pool| pool.user == client.who.user) else {
            return refused(client, "its user has no pool".to_owned());
        };
        let (asked, connected) =
            tokio::join!(self.ask_session(Arc::clone(&client), speaks_against), pool.successor(target));
        let (snapshot, probe) = match asked {
            Ok(Probed { session: Ok(snapshot), took }) => (snapshot, took),
            Ok(Probed { session: Err(stays), took }) => {
                let outcome = Transplanted::new(client, Err(words(&stays.reasons)));
                return (Transplanted { probe: took, ..outcome }, None);
            }
            Err(why) => return refused(client, why),
        };
        let mut successor = match connected {
            Ok(successor) => successor,
            Err(error) => return refused(client, format!("no connection to '{}': {error}", target.backend)),
        };
        let began = Instant::now();
        let Some(server) = successor.server() else { return refused(client, "no connection".to_owned()) };
        let deadline = tokio::time::Instant::now() + RESTORE;
        let restored = Box::pin(transplant::restore(server, &snapshot, deadline)).await;
        let times = Transplanted { probe, restore: began.elapsed(), ..Transplanted::new(client, Ok(())) };
        match restored {
            Ok(()) => (times, Some(successor)),
            Err(error) => {
                times.client.looked(Look::Stays(error.reason().text().into()));
                (Transplanted { outcome: Err(error.to_string()), ..times }, None)
            }
        }
    }

    /// Asks a session to read itself; remembers what it found.
    async fn ask_session(&self, client: Arc<Client>, speaks_against: &Arc<Vec<Reason>>) -> Result<Probed, String> {
        if client.who.replicates() {
            client.looked(Look::Stays(Reason::Replication.text().into()));
            return Ok(Probed { session: Err(NotMovable::from(Reason::Replication)), took: Duration::ZERO });
        }
        let (answer, answered) = oneshot::channel();
        self.site.errands.leave(&client, Errand::Probe { database: Arc::clone(speaks_against), answer });
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
                client.looked(Look::Stays("it was busy when it was looked at".into()));
                Err(format!("it gave no answer within {ANSWER:?}"))
            }
        }
    }

    /// Looks at every session that keeps a server, for SHOW SESSIONS; nothing is held for it.
    pub(super) async fn look_at_sessions(&self) {
        let clients = self.kept_clients();
        if clients.is_empty() {
            return;
        }
        let active = self.site.route.active();
        let speaks_against = match self.survey(&active.backend).await {
            Ok(reasons) => Arc::new(reasons),
            Err(silence) => {
                let why: Box<str> = format!("the catalogue could not be read: {silence}").into();
                return clients.iter().for_each(|client| client.looked(Look::Stays(why.clone())));
            }
        };
        let looks = clients.into_iter().map(|client| self.ask_session(client, &speaks_against));
        stream::iter(looks).buffer_unordered(AT_ONCE).for_each(|_| std::future::ready(())).await;
    }

    /// How many sessions keep a server of a pool.
    pub(super) fn kept_of(&self, pool: &Pool) -> usize {
        self.kept_clients().iter().filter(|client| client.who.user == pool.user).count()
    }

    /// Whether every one of these clients has a copy on a backend, made under this very pause.
    pub(super) fn has_successors(&self, pause: &Pause, backend: &str, clients: &[Arc<Client>]) -> bool {
        let successors = lock(&self.successors);
        let Some(ready) = successors.as_ref().filter(|s| s.pause == pause.id && *s.backend == *backend) else {
            return clients.is_empty();
        };
        clients.iter().all(|client| ready.of_clients.contains_key(&client.who.id))
    }

    /// Those of these clients that have no copy there.
    pub(super) fn without_successor(&self, backend: &str, mut clients: Vec<Arc<Client>>) -> Vec<Arc<Client>> {
        let pause = self.site.gate.pause();
        clients.retain(|client| {
            !pause.as_ref().is_some_and(|pause| self.has_successors(pause, backend, std::slice::from_ref(client)))
        });
        clients
    }

    /// Gives every client its copy, once the route has moved.
    pub(super) async fn hand_over(&self) {
        let Some(successors) = lock(&self.successors).take() else { return };
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

    /// Closes the copies: their pause is over.
    pub(super) fn abandon(&self) {
        drop(lock(&self.successors).take());
    }

    /// Closes the copies if their pause is over; whether it was.
    pub(super) fn abandon_outlived(&self) -> bool {
        let pause = self.site.gate.pause().map(|pause| pause.id);
        let outlived = lock(&self.successors).take_if(|successors| Some(successors.pause) != pause);
        outlived.is_some()
    }
}

fn words(reasons: &[Reason]) -> String {
    reasons.iter().map(|reason| reason.text()).collect::<Vec<_>>().join("; ")
}
