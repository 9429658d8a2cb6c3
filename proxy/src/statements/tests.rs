//! Random pipelines of several clients on shared servers, against what PostgreSQL would answer each on a server of its own.
//!
//! Invariant: [`Server`] follows src/backend/tcop/postgres.c (exec_parse_message and its like) and prepare.c in what they
//! do with statements; it knows nothing of the desk.

use std::collections::{HashMap, VecDeque};
use std::mem::discriminant;

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::frame;
use crate::frame::HEADER_BYTES;
use crate::message::{put, put_cstring, put_query};
use crate::tracker::{Front, Shut, Stand, Status, Tracker};

type Answer = (u8, Vec<u8>);

/// A PostgreSQL session, as far as statements are concerned.
#[expect(clippy::struct_excessive_bools, reason = "mirrors the flags of PostgreSQL's main loop, which it stands for")]
struct Server {
    inbox: VecDeque<Vec<u8>>,
    named: HashMap<Vec<u8>, Vec<u8>>,
    unnamed: Option<Vec<u8>>,
    unnamed_was_bound: bool,
    portal: Option<Vec<u8>>,
    status: u8,
    skips: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            inbox: VecDeque::new(),
            named: HashMap::new(),
            unnamed: None,
            unnamed_was_bound: false,
            portal: None,
            status: b'I',
            skips: false,
        }
    }
}

fn text(bytes: &[u8]) -> (&[u8], &[u8]) {
    let nul = bytes.iter().position(|b| *b == 0).unwrap();
    (&bytes[..nul], &bytes[nul + 1..])
}

impl Server {
    fn feed(&mut self, mut bytes: &[u8]) {
        while let Some(header) = frame::header(bytes).unwrap() {
            self.inbox.push_back(bytes[..header.total_bytes].to_vec());
            bytes = &bytes[header.total_bytes..];
        }
        assert!(bytes.is_empty(), "a message was cut");
    }

    /// Reads one message and gives its answers.
    fn step(&mut self) -> Vec<Answer> {
        let Some(message) = self.inbox.pop_front() else { return Vec::new() };
        let (tag, body) = (message[0], &message[HEADER_BYTES..]);
        if self.skips && tag != b'S' {
            return Vec::new();
        }
        let mut answers = Vec::new();
        let outcome = match tag {
            b'P' => self.parse(body, &mut answers),
            b'B' => self.bind(body, &mut answers),
            b'D' => self.describe(body, &mut answers),
            b'C' => {
                match (body[0], text(&body[1..]).0) {
                    (b'S', b"") => self.unnamed = None,
                    (b'S', name) => drop(self.named.remove(name)),
                    (_, _) => {}
                }
                answers.push((b'3', Vec::new()));
                Ok(())
            }
            b'E' => match self.portal.clone() {
                None => Err("34000"),
                Some(command) => self.run(&command, &mut answers),
            },
            b'Q' => {
                (self.unnamed, self.portal) = (None, None);
                let commands = text(body).0.to_vec();
                let run = |part: &str| self.run(part.as_bytes(), &mut answers);
                String::from_utf8(commands).unwrap().split("; ").try_for_each(run)
            }
            b'S' => Ok(()),
            other => panic!("tag {other}"),
        };
        if let Err(code) = outcome {
            answers.push((b'E', code.as_bytes().to_vec()));
            self.skips = tag != b'Q';
            if self.status == b'T' {
                self.status = b'E';
            }
        }
        if matches!(tag, b'S' | b'Q') {
            self.skips = false;
            if self.status == b'I' {
                self.portal = None;
            }
            answers.push((b'Z', vec![self.status]));
        }
        answers
    }

