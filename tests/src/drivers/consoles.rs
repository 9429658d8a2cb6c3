//! PostgreSQL's own programs on the course: psql spoken to over its stdin, pgbench with a script of the same round.
//!
//! Invariant: a write is acknowledged when psql has said its COMMIT's SQLSTATE, or when pgbench has logged its transaction.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio_util::sync::CancellationToken;

use crate::drivers::course::{Engagement, InTransaction, Order, Pooling, ROUNDS_MAX, Types, check};
use crate::drivers::{Notebook, note};

/// Longer than any hold budget: an answer that has not come by then never will.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Clients of one pgbench, each with a connection and a number of its own.
const PGBENCH_CLIENTS: i32 = 2;
/// It is stopped long before.
const PGBENCH_LIMIT: Duration = Duration::from_secs(300);

/// A psql that reads statements and says the SQLSTATE after each.
struct Psql {
    child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
    asked: u64,
}

impl Psql {
    fn start(tool: &Path, engagement: &Engagement) -> Result<Psql> {
        let mut command = Command::new(tool);
        command.args(["-X", "-q", "-A", "-t"]).envs(engagement.environment()).kill_on_drop(true);
        let stderr = File::create(engagement.dir.join(format!("{}.stderr", engagement.client)))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().context("starting psql")?;
        let stdin = child.stdin.take().context("no stdin")?;
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        Ok(Psql { child, stdin, stdout, asked: 0 })
    }

    /// Sends one statement; its SQLSTATE and what was printed.
    async fn ask(&mut self, sql: &str) -> Result<(String, Vec<String>)> {
        self.asked += 1;
        let mark = format!("answered-{} ", self.asked);
        let request = format!("{sql};\n\\echo {mark}:SQLSTATE\n");
        self.stdin.write_all(request.as_bytes()).await.context("psql reads no more")?;
        let mut printed = Vec::new();
        let answer = async {
            loop {
                let line = self.stdout.next_line().await?.context("psql has ended")?;
                match line.strip_prefix(&mark) {
                    Some(state) => return anyhow::Ok(state.to_owned()),
                    None => printed.push(line),
                }
            }
        };
        let state = tokio::time::timeout(ANSWER_LIMIT, answer).await.with_context(|| sql.to_owned())??;
        Ok((state, printed))
    }

    async fn run(&mut self, sql: &str) -> Result<Vec<String>> {
        let (state, printed) = self.ask(sql).await?;
        ensure!(state == "00000", "{sql}: {state}");
        Ok(printed)
    }
}

pub(crate) async fn psql(
    tool: PathBuf,
    engagement: &Engagement,
    notebook: &Notebook,
    stop: CancellationToken,
) -> Result<()> {
    note(notebook, |told| told.version = version(&tool));
    let mut psql = Psql::start(&tool, engagement)?;
    begin_session(&mut psql, engagement).await.context("connecting")?;
    for n in 1..=ROUNDS_MAX {
        let order = Order { client: engagement.client, n };
        let doing = transfer(&mut psql, engagement.pooling, order).await;
        note(notebook, |told| match &doing {
            Ok(()) => told.acknowledged.push((order.client, n)),
            Err(_) => told.unknown.push((order.client, n)),
        });
        doing.context("transfer")?;
        afterwards(&mut psql, engagement, order, notebook).await.with_context(|| format!("round {n}"))?;
        if stop.is_cancelled() {
            break;
        }
        tokio::time::sleep(engagement.pace).await;
    }
    drop(psql.stdin);
    let status = tokio::time::timeout(ANSWER_LIMIT, psql.child.wait()).await.context("psql does not end")??;
    ensure!(status.success(), "psql ended with {status}");
    Ok(())
}

