//! Runs `proxyctl` as an operator would.
//!
//! Invariant: every run has its own stdout and stderr file, also one that is killed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::Value as Json;
use toml::{Table, Value};

use crate::pair::{DATABASE, PGCUTOVER, Pair, SOURCE, TARGET, password};
use crate::process::Process;
use crate::product::Product;
use crate::proxy::{Proxy, with_own_hosts_file};
use crate::run_dir::RunDir;

/// Budgets for tests of faults: short waits for whatever was killed, and a stall that is not what they measure, because tests
/// share a machine.
pub const SHORT: [(&str, &str); 6] = [
    ("drain", "700ms"),
    ("lease", "1s"),
    ("renew", "200ms"),
    ("catch_up", "3s"),
    ("stall", "5s"),
    ("transaction_age_max", "60s"),
];

/// A configuration and the directory of its journals.
#[derive(Debug)]
pub struct Control {
    /// The whole file; written before each run.
    pub config: Table,
    /// Stands in for /etc/hosts, for proxyctl alone; needs [`own_hosts_file_is_possible`](crate::proxy::own_hosts_file_is_possible).
    pub hosts: Option<PathBuf>,
    dir: PathBuf,
    program: PathBuf,
    runs: std::sync::atomic::AtomicU32,
}

impl Control {
    /// For a pair behind these proxies.
    ///
    /// # Errors
    /// The binaries do not build, or there is no directory.
    pub fn for_pair(pair: &Pair, proxies: &[&Proxy]) -> Result<Control> {
        let admins: Vec<(&str, String)> = proxies.iter().map(|proxy| (proxy.name(), proxy.admin_dsn())).collect();
        let dsn = |port: u16| {
            let secret = password(PGCUTOVER);
            format!("host=127.0.0.1 port={port} user={PGCUTOVER} password={secret} dbname={DATABASE}")
        };
        let dir = RunDir::current()?.subdirectory("control")?;
        let mut config = Table::new();
        config.insert("database".to_owned(), DATABASE.into());
        config.insert("journal_dir".to_owned(), dir.join("runs").display().to_string().into());
        config.insert("source".to_owned(), side(SOURCE, dsn(pair.source.port())));
        config.insert("target".to_owned(), side(TARGET, dsn(pair.target.port())));
        let proxies = admins.into_iter().map(|(name, dsn)| {
            Value::Table(Table::from_iter([("name".to_owned(), name.into()), ("dsn".to_owned(), dsn.into())]))
        });
        config.insert("proxies".to_owned(), Value::Array(proxies.collect()));
        // On by default; here only where it is what a test is about, since it makes every run a second longer.
        config.insert("way_back".to_owned(), Value::Table(Table::from_iter([("enabled".to_owned(), false.into())])));
        fs::create_dir_all(dir.join("runs"))?;
        let program = Product::build()?.proxyctl.clone();
        Ok(Control { config, hosts: None, dir, program, runs: std::sync::atomic::AtomicU32::new(0) })
    }

    /// Sets budgets; the others stay as they are.
    pub fn budget(&mut self, budgets: &[(&str, &str)]) {
        budgets.iter().for_each(|(key, value)| self.set("budgets", key, *value));
    }

    /// Sets one key of a section; the others stay as they are.
    pub fn set(&mut self, section: &str, key: &str, value: impl Into<Value>) {
        let section = self.config.entry(section).or_insert_with(|| Value::Table(Table::new()));
        if let Some(section) = section.as_table_mut() {
            section.insert(key.to_owned(), value.into());
        }
    }

    /// Prepares and attaches the way back, as it is by default.
    pub fn with_way_back(&mut self) {
        self.config.remove("way_back");
    }

    /// For what needs no configuration.
    ///
    /// # Errors
    /// The binaries do not build, or there is no directory.
    pub fn bare() -> Result<Control> {
        let dir = RunDir::current()?.subdirectory("control")?;
        let program = Product::build()?.proxyctl.clone();
        Ok(Control { config: Table::new(), hosts: None, dir, program, runs: std::sync::atomic::AtomicU32::new(0) })
    }

