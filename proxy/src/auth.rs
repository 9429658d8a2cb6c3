//! Who the client is: trust, cleartext, md5 and SCRAM against what is known of the user, or its certificate.
//!
//! What is known is in the user file, or asked of a server by `auth_query` for users that the file does not name.
//!
//! Invariant: nothing that a client says goes into that question but its name, as a parameter; an unknown user and a
//! wrong password take the same path and get the same answer; no slow hash runs on the event loop; nothing behind the
//! message that is asked for is read from the client.

mod exchange;
mod lookup;
mod users;

use crate::backend::Secret;
use crate::certificate;
use crate::config::AuthType;
use crate::message::{self, Authentication, Startup};
use crate::report::{Blame, Report, SqlState};
use crate::stream::{Peer, Stream};
use crate::tls::Acceptor;

use exchange::Exchange;
pub use lookup::Lookup;
use users::Known;
pub use users::{UserFileError, Users};

/// A client that proved who it is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// As bytes, as sent.
    pub user: Box<[u8]>,
    /// What its login taught us: how to log in to servers in its name.
    pub secret: Secret,
}

/// What a client is measured by.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// `auth_type`.
    pub method: AuthType,
    /// What is known of users.
    pub users: &'a Users,
    /// Where the others are looked up; `None`: nowhere.
    pub lookup: Option<&'a Lookup>,
    /// The side of TLS that has greeted this client.
    pub acceptor: &'a Acceptor,
}

/// Asks the client to prove who it is, and writes AuthenticationOk. The caller bounds the time; not cancel safe.
///
/// # Errors
/// The [`Report`] to send before closing; nothing of it has been written. [`Report::client_gone`] where there is nobody
/// to send it to.
pub async fn authenticate(stream: &mut Stream, startup: &Startup, terms: Terms<'_>) -> Result<Identity, Report> {
    let user = &*startup.user;
    certified(stream, user, terms)?;
    // Boxed: only clients that are logging in pay for these futures.
    let known = match terms.lookup.filter(|_| !terms.users.contains(user)) {
        Some(lookup) => Box::pin(lookup.known(terms.users, user)).await?,
        None => terms.users.known(user),
    };
    let mut exchange = Exchange::new(stream);
    let secret = Box::pin(prove(&mut exchange, &known, user, terms)).await?;
    message::put_authentication(&mut exchange.output, &Authentication::Ok);
    exchange.send().await?;
    Ok(Identity { user: startup.user.clone(), secret })
}

/// Whether the peer is a process of our own user on this machine: the admin console's password-less way in.
#[must_use]
pub fn is_own_process(peer: Peer) -> bool {
    match peer {
        Peer::Unix { uid } => uid == Some(nix::unistd::geteuid().as_raw()),
        Peer::Tcp(_) => false,
    }
}

/// Writes AuthenticationOk for a client that needs no proof ([`is_own_process`]).
///
/// # Errors
/// [`Report::client_gone`].
pub async fn welcome_own_process(stream: &mut Stream) -> Result<(), Report> {
    let mut exchange = Exchange::new(stream);
    message::put_authentication(&mut exchange.output, &Authentication::Ok);
    exchange.send().await
}

/// Where a certificate is demanded that names the user: `auth_type = cert`, and TLS under `verify-full`. The TLS
/// handshake has checked it; that it names the user, byte for byte, is checked here.
fn certified(stream: &Stream, user: &[u8], terms: Terms<'_>) -> Result<(), Report> {
    let demanded = terms.method == AuthType::Cert || (terms.acceptor.names_user() && stream.is_tls());
    if !demanded {
        return Ok(());
    }
    let chain = match stream {
        Stream::TlsServer(tls) => tls.get_ref().1.peer_certificates().unwrap_or_default(),
        Stream::Tcp(_) | Stream::Unix(_) | Stream::TlsClient(_) => &[],
    };
    let Some(own) = chain.first() else {
        let message = "connection requires a valid client certificate";
        return Err(Report::fatal(SqlState::INVALID_AUTHORIZATION, message, Blame::Client));
    };
    match certificate::common_name(own) {
        Some(name) if name == user => Ok(()),
        Some(_) | None => Err(Report::certificate_authentication_failed(user)),
    }
}

async fn prove(exchange: &mut Exchange<'_>, known: &Known, user: &[u8], terms: Terms<'_>) -> Result<Secret, Report> {
    let proven = match terms.method {
        AuthType::Trust | AuthType::Cert => return known.secret().ok_or_else(|| Report::role_does_not_exist(user)),
        AuthType::Plain => exchange.plain(known, user).await?,
        AuthType::Md5 if known.demands_scram() => exchange.scram(known, terms.acceptor).await?,
        AuthType::Md5 => exchange.md5(known, user).await?,
        AuthType::Scram => exchange.scram(known, terms.acceptor).await?,
    };
    proven.ok_or_else(|| Report::password_authentication_failed(user))
}

#[cfg(test)]
mod tests;
