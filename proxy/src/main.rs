//! `pgcutover CONFIG.toml`: args, configuration, runtime, run, exit code.
//!
//! Invariant: stdout stays empty; exit 0 after an orderly end, 2 for a wrong configuration, 1 for anything else.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pgcutover::config::Config;
use pgcutover::server;
use pgcutover::server::Signal;
use pgcutover_api::command::Shutdown;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

/// PostgreSQL proxy and pooler that moves a database to another server without an error.
///
/// SIGHUP reads the configuration again, whole or not at all. SIGTERM stops accepting and lets open transactions end;
/// a second signal, or SIGQUIT, ends them.
///
/// Exit codes: 0 orderly end, 1 could not run, 2 wrong configuration or usage.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// The configuration file (TOML).
    config: PathBuf,
    /// Read and check the configuration, then exit.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return complain(2, &error.to_string()),
    };
    if arguments.check {
        return ExitCode::SUCCESS;
    }
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(&config.general.log_level));
    match filter {
        Ok(filter) => tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr)
            .init(),
        Err(error) => return complain(2, &format!("{}: pgcutover.log_level: {error}", arguments.config.display())),
    }
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(1, &format!("{error:#}")),
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    // The main thread's runtime accepts, watches and serves HTTP; clients live on the workers.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (sender, signals) = watch::channel(Signal::None);
        let mut hang_up = signal(SignalKind::hangup())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut quit = signal(SignalKind::quit())?;
        let listen = async {
            loop {
                let wish = tokio::select! {
                    _ = hang_up.recv() => Signal::Reload,
                    _ = terminate.recv() => Signal::End(Shutdown::WaitForServers),
                    _ = interrupt.recv() => Signal::End(Shutdown::WaitForServers),
                    _ = quit.recv() => Signal::End(Shutdown::Now),
                };
                sender.send_replace(wish);
            }
        };
        tokio::select! {
            outcome = server::run(config, signals) => outcome,
            () = listen => Ok(()),
        }
    })
}

#[expect(clippy::print_stderr, reason = "before the log is set up, and after it is gone, stderr is all there is")]
fn complain(code: u8, words: &str) -> ExitCode {
    eprintln!("pgcutover: {words}");
    ExitCode::from(code)
}
