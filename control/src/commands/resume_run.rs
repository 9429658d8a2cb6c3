//! `proxyctl resume-run`: takes up a run that broke off, undoes it or brings it to its end, and says which.
//!
//! Invariant: what the store says decides, not the journal; nothing is done for a run whose proxyctl may be alive.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use pgcutover_api::epoch::{Claim, RunId};
use pgcutover_api::store::{Outcome, StoreView, Turn};

use crate::clusters::{Cluster, ClusterError, Clusters, DecideError, Role};
use crate::commands::{Context, interrupt, report};
use crate::config::{Config, Replication};
use crate::engine::{Engine, Hooks};
use crate::event::{Began, Decision, Event};
use crate::journal::{self, Journal, JournalError};
use crate::plan::Goal;
use crate::printer::{Exit, Printer};
use crate::roster;
use crate::standing::{Standing, Views};
use crate::state::Phase;
use crate::steps::{STEP_DEADLINE, Scene, kept};

/// Which run, and by what.
#[derive(Debug, Args)]
pub struct ResumeRun {
    /// The run (default: the one whose epoch is open, else the last one in the journals that broke off).
    run: Option<RunId>,
    /// Its journal is lost or damaged: act on what the store says alone. Be sure that its proxyctl is dead.
    #[arg(long, requires = "run")]
    without_journal: bool,
    /// Write the HTML page there (default: beside the journal).
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    #[command(flatten)]
    hooks: Hooks,
}

/// What both stores say, and why one does not.
struct Survey {
    source: Result<StoreView, ClusterError>,
    target: Result<StoreView, ClusterError>,
}

impl Survey {
    async fn take(config: &Config) -> Survey {
        let clusters = Clusters::unconnected(&config.source.endpoint, &config.target.endpoint);
        let (source, target) = tokio::join!(view(config, &clusters.source), view(config, &clusters.target));
        Survey { source, target }
    }

    fn views(&self) -> Views<'_> {
        Views { source: self.source.as_ref().ok(), target: self.target.as_ref().ok() }
    }

    fn open(&self) -> Option<RunId> {
        self.source.as_ref().ok()?.open.as_ref().map(|open| open.run)
    }
}

async fn view(config: &Config, cluster: &Cluster) -> Result<StoreView, ClusterError> {
    if cluster.installed(STEP_DEADLINE).await? {
        cluster.view(&config.route, STEP_DEADLINE).await
    } else {
        Ok(StoreView::default())
    }
}

impl ResumeRun {
    /// Finds the run, asks the store, acts.
    pub async fn run(self, context: Context) -> anyhow::Result<Exit> {
        let Context { config, printer } = context;
        let (config, survey) = heading(config, self.run).await;
        let found = self.run.or_else(|| survey.open());
        let Some(run) = found.map_or_else(|| broken_off(&config, printer), |run| Ok(Some(run)))? else {
            return Ok(nothing(&config, printer, &survey));
        };
        match self.journal(&config, run) {
            Ok(journal) => self.take_up(config, printer, journal, run).await,
            Err(JournalError::Io { error, path }) if error.kind() == std::io::ErrorKind::NotFound => {
                let standing = Standing::of(run, None, survey.views());
                printer.talk(format_args!("proxyctl: {}", lost(&config, run, &path, standing)));
                Ok(Exit::Refused)
            }
            Err(error @ (JournalError::Locked { .. } | JournalError::Damaged { .. })) => {
                let standing = Standing::of(run, None, survey.views());
                printer.talk(format_args!("proxyctl: run {run}: {standing}; {error}"));
                Ok(Exit::Refused)
            }
            Err(JournalError::Empty { path }) => {
                printer.talk(format_args!("proxyctl: {}", JournalError::Empty { path }));
                Ok(Exit::Done)
            }
            Err(error @ (JournalError::Io { .. } | JournalError::Illegal(_))) => Err(error.into()),
        }
    }

