//! What may be typed, and what it says when `--help` is.
//!
//! Invariant: help, checks and completions come from the one definition below; every error ends in an exit code of `Exit`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::commands;
use crate::commands::Context;
use crate::config::{Config, ConfigError};
use crate::plan::Goal;
use crate::printer::{Exit, Output, Printer};

/// Moves a database to another PostgreSQL server while its clients keep their connections.
#[derive(Debug, Parser)]
#[command(name = "proxyctl", version, after_help = Exit::help(), max_term_width = 110)]
pub struct Cli {
    /// The description of the cutover; several, with commas between them, for several databases in one run: preflight, cutover,
    /// rehearse and rollback look at all of them first, then take one after the other.
    #[arg(
        short,
        long,
        global = true,
        value_name = "FILE[,FILE…]",
        default_value = "cutover.toml",
        env = "PROXYCTL_CONFIG",
        value_delimiter = ',',
        action = ArgAction::Set,
        num_args = 1
    )]
    config: Vec<PathBuf>,
    /// The form of stdout.
    #[arg(long, global = true, value_enum, default_value_t)]
    output: Output,
    #[command(subcommand)]
    verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
enum Verb {
    /// How gates, servers and replication stand.
    Status,
    /// Look for everything that would make a cutover fail; change nothing.
    Preflight,
    /// Every session on the proxies, whether it can be moved, and why not.
    Sessions(commands::sessions::Sessions),
    /// The steps of a cutover, their order and what happens when one fails; with --drift what differs from what is declared.
    Plan(commands::plan::Plan),
    /// Hold the clients of every proxy.
    Pause(commands::pause::Pause),
    /// Route every proxy to the target, by a recorded decision or by force.
    Switch(commands::switch::Switch),
    /// Let the clients of every proxy go.
    Resume(commands::resume::Resume),
    /// Decide the open epoch as aborted, open the fence, resume on the source.
    Abort,
    /// Take up a run that broke off: undo it, or bring it to its end, by what the store says; tell which.
    ResumeRun(commands::resume_run::ResumeRun),
    /// The cutover: from the first check to clients on the target.
    Cutover(commands::cutover::Cutover),
    /// Everything of a cutover that can be taken back, on the live system, then back: predicts how long clients would be held.
    Rehearse(commands::cutover::Cutover),
    /// The cutover the other way round: back to the server that served before.
    Rollback(commands::rollback::Rollback),
    /// Reverse replication, which keeps the server that served before in step: how it stands; attach it; drop it.
    WayBack(commands::way_back::WayBack),
    /// Compare both servers, whole tables, while replication runs: equal, different (and where), or too busy to tell.
    Verify,
    /// Build the report of a run from its journal.
    Report(commands::report::Report),
    /// What runs there were: when, by whom, how they ended, how long clients were held.
    History(commands::history::History),
    /// Keep a PgBouncer, beside it: hold, point it elsewhere and let go as the store says.
    WatchPgbouncer(commands::watch_pgbouncer::WatchPgbouncer),
    /// Our tables and gates in the databases: print, install or remove them.
    Objects(commands::objects::Objects),
    /// Completions for a shell.
    Completions(commands::completions::Completions),
}

