//! A PostgreSQL server of one major version for one test.
//!
//! Data directories are copies of one template per version (made once, kept in the cache), so the clusters of one
//! version share a system identifier unless [`Identity::Own`] is asked for.
//!
//! Invariant: a dropped cluster runs no more and its directory is gone.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_postgres::Config;

use crate::binaries::{self, Binaries, Installation};
use crate::client::Client;
use crate::port::Port;
use crate::process::{POLL, Process, children_of};
use crate::run_dir::RunDir;
use crate::tls;
use crate::user::ServerUser;

/// The superuser; it logs in without a password on the Unix socket and not at all over TCP unless it is given one.
pub const SUPERUSER: &str = "postgres";

/// Crash recovery of a loaded server on a slow disk; an ordinary start takes 0.2 s.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Changes with anything below that changes what is in a template.
const TEMPLATE_FORM: u32 = 1;

/// What a test may want to have different.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Major version.
    pub major: u32,
    /// Does a commit wait for the disk?
    pub commits: Commits,
    /// More settings, `name = value`; they win over the harness's.
    pub settings: Vec<(String, String)>,
    /// Whose system identifier?
    pub identity: Identity,
    /// Certificate and key to offer TLS with; without them the server refuses it.
    pub tls: Option<tls::Identity>,
}

/// What a commit waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commits {
    /// The disk (`fsync = on`): the demo, because its stall shall be an honest one.
    WaitForDisk,
    /// The kernel: tests. Killing processes can't lose what the kernel has, so waiting would only cost time.
    TrustKernel,
}

/// Whose system identifier a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The one of the template, the same for all clusters of one version.
    Template,
    /// Its own; costs an initdb (0.7 s).
    Own,
}

impl ClusterOptions {
    /// A server of this major as tests want it.
    pub fn new(major: u32) -> ClusterOptions {
        let (commits, identity) = (Commits::TrustKernel, Identity::Template);
        ClusterOptions { major, commits, settings: Vec::new(), identity, tls: None }
    }
}

/// A server and its data directory.
#[derive(Debug)]
pub struct Cluster {
    installation: Installation,
    user: ServerUser,
    dir: PathBuf,
    port: Port,
    process: Option<Process>,
}

/// How a server is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Sessions are ended, a checkpoint is written (SIGINT).
    Fast,
    /// No checkpoint, recovery at the next start (SIGQUIT).
    Immediate,
}

impl Cluster {
    /// Copies the template and starts a server on a free port; returns once it accepts connections.
    ///
    /// # Errors
    /// The version is not there, or the server does not start: the message carries its log.
    pub async fn start(binaries: &Binaries, options: &ClusterOptions) -> Result<Cluster> {
        let installation = binaries.major(options.major)?.clone();
        let user = ServerUser::current()?;
        let dir = RunDir::current()?.subdirectory(&format!("pg{}", options.major))?;
        user.own(&dir)?;
        let mut cluster = Cluster { installation, user, dir, port: Port::reserve()?, process: None };
        cluster.create_data(options)?;
        cluster.restart().await?;
        Ok(cluster)
    }

