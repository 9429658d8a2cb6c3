//! A backend's decision store, reached with the control login.
//!
//! Invariant: an answer counts only when its whole message was acknowledged; after any doubt the connection is dropped.
//! Nothing here decides anything: it asks, writes and reads.

use std::sync::Arc;
use std::time::Duration;

use pgcutover_api::store;
use pgcutover_api::store::{BadRow, Identity, Member, Name, Outcome, StoreView, Turn};
use thiserror::Error;
use tokio::time::Instant;

use crate::backend;
use crate::backend::{ConnectError, Login, Row, ServerConnection, ServerError};
use crate::database::{Database, lock, password};
use crate::parameters::Reported;
use crate::transplant;
use crate::transplant::Survey;

/// The longest wait for the store: a third of the default lease, so that an ended lease can be decided, and asked about
/// again, before clients are shed.
const ANSWER: Duration = Duration::from_secs(1);

/// A connection to one backend's store, opened when needed.
#[derive(Debug, Default)]
pub(super) struct Link {
    connection: Option<ServerConnection>,
}

/// Why the store gave no answer.
#[derive(Debug, Error)]
pub(super) enum Silence {
    /// The database has no control login, or its name does not fit the store.
    #[error("the database has no control login (control_user)")]
    NoControl,
    /// No such backend is declared.
    #[error("the backend is not declared")]
    Undeclared,
    /// No connection.
    #[error("no control connection: {0}")]
    Connect(#[from] ConnectError),
    /// The server refused, or the connection broke.
    #[error("the store does not answer: {0}")]
    Server(#[from] ServerError),
    /// It answered something else.
    #[error(transparent)]
    Row(#[from] BadRow),
    /// Another server than the one that the pause began on.
    #[error("the server is not the one that was paused: system {0}, timeline {1:?}")]
    Replaced(u64, Option<u32>),
}

impl Silence {
    /// The server's SQLSTATE, where it refused.
    pub(super) fn sqlstate(&self) -> Option<String> {
        match self {
            Self::Server(error) => error.sqlstate().map(|state| state.as_str().to_owned()),
            Self::NoControl | Self::Undeclared | Self::Connect(_) | Self::Row(_) | Self::Replaced(..) => None,
        }
    }

    /// Whether no store was ever installed there: nothing is armed, nothing to hold for.
    pub(super) fn is_unarmed(&self) -> bool {
        // 42P01 undefined_table, 3F000 invalid_schema_name.
        matches!(self.sqlstate().as_deref(), Some("42P01" | "3F000"))
    }
}

impl Database {
    /// State and newest decisions as a backend's store has them.
    pub(super) async fn view(&self, backend: &str) -> Result<StoreView, Silence> {
        let row = self.ask::<12>(backend, &store::view(self.route_name()?)).await?;
        Ok(StoreView::decode(&texts(&row))?)
    }

    /// Records `want` for an epoch unless it is decided; answers the outcome.
    pub(super) async fn decide(&self, backend: &str, turn: &Turn, want: Outcome) -> Result<Outcome, Silence> {
        let row = self.ask::<1>(backend, &store::decide(turn, want)).await?;
        Ok(store::decode_outcome(&texts(&row))?)
    }

    /// Writes the evidence of a commit on its target.
    pub(super) async fn witness(&self, turn: &Turn, target: &str) -> Result<(), Silence> {
        let name = Name::new(target).map_err(|_| Silence::Undeclared)?;
        self.ask::<1>(target, &store::witness(turn, &name)).await.map(drop)
    }

    /// Enrols this proxy in the store of its active backend.
    pub(super) async fn enroll(&self, backend: &str, member: &Member) -> Result<(), Silence> {
        self.run(backend, &store::enroll(self.route_name()?, member)).await.map(drop)
    }

    /// Asks a backend who it is, and remembers it. Of the source of an epoch pause what was known when it was paused
    /// is kept (R14): another server in its place stays another one, however often it is asked.
    pub(super) async fn identify(&self, backend: &str) -> Result<Identity, Silence> {
        let row = self.ask::<4>(backend, store::IDENTITY).await?;
        let identity = Identity::decode(&texts(&row))?;
        let mut identities = lock(&self.identities);
        let paused = self.site.gate.pause().and_then(|pause| pause.epoch).is_some_and(|epoch| epoch.source == backend);
        if !paused || !identities.contains_key(backend) {
            identities.insert(backend.to_owned(), identity.clone());
        }
        Ok(identity)
    }

    /// Runs a read-only statement of ours.
    pub(super) async fn run(&self, backend: &str, sql: &str) -> Result<Vec<Row>, Silence> {
        let link = Arc::clone(lock(&self.links).entry(backend.to_owned()).or_default());
        let deadline = Instant::now() + ANSWER;
        // Bounded: whoever holds the link has the same deadline for its own answer.
        let mut link = link.lock().await;
        let mut connection = match link.connection.take() {
            Some(connection) => connection,
            None => self.connect(backend, deadline).await?,
        };
        match connection.simple(sql, deadline).await {
            Ok(rows) => {
                link.connection = Some(connection);
                Ok(rows)
            }
            Err(error) => {
                // A refused message has left a transaction open; it is closed with the connection if need be.
                if matches!(error, ServerError::Refused { .. })
                    && connection.simple(store::ROLLBACK, deadline).await.is_ok()
                {
                    link.connection = Some(connection);
                }
                Err(error.into())
            }
        }
    }

    /// What moving any session of the database needs to know, as a backend's catalogue says.
    pub(super) async fn survey(&self, backend: &str) -> Result<Survey, Silence> {
        let link = Arc::clone(lock(&self.links).entry(backend.to_owned()).or_default());
        let deadline = Instant::now() + ANSWER;
        // Bounded: whoever holds the link has the same deadline for its own answer.
        let mut link = link.lock().await;
        let mut connection = match link.connection.take() {
            Some(connection) => connection,
            None => self.connect(backend, deadline).await?,
        };
        let survey = Box::pin(transplant::survey(&mut connection, deadline)).await?;
        connection.asides.clear();
        link.connection = Some(connection);
        Ok(survey)
    }

    pub(super) fn route_name(&self) -> Result<&Name, Silence> {
        self.name.as_ref().ok_or(Silence::NoControl)
    }

    async fn ask<const COLUMNS: usize>(&self, backend: &str, sql: &str) -> Result<[Option<String>; COLUMNS], Silence> {
        let rows = self.run(backend, sql).await?;
        let row = rows.last().ok_or(BadRow::Columns { wanted: COLUMNS, found: 0 })?;
        Ok(std::array::from_fn(|column| row.text(column).map(str::to_owned)))
    }

    async fn connect(&self, backend: &str, deadline: Instant) -> Result<ServerConnection, Silence> {
        let config = self.process.config.load_full();
        let control = config.databases.get(self.name()).and_then(|d| d.control.as_ref()).ok_or(Silence::NoControl)?;
        let endpoint = self.endpoint(backend).ok_or(Silence::Undeclared)?;
        let login = Login {
            user: control.user.as_bytes().into(),
            secret: password(control.password.as_deref()),
            settings: vec![(b"application_name"[..].into(), b"pgcutover control"[..].into())],
        };
        let connection = backend::connect(&endpoint.address, &login, deadline).await?;
        self.remember_welcome(backend, &connection.parameters);
        Ok(connection)
    }

    fn remember_welcome(&self, backend: &str, parameters: &Reported) {
        let own: [&[u8]; 3] = [b"application_name", b"is_superuser", b"session_authorization"];
        let mut welcome = parameters.clone();
        welcome.retain(|(name, _)| !own.contains(&&**name));
        // A target that is a standby now is a primary once clients get there.
        if backend != &*self.site.route.active().backend {
            welcome.retain(|(name, _)| &**name != b"in_hot_standby");
        }
        self.welcome.store(Arc::new(Some(Arc::new(welcome))));
    }
}

fn texts<const COLUMNS: usize>(row: &[Option<String>; COLUMNS]) -> [Option<&str>; COLUMNS] {
    std::array::from_fn(|column| row[column].as_deref())
}
