//! Host names of servers: each is one answer at a time, and everybody connects to the same address of it.
//!
//! Invariant: the address that is in use changes only while the gate is open, never by a failed lookup, and each change
//! is told to whoever has connections to the former one. A shut gate freezes it: what decides an epoch has to speak to
//! the server that was paused.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::relay::ShutSignal;

/// The longest wait for one lookup. The system's own limit is about twice that, and what is known serves meanwhile.
const LOOKUP: Duration = Duration::from_secs(5);

/// Asks for the addresses of a host name; may block.
type Lookup = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// Where answers come from.
#[derive(Clone)]
pub struct Resolver(Arc<Lookup>);

impl Resolver {
    /// The operating system: `/etc/hosts`, DNS, or what else it is configured for.
    #[must_use]
    pub fn system() -> Self {
        Self::new(|host, port| (host, port).to_socket_addrs().map(Iterator::collect))
    }

    /// Any other source. It may block: it runs where that harms nobody.
    #[must_use]
    pub fn new(lookup: impl Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(lookup))
    }
}

/// What names of one database have in common.
#[derive(Clone)]
pub struct Registry {
    /// Where answers come from.
    pub resolver: Resolver,
    /// While it is shut no address in use changes.
    pub gate: Arc<dyn ShutSignal + Send + Sync>,
    /// Notified when an address in use has changed: [`Name::take_move`] says which.
    pub told: Arc<Notify>,
}

/// The name of a server's host, and its present answer.
pub struct Name {
    host: Box<str>,
    port: u16,
    registry: Registry,
    answer: Mutex<Answer>,
    /// Held by a lookup as long as it blocks, also when nobody waits for it any more: there is one at a time.
    looking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct Answer {
    /// The one in use first; empty before the first lookup.
    addresses: Vec<SocketAddr>,
    /// Whether a connection was made to the first: from then on leaving it is a move.
    in_use: bool,
    looked_at: Option<Instant>,
    last: Last,
    moved: Option<Move>,
}

/// What the last lookup brought.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Last {
    #[default]
    Answered,
    Failed,
}

/// A change of the address in use, which nobody ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The address before.
    pub from: SocketAddr,
    /// The address now.
    pub to: SocketAddr,
}

/// How long answers are good for.
#[derive(Debug, Clone, Copy)]
pub struct Ttl {
    /// `dns_max_ttl`.
    pub answer: Duration,
    /// `dns_nxdomain_ttl`: how soon a failed lookup is repeated.
    pub failure: Duration,
}

/// An answer as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The name.
    pub host: Box<str>,
    /// The address in use first.
    pub addresses: Vec<SocketAddr>,
    /// Until it is looked up again.
    pub left: Duration,
}

impl Name {
    /// A name that nobody has looked up yet; `None` if `host` is an address or a socket's directory, which need no answer.
    #[must_use]
    pub fn new(host: &str, port: u16, registry: &Registry) -> Option<Arc<Self>> {
        if host.starts_with('/') || host.parse::<std::net::IpAddr>().is_ok() {
            return None;
        }
        Some(Arc::new(Self {
            host: host.into(),
            port,
            registry: registry.clone(),
            answer: Mutex::default(),
            looking: Arc::default(),
        }))
    }

