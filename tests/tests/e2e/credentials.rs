//! Who may in, beyond a password over plain TCP: certificates of both sides, and logins that are bound to them.
//!
//! Invariant: every client here is libpq or the driver with rustls; the certificates are of authorities made for the test.

use std::fs;
use std::path::{Path, PathBuf};

use e2e::pair::{APP, DATABASE, OTHER, password};
use e2e::proxy::{ADMIN, ProxyOptions};
use e2e::tls::{Authority, Identity};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SignatureAlgorithm};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::config::{ChannelBinding, SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::house::{House, LIMIT, run, stderr, stdout, until};

/// Gives the proxy a certificate for `localhost`.
fn front(options: &mut ProxyOptions, identity: &Identity, mode: &str) {
    options.setting("client_tls_sslmode", mode);
    options.setting("client_tls_cert_file", identity.certificate.display().to_string());
    options.setting("client_tls_key_file", identity.key.display().to_string());
}

/// A proxy that demands client certificates of an authority, which name the user.
async fn guarded(authority: &Authority, change: impl FnOnce(&mut ProxyOptions)) -> House {
    let own = authority.sign("front", &["localhost"]).unwrap();
    House::open(|options| {
        front(options, &own, "verify-full");
        options.setting("client_tls_ca_file", authority.certificate().display().to_string());
        change(options);
    })
    .await
}

/// A connection string of libpq over TLS that checks the proxy.
fn dsn(house: &House, user: &str, ca: &Path, more: &str) -> String {
    let (port, ca) = (house.proxy.port(), ca.display());
    format!("host=localhost port={port} user={user} dbname={DATABASE} sslmode=verify-full sslrootcert={ca} {more}")
}

/// libpq's settings for a client certificate.
fn shown(identity: &Identity) -> String {
    format!("sslcert={} sslkey={}", identity.certificate.display(), identity.key.display())
}

/// psql without a password of its own, and without asking for one.
async fn psql(dsn: &str, command: &str) -> std::process::Output {
    run("psql", &["-X", "-A", "-t", "-w", "-d", dsn, "-c", command]).await
}

/// The driver over TLS, with what it demands of channel binding.
async fn driver(
    house: &House,
    ca: &Path,
    binding: ChannelBinding,
) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let tls = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut to = tokio_postgres::Config::new();
    to.host("localhost").port(house.proxy.port()).user(APP).password(password(APP)).dbname(DATABASE);
    to.ssl_mode(SslMode::Require).channel_binding(binding).connect_timeout(LIMIT);
    let (client, connection) = to.connect(MakeRustlsConnect::new(tls)).await?;
    // Ends with its client.
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

#[tokio::test]
async fn a_reload_gives_new_clients_the_new_certificate_and_keeps_the_old_clients() {
    let (old, new) = (Authority::create().unwrap(), Authority::create().unwrap());
    let mut house = House::open(|options| front(options, &old.sign("front", &["localhost"]).unwrap(), "require")).await;
    let client = driver(&house, &old.certificate(), ChannelBinding::Prefer).await.unwrap();
    client.batch_execute("SELECT 1").await.unwrap();

    front(house.proxy.options(), &new.sign("front", &["localhost"]).unwrap(), "require");
    house.proxy.reload().unwrap();
    until("new clients see the new certificate", async || {
        driver(&house, &new.certificate(), ChannelBinding::Require).await.is_ok()
    })
    .await;
    assert!(driver(&house, &old.certificate(), ChannelBinding::Prefer).await.is_err(), "the old certificate is gone");
    client.batch_execute("SELECT 1").await.unwrap();

    // A file that makes no sense changes nothing.
    let broken = Identity { certificate: house.proxy.config_file(), key: house.proxy.config_file() };
    front(house.proxy.options(), &broken, "require");
    house.proxy.reload().unwrap();
    let log = house.proxy.log();
    until("the reload is refused", async || fs::read_to_string(&log).unwrap().contains("RELOAD was refused")).await;
    driver(&house, &new.certificate(), ChannelBinding::Require).await.unwrap();
    client.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test]
async fn a_certificate_opens_for_the_user_that_it_names_and_for_nobody_else() {
    let (authority, stranger) = (Authority::create().unwrap(), Authority::create().unwrap());
    let house = guarded(&authority, |options| {
        options.setting("auth_type", "cert");
        options.users = vec![
            format!("\"{APP}\" \"{}\"", password(APP)),
            format!("\"{ADMIN}\" \"\""),
            "\"nameless\" \"\"".to_owned(),
        ];
    })
    .await;
    let ca = authority.certificate();
    let of = |user: &str| shown(&authority.sign(user, &[]).unwrap());
    let good = stdout(&psql(&dsn(&house, APP, &ca, &of(APP)), "SELECT current_user").await);
    assert_eq!(good.trim(), APP, "no password was asked");
    let console = dsn(&house, ADMIN, &ca, &of(ADMIN)).replace("dbname=app", "dbname=pgcutover");
    assert!(stdout(&psql(&console, "SHOW VERSION").await).contains("pgcutover"));

    let not_named = "certificate authentication failed for user \"app\"";
    for (user, certificate, wanted) in [
        (APP, of("App"), not_named),
        (APP, of("apps"), not_named),
        (APP, of(OTHER), not_named),
        ("nobody", of("nobody"), "role \"nobody\" does not exist"),
        // These TLS itself turns away.
        (APP, "sslcert=/none".to_owned(), "alert"),
        (APP, shown(&stranger.sign(APP, &[]).unwrap()), "alert"),
    ] {
        let error = stderr(&psql(&dsn(&house, user, &ca, &certificate), "SELECT 1").await);
        assert!(error.contains(wanted), "{user} {certificate}: {error}");
    }
    let plain = format!("host=localhost port={} user={APP} dbname={DATABASE} sslmode=disable", house.proxy.port());
    assert!(stderr(&psql(&plain, "SELECT 1").await).contains("connection requires TLS"));
    let socket =
        format!("host={} port={} user={APP} dbname={DATABASE}", house.proxy.dir().display(), house.proxy.port());
    assert!(stderr(&psql(&socket, "SELECT 1").await).contains("connection requires a valid client certificate"));
}

#[tokio::test]
async fn a_certificate_without_a_secret_for_the_server_is_told_so() {
    let authority = Authority::create().unwrap();
    // The user file holds the verifier only, and the server asks for a password.
    let house = guarded(&authority, |options| options.setting("auth_type", "cert")).await;
    let dsn = dsn(&house, APP, &authority.certificate(), &shown(&authority.sign(APP, &[]).unwrap()));
    let error = stderr(&psql(&dsn, "SELECT 1").await);
    assert!(error.contains("the proxy can't log in for this user"), "{error}");
    assert!(error.contains("Give the user a password that this server takes (auth_file)"), "{error}");
}

#[tokio::test]
async fn verify_full_demands_the_certificate_and_the_password() {
    let authority = Authority::create().unwrap();
    let house = guarded(&authority, |_| ()).await;
    let ca = authority.certificate();
    let of = |user: &str| shown(&authority.sign(user, &[]).unwrap());
    let with = |certificate: String, secret: &str| dsn(&house, APP, &ca, &format!("{certificate} password={secret}"));
    let good = with(of(APP), &password(APP));
    assert_eq!(stdout(&psql(&good, "SELECT current_user").await).trim(), APP);
    assert!(stderr(&psql(&with(of(APP), "wrong"), "SELECT 1").await).contains("password authentication failed"));
    assert!(
        stderr(&psql(&with(of(OTHER), &password(APP)), "SELECT 1").await).contains("certificate authentication failed")
    );
}

#[tokio::test]
async fn a_login_is_bound_to_the_proxys_certificate_and_its_key_still_opens_the_server() {
    let authority = Authority::create().unwrap();
    let house = House::open(|options| front(options, &authority.sign("front", &["localhost"]).unwrap(), "allow")).await;
    let ca = authority.certificate();
    for binding in ["require", "prefer", "disable"] {
        let dsn = dsn(&house, APP, &ca, &format!("channel_binding={binding} password={}", password(APP)));
        assert_eq!(stdout(&psql(&dsn, "SELECT current_user").await).trim(), APP, "{binding}");
    }
    let wrong = dsn(&house, APP, &ca, "channel_binding=require password=wrong");
    assert!(stderr(&psql(&wrong, "SELECT 1").await).contains("password authentication failed"));
    let plain = dsn(&house, APP, &ca, &format!("channel_binding=require password={}", password(APP)));
    let plain = plain.replace("sslmode=verify-full", "sslmode=disable");
    assert!(stderr(&psql(&plain, "SELECT 1").await).contains("channel binding required"));
    for binding in [ChannelBinding::Require, ChannelBinding::Prefer, ChannelBinding::Disable] {
        let client = driver(&house, &ca, binding).await.unwrap();
        client.batch_execute("SELECT 1").await.unwrap_or_else(|error| panic!("{binding:?}: {error}"));
    }
}

/// A certificate that signs itself, as its own authority.
fn self_signed(dir: &Path, algorithm: &'static SignatureAlgorithm) -> Identity {
    let key = KeyPair::generate_for(algorithm).unwrap();
    let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let file = |name: &str, text: &str| -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    Identity { certificate: file("own.crt", &own.pem()), key: file("own.key", &key.serialize_pem()) }
}

#[tokio::test]
async fn binding_uses_the_certificates_own_hash_and_is_not_offered_where_it_has_none() {
    for (algorithm, bindable) in [(&PKCS_ECDSA_P384_SHA384, true), (&PKCS_ED25519, false)] {
        let directory = tempfile::tempdir().unwrap();
        let own = self_signed(directory.path(), algorithm);
        let house = House::open(|options| front(options, &own, "allow")).await;
        let with = |binding: &str| {
            dsn(&house, APP, &own.certificate, &format!("channel_binding={binding} password={}", password(APP)))
        };
        let required = psql(&with("require"), "SELECT 1").await;
        assert_eq!(required.status.success(), bindable, "{}", String::from_utf8_lossy(&required.stderr));
        assert_eq!(stdout(&psql(&with("prefer"), "SELECT 1").await).trim(), "1");
    }
}
