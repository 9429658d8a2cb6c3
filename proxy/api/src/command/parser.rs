//! Reads a console command: tokens in, one [`Command`] or an error that names the right form out.
//!
//! Invariant: total and pure; any text gives a value, never a panic, in time linear in its length.

use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use super::COMMAND_BYTES_MAX;
use super::Command;
use super::DriverSetting;
use super::EpochPause;
use super::Mode;
use super::NAME_BYTES_MAX;
use super::OnTimeout;
use super::PauseWith;
use super::PrepareSwitch;
use super::Renew;
use super::ResumeWith;
use super::Scope;
use super::Show;
use super::Shutdown;
use super::Switch;
use super::Table;
use super::VALUE_BYTES_MAX;
use super::Warrant;
use super::lexer::Token;
use super::lexer::tokens;
use crate::epoch::Claim;
use crate::epoch::Epoch;
use crate::epoch::Lease;
use crate::epoch::RunId;

/// Why a text is no command.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GrammarError {
    /// Nothing but blanks, comments and `;`: PostgreSQL answers this with EmptyQueryResponse.
    #[error("the command is empty")]
    Empty,
    /// Anything else.
    #[error("{message}")]
    Wrong {
        /// What is wrong, in words for the one who typed it.
        message: String,
        /// What to type instead: the right form, or a near miss.
        hint: Option<String>,
    },
}

impl GrammarError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self::Wrong { message: message.into(), hint: None }
    }

    /// With a hint, unless it has one.
    pub(super) fn hint(self, advice: impl Into<String>) -> Self {
        match self {
            Self::Wrong { message, hint: None } => Self::Wrong { message, hint: Some(advice.into()) },
            Self::Wrong { hint: Some(_), .. } | Self::Empty => self,
        }
    }
}

/// The right form of every verb.
const FORMS: &[(&str, &str)] = &[
    ("SHOW", "SHOW table; SHOW HELP lists the tables"),
    ("SELECT", "SHOW table; SHOW HELP lists the tables"),
    ("SET", "SET key = value"),
    ("RELOAD", "RELOAD"),
    (
        "PAUSE",
        "PAUSE [db], or PAUSE db WITH (run '…', epoch n, source 'blue', target 'green', drain '2s', \
         on_timeout abort|cancel|terminate, lease '3s', mode all|writes)",
    ),
    ("PREPARE", "PREPARE SWITCH db TO backend [WITH (connections n)]"),
    ("SWITCH", "SWITCH db TO backend WITH (run '…', epoch n) or WITH (force)"),
    ("RESUME", "RESUME [db], or RESUME db WITH (run '…', epoch n) or WITH (force)"),
    ("RENEW", "RENEW db WITH (run '…', epoch n, lease '3s')"),
    ("RECONNECT", "RECONNECT [db]"),
    ("WAIT_CLOSE", "WAIT_CLOSE [db]"),
    ("KILL", "KILL [db]"),
    ("KILL_CLIENT", "KILL_CLIENT id"),
    ("DISABLE", "DISABLE db"),
    ("ENABLE", "ENABLE db"),
    ("SUSPEND", "SUSPEND"),
    ("SHUTDOWN", "SHUTDOWN [WAIT_FOR_SERVERS | WAIT_FOR_CLIENTS]"),
];

/// Reads one command. Keywords in any case, one optional `;`, names with other than letters, digits and `_` in double quotes.
///
/// # Errors
/// [`GrammarError::Empty`] for no command at all; [`GrammarError::Wrong`] with the right form otherwise.
pub fn parse(text: &str) -> Result<Command, GrammarError> {
    if text.len() > COMMAND_BYTES_MAX {
        return Err(GrammarError::new(format!("the command is longer than {COMMAND_BYTES_MAX} bytes")));
    }
    let mut words = Words { tokens: tokens(text)?, next: 0 };
    while words.sign(';') {}
    if words.at_end() {
        return Err(GrammarError::Empty);
    }
    let verb = words.name("a command").map_err(|error| error.hint("SHOW HELP lists the commands"))?;
    let form = FORMS.iter().find(|(known, _)| known.eq_ignore_ascii_case(&verb)).ok_or_else(|| unknown_verb(&verb))?;
    let parsed = command(form.0, &mut words).and_then(|command| words.finish().map(|()| command));
    parsed.map_err(|error| error.hint(format!("the form is: {}", form.1)))
}

fn unknown_verb(verb: &str) -> GrammarError {
    let error = GrammarError::new(format!("{verb:?} is no command of this console"));
    let verbs = FORMS.iter().map(|(verb, _)| *verb).filter(|verb| *verb != "SELECT");
    match nearest(verb, verbs) {
        Some(near) => error.hint(format!("did you mean {near}? SHOW HELP lists the commands")),
        None => error.hint("SHOW HELP lists the commands"),
    }
}

