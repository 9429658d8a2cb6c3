//! Errands: what a session does with the server connection that it keeps when a cutover asks for it.
//!
//! Invariant: an errand runs between two transactions, and only where a message to the client is not half through; what
//! the server says aside is passed on. A session goes on with a successor, or with what it had, never with neither.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;

use crate::backend::{Asides, Batch};
use crate::client::Order;
use crate::frame;
use crate::gate::Permits;
use crate::message;
use crate::pool::{Errand, Probed, Successor};
use crate::relay::{Hazard, Overheard, Parsing};
use crate::report::Report;
use crate::session::{Farewell, Session};
use crate::transplant;
use crate::transplant::{Hints, LockCalls, NotMovable, ParseSettings, Reason, Seen, Snapshot, Survey};

/// How long reading a session may take.
const PROBE: Duration = Duration::from_millis(700);

/// How long a client may take to read what its server had said before.
const QUIET: Duration = Duration::from_millis(300);

/// The longest message kept aside that is looked into.
const ASIDE_BYTES_MAX: usize = 1 << 20;

/// What a session is made of, as it was last read.
#[derive(Debug)]
pub struct Known {
    survey: Arc<Survey>,
    snapshot: Arc<Snapshot>,
    /// Whether the session has said nothing since.
    silent: bool,
}

impl Known {
    /// The session says something.
    pub(super) fn spoken(&mut self) {
        self.silent = false;
    }
}

impl Session {
    /// Runs the errand that was left, if it still is. Bounded.
    pub(super) async fn run_errand(&mut self) -> Result<(), Farewell> {
        self.client.forget(Order::Errand);
        match self.pool.site.errands.take(self.client.who.id) {
            None => Ok(()),
            Some(Errand::Probe { survey, answer }) => {
                if let Some(known) = self.known.as_ref().filter(|known| known.silent && known.survey == survey) {
                    // Whoever asked may have given up.
                    let _ = answer.send(Probed { session: Ok(Arc::clone(&known.snapshot)), took: Duration::ZERO });
                    return Ok(());
                }
                let began = Instant::now();
                let Some(session) = self.probe(&survey).await? else { return Ok(()) };
                if let Ok(snapshot) = &session {
                    self.known = Some(Box::new(Known { survey, snapshot: Arc::clone(snapshot), silent: true }));
                }
                // Whoever asked may have given up.
                let _ = answer.send(Probed { session, took: began.elapsed() });
                Ok(())
            }
            Some(Errand::Adopt { successor, answer }) => {
                self.adopt(successor).await?;
                // Whoever asked may have given up.
                let _ = answer.send(());
                Ok(())
            }
        }
    }

    /// Whether it keeps a connection to a backend that traffic has left, which it must not use any more.
    pub(super) fn is_stray(&self) -> bool {
        let Some(kept) = &self.kept else { return false };
        kept.pooled.shared.backend != self.pool.site.route.active().backend
    }

    async fn probe(&mut self, survey: &Arc<Survey>) -> Result<Option<Result<Arc<Snapshot>, NotMovable>>, Farewell> {
        if self.kept.is_none() {
            return Ok(None);
        }
        if !self.quiet().await? {
            return Ok(Some(Err(NotMovable::from(Reason::InTransaction))));
        }
        // It is read as its client has made it.
        self.dress(Permits::All).await?;
        let hints = self.hints(survey);
        let Some(kept) = self.kept.as_mut() else { return Ok(None) };
        let deadline = tokio::time::Instant::now() + PROBE;
        let before = self.known.as_ref().map(|known| &*known.snapshot);
        let outcome = Box::pin(transplant::probe(&mut kept.pooled.server, &hints, before, deadline)).await;
        self.pass_on_asides().await?;
        let session = outcome.map_err(|error| Farewell::ServerGone(error.to_string()))?;
        if let (Ok(snapshot), Some(overheard)) = (&session, self.overheard.as_mut())
            && !snapshot.holds_locks()
        {
            overheard.holds_no_locks();
        }
        Ok(Some(session.map(Arc::new)))
    }

