//! Real bytes over real sockets.

use std::time::Duration;

use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::net::{TcpListener, UnixStream};

use super::*;
use crate::config::{ClientTls, SslMode};
use crate::message::{CANCEL_REQUEST_CODE, GSSENC_REQUEST_CODE, SSL_REQUEST_CODE, negotiate_protocol_version, notice};
use crate::tls::{ClientTlsSettings, Connector, RootCert};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn packet_of(body: &[u8]) -> Vec<u8> {
    [&u32::try_from(body.len() + 4).unwrap().to_be_bytes(), body].concat()
}

fn startup(version: u32, parameters: &[u8]) -> Vec<u8> {
    packet_of(&[&version.to_be_bytes(), parameters, b"\0"].concat())
}

fn request(code: i32) -> Vec<u8> {
    packet_of(&code.to_be_bytes())
}

const V3_0: u32 = 0x3_0000;

/// Sends bytes over a Unix socket, closes that half, and gives what came of it and what was answered.
async fn greeted(bytes: &[u8]) -> (Result<Hello, Report>, Vec<u8>) {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(bytes).await.unwrap();
    client.shutdown().await.unwrap();
    let outcome = greet(Stream::Unix(server), &Acceptor::disabled(), soon()).await.map(|(_, hello)| hello);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    (outcome, answer)
}

async fn session_of(bytes: &[u8]) -> (Startup, Vec<u8>) {
    match greeted(bytes).await {
        (Ok(Hello::Session(startup)), answer) => (*startup, answer),
        other => panic!("{other:?}"),
    }
}

fn text(startup: &Startup) -> Vec<String> {
    let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    startup.settings.iter().map(|(name, value)| format!("{}={}", shown(name), shown(value))).collect()
}

#[tokio::test]
async fn a_startup_is_kept_as_it_came_and_in_order() {
    let sent = startup(
        V3_0,
        b"user\0al\xffice\0database\0app\0application_name\0x y\0options\0-c a=1 --b-c=2\0TimeZone\0UTC\0",
    );
    let (startup, answer) = session_of(&sent).await;
    assert_eq!((&*startup.user, &*startup.database), (&b"al\xffice"[..], &b"app"[..]));
    assert_eq!(text(&startup), ["a=1", "b_c=2", "application_name=x y", "TimeZone=UTC"]);
    assert_eq!((startup.protocol, startup.replication, answer), (Protocol::V3_0, Replication::No, vec![]));
}

#[tokio::test]
async fn the_database_is_the_users_name_where_none_is_given() {
    for parameters in [&b"user\0alice\0"[..], b"user\0alice\0database\0\0"] {
        assert_eq!(&*session_of(&startup(V3_0, parameters)).await.0.database, b"alice");
    }
}

#[tokio::test]
async fn versions_are_negotiated_with_exactly_one_message() {
    let user = &b"user\0a\0"[..];
    let greased = &b"user\0a\0_pq_.test_protocol_negotiation\0\0"[..];
    for (version, parameters, spoken, told) in [
        (0x3_0000, user, Protocol::V3_0, None),
        (0x3_0002, user, Protocol::V3_2, None),
        (0x3_0001, user, Protocol::V3_0, Some((0x3_0000, vec![]))),
        (0x3_0003, user, Protocol::V3_2, Some((0x3_0002, vec![]))),
        (0x3_270f, greased, Protocol::V3_2, Some((0x3_0002, vec![&b"_pq_.test_protocol_negotiation"[..]]))),
        (0x3_0000, greased, Protocol::V3_0, Some((0x3_0000, vec![&b"_pq_.test_protocol_negotiation"[..]]))),
    ] {
        let (startup, answer) = session_of(&startup(version, parameters)).await;
        assert_eq!(startup.protocol, spoken, "{version:x}");
        assert!(startup.settings.is_empty());
        let Some(told) = told else {
            assert_eq!(answer, b"");
            continue;
        };
        let frame = frame::next(&answer, 1000).unwrap().unwrap();
        assert_eq!((frame.tag, frame.len_bytes()), (b'v', answer.len()));
        assert_eq!(negotiate_protocol_version(frame.body).unwrap(), told);
    }
}

#[tokio::test]
async fn encryption_is_refused_politely_and_once() {
    let user = startup(V3_0, b"user\0a\0");
    let both = [request(GSSENC_REQUEST_CODE), request(SSL_REQUEST_CODE), user.clone()].concat();
    let (_, answer) = session_of(&both).await;
    assert_eq!(answer, b"NN");
    let twice = [request(SSL_REQUEST_CODE), request(SSL_REQUEST_CODE), user].concat();
    let (outcome, answer) = greeted(&twice).await;
    assert_eq!(outcome.unwrap_err().sqlstate, SqlState::PROTOCOL_VIOLATION);
    assert_eq!(answer[..2], *b"NE");
}

