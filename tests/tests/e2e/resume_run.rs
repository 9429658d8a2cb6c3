//! `proxyctl resume-run`: a run that was killed at any step is undone or brought to its end, and which is said; also where its
//! journal is torn, damaged or lost. Two proxyctl never work on one database at a time.
//!
//! Invariant: leases are long here: whoever waits for one to end is too slow for these tests.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use e2e::control::{Control, Finished};
use e2e::pair::{DATABASE, SOURCE, TARGET};
use proxyctl::plan::{POINT_OF_NO_RETURN, Plan, Step};

use crate::theatre::{ABORTED, LIMIT, REFUSED, Theatre};

/// Far above what taking up a run takes, far below the lease.
const SOON: Duration = Duration::from_secs(5);

/// What a run may leave on the target, and the gate's form on the source.
const SLOTS: &str = "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'pgcutover_back_%'";
const FENCED: &str = "SELECT count(*) FROM pgcutover.gates WHERE form <> 'open'";

async fn theatre() -> Theatre {
    let mut theatre = Theatre::open(2).await;
    theatre.stage.control.budget(&[("lease", "10s")]);
    theatre.stage.control.with_way_back();
    // What was left is asked for in the store, also where the first step never made one.
    assert_eq!(theatre.proxyctl(&["objects"]).await.code, Some(0));
    theatre
}

impl Theatre {
    async fn proxyctl(&self, args: &[&str]) -> Finished {
        self.stage.control.run(args, LIMIT).await.unwrap()
    }

    /// Kills a cutover there; its journal.
    async fn killed(&self, at: &str) -> PathBuf {
        let finished = self.proxyctl(&["cutover", "--stop-at", at]).await;
        assert_eq!(finished.code, None, "{at}: {}", finished.story());
        let journal = finished.stderr.split("journal ").nth(1).unwrap_or_else(|| panic!("{}", finished.story()));
        journal.lines().next().unwrap().into()
    }

