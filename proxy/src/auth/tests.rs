//! Clients of every kind, over real sockets.

use std::time::Duration;

use bytes::BytesMut;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::*;
use crate::backend::{md5_hex, md5_stored};
use crate::frame;
use crate::message::{Protocol, Replication};
use crate::report::SqlState;
use crate::scram::{ClientExchange, Keys, MECHANISM};

/// RFC 7677's password `pencil`, as PostgreSQL stores it.
const VERIFIER: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

fn users() -> Users {
    let md5 = String::from_utf8(md5_stored(b"pencil", b"old").to_vec()).unwrap();
    let text = format!("\"new\" \"{VERIFIER}\"\n\"old\" \"md5{md5}\"\n\"bare\" \"pencil\"\n\"none\" \"\"\n");
    Users::parse(text.as_bytes()).unwrap()
}

/// Without TLS.
fn terms(method: AuthType, users: &Users) -> Terms<'_> {
    static NONE: std::sync::LazyLock<Acceptor> = std::sync::LazyLock::new(Acceptor::disabled);
    Terms { method, users, lookup: None, acceptor: &NONE }
}

fn startup(user: &[u8]) -> Startup {
    Startup {
        protocol: Protocol::V3_0,
        user: user.into(),
        database: user.into(),
        replication: Replication::No,
        settings: Vec::new(),
    }
}

/// A client with a password that answers whatever it is asked, and tells what it saw.
struct Client {
    socket: UnixStream,
    password: &'static [u8],
    user: &'static [u8],
}

impl Client {
    async fn read(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut front = [0; 5];
        self.socket.read_exact(&mut front).await.ok()?;
        let length = u32::from_be_bytes(front[1..].try_into().unwrap());
        let mut body = vec![0; length as usize - 4];
        self.socket.read_exact(&mut body).await.ok()?;
        Some((front[0], body))
    }

    async fn send(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let mut out = BytesMut::new();
        write(&mut out);
        self.socket.write_all(&out).await.unwrap();
    }

    /// The methods it was asked for, up to AuthenticationOk or the end.
    async fn log_in(mut self) -> Vec<&'static str> {
        let mut seen = Vec::new();
        while let Some((tag, body)) = self.read().await {
            assert_eq!(tag, b'R');
            match message::authentication(&body).unwrap() {
                Authentication::Ok => {
                    seen.push("ok");
                    return seen;
                }
                Authentication::Cleartext => {
                    seen.push("cleartext");
                    let password = self.password;
                    self.send(|out| message::put_password(out, password)).await;
                }
                Authentication::Md5(salt) => {
                    seen.push("md5");
                    let digits = md5_hex(&[&md5_stored(self.password, self.user), &salt]);
                    self.send(|out| message::put_password(out, &[b"md5", &digits[..]].concat())).await;
                }
                Authentication::Sasl(mechanisms) => {
                    assert_eq!(mechanisms, [MECHANISM]);
                    seen.push("scram");
                    self.scram().await;
                }
                other @ (Authentication::SaslContinue(_) | Authentication::SaslFinal(_) | Authentication::Other(_)) => {
                    panic!("{other:?}")
                }
            }
        }
        seen
    }

    async fn scram(&mut self) {
        let exchange = ClientExchange::start(&[7; 18]);
        let first = exchange.client_first().to_vec();
        self.send(|out| message::put_sasl_initial_response(out, MECHANISM, &first)).await;
        let (_, body) = self.read().await.unwrap();
        let Authentication::SaslContinue(data) = message::authentication(&body).unwrap() else { panic!("{body:?}") };
        let challenge = exchange.challenged(data).unwrap();
        let keys = Keys::derive(self.password, &challenge.salt, challenge.iterations);
        let (client_final, proven) = challenge.prove(&keys);
        self.send(|out| message::put_sasl_response(out, &client_final)).await;
        if let Some((_, body)) = self.read().await {
            let Authentication::SaslFinal(data) = message::authentication(&body).unwrap() else { panic!("{body:?}") };
            proven.verify(data).unwrap();
        }
    }
}

async fn log_in(
    method: AuthType,
    user: &'static [u8],
    password: &'static [u8],
) -> (Result<Identity, Report>, Vec<&'static str>) {
    let (client, server) = UnixStream::pair().unwrap();
    let users = users();
    let serve = async {
        let mut stream = Stream::Unix(server);
        authenticate(&mut stream, &startup(user), terms(method, &users)).await
    };
    let client = Client { socket: client, password, user };
    timeout(Duration::from_secs(20), async { tokio::join!(serve, client.log_in()) }).await.unwrap()
}