fn command(verb: &str, words: &mut Words) -> Result<Command, GrammarError> {
    Ok(match verb {
        "SHOW" | "SELECT" => Command::Show(show(words)?),
        "SET" => set(words)?,
        "RELOAD" => Command::Reload,
        "PAUSE" => pause(words)?,
        "PREPARE" => Command::PrepareSwitch(prepare_switch(words)?),
        "SWITCH" => Command::Switch(switch(words)?),
        "RESUME" => resume(words)?,
        "RENEW" => Command::Renew(renew(words)?),
        "RECONNECT" => Command::Reconnect(words.scope()?),
        "WAIT_CLOSE" => Command::WaitClose(words.scope()?),
        "KILL" => Command::Kill(words.scope()?),
        "KILL_CLIENT" => Command::KillClient(number(&words.name("a client id")?, "a client id")?),
        "DISABLE" => Command::Disable(words.database()?),
        "ENABLE" => Command::Enable(words.database()?),
        "SUSPEND" => Command::Suspend,
        "SHUTDOWN" => Command::Shutdown(shutdown(words)?),
        other => return Err(unknown_verb(other)),
    })
}

fn show(words: &mut Words) -> Result<Show, GrammarError> {
    let what = words.name("a table")?;
    if what.eq_ignore_ascii_case("BLOCKERS") {
        return words.scope().map(Show::Blockers);
    }
    if let Some(table) = Table::from_word(&what) {
        return Ok(Show::Table(table));
    }
    if let Some(setting) = DriverSetting::from_word(&what) {
        return Ok(Show::Setting(setting));
    }
    let error = GrammarError::new(format!("there is no table {what:?}"));
    let tables = Table::ALL.iter().map(|table| table.word()).chain(["BLOCKERS"]);
    Err(match nearest(&what, tables) {
        Some(near) => error.hint(format!("did you mean SHOW {near}?")),
        None => error.hint("SHOW HELP lists the tables"),
    })
}

fn set(words: &mut Words) -> Result<Command, GrammarError> {
    let key = words.name("a key")?;
    if !words.sign('=') && !words.keyword("TO") {
        return Err(GrammarError::new(format!("expected = or TO after {key:?}")));
    }
    let value = words.value("a value")?;
    if value.len() > VALUE_BYTES_MAX {
        return Err(GrammarError::new(format!("the value is longer than {VALUE_BYTES_MAX} bytes")));
    }
    Ok(Command::Set { key, value })
}

fn shutdown(words: &mut Words) -> Result<Shutdown, GrammarError> {
    if words.at_end() {
        return Ok(Shutdown::Now);
    }
    let how = words.name("what to wait for")?;
    Shutdown::from_word(&how)
        .filter(|how| *how != Shutdown::Now)
        .ok_or_else(|| GrammarError::new(format!("SHUTDOWN cannot {how:?}")))
}

fn pause(words: &mut Words) -> Result<Command, GrammarError> {
    let Scope::Database(database) = words.scope()? else { return Ok(Command::Pause(Scope::All)) };
    let known = &["run", "epoch", "source", "target", "drain", "on_timeout", "lease", "mode"];
    let Some(mut options) = words.options(known)? else { return Ok(Command::Pause(Scope::Database(database))) };
    Ok(Command::PauseWith(PauseWith {
        database,
        epoch: epoch_pause(&mut options)?,
        drain: options.take("drain").map(|value| duration(&value, "drain")).transpose()?,
        on_timeout: options.choice("on_timeout", OnTimeout::from_word, OnTimeout::Abort)?,
        lease: options.lease()?,
        mode: options.choice("mode", Mode::from_word, Mode::All)?,
    }))
}

fn epoch_pause(options: &mut Options) -> Result<Option<EpochPause>, GrammarError> {
    let (claim, source, target) = (options.claim()?, options.take("source"), options.take("target"));
    match (claim, source, target) {
        (None, None, None) => Ok(None),
        (Some(claim), Some(source), Some(target)) => {
            Ok(Some(EpochPause { claim, source: checked_name(source)?, target: checked_name(target)? }))
        }
        (None | Some(_), None | Some(_), None | Some(_)) => {
            Err(GrammarError::new("run, epoch, source and target come together"))
        }
    }
}

fn prepare_switch(words: &mut Words) -> Result<PrepareSwitch, GrammarError> {
    words.expect("SWITCH")?;
    let (database, backend) = words.database_to_backend()?;
    let mut options = words.options(&["connections"])?;
    let connections = options.as_mut().and_then(|options| options.take("connections"));
    let connections = connections.map(|value| number(&value, "connections")).transpose()?;
    Ok(PrepareSwitch { database, backend, connections })
}

