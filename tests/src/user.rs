//! Which user runs the servers: PostgreSQL refuses to run as root.
//!
//! Invariant: a command made here never runs as root.

use std::env;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::{Gid, Uid, User};

/// The user that owns data directories and runs servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerUser {
    uid: Uid,
    gid: Gid,
    /// Are we root, so that ownership has to be given away?
    drops: bool,
}

impl ServerUser {
    /// Ourselves, or as root the user named by `PGCUTOVER_PG_USER` (default `nobody`).
    ///
    /// # Errors
    /// As root: there is no such user, or it is root again.
    pub fn current() -> Result<ServerUser> {
        let uid = Uid::effective();
        if !uid.is_root() {
            return Ok(ServerUser { uid, gid: Gid::effective(), drops: false });
        }
        let name = env::var("PGCUTOVER_PG_USER").unwrap_or_else(|_| "nobody".to_owned());
        let user = User::from_name(&name)?.with_context(|| {
            format!("no user {name}: name one in PGCUTOVER_PG_USER, PostgreSQL does not run as root")
        })?;
        anyhow::ensure!(!user.uid.is_root(), "PGCUTOVER_PG_USER={name} is root, PostgreSQL does not run as root");
        Ok(ServerUser { uid: user.uid, gid: user.gid, drops: true })
    }

    /// Numeric id, part of the names of what this user owns in the cache.
    pub fn uid(self) -> u32 {
        self.uid.as_raw()
    }

    /// A command that runs as this user, from a directory it can read, in a process group of its own:
    /// a Ctrl-C on the terminal ends us, and we end the servers in order.
    pub fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir("/").process_group(0).env_remove("PGDATA").env_remove("PGPORT").env("LC_ALL", "C");
        if self.drops {
            command.uid(self.uid()).gid(self.gid.as_raw()).env("HOME", "/");
        }
        command
    }

    /// Gives `path` to this user.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn own(self, path: &Path) -> Result<()> {
        if self.drops {
            std::os::unix::fs::chown(path, Some(self.uid()), Some(self.gid.as_raw()))
                .with_context(|| format!("giving {} to the servers' user", path.display()))?;
        }
        Ok(())
    }
}
