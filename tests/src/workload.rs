//! Load through proxies (or straight at a server): closed-loop clients with think time, open-loop probes at 100 Hz,
//! clients that pipeline, clients that idle.
//!
//! Invariant: every client that was started is in the [`Outcome`] with its notes, its waits and its errors.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::task::JoinHandle;
use tokio_postgres::Config;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::errors::ClientError;
use crate::ledger::Notes;
use crate::pair::{APP, DATABASE, OTHER, password};
use crate::pipeliner::Pipeliner;
use crate::process::POLL;
use crate::samples::Samples;
use crate::writer::{Counters, Diet, Pace, Protocol, Record, Writer};

/// Probes send every so often.
const PROBE_PERIOD: Duration = Duration::from_millis(10);

/// Client numbers of the probes, of those who pipeline and of those who idle begin here.
const PROBES: i32 = 1000;
const PIPELINERS: i32 = 2000;
const IDLERS: i32 = 3000;

/// How much load, and where.
#[derive(Clone, Debug)]
pub struct WorkloadOptions {
    /// Where clients connect, in turn.
    pub ports: Vec<u16>,
    /// Login of all clients but those in `sessions`; the password is [`password`]'s.
    pub user: String,
    /// So many of the closed-loop clients log in as this other user, and keep settings, prepared statements and a channel
    /// in their session: it has to be pooled by session.
    pub sessions: (u32, String),
    /// Closed-loop clients.
    pub clients: u32,
    /// Writing transactions each second of all closed-loop clients together, if answers come in time.
    pub writes_per_s: u32,
    /// Pairs of open-loop probes (one reads, one writes), each at 100 Hz.
    pub probes: u32,
    /// Clients that always have this many requests in flight: (clients, requests).
    pub pipelining: (u32, usize),
    /// Clients that log in and then say nothing until the end.
    pub idle: u32,
    /// Writes go to accounts 1 to this.
    pub accounts: u32,
    /// The closed loop made an open one.
    pub open_loop: Option<OpenLoop>,
}

/// Clients that send at fixed times, evenly spread, whatever happens: whoever is late sends at once until it has caught up,
/// and what fails it sends again. So no stall hides behind those that wait for it.
#[derive(Clone, Debug)]
pub struct OpenLoop {
    /// Time for all of them to log in, one after the other, before the first transaction is due.
    pub log_in: Duration,
    /// Where they connect instead of `ports`: looked up at every login, as a name is.
    pub address: Option<Arc<AtomicU16>>,
}

impl WorkloadOptions {
    /// `clients` clients with 650 writes a second and one pair of probes: with probes and stalls well above 500.
    pub fn new(ports: Vec<u16>, clients: u32) -> WorkloadOptions {
        WorkloadOptions {
            ports,
            user: APP.to_owned(),
            sessions: (0, OTHER.to_owned()),
            clients,
            writes_per_s: 650,
            probes: 1,
            pipelining: (0, 100),
            idle: 0,
            accounts: 1000,
            open_loop: None,
        }
    }

    fn login(&self, client: u32) -> Config {
        self.login_of(&self.user, client)
    }

    fn login_of(&self, user: &str, client: u32) -> Config {
        let mut config = Config::new();
        if self.address().is_none() {
            config.port(self.ports[client as usize % self.ports.len().max(1)]);
        }
        config.host("127.0.0.1").user(user).password(password(user)).dbname(DATABASE);
        config.application_name(format!("load-{client}"));
        config
    }

    fn address(&self) -> Option<Arc<AtomicU16>> {
        self.open_loop.as_ref()?.address.clone()
    }

    /// How client `number` goes about it, and when it logs in and begins.
    fn pace(&self, number: u32, now: Instant) -> (Pace, (Instant, Instant)) {
        let clients = self.clients.max(1);
        let period = Duration::from_secs(1) * clients / self.writes_per_s.max(1);
        match &self.open_loop {
            None => (Pace::ThinkTime(period), (now, now)),
            Some(OpenLoop { log_in, .. }) => {
                let share = |of: Duration| of * number / clients;
                (Pace::Insist(period), (now + share(*log_in), now + *log_in + share(period)))
            }
        }
    }
}

/// Load that runs.
#[derive(Debug)]
pub struct Workload {
    stop: CancellationToken,
    counters: Arc<Counters>,
    tasks: Vec<JoinHandle<Record>>,
    idlers: Vec<(i32, Client)>,
    began: Instant,
}

/// What the clients brought home.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// One for each client.
    pub records: Vec<Record>,
    /// Transactions that ended well, reads among them.
    pub transactions: u64,
    /// How long the load ran.
    pub duration: Duration,
}

impl Outcome {
    /// What every client was told.
    pub fn notes(&self) -> Vec<Notes> {
        self.records.iter().map(|record| record.notes.clone()).collect()
    }

    /// Every error that a client saw, in order of time.
    pub fn errors(&self) -> Vec<ClientError> {
        let mut errors: Vec<ClientError> =
            self.records.iter().flat_map(|record| record.errors.iter().cloned()).collect();
        errors.sort_by_key(|error| error.at_us);
        errors
    }

    /// Every client's waits.
    pub fn samples(&self) -> impl Iterator<Item = (i32, &Samples)> {
        self.records.iter().map(|record| (record.notes.client, &record.samples))
    }

