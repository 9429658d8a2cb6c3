//! What a run writes down so that one can read afterwards what happened: when each member answered, how long it held its
//! clients, where traffic went, how late replication was.
//!
//! Invariant: nothing here fails a run or makes a client wait. What takes a question of its own is asked before the pause or
//! after RESUME, and what was not answered is told as not read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use pgcutover_api::epoch::RunId;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::bouncers::Console;
use crate::config::Config;
use crate::config::members::BouncerEntry;
use crate::event::Facts;
use crate::proxies::Proxy;
use crate::report::lag::LAG;
use crate::report::timeline::{Kind, MEMBERS, Moment, NOT_READ, TOLD};
use crate::report::traffic::{AFTER, BEFORE, BEGUN};
use crate::steps::Scene;
use crate::steps::curve::{Curve, Point};

/// A table is answered from memory: whoever takes longer is not read.
const ANSWER: Duration = Duration::from_millis(500);
/// Between the two looks at traffic after RESUME: enough for clients that write ten times a second to show.
const WINDOW: Duration = Duration::from_millis(250);

/// What has been gathered and is not in the journal yet.
#[derive(Debug, Default)]
pub struct Evidence {
    answers: Mutex<BTreeMap<Moment, BTreeMap<String, u64>>>,
    /// How late replication was, as the heartbeat writes it.
    pub lag: Arc<Mutex<Curve>>,
    /// When traffic was first looked at after RESUME.
    resumed: Option<Instant>,
}

impl Evidence {
    /// A member did it at this moment, microseconds since 1970.
    pub fn note(&self, moment: Moment, member: &str, at_us: u64) {
        lock(&self.answers).entry(moment).or_default().entry(member.to_owned()).or_insert(at_us);
    }
}

/// Takes note of when a member's answer came, if it is a good one.
pub async fn answered<T, E>(
    scene: &Scene,
    moment: Moment,
    member: &str,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let answer = answer.await;
    if answer.is_ok() {
        scene.evidence.note(moment, member, scene.journal.now_us());
    }
    answer
}

/// Writes down who has answered.
pub fn tell(scene: &mut Scene, moment: Moment) {
    let answers = lock(&scene.evidence.answers).remove(&moment).unwrap_or_default();
    if !answers.is_empty() {
        let facts = answers.into_iter().fold(Facts::new(), |facts, (member, at_us)| facts.with(&member, at_us));
        scene.observe(moment.what(), facts);
    }
}

/// Before clients are held, for the first time: who takes part, with which configuration, and where traffic goes.
pub async fn members(scene: &mut Scene) {
    let of_proxies = scene.fleet.each(|proxy| async move {
        let digest = bounded(proxy.config_digest()).await;
        Ok((Kind::Proxy, digest))
    });
    let of_bouncers = join_all(scene.config.bouncers.iter().map(|entry| async move {
        (
            entry.name.as_str(),
            (Kind::Pgbouncer, bounded(async { Console::open(&entry.endpoint).await?.config_digest().await }).await),
        )
    }));
    let (of_proxies, of_bouncers) = tokio::join!(of_proxies, of_bouncers);
    let of_proxies = of_proxies.into_iter().filter_map(|(name, read)| Some((name, read.ok()?)));
    let facts = of_proxies.chain(of_bouncers).fold(Facts::new(), |facts, (name, (kind, digest))| {
        let value = match digest {
            Ok(digest) => json!({ "kind": kind, "config": digest }),
            Err(why) => json!({ "kind": kind, NOT_READ: why }),
        };
        facts.with(name, value)
    });
    scene.observe(MEMBERS, facts);
    before(scene).await;
}

/// Before clients are held: where traffic goes.
pub async fn before(scene: &mut Scene) {
    let facts = traffic(scene).await;
    scene.observe(BEFORE, facts);
}

/// Clients have been let go: from here on traffic counts for what comes after.
pub async fn resumed(scene: &mut Scene) {
    // A PgBouncer is seen to have been switched only now.
    tell(scene, Moment::Switched);
    tell(scene, Moment::Resumed);
    let facts = traffic(scene).await;
    scene.observe(AFTER, facts);
    scene.evidence.resumed = Some(Instant::now());
}

