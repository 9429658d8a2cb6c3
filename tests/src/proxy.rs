//! A running `pgcutover`, configured and started as an operator would.
//!
//! Invariant: a proxy that was started listens; its port, its state directory and its log stay over restarts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tokio_postgres::{Config, SimpleQueryRow};
use toml::{Table, Value};

use crate::client::Client;
use crate::pair::{APP, DATABASE, OTHER, PROXY, Pair, SOURCE, TARGET, password};
use crate::port::Port;
use crate::process::Process;
use crate::product::Product;
use crate::run_dir::RunDir;

/// The admin's login on the console.
pub const ADMIN: &str = "admin";
/// The login that may look and not touch.
pub const STATS: &str = "stats";

/// A proxy opens its listeners before anything that waits for a server.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A configuration before it is written: a test changes what it is about.
#[derive(Debug)]
pub struct ProxyOptions {
    /// Instance name, and the name of its directory.
    pub name: String,
    /// The whole file.
    pub config: Table,
    /// Lines of the user file.
    pub users: Vec<String>,
    /// Stands in for /etc/hosts, for this proxy alone; needs [`own_hosts_file_is_possible`].
    pub hosts: Option<PathBuf>,
    dir: PathBuf,
    port: Port,
    http_port: Port,
}

impl ProxyOptions {
    /// A proxy for the pair's database, active on the source, that knows its logins by their verifiers.
    ///
    /// # Errors
    /// No directory or port.
    pub fn for_pair(pair: &Pair, peer_id: u16) -> Result<ProxyOptions> {
        let backends = [(SOURCE, pair.source.port()), (TARGET, pair.target.port())];
        let mut options = ProxyOptions::for_backends(&backends, peer_id)?;
        for login in [APP, OTHER] {
            let verifier = pair.verifiers().get(login).with_context(|| format!("no verifier of {login}"))?;
            options.users.push(format!("\"{login}\" \"{verifier}\""));
        }
        Ok(options)
    }

    /// A proxy for these backends (name, port on 127.0.0.1), active on the first one.
    ///
    /// # Errors
    /// No directory or port.
    pub fn for_backends(backends: &[(&str, u16)], peer_id: u16) -> Result<ProxyOptions> {
        let name = format!("p{peer_id}");
        let dir = RunDir::current()?.subdirectory(&name)?;
        let (port, http_port) = (Port::reserve()?, Port::reserve()?);
        let users = [ADMIN, STATS].map(|user| format!("\"{user}\" \"{}\"", password(user)));
        let mut config = Table::new();
        config.insert("pgcutover".to_owned(), Value::Table(settings(&name, &dir, [&port, &http_port])));
        let mut options = ProxyOptions { name, config, users: users.into(), hosts: None, dir, port, http_port };
        options.setting("peer_id", i64::from(peer_id));
        let database = options.database(DATABASE);
        database.insert("active".to_owned(), backends.first().context("no backend")?.0.into());
        database.insert("control_user".to_owned(), PROXY.into());
        database.insert("control_password".to_owned(), password(PROXY).into());
        for (backend, port) in backends {
            options.backend_port(backend, *port);
        }
        Ok(options)
    }

    /// Sets a key of `[pgcutover]`.
    pub fn setting(&mut self, key: &str, value: impl Into<Value>) {
        table(&mut self.config, "pgcutover").insert(key.to_owned(), value.into());
    }

    /// The table of a database, made if it is not there.
    pub fn database(&mut self, name: &str) -> &mut Table {
        table(table(&mut self.config, "databases"), name)
    }

    /// The table of a user, made if it is not there.
    pub fn user(&mut self, name: &str) -> &mut Table {
        table(table(&mut self.config, "users"), name)
    }

    /// Lets a backend of the pair's database be reached at another port (a fault proxy's).
    pub fn backend_port(&mut self, backend: &str, port: u16) {
        let backend = table(table(self.database(DATABASE), "backends"), backend);
        backend.insert("host".to_owned(), "127.0.0.1".into());
        backend.insert("port".to_owned(), i64::from(port).into());
    }

    /// The port it will listen on.
    pub fn port(&self) -> u16 {
        self.port.number()
    }
}

fn settings(name: &str, dir: &Path, ports: [&Port; 2]) -> Table {
    let path = |name: &str| Value::from(dir.join(name).display().to_string());
    let mut settings = Table::new();
    let mut set = |key: &str, value: Value| settings.insert(key.to_owned(), value);
    set("listen_addr", "127.0.0.1".into());
    set("listen_port", i64::from(ports[0].number()).into());
    set("unix_socket_dir", dir.display().to_string().into());
    set("http_addr", format!("127.0.0.1:{}", ports[1].number()).into());
    set("instance", name.into());
    set("state_dir", path("state"));
    set("auth_type", "scram-sha-256".into());
    set("auth_file", path("userlist.txt"));
    set("admin_users", vec![ADMIN].into());
    set("stats_users", vec![STATS].into());
    set("pool_mode", "transaction".into());
    settings
}

fn table<'a>(parent: &'a mut Table, name: &str) -> &'a mut Table {
    let entry = parent.entry(name).or_insert_with(|| Value::Table(Table::new()));
    if !entry.is_table() {
        *entry = Value::Table(Table::new());
    }
    entry.as_table_mut().unwrap_or_else(|| unreachable!("made a table above"))
}

