//! Walks the plan: the intent goes to the journal, the step acts, the outcome goes to the journal.
//!
//! Invariant: before the decision every failure, a lost lease and Ctrl-C included, ends in `decide(abort)` and traffic on the
//! source; nothing is undone or resumed before that answered abort (PROTOCOL R2). If it answers commit, the run goes forward.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use pgcutover_api::epoch::{Claim, Epoch};
use pgcutover_api::store::Outcome;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::Replication;
use crate::event::{Began, Decision, Ending, Event, Facts};
use crate::finding::Finding;
use crate::journal;
use crate::journal::JournalError;
use crate::plan::{Goal, OnFailure, POINT_OF_NO_RETURN, Step};
use crate::printer::Progress;
use crate::state::Phase;
use crate::steps::{self, Scene, StepError, Undo, decided, evidence, pinned};

/// Where a test kills the process, as kill -9 would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopAt {
    moment: Moment,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The intent is journaled, nothing has been done.
    Before,
    /// It has been done, the outcome is not journaled.
    After,
}

impl FromStr for StopAt {
    type Err = String;

    fn from_str(text: &str) -> Result<StopAt, String> {
        let (moment, step) = text.split_once(':').ok_or("must be before:STEP or after:STEP")?;
        let moment = match moment {
            "before" => Moment::Before,
            "after" => Moment::After,
            other => return Err(format!("'{other}' is neither 'before' nor 'after'")),
        };
        Ok(StopAt { moment, step: step.parse().map_err(|error| format!("{error}"))? })
    }
}

impl fmt::Display for StopAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moment = match self.moment {
            Moment::Before => "before",
            Moment::After => "after",
        };
        write!(f, "{moment}:{}", self.step)
    }
}

/// What tests want to happen at a moment of a run.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Hooks {
    /// Kill this process before or after a step, for tests of what is left behind.
    #[arg(long, value_name = "before|after:STEP", hide = true)]
    stop_at: Option<StopAt>,
    /// Wait there for SIGUSR1, for tests that kill another process meanwhile.
    #[arg(long, value_name = "before|after:STEP", hide = true)]
    hold_at: Option<StopAt>,
}

/// A test that forgot its signal must not keep a run for ever.
const HELD_MAX: Duration = Duration::from_secs(60);

/// One run.
pub struct Engine {
    /// What it acts on.
    pub scene: Scene,
    /// What it is for.
    pub goal: Goal,
    /// Who watches.
    pub progress: Progress,
    /// Becomes true when a person wants it to end.
    pub interrupt: watch::Receiver<bool>,
    /// For tests.
    pub hooks: Hooks,
    /// The outcome of the last step, journaled together with the next intent: one fsync for both.
    pub unwritten: Option<Event>,
}

impl Engine {
    /// A run that has not begun.
    pub fn new(scene: Scene, goal: Goal, progress: Progress, interrupt: watch::Receiver<bool>, hooks: Hooks) -> Engine {
        Engine { scene, goal, progress, interrupt, hooks, unwritten: None }
    }

    /// The whole cutover. A journal that cannot be written ends it, but never leaves clients held.
    pub async fn run(&mut self) -> Result<Ending, JournalError> {
        let ended = self.journaled().await;
        if ended.is_err() && self.scene.claim.is_some() {
            self.land_without_journal().await;
        }
        ended
    }

    /// Whatever the store says: clients end on that side.
    async fn land_without_journal(&mut self) {
        match decided::decide(&self.scene, Outcome::Abort).await {
            Ok(Decision::Abort) => {
                let _ = tokio::join!(steps::undo(Step::Fenced, &self.scene), steps::undo(Step::Paused, &self.scene));
            }
            Ok(Decision::Commit) => {
                let _ = steps::run(Step::Switched, &mut self.scene).await;
                let _ = steps::run(Step::Resumed, &mut self.scene).await;
            }
            // The proxies land by their own rules.
            Err(error) => tracing::error!("{error}"),
        }
    }

    async fn journaled(&mut self) -> Result<Ending, JournalError> {
        self.begin()?;
        self.walk().await?;
        self.finish().await
    }

