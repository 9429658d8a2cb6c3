//! What a run did, on disk: append, fsync, lock; read back, also after a crash in the middle of a line.
//!
//! Invariant: the only writer of journals. Nothing is written that `State::next` refuses; when `append` returns, the
//! events are on disk; one run per database and directory at a time. What reads as torn was never waited for by anybody.

mod lock;

pub use lock::whoami;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use pgcutover_api::epoch::RunId;
use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::journal::lock::Lock;
use crate::state::{IllegalEvent, State};

/// One event and its moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Microseconds since 1970-01-01 UTC, by proxyctl's clock; never goes back within a run.
    pub at_us: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Why a journal could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk said no.
    #[error("{}: {error}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        error: std::io::Error,
    },
    /// Another proxyctl works on the same database.
    #[error("another proxyctl is at work on '{database}': {holder} (it holds {})", .path.display())]
    Locked {
        /// The route name.
        database: String,
        /// Who it is, in its own words.
        holder: String,
        /// The lock file.
        path: PathBuf,
    },
    /// A line that was once on disk cannot be read: not a crash, but damage.
    #[error(
        "{}: line {line} (from byte {byte} on) is damaged: {reason}. No crash of proxyctl leaves that. The store knows how the \
         epoch stands: see 'proxyctl status', then 'proxyctl resume-run RUN --without-journal'", .path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// Where it begins, from 0.
        byte: usize,
        /// Why.
        reason: String,
    },
    /// There is nothing to take up.
    #[error("{}: nothing was written before it broke off: that run has done nothing", .path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// An event that must not follow.
    #[error("journal: {0}")]
    Illegal(#[from] IllegalEvent),
}

/// A record as it stands in the file.
#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    record: Record,
    /// Bytes of the file that were on disk when this line was written: what cannot be read before that is damage, what
    /// cannot be read after it a crash may have torn. Journals of before there was this field do not have it.
    #[serde(default)]
    synced: Option<usize>,
}

/// The journal of a run that goes on.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    written: usize,
    synced: usize,
    clock: Clock,
    state: State,
    records: Vec<Record>,
    lock: Lock,
}

/// Wall-clock moments that never go back.
#[derive(Debug)]
struct Clock {
    started: Instant,
    started_us: u64,
}

impl Clock {
    /// Now, or the given moment if that is later.
    fn start(not_before_us: u64) -> Clock {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Clock { started: Instant::now(), started_us: now_us.max(not_before_us) }
    }

