//! What a run did, on disk: append, fsync, lock; read back, also after a crash in the middle of a line.
//!
//! Invariant: the only writer of journals. Nothing is written that `State::next` refuses; when `append` returns, the
//! events are on disk; one run per database and directory at a time.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use pgcutover_api::epoch::RunId;
use serde::{Deserialize, Serialize};

use crate::state::{Event, IllegalEvent, State};

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
    #[error("another proxyctl is at work on '{database}' (it holds {})", .path.display())]
    Locked {
        /// The route name.
        database: String,
        /// The lock file.
        path: PathBuf,
    },
    /// A line before the last one cannot be read: not a crash, but damage.
    #[error("{}: line {line} is damaged: {reason}", .path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// Why.
        reason: String,
    },
    /// An event that must not follow.
    #[error("journal: {0}")]
    Illegal(#[from] IllegalEvent),
}

/// The journal of a run that goes on.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    clock: Clock,
    state: State,
    records: Vec<Record>,
    _lock: Flock<File>,
}

/// Wall-clock moments that never go back.
#[derive(Debug)]
struct Clock {
    started: Instant,
    started_us: u64,
}

impl Clock {
    fn start() -> Clock {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Clock { started: Instant::now(), started_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX) }
    }

    fn now_us(&self) -> u64 {
        self.started_us.saturating_add(u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

impl Journal {
    /// Makes the journal of a new run; fails while another run of the database holds the lock.
    pub fn create(dir: &Path, database: &str, run: RunId) -> Result<Journal, JournalError> {
        std::fs::create_dir_all(dir).map_err(at(dir))?;
        let lock = lock(dir, database)?;
        let path = path(dir, run);
        let file = OpenOptions::new().append(true).create_new(true).open(&path).map_err(at(&path))?;
        // The directory entry must survive a crash as well.
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))?;
        Ok(Journal { path, file, clock: Clock::start(), state: State::default(), records: Vec::new(), _lock: lock })
    }

    /// Writes events, in order, with one fsync; all of them or, on a refusal, none.
    pub fn append(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(), JournalError> {
        self.write(events)?;
        self.file.sync_data().map_err(at(&self.path))
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
            let line = serde_json::to_string(&record)
                .map_err(|error| JournalError::Io { path: self.path.clone(), error: error.into() })?;
            lines.push_str(&line);
            lines.push('\n');
            records.push(record);
        }
        self.file.write_all(lines.as_bytes()).map_err(at(&self.path))?;
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

/// A journal that was read back.
#[derive(Debug, PartialEq)]
pub struct Replay {
    /// Its events.
    pub records: Vec<Record>,
    /// Where the run stood after them.
    pub state: State,
    /// Bytes at the end that a crash left of an unfinished line.
    pub torn_bytes: usize,
}

/// Reads a journal. What a crash left of its last line is left out; damage anywhere else is an error.
pub fn read(path: &Path) -> Result<Replay, JournalError> {
    let mut text = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut text)).map_err(at(path))?;
    let mut replay = Replay { records: Vec::new(), state: State::default(), torn_bytes: 0 };
    let mut rest = text.as_slice();
    while !rest.is_empty() {
        let line_number = replay.records.len() + 1;
        // A line counts once its newline is there: bytes of one write may reach the disk in any order.
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            replay.torn_bytes = rest.len();
            break;
        };
        let last = end + 1 == rest.len();
        match serde_json::from_slice::<Record>(&rest[..end]) {
            Ok(record) => {
                replay.state = replay.state.next(&record.event)?;
                replay.records.push(record);
            }
            Err(_) if last => {
                replay.torn_bytes = rest.len();
                break;
            }
            Err(error) => {
                return Err(JournalError::Damaged {
                    path: path.to_owned(),
                    line: line_number,
                    reason: error.to_string(),
                });
            }
        }
        rest = &rest[end + 1..];
    }
    Ok(replay)
}

fn lock(dir: &Path, database: &str) -> Result<Flock<File>, JournalError> {
    let path = dir.join(format!("{}.lock", file_name(database)));
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
    let mut held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => held,
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            return Err(JournalError::Locked { database: database.to_owned(), path });
        }
        Err((_, errno)) => return Err(JournalError::Io { path, error: errno.into() }),
    };
    // Whoever finds the lock taken may look who has it.
    let pid = std::process::id().to_string();
    held.set_len(0).and_then(|()| held.rewind()).and_then(|()| held.write_all(pid.as_bytes())).map_err(at(&path))?;
    Ok(held)
}

/// A database name as part of a file name: everything but letters and digits as hexadecimal.
fn file_name(database: &str) -> String {
    let mut name = String::new();
    for byte in database.bytes() {
        if byte.is_ascii_alphanumeric() { name.push(byte.into()) } else { name.push_str(&format!("_{byte:02x}")) }
    }
    name
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> JournalError {
    let path = path.to_owned();
    move |error| JournalError::Io { path: path.clone(), error }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::finding::Finding;
    use crate::plan::{Goal, Step};
    use crate::state::{Began, Ending, Facts, Phase};

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
        Journal::create(dir.path(), "app", run).unwrap().append(some_events(run)).unwrap();
        let file = path(dir.path(), run);
        let text = std::fs::read_to_string(&file).unwrap().replacen("\"started\"", "\"stated\"", 1);
        std::fs::write(&file, text).unwrap();
        assert!(matches!(read(&file), Err(JournalError::Damaged { line: 2, .. })));
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
