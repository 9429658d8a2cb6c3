//! Our side of a server's login: trust, cleartext, md5, SCRAM with a password or with passed-through keys.
//!
//! Invariant: a SCRAM server has proven that it knows the verifier before its AuthenticationOk counts.

use bytes::Bytes;
use md5::{Digest, Md5};

use crate::backend::dial::{self, Attempt};
use crate::backend::{
    Address, BackendKey, Cleartext, ConnectError, ConnectFailure, Login, PassThrough, Secret, ServerConnection,
};
use crate::message::{self, Authentication, Malformed, PairRef, Protocol};
use crate::report::SqlState;
use crate::scram::{Challenge, ClientExchange, Keys, MECHANISM, NONCE_RAW_BYTES, ScramError};
use crate::stream::Peer;

/// Connects by the address's sslmode and logs in. The caller bounds the time.
pub(super) async fn enter(address: &Address, login: &Login) -> Result<ServerConnection, ConnectError> {
    let (first, second) = dial::attempts(address);
    let stream = match (dial::open(address, None, first).await, second) {
        (Err(error), Some(second)) if error.failure == ConnectFailure::Tls => dial::open(address, None, second).await?,
        (opened, _) => opened?,
    };
    let was_first = stream.is_tls() == (first == Attempt::Tls);
    match (welcome(ServerConnection::fresh(stream), address, login).await, second) {
        // 28000 is pg_hba's answer: this way in is shut, the other one may be open.
        (Err(error), Some(second)) if was_first && error.sqlstate == Some(SqlState::INVALID_AUTHORIZATION) => {
            let stream = dial::open(address, None, second).await?;
            welcome(ServerConnection::fresh(stream), address, login).await
        }
        (entered, _) => entered,
    }
}

/// Logs in over an open stream and reads on to the first ReadyForQuery.
pub(super) async fn welcome(
    mut connection: ServerConnection,
    address: &Address,
    login: &Login,
) -> Result<ServerConnection, ConnectError> {
    let mut pairs: Vec<PairRef<'_>> = vec![(b"user", &login.user), (b"database", &address.dbname)];
    pairs.extend(login.settings.iter().map(|(name, value)| (&**name, &**value)));
    message::put_startup(&mut connection.output, address.protocol, &pairs);
    connection.send().await?;
    authenticate(&mut connection, address, login).await?;
    loop {
        let (tag, body) = connection.next().await?;
        match tag {
            b'Z' => {
                connection.come_to_rest(&body)?;
                return Ok(connection);
            }
            b'S' => connection.learn(&body)?,
            b'K' => {
                let peer = match connection.stream.peer() {
                    Ok(Peer::Tcp(peer)) => Some(peer),
                    Ok(Peer::Unix { uid: _ }) | Err(_) => None,
                };
                connection.key = Some(BackendKey { key: message::backend_key_data(&body).map_err(malformed)?, peer });
            }
            b'N' => {}
            b'E' => return Err(ConnectError::refused(&body)),
            _ => return Err(unexpected(tag)),
        }
    }
}

/// Answers what the server asks until it says AuthenticationOk.
async fn authenticate(connection: &mut ServerConnection, address: &Address, login: &Login) -> Result<(), ConnectError> {
    let request = first_request(connection, address.protocol).await?;
    match message::authentication(&request).map_err(malformed)? {
        Authentication::Ok => return Ok(()),
        Authentication::Cleartext => {
            let text = cleartext(connection, address, login)?;
            message::put_password(&mut connection.output, text);
        }
        Authentication::Md5(salt) => {
            let answer = md5_answer(login, salt)?;
            message::put_password(&mut connection.output, &answer);
        }
        Authentication::Sasl(mechanisms) if mechanisms.contains(&MECHANISM) => {
            prove(connection, login).await?;
        }
        Authentication::Sasl(_) => {
            return Err(lacking("server offers no SASL mechanism that is spoken here (SCRAM-SHA-256)"));
        }
        Authentication::Other(code) => {
            return Err(lacking(format!("server asks for authentication method {code}, which is not spoken here")));
        }
        Authentication::SaslContinue(_) | Authentication::SaslFinal(_) => return Err(unexpected(b'R')),
    }
    connection.send().await?;
    let verdict = self::request(connection).await?;
    match message::authentication(&verdict).map_err(malformed)? {
        Authentication::Ok => Ok(()),
        Authentication::Cleartext
        | Authentication::Md5(_)
        | Authentication::Sasl(_)
        | Authentication::SaslContinue(_)
        | Authentication::SaslFinal(_)
        | Authentication::Other(_) => Err(unexpected(b'R')),
    }
}

/// The first Authentication message. Before it a server may say once that it speaks less than we asked for.
async fn first_request(connection: &mut ServerConnection, asked: Protocol) -> Result<Bytes, ConnectError> {
    if asked == Protocol::V3_0 {
        return request(connection).await;
    }
    loop {
        let (tag, body) = connection.next().await?;
        match tag {
            b'R' => return Ok(body),
            b'E' => return Err(ConnectError::refused(&body)),
            b'N' => {}
            b'v' => {
                let (version, options) = message::negotiate_protocol_version(&body).map_err(malformed)?;
                // We ask for no option, and there is nothing between 3.0 and what we ask for but the burnt 3.1.
                if version != Protocol::V3_0.code() || !options.is_empty() {
                    return Err(unexpected(tag));
                }
                return request(connection).await;
            }
            _ => return Err(unexpected(tag)),
        }
    }
}

