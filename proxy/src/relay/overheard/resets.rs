//! Whether a client has taken settings back to their start.
//!
//! Invariant: a reset that the server has carried out is noted; one more may be. One inside a function's body, or a text that
//! is made at run time, is not seen. Pure.

/// What may have been taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Reset {
    /// Nothing.
    #[default]
    Nothing,
    /// Some settings: the server knows which of its own.
    Some,
    /// Each.
    All,
}

/// Follows one session.
#[derive(Debug, Clone)]
pub(super) struct Resets {
    done: Reset,
    /// What the command tag RESET means by the texts of this transaction.
    now: Option<Reset>,
    /// What it means if none of them has it, so that it was prepared: of each, while no single one was ever named.
    by_reset: Reset,
    /// What the command tag SET means: nothing, while there was no `SET … TO DEFAULT`.
    by_set: Reset,
}

impl Default for Resets {
    fn default() -> Self {
        Self { done: Reset::Nothing, now: None, by_reset: Reset::All, by_set: Reset::Nothing }
    }
}

impl Resets {
    /// The word RESET, and what follows it.
    pub(super) fn reset(&mut self, name: &[u8]) {
        let what = if name.eq_ignore_ascii_case(b"all") { Reset::All } else { Reset::Some };
        self.now = Some(self.now.map_or(what, |now| now.min(what)));
        self.by_reset = self.by_reset.min(what);
    }

    /// The word DEFAULT.
    pub(super) fn set_to_default(&mut self) {
        self.by_set = Reset::Some;
    }

    /// A command tag, with its NUL.
    pub(super) fn completed(&mut self, tag: &[u8]) {
        let done = match tag {
            b"DISCARD ALL\0" => Reset::All,
            b"RESET\0" => self.now.unwrap_or(self.by_reset),
            b"SET\0" => self.by_set,
            _ => Reset::Nothing,
        };
        self.done = self.done.max(done);
    }

    /// A transaction is over: what was taken back in it.
    pub(super) fn take(&mut self) -> Reset {
        self.now = None;
        std::mem::take(&mut self.done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_means_what_the_texts_may_have_meant() {
        let mut resets = Resets::default();
        resets.completed(b"SET\0");
        resets.completed(b"SELECT 1\0");
        assert_eq!(resets.take(), Reset::Nothing);
        resets.completed(b"RESET\0");
        assert_eq!((resets.take(), resets.take()), (Reset::All, Reset::Nothing));
        resets.set_to_default();
        resets.reset(b"All");
        resets.completed(b"SET\0");
        assert_eq!(resets.take(), Reset::Some);
        resets.reset(b"work_mem");
        resets.completed(b"RESET\0");
        assert_eq!(resets.take(), Reset::Some);
        resets.completed(b"RESET\0");
        assert_eq!(resets.take(), Reset::Some, "it was prepared");
        resets.reset(b"ALL");
        resets.completed(b"RESET\0");
        assert_eq!(resets.take(), Reset::All);
        resets.completed(b"DISCARD ALL\0");
        resets.completed(b"RESET\0");
        assert_eq!(resets.take(), Reset::All);
    }
}