    fn refuses(&self, command: &[u8]) -> Result<(), &'static str> {
        if self.status == b'E' && command != b"ROLLBACK" { Err("25P02") } else { Ok(()) }
    }

    fn parse(&mut self, body: &[u8], answers: &mut Vec<Answer>) -> Result<(), &'static str> {
        let (name, rest) = text(body);
        let command = text(rest).0;
        if name.is_empty() {
            self.unnamed = None;
        }
        if command == b"no parse" {
            return Err("42601");
        }
        if !command.is_empty() {
            self.refuses(command)?;
        }
        if name.is_empty() {
            self.unnamed = Some(command.to_vec());
            self.unnamed_was_bound = false;
        } else if self.named.contains_key(name) {
            return Err("42P05");
        } else {
            self.named.insert(name.to_vec(), command.to_vec());
        }
        answers.push((b'1', Vec::new()));
        Ok(())
    }

    fn find(&self, name: &[u8]) -> Result<Vec<u8>, &'static str> {
        let found = if name.is_empty() { self.unnamed.as_ref() } else { self.named.get(name) };
        found.cloned().ok_or("26000")
    }

    fn bind(&mut self, body: &[u8], answers: &mut Vec<Answer>) -> Result<(), &'static str> {
        let name = text(text(body).1).0;
        let command = self.find(name)?;
        self.refuses(&command)?;
        if command == b"no bind" {
            return Err("22000");
        }
        if name.is_empty() {
            self.unnamed_was_bound = true;
        }
        self.portal = Some(command);
        answers.push((b'2', Vec::new()));
        Ok(())
    }

    fn describe(&self, body: &[u8], answers: &mut Vec<Answer>) -> Result<(), &'static str> {
        let command = self.find(text(&body[1..]).0)?;
        self.refuses(&command)?;
        answers.push((b't', command.clone()));
        answers.push((b'T', command));
        Ok(())
    }

    fn run(&mut self, command: &[u8], answers: &mut Vec<Answer>) -> Result<(), &'static str> {
        self.refuses(command)?;
        let mut done = |tag: &[u8]| answers.push((b'C', [tag, b"\0"].concat()));
        match command {
            b"BEGIN" => self.status = b'T',
            b"ROLLBACK" => self.status = b'I',
            b"DEALLOCATE ALL" => {
                self.named.clear();
                done(b"DEALLOCATE ALL");
                return Ok(());
            }
            b"PREPARE \"PGCUTOVER none\" AS SELECT 1" => {
                assert!(self.named.insert(b"PGCUTOVER none".to_vec(), Vec::new()).is_none());
                done(b"PREPARE");
                return Ok(());
            }
            _ => {
                if let Some(name) = command.strip_prefix(b"DEALLOCATE ") {
                    let name = name.strip_prefix(b"\"").and_then(|name| name.strip_suffix(b"\"")).unwrap_or(name);
                    self.named.remove(name).ok_or("26000")?;
                    done(b"DEALLOCATE");
                    return Ok(());
                }
            }
        }
        done(command);
        Ok(())
    }
}

/// A message of a client; names and texts by number.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Sent {
    Parse(usize, usize),
    Bind(usize),
    Describe(usize),
    Close(usize),
    Execute,
    Sync,
    Query(usize),
}

const NAMES: [&str; 4] = ["", "s1", "s2", "s3"];
const TEXTS: [&str; 10] =
    ["one", "two", "three", "four", "BEGIN", "ROLLBACK", "no parse", "no bind", "DEALLOCATE s1", "DEALLOCATE s2"];
/// Those before it are for any statement.
const DEALLOCATES: usize = 8;
const QUERIES: [&str; 7] = ["one", "BEGIN", "ROLLBACK", "DEALLOCATE ALL", "DEALLOCATE s1", "DEALLOCATE s2", "no bind"];

impl Sent {
    fn bytes(self) -> BytesMut {
        let mut out = BytesMut::new();
        let target = |out: &mut BytesMut, tag: u8, name: usize| {
            put(out, tag, |out| {
                out.put_u8(b'S');
                put_cstring(out, NAMES[name].as_bytes());
            });
        };
        match self {
            Sent::Parse(name, text) => put(&mut out, b'P', |out| {
                put_cstring(out, NAMES[name].as_bytes());
                put_cstring(out, TEXTS[text].as_bytes());
                out.put_u16(0);
            }),
            Sent::Bind(name) => put(&mut out, b'B', |out| {
                put_cstring(out, b"");
                put_cstring(out, NAMES[name].as_bytes());
                out.put_slice(&[0; 6]);
            }),
            Sent::Describe(name) => target(&mut out, b'D', name),
            Sent::Close(name) => target(&mut out, b'C', name),
            Sent::Execute => put(&mut out, b'E', |out| out.put_slice(&[0; 5])),
            Sent::Sync => put(&mut out, b'S', |_| {}),
            Sent::Query(text) => put_query(&mut out, QUERIES[text].as_bytes()),
        }
        out
    }
}

