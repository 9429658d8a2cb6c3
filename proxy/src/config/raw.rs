//! The configuration file as it is typed: every key optional, nothing checked beyond its type.
//!
//! Invariant: an unknown key is an error, never ignored. Names are PgBouncer's where the meaning is the same.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

use crate::config::{AuthType, ClientTls, PoolMode, ProtocolVersion, SessionPolicy, SslMode, WritesPolicy};

/// The whole file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(default)]
    pub(super) pgcutover: General,
    #[serde(default)]
    pub(super) databases: BTreeMap<String, Database>,
    #[serde(default)]
    pub(super) users: BTreeMap<String, User>,
    #[serde(default)]
    pub(super) peers: BTreeMap<String, Peer>,
}

/// `[pgcutover]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct General {
    pub(super) listen_addr: Option<OneOrMany>,
    pub(super) listen_port: Option<u16>,
    pub(super) unix_socket_dir: Option<PathBuf>,
    pub(super) instance: Option<String>,
    pub(super) peer_id: Option<u16>,
    pub(super) state_dir: Option<PathBuf>,
    pub(super) auth_type: Option<AuthType>,
    pub(super) auth_file: Option<PathBuf>,
    pub(super) auth_query: Option<String>,
    pub(super) auth_user: Option<String>,
    pub(super) auth_dbname: Option<String>,
    pub(super) admin_users: Option<Vec<String>>,
    pub(super) stats_users: Option<Vec<String>>,
    pub(super) pool_mode: Option<PoolMode>,
    pub(super) default_pool_size: Option<u32>,
    pub(super) min_pool_size: Option<u32>,
    pub(super) max_client_conn: Option<u32>,
    pub(super) max_db_connections: Option<u32>,
    pub(super) max_user_connections: Option<u32>,
    pub(super) max_prepared_statements: Option<u32>,
    pub(super) client_login_timeout: Option<Span>,
    pub(super) query_wait_timeout: Option<Span>,
    pub(super) server_connect_timeout: Option<Span>,
    pub(super) server_login_retry: Option<Span>,
    pub(super) server_idle_timeout: Option<Span>,
    pub(super) server_lifetime: Option<Span>,
    pub(super) dns_max_ttl: Option<Span>,
    pub(super) dns_nxdomain_ttl: Option<Span>,
    pub(super) server_reset_query: Option<String>,
    pub(super) client_tls_sslmode: Option<ClientTls>,
    pub(super) client_tls_key_file: Option<PathBuf>,
    pub(super) client_tls_cert_file: Option<PathBuf>,
    pub(super) client_tls_ca_file: Option<PathBuf>,
    pub(super) http_addr: Option<String>,
    pub(super) log_level: Option<String>,
    pub(super) drain_timeout: Option<Span>,
    pub(super) pause_lease: Option<Span>,
    pub(super) hold_budget: Option<Span>,
    pub(super) pause_lease_default: Option<Span>,
    pub(super) workers: Option<usize>,
}

/// `[databases.NAME]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Database {
    pub(super) active: String,
    pub(super) pool_mode: Option<PoolMode>,
    pub(super) pool_size: Option<u32>,
    pub(super) max_db_connections: Option<u32>,
    pub(super) auth_query: Option<String>,
    pub(super) auth_user: Option<String>,
    pub(super) auth_dbname: Option<String>,
    pub(super) session_policy: Option<SessionPolicy>,
    pub(super) writes_policy: Option<WritesPolicy>,
    pub(super) control_user: Option<String>,
    pub(super) control_password: Option<String>,
    pub(super) backends: BTreeMap<String, Backend>,
}

/// `[databases.NAME.backends.NAME]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Backend {
    pub(super) host: String,
    pub(super) port: Option<u16>,
    pub(super) dbname: Option<String>,
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) sslmode: Option<SslMode>,
    pub(super) sslrootcert: Option<String>,
    pub(super) max_protocol_version: Option<ProtocolVersion>,
}

/// `[users.NAME]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct User {
    pub(super) pool_mode: Option<PoolMode>,
    pub(super) pool_size: Option<u32>,
    pub(super) max_user_connections: Option<u32>,
}

/// `[peers.ID]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Peer {
    pub(super) host: String,
    pub(super) port: u16,
}

/// A string or a list of strings.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// A duration: PgBouncer's plain seconds (also fractional) or words such as `'500ms'`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span(pub(super) Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Seconds(f64),
            Words(String),
        }
        let parsed = match Either::deserialize(deserializer)? {
            Either::Seconds(seconds) => Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string()),
            Either::Words(words) => humantime::parse_duration(&words).map_err(|e| e.to_string()),
        };
        parsed.map(Span).map_err(|why| de::Error::custom(format!("not a duration: {why}; write 2.5 or '2500ms'")))
    }
}
