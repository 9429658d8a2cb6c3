//! What a keeper writes down before it holds, so that the next one knows a PAUSE it finds for its own, and whose it was; and the
//! lock that makes it the only keeper on this machine.
//!
//! Invariant: a note is replaced whole; it stays until clients are let go and the settings are as they were.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use pgcutover_api::epoch::Claim;
use serde::{Deserialize, Serialize};

/// A hold as the next keeper has to know it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Noted {
    /// Whom it is held for; nobody any more once clients were let go.
    pub(super) claim: Option<Claim>,
    /// Which server it was paused on: system identifier and timeline (R14).
    pub(super) source: Option<(u64, Option<u32>)>,
    /// Settings as they were.
    pub(super) settings: Vec<(String, String)>,
}

/// Where the note of one PgBouncer lies.
#[derive(Debug)]
pub(super) struct Note {
    path: PathBuf,
}

/// The right to keep a PgBouncer, as far as this directory goes. The kernel gives it back when the process dies.
#[derive(Debug)]
pub(super) struct Post {
    _file: Flock<File>,
}

impl Note {
    pub(super) fn of(dir: &Path, name: &str) -> Note {
        Note { path: dir.join(format!("{name}.held")) }
    }

    /// What it says; nothing if there is none.
    pub(super) fn read(&self) -> Result<Option<Noted>, String> {
        match fs::read(&self.path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| self.about(&error)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.about(&error)),
        }
    }

    pub(super) fn write(&self, noted: &Noted) -> Result<(), String> {
        let beside = self.path.with_extension("held-new");
        let text = serde_json::to_vec(noted).map_err(|error| self.about(&error))?;
        let written = File::create(&beside).and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
        written.and_then(|()| fs::rename(&beside, &self.path)).map_err(|error| self.about(&error))
    }

    pub(super) fn remove(&self) -> Result<(), String> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(self.about(&error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn about(&self, error: &dyn std::fmt::Display) -> String {
        format!("{}: {error}", self.path.display())
    }
}

impl Post {
    /// Fails while another process keeps this PgBouncer with the same directory.
    pub(super) fn take(dir: &Path, name: &str) -> Result<Post, String> {
        let path = dir.join(format!("{name}.keeper"));
        let about = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        fs::create_dir_all(dir).map_err(|error| about(&error))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        match Flock::lock(file.map_err(|error| about(&error))?, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Post { _file: file }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(about(&"another process keeps this PgBouncer already")),
            Err((_, errno)) => Err(about(&errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_says_what_was_written_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let note = Note::of(dir.path(), "b1");
        assert_eq!(note.read().unwrap(), None);
        let claim = Claim { run: pgcutover_api::epoch::RunId::random(), epoch: 7_u64.try_into().unwrap() };
        let settings = vec![("server_login_retry".to_owned(), "15".to_owned())];
        let noted = Noted { claim: Some(claim), source: Some((42, Some(1))), settings };
        note.write(&noted).unwrap();
        assert_eq!(Note::of(dir.path(), "b1").read().unwrap(), Some(noted));
        note.remove().unwrap();
        note.remove().unwrap();
        assert_eq!(note.read().unwrap(), None);
        fs::write(dir.path().join("b1.held"), "{").unwrap();
        assert!(note.read().unwrap_err().contains("b1.held"), "a damaged note is no missing one");
    }

    #[test]
    fn one_process_at_a_time_keeps_a_pgbouncer() {
        let dir = tempfile::tempdir().unwrap();
        let post = Post::take(dir.path(), "b1").unwrap();
        assert!(Post::take(dir.path(), "b1").unwrap_err().contains("keeps this PgBouncer already"));
        Post::take(dir.path(), "b2").unwrap();
        drop(post);
        Post::take(dir.path(), "b1").unwrap();
    }
}
