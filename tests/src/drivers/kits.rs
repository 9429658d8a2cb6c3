//! What runs the programs of `tests/drivers`: an interpreter or compiler of each language with its drivers, in the cache.
//!
//! Python and node by pip and npm, pinned with hashes. Debian's packages are downloaded and unpacked into the cache, never
//! installed: Go's would change half of the machine.
//!
//! Invariant: a [`Kit`] has imported its drivers before.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::binaries::{Network, cache};
use crate::fetch::{
    alone, apt_install, apt_update, children, fingerprint, finish, on_known_machine, on_path, partial, run,
};
use crate::printer::say;

const REQUIREMENTS: &str = include_str!("../../drivers/requirements.txt");
const PACKAGE: &str = include_str!("../../drivers/node/package.json");
const PACKAGE_LOCK: &str = include_str!("../../drivers/node/package-lock.json");
const JAVA: &str = include_str!("../../drivers/java/Course.java");
const GO: [(&str, &str); 3] = [
    ("course.go", include_str!("../../drivers/go/course.go")),
    ("with_pq.go", include_str!("../../drivers/go/with_pq.go")),
    ("with_pgx.go", include_str!("../../drivers/go/with_pgx.go")),
];

/// Debian 12's; another release has other names, and then these drivers are not tried.
const JAVA_PACKAGES: &[&str] = &["libpostgresql-jdbc-java"];
const RUBY_PACKAGES: &[&str] = &["libruby3.1", "ruby3.1", "ruby-pg"];
/// Just what the two drivers import: their packages want much more, for examples and tests.
const GO_PACKAGES: &[&str] = &[
    "golang-1.19-go",
    "golang-1.19-src",
    "golang-github-lib-pq-dev",
    "golang-github-jackc-pgx-v4-dev",
    "golang-github-jackc-pgconn-dev",
    "golang-github-jackc-pgio-dev",
    "golang-github-jackc-pgpassfile-dev",
    "golang-github-jackc-pgproto3-v2-dev",
    "golang-github-jackc-pgservicefile-dev",
    "golang-github-jackc-pgtype-dev",
    "golang-github-jackc-chunkreader-v2-dev",
    "golang-github-jackc-puddle-dev",
    "golang-golang-x-crypto-dev",
    "golang-golang-x-text-dev",
];

/// Where Debian's packages keep libraries of this machine's kind.
const LIBRARIES: &str = "root/usr/lib/x86_64-linux-gnu";

/// A language with its drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// psycopg2, psycopg, asyncpg.
    Python,
    /// pg, postgres.
    Node,
    /// pgJDBC.
    Java,
    /// ruby-pg.
    Ruby,
    /// lib/pq, pgx.
    Go,
}

impl Language {
    fn name(self) -> &'static str {
        match self {
            Language::Python => "python",
            Language::Node => "node",
            Language::Java => "java",
            Language::Ruby => "ruby",
            Language::Go => "go",
        }
    }

    /// All that decides what is in the cache; with another one it is made anew.
    fn pins(self) -> String {
        match self {
            Language::Python => REQUIREMENTS.to_owned(),
            Language::Node => PACKAGE_LOCK.to_owned(),
            Language::Java => JAVA_PACKAGES.join(" ") + JAVA,
            Language::Ruby => RUBY_PACKAGES.join(" "),
            Language::Go => GO_PACKAGES.join(" ") + &GO.map(|(_, text)| text).concat(),
        }
    }

    fn make(self, cache: &Path, partial: &Path) -> Result<()> {
        on_known_machine()?;
        say(format_args!("fetching the drivers of {} (once) into {}", self.name(), cache.display()));
        match self {
            Language::Python => make_python(partial),
            Language::Node => make_node(partial),
            Language::Java => make_java(partial),
            Language::Ruby => unpack(partial, RUBY_PACKAGES),
            Language::Go => make_go(partial),
        }
    }
}

/// A language that is there.
#[derive(Clone, Debug)]
pub struct Kit {
    language: Language,
    directory: PathBuf,
}

