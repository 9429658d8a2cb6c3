//! What a run was: folded from its journal alone, as text, as JSON and as one HTML page.
//!
//! Invariant: pure but for the one file it is asked to write; the same journal always gives the same report.

use std::fmt;
use std::path::{Path, PathBuf};

use pgcutover_api::epoch::{Epoch, RunId};
use serde::Serialize;

use crate::event::{Began, Decision, Ending, Event, Facts};
use crate::finding::{Finding, Level};
use crate::journal::Record;
use crate::plan::{Goal, Step};
use crate::report::lag::{Lag, Positions};
use crate::report::prediction::Prediction;
use crate::report::timeline::{Member, Moment, Table};
use crate::report::traffic::Traffic;
use crate::report::verification::{VERIFICATION, Verification};
use crate::state::{Phase, State};

pub mod html;
pub mod lag;
pub mod picture;
pub mod prediction;
pub mod samples;
pub mod timeline;
pub mod traffic;
pub mod verification;

/// An observation the report folds: the moment the first PAUSE was sent.
pub const PAUSE_SENT: &str = "pause_sent";
/// The moment the last RESUME was answered.
pub const RESUME_ANSWERED: &str = "resume_answered";
/// A rehearsal's abort was asked for (`asked_us`) and answered.
pub const ABORT_ANSWERED: &str = "abort_answered";
/// A rehearsal read every sequence of the source, without holding anybody: `ms`, `count`.
pub const SEQUENCES_READ: &str = "sequences_read";
/// Facts about the source, among them its `version`.
pub const SOURCE: &str = "source";
/// Facts about the target, among them its `version`.
pub const TARGET: &str = "target";

/// Everything there is to say about a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The run.
    pub run: Option<RunId>,
    /// The route name.
    pub database: String,
    /// What it was for.
    pub goal: Goal,
    /// When it began, microseconds since 1970.
    pub began_at_us: u64,
    /// Who began it: user, machine, process.
    pub by: String,
    /// The digest of its configuration: runs that were asked the same have the same.
    pub config: String,
    /// Its epoch, if one was opened.
    pub epoch: Option<Epoch>,
    /// How it ended; of a run that broke off, how it stood.
    pub outcome: Ending,
    /// False for a run whose journal breaks off: its proxyctl died.
    pub ended: bool,
    /// Version of the source's server, empty if never asked.
    pub source_version: String,
    /// Version of the target's server, empty if never asked.
    pub target_version: String,
    /// From the first PAUSE sent to the last RESUME answered.
    pub pause_ms: Option<f64>,
    /// How long a cutover would hold clients, by a rehearsal.
    pub prediction: Option<Prediction>,
    /// What comparing both servers came to, if it was tried.
    pub verification: Option<Verification>,
    /// The steps that were begun, in order.
    pub steps: Vec<StepLine>,
    /// What each member did and when; empty where nobody wrote it down.
    pub members: Vec<Member>,
    /// Where the log stood.
    pub log: Option<Positions>,
    /// How late replication was.
    pub lag: Option<Lag>,
    /// Where transactions went, before and after.
    pub traffic: Option<Traffic>,
    /// What was found on the way, worst first.
    pub findings: Vec<Finding>,
    /// The journal's file.
    pub journal: PathBuf,
    /// The HTML page's file, if one was written.
    pub report_html: Option<PathBuf>,
    /// Backend name of the source.
    pub source: String,
    /// Backend name of the target.
    pub target: String,
    /// The proxies that took part.
    pub proxies: Vec<String>,
    /// Limits that were in force, milliseconds by name.
    pub budgets_ms: Vec<(String, u64)>,
    /// Things seen on the way that are told nowhere else.
    pub observations: Vec<Observation>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepLine {
    /// Its name.
    pub name: Step,
    /// How long it took.
    pub ms: f64,
    /// What became of it.
    pub outcome: StepOutcome,
    /// When it began, microseconds since 1970.
    pub at_us: u64,
    /// Why it failed, or why it could not be undone.
    pub error: Option<String>,
    /// What it learned.
    pub facts: Facts,
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// It did what it should.
    Done,
    /// It did not.
    Failed,
    /// It did, and was taken back.
    Undone,
    /// The journal breaks off in it.
    BrokenOff,
}

/// Something seen on the way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Observation {
    /// When, microseconds since 1970.
    pub at_us: u64,
    /// What was looked at.
    pub what: String,
    /// What was seen.
    pub facts: Facts,
}

