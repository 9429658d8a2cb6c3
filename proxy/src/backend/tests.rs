//! Servers that misbehave; servers that behave are the end-to-end tests' matter.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::message::{Authentication, put_authentication, put_parameter_status, put_ready_for_query};
use crate::scram::{Binding, NONCE_RAW_BYTES, ServerExchange, Verifier};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn login(secret: Secret) -> Login {
    Login { user: (*b"alice").into(), secret, settings: vec![((*b"a").into(), (*b"b").into())] }
}

fn password() -> Secret {
    Secret::Password(Password::new(*b"pencil"))
}

fn written(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut out = BytesMut::new();
    write(&mut out);
    out.to_vec()
}

/// Reads a client's next message: a startup packet or a typed one.
async fn read(socket: &mut TcpStream, header_bytes: usize) -> Vec<u8> {
    let mut front = vec![0; header_bytes];
    socket.read_exact(&mut front).await.unwrap();
    let length = u32::from_be_bytes(*front.last_chunk().unwrap()) as usize;
    let mut body = vec![0; length - 4];
    socket.read_exact(&mut body).await.unwrap();
    body
}

/// Connects to a server that, after the startup packet, does what `play` says.
async fn against<F: Future<Output = ()>>(
    secret: Secret,
    play: impl FnOnce(TcpStream) -> F,
) -> Result<ServerConnection, ConnectError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address {
        host: "127.0.0.1".into(),
        port: listener.local_addr().unwrap().port(),
        name: None,
        dbname: (*b"app").into(),
        tls: Connector::disabled(),
        protocol: Protocol::V3_0,
        cleartext: Cleartext::Protected,
    };
    let server = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        assert_eq!(read(&mut socket, 4).await, b"\0\x03\0\0user\0alice\0database\0app\0a\0b\0\0");
        play(socket).await;
    };
    let login = login(secret);
    tokio::join!(connect(&address, &login, soon()), server).0
}

/// A server that says these bytes and closes.
async fn saying(secret: Secret, bytes: &[u8]) -> Result<ServerConnection, ConnectError> {
    against(secret, async |mut socket: TcpStream| socket.write_all(bytes).await.unwrap()).await
}

const AUTH_OK: &[u8] = b"R\0\0\0\x08\0\0\0\0";
const READY: &[u8] = b"Z\0\0\0\x05I";

#[tokio::test]
async fn a_welcome_is_read_to_its_end_and_nothing_stays_buffered() {
    let key = CancelKey { pid: 77, secret: [5; 32].into() };
    let mut bytes = BytesMut::new();
    put_authentication(&mut bytes, &Authentication::Ok);
    put_parameter_status(&mut bytes, b"server_version", b"15.1");
    put_parameter_status(&mut bytes, b"TimeZone", b"UTC");
    put_parameter_status(&mut bytes, b"server_version", b"15.2");
    message::put_backend_key_data(&mut bytes, &key);
    put_ready_for_query(&mut bytes, Status::Idle);
    let connection = saying(Secret::None, &bytes).await.unwrap();
    assert_eq!((connection.pid(), connection.rest), (77, Rest::Idle));
    assert_eq!(connection.key.as_ref().unwrap().key, key);
    assert!(connection.key.as_ref().unwrap().peer.is_some());
    assert_eq!(connection.parameter(b"server_version"), Some(&b"15.2"[..]));
    assert_eq!(connection.parameters.len(), 2);
    assert_eq!((connection.input.capacity(), connection.output.capacity()), (0, 0));
}

#[tokio::test]
async fn what_makes_no_sense_is_a_protocol_failure_and_no_panic() {
    let statuses: Vec<u8> = (0..=PARAMETERS_LEN_MAX)
        .flat_map(|n| written(|out| put_parameter_status(out, n.to_string().as_bytes(), b"x")))
        .collect();
    for bytes in [
        &b"R\0\0\0\x03"[..],
        b"R\0\0\0\x06\0\0",
        b"R\x7f\xff\xff\xff\0\0\0\0",
        b"R\0\0\0\x0b\0\0\0\x0br=x",
        b"v\0\0\0\x0c\0\x03\0\0\0\0\0\0",
        b"HTTP/1.1 400 Bad Request",
        b"R\0\0\0\x08\0\0\0\0R\0\0\0\x08\0\0\0\0",
        b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05X",
        b"R\0\0\0\x08\0\0\0\0K\0\0\0\x08\0\0\0\0",
        b"R\0\0\0\x08\0\0\0\0S\0\0\0\x06ab",
        &[AUTH_OK, &statuses, READY].concat(),
    ] {
        let error = saying(Secret::None, bytes).await.unwrap_err();
        assert_eq!(error.failure, ConnectFailure::Protocol, "{:?}: {error}", String::from_utf8_lossy(bytes));
    }
    for bytes in [&b""[..], b"R\0\0", AUTH_OK] {
        assert_eq!(saying(Secret::None, bytes).await.unwrap_err().failure, ConnectFailure::Network);
    }
}

