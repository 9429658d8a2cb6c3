//! Decides when a transaction may begin.
//!
//! Invariant: while the gate is shut no new [`Pass`] is given out, so once no pass is out none will be until it opens:
//! a pause that is drained stays drained. While it is shut for writes only, a new pass permits reads; once no other is out
//! none will be. Both may be in force at a time, and neither opens the other. A pause is an owned object, not a flag: only
//! its own end, named by its [`PauseId`], opens the gate. No clock and no IO here; time comes from the caller.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pgcutover_api::command::EpochPause;
use pgcutover_api::epoch::Claim;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::relay::ShutSignal;

/// The gate of one database.
#[derive(Debug, Default)]
pub struct Gate {
    /// The passes out: those for everything in the lower half, those for reads from [`READER`] on; [`SHUT`], [`WRITES`].
    word: AtomicU64,
    /// Clients waiting in [`Gate::enter`].
    held: AtomicU32,
    /// The turn of the next client that has to wait.
    turns: AtomicU64,
    pause: Mutex<Shutter>,
    /// Wakes held clients, in the order in which they came.
    opened: Notify,
    /// Wakes whoever waits for the drain or for the end of a pause.
    moved: Notify,
}

/// Set while a pause holds the gate.
const SHUT: u64 = 1 << 63;

/// Set while a pause holds writes.
const WRITES: u64 = 1 << 62;

/// One pass for reads.
const READER: u64 = 1 << 32;

#[derive(Debug, Default)]
struct Shutter {
    pause: Option<Pause>,
    /// The pause that holds writes.
    writes: Option<Pause>,
    last: u64,
    admitted: HashSet<u64>,
}

/// Permission to run one transaction. Dropping it is the end of the transaction.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    permits: Permits,
}

/// What a pass permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permits {
    /// Any transaction.
    All,
    /// One in read-only mode.
    Reads,
    /// As [`Permits::Reads`], without that mode: the client is about to ask for it, or to set it, itself.
    Settings,
}

/// What whoever waits for a pass has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// A pass for reads will do.
    Any,
    /// It writes.
    All,
}

impl Pass {
    /// What it permits.
    #[must_use]
    pub fn permits(&self) -> Permits {
        self.permits
    }

    /// The same for a client that speaks of the read-only mode itself.
    #[must_use]
    pub fn for_settings(mut self) -> Self {
        if self.permits == Permits::Reads {
            self.permits = Permits::Settings;
        }
        self
    }

    /// Whether a pass of today would be another one, or none.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        let expected = if self.permits == Permits::All { 0 } else { WRITES };
        self.gate.word.load(Ordering::Acquire) & (SHUT | WRITES) != expected
    }

    /// In the place of a pass for reads one for everything, if the gate is open by now.
    #[must_use]
    pub fn renewed(&self) -> Option<Pass> {
        if self.permits == Permits::All || !self.is_stale() {
            return None;
        }
        self.gate.try_enter_for(Wants::All)
    }
}

impl ShutSignal for Pass {
    /// Whoever may only read goes one statement at a time: each may be the one that has to wait.
    fn is_shut(&self) -> bool {
        self.permits != Permits::All || self.gate.word.load(Ordering::Acquire) & (SHUT | WRITES) != 0
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.leave(if self.permits == Permits::All { 1 } else { READER });
    }
}

/// Names one pause of one gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseId(u64);

/// The gate held shut.
#[derive(Debug, Clone)]
pub struct Pause {
    /// Its name.
    pub id: PauseId,
    /// Who asked: `user@address`, or `watch` for a hold that the proxy made by itself.
    pub owner: String,
    /// The epoch; `None` for PgBouncer's kind of pause.
    pub epoch: Option<EpochPause>,
    /// When it began.
    pub since: Instant,
    /// When its lease ends; `None` = held until somebody resumes.
    pub lease_ends: Option<Instant>,
}

/// What a pause is made of.
#[derive(Debug, Clone)]
pub struct Intent {
    /// See [`Pause::owner`].
    pub owner: String,
    /// See [`Pause::epoch`].
    pub epoch: Option<EpochPause>,
    /// How long the pause lasts unless it is renewed.
    pub lease: Option<Duration>,
}

