//! Many live sessions under load go through a whole cutover: no error, and each is what it was.
//!
//! Invariant: every error of every client fails the test; the stall that is printed is the longest of all of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::pair::{APP, Pair, PairOptions};
use e2e::stage::Stage;
use tokio_postgres::Statement;
use tokio_util::sync::CancellationToken;

use crate::armed::LIMIT;
use crate::stand::{WHERE, session_pooled};

/// Prepared statements of each session.
const STATEMENTS: usize = 20;

/// How often each session says something: so many that none is at rest for long.
const PACE: Duration = Duration::from_millis(100);

/// Sessions: `PGCUTOVER_SESSIONS`, or as many as do not disturb the other tests.
fn sessions() -> usize {
    std::env::var("PGCUTOVER_SESSIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(40)
}

/// What one client saw.
struct Seen {
    client: Client,
    n: i32,
    longest: Duration,
    drawn: i64,
}

async fn prepared(client: &Client) -> Vec<Statement> {
    let mut statements = Vec::new();
    for n in 0..STATEMENTS {
        statements.push(client.prepare(&format!("SELECT {n} + count(*) FROM branches WHERE bid > $1")).await.unwrap());
    }
    statements
}

/// Writes and reads in turn until it is told to stop.
async fn work(client: Client, n: i32, stop: CancellationToken) -> Seen {
    client.run(&format!("SET work_mem = '{n}MB'; SET my.n = '{n}'; LISTEN news")).await.unwrap();
    let statements = prepared(&client).await;
    let insert = client.prepare("INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, 1, 0)").await.unwrap();
    let mut seen = Seen { client, n, longest: Duration::ZERO, drawn: 0 };
    let mut tick = tokio::time::interval(PACE);
    while !stop.is_cancelled() {
        tick.tick().await;
        let began = Instant::now();
        let at = usize::try_from(seen.drawn).unwrap() % STATEMENTS;
        let row = seen.client.query_one(&statements[at], &[&0_i32]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 10 + i64::try_from(at).unwrap());
        seen.drawn += 1;
        seen.client.execute(&insert, &[&n, &seen.drawn]).await.unwrap();
        seen.longest = seen.longest.max(began.elapsed());
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stdout, reason = "a figure for whoever asks for many sessions with --nocapture")]
async fn many_sessions_under_load_move_without_an_error() {
    let count = sessions();
    let mut options = PairOptions::new(13, 17);
    for cluster in [&mut options.source, &mut options.target] {
        cluster.settings.push(("max_connections".to_owned(), (count + 80).to_string()));
    }
    let pair = Pair::start(&Binaries::of(&[13, 17]).unwrap(), &options).await.unwrap();
    let pool_size = i64::try_from(count).unwrap() + 10;
    let mut stage = Stage::with(pair, 1, |options| {
        session_pooled(options, APP);
        options.setting("default_pool_size", pool_size);
        options.setting("max_client_conn", pool_size + 10);
    })
    .await
    .unwrap();
    // Tests share a machine: what they measure is not the stall.
    stage.control.budget(&[("stall", "10s")]);
    let stop = CancellationToken::new();
    let mut tasks = Vec::new();
    for n in 1..=count {
        let client = stage.proxies[0].connect(APP).await.unwrap();
        tasks.push(tokio::spawn(work(client, i32::try_from(n).unwrap(), stop.clone())));
    }
    let finished = stage.control.run(&["cutover"], LIMIT * 2).await.unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.story());
    let report = Arc::new(finished.json().unwrap());
    stop.cancel();
    let target = stage.pair.target.superuser("app").await.unwrap();
    let mut longest = Duration::ZERO;
    for task in tasks {
        let Seen { client, n, longest: stall, drawn } = task.await.unwrap();
        longest = longest.max(stall);
        assert_eq!(client.number(WHERE).await.unwrap(), i64::from(stage.pair.target.port()));
        assert_eq!(client.text("SHOW work_mem").await.unwrap().unwrap(), format!("{n}MB"));
        assert_eq!(client.text("SHOW my.n").await.unwrap().unwrap(), n.to_string());
        let listens = "SELECT count(*) FROM pg_listening_channels()";
        assert_eq!(client.number(listens).await.unwrap(), 1);
        let stored = format!("SELECT count(DISTINCT n) * 10 + (count(*) = max(n))::int FROM ledger WHERE client = {n}");
        assert_eq!(target.number(&stored).await.unwrap(), drawn * 10 + 1);
    }
    let step = report["steps"].as_array().unwrap().iter().find(|step| step["name"] == "transplanted").unwrap().clone();
    println!("{count} sessions: longest stall {longest:?}, pause {} ms, step {step}", report["pause_ms"]);
}
