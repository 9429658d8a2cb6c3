//! Prints a command in its one canonical form.
//!
//! Invariant: whatever is printed parses back to the same value; every name that is not a plain word is quoted.

use std::fmt;
use std::fmt::Formatter;
use std::time::Duration;

use super::Command;
use super::PauseWith;
use super::Scope;
use super::Show;
use super::Shutdown;
use super::Warrant;
use super::lexer::is_plain;

pub(super) fn command(command: &Command, f: &mut Formatter<'_>) -> fmt::Result {
    let verb = command.verb();
    match command {
        Command::Show(show) => self::show(show, f),
        Command::Set { key, value } => write!(f, "SET {} = {}", Name(key), Text(value)),
        Command::Reload | Command::Suspend => f.write_str(verb),
        Command::Pause(scope)
        | Command::Resume(scope)
        | Command::Reconnect(scope)
        | Command::WaitClose(scope)
        | Command::Kill(scope) => with_scope(verb, scope, f),
        Command::PauseWith(pause) => pause_with(pause, f),
        Command::PrepareSwitch(prepare) => {
            write!(f, "PREPARE SWITCH {} TO {}", Name(&prepare.database), Name(&prepare.backend))?;
            prepare.connections.map_or(Ok(()), |count| write!(f, " WITH (connections {count})"))
        }
        Command::Switch(switch) => {
            let (database, backend) = (Name(&switch.database), Name(&switch.backend));
            write!(f, "SWITCH {database} TO {backend} WITH ({})", switch.warrant)
        }
        Command::Transplant(transplant) => {
            let (database, backend) = (Name(&transplant.database), Name(&transplant.backend));
            write!(f, "TRANSPLANT {database} TO {backend} WITH ({})", transplant.warrant)
        }
        Command::ResumeWith(resume) => write!(f, "RESUME {} WITH ({})", Name(&resume.database), resume.warrant),
        Command::Renew(renew) => {
            let (warrant, lease) = (Warrant::Claim(renew.claim), Span(renew.lease.duration()));
            write!(f, "RENEW {} WITH ({warrant}, lease {lease})", Name(&renew.database))
        }
        Command::KillClient(id) => write!(f, "{verb} {id}"),
        Command::Disable(database) | Command::Enable(database) => write!(f, "{verb} {}", Name(database)),
        Command::Shutdown(Shutdown::Now) => f.write_str(verb),
        Command::Shutdown(how) => write!(f, "{verb} {how}"),
    }
}

fn show(show: &Show, f: &mut Formatter<'_>) -> fmt::Result {
    match show {
        Show::Table(table) => write!(f, "SHOW {table}"),
        Show::Setting(setting) => write!(f, "SHOW {setting}"),
        Show::Blockers(scope) => with_scope("SHOW BLOCKERS", scope, f),
    }
}

fn with_scope(words: &str, scope: &Scope, f: &mut Formatter<'_>) -> fmt::Result {
    match scope {
        Scope::All => f.write_str(words),
        Scope::Database(name) => write!(f, "{words} {}", Name(name)),
    }
}

fn pause_with(pause: &PauseWith, f: &mut Formatter<'_>) -> fmt::Result {
    write!(f, "PAUSE {} WITH (", Name(&pause.database))?;
    if let Some(epoch) = &pause.epoch {
        let (source, target) = (Text(&epoch.source), Text(&epoch.target));
        write!(f, "{}, source {source}, target {target}, ", Warrant::Claim(epoch.claim))?;
    }
    if let Some(drain) = pause.drain {
        write!(f, "drain {}, ", Span(drain))?;
    }
    if let Some(lease) = pause.lease {
        write!(f, "lease {}, ", Span(lease.duration()))?;
    }
    write!(f, "on_timeout {}, mode {})", pause.on_timeout, pause.mode)
}

impl fmt::Display for Warrant {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim(claim) => write!(f, "run '{}', epoch {}", claim.run, claim.epoch),
            Self::Force => f.write_str("force"),
        }
    }
}

/// A name, quoted unless it is a plain word.
struct Name<'a>(&'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if is_plain(self.0) && !is_reserved(self.0) {
            f.write_str(self.0)
        } else {
            write!(f, "\"{}\"", self.0.replace('"', "\"\""))
        }
    }
}

/// Words that end a name when they stand bare.
fn is_reserved(word: &str) -> bool {
    ["with", "to"].iter().any(|reserved| reserved.eq_ignore_ascii_case(word))
}

/// A string in single quotes.
struct Text<'a>(&'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0.replace('\'', "''"))
    }
}

/// A duration in humantime's words, quoted.
struct Span(Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", humantime::format_duration(self.0))
    }
}
