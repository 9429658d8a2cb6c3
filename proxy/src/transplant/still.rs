//! Whether a session is still what it was a moment ago: one call of a function of ours on its server.
//!
//! Invariant: a session that is found to be the same is so in everything that a full look reads, but for the values of
//! sequences, which are read. Whatever else can be told from outside (errors, an unknown sequence, another list of
//! settings) means that it has to be looked at whole.

use crate::backend::{Answer, Batch, Described};
use crate::transplant::sequences;
use crate::transplant::sequences::Sequences;
use crate::transplant::snapshot::{Custom, State};

/// $1: names of settings, $2: OIDs of sequences. The function is installed with the decision store.
const PRINT: &str = "\
SELECT p.print, p.used, p.last, p.loaded FROM pgcutover.session_print($1::pg_catalog.text[], $2::pg_catalog.oid[]) p";

/// What tells a session from what it was, as its server said it right after it was looked at whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Print {
    /// The settings that are in it, as an array.
    settings: Box<[u8]>,
    hash: String,
    /// What no catalogue shows: the unnamed statement.
    unnamed: Option<Described>,
}

/// What the server says now.
pub(super) struct Said {
    hash: String,
    used: String,
    last: String,
    loaded: String,
}

/// The names of all settings of a state, as an array.
pub(super) fn settings_of(state: &State) -> Box<[u8]> {
    let known = state.settings.iter().map(|setting| &setting.name);
    let mut array = b"{".to_vec();
    for name in known.chain(state.custom.iter().map(|(name, _)| name)) {
        if array.len() > 1 {
            array.push(b',');
        }
        array.push(b'"');
        for byte in name.iter() {
            if matches!(byte, b'"' | b'\\') {
                array.push(b'\\');
            }
            array.push(*byte);
        }
        array.push(b'"');
    }
    array.push(b'}');
    array.into()
}

/// Asks: that many answers.
pub(super) fn ask(batch: &mut Batch, settings: &[u8], of_sequences: &[u32]) -> usize {
    let before = batch.answers();
    let mut settings = settings;
    for some in sequences::chunks(of_sequences) {
        batch.run(PRINT, [&[settings, sequences::list(some).as_bytes()][..]]);
        batch.sync();
        // Once is enough.
        settings = b"{}";
    }
    batch.answers() - before
}

impl Said {
    /// From the answers to [`ask`]; `None` where the server refused, or said something else.
    pub(super) fn new(answers: Vec<Answer>) -> Option<Self> {
        let mut said: Option<Self> = None;
        for answer in answers {
            let answer = answer.accepted().ok()?;
            let text = |column| Some(answer.rows.first()?.text(column)?.to_owned());
            let next = Self { hash: text(0)?, used: text(1)?, last: text(2)?, loaded: text(3)? };
            match &mut said {
                None => said = Some(next),
                // The hash of the others is that of no settings.
                Some(first) => first.used.push_str(&next.used),
            }
        }
        said
    }

    /// The print of a session that was looked at just before; `loaded`: when its server had read its configuration then.
    pub(super) fn into_print(
        self,
        settings: Box<[u8]>,
        loaded: Option<&[u8]>,
        unnamed: Option<Described>,
    ) -> Option<Print> {
        let hash = [self.hash.as_str(), self.loaded.as_str()].join("@");
        (loaded == Some(self.loaded.as_bytes())).then_some(Print { settings, hash, unnamed })
    }
}

impl Print {
    /// The settings to ask for again.
    pub(super) fn settings(&self) -> &[u8] {
        &self.settings
    }

    /// The sequences as they are now, if nothing else has changed.
    pub(super) fn still(&self, said: &Said, unnamed: Option<&Described>, before: &Sequences) -> Option<Sequences> {
        let now = [said.hash.as_str(), said.loaded.as_str()].join("@");
        if self.hash == now && self.unnamed.as_ref() == unnamed {
            before.moved_on(&said.used, &said.last)
        } else {
            None
        }
    }
}

/// Whether these custom settings are those that are in a state.
pub(super) fn are_those(names: &[Box<[u8]>], custom: &[Custom]) -> bool {
    names.len() == custom.len() && names.iter().zip(custom).all(|(name, (known, _))| name == known)
}
