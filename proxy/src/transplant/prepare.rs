//! Recognises a text that is exactly one PREPARE of a given name.
//!
//! Invariant: says yes only where every reading of the text agrees, whatever standard_conforming_strings is: a text
//! that is repeated must do nothing but prepare. Pure.

/// Whether `text` is one PREPARE statement that makes `name`, and nothing else.
#[must_use]
pub(super) fn is_one_prepare(text: &[u8], name: &[u8]) -> bool {
    let mut lexer = Lexer { rest: text };
    let mut tokens = Vec::new();
    loop {
        match lexer.token() {
            Some(Token::End) => break,
            // Two tokens tell what it is; behind them only a `;` matters.
            Some(token) if tokens.len() < 2 || token == Token::Semicolon => tokens.push(token),
            Some(_) if tokens.last() == Some(&Token::Semicolon) => return false,
            Some(_) => {}
            None => return false,
        }
    }
    let [Token::Word(verb), Token::Word(made) | Token::Quoted(made), end @ ..] = tokens.as_slice() else {
        return false;
    };
    verb == b"prepare" && made == name && matches!(end, [] | [Token::Semicolon])
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    /// A keyword or name, folded to lower case.
    Word(Vec<u8>),
    /// A quoted name.
    Quoted(Vec<u8>),
    Semicolon,
    /// Anything else.
    Other,
    End,
}

/// What remains of the text.
struct Lexer<'a> {
    rest: &'a [u8],
}

impl Lexer<'_> {
    /// The next token; `None` where the text can be read in two ways or ends too early.
    fn token(&mut self) -> Option<Token> {
        self.skip_blank()?;
        let Some((&first, after)) = self.rest.split_first() else { return Some(Token::End) };
        match first {
            b';' => {
                self.rest = after;
                Some(Token::Semicolon)
            }
            b'"' => {
                self.rest = after;
                self.until_quote(b'"', false).map(Token::Quoted)
            }
            b'\'' => {
                self.rest = after;
                self.until_quote(b'\'', false).map(|_| Token::Other)
            }
            b'$' => self.dollar(),
            b'0'..=b'9' => {
                // Digits may run into a name; where they run into a dollar quote servers read it in two ways.
                (!self.word().contains(&b'$')).then_some(Token::Other)
            }
            _ if is_word(first) => self.name(),
            _ => {
                self.rest = after;
                Some(Token::Other)
            }
        }
    }

    /// White space and comments.
    fn skip_blank(&mut self) -> Option<()> {
        loop {
            match self.rest {
                [b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, after @ ..] => self.rest = after,
                [b'-', b'-', ..] => {
                    let end = self.rest.iter().position(|b| matches!(b, b'\n' | b'\r')).unwrap_or(self.rest.len());
                    self.rest = self.rest.get(end..)?;
                }
                [b'/', b'*', after @ ..] => {
                    self.rest = after;
                    self.comment()?;
                }
                _ => return Some(()),
            }
        }
    }

    /// The rest of a comment, with those in it.
    fn comment(&mut self) -> Option<()> {
        let mut depth = 1;
        while depth > 0 {
            match self.rest {
                [b'*', b'/', after @ ..] => (depth, self.rest) = (depth - 1, after),
                [b'/', b'*', after @ ..] => (depth, self.rest) = (depth + 1, after),
                [_, after @ ..] => self.rest = after,
                [] => return None,
            }
        }
        Some(())
    }

    /// What stands up to the closing quote, doubled ones undone. A backslash is taken with what follows it where it
    /// escapes, and refused where that depends on a setting.
    fn until_quote(&mut self, quote: u8, escapes: bool) -> Option<Vec<u8>> {
        let mut inside = Vec::new();
        loop {
            match self.rest {
                [q, again, after @ ..] if *q == quote && *again == quote => {
                    inside.push(quote);
                    self.rest = after;
                }
                [q, after @ ..] if *q == quote => {
                    self.rest = after;
                    return Some(inside);
                }
                [b'\\', _, after @ ..] if escapes => {
                    // In some client encodings a backslash is the second byte of a letter.
                    if inside.last().is_some_and(|byte: &u8| *byte >= 0x80) {
                        return None;
                    }
                    inside.push(b'\\');
                    self.rest = after;
                }
                [b'\\', ..] if quote == b'\'' => return None,
                [byte, after @ ..] => {
                    inside.push(*byte);
                    self.rest = after;
                }
                [] => return None,
            }
        }
    }

    /// A parameter (`$1`) or a dollar-quoted string.
    fn dollar(&mut self) -> Option<Token> {
        let after = self.rest.get(1..)?;
        let tag_bytes = after.iter().position(|b| !is_word(*b) || *b == b'$').unwrap_or(after.len());
        if after.get(tag_bytes) != Some(&b'$') || after.first().is_some_and(u8::is_ascii_digit) {
            self.rest = after;
            return Some(Token::Other);
        }
        let (mark, inside) = self.rest.split_at_checked(tag_bytes + 2)?;
        let end = inside.windows(mark.len()).position(|window| window == mark)?;
        self.rest = inside.get(end + mark.len()..)?;
        Some(Token::Other)
    }

    /// A name, or a string with a letter before it.
    fn name(&mut self) -> Option<Token> {
        let word = self.word();
        match (word.as_slice(), self.rest) {
            (b"e", [b'\'', after @ ..]) => {
                self.rest = after;
                self.until_quote(b'\'', true).map(|_| Token::Other)
            }
            // U&"name" is a name whose escapes we don't undo: no such statement is recognised.
            _ => Some(Token::Word(word)),
        }
    }

    /// Letters, digits, `_`, `$` and all beyond ASCII, folded.
    fn word(&mut self) -> Vec<u8> {
        let end = self.rest.iter().position(|byte| !is_word(*byte)).unwrap_or(self.rest.len());
        let (word, after) = self.rest.split_at(end);
        self.rest = after;
        word.to_ascii_lowercase()
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | 0x80..)
}

