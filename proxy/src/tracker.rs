//! Knows from the frames of both sides whether a session rests: no answer owed, no batch open, no copy, no transaction.
//!
//! Invariant: [`Tracker::at_rest`] is true only when the server waits for its next message outside a transaction and
//! has answered all that was forwarded. When in doubt it says no: a connection is then kept, never given to another
//! client. Pure: no IO, no clock. Source: PostgreSQL, "Message Flow", and src/backend/tcop/postgres.c.

use std::collections::VecDeque;

/// Answers that one client may be owed before we stop reading from it. Each of them comes without further input from
/// the client, so waiting for them can't deadlock.
const OWED_MAX: usize = 1024;

/// The transaction status that ReadyForQuery carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// `I`: not in a transaction.
    Idle,
    /// `T`: in a transaction.
    Transaction,
    /// `E`: in a failed transaction.
    Failed,
}

impl Status {
    /// The status byte of ReadyForQuery; an unknown one counts as a transaction, which keeps the connection.
    #[must_use]
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            b'I' => Status::Idle,
            b'E' => Status::Failed,
            _ => Status::Transaction,
        }
    }
}

/// A ReadyForQuery that the server owes, and for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    /// Query or FunctionCall.
    Simple,
    /// Sync that ends a batch.
    Sync(Shape),
    /// Sync with nothing before it since the last one.
    BareSync,
}

/// Extended-protocol messages sent since the last Sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Batch {
    Closed,
    Open(Shape),
}

/// Where the Executes of a batch stand: it tells what became of its Sync when one of them begins a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// No Execute yet.
    NoExecute,
    /// One, and nothing after it: the Sync is read, and ignored, as part of the copy.
    LastIsTheOnlyExecute,
    /// Anything else: what followed the copying Execute may have failed the copy, and then the Sync is answered.
    Unclear,
}

impl Shape {
    fn then(self, tag: u8) -> Self {
        match (self, tag) {
            (Shape::NoExecute, b'E') => Shape::LastIsTheOnlyExecute,
            (Shape::NoExecute, _) => Shape::NoExecute,
            (Shape::LastIsTheOnlyExecute | Shape::Unclear, _) => Shape::Unclear,
        }
    }
}

/// Whether the server reads copy data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copy {
    No,
    In,
    /// A copy began in a batch of unclear shape: nobody can tell how many answers are owed, so this connection never
    /// rests again and goes when its client goes.
    Lost,
}

/// The gate's state as far as a session in a transaction cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shut {
    /// Everything may be forwarded.
    No,
    /// Only what brings the session to rest may be forwarded.
    Yes,
}

/// What to do with a client's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// Send it on.
    Forward,
    /// The server would ignore it: swallow it.
    Drop,
    /// Not now: leave it where it is until an answer has come.
    Hold,
    /// The client says goodbye.
    Terminate,
    /// No client may send this after login.
    Illegal,
}

/// Where a session stands between two messages of its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stand {
    /// Between batches.
    Between,
    /// In a batch.
    Batch,
    /// The server reads copy data.
    Copy,
    /// Nobody can tell how many answers are owed.
    Lost,
}

/// Follows one session on one server connection.
#[derive(Debug)]
pub struct Tracker {
    owed: VecDeque<Owed>,
    batch: Batch,
    copy: Copy,
    status: Status,
}

impl Default for Tracker {
    fn default() -> Self {
        Self { owed: VecDeque::new(), batch: Batch::Closed, copy: Copy::No, status: Status::Idle }
    }
}

impl Tracker {
    /// True when the server connection may serve another client.
    #[must_use]
    pub fn at_rest(&self) -> bool {
        self.status == Status::Idle && self.owed.is_empty() && self.batch == Batch::Closed && self.copy == Copy::No
    }

