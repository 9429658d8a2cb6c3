//! `proxyctl report RUN`: rebuilds a run's report from its journal; and what every run tells at its end.
//!
//! Invariant: reads the journal only; asks no server and no proxy.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use pgcutover_api::epoch::RunId;

use crate::commands::Context;
use crate::event::Ending;
use crate::finding::Level;
use crate::journal::{self, Journal};
use crate::printer::{Exit, Printer};
use crate::report::samples::Samples;
use crate::report::{self, html};

/// Which run.
#[derive(Debug, Args)]
pub struct Report {
    /// The run.
    run: RunId,
    /// Write the HTML page there (default: beside the journal).
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// What clients saw: lines of client,at_us,stall_us.
    #[arg(long, value_name = "FILE")]
    clients: Option<PathBuf>,
}

impl Report {
    /// Builds and prints it.
    pub fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let journal = journal::path(&context.config.journal_dir, self.run);
        let replay = journal::read(&journal)?;
        let samples = self.clients.as_deref().map(Samples::load).transpose()?.unwrap_or_default();
        let page = self.report.clone().unwrap_or_else(|| journal.with_extension("html"));
        let mut report = report::Report::fold(&journal, &replay.records, &replay.state);
        html::write(&page, &report, &samples).with_context(|| page.display().to_string())?;
        report.report_html = Some(page);
        context.printer.data(&report);
        Ok(Exit::Done)
    }
}

/// Tells how a run ended that this process took part in, and writes its page; the exit code of that ending.
pub fn tell(printer: Printer, journal: &Journal, page: Option<PathBuf>, clients: Option<&Path>) -> Exit {
    let mut report = report::Report::fold(journal.path(), journal.records(), journal.state());
    let page = page.unwrap_or_else(|| journal.path().with_extension("html"));
    let samples = clients.map(Samples::load).transpose().map_err(anyhow::Error::from);
    match samples.and_then(|samples| Ok(html::write(&page, &report, &samples.unwrap_or_default())?)) {
        Ok(()) => report.report_html = Some(page),
        // The run is what counts: a page that cannot be written is told.
        Err(error) => printer.talk(format_args!("proxyctl: no report page: {error:#}")),
    }
    printer.data(&report);
    printer.next(next(&report));
    let exit = report.outcome.into();
    let differs = report.verification.is_some_and(|verification| verification.differs());
    if exit == Exit::Done && differs { Exit::Differs } else { exit }
}

/// What a person does after a run that ended so.
fn next(report: &report::Report) -> String {
    let source = &report.source;
    let is_red = report.findings.iter().any(|finding| finding.level == Level::Red);
    match report.outcome {
        Ending::Rehearsed => "the same without rehearsing, when the time has come".to_owned(),
        Ending::Committed => {
            format!("'proxyctl status' tells where everything stands; {source} stays fenced")
        }
        Ending::Refused | Ending::Aborted if is_red => {
            "mend what is red above; 'proxyctl preflight' looks without holding anybody; then the same again".to_owned()
        }
        Ending::Refused | Ending::Aborted => "the same again, when the time has come".to_owned(),
        Ending::Unfinished => "'proxyctl resume-run' finishes what does not follow by itself".to_owned(),
        Ending::Undecided => format!("see that {source} answers, then 'proxyctl resume-run'"),
    }
}