    /// Takes the successor over. What the former connection still had to say is passed on before it closes.
    async fn adopt(&mut self, successor: Successor) -> Result<(), Farewell> {
        self.known = None;
        let Some(next) = successor.into_kept(self.worker) else { return Ok(()) };
        let quiet = self.quiet().await?;
        if let Some(former) = self.kept.as_mut() {
            let deadline = tokio::time::Instant::now() + PROBE;
            // For what comes aside: notifications sent before the switch. The server may be gone; the session is not.
            let mut nothing = Batch::default();
            nothing.sync();
            let heard = Box::pin(former.pooled.server.converse(nothing, Asides::All, deadline)).await;
            if let Err(error) = heard {
                tracing::warn!(client = self.client.who.id, %error, "the former server said nothing more");
            }
            self.pass_on_asides().await?;
        }
        self.client.relink(&next.pooled.shared);
        if let Some(former) = self.kept.replace(Box::new(next)) {
            former.leave();
        }
        if let Some(kept) = self.kept.as_mut() {
            // Restored with the rest of the session.
            kept.pooled.applied = Arc::clone(&self.settings);
        }
        if !quiet {
            // A message of the former server is half through: nothing can follow it.
            return Err(Farewell::Refused(Box::new(Report::admin_shutdown())));
        }
        self.pass_on_asides().await
    }

    /// Passes on what the server has said so far; whether nothing of it is left.
    pub(super) async fn quiet(&mut self) -> Result<bool, Farewell> {
        let silence = std::future::poll_fn(|cx| {
            if let Err(farewell) = self.poll_gossip(cx) {
                return std::task::Poll::Ready(Err(farewell));
            }
            if self.down.as_ref().is_some_and(|down| !down.is_empty()) {
                return std::task::Poll::Pending;
            }
            self.down = None;
            std::task::Poll::Ready(Ok(()))
        });
        match tokio::time::timeout(QUIET, silence).await {
            Ok(outcome) => outcome.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Passes on what came aside during statements of ours, and remembers settings among it.
    pub(super) async fn pass_on_asides(&mut self) -> Result<(), Farewell> {
        let Some(kept) = self.kept.as_mut() else { return Ok(()) };
        let asides = std::mem::take(&mut kept.pooled.server.asides);
        if asides.is_empty() {
            return Ok(());
        }
        let reported = settings_in(&asides);
        if !reported.is_empty() {
            kept.pooled.note(&reported);
            let mut told = (*self.told).clone();
            reported.iter().for_each(|(name, value)| crate::parameters::report(&mut told, name, value));
            self.told = Arc::new(told);
        }
        self.tell(&asides).await
    }

    /// Passes on what a server has said aside. Ended by a client that does not read.
    pub(super) async fn tell(&mut self, asides: &[u8]) -> Result<(), Farewell> {
        let written = tokio::time::timeout(QUIET, self.stream.write_all(asides)).await;
        let written = written.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        written.map_err(Farewell::ClientGone)
    }

    /// What no server can say of this session.
    fn hints(&self, survey: &Arc<Survey>) -> Hints {
        let silent = Overheard::default();
        let overheard = self.overheard.as_deref().unwrap_or(&silent);
        let asked = self.settings.names().filter(|name| name.contains(&b'.'));
        // Names that were heard are all names only where none was made at run time: the prober takes a list for complete.
        let complete =
            !overheard.hazards().any(|h| h == Hazard::DynamicSetting) && !survey.forbids(Reason::DynamicSetting);
        let names = overheard.names().chain(asked).filter(|_| complete);
        Hints {
            custom_settings: names.map(Into::into).collect(),
            survey: Arc::clone(survey),
            seen: Seen {
                reasons: overheard.hazards().map(reason).collect(),
                parse_settings: match overheard.parsing() {
                    Parsing::Nothing | Parsing::Settled => ParseSettings::Unchanged,
                    Parsing::Unsettled => ParseSettings::Changed,
                },
                lock_calls: overheard.lock_calls().map_or(LockCalls::Unclear, LockCalls::Counted),
                unnamed: overheard.unnamed().map(Into::into),
            },
        }
    }
}

fn reason(hazard: Hazard) -> Reason {
    match hazard {
        Hazard::Load => Reason::Load,
        Hazard::SessionAuthorization => Reason::SessionAuthorization,
        Hazard::FunctionCall => Reason::FunctionCall,
        Hazard::RandomSeed => Reason::RandomSeed,
        Hazard::DynamicSetting => Reason::DynamicSetting,
        Hazard::Unread => Reason::TooLarge,
    }
}

/// The settings among messages that came aside.
pub(super) fn settings_in(asides: &BytesMut) -> Vec<message::Pair> {
    let mut rest = &asides[..];
    let mut settings = Vec::new();
    while let Ok(Some(frame)) = frame::next(rest, ASIDE_BYTES_MAX) {
        if frame.tag == b'S'
            && let Ok((name, value)) = message::parameter_status(frame.body)
        {
            settings.push((name.into(), value.into()));
        }
        rest = &rest[frame.len_bytes()..];
    }
    settings
}
