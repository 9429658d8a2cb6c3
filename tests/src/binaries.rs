//! Where server binaries of each major version are.
//!
//! Looks, in this order, into the directories of `PGCUTOVER_PG_BIN` (a list like PATH), the harness's own cache,
//! `/usr/lib/postgresql/*/bin` and PATH; what is missing is fetched into the cache unless that is forbidden
//! (`--offline`, `PGCUTOVER_OFFLINE=1`).
//!
//! Invariant: an [`Installation`] has been run as the servers' user and said its version.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::fetch;
use crate::user::ServerUser;

/// The exit code of a program that found too few server versions and may not, or can't, fetch them (`EX_TEMPFAIL`).
pub const EXIT_NO_SERVERS: u8 = 75;

/// The binaries of one server version.
#[derive(Clone, Debug)]
pub struct Installation {
    /// Major version, such as 17.
    pub major: u32,
    /// As `postgres --version` says it, such as `17.10`.
    pub version: String,
    /// The directory of `postgres` and `initdb`.
    pub bin: PathBuf,
}

/// What a caller wants to have.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// Exactly these majors.
    Majors(Vec<u32>),
    /// Any so many different majors.
    AtLeast(usize),
}

/// May anything be fetched?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Fetch what is missing.
    Allowed,
    /// Never fetch.
    Offline,
}

impl Network {
    /// Offline if `PGCUTOVER_OFFLINE` is set to anything but `0` or nothing.
    pub fn from_env() -> Network {
        match env::var("PGCUTOVER_OFFLINE") {
            Ok(value) if !value.is_empty() && value != "0" => Network::Offline,
            Ok(_) | Err(_) => Network::Allowed,
        }
    }
}

/// Too few versions: what was looked for, what is there, what to do.
#[derive(Debug, thiserror::Error)]
#[error("{wanted} not found; found {found}.\n{advice}")]
pub struct Missing {
    wanted: String,
    found: String,
    advice: String,
}

/// The installations of this machine, one for each major.
#[derive(Clone, Debug)]
pub struct Binaries {
    installations: BTreeMap<u32, Installation>,
}

impl Binaries {
    /// Finds what is wanted, fetching what is missing where that is allowed.
    ///
    /// # Errors
    /// [`Missing`] (to be found by downcast) if it is not there in the end; others when the cache can't be used.
    pub fn find(wanted: &Wanted, network: Network) -> Result<Binaries> {
        let user = ServerUser::current()?;
        let found = Binaries::scan(user)?;
        if found.satisfies(wanted) {
            return Ok(found);
        }
        let failures = match network {
            Network::Offline => vec!["fetching is forbidden (--offline or PGCUTOVER_OFFLINE)".to_owned()],
            Network::Allowed => fetch::fetch(&cache()?, || {
                Binaries::scan(user).map_or_else(|_| found.unmet(wanted), |now| now.unmet(wanted))
            })?,
        };
        let now = Binaries::scan(user)?;
        if now.satisfies(wanted) { Ok(now) } else { Err(now.missing(wanted, &failures).into()) }
    }

    /// Finds these majors, fetching what is missing unless the environment forbids it: what a test calls.
    ///
    /// # Errors
    /// As [`Binaries::find`].
    pub fn of(majors: &[u32]) -> Result<Binaries> {
        Binaries::find(&Wanted::Majors(majors.to_vec()), Network::from_env())
    }

    /// What is on this machine, without fetching.
    ///
    /// # Errors
    /// There is no place for a cache.
    pub fn scan(user: ServerUser) -> Result<Binaries> {
        let mut installations = BTreeMap::new();
        for bin in directories()? {
            if let Some(installation) = installation(user, &bin) {
                installations.entry(installation.major).or_insert(installation);
            }
        }
        Ok(Binaries { installations })
    }

    /// The installation of a major.
    ///
    /// # Errors
    /// It is not there; the message names what is.
    pub fn major(&self, major: u32) -> Result<&Installation> {
        self.installations
            .get(&major)
            .with_context(|| format!("PostgreSQL {major} not found; found {}", self.describe()))
    }

    /// All majors, ascending.
    pub fn majors(&self) -> Vec<u32> {
        self.installations.keys().copied().collect()
    }

    fn satisfies(&self, wanted: &Wanted) -> bool {
        match wanted {
            Wanted::Majors(majors) => majors.iter().all(|major| self.installations.contains_key(major)),
            Wanted::AtLeast(count) => self.installations.len() >= *count,
        }
    }

    fn unmet(&self, wanted: &Wanted) -> fetch::Unmet {
        match wanted {
            Wanted::Majors(majors) => fetch::Unmet::Majors(
                majors.iter().copied().filter(|major| !self.installations.contains_key(major)).collect(),
            ),
            Wanted::AtLeast(count) => fetch::Unmet::More(count.saturating_sub(self.installations.len())),
        }
    }

