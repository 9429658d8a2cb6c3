//! A running PgBouncer (Debian's package), for what has to be compared with, or to work beside, the real one.
//!
//! Invariant: a bouncer that was started listens on 127.0.0.1 and never runs as root, which it refuses.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::binaries::Network;
use crate::client::Client;
use crate::fetch::{apt_install, apt_update};
use crate::pair::{APP, DATABASE, OTHER, PROXY, password};
use crate::port::Port;
use crate::process::Process;
use crate::proxy::{ADMIN, STATS};
use crate::run_dir::RunDir;
use crate::user::ServerUser;

/// It opens its listener before anything that waits for a server.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Where Debian puts it, and where PATH may have it.
const PLACES: [&str; 3] = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"];

/// A running PgBouncer in front of one server.
#[derive(Debug)]
pub struct Bouncer {
    process: Process,
    port: Port,
    dir: PathBuf,
}

impl Bouncer {
    /// The program, where it is installed.
    pub fn program() -> Option<&'static Path> {
        PLACES.iter().map(Path::new).find(|place| place.is_file())
    }

    /// The program; as root it is installed from Debian's packages where it is missing and something may be fetched.
    ///
    /// # Errors
    /// It is not there and can't or may not be installed; the message says what to install.
    pub fn installed(network: Network) -> Result<&'static Path> {
        let advice = "no pgbouncer: apt-get install -y --no-install-recommends pgbouncer";
        if let Some(program) = Bouncer::program() {
            return Ok(program);
        }
        if network == Network::Offline {
            bail!("{advice} (fetching is forbidden: --offline or PGCUTOVER_OFFLINE)");
        }
        apt_update().and_then(|()| apt_install(&["pgbouncer"])).context(advice)?;
        Bouncer::program().context(advice)
    }

    /// Starts one in transaction pooling for the pair's database on `server_port`.
    ///
    /// # Errors
    /// It is not installed or does not start: the message carries its log.
    pub async fn start(server_port: u16, pool_size: u32) -> Result<Bouncer> {
        Bouncer::with(server_port, &format!("pool_mode = transaction\ndefault_pool_size = {pool_size}\n")).await
    }

    /// Starts one with these lines of configuration for the pair's database on `server_port`.
    ///
    /// # Errors
    /// As [`Bouncer::start`].
    pub async fn with(server_port: u16, lines: &str) -> Result<Bouncer> {
        let program = Bouncer::program().context("no pgbouncer: apt-get install -y pgbouncer")?;
        let dir = RunDir::current()?.subdirectory("pgbouncer")?;
        let port = Port::reserve()?;
        let number = port.number();
        let users: String =
            [APP, OTHER, PROXY, ADMIN, STATS].map(|u| format!("\"{u}\" \"{}\"\n", password(u))).concat();
        fs::write(dir.join("userlist.txt"), users)?;
        let path = dir.display();
        let settings = format!(
            "[databases]\n{DATABASE} = host=127.0.0.1 port={server_port}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {number}\nunix_socket_dir =\n\
             auth_type = scram-sha-256\nauth_file = {path}/userlist.txt\nadmin_users = {ADMIN}\nstats_users = {STATS}\n\
             max_client_conn = 1000\n\
             ignore_startup_parameters = extra_float_digits\nlog_connections = 0\nlog_disconnections = 0\n{lines}"
        );
        let file = dir.join("pgbouncer.ini");
        fs::write(&file, settings)?;
        for owned in [dir.clone(), dir.join("userlist.txt"), file.clone()] {
            ServerUser::current()?.own(&owned)?;
        }
        let process = spawn(program, &dir)?;
        let mut bouncer = Bouncer { process, port, dir };
        bouncer.listens().await?;
        Ok(bouncer)
    }

    async fn listens(&mut self) -> Result<()> {
        let number = self.port.number();
        let listening = || std::net::TcpStream::connect(("127.0.0.1", number)).ok();
        self.process.until("listening", START_LIMIT, listening).await.map(drop)
    }

    /// Kills it at once.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Starts it again with its file as it is now.
    ///
    /// # Errors
    /// As [`Bouncer::start`].
    pub async fn restart(&mut self) -> Result<()> {
        self.process = spawn(Bouncer::program().context("no pgbouncer")?, &self.dir)?;
        self.listens().await
    }

    /// TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its directory: settings, user file, log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A connection to a database of it, or to its console (`pgbouncer`).
    ///
    /// # Errors
    /// The login is refused.
    pub async fn connect(&self, user: &str, database: &str) -> Result<Client> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port()).user(user).password(password(user)).dbname(database);
        Client::connect(&config).await.with_context(|| format!("connecting to PgBouncer as {user}"))
    }

    /// The cell of a row of a table of its console: of the row where column `row.0` is `row.1`.
    ///
    /// # Errors
    /// It does not answer, or there is no such cell.
    pub async fn shown(&self, show: &str, row: (&str, &str), column: &str) -> Result<String> {
        let rows = self.connect(ADMIN, "pgbouncer").await?.rows(show).await?;
        let found = rows.iter().find(|found| found.get(row.0) == Some(row.1)).and_then(|found| found.get(column));
        Ok(found.with_context(|| format!("{show} has no {column} where {} is {}", row.0, row.1))?.to_owned())
    }

    /// The port of the server that it sends clients of the pair's database to.
    ///
    /// # Errors
    /// As [`Bouncer::shown`].
    pub async fn points_at(&self) -> Result<u16> {
        Ok(self.shown("SHOW DATABASES", ("name", DATABASE), "port").await?.parse()?)
    }
}

fn spawn(program: &Path, dir: &Path) -> Result<Process> {
    let mut command = ServerUser::current()?.command(program);
    command.arg(dir.join("pgbouncer.ini"));
    Process::spawn(command, "pgbouncer", &dir.join("pgbouncer.log"), Signal::SIGINT)
}