fn batch() -> impl Strategy<Value = Vec<Sent>> {
    let message = prop_oneof![
        4 => (0..4_usize, 0..DEALLOCATES).prop_map(|(name, text)| Sent::Parse(name, text)),
        4 => (0..4_usize).prop_map(Sent::Bind),
        1 => (0..4_usize).prop_map(Sent::Describe),
        2 => (0..4_usize).prop_map(Sent::Close),
        3 => Just(Sent::Execute),
    ];
    let extended = proptest::collection::vec(message, 0..7).prop_map(|mut messages| {
        // An unnamed statement that is replaced in the batch that brought it, by what is then skipped: not promised.
        let mut is_new = false;
        messages.retain(|message| {
            let is_dropped = is_new && matches!(message, Sent::Parse(0, _) | Sent::Close(0));
            is_new |= matches!(message, Sent::Parse(0, _));
            !is_dropped
        });
        messages
    });
    let orderly = proptest::collection::vec(0..4_usize, 1..4).prop_map(|texts| {
        texts.into_iter().flat_map(|text| [Sent::Parse(0, text), Sent::Bind(0), Sent::Execute]).collect()
    });
    // One in a batch, bound there and never again, with nothing behind it that has to do with the name.
    let deallocate = (0..4_usize, DEALLOCATES..TEXTS.len(), 2..4_usize).prop_map(|(before, text, length)| {
        let all = [Sent::Parse(0, text), Sent::Bind(0), Sent::Execute];
        let others = [Sent::Sync, Sent::Parse(0, 0), Sent::Bind(0)];
        let before = [Sent::Bind(before)].into_iter().filter(|_| before > 0);
        before.chain(all.into_iter().take(length)).chain(others).collect()
    });
    let in_batches = prop_oneof![3 => extended, 1 => orderly, 1 => deallocate].prop_map(|mut messages: Vec<Sent>| {
        messages.push(Sent::Sync);
        messages
    });
    prop_oneof![3 => in_batches, 1 => (0..QUERIES.len()).prop_map(|text| vec![Sent::Query(text)])]
}

/// A server connection of the pool.
#[derive(Default)]
struct Shared {
    server: Server,
    shelf: Shelf,
    tracker: Tracker,
}

/// A client: what it will send, its names, and a server of its own that is sent the same.
#[derive(Default)]
struct Client {
    script: VecDeque<Sent>,
    names: Option<Box<Names>>,
    own: Server,
}

/// What a transaction is made of besides its client and its server.
struct House {
    cache: Cache,
    settings: Arc<Settings>,
    prepared_max: usize,
}

/// One transaction; `paces` says when the client is faster than the server. False if the connection can't be used again.
fn transaction(
    house: &House,
    client: &mut Client,
    shared: &mut Shared,
    paces: &mut impl Iterator<Item = bool>,
) -> bool {
    let Shared { server, shelf, tracker } = shared;
    let mut desk = Desk::new(&mut client.names, shelf, &house.cache, &house.settings, house.prepared_max);
    let (mut wanted, mut got, mut begun) = (Vec::new(), Vec::new(), false);
    loop {
        let sends = !(begun && tracker.at_rest());
        let is_fast = paces.next().unwrap_or(false) || server.inbox.is_empty();
        match client.script.front().copied().filter(|_| sends && is_fast) {
            Some(sent) if offer(sent, &mut desk, server, tracker) => {
                begun = true;
                client.script.pop_front();
                client.own.feed(&sent.bytes());
                wanted.extend(client.own.step());
            }
            _ if server.inbox.is_empty() => {
                assert!(client.script.is_empty() || !sends, "nothing moves any more");
                break;
            }
            Some(_) | None => {
                for (tag, body) in server.step() {
                    tracker.backend(tag, body.first().copied().unwrap_or(0));
                    match desk.back(tag, &body) {
                        Back::Pass => got.push((tag, body)),
                        Back::Swallow => {}
                        Back::As(other) => got.push((other, Vec::new())),
                        Back::Instead | Back::Nonsense => panic!("{} {body:?}", char::from(tag)),
                    }
                    if tag == b'Z' {
                        desk.settle(tracker.owed());
                    }
                }
            }
        }
    }
    desk.part();
    assert_eq!(got, wanted);
    assert!(shelf.len() <= house.prepared_max);
    // What the pool promises of an unnamed statement ends where the transaction does.
    if client.own.unnamed_was_bound {
        client.own.unnamed = None;
    }
    tracker.at_rest()
}