fn switch(words: &mut Words) -> Result<Switch, GrammarError> {
    let (database, backend) = words.database_to_backend()?;
    let warrant = words.warrant()?.ok_or_else(|| GrammarError::new("SWITCH needs WITH (…)"))?;
    Ok(Switch { database, backend, warrant })
}

fn resume(words: &mut Words) -> Result<Command, GrammarError> {
    let Scope::Database(database) = words.scope()? else { return Ok(Command::Resume(Scope::All)) };
    Ok(match words.warrant()? {
        Some(warrant) => Command::ResumeWith(ResumeWith { database, warrant }),
        None => Command::Resume(Scope::Database(database)),
    })
}

fn renew(words: &mut Words) -> Result<Renew, GrammarError> {
    let database = words.database()?;
    let needed = || GrammarError::new("RENEW needs WITH (run '…', epoch n, lease '3s')");
    let mut options = words.options(&["run", "epoch", "lease"])?.ok_or_else(needed)?;
    let claim = options.claim()?.ok_or_else(needed)?;
    let lease = options.lease()?.ok_or_else(needed)?;
    Ok(Renew { database, claim, lease })
}

/// The tokens and how far they are read.
struct Words {
    tokens: Vec<Token>,
    next: usize,
}

impl Words {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next)
    }

    /// Nothing is left, or only `;`.
    fn at_end(&self) -> bool {
        self.tokens[self.next..].iter().all(|token| *token == Token::Sign(';'))
    }

    fn finish(&self) -> Result<(), GrammarError> {
        if self.at_end() {
            return Ok(());
        }
        Err(match self.peek() {
            Some(Token::Sign(';')) => GrammarError::new("one command per query").hint("send each command on its own"),
            Some(Token::Bare(word) | Token::Quoted(word) | Token::Text(word)) => {
                GrammarError::new(format!("the command goes on with {word:?}"))
            }
            Some(Token::Sign(sign)) => GrammarError::new(format!("the command goes on with '{sign}'")),
            None => GrammarError::new("the command ends early"),
        })
    }

    fn sign(&mut self, sign: char) -> bool {
        let found = self.peek() == Some(&Token::Sign(sign));
        self.next += usize::from(found);
        found
    }

    fn keyword(&mut self, keyword: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Bare(word)) if word.eq_ignore_ascii_case(keyword));
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, keyword: &str) -> Result<(), GrammarError> {
        if self.keyword(keyword) { Ok(()) } else { Err(GrammarError::new(format!("expected {keyword}"))) }
    }

    /// A word, bare or in double quotes.
    fn name(&mut self, what: &str) -> Result<String, GrammarError> {
        let Some(Token::Bare(name) | Token::Quoted(name)) = self.peek() else {
            return Err(GrammarError::new(format!("expected {what}")));
        };
        let name = checked_name(name.clone())?;
        self.next += 1;
        Ok(name)
    }

    /// A word or a string.
    fn value(&mut self, what: &str) -> Result<String, GrammarError> {
        let Some(Token::Bare(value) | Token::Quoted(value) | Token::Text(value)) = self.peek() else {
            return Err(GrammarError::new(format!("expected {what}")));
        };
        let value = value.clone();
        self.next += 1;
        Ok(value)
    }

    fn database(&mut self) -> Result<String, GrammarError> {
        let reserved = ["WITH", "TO"].iter().find(|word| self.keyword_ahead(word));
        match reserved {
            Some(word) => Err(GrammarError::new(format!("expected a database before {word}"))),
            None => self.name("a database"),
        }
    }

    fn keyword_ahead(&self, keyword: &str) -> bool {
        matches!(self.peek(), Some(Token::Bare(word)) if word.eq_ignore_ascii_case(keyword))
    }

    fn scope(&mut self) -> Result<Scope, GrammarError> {
        if self.at_end() { Ok(Scope::All) } else { self.database().map(Scope::Database) }
    }

    fn database_to_backend(&mut self) -> Result<(String, String), GrammarError> {
        let database = self.database()?;
        self.expect("TO")?;
        Ok((database, self.name("a backend")?))
    }

    /// `WITH (run '…', epoch n)` or `WITH (force)`, if there is a WITH.
    fn warrant(&mut self) -> Result<Option<Warrant>, GrammarError> {
        let Some(mut options) = self.options(&["run", "epoch", "force"])? else { return Ok(None) };
        let forced = options.take("force").is_some();
        match (forced, options.claim()?) {
            (true, None) => Ok(Some(Warrant::Force)),
            (false, Some(claim)) => Ok(Some(Warrant::Claim(claim))),
            (true, Some(_)) => Err(GrammarError::new("either run and epoch, or force")),
            (false, None) => Err(GrammarError::new("WITH needs run and epoch, or force")),
        }
    }

    /// `WITH (name value, …)`, if there is a WITH. Only known names, each once.
    fn options(&mut self, known: &[&'static str]) -> Result<Option<Options>, GrammarError> {
        if !self.keyword("WITH") {
            return Ok(None);
        }
        if !self.sign('(') {
            return Err(GrammarError::new("expected ( after WITH"));
        }
        let mut options = Options(Vec::new());
        loop {
            let name = known_option(&self.name("an option")?, known)?;
            if options.0.iter().any(|(taken, _)| *taken == name) {
                return Err(GrammarError::new(format!("{name} is given twice")));
            }
            // `force` is the one option that is its own value.
            let value = if name == "force" { String::new() } else { self.option_value(name)? };
            options.0.push((name, value));
            if self.sign(')') {
                return Ok(Some(options));
            }
            if !self.sign(',') {
                return Err(GrammarError::new(format!("expected , or ) after {name}")));
            }
        }
    }

    fn option_value(&mut self, name: &str) -> Result<String, GrammarError> {
        self.sign('=');
        self.value(&format!("a value for {name}"))
    }
}