impl Report {
    /// Folds a journal.
    pub fn fold(journal: &Path, records: &[Record], state: &State) -> Report {
        let mut report = Report::empty(journal, state);
        report.began_at_us = records.first().map_or(0, |record| record.at_us);
        let last_us = records.last().map_or(0, |record| record.at_us);
        for record in records {
            report.take(record);
        }
        for step in report.steps.iter_mut().filter(|step| step.outcome == StepOutcome::BrokenOff) {
            step.ms = ms(last_us.saturating_sub(step.at_us));
        }
        report.source_version = report.version_of(SOURCE);
        report.target_version = report.version_of(TARGET);
        report.pause_ms = report.pause_us().map(|(from, to)| ms(to.saturating_sub(from)));
        report.prediction = if report.outcome == Ending::Rehearsed { Prediction::of(&report) } else { None };
        report.evidence();
        report.findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
        report
    }

    fn empty(journal: &Path, state: &State) -> Report {
        Report {
            run: None,
            database: String::new(),
            goal: state.goal,
            began_at_us: 0,
            by: String::new(),
            config: String::new(),
            epoch: state.epoch,
            outcome: standing(state),
            ended: matches!(state.phase, Phase::Ended(_)),
            source_version: String::new(),
            target_version: String::new(),
            pause_ms: None,
            prediction: None,
            verification: None,
            steps: Vec::new(),
            members: Vec::new(),
            log: None,
            lag: None,
            traffic: None,
            findings: Vec::new(),
            journal: journal.to_owned(),
            report_html: None,
            source: String::new(),
            target: String::new(),
            proxies: Vec::new(),
            budgets_ms: Vec::new(),
            observations: Vec::new(),
        }
    }

    /// What members and servers told on the way.
    fn evidence(&mut self) {
        self.members = timeline::members(self);
        self.log = lag::positions(self);
        self.lag = lag::lag(self);
        self.traffic = traffic::traffic(self);
        let serving = match self.outcome {
            Ending::Committed | Ending::Unfinished => &self.target,
            Ending::Aborted | Ending::Refused | Ending::Undecided | Ending::Rehearsed => &self.source,
        };
        let strays = self.traffic.iter().flat_map(|traffic| traffic::astray(traffic, serving));
        self.findings.extend(strays);
        let moments = Moment::ALL.map(Moment::what);
        let others = [timeline::MEMBERS, timeline::HELD, timeline::TOLD, traffic::BEFORE, traffic::AFTER, lag::LAG];
        self.observations.retain(|seen| !moments.iter().chain(&others).any(|what| seen.what == *what));
    }

    fn take(&mut self, record: &Record) {
        match &record.event {
            Event::Began(began) => self.began(began),
            Event::Started { step } => self.steps.push(StepLine {
                name: *step,
                ms: 0.0,
                outcome: StepOutcome::BrokenOff,
                at_us: record.at_us,
                error: None,
                facts: Facts::new(),
            }),
            Event::Finished { step, facts } => self.ended(*step, record.at_us, |line| {
                line.outcome = StepOutcome::Done;
                line.facts = facts.clone();
            }),
            Event::Failed { step, error } => self.ended(*step, record.at_us, |line| {
                line.outcome = StepOutcome::Failed;
                line.error = Some(error.clone());
            }),
            Event::Undone { step } => {
                if let Some(line) = self.line(*step).filter(|line| line.outcome == StepOutcome::Done) {
                    line.outcome = StepOutcome::Undone;
                }
            }
            Event::UndoFailed { step, error } => {
                if let Some(line) = self.line(*step) {
                    line.error.get_or_insert_with(|| format!("not taken back: {error}"));
                }
            }
            Event::Found { finding } => self.findings.push(finding.clone()),
            Event::Observed { what, facts } if what == VERIFICATION => self.verification = Verification::of(facts),
            Event::Observed { what, facts } => {
                let observation = Observation { at_us: record.at_us, what: what.clone(), facts: facts.clone() };
                self.observations.push(observation);
            }
            // Known from the state.
            Event::Opened { .. }
            | Event::Decided { .. }
            | Event::Turned
            | Event::Continued { .. }
            | Event::Ended { .. } => {}
        }
    }

    fn began(&mut self, began: &Began) {
        self.run = Some(began.run);
        self.database.clone_from(&began.database);
        self.by.clone_from(&began.by);
        self.config.clone_from(&began.config);
        self.source.clone_from(&began.source);
        self.target.clone_from(&began.target);
        self.proxies.clone_from(&began.proxies);
        self.budgets_ms.clone_from(&began.budgets_ms);
    }

    fn line(&mut self, step: Step) -> Option<&mut StepLine> {
        // A step that was taken again, after its run broke off, counts as it was the last time.
        self.steps.iter_mut().rfind(|line| line.name == step)
    }

