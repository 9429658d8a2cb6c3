//! The password exchanges with a client, our side the server's.
//!
//! Invariant: `Ok(None)` is a wrong proof and says nothing about why; messages are read exactly, so that what a client
//! sends behind its login stays in the socket.

use std::sync::Arc;

use bytes::BytesMut;
use subtle::ConstantTimeEq;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::auth::users::{Known, Stored};
use crate::backend::{PassThrough, Password, Secret, md5_hex, md5_stored};
use crate::frame;
use crate::message::{self, Authentication, Malformed};
use crate::report::{Blame, Report, SqlState};
use crate::scram::{Binding, MECHANISM, MECHANISM_PLUS, NONCE_RAW_BYTES, ScramError, ServerExchange, Verifier};
use crate::stream::Stream;
use crate::tls::Acceptor;

/// The longest message of a client that logs in, in bytes: passwords that are tokens have about two thousand.
const MESSAGE_BYTES_MAX: usize = 8192;

/// One client's login.
pub(super) struct Exchange<'a> {
    stream: &'a mut Stream,
    /// Written by the next [`Exchange::send`].
    pub(super) output: BytesMut,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(stream: &'a mut Stream) -> Self {
        Self { stream, output: BytesMut::new() }
    }

    /// Cleartext password.
    pub(super) async fn plain(&mut self, known: &Known, user: &[u8]) -> Result<Option<Secret>, Report> {
        let body = self.ask(&Authentication::Cleartext).await?;
        let password = message::password(&body).map_err(malformed)?;
        match &known.stored {
            Some(Stored::Plain(right)) => {
                let same = bool::from(password.ct_eq(right.text()));
                Ok(same.then(|| Secret::Password(Arc::clone(right))))
            }
            Some(Stored::Md5(digits)) => {
                let right = bool::from(md5_stored(password, user).ct_eq(digits));
                Ok(right.then(|| Secret::Password(Password::new(password))))
            }
            Some(Stored::Scram(verifier)) => accepted(verifier.clone(), password).await,
            Some(Stored::Nothing) | None => accepted(known.mock.clone(), password).await,
        }
    }

    /// PostgreSQL's md5 challenge.
    pub(super) async fn md5(&mut self, known: &Known, user: &[u8]) -> Result<Option<Secret>, Report> {
        let salt = random::<4>()?;
        let body = self.ask(&Authentication::Md5(salt)).await?;
        let answer = message::password(&body).map_err(malformed)?;
        let (digits, secret) = match &known.stored {
            Some(Stored::Plain(password)) => {
                (md5_stored(password.text(), user), Some(Secret::Password(Arc::clone(password))))
            }
            Some(Stored::Md5(digits)) => (*digits, Some(Secret::Md5(*digits))),
            // The verifier case uses SCRAM; the others compare with digits that no password has.
            Some(Stored::Scram(_) | Stored::Nothing) | None => ([b'-'; 32], None),
        };
        let wanted = [b"md5", &md5_hex(&[&digits, &salt])[..]].concat();
        let right = bool::from(answer.ct_eq(&wanted));
        Ok(secret.filter(|_| right))
    }

    /// SCRAM-SHA-256, and SCRAM-SHA-256-PLUS over TLS.
    pub(super) async fn scram(&mut self, known: &Known, acceptor: &Acceptor) -> Result<Option<Secret>, Report> {
        let verifier = self::verifier(known).await?;
        let end_point = acceptor.end_point().filter(|_| self.stream.is_tls());
        // The stronger first, as in PostgreSQL: clients take the first that they know.
        let mechanisms = if end_point.is_some() { vec![MECHANISM_PLUS, MECHANISM] } else { vec![MECHANISM] };
        let first = self.ask(&Authentication::Sasl(mechanisms)).await?;
        let (mechanism, data) = message::sasl_initial_response(&first).map_err(malformed)?;
        let binding = match (mechanism, end_point) {
            (MECHANISM_PLUS, Some(data)) => Binding::EndPoint(data),
            (MECHANISM, Some(_)) => Binding::Declined,
            (MECHANISM, None) => Binding::Impossible,
            (_, _) => {
                return Err(Report::protocol_violation("client selected an invalid SASL authentication mechanism"));
            }
        };
        let client_first = match data {
            Some(data) => data.to_vec(),
            // A client may wait for an empty challenge before its first words.
            None => self.ask(&Authentication::SaslContinue(b"")).await?,
        };
        let nonce = random::<NONCE_RAW_BYTES>()?;
        let exchange = ServerExchange::start(&client_first, verifier.clone(), &nonce, binding).map_err(broken)?;
        let client_final = self.ask(&Authentication::SaslContinue(exchange.server_first())).await?;
        let (server_final, keys) = match exchange.finish(&client_final) {
            Ok(proven) => proven,
            Err(ScramError::WrongProof) => return Ok(None),
            Err(error) => return Err(broken(error)),
        };
        let secret = match &known.stored {
            Some(Stored::Scram(_)) => Secret::Scram(Arc::new(PassThrough { keys, verifier })),
            Some(Stored::Plain(password)) => Secret::Password(Arc::clone(password)),
            // Nobody can prove a mock verifier; were it so, it would still prove nothing.
            Some(Stored::Nothing | Stored::Md5(_)) | None => return Ok(None),
        };
        message::put_authentication(&mut self.output, &Authentication::SaslFinal(&server_final));
        Ok(Some(secret))
    }

    /// Sends a request and reads the client's answer: the body of one message of the password family.
    async fn ask(&mut self, request: &Authentication<'_>) -> Result<Vec<u8>, Report> {
        message::put_authentication(&mut self.output, request);
        self.send().await?;
        let gone = |_| Report::client_gone();
        let mut front = [0; frame::HEADER_BYTES];
        self.stream.read_exact(&mut front).await.map_err(gone)?;
        // The header alone shows an impossible or overlong message.
        frame::next(&front, MESSAGE_BYTES_MAX).map_err(|e| Report::protocol_violation(e.to_string()))?;
        let [tag, length @ ..] = front;
        if tag != b'p' {
            return Err(Report::protocol_violation(format!("expected password response, got message type {tag}")));
        }
        let counted = usize::try_from(u32::from_be_bytes(length)).unwrap_or(MESSAGE_BYTES_MAX);
        let mut body = vec![0; counted.saturating_sub(4)];
        self.stream.read_exact(&mut body).await.map_err(gone)?;
        Ok(body)
    }

    /// Writes what `output` holds.
    pub(super) async fn send(&mut self) -> Result<(), Report> {
        let written = async {
            self.stream.write_all(&self.output).await?;
            self.stream.flush().await
        };
        written.await.map_err(|_| Report::client_gone())?;
        self.output.clear();
        Ok(())
    }
}