    /// Takes up a run that broke off: by what the store says of its epoch it is undone or goes forward. `commit` is one that
    /// was read where the source need not be asked: on the target.
    pub async fn take_up(&mut self, epoch: Option<Epoch>, commit: Option<Decision>) -> Result<Ending, JournalError> {
        self.scene.claim = epoch.map(|epoch| Claim { run: self.scene.run, epoch });
        let ended = self.taken_up(epoch, commit).await;
        if ended.is_err() && self.scene.claim.is_some() {
            self.land_without_journal().await;
        }
        ended
    }

    async fn taken_up(&mut self, epoch: Option<Epoch>, commit: Option<Decision>) -> Result<Ending, JournalError> {
        if self.scene.journal.state().phase == Phase::Fresh {
            self.begin()?;
        }
        self.scene.journal.append([Event::Continued { epoch }])?;
        if let (Some(outcome), None) = (commit, self.scene.journal.state().decision) {
            self.scene.journal.append([Event::Decided { outcome }])?;
        }
        self.walk().await?;
        self.finish().await
    }

    async fn finish(&mut self) -> Result<Ending, JournalError> {
        if self.goal == Goal::Rehearsal && self.scene.journal.state().phase == Phase::Between {
            self.scene.journal.append([Event::Turned])?;
        }
        if self.scene.journal.state().phase == Phase::Aborting {
            self.go_back().await?;
            // A commit that was thought lost: forward.
            self.walk().await?;
        }
        let ending = self.ending();
        self.scene.heartbeat = None;
        evidence::close(&mut self.scene).await;
        self.verify(ending).await;
        self.scene.journal.append([Event::Ended { ending }])?;
        Ok(ending)
    }

    /// Clients were let go: what is left is to see whether both sides were equal.
    async fn verify(&mut self, ending: Ending) {
        let mut interrupt = self.interrupt.clone();
        let progress = &self.progress;
        pinned::verify(&mut self.scene, ending, wanted(&mut interrupt), &|line| progress.now(line)).await;
    }

    fn begin(&mut self) -> Result<(), JournalError> {
        let config = &self.scene.config;
        let budgets = &config.budgets;
        let ms = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let budgets_ms = [
            ("drain", budgets.drain),
            ("lease", budgets.lease),
            ("renew", budgets.renew),
            ("barrier", budgets.barrier),
            ("catch_up", budgets.catch_up),
            ("stall", budgets.stall),
            ("transaction_age_max", budgets.transaction_age_max),
        ];
        let began = Began {
            run: self.scene.run,
            goal: self.goal,
            database: config.database.clone(),
            source: config.source.backend.clone(),
            target: config.target.backend.clone(),
            proxies: config.proxies.iter().map(|proxy| proxy.name.clone()).collect(),
            budgets_ms: budgets_ms.map(|(name, span)| (name.to_owned(), ms(span))).to_vec(),
            proxyctl_version: env!("CARGO_PKG_VERSION").to_owned(),
            by: journal::whoami(),
            config: config.digest(),
        };
        self.scene.journal.append([Event::Began(began)])
    }

    /// Takes step after step until one fails before the decision, or none is left.
    async fn walk(&mut self) -> Result<(), JournalError> {
        while self.scene.journal.state().phase == Phase::Between || self.unwritten.is_some() {
            let Some(step) = self.next_step() else { break };
            self.take(step).await?;
        }
        self.write_out()
    }

    fn next_step(&self) -> Option<Step> {
        self.scene.journal.state().next_step()
    }

    fn write_out(&mut self) -> Result<(), JournalError> {
        match self.unwritten.take() {
            Some(event) => self.scene.journal.append([event]),
            None => Ok(()),
        }
    }

    async fn take(&mut self, step: Step) -> Result<(), JournalError> {
        let intent = self.unwritten.take().into_iter().chain([Event::Started { step }]);
        self.scene.journal.append(intent.collect::<Vec<_>>())?;
        self.progress.now(&format!("{step}: {}", step.purpose()));
        self.hook(Moment::Before, step).await;
        let began = tokio::time::Instant::now();
        let outcome = self.act(step).await;
        let taken = began.elapsed();
        self.hook(Moment::After, step).await;
        let ms = taken.as_secs_f64() * 1000.0;
        match outcome {
            Ok(facts) => {
                self.progress.done(&format!("{step:<13}{ms:>10.1} ms"));
                self.unwritten = Some(Event::Finished { step, facts });
                Ok(())
            }
            Err(error) => {
                self.progress.done(&format!("{step:<13}{ms:>10.1} ms  FAILED: {error}"));
                self.fail(step, error)
            }
        }
    }