    /// Host and port.
    #[must_use]
    pub fn place(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// Addresses to try, in this order; never empty. One that is in use under a shut gate is the only one.
    ///
    /// Waits for the first lookup only, at most 5 s.
    ///
    /// # Errors
    /// The first lookup failed.
    pub async fn candidates(&self) -> io::Result<Vec<SocketAddr>> {
        if let Some(known) = self.usable() {
            return Ok(known);
        }
        self.look_up(|answer| answer.addresses.is_empty()).await?;
        self.usable().ok_or_else(no_address)
    }

    fn usable(&self) -> Option<Vec<SocketAddr>> {
        let answer = self.lock();
        let first = answer.addresses.first()?;
        Some(if self.is_frozen(&answer) { vec![*first] } else { answer.addresses.clone() })
    }

    /// A connection was made to `at`, by somebody for whom `first` was the address in use and, if it is another one, did
    /// not answer. Whether that counts: not if the answer has changed meanwhile, or if the gate has shut.
    #[must_use = "a connection that does not count has to be closed"]
    pub fn settle(&self, at: SocketAddr, first: SocketAddr) -> bool {
        let mut answer = self.lock();
        if answer.addresses.first() == Some(&at) {
            answer.in_use = true;
            return true;
        }
        if answer.addresses.first() != Some(&first) || self.is_frozen(&answer) {
            return false;
        }
        if !answer.prefer(at) {
            return false;
        }
        answer.leave(first, at);
        answer.in_use = true;
        self.tell(&answer);
        true
    }

    /// Whether a connection that was made to this address is where new ones go.
    #[must_use]
    pub fn is_at(&self, peer: SocketAddr) -> bool {
        self.lock().addresses.first().is_some_and(|first| first.ip() == peer.ip())
    }

    /// Looks the name up again, at most for 5 s. Does nothing under a shut gate.
    pub async fn refresh(&self) {
        // What failed was logged, and what was known goes on.
        let _ = self.look_up(|answer| !self.is_frozen(answer)).await;
    }

    /// When it has to be looked up again; `None` before anybody needed it.
    #[must_use]
    pub fn due(&self, ttl: Ttl) -> Option<Instant> {
        let answer = self.lock();
        let good_for = match answer.last {
            Last::Answered => ttl.answer,
            Last::Failed => ttl.failure,
        };
        Some(answer.looked_at? + good_for)
    }

    /// The present answer; `None` before the first one.
    #[must_use]
    pub fn known(&self, ttl: Ttl, now: Instant) -> Option<Known> {
        let left = self.due(ttl)?.saturating_duration_since(now);
        let addresses = self.lock().addresses.clone();
        (!addresses.is_empty()).then(|| Known { host: self.host.clone(), addresses, left })
    }

    /// Whether a lookup is under way.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.looking.try_lock().is_err()
    }

    /// The last move, once.
    pub fn take_move(&self) -> Option<Move> {
        self.lock().moved.take()
    }

    /// One lookup, if it is still `wanted` when it is our turn.
    async fn look_up(&self, wanted: impl Fn(&Answer) -> bool) -> io::Result<()> {
        let looking = async {
            // Ended by the lookup before, or by the clock below.
            let alone = Arc::clone(&self.looking).lock_owned().await;
            if !wanted(&self.lock()) {
                return Ok(());
            }
            let (Resolver(lookup), host, port) = (self.registry.resolver.clone(), self.host.clone(), self.port);
            // The turn goes along, because a lookup that nobody waits for any more still blocks, and comes back, because
            // the next in line is to see what was learned. If `lookup` panics it is released by the unwinding.
            let looked = tokio::task::spawn_blocking(move || (lookup(&host, port), alone)).await;
            let (found, _alone) = match looked {
                Ok((found, alone)) => (found, Some(alone)),
                Err(error) => (Err(io::Error::other(error)), None),
            };
            self.learn(found)
        };
        tokio::time::timeout(LOOKUP, looking).await.unwrap_or_else(|_| {
            self.learn(Err(io::Error::new(io::ErrorKind::TimedOut, "no answer from the resolver in time")))
        })
    }

    fn learn(&self, found: io::Result<Vec<SocketAddr>>) -> io::Result<()> {
        let mut answer = self.lock();
        if self.is_frozen(&answer) {
            // The gate has shut meanwhile: it is asked again when that opens.
            return Ok(());
        }
        answer.looked_at = Some(Instant::now());
        let found = found.and_then(|found| if found.is_empty() { Err(no_address()) } else { Ok(found) });
        match found {
            Ok(found) => {
                if std::mem::replace(&mut answer.last, Last::Answered) == Last::Failed {
                    tracing::info!(host = %self.host, "the name is resolved again");
                }
                answer.replace(found);
                self.tell(&answer);
                Ok(())
            }
            Err(error) => {
                // Once: the retries would only repeat it. Before the first answer the attempt to connect says it.
                let before = std::mem::replace(&mut answer.last, Last::Failed);
                if before == Last::Answered && !answer.addresses.is_empty() {
                    tracing::warn!(host = %self.host, %error, "a name can't be resolved: its former answer goes on");
                }
                Err(error)
            }
        }
    }

    fn is_frozen(&self, answer: &Answer) -> bool {
        answer.in_use && self.registry.gate.is_shut()
    }

