//! Which declared backend is active, since which epoch; durable.
//!
//! Invariant: the route changes whole and only forward: readers see one backend with its epoch and generation, and the
//! file is replaced atomically (written aside, fsync, rename, fsync of the directory). `active` of the configuration is
//! used only where no file is.

use std::fs::File;
use std::io;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use pgcutover_api::epoch::Epoch;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::backend::{Address, Login};

/// Where a declared backend is, and who logs in there.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Where it is.
    pub address: Arc<Address>,
    /// The one user that all clients become there; `None`: each its own.
    pub forced: Option<Login>,
}

/// The active backend of a database.
#[derive(Debug, Clone)]
pub struct Active {
    /// Its name in the configuration.
    pub backend: Box<str>,
    /// Where it is.
    pub endpoint: Arc<Endpoint>,
    /// The epoch that made it active; zero before any cutover.
    pub epoch: Epoch,
    /// Grows with every switch, RECONNECT and change of address, ordered or not: connections of an older generation are retired.
    pub generation: u64,
}

/// The route of one database.
pub struct Route {
    active: ArcSwap<Active>,
    file: PathBuf,
}

/// What is kept on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Durable {
    /// The active backend's name.
    pub backend: String,
    /// The epoch that made it active.
    pub epoch: Epoch,
}

/// Why a route was not read or written.
#[derive(Debug, Error)]
pub enum RouteError {
    /// The file can't be read or written.
    #[error("route file {}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is there and makes no sense; nobody guesses which side is active.
    #[error("route file {}: {reason}; restore it, or remove it if `active` in the configuration is right", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Where the route of a database is kept: `state_dir/routes/NAME.toml`, with every unusual byte of the name as `%XX`.
#[must_use]
pub fn file(state_dir: &Path, database: &str) -> PathBuf {
    let mut name = String::new();
    for byte in database.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => name.push(char::from(byte)),
            other => name.push_str(&format!("%{other:02X}")),
        }
    }
    state_dir.join("routes").join(name + ".toml")
}

/// Reads what is kept; `None` where nothing is.
///
/// # Errors
/// [`RouteError`].
pub fn load(file: &Path) -> Result<Option<Durable>, RouteError> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RouteError::Io { file: file.to_owned(), source }),
    };
    toml::from_str(&text)
        .map(Some)
        .map_err(|error| RouteError::Damaged { file: file.to_owned(), reason: error.message().to_owned() })
}

/// Replaces what is kept, so that after a crash either the old or the new route is there.
///
/// # Errors
/// [`RouteError::Io`]; the old file is then still there, or already replaced.
pub fn store(file: &Path, durable: &Durable) -> Result<(), RouteError> {
    replace(file, durable).map_err(|source| RouteError::Io { file: file.to_owned(), source })
}

fn replace(file: &Path, durable: &Durable) -> io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let text = toml::to_string(durable).map_err(io::Error::other)?;
    let aside = file.with_extension("new");
    let mut new = File::create(&aside)?;
    new.write_all(text.as_bytes())?;
    new.sync_all()?;
    std::fs::rename(&aside, file)?;
    File::open(directory)?.sync_all()
}

impl Route {
    /// A route that starts at `active` and is kept in `file`.
    #[must_use]
    pub fn new(active: Active, file: PathBuf) -> Self {
        Self { active: ArcSwap::from_pointee(active), file }
    }

    /// The active backend.
    #[must_use]
    pub fn active(&self) -> Arc<Active> {
        self.active.load_full()
    }

    /// The generation of the active backend, without touching a reference count.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.active.load().generation
    }

    /// Makes another backend active and writes it down.
    ///
    /// # Errors
    /// The switch has happened all the same: a file that can't be written is an alarm, it does not stop a decided
    /// switch. After a restart the decision store says where traffic belongs.
    pub fn switch(&self, backend: &str, endpoint: Arc<Endpoint>, epoch: Epoch) -> Result<(), RouteError> {
        self.active.rcu(|active| Active {
            backend: backend.into(),
            endpoint: Arc::clone(&endpoint),
            epoch,
            generation: active.generation + 1,
        });
        store(&self.file, &Durable { backend: backend.to_owned(), epoch })
    }

    /// Retires the present connections: their backend stays, at a possibly new address.
    pub fn renew(&self, endpoint: Arc<Endpoint>) {
        self.active.rcu(|active| Active {
            backend: active.backend.clone(),
            endpoint: Arc::clone(&endpoint),
            epoch: active.epoch,
            generation: active.generation + 1,
        });
    }

    /// Retires the present connections if that backend is active; whether it is.
    pub fn retire(&self, backend: &str) -> bool {
        // Beside a switch: either it comes first, and nothing happens here, or its own generation is yet newer.
        let former = self.active.rcu(|active| {
            let generation = active.generation + u64::from(*active.backend == *backend);
            Active { generation, ..Active::clone(active) }
        });
        *former.backend == *backend
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_survives_a_restart_and_half_a_write() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path(), "a/b ü");
        assert!(file.ends_with("routes/a%2Fb%20%C3%BC.toml"));
        assert_eq!(load(&file).unwrap(), None);
        let green = Durable { backend: "green".to_owned(), epoch: 7_u64.try_into().unwrap() };
        store(&file, &green).unwrap();
        std::fs::write(file.with_extension("new"), "backend = 'bl").unwrap();
        assert_eq!(load(&file).unwrap(), Some(green));
    }

    #[test]
    fn a_damaged_route_is_an_error_and_no_guess() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path(), "app");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "backend = 'green'\n").unwrap();
        assert!(load(&file).unwrap_err().to_string().contains("routes/app.toml"));
    }
}
