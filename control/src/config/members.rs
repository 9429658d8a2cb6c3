//! Who takes part, as the file names it: proxies by address, by a DNS name, or by what they enrolled; PgBouncers and how each is
//! pointed at another server.
//!
//! Invariant: names are unique; an entry whose addresses come from elsewhere says so (`find`), so that a name which begins to
//! answer with several addresses never silently stands for one of them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio_postgres::config::Host;

use crate::config::section::{Checked, Section, with_source, wrong};
use crate::config::{Endpoint, endpoint};

/// One `[[proxies]]` table.
#[derive(Debug, Clone)]
pub struct ProxyEntry {
    /// The name reports use; for several proxies what their names begin with.
    pub name: String,
    /// How to reach its console, or theirs.
    pub endpoint: Endpoint,
    /// Which proxies it stands for.
    pub find: Find,
}

/// Which proxies an entry stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Find {
    /// The one at this address.
    Listed,
    /// One at each address that the host name answers with.
    Dns,
    /// Each that has enrolled itself in the store, where it enrolled; those with an entry of their own excepted.
    Members,
}

/// What becomes of proxies that serve the database and that no entry stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unlisted {
    /// No cutover begins while there are any.
    Refuse,
    /// They hold and follow by themselves, up to a second later than the others.
    Follow,
}

/// One `[[pgbouncer]]` table.
#[derive(Debug, Clone)]
pub struct BouncerEntry {
    /// The name reports use, and under which its keeper enrols.
    pub name: String,
    /// Its admin console.
    pub endpoint: Endpoint,
    /// Its `[databases]` entry.
    pub database: String,
    /// The source as PgBouncer's file names it.
    pub source: Address,
    /// The target, likewise.
    pub target: Address,
    /// How its file is changed.
    pub point: Point,
}

/// A server as PgBouncer's file names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// `host`.
    pub host: String,
    /// `port`.
    pub port: u16,
    /// `dbname`.
    pub dbname: String,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.port, self.dbname)
    }
}

/// How a PgBouncer is pointed at another server; in either `{backend}`, `{host}`, `{port}` and `{dbname}` are filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Point {
    /// This file is written from that one.
    Template {
        /// Where the placeholders stand.
        template: PathBuf,
        /// What PgBouncer reads.
        file: PathBuf,
    },
    /// A program and its arguments.
    Command(Vec<String>),
}

/// What becomes of PgBouncers that nobody keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unleased {
    /// No cutover begins while there are any.
    Refuse,
    /// The run keeps them itself: if it dies, nobody lets them go.
    Keep,
}

const FINDS: &[(&str, Find)] = &[("listed", Find::Listed), ("dns", Find::Dns), ("members", Find::Members)];

pub(super) const UNLISTED: &[(&str, Unlisted)] = &[("refuse", Unlisted::Refuse), ("follow", Unlisted::Follow)];

pub(super) fn proxies(sections: Vec<Section>) -> Checked<Vec<ProxyEntry>> {
    let mut proxies: Vec<ProxyEntry> = Vec::new();
    for mut section in sections {
        let name = section.required("name", Section::text)?;
        let find = section.choice("find", FINDS)?.unwrap_or(Find::Listed);
        let endpoint = endpoint(&mut section)?;
        check_host(&section, find, &endpoint)?;
        if proxies.iter().any(|other| other.name == name) {
            return Err(wrong("proxies.name", format!("'{name}' names two proxies")));
        }
        proxies.push(ProxyEntry { name, endpoint, find });
        section.finish()?;
    }
    Ok(proxies)
}

fn check_host(section: &Section, find: Find, endpoint: &Endpoint) -> Checked<()> {
    let hosts = endpoint.pg.get_hosts();
    let reason = match find {
        Find::Listed => return Ok(()),
        Find::Dns => match hosts {
            [tokio_postgres::config::Host::Tcp(_)] => return Ok(()),
            _ => "must name one host whose addresses are the proxies (find = 'dns')",
        },
        Find::Members if hosts.is_empty() && endpoint.pg.get_ports().is_empty() => return Ok(()),
        Find::Members => "must name neither host nor port: members are reached where they enrolled (find = 'members')",
    };
    Err(wrong(section.key("dsn"), reason))
}

/// The PgBouncers; relative paths are relative to `beside`. `defaults`: source and target as proxyctl itself reaches them.
pub(super) fn bouncers(
    sections: Vec<Section>,
    database: &str,
    defaults: [&Endpoint; 2],
    beside: &Path,
) -> Checked<Vec<BouncerEntry>> {
    let mut bouncers: Vec<BouncerEntry> = Vec::new();
    for mut section in sections {
        let name = section.required("name", Section::text)?;
        if bouncers.iter().any(|other| other.name == name) {
            return Err(wrong("pgbouncer.name", format!("'{name}' names two PgBouncers")));
        }
        bouncers.push(BouncerEntry {
            name,
            endpoint: endpoint(&mut section)?,
            database: section.text("database")?.unwrap_or_else(|| database.to_owned()),
            source: address(&mut section, "source", defaults[0])?,
            target: address(&mut section, "target", defaults[1])?,
            point: point(&mut section, beside)?,
        });
        section.finish()?;
    }
    Ok(bouncers)
}

fn address(section: &mut Section, key: &'static str, default: &Endpoint) -> Checked<Address> {
    let pg = match section.text(key)? {
        None => default.pg.clone(),
        Some(words) => tokio_postgres::Config::from_str(&words)
            .map_err(|error| wrong(section.key(key), format!("is not a connection string: {}", with_source(&error))))?,
    };
    let Some(Host::Tcp(host)) = pg.get_hosts().first() else {
        return Err(wrong(section.key(key), "must name a host: a PgBouncer does not show the directory of a socket"));
    };
    let port = pg.get_ports().first().copied().unwrap_or(5432);
    let dbname = pg.get_dbname().or(default.pg.get_dbname()).unwrap_or_default().to_owned();
    Ok(Address { host: host.clone(), port, dbname })
}

fn point(section: &mut Section, beside: &Path) -> Checked<Point> {
    let (template, file) = (section.text("template")?, section.text("file")?);
    let command = section.texts("command")?.filter(|words| !words.is_empty());
    match (template, file, command) {
        (Some(template), Some(file), None) => {
            Ok(Point::Template { template: beside.join(template), file: beside.join(file) })
        }
        (None, None, Some(words)) => Ok(Point::Command(words)),
        _ => {
            Err(wrong(section.key("template"), "either template and file, or command: how PgBouncer's file is changed"))
        }
    }
}
