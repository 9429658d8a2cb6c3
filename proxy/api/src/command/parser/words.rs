//! What a console command is made of: words, names, values and the options of a WITH, taken one after the other.
//!
//! Invariant: a word is taken once and in its turn; what is not there gives an error that names what was expected.

use std::str::FromStr;
use std::time::Duration;

use crate::command::lexer::Token;
use crate::command::parser::GrammarError;
use crate::command::{NAME_BYTES_MAX, Scope, Warrant};
use crate::epoch::{Claim, Epoch, Lease, RunId};

/// The tokens and how far they are read.
pub(super) struct Words {
    pub(super) tokens: Vec<Token>,
    pub(super) next: usize,
}

impl Words {
    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next)
    }

    /// Nothing is left, or only `;`.
    pub(super) fn at_end(&self) -> bool {
        self.tokens[self.next..].iter().all(|token| *token == Token::Sign(';'))
    }

    pub(super) fn finish(&self) -> Result<(), GrammarError> {
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

    pub(super) fn sign(&mut self, sign: char) -> bool {
        let found = self.peek() == Some(&Token::Sign(sign));
        self.next += usize::from(found);
        found
    }

    pub(super) fn keyword(&mut self, keyword: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Bare(word)) if word.eq_ignore_ascii_case(keyword));
        self.next += usize::from(found);
        found
    }

    pub(super) fn expect(&mut self, keyword: &str) -> Result<(), GrammarError> {
        if self.keyword(keyword) { Ok(()) } else { Err(GrammarError::new(format!("expected {keyword}"))) }
    }

    /// A word, bare or in double quotes.
    pub(super) fn name(&mut self, what: &str) -> Result<String, GrammarError> {
        let Some(Token::Bare(name) | Token::Quoted(name)) = self.peek() else {
            return Err(GrammarError::new(format!("expected {what}")));
        };
        let name = checked_name(name.clone())?;
        self.next += 1;
        Ok(name)
    }

    /// A word or a string.
    pub(super) fn value(&mut self, what: &str) -> Result<String, GrammarError> {
        let Some(Token::Bare(value) | Token::Quoted(value) | Token::Text(value)) = self.peek() else {
            return Err(GrammarError::new(format!("expected {what}")));
        };
        let value = value.clone();
        self.next += 1;
        Ok(value)
    }

    pub(super) fn database(&mut self) -> Result<String, GrammarError> {
        let reserved = ["WITH", "TO"].iter().find(|word| self.keyword_ahead(word));
        match reserved {
            Some(word) => Err(GrammarError::new(format!("expected a database before {word}"))),
            None => self.name("a database"),
        }
    }

    pub(super) fn keyword_ahead(&self, keyword: &str) -> bool {
        matches!(self.peek(), Some(Token::Bare(word)) if word.eq_ignore_ascii_case(keyword))
    }

    pub(super) fn scope(&mut self) -> Result<Scope, GrammarError> {
        if self.at_end() { Ok(Scope::All) } else { self.database().map(Scope::Database) }
    }

    pub(super) fn database_to_backend(&mut self) -> Result<(String, String), GrammarError> {
        let database = self.database()?;
        self.expect("TO")?;
        Ok((database, self.name("a backend")?))
    }

    /// `WITH (run '…', epoch n)` or `WITH (force)`, if there is a WITH.
    pub(super) fn warrant(&mut self) -> Result<Option<Warrant>, GrammarError> {
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
    pub(super) fn options(&mut self, known: &[&'static str]) -> Result<Option<Options>, GrammarError> {
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

    pub(super) fn option_value(&mut self, name: &str) -> Result<String, GrammarError> {
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
pub(super) struct Options(Vec<(&'static str, String)>);

impl Options {
    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(option, _)| *option == name)?;
        Some(self.0.swap_remove(at).1)
    }

    pub(super) fn claim(&mut self) -> Result<Option<Claim>, GrammarError> {
        match (self.take("run"), self.take("epoch")) {
            (None, None) => Ok(None),
            (Some(run), Some(epoch)) => Ok(Some(Claim { run: item::<RunId>(&run)?, epoch: item::<Epoch>(&epoch)? })),
            (None, Some(_)) => Err(GrammarError::new("epoch needs run '…' beside it")),
            (Some(_), None) => Err(GrammarError::new("run needs epoch n beside it")),
        }
    }

    pub(super) fn lease(&mut self) -> Result<Option<Lease>, GrammarError> {
        let Some(value) = self.take("lease") else { return Ok(None) };
        let lease = Lease::try_from(duration(&value, "lease")?);
        lease.map(Some).map_err(|error| GrammarError::new(error.to_string()))
    }

    pub(super) fn choice<T>(
        &mut self,
        name: &str,
        from_word: fn(&str) -> Option<T>,
        default: T,
    ) -> Result<T, GrammarError> {
        let Some(value) = self.take(name) else { return Ok(default) };
        from_word(&value).ok_or_else(|| GrammarError::new(format!("{name} cannot be {value:?}")))
    }
}

pub(super) fn item<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, GrammarError> {
    text.parse().map_err(|error: T::Err| GrammarError::new(format!("{text:?}: {error}")))
}

pub(super) fn number<T: FromStr>(text: &str, what: &str) -> Result<T, GrammarError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = if digits { text.parse().ok() } else { None };
    parsed.ok_or_else(|| GrammarError::new(format!("{what} has to be a whole number, not {text:?}")))
}

/// `2s`, `500ms`, or a plain number of seconds; at most a day, whole milliseconds.
pub(super) fn duration(text: &str, what: &str) -> Result<Duration, GrammarError> {
    let plain = text.parse::<f64>().ok().map(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let parsed = plain.unwrap_or_else(|| humantime::parse_duration(text).ok());
    let whole = parsed.filter(|duration| *duration <= Lease::MAX).map(|duration| duration.as_millis());
    let millis = whole.and_then(|millis| u64::try_from(millis).ok());
    millis.map(Duration::from_millis).ok_or_else(|| {
        GrammarError::new(format!("{what} has to be a time up to a day such as '2s', '500ms' or 1.5, not {text:?}"))
    })
}

pub(super) fn checked_name(name: String) -> Result<String, GrammarError> {
    match name.len() {
        0 => Err(GrammarError::new("a name is empty")),
        1..=NAME_BYTES_MAX => Ok(name),
        _ => Err(GrammarError::new(format!("a name is longer than {NAME_BYTES_MAX} bytes"))),
    }
}

/// The known word that a typo most likely meant: at most two edits away, and nearer than another word.
pub(super) fn nearest<'a>(typed: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let typed = typed.to_ascii_lowercase();
    let distance = |word: &str| strsim::damerau_levenshtein(&typed, &word.to_ascii_lowercase());
    known.map(|word| (distance(word), word)).filter(|(edits, _)| *edits <= 2).min().map(|(_, word)| word)
}