    async fn left_nothing(&self) {
        let source = self.stage.pair.source.superuser(DATABASE).await.unwrap();
        let target = self.stage.pair.target.superuser(DATABASE).await.unwrap();
        assert_eq!(target.number(SLOTS).await.unwrap(), 0, "a slot keeps WAL on the target");
        assert_eq!(source.number(FENCED).await.unwrap(), 0, "the fence stands");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_killed_before_its_decision_is_undone_at_once_and_says_so() {
    let mut theatre = theatre().await;
    let crashes =
        Plan.steps().filter(|step| *step <= POINT_OF_NO_RETURN).flat_map(|step| ["before", "after"].map(|m| (m, step)));
    for (moment, step) in crashes.filter(|crash| *crash != ("after", POINT_OF_NO_RETURN)) {
        let at = format!("{moment}:{step}");
        theatre.killed(&at).await;
        let asked = Instant::now();
        let taken_up = theatre.proxyctl(&["resume-run"]).await;
        let opened = step > Step::Paused || (moment, step) == ("after", Step::Paused);
        let (code, outcome) = if opened { (ABORTED, "aborted") } else { (REFUSED, "refused") };
        assert_eq!(taken_up.code, Some(code), "{at}: {}", taken_up.story());
        assert_eq!(taken_up.json().unwrap()["outcome"], outcome, "{at}");
        assert!(taken_up.stderr.contains(&format!("broke off at '{step}'")), "{at}: {}", taken_up.story());
        assert_eq!(theatre.settled().await, SOURCE, "{at}");
        assert!(asked.elapsed() < SOON, "{at}: {:?}: a lease was waited for", asked.elapsed());
        theatre.left_nothing().await;
        theatre.load.acknowledges(20, LIMIT).await.unwrap();
        let again = theatre.proxyctl(&["resume-run"]).await;
        assert_eq!(again.code, Some(0), "{at}: {}", again.story());
        assert!(again.stderr.contains("nothing to take up"), "{at}: {}", again.story());
    }
    theatre.ends_without_error_on(SOURCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_killed_after_its_decision_is_brought_to_its_end() {
    for at in ["after:decided", "before:switched", "after:switched", "before:resumed", "after:resumed"] {
        let mut theatre = theatre().await;
        theatre.killed(at).await;
        let asked = Instant::now();
        let taken_up = theatre.proxyctl(&["resume-run"]).await;
        assert_eq!(taken_up.code, Some(0), "{at}: {}", taken_up.story());
        let report = taken_up.json().unwrap();
        assert_eq!((&report["outcome"], &report["ended"]), (&"committed".into(), &true.into()), "{at}");
        // The snapshots of the moment at which both sides were equal died with the run.
        let none = report["verification"]["none"].as_str().unwrap_or_default();
        assert!(none.contains("proxyctl was away"), "{at}: {}", report["verification"]);
        assert_eq!(theatre.settled().await, TARGET, "{at}");
        assert!(asked.elapsed() < SOON, "{at}: {:?}: a lease was waited for", asked.elapsed());
        theatre.ends_without_error_on(TARGET).await;
    }
}

/// Whoever takes up a run may die too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_may_be_taken_up_again_and_again() {
    let theatre = theatre().await;
    theatre.killed("before:decided").await;
    let refused = theatre.proxyctl(&["cutover"]).await;
    assert_eq!(refused.code, Some(REFUSED), "{}", refused.story());
    assert!(refused.stderr.contains("a stale lock: run "), "{}", refused.story());
    assert_eq!(theatre.proxyctl(&["resume-run"]).await.code, Some(ABORTED));
    theatre.killed("after:decided").await;
    for at in ["before:switched", "after:switched", "before:resumed", "after:resumed"] {
        let killed = theatre.proxyctl(&["resume-run", "--stop-at", at]).await;
        assert_eq!(killed.code, None, "{at}: {}", killed.story());
    }
    let taken_up = theatre.proxyctl(&["resume-run"]).await;
    assert_eq!(taken_up.code, Some(0), "{}", taken_up.story());
    theatre.ends_without_error_on(TARGET).await;
}

/// The last line is torn in the middle of a letter; then a line before it is damaged; then the file is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_is_torn_damaged_or_lost_leaves_the_store_to_say_what_to_do() {
    let mut theatre = theatre().await;
    let journal = theatre.killed("after:way_back").await;
    let whole = fs::read(&journal).unwrap();
    fs::write(&journal, [&whole[..whole.len() - 5], b"\xc3"].concat()).unwrap();
    let taken_up = theatre.proxyctl(&["resume-run"]).await;
    assert_eq!(taken_up.code, Some(ABORTED), "{}", taken_up.story());
    theatre.left_nothing().await;

    for (what, told) in [("damaged", "line 2 (from byte "), ("lost", "has no journal here")] {
        let journal = theatre.killed("after:way_back").await;
        let run = journal.file_stem().unwrap().to_str().unwrap().to_owned();
        if what == "lost" {
            fs::rename(&journal, journal.with_extension("elsewhere")).unwrap();
        } else {
            let text = fs::read_to_string(&journal).unwrap();
            fs::write(&journal, text.replacen("\"started\"", "\"st\u{fffd}rted\"", 1)).unwrap();
        }
        // No run named: the store knows whose epoch is open.
        let refused = theatre.proxyctl(&["resume-run"]).await;
        assert_eq!(refused.code, Some(REFUSED), "{what}: {}", refused.story());
        for word in [told, "is open: nobody has decided", &run, "--without-journal"] {
            assert!(refused.stderr.contains(word), "{what}: no '{word}': {}", refused.story());
        }
        let taken_up = theatre.proxyctl(&["resume-run", &run, "--without-journal"]).await;
        assert_eq!(taken_up.code, Some(ABORTED), "{what}: {}", taken_up.story());
        assert_eq!(theatre.settled().await, SOURCE);
        theatre.left_nothing().await;
    }
    theatre.ends_without_error_on(SOURCE).await;
}

/// The open epoch is the lock that counts, whatever directories the two of them keep their journals in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_proxyctl_on_two_machines_never_cut_over_one_database_at_a_time() {
    let mut theatre = theatre().await;
    theatre.patient();
    let mut elsewhere =
        Control::for_pair(&theatre.stage.pair, &theatre.stage.proxies.iter().collect::<Vec<_>>()).unwrap();
    elsewhere.config = theatre.stage.control.config.clone();
    let runs = elsewhere.dir().join("runs").display().to_string();
    elsewhere.config.insert("journal_dir".to_owned(), runs.into());
    let (client, running) = theatre.held().await;
    let said = running.stderr();
    let run = said.rsplit("run ").next().unwrap().split(',').next().unwrap();
    let here = theatre.proxyctl(&["cutover"]).await;
    assert_eq!(here.code, Some(REFUSED), "{}", here.story());
    for word in ["another proxyctl is at work", run, "pid"] {
        assert!(here.stderr.contains(word), "no '{word}': {}", here.story());
    }
    let resumed = theatre.proxyctl(&["resume-run"]).await;
    assert_eq!(resumed.code, Some(REFUSED), "{}", resumed.story());
    let there = elsewhere.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(there.code, Some(REFUSED), "{}", there.story());
    let findings = there.json().unwrap()["findings"].to_string();
    assert!(findings.contains(run) && findings.contains("resume-run"), "{findings}");
    // Taken up there it would be undone under a proxyctl that lives.
    let resumed = elsewhere.run(&["resume-run"], LIMIT).await.unwrap();
    assert_eq!(resumed.code, Some(REFUSED), "{}", resumed.story());
    client.run("COMMIT").await.unwrap();
    let finished = running.wait(LIMIT).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    theatre.ends_without_error_on(TARGET).await;
}
