//! All drivers at once over one cutover between two majors, under load: what each of them noticed.
//!
//! Invariant: every way that was asked for has a [`Verdict`]; it says "survived" only of a driver that wrote on both servers,
//! saw no error, and whose writes are all on the serving side exactly once.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::binaries::{Binaries, Network};
use crate::client::Client;
use crate::control::Control;
use crate::drivers::course::{Engagement, Pooling, Told, Types};
use crate::drivers::ways::{CLIENTS, Way};
use crate::drivers::{Means, Performance};
use crate::errors::tally;
use crate::ledger::{Audit, Notes, Write};
use crate::pair::{APP, DATABASE, PGCUTOVER, PUBLICATION, Pair, PairOptions, SUBSCRIPTION, password};
use crate::printer::say;
use crate::process::POLL;
use crate::proxy::ProxyOptions;
use crate::run_dir::RunDir;
use crate::stage::{Serving, Stage};
use crate::workload::{Workload, WorkloadOptions};

/// Between the rounds of one driver: thirty of them at work leave two cores time for servers and proxy.
const PACE: Duration = Duration::from_millis(100);
/// Rounds before the cutover, and after it: drivers prepare statements at the first use or the fifth.
const ROUNDS: i64 = 8;
/// For starting thirty programs on a loaded machine, and for what they do afterwards.
const ROUNDS_LIMIT: Duration = Duration::from_secs(90);
/// No cutover takes this long: every step has a budget of seconds.
const CUTOVER_LIMIT: Duration = Duration::from_secs(90);
/// A loaded machine may not be calm the first time; a refused attempt changes nothing.
const ATTEMPTS: u32 = 3;

/// What crosses, between what.
#[derive(Clone, Debug)]
pub struct Crossing {
    /// Major version of the source.
    pub from: u32,
    /// Major version of the target.
    pub to: u32,
    /// What the proxy does with connections.
    pub pooling: Pooling,
    /// What drivers write.
    pub types: Types,
    /// Who.
    pub ways: Vec<&'static Way>,
}

/// What became of one way of a driver.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The way's id.
    pub way: &'static str,
    /// The driver's version, if it was started and said one.
    pub version: Option<String>,
    /// Why it was not tried.
    pub untried: Option<String>,
    /// Writes acknowledged.
    pub acknowledged: usize,
    /// Writes that the source took.
    pub before: usize,
    /// Writes that the target took.
    pub after: usize,
    /// What it noticed, and what the ledger says of it: nothing, if it survived.
    pub errors: Vec<String>,
}

impl Verdict {
    /// It was tried, and noticed nothing but a wait.
    pub fn survived(&self) -> bool {
        self.untried.is_none() && self.errors.is_empty()
    }
}

/// What became of all.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of the source.
    pub from: String,
    /// Version of the target.
    pub to: String,
    /// What the proxy did with connections.
    pub pooling: Pooling,
    /// What drivers wrote.
    pub types: Types,
    /// What proxyctl said in the end.
    pub outcome: String,
    /// How often the cutover had to be asked for.
    pub attempts: u32,
    /// Length of the pause.
    pub pause_ms: Option<f64>,
    /// Errors of the ordinary load, by their text.
    pub load_errors: Vec<(String, usize)>,
    /// The ledger in one line.
    pub ledger: String,
    /// Nothing lost, nothing doubled.
    pub ledger_adds_up: bool,
    /// One for each way.
    pub verdicts: Vec<Verdict>,
}

impl Report {
    /// The cutover took place, the ledger adds up, the ordinary load noticed nothing.
    pub fn holds(&self) -> bool {
        self.outcome == "committed" && self.ledger_adds_up && self.load_errors.is_empty()
    }

    /// What became of a way.
    pub fn of(&self, way: &str) -> Option<&Verdict> {
        self.verdicts.iter().find(|verdict| verdict.way == way)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { from, to, outcome, attempts, ledger, .. } = self;
        let (pooling, pause_ms) = (self.pooling.word(), self.pause_ms.unwrap_or_default());
        write!(
            f,
            "{from} to {to}, {pooling} pooling: {outcome} (attempt {attempts}, pause {pause_ms:.0} ms); {ledger}"
        )?;
        for (text, count) in &self.load_errors {
            write!(f, "\n  the load: {count} times {text}")?;
        }
        for verdict in self.verdicts.iter().filter(|verdict| !verdict.survived()) {
            let why = verdict.untried.iter().chain(&verdict.errors).cloned().collect::<Vec<_>>();
            write!(f, "\n  {}: {}", verdict.way, why.join("; "))?;
        }
        Ok(())
    }
}

