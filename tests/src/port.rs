//! TCP ports that no other harness on this machine uses.
//!
//! Invariant: a port belongs to one living [`Port`] at a time, over all processes, and is never 5432. Ports come from
//! below the range from which the kernel serves outgoing connections, so a server can restart on its own.

use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use anyhow::{Context, Result};

/// Linux hands out 32768-60999 to outgoing connections; well-known servers live below 10000.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// A reserved port; dropping it gives it back.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: File,
}

impl Port {
    /// Reserves a port on which nobody listens.
    ///
    /// # Errors
    /// All are taken, or the directory of locks can't be written.
    pub fn reserve() -> Result<Port> {
        let locks = std::env::temp_dir().join("pgcutover-ports");
        if fs::create_dir(&locks).is_ok() {
            // Other users' harnesses take part.
            fs::set_permissions(&locks, fs::Permissions::from_mode(0o1777))?;
        }
        let start = uuid::Uuid::new_v4().as_fields().1 % COUNT;
        for step in 0..COUNT {
            let number = FIRST + (start + step) % COUNT;
            let path = locks.join(number.to_string());
            let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o666).open(path);
            let Ok(lock) = opened else { continue };
            if lock.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", number)).is_ok() {
                return Ok(Port { number, _lock: lock });
            }
        }
        None.context("no free port between 20000 and 31999")
    }

    /// The number.
    pub fn number(&self) -> u16 {
        self.number
    }
}
