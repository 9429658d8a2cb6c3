//! Serves one logged-in client until it leaves.
//!
//! Invariant: between transactions a transaction-pooled session owns its client's socket and nothing else; a server
//! connection is only used under a pass. A session is an owned value: at rest it can give up its server connection and
//! take another. What was read from the client is answered or refused, never lost.

mod errand;
mod refuse;
mod resets;
mod wait;
mod writes;

pub use errand::Known;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;

use crate::backend::ServerError;
use crate::client::{Client, Order, State};
use crate::config::PoolMode;
use crate::gate::Permits;
use crate::message;
use crate::metrics::Meter;
use crate::parameters;
use crate::parameters::{Reported, Settings};
use crate::pool::{Kept, Lease, NoServer, Pool, Sharing};
use crate::relay::{Buffer, End, Moved, Overheard, Read, Relay, Statements};
use crate::report::{Report, Severity};
use crate::statements::{Desk, Names};
use crate::stream::Stream;
use crate::tracker::Tracker;

/// How long applying settings or resetting a connection may take.
const OWN_STATEMENT: Duration = Duration::from_secs(5);

/// How long a last word to a client may take.
const LAST_WORD: Duration = Duration::from_secs(1);

/// A logged-in client's session.
pub struct Session {
    /// The client's socket.
    pub stream: Stream,
    /// What others know of the client.
    pub client: Arc<Client>,
    /// Where its server connections come from.
    pub pool: Arc<Pool>,
    /// What it counts with.
    pub meter: Meter,
    /// The settings that it has.
    pub settings: Arc<Settings>,
    /// Those it asked for in its Startup: what RESET takes them back to.
    pub startup: Arc<Settings>,
    /// What it was told of its server.
    pub told: Arc<Reported>,
    /// The route's generation of the server that last told it; 0 if none has served it yet.
    pub told_by: u64,
    /// The worker that runs it.
    pub worker: usize,
    /// Bytes from the client; none at rest.
    pub up: Option<Buffer>,
    /// Bytes from a kept server; none at rest.
    pub down: Option<Buffer>,
    /// A session-pooled client's server connection.
    pub kept: Option<Box<Kept>>,
    /// A transaction-pooled client's named statements; none until it has prepared one.
    pub names: Option<Box<Names>>,
    /// What its texts told since it keeps a server connection.
    pub overheard: Option<Box<Overheard>>,
    /// What it was made of when it was last looked at, if it has said nothing since.
    pub known: Option<Box<Known>>,
}

/// What ends a wait for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// A message that needs a server.
    Statement,
    /// Somebody left an errand.
    Errand,
}

/// How a session ended.
#[derive(Debug)]
pub enum Farewell {
    /// The client said goodbye.
    Terminated,
    /// The client's connection broke.
    ClientGone(io::Error),
    /// The server's connection broke in the middle of things.
    ServerGone(String),
    /// We ended it; the client was told why.
    Refused(Box<Report>),
}

impl Session {
    /// Serves the client. Ended by the client, by a lost server connection, or by an order.
    pub async fn run(&mut self) -> Farewell {
        let farewell = loop {
            let outcome = match std::future::poll_fn(|cx| self.poll_begin(cx)).await {
                Ok(Begun::Statement) => self.transaction().await,
                Ok(Begun::Errand) => Box::pin(self.run_errand()).await,
                Err(farewell) => Err(farewell),
            };
            if let Err(farewell) = outcome {
                break farewell;
            }
        };
        // Boxed: an idle client need not carry its last word.
        Box::pin(self.leave(&farewell)).await;
        farewell
    }

    /// One transaction: pass, server connection, settings, frames.
    async fn transaction(&mut self) -> Result<(), Farewell> {
        let asked_at = Instant::now();
        let Some(lease) = self.lease(asked_at).await? else {
            self.client.enter(State::Idle, Instant::now());
            return Ok(());
        };
        let begun_at = Instant::now();
        self.meter.wait(micros(begun_at - asked_at));
        self.meter.server_assignment();
        if let Some(known) = self.known.as_mut() {
            known.spoken();
        }
        // Boxed, with all that a transaction needs and an idle client does not.
        let outcome = Box::pin(self.relay(lease, begun_at)).await;
        let ended_at = Instant::now();
        // A kept server stays linked: its client's cancels are its own affair, and it is listed as a blocker.
        if self.client.who.pool_mode == PoolMode::Transaction {
            self.client.unlink();
        }
        self.client.enter(State::Idle, ended_at);
        let (lease, end, moved) = outcome?;
        self.count(moved, micros(ended_at - begun_at));
        // What the server says beside its answers is in the buffer: then it waits for the next transaction's end.
        let mut lease = lease;
        if matches!(end, End::Rest) && self.down.is_none() && self.overheard.is_some() {
            Box::pin(self.start_again(&mut lease)).await?;
        }
        self.finish(lease, end)
    }

