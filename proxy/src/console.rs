//! The admin console: PgBouncer's commands and ours, on the PostgreSQL wire.
//!
//! Invariant: a command is answered once, to the connection that sent it, and waits for nobody else's; what it does, it
//! does through [`Admin`]. A console that leaves or cancels while its PAUSE waits drops that wait, which by
//! [`Admin::pause`] undoes the pause it began.

use std::future::{Future, pending};
use std::io;
use std::sync::Arc;

use pgcutover_api::command::{self, Command, DriverSetting, GrammarError, Show, Table};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::message::CancelKey;
use crate::report::{Blame, Report, SqlState};

mod admin;
mod desk;
mod orders;
mod readings;
mod tables;
#[cfg(test)]
mod tests;

pub use admin::{
    Admin, Census, ClientState, DatabaseRow, DnsRow, Forwards, LoginState, Peer, PoolRow, Refusal, ServerState,
    SettingRow, SocketRow, SocketState, UserRow, Visitor, Why,
};
pub use readings::readings;

use desk::{Desk, Request};
use orders::Answer;

/// The version as drivers see it: ours with PgBouncer's ending, by which tools know a console.
const SERVER_VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "/bouncer");

/// What a visitor may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// Everything (`admin_users`).
    Admin,
    /// SHOW only (`stats_users`).
    Stats,
}

/// One authenticated visit to the console.
#[derive(Debug, Clone)]
pub struct Visit {
    /// Who.
    pub visitor: Visitor,
    /// With which rights.
    pub authority: Authority,
    /// The key for its cancel requests.
    pub key: CancelKey,
    /// Rung (`notify_waiters`) when a cancel request with that key came. One that comes while nothing waits is lost, as in
    /// PostgreSQL.
    pub cancels: Arc<Notify>,
    /// Ends the visit: SHUTDOWN, KILL_CLIENT. A command that does not wait is finished first.
    pub closing: CancellationToken,
}

/// Serves a visitor who has read AuthenticationOk, from the welcome parameters to the end of the stream.
///
/// Extended-protocol messages get one ERROR and are skipped to the next Sync; anything that is no message of the protocol
/// gets a FATAL and ends the visit.
///
/// # Errors
/// The stream broke, or the visitor did not read an answer in time.
pub async fn serve<S, A>(stream: S, visit: &Visit, admin: &A) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    A: Admin,
{
    let mut desk = Desk::new(stream);
    desk.welcome(&visit.key).await?;
    while let Some(request) = next(&mut desk, visit).await? {
        match request {
            Request::Query(text) => {
                let Some(answer) = answered(&text, &mut desk, visit, admin).await else { return Ok(()) };
                desk.answer(answer).await?;
            }
            Request::Extended => desk.refuse(&extended_protocol()).await?,
            Request::FunctionCall => desk.answer(Err(extended_protocol())).await?,
            Request::Sync => desk.ready().await?,
            Request::Broken(report) => return desk.refuse(&report).await,
        }
        if visit.closing.is_cancelled() {
            return desk.refuse(&Report::admin_shutdown()).await;
        }
    }
    Ok(())
}

/// The next request; `None` when the visitor left. Cancel safe: bytes read so far stay in the desk.
async fn next<S>(desk: &mut Desk<S>, visit: &Visit) -> io::Result<Option<Request>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    // No limit on the wait: the visitor or the closing token ends it.
    tokio::select! {
        () = visit.closing.cancelled() => Ok(Some(Request::Broken(Report::admin_shutdown()))),
        request = desk.request() => request,
    }
}

/// What a query is answered with; `None` when the visitor left while it waited.
async fn answered<S, A>(text: &[u8], desk: &mut Desk<S>, visit: &Visit, admin: &A) -> Option<Result<Answer, Report>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    A: Admin,
{
    let command = match authorised(text, visit.authority) {
        Ok(Some(command)) => command,
        Ok(None) => return Some(Ok(Answer::Nothing)),
        Err(report) => return Some(Err(report)),
    };
    if !matches!(command, Command::Show(_)) {
        tracing::info!(by = %visit.visitor, %command, "console command");
    }
    let answer = attended(&command, desk, visit, admin).await;
    match &answer {
        Some(Ok(_)) => {}
        Some(Err(report)) => tracing::warn!(by = %visit.visitor, %command, %report, "console command failed"),
        None => tracing::warn!(by = %visit.visitor, %command, "the admin left while the command waited"),
    }
    answer
}

