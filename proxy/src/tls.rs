//! TLS on both sides: rustls with the ring provider, and libpq's words for how much of it is demanded.
//!
//! Invariant: an [`Acceptor`] or [`Connector`] holds keys and certificates that were read and checked when it was
//! made; a reload makes a new one and swaps it in, connections that are open keep the old.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::{ClientConfig, ServerConfig};
use thiserror::Error;
use tokio::net::TcpStream;

use crate::config::SslMode;
use crate::stream::Stream;

/// The ALPN protocol of PostgreSQL.
const ALPN: &[u8] = b"postgresql";

/// What the listeners' TLS is made of (`client_tls_*`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTlsSettings {
    /// `client_tls_sslmode`.
    pub mode: SslMode,
    /// `client_tls_key_file`: PEM.
    pub key_file: Option<PathBuf>,
    /// `client_tls_cert_file`: PEM, the chain.
    pub cert_file: Option<PathBuf>,
    /// `client_tls_ca_file`: PEM, who signs client certificates.
    pub ca_file: Option<PathBuf>,
}

/// Which authorities may have signed a server's certificate (`sslrootcert`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RootCert {
    /// A PEM file.
    File(PathBuf),
    /// The operating system's store.
    System,
}

/// Why TLS can't be set up as configured, or a handshake failed.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file that can't be read or holds nothing usable.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Settings that contradict each other or lack a part.
    #[error("{0}")]
    Settings(&'static str),
    /// Key, certificate and CA do not fit together.
    #[error("TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
    /// The handshake with the peer failed.
    #[error("TLS handshake: {0}")]
    Handshake(#[from] std::io::Error),
    /// The peer's bytes came where TLS was to begin, or it speaks another protocol inside TLS.
    #[error("TLS handshake: {0}")]
    Peer(&'static str),
}

/// The listeners' side: answers clients that want TLS.
#[derive(Clone)]
pub struct Acceptor {
    mode: SslMode,
    config: Option<Arc<ServerConfig>>,
}

impl Acceptor {
    /// Reads key, certificates and CA.
    ///
    /// # Errors
    /// [`TlsError`] naming the file, or the setting that is missing.
    pub fn new(settings: &ClientTlsSettings) -> Result<Self, TlsError> {
        let _ = settings;
        unimplemented!()
    }

    /// One that answers every SSLRequest with `N`.
    #[must_use]
    pub fn disabled() -> Self {
        Self { mode: SslMode::Disable, config: None }
    }

    /// Whether TLS is offered.
    #[must_use]
    pub fn offers_tls(&self) -> bool {
        self.config.is_some()
    }

    /// Whether a TCP client without TLS is refused.
    #[must_use]
    pub fn requires_tls(&self) -> bool {
        matches!(self.mode, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull)
    }

    /// Shakes hands with a client. The caller bounds the time.
    ///
    /// # Errors
    /// [`TlsError`]: the socket is gone with it.
    pub async fn accept(&self, tcp: TcpStream) -> Result<Stream, TlsError> {
        let _ = tcp;
        unimplemented!()
    }
}

/// The server connections' side of one backend: how much TLS it demands.
#[derive(Clone)]
pub struct Connector {
    mode: SslMode,
    config: Option<Arc<ClientConfig>>,
}

impl Connector {
    /// Reads the root certificates.
    ///
    /// # Errors
    /// [`TlsError`]: `verify-*` without roots, `system` with less than `verify-full` (as libpq), an unreadable file.
    pub fn new(mode: SslMode, root: Option<&RootCert>) -> Result<Self, TlsError> {
        let _ = (mode, root);
        unimplemented!()
    }

    /// One that never asks for TLS.
    #[must_use]
    pub fn disabled() -> Self {
        Self { mode: SslMode::Disable, config: None }
    }

    /// How much TLS is demanded.
    #[must_use]
    pub fn mode(&self) -> SslMode {
        self.mode
    }

    /// Asks the server for TLS (SSLRequest, one byte of answer) and shakes hands, against the host's name.
    /// The caller bounds the time.
    pub(crate) async fn connect(&self, tcp: TcpStream, host: &str) -> Result<Stream, TlsError> {
        let _ = (tcp, host);
        unimplemented!()
    }
}