async fn begin_session(psql: &mut Psql, engagement: &Engagement) -> Result<()> {
    psql.run("SELECT 1").await?;
    if engagement.pooling == Pooling::Session {
        psql.run("SET work_mem = '7MB'").await?;
        psql.run(&format!("LISTEN echo_{}", engagement.client)).await?;
        psql.run("PREPARE send (int, bigint, bytea, timestamptz) AS INSERT INTO parcel (client, n, body, sent) VALUES ($1, $2, $3, $4)").await?;
        psql.run("PREPARE look (int, bigint) AS SELECT encode(body, 'hex'), (extract(epoch FROM sent) * 1000)::bigint FROM parcel WHERE client = $1 AND n = $2").await?;
    }
    Ok(())
}

async fn transfer(psql: &mut Psql, pooling: Pooling, order: Order) -> Result<()> {
    let Order { client, n } = order;
    let (aid, delta) = (order.aid(), order.delta());
    psql.run("BEGIN").await?;
    psql.run(&format!("INSERT INTO ledger (client, n, aid, delta) VALUES ({client}, {n}, {aid}, {delta})")).await?;
    psql.run(&format!("UPDATE accounts SET abalance = abalance + {delta} WHERE aid = {aid}")).await?;
    psql.run(&send(pooling, order)).await?;
    psql.run("COMMIT").await?;
    Ok(())
}

fn hex(order: Order) -> String {
    order.body().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn send(pooling: Pooling, order: Order) -> String {
    let Order { client, n } = order;
    let body = hex(order);
    let sent = format!("timestamptz '2026-01-01 00:00:00+00' + {n} * interval '1 millisecond'");
    match pooling {
        Pooling::Session => format!("EXECUTE send({client}, {n}, '\\x{body}', {sent})"),
        Pooling::Transaction => {
            format!("INSERT INTO parcel (client, n, body, sent) VALUES ({client}, {n}, '\\x{body}', {sent})")
        }
    }
}

async fn afterwards(psql: &mut Psql, engagement: &Engagement, order: Order, notebook: &Notebook) -> Result<()> {
    let Order { client, n } = order;
    let look = match engagement.pooling {
        Pooling::Session => format!("EXECUTE look({client}, {n})"),
        Pooling::Transaction => format!(
            "SELECT encode(body, 'hex'), (extract(epoch FROM sent) * 1000)::bigint FROM parcel WHERE client = {client} AND n = {n}"
        ),
    };
    let found = psql.run(&look).await?.join("\n");
    let (body, sent) = found.split_once('|').with_context(|| format!("parcel: {found}"))?;
    check("body", body, hex(order).as_str())?;
    let millis = sent.split('.').next().unwrap_or_default().to_owned();
    check("sent", millis, (crate::drivers::course::EPOCH_S * 1000 + n).to_string())?;
    if let Some(inside) = order.collision() {
        if inside == InTransaction::Yes {
            psql.run("BEGIN").await?;
        }
        let (state, _) = psql.ask(&send(engagement.pooling, order)).await?;
        if inside == InTransaction::Yes {
            psql.run("ROLLBACK").await?;
        }
        check("collision", state.as_str(), "23505")?;
        note(notebook, |told| told.refused += 1);
    }
    if engagement.pooling == Pooling::Session {
        check("work_mem", psql.run("SHOW work_mem").await?, vec!["7MB".to_owned()])?;
        let heard = psql.run(&format!("NOTIFY echo_{client}, '{n}'")).await?.join("\n");
        ensure!(heard.contains(&format!("with payload \"{n}\"")), "notification: {heard:?}, wanted {n}");
    }
    if engagement.types == Types::OtherOids {
        feel(psql, order).await?;
    }
    Ok(())
}

async fn feel(psql: &mut Psql, order: Order) -> Result<()> {
    let Order { client, n } = order;
    let quote = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let mood = quote(order.mood());
    let values = format!("{client}, {n}, {mood}, ARRAY[{mood}, 'ok']::mood[], {}", quote(&order.spot()));
    psql.run(&format!("INSERT INTO feeling (client, n, mood, moods, spot) VALUES ({values})")).await?;
    let felt = format!("SELECT mood, moods[1], (spot).mood FROM feeling WHERE client = {client} AND n = {n}");
    check("feeling", psql.run(&felt).await?.join("\n"), [order.mood(); 3].join("|"))
}

/// `psql (PostgreSQL) 15.18 (Debian …)`
fn version(tool: &Path) -> Option<String> {
    let output = std::process::Command::new(tool).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout).split_whitespace().nth(2).map(str::to_owned)
}

