//! `proxyctl watch-pgbouncer`: keeps one PgBouncer, beside it, all year.
//!
//! Invariant: once it keeps it, it ends when it is told to and holds nobody, never because something is away.

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::bouncers::Keeper;
use crate::commands::Context;
use crate::printer::Exit;

/// Which.
#[derive(Debug, Args)]
pub struct WatchPgbouncer {
    /// Its name in [[pgbouncer]].
    name: String,
    /// Only say whether it could be kept.
    #[arg(long)]
    check: bool,
}

impl WatchPgbouncer {
    /// Keeps it until SIGTERM or Ctrl-C.
    pub async fn run(self, context: &Context) -> anyhow::Result<Exit> {
        let config = &context.config;
        let entry = config.bouncers.iter().find(|entry| entry.name == self.name);
        let entry = entry.ok_or_else(|| anyhow::anyhow!("no [[pgbouncer]] is called '{}'", self.name))?;
        let mut keeper = Keeper::new(config, entry);
        if let Err(problem) = keeper.check().await {
            context.printer.talk(format_args!("proxyctl: PgBouncer {}: {problem}", self.name));
            return Ok(Exit::Refused);
        }
        if self.check {
            return Ok(Exit::Done);
        }
        context.printer.talk(format_args!("keeping PgBouncer {}", self.name));
        let (wanted, stop) = watch::channel(false);
        let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let told = async {
            tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
            wanted.send_replace(true);
            // Ended by the keeper, once it holds nobody.
            std::future::pending::<()>().await;
        };
        let kept = tokio::select! {
            kept = keeper.run(stop) => kept,
            () = told => Ok(()),
        };
        match kept {
            Ok(()) => Ok(Exit::Done),
            Err(problem) => {
                context.printer.talk(format_args!("proxyctl: PgBouncer {}: {problem}", self.name));
                Ok(Exit::Refused)
            }
        }
    }
}