#[tokio::test]
async fn nonsense_is_answered_in_postgresqls_words() {
    let user = b"user\0a\0";
    for (bytes, sqlstate) in [
        (startup(0x2_0000, user), "0A000"),
        (startup(0x4_0000, user), "0A000"),
        (startup(V3_0, b""), "28000"),
        (startup(V3_0, b"database\0a\0"), "28000"),
        (startup(V3_0, b"user\0a\0\0x"), "08P01"),
        (packet_of(b"\0\x03\0\0user\0a"), "08P01"),
        (startup(V3_0, b"user\0a\0options\0-B 5\0"), "42601"),
        (startup(V3_0, b"user\0a\0replication\0maybe\0"), "08P01"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), "08P01"),
        (b"\0\0\0\x07\0\0\0".to_vec(), "08P01"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(), "08P01"),
        (packet_of(&[&CANCEL_REQUEST_CODE.to_be_bytes()[..], &[1; 7]].concat()), "08P01"),
        (packet_of(&[&SSL_REQUEST_CODE.to_be_bytes()[..], b"x"].concat()), "08P01"),
    ] {
        let shown = String::from_utf8_lossy(&bytes).into_owned();
        let (outcome, answer) = greeted(&bytes).await;
        assert_eq!(outcome.unwrap_err().sqlstate.as_str(), sqlstate, "{shown}");
        let frame = frame::next(&answer, 1000).unwrap().unwrap();
        assert_eq!((frame.tag, frame.len_bytes()), (b'E', answer.len()), "{shown}");
        assert_eq!(notice(frame.body).sqlstate, sqlstate.as_bytes(), "{shown}");
    }
}

#[tokio::test]
async fn a_cancel_request_gives_its_key() {
    let body = [&CANCEL_REQUEST_CODE.to_be_bytes()[..], &7i32.to_be_bytes(), &[9; 32]].concat();
    let (outcome, answer) = greeted(&packet_of(&body)).await;
    let Ok(Hello::Cancel(key)) = outcome else { panic!("{outcome:?}") };
    assert_eq!((key.pid, &*key.secret, answer.len()), (7, &[9; 32][..], 0));
}

