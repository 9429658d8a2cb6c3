//! What differs between machines and runs, under names that a reader can follow.
//!
//! Invariant: only names are replaced, never a figure that was measured; the same run has the same name all through the chapter.

use std::path::Path;

use crate::stage::Stage;

/// What stands for what.
#[derive(Debug, Default)]
pub(super) struct Disguise {
    texts: Vec<(String, String)>,
    runs: Vec<String>,
}

impl Disguise {
    /// Servers, proxies and files of a stage.
    pub(super) fn of_stage(stage: &Stage) -> Disguise {
        let mut texts = Vec::new();
        let mut place = |port: u16, name: &str| texts.push((format!("127.0.0.1:{port}"), name.to_owned()));
        place(stage.pair.source.port(), "db-old:5432");
        place(stage.pair.target.port(), "db-new:5432");
        for (at, proxy) in stage.proxies.iter().enumerate() {
            place(proxy.port(), &format!("10.0.0.{}:6432", at + 11));
        }
        texts.push((slashed(stage.control.dir()), String::new()));
        Disguise { texts, runs: Vec::new() }
    }

    /// The text as the chapter has it.
    pub(super) fn of(&mut self, text: &str) -> String {
        let mut text = text.to_owned();
        for (from, to) in &self.texts {
            text = text.replace(from, to);
        }
        text.lines().map(|line| self.line(line) + "\n").collect()
    }

    fn line(&mut self, line: &str) -> String {
        let line = self.named_runs(line);
        let line = anonymous(&line);
        let Some((before, after)) = line.split_once(", pid ") else { return line };
        let who = before.rfind([' ', '(']).map_or(0, |at| at + 1);
        let rest = after.trim_start_matches(|letter: char| letter.is_ascii_digit());
        format!("{}ops@db1, pid 812{rest}", &before[..who])
    }

    /// Every run's id, in the order in which they come.
    fn named_runs(&mut self, line: &str) -> String {
        const LENGTH: usize = 36;
        let mut named = String::new();
        let mut rest = line;
        while !rest.is_empty() {
            match rest.get(..LENGTH).filter(|id| id.contains('-') && uuid::Uuid::try_parse(id).is_ok()) {
                Some(id) => {
                    named.push_str(&self.run(id));
                    rest = &rest[LENGTH..];
                }
                None => {
                    let letter = rest.chars().next().unwrap_or_default();
                    named.push(letter);
                    rest = &rest[letter.len_utf8()..];
                }
            }
        }
        named
    }

    fn run(&mut self, id: &str) -> String {
        let known = self.runs.iter().position(|run| run == id);
        let at = known.unwrap_or_else(|| {
            self.runs.push(id.to_owned());
            self.runs.len() - 1
        });
        // As good as random, and the same in every run of this program.
        let head = 0x8a6f_0c1e_u32.wrapping_mul(2 * u32::try_from(at).unwrap_or(0) + 1);
        format!("{head:08x}-6a53-4a0e-9d0e-3a6b1c2d4e5f")
    }
}

/// Digests of configurations hold ports.
fn anonymous(line: &str) -> String {
    const DIGEST: &str = "3f9c0b7de21a4c58";
    let is_digest = |word: &str| {
        let bare = word.trim_end_matches([';', ',']);
        bare.len() == DIGEST.len() && bare.bytes().all(|letter| letter.is_ascii_hexdigit())
    };
    let word = |word: &str| {
        if is_digest(word) { format!("{DIGEST}{}", &word[DIGEST.len()..]) } else { word.to_owned() }
    };
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

fn slashed(dir: &Path) -> String {
    format!("{}/", dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pair::{SOURCE, TARGET};

    #[test]
    fn names_replace_what_differs_and_figures_stay() {
        let texts = vec![("127.0.0.1:4711".to_owned(), "db-old:5432".to_owned())];
        let mut disguise = Disguise { texts, runs: Vec::new() };
        assert_eq!(disguise.of("at 'fenced' (root@box7, pid 33); its\n"), "at 'fenced' (ops@db1, pid 812); its\n");
        let id = "0d3c1bb2-6f3c-44a4-8a43-0c9f9c6d1f10";
        let text = format!(
            "{SOURCE} at 127.0.0.1:4711\nrun {id}, by root@box7, pid 33, configuration 00aa1122cc33dd44; {id}\n{TARGET} 12.5 ms\n"
        );
        let run = "8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f";
        let wanted = format!(
            "{SOURCE} at db-old:5432\nrun {run}, by ops@db1, pid 812, configuration 3f9c0b7de21a4c58; {run}\n{TARGET} 12.5 ms\n"
        );
        assert_eq!(disguise.of(&text), wanted);
    }
}
