//! The messages of the cold path: what strangers send before and while they log in, what servers answer, and how
//! both are written.
//!
//! Invariant: every reader is a total function over `&[u8]` (a frame's body, already bounded by `frame`): it never
//! panics, never reads past its slice, and allocates at most what the slice holds. Names and values stay bytes: user
//! and database names need not be UTF-8. Source: PostgreSQL, "Frontend/Backend Protocol", Message Formats.

mod read;
mod write;

use thiserror::Error;

pub use read::{
    ColumnRef, authentication, backend_key_data, columns, data_row, first_packet, negotiate_protocol_version, notice,
    options, parameter_description, parameter_status, password, ready_for_query, row_description,
    sasl_initial_response, startup_pairs,
};
pub use write::{
    put, put_authentication, put_backend_key_data, put_bind_execute, put_cancel_request, put_close, put_cstring,
    put_describe, put_negotiate_protocol_version, put_parameter_status, put_parse, put_password, put_query,
    put_ready_for_query, put_sasl_initial_response, put_sasl_response, put_ssl_request, put_startup, put_statement,
    put_sync,
};

/// The request code of an SSLRequest.
pub const SSL_REQUEST_CODE: i32 = 80_877_103;
/// The request code of a GSSENCRequest.
pub const GSSENC_REQUEST_CODE: i32 = 80_877_104;
/// The request code of a CancelRequest.
pub const CANCEL_REQUEST_CODE: i32 = 80_877_102;
/// Protocol 3.0, as a number in the StartupMessage.
pub const PROTOCOL_3_0: i32 = 3 << 16;

/// The shortest and the longest secret of a cancel key, in bytes (4 in protocol 3.0, up to 256 in 3.2).
pub const CANCEL_SECRET_BYTES: std::ops::RangeInclusive<usize> = 4..=256;

/// Bytes that are not the message they claim to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("malformed {message}: {what}")]
pub struct Malformed {
    /// The message's name in PostgreSQL's documentation.
    pub message: &'static str,
    /// What is wrong with it.
    pub what: &'static str,
}

/// What a key in a CancelRequest or BackendKeyData says.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CancelKey {
    /// The process id, or what looks like one.
    pub pid: i32,
    /// 4 to 256 bytes.
    pub secret: Box<[u8]>,
}

impl std::fmt::Debug for CancelKey {
    /// The secret is one.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelKey").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// A protocol version that this proxy speaks with a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// 3.0: cancel secrets have exactly 4 bytes.
    V3_0,
    /// 3.2: cancel secrets have up to 256 bytes.
    V3_2,
}

impl Protocol {
    /// The version as the number on the wire.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::V3_0 => PROTOCOL_3_0,
            Self::V3_2 => PROTOCOL_3_0 + 2,
        }
    }
}

/// Whether the connection is one for replication (`replication` in the StartupMessage).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Replication {
    /// An ordinary session.
    No,
    /// A physical walsender.
    Physical,
    /// A walsender bound to a database; takes SQL too.
    Database,
}

impl Replication {
    /// What the StartupMessage says for it; `None` where it says nothing.
    #[must_use]
    pub fn value(self) -> Option<&'static [u8]> {
        match self {
            Self::No => None,
            Self::Physical => Some(b"true"),
            Self::Database => Some(b"database"),
        }
    }
}

/// A name and its value, as bytes.
pub type Pair = (Box<[u8]>, Box<[u8]>);

/// A name and its value, where they lie in a message.
pub type PairRef<'a> = (&'a [u8], &'a [u8]);

/// What a client wants to be: the checked StartupMessage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    /// The version spoken from here on, already negotiated.
    pub protocol: Protocol,
    /// Never empty.
    pub user: Box<[u8]>,
    /// The user's name where the client named no database. Never empty.
    pub database: Box<[u8]>,
    /// For walsenders.
    pub replication: Replication,
    /// Settings in the order in which they apply: those of `options` (`-c k=v`, `--k=v`), then the others as sent.
    /// `user`, `database`, `options`, `replication` and `_pq_.` names are not among them.
    pub settings: Vec<Pair>,
}

/// The first packet of a connection, by its request code; `body` starts with the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstPacket<'a> {
    /// May we speak TLS?
    SslRequest,
    /// May we speak GSS encryption?
    GssEncRequest,
    /// Cancel what runs under this key.
    Cancel(CancelKey),
    /// A StartupMessage of this version; the rest of its body is still to be read.
    Startup {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
        /// What follows the version.
        parameters: &'a [u8],
    },
}

/// What a server asks of us, or says about our login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authentication<'a> {
    /// We are in.
    Ok,
    /// Send the password.
    Cleartext,
    /// Send md5 with this salt.
    Md5([u8; 4]),
    /// Choose one of these SASL mechanisms.
    Sasl(Vec<&'a [u8]>),
    /// A challenge.
    SaslContinue(&'a [u8]),
    /// The server's proof.
    SaslFinal(&'a [u8]),
    /// A method that this proxy does not speak (GSS, SSPI, Kerberos …), by its number.
    Other(i32),
}

/// What an ErrorResponse or NoticeResponse of a server says; absent fields are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notice<'a> {
    /// `V` where there is one, else `S`.
    pub severity: &'a [u8],
    /// `C`: as sent, need not be five characters.
    pub sqlstate: &'a [u8],
    /// `M`.
    pub message: &'a [u8],
    /// `D`.
    pub detail: &'a [u8],
    /// `H`.
    pub hint: &'a [u8],
}

/// What a ReadyForQuery says about the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// `I`: none.
    Idle,
    /// `T`: in one.
    InTransaction,
    /// `E`: in a failed one.
    Failed,
}

#[cfg(test)]
mod tests;