#[cfg(test)]
mod tests {
    use super::is_one_prepare;

    #[track_caller]
    fn check(text: &str, expected: bool) {
        assert_eq!(is_one_prepare(text.as_bytes(), b"ms"), expected, "{text}");
    }

    #[test]
    fn one_prepare_is_recognised_and_nothing_else() {
        for text in [
            "prepare ms as select 1",
            " \n-- c ; \n/* a /* b; */ ; */PREPARE \"ms\"(int) AS SELECT $1;  -- end; \n /* ; */",
            "PREPARE MS AS SELECT ';', E'\\';', $$;$$, $a$;$$;$a$, \"x;\"\"y\", a$b$c FROM t",
            "prepare ms as select $1, 'it''s; ', U&'d;' , 1e5",
            "prepare ms as select 1;",
        ] {
            check(text, true);
        }
        for text in [
            "",
            "prepare",
            "prepare other as select 1",
            "prepare \"MS\" as select 1",
            "select 1; prepare ms as select 2; select 3",
            "prepare ms as select 1; delete from t",
            "prepare ms as select 1;;",
            "prepare ms as select '\\'; delete from t --'",
            "prepare ms as select $$ ",
            "prepare ms as select 'a",
            "prepare ms as select $a$;$b$",
            "/* prepare ms as select 1",
            "prepare ms as select a$b$; delete from t; select c$b$d",
            "select prepare ms as",
            "prepare ms as select 1$a$;$a$",
            "prepare ms as select e'\u{e9}\\';",
        ] {
            check(text, false);
        }
    }

    #[test]
    fn an_e_string_and_a_plain_one_end_where_they_end() {
        check("prepare ms as select e'\\''; delete from t; select ''", false);
        check("prepare ms as select xe'\\''; delete from t", false);
        check("prepare ms as select e'\\\\'", true);
    }
}