/// CVE-2026-6666's shape: an ErrorResponse without a SQLSTATE.
#[tokio::test]
async fn an_error_without_sqlstate_is_an_error() {
    let error = saying(Secret::None, b"E\0\0\0\x05\0").await.unwrap_err();
    assert_eq!((error.failure, error.sqlstate), (ConnectFailure::Unavailable, None));
    let error = saying(Secret::None, b"E\0\0\0\x13SFATAL\0C28P01\0\0").await.unwrap_err();
    assert_eq!((error.failure, error.blame), (ConnectFailure::Refused, Blame::Operator));
}

#[tokio::test]
async fn failures_are_sorted_by_who_has_to_act() {
    for (code, failure, blame) in [
        ("28000", ConnectFailure::Refused, Blame::Operator),
        ("3D000", ConnectFailure::Refused, Blame::Operator),
        ("42501", ConnectFailure::Refused, Blame::Operator),
        ("53300", ConnectFailure::Unavailable, Blame::Source),
        ("57P03", ConnectFailure::Unavailable, Blame::Source),
    ] {
        let body = format!("SFATAL\0C{code}\0Mwords\0\0");
        let error = ConnectError::refused(body.as_bytes());
        assert_eq!((error.failure, error.blame), (failure, blame), "{code}");
        assert_eq!(error.to_string(), format!("words ({code})"));
    }
    let error = ConnectError::new(ConnectFailure::Network, "x");
    assert_eq!(error.at_target().blame, Blame::Target);
    assert_eq!(ConnectError::new(ConnectFailure::Tls, "x").at_target().blame, Blame::Operator);
}

#[tokio::test]
async fn a_password_does_not_cross_the_network_in_the_clear() {
    let asking = async |mut socket: TcpStream| {
        socket.write_all(&written(|out| put_authentication(out, &Authentication::Cleartext))).await.unwrap();
        let mut sent = Vec::new();
        socket.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent, b"");
    };
    let error = against(password(), asking).await.unwrap_err();
    assert_eq!(error.failure, ConnectFailure::Refused);
    assert!(error.message.contains("unencrypted"), "{error}");
}

#[tokio::test]
async fn a_secret_that_does_not_fit_the_question_is_said_so() {
    let verifier = Verifier::mock(&[0; 32], b"x");
    let keys = Keys { client_key: [0; 32], server_key: [0; 32] };
    let scram = Secret::Scram(Arc::new(PassThrough { keys, verifier }));
    for (secret, question) in [
        (Secret::None, Authentication::Md5([0; 4])),
        (scram, Authentication::Md5([0; 4])),
        (Secret::None, Authentication::Other(7)),
        (password(), Authentication::Sasl(vec![b"OAUTHBEARER"])),
    ] {
        let error = saying(secret, &written(|out| put_authentication(out, &question))).await.unwrap_err();
        assert_eq!((error.failure, error.blame), (ConnectFailure::Refused, Blame::Operator), "{error}");
    }
}

/// What a SCRAM server does after the client's proof.
enum Ending {
    Honest,
    Forged,
    Skipped,
    Refusing,
}

async fn scram_server(mut socket: TcpStream, verifier: Verifier, ending: Ending) {
    let say = |request: &Authentication<'_>| written(|out| put_authentication(out, request));
    let mechanisms = Authentication::Sasl(vec![b"SCRAM-SHA-256-PLUS", scram::MECHANISM]);
    socket.write_all(&say(&mechanisms)).await.unwrap();
    let first = read(&mut socket, 5).await;
    let (_, data) = message::sasl_initial_response(&first).unwrap();
    let exchange = ServerExchange::start(data.unwrap(), verifier, &[3; NONCE_RAW_BYTES], Binding::Impossible).unwrap();
    socket.write_all(&say(&Authentication::SaslContinue(exchange.server_first()))).await.unwrap();
    if matches!(ending, Ending::Refusing) {
        // The client hangs up: these keys are not of this verifier.
        assert_eq!(socket.read(&mut [0; 1]).await.unwrap(), 0);
        return;
    }
    let client_final = read(&mut socket, 5).await;
    let (mut server_final, _) = exchange.finish(&client_final).unwrap();
    if matches!(ending, Ending::Forged) {
        let last = server_final.len() - 2;
        server_final[last] = if server_final[last] == b'A' { b'E' } else { b'A' };
    }
    let proof = say(&Authentication::SaslFinal(&server_final));
    let proof = if matches!(ending, Ending::Skipped) { Vec::new() } else { proof };
    // The client may hang up at any of it.
    let _ = socket.write_all(&[&proof, AUTH_OK, READY].concat()).await;
}

