//! Opens one authenticated connection: TLS as libpq's `sslmode` means it, keepalives, a deadline.
//!
//! Invariant: every attempt ends within `CONNECT_DEADLINE`; `verify-full` never speaks to a host that could not prove its name.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::{Client, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::{Endpoint, RootCertificate, TlsMode};

/// Reaching a server in the same region takes milliseconds; a dead one must not look like a slow one for longer than a lease.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(3);

/// Why a connection could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The server refused or could not be reached.
    #[error("{}", words(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// Nothing answered in time.
    #[error("no answer within {CONNECT_DEADLINE:?}")]
    Deadline,
    /// The certificates that are to be believed could not be read.
    #[error("sslrootcert: {0}")]
    Roots(String),
}

/// The server's own words where it spoke, else what went wrong on the way.
pub fn words(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        let detail = db.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
        return format!("{}{detail} [{}]", db.message(), db.code().code());
    }
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Opens a connection that names itself `application_name`. The task that drives it ends when the client is dropped
/// or the connection breaks. Not cancel safe: dropping the future closes a half-open connection.
pub async fn dial(endpoint: &Endpoint, application_name: &str) -> Result<Client, DialError> {
    tokio::time::timeout(CONNECT_DEADLINE, open(endpoint, application_name)).await.unwrap_or(Err(DialError::Deadline))
}

async fn open(endpoint: &Endpoint, application_name: &str) -> Result<Client, DialError> {
    let mut pg = endpoint.pg.clone();
    pg.application_name(application_name).keepalives_idle(Duration::from_secs(10));
    pg.ssl_mode(match endpoint.tls {
        TlsMode::Disable => tokio_postgres::config::SslMode::Disable,
        TlsMode::Prefer => tokio_postgres::config::SslMode::Prefer,
        TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull => tokio_postgres::config::SslMode::Require,
    });
    if endpoint.tls == TlsMode::Disable {
        let (client, connection) = pg.connect(NoTls).await?;
        drive(connection);
        return Ok(client);
    }
    let (client, connection) = pg.connect(MakeRustlsConnect::new(tls(endpoint)?)).await?;
    drive(connection);
    Ok(client)
}

fn drive<S, T>(connection: tokio_postgres::Connection<S, T>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    // Ends with the connection; whoever uses the client sees the error there.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("connection ended: {}", words(&error));
        }
    });
}

fn tls(endpoint: &Endpoint) -> Result<ClientConfig, DialError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| DialError::Roots(error.to_string()))?;
    let config = match endpoint.tls {
        TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(provider))).with_no_client_auth()
        }
        TlsMode::VerifyCa => {
            let roots = Arc::new(roots(&endpoint.root)?);
            let verifier = AuthorityOnly { roots, provider };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth()
        }
        TlsMode::VerifyFull => {
            let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots(&endpoint.root)?), provider)
                .build()
                .map_err(|error| DialError::Roots(error.to_string()))?;
            builder.with_webpki_verifier(verifier).with_no_client_auth()
        }
    };
    Ok(config)
}

fn roots(root: &RootCertificate) -> Result<RootCertStore, DialError> {
    let mut store = RootCertStore::empty();
    let certificates: Vec<CertificateDer<'static>> = match root {
        RootCertificate::System => rustls_native_certs::load_native_certs().certs,
        RootCertificate::File(path) => CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect)
            .map_err(|error| DialError::Roots(format!("{}: {error}", path.display())))?,
    };
    store.add_parsable_certificates(certificates);
    if store.is_empty() {
        return Err(DialError::Roots("holds no certificate".to_owned()));
    }
    Ok(store)
}

/// `prefer` and `require`: encrypted, but to whom is not asked, as in libpq.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

/// `verify-ca`: the certificate comes from a known authority; the name in it is not compared.
#[derive(Debug)]
struct AuthorityOnly {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for AuthorityOnly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
