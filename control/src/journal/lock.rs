//! One run of a database and directory at a time: a lock file that says who has it.
//!
//! Invariant: the kernel gives the lock back when its process dies; words that are still in the file tell that it died at work.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use pgcutover_api::epoch::RunId;

use crate::journal::{JournalError, at};

/// The right to work on a database, as far as this directory goes. The kernel gives it back when the process dies.
#[derive(Debug)]
pub(super) struct Lock {
    file: Flock<File>,
    /// Who held it last and died at work.
    stale: Option<String>,
}

impl Lock {
    /// For a run; fails while another one of the database holds it.
    pub(super) fn take(dir: &Path, database: &str, run: RunId) -> Result<Lock, JournalError> {
        let path = dir.join(format!("{}.lock", file_name(database)));
        let file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).map_err(at(&path))?;
        let (mut held, stale) = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut held) => {
                let last = words_in(&mut held);
                (held, last)
            }
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let holder = words_in(&mut file).unwrap_or_else(|| "it has just begun".to_owned());
                return Err(JournalError::Locked { database: database.to_owned(), holder, path });
            }
            Err((_, errno)) => return Err(JournalError::Io { path, error: errno.into() }),
        };
        // Whoever finds the lock taken may look who has it.
        let who = format!("run {run} of {}", whoami());
        held.set_len(0)
            .and_then(|()| held.rewind())
            .and_then(|()| held.write_all(who.as_bytes()))
            .map_err(at(&path))?;
        Ok(Lock { file: held, stale })
    }

    /// Who held it last and died without giving it back.
    pub(super) fn stale(&self) -> Option<&str> {
        self.stale.as_deref()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // An empty lock file is one that was given back in good order.
        let _ = self.file.set_len(0);
    }
}

/// What a lock file says, if anything.
fn words_in(file: &mut File) -> Option<String> {
    // A holder's words take a hundred bytes.
    const BYTES_MAX: u64 = 1000;
    let mut words = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut words).ok()?;
    let words = String::from_utf8_lossy(&words).trim().to_owned();
    Some(words).filter(|words| !words.is_empty())
}

/// This process, for people: user, machine, process.
pub fn whoami() -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).ok().flatten();
    let user = user.map_or_else(|| nix::unistd::Uid::effective().to_string(), |user| user.name);
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{user}@{}, pid {}", host.trim(), std::process::id())
}

/// A database name as part of a file name: everything but letters and digits as hexadecimal.
fn file_name(database: &str) -> String {
    let mut name = String::new();
    for byte in database.bytes() {
        if byte.is_ascii_alphanumeric() { name.push(byte.into()) } else { name.push_str(&format!("_{byte:02x}")) }
    }
    name
}
