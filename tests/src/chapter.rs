//! README's chapter "Your first production cutover", played: every command of it on real servers under load, and what it printed.
//!
//! Invariant: a block of the chapter is what a screen showed in a run of this module, with names in place of this machine's ports,
//! paths and logins ([`disguise`]); the SQL in it is the SQL that was run. Blocks of two runs are the same but for figures.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use crate::binaries::{Binaries, Network, Wanted, tool};
use crate::chapter::disguise::Disguise;
use crate::cluster::{Cluster, SUPERUSER};
use crate::control::Control;
use crate::ledger::{Sides, audit};
use crate::pair::{DATABASE, PGCUTOVER, PROXY, PUBLICATION, Pair, PairOptions, Rights, SUBSCRIPTION, TARGET, password};
use crate::stage::Stage;
use crate::workload::{Workload, WorkloadOptions};

pub mod blocks;
mod disguise;

use crate::chapter::blocks::Block;

/// From which major to which: the source lacks what a subscription's owner may from 16 on.
pub const MAJORS: [u32; 2] = [15, 17];
/// A command of proxyctl on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);
/// Writes that have to come through between two commands.
const BETWEEN: u64 = 20;
/// Cutovers and rollbacks that are committed.
const MOVES: usize = 3;

/// What a screen shows, and what a command may not do.
struct Screen<'a> {
    control: &'a Control,
    shown: String,
}

impl Screen<'_> {
    fn new(control: &Control) -> Screen<'_> {
        Screen { control, shown: String::new() }
    }

    /// `proxyctl ARGS…`, which has to end with that code; what it said.
    async fn proxyctl(&mut self, args: &[&str], code: i32) -> Result<String> {
        let (said, ended) = self.control.screen(args, LIMIT).await?;
        ensure!(ended == Some(code), "proxyctl {} ended with {ended:?}, not {code}:\n{said}", args.join(" "));
        self.line(&format!("$ proxyctl {}", args.join(" ")));
        self.shown.push_str(&said);
        if code != 0 {
            self.line(&format!("(exit {code})"));
        }
        Ok(said)
    }

    /// A superuser's psql, quiet, in the database that moves.
    async fn psql(&mut self, cluster: &Cluster, host: &str, args: &[&str]) -> Result<()> {
        let quoted = args.iter().map(|arg| if arg.contains(' ') { format!("\"{arg}\"") } else { (*arg).to_owned() });
        let typed: Vec<String> = quoted.collect();
        let mut command = Command::new(tool("psql")?);
        command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", SUPERUSER, "-d", DATABASE, "-h"]);
        command.arg(cluster.dir()).args(["-p", &cluster.port().to_string()]).args(args);
        command.current_dir(self.control.dir()).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(LIMIT, command.output()).await.context("psql takes too long")??;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "psql {} ended with {}: {said}", typed.join(" "), output.status);
        self.line(&format!("$ psql -h {host} -d {DATABASE} {}", typed.join(" ")));
        self.shown.push_str(&said);
        Ok(())
    }

    /// Says how many instead: they come again where nothing is red.
    fn leave_out_green(&mut self) {
        let (green, other): (Vec<&str>, Vec<&str>) = self.shown.lines().partition(|line| line.starts_with("green"));
        let at = other.iter().rposition(|line| line.trim_start().starts_with("fix: ")).map_or(0, |at| at + 1);
        let (before, after) = other.split_at(at);
        let left_out = format!("[… {} green lines]", green.len());
        let all = [before, &[left_out.as_str()], after].concat();
        self.shown = all.join("\n") + "\n";
    }

    fn line(&mut self, line: &str) {
        self.shown.push_str(line);
        self.shown.push('\n');
    }
}

/// What happened so far.
struct Play {
    disguise: Disguise,
    blocks: Vec<Block>,
}

impl Play {
    fn keep(&mut self, name: &'static str, screen: Screen<'_>) {
        self.blocks.push(Block { name, text: self.disguise.of(&screen.shown) });
    }
}

