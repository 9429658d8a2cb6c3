//! A driver that decodes values by their declared types: psycopg2, in a Python environment of its own in the cache.
//!
//! Invariant: a [`Python`] has imported the driver before.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::binaries::{Network, cache};
use crate::fetch::{alone, apt_install, apt_update, fingerprint, finish, on_known_machine, on_path, partial, run};
use crate::printer::say;

const REQUIREMENTS: &str = include_str!("../drivers/requirements.txt");

/// An interpreter that has the driver.
#[derive(Clone, Debug)]
pub struct Python {
    program: PathBuf,
}

impl Python {
    /// The one in the cache, which is made if it is not there and something may be fetched.
    ///
    /// # Errors
    /// It is not there and can't or may not be made; the message says what is missing.
    pub fn with_psycopg2(network: Network) -> Result<Python> {
        let cache = cache()?;
        let directory = cache.join(format!("psycopg2-{:016x}", fingerprint(REQUIREMENTS)));
        let python = Python { program: directory.join("bin/python3") };
        if python.imports() {
            return Ok(python);
        }
        if network == Network::Offline {
            bail!("psycopg2 is not in the cache, and fetching is forbidden (--offline or PGCUTOVER_OFFLINE)");
        }
        let _alone = alone(&cache)?;
        if !python.imports() {
            make(&cache, &directory).context("psycopg2 can't be fetched (apt-get install -y python3-venv may help)")?;
        }
        if python.imports() { Ok(python) } else { bail!("psycopg2 was fetched, but can't be imported") }
    }

    /// False also when the machine's Python has become another one since.
    fn imports(&self) -> bool {
        let mut command = Command::new(&self.program);
        command.args(["-c", "import psycopg2"]);
        self.program.exists() && run(command).is_ok()
    }

    /// A command that runs one of the scripts in `tests/drivers`.
    pub fn script(&self, name: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers").join(name));
        command
    }
}

fn make(cache: &Path, directory: &Path) -> Result<()> {
    on_known_machine()?;
    on_path("python3")?;
    let partial = partial(cache)?;
    say(format_args!("fetching psycopg2 by pip (about 5 MB, once) into {}", cache.display()));
    if let Err(error) = environment(&partial) {
        // Debian keeps what it takes in a package of its own.
        apt_update().and_then(|()| apt_install(&["python3-venv"])).with_context(|| format!("{error:#}"))?;
        environment(&partial)?;
    }
    let requirements = partial.join("requirements.txt");
    fs::write(&requirements, REQUIREMENTS)?;
    let mut command = Command::new(partial.join("bin/python3"));
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]);
    command.args(["--only-binary", ":all:", "--requirement"]).arg(requirements);
    run(command)?;
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    finish(&partial, directory)
}

fn environment(partial: &Path) -> Result<()> {
    let mut command = Command::new("python3");
    command.args(["-m", "venv", "--clear"]).arg(partial);
    run(command)
}