    /// A server connection under a pass; `None` when the statement was refused and the client goes on.
    async fn lease(&mut self, asked_at: Instant) -> Result<Option<Lease>, Farewell> {
        loop {
            let pass = match self.pool.site.gate.try_enter() {
                Some(pass) if pass.permits() == Permits::All => pass,
                entered => match Box::pin(self.admission(entered, asked_at)).await? {
                    Some(pass) => pass,
                    None => return Ok(None),
                },
            };
            if self.is_stray() {
                // Its copy is on its way, or there is none.
                Box::pin(self.run_errand()).await?;
                if self.is_stray() {
                    return Err(Farewell::Refused(Box::new(Report::admin_shutdown())));
                }
            }
            if self.is_dressed_otherwise(pass.permits()) {
                Box::pin(self.dress(pass.permits())).await?;
            }
            if let Some(kept) = self.kept.take() {
                return Ok(Some(kept.begin(pass)));
            }
            let pool = Arc::clone(&self.pool);
            let turn = self.client.take_turn();
            match Box::pin(self.waited(pool.checkout(pass, turn, self.worker))).await? {
                Some(Ok(mut lease)) => {
                    if let Some(pass) = lease.pass.renewed() {
                        lease.pass = pass;
                    }
                    return Ok(Some(lease));
                }
                Some(Err(NoServer::Shut)) => {}
                Some(Err(NoServer::Refused(report))) => {
                    Box::pin(self.refuse(report)).await?;
                    return Ok(None);
                }
                None => return Ok(None),
            }
        }
    }

    /// Makes the connection fit the client, then moves frames until the end.
    async fn relay(&mut self, mut lease: Lease, begun_at: Instant) -> Result<(Lease, End, Moved), Farewell> {
        // A kept server may have been in the middle of a message to its client.
        let mut down = self.down.take().unwrap_or_else(Buffer::take);
        if let Err(error) = self.fit(&mut lease, &mut down).await {
            lease.close();
            return Err(error);
        }
        // From here on a cancel finds the server, and hits no statement of ours. In this order: one that finds the client
        // active finds its server too.
        self.client.link(&lease.pooled.shared);
        lease.pooled.shared.begin();
        self.client.enter(State::Active, begun_at);
        if self.client.take(Order::Cancel) && self.cancelled(&mut down).await? {
            return Ok((lease, End::Rest, Moved::default()));
        }
        let mut up = self.up.take().unwrap_or_else(Buffer::take);
        let prepared_max = self.pool.site.config.load().general.max_prepared_statements as usize;
        let Lease { pooled, pass, .. } = &mut lease;
        let pooled = &mut **pooled;
        let mut relay = Relay {
            client: &mut self.stream,
            up: &mut up,
            server: &mut pooled.server.stream,
            down: &mut down,
            tracker: &mut pooled.tracker,
            shut: pass,
            statements: match self.client.who.pool_mode {
                PoolMode::Session => Statements::Kept,
                PoolMode::Transaction => Statements::Shared(Desk::new(
                    &mut self.names,
                    &mut pooled.shelf,
                    &self.pool.site.statements,
                    &self.settings,
                    prepared_max,
                )),
            },
            overheard: match self.client.who.pool_mode {
                PoolMode::Session => Some(self.overheard.get_or_insert_default()),
                PoolMode::Transaction => None,
            },
            advice: writes::advice(pass.permits(), &self.pool.site.gate),
            reported: Vec::new(),
            moved: Moved::default(),
        };
        let client = &self.client;
        // A replication stream has no end that one could wait for.
        let ends: &[Order] = if client.who.replicates() { &[Order::Kill, Order::Leave] } else { &[Order::Kill] };
        let end = std::future::poll_fn(|cx| match client.poll_order(cx, ends) {
            Poll::Ready(_) => Poll::Ready(End::Refused(Box::new(Report::admin_shutdown()))),
            Poll::Pending => relay.poll(cx),
        })
        .await;
        let (reported, moved) = (std::mem::take(&mut relay.reported), relay.moved);
        let (counts, has_reset) = (relay.part(), relay.has_reset());
        self.meter.parses(counts.client_parses, counts.server_parses);
        self.meter.binds(counts.binds);
        self.client.prepared.store(self.names.as_ref().map_or(0, |names| names.len()), Ordering::Relaxed);
        pooled.shared.prepared.store(pooled.shelf.len(), Ordering::Relaxed);
        if !reported.is_empty() {
            self.follow(&mut lease, &reported);
        }
        if has_reset {
            lease.pooled.is_reset = true;
            self.settings = Arc::new(self.settings.completed(&self.startup));
        }
        if !up.is_empty() {
            self.up = Some(up);
        }
        if !down.is_empty() {
            self.down = Some(down);
        }
        Ok((lease, end, moved))
    }

