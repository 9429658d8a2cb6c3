//! Runs one of the programs of `tests/drivers` and takes down what it says.
//!
//! Invariant: the program ends when this process does, however that ends: its stdin closes.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio_util::sync::CancellationToken;

use crate::drivers::course::{Engagement, Types};
use crate::drivers::{Notebook, note};

/// A line of its stdout; one of the fields, or `unknown` with `error`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    version: Option<String>,
    acknowledged: Option<i64>,
    unknown: Option<i64>,
    error: Option<String>,
    done: Option<Done>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Done {
    #[serde(rename = "rounds")]
    _rounds: u64,
    refused: u64,
}

pub(crate) async fn perform(
    mut command: Command,
    mode: &str,
    engagement: &Engagement,
    notebook: &Notebook,
    stop: CancellationToken,
) -> Result<()> {
    let types = if engagement.types == Types::BuiltIn { "0" } else { "1" };
    command.args([mode, &engagement.client.to_string(), engagement.pooling.word(), types]);
    command.arg(engagement.pace.as_millis().to_string()).envs(engagement.environment()).current_dir("/");
    let stderr = engagement.dir.join(format!("{}.stderr", engagement.client));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&stderr)?);
    let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().context("starting it")?;
    let mut stdin = child.stdin.take();
    let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
    let mut said_done = false;
    loop {
        tokio::select! {
            // Ends with the program; whoever waits for the performance has a limit.
            line = lines.next_line() => match line? {
                Some(line) => said_done |= take_down(&line, engagement.client, notebook)?,
                None => break,
            },
            () = stop.cancelled(), if stdin.is_some() => stdin = None,
        }
    }
    let status = child.wait().await?;
    if !status.success() || !said_done {
        let talk = fs::read_to_string(&stderr).unwrap_or_default();
        let last: Vec<&str> = talk.lines().rev().take(3).collect();
        bail!("the program ended with {status}: {}", last.into_iter().rev().collect::<Vec<_>>().join(" | "));
    }
    Ok(())
}

/// Was it the last line?
fn take_down(line: &str, client: i32, notebook: &Notebook) -> Result<bool> {
    let said: Line = serde_json::from_str(line).with_context(|| format!("not a line of ours: {line}"))?;
    note(notebook, |told| {
        told.version = said.version.or(told.version.take());
        told.acknowledged.extend(said.acknowledged.map(|n| (client, n)));
        told.unknown.extend(said.unknown.map(|n| (client, n)));
        told.errors.extend(said.error);
        told.refused += said.done.as_ref().map_or(0, |done| done.refused);
    });
    Ok(said.done.is_some())
}
