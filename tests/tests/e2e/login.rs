//! Logging in, at both ends, against real servers and real clients.
//!
//! Invariant: what a server asks is answered as libpq would, and what our own front asks is answered by libpq itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use e2e::binaries::{Binaries, tool};
use e2e::client::Client;
use e2e::cluster::{Cluster, ClusterOptions};
use e2e::pair::{APP, OTHER};
use e2e::tls::Authority;
use e2e::user::ServerUser;
use pgcutover::auth::{self, Terms, Users};
use pgcutover::backend::{
    self, Address, Cleartext, ConnectError, ConnectFailure, Login, PassThrough, Password, Rest, Secret,
    ServerConnection, ServerError,
};
use pgcutover::config::{AuthType, ClientTls, SslMode};
use pgcutover::handshake::{self, Hello};
use pgcutover::message::{self, Protocol, Status};
use pgcutover::report::{Report, SqlState};
use pgcutover::scram::{Keys, Verifier};
use pgcutover::stream::Stream;
use pgcutover::tls::{Acceptor, ClientTlsSettings, Connector, RootCert};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::house::{House, sqlstate, stderr, stdout};

/// One user for each way in.
const HBA: &str = "\
local all postgres trust
local all clear password
local all all scram-sha-256
host all trusted 127.0.0.1/32 trust
host all clear 127.0.0.1/32 password
host all hashed 127.0.0.1/32 md5
hostssl all tls_only 127.0.0.1/32 scram-sha-256
hostnossl all plain_only 127.0.0.1/32 scram-sha-256
host all tls_only,plain_only 127.0.0.1/32 reject
host all barred 127.0.0.1/32 reject
host all all 127.0.0.1/32 scram-sha-256
";

const SETUP: &str = "\
CREATE ROLE trusted LOGIN; CREATE ROLE barred LOGIN; CREATE ROLE closed LOGIN PASSWORD 'pencil' CONNECTION LIMIT 0;
SET password_encryption = 'md5'; CREATE ROLE hashed LOGIN PASSWORD 'pencil'; SET password_encryption = 'scram-sha-256';
CREATE ROLE scram LOGIN PASSWORD 'pencil'; CREATE ROLE clear LOGIN PASSWORD 'pencil';
CREATE ROLE tls_only LOGIN PASSWORD 'pencil'; CREATE ROLE plain_only LOGIN PASSWORD 'pencil'";

struct Server {
    cluster: Cluster,
}

impl Server {
    /// A server with TLS whose certificate is for `localhost`, and a role for each way in.
    async fn start(major: u32) -> Self {
        let mut cluster = Cluster::start(&Binaries::of(&[major]).unwrap(), &ClusterOptions::new(major)).await.unwrap();
        certificates(&cluster);
        fs::write(cluster.data().join("pg_hba.conf"), HBA).unwrap();
        cluster.set("ssl", "on", true).await.unwrap();
        cluster.superuser("postgres").await.unwrap().run(SETUP).await.unwrap();
        Self { cluster }
    }

    fn ca(&self) -> RootCert {
        RootCert::File(self.cluster.dir().join("ca.crt"))
    }

    fn address(&self, host: &str, mode: SslMode, root: Option<&RootCert>) -> Address {
        Address {
            host: host.into(),
            port: self.cluster.port(),
            name: None,
            dbname: (*b"postgres").into(),
            tls: Connector::new(mode, root).unwrap(),
            protocol: Protocol::V3_0,
            cleartext: Cleartext::Protected,
        }
    }

    fn tcp(&self, mode: SslMode) -> Address {
        self.address("127.0.0.1", mode, None)
    }

    fn socket(&self) -> Address {
        self.address(&self.cluster.dir().display().to_string(), SslMode::Disable, None)
    }