impl Pause {
    /// Run and epoch of an epoch pause.
    #[must_use]
    pub fn claim(&self) -> Option<Claim> {
        self.epoch.as_ref().map(|epoch| epoch.claim)
    }
}

impl Intent {
    fn claim(&self) -> Option<Claim> {
        self.epoch.as_ref().map(|epoch| epoch.claim)
    }
}

/// How a wait for the drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// No transaction is open.
    Yes,
    /// Somebody ended the pause first.
    Ended,
}

/// Why a lease was not renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotRenewed {
    /// The gate is open.
    Open,
    /// Another run or epoch holds it.
    Other(Claim),
    /// It is held without an epoch.
    Unclaimed,
    /// The lease has ended; it is never revived.
    Ended,
}

impl ShutSignal for Gate {
    fn is_shut(&self) -> bool {
        self.word.load(Ordering::Acquire) & SHUT != 0
    }
}

impl Gate {
    /// A pass, if the gate is open, or open for reads. The hot path: one atomic load and one addition, no lock.
    #[must_use]
    pub fn try_enter(self: &Arc<Self>) -> Option<Pass> {
        self.try_enter_for(Wants::Any)
    }

    fn try_enter_for(self: &Arc<Self>, wants: Wants) -> Option<Pass> {
        // Goes round again only where a pause of writes begins or ends between the two looks.
        loop {
            let reads = self.word.load(Ordering::Acquire) & WRITES != 0;
            if reads && wants == Wants::All {
                return None;
            }
            let (pass, permits) = if reads { (READER, Permits::Reads) } else { (1, Permits::All) };
            let before = self.word.fetch_add(pass, Ordering::AcqRel);
            if before & SHUT == 0 && (before & WRITES != 0) == reads {
                return Some(Pass { gate: Arc::clone(self), permits });
            }
            self.leave(pass);
            if before & SHUT != 0 {
                return None;
            }
        }
    }

    /// Waits for a pass. The wait is ended by the end of the pause; the caller adds the client's hold budget, its
    /// hang-up and its cancel. Cancel safe: dropped while waiting it holds nothing.
    ///
    /// `turn` becomes the client's place in the order in which clients came to the shut gate, from 1 up.
    pub async fn enter(self: &Arc<Self>, client: u64, turn: &AtomicU64, wants: Wants) -> Pass {
        let _held = Held::new(&self.held);
        turn.store(self.turns.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        loop {
            let opened = self.opened.notified();
            tokio::pin!(opened);
            // Registered before the gate is tried: an opening in between wakes us.
            opened.as_mut().enable();
            if let Some(pass) = self.try_enter_for(wants).or_else(|| self.admitted(client, wants)) {
                return pass;
            }
            opened.await;
        }
    }

    /// Open transactions.
    #[must_use]
    pub fn passes(&self) -> u64 {
        let word = self.word.load(Ordering::Acquire);
        writers(word) + readers(word)
    }

    /// Open transactions that may write: they began while no pause held writes.
    #[must_use]
    pub fn writers(&self) -> u64 {
        writers(self.word.load(Ordering::Acquire))
    }

    /// Held clients.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.held.load(Ordering::Relaxed)
    }

    /// The pause that holds the gate. One that holds writes only is none of these: nothing may rely on it.
    #[must_use]
    pub fn pause(&self) -> Option<Pause> {
        self.lock().pause.clone()
    }

    /// The pause that holds writes.
    #[must_use]
    pub fn writes(&self) -> Option<Pause> {
        self.lock().writes.clone()
    }