fn kind(secret: &Secret) -> &'static str {
    match secret {
        Secret::None => "none",
        Secret::Password(_) => "password",
        Secret::Md5(_) => "md5",
        Secret::Scram(_) => "scram",
    }
}

#[tokio::test]
async fn the_right_password_opens_and_teaches_how_to_log_in_to_servers() {
    for (method, user, asked, learnt) in [
        (AuthType::Scram, &b"new"[..], "scram", "scram"),
        (AuthType::Scram, b"bare", "scram", "password"),
        (AuthType::Md5, b"old", "md5", "md5"),
        (AuthType::Md5, b"bare", "md5", "password"),
        (AuthType::Md5, b"new", "scram", "scram"),
        (AuthType::Plain, b"new", "cleartext", "password"),
        (AuthType::Plain, b"old", "cleartext", "password"),
        (AuthType::Plain, b"bare", "cleartext", "password"),
    ] {
        let (identity, seen) = log_in(method, user, b"pencil").await;
        assert_eq!(seen, [asked, "ok"], "{method:?}");
        let identity = identity.unwrap();
        assert_eq!((&*identity.user, kind(&identity.secret)), (user, learnt), "{method:?}");
    }
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_can_not_be_told_apart() {
    for (method, asked) in [(AuthType::Scram, "scram"), (AuthType::Md5, "md5"), (AuthType::Plain, "cleartext")] {
        for (user, password) in [
            (&b"bare"[..], &b"wrong"[..]),
            (b"nobody", b"pencil"),
            (b"none", b""),
            (b"none", b"pencil"),
            (b"\xff\xfe", b"pencil"),
        ] {
            let (outcome, seen) = log_in(method, user, password).await;
            assert_eq!(seen, [asked], "{method:?} {user:?}");
            let report = outcome.unwrap_err();
            assert_eq!(report, Report::password_authentication_failed(user));
            assert_eq!(report.sqlstate, SqlState::INVALID_PASSWORD);
        }
    }
    // A hash is no verifier: the exchange goes to its end and fails, as in PgBouncer.
    assert_eq!(log_in(AuthType::Scram, b"old", b"pencil").await.0.unwrap_err().sqlstate, SqlState::INVALID_PASSWORD);
    assert_eq!(log_in(AuthType::Md5, b"new", b"wrong").await.0.unwrap_err().sqlstate, SqlState::INVALID_PASSWORD);
}

#[tokio::test]
async fn trust_asks_nothing_and_knows_its_users() {
    let (identity, seen) = log_in(AuthType::Trust, b"bare", b"").await;
    assert_eq!((seen, kind(&identity.unwrap().secret)), (vec!["ok"], "password"));
    assert_eq!(kind(&log_in(AuthType::Trust, b"new", b"").await.0.unwrap().secret), "none");
    let (refused, seen) = log_in(AuthType::Trust, b"nobody", b"").await;
    assert_eq!((seen, refused.unwrap_err()), (vec![], Report::role_does_not_exist(b"nobody")));
}

#[tokio::test]
async fn a_connection_without_a_certificate_is_not_let_in_by_certificate() {
    let (refused, seen) = log_in(AuthType::Cert, b"bare", b"pencil").await;
    let report = refused.unwrap_err();
    assert_eq!((seen, report.sqlstate), (vec![], SqlState::INVALID_AUTHORIZATION));
    assert_eq!(report.message, "connection requires a valid client certificate");
}

#[tokio::test]
async fn a_passed_through_key_belongs_to_its_verifier() {
    let (identity, _) = log_in(AuthType::Scram, b"new", b"pencil").await;
    let Secret::Scram(pass_through) = identity.unwrap().secret else { panic!("no keys") };
    assert_eq!(pass_through.verifier.accepts(b"pencil"), Some(pass_through.keys.clone()));
}

/// Sends raw bytes as the answer to the first request.
async fn answered(method: AuthType, bytes: &[u8]) -> Report {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(bytes).await.unwrap();
    client.shutdown().await.unwrap();
    let mut stream = Stream::Unix(server);
    authenticate(&mut stream, &startup(b"bare"), terms(method, &users())).await.unwrap_err()
}

#[tokio::test]
async fn broken_answers_are_refused_in_words() {
    for (bytes, sqlstate) in [
        (&b"Q\0\0\0\x06x\0"[..], "08P01"),
        (b"p\0\0\0\x03", "08P01"),
        (b"p\x7f\xff\xff\xff", "08P01"),
        (b"p\xff\xff\xff\xff", "08P01"),
        (b"p\0\0\0\x04", "08P01"),
        (b"p\0\0\0\x12SCRAM-SHA-256", "08006"),
        (b"p\0\0\0\x16SCRAM-SHA-256\0\x7f\xff\xff\xff", "08P01"),
        (b"p\0\0\0\x16SCRAM-SHA-1\0\0\0\0\0\0\0", "08P01"),
        (b"p\0\0\0\x19SCRAM-SHA-256\0\0\0\0\x03n,,", "08P01"),
        (b"p\0\0\0\x24SCRAM-SHA-256\0\0\0\0\x0ep=x,,n=,r=abcd", "0A000"),
        (b"", "08006"),
        (b"p\0", "08006"),
    ] {
        let report = answered(AuthType::Scram, bytes).await;
        assert_eq!(report.sqlstate.as_str(), sqlstate, "{:?} {report}", String::from_utf8_lossy(bytes));
    }
    assert_eq!(answered(AuthType::Md5, b"p\0\0\0\x07md5").await.sqlstate, SqlState::PROTOCOL_VIOLATION);
    assert_eq!(answered(AuthType::Plain, b"p\0\0\0\x08a\0b\0").await.sqlstate, SqlState::PROTOCOL_VIOLATION);
}

#[tokio::test]
async fn nothing_behind_the_login_is_read() {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(b"p\0\0\0\x0bpencil\0Q\0\0\0\x04").await.unwrap();
    let mut stream = Stream::Unix(server);
    authenticate(&mut stream, &startup(b"bare"), terms(AuthType::Plain, &users())).await.unwrap();
    let mut rest = [0; 5];
    stream.read_exact(&mut rest).await.unwrap();
    assert_eq!(frame::header(&rest).unwrap().unwrap().tag, b'Q');
}

#[tokio::test]
async fn our_own_process_is_known_on_the_unix_socket() {
    let (_client, server) = UnixStream::pair().unwrap();
    assert!(is_own_process(Stream::Unix(server).peer().unwrap()));
    assert!(!is_own_process(Peer::Unix { uid: Some(nix::unistd::geteuid().as_raw() + 1) }));
    assert!(!is_own_process(Peer::Unix { uid: None }));
    assert!(!is_own_process(Peer::Tcp("127.0.0.1:1".parse().unwrap())));
}

#[test]
fn a_user_file_is_read_as_pgbouncer_reads_it() {
    let text =
        b"; comment\n\n  \"a\"\"b\"   \"p\"\"w\" \"ignored\"\r\n# comment\n\"\xff\" \"x\"\n\"d\" \"md5nothex\"\n";
    let users = Users::parse(text).unwrap();
    let mut names: Vec<_> = users.names().map(<[u8]>::to_vec).collect();
    names.sort();
    assert_eq!(names, [b"a\"b".to_vec(), b"d".to_vec(), b"\xff".to_vec()]);
    let Some(Secret::Password(password)) = users.secret(b"a\"b") else { panic!("no password") };
    assert_eq!(password.text(), b"p\"w");
    assert!(matches!(users.secret(b"d"), Some(Secret::Password(_))));
    assert!(!users.contains(b"c") && users.secret(b"c").is_none());
}

#[test]
fn a_broken_user_file_names_its_line() {
    for (text, line) in [
        ("\"a\" \"b\"\na b\n", 2),
        ("\"a\" \"b", 1),
        ("\"a\"", 1),
        ("\"a\n\" \"b\"", 1),
        ("\"\" \"b\"", 1),
        ("\n\n\"a\" \"SCRAM-SHA-256$x\"", 3),
        ("\"a\" \"b\"\n;\n\"a\" \"c\"", 3),
    ] {
        let error = Users::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("line {line}: ")), "{text:?}: {error}");
    }
    assert!(Users::load("/no/such/file".as_ref()).unwrap_err().to_string().starts_with("/no/such/file: "));
}

#[test]
fn users_that_can_not_log_in_by_the_method_are_named() {
    let users = users();
    let unusable = |method| {
        let mut names: Vec<_> = users.unusable(method).map(|n| String::from_utf8_lossy(n).into_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(unusable(AuthType::Scram), ["none", "old"]);
    assert_eq!(unusable(AuthType::Md5), ["none"]);
    assert_eq!(unusable(AuthType::Trust), Vec::<String>::new());
}

proptest! {
    #[test]
    fn no_user_file_makes_the_reader_panic(text in "[\"a;#\\\\ \n$:md5SCRAM-]{0,60}", bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = Users::parse(text.as_bytes());
        let _ = Users::parse(&bytes);
    }
}
