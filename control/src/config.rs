//! The one TOML file of a cutover: who moves, from where, to where, through which proxies, and how long each part may take.
//!
//! Invariant: a `Config` has been checked; whoever holds one checks nothing again. An error names file, key and reason,
//! and where a key was mistyped the nearest known one.

pub mod members;
mod section;
mod verify;
mod way_back;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use pgcutover_api::command::OnTimeout;
use pgcutover_api::store::Name;
use toml::Table;

use crate::config::members::{BouncerEntry, ProxyEntry, UNLISTED, Unleased, Unlisted};
use crate::config::section::{Checked, Section, Wrong, with_source, wrong};

pub use crate::config::verify::Verify;
pub use crate::config::way_back::WayBack;

/// The hold budget a proxy has unless its configuration says otherwise; the real one is read from each proxy when it is armed.
pub const HOLD_BUDGET_DEFAULT: Duration = Duration::from_secs(15);

/// Everything `proxyctl` was told, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file it came from.
    pub path: PathBuf,
    /// The route name: the database as clients know it on the proxies.
    pub database: String,
    /// The same, as the decision store takes it.
    pub route: Name,
    /// Where journals are kept; relative paths are relative to the file.
    pub journal_dir: PathBuf,
    /// The server that loses its clients.
    pub source: Side,
    /// The server that gains them.
    pub target: Side,
    /// Every proxy that serves the database, or where to find it.
    pub proxies: Vec<ProxyEntry>,
    /// Every PgBouncer that serves the database.
    pub bouncers: Vec<BouncerEntry>,
    /// How changes get from source to target.
    pub replication: Replication,
    /// Deadlines and limits.
    pub budgets: Budgets,
    /// What happens to sequences.
    pub sequences: Sequences,
    /// Choices that are not deadlines.
    pub policy: Policy,
    /// Whether a way back is prepared within the stall and attached after it.
    pub way_back: WayBack,
    /// Whether both servers are compared.
    pub verify: Verify,
}

/// One of the two clusters.
#[derive(Clone)]
pub struct Side {
    /// The backend's name on the proxies.
    pub backend: String,
    /// How `proxyctl` itself reaches it (not through a proxy).
    pub endpoint: Endpoint,
    /// How the other server reaches it, where that is another way; libpq's words.
    replication_dsn: Option<String>,
}

/// A connection string and how TLS is to be used on it.
#[derive(Clone)]
pub struct Endpoint {
    /// The parsed connection string. Its `sslmode` is overridden by `tls`.
    pub pg: tokio_postgres::Config,
    /// libpq's `sslmode`.
    pub tls: TlsMode,
    /// libpq's `sslrootcert`.
    pub root: RootCertificate,
}

impl Endpoint {
    /// Host, port and database for people; never the password.
    pub fn describe(&self) -> String {
        let host = match self.pg.get_hosts().first() {
            Some(tokio_postgres::config::Host::Tcp(name)) => name.clone(),
            Some(tokio_postgres::config::Host::Unix(path)) => path.display().to_string(),
            None => "localhost".to_owned(),
        };
        let port = self.pg.get_ports().first().copied().unwrap_or(5432);
        format!("{host}:{port}/{}", self.pg.get_dbname().unwrap_or_default())
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({}, {:?})", self.describe(), self.tls)
    }
}

/// libpq's `sslmode` as far as a controller needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// Never.
    Disable,
    /// If the server offers it, without checking whom we speak to.
    Prefer,
    /// Always, without checking whom we speak to.
    Require,
    /// Always, and the certificate must come from a known authority.
    VerifyCa,
    /// Always, and the certificate must be the host's.
    VerifyFull,
}

/// Whose certificates are believed under `verify-ca` and `verify-full`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCertificate {
    /// The operating system's.
    System,
    /// Those in a PEM file.
    File(PathBuf),
}