    /// Whether anybody is held, writers or all.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.word.load(Ordering::Acquire) & (SHUT | WRITES) != 0
    }

    /// Shuts the gate. A hold of the same run and epoch is taken over, with the new owner and lease.
    ///
    /// # Errors
    /// The pause that holds the gate already.
    pub fn shut(&self, intent: Intent, now: Instant) -> Result<PauseId, Box<Pause>> {
        let shutter = self.lock();
        if let Some(held) = &shutter.pause {
            let same = intent.claim().is_some() && held.claim() == intent.claim();
            // An ended lease is about to be decided: it is not revived by asking again.
            if !same || held.lease_ends.is_some_and(|end| end <= now) {
                return Err(Box::new(held.clone()));
            }
        }
        Ok(self.put(shutter, intent, now))
    }

    /// Shuts an open gate. One that is shut stays as it is, whoever asks: a run's own PAUSE may have come since the caller
    /// looked, and would take being replaced for being ended.
    ///
    /// # Errors
    /// The pause that holds the gate already.
    pub fn hold(&self, intent: Intent, now: Instant) -> Result<PauseId, Box<Pause>> {
        let shutter = self.lock();
        match &shutter.pause {
            Some(held) => Err(Box::new(held.clone())),
            None => Ok(self.put(shutter, intent, now)),
        }
    }

    /// One pause takes over from another without the gate opening in between; `None` where that one is over.
    pub fn succeed(&self, id: PauseId, intent: Intent, now: Instant) -> Option<PauseId> {
        let shutter = self.lock();
        let holds = shutter.pause.as_ref().is_some_and(|pause| pause.id == id);
        holds.then(|| self.put(shutter, intent, now))
    }

    /// Shuts the gate for writes, whatever else holds it.
    ///
    /// # Errors
    /// The pause that holds writes already.
    pub fn hold_writes(&self, intent: Intent, now: Instant) -> Result<PauseId, Box<Pause>> {
        let mut shutter = self.lock();
        if let Some(held) = &shutter.writes {
            return Err(Box::new(held.clone()));
        }
        shutter.last += 1;
        let id = PauseId(shutter.last);
        let lease_ends = intent.lease.map(|lease| now + lease);
        shutter.writes = Some(Pause { id, owner: intent.owner, epoch: intent.epoch, since: now, lease_ends });
        self.word.fetch_or(WRITES, Ordering::AcqRel);
        drop(shutter);
        self.moved.notify_waiters();
        Ok(id)
    }

    fn put(&self, mut shutter: MutexGuard<'_, Shutter>, intent: Intent, now: Instant) -> PauseId {
        shutter.last += 1;
        let id = PauseId(shutter.last);
        let since = shutter.pause.as_ref().map_or(now, |held| held.since);
        let lease_ends = intent.lease.map(|lease| now + lease);
        shutter.pause = Some(Pause { id, owner: intent.owner, epoch: intent.epoch, since, lease_ends });
        self.word.fetch_or(SHUT, Ordering::AcqRel);
        drop(shutter);
        self.moved.notify_waiters();
        id
    }

    /// Lengthens the lease of a claimed pause.
    ///
    /// # Errors
    /// [`NotRenewed`]; an ended lease stays ended.
    pub fn renew(&self, claim: Claim, lease: Duration, now: Instant) -> Result<(), NotRenewed> {
        let mut shutter = self.lock();
        let pause = shutter.pause.as_mut().ok_or(NotRenewed::Open)?;
        match pause.claim() {
            None => return Err(NotRenewed::Unclaimed),
            Some(owner) if owner != claim => return Err(NotRenewed::Other(owner)),
            Some(_) => {}
        }
        if pause.lease_ends.is_none_or(|end| end <= now) {
            return Err(NotRenewed::Ended);
        }
        pause.lease_ends = Some(now + lease);
        drop(shutter);
        self.moved.notify_waiters();
        Ok(())
    }

    /// Ends the lease at once: what the drain deadline does to a claimed pause, so that the watch decides its epoch.
    pub fn end_lease(&self, id: PauseId, now: Instant) {
        if let Some(pause) = self.lock().pause.as_mut().filter(|pause| pause.id == id) {
            pause.lease_ends = Some(now);
        }
        self.moved.notify_waiters();
    }

    /// Opens the gate, if it is still this pause that holds it; held clients go on in the order in which they came: their
    /// turns say it, since they are woken on several threads.
    pub fn open(&self, id: PauseId) -> bool {
        let mut shutter = self.lock();
        let Some(bit) = shutter.bit(id) else { return false };
        if bit == SHUT {
            shutter.pause = None
        } else {
            shutter.writes = None
        }
        shutter.admitted.clear();
        self.word.fetch_and(!bit, Ordering::AcqRel);
        drop(shutter);
        self.opened.notify_waiters();
        self.moved.notify_waiters();
        true
    }

    /// Lets one held client run one transaction, because the drain waits for a lock that its session owns. Does
    /// nothing once the pause is drained.
    pub fn admit(&self, id: PauseId, client: u64) {
        let mut shutter = self.lock();
        if shutter.bit(id).is_some_and(|bit| self.waited_for(bit) > 0) {
            shutter.admitted.insert(client);
            drop(shutter);
            self.opened.notify_waiters();
        }
    }

    /// Waits until the pause is drained or over. Ended by the transactions' ends, by RESUME, by the lease; the caller
    /// adds the drain deadline. Cancel safe.
    pub async fn drained(&self, id: PauseId) -> Drained {
        loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            let Some(bit) = self.lock().bit(id) else { return Drained::Ended };
            if self.waited_for(bit) == 0 {
                return Drained::Yes;
            }
            moved.await;
        }
    }

    /// The next change of the pause, or of its drain. Enable it before reading the state that it may change.
    pub fn change(&self) -> Notified<'_> {
        self.moved.notified()
    }

    fn admitted(self: &Arc<Self>, client: u64, wants: Wants) -> Option<Pass> {
        let mut shutter = self.lock();
        let word = self.word.load(Ordering::Acquire);
        // Checked under the lock together with the counts: a drained pause admits nobody.
        let writes_drained = word & WRITES != 0 && writers(word) == 0;
        let drained = if word & SHUT != 0 { writers(word) + readers(word) == 0 } else { writes_drained };
        let permits = match wants {
            _ if drained => return None,
            Wants::All if writes_drained => return None,
            Wants::Any if writes_drained => Permits::Reads,
            Wants::Any | Wants::All => Permits::All,
        };
        if !shutter.admitted.remove(&client) {
            return None;
        }
        self.word.fetch_add(if permits == Permits::All { 1 } else { READER }, Ordering::AcqRel);
        Some(Pass { gate: Arc::clone(self), permits })
    }

    fn leave(&self, pass: u64) {
        let now = self.word.fetch_sub(pass, Ordering::AcqRel) - pass;
        if now & (SHUT | WRITES) == 0 {
            return;
        }
        let last_writer = now & WRITES != 0 && pass == 1 && writers(now) == 0;
        if last_writer || (now & SHUT != 0 && writers(now) + readers(now) == 0) {
            self.moved.notify_waiters();
        }
    }

    /// Passes that a pause with this bit waits for.
    fn waited_for(&self, bit: u64) -> u64 {
        if bit == SHUT { self.passes() } else { self.writers() }
    }

    fn lock(&self) -> MutexGuard<'_, Shutter> {
        // Nothing under this lock panics; a poisoned one would still hold a consistent pause.
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shutter {
    /// The bit of a pause that is in force.
    fn bit(&self, id: PauseId) -> Option<u64> {
        let is_it = |pause: &Option<Pause>| pause.as_ref().is_some_and(|pause| pause.id == id);
        match (is_it(&self.pause), is_it(&self.writes)) {
            (true, _) => Some(SHUT),
            (false, true) => Some(WRITES),
            (false, false) => None,
        }
    }
}

