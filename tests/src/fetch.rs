//! Fetches server binaries into the cache: npm, else pip, else (as root) Debian's packages first.
//!
//! Invariant: a directory with its final name is complete and readable by everybody; whatever was killed half way has
//! another name and is removed by the next fetch. One process fetches at a time.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::printer::say;

const PACKAGE: &str = include_str!("../package.json");
const PACKAGE_LOCK: &str = include_str!("../package-lock.json");
const REQUIREMENTS: &str = include_str!("../requirements.txt");

/// What the two sources hold; the pinned files above say so.
const NPM_MAJORS: [u32; 4] = [13, 16, 17, 18];
const PIP_MAJORS: [u32; 2] = [17, 18];

/// What is still wanted.
#[derive(Debug)]
pub(crate) enum Unmet {
    Majors(Vec<u32>),
    More(usize),
}

impl Unmet {
    fn is_met(&self) -> bool {
        match self {
            Unmet::Majors(majors) => majors.is_empty(),
            Unmet::More(count) => *count == 0,
        }
    }

    fn served_by(&self, source: &[u32]) -> bool {
        match self {
            Unmet::Majors(majors) => majors.iter().any(|major| source.contains(major)),
            Unmet::More(count) => *count > 0,
        }
    }
}

/// The directories of fetched binaries.
pub(crate) fn fetched(cache: &Path) -> Vec<PathBuf> {
    let npm = children(&npm_dir(cache).join("node_modules")).map(|package| package.join("native/bin"));
    let pip = children(&pip_dir(cache)).map(|package| package.join("pginstall/bin"));
    let mut found: Vec<PathBuf> = npm.chain(pip).filter(|bin| bin.join("postgres").is_file()).collect();
    found.sort();
    found
}

/// The directories of fetched client tools.
pub(crate) fn client_directories(cache: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    children(&clients_dir(cache)).map(|package| package.join("pginstall/bin"))
}

/// Fetches the client tools of the newest majors (their servers come along).
///
/// # Errors
/// There is no pip, or no network.
pub(crate) fn clients(cache: &Path) -> Result<()> {
    let _alone = alone(cache)?;
    if clients_dir(cache).exists() {
        return Ok(());
    }
    on_known_machine()?;
    if run_pip_version().is_err() {
        apt_update().and_then(|()| apt_install(&["python3-pip"]))?;
    }
    pip_into(cache, &clients_dir(cache))
}

fn run_pip_version() -> Result<()> {
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "--version"]);
    run(command)
}

/// Fetches until `unmet` says that nothing is; returns why what is missing could not be fetched.
///
/// # Errors
/// The cache can't be written.
pub(crate) fn fetch(cache: &Path, unmet: impl Fn() -> Unmet) -> Result<Vec<String>> {
    let _alone = alone(cache)?;
    let mut failures = Vec::new();
    for source in [Source::Npm, Source::Pip, Source::Apt] {
        let wanted = unmet();
        if wanted.is_met() {
            break;
        }
        if let Err(error) = source.fetch(cache, &wanted) {
            failures.push(format!("{source:?}: {error:#}"));
        }
    }
    Ok(failures)
}

/// Waits until no other process fetches and clears what a killed one left; holds the others off while it lives.
///
/// # Errors
/// The cache can't be written.
pub(crate) fn alone(cache: &Path) -> Result<File> {
    fs::create_dir_all(cache).with_context(|| format!("creating the cache {}", cache.display()))?;
    let lock = File::create(cache.join("fetch.lock"))?;
    // Ended by the other process: a fetch is bounded by its client's own time limits, and the kernel frees the lock.
    lock.lock()?;
    for leftover in children(cache).filter(|path| path.to_string_lossy().ends_with(".partial")) {
        // A client that outlived its harness may still write there; what can't be removed now is removed next time.
        let _ = fs::remove_dir_all(leftover);
    }
    Ok(lock)
}

/// The entries of a directory; none if it can't be read.
pub(crate) fn children(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path())
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Npm,
    Pip,
    Apt,
}

impl Source {
    fn fetch(self, cache: &Path, wanted: &Unmet) -> Result<()> {
        match self {
            Source::Npm => npm(cache, wanted),
            Source::Pip => pip(cache, wanted),
            Source::Apt => apt(cache, wanted),
        }
    }
}

fn npm(cache: &Path, wanted: &Unmet) -> Result<()> {
    if npm_dir(cache).exists() || !wanted.served_by(&NPM_MAJORS) {
        bail!("has {NPM_MAJORS:?} only");
    }
    on_known_machine()?;
    on_path("npm")?;
    let partial = partial(cache)?;
    fs::write(partial.join("package.json"), PACKAGE)?;
    fs::write(partial.join("package-lock.json"), PACKAGE_LOCK)?;
    say(format_args!("fetching PostgreSQL {NPM_MAJORS:?} by npm (about 90 MB, once) into {}", cache.display()));
    // The packages' own scripts only make the links that `link_libraries` makes.
    let mut command = Command::new("npm");
    command.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(&partial);
    run(command)?;
    for package in children(&partial.join("node_modules")).filter(|path| path.join("native").is_dir()) {
        link_libraries(&package)?;
    }
    finish(&partial, &npm_dir(cache))
}

