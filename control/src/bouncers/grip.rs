//! A PgBouncer in its keeper's hand: its console, the PAUSE for an epoch, and the settings that are eased meanwhile.
//!
//! Invariant: a note is on disk before PAUSE is sent, and says whom it is for; "drained" is said only while no server
//! connection is left.

use std::time::{Duration, Instant};

use pgcutover_api::epoch::Claim;
use pgcutover_api::store::Identity;
use tokio::task::JoinHandle;

use crate::bouncers::console::{Already, Blocker, Console, ConsoleError};
use crate::bouncers::note::{Note, Noted, Post};
use crate::clusters::ClusterError;
use crate::config::Config;
use crate::config::members::{Address, BouncerEntry};

/// Held clients are shed after this, as the proxies do, unless PgBouncer does it later anyway.
const HOLD_SECONDS: f64 = 15.0;
/// How soon PgBouncer tries a login again that failed.
const RETRY: &str = "server_login_retry";
/// How long its clients wait for a server.
const PATIENCE: &str = "query_wait_timeout";
/// Whether a session's server is closed at the end of its transaction if it is to be closed, and not with the session.
const FAST_CLOSE: &str = "server_fast_close";
/// How long after a hold logins may still fail for its sake.
const EASED: Duration = Duration::from_secs(2);

/// Why a look came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    Store(#[from] ClusterError),
    #[error("{0}")]
    Other(String),
}

impl Trouble {
    pub(super) fn is_away(&self) -> bool {
        matches!(self, Trouble::Console(ConsoleError::Away(_)))
    }
}

/// One PgBouncer and what is done to it.
pub(super) struct Grip {
    pub(super) entry: BouncerEntry,
    lease: Duration,
    drain: Duration,
    note: Note,
    console: Option<Console>,
    hold: Option<Hold>,
    /// Whose a PAUSE is that is there already.
    found: Already,
    /// Settings as they were before a hold, and from when on they may be so again.
    eased: Option<(Instant, Vec<(String, String)>)>,
}

/// Everybody held for one epoch, or about to be.
pub(super) struct Hold {
    pub(super) claim: Claim,
    /// System identifier and timeline of the server that it was paused on.
    pub(super) source: Option<(u64, Option<u32>)>,
    pub(super) lease_ends: Instant,
    pub(super) drain_ends: Instant,
    pause: Pause,
}

enum Pause {
    /// Under way, on a connection of its own.
    Waits(JoinHandle<Result<Console, ConsoleError>>),
    /// No server connection is left.
    Drained,
    /// Not sent yet; or PgBouncer went away, or somebody resumed it: to be sent again.
    Failed,
    /// An operator had paused it: that pause is not ours to end, and proves nothing.
    Foreign,
}

/// What R14 compares.
pub(super) fn marks(identity: &Identity) -> (u64, Option<u32>) {
    (identity.system_identifier, identity.timeline)
}

impl Grip {
    /// Nothing is connected or read yet.
    pub(super) fn new(config: &Config, entry: &BouncerEntry) -> Grip {
        Grip {
            lease: config.budgets.lease,
            drain: config.budgets.drain,
            note: Note::of(&config.journal_dir, &entry.name),
            entry: entry.clone(),
            console: None,
            hold: None,
            found: Already::Foreign,
            eased: None,
        }
    }

    /// Takes the post, and up again what a keeper that died has left held.
    pub(super) fn take_post(&mut self, config: &Config) -> Result<Post, String> {
        let post = Post::take(&config.journal_dir, &self.entry.name)?;
        let Some(noted) = self.note.read()? else { return Ok(post) };
        let now = Instant::now();
        if let Some(claim) = noted.claim {
            tracing::warn!(pgbouncer = %self.entry.name, %claim, "was held by a keeper that died");
            let (lease_ends, drain_ends) = (now + self.lease, now + self.drain);
            let source = noted.source;
            self.hold = Some(Hold { claim, source, lease_ends, drain_ends, pause: Pause::Failed });
            self.found = Already::Ours;
        }
        self.eased = Some((now, noted.settings));
        Ok(post)
    }

