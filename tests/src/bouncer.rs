//! A running PgBouncer (Debian's package), for what has to be compared with, or to work beside, the real one.
//!
//! Invariant: a bouncer that was started listens on 127.0.0.1 and never runs as root, which it refuses.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::client::Client;
use crate::pair::{APP, DATABASE, OTHER, password};
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

    /// Starts one in transaction pooling for the pair's database on `server_port`.
    ///
    /// # Errors
    /// It is not installed or does not start: the message carries its log.
    pub async fn start(server_port: u16, pool_size: u32) -> Result<Bouncer> {
        let program = Bouncer::program().context("no pgbouncer: apt-get install -y pgbouncer")?;
        let dir = RunDir::current()?.subdirectory("pgbouncer")?;
        let port = Port::reserve()?;
        let number = port.number();
        let users: String = [APP, OTHER, ADMIN, STATS].map(|u| format!("\"{u}\" \"{}\"\n", password(u))).concat();
        fs::write(dir.join("userlist.txt"), users)?;
        let path = dir.display();
        let settings = format!(
            "[databases]\n{DATABASE} = host=127.0.0.1 port={server_port}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {number}\nunix_socket_dir =\n\
             auth_type = scram-sha-256\nauth_file = {path}/userlist.txt\nadmin_users = {ADMIN}\nstats_users = {STATS}\n\
             pool_mode = transaction\ndefault_pool_size = {pool_size}\nmax_client_conn = 1000\n\
             ignore_startup_parameters = extra_float_digits\nlog_connections = 0\nlog_disconnections = 0\n"
        );
        let file = dir.join("pgbouncer.ini");
        fs::write(&file, settings)?;
        let user = ServerUser::current()?;
        for owned in [dir.clone(), dir.join("userlist.txt"), file.clone()] {
            user.own(&owned)?;
        }
        let mut command = user.command(program);
        command.arg(&file);
        let process = Process::spawn(command, "pgbouncer", &dir.join("pgbouncer.log"), Signal::SIGINT)?;
        let mut bouncer = Bouncer { process, port, dir };
        let listening = || std::net::TcpStream::connect(("127.0.0.1", number)).ok();
        bouncer.process.until("listening", START_LIMIT, listening).await?;
        Ok(bouncer)
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
}