/// How changes get from source to target. Each step that differs asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replication {
    /// Publications and subscriptions of PostgreSQL itself.
    Logical {
        /// Those on the target that must have caught up; empty means all of the target database.
        subscriptions: Vec<String>,
    },
    /// The target is a streaming standby of the source, and is promoted: the whole cluster moves (R16), nothing follows it back.
    Physical,
}

/// Deadlines and limits of a cutover. Checked against each other when the file is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budgets {
    /// How long open transactions may take to end once the gate is shut.
    pub drain: Duration,
    /// How long a pause lives without being renewed.
    pub lease: Duration,
    /// How often leases are renewed.
    pub renew: Duration,
    /// How long the last changes may take to reach the target.
    pub catch_up: Duration,
    /// The predicted stall above which a run does not start.
    pub stall: Duration,
    /// Replication lag above which a run does not start, bytes of WAL.
    pub lag_bytes_max: u64,
    /// Age of the oldest transaction above which a run does not start.
    pub transaction_age_max: Duration,
    /// How long writers that passed the gate before the fence may take to end.
    pub barrier: Duration,
}

impl Default for Budgets {
    fn default() -> Budgets {
        Budgets {
            drain: Duration::from_secs(2),
            lease: Duration::from_secs(3),
            renew: Duration::from_millis(500),
            catch_up: Duration::from_secs(5),
            stall: Duration::from_millis(250),
            lag_bytes_max: 1 << 20,
            transaction_age_max: Duration::from_secs(1),
            barrier: Duration::from_secs(1),
        }
    }
}

/// What happens to sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequences {
    /// Values left out on the target so that numbers handed out late on the source are not handed out again.
    pub gap: u32,
}

/// Whether something may be different on the target that clients would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It must be equal.
    Refused,
    /// Somebody has looked at what clients do and said yes.
    Accepted,
}

impl Change {
    fn accepted_by(flag: Option<bool>) -> Change {
        if flag == Some(true) { Change::Accepted } else { Change::Refused }
    }
}

/// Choices that are not deadlines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What happens to transactions that outlast the drain deadline.
    pub on_timeout: OnTimeout,
    /// Connections each proxy opens to the target before the pause.
    pub prewarm: u32,
    /// The login of the proxies for decisions; gets its rights on our tables when they are made.
    pub proxy_role: String,
    /// Whether user-defined types may have other oids on the target: preflight is red otherwise.
    pub oid_change: Change,
    /// Whether columns may have another order or other types on the target: preflight is red otherwise.
    pub column_change: Change,
    /// Attempts that `cutover` and `rehearse` make at most; 1 or more.
    pub attempts: u32,
    /// How long the second one waits; each further one waits twice as long as the one before.
    pub back_off: Duration,
    /// What becomes of proxies that nobody listed.
    pub unlisted: Unlisted,
    /// What becomes of PgBouncers that nobody keeps.
    pub unleased: Unleased,
}

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {key}: {reason}", .file.display())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The key with its tables, such as `budgets.drain`; `-` for the file as a whole.
    pub key: String,
    /// What is wrong with it and what would be right.
    pub reason: String,
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            file: path.to_owned(),
            key: "-".to_owned(),
            reason: format!("cannot be read: {error}"),
        })?;
        Config::parse(path, &text)
    }

    /// Checks the text of a file that is called `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        read(path, text).map_err(|Wrong { key, reason }| ConfigError { file: path.to_owned(), key, reason })
    }

    /// Tells whether two runs of one version of proxyctl were asked the same, wherever the file lies. No secret goes into it.
    pub fn digest(&self) -> String {
        let asked = Config { path: PathBuf::new(), ..self.clone() };
        digest(&format!("{asked:?}"))
    }
}