    /// The transaction status of the last ReadyForQuery.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// True while the server works on something or waits for the rest of a batch; false between the statements of a
    /// transaction.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.owed.is_empty() || self.batch != Batch::Closed || self.copy != Copy::No
    }

    /// Where the next message of the client comes in.
    #[must_use]
    pub fn stand(&self) -> Stand {
        match (self.copy, self.batch) {
            (Copy::Lost, _) => Stand::Lost,
            (Copy::In, _) => Stand::Copy,
            (Copy::No, Batch::Open(_)) => Stand::Batch,
            (Copy::No, Batch::Closed) => Stand::Between,
        }
    }

    /// ReadyForQuery messages owed.
    #[must_use]
    pub fn owed(&self) -> usize {
        self.owed.len()
    }

    /// Decides about a client's message and, if it is forwarded, takes note of it.
    ///
    /// With the gate shut, whatever completes an open batch or copy goes on; a new statement goes on only when nothing
    /// is owed, so a client that pipelines drains within a round trip.
    pub fn frontend(&mut self, tag: u8, shut: Shut) -> Front {
        match tag {
            b'Q' | b'F' => self.start(Owed::Simple, shut),
            b'S' => self.sync(shut),
            b'P' | b'B' | b'D' | b'E' | b'C' => {
                let shape = match self.batch {
                    Batch::Closed if !self.may_start(shut) => return Front::Hold,
                    Batch::Closed => Shape::NoExecute,
                    Batch::Open(shape) => shape,
                };
                self.batch = Batch::Open(shape.then(tag));
                Front::Forward
            }
            b'H' => Front::Forward,
            b'd' => self.copy_data(),
            b'c' | b'f' => {
                let verdict = self.copy_data();
                self.copy_ends_unasked();
                self.copy_ends();
                verdict
            }
            b'X' => Front::Terminate,
            _ => Front::Illegal,
        }
    }

    /// Takes note of a server's message; `status` is the first byte of the body.
    pub fn backend(&mut self, tag: u8, status: u8) {
        match tag {
            b'Z' => {
                self.status = Status::from_byte(status);
                self.owed.pop_front();
                self.copy_ends();
            }
            b'G' => self.copy_in_begins(),
            b'E' => self.copy_ends(),
            _ => {}
        }
    }

    fn start(&mut self, owed: Owed, shut: Shut) -> Front {
        if !self.may_start(shut) {
            return Front::Hold;
        }
        self.owed.push_back(owed);
        Front::Forward
    }

    fn sync(&mut self, shut: Shut) -> Front {
        // A server that reads copy data ignores Sync; ours need not travel.
        if self.copy == Copy::In {
            return Front::Drop;
        }
        match self.batch {
            Batch::Open(shape) => {
                self.batch = Batch::Closed;
                self.owed.push_back(Owed::Sync(shape));
                Front::Forward
            }
            Batch::Closed => self.start(Owed::BareSync, shut),
        }
    }

    fn may_start(&self, shut: Shut) -> bool {
        match shut {
            Shut::No => self.owed.len() < OWED_MAX,
            Shut::Yes => self.owed.is_empty(),
        }
    }

    /// Copy data that comes after the server gave up the copy is ignored by it: at rest it must not cost a connection.
    fn copy_data(&self) -> Front {
        if self.is_busy() { Front::Forward } else { Front::Drop }
    }

    /// An end sent before the client knows of the copy: if one begins, the Syncs behind this end are answered, and those
    /// before it are not. Nobody tells them apart any more.
    fn copy_ends_unasked(&mut self) {
        if self.copy != Copy::No {
            return;
        }
        if self.batch == Batch::Open(Shape::LastIsTheOnlyExecute) {
            self.batch = Batch::Open(Shape::Unclear);
        }
        for owed in &mut self.owed {
            if *owed == Owed::Sync(Shape::LastIsTheOnlyExecute) {
                *owed = Owed::Sync(Shape::Unclear);
            }
        }
    }

    fn copy_ends(&mut self) {
        if self.copy == Copy::In {
            self.copy = Copy::No;
        }
    }

    /// The server ignores the Syncs that were sent along with the Execute that began the copy.
    fn copy_in_begins(&mut self) {
        if self.copy == Copy::Lost {
            return;
        }
        self.copy = Copy::In;
        match self.owed.front() {
            Some(Owed::Simple) => {}
            Some(Owed::Sync(Shape::LastIsTheOnlyExecute)) => {
                self.owed.pop_front();
                while self.owed.front() == Some(&Owed::BareSync) {
                    self.owed.pop_front();
                }
                if self.owed.is_empty() && self.batch == Batch::Closed {
                    self.batch = Batch::Open(Shape::Unclear);
                }
            }
            None => {}
            Some(Owed::Sync(Shape::NoExecute | Shape::Unclear) | Owed::BareSync) => self.copy = Copy::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What PostgreSQL's main loop does with the messages it reads, as far as ReadyForQuery is concerned.
    #[derive(Default)]
    #[expect(
        clippy::struct_excessive_bools,
        reason = "mirrors the flags of PostgreSQL's main loop, which it stands for"
    )]
    struct Server {
        inbox: VecDeque<Sent>,
        in_transaction: bool,
        skip_to_sync: bool,
        copy: Option<bool>, // Some(simple)
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Sent {
        Begin,
        Commit,
        Select,
        Broken,
        Copy,
        Parse,
        Execute,
        BrokenParse,
        ExecuteCopy,
        Sync,
        Flush,
        Data,
        Done,
    }

    impl Sent {
        fn tag(self) -> u8 {
            match self {
                Sent::Begin | Sent::Commit | Sent::Select | Sent::Broken | Sent::Copy => b'Q',
                Sent::Parse | Sent::BrokenParse => b'P',
                Sent::Execute | Sent::ExecuteCopy => b'E',
                Sent::Sync => b'S',
                Sent::Flush => b'H',
                Sent::Data => b'd',
                Sent::Done => b'c',
            }
        }
    }

    impl Server {
        fn ready(&self) -> (u8, u8) {
            (b'Z', if self.in_transaction { b'T' } else { b'I' })
        }

        /// Reads one message and returns what it sends.
        fn step(&mut self) -> Vec<(u8, u8)> {
            let Some(sent) = self.inbox.pop_front() else { return Vec::new() };
            if let Some(simple) = self.copy {
                return match sent {
                    Sent::Sync | Sent::Flush | Sent::Data => Vec::new(),
                    Sent::Done => {
                        self.copy = None;
                        if simple { vec![(b'C', 0), self.ready()] } else { vec![(b'C', 0)] }
                    }
                    Sent::Begin
                    | Sent::Commit
                    | Sent::Select
                    | Sent::Broken
                    | Sent::Copy
                    | Sent::Parse
                    | Sent::Execute
                    | Sent::BrokenParse
                    | Sent::ExecuteCopy => {
                        self.copy = None;
                        if simple {
                            vec![(b'E', 0), self.ready()]
                        } else {
                            self.skip_to_sync = true;
                            vec![(b'E', 0)]
                        }
                    }
                };
            }
            if self.skip_to_sync && sent != Sent::Sync {
                return Vec::new();
            }
            match sent {
                Sent::Begin => self.in_transaction = true,
                Sent::Commit => self.in_transaction = false,
                Sent::Select => {}
                Sent::Broken => return vec![(b'E', 0), self.ready()],
                Sent::Copy => {
                    self.copy = Some(true);
                    return vec![(b'G', 0)];
                }
                Sent::ExecuteCopy => {
                    self.copy = Some(false);
                    return vec![(b'G', 0)];
                }
                Sent::BrokenParse => {
                    self.skip_to_sync = true;
                    return vec![(b'E', 0)];
                }
                Sent::Sync => {
                    self.skip_to_sync = false;
                    return vec![self.ready()];
                }
                Sent::Parse | Sent::Execute => return vec![(b'1', 0)],
                Sent::Flush | Sent::Data | Sent::Done => return Vec::new(),
            }
            vec![(b'C', 0), self.ready()]
        }

        fn is_at_rest(&self) -> bool {
            self.inbox.iter().all(|s| matches!(s, Sent::Data | Sent::Done | Sent::Flush))
                && !self.in_transaction
                && self.copy.is_none()
                && !self.skip_to_sync
        }
    }

    fn sent() -> impl Strategy<Value = Sent> {
        prop_oneof![
            Just(Sent::Begin),
            Just(Sent::Commit),
            Just(Sent::Select),
            Just(Sent::Broken),
            Just(Sent::Copy),
            Just(Sent::Parse),
            Just(Sent::Execute),
            Just(Sent::BrokenParse),
            Just(Sent::ExecuteCopy),
            Just(Sent::Sync),
            Just(Sent::Sync),
            Just(Sent::Flush),
            Just(Sent::Data),
            Just(Sent::Done),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// Whatever the client sends and however answers interleave: a connection that we call at rest is at rest.
        #[test]
        fn at_rest_is_never_claimed_too_early(script in proptest::collection::vec((sent(), 0usize..4, any::<bool>()), 0..40)) {
            let mut tracker = Tracker::default();
            let mut server = Server::default();
            for (message, steps, shut) in script {
                let shut = if shut { Shut::Yes } else { Shut::No };
                match tracker.frontend(message.tag(), shut) {
                    Front::Forward => server.inbox.push_back(message),
                    Front::Drop | Front::Hold => {}
                    Front::Terminate | Front::Illegal => unreachable!(),
                }
                for _ in 0..steps {
                    for (tag, status) in server.step() { tracker.backend(tag, status); }
                }
                if tracker.at_rest() {
                    prop_assert!(server.is_at_rest(), "inbox {:?}", server.inbox);
                }
            }
        }

        /// A client that keeps the protocol comes to rest once everything is answered.
        #[test]
        fn a_lawful_client_comes_to_rest(batches in proptest::collection::vec(prop_oneof![
            Just(vec![Sent::Select]), Just(vec![Sent::Begin, Sent::Select, Sent::Commit]), Just(vec![Sent::Broken]),
            Just(vec![Sent::Parse, Sent::Execute, Sent::Sync]), Just(vec![Sent::BrokenParse, Sent::Execute, Sent::Sync]),
            Just(vec![Sent::Sync]),
        ], 1..20)) {
            let mut tracker = Tracker::default();
            let mut server = Server::default();
            for message in batches.into_iter().flatten() {
                prop_assert_eq!(tracker.frontend(message.tag(), Shut::No), Front::Forward);
                server.inbox.push_back(message);
            }
            while !server.inbox.is_empty() {
                for (tag, status) in server.step() { tracker.backend(tag, status); }
            }
            prop_assert!(tracker.at_rest());
        }

        /// No byte makes the tracker panic or grow without bound.
        #[test]
        fn any_tags_are_bounded(tags in proptest::collection::vec((any::<bool>(), any::<u8>(), any::<u8>()), 0..5000)) {
            let mut tracker = Tracker::default();
            for (front, tag, status) in tags {
                if front { tracker.frontend(tag, Shut::No); } else { tracker.backend(tag, status); }
                prop_assert!(tracker.owed.len() <= OWED_MAX + 1);
            }
        }
    }

    fn front(tracker: &mut Tracker, tags: &[u8]) {
        for tag in tags {
            assert_eq!(tracker.frontend(*tag, Shut::No), Front::Forward, "{}", *tag as char);
        }
    }

    /// libpq sends Execute and Sync at once, then the data, then CopyDone and Sync: two Syncs, one ReadyForQuery.
    #[test]
    fn the_sync_sent_along_with_a_copy_is_not_owed() {
        let mut tracker = Tracker::default();
        front(&mut tracker, b"PBES");
        tracker.backend(b'G', 0);
        front(&mut tracker, b"ddc");
        assert!(!tracker.at_rest());
        front(&mut tracker, b"S");
        tracker.backend(b'C', 0);
        assert!(!tracker.at_rest());
        tracker.backend(b'Z', b'I');
        assert!(tracker.at_rest());
    }

    /// The server answers a Sync behind the CopyDone, whoever sent that before it knew of the copy: what is owed for the
    /// Query behind both must not count as that answer.
    #[test]
    fn an_end_sent_before_the_copy_is_known_keeps_the_connection() {
        for early in [&b"PBEcSQ"[..], b"PBEScSQ", b"PBEfSQ", b"PBESSfQ"] {
            let mut tracker = Tracker::default();
            front(&mut tracker, early);
            tracker.backend(b'G', 0);
            tracker.backend(b'C', 0);
            for _ in 0..4 {
                tracker.backend(b'Z', b'I');
                assert!(!tracker.at_rest(), "{}", String::from_utf8_lossy(early));
            }
        }
    }

    #[test]
    fn copy_data_that_comes_after_the_end_costs_no_connection() {
        let mut tracker = Tracker::default();
        front(&mut tracker, b"Q");
        tracker.backend(b'G', 0);
        front(&mut tracker, b"d");
        tracker.backend(b'E', 0);
        tracker.backend(b'Z', b'I');
        assert!(tracker.at_rest());
        assert_eq!(tracker.frontend(b'd', Shut::No), Front::Drop);
        assert_eq!(tracker.frontend(b'c', Shut::No), Front::Drop);
        assert!(tracker.at_rest());
    }

    #[test]
    fn a_shut_gate_lets_a_transaction_go_on_one_statement_at_a_time() {
        let mut tracker = Tracker::default();
        front(&mut tracker, b"Q");
        assert_eq!(tracker.frontend(b'Q', Shut::Yes), Front::Hold, "an answer is outstanding");
        tracker.backend(b'Z', b'T');
        assert_eq!(tracker.frontend(b'P', Shut::Yes), Front::Forward);
        assert_eq!(tracker.frontend(b'S', Shut::Yes), Front::Forward, "a begun batch is finished");
        assert_eq!(tracker.frontend(b'P', Shut::Yes), Front::Hold);
        tracker.backend(b'Z', b'I');
        assert!(tracker.at_rest());
    }
}
