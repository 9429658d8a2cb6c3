//! What RESET means to a client that shares no server: what its Startup asked for, as on a server of its own.
//!
//! Invariant: only settings that the server has just taken back to its own start are set again; nothing that the client has
//! set itself is touched.

use crate::backend::{Asides, Batch};
use crate::pool::Lease;
use crate::relay::Reset;
use crate::session::errand::settings_in;
use crate::session::{Farewell, OWN_STATEMENT, Session};

/// A setting of the server that stands at its start. What a session sets has the source `session`.
const RESTORE: &str = "SELECT pg_catalog.set_config(s.name, $2, false) FROM pg_catalog.pg_settings s \
    WHERE pg_catalog.lower(s.name) = pg_catalog.lower($1::text) AND s.source <> 'session'";

/// A custom setting (`my.tenant`) that is empty: no catalogue shows those.
const RESTORE_CUSTOM: &str =
    "SELECT pg_catalog.set_config($1, $2, false) WHERE pg_catalog.current_setting($1::text, true) = ''";

impl Session {
    /// Notes that settings may have been taken back to the server's start, and sets them again as soon as nothing of the
    /// server's is under way. Ended by the server or by its time limit.
    pub(super) async fn start_again(&mut self, lease: &mut Lease) -> Result<(), Farewell> {
        let reset = self.overheard.as_mut().map_or(Reset::Nothing, |overheard| overheard.take_reset());
        let mut batch = Batch::default();
        for name in self.startup.names() {
            let (custom, value) = (name.contains(&b'.'), self.startup.value(name).unwrap_or_default());
            match (reset, custom) {
                (Reset::Nothing, _) | (Reset::Some, true) => continue,
                (Reset::All, true) => batch.run(RESTORE_CUSTOM, [&[name, value][..]]),
                (Reset::Some | Reset::All, false) => batch.run(RESTORE, [&[name, value][..]]),
            }
            batch.sync();
        }
        if batch.is_empty() {
            return Ok(());
        }
        let server = &mut lease.pooled.server;
        let deadline = tokio::time::Instant::now() + OWN_STATEMENT;
        let heard = Box::pin(server.converse(batch, Asides::All, deadline)).await;
        let answers = heard.map_err(|error| Farewell::ServerGone(error.to_string()))?;
        for refused in answers.iter().filter_map(|answer| answer.refused.as_ref()) {
            tracing::warn!(client = self.client.who.id, %refused, "a setting of the Startup could not be set again");
        }
        let asides = std::mem::take(&mut lease.pooled.server.asides);
        let reported = settings_in(&asides);
        if !reported.is_empty() {
            self.follow(lease, &reported);
        }
        self.tell(&asides).await
    }
}
