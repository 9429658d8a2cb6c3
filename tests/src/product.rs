//! The programs under test.
//!
//! Invariant: they are built from this tree, by the profile of this very program (a test of one crate does not build
//! another's binaries), unless `PGCUTOVER_BIN_DIR` names a directory that holds them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::printer::say;

/// Where `pgcutover` and `proxyctl` are.
#[derive(Clone, Debug)]
pub struct Product {
    /// The proxy.
    pub pgcutover: PathBuf,
    /// The controller.
    pub proxyctl: PathBuf,
}

impl Product {
    /// Builds both, once a process.
    ///
    /// # Errors
    /// They do not build; cargo has said why on stderr.
    pub fn build() -> Result<&'static Product> {
        // One build for all tests of a process, which run at the same time.
        static BUILT: OnceLock<Result<Product, String>> = OnceLock::new();
        BUILT
            .get_or_init(|| build().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))
    }
}

impl Product {
    /// Which build it is, by the directory that it was found in: `release`, `debug`.
    pub fn profile(&self) -> &str {
        self.pgcutover.parent().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default()
    }
}

fn build() -> Result<Product> {
    let given = env::var_os("PGCUTOVER_BIN_DIR").map(PathBuf::from);
    let directory = match given {
        Some(directory) => directory,
        None => build_beside(&profile_directory()?)?,
    };
    let product = Product { pgcutover: directory.join("pgcutover"), proxyctl: directory.join("proxyctl") };
    for binary in [&product.pgcutover, &product.proxyctl] {
        ensure!(binary.is_file(), "{} is not there", binary.display());
    }
    Ok(product)
}

/// `target/debug` or `target/release`: where this program was built.
fn profile_directory() -> Result<PathBuf> {
    let program = env::current_exe().context("where am I?")?;
    let directory = program.parent().context("a program without directory")?;
    let directory = if directory.ends_with("deps") { directory.parent() } else { Some(directory) };
    directory.map(Path::to_owned).context("a target directory without parent")
}

fn build_beside(profile: &Path) -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("a crate without workspace")?;
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--quiet", "-p", "pgcutover", "-p", "proxyctl"]).current_dir(workspace);
    command.arg("--target-dir").arg(profile.parent().context("a profile without target directory")?);
    if profile.ends_with("release") {
        command.arg("--release");
    }
    say("building pgcutover and proxyctl");
    let status = command.stdin(Stdio::null()).status().context("starting cargo")?;
    ensure!(status.success(), "pgcutover and proxyctl do not build: cargo ended with {status}");
    Ok(profile.to_owned())
}
