//! The configuration: read whole, checked once, then only handed around as values.
//!
//! Invariant: a [`Config`] that exists is consistent; inside the proxy nothing is checked again. Deadlines are checked
//! against each other here: drain < lease and lease + drain < hold budget.

mod lookup;
mod raw;
mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

pub use lookup::UserLookup;
pub use words::{AuthType, ClientTls, PoolMode, ProtocolVersion, SessionPolicy, SslMode, WritesPolicy};

/// The whole checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[pgcutover]`.
    pub general: General,
    /// `[databases.*]` by the name that clients use.
    pub databases: BTreeMap<String, Database>,
    /// `[users.*]`.
    pub users: BTreeMap<String, User>,
    /// `[peers.*]` by peer_id: where a cancel key of another instance belongs.
    pub peers: BTreeMap<u16, Peer>,
    /// The file it came from; RELOAD reads it again.
    pub path: PathBuf,
}

/// `[pgcutover]`, checked.
#[derive(Debug, Clone)]
pub struct General {
    /// Addresses to listen on; empty = no TCP.
    pub listen_addr: Vec<String>,
    /// TCP port, also part of the Unix socket's name; 0 picks a free one.
    pub listen_port: u16,
    /// Directory of the Unix socket.
    pub unix_socket_dir: Option<PathBuf>,
    /// Name of this instance; `None` = random, kept in `state_dir`.
    pub instance: Option<String>,
    /// Number of this instance in cancel keys, 0 (alone) to 16383.
    pub peer_id: u16,
    /// Where routes are kept.
    pub state_dir: PathBuf,
    /// How clients prove who they are.
    pub auth_type: AuthType,
    /// PgBouncer's user file.
    pub auth_file: Option<PathBuf>,
    /// What asks a server for a user's name and secret; `$1` is the user's name.
    pub auth_query: String,
    /// Who asks it for users that `auth_file` does not name; `None` = nobody does.
    pub auth_user: Option<String>,
    /// The declared database that is asked; `None` = the one that the client wants.
    pub auth_dbname: Option<String>,
    /// Users that may do everything on the admin console.
    pub admin_users: Vec<String>,
    /// Users that may SHOW.
    pub stats_users: Vec<String>,
    /// Default pool mode.
    pub pool_mode: PoolMode,
    /// Server connections per database and user, 1-10000.
    pub default_pool_size: u32,
    /// Connections kept open per used pool.
    pub min_pool_size: u32,
    /// Clients at most.
    pub max_client_conn: u32,
    /// Server connections per database at most; 0 = no limit.
    pub max_db_connections: u32,
    /// Server connections per user at most; 0 = no limit.
    pub max_user_connections: u32,
    /// Named statements that a server connection keeps prepared in transaction pooling; 0 = none are let through.
    pub max_prepared_statements: u32,
    /// From accept to ReadyForQuery.
    pub client_login_timeout: Duration,
    /// Longest wait for a server connection outside a pause; zero = none.
    pub query_wait_timeout: Duration,
    /// From connect to the server's ReadyForQuery.
    pub server_connect_timeout: Duration,
    /// Rest after a failed server login.
    pub server_login_retry: Duration,
    /// Unused server connections are closed after this; zero = never.
    pub server_idle_timeout: Duration,
    /// Older server connections are closed at rest; zero = never.
    pub server_lifetime: Duration,
    /// How long an answer for a backend's host name is good; it is looked up again in the background.
    pub dns_max_ttl: Duration,
    /// How soon a failed lookup is repeated.
    pub dns_nxdomain_ttl: Duration,
    /// Sent to a session-pooled server connection when its client leaves.
    pub server_reset_query: String,
    /// TLS towards clients.
    pub client_tls_sslmode: ClientTls,
    /// Its private key, PEM.
    pub client_tls_key_file: Option<PathBuf>,
    /// Its certificate chain, PEM.
    pub client_tls_cert_file: Option<PathBuf>,
    /// Authority of client certificates, PEM.
    pub client_tls_ca_file: Option<PathBuf>,
    /// Address of /metrics, /livez, /readyz.
    pub http_addr: Option<String>,
    /// tracing's filter, e.g. `info`.
    pub log_level: String,
    /// Default drain of `PAUSE WITH`.
    pub drain_timeout: Duration,
    /// Default lease of `PAUSE WITH`.
    pub pause_lease: Duration,
    /// How long one client is held before it gets a retryable error.
    pub hold_budget: Duration,
    /// Lease of a plain PAUSE; zero = none, as in PgBouncer.
    pub pause_lease_default: Duration,
    /// Threads that serve clients; 0 = one per core.
    pub workers: usize,
}