    /// Answers a statement that was cancelled before it reached the server; `false` if that can't be, since something else
    /// is half through.
    async fn cancelled(&mut self, down: &mut Buffer) -> Result<bool, Farewell> {
        while down.has_cleared() {
            std::future::poll_fn(|cx| down.poll_write(&mut self.stream, cx)).await.map_err(Farewell::ClientGone)?;
        }
        if !down.is_empty() {
            return Ok(false);
        }
        self.refuse(Box::new(Report::query_canceled())).await?;
        Ok(true)
    }

    /// Applies the client's settings to the server connection and tells the client what is different there.
    async fn fit(&mut self, lease: &mut Lease, down: &mut Buffer) -> Result<(), Farewell> {
        let permits = lease.pass.permits();
        let pooled = &mut *lease.pooled;
        // A session that keeps its server is moved whole, or not at all.
        let shares = self.client.who.pool_mode == PoolMode::Transaction;
        let moved = shares && self.told_by != 0 && self.told_by != pooled.generation;
        self.told_by = pooled.generation;
        if moved && let Some(carried) = self.settings.carried(&self.told, &pooled.initial) {
            self.settings = Arc::new(carried);
        }
        let dress = self.dress_for(permits);
        let wanted = dress.as_ref().unwrap_or(&self.settings);
        if pooled.is_reset || !Arc::ptr_eq(&pooled.applied, wanted) {
            let query = if pooled.is_reset { Some(wanted.query_from_start()) } else { pooled.applied.query_to(wanted) };
            if let Some(query) = query {
                let deadline = tokio::time::Instant::now() + OWN_STATEMENT;
                // Not UTF-8: the server answers what it thinks of it.
                let query = String::from_utf8_lossy(&query);
                pooled.server.simple(&query, deadline).await.map_err(|error| self.unfit(&error))?;
                pooled.reported = Arc::new(self.own_view(pooled, &pooled.server.parameters));
            }
            (pooled.applied, pooled.is_reset) = (Arc::clone(wanted), false);
        }
        if !Arc::ptr_eq(&pooled.reported, &self.told) {
            let mut news = BytesMut::new();
            for (name, value) in parameters::differences(&self.told, &pooled.reported) {
                message::put_parameter_status(&mut news, name, value);
            }
            if !down.append(&news) {
                self.stream.write_all(&news).await.map_err(Farewell::ClientGone)?;
            }
            self.told = Arc::clone(&pooled.reported);
        }
        Ok(())
    }

    /// Why a server connection could not be made to fit. One that broke is not the client's doing: nothing of its transaction
    /// was sent.
    fn unfit(&self, error: &ServerError) -> Farewell {
        match error {
            ServerError::Refused { .. } => Farewell::Refused(Box::new(Report::settings_refused(&error.to_string()))),
            ServerError::Broken(_) | ServerError::Timeout => {
                self.pool.site.events.servers_lost.count();
                Farewell::ServerGone(error.to_string())
            }
        }
    }