/// Plays the chapter from the first right to the last clean-up; its blocks in order.
///
/// # Errors
/// A command did not end as the chapter says, a client saw an error, or the ledger does not add up.
pub async fn play(network: Network) -> Result<Vec<Block>> {
    let binaries = Binaries::find(&Wanted::Majors(MAJORS.to_vec()), network)?;
    let options = PairOptions { rights: Rights::ToGrant, ..PairOptions::new(MAJORS[0], MAJORS[1]) };
    let pair = Pair::start(&binaries, &options).await?;
    for cluster in [&pair.source, &pair.target] {
        // What preflight has to find.
        cluster.superuser(DATABASE).await?.run("ALTER TABLE ledger DROP CONSTRAINT ledger_pkey").await?;
    }
    let mut play = Play { disguise: Disguise::default(), blocks: Vec::new() };
    rights(&mut play, &pair).await?;
    let mut stage = Stage::with(pair, 1, |_| ()).await?;
    configure(&mut stage);
    play.disguise = Disguise::of_stage(&stage);
    let mut load = WorkloadOptions::new(stage.ports(), 8);
    load.writes_per_s = 150;
    let load = Workload::start(&load).await?;
    load.acknowledges(BETWEEN, LIMIT).await?;
    prepare(&mut play, &stage).await?;
    go(&mut play, &stage, &load).await?;
    come_back(&mut play, &stage, &load).await?;
    clean_up(&mut play, &mut stage, &load).await?;
    load.acknowledges(BETWEEN, LIMIT).await?;
    let outcome = load.stop().await?;
    let errors = outcome.errors();
    ensure!(errors.is_empty(), "{} errors of clients such as {:?}", errors.len(), errors.first());
    let serving = stage.pair.target.superuser(DATABASE).await?;
    let found = audit(&outcome.notes(), Sides { serving: &serving, other: None, moves: MOVES }).await?;
    ensure!(found.is_clean(), "{found}");
    Ok(play.blocks)
}

/// The configuration as it comes, but for what the speed of a machine that tests share would decide.
fn configure(stage: &mut Stage) {
    stage.control.with_way_back();
    stage.control.budget(&[("stall", "5s"), ("transaction_age_max", "60s"), ("drain", "4s"), ("lease", "5s")]);
}

/// The two hosts as the chapter calls them.
const HOSTS: [&str; 2] = ["db-old", "db-new"];

async fn rights(play: &mut Play, pair: &Pair) -> Result<()> {
    let control = Control::bare()?;
    for (part, file) in [("roles", "roles.sql"), ("way-back", "way-back.sql")] {
        let (sql, code) = control.screen(&["objects", "sql", part], LIMIT).await?;
        ensure!(code == Some(0), "{sql}");
        let [proxy, proxyctl] = [PROXY, PGCUTOVER].map(password);
        let sql =
            sql.replace("'change me too'", &format!("'{proxy}'")).replace("'change me'", &format!("'{proxyctl}'"));
        std::fs::write(control.dir().join(file), sql)?;
    }
    let mut screen = Screen::new(&control);
    screen.line("$ proxyctl objects sql roles > roles.sql           # replace both passwords");
    screen.line("$ proxyctl objects sql way-back > way-back.sql     # for servers before PostgreSQL 16");
    let (source, target) = ((&pair.source, HOSTS[0]), (&pair.target, HOSTS[1]));
    screen.psql(source.0, source.1, &["-f", "roles.sql", "-f", "way-back.sql"]).await?;
    screen.psql(source.0, source.1, &["-c", &format!("ALTER PUBLICATION {PUBLICATION} OWNER TO {PGCUTOVER}")]).await?;
    screen.psql(target.0, target.1, &["-f", "roles.sql"]).await?;
    screen.psql(target.0, target.1, &["-c", &format!("GRANT pg_create_subscription TO {PGCUTOVER}")]).await?;
    screen
        .psql(target.0, target.1, &["-c", &format!("ALTER SUBSCRIPTION {SUBSCRIPTION} OWNER TO {PGCUTOVER}")])
        .await?;
    play.keep("rights", screen);
    let mut roles = Screen::new(&control);
    let statements = pgcutover_api::store::ROLES.lines();
    statements
        .filter(|line| !line.starts_with("--") && !line.starts_with(['\\', ' ']) && !line.is_empty())
        .for_each(|line| roles.line(line));
    play.keep("roles", roles);
    Ok(())
}