/// A way that can be had, or the reason why it can't.
type Cast = Vec<(&'static Way, std::result::Result<Means, String>)>;

impl Crossing {
    /// Sets the stage, lets all drivers and the load work, cuts over, lets them work on, and asks the ledger.
    ///
    /// # Errors
    /// The stage can't be set, or a server can't be read; what happens to drivers is in the report.
    pub async fn run(&self, network: Network) -> Result<Report> {
        let cast = self.cast(network).await?;
        let stage = self.stage().await?;
        let dir = RunDir::current()?.subdirectory("drivers")?;
        let workload = Workload::start(&load(stage.ports())).await?;
        workload.acknowledges(1, CUTOVER_LIMIT).await.context("the load does not get through the proxy")?;
        let performances = begin(&cast, |way| self.engagement(way, &stage, &dir));
        wrote(&stage, Side::Source, &performances).await?;
        let cutover = cut_over(&stage).await?;
        if cutover.serving() == Serving::Target {
            wrote(&stage, Side::Target, &performances).await?;
        }
        performances.iter().for_each(Performance::stop);
        let mut told = BTreeMap::new();
        for performance in performances {
            told.insert(performance.way.id, performance.told().await);
        }
        let load = workload.stop().await?;
        let notes: Vec<Notes> = told.values().flat_map(Told::notes).chain(load.notes()).collect();
        let audit = stage.audit(&merged(notes), cutover.serving()).await?;
        let rows = Rows::read(&stage, cutover.serving()).await?;
        let verdicts = cast.iter().map(|(way, means)| verdict(way, means, told.get(way.id), &audit, &rows)).collect();
        Ok(Report {
            from: stage.pair.source.version().to_owned(),
            to: stage.pair.target.version().to_owned(),
            pooling: self.pooling,
            types: self.types,
            outcome: cutover.outcome,
            attempts: cutover.attempts,
            pause_ms: cutover.pause_ms,
            load_errors: tally(&load.errors()),
            ledger_adds_up: audit.is_clean(),
            ledger: audit.to_string(),
            verdicts,
        })
    }

    /// Fetching takes seconds to a minute, and it blocks.
    async fn cast(&self, network: Network) -> Result<Cast> {
        let ways = self.ways.clone();
        let find = move || {
            let means = |way: &Way| Means::find(way, network).map_err(|error| format!("{error:#}"));
            ways.into_iter().map(|way| (way, means(way))).collect()
        };
        tokio::task::spawn_blocking(find).await.context("looking for the drivers")
    }

    async fn stage(&self) -> Result<Stage> {
        let binaries = Binaries::of(&[self.from, self.to])?;
        let mut options = PairOptions::new(self.from, self.to);
        for side in [&mut options.source, &mut options.target] {
            side.settings.push(("max_connections".to_owned(), "300".to_owned()));
        }
        let pair = Pair::start(&binaries, &options).await?;
        add_tables(&pair, self.types).await?;
        let pooling = self.pooling.word();
        let change = |options: &mut ProxyOptions| {
            options.setting("pool_mode", pooling);
            options.setting("default_pool_size", if pooling == "session" { 100 } else { 20 });
            // A session that can't be moved is told so, and leaves; the others go on.
            options.database(DATABASE).insert("session_policy".to_owned(), "disconnect".into());
            // Above the sum of proxyctl's budgets below.
            options.setting("hold_budget", "40s");
        };
        let mut stage = Stage::with(pair, 1, change).await?;
        configure(&mut stage.control, self.types);
        if self.to < 16 {
            carry_sentinel(&stage).await?;
        }
        Ok(stage)
    }

    fn engagement(&self, way: &Way, stage: &Stage, dir: &std::path::Path) -> Engagement {
        Engagement {
            port: stage.proxies.first().map_or(0, crate::proxy::Proxy::port),
            user: APP.to_owned(),
            password: password(APP),
            database: DATABASE.to_owned(),
            client: way.client(),
            name: way.id,
            pooling: self.pooling,
            types: self.types,
            pace: PACE,
            dir: dir.to_owned(),
        }
    }
}

/// A load that leaves the drivers room; it writes all the time and notices every stall.
fn load(ports: Vec<u16>) -> WorkloadOptions {
    let mut options = WorkloadOptions::new(ports, 8);
    options.writes_per_s = 100;
    options
}

const PARCEL: &str = "CREATE TABLE parcel (client int, n bigint, body bytea NOT NULL, sent timestamptz NOT NULL, PRIMARY KEY (client, n))";
const FEELING: &str = "CREATE TYPE mood AS ENUM ('ok', 'so, so', 'it''s {bad}');
    CREATE TYPE spot AS (street text, mood mood);
    CREATE TABLE feeling (client int, n bigint, mood mood, moods mood[], spot spot, PRIMARY KEY (client, n))";
/// Uses up numbers, so that types made next have others than on a server that did not. Far enough for no number to mean
/// two things.
const BURN: &str = "DO $$ DECLARE used oid; BEGIN FOR n IN 1..3000 LOOP used := lo_create(0); PERFORM lo_unlink(used); END LOOP; END $$";

/// What the course needs besides the pair's tables, on both sides and replicated.
async fn add_tables(pair: &Pair, types: Types) -> Result<()> {
    let (source, target) = (pair.source.superuser(DATABASE).await?, pair.target.superuser(DATABASE).await?);
    let (tables, names) = match types {
        Types::BuiltIn => (PARCEL.to_owned(), "parcel"),
        Types::OtherOids => (format!("{PARCEL}; {FEELING}"), "parcel, feeling"),
    };
    if types == Types::OtherOids {
        target.run(BURN).await?;
    }
    let grant = format!("GRANT SELECT, INSERT ON {names} TO {APP}");
    for side in [&source, &target] {
        side.run(&format!("SET ROLE app_owner; {tables}; {grant}; RESET ROLE")).await?;
    }
    source.run(&format!("SET ROLE {PGCUTOVER}; ALTER PUBLICATION {PUBLICATION} ADD TABLE {names}; RESET ROLE")).await?;
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} REFRESH PUBLICATION")).await?;
    let copied = "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel";
    target.until(copied, ROUNDS_LIMIT).await.context("the initial copy of the drivers' tables")
}