/// The next Authentication message; an ErrorResponse ends the login.
async fn request(connection: &mut ServerConnection) -> Result<Bytes, ConnectError> {
    loop {
        let (tag, body) = connection.next().await?;
        match tag {
            b'R' => return Ok(body),
            b'E' => return Err(ConnectError::refused(&body)),
            b'N' => {}
            _ => return Err(unexpected(tag)),
        }
    }
}

fn cleartext<'a>(connection: &ServerConnection, address: &Address, login: &'a Login) -> Result<&'a [u8], ConnectError> {
    let protected = connection.stream.is_tls() || connection.stream.is_unix();
    if !protected && address.cleartext == Cleartext::Protected {
        return Err(lacking("server asks for a cleartext password over an unencrypted connection"));
    }
    match &login.secret {
        Secret::Password(password) => Ok(password.text()),
        Secret::None | Secret::Md5(_) | Secret::Scram(_) => Err(no_password("a password")),
    }
}

/// `md5` and the digest over the stored hash and the salt.
fn md5_answer(login: &Login, salt: [u8; 4]) -> Result<Vec<u8>, ConnectError> {
    let stored = match &login.secret {
        Secret::Password(password) => md5_stored(password.text(), &login.user),
        Secret::Md5(stored) => *stored,
        Secret::None | Secret::Scram(_) => return Err(no_password("an md5 hash")),
    };
    Ok([b"md5", &md5_hex(&[&stored, &salt])[..]].concat())
}

/// The 32 hexadecimal digits that PostgreSQL stores of a password behind `md5`.
pub(crate) fn md5_stored(password: &[u8], user: &[u8]) -> [u8; 32] {
    md5_hex(&[password, user])
}

/// MD5 in 32 lower-case hexadecimal digits.
pub(crate) fn md5_hex(parts: &[&[u8]]) -> [u8; 32] {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let mut hash = Md5::new();
    parts.iter().for_each(|part| hash.update(part));
    let mut hex = [0; 32];
    for (pair, byte) in hex.chunks_exact_mut(2).zip(hash.finalize()) {
        pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
    hex
}

/// The SCRAM exchange, up to and with the server's proof.
async fn prove(connection: &mut ServerConnection, login: &Login) -> Result<(), ConnectError> {
    let mut nonce = [0; NONCE_RAW_BYTES];
    getrandom::fill(&mut nonce).map_err(|e| ConnectError::new(ConnectFailure::Unavailable, e.to_string()))?;
    let exchange = ClientExchange::start(&nonce);
    message::put_sasl_initial_response(&mut connection.output, MECHANISM, exchange.client_first());
    connection.send().await?;

    let request = request(connection).await?;
    let Authentication::SaslContinue(data) = message::authentication(&request).map_err(malformed)? else {
        return Err(unexpected(b'R'));
    };
    let challenge = exchange.challenged(data).map_err(|e| distrusted(&e))?;
    let keys = keys(login, &challenge).await?;
    let (client_final, proven) = challenge.prove(&keys);
    message::put_sasl_response(&mut connection.output, &client_final);
    connection.send().await?;

    let request = self::request(connection).await?;
    let Authentication::SaslFinal(data) = message::authentication(&request).map_err(malformed)? else {
        return Err(unexpected(b'R'));
    };
    proven.verify(data).map_err(|e| distrusted(&e))
}

/// The keys that the server's challenge asks for.
async fn keys(login: &Login, challenge: &Challenge) -> Result<Keys, ConnectError> {
    match &login.secret {
        Secret::Password(password) => password
            .keys(&challenge.salt, challenge.iterations)
            .await
            .ok_or_else(|| ConnectError::new(ConnectFailure::Unavailable, "shutting down")),
        Secret::Scram(pass_through) => passed_through(pass_through, challenge),
        Secret::None | Secret::Md5(_) => Err(no_password("a SCRAM proof")),
    }
}

/// Keys are good for one verifier only; a different one is said before the server says "wrong password".
fn passed_through(known: &PassThrough, challenge: &Challenge) -> Result<Keys, ConnectError> {
    if known.verifier.salt == challenge.salt && known.verifier.iterations == challenge.iterations {
        return Ok(known.keys.clone());
    }
    Err(ConnectError { sqlstate: Some(SqlState::INVALID_PASSWORD), ..lacking(ScramError::OtherVerifier.to_string()) })
}

fn no_password(what: &str) -> ConnectError {
    lacking(format!("server asks for {what}, and what is known of the user can't give one"))
}

/// The login can't go on because of what we are configured with.
fn lacking(message: impl Into<String>) -> ConnectError {
    ConnectError::new(ConnectFailure::Refused, message)
}

fn distrusted(error: &ScramError) -> ConnectError {
    ConnectError::new(ConnectFailure::Protocol, error.to_string())
}

fn malformed(error: Malformed) -> ConnectError {
    ConnectError::new(ConnectFailure::Protocol, error.to_string())
}

fn unexpected(tag: u8) -> ConnectError {
    ConnectError::new(ConnectFailure::Protocol, format!("unexpected message {tag:#04x} of the server during login"))
}