    fn journal(&self, config: &Config, run: RunId) -> Result<Journal, JournalError> {
        let (dir, database) = (&config.journal_dir, &config.database);
        if !self.without_journal {
            return Journal::reopen(dir, database, run);
        }
        match Journal::reopen(dir, database, run) {
            Err(JournalError::Damaged { .. } | JournalError::Empty { .. }) => {
                journal::set_aside(dir, run)?;
                Journal::create(dir, database, run)
            }
            Err(JournalError::Io { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => {
                Journal::create(dir, database, run)
            }
            other => other,
        }
    }

    async fn take_up(self, config: Config, printer: Printer, journal: Journal, run: RunId) -> anyhow::Result<Exit> {
        let config = match began(&journal) {
            Some(began) if is_the_other_way(began, &config) => config.turned(None),
            Some(_) | None => config,
        };
        if let Some(began) = began(&journal)
            && let Some(other) = other_move(began, &config)
        {
            printer.talk(format_args!("proxyctl: run {run} {other}"));
            return Ok(Exit::Usage);
        }
        // With the lock held: nobody here moves it any more.
        let survey = Survey::take(&config).await;
        let standing = Standing::of(run, journal.state().epoch, survey.views());
        printer.talk(format_args!("run {run} {}; {standing}", broke_off(&journal)));
        if let Some(contradiction) = standing.contradicts(journal.state()) {
            let whose = "it is another run's or was altered: 'proxyctl status' shows what counts";
            printer.talk(format_args!("proxyctl: {contradiction}; {whose}"));
            return Ok(Exit::Unexpected);
        }
        if standing == Standing::Unknown {
            let error = survey.source.err().map(|error| error.to_string()).unwrap_or_default();
            printer.talk(format_args!("proxyctl: {error}; proxies hold by their own rules, run this again"));
            return Ok(Exit::Undecided);
        }
        if let Standing::Older(epoch) = standing
            && committed(&config, Claim { run, epoch }).await?
        {
            printer.talk("it was committed, and the database has moved on since: nothing is left to do for it");
            return Ok(Exit::Done);
        }
        // An epoch that opened after all, or a run with a step that could not be taken back, is something left to do.
        if journal.state().is_over() && !journal.records().is_empty() && standing.epoch() == journal.state().epoch {
            printer.talk("nothing is left to do for it");
            return Ok(report::tell(printer, &journal, self.report, None));
        }
        let goal = if journal.records().is_empty() { Goal::Cutover } else { journal.state().goal };
        let mut scene = Scene::new(config, journal, run);
        (scene.fleet, scene.absent) = roster::assemble_some(&scene.config, &scene.clusters.source).await;
        // Where a keeper died with the run, nobody else lets its PgBouncer go.
        if let Err(error) = kept::keep_unleased(&mut scene).await {
            printer.talk(format_args!("proxyctl: {error}"));
        }
        let mut engine = Engine::new(scene, goal, printer.progress(), interrupt(printer)?, self.hooks);
        let ended = engine.take_up(standing.epoch(), commit(standing)).await;
        if let Some(keepers) = engine.scene.keepers.take() {
            keepers.end().await;
        }
        let Engine { scene, progress, .. } = engine;
        drop(progress);
        let exit = report::tell(printer, &scene.journal, self.report, None);
        ended.context("the journal could not be written: the run stands as reported")?;
        Ok(exit)
    }
}

/// No run was named, none is known here.
fn nothing(config: &Config, printer: Printer, survey: &Survey) -> Exit {
    match &survey.source {
        Ok(_) => {
            let database = &config.database;
            printer
                .talk(format_args!("proxyctl: nothing to take up: no epoch of {database} is open, no run broke off"));
            Exit::Done
        }
        Err(error) => {
            printer
                .talk(format_args!("proxyctl: {error}: whether an epoch is open is not known; no run broke off here"));
            Exit::Undecided
        }
    }
}

/// How an epoch ended that newer ones came after: nothing can be decided about it any more, so this only reads.
async fn committed(config: &Config, claim: Claim) -> Result<bool, DecideError> {
    let source = Cluster::new(Role::Source, &config.source.endpoint);
    let turn = Turn { db: config.route.clone(), claim };
    Ok(source.decide(&turn, Outcome::Abort, STEP_DEADLINE).await? == Outcome::Commit)
}

/// A commit that was read needs no asking: the source may be away.
fn commit(standing: Standing) -> Option<Decision> {
    match standing {
        Standing::Decided(_, Decision::Commit) => Some(Decision::Commit),
        Standing::Decided(_, Decision::Abort)
        | Standing::Open(_)
        | Standing::Older(_)
        | Standing::Unopened
        | Standing::Unknown => None,
    }
}

/// The configuration in the direction of what is to be taken up: a rollback's epochs are on what it calls the target. One
/// that is open there, or was last there, and not on the source, tells.
async fn heading(config: Config, run: Option<RunId>) -> (Config, Survey) {
    let survey = Survey::take(&config).await;
    let known = |view: &StoreView| {
        let open = view.open.as_ref().map(|open| open.run);
        let last = view.last.as_ref().map(|last| last.run);
        match run {
            Some(run) => open == Some(run) || last == Some(run),
            None => open.is_some(),
        }
    };
    let there = |view: &Result<StoreView, ClusterError>| view.as_ref().is_ok_and(known);
    // A standby knows all of its source's epochs, and a promoted one the open one: they are no rollback's.
    let physical = config.replication == Replication::Physical;
    if physical || there(&survey.source) || !there(&survey.target) {
        return (config, survey);
    }
    let Survey { source, target } = survey;
    (config.turned(None), Survey { source: target, target: source })
}

fn is_the_other_way(began: &Began, config: &Config) -> bool {
    [&began.source, &began.target] == [&config.target.backend, &config.source.backend]
}

/// The last run of this database that broke off, by the journals.
fn broken_off(config: &Config, printer: Printer) -> Result<Option<RunId>, JournalError> {
    let mut last: Option<(u64, RunId)> = None;
    for run in journal::runs(&config.journal_dir)? {
        let replay = match journal::read(&journal::path(&config.journal_dir, run)) {
            Ok(replay) => replay,
            Err(error) => {
                printer.talk(format_args!("proxyctl: {error}"));
                continue;
            }
        };
        let Some(first) = replay.records.first() else { continue };
        let ours = matches!(&first.event, Event::Began(began) if began.database == config.database);
        if ours && !replay.state.is_over() && last.is_none_or(|(at_us, _)| at_us < first.at_us) {
            last = Some((first.at_us, run));
        }
    }
    Ok(last.map(|(_, run)| run))
}

fn began(journal: &Journal) -> Option<&Began> {
    if let Event::Began(began) = &journal.records().first()?.event { Some(began) } else { None }
}

/// A configuration that names other servers would undo nothing, or the wrong thing.
fn other_move(began: &Began, config: &Config) -> Option<String> {
    let asked = [&config.database, &config.source.backend, &config.target.backend];
    let Began { database, source, target, .. } = began;
    (asked != [database, source, target]).then(|| {
        let [database_here, source_here, target_here] = asked;
        format!(
            "moves {database} from {source} to {target}, this configuration {database_here} from {source_here} to \
             {target_here}: give the one it was started with (-c)"
        )
    })
}

fn broke_off(journal: &Journal) -> String {
    if journal.records().is_empty() {
        return "has no journal".to_owned();
    }
    if let Phase::Ended(ending) = journal.state().phase {
        return format!("ended {ending}");
    }
    let started = |event: &Event| if let Event::Started { step } = event { Some(*step) } else { None };
    let step = journal.records().iter().rev().find_map(|record| started(&record.event));
    let place = step.map_or("before its first step".to_owned(), |step| format!("at '{step}'"));
    // The lock names a run, too: said once where it is this one.
    let own = began(journal).map(|began| format!("run {} of ", began.run)).unwrap_or_default();
    let who = journal.died_at_work().map(|who| format!(" ({})", who.strip_prefix(own.as_str()).unwrap_or(who)));
    let who = who.unwrap_or_default();
    format!("broke off {place}{who}")
}

fn lost(config: &Config, run: RunId, path: &std::path::Path, standing: Standing) -> String {
    let source = &config.source.backend;
    let without = format!("'proxyctl resume-run {run} --without-journal'");
    let then = match standing {
        Standing::Open(_) => format!(
            "if its proxyctl is dead: {without}, or 'proxyctl abort', takes everybody back to {source}; without either, \
             proxies do so when their leases end"
        ),
        Standing::Decided(_, Decision::Commit) => format!("proxies follow by themselves; {without} finishes the rest"),
        Standing::Decided(_, Decision::Abort) | Standing::Older(_) => {
            format!("proxies are on {source} by themselves; {without} removes what it left")
        }
        Standing::Unopened => "nobody is held for it, there is nothing to do".to_owned(),
        Standing::Unknown => format!("run this again when {source} is back"),
    };
    format!(
        "run {run} has no journal here ({}): it is lost, or on another machine; there 'proxyctl resume-run' is right. {}: {then}",
        path.display(),
        standing
    )
}