/// Before 16 only superusers own subscriptions: what proxyctl can't refresh, its operator does, as README.md says.
async fn carry_sentinel(stage: &Stage) -> Result<()> {
    let made = stage.control.run(&["objects"], CUTOVER_LIMIT).await?;
    ensure!(made.code == Some(0), "{}", made.story());
    let source = stage.pair.source.superuser(DATABASE).await?;
    let ours = "SELECT string_agg('pgcutover.' || name, ', ') FROM unnest(ARRAY['heartbeat', 'sentinel']) name
        WHERE NOT EXISTS (SELECT FROM pg_publication_tables WHERE (schemaname, tablename) = ('pgcutover', name))";
    if let Some(unpublished) = source.text(ours).await? {
        source.run(&format!("ALTER PUBLICATION {PUBLICATION} ADD TABLE {unpublished}")).await?;
    }
    let target = stage.pair.target.superuser(DATABASE).await?;
    target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} REFRESH PUBLICATION WITH (copy_data = false)")).await?;
    target.until("SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel", ROUNDS_LIMIT).await
}

/// Thirty programs and two servers on two cores: what matters here is that nobody sees an error, not how long it takes.
fn configure(control: &mut Control, types: Types) {
    control.budget(&[
        ("drain", "5s"),
        ("catch_up", "15s"),
        ("lease", "9s"),
        ("barrier", "5s"),
        ("transaction_age_max", "5s"),
    ]);
    control.set("budgets", "lag_bytes_max", 16 << 20);
    control.set("policy", "accept_oid_change", types == Types::OtherOids);
}

fn begin(cast: &Cast, engage: impl Fn(&Way) -> Engagement) -> Vec<Performance> {
    let ready = cast.iter().filter_map(|(way, means)| Some((*way, means.as_ref().ok()?.clone())));
    ready.map(|(way, means)| Performance::begin(way, means, engage(way))).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

/// Waits until every driver that still runs has written so many rounds on this side. Who does not in time is not waited
/// for: its verdict will say that it wrote nothing there.
async fn wrote(stage: &Stage, side: Side, performances: &[Performance]) -> Result<()> {
    let server = if side == Side::Source { &stage.pair.source } else { &stage.pair.target };
    let client = server.superuser(DATABASE).await?;
    let sql = format!(
        "SELECT client FROM ledger WHERE client >= {CLIENTS} AND port = {} GROUP BY client HAVING count(*) >= {ROUNDS}",
        server.port()
    );
    let deadline = Instant::now() + ROUNDS_LIMIT;
    while Instant::now() < deadline {
        let done: Vec<i32> = client.query(&sql, &[]).await?.iter().map(|row| row.get(0)).collect();
        if performances.iter().all(|one| one.ended() || done.contains(&one.way.client())) {
            return Ok(());
        }
        tokio::time::sleep(POLL * 10).await;
    }
    say(format_args!("not every driver has written {ROUNDS} rounds on the {side:?} within {ROUNDS_LIMIT:?}"));
    Ok(())
}

struct Cutover {
    outcome: String,
    attempts: u32,
    pause_ms: Option<f64>,
}

impl Cutover {
    /// After a decision clients are on the target, or on their way to it.
    fn serving(&self) -> Serving {
        match self.outcome.as_str() {
            "committed" | "unfinished" => Serving::Target,
            _ => Serving::Source,
        }
    }
}

async fn cut_over(stage: &Stage) -> Result<Cutover> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let finished = stage.control.run(&["cutover"], CUTOVER_LIMIT).await?;
        let json = finished.json()?;
        let outcome = json.get("outcome").and_then(|outcome| outcome.as_str()).unwrap_or("failed").to_owned();
        let pause_ms = json.get("pause_ms").and_then(serde_json::Value::as_f64);
        if outcome == "committed" {
            return Ok(Cutover { outcome, attempts, pause_ms });
        }
        say(format_args!("attempt {attempts}: {outcome}: {}{}", red(&json), finished.stderr));
        if !["refused", "aborted"].contains(&outcome.as_str()) || attempts == ATTEMPTS {
            return Ok(Cutover { outcome, attempts, pause_ms });
        }
    }
}

