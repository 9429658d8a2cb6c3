//! Cuts a console command into words, strings and signs.
//!
//! Invariant: every byte of the input is looked at once; nothing is copied that is longer than the input.

use super::GrammarError;

/// A piece of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// Letters, digits, `_`, `.` and `$`, as typed.
    Bare(String),
    /// `"…"`, unquoted.
    Quoted(String),
    /// `'…'`, unquoted.
    Text(String),
    /// One of `= , ( ) ;`.
    Sign(char),
}

/// Whether a name needs no quotes.
pub(super) fn is_plain(word: &str) -> bool {
    !word.is_empty() && word.chars().all(is_word_char)
}

fn is_word_char(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || matches!(letter, '_' | '.' | '$')
}

/// The tokens of a command; comments are blanks.
pub(super) fn tokens(command: &str) -> Result<Vec<Token>, GrammarError> {
    let mut rest = skip_blanks(command)?;
    let mut tokens = Vec::new();
    while let Some(first) = rest.chars().next() {
        let (token, after) = match first {
            '"' => quoted(rest, '"').map(|(text, after)| (Token::Quoted(text), after))?,
            '\'' => quoted(rest, '\'').map(|(text, after)| (Token::Text(text), after))?,
            '=' | ',' | '(' | ')' | ';' => (Token::Sign(first), &rest[1..]),
            letter if is_word_char(letter) => {
                let end = rest.find(|letter| !is_word_char(letter)).unwrap_or(rest.len());
                (Token::Bare(rest[..end].to_owned()), &rest[end..])
            }
            other => return Err(stray(other)),
        };
        tokens.push(token);
        rest = skip_blanks(after)?;
    }
    Ok(tokens)
}

fn stray(sign: char) -> GrammarError {
    let error = GrammarError::new(format!("unexpected {sign:?} in the command"));
    match sign {
        '-' => error.hint("a name with '-' needs double quotes: PAUSE \"my-db\""),
        _ => error.hint("a name with other than letters, digits and '_' needs double quotes"),
    }
}

/// The text of a quoted piece, its doubled quotes halved, and what follows it.
fn quoted(piece: &str, quote: char) -> Result<(String, &str), GrammarError> {
    let mut text = String::new();
    let mut letters = piece.char_indices().skip(1).peekable();
    while let Some((at, letter)) = letters.next() {
        if letter != quote {
            text.push(letter);
        } else if letters.next_if(|(_, next)| *next == quote).is_some() {
            text.push(quote);
        } else {
            return Ok((text, &piece[at + 1..]));
        }
    }
    Err(GrammarError::new(format!("a {quote} is not closed")))
}

/// Past white space and comments of both kinds.
fn skip_blanks(text: &str) -> Result<&str, GrammarError> {
    let mut rest = text.trim_start();
    loop {
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.split_once('\n').map_or("", |(_, after)| after).trim_start();
        } else if let Some(comment) = rest.strip_prefix("/*") {
            let (_, after) = comment.split_once("*/").ok_or_else(|| GrammarError::new("a /* is not closed"))?;
            rest = after.trim_start();
        } else {
            return Ok(rest);
        }
    }
}
