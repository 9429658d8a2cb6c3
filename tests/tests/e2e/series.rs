//! Several databases in one run: none moves before all are ready, then one after the other.

use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::control::{Finished, SHORT};
use e2e::pair::{APP, DATABASE, PairOptions};
use e2e::stage::{Serving, Stage};
use e2e::workload::{Workload, WorkloadOptions};

/// A series of two.
const LIMIT: Duration = Duration::from_secs(60);
const DONE: i32 = 0;
const USAGE: i32 = 2;
const REFUSED: i32 = 3;
const ABORTED: i32 = 4;

/// Two databases, each on servers and behind a proxy of its own, written to.
struct Scene {
    stages: [Stage; 2],
    loads: [Workload; 2],
}

impl Scene {
    async fn open() -> Scene {
        let binaries = Binaries::of(&[13, 17]).unwrap();
        let options = PairOptions::new(13, 17);
        let stage = || async {
            let mut stage = Stage::start(&binaries, &options, 1).await.unwrap();
            stage.control.budget(&SHORT);
            let mut load = WorkloadOptions::new(stage.ports(), 4);
            load.writes_per_s = 100;
            let load = Workload::start(&load).await.unwrap();
            load.acknowledges(20, LIMIT).await.unwrap();
            (stage, load)
        };
        let ((first, of_first), (second, of_second)) = tokio::join!(stage(), stage());
        Scene { stages: [first, second], loads: [of_first, of_second] }
    }

    /// One proxyctl for both.
    async fn run(&self, verb: &[&str]) -> Finished {
        for stage in &self.stages {
            // Writes its configuration.
            stage.control.run(&["plan"], LIMIT).await.unwrap();
        }
        let files = self.stages.each_ref().map(|stage| stage.control.dir().join("cutover.toml").display().to_string());
        let files = files.join(",");
        let args = [verb, &["-c", &files]].concat();
        self.stages[0].control.run(&args, LIMIT).await.unwrap()
    }

    async fn backends(&self) -> [String; 2] {
        let mut found = [String::new(), String::new()];
        for (stage, found) in self.stages.iter().zip(&mut found) {
            let gates = stage.proxies[0].ask("SHOW GATES").await.unwrap();
            let gate = gates.iter().find(|gate| gate.get("database") == Some(DATABASE)).unwrap();
            *found = gate.get("backend").unwrap().to_owned();
        }
        found
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn databases_move_one_after_the_other_once_all_are_ready() {
    let mut scene = Scene::open().await;
    let unable = scene.run(&["abort"]).await;
    assert_eq!(unable.code, Some(USAGE), "{}", unable.story());

    // Something red about the second one.
    scene.stages[1].control.set("replication", "subscriptions", vec!["nobody_has_made_it"]);
    let refused = scene.run(&["cutover"]).await;
    assert_eq!(refused.code, Some(REFUSED), "{}", refused.story());
    assert!(refused.stderr.contains("nothing was moved"), "{}", refused.story());
    assert_eq!(scene.backends().await, ["blue", "blue"]);

    scene.stages[1].control.config.remove("replication");
    let rehearsed = scene.run(&["rehearse"]).await;
    assert_eq!(rehearsed.code, Some(DONE), "{}", rehearsed.story());
    assert_eq!(rehearsed.stdout.matches("\"outcome\":\"rehearsed\"").count(), 2, "{}", rehearsed.story());

    // Ready, both; then the second one's drain does not end.
    let busy = scene.stages[1].proxies[0].connect(APP).await.unwrap();
    busy.run("BEGIN; SELECT 1").await.unwrap();
    let half = scene.run(&["cutover"]).await;
    assert_eq!(half.code, Some(ABORTED), "{}", half.story());
    assert!(half.stderr.contains("the series ends here; ended well: app; not begun: none"), "{}", half.story());
    assert_eq!(scene.backends().await, ["green", "blue"]);
    busy.run("COMMIT").await.unwrap();

    let rest = scene.stages[1].control.run(&["cutover"], LIMIT).await.unwrap();
    assert_eq!(rest.code, Some(DONE), "{}", rest.story());
    assert_eq!(scene.backends().await, ["green", "green"]);
    for (stage, load) in scene.stages.iter().zip(scene.loads) {
        let outcome = load.stop().await.unwrap();
        assert!(outcome.errors().is_empty(), "{:?}", outcome.errors().first());
        let audit = stage.audit(&outcome.notes(), Serving::Target).await.unwrap();
        assert!(audit.is_clean(), "{audit}");
    }
}