    /// Where its files are; the journals are in `runs`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts `proxyctl -c FILE --output json ARGS…`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn(&self, args: &[&str]) -> Result<Running> {
        let n = self.number();
        let [stdout, stderr] = ["stdout", "stderr"].map(|stream| self.dir.join(format!("{n}.{stream}")));
        let out = (File::create(&stdout)?, File::create(&stderr)?);
        let process = self.start(&["--output", "json"], args, out, &stderr)?;
        Ok(Running { process, stdout })
    }

    /// What `proxyctl ARGS…` says to a person, both streams in one as on a screen, and how it ends.
    ///
    /// # Errors
    /// It can't be started, or still runs after `limit`.
    pub async fn screen(&self, args: &[&str], limit: Duration) -> Result<(String, Option<i32>)> {
        let screen = self.dir.join(format!("{}.screen", self.number()));
        let file = File::create(&screen)?;
        let mut process = self.start(&[], args, (file.try_clone()?, file), &screen)?;
        let status = process.wait(limit).await?;
        Ok((text(&screen), status.code()))
    }

    fn number(&self) -> u32 {
        self.runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }

    fn start(&self, form: &[&str], args: &[&str], out: (File, File), log: &Path) -> Result<Process> {
        let config = self.dir.join("cutover.toml");
        fs::write(&config, toml::to_string(&self.config)?)?;
        let mut command = match &self.hosts {
            None => Command::new(&self.program),
            Some(hosts) => with_own_hosts_file(hosts, &self.program),
        };
        command.arg("-c").arg(config).args(form).args(args).current_dir(&self.dir);
        command.stdin(std::process::Stdio::null()).stdout(out.0).stderr(out.1);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let name = format!("proxyctl {}", args.join(" "));
        Process::spawn_redirected(command, &name, log, Signal::SIGTERM)
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// It can't be started, or still runs after `limit`.
    pub async fn run(&self, args: &[&str], limit: Duration) -> Result<Finished> {
        self.spawn(args)?.wait(limit).await
    }
}

fn side(backend: &str, dsn: String) -> Value {
    Value::Table(Table::from_iter([("backend".to_owned(), backend.into()), ("dsn".to_owned(), dsn.into())]))
}

/// A proxyctl that runs.
#[derive(Debug)]
pub struct Running {
    process: Process,
    stdout: PathBuf,
}

impl Running {
    /// Kills it at once.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.process.exited().is_some()
    }

    /// What it has said on stderr so far.
    pub fn stderr(&self) -> String {
        text(self.process.log())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub async fn wait(mut self, limit: Duration) -> Result<Finished> {
        let status = self.process.wait(limit).await?;
        Ok(Finished { code: status.code(), stdout: text(&self.stdout), stderr: self.stderr() })
    }
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// One step of a report.
#[derive(Clone, Debug, Serialize)]
pub struct StepTime {
    /// Its name.
    pub name: String,
    /// How long it took.
    pub ms: f64,
}

/// The steps of a report, in order.
pub fn steps(report: &Json) -> Vec<StepTime> {
    let steps = report.get("steps").and_then(Json::as_array).cloned().unwrap_or_default();
    let one =
        |step: &Json| Some(StepTime { name: step.get("name")?.as_str()?.to_owned(), ms: step.get("ms")?.as_f64()? });
    steps.iter().filter_map(one).collect()
}

/// A proxyctl that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Data.
    pub stdout: String,
    /// Talk.
    pub stderr: String,
}

impl Finished {
    /// The last line of stdout as JSON.
    ///
    /// # Errors
    /// There is none; the message holds what was said instead.
    pub fn json(&self) -> Result<Json> {
        let line = self.stdout.lines().last().with_context(|| self.story())?;
        serde_json::from_str(line).with_context(|| self.story())
    }

    /// All that is known of it, for error messages.
    pub fn story(&self) -> String {
        format!("proxyctl ended with {:?}\nstdout: {}\nstderr: {}", self.code, self.stdout, self.stderr)
    }
}