/// The findings that stood in the way.
fn red(json: &serde_json::Value) -> String {
    let findings = json.get("findings").and_then(serde_json::Value::as_array).into_iter().flatten();
    let red = findings.filter(|finding| finding.get("level").is_some_and(|level| level == "red"));
    red.map(|finding| format!("{finding}\n")).collect()
}

/// One note a client: the audit takes each write once.
fn merged(notes: Vec<Notes>) -> Vec<Notes> {
    let mut clients: BTreeMap<i32, Notes> = BTreeMap::new();
    for note in notes {
        let all = clients.entry(note.client).or_insert_with(|| Notes { client: note.client, ..Notes::default() });
        all.acknowledged.extend(note.acknowledged);
        all.unknown.extend(note.unknown);
        all.refused.extend(note.refused);
    }
    clients.into_values().collect()
}

/// What the serving side holds of the drivers.
struct Rows {
    source: u16,
    /// Client, port of the server that took it.
    taken: Vec<(i32, i32)>,
    /// Writes of the ledger without their parcel.
    without_parcel: Vec<Write>,
}

impl Rows {
    async fn read(stage: &Stage, serving: Serving) -> Result<Rows> {
        let server = if serving == Serving::Source { &stage.pair.source } else { &stage.pair.target };
        let client = server.superuser(DATABASE).await?;
        let taken = format!("SELECT client, coalesce(port, 0) FROM ledger WHERE client >= {CLIENTS}");
        let bare = format!(
            "SELECT client, n FROM ledger l WHERE client >= {CLIENTS}
              AND NOT EXISTS (SELECT FROM parcel p WHERE (p.client, p.n) = (l.client, l.n))"
        );
        Ok(Rows {
            source: stage.pair.source.port(),
            taken: pairs(&client, &taken).await?,
            without_parcel: pairs(&client, &bare).await?,
        })
    }
}

async fn pairs<A, B>(client: &Client, sql: &str) -> Result<Vec<(A, B)>>
where
    A: for<'a> tokio_postgres::types::FromSql<'a>,
    B: for<'a> tokio_postgres::types::FromSql<'a>,
{
    Ok(client.query(sql, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn verdict(
    way: &Way,
    means: &std::result::Result<Means, String>,
    told: Option<&Told>,
    audit: &Audit,
    rows: &Rows,
) -> Verdict {
    let ours = |client: i32| (way.client()..way.client() + 10).contains(&client);
    let taken: Vec<i32> = rows.taken.iter().filter(|(client, _)| ours(*client)).map(|(_, port)| *port).collect();
    let before = taken.iter().filter(|port| **port == i32::from(rows.source)).count();
    let mut verdict = Verdict {
        way: way.id,
        version: told.and_then(|told| told.version.clone()),
        untried: means.as_ref().err().cloned(),
        acknowledged: told.map_or(0, |told| told.acknowledged.len()),
        before,
        after: taken.len() - before,
        errors: told.map(|told| told.errors.clone()).unwrap_or_default(),
    };
    if verdict.untried.is_some() {
        return verdict;
    }
    let lists = [
        ("lost", &audit.lost),
        ("doubled", &audit.doubled),
        ("phantom", &audit.phantom),
        ("stranded on the other side", &audit.stranded),
        ("taken by a side already left", &audit.split),
        ("without its parcel", &rows.without_parcel),
    ];
    for (word, list) in lists {
        let found: Vec<&Write> = list.iter().filter(|(client, _)| ours(*client)).collect();
        if let Some(first) = found.first() {
            verdict.errors.push(format!("{} writes {word}, such as {first:?}", found.len()));
        }
    }
    if verdict.errors.is_empty() && (verdict.before == 0 || verdict.after == 0) {
        let text = format!("wrote {} on the source and {} on the target", verdict.before, verdict.after);
        verdict.errors.push(text);
    }
    verdict
}