    fn now_us(&self) -> u64 {
        self.started_us.saturating_add(u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

impl Journal {
    /// Makes the journal of a new run; fails while another run of the database holds the lock.
    pub fn create(dir: &Path, database: &str, run: RunId) -> Result<Journal, JournalError> {
        std::fs::create_dir_all(dir).map_err(at(dir))?;
        let lock = Lock::take(dir, database, run)?;
        let path = path(dir, run);
        let file = OpenOptions::new().append(true).create_new(true).open(&path).map_err(at(&path))?;
        // The directory entry must survive a crash as well.
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))?;
        let (state, records) = (State::default(), Vec::new());
        Ok(Journal { path, file, written: 0, synced: 0, clock: Clock::start(0), state, records, lock })
    }

    /// Takes up the journal of a run that broke off: what a crash left of its end is cut off, what is left is on disk.
    pub fn reopen(dir: &Path, database: &str, run: RunId) -> Result<Journal, JournalError> {
        let path = path(dir, run);
        // Without its file there is nothing to lock for.
        let file = OpenOptions::new().append(true).open(&path).map_err(at(&path))?;
        let lock = Lock::take(dir, database, run)?;
        let Replay { records, state, whole_bytes, torn_bytes: _ } = read(&path)?;
        let Some(last) = records.last() else { return Err(JournalError::Empty { path }) };
        let clock = Clock::start(last.at_us);
        let cut = u64::try_from(whole_bytes).unwrap_or(u64::MAX);
        file.set_len(cut).and_then(|()| file.sync_all()).map_err(at(&path))?;
        Ok(Journal { path, file, written: whole_bytes, synced: whole_bytes, clock, state, records, lock })
    }

    /// Who held the lock last and died without giving it back; nobody if the last one ended in good order.
    pub fn died_at_work(&self) -> Option<&str> {
        self.lock.stale()
    }

    /// Writes events, in order, with one fsync; all of them or, on a refusal, none.
    pub fn append(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(), JournalError> {
        self.write(events)?;
        self.file.sync_data().map_err(at(&self.path))?;
        self.synced = self.written;
        Ok(())
    }

    /// Writes something seen on the way. Nothing depends on it, so nothing waits for the disk.
    pub fn note(&mut self, event: Event) -> Result<(), JournalError> {
        self.write([event])
    }

    fn write(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(), JournalError> {
        let mut state = self.state.clone();
        let mut lines = String::new();
        let mut records = Vec::new();
        for event in events {
            state = state.next(&event)?;
            let record = Record { at_us: self.clock.now_us(), event };
            let line = Line { record, synced: Some(self.synced) };
            let text = serde_json::to_string(&line)
                .map_err(|error| JournalError::Io { path: self.path.clone(), error: error.into() })?;
            lines.push_str(&text);
            lines.push('\n');
            records.push(line.record);
        }
        self.file.write_all(lines.as_bytes()).map_err(at(&self.path))?;
        self.written += lines.len();
        self.state = state;
        self.records.append(&mut records);
        Ok(())
    }

    /// Where the run stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Everything written so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Microseconds since 1970 by the journal's clock.
    pub fn now_us(&self) -> u64 {
        self.clock.now_us()
    }
}

/// The file of a run.
pub fn path(dir: &Path, run: RunId) -> PathBuf {
    dir.join(format!("{run}.jsonl"))
}

/// Every run with a journal in that directory, in no order.
pub fn runs(dir: &Path) -> Result<Vec<RunId>, JournalError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        // Nothing ever ran here.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(dir)(error)),
    };
    let mut runs = Vec::new();
    for entry in entries {
        let name = entry.map_err(at(dir))?.file_name();
        runs.extend(
            name.to_str().and_then(|name| name.strip_suffix(".jsonl")).and_then(|run| run.parse::<RunId>().ok()),
        );
    }
    Ok(runs)
}

/// Puts a journal that cannot be read out of the way, for people; where it went.
pub fn set_aside(dir: &Path, run: RunId) -> Result<PathBuf, JournalError> {
    let (from, to) = (path(dir, run), path(dir, run).with_extension("damaged"));
    std::fs::rename(&from, &to).map_err(at(&from))?;
    Ok(to)
}

/// A journal that was read back.
#[derive(Debug, PartialEq)]
pub struct Replay {
    /// Its events.
    pub records: Vec<Record>,
    /// Where the run stood after them.
    pub state: State,
    /// Bytes they take.
    pub whole_bytes: usize,
    /// Bytes at the end that a crash left of unfinished lines.
    pub torn_bytes: usize,
}

/// Reads a journal. What a crash left of its end is left out; damage anywhere else is an error.
pub fn read(path: &Path) -> Result<Replay, JournalError> {
    let mut text = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut text)).map_err(at(path))?;
    parse(path, &text)
}

fn parse(path: &Path, text: &[u8]) -> Result<Replay, JournalError> {
    let mut replay = Replay { records: Vec::new(), state: State::default(), whole_bytes: 0, torn_bytes: 0 };
    // A line counts once its newline is there: bytes of one write may reach the disk in any order.
    while let Some(length) = text[replay.whole_bytes..].iter().position(|byte| *byte == b'\n') {
        let (byte, line) = (replay.whole_bytes, replay.records.len() + 1);
        let damaged = |reason: String| JournalError::Damaged { path: path.to_owned(), line, byte, reason };
        match serde_json::from_slice::<Line>(&text[byte..byte + length]) {
            Ok(Line { record, .. }) => {
                replay.state = replay.state.next(&record.event).map_err(|illegal| damaged(illegal.to_string()))?;
                replay.records.push(record);
                replay.whole_bytes += length + 1;
            }
            Err(error) if was_on_disk(byte, &text[byte + length + 1..]) => return Err(damaged(error.to_string())),
            Err(_) => break,
        }
    }
    replay.torn_bytes = text.len() - replay.whole_bytes;
    Ok(replay)
}

