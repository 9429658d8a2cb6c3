//! `proxyctl switch`: routes every proxy to the target.
//!
//! Invariant: without force each proxy first reads the commit itself.

use clap::{ArgGroup, Args};
use pgcutover_api::command::{Command, Switch as Order};

use crate::commands::{Answers, Context, Right};
use crate::printer::Exit;
use crate::proxies::SHOW_DEADLINE;

/// By what right, and whereto.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("right").args(["run", "force"]).required(true)))]
pub struct Switch {
    /// The backend to route to (default: the target's).
    #[arg(long)]
    to: Option<String>,
    #[command(flatten)]
    right: Right,
}

impl Switch {
    /// Switches every proxy that can be reached.
    pub async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let backend = self.to.clone().unwrap_or_else(|| context.config.target.backend.clone());
        let warrant = self.right.warrant().ok_or_else(|| anyhow::anyhow!("--run and --epoch, or --force"))?;
        let command = Command::Switch(Order { database: context.config.database.clone(), backend, warrant });
        let (fleet, unreached) = context.fleet().await;
        let answers = fleet.each(|proxy| proxy.order_aside(&command, SHOW_DEADLINE)).await;
        let answers = Answers::new(command.to_string(), answers).and_unreached(unreached);
        context.printer.data(&answers);
        Ok(if answers.all_done() { Exit::Done } else { Exit::Unfinished })
    }
}
