//! `cargo run -p e2e --bin kills`: the kill matrix, every step × {before, after} × every victim, and its table.
//!
//! Invariant: a cell that could not be played is a failure; the table holds what happened in this very run.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::binaries::{Binaries, Network};
use e2e::bouncer::Bouncer;
use e2e::control::Control;
use e2e::kills::{AWAY, Cell, Kind, Members, OUTAGE, Outcome, Setting, Victim};
use e2e::printer::{result, say};
use e2e::program::{self, Output};
use futures_util::StreamExt;
use serde_json::json;

/// Kills proxyctl, a proxy, the source, the target, or one proxy's network before and after every step of a cutover under
/// load. What died is started again after a second and a half, proxyctl is not, and a source that is gone stays away for longer than
/// clients are held; nobody else intervenes. Each cell must end with everybody on one side, a ledger that adds up, and a loser that
/// takes no writes; the table has the side and the milliseconds from the kill until everybody serves.
///
/// Exit codes: 0 every cell ended well; 1 otherwise.
#[derive(Debug, Parser)]
#[command(name = "kills")]
struct Args {
    /// Only these steps
    #[arg(long)]
    step: Vec<String>,
    /// Only before, or only after
    #[arg(long, value_parser = ["before", "after"])]
    moment: Option<String>,
    /// Only these victims: proxyctl, proxy, source, source-gone, target, network; with a PgBouncer proxyctl, pgbouncer, keeper
    #[arg(long)]
    victim: Vec<Victim>,
    /// How the target follows the source
    #[arg(long, value_enum, default_value_t)]
    kind: Kind,
    /// Who stands before the servers
    #[arg(long, value_enum, default_value_t)]
    members: Members,
    /// Cells at the same time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Major of the source, if it is not the target's own primary
    #[arg(long, default_value_t = 13)]
    from: u32,
    /// Major of the target
    #[arg(long, default_value_t = 17)]
    to: u32,
    /// What goes to stdout
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("kills", async { matrix(&args).await.map(program::exit) })
}

type Played = (Cell, Result<Outcome, String>);

async fn matrix(args: &Args) -> Result<bool> {
    let setting = Setting { kind: args.kind, members: args.members, majors: (args.from, args.to) };
    let binaries = match args.kind {
        Kind::Logical => Binaries::of(&[args.from, args.to])?,
        Kind::Physical => Binaries::of(&[args.to])?,
    };
    if args.members == Members::Pgbouncer {
        Bouncer::installed(Network::from_env())?;
    }
    let all = steps().await?;
    let unknown = args.step.iter().find(|step| !all.contains(step));
    ensure!(
        unknown.is_none(),
        "no step is called {}; there are {}",
        unknown.map_or("", String::as_str),
        all.join(", ")
    );
    let steps: Vec<String> = all.into_iter().filter(|step| args.step.is_empty() || args.step.contains(step)).collect();
    let mut victims = setting.victims().to_vec();
    victims.retain(|victim| args.victim.is_empty() || args.victim.contains(victim));
    ensure!(!victims.is_empty(), "none of these victims is there");
    let moments = ["before", "after"].into_iter();
    let moments: Vec<_> = moments.filter(|moment| args.moment.as_ref().is_none_or(|only| only == moment)).collect();
    let cells = steps.iter().flat_map(|step| {
        let victims = &victims;
        moments.iter().flat_map(move |moment| {
            victims.iter().map(move |victim| Cell { step: step.clone(), moment, victim: *victim })
        })
    });
    let plays = cells.map(|cell| {
        let (binaries, setting) = (&binaries, &setting);
        async move {
            let played = cell.play(binaries, setting).await.map_err(|error| format!("{error:#}"));
            say(told(&cell, &played));
            (cell, played)
        }
    });
    let mut played: Vec<Played> = Vec::new();
    let mut plays = futures_util::stream::iter(plays).buffered(args.jobs.max(1));
    while let Some(cell) = plays.next().await {
        played.push(cell);
    }
    match args.output {
        Output::Text => result(table(&steps, &victims, &played)),
        Output::Json => result(json!({
            "setting": setting, "outage_ms": OUTAGE.as_millis() as u64, "away_ms": AWAY.as_millis() as u64, "cells": lines(&played),
        })),
    }
    Ok(played.iter().all(|(_, played)| played.is_ok()))
}

/// The steps, as proxyctl itself tells them.
async fn steps() -> Result<Vec<String>> {
    const LIMIT: Duration = Duration::from_secs(20);
    let plan = Control::bare()?.run(&["plan"], LIMIT).await?.json()?;
    let steps = plan["steps"].as_array().context("a plan without steps")?;
    steps.iter().map(|step| Ok(step["name"].as_str().context("a step without a name")?.to_owned())).collect()
}

fn told(cell: &Cell, played: &Result<Outcome, String>) -> String {
    match played {
        Ok(outcome) => {
            let Outcome { side, service_ms, exit, client_errors, sqlstates, shed_ms, .. } = outcome;
            let exit = exit.map_or("killed".to_owned(), |exit| format!("exit {exit}"));
            let shed = shed_ms.map_or(String::new(), |(least, most)| format!(", shed after {least}-{most} ms"));
            format!("{cell}: {side} after {service_ms} ms, {exit}, {client_errors} client errors {sqlstates:?}{shed}")
        }
        Err(error) => format!("{cell}: FAILED: {error}"),
    }
}

fn lines(played: &[Played]) -> Vec<serde_json::Value> {
    let line = |(cell, played): &Played| match played {
        Ok(outcome) => json!(outcome),
        Err(error) => json!({ "step": cell.step, "moment": cell.moment, "victim": cell.victim, "failed": error }),
    };
    played.iter().map(line).collect()
}

fn table(steps: &[String], victims: &[Victim], played: &[Played]) -> String {
    let words: Vec<&str> = victims.iter().map(|victim| victim.word()).collect();
    let mut lines = vec![format!("| killed | {} |", words.join(" | ")), format!("|---|{}", "---|".repeat(words.len()))];
    for (step, moment) in steps.iter().flat_map(|step| ["before", "after"].map(|moment| (step, moment))) {
        let cells = victims.iter().map(|victim| {
            let here = |(cell, _): &&Played| cell.step == *step && cell.moment == moment && cell.victim == *victim;
            match played.iter().find(here) {
                Some((_, Ok(outcome))) => format!("{} {} ms", outcome.side, outcome.service_ms),
                Some((_, Err(_))) => "FAILED".to_owned(),
                None => "not played".to_owned(),
            }
        });
        lines.push(format!("| {moment} {step} | {} |", cells.collect::<Vec<_>>().join(" | ")));
    }
    lines.join("\n")
}
