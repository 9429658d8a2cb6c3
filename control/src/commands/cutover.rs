//! `proxyctl cutover`: the whole of it; `proxyctl rehearse`: all of it that can be taken back, and then taken back.
//!
//! Invariant: whatever happens after the journal is there, a report is printed and written.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use pgcutover_api::epoch::RunId;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::clusters::{Cluster, Clusters, Role};
use crate::commands::Context;
use crate::engine::{Engine, StopAt};
use crate::journal::{Journal, JournalError};
use crate::plan::Goal;
use crate::printer::{Exit, Printer};
use crate::proxies::Fleet;
use crate::report::samples::Samples;
use crate::report::{Report, html};
use crate::state::Ending;
use crate::steps::Scene;

/// How.
#[derive(Debug, Args)]
pub struct Cutover {
    /// Write the HTML page there (default: beside the journal).
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// What clients saw, read when the run is over: lines of client,at_us,stall_us.
    #[arg(long, value_name = "FILE")]
    clients: Option<PathBuf>,
    /// Kill this process before or after a step, for tests of what is left behind.
    #[arg(long, value_name = "before|after:STEP", hide = true)]
    stop_at: Option<StopAt>,
}

impl Cutover {
    /// Cuts over, or rehearses it.
    pub async fn run(self, goal: Goal, context: Context) -> anyhow::Result<Exit> {
        let printer = context.printer;
        let scene = match scene(context) {
            Ok(scene) => scene,
            Err(error @ JournalError::Locked { .. }) => {
                printer.talk(format_args!("proxyctl: {error}"));
                return Ok(Exit::Refused);
            }
            Err(error) => return Err(error.into()),
        };
        let journal = scene.journal.path().to_owned();
        printer.talk(format_args!("run {}, journal {}", scene.run, journal.display()));
        let mut engine = Engine::new(scene, goal, printer.progress(), interrupt(printer)?, self.stop_at);
        let ended = engine.run().await;
        let Engine { scene, progress, .. } = engine;
        drop(progress);
        let mut report = Report::fold(&journal, scene.journal.records(), scene.journal.state());
        let page = self.report.unwrap_or_else(|| journal.with_extension("html"));
        let samples = self.clients.as_deref().map(Samples::load).transpose();
        match samples
            .map_err(anyhow::Error::from)
            .and_then(|samples| Ok(html::write(&page, &report, &samples.unwrap_or_default())?))
        {
            Ok(()) => report.report_html = Some(page),
            // The cutover is what counts: a page that cannot be written is told.
            Err(error) => printer.talk(format_args!("proxyctl: no report page: {error:#}")),
        }
        printer.data(&report);
        Ok(exit(ended.context("the journal could not be written: the run stands as reported")?))
    }
}

/// Nobody is connected yet: what cannot be reached belongs into the report.
fn scene(context: Context) -> Result<Scene, JournalError> {
    let config = context.config;
    let run = RunId::random();
    let clusters = Clusters {
        source: Cluster::new(Role::Source, &config.source.endpoint),
        target: Cluster::new(Role::Target, &config.target.endpoint),
    };
    Ok(Scene {
        journal: Journal::create(&config.journal_dir, &config.database, run)?,
        database: config.route.clone(),
        decider: clusters.source.another(),
        config,
        run,
        clusters,
        identities: None,
        fleet: Fleet::none(),
        claim: None,
        catalogue: None,
        open_is_unknown: false,
        leases: None,
        heartbeat: None,
    })
}

/// Becomes true at Ctrl-C or SIGTERM: an orderly abort, as long as nothing is decided.
fn interrupt(printer: Printer) -> std::io::Result<watch::Receiver<bool>> {
    let (wanted, watch) = watch::channel(false);
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Ends with the process.
    tokio::spawn(async move {
        loop {
            tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
            printer.talk("ending: an undecided cutover is aborted, a decided one is finished");
            wanted.send_replace(true);
        }
    });
    Ok(watch)
}

fn exit(ending: Ending) -> Exit {
    match ending {
        Ending::Committed | Ending::Rehearsed => Exit::Done,
        Ending::Refused => Exit::Refused,
        Ending::Aborted => Exit::Aborted,
        Ending::Unfinished => Exit::Unfinished,
        Ending::Undecided => Exit::Undecided,
    }
}