    /// Takes note of settings that changed while the client was served.
    fn follow(&mut self, lease: &mut Lease, reported: &[message::Pair]) {
        let worn = self.is_still_worn(lease.pass.permits(), reported);
        let pooled = &mut *lease.pooled;
        pooled.note(reported);
        let mut settings = Settings::clone(&self.settings);
        for (name, value) in writes::own(lease.pass.permits(), reported) {
            settings.follow(&pooled.initial, name, value);
            if name.eq_ignore_ascii_case(b"application_name") {
                self.client.rename(&String::from_utf8_lossy(value));
            }
        }
        self.settings = Arc::new(settings);
        pooled.applied = if worn { Arc::new(self.settings.read_only()) } else { Arc::clone(&self.settings) };
        self.told = Arc::clone(&pooled.reported);
    }

    fn finish(&mut self, lease: Lease, end: End) -> Result<(), Farewell> {
        let keeps = self.client.who.pool_mode == PoolMode::Session;
        let farewell = match end {
            End::Rest => None,
            End::Terminated => Some(Farewell::Terminated),
            End::ClientGone(error) => Some(Farewell::ClientGone(error)),
            End::Refused(report) => Some(Farewell::Refused(report)),
            End::Spoiled(report) => {
                lease.close();
                return Err(Farewell::Refused(report));
            }
            End::ServerGone(error) => {
                self.pool.site.events.servers_lost.count();
                lease.close();
                return Err(Farewell::ServerGone(error.to_string()));
            }
            End::ServerNonsense(what) => {
                lease.close();
                return Err(Farewell::ServerGone(what));
            }
        };
        // Said after its last answer: for a client that keeps the server; to the next one it would be a stranger's.
        let said_more = !keeps && self.down.take().is_some();
        let rests = lease.pooled.tracker.at_rest() && !said_more;
        match (rests, keeps) {
            (true, true) => self.kept = Some(Box::new(lease.keep())),
            (true, false) => lease.rest(),
            (false, _) => lease.close(),
        }
        farewell.map_or(Ok(()), Err)
    }

    fn count(&self, moved: Moved, duration_us: u64) {
        self.meter.received(moved.up_bytes);
        self.meter.sent(moved.down_bytes);
        self.meter.xact(duration_us);
        self.meter.queries(moved.queries, duration_us);
    }

