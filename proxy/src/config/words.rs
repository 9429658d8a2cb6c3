//! Words that the configuration chooses from.
//!
//! Invariant: PgBouncer's and libpq's words where the meaning is theirs.

use serde::Deserialize;

/// How long a client keeps its server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolMode {
    /// Until the client leaves.
    Session,
    /// Until the transaction ends.
    Transaction,
}

impl PoolMode {
    /// PgBouncer's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            PoolMode::Session => "session",
            PoolMode::Transaction => "transaction",
        }
    }
}

/// What becomes of a session that can't be moved when its database moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum SessionPolicy {
    /// The database stays with it.
    #[default]
    Refuse,
    /// The same, after a wait before the pause: it may become movable, or leave.
    Wait,
    /// It is disconnected (57P01), once all else is ready.
    Disconnect,
}

/// What becomes of a statement that writes while a pause holds writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum WritesPolicy {
    /// It waits, where that can be told before it is sent.
    #[default]
    Hold,
    /// The server refuses it (25006).
    Decline,
}

/// How clients prove who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum AuthType {
    /// SCRAM-SHA-256 (RFC 7677).
    #[serde(rename = "scram-sha-256")]
    Scram,
    /// PostgreSQL's md5 method; a user whose secret is a SCRAM verifier uses SCRAM.
    #[serde(rename = "md5")]
    Md5,
    /// Cleartext password.
    #[serde(rename = "plain")]
    Plain,
    /// No proof; the user must be known.
    #[serde(rename = "trust")]
    Trust,
    /// A client certificate whose common name is the user, who must be known; no password is asked.
    #[serde(rename = "cert")]
    Cert,
}

/// TLS towards servers, with libpq's meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// Never.
    Disable,
    /// Only if the server insists.
    Allow,
    /// If the server offers it.
    #[default]
    Prefer,
    /// Always, certificate unchecked (checked like verify-ca when sslrootcert is given, as libpq does).
    Require,
    /// Always, signed by a trusted authority.
    VerifyCa,
    /// Always, signed and issued for the host.
    VerifyFull,
}

impl SslMode {
    /// libpq's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            SslMode::Disable => "disable",
            SslMode::Allow => "allow",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        }
    }
}

/// TLS towards clients (`client_tls_sslmode`), with PgBouncer's meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientTls {
    /// Not offered.
    Disable,
    /// Offered.
    Allow,
    /// Offered (the same as allow).
    Prefer,
    /// A client without TLS is refused.
    Require,
    /// TLS and a client certificate of the given authority.
    VerifyCa,
    /// The same, and the certificate's common name must be the user (PostgreSQL's `clientcert=verify-full`).
    VerifyFull,
}

/// The newest protocol that a server is asked for (libpq's `max_protocol_version`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
pub enum ProtocolVersion {
    /// What every server speaks, and everything that stands in front of one.
    #[default]
    #[serde(rename = "3.0")]
    V3_0,
    /// PostgreSQL 18's: long cancel keys. Older servers answer with 3.0.
    #[serde(rename = "3.2", alias = "latest")]
    V3_2,
}