fn pip(cache: &Path, wanted: &Unmet) -> Result<()> {
    if pip_dir(cache).exists() || !wanted.served_by(&PIP_MAJORS) {
        bail!("has {PIP_MAJORS:?} only");
    }
    on_known_machine()?;
    on_path("python3")?;
    pip_into(cache, &pip_dir(cache))
}

fn pip_into(cache: &Path, complete: &Path) -> Result<()> {
    let partial = partial(cache)?;
    let requirements = partial.join("requirements.txt");
    fs::write(&requirements, REQUIREMENTS)?;
    say(format_args!("fetching PostgreSQL {PIP_MAJORS:?} by pip (about 30 MB, once) into {}", cache.display()));
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]);
    command.arg("--target").arg(&partial).arg("--requirement").arg(requirements);
    run(command)?;
    finish(&partial, complete)
}

/// Debian's packages, as root: a server of a wanted major, else pip for the versions that pip has.
fn apt(cache: &Path, wanted: &Unmet) -> Result<()> {
    apt_update()?;
    let mut failures = Vec::new();
    if let Unmet::Majors(majors) = wanted {
        for major in majors {
            if let Err(error) = apt_server(*major) {
                failures.push(format!("{error:#}"));
            }
        }
    }
    if wanted.served_by(&PIP_MAJORS) && !pip_dir(cache).exists() {
        let installed = apt_install(&["python3-pip"]).and_then(|()| pip(cache, wanted));
        failures.extend(installed.err().map(|error| format!("{error:#}")));
    }
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}

/// Debian's lists as they are today.
///
/// # Errors
/// Not root, or not Debian.
pub(crate) fn apt_update() -> Result<()> {
    if !nix::unistd::Uid::effective().is_root() {
        bail!("needs root");
    }
    on_path("apt-get")?;
    // A fresh container has no lists. If it fails, the lists that are there may do.
    let mut update = Command::new("apt-get");
    update.args(["update", "--quiet"]);
    let _ = run(update);
    Ok(())
}

fn apt_server(major: u32) -> Result<()> {
    // Debian would make and start a server on port 5432; we want the binaries only.
    let config = Path::new("/etc/postgresql-common/createcluster.conf");
    if !config.exists() {
        fs::create_dir_all("/etc/postgresql-common")?;
        fs::write(config, "create_main_cluster = false\n")?;
    }
    apt_install(&[&format!("postgresql-{major}")])
}

pub(crate) fn apt_install(packages: &[&str]) -> Result<()> {
    say(format_args!("as root: apt-get install -y --no-install-recommends {}", packages.join(" ")));
    let mut command = Command::new("apt-get");
    command.args(["-o", "Dpkg::Options::=--force-confold", "install", "-y", "--no-install-recommends"]);
    command.args(packages).env("DEBIAN_FRONTEND", "noninteractive");
    run(command)
}

/// Runs a package manager's client; its stdout is talk, so it goes nowhere unless it fails.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{program} can't be started"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        let last: Vec<&str> = words.lines().rev().take(4).collect();
        bail!("{program} ended with {}: {}", output.status, last.into_iter().rev().collect::<Vec<_>>().join(" | "));
    }
    Ok(())
}

pub(crate) fn on_path(program: &str) -> Result<()> {
    let directories = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&directories).any(|directory| directory.join(program).is_file()) {
        return Ok(());
    }
    bail!("{program} is not installed")
}

/// A directory that nobody else writes into.
pub(crate) fn partial(cache: &Path) -> Result<PathBuf> {
    let path = cache.join(format!("{}.partial", uuid::Uuid::new_v4()));
    fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

pub(crate) fn on_known_machine() -> Result<()> {
    if env::consts::OS == "linux" && env::consts::ARCH == "x86_64" {
        return Ok(());
    }
    bail!("the pinned packages are for Linux on x86_64")
}

#[derive(Deserialize)]
struct Link {
    source: PathBuf,
    target: PathBuf,
}

/// The packages carry no symbolic links, but a list of those that their libraries need.
fn link_libraries(package: &Path) -> Result<()> {
    let list = fs::read_to_string(package.join("native/pg-symlinks.json"))?;
    for link in serde_json::from_str::<Vec<Link>>(&list)? {
        let target = package.join(&link.target);
        if !target.exists() {
            symlink(package.join(&link.source).file_name().context("a link to nothing")?, &target)
                .with_context(|| format!("linking {}", target.display()))?;
        }
    }
    Ok(())
}

/// Readable by everybody whatever the umask, then under its final name in one step.
pub(crate) fn finish(partial: &Path, complete: &Path) -> Result<()> {
    let mut command = Command::new("chmod");
    command.args(["-R", "a+rX"]).arg(partial);
    run(command)?;
    if let Some(cache) = complete.parent() {
        fs::set_permissions(cache, fs::Permissions::from_mode(0o755))?;
    }
    fs::rename(partial, complete).with_context(|| format!("completing {}", complete.display()))
}

fn npm_dir(cache: &Path) -> PathBuf {
    cache.join(format!("npm-{:016x}", fingerprint(PACKAGE_LOCK)))
}

fn clients_dir(cache: &Path) -> PathBuf {
    cache.join(format!("clients-{:016x}", fingerprint(REQUIREMENTS)))
}

fn pip_dir(cache: &Path) -> PathBuf {
    cache.join(format!("pip-{:016x}", fingerprint(REQUIREMENTS)))
}

/// FNV-1a: a name for the pinned versions that stays the same over releases of the compiler.
pub(crate) fn fingerprint(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
