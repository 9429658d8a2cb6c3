//! A session while a pause holds writes: what it waits with, and the mode that its server connection is in meanwhile.
//!
//! Invariant: a statement is held before any of it is sent, so it runs once; whatever else turns out to write is refused by
//! the server. Read-only mode is put on and taken off between two transactions, as the difference of two settings: what a
//! connection was told in our name is taken back before the client's next transaction, and never taken for the client's own.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Asides, Batch};
use crate::client::Order;
use crate::config::{PoolMode, WritesPolicy};
use crate::gate::{Gate, Pass, Permits, Wants};
use crate::message::Pair;
use crate::parameters;
use crate::parameters::{READ_ONLY_MODE, Reported, Settings};
use crate::pool::Pooled;
use crate::relay::{Buffer, Read};
use crate::report::Report;
use crate::session::{Farewell, OWN_STATEMENT, Session};
use crate::statements::{BATCH_BYTES_MAX, Beginning, Prepared, beginning};

const SET: &str = "SELECT pg_catalog.set_config($1, $2, false)";

const TAKE_BACK: &str = "RESET default_transaction_read_only";

const ASK: &str = "SELECT pg_catalog.current_setting('default_transaction_read_only')";

/// A statement prepared by the protocol or by SQL, as its client wrote it.
const TEXT: &str = "SELECT statement FROM pg_catalog.pg_prepared_statements WHERE name OPERATOR(pg_catalog.=) $1";

/// What became of a wait for more of the client's bytes.
enum More {
    Bytes,
    Errand,
}

impl Session {
    /// A pass for what the client is about to begin, where the gate is not open for everything; `None` when the statement
    /// was refused and the client goes on.
    pub(super) async fn admission(
        &mut self,
        entered: Option<Pass>,
        asked_at: Instant,
    ) -> Result<Option<Pass>, Farewell> {
        let mut entered = entered;
        loop {
            let pass = match entered.take().or_else(|| self.pool.site.gate.try_enter()) {
                Some(pass) => pass,
                None => match self.held(asked_at, Wants::Any).await? {
                    Some(pass) => pass,
                    None => return Ok(None),
                },
            };
            // What a replication connection says is no transaction, and its server takes no settings.
            if pass.permits() == Permits::All || self.client.who.replicates() {
                return Ok(Some(pass));
            }
            let policy = self.pool.site.config.load().writes_policy(&self.pool.site.database);
            match (self.beginning().await?, policy) {
                (Beginning::Reads | Beginning::Unknown(_), _) | (Beginning::Writes, WritesPolicy::Decline) => {
                    return Ok(Some(pass));
                }
                (Beginning::Settings, _) => return Ok(Some(pass.for_settings())),
                (Beginning::Writes, WritesPolicy::Hold) => {
                    drop(pass);
                    return self.held(asked_at, Wants::All).await;
                }
                (Beginning::More, _) => {
                    // They may be long in coming: nobody waits for it meanwhile.
                    drop(pass);
                    if matches!(self.more().await?, More::Errand) {
                        self.run_errand().await?;
                    }
                }
            }
        }
    }

    /// What the client is about to begin.
    async fn beginning(&mut self) -> Result<Beginning, Farewell> {
        let mut asked = Vec::new();
        loop {
            let pending = self.up.as_ref().map_or(&[][..], Buffer::pending);
            let unnamed = self.overheard.as_deref().and_then(|overheard| overheard.unnamed());
            let texts = match self.client.who.pool_mode {
                PoolMode::Transaction => Prepared::Shared(self.names.as_deref()),
                PoolMode::Session => Prepared::Kept(&asked, unnamed),
            };
            match beginning(pending, &texts) {
                Beginning::Unknown(name) => {
                    let text = self.text_of(&name).await?;
                    asked.push((name, text));
                }
                known @ (Beginning::Reads | Beginning::Writes | Beginning::Settings | Beginning::More) => {
                    return Ok(known);
                }
            }
        }
    }

    /// Reads on. Ended by the client, or by an order.
    async fn more(&mut self) -> Result<More, Farewell> {
        std::future::poll_fn(|cx| {
            match self.client.poll_order(cx, &[Order::Kill, Order::Leave, Order::Errand]) {
                std::task::Poll::Ready(Order::Errand) => return std::task::Poll::Ready(Ok(More::Errand)),
                std::task::Poll::Ready(Order::Kill | Order::Leave | Order::Cancel) => {
                    let farewell = Farewell::Refused(Box::new(Report::admin_shutdown()));
                    return std::task::Poll::Ready(Err(farewell));
                }
                std::task::Poll::Pending => {}
            }
            self.poll_gossip(cx)?;
            let up = self.up.get_or_insert_with(Buffer::take);
            // Room for it: what is at hand need not be all that has to be seen.
            up.holds(up.pending().len() + 1, BATCH_BYTES_MAX);
            up.poll_read(&mut self.stream, cx).map(|read| match read {
                Ok(Read::Some | Read::Full) => Ok(More::Bytes),
                Ok(Read::End) => Err(Farewell::ClientGone(io::ErrorKind::UnexpectedEof.into())),
                Err(error) => Err(Farewell::ClientGone(error)),
            })
        })
        .await
    }

    /// The settings that its server connection has to have, where they are not its own.
    pub(super) fn dress_for(&self, permits: Permits) -> Option<Arc<Settings>> {
        let reads = permits == Permits::Reads && !self.client.who.replicates();
        reads.then(|| Arc::new(self.settings.read_only()))
    }

    /// Whether the connection that it keeps is in another mode.
    pub(super) fn is_dressed_otherwise(&self, permits: Permits) -> bool {
        let Some(kept) = &self.kept else { return false };
        permits == Permits::Reads || !Arc::ptr_eq(&kept.pooled.applied, &self.settings)
    }