/// `[databases.NAME]`, checked.
#[derive(Debug, Clone)]
pub struct Database {
    /// Initial backend; the durable route and the decisions win over it.
    pub active: String,
    /// Override of the pool mode.
    pub pool_mode: Option<PoolMode>,
    /// Override of the pool size.
    pub pool_size: Option<u32>,
    /// Override of the connection limit; 0 = no limit.
    pub max_db_connections: Option<u32>,
    /// Override of `auth_query`.
    pub auth_query: Option<String>,
    /// Override of `auth_user`.
    pub auth_user: Option<String>,
    /// Override of `auth_dbname`.
    pub auth_dbname: Option<String>,
    /// Sessions that can't be moved.
    pub session_policy: SessionPolicy,
    /// What becomes of a statement that writes while a pause holds writes.
    pub writes_policy: WritesPolicy,
    /// Login for decisions and checks.
    pub control: Option<Control>,
    /// Declared servers by name; contains `active`.
    pub backends: BTreeMap<String, Backend>,
}

/// The control login of a database: never used for clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Role.
    pub user: String,
    /// Password; `None` = trust, peer or certificate.
    pub password: Option<String>,
}

/// `[databases.NAME.backends.NAME]`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Host name, address, or socket directory (starts with `/`).
    pub host: String,
    /// Port.
    pub port: u16,
    /// Name of the database on the server.
    pub dbname: String,
    /// All clients log in to the server as this user.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<String>,
    /// TLS.
    pub sslmode: SslMode,
    /// File of trusted authorities, or `system`.
    pub sslrootcert: Option<String>,
    /// The newest protocol to ask it for.
    pub max_protocol_version: ProtocolVersion,
}

/// `[users.NAME]`, checked.
#[derive(Debug, Clone, Default)]
pub struct User {
    /// Override of the pool mode.
    pub pool_mode: Option<PoolMode>,
    /// Override of the pool size.
    pub pool_size: Option<u32>,
    /// Override of the connection limit; 0 = no limit.
    pub max_user_connections: Option<u32>,
}