#[tokio::test]
async fn a_scram_server_has_to_prove_itself_before_its_ok_counts() {
    let keys = Keys::derive(b"pencil", b"salt", 4096);
    let verifier = Verifier::of(&keys, b"salt", 4096);
    let against = async |secret: Secret, ending: Ending| {
        let verifier = verifier.clone();
        against(secret, |socket| scram_server(socket, verifier, ending)).await.map(|c| c.rest)
    };
    let passed =
        |verifier: &Verifier| Secret::Scram(Arc::new(PassThrough { keys: keys.clone(), verifier: verifier.clone() }));
    for secret in [password(), passed(&verifier)] {
        assert_eq!(against(secret.clone(), Ending::Honest).await, Ok(Rest::Idle));
        assert_eq!(against(secret.clone(), Ending::Forged).await.unwrap_err().failure, ConnectFailure::Protocol);
        assert_eq!(against(secret, Ending::Skipped).await.unwrap_err().failure, ConnectFailure::Protocol);
    }
    let other = passed(&Verifier::of(&keys, b"pepper", 4096));
    let error = against(other, Ending::Refusing).await.unwrap_err();
    assert_eq!((error.failure, error.sqlstate), (ConnectFailure::Refused, Some(SqlState::INVALID_PASSWORD)));
    assert!(error.message.contains("verifier"), "{error}");
}

#[tokio::test]
async fn a_password_is_hashed_once_for_many_logins() {
    let password = Password::new(*b"pencil");
    let (first, second) = tokio::join!(password.keys(b"salt", 4096), password.keys(b"salt", 4096));
    assert_eq!(first, second);
    assert_eq!(password.derived.lock().await.len(), 1);
    for salt in 0..9u8 {
        password.keys(&[salt], 1).await.unwrap();
    }
    assert_eq!(password.derived.lock().await.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_costs_the_deadline_and_not_more() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address {
        host: "127.0.0.1".into(),
        port: listener.local_addr().unwrap().port(),
        name: None,
        dbname: (*b"app").into(),
        tls: Connector::disabled(),
        protocol: Protocol::V3_0,
        cleartext: Cleartext::Protected,
    };
    let deadline = Instant::now() + Duration::from_secs(15);
    let error = connect(&address, &login(Secret::None), deadline).await.unwrap_err();
    assert_eq!(error.failure, ConnectFailure::Timeout);
    assert_eq!(Instant::now(), deadline);
}

/// A connection at rest, and the server's end of it.
async fn at_rest() -> (ServerConnection, TcpStream) {
    let (give, take) = tokio::sync::oneshot::channel();
    let connection = against(Secret::None, async |mut socket: TcpStream| {
        socket.write_all(&[AUTH_OK, READY].concat()).await.unwrap();
        give.send(socket).unwrap();
    });
    (connection.await.unwrap(), take.await.unwrap())
}

#[tokio::test]
async fn answers_that_make_no_sense_break_the_connection() {
    for (answer, said) in [
        (&b"D\0\0\0\x07\0\x01\0"[..], "DataRow"),
        (b"G\0\0\0\x07\0\0\0", "0x47"),
        (b"Z\0\0\0\x05?", "ReadyForQuery"),
        (b"E\0\0\0\x1fSFATAL\0C57P01\0Mgoing down\0\0", "going down (57P01)"),
        (b"", "closed the connection"),
    ] {
        let (mut connection, mut socket) = at_rest().await;
        let answering = async {
            read(&mut socket, 5).await;
            socket.write_all(answer).await.unwrap();
            drop(socket);
        };
        let (outcome, ()) = tokio::join!(connection.simple("SELECT", soon()), answering);
        let Err(ServerError::Broken(message)) = outcome else { panic!("{outcome:?}") };
        assert!(message.contains(said), "{message}");
        assert_eq!(connection.rest, Rest::Busy);
        assert!(matches!(connection.simple("SELECT", soon()).await, Err(ServerError::Broken(_))));
    }
}

#[tokio::test]
async fn an_answer_that_does_not_come_leaves_the_connection_busy() {
    let (mut connection, _socket) = at_rest().await;
    let outcome = connection.query("SELECT", &[], Instant::now() + Duration::from_millis(20)).await;
    assert_eq!((outcome, connection.rest), (Err(ServerError::Timeout), Rest::Busy));
}