fn known_option(name: &str, known: &[&'static str]) -> Result<&'static str, GrammarError> {
    known.iter().copied().find(|option| option.eq_ignore_ascii_case(name)).ok_or_else(|| {
        let error = GrammarError::new(format!("there is no option {name:?} here"));
        match nearest(name, known.iter().copied()) {
            Some(near) => error.hint(format!("did you mean {near}? the options are: {}", known.join(", "))),
            None => error.hint(format!("the options are: {}", known.join(", "))),
        }
    })
}

/// The options of a WITH that nobody took yet.
struct Options(Vec<(&'static str, String)>);

impl Options {
    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(option, _)| *option == name)?;
        Some(self.0.swap_remove(at).1)
    }

    fn claim(&mut self) -> Result<Option<Claim>, GrammarError> {
        match (self.take("run"), self.take("epoch")) {
            (None, None) => Ok(None),
            (Some(run), Some(epoch)) => Ok(Some(Claim { run: item::<RunId>(&run)?, epoch: item::<Epoch>(&epoch)? })),
            (None, Some(_)) => Err(GrammarError::new("epoch needs run '…' beside it")),
            (Some(_), None) => Err(GrammarError::new("run needs epoch n beside it")),
        }
    }

    fn lease(&mut self) -> Result<Option<Lease>, GrammarError> {
        let Some(value) = self.take("lease") else { return Ok(None) };
        let lease = Lease::try_from(duration(&value, "lease")?);
        lease.map(Some).map_err(|error| GrammarError::new(error.to_string()))
    }

    fn choice<T>(&mut self, name: &str, from_word: fn(&str) -> Option<T>, default: T) -> Result<T, GrammarError> {
        let Some(value) = self.take(name) else { return Ok(default) };
        from_word(&value).ok_or_else(|| GrammarError::new(format!("{name} cannot be {value:?}")))
    }
}

fn item<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, GrammarError> {
    text.parse().map_err(|error: T::Err| GrammarError::new(format!("{text:?}: {error}")))
}

fn number<T: FromStr>(text: &str, what: &str) -> Result<T, GrammarError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = if digits { text.parse().ok() } else { None };
    parsed.ok_or_else(|| GrammarError::new(format!("{what} has to be a whole number, not {text:?}")))
}

/// `2s`, `500ms`, or a plain number of seconds; at most a day, whole milliseconds.
fn duration(text: &str, what: &str) -> Result<Duration, GrammarError> {
    let plain = text.parse::<f64>().ok().map(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let parsed = plain.unwrap_or_else(|| humantime::parse_duration(text).ok());
    let whole = parsed.filter(|duration| *duration <= Lease::MAX).map(|duration| duration.as_millis());
    let millis = whole.and_then(|millis| u64::try_from(millis).ok());
    millis.map(Duration::from_millis).ok_or_else(|| {
        GrammarError::new(format!("{what} has to be a time up to a day such as '2s', '500ms' or 1.5, not {text:?}"))
    })
}

fn checked_name(name: String) -> Result<String, GrammarError> {
    match name.len() {
        0 => Err(GrammarError::new("a name is empty")),
        1..=NAME_BYTES_MAX => Ok(name),
        _ => Err(GrammarError::new(format!("a name is longer than {NAME_BYTES_MAX} bytes"))),
    }
}

/// The known word that a typo most likely meant: at most two edits away, and nearer than another word.
fn nearest<'a>(typed: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let typed = typed.to_ascii_lowercase();
    let distance = |word: &str| strsim::damerau_levenshtein(&typed, &word.to_ascii_lowercase());
    known.map(|word| (distance(word), word)).filter(|(edits, _)| *edits <= 2).min().map(|(_, word)| word)
}
