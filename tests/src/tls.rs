//! Certificates for one test: an authority of its own, and what it signed.
//!
//! Invariant: private keys are readable by their owner only.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::run_dir::RunDir;

/// A certificate authority in a directory of this run.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl Authority {
    /// A new authority; its certificate is [`Authority::certificate`].
    ///
    /// # Errors
    /// No directory, or no key could be made.
    pub fn create() -> Result<Authority> {
        let dir = RunDir::current()?.subdirectory("tls")?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "pgcutover tests");
        let key = KeyPair::generate()?;
        fs::write(dir.join("ca.crt"), params.self_signed(&key)?.pem())?;
        Ok(Authority { dir, issuer: Issuer::new(params, key) })
    }

    /// The authority's own certificate, for `sslrootcert` and `client_tls_ca_file`.
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// Signs a certificate: `name` is its common name (a client's user), `hosts` the names and addresses it is good for.
    ///
    /// # Errors
    /// A host is no name, or the files can't be written.
    pub fn sign(&self, name: &str, hosts: &[&str]) -> Result<Identity> {
        let mut params = CertificateParams::new(hosts.iter().map(|host| (*host).to_owned()).collect::<Vec<_>>())?;
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let identity =
            Identity { certificate: self.dir.join(format!("{name}.crt")), key: self.dir.join(format!("{name}.key")) };
        fs::write(&identity.certificate, certificate.pem())?;
        write_key(&identity.key, &key.serialize_pem())?;
        Ok(identity)
    }
}

/// PostgreSQL refuses keys that others can read.
pub(crate) fn write_key(path: &Path, pem: &str) -> Result<()> {
    fs::write(path, pem).with_context(|| path.display().to_string())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).context("closing a private key")
}
