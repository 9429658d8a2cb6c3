//! A table of the TOML file as a checker reads it: every key is asked for by name and by type.
//!
//! Invariant: what nobody asked for is refused, with the nearest word that somebody did ask for.

use std::time::Duration;

use toml::{Table, Value};

pub(super) type Checked<T> = Result<T, Wrong>;

/// A key and what is wrong with it; the file is added at the end.
pub(super) struct Wrong {
    pub(super) key: String,
    pub(super) reason: String,
}

/// A TOML table that remembers which keys were asked for, so that the rest can be refused with a suggestion.
pub(super) struct Section {
    path: String,
    table: Table,
    asked: Vec<&'static str>,
}

impl Section {
    /// The whole file.
    pub(super) fn root(table: Table) -> Section {
        Section { path: String::new(), table, asked: Vec::new() }
    }

    pub(super) fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn take(&mut self, name: &'static str) -> Option<Value> {
        self.asked.push(name);
        self.table.remove(name)
    }

    pub(super) fn required<T>(
        &mut self,
        name: &'static str,
        read: fn(&mut Section, &'static str) -> Checked<Option<T>>,
    ) -> Checked<T> {
        match read(self, name)? {
            Some(value) => Ok(value),
            None => {
                // A mistyped key is the likelier story than a forgotten one.
                let guess = self.table.keys().find(|key| strsim::jaro_winkler(key, name) > 0.8);
                let hint = guess.map(|key| format!("; did '{}' mean it?", self.key(key))).unwrap_or_default();
                Err(wrong(self.key(name), format!("is missing{hint}")))
            }
        }
    }

    pub(super) fn text(&mut self, name: &'static str) -> Checked<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.mistyped(name, "a string", &other)),
        }
    }

    pub(super) fn texts(&mut self, name: &'static str) -> Checked<Option<Vec<String>>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Value::Array(items) = &value else { return Err(self.mistyped(name, "a list of strings", &value)) };
        let texts = items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
        texts.map(Some).ok_or_else(|| self.mistyped(name, "a list of strings", &value))
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Checked<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Boolean(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.mistyped(name, "true or false", &other)),
        }
    }

    pub(super) fn integer(&mut self, name: &'static str) -> Checked<Option<u64>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Integer(number)) if number >= 0 => Ok(Some(number.unsigned_abs())),
            Some(other) => Err(self.mistyped(name, "a number from 0 up", &other)),
        }
    }

    pub(super) fn small(&mut self, name: &'static str) -> Checked<Option<u32>> {
        let Some(number) = self.integer(name)? else { return Ok(None) };
        let small =
            u32::try_from(number).map_err(|_| wrong(self.key(name), format!("{number} is more than {}", u32::MAX)))?;
        Ok(Some(small))
    }

    /// PgBouncer's plain seconds, or a string with a unit.
    pub(super) fn duration(&mut self, name: &'static str) -> Checked<Option<Duration>> {
        let expected = "seconds or a string with a unit such as '500ms'";
        match self.take(name) {
            None => Ok(None),
            Some(Value::Integer(seconds)) if seconds >= 0 => Ok(Some(Duration::from_secs(seconds.unsigned_abs()))),
            Some(Value::Float(seconds)) => {
                let duration = Duration::try_from_secs_f64(seconds);
                duration.map(Some).map_err(|_| self.mistyped(name, expected, &Value::Float(seconds)))
            }
            Some(Value::String(text)) => {
                let duration = humantime::parse_duration(&text);
                duration.map(Some).map_err(|_| self.mistyped(name, expected, &Value::String(text)))
            }
            Some(other) => Err(self.mistyped(name, expected, &other)),
        }
    }

    pub(super) fn choice<T: Copy>(&mut self, name: &'static str, choices: &[(&'static str, T)]) -> Checked<Option<T>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        if let Some((_, choice)) = choices.iter().find(|(word, _)| *word == text) {
            return Ok(Some(*choice));
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let hint = suggestion(&text, &words);
        Err(wrong(self.key(name), format!("'{text}' is not one of {}{hint}", words.join(", "))))
    }

    pub(super) fn section(&mut self, name: &'static str) -> Checked<Option<Section>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(Section { path: self.key(name), table, asked: Vec::new() })),
            Some(other) => Err(self.mistyped(name, "a table", &other)),
        }
    }

    pub(super) fn sections(&mut self, name: &'static str) -> Checked<Vec<Section>> {
        let Some(value) = self.take(name) else { return Ok(Vec::new()) };
        let expected = "a list of tables, each written [[name]]";
        let Value::Array(items) = &value else { return Err(self.mistyped(name, expected, &value)) };
        let mut sections = Vec::new();
        for item in items {
            let Value::Table(table) = item else { return Err(self.mistyped(name, expected, &value)) };
            sections.push(Section { path: self.key(name), table: table.clone(), asked: Vec::new() });
        }
        Ok(sections)
    }

    fn mistyped(&self, name: &str, expected: &str, found: &Value) -> Wrong {
        wrong(self.key(name), format!("must be {expected}, is {} {found}", found.type_str()))
    }

    /// Refuses keys that nobody asked for.
    pub(super) fn finish(self) -> Checked<()> {
        let Some(unknown) = self.table.keys().next() else { return Ok(()) };
        let hint = suggestion(unknown, &self.asked);
        Err(wrong(self.key(unknown), format!("is not a key{hint}")))
    }
}

/// `; did you mean 'x'?` where one of `known` is close to `given`.
fn suggestion(given: &str, known: &[&str]) -> String {
    let nearest = known.iter().map(|word| (strsim::jaro_winkler(given, word), word)).max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        // Below 0.75 words that share a first letter start to match.
        Some((likeness, word)) if likeness > 0.75 => format!("; did you mean '{word}'?"),
        Some(_) | None => format!("; known here: {}", known.join(", ")),
    }
}

pub(super) fn wrong(key: impl Into<String>, reason: impl Into<String>) -> Wrong {
    Wrong { key: key.into(), reason: reason.into() }
}

/// An error and what lies below it.
pub(super) fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