/// Tells texts of configurations apart.
pub fn digest(text: &str) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(text);
    // Enough to tell a handful of configurations apart by eye.
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path, text: &str) -> Checked<Config> {
    let table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| wrong("-", format!("is not TOML: {}", error.to_string().trim())))?;
    let mut root = Section::root(table);
    let beside = path.parent().unwrap_or(Path::new("."));
    let database = root.required("database", Section::text)?;
    let source = root.section("source")?.ok_or_else(|| wrong("source", "is missing: the server to move away from"))?;
    let target = root.section("target")?.ok_or_else(|| wrong("target", "is missing: the server to move to"))?;
    let (source, target) = (side(source)?, side(target)?);
    let replication = replication(root.section("replication")?)?;
    let config = Config {
        path: path.to_owned(),
        route: Name::new(&database).map_err(|error| wrong("database", error.to_string()))?,
        journal_dir: beside.join(root.text("journal_dir")?.unwrap_or_else(|| "runs".to_owned())),
        bouncers: members::bouncers(
            root.sections("pgbouncer")?,
            &database,
            [&source.endpoint, &target.endpoint],
            beside,
        )?,
        source,
        target,
        database,
        proxies: members::proxies(root.sections("proxies")?)?,
        budgets: budgets(root.section("budgets")?)?,
        sequences: sequences(root.section("sequences")?)?,
        policy: policy(root.section("policy")?)?,
        way_back: way_back::way_back(root.section("way_back")?, &replication)?,
        verify: verify::verify(root.section("verify")?)?,
        replication,
    };
    root.finish()?;
    check_names(&config)?;
    check_deadlines(&config.budgets)?;
    if config.policy.attempts == 0 {
        return Err(wrong("policy.attempts", "must be 1 or more"));
    }
    if config.replication == Replication::Physical && !config.bouncers.is_empty() {
        let reason =
            "can't take part in a physical move yet (replication.kind): nobody has tried it; put a pgcutover in front";
        return Err(wrong("pgbouncer", reason));
    }
    Ok(config)
}

fn side(mut section: Section) -> Checked<Side> {
    let side = Side {
        backend: section.required("backend", Section::text)?,
        endpoint: endpoint(&mut section)?,
        replication_dsn: section.text("replication_dsn")?,
    };
    section.finish()?;
    Ok(side)
}

fn endpoint(section: &mut Section) -> Checked<Endpoint> {
    let dsn = section.required("dsn", Section::text)?;
    let pg = tokio_postgres::Config::from_str(&dsn)
        .map_err(|error| wrong(section.key("dsn"), format!("is not a connection string: {}", with_source(&error))))?;
    let of_dsn = match pg.get_ssl_mode() {
        tokio_postgres::config::SslMode::Disable => TlsMode::Disable,
        tokio_postgres::config::SslMode::Require => TlsMode::Require,
        tokio_postgres::config::SslMode::Prefer | _ => TlsMode::Prefer,
    };
    let tls = section.choice("sslmode", TLS_MODES)?.unwrap_or(of_dsn);
    let root = match section.text("sslrootcert")?.as_deref() {
        None | Some("system") => RootCertificate::System,
        Some(file) => RootCertificate::File(file.into()),
    };
    Ok(Endpoint { pg, tls, root })
}

const TLS_MODES: &[(&str, TlsMode)] = &[
    ("disable", TlsMode::Disable),
    ("prefer", TlsMode::Prefer),
    ("require", TlsMode::Require),
    ("verify-ca", TlsMode::VerifyCa),
    ("verify-full", TlsMode::VerifyFull),
];