    fn ended(&mut self, step: Step, at_us: u64, how: impl FnOnce(&mut StepLine)) {
        if let Some(line) = self.line(step) {
            line.ms = ms(at_us.saturating_sub(line.at_us));
            how(line);
        }
    }

    fn version_of(&self, side: &str) -> String {
        let seen = self.observations.iter().rfind(|seen| seen.what == side);
        let version = seen.and_then(|seen| seen.facts.0.get("version")).and_then(|version| version.as_str());
        version.unwrap_or_default().to_owned()
    }

    /// From the first PAUSE sent to the last RESUME answered, microseconds since 1970.
    pub fn pause_us(&self) -> Option<(u64, u64)> {
        let from = self.observations.iter().find(|seen| seen.what == PAUSE_SENT)?.at_us;
        let to = self.observations.iter().rfind(|seen| seen.what == RESUME_ANSWERED)?.at_us;
        Some((from, to))
    }

    /// How it ended, in one sentence.
    pub fn verdict(&self) -> String {
        let verdict = match self.outcome {
            Ending::Committed => format!("committed: clients of {} are served by {}", self.database, self.target),
            Ending::Aborted => {
                format!("aborted: clients of {} are served by {}, as before", self.database, self.source)
            }
            Ending::Rehearsed => {
                format!("rehearsed: clients of {} are served by {}, as before", self.database, self.source)
            }
            Ending::Refused => format!("refused: nothing happened, {} is served by {}", self.database, self.source),
            Ending::Unfinished => {
                format!("decided for {}, not confirmed everywhere: what is missing follows by itself", self.target)
            }
            Ending::Undecided if self.ended => {
                format!(
                    "undecided: clients are held until {} answers; run 'proxyctl resume-run' when it does",
                    self.source
                )
            }
            Ending::Undecided => {
                "undecided as far as the journal goes: when the leases end the proxies decide and follow; \
                                  'proxyctl resume-run' ends it at once, 'proxyctl status' tells the outcome"
                    .to_owned()
            }
        };
        if self.ended { verdict } else { format!("{verdict} (proxyctl died: the journal breaks off)") }
    }
}

/// How a run ended; of one that broke off, how it stood.
fn standing(state: &State) -> Ending {
    if let Phase::Ended(ending) = state.phase {
        return ending;
    }
    match (state.decision, state.touched.iter().any(|step| step.holds_clients())) {
        (Some(Decision::Commit), _) => Ending::Unfinished,
        (Some(Decision::Abort), _) => Ending::Aborted,
        (None, true) => Ending::Undecided,
        (None, false) => Ending::Refused,
    }
}