/// Parses, does, tells.
pub async fn run(typed: impl IntoIterator<Item = OsString>) -> Exit {
    let cli = match Cli::try_parse_from(typed) {
        Ok(cli) => cli,
        Err(error) => {
            // clap knows which of help and error goes where.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Done };
        }
    };
    let filter = EnvFilter::try_from_env("PROXYCTL_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let printer = Printer::new(cli.output);
    match perform(cli, printer).await {
        Ok(exit) => exit,
        Err(error) => {
            printer.talk(format_args!("proxyctl: {error:#}"));
            if error.is::<ConfigError>() { Exit::Usage } else { Exit::Unexpected }
        }
    }
}

async fn perform(cli: Cli, printer: Printer) -> anyhow::Result<Exit> {
    let all = |alone: bool| contexts(&cli.config, alone, printer);
    let context = || one(&cli.config, printer);
    match cli.verb {
        Verb::Plan(plan) if plan.only_prints() => plan.print(printer),
        Verb::Plan(plan) => plan.run(&context()?).await,
        Verb::Completions(completions) => completions.run(&mut Cli::command(), printer),
        Verb::Objects(objects) if objects.only_prints() => objects.print(printer),
        Verb::Status => commands::status::run(&context()?).await,
        Verb::Preflight => commands::series::preflights(&all(false)?, Some("rehearse")).await,
        Verb::Sessions(sessions) => sessions.run(&context()?).await,
        Verb::Pause(pause) => pause.run(&context()?).await,
        Verb::Switch(switch) => switch.run(&context()?).await,
        Verb::Resume(resume) => resume.run(&context()?).await,
        Verb::Abort => commands::abort::run(&context()?).await,
        Verb::ResumeRun(resume_run) => resume_run.run(context()?).await,
        Verb::Cutover(cutover) => commands::series::run(&cutover, Goal::Cutover, all(cutover.is_of_one_run())?).await,
        Verb::Rehearse(rehearsal) => {
            commands::series::run(&rehearsal, Goal::Rehearsal, all(rehearsal.is_of_one_run())?).await
        }
        Verb::Rollback(rollback) => {
            let contexts = all(rollback.is_of_one_run())?;
            rollback.run(contexts).await
        }
        Verb::WayBack(way_back) => way_back.run(&context()?).await,
        Verb::Verify => commands::verify::run(&context()?).await,
        Verb::WatchPgbouncer(watch) => watch.run(&context()?).await,
        Verb::Report(report) => report.run(&context()?),
        Verb::History(history) => history.run(&context()?),
        Verb::Objects(objects) => objects.run(&context()?).await,
    }
}

/// One of each file; `alone`: several would write the same file.
fn contexts(files: &[PathBuf], alone: bool, printer: Printer) -> Result<Vec<Context>, ConfigError> {
    if alone {
        return Ok(vec![one(files, printer)?]);
    }
    let mut contexts: Vec<Context> = Vec::new();
    for file in files {
        let config = Config::load(file)?;
        let place = |config: &Config| (config.database.clone(), config.journal_dir.clone());
        if let Some(other) = contexts.iter().find(|other| place(&other.config) == place(&config)) {
            let reason = format!("'{}' is what {} moves, too", config.database, other.config.path.display());
            return Err(ConfigError { file: file.clone(), key: "database".to_owned(), reason });
        }
        contexts.push(Context { config, printer });
    }
    Ok(contexts)
}

/// Of what takes one database at a time.
fn one(files: &[PathBuf], printer: Printer) -> Result<Context, ConfigError> {
    match files {
        [file] => Ok(Context { config: Config::load(file)?, printer }),
        [file, ..] => {
            let reason = "this takes one configuration at a time".to_owned();
            Err(ConfigError { file: file.clone(), key: "-".to_owned(), reason })
        }
        [] => Err(ConfigError { file: PathBuf::new(), key: "-".to_owned(), reason: "no file was named".to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound_and_help_tells_the_exit_codes() {
        Cli::command().debug_assert();
        let help = Cli::command().render_long_help().to_string();
        for exit in Exit::ALL {
            assert!(help.contains(exit.meaning()), "{help}");
        }
    }

    #[test]
    fn a_claim_needs_both_run_and_epoch_and_force_excludes_them() {
        let run = "8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f";
        let parses = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        assert!(parses(&format!("proxyctl resume --run {run} --epoch 7")));
        assert!(!parses(&format!("proxyctl resume --run {run}")));
        assert!(!parses(&format!("proxyctl resume --run {run} --epoch 7 --force")));
        assert!(!parses("proxyctl switch"));
        assert!(parses("proxyctl switch --force"));
        assert!(parses("proxyctl cutover --stop-at before:fenced"));
        assert!(!parses("proxyctl cutover --stop-at fenced"));
        assert!(parses(&format!("proxyctl resume-run {run} --without-journal")));
        assert!(!parses("proxyctl resume-run --without-journal"));
        assert!(parses("proxyctl rollback --stop-at before:attached"));
        assert!(!parses("proxyctl rollback --preflight --rehearse"));
        assert!(parses("proxyctl way-back attach"));
    }

    #[test]
    fn several_configurations_are_one_argument() {
        let files = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.config.len());
        assert_eq!(files("proxyctl -c a.toml,b.toml cutover").unwrap(), 2);
        assert_eq!(files("proxyctl cutover -c a.toml").unwrap(), 1);
        // The first would be left out without a word.
        assert!(files("proxyctl -c a.toml -c b.toml cutover").is_err());
    }
}
