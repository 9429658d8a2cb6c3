//! What is known of users: the user file, in PgBouncer's format, and what servers said in its words.
//!
//! Invariant: a file is taken whole or refused with the line that is wrong.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use thiserror::Error;

use crate::backend::{Password, Secret};
use crate::config::AuthType;
use crate::scram::{self, Verifier};

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
    #[error("{path}line {line}: {reason}")]
    Line {
        /// The file and a colon; empty for a text that is no file.
        path: String,
        /// From 1.
        line: usize,
        /// Why.
        reason: &'static str,
    },
    /// The operating system has no randomness.
    #[error("no randomness: {0}")]
    Randomness(String),
}

/// What the file says of one user.
#[derive(Debug, Clone)]
pub(super) enum Stored {
    /// `""`: no password is right.
    Nothing,
    /// The password itself.
    Plain(Arc<Password>),
    /// The digits behind `md5`.
    Md5([u8; 32]),
    /// What PostgreSQL stores.
    Scram(Verifier),
}

/// The users of the user file.
#[derive(Default)]
pub struct Users {
    by_name: HashMap<Box<[u8]>, Stored>,
    /// Makes the verifiers that unknown users meet, and the salts of plain passwords.
    mock_secret: scram::Digest,
}

impl std::fmt::Debug for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Users").field("len", &self.by_name.len()).finish_non_exhaustive()
    }
}

impl Users {
    /// Reads a user file.
    ///
    /// # Errors
    /// [`UserFileError`].
    pub fn load(path: &Path) -> Result<Self, UserFileError> {
        let name = path.display().to_string();
        match std::fs::read(path) {
            Err(source) => Err(UserFileError::Read { path: name, source }),
            Ok(text) => Self::parse(&text).map_err(|error| match error {
                UserFileError::Line { path: _, line, reason } => {
                    UserFileError::Line { path: format!("{name}: "), line, reason }
                }
                error @ (UserFileError::Read { .. } | UserFileError::Randomness(_)) => error,
            }),
        }
    }

    /// Parses PgBouncer's format: `"user" "secret"` a line, `""` for a quote inside, `;` or `#` begins a comment line.
    /// The secret is a SCRAM verifier, `md5` and 32 digits, or the password.
    ///
    /// # Errors
    /// [`UserFileError::Line`].
    pub fn parse(text: &[u8]) -> Result<Self, UserFileError> {
        let mut users = Self::default();
        getrandom::fill(&mut users.mock_secret).map_err(|e| UserFileError::Randomness(e.to_string()))?;
        for (number, line) in text.split(|b| *b == b'\n').enumerate() {
            let wrong = |reason| UserFileError::Line { path: String::new(), line: number + 1, reason };
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b";") || line.starts_with(b"#") {
                continue;
            }
            let (user, rest) = quoted(line).ok_or(wrong("a user name in double quotes is expected"))?;
            let (secret, _) = quoted(rest.trim_ascii_start()).ok_or(wrong("a secret in double quotes is expected"))?;
            if user.is_empty() {
                return Err(wrong("the user name is empty"));
            }
            let stored = stored(&secret).ok_or(wrong("the SCRAM verifier is malformed"))?;
            if users.by_name.insert(user.into(), stored).is_some() {
                return Err(wrong("the user is named twice"));
            }
        }
        Ok(users)
    }

    /// Whether the file names this user.
    #[must_use]
    pub fn contains(&self, user: &[u8]) -> bool {
        self.by_name.contains_key(user)
    }

    /// The names in the file, in no order.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.by_name.keys().map(|name| &**name)
    }

    /// Users that can't log in by this method whatever they send; worth a warning when the file is read.
    pub fn unusable(&self, method: AuthType) -> impl Iterator<Item = &[u8]> {
        let usable = move |stored: &Stored| match (method, stored) {
            (AuthType::Trust | AuthType::Cert, _) => true,
            (_, Stored::Nothing) | (AuthType::Scram, Stored::Md5(_)) => false,
            (AuthType::Scram | AuthType::Md5 | AuthType::Plain, _) => true,
        };
        self.by_name.iter().filter(move |(_, stored)| !usable(stored)).map(|(name, _)| &**name)
    }

    /// What the file alone allows us to say to servers in this user's name; `None` for an unknown user.
    #[must_use]
    pub fn secret(&self, user: &[u8]) -> Option<Secret> {
        self.known(user).secret()
    }

    /// What the file says of a user.
    pub(super) fn known(&self, user: &[u8]) -> Known {
        Known { stored: self.by_name.get(user).cloned(), mock: Verifier::mock(&self.mock_secret, user) }
    }

    /// What a server said of a user: its secret, in the forms that the file may have; `None`: there is no such user.
    /// `Err` for something that begins like a SCRAM verifier and is none.
    pub(super) fn told(&self, user: &[u8], secret: Option<&[u8]>) -> Result<Known, ()> {
        let stored = secret.map(|secret| stored(secret).ok_or(())).transpose()?;
        Ok(Known { stored, mock: Verifier::mock(&self.mock_secret, user) })
    }
}

/// What is known of somebody who wants in.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// `None`: there is no such user.
    pub(super) stored: Option<Stored>,
    /// A verifier that nobody can prove. Its salt is also the salt of a plain password, so that the two look alike.
    pub(super) mock: Verifier,
}

impl Known {
    /// What this alone allows us to say to servers in the user's name; `None` for an unknown user. A SCRAM verifier gives
    /// [`Secret::None`]: only the client's own login reveals the keys.
    pub(super) fn secret(&self) -> Option<Secret> {
        self.stored.as_ref().map(|stored| match stored {
            Stored::Nothing | Stored::Scram(_) => Secret::None,
            Stored::Plain(password) => Secret::Password(Arc::clone(password)),
            Stored::Md5(digits) => Secret::Md5(*digits),
        })
    }

    /// Whether only SCRAM can prove this user, whatever method is configured: PostgreSQL's rule for `md5`.
    pub(super) fn demands_scram(&self) -> bool {
        matches!(self.stored, Some(Stored::Scram(_)))
    }
}

/// `None` for something that begins like a SCRAM verifier and is none.
fn stored(secret: &[u8]) -> Option<Stored> {
    if secret.starts_with(b"SCRAM-SHA-256$") {
        return Verifier::parse(secret).map(Stored::Scram);
    }
    Some(match secret.strip_prefix(b"md5").and_then(|digits| <[u8; 32]>::try_from(digits).ok()) {
        Some(digits) if digits.iter().all(u8::is_ascii_hexdigit) => Stored::Md5(digits.map(|d| d.to_ascii_lowercase())),
        Some(_) | None if secret.is_empty() => Stored::Nothing,
        Some(_) | None => Stored::Plain(Password::new(secret)),
    })
}

/// Takes a quoted text from the front; a doubled quote inside is one.
fn quoted(line: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut rest = line.strip_prefix(b"\"")?;
    let mut text = Vec::new();
    loop {
        let quote = rest.iter().position(|b| *b == b'"')?;
        let (before, after) = rest.split_at(quote);
        text.extend_from_slice(before);
        match after {
            [b'"', b'"', more @ ..] => {
                text.push(b'"');
                rest = more;
            }
            [_, more @ ..] => return Some((text, more)),
            [] => return None,
        }
    }
}
