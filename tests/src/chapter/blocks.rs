//! The blocks of README.md between their marks, `<!-- chapter: NAME -->` … `<!-- chapter: end -->`.
//!
//! Invariant: nothing outside the marks is touched; a block that differs in nothing but figures stays as it is.

use anyhow::{Context, Result, ensure};

const END: &str = "<!-- chapter: end -->";

/// What one part of the chapter shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its name in README.md.
    pub name: &'static str,
    /// Its lines.
    pub text: String,
}

impl Block {
    fn begin(&self) -> String {
        format!("<!-- chapter: {} -->", self.name)
    }

    fn dressed(&self) -> String {
        format!("\n```\n{}\n```\n", self.text.trim_end())
    }
}

/// What becomes of a block that differs in figures only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figures {
    /// It stays.
    Stay,
    /// It is written anew.
    Anew,
}

/// Begins of lines that a run leaves out where it could not look: they are not missed.
const BY_CHANCE: [&str; 4] = ["replication lag: ", "transactions before: ", "transactions after: ", "log: "];

/// A page with these blocks in place of those that it has; which of them are new.
///
/// # Errors
/// A mark is missing, or a mark has no block.
pub fn put(page: &str, blocks: &[Block], figures: Figures) -> Result<(String, Vec<&'static str>)> {
    let mut new = Vec::new();
    let mut text = page.to_owned();
    for (block, there) in beside(page, blocks)? {
        let dressed = block.dressed();
        let is_new = shape(there) != shape(&dressed);
        if is_new {
            new.push(block.name);
        }
        if is_new || figures == Figures::Anew {
            let begin = block.begin();
            text = text.replacen(&format!("{begin}{there}{END}"), &format!("{begin}{dressed}{END}"), 1);
        }
    }
    Ok((text, new))
}

/// Lines of the page's blocks that nobody printed, in that order, figures aside.
///
/// # Errors
/// As [`put`].
pub fn unprinted(page: &str, blocks: &[Block]) -> Result<Vec<String>> {
    let mut missed = Vec::new();
    for (block, there) in beside(page, blocks)? {
        let dressed = block.dressed();
        let mut printed = dressed.lines().map(shape);
        let lines = there.lines().filter(|line| !BY_CHANCE.iter().any(|begin| line.starts_with(begin)));
        missed.extend(lines.filter(|line| !printed.any(|other| other == shape(line))).map(str::to_owned));
    }
    Ok(missed)
}

/// Each block with what the page has in its place.
fn beside<'a>(page: &'a str, blocks: &'a [Block]) -> Result<Vec<(&'a Block, &'a str)>> {
    let mut pairs = Vec::new();
    for block in blocks {
        let begin = block.begin();
        let (_, rest) = page.split_once(&begin).with_context(|| format!("the page has no {begin}"))?;
        let (there, _) = rest.split_once(END).with_context(|| format!("{begin} has no end"))?;
        pairs.push((block, there));
    }
    let marks = page.matches("<!-- chapter: ").count();
    ensure!(marks == 2 * blocks.len(), "{marks} marks for {} blocks: one has no block", blocks.len());
    Ok(pairs)
}

/// The text without what a measurement decides: figures, log positions, empty cells, and the room that they take.
fn shape(text: &str) -> String {
    let mut shape = String::new();
    for word in text.split([' ', '\n']).filter(|word| !word.is_empty()) {
        let bare = word.trim_end_matches(',');
        let is_position = bare.split_once('/').is_some_and(|(high, low)| is_hex(high) && is_hex(low));
        let rest = if bare == "-" || is_position { format!("0{}", &word[bare.len()..]) } else { word.to_owned() };
        for letter in rest.chars() {
            let in_figure = shape.ends_with('#') && (letter.is_ascii_digit() || letter == '.');
            match letter {
                _ if in_figure => {}
                '0'..='9' => shape.push('#'),
                _ => shape.push(letter),
            }
        }
        shape.push(' ');
    }
    // A negative one is one, too.
    shape.replace("-#", "#")
}

fn is_hex(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|letter| letter.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> Block {
        Block { name: "status", text: text.to_owned() }
    }

    #[test]
    fn a_block_that_differs_in_figures_only_stays_and_another_is_put_in_its_place() {
        assert_eq!(shape("fence 0/1B10988, seen"), shape("fence 0/2000000, seen"));
        assert_eq!(shape("p1   12.5   3\nblue -> green"), shape("p1  -  3\nblue -> green"));
        let page = "before\n<!-- chapter: status -->\n```\nheld    9.5 ms\n```\n<!-- chapter: end -->\nafter\n";
        assert_eq!(put(page, &[block("held  -112.25 ms\n")], Figures::Stay).unwrap(), (page.to_owned(), Vec::new()));
        let (anew, new) = put(page, &[block("held 7 ms")], Figures::Anew).unwrap();
        assert_eq!((anew, new), (page.replace("held    9.5 ms", "held 7 ms"), Vec::new()));
        let (put, new) = put(page, &[block("held 9.5 ms, and more\n")], Figures::Stay).unwrap();
        assert_eq!(put, page.replace("held    9.5 ms", "held 9.5 ms, and more"));
        assert_eq!(new, ["status"]);
    }

    #[test]
    fn a_line_that_nobody_printed_is_named_and_more_lines_than_the_page_has_are_not() {
        let page = "<!-- chapter: status -->\n```\n$ do 1\nlog: 0/12\ndone in 3 ms\n```\n<!-- chapter: end -->";
        let unprinted = |text: &str| unprinted(page, &[block(text)]).unwrap();
        assert!(unprinted("$ do 1\nand more\ndone in 99.5 ms\n").is_empty());
        assert_eq!(unprinted("$ do 1\nfailed in 3 ms\n"), ["done in 3 ms", "```"]);
        assert_eq!(unprinted("done in 3 ms\n$ do 1\n"), ["done in 3 ms", "```"]);
    }

    #[test]
    fn a_mark_without_block_and_a_block_without_mark_are_errors() {
        assert!(put("no marks", &[block("x")], Figures::Stay).is_err());
        let page = "<!-- chapter: status -->\n<!-- chapter: end -->";
        assert!(put(page, &[], Figures::Stay).is_err());
    }
}