/// At the end of a run: where traffic has gone since, what members say of their pause, and how late replication was.
pub async fn close(scene: &mut Scene) {
    if let Some(resumed) = scene.evidence.resumed.take() {
        // reason: traffic is the difference of two looks; ended by the clock.
        tokio::time::sleep_until(resumed + WINDOW).await;
        let facts = traffic(scene).await;
        scene.observe(AFTER, facts);
        let facts = told(scene).await;
        scene.observe(TOLD, facts);
    }
    let facts = {
        let curve = lock(&scene.evidence.lag);
        let (points, beats) = curve.points();
        let pairs: Vec<Value> = points.iter().map(|Point { at_us, lag_us }| json!([at_us, lag_us])).collect();
        Facts::new().with("beats", beats).with("points", pairs)
    };
    scene.observe(LAG, facts);
}

/// How many transactions were begun on each backend so far, by member.
async fn traffic(scene: &Scene) -> Facts {
    let database = scene.config.database.as_str();
    let of_proxies = scene.fleet.each(|proxy| async move { Ok(bounded(of_proxy(proxy, database)).await) });
    let of_bouncers = join_all(
        scene
            .config
            .bouncers
            .iter()
            .map(|entry| async { (entry.name.as_str(), bounded(of_bouncer(&scene.config, entry)).await) }),
    );
    let (of_proxies, of_bouncers) = tokio::join!(of_proxies, of_bouncers);
    let of_proxies = of_proxies.into_iter().filter_map(|(name, read)| Some((name, read.ok()?)));
    of_proxies.chain(of_bouncers).fold(Facts::new(), |facts, (name, read)| {
        let value = match read {
            Ok(begun) => json!({ BEGUN: begun }),
            Err(why) => json!({ NOT_READ: why }),
        };
        facts.with(name, value)
    })
}

async fn of_proxy(proxy: &Proxy, database: &str) -> anyhow::Result<Map<String, Value>> {
    let rows = proxy.backends(database).await?;
    Ok(rows.into_iter().map(|row| (row.backend, row.transactions.into())).collect())
}

/// PgBouncer counts by database, so by where that points.
async fn of_bouncer(config: &Config, entry: &BouncerEntry) -> anyhow::Result<Map<String, Value>> {
    let console = Console::open(&entry.endpoint).await?;
    let address = console.pointed(&entry.database).await?.address;
    let begun = console.transactions(&entry.database).await?;
    let backend = match &address {
        address if *address == entry.source => config.source.backend.clone(),
        address if *address == entry.target => config.target.backend.clone(),
        elsewhere => elsewhere.to_string(),
    };
    Ok(Map::from_iter([(backend, begun.into())]))
}

/// What the proxies say of the pause that is over.
async fn told(scene: &Scene) -> Facts {
    let (database, run) = (scene.config.database.as_str(), scene.run);
    let told = scene.fleet.each(|proxy| async move { Ok(bounded(of_pause(proxy, database, run)).await) }).await;
    told.into_iter()
        .filter_map(|(name, read)| Some((name, read.ok()?)))
        .fold(Facts::new(), |facts, (name, read)| facts.with(name, read.unwrap_or_else(|why| json!({ NOT_READ: why }))))
}

async fn of_pause(proxy: &Proxy, database: &str, run: RunId) -> anyhow::Result<Value> {
    let (pauses, switches) = tokio::try_join!(proxy.pauses(database), proxy.switches(database))?;
    let Some(pause) = pauses.into_iter().rfind(|pause| pause.run == Some(run)) else {
        anyhow::bail!("it knows no pause of this run that is over");
    };
    let switch = switches.into_iter().rfind(|switch| switch.run == Some(run));
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Ok(json!({
        "drain_ms": pause.drain_ms.map(ms),
        "pause_ms": ms(pause.pause_ms),
        "held_clients": pause.held_clients,
        "holds": pause.holds,
        "held_us_p50": pause.held_us_p50,
        "held_us_max": pause.held_us_max,
        "how": switch.as_ref().map(|switch| switch.how.to_string()),
        "held_at_switch": switch.map(|switch| switch.held_clients),
    }))
}

/// What was read, or why not.
async fn bounded<T, E: ToString>(read: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    match tokio::time::timeout(ANSWER, read).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {ANSWER:?}")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