impl Kit {
    /// The one in the cache, which is made if it is not there and something may be fetched.
    ///
    /// # Errors
    /// It is not there and can't or may not be made; the message says what is missing.
    pub fn find(language: Language, network: Network) -> Result<Kit> {
        let (cache, name) = (cache()?, language.name());
        let directory = cache.join(format!("drivers-{name}-{:016x}", fingerprint(&language.pins())));
        let kit = Kit { language, directory };
        if kit.imports().is_ok() {
            return Ok(kit);
        }
        if network == Network::Offline {
            bail!(
                "the drivers of {name} are not in the cache, and fetching is forbidden (--offline or PGCUTOVER_OFFLINE)"
            );
        }
        let _alone = alone(&cache)?;
        if kit.imports().is_err() {
            let partial = partial(&cache)?;
            language.make(&cache, &partial).with_context(|| format!("the drivers of {name} can't be had"))?;
            if kit.directory.exists() {
                fs::remove_dir_all(&kit.directory).with_context(|| format!("removing {}", kit.directory.display()))?;
            }
            finish(&partial, &kit.directory)?;
        }
        kit.imports().with_context(|| format!("the drivers of {name} were fetched, but do not load"))?;
        Ok(kit)
    }

    /// Fails also when the machine's interpreter has become another one since.
    fn imports(&self) -> Result<()> {
        let mut command = match self.language {
            Language::Python => self.inline("import psycopg2, psycopg, asyncpg"),
            Language::Node => self.inline("require('pg'); require('postgres')"),
            Language::Ruby => self.inline("require 'pg'; require 'json'"),
            Language::Java => {
                let mut command = self.interpreter();
                command.args(["Course", "version"]);
                command
            }
            Language::Go => {
                let mut command = self.interpreter();
                command.args(["version", "", "0", "", "", "0"]);
                command
            }
        };
        if !self.directory.exists() {
            bail!("{} is not there", self.directory.display());
        }
        command.current_dir("/");
        run(command)
    }

    fn inline(&self, text: &str) -> Command {
        let mut command = self.interpreter();
        command.arg(if self.language == Language::Python { "-c" } else { "-e" }).arg(text);
        command
    }

    /// The interpreter, without a program yet.
    fn interpreter(&self) -> Command {
        let directory = &self.directory;
        match self.language {
            Language::Python => Command::new(directory.join("bin/python3")),
            Language::Node => {
                let mut command = Command::new("node");
                command.env("NODE_PATH", directory.join("node_modules"));
                command
            }
            Language::Java => {
                let mut command = Command::new("java");
                // One connection's work: no need for a heap or a compiler of a server's size.
                command.args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx64m", "-cp", &self.class_path()]);
                command
            }
            Language::Ruby => {
                let mut command = Command::new(directory.join("root/usr/bin/ruby3.1"));
                let libraries = directory.join(LIBRARIES);
                let places = ["root/usr/lib/ruby/vendor_ruby", "root/usr/lib/ruby/3.1.0"].map(|at| directory.join(at));
                let compiled = ["ruby/vendor_ruby/3.1.0", "ruby/3.1.0"].map(|at| libraries.join(at));
                let all = places.iter().chain(&compiled).map(|path| path.display().to_string());
                command.env("RUBYLIB", all.collect::<Vec<_>>().join(":")).env("LD_LIBRARY_PATH", &libraries);
                command.arg("--disable=gems");
                command
            }
            Language::Go => Command::new(directory.join("driver")),
        }
    }

    fn class_path(&self) -> String {
        let jar = self.directory.join("root/usr/share/java/postgresql.jar");
        format!("{}:{}", self.directory.join("classes").display(), jar.display())
    }

    /// A command that runs one of the programs of `tests/drivers`: a file's name, or for Go the driver's.
    pub fn program(&self, name: &str) -> Command {
        let mut command = self.interpreter();
        match self.language {
            Language::Python | Language::Node | Language::Ruby => {
                command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers").join(name))
            }
            Language::Java | Language::Go => command.arg(name),
        };
        command
    }

