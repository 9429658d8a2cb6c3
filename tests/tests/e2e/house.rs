//! One server, one proxy in front of it, and the ways in that the tests of the proxy's everyday work take.
//!
//! Invariant: logins reach the server by SCRAM pass-through unless a test says otherwise: the user file of the proxy holds
//! verifiers, no password.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::{BufMut, BytesMut};
use e2e::binaries::{Binaries, tool};
use e2e::client::Client;
use e2e::cluster::Cluster;
use e2e::pair::{APP, DATABASE, OTHER, PairOptions, SOURCE, password, single};
use e2e::process::POLL;
use e2e::proxy::{Proxy, ProxyOptions};
use e2e::wire::{Report, Wire};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio_postgres::Config;
use toml::{Table, Value};

/// For whatever is waited for: a loaded machine gets time.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Fields end in this order: the proxy before its server.
pub(crate) struct House {
    pub(crate) proxy: Proxy,
    pub(crate) server: Cluster,
}

impl House {
    pub(crate) async fn open(change: impl FnOnce(&mut ProxyOptions)) -> House {
        House::with(PairOptions::new(17, 17), change).await
    }

    pub(crate) async fn with(options: PairOptions, change: impl FnOnce(&mut ProxyOptions)) -> House {
        let server = single(&Binaries::of(&[17]).unwrap(), &options).await.unwrap();
        let mut options = ProxyOptions::for_backends(&[(SOURCE, server.port())], 1).unwrap();
        let superuser = server.superuser(DATABASE).await.unwrap();
        for login in [APP, OTHER] {
            let verifier = format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{login}'");
            let verifier = superuser.text(&verifier).await.unwrap().unwrap();
            options.users.push(format!("\"{login}\" \"{verifier}\""));
        }
        change(&mut options);
        let proxy = Proxy::start(options).await.unwrap();
        House { proxy, server }
    }

    pub(crate) async fn connect(&self, user: &str) -> Client {
        self.proxy.connect(user).await.unwrap()
    }

    /// A login of the driver that a test may change.
    pub(crate) fn login(&self, user: &str) -> Config {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.proxy.port()).user(user).password(password(user)).dbname(DATABASE);
        config
    }

    /// A raw connection that has met its server: what it was not told at the login it has been told now.
    pub(crate) async fn wire(&self) -> Wire {
        let (mut wire, _) = Wire::log_in(self.proxy.port(), APP, &password(APP), DATABASE).await.unwrap();
        let (messages, status) = wire.query("SELECT 1").await.unwrap();
        assert!(errors(&messages).is_empty() && status == b'I');
        wire
    }

    /// The server as a superuser sees it, past the proxy.
    pub(crate) async fn superuser(&self) -> Client {
        self.server.superuser(DATABASE).await.unwrap()
    }

    /// A libpq connection string of a client.
    pub(crate) fn dsn(&self, user: &str) -> String {
        let (port, secret) = (self.proxy.port(), password(user));
        format!("host=127.0.0.1 port={port} user={user} password={secret} dbname={DATABASE}")
    }

    /// psql's answer to one command, unaligned, without headers.
    pub(crate) async fn psql(&self, dsn: &str, command: &str) -> Output {
        let arguments =
            ["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", "-d", dsn, "-c", command];
        run("psql", &arguments).await
    }
}

/// Runs a client tool to its end; says which package has it if it is missing.
pub(crate) async fn run(name: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(tool(name).unwrap());
    command.args(arguments).env("LC_ALL", "C");
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// What a tool wrote, if it ended well.
pub(crate) fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The complaint of a tool that had to fail.
pub(crate) fn stderr(output: &Output) -> String {
    assert!(!output.status.success(), "it did not fail: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A nested table of the configuration.
pub(crate) fn table<'a>(parent: &'a mut Table, name: &str) -> &'a mut Table {
    let entry = parent.entry(name).or_insert_with(|| Value::Table(Table::new()));
    entry.as_table_mut().unwrap()
}

/// Sets a key of `[users.name]`.
pub(crate) fn user_setting(options: &mut ProxyOptions, user: &str, key: &str, value: impl Into<Value>) {
    table(table(&mut options.config, "users"), user).insert(key.to_owned(), value.into());
}

/// Asks until `holds`.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + LIMIT;
    while !holds().await {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        // reason: asks again; the loop has a deadline.
        tokio::time::sleep(POLL).await;
    }
}

/// The SQLSTATE of an error of the driver.
pub(crate) fn sqlstate(error: &tokio_postgres::Error) -> &str {
    error.code().unwrap_or_else(|| panic!("no ErrorResponse: {error}")).code()
}

/// Opens a session without a password (auth_type trust) with any Startup parameters.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
pub(crate) async fn trusted(port: u16, parameters: &[(&str, &str)]) -> Result<(Wire, Vec<Message>), Report> {
    let mut wire = Wire::connect(port).await.unwrap();
    let mut output = BytesMut::new();
    frontend::startup_message(parameters.iter().copied(), &mut output).unwrap();
    wire.send(&output).await.unwrap();
    let mut welcome = Vec::new();
    loop {
        match wire.message().await.unwrap() {
            Message::ErrorResponse(body) => return Err(Report::of(&body)),
            Message::ReadyForQuery(_) => return Ok((wire, welcome)),
            other => welcome.push(other),
        }
    }
}

/// The first column of the first row among messages.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
pub(crate) fn first_cell(messages: &[Message]) -> Option<String> {
    messages.iter().find_map(|message| match message {
        Message::DataRow(row) => {
            let range = tokio_postgres::fallible_iterator::FallibleIterator::next(&mut row.ranges()).unwrap()??;
            Some(String::from_utf8_lossy(&row.buffer()[range]).into_owned())
        }
        _ => None,
    })
}

/// The errors among messages.
#[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; the rest is not asked for")]
pub(crate) fn errors(messages: &[Message]) -> Vec<Report> {
    let error = |message: &Message| match message {
        Message::ErrorResponse(body) => Some(Report::of(body)),
        _ => None,
    };
    messages.iter().filter_map(error).collect()
}

/// A message of any tag and body.
pub(crate) fn message(tag: u8, body: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u8(tag);
    out.put_i32(i32::try_from(body.len() + 4).unwrap());
    out.put_slice(body);
    out
}