/// Microseconds as milliseconds with three digits.
fn ms(us: u64) -> f64 {
    // Exact: a run of 285 years still fits the mantissa.
    us as f64 / 1000.0
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = self.run.map(|run| run.to_string()).unwrap_or_default();
        writeln!(f, "{}", self.verdict())?;
        writeln!(f, "run {run}, epoch {}", self.epoch.map_or("none".to_owned(), |epoch| epoch.to_string()))?;
        if !self.by.is_empty() {
            writeln!(f, "begun by {}, configuration {}", self.by, self.config)?;
        }
        writeln!(f, "{} {} -> {} {}", self.source, self.source_version, self.target, self.target_version)?;
        if let Some(pause_ms) = self.pause_ms {
            writeln!(f, "clients were held for {pause_ms:.1} ms")?;
        }
        if let Some(prediction) = &self.prediction {
            write!(f, "{prediction}")?;
        }
        if let Some(verification) = &self.verification {
            write!(f, "{verification}")?;
        }
        if !self.steps.is_empty() {
            writeln!(f, "steps of this run:")?;
        }
        for step in &self.steps {
            let outcome = match step.outcome {
                StepOutcome::Done => "done",
                StepOutcome::Failed => "FAILED",
                StepOutcome::Undone => "undone",
                StepOutcome::BrokenOff => "broken off",
            };
            writeln!(f, "  {:<13}{:>10.1} ms  {outcome}", step.name, step.ms)?;
            if let Some(error) = &step.error {
                writeln!(f, "    {error}")?;
            }
        }
        write!(f, "{}", Table(&self.members))?;
        self.log.iter().try_for_each(|log| writeln!(f, "log: {}", log.words()))?;
        self.lag.iter().try_for_each(|lag| writeln!(f, "{lag}"))?;
        self.traffic.iter().try_for_each(|traffic| write!(f, "{traffic}"))?;
        for finding in self.findings.iter().filter(|finding| finding.level > Level::Green) {
            writeln!(f, "{finding}")?;
        }
        writeln!(f, "journal: {}", self.journal.display())?;
        if let Some(page) = &self.report_html {
            writeln!(f, "report:  {}", page.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn records(events: Vec<Event>) -> Vec<Record> {
        let stamped = events.into_iter().enumerate();
        stamped.map(|(at, event)| Record { at_us: 1_700_000_000_000_000 + at as u64 * 5_000, event }).collect()
    }

    pub(crate) fn committed() -> Vec<Event> {
        let seen = |what: &str, facts| Event::Observed { what: what.into(), facts };
        let mut events = vec![Event::Began(Began {
            run: "8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f".parse().unwrap(),
            goal: Goal::Cutover,
            database: "<app> & \"co\"".into(),
            source: "blue".into(),
            target: "green".into(),
            proxies: vec!["p1".into(), "<script>alert(1)</script>".into()],
            budgets_ms: vec![("drain".into(), 2000)],
            proxyctl_version: "0.1.0".into(),
            by: "ops@db1, pid 7".into(),
            config: "3f".into(),
        })];
        for step in Step::ALL {
            events.push(Event::Started { step });
            if step == Step::Armed {
                events.push(seen(SOURCE, Facts::new().with("version", "13.23")));
                events.push(seen(TARGET, Facts::new().with("version", "17.6")));
            }
            if step == Step::Paused {
                events.push(Event::Opened { epoch: 7u64.try_into().unwrap() });
                events.push(seen(PAUSE_SENT, Facts::new()));
            }
            if step == Step::Decided {
                events.push(Event::Decided { outcome: Decision::Commit });
            }
            if step == Step::Resumed {
                events.push(seen(RESUME_ANSWERED, Facts::new()));
            }
            events.push(Event::Finished { step, facts: Facts::new().with("note", "a<b") });
        }
        events.push(Event::Ended { ending: Ending::Committed });
        events
    }

    pub(crate) fn fold(events: Vec<Event>) -> Report {
        let state = State::replay(&events).unwrap();
        Report::fold(Path::new("runs/x.jsonl"), &records(events), &state)
    }

    #[test]
    fn a_committed_run_says_what_the_contract_promises() {
        let json = serde_json::to_value(fold(committed())).unwrap();
        assert_eq!(json["outcome"], "committed");
        assert_eq!(json["epoch"], 7);
        assert_eq!((&json["by"], &json["config"]), (&"ops@db1, pid 7".into(), &"3f".into()));
        assert_eq!(json["source_version"], "13.23");
        assert_eq!(json["steps"].as_array().unwrap().len(), Step::ALL.len());
        assert_eq!(json["steps"][11]["name"], "resumed");
        assert_eq!(json["steps"][1]["outcome"], "done");
        assert!(json["pause_ms"].as_f64().unwrap() > 0.0);
    }

    #[test]
    fn a_journal_that_breaks_off_says_how_the_run_stood() {
        let events = committed();
        for cut in 1..events.len() {
            let report = fold(events[..cut].to_vec());
            assert!(!report.ended);
            assert!(report.verdict().contains("breaks off"));
            let expected = match report.steps.last().map(|step| step.name) {
                None | Some(Step::Armed | Step::Calm) => Ending::Refused,
                Some(step) if step < Step::Decided => Ending::Undecided,
                Some(_) if matches!(events[cut - 1], Event::Started { step: Step::Decided }) => Ending::Undecided,
                Some(_) => Ending::Unfinished,
            };
            assert_eq!(report.outcome, expected, "cut at {cut}");
        }
    }

    #[test]
    fn an_abort_keeps_the_cause_and_the_fix() {
        let mut events = committed();
        let at = events.iter().position(|event| *event == Event::Started { step: Step::CaughtUp }).unwrap();
        events.truncate(at + 1);
        events.push(Event::Failed { step: Step::CaughtUp, error: "no sentinel".into() });
        let finding = Finding::red("caught_up", "sub1", "is disabled", "ALTER SUBSCRIPTION sub1 ENABLE");
        events.push(Event::Found { finding });
        events.push(Event::Decided { outcome: Decision::Abort });
        events.push(Event::Undone { step: Step::Fenced });
        events.push(Event::Ended { ending: Ending::Aborted });
        let report = fold(events);
        assert_eq!(report.outcome, Ending::Aborted);
        assert_eq!(report.steps[3].outcome, StepOutcome::Undone);
        let text = report.to_string();
        assert!(text.contains("no sentinel") && text.contains("fix: ALTER SUBSCRIPTION sub1 ENABLE"), "{text}");
    }
}
