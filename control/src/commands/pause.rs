//! `proxyctl pause`: holds the clients of every proxy, all or none.
//!
//! Invariant: the pause has a lease; one that failed somewhere is taken back everywhere.

use std::time::Duration;

use clap::Args;
use pgcutover_api::command::{Command, EpochPause, Mode, PauseWith, ResumeWith, Scope, Warrant};
use pgcutover_api::epoch::Lease;

use crate::commands::{Answers, Context, Owner};
use crate::printer::Exit;
use crate::proxies::{ProxyErrors, SHOW_DEADLINE};

/// How.
#[derive(Debug, Args)]
pub struct Pause {
    #[command(flatten)]
    owner: Owner,
    /// How long open transactions may take to end (default: budgets.drain).
    #[arg(long, value_parser = humantime::parse_duration)]
    drain: Option<Duration>,
    /// How long the pause lasts (default: budgets.lease).
    #[arg(long, value_parser = humantime::parse_duration)]
    lease: Option<Duration>,
}

impl Pause {
    /// Pauses every proxy, or none.
    pub async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = &context.config;
        let (fleet, absent) = context.fleet().await;
        if !absent.is_empty() {
            return Err(ProxyErrors(absent).into());
        }
        let drain = self.drain.unwrap_or(config.budgets.drain);
        let command = self.command(context, drain)?;
        let answers = fleet.each(|proxy| proxy.order(&command, drain + SHOW_DEADLINE)).await;
        let answers = Answers::new(command.to_string(), answers);
        context.printer.data(&answers);
        if answers.all_done() {
            return Ok(Exit::Done);
        }
        let back = self.back(&config.database);
        context
            .printer
            .data(&Answers::new(back.to_string(), fleet.each(|p| p.order_aside(&back, SHOW_DEADLINE)).await));
        Ok(Exit::Aborted)
    }

    fn command(&self, context: &Context, drain: Duration) -> anyhow::Result<Command> {
        let config = &context.config;
        let epoch = self.owner.claim().map(|claim| EpochPause {
            claim,
            source: config.source.backend.clone(),
            target: config.target.backend.clone(),
        });
        Ok(Command::PauseWith(PauseWith {
            database: config.database.clone(),
            epoch,
            drain: Some(drain),
            on_timeout: config.policy.on_timeout,
            lease: Some(Lease::try_from(self.lease.unwrap_or(config.budgets.lease))?),
            mode: Mode::All,
        }))
    }

    fn back(&self, database: &str) -> Command {
        match self.owner.claim() {
            Some(claim) => {
                Command::ResumeWith(ResumeWith { database: database.to_owned(), warrant: Warrant::Claim(claim) })
            }
            None => Command::Resume(Scope::Database(database.to_owned())),
        }
    }
}
