//! Who the client is: trust, cleartext, md5 and SCRAM against the user file.
//!
//! Invariant: an unknown user and a wrong password take the same path and get the same answer; no slow hash runs on
//! the event loop; nothing behind the message that is asked for is read from the client.

mod exchange;
mod users;

use crate::backend::Secret;
use crate::config::AuthType;
use crate::message::{self, Authentication, Startup};
use crate::report::Report;
use crate::stream::{Peer, Stream};

use exchange::Exchange;
pub use users::{UserFileError, Users};

/// A client that proved who it is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// As bytes, as sent.
    pub user: Box<[u8]>,
    /// What its login taught us: how to log in to servers in its name.
    pub secret: Secret,
}

/// Asks the client to prove who it is, and writes AuthenticationOk. The caller bounds the time; not cancel safe.
///
/// # Errors
/// The [`Report`] to send before closing; nothing of it has been written. [`Report::client_gone`] where there is nobody
/// to send it to.
pub async fn authenticate(
    stream: &mut Stream,
    startup: &Startup,
    method: AuthType,
    users: &Users,
) -> Result<Identity, Report> {
    let mut exchange = Exchange::new(stream);
    // Boxed: only clients that are logging in pay for this future.
    let secret = Box::pin(prove(&mut exchange, startup, method, users)).await?;
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

async fn prove(
    exchange: &mut Exchange<'_>,
    startup: &Startup,
    method: AuthType,
    users: &Users,
) -> Result<Secret, Report> {
    let user = &startup.user;
    let proven = match method {
        AuthType::Trust => return users.secret(user).ok_or_else(|| Report::role_does_not_exist(user)),
        AuthType::Plain => exchange.plain(users, user).await?,
        AuthType::Md5 if users.demands_scram(user) => exchange.scram(users, user).await?,
        AuthType::Md5 => exchange.md5(users, user).await?,
        AuthType::Scram => exchange.scram(users, user).await?,
    };
    proven.ok_or_else(|| Report::password_authentication_failed(user))
}

#[cfg(test)]
mod tests;