    /// Lets a step act; before the decision it ends at once when a lease is lost or a person wants it to.
    async fn act(&mut self, step: Step) -> Result<Facts, StepError> {
        let limit = steps::limit(step, &self.scene.config);
        let mut losses = self.scene.fleet.losses();
        let mut interrupt = self.interrupt.clone();
        if step.on_failure() == OnFailure::GoForward {
            return within(limit, steps::run(step, &mut self.scene)).await;
        }
        if let Some(lost) = losses.one() {
            return Err(lease_lost(&lost));
        }
        if *interrupt.borrow() {
            return Err(StepError::plain("interrupted"));
        }
        if step == POINT_OF_NO_RETURN {
            // From here on only the store says how it ends.
            return within(limit, steps::run(step, &mut self.scene)).await;
        }
        tokio::select! {
            biased;
            outcome = within(limit, steps::run(step, &mut self.scene)) => outcome,
            lost = losses.first() => Err(lease_lost(&lost)),
            () = wanted(&mut interrupt) => Err(StepError::plain("interrupted")),
        }
    }

    fn fail(&mut self, step: Step, error: StepError) -> Result<(), JournalError> {
        let mut findings = error.findings;
        if findings.is_empty() {
            findings.push(unexplained(step, &error.message));
        }
        let found = findings.into_iter().map(|finding| Event::Found { finding });
        let events: Vec<Event> = found.chain([Event::Failed { step, error: error.message }]).collect();
        self.scene.journal.append(events)
    }

    /// A step failed before the decision.
    async fn go_back(&mut self) -> Result<(), JournalError> {
        self.progress.now("aborting");
        // From here on a lease that ends does what we want; while we cannot ask the store, a proxy may be able to.
        if let Some(leases) = self.scene.leases.take() {
            leases.stop().await;
        }
        let state = self.scene.journal.state();
        let mut decision = state.decision;
        if self.scene.claim.is_some() && decision.is_none() {
            let asked_us = self.scene.journal.now_us();
            match decided::decide(&self.scene, Outcome::Abort).await {
                Ok(outcome) => {
                    self.scene.observe(crate::report::ABORT_ANSWERED, Facts::new().with("asked_us", asked_us));
                    self.scene.journal.append([Event::Decided { outcome }])?;
                    decision = Some(outcome);
                }
                Err(error) => {
                    let found = error.findings.into_iter().map(|finding| Event::Found { finding });
                    return self.scene.journal.append(found.collect::<Vec<_>>());
                }
            }
        }
        match (self.scene.claim, decision) {
            (None, _) | (Some(_), Some(Decision::Abort)) => {
                self.undo_all().await?;
                self.measure_sequences().await;
                Ok(())
            }
            // Forward: the walk goes on.
            (Some(_), Some(Decision::Commit) | None) => Ok(()),
        }
    }

    /// What a rehearsal leaves out is estimated; reading the sequences is the part of it that grows with the schema.
    async fn measure_sequences(&mut self) {
        if self.goal != Goal::Rehearsal || self.scene.config.replication == Replication::Physical {
            return;
        }
        let began = tokio::time::Instant::now();
        if let Ok(sequences) = self.scene.clusters.source.sequences(steps::STEP_DEADLINE).await {
            let ms = began.elapsed().as_secs_f64() * 1000.0;
            let facts = Facts::new().with("ms", ms).with("count", sequences.len());
            self.scene.observe(crate::report::SEQUENCES_READ, facts);
        }
    }