    fn tell(&self, answer: &Answer) {
        if answer.moved.is_some() {
            self.registry.told.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Answer> {
        // Nothing under this lock panics half way through a change.
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answer {
    /// A new answer, not empty: an address in use that is still in it stays in use.
    fn replace(&mut self, mut found: Vec<SocketAddr>) {
        let mut seen = Vec::with_capacity(found.len());
        found.retain(|address| {
            let new = !seen.contains(address);
            seen.push(*address);
            new
        });
        match (self.addresses.first().copied(), found.first().copied()) {
            (Some(first), _) if found.contains(&first) => {
                self.addresses = found;
                let _ = self.prefer(first); // It is among them.
            }
            (Some(first), Some(next)) => {
                self.leave(first, next);
                self.addresses = found;
            }
            (None, _) => self.addresses = found,
            (Some(_), None) => {}
        }
    }

    /// Puts one of the addresses first; `false` if it is none of them.
    fn prefer(&mut self, at: SocketAddr) -> bool {
        let Some(index) = self.addresses.iter().position(|address| *address == at) else { return false };
        self.addresses[..=index].rotate_right(1);
        true
    }

    fn leave(&mut self, from: SocketAddr, to: SocketAddr) {
        if self.in_use {
            // A move that nobody has seen yet goes on to here.
            let from = self.moved.map_or(from, |earlier| earlier.from);
            self.moved = Some(Move { from, to });
        }
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({}:{} {:?})", self.host, self.port, self.lock().addresses)
    }
}

fn no_address() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the name has no address")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    /// A gate that a test shuts.
    #[derive(Default)]
    struct Bar(AtomicBool);

    impl ShutSignal for Bar {
        fn is_shut(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// A name, and what it will be answered with next.
    struct Stage {
        name: Arc<Name>,
        gate: Arc<Bar>,
        next: Arc<Mutex<Vec<SocketAddr>>>,
        lookups: Arc<AtomicUsize>,
    }

    fn at(last: u8) -> SocketAddr {
        ([10, 0, 0, last], 5432).into()
    }

    impl Stage {
        fn new() -> Self {
            let (gate, next, lookups) = (Arc::<Bar>::default(), Arc::<Mutex<Vec<_>>>::default(), Arc::default());
            let (answers, count) = (Arc::clone(&next), Arc::<AtomicUsize>::clone(&lookups));
            let resolver = Resolver::new(move |host, port| {
                assert_eq!((host, port), ("db.example", 5432));
                count.fetch_add(1, Ordering::Relaxed);
                let answer = answers.lock().unwrap().clone();
                if answer.is_empty() { Err(io::Error::other("no such name")) } else { Ok(answer) }
            });
            let registry = Registry { resolver, gate: Arc::clone(&gate) as _, told: Arc::default() };
            Self { name: Name::new("db.example", 5432, &registry).unwrap(), gate, next, lookups }
        }

        fn answers(&self, addresses: &[u8]) {
            *self.next.lock().unwrap() = addresses.iter().map(|last| at(*last)).collect();
        }

        async fn refreshed(&self, addresses: &[u8]) -> Option<Move> {
            self.answers(addresses);
            self.name.refresh().await;
            self.name.take_move()
        }

        fn shut(&self, shut: bool) {
            self.gate.0.store(shut, Ordering::Relaxed);
        }

        /// In use at the first address of this answer.
        async fn in_use(addresses: &[u8]) -> Self {
            let stage = Self::new();
            stage.answers(addresses);
            let first = stage.name.candidates().await.unwrap()[0];
            assert!(stage.name.settle(first, first));
            stage
        }
    }

    #[test]
    fn addresses_and_directories_need_no_answer() {
        let registry = Registry { resolver: Resolver::system(), gate: Arc::<Bar>::default(), told: Arc::default() };
        assert!(["/tmp", "127.0.0.1", "::1"].iter().all(|host| Name::new(host, 5432, &registry).is_none()));
        assert!(Name::new("localhost", 5432, &registry).is_some());
    }

    #[tokio::test]
    async fn everybody_uses_one_answer_and_one_address() {
        let stage = Stage::in_use(&[1, 2]).await;
        assert_eq!(stage.name.candidates().await.unwrap(), [at(1), at(2)]);
        // In another order it is the same answer; further addresses are for when the first one fails.
        assert_eq!(stage.refreshed(&[3, 2, 1, 1]).await, None);
        assert_eq!(stage.name.candidates().await.unwrap(), [at(1), at(3), at(2)]);
        assert_eq!(stage.lookups.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn an_answer_without_the_address_in_use_is_a_move() {
        let stage = Stage::in_use(&[1]).await;
        assert_eq!(stage.refreshed(&[2, 3]).await, Some(Move { from: at(1), to: at(2) }));
        assert_eq!(stage.name.take_move(), None, "told once");
        assert!(stage.name.is_at(at(2)) && !stage.name.is_at(at(1)));
        assert!(!stage.name.settle(at(1), at(1)), "a connection that was under way to the former address");
        stage.name.registry.told.notified().await;
    }

    #[tokio::test]
    async fn an_answer_that_nobody_used_may_change_silently() {
        let stage = Stage::new();
        stage.answers(&[1]);
        stage.name.candidates().await.unwrap();
        assert_eq!(stage.refreshed(&[2]).await, None);
        assert_eq!(stage.name.candidates().await.unwrap(), [at(2)]);
    }

    #[tokio::test]
    async fn the_next_address_is_a_move_only_if_the_first_was_in_use() {
        let stage = Stage::new();
        stage.answers(&[1, 2, 3]);
        stage.name.candidates().await.unwrap();
        assert!(stage.name.settle(at(2), at(1)));
        assert_eq!((stage.name.take_move(), stage.name.candidates().await.unwrap()), (None, vec![at(2), at(1), at(3)]));
        assert!(stage.name.settle(at(3), at(2)));
        assert_eq!(stage.name.take_move(), Some(Move { from: at(2), to: at(3) }));
        assert!(!stage.name.settle(at(1), at(2)), "it tried while another one was in use");
    }

    #[tokio::test]
    async fn a_shut_gate_freezes_the_address_in_use() {
        let stage = Stage::in_use(&[1, 2]).await;
        stage.shut(true);
        assert_eq!(stage.refreshed(&[3]).await, None);
        assert_eq!(stage.lookups.load(Ordering::Relaxed), 1, "nobody even asks");
        assert_eq!(stage.name.candidates().await.unwrap(), [at(1)], "not even the next of the same answer");
        assert!(!stage.name.settle(at(2), at(1)));
        // One that was under way when the gate shut.
        stage.name.learn(Ok(vec![at(3)])).unwrap();
        assert!(stage.name.is_at(at(1)) && stage.name.take_move().is_none());
        let ttl = Ttl { answer: Duration::ZERO, failure: Duration::ZERO };
        assert!(stage.name.due(ttl).unwrap() <= Instant::now(), "it stays due");
        stage.shut(false);
        assert_eq!(stage.refreshed(&[3]).await, Some(Move { from: at(1), to: at(3) }));
    }

    #[tokio::test]
    async fn a_failed_lookup_keeps_the_answer_and_is_repeated_sooner() {
        let stage = Stage::in_use(&[1]).await;
        let ttl = Ttl { answer: Duration::from_secs(60), failure: Duration::from_secs(1) };
        let asked = Instant::now();
        assert!(stage.name.due(ttl).unwrap() > asked + Duration::from_secs(50));
        assert_eq!(stage.refreshed(&[]).await, None);
        assert_eq!(stage.name.candidates().await.unwrap(), [at(1)]);
        assert!(stage.name.due(ttl).unwrap() < Instant::now() + Duration::from_secs(2));
        assert_eq!(stage.refreshed(&[1]).await, None);
        assert!(stage.name.known(ttl, Instant::now()).unwrap().left > Duration::from_secs(50));
    }

    #[tokio::test]
    async fn a_name_without_an_answer_is_an_error_and_asked_again() {
        let stage = Stage::new();
        assert!(stage.name.candidates().await.unwrap_err().to_string().contains("no such name"));
        stage.answers(&[1]);
        assert_eq!(stage.name.candidates().await.unwrap(), [at(1)]);
    }

    #[tokio::test]
    async fn many_who_need_the_first_answer_ask_once() {
        // The next in line races with the end of the lookup, so once is not enough to see it lose.
        for _ in 0..200 {
            let stage = Stage::new();
            stage.answers(&[1]);
            let all = futures_util::future::join_all((0..9).map(|_| stage.name.candidates())).await;
            assert!(all.iter().all(|one| one.as_ref().is_ok_and(|one| *one == [at(1)])));
            assert_eq!(stage.lookups.load(Ordering::Relaxed), 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookup_that_hangs_is_given_up_and_not_joined_by_another() {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Mutex::new(held);
        let lookups = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&lookups);
        let resolver = Resolver::new(move |_, _| {
            count.fetch_add(1, Ordering::Relaxed);
            let _ = held.lock().unwrap().recv();
            Ok(vec![at(1)])
        });
        let registry = Registry { resolver, gate: Arc::<Bar>::default(), told: Arc::default() };
        let name = Name::new("db.example", 5432, &registry).unwrap();
        // The paused clock stands still while a thread is blocked, so it is moved by hand.
        for _ in 0..2 {
            let (error, ()) = tokio::join!(name.candidates(), tokio::time::advance(LOOKUP));
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        assert!(name.is_pending());
        assert!(lookups.load(Ordering::Relaxed) <= 1);
        drop(release);
    }
}
