//! `proxyctl verify`: both servers compared, table by table, while replication runs; before a cutover it proves the copy, after one
//! the way back.
//!
//! Invariant: nothing is changed, but for an empty message in the source's log, whose position is awaited on the target.

use crate::clusters::{Clusters, Role};
use crate::commands::Context;
use crate::printer::Exit;
use crate::report::verification::Compared;
use crate::steps::{reverse, rounds};

/// Compares in the direction in which replication runs.
pub async fn run(context: &Context) -> anyhow::Result<Exit> {
    let given = &context.config;
    let clusters = Clusters::connect(&given.source.endpoint, &given.target.endpoint).await?;
    let served = reverse::served(given, &clusters).await?;
    let (config, clusters) = if served.is_some_and(|served| served.by == Role::Target) {
        let config = given.clone().turned(None);
        let clusters = Clusters::connect(&config.source.endpoint, &config.target.endpoint).await?;
        (config, clusters)
    } else {
        (given.clone(), clusters)
    };
    let progress = context.printer.progress();
    let verification = rounds::verify(&config, &clusters, &|line| progress.now(line)).await?;
    drop(progress);
    context.printer.data(&verification);
    let busy = verification.tables.iter().any(|line| matches!(line.result, Compared::Busy { .. }));
    Ok(if verification.differs() {
        Exit::Differs
    } else if busy || verification.none.is_some() {
        Exit::Refused
    } else {
        Exit::Done
    })
}
