//! TRANSPLANT: copies of live sessions on the backend that traffic is about to go to.
//!
//! Invariant: all sessions that keep a server have a copy, or none has, except those that `session_policy` lets go; copies
//! belong to one drained pause, under which no session can say anything more. They are given to their clients by a switch,
//! and closed with the end of that pause; nobody is let go before the switch. Each step is taken for all sessions before
//! the next: one that can't be moved is known before anything is done for the others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream;
use pgcutover_api::command::{Transplant, Warrant};
use pgcutover_api::store;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::client::{Client, Look, Order};
use crate::config::SessionPolicy;
use crate::database::draft::{Draft, copy, finished, is_of_session};
use crate::database::refusal::{Refusal, Why};
use crate::database::{Database, lock};
use crate::gate::{Pause, PauseId};
use crate::pool::{Errand, Pool, Probed, Successor};
use crate::route::Active;
use crate::transplant::{NotMovable, Reason, Seat, Snapshot, Survey, Ticket};

/// Sessions that are moved at a time: enough that a hundred take a few round trips each, few enough that neither server
/// is flooded while clients are held.
const AT_ONCE: usize = 16;

/// How long one session may take to answer: longer than it gives the server.
const ANSWER: Duration = Duration::from_millis(1200);

/// Tickets that are made by one statement.
const TICKETS_AT_ONCE: usize = 1000;

/// Why a session that could be moved is not.
const OTHERS: &str = "another session can't be moved";

/// Why a session that has used a sequence can't be moved.
const UNSPEAKABLE: &str = "it has used a sequence whose name is not ASCII, and may not set it";

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

/// What one session is made of, or what becomes of it.
struct Reading {
    client: Arc<Client>,
    session: Result<Ready, Moved>,
    probe: Duration,
}

/// All that is needed to copy a session.
struct Ready {
    pool: Arc<Pool>,
    draft: Option<Draft>,
    snapshot: Arc<Snapshot>,
    tickets: Vec<Ticket>,
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
        let began = Instant::now();
        let reads = clients.into_iter().map(|client| self.read_one(client, &target, &survey));
        let mut readings: Vec<Reading> = stream::iter(reads).buffer_unordered(AT_ONCE).collect().await;
        let read = began.elapsed();
        self.hand_out_tickets(&mut readings, &target.backend).await;
        let ticketed = began.elapsed();
        let all_can = !readings.iter().any(|reading| matches!(reading.session, Err(Moved::Refused(_))));
        let copies = readings.into_iter().map(|reading| self.copy_one(reading, &target, all_can));
        let mut moved: Vec<_> = stream::iter(copies).buffer_unordered(AT_ONCE).collect().await;
        let copied = began.elapsed();
        tracing::info!(database = %self.name(), sessions = moved.len(), ?read, ?ticketed, ?copied, "sessions were copied");
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
                Some(_) => outcome.outcome = Moved::Refused(OTHERS.to_owned()),
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

    /// Reads one session.
    async fn read_one(&self, client: Arc<Client>, target: &Active, survey: &Arc<Survey>) -> Reading {
        let draft = self.draft_of(&client, &target.backend);
        let asked = self.ask_session(Arc::clone(&client), survey).await;
        let pool = self.pools().into_iter().find(|pool| pool.user == client.who.user);
        let (session, probe) = match (asked, pool) {
            (Ok(Probed { session: Ok(snapshot), took }), Some(pool)) => {
                (Ok(Ready { pool, draft, snapshot, tickets: Vec::new() }), took)
            }
            (Ok(Probed { session: Err(stays), took }), Some(_)) => (Err(self.stays(words(&stays.reasons))), took),
            (Err(why), Some(_)) => (Err(Moved::Refused(why)), Duration::ZERO),
            (_, None) => (Err(Moved::Refused("its user has no pool".to_owned())), Duration::ZERO),
        };
        Reading { client, session, probe }
    }

    /// Tickets for all that need some: one statement, because all of them wait for it.
    async fn hand_out_tickets(&self, readings: &mut [Reading], backend: &str) {
        let mut wanted = Vec::new();
        for reading in readings.iter_mut() {
            let Ok(ready) = &mut reading.session else { continue };
            match ready.snapshot.seats() {
                Some(seats) => {
                    let tickets: Vec<Uuid> = seats.iter().map(|_| Uuid::new_v4()).collect();
                    ready.tickets = tickets.iter().map(Uuid::to_string).collect();
                    wanted.extend(tickets.into_iter().zip(seats));
                }
                None => reading.session = Err(self.stays(UNSPEAKABLE.to_owned())),
            }
        }
        if let Err(why) = self.sell(&wanted, backend).await {
            let needy = readings.iter_mut().filter(|r| r.session.as_ref().is_ok_and(|ready| !ready.tickets.is_empty()));
            needy.for_each(|reading| reading.session = Err(Moved::Refused(why.clone())));
        }
    }

    async fn sell(&self, wanted: &[(Uuid, Seat)], backend: &str) -> Result<(), String> {
        for some in wanted.chunks(TICKETS_AT_ONCE) {
            let rows: Vec<_> = some
                .iter()
                .map(|(ticket, seat)| store::Seat {
                    ticket: *ticket,
                    schema: &seat.schema,
                    name: &seat.name,
                    value: seat.value,
                })
                .collect();
            let sold = self.run(backend, &store::seats(&rows)).await;
            sold.map_err(|silence| format!("the sequences that it has used can't be set on '{backend}': {silence}"))?;
        }
        Ok(())
    }

    /// Restores one session on a connection of its own, unless another one can't be moved anyway.
    async fn copy_one(&self, reading: Reading, target: &Active, all_can: bool) -> (Transplanted, Option<Successor>) {
        let Reading { client, session, probe } = reading;
        let without = |client, outcome| (Transplanted { probe, ..Transplanted::new(client, outcome) }, None);
        let Ready { pool, draft, snapshot, tickets } = match session {
            Ok(ready) if all_can => ready,
            Ok(_) => return without(client, Moved::Refused(OTHERS.to_owned())),
            Err(outcome) => return without(client, outcome),
        };
        let began = Instant::now();
        let restored = match finished(draft, &snapshot, &tickets).await {
            Some(successor) => Ok(Ok(successor)),
            None => copy(&pool, target, &snapshot, &tickets).await,
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

    /// What becomes of a session that can't be moved.
    fn stays(&self, why: String) -> Moved {
        match self.site.config.load().session_policy(self.name()) {
            SessionPolicy::Refuse | SessionPolicy::Wait => Moved::Refused(why),
            SessionPolicy::Disconnect => Moved::Leaves(why),
        }
    }

    /// Asks a session to read itself; remembers what it found.
    pub(super) async fn ask_session(&self, client: Arc<Client>, survey: &Arc<Survey>) -> Result<Probed, String> {
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

fn words(reasons: &[Reason]) -> String {
    reasons.iter().map(|reason| reason.text()).collect::<Vec<_>>().join("; ")
}
