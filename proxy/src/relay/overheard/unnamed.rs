//! The text of the unnamed statement that a server has, as far as it is sure which that is.
//!
//! Invariant: where all that was sent is answered and the server has an unnamed statement, a text that is known is its text.
//! Whether it has one is the server's to say: a simple query ends it, as a Close does. Pure. Source: PostgreSQL,
//! src/backend/tcop/postgres.c, `exec_parse_message`.

/// Texts are kept up to this many bytes: a session owns one.
const BYTES_MAX: usize = 64 * 1024;

/// Whether the server skips messages up to the next Sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Skipping {
    #[default]
    No,
    Perhaps,
}

/// Follows one session.
#[derive(Debug, Clone, Default)]
pub(super) struct Unnamed {
    text: Option<Box<[u8]>>,
    /// Parse messages sent and not answered, or more: one that failed or was skipped is struck off by [`Self::answered`].
    parses_owed: u32,
    skipping: Skipping,
}

impl Unnamed {
    /// The text, if it is sure.
    pub(super) fn text(&self) -> Option<&[u8]> {
        self.text.as_deref()
    }

    /// A Parse goes to the server.
    pub(super) fn parse(&mut self, name: &[u8], text: &[u8]) {
        self.parses_owed = self.parses_owed.saturating_add(1);
        if name.is_empty() {
            let sure = self.skipping == Skipping::No && text.len() <= BYTES_MAX;
            self.text = sure.then(|| text.into());
        }
    }

    /// A Parse that is too long to be read, of whatever name.
    pub(super) fn unread(&mut self) {
        self.parses_owed = self.parses_owed.saturating_add(1);
        self.text = None;
    }

    /// The type of a message of the server.
    pub(super) fn answer(&mut self, tag: u8) {
        match tag {
            b'E' => {
                // The last Parse may have failed, or been skipped and the one before it be alive. Where each was answered,
                // what fails leaves the unnamed statement as it is.
                if self.parses_owed > 0 {
                    self.text = None;
                }
                self.skipping = Skipping::Perhaps;
            }
            b'1' => self.parses_owed = self.parses_owed.saturating_sub(1),
            b'Z' => self.skipping = Skipping::No,
            _ => {}
        }
    }