/// Sends a message as the relay does; false if it has to wait.
fn offer(sent: Sent, desk: &mut Desk<'_>, server: &mut Server, tracker: &mut Tracker) -> bool {
    let bytes = sent.bytes();
    let header = frame::header(&bytes).unwrap().unwrap();
    let stand = tracker.stand();
    let look = desk.look(header, &bytes, stand);
    for cut in HEADER_BYTES..bytes.len() {
        match desk.look(header, &bytes[..cut], stand) {
            Look::More(more) => assert!(more > cut && more <= bytes.len()),
            part @ (Look::Plain | Look::Rewrite | Look::Wait | Look::Refuse(_)) => {
                assert_eq!(discriminant(&part), discriminant(&look), "{sent:?} cut at {cut}");
            }
        }
    }
    let is_rewritten = match look {
        Look::Wait => return false,
        Look::Plain => false,
        Look::Rewrite => true,
        Look::More(_) | Look::Refuse(_) => panic!("{sent:?}: {look:?}"),
    };
    assert_eq!(tracker.frontend(header.tag, Shut::No), Front::Forward);
    if is_rewritten {
        let (front, rest, out) = desk.rewrite(header, &bytes, tracker.status() == Status::Failed);
        let rest = if rest == Rest::Send { &bytes[front..] } else { &[] };
        server.feed(&[out, rest].concat());
    } else {
        assert!(desk.sent(header, &bytes, stand));
        server.feed(&bytes);
    }
    true
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever clients do with statements, in whatever pipelines, and whichever server each transaction meets, a new one
    /// after a switch included: each is answered as by a server of its own.
    #[test]
    fn clients_are_answered_as_by_servers_of_their_own(
        scripts in proptest::collection::vec(proptest::collection::vec(batch(), 1..8), 1..4),
        turns in proptest::collection::vec((0..3_usize, 0..2_usize, 0..12_u8), 1..40),
        paces in proptest::collection::vec(any::<bool>(), 64),
        prepared_max in 1..4_usize,
    ) {
        let house = House { cache: Cache::default(), settings: Arc::default(), prepared_max };
        let mut clients: Vec<Client> = scripts
            .into_iter()
            .map(|batches| Client { script: batches.into_iter().flatten().collect(), ..Client::default() })
            .collect();
        let mut pool = [Shared::default(), Shared::default()];
        let mut paces = paces.into_iter().cycle();
        for (client, server, luck) in turns {
            let index = client % clients.len();
            let client = &mut clients[index];
            if client.script.is_empty() {
                continue;
            }
            if luck == 0 {
                pool[server] = Shared::default();
            }
            if !transaction(&house, client, &mut pool[server], &mut paces) {
                pool[server] = Shared::default();
            }
        }
    }

    /// No bytes make it panic, and what it asks for is bounded.
    #[test]
    fn any_bytes_are_borne(
        messages in proptest::collection::vec((prop_oneof![Just(b'P'), Just(b'B'), Just(b'C'), Just(b'D'), Just(b'Q'), any::<u8>()],
            proptest::collection::vec(prop_oneof![Just(0_u8), Just(b'S'), Just(b'P'), any::<u8>()], 0..12)), 0..40),
        answers in proptest::collection::vec((prop_oneof![Just(b'1'), Just(b'2'), Just(b'3'), Just(b't'), Just(b'E'), Just(b'C'), Just(b'Z')], 0..3_usize), 0..40),
    ) {
        let (mut names, mut shelf, cache, settings) = (None, Shelf::default(), Cache::default(), Arc::default());
        let mut desk = Desk::new(&mut names, &mut shelf, &cache, &settings, 2);
        let mut answers = answers.into_iter();
        for (tag, body) in messages {
            let mut bytes = BytesMut::new();
            put(&mut bytes, tag, |out| out.put_slice(&body));
            let header = frame::header(&bytes).unwrap().unwrap();
            match desk.look(header, &bytes, Stand::Between) {
                Look::Plain => { let _ = desk.sent(header, &bytes, Stand::Between); }
                Look::Rewrite => { desk.rewrite(header, &bytes, false); }
                Look::More(more) => prop_assert!(more > bytes.len(), "all of it is there"),
                Look::Wait | Look::Refuse(_) => {}
            }
            if let Some((tag, marks)) = answers.next() {
                desk.back(tag, &body);
                desk.settle(marks);
            }
        }
        desk.part();
    }
}

