//! Who is asked for users that the user file does not name: `auth_query`, `auth_user`, `auth_dbname`.
//!
//! Invariant: whoever asks logs in with a secret of the operator's, never with a client's; a user is who the answer says
//! only if that is, byte for byte, who the client said.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::auth::users::{Known, Users};
use crate::backend::{Password, Secret};
use crate::config::Config;
use crate::database::{Database, Question};
use crate::report::Report;

/// A server that is asked, and the question.
pub struct Lookup {
    database: Arc<Database>,
    question: Question,
}

impl Lookup {
    /// How users who want a database are looked up; `None` where they are not, or there is no such database.
    ///
    /// `auth_user` logs in with its secret from the user file; if it is the control login of the database that is asked,
    /// and not in the file, with that one's password.
    #[must_use]
    pub fn new(
        config: &Config,
        users: &Users,
        databases: &BTreeMap<String, Arc<Database>>,
        database: &[u8],
    ) -> Option<Self> {
        let lookup = config.user_lookup(std::str::from_utf8(database).ok()?)?;
        let asked = databases.get(lookup.dbname)?;
        let control = config.databases.get(lookup.dbname).and_then(|database| database.control.as_ref());
        let control = control.filter(|control| control.user == lookup.user).and_then(|c| c.password.as_deref());
        let secret = users.secret(lookup.user.as_bytes()).unwrap_or_else(|| {
            control.map_or(Secret::None, |password| Secret::Password(Password::new(password.as_bytes())))
        });
        let question = Question { user: lookup.user.into(), secret, sql: lookup.query.into() };
        Some(Self { database: Arc::clone(asked), question })
    }

    /// What the server knows of a user. Bounded by the question's own limits, and by the hold budget during a pause.
    pub(super) async fn known(&self, users: &Users, user: &[u8]) -> Result<Known, Report> {
        let secret = self.database.look_up(user, &self.question).await?;
        users.told(user, secret.as_deref()).map_err(|()| {
            tracing::warn!(user = %String::from_utf8_lossy(user), "auth_query gave a SCRAM verifier that is malformed");
            Report::user_lookup_failed()
        })
    }
}