    /// Writes acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.records.iter().map(|record| record.notes.acknowledged.len()).sum()
    }
}

impl Workload {
    /// Starts all clients; those that idle are logged in when this returns, the others go on trying.
    ///
    /// # Errors
    /// An idle client can't log in.
    pub async fn start(options: &WorkloadOptions) -> Result<Workload> {
        let (stop, counters) = (CancellationToken::new(), Arc::new(Counters::default()));
        let mut idlers = Vec::new();
        for number in 0..options.idle {
            let id = IDLERS + number.cast_signed();
            idlers.push((id, Client::connect(&options.login(number)).await.context("login of an idle client")?));
        }
        let mut workload = Workload { stop, counters, tasks: Vec::new(), idlers, began: Instant::now() };
        workload.spawn_writers(options);
        workload.spawn_probes(options);
        for number in 0..options.pipelining.0 {
            let mut pipeliner = Pipeliner::new(options.login(number), options.pipelining.1, options.accounts);
            pipeliner.record.notes.client = PIPELINERS + number.cast_signed();
            pipeliner.counters = Arc::clone(&workload.counters);
            workload.tasks.push(tokio::spawn(pipeliner.run(workload.stop.clone())));
        }
        Ok(workload)
    }

    fn spawn_writers(&mut self, options: &WorkloadOptions) {
        let now = Instant::now();
        for number in 0..options.clients {
            // Both ways to speak among those of either pooling.
            let protocol = if number / 2 % 2 == 0 { Protocol::Simple } else { Protocol::Extended };
            let id = number.cast_signed() + 1;
            let (sessions, other) = &options.sessions;
            let keeps = is_one_of(*sessions, number, options.clients);
            let login = options.login_of(if keeps { other } else { &options.user }, number);
            let (pace, begins) = options.pace(number, now);
            self.spawn(options, id, |writer| Writer { login, protocol, keeps, pace, begins, ..writer });
        }
    }

    fn spawn_probes(&mut self, options: &WorkloadOptions) {
        for number in 0..options.probes {
            let id = PROBES + 2 * number.cast_signed();
            for (id, diet) in [(id, Diet::ReadsOnly), (id + 1, Diet::SingleWrites)] {
                let login = options.login(number);
                self.spawn(options, id, |writer| Writer { login, diet, ..writer });
            }
        }
    }

    fn spawn(&mut self, options: &WorkloadOptions, id: i32, shape: impl FnOnce(Writer) -> Writer) {
        let notes = Notes { client: id, ..Notes::default() };
        let now = Instant::now();
        let writer = shape(Writer {
            login: Config::new(),
            address: options.address(),
            begins: (now, now),
            protocol: Protocol::Extended,
            pace: Pace::Schedule(PROBE_PERIOD),
            diet: Diet::Mixed,
            keeps: false,
            accounts: options.accounts,
            counters: Arc::clone(&self.counters),
            failures: 0,
            record: Record { notes, ..Record::default() },
        });
        self.tasks.push(tokio::spawn(writer.run(self.stop.clone())));
    }

    /// Totals so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Waits until `more` further writes are acknowledged.
    ///
    /// # Errors
    /// They are not within `limit`.
    pub async fn acknowledges(&self, more: u64, limit: Duration) -> Result<()> {
        let goal = self.counters.acknowledged.load(Ordering::Relaxed) + more;
        let waiting = async {
            while self.counters.acknowledged.load(Ordering::Relaxed) < goal {
                tokio::time::sleep(POLL).await;
            }
        };
        let errors = || self.counters.errors.load(Ordering::Relaxed);
        tokio::time::timeout(limit, waiting)
            .await
            .with_context(|| format!("no {more} more writes within {limit:?}; clients saw {} errors", errors()))
    }

    /// Stops all clients once their transaction under way is answered; an idle client shows that it still lives.
    ///
    /// # Errors
    /// A client's task panicked.
    pub async fn stop(self) -> Result<Outcome> {
        self.stop.cancel();
        let mut records = Vec::new();
        for task in self.tasks {
            // Ended by the limit on every answer.
            records.push(task.await.context("a client's task")?);
        }
        for (id, client) in self.idlers {
            let mut record = Record { notes: Notes { client: id, ..Notes::default() }, ..Record::default() };
            if let Err(error) = client.batch_execute("SELECT 1").await {
                record.errors.push(ClientError::of(id, "idle", &error));
            }
            records.push(record);
        }
        let transactions = self.counters.transactions.load(Ordering::Relaxed);
        Ok(Outcome { records, transactions, duration: self.began.elapsed() })
    }
}

/// Spreads `chosen` among `all` evenly: is `number` one of them?
fn is_one_of(chosen: u32, number: u32, all: u32) -> bool {
    let before = |number: u32| u64::from(number) * u64::from(chosen.min(all)) / u64::from(all.max(1));
    before(number + 1) > before(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_are_chosen_and_spread() {
        for (chosen, all) in [(0, 7), (3, 7), (7, 7), (16, 32), (9, 7)] {
            let picked = (0..all).filter(|number| is_one_of(chosen, *number, all)).count();
            assert_eq!(picked, chosen.min(all) as usize, "{chosen} of {all}");
        }
        assert!(!is_one_of(16, 0, 32) && is_one_of(16, 1, 32));
    }
}