    fn describe(&self) -> String {
        if self.installations.is_empty() {
            return "none".to_owned();
        }
        let all = self.installations.values().map(|one| format!("{} in {}", one.version, one.bin.display()));
        all.collect::<Vec<_>>().join(", ")
    }

    fn missing(&self, wanted: &Wanted, failures: &[String]) -> Missing {
        let wanted = match wanted {
            Wanted::Majors(majors) => {
                let absent = majors.iter().filter(|major| !self.installations.contains_key(major));
                format!("PostgreSQL {}", absent.map(u32::to_string).collect::<Vec<_>>().join(" and "))
            }
            Wanted::AtLeast(count) => format!("{count} major versions of PostgreSQL"),
        };
        let mut advice = failures.join("\n");
        advice.push_str("\nTo let the harness fetch them: apt-get install -y --no-install-recommends npm python3-pip");
        advice.push_str("\nor name directories that hold `postgres` and `initdb` in PGCUTOVER_PG_BIN");
        Missing { wanted, found: self.describe(), advice }
    }
}

/// A client tool (`psql`, `pgbench`, `pg_dump`, `pgbouncer`, …): from the directories in which servers are looked for,
/// the newest first among Debian's, then PATH and /usr/sbin.
///
/// # Errors
/// It is not there; the message names the package that has it.
pub fn tool(name: &str) -> Result<PathBuf> {
    let mut places = directories()?;
    places.push(PathBuf::from("/usr/sbin"));
    let package = if name == "pgbouncer" { "pgbouncer" } else { "postgresql-client" };
    places.into_iter().map(|place| place.join(name)).find(|path| path.is_file()).with_context(|| {
        format!("{name} not found: apt-get install -y --no-install-recommends {package}, or PGCUTOVER_PG_BIN")
    })
}

/// A client tool of a major version: what only its libpq can do. Fetched, unless that is forbidden, beside the servers,
/// where [`tool`] does not look.
///
/// # Errors
/// It is not there and can't or may not be fetched.
pub fn tool_of(major: u32, name: &str, network: Network) -> Result<PathBuf> {
    let cache = cache()?;
    let found = || {
        let places = directories().unwrap_or_default().into_iter().chain(fetch::client_directories(&cache));
        places.map(|place| place.join(name)).find(|path| path.is_file() && version_of(path) == Some(major))
    };
    if let Some(path) = found() {
        return Ok(path);
    }
    if network == Network::Allowed {
        fetch::clients(&cache).with_context(|| format!("{name} {major} is not there and can't be fetched"))?;
    }
    found().with_context(|| format!("{name} of PostgreSQL {major} not found: PGCUTOVER_PG_BIN, or let pip fetch it"))
}

/// `psql (PostgreSQL) 18.6`
fn version_of(tool: &Path) -> Option<u32> {
    let output = std::process::Command::new(tool).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().nth(2)?.split(['.', 'b', 'r', 'd']).next()?.parse().ok()
}

/// The cache: `PGCUTOVER_CACHE`, as root `/var/cache/pgcutover` (the servers' user must be able to read it), else under
/// `XDG_CACHE_HOME` or `~/.cache`.
///
/// # Errors
/// Neither is set.
pub fn cache() -> Result<PathBuf> {
    if let Some(path) = env::var_os("PGCUTOVER_CACHE") {
        return Ok(PathBuf::from(path));
    }
    if nix::unistd::Uid::effective().is_root() {
        return Ok(PathBuf::from("/var/cache/pgcutover"));
    }
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    Ok(base.context("no place for a cache: set HOME or PGCUTOVER_CACHE")?.join("pgcutover"))
}

fn directories() -> Result<Vec<PathBuf>> {
    let mut directories: Vec<PathBuf> =
        env::var_os("PGCUTOVER_PG_BIN").map(|list| env::split_paths(&list).collect()).unwrap_or_default();
    directories.extend(fetch::fetched(&cache()?));
    let mut debian: Vec<PathBuf> = fetch::children(Path::new("/usr/lib/postgresql")).collect();
    debian.sort_by_key(|path| path.file_name().and_then(|name| name.to_string_lossy().parse::<u32>().ok()));
    directories.extend(debian.into_iter().rev().map(|path| path.join("bin")));
    directories.extend(env::var_os("PATH").map(|list| env::split_paths(&list).collect::<Vec<_>>()).unwrap_or_default());
    Ok(directories)
}

/// `bin`, if `postgres` there runs as the servers' user and `initdb` is beside it.
fn installation(user: ServerUser, bin: &Path) -> Option<Installation> {
    let postgres = bin.join("postgres");
    if !postgres.is_file() || !bin.join("initdb").is_file() {
        return None;
    }
    let output = user.command(&postgres).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)"
    let version = text.split_whitespace().nth(2)?.to_owned();
    let major = version.split(['.', 'b', 'r', 'd']).next()?.parse().ok()?;
    Some(Installation { major, version, bin: bin.to_owned() })
}
