//! Who the client is: the user file, and the password, md5 and SCRAM exchanges.
//!
//! Invariant: an unknown user and a wrong password take the same path and get the same answer; no slow hash runs on
//! the event loop.

use std::path::Path;
use std::sync::Arc;

use thiserror::Error;

use crate::backend::Secret;
use crate::config::AuthType;
use crate::message::Startup;
use crate::report::Report;
use crate::stream::{Peer, Stream};

/// A user file that can't be used.
#[derive(Debug, Error)]
pub enum UserFileError {
    /// It can't be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A line makes no sense.
    #[error("line {line}: {reason}")]
    Line {
        /// From 1.
        line: usize,
        /// Why.
        reason: String,
    },
}

/// The users of the user file.
#[derive(Debug, Default)]
pub struct Users {}

impl Users {
    /// Reads a user file.
    ///
    /// # Errors
    /// [`UserFileError`].
    pub fn load(path: &Path) -> Result<Self, UserFileError> {
        let _ = path;
        unimplemented!()
    }

    /// Parses PgBouncer's format: `"user" "secret"` a line.
    ///
    /// # Errors
    /// [`UserFileError::Line`].
    pub fn parse(text: &[u8]) -> Result<Self, UserFileError> {
        let _ = text;
        unimplemented!()
    }

    /// Whether the file names this user.
    #[must_use]
    pub fn contains(&self, user: &[u8]) -> bool {
        let _ = user;
        unimplemented!()
    }

    /// What the file allows us to say to servers in this user's name; `None` for an unknown user.
    #[must_use]
    pub fn secret(&self, user: &[u8]) -> Option<Secret> {
        let _ = user;
        unimplemented!()
    }
}

/// A client that proved who it is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// As bytes, as sent.
    pub user: Box<[u8]>,
    /// What its login taught us: how to log in to servers in its name.
    pub secret: Secret,
}

/// Asks the client to prove who it is, and writes AuthenticationOk. The caller bounds the time; not cancel safe.
///
/// # Errors
/// The [`Report`] to send before closing; nothing of it has been written. A lost connection is a report too.
pub async fn authenticate(
    stream: &mut Stream,
    startup: &Startup,
    method: AuthType,
    users: &Arc<Users>,
) -> Result<Identity, Report> {
    let _ = (stream, startup, method, users);
    unimplemented!()
}

/// Whether the peer is a process of our own user on this machine: the admin console's password-less way in.
#[must_use]
pub fn is_own_process(peer: Peer) -> bool {
    match peer {
        Peer::Unix { uid } => uid == Some(nix::unistd::geteuid().as_raw()),
        Peer::Tcp(_) => false,
    }
}
