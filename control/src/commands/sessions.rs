//! `proxyctl sessions`: every client of the database on every proxy, and what a cutover will make of it.
//!
//! Invariant: nobody is held for it; a proxy that does not answer is told and hides nothing else.

use std::fmt;

use clap::Args;
use pgcutover_api::rows::{Prospect, SessionRow};
use serde::Serialize;

use crate::commands::Context;
use crate::printer::Exit;
use crate::proxies::{Proxy, ProxyError};
use crate::steps::inspection;

/// What may be asked.
#[derive(Debug, Clone, Copy, Args)]
pub struct Sessions {
    /// Have each session looked at first, as preflight does (PREPARE SWITCH: proxies also open connections to the target).
    #[arg(long)]
    look: bool,
}

#[derive(Serialize)]
struct List {
    database: String,
    sessions: Vec<Line>,
    /// Proxies that did not answer.
    errors: Vec<String>,
}

#[derive(Serialize)]
struct Line {
    proxy: String,
    verdict: &'static str,
    reason: String,
    client_id: u64,
    user: String,
    application_name: String,
    addr: String,
    port: u16,
    pool_mode: &'static str,
    state: &'static str,
}

impl Sessions {
    /// Asks every proxy and prints.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let (fleet, unreached) = context.fleet().await;
        let mut errors: Vec<String> = unreached.iter().map(ProxyError::to_string).collect();
        let mut sessions = Vec::new();
        for (proxy, answer) in fleet.each(|proxy| self.of(context, proxy)).await {
            match answer {
                Ok(rows) => sessions.extend(rows.into_iter().map(|row| line(proxy, row))),
                Err(error) => errors.push(error.to_string()),
            }
        }
        // Whoever holds a cutover up comes first.
        sessions.sort_by_key(|line| line.verdict == Prospect::Moves.word());
        let exit = if errors.is_empty() { Exit::Done } else { Exit::Unexpected };
        context.printer.data(&List { database: context.config.database.clone(), sessions, errors });
        Ok(exit)
    }

    async fn of(self, context: &Context, proxy: &Proxy) -> Result<Vec<SessionRow>, ProxyError> {
        if self.look {
            inspection::prepare(&context.config, proxy).await?;
        }
        proxy.sessions(&context.config.database).await
    }
}

fn line(proxy: &str, row: SessionRow) -> Line {
    Line {
        proxy: proxy.to_owned(),
        verdict: row.verdict.word(),
        reason: row.reason,
        client_id: row.client_id,
        user: row.user,
        application_name: row.application_name,
        addr: row.addr,
        port: row.port,
        pool_mode: row.pool_mode.word(),
        state: row.state.word(),
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.sessions {
            let Line { proxy, verdict, client_id, user, application_name, addr, port, .. } = line;
            write!(f, "{verdict:<8} {proxy} client {client_id} {user} from {addr}:{port} ({application_name}), ")?;
            write!(f, "{} pooling, {}", line.pool_mode, line.state)?;
            if line.reason.is_empty() { writeln!(f)? } else { writeln!(f, ": {}", line.reason)? }
        }
        self.errors.iter().try_for_each(|error| writeln!(f, "ERROR: {error}"))?;
        let moving = self.sessions.iter().filter(|line| line.verdict == Prospect::Moves.word()).count();
        write!(f, "{}: {} sessions, {moving} of them move", self.database, self.sessions.len())
    }
}
