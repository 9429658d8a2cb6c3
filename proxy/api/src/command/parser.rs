//! Reads a console command: tokens in, one [`Command`] or an error that names the right form out.
//!
//! Invariant: total and pure; any text gives a value, never a panic, in time linear in its length.

mod words;

use thiserror::Error;

use words::{Options, Words, checked_name, duration, nearest, number};

use super::COMMAND_BYTES_MAX;
use super::Command;
use super::DriverSetting;
use super::EpochPause;
use super::Mode;
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
use super::Transplant;
use super::VALUE_BYTES_MAX;
use super::lexer::tokens;

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
    ("TRANSPLANT", "TRANSPLANT db TO backend WITH (run '…', epoch n) or WITH (force)"),
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
        "TRANSPLANT" => Command::Transplant(transplant(words)?),
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

fn transplant(words: &mut Words) -> Result<Transplant, GrammarError> {
    let (database, backend) = words.database_to_backend()?;
    let warrant = words.warrant()?.ok_or_else(|| GrammarError::new("TRANSPLANT needs WITH (…)"))?;
    Ok(Transplant { database, backend, warrant })
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::command::{NAME_BYTES_MAX, Warrant};
    use crate::epoch::{Claim, Epoch, Lease, RunId};

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-zA-Z0-9_]{1,12}",
            "[ -~äß漢]{1,15}",
            Just("with".to_owned()),
            Just("TO".to_owned()),
            Just("a\"b".to_owned()),
            Just("my-db".to_owned()),
        ]
    }

    fn scope() -> impl Strategy<Value = Scope> {
        prop_oneof![Just(Scope::All), name().prop_map(Scope::Database)]
    }

    fn claim() -> impl Strategy<Value = Claim> {
        (any::<u128>(), 0..=i64::MAX as u64).prop_map(|(run, epoch)| Claim {
            run: RunId::from(Uuid::from_u128(run)),
            epoch: Epoch::try_from(epoch).unwrap(),
        })
    }

    fn warrant() -> impl Strategy<Value = Warrant> {
        prop_oneof![claim().prop_map(Warrant::Claim), Just(Warrant::Force)]
    }

    fn span() -> impl Strategy<Value = Duration> {
        (0..=86_400_000_u64).prop_map(Duration::from_millis)
    }

    fn lease() -> impl Strategy<Value = Lease> {
        (1..=86_400_000_u64).prop_map(|millis| Lease::try_from(Duration::from_millis(millis)).unwrap())
    }

    fn any_of<T: Copy + std::fmt::Debug + 'static>(all: &'static [T]) -> impl Strategy<Value = T> {
        prop::sample::select(all)
    }

    fn pause_with() -> impl Strategy<Value = Command> {
        let epoch = (claim(), name(), name()).prop_map(|(claim, source, target)| EpochPause { claim, source, target });
        let (drain, lease) = (prop::option::of(span()), prop::option::of(lease()));
        let parts = (name(), prop::option::of(epoch), drain, any_of(OnTimeout::ALL), lease, any_of(Mode::ALL));
        parts.prop_map(|(database, epoch, drain, on_timeout, lease, mode)| {
            Command::PauseWith(PauseWith { database, epoch, drain, on_timeout, lease, mode })
        })
    }

    fn any_command() -> impl Strategy<Value = Command> {
        let pgbouncers = prop_oneof![
            any_of(Table::ALL).prop_map(|table| Command::Show(Show::Table(table))),
            any_of(DriverSetting::ALL).prop_map(|setting| Command::Show(Show::Setting(setting))),
            scope().prop_map(|scope| Command::Show(Show::Blockers(scope))),
            (name(), "[ -~]{0,40}").prop_map(|(key, value)| Command::Set { key, value }),
            Just(Command::Reload),
            Just(Command::Suspend),
            scope().prop_map(Command::Pause),
            scope().prop_map(Command::Resume),
            scope().prop_map(Command::Reconnect),
            scope().prop_map(Command::WaitClose),
            scope().prop_map(Command::Kill),
            any::<u64>().prop_map(Command::KillClient),
            name().prop_map(Command::Disable),
            name().prop_map(Command::Enable),
            any_of(Shutdown::ALL).prop_map(Command::Shutdown),
        ];
        let ours = prop_oneof![
            pause_with(),
            (name(), name(), prop::option::of(any::<u32>())).prop_map(|(database, backend, connections)| {
                Command::PrepareSwitch(PrepareSwitch { database, backend, connections })
            }),
            (name(), name(), warrant()).prop_map(|(database, backend, warrant)| Command::Switch(Switch {
                database,
                backend,
                warrant
            })),
            (name(), name(), warrant()).prop_map(|(database, backend, warrant)| Command::Transplant(Transplant {
                database,
                backend,
                warrant
            })),
            (name(), warrant()).prop_map(|(database, warrant)| Command::ResumeWith(ResumeWith { database, warrant })),
            (name(), claim(), lease()).prop_map(|(database, claim, lease)| Command::Renew(Renew {
                database,
                claim,
                lease
            })),
        ];
        prop_oneof![pgbouncers, ours]
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_as_the_same_command(command in any_command()) {
            let text = command.to_string();
            prop_assert!(text.len() <= COMMAND_BYTES_MAX);
            prop_assert_eq!(parse(&text), Ok(command.clone()), "{}", &text);
            prop_assert_eq!(parse(&format!("  {text} ; -- done")), Ok(command), "{}", &text);
        }

        #[test]
        fn keywords_have_no_case(upper in any::<bool>()) {
            let fold = |text: &str| if upper { text.to_uppercase() } else { text.to_lowercase() };
            prop_assert_eq!(parse(&fold("show pools")), Ok(Command::Show(Show::Table(Table::Pools))));
            prop_assert_eq!(parse(&fold("Wait_Close")), Ok(Command::WaitClose(Scope::All)));
            prop_assert!(parse(&fold("resume \"x\" with (force)")).is_ok());
        }

        #[test]
        fn any_text_is_a_command_or_an_error(text in any::<String>()) {
            let _ = parse(&text);
        }

        #[test]
        fn any_tokens_are_a_command_or_an_error(
            words in prop::collection::vec(
                prop::sample::select(vec![
                    "PAUSE", "SHOW", "SET", "RESUME", "SWITCH", "PREPARE", "RENEW", "TO", "WITH", "(", ")", ",", "=", ";",
                    "run", "epoch", "lease", "drain", "mode", "writes", "on_timeout", "cancel", "force", "'x'", "\"y\"", "'", "\"", "app", "7", "'2s'", "/*", "*/", "--",
                ]),
                0..12,
            )
        ) {
            let text = words.join(" ");
            if let Ok(command) = parse(&text) {
                prop_assert_eq!(parse(&command.to_string()), Ok(command));
            }
        }
    }

    const RUN: &str = "8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f";

    #[track_caller]
    fn wrong(text: &str) -> (String, String) {
        match parse(text) {
            Err(GrammarError::Wrong { message, hint }) => (message, hint.unwrap_or_default()),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn an_epoch_pause_reads_every_option_in_any_order() {
        let text = format!(
            "pause app with (lease '3s', mode all, on_timeout cancel, drain '1500ms', target green, source 'blue', \
             epoch 7, run '{RUN}');"
        );
        let expected = PauseWith {
            database: "app".to_owned(),
            epoch: Some(EpochPause {
                claim: Claim { run: RUN.parse().unwrap(), epoch: "7".parse().unwrap() },
                source: "blue".to_owned(),
                target: "green".to_owned(),
            }),
            drain: Some(Duration::from_millis(1500)),
            on_timeout: OnTimeout::Cancel,
            lease: Some(Lease::try_from(Duration::from_secs(3)).unwrap()),
            mode: Mode::All,
        };
        assert_eq!(parse(&text), Ok(Command::PauseWith(expected)));
    }

    #[test]
    fn a_plain_number_is_seconds() {
        for (text, millis) in
            [("2", 2000), ("'0.5'", 500), ("1.5", 1500), ("'500ms'", 500), ("'1m 1s'", 61_000), ("0", 0)]
        {
            let Ok(Command::PauseWith(pause)) = parse(&format!("PAUSE app WITH (drain {text})")) else {
                panic!("{text}")
            };
            assert_eq!(pause.drain, Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["'-1'", "'inf'", "'nan'", "''", "'2 parsecs'", "86401", "'1e300'", "'2d'"] {
            let (message, _) = wrong(&format!("PAUSE app WITH (drain {text})"));
            assert!(message.starts_with("drain has to be a time"), "{text}: {message}");
        }
        assert!(wrong("PAUSE app WITH (lease 0)").0.contains("1 ms to 1 day"));
    }

    #[test]
    fn pgbouncers_forms_are_accepted() {
        let database = |name: &str| Scope::Database(name.to_owned());
        let set = |key: &str, value: &str| Command::Set { key: key.to_owned(), value: value.to_owned() };
        for (text, command) in [
            ("SELECT version", Command::Show(Show::Table(Table::Version))),
            ("show \"pools\";", Command::Show(Show::Table(Table::Pools))),
            ("PAUSE \"name-with-dash\" ; ", Command::Pause(database("name-with-dash"))),
            ("PAUSE \"a\"\"b\"", Command::Pause(database("a\"b"))),
            ("PAUSE App", Command::Pause(database("App"))),
            ("SET a=b", set("a", "b")),
            ("SET a TO b", set("a", "b")),
            ("set a = 'it''s'", set("a", "it's")),
            ("SET a=''", set("a", "")),
            ("SHOW DateStyle", Command::Show(Show::Setting(DriverSetting::DateStyle))),
            ("SHUTDOWN wait_for_clients", Command::Shutdown(Shutdown::WaitForClients)),
            ("\n\tKILL_CLIENT 12\r\n", Command::KillClient(12)),
        ] {
            assert_eq!(parse(text), Ok(command), "{text}");
        }
    }

    #[test]
    fn an_empty_command_is_not_a_wrong_one() {
        for text in ["", " ; ", ";;", "-- ping", "/* */"] {
            assert_eq!(parse(text), Err(GrammarError::Empty), "{text:?}");
        }
    }

    #[test]
    fn an_error_names_the_right_form_or_the_near_word() {
        for (text, message, hint) in [
            ("PUASE app", "no command", "PAUSE"),
            ("SHOW POLLS", "no table", "SHOW POOLS"),
            ("SHOW nonsense", "no table", "SHOW HELP"),
            ("frobnicate", "no command", "SHOW HELP"),
            ("PAUSE my-db", "unexpected '-'", "double quotes"),
            ("PAUSE a b", "goes on with \"b\"", "PAUSE [db]"),
            ("RELOAD; RELOAD", "one command per query", "on its own"),
            ("SWITCH app TO green", "needs WITH", "SWITCH db TO backend WITH"),
            ("SWITCH app green", "expected TO", "SWITCH db TO backend WITH"),
            ("SWITCH app TO green WITH (force, epoch 1)", "epoch needs run", "SWITCH db TO"),
            ("RENEW app WITH (epoch 3)", "epoch needs run", "RENEW db WITH"),
            ("RENEW app", "RENEW needs WITH", "RENEW db WITH"),
            ("RESUME app WITH (epcoh 3)", "no option \"epcoh\"", "did you mean epoch"),
            ("RESUME app WITH (force, force)", "force is given twice", "RESUME"),
            ("RESUME WITH (force)", "expected a database", "RESUME"),
            ("PAUSE app WITH ()", "expected an option", "PAUSE"),
            ("PAUSE app WITH (mode some)", "mode cannot be", "PAUSE"),
            ("PAUSE app WITH (source blue)", "come together", "PAUSE"),
            ("PREPARE app TO green", "expected SWITCH", "PREPARE SWITCH db"),
            ("PREPARE SWITCH app TO green WITH (connections -1)", "unexpected '-'", "double quotes"),
            ("PREPARE SWITCH app TO green WITH (connections '99999999999')", "whole number", "PREPARE"),
            ("KILL_CLIENT x", "whole number", "KILL_CLIENT id"),
            ("SHUTDOWN NOW", "cannot", "WAIT_FOR_SERVERS"),
            ("SET a", "expected = or TO", "SET key = value"),
            ("SHOW", "expected a table", "SHOW table"),
            ("'PAUSE'", "expected a command", "SHOW HELP"),
            ("PAUSE \"\"", "a name is empty", "PAUSE"),
            ("PAUSE \"x", "a \" is not closed", ""),
        ] {
            let (said, advice) = wrong(text);
            assert!(said.contains(message), "{text}: {said}");
            assert!(advice.contains(hint), "{text}: {advice}");
        }
    }

    #[test]
    fn lengths_are_bounded() {
        let long = "x".repeat(NAME_BYTES_MAX);
        assert!(parse(&format!("PAUSE {long}")).is_ok());
        assert!(wrong(&format!("PAUSE {long}x")).0.contains("longer than 63"));
        assert!(wrong(&format!("SET a = '{}'", "x".repeat(VALUE_BYTES_MAX + 1))).0.contains("longer than 255"));
        assert!(wrong(&format!("PAUSE /*{}*/", "x".repeat(COMMAND_BYTES_MAX))).0.contains("longer than 4096"));
    }
}