#[tokio::test]
async fn who_says_nothing_is_gone_and_who_stops_in_between_is_too() {
    assert!(matches!(greeted(b"").await.0, Ok(Hello::Gone)));
    let cut = startup(V3_0, b"user\0alice\0");
    for len in 1..cut.len() {
        assert_eq!(greeted(&cut[..len]).await.0.unwrap_err(), Report::client_gone(), "{len}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_dawdles_is_cut_off_at_the_deadline() {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(b"\0\0").await.unwrap();
    let started = Instant::now();
    let deadline = started + Duration::from_secs(60);
    let outcome = greet(Stream::Unix(server), &Acceptor::disabled(), deadline).await;
    assert_eq!(outcome.unwrap_err(), Report::login_timeout());
    assert_eq!(started.elapsed().as_secs(), 60);
}

#[tokio::test]
async fn partial_packets_are_awaited_and_nothing_behind_the_startup_is_read() {
    let (mut client, server) = UnixStream::pair().unwrap();
    let sent = [request(SSL_REQUEST_CODE), startup(V3_0, b"user\0alice\0"), b"Q\0\0\0\x08one\0".to_vec()].concat();
    let acceptor = Acceptor::disabled();
    let greeting = greet(Stream::Unix(server), &acceptor, soon());
    let sending = async {
        for byte in &sent {
            client.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    let (greeted, ()) = tokio::join!(greeting, sending);
    let (mut stream, _) = greeted.unwrap();
    let mut rest = [0; 9];
    stream.read_exact(&mut rest).await.unwrap();
    assert_eq!(&rest, b"Q\0\0\0\x08one\0");
}

/// Pieces that startup packets are made of.
const PIECES: [&[u8]; 7] = [b"user\0", b"options\0", b"replication\0", b"-c a=b\0", b"\0", b"\xff\\", b"_pq_.x\0"];

proptest! {
    #[test]
    fn no_startup_packet_makes_the_judge_panic(
        code in prop_oneof![Just(0x3_0000u32), Just(0x3_0002), Just(80_877_102), any::<u32>()],
        pieces in proptest::collection::vec(proptest::sample::select(PIECES.as_slice()), 0..12),
    ) {
        let _ = judge(&packet_of(&[&code.to_be_bytes()[..], &pieces.concat()].concat()), false);
    }

    #[test]
    fn nor_do_bytes_of_any_kind(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = judge(&bytes, false);
    }
}

/// An authority, a server certificate for `localhost`, and a client certificate, in files.
struct Pki {
    directory: tempfile::TempDir,
}

impl Pki {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        std::fs::write(directory.path().join("ca.crt"), ca_certificate.pem()).unwrap();
        let issuer = Issuer::from_params(&ca, &ca_key);
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        std::fs::write(directory.path().join("server.crt"), leaf.pem()).unwrap();
        std::fs::write(directory.path().join("server.key"), key.serialize_pem()).unwrap();
        Self { directory }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn acceptor(&self, mode: ClientTls) -> Acceptor {
        Acceptor::new(&ClientTlsSettings {
            mode,
            key_file: Some(self.file("server.key")),
            cert_file: Some(self.file("server.crt")),
            ca_file: Some(self.file("ca.crt")),
        })
        .unwrap()
    }

    fn connector(&self, mode: SslMode) -> Connector {
        Connector::new(mode, Some(&RootCert::File(self.file("ca.crt")))).unwrap()
    }
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connecting = TcpStream::connect(listener.local_addr().unwrap());
    let (client, server) = tokio::join!(connecting, listener.accept());
    (client.unwrap(), server.unwrap().0)
}

/// Both sides of one TLS connection attempt followed by a startup.
async fn over_tls(
    acceptor: &Acceptor,
    connector: &Connector,
    host: &str,
) -> (Result<bool, String>, Result<(Stream, Hello), Report>) {
    let (client, server) = tcp_pair().await;
    let client = async {
        let mut stream = connector.connect(client, host).await.map_err(|e| e.to_string())?;
        stream.write_all(&startup(V3_0, b"user\0a\0")).await.map_err(|e| e.to_string())?;
        stream.flush().await.map_err(|e| e.to_string())?;
        Ok(stream.is_tls())
    };
    tokio::join!(client, greet(Stream::Tcp(server), acceptor, soon()))
}

#[tokio::test]
async fn tls_is_agreed_on_and_certificates_are_checked_as_libpq_checks_them() {
    let (pki, other) = (Pki::new(), Pki::new());
    let acceptor = pki.acceptor(ClientTls::Allow);
    for (connector, host, good) in [
        (Connector::new(SslMode::Prefer, None).unwrap(), "anything", true),
        (Connector::new(SslMode::Require, None).unwrap(), "not a name", true),
        (pki.connector(SslMode::VerifyCa), "127.0.0.1", true),
        (pki.connector(SslMode::VerifyFull), "localhost", true),
        (pki.connector(SslMode::VerifyFull), "127.0.0.1", false),
        (pki.connector(SslMode::VerifyFull), "not a name", false),
        (other.connector(SslMode::VerifyCa), "localhost", false),
        (other.connector(SslMode::Require), "localhost", false),
    ] {
        let mode = connector.mode();
        let (client, server) = over_tls(&acceptor, &connector, host).await;
        assert_eq!(client.is_ok(), good, "{mode:?} {host}: {client:?}");
        assert_eq!(server.is_ok(), good, "{mode:?} {host}");
        if good {
            assert_eq!(client, Ok(true));
            assert!(server.unwrap().0.is_tls());
        }
    }
}

/// PostgreSQL's documentation begins with a self-signed certificate; whoever has it as root file trusts it itself.
#[tokio::test]
async fn a_self_signed_certificate_is_its_own_root() {
    let pki = Pki::new();
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(pki.file("server.crt"), own.pem()).unwrap();
    std::fs::write(pki.file("server.key"), key.serialize_pem()).unwrap();
    let acceptor = pki.acceptor(ClientTls::Allow);
    let connector = |root: &str| Connector::new(SslMode::VerifyFull, Some(&RootCert::File(pki.file(root)))).unwrap();
    for (root, host, good) in
        [("server.crt", "localhost", true), ("server.crt", "other", false), ("ca.crt", "localhost", false)]
    {
        let (client, server) = over_tls(&acceptor, &connector(root), host).await;
        assert_eq!((client.is_ok(), server.is_ok()), (good, good), "{root} {host}");
    }
}

#[tokio::test]
async fn a_client_that_wants_tls_from_a_plain_listener_hears_no() {
    let pki = Pki::new();
    let plain = Acceptor::disabled();
    let (client, server) = over_tls(&plain, &Connector::new(SslMode::Prefer, None).unwrap(), "localhost").await;
    assert_eq!((client, server.unwrap().0.is_tls()), (Ok(false), false));
    let (client, server) = over_tls(&plain, &pki.connector(SslMode::Require), "localhost").await;
    assert!(client.unwrap_err().contains("SSL was required"));
    assert!(matches!(server, Ok((_, Hello::Gone))));
}

#[tokio::test]
async fn a_listener_that_requires_tls_refuses_plain_sessions_but_not_cancels() {
    let acceptor = Pki::new().acceptor(ClientTls::Require);
    let (mut client, server) = tcp_pair().await;
    client.write_all(&startup(V3_0, b"user\0a\0")).await.unwrap();
    assert_eq!(greet(Stream::Tcp(server), &acceptor, soon()).await.unwrap_err(), Report::tls_required());
    let (mut client, server) = tcp_pair().await;
    client.write_all(&packet_of(&[&CANCEL_REQUEST_CODE.to_be_bytes()[..], &[0; 8]].concat())).await.unwrap();
    assert!(matches!(greet(Stream::Tcp(server), &acceptor, soon()).await, Ok((_, Hello::Cancel(_)))));
}

#[tokio::test]
async fn a_listener_that_verifies_demands_a_client_certificate() {
    let pki = Pki::new();
    let acceptor = pki.acceptor(ClientTls::VerifyCa);
    let (_, server) = over_tls(&acceptor, &pki.connector(SslMode::VerifyFull), "localhost").await;
    assert!(server.unwrap_err().message.contains("could not accept SSL connection"));
}

/// CVE-2021-23214's shape: a query slipped in between the request for TLS and its answer.
#[tokio::test]
async fn bytes_that_came_before_tls_are_refused_and_not_read_after_it() {
    let acceptor = Pki::new().acceptor(ClientTls::Allow);
    let (mut client, server) = tcp_pair().await;
    client.write_all(&[request(SSL_REQUEST_CODE), startup(V3_0, b"user\0evil\0")].concat()).await.unwrap();
    server.readable().await.unwrap();
    let outcome = greet(Stream::Tcp(server), &acceptor, soon()).await;
    assert_eq!(outcome.unwrap_err(), Report::unencrypted_data());
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer[0], b'E');
}

/// CVE-2021-23222's shape, on the other leg: a forged answer behind the `S`.
#[tokio::test]
async fn bytes_that_follow_a_servers_yes_unencrypted_break_the_connection() {
    let connector = Connector::new(SslMode::Require, None).unwrap();
    let (client, mut server) = tcp_pair().await;
    let forging = async {
        let mut asked = [0; 8];
        server.read_exact(&mut asked).await.unwrap();
        server.write_all(b"SR\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await.unwrap();
        server
    };
    let (connected, _server) = tokio::join!(connector.connect(client, "localhost"), forging);
    assert!(connected.is_err());
}

#[tokio::test]
async fn direct_tls_needs_the_protocols_name() {
    let pki = Pki::new();
    let acceptor = pki.acceptor(ClientTls::Allow);
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(pki.file("ca.crt")).unwrap();
    roots.add(rustls::pki_types::pem::PemObject::from_pem_slice(&pem).unwrap()).unwrap();
    for (alpn, good) in [(vec![b"postgresql".to_vec()], true), (vec![], false), (vec![b"http/1.1".to_vec()], false)] {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = alpn;
        let (client, server) = tcp_pair().await;
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        let client = async {
            let mut tls = connector.connect("localhost".try_into().unwrap(), client).await?;
            tls.write_all(&startup(V3_0, b"user\0direct\0")).await?;
            tls.flush().await?;
            std::io::Result::Ok(tls)
        };
        let (_client, greeted) = tokio::join!(client, greet(Stream::Tcp(server), &acceptor, soon()));
        assert_eq!(matches!(greeted, Ok((Stream::TlsServer(_), Hello::Session(_)))), good);
    }
}

#[tokio::test]
async fn settings_that_can_not_work_are_named() {
    let pki = Pki::new();
    let connector = |mode, root: Option<RootCert>| Connector::new(mode, root.as_ref()).unwrap_err().to_string();
    assert!(connector(SslMode::VerifyFull, None).contains("sslrootcert"));
    assert!(connector(SslMode::Require, Some(RootCert::System)).contains("verify-full"));
    assert!(connector(SslMode::Require, Some(RootCert::File("/no/such.crt".into()))).contains("/no/such.crt"));
    let keys_are_no_certificates = Some(RootCert::File(pki.file("server.key")));
    assert!(connector(SslMode::VerifyCa, keys_are_no_certificates).contains("no certificate"));
    let mut settings = ClientTlsSettings {
        mode: ClientTls::VerifyCa,
        key_file: Some(pki.file("server.key")),
        cert_file: Some(pki.file("server.crt")),
        ca_file: None,
    };
    assert!(Acceptor::new(&settings).unwrap_err().to_string().contains("client_tls_ca_file"));
    settings.ca_file = Some(pki.file("ca.crt"));
    settings.cert_file = Some(Pki::new().file("server.crt"));
    assert!(Acceptor::new(&settings).is_err(), "a certificate file that is gone");
}

#[test]
fn streams_are_small() {
    // Two words and the socket; a client's future holds one for as long as the client is there.
    assert!(size_of::<Stream>() <= 64, "{}", size_of::<Stream>());
}