    /// All that was sent is answered: what fails from here on does not undo the last Parse.
    pub(super) fn answered(&mut self) {
        self.parses_owed = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;
    use crate::tracker::{Front, Shut, Tracker};

    /// What a client does next; the number tells texts apart.
    #[derive(Debug, Clone, Copy)]
    enum Deed {
        Parse(Name, Outcome),
        Execute(Outcome),
        CloseUnnamed,
        Sync,
        Query(Outcome),
        /// So many answers arrive.
        Hear(usize),
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Name {
        None,
        Some,
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Outcome {
        Good,
        Bad,
    }

    fn deeds() -> impl Strategy<Value = Deed> {
        let outcome = || prop_oneof![3 => Just(Outcome::Good), 1 => Just(Outcome::Bad)];
        let name = || prop_oneof![2 => Just(Name::None), 1 => Just(Name::Some)];
        prop_oneof![
            4 => (name(), outcome()).prop_map(|(name, outcome)| Deed::Parse(name, outcome)),
            2 => outcome().prop_map(Deed::Execute),
            1 => Just(Deed::CloseUnnamed),
            3 => Just(Deed::Sync),
            1 => outcome().prop_map(Deed::Query),
            4 => (1usize..8).prop_map(Deed::Hear),
        ]
    }

    /// A server as far as its unnamed statement goes; what it answers is on its way.
    #[derive(Default)]
    struct Server {
        unnamed: Option<usize>,
        skips: bool,
        answers: VecDeque<u8>,
    }

    impl Server {
        fn read(&mut self, deed: Deed, number: usize) {
            if matches!(deed, Deed::Sync) {
                self.skips = false;
                return self.answers.push_back(b'Z');
            }
            if self.skips {
                return;
            }
            match deed {
                Deed::Parse(name, outcome) => {
                    if name == Name::None {
                        self.unnamed = (outcome == Outcome::Good).then_some(number);
                    }
                    self.extended(b'1', outcome);
                }
                Deed::Execute(outcome) => self.extended(b'C', outcome),
                Deed::CloseUnnamed => {
                    self.unnamed = None;
                    self.extended(b'3', Outcome::Good);
                }
                Deed::Query(outcome) => {
                    self.unnamed = None;
                    self.answers.push_back(if outcome == Outcome::Good { b'C' } else { b'E' });
                    self.answers.push_back(b'Z');
                }
                Deed::Sync | Deed::Hear(_) => {}
            }
        }

        fn extended(&mut self, answer: u8, outcome: Outcome) {
            self.skips = outcome == Outcome::Bad;
            self.answers.push_back(if self.skips { b'E' } else { answer });
        }

        /// So many answers arrive; as the relay takes them.
        fn speak(&mut self, count: usize, heard: &mut Unnamed, tracker: &mut Tracker) {
            for answer in self.answers.drain(..count.min(self.answers.len())) {
                heard.answer(answer);
                tracker.backend(answer, b'I');
                if answer == b'Z' && !tracker.is_busy() {
                    heard.answered();
                }
            }
        }

        /// While something is on its way nothing is promised.
        fn agrees(&self, heard: &Unnamed, tracker: &Tracker) -> bool {
            let (Some(text), Some(number)) = (heard.text(), self.unnamed) else { return true };
            tracker.is_busy() || text == number.to_string().as_bytes()
        }
    }

    proptest! {
        /// However far the answers are behind: once they are there, a text that is known is the one that the server has.
        #[test]
        fn a_text_that_is_known_is_the_servers(deeds in proptest::collection::vec(deeds(), 1..40)) {
            let (mut heard, mut tracker, mut server) = (Unnamed::default(), Tracker::default(), Server::default());
            for (number, deed) in deeds.into_iter().enumerate() {
                let tag = match deed {
                    Deed::Parse(..) => b'P',
                    Deed::Execute(_) => b'E',
                    Deed::CloseUnnamed => b'C',
                    Deed::Sync => b'S',
                    Deed::Query(_) => b'Q',
                    Deed::Hear(count) => {
                        server.speak(count, &mut heard, &mut tracker);
                        prop_assert!(server.agrees(&heard, &tracker));
                        continue;
                    }
                };
                prop_assert_eq!(tracker.frontend(tag, Shut::No), Front::Forward);
                if let Deed::Parse(name, _) = deed {
                    heard.parse(if name == Name::None { &b""[..] } else { b"named" }, number.to_string().as_bytes());
                }
                server.read(deed, number);
            }
            server.read(Deed::Sync, 0);
            tracker.frontend(b'S', Shut::No);
            server.speak(usize::MAX, &mut heard, &mut tracker);
            prop_assert!(server.agrees(&heard, &tracker));
        }
    }

    /// `P` and a text: Parse of the unnamed statement; `p`: of one with a name; any other byte: an answer; `!`: all is
    /// answered.
    fn unnamed_after(talk: &[&str]) -> Option<String> {
        let mut heard = Unnamed::default();
        for said in talk {
            match said.split_at(1) {
                ("P", text) => heard.parse(b"", text.as_bytes()),
                ("p", text) => heard.parse(b"named", text.as_bytes()),
                ("!", _) => heard.answered(),
                (tag, _) => heard.answer(tag.as_bytes()[0]),
            }
        }
        heard.text().map(|text| String::from_utf8(text.to_vec()).unwrap())
    }

    #[test]
    fn an_unnamed_text_is_not_known_after_an_error_that_may_be_its_own() {
        assert_eq!(unnamed_after(&["PSELECT 1"]).as_deref(), Some("SELECT 1"));
        assert_eq!(unnamed_after(&["PSELECT 1", "E"]), None);
        assert_eq!(unnamed_after(&["PSELECT 1", "E", "PSELECT 2"]), None, "it may have been skipped");
        assert_eq!(unnamed_after(&["PSELECT 1", "E", "Z", "!", "PSELECT 2", "E", "Z", "!"]), None);
        assert_eq!(unnamed_after(&["PSELECT 1", "E", "Z", "PSELECT 2"]).as_deref(), Some("SELECT 2"));
        assert_eq!(unnamed_after(&["PSELECT 1", "1", "PSELECT 2", "E", "Z", "!"]), None, "either may be alive");
        assert_eq!(
            unnamed_after(&["PSELECT 1", "1", "pSELECT 2", "PSELECT 3", "1", "E"]),
            None,
            "whose answer was it?"
        );
        assert_eq!(unnamed_after(&["pSELECT 1", "E", "PSELECT 2", "1", "Z", "!"]), None, "it was skipped by then");
        // The batch before it failed: its answer is not the next one's.
        assert_eq!(unnamed_after(&["pSELECT 1", "PSELECT 2", "E", "Z", "1", "Z", "!"]), None);
    }

    #[test]
    fn an_unnamed_text_outlives_the_errors_of_others() {
        let known = Some("SELECT 1");
        assert_eq!(unnamed_after(&["PSELECT 1", "1", "Z", "!", "E"]).as_deref(), known);
        assert_eq!(unnamed_after(&["PSELECT 1", "Z", "!", "E", "Z", "!"]).as_deref(), known);
        assert_eq!(
            unnamed_after(&["PSELECT 1", "1", "E", "Z", "!"]).as_deref(),
            known,
            "its own Bind or Execute failed"
        );
        assert_eq!(unnamed_after(&["PSELECT 1", "1", "pSELECT 2", "1", "E", "Z", "!"]).as_deref(), known);
        assert_eq!(
            unnamed_after(&["PSELECT 1", "1", "Z", "!", "pSELECT 2", "E", "Z", "!"]),
            None,
            "not sure is not known"
        );
        assert_eq!(unnamed_after(&["pX", "E", "Z", "!", "PSELECT 1", "1", "E", "Z", "!"]).as_deref(), known);
    }
}