    /// Whether a keeper that died has left it held: then nothing is reason enough not to take it up.
    pub(super) fn was_left_held(&self) -> bool {
        self.note.read().is_ok_and(|noted| noted.is_some_and(|noted| noted.claim.is_some()))
    }

    pub(super) fn hold(&self) -> Option<&Hold> {
        self.hold.as_ref()
    }

    /// Nobody is held, and the settings are as they were.
    pub(super) fn is_off(&self) -> bool {
        self.hold.is_none() && self.eased.is_none()
    }

    pub(super) fn is_drained(&self) -> bool {
        self.hold.as_ref().is_some_and(|hold| matches!(hold.pause, Pause::Drained))
    }

    /// The lease lasts until then, if not longer already.
    pub(super) fn renewed(&mut self, ago: Duration, now: Instant) {
        if let (Some(hold), Some(ends)) = (&mut self.hold, (now + self.lease).checked_sub(ago)) {
            hold.lease_ends = hold.lease_ends.max(ends);
        }
    }

    /// Where the database points.
    pub(super) async fn pointed(&mut self) -> Result<Address, Trouble> {
        let name = self.entry.database.clone();
        Ok(self.console().await?.pointed(&name).await?.address)
    }

    pub(super) async fn reload(&mut self) -> Result<(), Trouble> {
        Ok(self.console().await?.reload().await?)
    }