/// Carries the command out while watching for a cancel request, a hang-up and the end of the visit, if it is one that waits.
/// One that does not wait is never dropped half done.
async fn attended<S, A>(
    command: &Command,
    desk: &mut Desk<S>,
    visit: &Visit,
    admin: &A,
) -> Option<Result<Answer, Report>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    A: Admin,
{
    let watched = waits(command);
    tokio::select! {
        biased;
        answer = orders::carry_out(command, &visit.visitor, admin) => Some(answer),
        () = only_if(watched, visit.cancels.notified()) => Some(Err(cancelled(command))),
        () = only_if(watched, visit.closing.cancelled()) => Some(Err(Report::admin_shutdown())),
        () = only_if(watched, desk.hung_up()) => None,
    }
}

async fn only_if(watched: bool, event: impl Future<Output = ()>) {
    if watched { event.await } else { pending().await }
}

/// Whether a command waits for something outside this process for as long as it takes.
fn waits(command: &Command) -> bool {
    matches!(command, Command::Pause(_) | Command::PauseWith(_) | Command::WaitClose(_) | Command::PrepareSwitch(_))
}

/// The command, if the visitor may give it; `None` for an empty query.
fn authorised(text: &[u8], authority: Authority) -> Result<Option<Command>, Report> {
    let text = std::str::from_utf8(text)
        .map_err(|_| Report::error(SqlState::SYNTAX_ERROR, "the command is not UTF-8", Blame::Client))?;
    let command = match command::parse(text) {
        Ok(command) => command,
        Err(GrammarError::Empty) => return Ok(None),
        Err(GrammarError::Wrong { message, hint }) => {
            let report = Report::error(SqlState::SYNTAX_ERROR, message, Blame::Client);
            return Err(Report { hint: hint.map(Into::into), ..report });
        }
    };
    let allowed = authority == Authority::Admin || is_harmless(&command);
    if allowed { Ok(Some(command)) } else { Err(not_allowed(&command)) }
}

/// What statistics users may do: SHOW, and what their drivers SET on connecting, which does nothing.
fn is_harmless(command: &Command) -> bool {
    match command {
        Command::Show(Show::Table(Table::Fds)) => false,
        Command::Show(_) => true,
        Command::Set { key, .. } => DriverSetting::from_word(key).is_some(),
        Command::Reload
        | Command::Pause(_)
        | Command::PauseWith(_)
        | Command::PrepareSwitch(_)
        | Command::Switch(_)
        | Command::Transplant(_)
        | Command::Resume(_)
        | Command::ResumeWith(_)
        | Command::Renew(_)
        | Command::Reconnect(_)
        | Command::WaitClose(_)
        | Command::Kill(_)
        | Command::KillClient(_)
        | Command::Disable(_)
        | Command::Enable(_)
        | Command::Suspend
        | Command::Shutdown(_) => false,
    }
}

fn not_allowed(command: &Command) -> Report {
    let message = format!("admin access needed for {}", command.verb());
    Report::error(SqlState::INSUFFICIENT_PRIVILEGE, message, Blame::Client)
        .with_hint("users in stats_users may only SHOW; admin_users may do this")
}

fn cancelled(command: &Command) -> Report {
    let report = Report::query_canceled();
    if matches!(command, Command::PauseWith(pause) if pause.epoch.is_some()) {
        report.with_detail("the pause stays: its epoch has to be decided; RESUME or SWITCH of its run ends it")
    } else if matches!(command, Command::Pause(_) | Command::PauseWith(_)) {
        report.with_detail("the pause that this command began was undone")
    } else {
        report
    }
}

fn extended_protocol() -> Report {
    let message = "extended query protocol not supported by admin console";
    Report::error(SqlState::FEATURE_NOT_SUPPORTED, message, Blame::Client)
        .with_hint("send simple queries: psql does, pgjdbc does with preferQueryMode=simple")
}
