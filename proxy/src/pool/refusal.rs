//! What a client is told that gets no server connection.
//!
//! Invariant: a server's own refusal is passed on; nothing else tells where servers are.

use crate::backend::{ConnectError, ConnectFailure};
use crate::pool::NoServer;
use crate::report::{Report, SqlState};

/// What a client is told: the server's own refusal if it refused the user, what we lack to log in as the user, else
/// only that there is no server.
pub(super) fn no_server(database: &str, error: &ConnectError) -> Report {
    match (error.failure, error.sqlstate) {
        (ConnectFailure::Refused, Some(sqlstate)) => Report::fatal(sqlstate, error.message.clone(), error.blame),
        (ConnectFailure::Refused, None) => {
            let message = format!("the proxy can't log in for this user: {}", error.message);
            Report::fatal(SqlState::INVALID_AUTHORIZATION, message, error.blame).with_hint(
                "Give the user a password that this server takes (auth_file), or let the server trust the proxy.",
            )
        }
        (
            ConnectFailure::Network
            | ConnectFailure::Tls
            | ConnectFailure::Unavailable
            | ConnectFailure::Protocol
            | ConnectFailure::Timeout,
            _,
        ) => Report::server_unavailable(database.as_bytes()),
    }
}

pub(super) fn refused(report: Report) -> NoServer {
    NoServer::Refused(Box::new(report))
}
