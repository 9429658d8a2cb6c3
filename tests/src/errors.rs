//! What clients saw go wrong.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::samples::now_us;

/// One ErrorResponse, disconnect, failed login or silence, as the client saw it.
#[derive(Clone, Debug, Serialize)]
pub struct ClientError {
    /// When.
    pub at_us: i64,
    /// Who.
    pub client: i32,
    /// Of an ErrorResponse.
    pub sqlstate: Option<String>,
    /// Words: the server's, or the driver's.
    pub text: String,
}

impl ClientError {
    /// What the driver reports, now.
    pub fn of(client: i32, doing: &str, error: &tokio_postgres::Error) -> ClientError {
        let database = error.as_db_error();
        let text = match database {
            Some(error) => format!("{doing}: {} {}: {}", error.severity(), error.code().code(), error.message()),
            None => format!("{doing}: {}", chain(error)),
        };
        ClientError { at_us: now_us(), client, sqlstate: database.map(|error| error.code().code().to_owned()), text }
    }

    /// Something else, now.
    pub fn because(client: i32, text: impl Into<String>) -> ClientError {
        ClientError { at_us: now_us(), client, sqlstate: None, text: text.into() }
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// Errors by their text, the most frequent first.
pub fn tally(errors: &[ClientError]) -> Vec<(String, usize)> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for error in errors {
        *counts.entry(&error.text).or_default() += 1;
    }
    let mut sorted: Vec<_> = counts.into_iter().map(|(text, count)| (text.to_owned(), count)).collect();
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    sorted
}