fn replication(section: Option<Section>) -> Checked<Replication> {
    let Some(mut section) = section else { return Ok(Replication::Logical { subscriptions: Vec::new() }) };
    let kind = section.choice("kind", KINDS)?.unwrap_or(Kind::Logical);
    let subscriptions = section.texts("subscriptions")?.unwrap_or_default();
    if kind == Kind::Physical && !subscriptions.is_empty() {
        return Err(wrong(
            section.key("subscriptions"),
            "must be empty: a physical standby has none (kind = 'physical')",
        ));
    }
    section.finish()?;
    Ok(match kind {
        Kind::Logical => Replication::Logical { subscriptions },
        Kind::Physical => Replication::Physical,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Logical,
    Physical,
}

const KINDS: &[(&str, Kind)] = &[("logical", Kind::Logical), ("physical", Kind::Physical)];

fn budgets(section: Option<Section>) -> Checked<Budgets> {
    let mut budgets = Budgets::default();
    let Some(mut section) = section else { return Ok(budgets) };
    for (key, place) in [
        ("drain", &mut budgets.drain),
        ("lease", &mut budgets.lease),
        ("renew", &mut budgets.renew),
        ("catch_up", &mut budgets.catch_up),
        ("stall", &mut budgets.stall),
        ("transaction_age_max", &mut budgets.transaction_age_max),
        ("barrier", &mut budgets.barrier),
    ] {
        if let Some(given) = section.duration(key)? {
            *place = given;
        }
    }
    if let Some(bytes) = section.integer("lag_bytes_max")? {
        budgets.lag_bytes_max = bytes;
    }
    section.finish()?;
    Ok(budgets)
}

fn sequences(section: Option<Section>) -> Checked<Sequences> {
    // A proxy pool's worth of sessions that each cached a few numbers stays well below a thousand.
    let default = Sequences { gap: 1000 };
    let Some(mut section) = section else { return Ok(default) };
    let gap = section.small("gap")?.unwrap_or(default.gap);
    section.finish()?;
    Ok(Sequences { gap })
}

fn policy(section: Option<Section>) -> Checked<Policy> {
    let default = Policy {
        on_timeout: OnTimeout::Abort,
        prewarm: 20,
        proxy_role: "pgcutover_proxy".to_owned(),
        oid_change: Change::Refused,
        column_change: Change::Refused,
        attempts: 1,
        back_off: Duration::from_secs(5),
        unlisted: Unlisted::Refuse,
        unleased: Unleased::Refuse,
    };
    let Some(mut section) = section else { return Ok(default) };
    let policy = Policy {
        on_timeout: section.choice("on_timeout", ON_TIMEOUT)?.unwrap_or(default.on_timeout),
        prewarm: section.small("prewarm")?.unwrap_or(default.prewarm),
        proxy_role: section.text("proxy_role")?.unwrap_or(default.proxy_role),
        oid_change: Change::accepted_by(section.flag("accept_oid_change")?),
        column_change: Change::accepted_by(section.flag("accept_column_change")?),
        attempts: section.small("attempts")?.unwrap_or(default.attempts),
        back_off: section.duration("back_off")?.unwrap_or(default.back_off),
        unlisted: section.choice("unlisted", UNLISTED)?.unwrap_or(default.unlisted),
        unleased: if section.flag("accept_unleased")?.unwrap_or(false) { Unleased::Keep } else { default.unleased },
    };
    section.finish()?;
    Ok(policy)
}

const ON_TIMEOUT: &[(&str, OnTimeout)] =
    &[("abort", OnTimeout::Abort), ("cancel", OnTimeout::Cancel), ("terminate", OnTimeout::Terminate)];

fn check_names(config: &Config) -> Checked<()> {
    for (key, side) in [("source.backend", &config.source), ("target.backend", &config.target)] {
        Name::new(&side.backend).map_err(|error| wrong(key, error.to_string()))?;
    }
    if config.source.backend == config.target.backend {
        return Err(wrong("target.backend", "is the source's: a cutover needs two backends of different names"));
    }
    if config.proxies.is_empty() && config.bouncers.is_empty() {
        return Err(wrong("proxies", "is missing: name every proxy that serves the database in a [[proxies]] table"));
    }
    let twice = config.bouncers.iter().find(|bouncer| config.proxies.iter().any(|proxy| proxy.name == bouncer.name));
    if let Some(bouncer) = twice {
        return Err(wrong("pgbouncer.name", format!("'{}' names a proxy too", bouncer.name)));
    }
    // A cancel through a paused PgBouncer is kept back until RESUME, and its pids are not ours to signal.
    if !config.bouncers.is_empty() && config.policy.on_timeout != OnTimeout::Abort {
        let reason = "must be 'abort' where a [[pgbouncer]] takes part: a paused PgBouncer cancels nothing; end long \
                      transactions before, or raise budgets.drain";
        return Err(wrong("policy.on_timeout", reason));
    }
    Ok(())
}

fn check_deadlines(budgets: &Budgets) -> Checked<()> {
    let must = |holds: bool, key: &str, reason: String| if holds { Ok(()) } else { Err(wrong(key, reason)) };
    let show = |d: Duration| humantime::format_duration(d).to_string();
    for (key, given) in [
        ("budgets.drain", budgets.drain),
        ("budgets.lease", budgets.lease),
        ("budgets.renew", budgets.renew),
        ("budgets.catch_up", budgets.catch_up),
        ("budgets.barrier", budgets.barrier),
        ("budgets.stall", budgets.stall),
    ] {
        must(!given.is_zero(), key, "must be longer than nothing".to_owned())?;
    }
    // A lease must survive one renewal that got lost.
    must(
        budgets.renew * 2 < budgets.lease,
        "budgets.renew",
        format!(
            "{} is too seldom for a lease of {}: twice renew must be below lease",
            show(budgets.renew),
            show(budgets.lease)
        ),
    )?;
    must(
        budgets.drain < budgets.lease,
        "budgets.drain",
        format!("{} must be below lease ({})", show(budgets.drain), show(budgets.lease)),
    )?;
    Ok(())
}

impl Budgets {
    /// Whether clients held by a proxy with this hold budget outlive the worst pause; the reason if not.
    pub fn fit_into(&self, hold: Duration) -> Result<(), String> {
        let show = |d: Duration| humantime::format_duration(d).to_string();
        let worst = self.drain + self.barrier + self.catch_up;
        if self.lease + self.drain >= hold {
            return Err(format!(
                "lease + drain ({}) must be below the hold budget ({})",
                show(self.lease + self.drain),
                show(hold)
            ));
        }
        if worst >= hold {
            return Err(format!(
                "drain + barrier + catch_up ({}) must be below the hold budget ({})",
                show(worst),
                show(hold)
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::members::{Find, Point};

    const LEAST: &str = r#"
database = "app"
[source]
backend = "blue"
dsn = "host=127.0.0.1 port=5433 user=pgcutover dbname=app"
[target]
backend = "green"
dsn = "host=127.0.0.1 port=5434 user=pgcutover dbname=app"
[[proxies]]
name = "p1"
dsn = "host=127.0.0.1 port=6432 user=admin password=secret dbname=pgcutover"
"#;

    fn error(text: &str) -> ConfigError {
        Config::parse(Path::new("/etc/cutover.toml"), text).expect_err("must be refused")
    }

    fn with(tail: &str) -> String {
        format!("{LEAST}{tail}")
    }

    #[test]
    fn the_least_file_has_the_documented_defaults() {
        let config = Config::parse(Path::new("/etc/cutover.toml"), LEAST).unwrap();
        assert_eq!(config.budgets, Budgets::default());
        assert_eq!(config.journal_dir, Path::new("/etc/runs"));
        assert_eq!(config.sequences.gap, 1000);
        assert_eq!(config.policy.prewarm, 20);
        assert!(config.way_back.enabled);
        assert!(Budgets::default().fit_into(HOLD_BUDGET_DEFAULT).is_ok());
    }

    #[test]
    fn the_example_in_the_repository_equals_the_defaults() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/cutover.toml");
        let Ok(text) = std::fs::read_to_string(&path) else { panic!("{} is missing", path.display()) };
        let config = Config::parse(&path, &text).unwrap();
        let least = Config::parse(&path, LEAST).unwrap();
        assert_eq!(config.budgets, least.budgets);
        assert_eq!(config.policy, least.policy);
        assert_eq!(config.sequences, least.sequences);
        assert_eq!(config.way_back, least.way_back);
        for key in ["accept_oid_change", "accept_column_change"] {
            assert!(text.contains(&format!("\n{key} = false ")), "the example names {key}");
        }
    }

    #[test]
    fn changes_are_accepted_only_by_word() {
        let changes = |text: &str| {
            let policy = Config::parse(Path::new("cutover.toml"), text).unwrap().policy;
            [policy.oid_change, policy.column_change]
        };
        assert_eq!(changes(LEAST), [Change::Refused; 2]);
        assert_eq!(changes(&with("[policy]\nprewarm = 3\n")), [Change::Refused; 2]);
        let oids = "[policy]\naccept_oid_change = true\naccept_column_change = false\n";
        assert_eq!(changes(&with(oids)), [Change::Accepted, Change::Refused]);
        assert_eq!(changes(&with("[policy]\naccept_column_change = true\n")), [Change::Refused, Change::Accepted]);
        assert_eq!(error(&with("[policy]\naccept_oid_change = 'yes'\n")).key, "policy.accept_oid_change");
        assert_eq!(error(&with("[policy]\nattempts = 0\n")).key, "policy.attempts");
    }

    #[test]
    fn a_mistyped_key_is_named_with_file_and_suggestion() {
        let text = error(&with("[budgets]\ndrian = '2s'\n")).to_string();
        assert_eq!(text, "/etc/cutover.toml: budgets.drian: is not a key; did you mean 'drain'?");
        let text = error(&LEAST.replace("database", "databse")).to_string();
        assert!(text.contains("database: is missing; did 'databse' mean it?"), "{text}");
    }

    #[test]
    fn a_wrong_value_says_what_would_be_right() {
        let text = error(&with("[budgets]\ndrain = 'soon'\n")).to_string();
        assert!(text.contains("budgets.drain: must be seconds or a string with a unit"), "{text}");
        let text = error(&with("[policy]\non_timeout = 'terminat'\n")).to_string();
        assert!(text.contains("did you mean 'terminate'"), "{text}");
        let text = error(&with("[policy]\nprewarm = -1\n")).to_string();
        assert!(text.contains("policy.prewarm: must be a number from 0 up"), "{text}");
        let text = error(&LEAST.replace("port=5433", "port=blue")).to_string();
        assert!(text.contains("source.dsn: is not a connection string"), "{text}");
        let text = error("database = [").to_string();
        assert!(text.contains("is not TOML"), "{text}");
    }

    #[test]
    fn deadlines_are_checked_against_each_other() {
        assert_eq!(error(&with("[budgets]\nrenew = 2\n")).key, "budgets.renew");
        assert_eq!(error(&with("[budgets]\ndrain = 3\n")).key, "budgets.drain");
        assert_eq!(error(&with("[budgets]\nbarrier = 0\n")).key, "budgets.barrier");
        assert!(Budgets::default().fit_into(Duration::from_secs(5)).is_err());
        assert!(
            Budgets { catch_up: Duration::from_secs(20), ..Budgets::default() }.fit_into(HOLD_BUDGET_DEFAULT).is_err()
        );
    }

    #[test]
    fn a_physical_move_has_neither_subscriptions_nor_a_way_back() {
        let physical = |tail: &str| with(&format!("[replication]\nkind = 'physical'\n{tail}"));
        let config = Config::parse(Path::new("cutover.toml"), &physical("")).unwrap();
        assert_eq!((config.replication, config.way_back.enabled), (Replication::Physical, false));
        assert_eq!(error(&physical("subscriptions = ['s']\n")).key, "replication.subscriptions");
        let refused = error(&physical("[way_back]\nenabled = true\n"));
        assert_eq!(refused.key, "way_back.enabled");
        assert!(refused.reason.contains("rebuild"), "{refused}");
        assert!(error(&with("[replication]\nkind = 'phisical'\n")).reason.contains("did you mean 'physical'"));
    }

    #[test]
    fn two_backends_and_proxies_of_different_names_are_needed() {
        assert_eq!(error(&LEAST.replace("green", "blue")).key, "target.backend");
        let twice = format!("{LEAST}\n[[proxies]]\nname = \"p1\"\ndsn = \"host=h\"\n");
        assert_eq!(error(&twice).key, "proxies.name");
        let none = LEAST.split("[[proxies]]").next().unwrap();
        assert_eq!(error(none).key, "proxies");
    }

    #[test]
    fn proxies_are_found_by_name_or_among_the_members_only_where_the_dsn_allows_it() {
        let entry = |find: &str, dsn: &str| {
            let text = with(&format!("[[proxies]]\nname = \"p2\"\nfind = \"{find}\"\ndsn = \"user=admin {dsn}\"\n"));
            Config::parse(Path::new("cutover.toml"), &text)
                .map(|config| config.proxies[1].find)
                .map_err(|error| error.key)
        };
        assert_eq!(entry("dns", "host=proxies.internal"), Ok(Find::Dns));
        assert_eq!(entry("members", "password=secret"), Ok(Find::Members));
        let refused = Err("proxies.dsn".to_owned());
        assert_eq!(entry("dns", "host=/run/socket"), refused);
        assert_eq!(entry("dns", "host=a,b"), refused);
        assert_eq!(entry("members", "host=proxies.internal"), refused);
        assert_eq!(entry("members", "port=6432"), refused);
        assert_eq!(entry("srv", "host=h"), Err("proxies.find".to_owned()));
    }

    #[test]
    fn a_pgbouncer_says_how_it_is_pointed_elsewhere() {
        let entry = |tail: &str| {
            let text = with(&format!("[[pgbouncer]]\nname = 'b1'\ndsn = 'host=h port=6432 dbname=pgbouncer'\n{tail}"));
            Config::parse(Path::new("/etc/cutover.toml"), &text)
                .map(|config| config.bouncers)
                .map_err(|error| error.key)
        };
        let both = "template = 't.ini'\nfile = '/etc/pgbouncer.ini'\ntarget = 'host=green port=6'\n";
        let [bouncer] = &entry(both).unwrap()[..] else { panic!("one") };
        assert_eq!((bouncer.database.as_str(), bouncer.source.to_string().as_str()), ("app", "127.0.0.1:5433/app"));
        assert_eq!(bouncer.target.to_string(), "green:6/app");
        let paths = Point::Template { template: "/etc/t.ini".into(), file: "/etc/pgbouncer.ini".into() };
        assert_eq!(bouncer.point, paths);
        assert!(entry("command = ['ssh', 'b1', 'point', '{host}']\n").is_ok());
        for bad in ["", "template = 't'\n", "file = 'f'\n", "template = 't'\nfile = 'f'\ncommand = ['x']\n"] {
            assert_eq!(entry(bad).unwrap_err(), "pgbouncer.template", "{bad}");
        }
        assert_eq!(entry("command = ['x']\nsource = 'host=/run'\n").unwrap_err(), "pgbouncer.source");
        assert_eq!(entry("command = ['x']\n[policy]\non_timeout = 'cancel'\n").unwrap_err(), "policy.on_timeout");
        assert!(entry("command = ['x']\n[policy]\non_timeout = 'abort'\n").is_ok());
        let namesake = "command = ['x']\n[[proxies]]\nname = 'b1'\ndsn = 'host=h port=6432 dbname=pgcutover'\n";
        assert_eq!(entry(namesake).unwrap_err(), "pgbouncer.name");
    }

    #[test]
    fn no_description_shows_a_password() {
        let config = Config::parse(Path::new("cutover.toml"), LEAST).unwrap();
        assert!(!format!("{config:?}").contains("secret"));
        assert_eq!(config.proxies[0].endpoint.describe(), "127.0.0.1:6432/pgcutover");
    }
}