    /// Puts the connection that it keeps into the mode of a transaction: by the extended protocol, which leaves the client's
    /// unnamed statement alone. Bounded.
    pub(super) async fn dress(&mut self, permits: Permits) -> Result<(), Farewell> {
        if self.kept.is_none() || self.client.who.replicates() {
            return Ok(());
        }
        if permits == Permits::Reads {
            self.note_own_mode().await?;
        }
        let Some(kept) = self.kept.as_ref() else { return Ok(()) };
        let dress = self.dress_for(permits);
        let wanted = dress.as_ref().unwrap_or(&self.settings);
        let applied = kept.pooled.applied.with(READ_ONLY_MODE, wanted.value(READ_ONLY_MODE));
        if applied == *kept.pooled.applied {
            return Ok(());
        }
        let mut batch = Batch::default();
        match wanted.value(READ_ONLY_MODE) {
            Some(value) => batch.run(SET, [&[READ_ONLY_MODE, value][..]]),
            None => batch.run(TAKE_BACK, [&[][..]]),
        }
        batch.sync();
        let applied = if applied == **wanted { Arc::clone(wanted) } else { Arc::new(applied) };
        self.say(batch).await?;
        if let Some(kept) = self.kept.as_mut() {
            kept.pooled.applied = applied;
        }
        Ok(())
    }

    /// Of a server that does not report it: what the client has made of read-only mode itself, to be given back.
    async fn note_own_mode(&mut self) -> Result<(), Farewell> {
        let Some(kept) = self.kept.as_ref() else { return Ok(()) };
        let is_on = kept.pooled.applied.value(READ_ONLY_MODE) == Some(b"on");
        if is_on || parameters::reported(&kept.pooled.initial, READ_ONLY_MODE).is_some() {
            return Ok(());
        }
        let mut batch = Batch::default();
        batch.run(ASK, [&[][..]]);
        batch.sync();
        let own = self.say(batch).await?;
        let settings = Arc::new(self.settings.with(READ_ONLY_MODE, own.as_deref()));
        if let Some(kept) = self.kept.as_mut() {
            kept.pooled.applied = Arc::new(kept.pooled.applied.with(READ_ONLY_MODE, own.as_deref()));
        }
        self.settings = settings;
        Ok(())
    }

    /// The text of a statement that the client has prepared on the server that it keeps; empty for none.
    async fn text_of(&mut self, name: &[u8]) -> Result<Vec<u8>, Farewell> {
        if self.kept.is_none() {
            return Ok(Vec::new());
        }
        let mut batch = Batch::default();
        batch.run(TEXT, [&[name][..]]);
        batch.sync();
        Ok(self.say(batch).await?.unwrap_or_default())
    }

    /// Says something of ours to the server that it keeps: the first value of the answer. What a server refuses has no value.
    async fn say(&mut self, batch: Batch) -> Result<Option<Vec<u8>>, Farewell> {
        if !self.quiet().await? {
            // A message is half through that the client does not read: nothing can be said in the middle of it.
            return Err(Farewell::Refused(Box::new(Report::admin_shutdown())));
        }
        let Some(kept) = self.kept.as_mut() else { return Ok(None) };
        let deadline = tokio::time::Instant::now() + OWN_STATEMENT;
        let heard = Box::pin(kept.pooled.server.converse(batch, Asides::Notifications, deadline)).await;
        let answers = heard.map_err(|error| Farewell::ServerGone(error.to_string()))?;
        self.pass_on_asides().await?;
        for refused in answers.iter().filter_map(|answer| answer.refused.as_ref()) {
            tracing::warn!(client = self.client.who.id, %refused, "a statement of ours was refused while writes are held");
        }
        let row = answers.first().and_then(|answer| answer.rows.first());
        Ok(row.and_then(|row| row.bytes(0)).map(<[u8]>::to_vec))
    }

    /// What a server reports, with the client's own read-only mode in the place of ours.
    pub(super) fn own_view(&self, pooled: &Pooled, parameters: &Reported) -> Reported {
        let mut view = parameters.clone();
        if let Some(own) = self.settings.own_mode(&pooled.initial) {
            parameters::report(&mut view, READ_ONLY_MODE, own);
        }
        view
    }

    /// Whether the connection is still in the mode that we put it into, after what it reported.
    pub(super) fn is_still_worn(&self, permits: Permits, reported: &[Pair]) -> bool {
        let last = reported.iter().rfind(|(name, _)| name.eq_ignore_ascii_case(READ_ONLY_MODE));
        permits == Permits::Reads && last.is_none_or(|(_, value)| **value == *b"on")
    }
}

/// What a server reported that is the client's own doing: of our mode it tells again when the client's is rolled back.
pub(super) fn own(permits: Permits, reported: &[Pair]) -> impl Iterator<Item = &Pair> {
    let ours = move |(name, value): &Pair| {
        permits == Permits::Reads && name.eq_ignore_ascii_case(READ_ONLY_MODE) && **value == *b"on"
    };
    reported.iter().filter(move |pair| !ours(pair))
}

/// What a client is told whose write the server refuses because of a pause.
pub(super) fn advice(permits: Permits, gate: &Gate) -> Option<Box<str>> {
    if permits == Permits::All {
        return None;
    }
    let Some(pause) = gate.writes() else {
        return Some("Writes were held when this transaction began and are no longer: try again.".into());
    };
    // An address is nothing for clients.
    let owner = pause.owner.split('@').next().unwrap_or_default();
    Some(
        format!("Writes of this database are paused by {owner}; reads go on. Try again when the pause is over.").into(),
    )
}