    /// Debian's version of a package that this kit was made from.
    pub fn version(&self, package: &str) -> Option<String> {
        let list = fs::read_to_string(self.directory.join("versions")).ok()?;
        let line = list.lines().find_map(|line| line.strip_prefix(package)?.strip_prefix('_'))?;
        Some(line.split(['_', '-']).next()?.to_owned())
    }
}

fn make_python(partial: &Path) -> Result<()> {
    on_path("python3")?;
    if let Err(error) = environment(partial) {
        // Debian keeps what it takes in a package of its own.
        apt_update().and_then(|()| apt_install(&["python3-venv"])).with_context(|| format!("{error:#}"))?;
        environment(partial)?;
    }
    let requirements = partial.join("requirements.txt");
    fs::write(&requirements, REQUIREMENTS)?;
    let mut command = Command::new(partial.join("bin/python3"));
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]);
    command.args(["--only-binary", ":all:", "--requirement"]).arg(requirements);
    run(command)
}

fn environment(partial: &Path) -> Result<()> {
    let mut command = Command::new("python3");
    command.args(["-m", "venv", "--clear"]).arg(partial);
    run(command)
}

fn make_node(partial: &Path) -> Result<()> {
    on_path("node")?;
    on_path("npm")?;
    fs::write(partial.join("package.json"), PACKAGE)?;
    fs::write(partial.join("package-lock.json"), PACKAGE_LOCK)?;
    let mut command = Command::new("npm");
    command.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(partial);
    run(command)
}

fn make_java(partial: &Path) -> Result<()> {
    if on_path("java").and_then(|()| on_path("javac")).is_err() {
        apt_update().and_then(|()| apt_install(&["openjdk-17-jdk-headless"]))?;
    }
    unpack(partial, JAVA_PACKAGES)?;
    let source = partial.join("Course.java");
    fs::write(&source, JAVA)?;
    let mut command = Command::new("javac");
    command.arg("-cp").arg(partial.join("root/usr/share/java/postgresql.jar"));
    command.arg("-d").arg(partial.join("classes")).arg(source);
    run(command)
}

fn make_go(partial: &Path) -> Result<()> {
    unpack(partial, GO_PACKAGES)?;
    let (root, source) = (partial.join("root"), partial.join("source"));
    fs::create_dir(&source)?;
    let mut command = Command::new(root.join("usr/lib/go-1.19/bin/go"));
    command.args(["build", "-o"]).arg(partial.join("driver"));
    for (name, text) in GO {
        fs::write(source.join(name), text)?;
        command.arg(name);
    }
    command.current_dir(&source).env("GOROOT", root.join("usr/lib/go-1.19"));
    command.env("GOPATH", root.join("usr/share/gocode")).env("GOCACHE", partial.join("built"));
    // Nothing comes from the network: all imports are in the packages.
    command.env("GO111MODULE", "off").env("GOPROXY", "off").env("GOFLAGS", "").env("CGO_ENABLED", "0");
    run(command)?;
    // The compiler is half a gigabyte; the programs are all that is needed from here on.
    fs::remove_dir_all(root)?;
    Ok(fs::remove_dir_all(partial.join("built"))?)
}

/// Debian's packages below `root`, as if they were installed there, and their names in `versions`.
fn unpack(partial: &Path, packages: &[&str]) -> Result<()> {
    on_path("apt-get")?;
    on_path("dpkg-deb")?;
    let archives = partial.join("archives");
    fs::create_dir(&archives)?;
    let download = || {
        let mut command = Command::new("apt-get");
        command.args(["download", "--quiet"]).args(packages).current_dir(&archives);
        run(command)
    };
    // A fresh container has no lists of packages.
    if let Err(error) = download() {
        apt_update().with_context(|| format!("{error:#}"))?;
        download()?;
    }
    let mut names = String::new();
    for archive in children(&archives) {
        let mut command = Command::new("dpkg-deb");
        command.arg("--extract").arg(&archive).arg(partial.join("root"));
        run(command)?;
        names += &archive.file_name().unwrap_or_default().to_string_lossy();
        names.push('\n');
    }
    fs::write(partial.join("versions"), names)?;
    Ok(fs::remove_dir_all(archives)?)
}