fn send(desk: &mut Desk<'_>, server: &mut Server, tracker: &mut Tracker, messages: &[Sent]) -> Vec<u8> {
    for sent in messages {
        assert!(offer(*sent, desk, server, tracker), "{sent:?} has to wait");
    }
    let mut tags = Vec::new();
    while !server.inbox.is_empty() {
        for (tag, body) in server.step() {
            tracker.backend(tag, body.first().copied().unwrap_or(0));
            match desk.back(tag, &body) {
                Back::Swallow => {}
                Back::As(tag) => tags.push(tag),
                Back::Pass | Back::Instead | Back::Nonsense => tags.push(tag),
            }
            if tag == b'Z' {
                desk.settle(tracker.owed());
            }
        }
    }
    tags
}

/// lib/pq and others prepare the unnamed statement, wait, and bind it: by then another client has the connection.
#[test]
fn an_unnamed_statement_follows_its_client_until_it_is_bound() {
    let (cache, settings) = (Cache::default(), Arc::default());
    let (mut one, mut two, mut pool) = (None, None, [Shared::default(), Shared::default()]);
    let mut turn = |names: &mut Option<Box<Names>>, at: usize, messages: &[Sent]| {
        let Shared { server, shelf, tracker } = &mut pool[at];
        let mut desk = Desk::new(names, shelf, &cache, &settings, 2);
        let tags = send(&mut desk, server, tracker, messages);
        desk.part();
        (String::from_utf8(tags).unwrap(), server.portal.take(), server.unnamed.clone())
    };
    let prepare = |text| [Sent::Parse(0, text), Sent::Describe(0), Sent::Sync];
    assert_eq!(turn(&mut one, 0, &prepare(0)).0, "1tTZ");
    assert_eq!(turn(&mut two, 0, &prepare(1)).0, "1tTZ");
    for (names, at, wanted) in [(&mut one, 0, "one"), (&mut two, 1, "two")] {
        let (tags, _, unnamed) = turn(names, at, &[Sent::Bind(0), Sent::Execute, Sent::Sync]);
        assert_eq!((tags.as_str(), unnamed.as_deref()), ("2CZ", Some(wanted.as_bytes())));
        assert_eq!(turn(names, at, &[Sent::Bind(0), Sent::Sync]).0, "EZ", "once");
    }
}

/// Names and texts of all clients together stay within what the process may have; what nobody uses makes room.
#[test]
fn texts_that_nobody_has_make_room_and_are_counted_once_in_all_databases() {
    let budget = Budget::default();
    let (one, two) = (Cache::new(Arc::clone(&budget)), Cache::new(Arc::clone(&budget)));
    let (kept, same) = (one.intern(b"kept"), two.intern(b"kept"));
    (0..CACHE_LEN_MIN).for_each(|n| drop(one.intern(n.to_string().as_bytes())));
    assert!(Arc::ptr_eq(&kept, &one.intern(b"kept")) && !Arc::ptr_eq(&kept, &same));
    drop(one.intern(b"one more"));
    assert!(budget.load(Ordering::Relaxed) < 100, "{budget:?}");
    one.retire(&kept);
    assert!(!Arc::ptr_eq(&kept, &one.intern(b"kept")));
    drop((one, two));
    assert_eq!(budget.load(Ordering::Relaxed), 0);
}
