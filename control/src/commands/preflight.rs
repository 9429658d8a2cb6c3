//! `proxyctl preflight`: everything that would make a cutover fail, without touching anything.
//!
//! Invariant: the same findings that `cutover` starts with.

use std::fmt;

use serde::Serialize;

use crate::clusters::Clusters;
use crate::commands::Context;
use crate::finding::{Finding, Level};
use crate::printer::Exit;
use crate::roster;
use crate::steps::inspection;

#[derive(Serialize)]
struct Findings {
    level: Level,
    findings: Vec<Finding>,
}

/// Looks and prints; `then` is the command that a person types next where nothing is red.
pub async fn run(context: &Context, then: Option<&str>) -> anyhow::Result<Exit> {
    let config = &context.config;
    let clusters = Clusters::connect(&config.source.endpoint, &config.target.endpoint).await?;
    let fleet = roster::assemble(config, &clusters.source).await?;
    let mut findings = inspection::inspect(config, &clusters, &fleet).await?;
    // As in a run that is refused.
    fleet.each(|proxy| inspection::let_go(config, proxy)).await;
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    let level = findings.first().map_or(Level::Green, |finding| finding.level);
    context.printer.data(&Findings { level, findings });
    match (level, then) {
        (_, None) => {}
        (Level::Red, Some(_)) => context.printer.next("mend what is red, then look again"),
        (Level::Yellow | Level::Green, Some(then)) => context.printer.next(format_args!("'proxyctl {then}'")),
    }
    Ok(if level == Level::Red { Exit::Refused } else { Exit::Done })
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        let of = |level| self.findings.iter().filter(|finding| finding.level == level).count();
        let (red, yellow, green) = (of(Level::Red), of(Level::Yellow), of(Level::Green));
        let verdict = if red == 0 { "nothing stands in the way" } else { "a run would refuse to start" };
        write!(f, "{verdict}: {red} red, {yellow} yellow, {green} green")
    }
}