pub(crate) async fn pgbench(
    tool: PathBuf,
    protocol: &str,
    engagement: &Engagement,
    notebook: &Notebook,
    stop: CancellationToken,
) -> Result<()> {
    note(notebook, |told| told.version = version(&tool));
    let dir = engagement.dir.join(format!("pgbench-{}", engagement.client));
    fs::create_dir(&dir)?;
    // Its script reads this file before each round; without it a client ends there, between two transactions.
    let going = dir.join("going");
    fs::write(&going, "1\n")?;
    let mut child = start_pgbench(&tool, protocol, engagement, &dir)?;
    let status = tokio::select! {
        status = child.wait() => status?,
        () = stop.cancelled() => {
            fs::remove_file(&going)?;
            child.wait().await?
        }
    };
    let writes = logged(&dir, engagement.client)?;
    note(notebook, |told| told.acknowledged.extend(writes));
    let talk = fs::read_to_string(dir.join("stderr"))?;
    let wrong = complaints(&talk);
    ensure!(wrong.is_empty(), "pgbench: {}", wrong.join(" | "));
    if !stop.is_cancelled() {
        bail!("pgbench ended by itself with {status}: {talk}");
    }
    Ok(())
}

fn start_pgbench(tool: &Path, protocol: &str, engagement: &Engagement, dir: &Path) -> Result<Child> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers/pgbench.sql");
    let rate = f64::from(PGBENCH_CLIENTS) / engagement.pace.as_secs_f64();
    let mut command = Command::new(tool);
    command.args(["-n", "-M", protocol, "-c", &PGBENCH_CLIENTS.to_string(), "-j", &PGBENCH_CLIENTS.to_string()]);
    command.args(["-T", &PGBENCH_LIMIT.as_secs().to_string(), "-R", &format!("{rate:.0}"), "-D", "n=0"]);
    command.args([
        "-D",
        &format!("base={}", engagement.client),
        "-D",
        &format!("going={}", dir.join("going").display()),
    ]);
    command.args(["-l", "--log-prefix"]).arg(dir.join("log")).arg("-f").arg(script);
    let stderr = File::create(dir.join("stderr"))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).envs(engagement.environment());
    command.kill_on_drop(true).spawn().context("starting pgbench")
}

/// Client and running number of each transaction in its logs. A client numbers its rounds from 1 and ends at the first
/// one that fails, so the k-th line of a client is its round k.
fn logged(dir: &Path, base: i32) -> Result<Vec<(i32, i64)>> {
    let mut writes = Vec::new();
    let mut rounds = [0_i64; PGBENCH_CLIENTS as usize];
    let logs = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    for log in logs.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("log."))) {
        for line in fs::read_to_string(log)?.lines() {
            let client: usize =
                line.split(' ').next().unwrap_or_default().parse().context("a line of pgbench's log")?;
            let round = rounds.get_mut(client).with_context(|| format!("a client of its own: {line}"))?;
            *round += 1;
            writes.push((base + i32::try_from(client)?, *round));
        }
    }
    Ok(writes)
}

/// What it said besides how a client ends on our order.
fn complaints(talk: &str) -> Vec<&str> {
    let expected = |line: &str| {
        line.contains("(setshell)")
            || line.contains("could not read result of shell command")
            || line.contains("Run was aborted")
            || line.starts_with("cat: ")
    };
    talk.lines()
        .filter(|line| line.contains("error:") || line.starts_with("cat: "))
        .filter(|line| !expected(line))
        .collect()
}
