//! TLS on both sides: rustls with the ring provider, and libpq's words for how much of it is demanded.
//!
//! Invariant: an [`Acceptor`] or [`Connector`] holds keys and certificates that were read and checked when it was
//! made; a reload makes a new one and swaps it in, connections that are open keep the old. Neither reads a byte of
//! TLS that came before TLS was agreed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::certificate;
use crate::config::{ClientTls, SslMode};
use crate::message::put_ssl_request;
use crate::stream::Stream;

/// The ALPN protocol of PostgreSQL.
const ALPN: &[u8] = b"postgresql";

/// What the listeners' TLS is made of (`client_tls_*`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTlsSettings {
    /// `client_tls_sslmode`.
    pub mode: ClientTls,
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
    /// The handshake with the peer failed: network, certificate or protocol.
    #[error("TLS handshake: {0}")]
    Handshake(#[from] io::Error),
    /// The peer is there and does not do TLS as demanded.
    #[error("{0}")]
    Peer(&'static str),
}

/// The listeners' side: answers clients that want TLS.
#[derive(Debug, Clone)]
pub struct Acceptor {
    mode: ClientTls,
    config: Option<Arc<ServerConfig>>,
    end_point: Option<Arc<[u8]>>,
}

impl Acceptor {
    /// Reads key, certificates and CA.
    ///
    /// # Errors
    /// [`TlsError`] naming the file, or the setting that is missing.
    pub fn new(settings: &ClientTlsSettings) -> Result<Self, TlsError> {
        let demands_certificate = match settings.mode {
            ClientTls::Disable => return Ok(Self::disabled()),
            ClientTls::Allow | ClientTls::Prefer | ClientTls::Require => false,
            ClientTls::VerifyCa | ClientTls::VerifyFull => true,
        };
        let key_file = required(settings.key_file.as_deref(), "client_tls_sslmode needs client_tls_key_file")?;
        let cert_file = required(settings.cert_file.as_deref(), "client_tls_sslmode needs client_tls_cert_file")?;
        let key = PrivateKeyDer::from_pem_file(key_file).map_err(|e| file_error(key_file, &e))?;
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
        let builder = if demands_certificate {
            let ca_file = required(settings.ca_file.as_deref(), "client_tls_sslmode needs client_tls_ca_file")?;
            let roots = Arc::new(trust_anchors(ca_file, certificates(ca_file)?)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(|e| file_error(ca_file, &e))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let chain = certificates(cert_file)?;
        let end_point = chain.first().and_then(|own| certificate::end_point(own)).map(Arc::from);
        let mut config = builder.with_single_cert(chain, key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // As PostgreSQL: no resumption, so no tickets to write and no state to keep per client.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { mode: settings.mode, config: Some(Arc::new(config)), end_point })
    }

    /// One that answers every SSLRequest with `N`.
    #[must_use]
    pub fn disabled() -> Self {
        Self { mode: ClientTls::Disable, config: None, end_point: None }
    }

    /// Whether TLS is offered.
    #[must_use]
    pub fn offers_tls(&self) -> bool {
        self.config.is_some()
    }

    /// Whether a TCP client without TLS is refused.
    #[must_use]
    pub fn requires_tls(&self) -> bool {
        match self.mode {
            ClientTls::Disable | ClientTls::Allow | ClientTls::Prefer => false,
            ClientTls::Require | ClientTls::VerifyCa | ClientTls::VerifyFull => true,
        }
    }

    /// Whether a TLS client's certificate must name the user it logs in as.
    #[must_use]
    pub fn names_user(&self) -> bool {
        self.mode == ClientTls::VerifyFull
    }

    /// What a login may be bound to: our certificate's `tls-server-end-point` data (RFC 5929), where it is defined.
    #[must_use]
    pub fn end_point(&self) -> Option<&[u8]> {
        self.end_point.as_deref()
    }

    /// Shakes hands with a client that was promised TLS. The caller bounds the time; not cancel safe.
    ///
    /// # Errors
    /// [`TlsError`]: the socket is gone with it.
    pub async fn accept(&self, tcp: TcpStream) -> Result<Stream, TlsError> {
        let config = self.config.clone().ok_or(TlsError::Settings("TLS is not offered"))?;
        let tls = Box::pin(tokio_rustls::TlsAcceptor::from(config).accept(tcp)).await?;
        Ok(Stream::TlsServer(Box::new(tls)))
    }

    /// As [`Acceptor::accept`], for a client that began with TLS: it must have asked for PostgreSQL by ALPN, so that no
    /// other protocol's client can be led here.
    ///
    /// # Errors
    /// [`TlsError`]: the socket is gone with it.
    pub async fn accept_direct(&self, tcp: TcpStream) -> Result<Stream, TlsError> {
        let stream = self.accept(tcp).await?;
        match &stream {
            Stream::TlsServer(tls) if tls.get_ref().1.alpn_protocol() == Some(ALPN) => Ok(stream),
            Stream::TlsServer(_) | Stream::TlsClient(_) | Stream::Tcp(_) | Stream::Unix(_) => Err(TlsError::Peer(
                "received direct SSL connection request without ALPN protocol negotiation extension",
            )),
        }
    }
}

/// The server connections' side of one backend: how much TLS it demands.
#[derive(Debug, Clone)]
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
        let demand = match (mode, root) {
            (SslMode::Disable, _) => return Ok(Self::disabled()),
            (SslMode::VerifyCa | SslMode::VerifyFull, None) => {
                return Err(TlsError::Settings("sslmode verify-ca and verify-full need sslrootcert"));
            }
            (SslMode::VerifyFull, Some(_)) => Demand::SignedForHost,
            (_, Some(RootCert::System)) => {
                return Err(TlsError::Settings("sslrootcert \"system\" needs sslmode verify-full"));
            }
            // libpq: whoever gives a root certificate wants it used, whatever the mode.
            (SslMode::Allow | SslMode::Prefer | SslMode::Require | SslMode::VerifyCa, Some(RootCert::File(_))) => {
                Demand::Signed
            }
            (SslMode::Allow | SslMode::Prefer | SslMode::Require, None) => Demand::Nothing,
        };
        let verifier = CertificateCheck::new(demand, root)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        // PostgreSQL servers do not resume.
        config.resumption = Resumption::disabled();
        Ok(Self { mode, config: Some(Arc::new(config)) })
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

    /// Asks the server for TLS and shakes hands, against the host's name. A server that says no gives the plain stream
    /// back where the mode allows plain. The caller bounds the time; not cancel safe.
    ///
    /// # Errors
    /// [`TlsError`]: the socket is gone with it.
    pub async fn connect(&self, mut tcp: TcpStream, host: &str) -> Result<Stream, TlsError> {
        let config = self.config.clone().ok_or(TlsError::Settings("TLS is disabled"))?;
        let mut request = BytesMut::new();
        put_ssl_request(&mut request);
        tcp.write_all(&request).await?;
        // Exactly one byte: whatever follows it belongs to TLS, and is refused by it if it was forged.
        match tcp.read_u8().await? {
            b'S' => {}
            b'N' => {
                return match self.mode {
                    SslMode::Disable | SslMode::Allow | SslMode::Prefer => Ok(Stream::Tcp(tcp)),
                    SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
                        Err(TlsError::Peer("server does not support SSL, but SSL was required"))
                    }
                };
            }
            _ => return Err(TlsError::Peer("server's answer to the SSL request makes no sense")),
        }
        let name = match ServerName::try_from(host.to_owned()) {
            Ok(name) => name,
            // Not a name a certificate can have: only who demands the name minds.
            Err(_) if self.mode == SslMode::VerifyFull => {
                return Err(TlsError::Peer("host is not a name that a certificate can have"));
            }
            Err(_) => ServerName::from(tcp.peer_addr()?.ip()),
        };
        let tls = Box::pin(tokio_rustls::TlsConnector::from(config).connect(name, tcp)).await?;
        Ok(Stream::TlsClient(Box::new(tls)))
    }
}

/// What a server's certificate must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Demand {
    Nothing,
    Signed,
    SignedForHost,
}

/// libpq's checks of a server's certificate.
#[derive(Debug)]
struct CertificateCheck {
    demand: Demand,
    roots: RootCertStore,
    /// The root file's certificates themselves: a server may show one of them (self-signed), as OpenSSL allows.
    pinned: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl CertificateCheck {
    fn new(demand: Demand, root: Option<&RootCert>) -> Result<Self, TlsError> {
        let algorithms = provider().signature_verification_algorithms;
        let (roots, pinned) = match root {
            None => (RootCertStore::empty(), Vec::new()),
            Some(RootCert::File(path)) => {
                let pinned = certificates(path)?;
                (trust_anchors(path, pinned.clone())?, pinned)
            }
            Some(RootCert::System) => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                (roots, Vec::new())
            }
        };
        if demand != Demand::Nothing && roots.is_empty() {
            return Err(TlsError::Settings("sslrootcert \"system\": the system's certificate store is empty"));
        }
        Ok(Self { demand, roots, pinned, algorithms })
    }
}

impl ServerCertVerifier for CertificateCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.demand == Demand::Nothing {
            return Ok(ServerCertVerified::assertion());
        }
        let certificate = ParsedCertificate::try_from(end_entity)?;
        if !self.pinned.contains(end_entity) {
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                &self.roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        if self.demand == Demand::SignedForHost {
            verify_server_name(&certificate, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // A certificate that nobody checks proves nothing, so its signature proves nothing either; not asking lets
        // certificates pass that webpki can't read (X.509 v1, as PostgreSQL's documentation makes them).
        if self.demand == Demand::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.demand == Demand::Nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn required<'a>(path: Option<&'a Path>, what: &'static str) -> Result<&'a Path, TlsError> {
    path.ok_or(TlsError::Settings(what))
}

fn file_error(path: &Path, reason: &impl ToString) -> TlsError {
    TlsError::File { path: path.to_owned(), reason: reason.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(file_error(path, &"holds no certificate")),
        Ok(found) => Ok(found),
        Err(error) => Err(file_error(path, &error)),
    }
}

fn trust_anchors(path: &Path, certificates: Vec<CertificateDer<'static>>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate).map_err(|e| file_error(path, &e))?;
    }
    Ok(roots)
}
