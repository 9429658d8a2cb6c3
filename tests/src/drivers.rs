//! Real drivers at real work: small programs, one for each driver, that all run the same course (`tests/drivers/README.md`).
//!
//! # A driver's life
//! [`kits`] has its interpreter and its libraries, [`ways`] lists each way in which it is used, a [`Performance`] is one of
//! these at work on one connection, and [`course`] is what it does and what it has told in the end.
//!
//! Invariant: a driver that can't be had is named with the reason, never left out.

mod consoles;
pub mod course;
pub mod kits;
mod moods;
mod native;
mod program;
pub mod ways;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::binaries::{Network, tool};
use crate::drivers::course::{Engagement, Told};
use crate::drivers::kits::Kit;
use crate::drivers::ways::{Player, Way};

/// After its order to stop a driver has its round to end: longer than any pause may hold it.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// What a driver has told so far; the performance writes, others look.
pub(crate) type Notebook = Arc<Mutex<Told>>;

/// Writes into a notebook. A panic of another writer does not make what is in it less true.
pub(crate) fn note(notebook: &Notebook, change: impl FnOnce(&mut Told)) {
    change(&mut notebook.lock().unwrap_or_else(PoisonError::into_inner));
}

/// What a way of a driver needs to run, found.
#[derive(Clone, Debug)]
pub enum Means {
    /// A program of `tests/drivers`.
    Kit(Kit),
    /// One of PostgreSQL's own programs.
    Tool(PathBuf),
    /// Nothing: it is part of this program.
    Linked,
}

impl Means {
    /// Finds, or fetches unless that is forbidden, what this way needs.
    ///
    /// # Errors
    /// It can't be had; the message says why.
    pub fn find(way: &Way, network: Network) -> Result<Means> {
        match way.player {
            Player::Program { language, .. } => Kit::find(language, network).map(Means::Kit),
            Player::Pgbench => tool("pgbench").map(Means::Tool),
            Player::Psql => tool("psql").map(Means::Tool),
            Player::TokioPostgres | Player::Sqlx => Ok(Means::Linked),
        }
    }
}

/// One way of a driver, at work.
#[derive(Debug)]
pub struct Performance {
    /// Which.
    pub way: &'static Way,
    notebook: Notebook,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Performance {
    /// Begins it.
    pub fn begin(way: &'static Way, means: Means, engagement: Engagement) -> Performance {
        let (notebook, stop) = (Notebook::default(), CancellationToken::new());
        let (book, order) = (Arc::clone(&notebook), stop.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = perform(way, means, &engagement, &book, order).await {
                note(&book, |told| told.errors.push(format!("{error:#}")));
            }
            note(&book, |told| told.ended = true);
        });
        Performance { way, notebook, stop, task }
    }

    /// Has it ended (by an error, or all its rounds done)?
    pub fn ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Orders it to stop after its round; waiting for it is [`Performance::told`].
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Waits for its end and gives what it has told.
    pub async fn told(mut self) -> Told {
        self.stop.cancel();
        match tokio::time::timeout(STOP_LIMIT, &mut self.task).await {
            Ok(Ok(())) => {}
            Ok(Err(panic)) => note(&self.notebook, |told| told.errors.push(format!("the harness: {panic}"))),
            Err(_) => {
                self.task.abort();
                let text = format!("did not end within {STOP_LIMIT:?}");
                note(&self.notebook, |told| told.errors.push(text));
            }
        }
        self.notebook.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn perform(
    way: &Way,
    means: Means,
    engagement: &Engagement,
    notebook: &Notebook,
    stop: CancellationToken,
) -> Result<()> {
    match (way.player, means) {
        (Player::Program { name, package, .. }, Means::Kit(kit)) => {
            note(notebook, |told| told.version = package.and_then(|package| kit.version(package)));
            program::perform(kit.program(name), way.mode, engagement, notebook, stop).await
        }
        (Player::Pgbench, Means::Tool(tool)) => consoles::pgbench(tool, way.mode, engagement, notebook, stop).await,
        (Player::Psql, Means::Tool(tool)) => consoles::psql(tool, engagement, notebook, stop).await,
        (Player::TokioPostgres, _) => native::tokio_postgres(way.mode, engagement, notebook, stop).await,
        (Player::Sqlx, _) => native::sqlx(way.mode, engagement, notebook, stop).await,
        (Player::Program { .. } | Player::Pgbench | Player::Psql, means) => {
            anyhow::bail!("{} can't be run by {means:?}", way.id)
        }
    }
}