    /// The abort is decided, or no epoch was opened: clients go first, everything else after.
    async fn undo_all(&mut self) -> Result<(), JournalError> {
        let touched = self.scene.journal.state().touched.clone();
        let (held, other): (Vec<Step>, Vec<Step>) =
            touched.into_iter().rev().partition(|step| matches!(step, Step::Paused | Step::Fenced));
        if held.contains(&Step::Paused) && self.scene.claim.is_some() {
            let fence = async {
                if held.contains(&Step::Fenced) {
                    steps::undo(Step::Fenced, &self.scene).await
                } else {
                    Ok(Undo::Nothing)
                }
            };
            let (fenced, paused) = tokio::join!(fence, steps::undo(Step::Paused, &self.scene));
            self.scene.observe(
                crate::report::RESUME_ANSWERED,
                Facts::new().with("on", self.scene.config.source.backend.as_str()),
            );
            if held.contains(&Step::Fenced) {
                self.undone(Step::Fenced, fenced)?;
            }
            self.undone(Step::Paused, paused)?;
            evidence::resumed(&mut self.scene).await;
        }
        for step in other {
            let outcome = steps::undo(step, &self.scene).await;
            self.undone(step, outcome)?;
        }
        Ok(())
    }

    fn undone(&mut self, step: Step, outcome: Result<Undo, StepError>) -> Result<(), JournalError> {
        let events = match outcome {
            Ok(Undo::Nothing) => return Ok(()),
            Ok(Undo::Done) => vec![Event::Undone { step }],
            Ok(Undo::Cost(finding)) => vec![Event::Found { finding: *finding }, Event::Undone { step }],
            Err(error) => {
                let found = error.findings.into_iter().map(|finding| Event::Found { finding });
                found.chain([Event::UndoFailed { step, error: error.message }]).collect()
            }
        };
        self.scene.journal.append(events)
    }

    fn ending(&self) -> Ending {
        let state = self.scene.journal.state();
        match (state.phase, state.decision) {
            (Phase::Aborting, Some(Decision::Abort)) if state.is_rehearsed() => Ending::Rehearsed,
            (Phase::Aborting, Some(Decision::Abort)) => Ending::Aborted,
            (Phase::Aborting, _) if self.scene.claim.is_some() || self.scene.open_is_unknown => Ending::Undecided,
            (Phase::Aborting, _) => Ending::Refused,
            _ if state.failed.is_empty() => Ending::Committed,
            _ => Ending::Unfinished,
        }
    }

    async fn hook(&self, moment: Moment, step: Step) {
        let here = Some(StopAt { moment, step });
        if self.hooks.stop_at == here {
            std::process::abort();
        }
        if self.hooks.hold_at == here {
            // Heard from before it is told that somebody listens.
            let Ok(mut go_on) = signal(SignalKind::user_defined1()) else { return };
            self.progress.say(&format!("held {}", StopAt { moment, step }));
            let _ = tokio::time::timeout(HELD_MAX, go_on.recv()).await;
        }
    }
}

async fn within(limit: Duration, step: impl Future<Output = Result<Facts, StepError>>) -> Result<Facts, StepError> {
    tokio::time::timeout(limit, step)
        .await
        .unwrap_or_else(|_| Err(StepError::plain(format!("not done within {limit:?}"))))
}

async fn wanted(interrupt: &mut watch::Receiver<bool>) {
    if interrupt.wait_for(|wanted| *wanted).await.is_err() {
        // Nobody can ask any more: only the step ends the wait.
        std::future::pending::<()>().await;
    }
}

fn lease_lost(lost: &crate::proxies::ProxyError) -> StepError {
    let fix = "see why the proxy did not answer in time; a longer lease or a shorter renew gives more room";
    let finding = Finding::red("lease", &lost.proxy, &lost.message, fix);
    StepError::found(format!("a lease was lost: {lost}"), vec![finding])
}

/// A report never says that something failed without saying where to look.
fn unexplained(step: Step, message: &str) -> Finding {
    Finding::red(
        step.name(),
        step.name(),
        message,
        "see the message; 'proxyctl status' and 'proxyctl preflight' tell more",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_a_crash_read_and_print() {
        for step in Step::ALL {
            for moment in ["before", "after"] {
                let text = format!("{moment}:{step}");
                assert_eq!(text.parse::<StopAt>().unwrap().to_string(), text);
            }
        }
        for bad in ["fenced", "during:fenced", "after:nothing", ""] {
            assert!(bad.parse::<StopAt>().is_err(), "{bad}");
        }
    }
}