/// Whether a line that begins at `byte` was on disk when one of those after it was written.
fn was_on_disk(byte: usize, after: &[u8]) -> bool {
    let lines = after.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let mut readable = lines.filter_map(|line| serde_json::from_slice::<Line>(line).ok());
    readable.any(|line| line.synced.is_none_or(|synced| synced > byte))
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> JournalError {
    let path = path.to_owned();
    move |error| JournalError::Io { path: path.clone(), error }
}

#[cfg(test)]
mod tests {
    use pgcutover_api::epoch::Epoch;
    use proptest::prelude::*;

    use super::*;
    use crate::event::{Began, Decision, Ending, Facts};
    use crate::finding::Finding;
    use crate::plan::{Goal, Step};
    use crate::state::Phase;

    fn began(run: RunId) -> Event {
        Event::Began(Began {
            run,
            goal: Goal::Cutover,
            database: "app".into(),
            source: "blue".into(),
            target: "green".into(),
            proxies: vec!["p1".into(), "p2".into()],
            budgets_ms: vec![("drain".into(), 2000)],
            proxyctl_version: "0".into(),
            by: "ops@db1, pid 7".into(),
            config: "0".into(),
        })
    }

    fn some_events(run: RunId) -> Vec<Event> {
        vec![
            began(run),
            Event::Started { step: Step::Armed },
            Event::Observed { what: "source".into(), facts: Facts::new().with("version", "13.4 \"x\"\n") },
            Event::Found { finding: Finding::red("armed", "public.t", "no primary key", "add one") },
            Event::Failed { step: Step::Armed, error: "refused".into() },
            Event::Undone { step: Step::Armed },
            Event::Ended { ending: Ending::Refused },
        ]
    }

    #[test]
    fn what_was_appended_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunId::random();
        let mut journal = Journal::create(dir.path(), "app", run).unwrap();
        journal.append(some_events(run)).unwrap();
        let replay = read(&path(dir.path(), run)).unwrap();
        assert_eq!(replay.records, journal.records());
        assert_eq!(replay.state, *journal.state());
        assert_eq!(replay.state.phase, Phase::Ended(Ending::Refused));
        assert_eq!(replay.torn_bytes, 0);
        assert!(replay.records.is_sorted_by_key(|record| record.at_us));
    }

    #[test]
    fn an_illegal_event_is_refused_and_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunId::random();
        let mut journal = Journal::create(dir.path(), "app", run).unwrap();
        let refused = journal.append([began(run), Event::Started { step: Step::Fenced }]);
        assert!(matches!(refused, Err(JournalError::Illegal(_))));
        assert_eq!(std::fs::read(journal.path()).unwrap(), b"");
        journal.append([began(run)]).unwrap();
    }

    #[test]
    fn a_second_run_of_the_same_database_waits_outside() {
        let dir = tempfile::tempdir().unwrap();
        let first = Journal::create(dir.path(), "a/b", RunId::random()).unwrap();
        let second = Journal::create(dir.path(), "a/b", RunId::random());
        assert!(matches!(second, Err(JournalError::Locked { .. })));
        Journal::create(dir.path(), "a_2fb", RunId::random()).unwrap();
        drop(first);
        Journal::create(dir.path(), "a/b", RunId::random()).unwrap();
    }

    #[test]
    fn damage_in_the_middle_is_not_taken_for_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunId::random();
        let mut journal = Journal::create(dir.path(), "app", run).unwrap();
        for event in some_events(run) {
            journal.append([event]).unwrap();
        }
        let file = path(dir.path(), run);
        let text = std::fs::read_to_string(&file).unwrap();
        let second = text.find('\n').unwrap() + 1;
        for (old, new) in
            [("\"started\"", "\"stated\""), ("{\"at_us\"", "\0\0\0\0\0\0\0\0"), ("\"armed\"", "\"fenced\"")]
        {
            let altered = text[second..].replacen(old, new, 1);
            std::fs::write(&file, format!("{}{altered}", &text[..second])).unwrap();
            let error = read(&file).unwrap_err();
            assert!(matches!(error, JournalError::Damaged { line: 2, byte, .. } if byte == second), "{error}");
            let told = error.to_string();
            assert!(told.contains("--without-journal") && told.contains(&format!("byte {second} ")), "{told}");
        }
    }

    /// One write of several lines may reach the disk in any order: a hole before lines that can be read is no damage, if
    /// nobody was told that they were written.
    #[test]
    fn a_hole_in_what_was_never_acknowledged_is_torn_and_not_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunId::random();
        let mut journal = Journal::create(dir.path(), "app", run).unwrap();
        let mut events = some_events(run);
        let last = events.split_off(2);
        journal.append(events).unwrap();
        let acknowledged = std::fs::read(journal.path()).unwrap().len();
        journal.append(last).unwrap();
        let whole = std::fs::read(journal.path()).unwrap();
        for hole in acknowledged..whole.len() {
            let mut torn = whole.clone();
            let end = (hole + 7).min(whole.len());
            torn[hole..end].fill(0);
            let replay = parse(journal.path(), &torn).unwrap();
            let complete = whole[..hole].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(replay.records[..], journal.records()[..complete], "a hole at {hole}");
        }
        let mut damaged = whole;
        damaged[acknowledged - 9..acknowledged - 2].fill(0);
        assert!(matches!(parse(journal.path(), &damaged), Err(JournalError::Damaged { line: 2, .. })));
    }

    #[test]
    fn a_journal_that_is_taken_up_goes_on_after_its_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunId::random();
        let mut journal = Journal::create(dir.path(), "app", run).unwrap();
        journal.append([began(run), Event::Started { step: Step::Armed }]).unwrap();
        assert!(matches!(Journal::reopen(dir.path(), "app", run), Err(JournalError::Locked { .. })));
        drop(journal);
        let file = path(dir.path(), run);
        let mut torn = std::fs::read(&file).unwrap();
        torn.extend(b"{\"at_us\":17, \"\xc3");
        std::fs::write(&file, &torn).unwrap();
        let mut journal = Journal::reopen(dir.path(), "app", run).unwrap();
        journal.append([Event::Continued { epoch: None }, Event::Ended { ending: Ending::Refused }]).unwrap();
        let replay = read(&file).unwrap();
        assert_eq!((replay.records.len(), replay.torn_bytes), (4, 0));
        assert!(replay.records.is_sorted_by_key(|record| record.at_us));
        let nothing = RunId::random();
        std::fs::write(path(dir.path(), nothing), b"{\"at_").unwrap();
        drop(journal);
        assert!(matches!(Journal::reopen(dir.path(), "app", nothing), Err(JournalError::Empty { .. })));
    }

    #[test]
    fn a_lock_that_was_not_given_back_tells_who_died_at_work() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (RunId::random(), RunId::random());
        let journal = Journal::create(dir.path(), "app", first).unwrap();
        assert_eq!(journal.died_at_work(), None);
        let Err(JournalError::Locked { holder, .. }) = Journal::create(dir.path(), "app", second) else {
            panic!("two at work");
        };
        assert!(holder.contains(&first.to_string()) && holder.contains("pid"), "{holder}");
        drop(journal);
        let journal = Journal::create(dir.path(), "app", second).unwrap();
        assert_eq!(journal.died_at_work(), None);
        drop(journal);
        // As a process leaves it that was killed: the kernel has given the lock back, the words are there.
        std::fs::write(dir.path().join("app.lock"), "run x of ops@db1, pid 7").unwrap();
        let journal = Journal::create(dir.path(), "app", RunId::random()).unwrap();
        assert_eq!(journal.died_at_work(), Some("run x of ops@db1, pid 7"));
    }

    /// Runs of every kind of end, event by event as the engine writes them.
    fn runs_of_every_kind(run: RunId) -> Vec<Vec<Event>> {
        let opened = Event::Opened { epoch: 7u64.try_into().unwrap() };
        let until = |goal: Goal, last: Step| {
            let mut events = vec![began(run)];
            if let Event::Began(began) = &mut events[0] {
                began.goal = goal;
            }
            for step in Step::ALL.into_iter().filter(|step| goal.takes(*step) && *step <= last) {
                events.push(Event::Started { step });
                if step == Step::Paused {
                    events.push(opened.clone());
                }
                if step == Step::Decided {
                    events.push(Event::Decided { outcome: Decision::Commit });
                }
                events.push(Event::Finished { step, facts: Facts::new().with("größe", "5 µs") });
            }
            events
        };
        let last = *Step::ALL.last().unwrap();
        let mut committed = until(Goal::Cutover, last);
        committed.push(Event::Ended { ending: Ending::Committed });
        let mut aborted = until(Goal::Cutover, Step::Fenced);
        aborted.extend([
            Event::Started { step: Step::CaughtUp },
            Event::Failed { step: Step::CaughtUp, error: "no".into() },
            Event::Decided { outcome: Decision::Abort },
            Event::UndoFailed { step: Step::Fenced, error: "gone".into() },
            Event::Undone { step: Step::Paused },
            Event::Ended { ending: Ending::Aborted },
        ]);
        let mut rehearsed = until(Goal::Rehearsal, last);
        rehearsed.extend([
            Event::Turned,
            Event::Decided { outcome: Decision::Abort },
            Event::Undone { step: Step::Fenced },
            Event::Undone { step: Step::Paused },
            Event::Ended { ending: Ending::Rehearsed },
        ]);
        let mut unfinished = until(Goal::Cutover, Step::Decided);
        for step in Step::ALL.into_iter().filter(|step| *step > Step::Decided) {
            unfinished.extend([Event::Started { step }, Event::Failed { step, error: "p2 is away".into() }]);
        }
        unfinished.push(Event::Ended { ending: Ending::Unfinished });
        vec![committed, aborted, rehearsed, unfinished, some_events(run)]
    }

    /// The engine's course after a run was taken up, without its effects: every event must be legal, and the end the store's.
    fn take_up(state: State, epoch: Option<Epoch>, answer: Decision) -> Ending {
        let mut state = state.next(&Event::Continued { epoch }).unwrap();
        let again = state.clone().next(&Event::Continued { epoch }).unwrap();
        assert_eq!(again, state, "taken up twice is taken up once");
        if state.phase == Phase::Aborting && epoch.is_some() && state.decision.is_none() {
            state = state.next(&Event::Decided { outcome: answer }).unwrap();
        }
        if state.phase == Phase::Aborting {
            for step in state.touched.clone().into_iter().rev() {
                state = state.next(&Event::Undone { step }).unwrap();
            }
        }
        let mut taken = Vec::new();
        while let Some(step) = state.next_step().filter(|_| state.phase == Phase::Between) {
            state = state.next(&Event::Started { step }).unwrap();
            state = state.next(&Event::Finished { step, facts: Facts::new() }).unwrap();
            taken.push(step);
        }
        assert!(taken.is_empty() || taken.last() == Step::ALL.last(), "{taken:?}");
        assert!(taken.windows(2).all(|pair| Goal::Cutover.step_after(Some(pair[0])) == Some(pair[1])), "{taken:?}");
        let ending = match (epoch, state.decision) {
            (None, _) => Ending::Refused,
            (Some(_), Some(Decision::Commit)) => Ending::Committed,
            (Some(_), _) => Ending::Aborted,
        };
        let ended = state.next(&Event::Ended { ending }).unwrap();
        assert!(ended.is_over());
        ending
    }

    /// Wherever a crash cuts the file: it reads, and the run can be taken up whatever the store answers.
    #[test]
    fn a_run_whose_journal_is_cut_at_any_byte_can_be_taken_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut ends = std::collections::BTreeMap::new();
        for events in runs_of_every_kind(RunId::random()) {
            let run = RunId::random();
            let mut journal = Journal::create(dir.path(), "app", run).unwrap();
            for event in events {
                journal.append([event]).unwrap();
            }
            let whole = std::fs::read(journal.path()).unwrap();
            for cut in 0..=whole.len() {
                let replay = parse(journal.path(), &whole[..cut]).unwrap();
                let complete = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
                assert_eq!(replay.records[..], journal.records()[..complete], "cut at {cut}");
                assert_eq!(replay.whole_bytes + replay.torn_bytes, cut);
                for (epoch, answer) in truths(&replay.state) {
                    let ending = take_up(replay.state.clone(), epoch, answer);
                    *ends.entry(ending.to_string()).or_insert(0) += 1;
                    assert_eq!(ending == Ending::Committed, epoch.is_some() && answer == Decision::Commit);
                }
            }
        }
        assert_eq!(ends.keys().collect::<Vec<_>>(), ["aborted", "committed", "refused"], "{ends:?}");
    }

    /// What the store may know of a run with such a journal; nothing where nothing is left to do.
    fn truths(state: &State) -> Vec<(Option<Epoch>, Decision)> {
        let seven = Some(Epoch::try_from(7u64).unwrap());
        match (state.is_over(), state.epoch, state.decision) {
            (true, ..) => Vec::new(),
            (false, Some(_), Some(decision)) => vec![(seven, decision)],
            (false, Some(_), None) => vec![(seven, Decision::Abort), (seven, Decision::Commit)],
            (false, None, _) => vec![(None, Decision::Abort), (seven, Decision::Abort), (seven, Decision::Commit)],
        }
    }

    proptest! {
        /// A crash may cut the file anywhere and may leave garbage where the last line should be.
        #[test]
        fn a_torn_tail_loses_only_the_line_it_tore(cut in 0..4000usize, garbage in prop::collection::vec(1u8..9, 0..20)) {
            let dir = tempfile::tempdir().unwrap();
            let run = RunId::random();
            let mut journal = Journal::create(dir.path(), "app", run).unwrap();
            journal.append(some_events(run)).unwrap();
            let file = path(dir.path(), run);
            let whole = std::fs::read(&file).unwrap();
            let cut = cut.min(whole.len());
            let mut torn = whole[..cut].to_vec();
            torn.extend(&garbage);
            std::fs::write(&file, &torn).unwrap();
            let complete = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            let replay = read(&file).unwrap();
            prop_assert_eq!(&replay.records[..], &journal.records()[..complete]);
        }
    }
}