    /// A standby of this server that streams through the slot `standby`, as the role `pgcutover`: a cold copy, for which this
    /// one is stopped a moment, since not every installation has pg_basebackup.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub async fn standby(&mut self, options: &ClusterOptions, password: &str) -> Result<Cluster> {
        let dir = RunDir::current()?.subdirectory(&format!("pg{}s", options.major))?;
        self.user.own(&dir)?;
        let (installation, user) = (self.installation.clone(), self.user);
        let mut copy = Cluster { installation, user, dir, port: Port::reserve()?, process: None };
        self.stop(Stop::Fast);
        let mut command = self.user.command("cp");
        command.args(["-R", "-p", "--reflink=auto"]).arg(self.data()).arg(copy.data());
        run(command)?;
        self.restart().await?;
        let primary = self.dsn("pgcutover", password, "postgres");
        let text =
            format!("{}primary_conninfo = '{primary}'\nprimary_slot_name = 'standby'\n", copy.configuration(options));
        fs::write(copy.data().join("postgresql.conf"), text)?;
        let signal = copy.data().join("standby.signal");
        fs::write(&signal, "")?;
        copy.user.own(&signal)?;
        copy.restart().await?;
        Ok(copy)
    }

    fn create_data(&self, options: &ClusterOptions) -> Result<()> {
        let data = self.data();
        match options.identity {
            Identity::Own => initdb(self.user, &self.installation, &data)?,
            Identity::Template => {
                let template = template(self.user, &self.installation)?;
                let mut copy = self.user.command("cp");
                copy.args(["-R", "-p", "--reflink=auto"]).arg(template).arg(&data);
                run(copy)?;
            }
        }
        if let Some(tls) = &options.tls {
            fs::copy(&tls.certificate, data.join("server.crt"))?;
            tls::write_key(&data.join("server.key"), &fs::read_to_string(&tls.key)?)?;
            self.user.own(&data.join("server.crt"))?;
            self.user.own(&data.join("server.key"))?;
        }
        // In place, so that the files keep their owner.
        fs::write(data.join("postgresql.conf"), self.configuration(options))?;
        fs::write(data.join("pg_hba.conf"), HBA).context("writing pg_hba.conf")
    }

    fn configuration(&self, options: &ClusterOptions) -> String {
        let mut text = format!(
            "port = {}\nunix_socket_directories = '{}'\nfsync = {}\n{CONFIGURATION}",
            self.port(),
            self.dir.display(),
            match options.commits {
                Commits::WaitForDisk => "on",
                Commits::TrustKernel => "off",
            },
        );
        if options.tls.is_some() {
            text.push_str("ssl = on\n");
        }
        for (name, value) in &options.settings {
            text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        text
    }

    /// Starts it again (or for the first time) on the same port; returns once it accepts connections.
    ///
    /// # Errors
    /// It does not start: the message carries its log.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop(Stop::Fast);
        let mut command = self.user.command(self.installation.bin.join("postgres"));
        command.arg("-D").arg(self.data());
        let name = format!("PostgreSQL {} on port {}", self.installation.version, self.port());
        let process = self.process.insert(Process::spawn(command, &name, &self.log(), Signal::SIGQUIT)?);
        let (status, pid) = (self.dir.join("data/postmaster.pid"), process.pid());
        process.until("accepting connections", START_LIMIT, || is_ready(&status, pid).then_some(())).await
    }

    /// Stops it and waits for its end.
    pub fn stop(&mut self, how: Stop) {
        if let Some(mut process) = self.process.take() {
            process.stop_with(match how {
                Stop::Fast => Signal::SIGINT,
                Stop::Immediate => Signal::SIGQUIT,
            });
        }
    }

    /// Kills every process of the server at once, as a power cut would; [`Cluster::restart`] then recovers.
    ///
    /// # Errors
    /// One of its processes does not end.
    pub async fn kill9(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        // Stopped first, so that it starts no more children while they are listed.
        process.signal(Signal::SIGSTOP)?;
        let children = children_of(process.pid());
        for pid in &children {
            // It may have ended since.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        process.kill9();
        let deadline = Instant::now() + START_LIMIT;
        while children.iter().any(|pid| Path::new(&format!("/proc/{pid}/exe")).exists()) {
            ensure!(Instant::now() < deadline, "killed processes of {} do not end", self.dir.display());
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Freezes (SIGSTOP) the server with all its sessions, as a machine that hangs, until [`Cluster::thaw`].
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self) -> Result<()> {
        self.signal_all(Signal::SIGSTOP)
    }

    /// Ends [`Cluster::freeze`].
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&self) -> Result<()> {
        self.signal_all(Signal::SIGCONT)
    }

    fn signal_all(&self, signal: Signal) -> Result<()> {
        let process = self.process.as_ref().context("the server does not run")?;
        process.signal(signal)?;
        for pid in children_of(process.pid()) {
            let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
        }
        Ok(())
    }

    /// Changes a setting and reloads, or restarts when `restart` says that it needs to.
    ///
    /// # Errors
    /// The file can't be written or the server does not start again.
    pub async fn set(&mut self, name: &str, value: &str, restart: bool) -> Result<()> {
        let path = self.data().join("postgresql.conf");
        let text = fs::read_to_string(&path)?;
        fs::write(&path, format!("{text}{name} = '{value}'\n"))?;
        if restart {
            return self.restart().await;
        }
        self.process.as_ref().context("the server does not run")?.signal(Signal::SIGHUP)
    }

    /// Is the server running?
    pub fn runs(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.exited().is_none())
    }

    /// TCP port on 127.0.0.1; stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Major version.
    pub fn major(&self) -> u32 {
        self.installation.major
    }

    /// Version as the binary says it.
    pub fn version(&self) -> &str {
        &self.installation.version
    }

    /// Pid of the postmaster.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The directory of the Unix socket, the log and the data.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The server's log.
    pub fn log(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    /// Connects as superuser on the Unix socket.
    ///
    /// # Errors
    /// As the driver says them.
    pub async fn superuser(&self, database: &str) -> Result<Client> {
        let mut config = Config::new();
        config.host_path(&self.dir).port(self.port()).user(SUPERUSER).dbname(database);
        config.application_name("harness");
        Client::connect(&config).await.with_context(|| format!("connecting to {}", self.dir.display()))
    }

    /// Connects over TCP with a password (SCRAM).
    ///
    /// # Errors
    /// As the driver says them.
    pub async fn connect(&self, user: &str, password: &str, database: &str) -> Result<Client> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port()).user(user).password(password).dbname(database);
        Client::connect(&config).await.with_context(|| format!("connecting as {user} to port {}", self.port()))
    }

    /// A libpq connection string over TCP.
    pub fn dsn(&self, user: &str, password: &str, database: &str) -> String {
        format!("host=127.0.0.1 port={} user={user} password={password} dbname={database}", self.port())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let keep = RunDir::current().is_ok_and(RunDir::kept);
        self.stop(if keep { Stop::Fast } else { Stop::Immediate });
        if !keep {
            // The watchdog takes what is left.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Passwords by SCRAM over TCP, the superuser's socket without one; its directory is the test's.
const HBA: &str = "\
local all postgres trust
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
host replication all 127.0.0.1/32 scram-sha-256
";

/// Replication that starts at once: a table synchronisation worker otherwise starts every 5 s only.
const CONFIGURATION: &str = "\
listen_addresses = '127.0.0.1'
wal_level = logical
max_connections = 150
max_wal_senders = 20
max_replication_slots = 20
max_worker_processes = 32
max_logical_replication_workers = 20
max_sync_workers_per_subscription = 8
max_prepared_transactions = 10
wal_retrieve_retry_interval = 100ms
password_encryption = 'scram-sha-256'
shared_buffers = 64MB
log_line_prefix = '%m [%p] %q%u@%d %a '
timezone = 'UTC'
datestyle = 'iso, mdy'
default_text_search_config = 'pg_catalog.english'
";

/// The eighth line of postmaster.pid says when connections are accepted (PostgreSQL 10 and later); the first one whose
/// file it is, for a killed postmaster leaves its own behind.
fn is_ready(postmaster_pid: &Path, pid: u32) -> bool {
    let text = fs::read_to_string(postmaster_pid).unwrap_or_default();
    let mut lines = text.lines();
    let ours = lines.next().is_some_and(|line| line.trim().parse() == Ok(pid));
    ours && lines.nth(6).is_some_and(|line| line.trim() == "ready")
}

/// The template of this version, made if it is not there.
fn template(user: ServerUser, installation: &Installation) -> Result<PathBuf> {
    let templates = binaries::cache()?.join("templates");
    fs::create_dir_all(&templates).with_context(|| format!("creating {}", templates.display()))?;
    let mut open = Command::new("chmod");
    open.arg("a+rx").arg(&templates);
    run(open)?;
    // Two installations of one version may differ in what they were built with, so the directory is part of the name.
    let origin = installation.bin.display().to_string().replace('/', "_");
    let name = format!("{}-{TEMPLATE_FORM}-{}{origin}", installation.version, user.uid());
    let complete = templates.join(&name);
    let lock = File::create(templates.join(format!("{name}.lock")))?;
    // Ended by the other process, whose initdb takes a second; the kernel frees the lock if it dies.
    lock.lock()?;
    if !complete.exists() {
        let partial = templates.join(format!("{name}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir(&partial)?;
        user.own(&partial)?;
        initdb(user, installation, &partial.join("data"))?;
        fs::rename(&partial, &complete)?;
    }
    Ok(complete.join("data"))
}

fn initdb(user: ServerUser, installation: &Installation, data: &Path) -> Result<()> {
    let mut command = user.command(installation.bin.join("initdb"));
    command.arg("-D").arg(data).args(["-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]);
    run(command)
}

fn run(mut command: Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("{program} can't be started"))?;
    if !output.status.success() {
        bail!("{program} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
