//! Carries a command out: one verb of [`Admin`], one answer.
//!
//! Invariant: every command is named here; a failure is told with the SQLSTATE of whoever's verb it was.

use pgcutover_api::command::{Command, DriverSetting, Show, Table};
use pgcutover_api::rows::YesNo;

use super::admin::{Admin, Refusal, Visitor, Why};
use super::tables::{self, Sheet};
use crate::report::{Report, SqlState};

/// What a command is answered with, before ReadyForQuery.
#[derive(Debug)]
pub(super) enum Answer {
    /// The query was empty.
    Nothing,
    /// The tag.
    Done(String),
    /// A notice and the tag.
    Told(Report, String),
    /// A table and the tag.
    Rows(Sheet, String),
}

/// Cancel safe as far as the verb of [`Admin`] behind it says.
pub(super) async fn carry_out<A: Admin>(command: &Command, by: &Visitor, admin: &A) -> Result<Answer, Report> {
    act(command, by, admin).await.map_err(|refusal| {
        let sqlstate = sqlstate(command, refusal.why);
        refusal.into_report(sqlstate)
    })
}

async fn act<A: Admin>(command: &Command, by: &Visitor, admin: &A) -> Result<Answer, Refusal> {
    match command {
        Command::Show(show) => return self::show(show, admin).await,
        Command::PrepareSwitch(prepare) => {
            let rows = admin.prepare(prepare.clone()).await?;
            return Ok(Answer::Rows(Sheet::of(&rows), command.tag()));
        }
        Command::Transplant(transplant) => {
            let rows = admin.transplant(transplant.clone()).await?;
            return Ok(Answer::Rows(Sheet::of(&rows), command.tag()));
        }
        Command::Set { key, .. } if DriverSetting::from_word(key).is_some() => {
            return Ok(Answer::Told(Report::notice("SET ignored"), "SET".to_owned()));
        }
        Command::Pause(scope) => admin.pause(by, scope.clone()).await,
        Command::PauseWith(pause) => admin.pause_with(by, pause.clone()).await,
        Command::Resume(scope) => admin.resume(scope.clone()).await,
        Command::ResumeWith(resume) => admin.resume_with(resume.clone()).await,
        Command::Switch(switch) => admin.switch(switch.clone()).await,
        Command::Renew(renew) => admin.renew(renew.clone()).await,
        Command::Reconnect(scope) => admin.reconnect(scope.clone()).await,
        Command::WaitClose(scope) => admin.wait_close(scope.clone()).await,
        Command::Kill(scope) => admin.kill(by, scope.clone()).await,
        Command::KillClient(id) => admin.kill_client(*id).await,
        Command::Disable(database) => admin.set_admits(database, YesNo::No).await,
        Command::Enable(database) => admin.set_admits(database, YesNo::Yes).await,
        Command::Reload => admin.reload().await,
        Command::Set { key, value } => admin.set(key, value).await,
        Command::Shutdown(how) => admin.shutdown(*how).await,
        Command::Suspend => Err(no_suspend()),
    }?;
    Ok(Answer::Done(command.tag()))
}

async fn show<A: Admin>(show: &Show, admin: &A) -> Result<Answer, Refusal> {
    let sheet = match show {
        Show::Table(Table::Help) => return Ok(Answer::Told(help(), "SHOW".to_owned())),
        Show::Table(Table::Fds) => return Err(no_fds()),
        Show::Table(table) => tables::table(*table, admin).await,
        Show::Blockers(scope) => Sheet::of(&admin.blockers(scope.clone()).await?),
        Show::Setting(setting) => tables::setting(*setting),
    };
    Ok(Answer::Rows(sheet, "SHOW".to_owned()))
}

/// PgBouncer's verbs fail with PgBouncer's code, ours with PostgreSQL's.
fn sqlstate(command: &Command, why: Why) -> SqlState {
    match why {
        Why::NotHere => SqlState::FEATURE_NOT_SUPPORTED,
        Why::Failed if *command == Command::Reload => SqlState::parse(b"F0000").unwrap_or(SqlState::WRONG_STATE),
        Why::Unknown | Why::WrongState | Why::NotDrained | Why::Undecided | Why::Failed if command.is_pgbouncers() => {
            SqlState::PROTOCOL_VIOLATION
        }
        Why::Unknown => SqlState::UNDEFINED_OBJECT,
        Why::WrongState | Why::Failed => SqlState::WRONG_STATE,
        Why::NotDrained => SqlState::NOT_AVAILABLE_IN_TIME,
        Why::Undecided => SqlState::CANNOT_CONNECT_NOW,
    }
}

fn no_suspend() -> Refusal {
    Refusal::new(Why::NotHere, "SUSPEND is not available: this proxy hands its sockets to nobody")
        .with_hint("PAUSE holds new transactions; a restart needs SHUTDOWN WAIT_FOR_CLIENTS")
}

fn no_fds() -> Refusal {
    Refusal::new(Why::NotHere, "SHOW FDS is not available: it would show keys and passwords")
        .with_hint("SHOW SOCKETS has the rest")
}

fn help() -> Report {
    Report::notice("Console usage").with_detail(format!(
        "\n\tSHOW {}|BLOCKERS [<db>]\n{}",
        Table::ALL.iter().map(|table| table.word()).collect::<Vec<_>>().join("|"),
        USAGE
    ))
}

/// The verbs beside SHOW.
const USAGE: &str = "\tSET key = arg
\tRELOAD
\tPAUSE [<db>]
\tPAUSE <db> WITH (run '…', epoch n, source 'blue', target 'green', drain '2s', on_timeout abort|cancel|terminate, lease '3s')
\tPAUSE <db> WITH (mode writes, drain '2s', on_timeout abort|cancel|terminate, lease '10m')
\tRESUME [<db>]
\tRESUME <db> WITH (run '…', epoch n | force)
\tRENEW <db> WITH (run '…', epoch n, lease '3s')
\tPREPARE SWITCH <db> TO <backend> [WITH (connections n)]
\tTRANSPLANT <db> TO <backend> WITH (run '…', epoch n | force)
\tSWITCH <db> TO <backend> WITH (run '…', epoch n | force)
\tDISABLE <db>
\tENABLE <db>
\tRECONNECT [<db>]
\tWAIT_CLOSE [<db>]
\tKILL [<db>]
\tKILL_CLIENT <client_id>
\tSHUTDOWN
\tSHUTDOWN WAIT_FOR_SERVERS|WAIT_FOR_CLIENTS";