async fn prepare(play: &mut Play, stage: &Stage) -> Result<()> {
    let mut screen = Screen::new(&stage.control);
    let said = screen.proxyctl(&["objects"], 0).await?;
    play.keep("objects", screen);
    let sql = said.lines().find(|line| line.starts_with("DO ") || line.starts_with("BEGIN")).map(str::to_owned);
    let sql = sql.with_context(|| format!("no statement for a superuser in: {said}"))?;
    stage.pair.source.superuser(DATABASE).await?.run(&sql).await?;

    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["preflight"], 3).await?;
    screen.leave_out_green();
    for (cluster, host) in [(&stage.pair.source, HOSTS[0]), (&stage.pair.target, HOSTS[1])] {
        screen.psql(cluster, host, &["-c", "ALTER TABLE public.ledger REPLICA IDENTITY FULL"]).await?;
    }
    screen.proxyctl(&["preflight"], 0).await?;
    play.keep("preflight", screen);
    Ok(())
}

async fn go(play: &mut Play, stage: &Stage, load: &Workload) -> Result<()> {
    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["rehearse"], 0).await?;
    play.keep("rehearse", screen);
    load.acknowledges(BETWEEN, LIMIT).await?;

    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["cutover", "--report", "cutover.html"], 0).await?;
    play.keep("cutover", screen);
    load.acknowledges(BETWEEN, LIMIT).await?;

    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["status"], 0).await?;
    play.keep("status", screen);
    Ok(())
}

async fn come_back(play: &mut Play, stage: &Stage, load: &Workload) -> Result<()> {
    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["rollback"], 0).await?;
    play.keep("rollback", screen);
    load.acknowledges(BETWEEN, LIMIT).await?;

    let died = stage.control.run(&["cutover", "--stop-at", "after:fenced"], LIMIT).await?;
    ensure!(died.code.is_none(), "{}", died.story());
    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["resume-run"], 4).await?;
    play.keep("resume-run", screen);
    load.acknowledges(BETWEEN, LIMIT).await?;

    let again = stage.control.run(&["cutover"], LIMIT).await?;
    ensure!(again.code == Some(0), "{}", again.story());
    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["history"], 0).await?;
    play.keep("history", screen);
    load.acknowledges(BETWEEN, LIMIT).await
}

async fn clean_up(play: &mut Play, stage: &mut Stage, load: &Workload) -> Result<()> {
    let mut screen = Screen::new(&stage.control);
    screen.proxyctl(&["way-back", "drop"], 0).await?;
    screen.proxyctl(&["objects", "drop"], 3).await?;
    play.keep("clean-up", screen);
    load.acknowledges(BETWEEN, LIMIT).await?;

    for proxy in &mut stage.proxies {
        proxy.options().database(DATABASE).insert("active".to_owned(), TARGET.into());
        proxy.write()?;
        proxy.ask("RELOAD").await?;
    }
    let mut screen = Screen::new(&stage.control);
    let said = screen.proxyctl(&["objects", "drop", "--unfence"], 0).await?;
    play.keep("drop", screen);
    for proxy in &mut stage.proxies {
        let database = proxy.options().database(DATABASE);
        database.remove("control_user");
        database.remove("control_password");
        proxy.write()?;
        proxy.ask("RELOAD").await?;
    }
    let sql = said.lines().last().context("no statement for a superuser")?;
    for cluster in [&stage.pair.source, &stage.pair.target] {
        cluster.superuser(DATABASE).await?.run(sql).await?;
    }
    Ok(())
}