/// Another instance that shares our listen address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Host.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Why a configuration was not taken: file, key, reason, and how to mend it.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{}: can't be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or a key is unknown or of the wrong type.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, reason and suggestion.
        message: String,
    },
    /// A value contradicts another or is out of range.
    #[error("{}: {key}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// What is wrong and how to mend it.
        reason: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`] names file, key and reason.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a file; relative file names in it are relative to the file.
    ///
    /// # Errors
    /// [`ConfigError`] names file, key and reason.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file: raw::File = toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.to_owned(),
            message: with_suggestion(e.to_string().trim_end()),
        })?;
        let config = Config {
            general: general(file.pgcutover, path.parent().unwrap_or(Path::new("."))),
            databases: file.databases.into_iter().map(|(name, d)| (name.clone(), database(&name, d))).collect(),
            users: file.users.into_iter().map(|(name, u)| (name, user(u))).collect(),
            peers: peers(file.peers, path)?,
            path: path.to_owned(),
        };
        config.check().map_err(|(key, reason)| ConfigError::Value { path: path.to_owned(), key, reason })?;
        Ok(config)
    }

    /// The pool mode that applies to a user of a database: the user's, the database's, the general one.
    #[must_use]
    pub fn pool_mode(&self, database: &str, user: &str) -> PoolMode {
        self.users
            .get(user)
            .and_then(|u| u.pool_mode)
            .or_else(|| self.databases.get(database).and_then(|d| d.pool_mode))
            .unwrap_or(self.general.pool_mode)
    }

    /// The pool size that applies to a user of a database.
    #[must_use]
    pub fn pool_size(&self, database: &str, user: &str) -> u32 {
        self.users
            .get(user)
            .and_then(|u| u.pool_size)
            .or_else(|| self.databases.get(database).and_then(|d| d.pool_size))
            .unwrap_or(self.general.default_pool_size)
    }

    /// What becomes of statements that write while a pause of the database holds writes.
    #[must_use]
    pub fn writes_policy(&self, database: &str) -> WritesPolicy {
        self.databases.get(database).map(|d| d.writes_policy).unwrap_or_default()
    }

    /// What becomes of a database's sessions that can't be moved.
    #[must_use]
    pub fn session_policy(&self, database: &str) -> SessionPolicy {
        self.databases.get(database).map(|d| d.session_policy).unwrap_or_default()
    }

    /// The same configuration with another `[pgcutover]`.
    ///
    /// # Errors
    /// Key and reason.
    pub fn with_general(&self, general: General) -> Result<Self, String> {
        let config = Self { general, ..self.clone() };
        config.check().map_err(|(key, reason)| format!("{key}: {reason}"))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (String, String)> {
        self.check_general()?;
        self.check_lookups()?;
        self.databases.iter().try_for_each(|(name, database)| check_database(name, database))
    }

    fn check_general(&self) -> Result<(), (String, String)> {
        let g = &self.general;
        let wrong = |key: &str, reason: String| Err((format!("pgcutover.{key}"), reason));
        if g.drain_timeout >= g.pause_lease {
            let reason = format!("{:?} must be shorter than pause_lease ({:?})", g.drain_timeout, g.pause_lease);
            return wrong("drain_timeout", reason);
        }
        if g.pause_lease + g.drain_timeout >= g.hold_budget {
            let reason = format!(
                "{:?} must be longer than pause_lease + drain_timeout ({:?}), or clients are shed before a cutover can end",
                g.hold_budget,
                g.pause_lease + g.drain_timeout
            );
            return wrong("hold_budget", reason);
        }
        if g.peer_id > 16383 {
            return wrong("peer_id", format!("{} is not between 0 and 16383", g.peer_id));
        }
        if g.default_pool_size == 0 {
            return wrong("default_pool_size", "must be at least 1".to_owned());
        }
        if g.listen_addr.is_empty() && g.unix_socket_dir.is_none() {
            return wrong("listen_addr", "nothing to listen on: set listen_addr or unix_socket_dir".to_owned());
        }
        if g.client_tls_sslmode != ClientTls::Disable
            && (g.client_tls_key_file.is_none() || g.client_tls_cert_file.is_none())
        {
            return wrong("client_tls_sslmode", "needs client_tls_key_file and client_tls_cert_file".to_owned());
        }
        if g.auth_type == AuthType::Cert && g.client_tls_sslmode != ClientTls::VerifyFull {
            return wrong("auth_type", "cert needs client_tls_sslmode = 'verify-full'".to_owned());
        }
        if matches!(g.client_tls_sslmode, ClientTls::VerifyCa | ClientTls::VerifyFull) && g.client_tls_ca_file.is_none()
        {
            return wrong("client_tls_sslmode", "verify-ca and verify-full need client_tls_ca_file".to_owned());
        }
        Ok(())
    }
}

/// The longest route name that the decision store takes, in bytes.
const ROUTE_NAME_BYTES_MAX: usize = 50;

fn check_database(name: &str, database: &Database) -> Result<(), (String, String)> {
    let key = format!("databases.{name}");
    if name == "pgbouncer" || name == "pgcutover" {
        return Err((key, "is the name of the admin console; choose another".to_owned()));
    }
    if name.is_empty() || name.len() > ROUTE_NAME_BYTES_MAX {
        return Err((key, format!("database names have 1 to {ROUTE_NAME_BYTES_MAX} bytes")));
    }
    if !database.backends.contains_key(&database.active) {
        let known: Vec<&str> = database.backends.keys().map(String::as_str).collect();
        let hint = nearest(&database.active, known.iter().copied());
        return Err((
            format!("{key}.active"),
            format!("'{}' is not a declared backend ({}){hint}", database.active, known.join(", ")),
        ));
    }
    if database.pool_size == Some(0) {
        return Err((format!("{key}.pool_size"), "must be at least 1".to_owned()));
    }
    Ok(())
}

fn peers(raw: BTreeMap<String, raw::Peer>, path: &Path) -> Result<BTreeMap<u16, Peer>, ConfigError> {
    raw.into_iter()
        .map(|(id, peer)| match id.parse::<u16>() {
            Ok(number) if (1..=16383).contains(&number) => Ok((number, Peer { host: peer.host, port: peer.port })),
            Ok(_) | Err(_) => Err(ConfigError::Value {
                path: path.to_owned(),
                key: format!("peers.{id}"),
                reason: "the key is a peer_id between 1 and 16383".to_owned(),
            }),
        })
        .collect()
}

fn general(raw: raw::General, directory: &Path) -> General {
    let seconds = |span: Option<raw::Span>, default: u64| span.map_or(Duration::from_secs(default), |s| s.0);
    let file = |name: Option<PathBuf>| name.map(|n| directory.join(n));
    General {
        listen_addr: match raw.listen_addr {
            None => vec!["127.0.0.1".to_owned()],
            Some(raw::OneOrMany::One(one)) => {
                one.split(',').map(str::trim).filter(|a| !a.is_empty()).map(str::to_owned).collect()
            }
            Some(raw::OneOrMany::Many(many)) => many,
        },
        listen_port: raw.listen_port.unwrap_or(6432),
        unix_socket_dir: raw.unix_socket_dir,
        instance: raw.instance,
        peer_id: raw.peer_id.unwrap_or(0),
        state_dir: raw.state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/pgcutover")),
        auth_type: raw.auth_type.unwrap_or(AuthType::Scram),
        auth_file: file(raw.auth_file),
        auth_query: raw.auth_query.unwrap_or_else(|| lookup::AUTH_QUERY.to_owned()),
        auth_user: raw.auth_user,
        auth_dbname: raw.auth_dbname,
        admin_users: raw.admin_users.unwrap_or_default(),
        stats_users: raw.stats_users.unwrap_or_default(),
        pool_mode: raw.pool_mode.unwrap_or(PoolMode::Session),
        default_pool_size: raw.default_pool_size.unwrap_or(20),
        min_pool_size: raw.min_pool_size.unwrap_or(0),
        max_client_conn: raw.max_client_conn.unwrap_or(100),
        max_db_connections: raw.max_db_connections.unwrap_or(0),
        max_user_connections: raw.max_user_connections.unwrap_or(0),
        max_prepared_statements: raw.max_prepared_statements.unwrap_or(200),
        client_login_timeout: seconds(raw.client_login_timeout, 60),
        query_wait_timeout: seconds(raw.query_wait_timeout, 120),
        server_connect_timeout: seconds(raw.server_connect_timeout, 15),
        server_login_retry: seconds(raw.server_login_retry, 1),
        server_idle_timeout: seconds(raw.server_idle_timeout, 600),
        server_lifetime: seconds(raw.server_lifetime, 3600),
        dns_max_ttl: seconds(raw.dns_max_ttl, 15),
        dns_nxdomain_ttl: seconds(raw.dns_nxdomain_ttl, 15),
        server_reset_query: raw.server_reset_query.unwrap_or_else(|| "DISCARD ALL".to_owned()),
        client_tls_sslmode: raw.client_tls_sslmode.unwrap_or(ClientTls::Disable),
        client_tls_key_file: file(raw.client_tls_key_file),
        client_tls_cert_file: file(raw.client_tls_cert_file),
        client_tls_ca_file: file(raw.client_tls_ca_file),
        http_addr: raw.http_addr,
        log_level: raw.log_level.unwrap_or_else(|| "info".to_owned()),
        drain_timeout: seconds(raw.drain_timeout, 2),
        pause_lease: seconds(raw.pause_lease, 3),
        hold_budget: seconds(raw.hold_budget, 15),
        pause_lease_default: seconds(raw.pause_lease_default, 0),
        workers: raw.workers.unwrap_or(0),
    }
}

fn database(name: &str, raw: raw::Database) -> Database {
    Database {
        active: raw.active,
        pool_mode: raw.pool_mode,
        pool_size: raw.pool_size,
        max_db_connections: raw.max_db_connections,
        auth_query: raw.auth_query,
        auth_user: raw.auth_user,
        auth_dbname: raw.auth_dbname,
        session_policy: raw.session_policy.unwrap_or_default(),
        writes_policy: raw.writes_policy.unwrap_or_default(),
        control: raw.control_user.map(|user| Control { user, password: raw.control_password }),
        backends: raw
            .backends
            .into_iter()
            .map(|(backend, b)| {
                let checked = Backend {
                    host: b.host,
                    port: b.port.unwrap_or(5432),
                    dbname: b.dbname.unwrap_or_else(|| name.to_owned()),
                    user: b.user,
                    password: b.password,
                    sslmode: b.sslmode.unwrap_or_default(),
                    sslrootcert: b.sslrootcert,
                    max_protocol_version: b.max_protocol_version.unwrap_or_default(),
                };
                (backend, checked)
            })
            .collect(),
    }
}

fn user(raw: raw::User) -> User {
    User { pool_mode: raw.pool_mode, pool_size: raw.pool_size, max_user_connections: raw.max_user_connections }
}

/// Adds "did you mean" to serde's list of expected keys.
fn with_suggestion(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !message.contains("unknown field") {
        return message.to_owned();
    }
    let Some(typed) = quoted.next() else { return message.to_owned() };
    let known: Vec<&str> = quoted.collect();
    format!("{message}{}", nearest(typed, known.into_iter()))
}

fn nearest<'a>(typed: &str, known: impl Iterator<Item = &'a str>) -> String {
    // Three edits: enough for a swapped or forgotten word, too few to propose something unrelated.
    known
        .map(|k| (strsim::damerau_levenshtein(typed, k), k))
        .filter(|(distance, _)| *distance <= 3)
        .min()
        .map_or(String::new(), |(_, k)| format!("; did you mean '{k}'?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[databases.app]\nactive = 'blue'\n[databases.app.backends.blue]\nhost = 'db1'\n";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/pgcutover.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn a_small_file_gets_pgbouncers_defaults() {
        let config = parse(SMALL).unwrap();
        assert_eq!(config.general.default_pool_size, 20);
        assert_eq!(config.databases["app"].backends["blue"].port, 5432);
        assert_eq!(config.databases["app"].backends["blue"].dbname, "app");
        assert_eq!(config.pool_mode("app", "alice"), PoolMode::Session);
    }

    #[test]
    fn a_misspelt_key_is_named_with_a_suggestion() {
        let error = parse(&format!("[pgcutover]\ndefault_pol_size = 3\n{SMALL}")).unwrap_err();
        assert!(
            error.contains("/etc/pgcutover.toml") && error.contains("did you mean 'default_pool_size'?"),
            "{error}"
        );
    }

    #[test]
    fn an_undeclared_active_backend_is_refused() {
        let error = parse(&SMALL.replace("'blue'", "'bleu'")).unwrap_err();
        assert!(error.contains("databases.app.active") && error.contains("did you mean 'blue'?"), "{error}");
    }

    #[test]
    fn deadlines_that_contradict_each_other_are_refused() {
        let error = parse(&format!("[pgcutover]\ndrain_timeout = '4s'\n{SMALL}")).unwrap_err();
        assert!(error.contains("drain_timeout"), "{error}");
        let error = parse(&format!("[pgcutover]\nhold_budget = 4\n{SMALL}")).unwrap_err();
        assert!(error.contains("hold_budget"), "{error}");
    }

    #[test]
    fn certificates_need_somebody_who_signs_them() {
        let tls = "client_tls_key_file = 'k'\nclient_tls_cert_file = 'c'\nclient_tls_sslmode =";
        for (general, key) in [
            ("auth_type = 'cert'".to_owned(), "pgcutover.auth_type"),
            (format!("auth_type = 'cert'\n{tls} 'verify-ca'\nclient_tls_ca_file = 'a'"), "pgcutover.auth_type"),
            (format!("{tls} 'verify-full'"), "pgcutover.client_tls_sslmode"),
        ] {
            let error = parse(&format!("[pgcutover]\n{general}\n{SMALL}")).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
        let good = format!("[pgcutover]\nauth_type = 'cert'\n{tls} 'verify-full'\nclient_tls_ca_file = 'a'\n{SMALL}");
        assert_eq!(parse(&good).unwrap().general.auth_type, AuthType::Cert);
    }

    const SAMPLE: &str = include_str!("../../config/pgcutover.toml");

    #[test]
    fn the_sample_file_sets_the_defaults_and_nothing_else() {
        let path = Path::new("/etc/pgcutover.toml");
        let sample = Config::parse(SAMPLE, path).unwrap();
        let defaults = Config::parse("", path).unwrap();
        assert_eq!(format!("{:?}", sample.general), format!("{:?}", defaults.general));
        assert!(sample.databases.is_empty());
    }

    /// Every key that the file may have is in the sample, set or as an example; the list comes from the types.
    #[test]
    fn the_sample_file_names_every_key() {
        let fields = include_str!("config/raw.rs").lines().filter_map(|line| line.trim().strip_prefix("pub(super) "));
        let keys = fields.filter_map(|rest| rest.split_once(':').map(|(key, _)| key)).filter(|key| !key.contains(' '));
        for key in keys.filter(|key| !["pgcutover", "databases", "users", "peers", "backends"].contains(key)) {
            let named = SAMPLE.lines().any(|l| l.trim_start_matches("# ").starts_with(&format!("{key} =")));
            assert!(named, "config/pgcutover.toml does not name '{key}'");
        }
    }
}