fn writers(word: u64) -> u64 {
    word & (READER - 1)
}

fn readers(word: u64) -> u64 {
    (word & !(SHUT | WRITES)) / READER
}

struct Held<'a>(&'a AtomicU32);

impl<'a> Held<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::task::Poll;

    fn plain() -> Intent {
        Intent { owner: "admin@unix".to_owned(), epoch: None, lease: None }
    }

    fn claim(epoch: u64) -> Claim {
        Claim { run: "8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f".parse().unwrap(), epoch: epoch.try_into().unwrap() }
    }

    fn claimed(epoch: u64, lease_ms: u64) -> Intent {
        let epoch = EpochPause { claim: claim(epoch), source: "blue".to_owned(), target: "green".to_owned() };
        Intent { owner: "p".to_owned(), epoch: Some(epoch), lease: Some(Duration::from_millis(lease_ms)) }
    }

    async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|cx| Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await
    }

    #[tokio::test]
    async fn pause_waits_for_open_transactions_and_holds_new_ones() {
        let gate = Arc::new(Gate::default());
        let open = gate.try_enter().unwrap();
        let id = gate.shut(plain(), Instant::now()).unwrap();
        assert!(gate.try_enter().is_none());
        let turn = AtomicU64::new(0);
        let mut held = Box::pin(gate.enter(1, &turn, Wants::Any));
        let mut drained = Box::pin(gate.drained(id));
        assert!(is_pending(&mut held).await && is_pending(&mut drained).await);
        assert_eq!(gate.held(), 1);
        drop(open);
        assert_eq!(drained.await, Drained::Yes);
        assert!(is_pending(&mut held).await);
        assert!(gate.open(id));
        drop(held.await);
        assert_eq!((gate.passes(), gate.held()), (0, 0));
    }

    #[tokio::test]
    async fn resume_ends_a_pause_that_still_drains_and_only_that_one() {
        let gate = Arc::new(Gate::default());
        let _open = gate.try_enter().unwrap();
        let first = gate.shut(plain(), Instant::now()).unwrap();
        let mut drained = Box::pin(gate.drained(first));
        assert!(is_pending(&mut drained).await);
        assert!(gate.open(first));
        let second = gate.shut(plain(), Instant::now()).unwrap();
        assert_eq!(drained.await, Drained::Ended);
        assert!(!gate.open(first), "the first pause can't end the second");
        assert!(gate.is_shut() && gate.open(second));
    }

    #[tokio::test]
    async fn a_run_takes_over_the_watchs_hold_and_the_watch_never_takes_over_a_runs_pause() {
        let gate = Arc::new(Gate::default());
        let start = Instant::now();
        let open = gate.try_enter().unwrap();
        let own = gate.hold(claimed(3, 100), start).unwrap();
        let paused = gate.shut(claimed(3, 100), start).unwrap();
        let mut drained = Box::pin(gate.drained(paused));
        assert!(is_pending(&mut drained).await);
        assert_eq!(gate.hold(claimed(3, 900), start).unwrap_err().id, paused, "as it was");
        drop(open);
        assert_eq!(drained.await, Drained::Yes);
        assert!(!gate.open(own) && gate.open(paused));
    }

    #[test]
    fn an_ended_lease_is_never_revived() {
        let gate = Gate::default();
        let start = Instant::now();
        gate.shut(claimed(3, 100), start).unwrap();
        gate.renew(claim(3), Duration::from_millis(100), start + Duration::from_millis(90)).unwrap();
        let late = start + Duration::from_millis(190);
        assert_eq!(gate.renew(claim(3), Duration::from_millis(100), late), Err(NotRenewed::Ended));
        assert!(gate.shut(claimed(3, 100), late).is_err(), "nor by pausing again");
        assert!(gate.shut(claimed(4, 100), start).is_err(), "nor taken by another epoch");
    }

    #[tokio::test]
    async fn one_held_client_can_be_let_through_until_the_drain_is_over() {
        let gate = Arc::new(Gate::default());
        let open = gate.try_enter().unwrap();
        let id = gate.shut(plain(), Instant::now()).unwrap();
        let turn = AtomicU64::new(0);
        let mut held = Box::pin(gate.enter(1, &turn, Wants::Any));
        let mut other = Box::pin(gate.enter(2, &turn, Wants::Any));
        assert!(is_pending(&mut held).await && is_pending(&mut other).await);
        gate.admit(id, 1);
        assert!(is_pending(&mut other).await);
        drop(held.await);
        drop(open);
        gate.admit(id, 2);
        assert!(is_pending(&mut other).await, "a drained pause admits nobody");
    }

    /// Passes taken and given back from two threads while the gate opens and shuts: a drained gate has no pass out.
    #[test]
    fn no_pass_lives_while_a_pause_is_drained() {
        let gate = Arc::new(Gate::default());
        let inside = Arc::new(AtomicU32::new(0));
        let stop = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (gate, inside, stop) = (Arc::clone(&gate), Arc::clone(&inside), Arc::clone(&stop));
                std::thread::spawn(move || {
                    while stop.load(Ordering::Relaxed) == 0 {
                        if let Some(pass) = gate.try_enter() {
                            inside.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(pass);
                        }
                    }
                })
            })
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for _ in 0..2000 {
            let id = gate.shut(plain(), Instant::now()).unwrap();
            assert_eq!(runtime.block_on(gate.drained(id)), Drained::Yes);
            assert_eq!(inside.load(Ordering::SeqCst), 0);
            assert!(gate.open(id));
        }
        stop.store(1, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[tokio::test]
    async fn a_pause_of_writes_waits_for_what_may_write_and_lets_reads_begin() {
        let gate = Arc::new(Gate::default());
        let open = gate.try_enter().unwrap();
        assert_eq!((open.permits(), open.is_shut()), (Permits::All, false));
        let id = gate.hold_writes(plain(), Instant::now()).unwrap();
        assert!(open.is_shut() && open.is_stale() && !gate.is_shut() && gate.is_paused());
        let mut drained = Box::pin(gate.drained(id));
        let reader = gate.try_enter().unwrap();
        assert_eq!((reader.permits(), reader.is_stale(), gate.passes(), gate.writers()), (Permits::Reads, false, 2, 1));
        let turn = AtomicU64::new(0);
        let mut writer = Box::pin(gate.enter(1, &turn, Wants::All));
        assert!(is_pending(&mut writer).await && is_pending(&mut drained).await);
        drop(open);
        assert_eq!(drained.await, Drained::Yes, "a reader is not waited for");
        assert!(gate.try_enter().is_some() && is_pending(&mut writer).await && reader.renewed().is_none());
        assert!(gate.open(id));
        assert_eq!(writer.await.permits(), Permits::All);
        assert!(reader.is_stale());
        assert_eq!(reader.renewed().unwrap().permits(), Permits::All);
        drop(reader);
        assert_eq!((gate.passes(), gate.held()), (0, 0));
    }

    #[tokio::test]
    async fn a_pause_and_a_pause_of_writes_end_apart() {
        let gate = Arc::new(Gate::default());
        let writes = gate.hold_writes(plain(), Instant::now()).unwrap();
        assert!(gate.pause().is_none() && gate.hold_writes(plain(), Instant::now()).is_err());
        let reader = gate.try_enter().unwrap();
        let all = gate.shut(claimed(1, 100), Instant::now()).unwrap();
        assert!(gate.try_enter().is_none() && reader.is_stale());
        let mut drained = Box::pin(gate.drained(all));
        assert!(is_pending(&mut drained).await, "whoever reads is in a transaction too");
        drop(reader);
        assert_eq!(drained.await, Drained::Yes);
        let turn = AtomicU64::new(0);
        let mut held = Box::pin(gate.enter(1, &turn, Wants::Any));
        assert!(is_pending(&mut held).await && gate.open(all) && !gate.open(all));
        assert_eq!(held.await.permits(), Permits::Reads, "writes are still held");
        assert!(gate.open(writes));
        assert_eq!(gate.try_enter().unwrap().permits(), Permits::All);
        assert_eq!(gate.passes(), 0);
    }

    #[tokio::test]
    async fn a_drained_pause_of_writes_lets_no_writer_through() {
        let gate = Arc::new(Gate::default());
        let open = gate.try_enter().unwrap();
        let id = gate.hold_writes(plain(), Instant::now()).unwrap();
        let turn = AtomicU64::new(0);
        let (mut owner, mut late) =
            (Box::pin(gate.enter(1, &turn, Wants::All)), Box::pin(gate.enter(2, &turn, Wants::All)));
        assert!(is_pending(&mut owner).await && is_pending(&mut late).await);
        gate.admit(id, 1);
        let admitted = owner.await;
        assert_eq!(admitted.permits(), Permits::All);
        gate.admit(id, 2);
        drop((open, admitted));
        assert!(is_pending(&mut late).await, "drained meanwhile");
    }
}
