//! A stage with load, and proxyctl with deadlines that suit tests of faults.
//!
//! Invariant: whatever a test does, it ends with everybody on one side and a ledger that adds up.

use std::time::{Duration, Instant};

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::control::{Running, SHORT};
use e2e::pair::{APP, DATABASE, PairOptions, SOURCE};
use e2e::stage::{Serving, Stage};
use e2e::workload::{Outcome, Workload, WorkloadOptions};

/// A cutover and whatever ends it.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// Proxies look at the store every second; a lease lasts one second here; a loaded machine gets time.
pub(crate) const SETTLED: Duration = Duration::from_secs(20);
/// Exit codes of proxyctl, as its help tells them.
pub(crate) const REFUSED: i32 = 3;
pub(crate) const ABORTED: i32 = 4;
pub(crate) const UNDECIDED: i32 = 6;

/// A stage with load, and proxyctl with deadlines that suit tests.
pub(crate) struct Theatre {
    pub(crate) stage: Stage,
    pub(crate) load: Workload,
}

impl Theatre {
    pub(crate) async fn open(proxies: u16) -> Theatre {
        Theatre::with(proxies, &[]).await
    }

    pub(crate) async fn with(proxies: u16, settings: &[(&str, &str)]) -> Theatre {
        let mut options = PairOptions::new(13, 17);
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        options.source.settings.extend(settings);
        Theatre::on(Stage::start(&Binaries::of(&[13, 17]).unwrap(), &options, proxies).await.unwrap()).await
    }

    pub(crate) async fn on(mut stage: Stage) -> Theatre {
        stage.control.budget(&SHORT);
        let mut load = WorkloadOptions::new(stage.ports(), 8);
        load.writes_per_s = 200;
        let load = Workload::start(&load).await.unwrap();
        load.acknowledges(100, LIMIT).await.unwrap();
        Theatre { stage, load }
    }

    /// Lets the drain last as long as a fault that is made meanwhile may take on a loaded machine.
    pub(crate) fn patient(&mut self) {
        self.stage.control.budget(&[("drain", "5s"), ("lease", "6s")]);
    }

    /// Opens a transaction through the first proxy and starts a cutover, which comes to wait for it: from then on the
    /// epoch is open and every other transaction is held.
    pub(crate) async fn held(&self) -> (Client, Running) {
        // Gates are put on tables that nobody writes at that moment: so before the transaction.
        let armed = self.stage.control.run(&["cutover", "--stop-at", "before:calm"], LIMIT).await.unwrap();
        assert_eq!(armed.code, None, "{}", armed.story());
        let client = self.stage.proxies[0].connect(APP).await.unwrap();
        client.run("BEGIN; UPDATE branches SET bbalance = bbalance WHERE bid = 1").await.unwrap();
        let running = self.stage.control.spawn(&["cutover"]).unwrap();
        self.until_pausing(&running).await;
        (client, running)
    }

    pub(crate) async fn until_pausing(&self, running: &Running) {
        let admin = self.stage.proxies[0].admin().await.unwrap();
        let until = Instant::now() + LIMIT;
        loop {
            assert!(Instant::now() < until, "never paused: {}", running.stderr());
            let gates = admin.rows("SHOW GATES").await.unwrap();
            if gates.iter().any(|gate| gate.get("database") == Some(DATABASE) && gate.get("state") == Some("pausing")) {
                return;
            }
            // reason: a look at a gate; the loop has a deadline.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until every proxy that runs is open, all on one backend; which.
    pub(crate) async fn settled(&mut self) -> String {
        let until = Instant::now() + SETTLED;
        loop {
            let mut gates = Vec::new();
            for proxy in &mut self.stage.proxies {
                if proxy.runs() {
                    let rows = proxy.ask("SHOW GATES").await.unwrap();
                    let of_app = rows.iter().find(|row| row.get("database") == Some(DATABASE)).unwrap();
                    gates.push(["state", "backend"].map(|column| of_app.get(column).unwrap_or_default().to_owned()));
                }
            }
            let [state, backend] = gates.first().unwrap().clone();
            if state == "open" && gates.iter().all(|gate| *gate == gates[0]) {
                return backend;
            }
            assert!(Instant::now() < until, "gates do not settle: {gates:?}");
            // reason: a look at the gates; the loop has a deadline.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Everybody is on `side`, writes go on there, no client saw an error, and the ledger balances.
    pub(crate) async fn ends_on(mut self, side: &str) -> Outcome {
        assert_eq!(self.settled().await, side);
        self.load.acknowledges(100, LIMIT).await.unwrap();
        let outcome = self.load.stop().await.unwrap();
        let serving = if side == SOURCE { Serving::Source } else { Serving::Target };
        let audit = self.stage.audit(&outcome.notes(), serving).await.unwrap();
        assert!(audit.is_clean(), "{audit}");
        outcome
    }

    pub(crate) async fn ends_without_error_on(self, side: &str) {
        let outcome = self.ends_on(side).await;
        let errors = outcome.errors();
        assert!(errors.is_empty(), "{} errors such as {:?}", errors.len(), errors.first());
    }
}
