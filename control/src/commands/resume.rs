//! `proxyctl resume`: lets the clients of every proxy go.
//!
//! Invariant: an owned pause is only ended by its owner's run and epoch, or by force; the proxies see to it.

use clap::Args;
use pgcutover_api::command::{Command, ResumeWith, Scope};

use crate::commands::{Answers, Context, Right};
use crate::printer::Exit;
use crate::proxies::SHOW_DEADLINE;

/// By what right.
#[derive(Debug, Args)]
pub struct Resume {
    #[command(flatten)]
    right: Right,
}

impl Resume {
    /// Resumes every proxy that can be reached.
    pub async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let database = context.config.database.clone();
        let command = match self.right.warrant() {
            Some(warrant) => Command::ResumeWith(ResumeWith { database, warrant }),
            None => Command::Resume(Scope::Database(database)),
        };
        let (fleet, unreached) = context.fleet().await;
        let answers = fleet.each(|proxy| proxy.order_aside(&command, SHOW_DEADLINE)).await;
        let answers = Answers::new(command.to_string(), answers).and_unreached(unreached);
        context.printer.data(&answers);
        Ok(if answers.all_done() { Exit::Done } else { Exit::Unfinished })
    }
}