/// The verifier that a client has to prove: its own, one made of its plain password, or one that nobody can prove.
async fn verifier(known: &Known) -> Result<Verifier, Report> {
    let mock = &known.mock;
    match &known.stored {
        Some(Stored::Scram(verifier)) => Ok(verifier.clone()),
        Some(Stored::Plain(password)) => {
            let keys = password.keys(&mock.salt, mock.iterations).await.ok_or_else(Report::shutting_down)?;
            Ok(Verifier::of(&keys, &mock.salt, mock.iterations))
        }
        Some(Stored::Nothing | Stored::Md5(_)) | None => Ok(mock.clone()),
    }
}

/// Whether a cleartext password is a verifier's; hashed off the event loop.
async fn accepted(verifier: Verifier, password: &[u8]) -> Result<Option<Secret>, Report> {
    let owned = password.to_vec();
    let keys = tokio::task::spawn_blocking(move || verifier.accepts(&owned)).await;
    let keys = keys.map_err(|_| Report::shutting_down())?;
    Ok(keys.map(|_| Secret::Password(Password::new(password))))
}

fn random<const N: usize>() -> Result<[u8; N], Report> {
    let mut bytes = [0; N];
    match getrandom::fill(&mut bytes) {
        Ok(()) => Ok(bytes),
        Err(_) => Err(Report::internal("the operating system gives no randomness")),
    }
}

fn malformed(error: Malformed) -> Report {
    Report::protocol_violation(error.to_string())
}

fn broken(error: ScramError) -> Report {
    match error {
        ScramError::Unsupported(what) => Report::fatal(SqlState::FEATURE_NOT_SUPPORTED, what, Blame::Client),
        ScramError::Downgraded => Report::fatal(SqlState::INVALID_AUTHORIZATION, error.to_string(), Blame::Client)
            .with_detail(
                "The client supports SCRAM channel binding but thinks the server does not. However, this server does \
                 support channel binding.",
            ),
        ScramError::OtherChannel => Report::fatal(SqlState::INVALID_AUTHORIZATION, error.to_string(), Blame::Client),
        ScramError::Malformed(_)
        | ScramError::WrongProof
        | ScramError::WrongServer
        | ScramError::OtherVerifier
        | ScramError::Refused => Report::protocol_violation(error.to_string()),
    }
}