    async fn stored(&self, user: &str) -> String {
        let client = self.cluster.superuser("postgres").await.unwrap();
        client.text(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{user}'")).await.unwrap().unwrap()
    }
}

/// An authority and a certificate that it signed for `localhost`, where the server looks for it.
fn certificates(cluster: &Cluster) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a certificate whose issuer has its own name for self-signed.
    ca.distinguished_name.push(DnType::CommonName, "authority");
    fs::write(cluster.dir().join("ca.crt"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let issuer = Issuer::from_params(&ca, &ca_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let key_file = cluster.data().join("server.key");
    fs::write(cluster.data().join("server.crt"), leaf.pem()).unwrap();
    fs::write(&key_file, key.serialize_pem()).unwrap();
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
    ServerUser::current().unwrap().own(&key_file).unwrap();
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn password(text: &str) -> Secret {
    Secret::Password(Password::new(text.as_bytes()))
}

fn login(user: &str, secret: Secret) -> Login {
    Login { user: user.as_bytes().into(), secret, settings: vec![((*b"application_name").into(), (*b"e2e").into())] }
}

async fn enter(address: &Address, user: &str, secret: Secret) -> Result<ServerConnection, ConnectError> {
    backend::connect(address, &login(user, secret), soon()).await
}

/// Keys as a client's proof would have revealed them.
fn passed_through(stored: &str) -> Secret {
    let verifier = Verifier::parse(stored.as_bytes()).unwrap();
    let keys = verifier.accepts(b"pencil").unwrap();
    Secret::Scram(Arc::new(PassThrough { keys, verifier }))
}

#[tokio::test]
async fn every_way_a_server_asks_for_proof_is_answered() {
    for major in [13, 17] {
        let server = Server::start(major).await;
        let (plain, tls) = (server.tcp(SslMode::Disable), server.tcp(SslMode::Require));
        let digits: [u8; 32] = server.stored("hashed").await.as_bytes()[3..].try_into().unwrap();
        let keys = passed_through(&server.stored("scram").await);
        let anywhere = Address { cleartext: Cleartext::Anywhere, ..plain.clone() };
        for (address, user, secret) in [
            (&plain, "trusted", Secret::None),
            (&plain, "hashed", password("pencil")),
            (&plain, "hashed", Secret::Md5(digits)),
            (&plain, "scram", password("pencil")),
            (&plain, "scram", keys.clone()),
            (&tls, "scram", keys),
            (&tls, "clear", password("pencil")),
            (&anywhere, "clear", password("pencil")),
            (&server.socket(), "clear", password("pencil")),
            (&server.socket(), "scram", password("pencil")),
            (&server.socket(), "postgres", Secret::None),
        ] {
            let connection = enter(address, user, secret).await.unwrap_or_else(|e| panic!("{user}: {e}"));
            assert_eq!(connection.rest, Rest::Idle);
            assert!(connection.pid() > 0);
            assert_eq!(connection.parameter(b"application_name"), Some(&b"e2e"[..]));
            assert!(connection.parameter(b"server_version").unwrap().starts_with(major.to_string().as_bytes()));
        }
    }
}

#[tokio::test]
async fn refusals_name_the_reason_and_who_has_to_act() {
    let server = Server::start(17).await;
    let plain = server.tcp(SslMode::Disable);
    let other_verifier = {
        let keys = Keys::derive(b"pencil", b"other salt", 4096);
        let verifier = Verifier::of(&keys, b"other salt", 4096);
        Secret::Scram(Arc::new(PassThrough { keys, verifier }))
    };
    let unknown_database = Address { dbname: (*b"nowhere").into(), ..plain.clone() };
    let nobody_there = Address { port: 1, ..plain.clone() };
    let no_such_host = Address { host: "host.invalid".into(), ..plain.clone() };
    for (address, user, secret, failure, sqlstate) in [
        (&plain, "scram", password("pen"), ConnectFailure::Refused, Some("28P01")),
        (&plain, "hashed", password("pen"), ConnectFailure::Refused, Some("28P01")),
        (&plain, "stranger", password("pencil"), ConnectFailure::Refused, Some("28P01")),
        (&plain, "scram", other_verifier, ConnectFailure::Refused, Some("28P01")),
        (&plain, "scram", Secret::None, ConnectFailure::Refused, None),
        (&plain, "clear", password("pencil"), ConnectFailure::Refused, None),
        (&plain, "barred", Secret::None, ConnectFailure::Refused, Some("28000")),
        (&plain, "closed", password("pencil"), ConnectFailure::Unavailable, Some("53300")),
        (&unknown_database, "scram", password("pencil"), ConnectFailure::Refused, Some("3D000")),
        (&nobody_there, "scram", password("pencil"), ConnectFailure::Network, None),
        (&no_such_host, "scram", password("pencil"), ConnectFailure::Network, None),
    ] {
        let error = enter(address, user, secret).await.unwrap_err();
        assert_eq!((error.failure, error.sqlstate.map(|s| s.to_string()).as_deref()), (failure, sqlstate), "{error}");
    }
}

#[tokio::test]
async fn sslmodes_mean_what_they_mean_to_libpq() {
    let server = Server::start(17).await;
    let (ca, localhost) = (server.ca(), "localhost");
    let strangers = tempfile::tempdir().unwrap();
    let stranger = RootCert::File(strangers.path().join("ca.crt"));
    let unrelated = CertificateParams::new(Vec::new()).unwrap().self_signed(&KeyPair::generate().unwrap()).unwrap();
    fs::write(strangers.path().join("ca.crt"), unrelated.pem()).unwrap();
    for (host, mode, root, user, encrypted) in [
        ("127.0.0.1", SslMode::Disable, None, "scram", Ok(false)),
        ("127.0.0.1", SslMode::Allow, None, "scram", Ok(false)),
        ("127.0.0.1", SslMode::Prefer, None, "scram", Ok(true)),
        ("127.0.0.1", SslMode::Require, None, "scram", Ok(true)),
        ("127.0.0.1", SslMode::Disable, None, "tls_only", Err(ConnectFailure::Refused)),
        ("127.0.0.1", SslMode::Allow, None, "tls_only", Ok(true)),
        ("127.0.0.1", SslMode::Prefer, None, "plain_only", Ok(false)),
        ("127.0.0.1", SslMode::Require, None, "plain_only", Err(ConnectFailure::Refused)),
        ("127.0.0.1", SslMode::VerifyCa, Some(&ca), "scram", Ok(true)),
        ("127.0.0.1", SslMode::VerifyFull, Some(&ca), "scram", Err(ConnectFailure::Tls)),
        (localhost, SslMode::VerifyFull, Some(&ca), "scram", Ok(true)),
        (localhost, SslMode::Require, Some(&stranger), "scram", Err(ConnectFailure::Tls)),
        (localhost, SslMode::VerifyCa, Some(&stranger), "scram", Err(ConnectFailure::Tls)),
        (localhost, SslMode::Prefer, Some(&stranger), "scram", Ok(false)),
    ] {
        let entered = enter(&server.address(host, mode, root), user, password("pencil")).await;
        let seen = entered.map(|connection| connection.stream.is_tls()).map_err(|error| error.failure);
        assert_eq!(seen, encrypted, "{host} {mode:?} {user}");
    }
}

#[tokio::test]
async fn statements_of_our_own_leave_the_connection_as_the_server_says() {
    let server = Server::start(17).await;
    let mut connection = enter(&server.tcp(SslMode::Prefer), "scram", password("pencil")).await.unwrap();
    let rows = connection.query("SELECT $1::int + 1, $2, NULL", &[Some("41"), None], soon()).await.unwrap();
    assert_eq!((rows.len(), rows[0].parse::<i64>(0), rows[0].text(1), rows[0].text(9)), (1, Some(42), None, None));

    let refused = connection.query("SELECT 1/$1::int", &[Some("0")], soon()).await.unwrap_err();
    assert_eq!(refused.sqlstate().unwrap().as_str(), "22012");
    assert_eq!(connection.rest, Rest::Idle);

    connection.simple("BEGIN; SET TimeZone = 'Asia/Tokyo'; SELECT 1", soon()).await.unwrap();
    assert_eq!((connection.rest, connection.parameter(b"TimeZone")), (Rest::InTransaction, Some(&b"Asia/Tokyo"[..])));
    assert!(connection.simple("SELECT 1/0", soon()).await.is_err());
    assert_eq!(connection.rest, Rest::Failed);
    connection.simple("ROLLBACK; DISCARD ALL", soon()).await.unwrap_err();
    connection.simple("ROLLBACK", soon()).await.unwrap();
    connection.simple("DISCARD ALL", soon()).await.unwrap();
    assert_eq!((connection.rest, connection.parameter(b"TimeZone")), (Rest::Idle, Some(&b"UTC"[..])));

    let rows = connection.simple("SELECT n FROM generate_series(1, 5000) n; SELECT 'last'", soon()).await.unwrap();
    assert_eq!((rows.len(), rows.last().unwrap().text(0)), (5001, Some("last")));
    assert_eq!((connection.input.capacity(), connection.output.capacity()), (0, 0));

    let late = connection.simple("SELECT pg_sleep(30)", Instant::now() + Duration::from_millis(50)).await;
    assert_eq!((late, connection.rest), (Err(ServerError::Timeout), Rest::Busy));
    let mut copying = enter(&server.tcp(SslMode::Prefer), "scram", password("pencil")).await.unwrap();
    assert!(matches!(copying.simple("COPY (SELECT 1) TO STDOUT", soon()).await, Err(ServerError::Broken(_))));
}

#[tokio::test]
async fn a_cancel_has_been_sent_when_it_returns() {
    let server = Server::start(17).await;
    for address in [server.socket(), server.tcp(SslMode::Disable), server.tcp(SslMode::Require)] {
        let mut connection = enter(&address, "scram", password("pencil")).await.unwrap();
        let key = connection.key.clone().unwrap();
        let observer = server.cluster.superuser("postgres").await.unwrap();
        let pid = connection.pid();
        let canceling = async {
            let active = format!("SELECT state = 'active' FROM pg_stat_activity WHERE pid = {pid}");
            observer.until(&active, Duration::from_secs(20)).await.unwrap();
            backend::cancel(&address, &key, soon()).await.unwrap();
        };
        let (outcome, ()) = tokio::join!(connection.simple("SELECT pg_sleep(60)", soon()), canceling);
        assert_eq!(outcome.unwrap_err().sqlstate(), Some(SqlState::QUERY_CANCELED));
        assert_eq!(connection.rest, Rest::Idle);
        connection.terminate(soon()).await;
        let gone = format!("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = {pid}");
        observer.until(&gone, Duration::from_secs(20)).await.unwrap();
    }
}

/// The least proxy: greets a client, asks for proof, logs in to the server with what it learnt, and copies bytes.
async fn front(stream: Stream, acceptor: &Acceptor, method: AuthType, users: &Users, server: &Address) {
    let (mut stream, hello) = handshake::greet(stream, acceptor, soon()).await.unwrap();
    let Hello::Session(startup) = hello else { return };
    let identity =
        match auth::authenticate(&mut stream, &startup, Terms { method, users, lookup: None, acceptor }).await {
            Ok(identity) => identity,
            Err(report) => return stream.refuse(&report).await,
        };
    let login = Login { user: identity.user, secret: identity.secret, settings: startup.settings };
    let mut connection = match backend::connect(server, &login, soon()).await {
        Ok(connection) => connection,
        Err(_) => return stream.refuse(&Report::server_unavailable(&startup.database)).await,
    };
    let mut welcome = BytesMut::new();
    for (name, value) in &connection.parameters {
        message::put_parameter_status(&mut welcome, name, value);
    }
    message::put_ready_for_query(&mut welcome, Status::Idle);
    stream.write_all(&welcome).await.unwrap();
    // The client ends it.
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut connection.stream).await;
}

/// What psql says over TCP: its first line, or its error.
async fn psql(port: u16, user: &str, secret: &str, parameters: &str) -> Result<String, String> {
    let mut command = tokio::process::Command::new(tool("psql").unwrap());
    command.env_clear().env("PGPASSWORD", secret).arg("-XAtwc").arg("SELECT current_user || ' ' || 6 * 7");
    command.arg(format!("host=localhost port={port} user={user} dbname=postgres {parameters}")).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(30), command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libpq_logs_in_through_us_and_we_with_its_own_proof() {
    let server = Server::start(17).await;
    let (data, dir) = (server.cluster.data(), server.cluster.dir().to_owned());
    let file = |name: &str| -> Option<PathBuf> { Some(data.join(name)) };
    let acceptor = Acceptor::new(&ClientTlsSettings {
        mode: ClientTls::Allow,
        key_file: file("server.key"),
        cert_file: file("server.crt"),
        ca_file: None,
    })
    .unwrap();
    let lines = format!(
        "\"scram\" \"{}\"\n\"hashed\" \"{}\"\n\"clear\" \"pencil\"\n\"trusted\" \"\"\n",
        server.stored("scram").await,
        server.stored("hashed").await,
    );
    let users = Users::parse(lines.as_bytes()).unwrap();
    let address = server.tcp(SslMode::Prefer);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ca = dir.join("ca.crt").display().to_string();
    let verified = format!("sslmode=verify-full sslrootcert={ca}");
    for (method, user, secret, parameters, good) in [
        (AuthType::Scram, "scram", "pencil", "sslmode=disable", true),
        (AuthType::Scram, "scram", "pencil", verified.as_str(), true),
        (AuthType::Scram, "clear", "pencil", "sslmode=require channel_binding=disable", true),
        (AuthType::Scram, "clear", "pencil", "sslmode=disable options='-c work_mem=5MB --geqo=off'", true),
        (AuthType::Md5, "hashed", "pencil", "sslmode=disable", true),
        (AuthType::Md5, "scram", "pencil", "sslmode=prefer", true),
        (AuthType::Plain, "scram", "pencil", verified.as_str(), true),
        (AuthType::Trust, "trusted", "", "sslmode=disable", true),
        (AuthType::Scram, "scram", "pen", "sslmode=disable", false),
        (AuthType::Scram, "stranger", "pencil", "sslmode=disable", false),
        (AuthType::Md5, "hashed", "pen", "sslmode=disable", false),
    ] {
        let serve = async {
            // A client that can't use what it is offered dials twice (sslmode=prefer); the first that asks is served.
            let (socket, _) = listener.accept().await.unwrap();
            front(Stream::Tcp(socket), &acceptor, method, &users, &address).await;
        };
        let (said, ()) = tokio::join!(psql(port, user, secret, parameters), serve);
        match good {
            true => assert_eq!(said, Ok(format!("{user} 42")), "{method:?} {parameters}"),
            false => {
                let error = said.unwrap_err();
                assert!(error.contains(&format!("password authentication failed for user \"{user}\"")), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn a_connection_at_rest_tells_when_it_no_longer_is() {
    let server = Server::start(17).await;
    let mut connection = enter(&server.tcp(SslMode::Require), "scram", password("pencil")).await.unwrap();
    let mut news = BytesMut::new();
    // TLS 1.3 sends session tickets of its own; they are no news.
    assert_eq!(connection.stream.arrived(&mut news), pgcutover::stream::Arrived::Nothing);
    let observer = server.cluster.superuser("postgres").await.unwrap();
    observer.run(&format!("SELECT pg_terminate_backend({})", connection.pid())).await.unwrap();
    let deadline = soon();
    while connection.stream.arrived(&mut news) != pgcutover::stream::Arrived::End {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    assert_eq!(message::notice(&news[5..]).sqlstate, b"57P01");
}

/// An md5 hash proves nothing to a server that keeps a SCRAM verifier: the client is told what is missing, and not to try
/// again; the users beside it are none the worse.
#[tokio::test]
async fn an_md5_hash_is_not_enough_for_a_server_that_wants_scram() {
    let house = House::open(|options| {
        options.setting("auth_type", "md5");
        options.users.retain(|line| !line.starts_with(&format!("\"{APP}\"")));
        // Of `app-secret` and `app`.
        options.users.push(format!("\"{APP}\" \"md55afb2fb5ee1832419a8c0fa45bc3255b\""));
    })
    .await;
    let mut wrong = house.login(APP);
    assert_eq!(sqlstate(&Client::connect(wrong.password("other")).await.unwrap_err()), "28P01");
    let error = match Client::connect(&house.login(APP)).await {
        // Another server connection has taught the proxy the welcome.
        Ok(client) => client.simple_query("SELECT 1").await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(sqlstate(&error), "28000");
    assert!(format!("{error:?}").contains("server asks for a SCRAM proof"), "{error:?}");
    let log = fs::read_to_string(house.proxy.log()).unwrap();
    assert!(log.contains("server asks for a SCRAM proof"), "{log}");
    // A verifier in the user file asks for SCRAM under auth_type md5, too, and passes it on.
    assert_eq!(house.connect(OTHER).await.number("SELECT 1").await.unwrap(), 1);
}

#[tokio::test]
async fn a_client_certificate_of_the_configured_authority_is_demanded() {
    let (ours, foreign) = (Authority::create().unwrap(), Authority::create().unwrap());
    let server = ours.sign("proxy", &["localhost", "127.0.0.1"]).unwrap();
    let house = House::open(|options| {
        options.setting("client_tls_sslmode", "verify-ca");
        options.setting("client_tls_key_file", server.key.display().to_string());
        options.setting("client_tls_cert_file", server.certificate.display().to_string());
        options.setting("client_tls_ca_file", ours.certificate().display().to_string());
    })
    .await;
    let (right, wrong) = (ours.sign("client", &[]).unwrap(), foreign.sign("client", &[]).unwrap());
    let with = |identity: &e2e::tls::Identity| {
        let (certificate, key) = (identity.certificate.display(), identity.key.display());
        format!("{} sslmode=require sslcert={certificate} sslkey={key}", house.dsn(APP))
    };
    let ask = async |dsn: &str| house.psql(dsn, "SELECT 42").await;
    assert_eq!(stdout(&ask(&with(&right)).await).trim(), "42");
    let said = stderr(&ask(&with(&wrong)).await);
    assert!(said.contains("alert"), "{said}");
    // No such file: libpq then has none to offer.
    let none = format!("{} sslcert=/nonexistent sslmode", house.dsn(APP));
    let said = stderr(&ask(&format!("{none}=require")).await);
    assert!(said.contains("alert"), "{said}");
    let said = stderr(&ask(&format!("{none}=disable")).await);
    assert!(!said.contains("alert") && said.contains("TLS"), "{said}");
    assert_eq!(stdout(&ask(&with(&right)).await).trim(), "42", "whoever was refused shut no door");
}