    /// Who keeps a PAUSE waiting, as far as it says.
    pub(super) async fn blockers(&mut self) -> Vec<Blocker> {
        match self.console().await {
            Ok(console) => console.blockers().await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    async fn console(&mut self) -> Result<&Console, Trouble> {
        let open = match self.console.take() {
            Some(console) if !console.is_closed() => console,
            Some(_) | None => {
                self.forget_pause();
                Console::open(&self.entry.endpoint).await?
            }
        };
        Ok(self.console.insert(open))
    }

    /// It went away, or does not answer: what is connected is not to be trusted, and one that comes back comes back open.
    pub(super) fn lost(&mut self) {
        self.console = None;
        self.forget_pause();
    }

    fn forget_pause(&mut self) {
        let Some(hold) = &mut self.hold else { return };
        if let Pause::Waits(task) = std::mem::replace(&mut hold.pause, Pause::Failed) {
            task.abort();
        }
    }

    /// Holds everybody for an epoch on this server; one that was held for an earlier epoch goes on being held.
    pub(super) async fn take(&mut self, claim: Claim, source: Option<&Identity>) -> Result<(), Trouble> {
        tracing::info!(pgbouncer = %self.entry.name, %claim, "holding");
        let now = Instant::now();
        let pause = self.hold.take().map_or(Pause::Failed, |hold| hold.pause);
        let (lease_ends, drain_ends) = (now + self.lease, now + self.drain);
        self.hold = Some(Hold { claim, source: source.map(marks), lease_ends, drain_ends, pause });
        if let Some((_, settings)) = &self.eased {
            let settings = settings.clone();
            self.note_down(settings)?;
        }
        self.press().await
    }

    /// Looks after PAUSE: whether it is answered, whether it still holds; and sends it where it does not.
    pub(super) async fn press(&mut self) -> Result<(), Trouble> {
        let pressed = self.pressed().await;
        if pressed.as_ref().is_err_and(Trouble::is_away) {
            self.lost();
        }
        pressed
    }

    async fn pressed(&mut self) -> Result<(), Trouble> {
        self.answered().await?;
        if self.is_drained() && !self.console().await?.is_empty().await? {
            tracing::warn!(pgbouncer = %self.entry.name, "somebody resumed it: holding again");
            self.forget_pause();
        }
        if self.hold.as_ref().is_some_and(|hold| matches!(hold.pause, Pause::Failed)) {
            self.pause().await?;
        }
        Ok(())
    }

    /// Whether a PAUSE that was sent is answered.
    async fn answered(&mut self) -> Result<(), Trouble> {
        let Some(hold) = &mut self.hold else { return Ok(()) };
        let Pause::Waits(task) = &mut hold.pause else { return Ok(()) };
        if !task.is_finished() {
            return Ok(());
        }
        let answer = task.await;
        hold.pause = Pause::Failed;
        match answer.map_err(|error| Trouble::Other(error.to_string()))? {
            Ok(_) => hold.pause = Pause::Drained,
            Err(ConsoleError::Refused { words, .. }) => {
                hold.pause = Pause::Foreign;
                self.found = Already::Foreign;
                self.unclaim()?;
                return Err(Trouble::Other(format!("it can't be paused: {words}")));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), Trouble> {
        let before = match self.eased.take() {
            Some((_, before)) => before,
            None => self.settings().await?,
        };
        self.note_down(before)?;
        self.ease().await?;
        let console = Console::open(&self.entry.endpoint).await?;
        if let Some(hold) = &mut self.hold {
            hold.pause = Pause::Waits(tokio::spawn(console.pause(self.found)));
            self.found = Already::Ours;
            // One that came back in the pause has clients of its own to wait for.
            hold.drain_ends = Instant::now() + self.drain;
        }
        Ok(())
    }

    async fn settings(&mut self) -> Result<Vec<(String, String)>, Trouble> {
        let console = self.console().await?;
        let mut settings = Vec::new();
        for key in [RETRY, PATIENCE, FAST_CLOSE] {
            settings.push((key.to_owned(), console.setting(key).await?));
        }
        Ok(settings)
    }

    fn note_down(&mut self, settings: Vec<(String, String)>) -> Result<(), Trouble> {
        let (claim, source) = (self.hold.as_ref().map(|hold| hold.claim), self.hold.as_ref().and_then(|h| h.source));
        let written = self.note.write(&Noted { claim, source, settings: settings.clone() });
        self.eased = Some((Instant::now(), settings));
        written.map_err(Trouble::Other)
    }

    /// The next keeper finds no hold, but what is to be set back.
    fn unclaim(&mut self) -> Result<(), Trouble> {
        let settings = self.eased.as_ref().map(|(_, settings)| settings.clone()).unwrap_or_default();
        self.note.write(&Noted { claim: None, source: None, settings }).map_err(Trouble::Other)
    }

    /// A cancel or a login that fails in the pause must not cost clients their connections after it, nor waiting itself.
    pub(super) async fn ease(&mut self) -> Result<(), Trouble> {
        let console = self.console().await?;
        console.set(RETRY, "0").await?;
        let patience: f64 = console.setting(PATIENCE).await?.parse().unwrap_or_default();
        // 0 is for ever.
        if patience > 0.0 && patience < HOLD_SECONDS {
            console.set(PATIENCE, &HOLD_SECONDS.to_string()).await?;
        }
        Ok(())
    }

    /// Sessions that PAUSE could not wait for lose their old server at the end of their transaction: they would read there, what
    /// nobody writes any more, for as long as they last.
    pub(super) async fn close_fast(&mut self) -> Result<(), Trouble> {
        Ok(self.console().await?.set(FAST_CLOSE, "1").await?)
    }

    /// RESUME on this connection, then whatever still waits in PAUSE on the other is dropped.
    pub(super) async fn let_go(&mut self) -> Result<(), Trouble> {
        let foreign = self.hold.as_ref().is_some_and(|hold| matches!(hold.pause, Pause::Foreign));
        if !foreign {
            self.console().await?.resume().await?;
        }
        self.forget_pause();
        self.hold = None;
        self.found = Already::Foreign;
        if let Some((when, _)) = &mut self.eased {
            *when = Instant::now() + EASED;
        }
        tracing::info!(pgbouncer = %self.entry.name, "let go");
        self.unclaim()
    }

    /// Some time after a hold: servers are back, what clients waited for is answered, and nobody is on an old server.
    pub(super) async fn restore(&mut self) -> Result<(), Trouble> {
        let Some((when, before)) = self.eased.clone() else { return Ok(()) };
        if Instant::now() < when || self.console().await?.is_closing().await? {
            return Ok(());
        }
        for (key, value) in &before {
            self.console().await?.set(key, value).await?;
        }
        self.eased = None;
        self.note.remove().map_err(Trouble::Other)
    }
}