/// Runs a program in a mount namespace of its own, where `hosts` lies over /etc/hosts. It keeps the process' id.
pub(crate) fn with_own_hosts_file(hosts: &Path, program: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]).arg(hosts).arg(program);
    command
}

/// Whether a process can be given a hosts file: that takes root.
pub fn own_hosts_file_is_possible() -> bool {
    let tried = with_own_hosts_file(Path::new("/etc/hosts"), Path::new("true")).output();
    tried.is_ok_and(|tried| tried.status.success())
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    options: ProxyOptions,
    process: Option<Process>,
    program: PathBuf,
}

impl Proxy {
    /// Writes the configuration and starts the proxy; returns once it listens.
    ///
    /// # Errors
    /// It does not build or start: the message carries its log.
    pub async fn start(options: ProxyOptions) -> Result<Proxy> {
        let program = Product::build()?.pgcutover.clone();
        fs::create_dir_all(options.dir.join("state"))?;
        let mut proxy = Proxy { options, process: None, program };
        proxy.write()?;
        proxy.restart().await?;
        Ok(proxy)
    }

    /// Writes configuration and user file as [`Proxy::options`] says them.
    ///
    /// # Errors
    /// The files can't be written.
    pub fn write(&self) -> Result<()> {
        fs::write(self.config_file(), toml::to_string(&self.options.config)?)?;
        let users = self.options.users.join("\n") + "\n";
        fs::write(self.options.dir.join("userlist.txt"), users).context("writing the user file")
    }

    /// What it was configured with; change it, then [`Proxy::reload`] or [`Proxy::restart`].
    pub fn options(&mut self) -> &mut ProxyOptions {
        &mut self.options
    }

    /// Starts it (again) with the file as it is; returns once it listens.
    ///
    /// # Errors
    /// It does not start: the message carries its log.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = None;
        let mut command = match &self.options.hosts {
            None => Command::new(&self.program),
            Some(hosts) => with_own_hosts_file(hosts, &self.program),
        };
        command.arg(self.config_file()).current_dir(&self.options.dir);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let log = self.log();
        let before = fs::metadata(&log).map_or(0, |meta| meta.len());
        let wanted = format!("listening on 127.0.0.1:{}", self.port());
        let process = self.process.insert(Process::spawn(command, &self.options.name, &log, Signal::SIGTERM)?);
        let said = || {
            let log = fs::read(&log).unwrap_or_default();
            let new = log.get(usize::try_from(before).unwrap_or(0)..).unwrap_or_default();
            String::from_utf8_lossy(new).contains(&wanted).then_some(())
        };
        process.until("listening", START_LIMIT, said).await
    }

    /// Writes the files and asks for a reload (SIGHUP), without waiting for it.
    ///
    /// # Errors
    /// It does not run.
    pub fn reload(&self) -> Result<()> {
        self.write()?;
        self.signal(Signal::SIGHUP)
    }

    /// Sends any signal: SIGTERM and SIGINT to stop, SIGSTOP and SIGCONT for a machine that hangs.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("the proxy does not run")?.signal(signal)
    }

    /// Kills it at once.
    pub fn kill9(&mut self) {
        if let Some(process) = &mut self.process {
            process.kill9();
        }
    }

    /// Waits for its end, which a signal has ordered.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        self.process.as_mut().context("the proxy does not run")?.wait(limit).await
    }

    /// Does it run?
    pub fn runs(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.exited().is_none())
    }

    /// Instance name.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.options.port.number()
    }

    /// Port of /metrics, /livez, /readyz.
    pub fn http_port(&self) -> u16 {
        self.options.http_port.number()
    }

    /// Its directory: files, Unix socket, state, log.
    pub fn dir(&self) -> &Path {
        &self.options.dir
    }

    /// Process id.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Its stderr.
    pub fn log(&self) -> PathBuf {
        self.options.dir.join("proxy.log")
    }

    /// Its configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.options.dir.join("pgcutover.toml")
    }

    /// A connection to the admin console; it knows simple queries only.
    ///
    /// # Errors
    /// The login is refused.
    pub async fn admin(&self) -> Result<Client> {
        self.login(ADMIN, "pgcutover").await
    }

    /// The rows of one admin command.
    ///
    /// # Errors
    /// The command is refused.
    pub async fn ask(&self, command: &str) -> Result<Vec<SimpleQueryRow>> {
        self.admin().await?.rows(command).await
    }

    /// A client's connection to the pair's database.
    ///
    /// # Errors
    /// The login is refused.
    pub async fn connect(&self, user: &str) -> Result<Client> {
        self.login(user, DATABASE).await
    }

    async fn login(&self, user: &str, database: &str) -> Result<Client> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port()).user(user).password(password(user)).dbname(database);
        Client::connect(&config).await.with_context(|| format!("connecting to {} as {user}", self.name()))
    }

    /// A libpq connection string for the admin console.
    pub fn admin_dsn(&self) -> String {
        let (port, secret) = (self.port(), password(ADMIN));
        format!("host=127.0.0.1 port={port} user={ADMIN} password={secret} dbname=pgcutover")
    }
}