    /// Waits until a statement begins. Owns no buffer while nothing has come.
    fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<Result<Begun, Farewell>> {
        // A cancel that comes at rest is about nothing.
        self.client.forget(Order::Cancel);
        match self.client.poll_order(cx, &[Order::Kill, Order::Leave, Order::Errand]) {
            Poll::Ready(Order::Errand) => return Poll::Ready(Ok(Begun::Errand)),
            Poll::Ready(Order::Kill | Order::Leave | Order::Cancel) => {
                return Poll::Ready(Err(Farewell::Refused(Box::new(Report::admin_shutdown()))));
            }
            Poll::Pending => {}
        }
        if let Err(farewell) = self.poll_gossip(cx) {
            return Poll::Ready(Err(farewell));
        }
        loop {
            if let Some(first) = self.first_message() {
                return Poll::Ready(first.map(|()| Begun::Statement));
            }
            if self.up.is_none() {
                std::task::ready!(self.stream.poll_readable(cx)).map_err(Farewell::ClientGone)?;
            }
            let up = self.up.get_or_insert_with(Buffer::take);
            match up.poll_read(&mut self.stream, cx) {
                Poll::Ready(Ok(Read::Some | Read::Full)) => {}
                Poll::Ready(Ok(Read::End)) => {
                    return Poll::Ready(Err(Farewell::ClientGone(io::ErrorKind::UnexpectedEof.into())));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Farewell::ClientGone(error))),
                Poll::Pending => {
                    if up.is_empty() {
                        self.up = None;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Whether a message that needs a server has begun. What a server at rest would ignore is dropped here.
    fn first_message(&mut self) -> Option<Result<(), Farewell>> {
        let up = self.up.as_mut()?;
        loop {
            let header = match up.next_header() {
                Ok(Some(header)) => header,
                Ok(None) => return None,
                Err(error) => return Some(Err(violation(error.to_string()))),
            };
            match header.tag {
                b'Q' | b'F' | b'S' | b'P' | b'B' | b'D' | b'E' | b'C' | b'H' => return Some(Ok(())),
                b'd' | b'c' | b'f' => up.discard(header),
                b'X' => return Some(Err(Farewell::Terminated)),
                other => return Some(Err(violation(format!("invalid frontend message type {other}")))),
            }
        }
    }

    /// Passes on what a kept server says at rest: notices, notifications, settings, its end.
    fn poll_gossip(&mut self, cx: &mut Context<'_>) -> Result<(), Farewell> {
        loop {
            let Some(kept) = self.kept.as_mut() else { return Ok(()) };
            if let Some(down) = self.down.as_mut() {
                if clear_gossip(down, &mut kept.pooled.tracker)? == Gossip::Settings
                    && let Some(known) = self.known.as_mut()
                {
                    known.spoken();
                }
                match down.poll_write(&mut self.stream, cx) {
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(error)) => return Err(Farewell::ClientGone(error)),
                    Poll::Pending => return Ok(()),
                }
                if down.is_empty() {
                    self.down = None;
                }
            }
            let server = &mut kept.pooled.server.stream;
            if server.poll_readable(cx).is_pending() {
                return Ok(());
            }
            match self.down.get_or_insert_with(Buffer::take).poll_read(server, cx) {
                Poll::Ready(Ok(Read::Some | Read::Full)) => {}
                Poll::Ready(Ok(Read::End)) => return Err(Farewell::ServerGone("closed at rest".to_owned())),
                Poll::Ready(Err(error)) => return Err(Farewell::ServerGone(error.to_string())),
                Poll::Pending => return Ok(()),
            }
        }
    }

    /// The last word to the client, and what becomes of a kept server connection.
    async fn leave(&mut self, farewell: &Farewell) {
        let last_word = match farewell {
            Farewell::Terminated | Farewell::ClientGone(_) => None,
            Farewell::ServerGone(_) => Some(Report::server_connection_lost()),
            Farewell::Refused(report) => Some(Report { severity: Severity::Fatal, ..(**report).clone() }),
        };
        if let Some(report) = last_word {
            let mut bytes = BytesMut::new();
            report.encode(&mut bytes);
            // The client may be gone already; then there is nobody to tell.
            let _ = tokio::time::timeout(LAST_WORD, self.stream.write_all(&bytes)).await;
            let _ = tokio::time::timeout(LAST_WORD, self.stream.shutdown()).await;
        }
        self.client.unlink();
        // Whoever left an errand need not wait for it.
        drop(self.pool.site.errands.take(self.client.who.id));
        let Some(mut kept) = self.kept.take() else { return };
        if matches!(farewell, Farewell::ServerGone(_)) || kept.sharing() == Sharing::OneToOne {
            return kept.close();
        }
        let reset = self.pool.site.config.load().general.server_reset_query.clone();
        let deadline = tokio::time::Instant::now() + OWN_STATEMENT;
        // A reset need not take back what is not the client's.
        let undress = kept.pooled.applied.query_to(&self.settings);
        let mut outcome = Ok(Vec::new());
        for query in undress.iter().map(|query| String::from_utf8_lossy(query)).chain([reset.into()]) {
            if outcome.is_ok() {
                outcome = kept.pooled.server.simple(&query, deadline).await;
            }
        }
        match outcome {
            Ok(_) => {
                kept.pooled.reported = Arc::new(kept.pooled.server.parameters.clone());
                kept.pooled.applied = Arc::new(Settings::default());
                kept.pooled.shelf.clear();
                kept.rest();
            }
            Err(_) => kept.close(),
        }
    }
}

/// What a server said at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gossip {
    /// Nothing that changes its session.
    Idle,
    /// Another value of a setting.
    Settings,
}

/// Clears messages that came from a server at rest.
fn clear_gossip(down: &mut Buffer, tracker: &mut Tracker) -> Result<Gossip, Farewell> {
    let mut gossip = Gossip::Idle;
    loop {
        match down.next_header() {
            Ok(None) => return Ok(gossip),
            Ok(Some(header)) => {
                if header.tag == b'S' {
                    gossip = Gossip::Settings;
                }
                tracker.backend(header.tag, 0);
                down.send(header);
            }
            Err(error) => return Err(Farewell::ServerGone(error.to_string())),
        }
    }
}

fn violation(what: String) -> Farewell {
    Farewell::Refused(Box::new(Report::protocol_violation(what)))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
