//! Who is on the stage of a cell: servers, proxies, links that can be cut, a PgBouncer with its keeper; how each is struck down
//! and comes back.
//!
//! Invariant: whoever was struck down comes back by itself, as it was; nobody is told what happened meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use toml::Value;

use crate::binaries::Binaries;
use crate::cluster::Cluster;
use crate::control::SHORT;
use crate::faults::{Fault, FaultProxy};
use crate::kept::Kept;
use crate::kills::{Kind, LIMIT, LOOK, Members, Setting, Victim};
use crate::ledger::{Notes, Sides, audit};
use crate::pair::{APP, DATABASE, Pair, PairOptions, SOURCE, TARGET, password};
use crate::stage::{Serving, Stage, audit_of};
use crate::workload::Workload;

/// How long a victim is away.
pub const OUTAGE: Duration = Duration::from_millis(1500);
/// How long clients are held where the source goes for good, as far as they can tell: longer than the worst pause that the budgets
/// allow.
pub(super) const HOLD_BUDGET: Duration = Duration::from_secs(3);
/// How long it stays away then: nobody who was held when it went can be held any more.
pub const AWAY: Duration = Duration::from_millis(4500);

/// How things stand at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Clients are served, or nothing is known.
    Open,
    /// Every proxy holds its clients, and nothing is decided as far as the target knows.
    Held,
    /// The target has the evidence of the commit.
    Committed,
}

/// All of them. Fields end in this order.
pub(super) struct Cast {
    kept: Option<Kept>,
    links: Vec<FaultProxy>,
    pub(super) stage: Stage,
    kind: Kind,
}

impl Cast {
    /// Starts them; budgets are made for what is to happen to `victim`.
    pub(super) async fn gather(binaries: &Binaries, setting: &Setting, victim: Victim) -> Result<Cast> {
        let (from, to) = setting.majors;
        let pair = match setting.kind {
            Kind::Logical => Pair::start(binaries, &PairOptions::new(from, to)).await?,
            Kind::Physical => Pair::physical(binaries, to).await?,
        };
        let gone = victim == Victim::SourceGone;
        let proxies = match setting.members {
            Members::Proxies => 2,
            Members::Pgbouncer => 1,
        };
        let mut links = Vec::new();
        for port in [pair.source.port(), pair.target.port()] {
            links.push(FaultProxy::start(port).await?);
        }
        let ports = [links[0].port(), links[1].port()];
        // Longer than the worst pause that the budgets allow, shorter than anybody's patience here.
        let hold_budget = if gone { HOLD_BUDGET } else { Duration::from_secs(8) };
        let mut stage = Stage::with(pair, proxies, |options| {
            options.setting("hold_budget", format!("{}ms", hold_budget.as_millis()));
            // What a hold of its own may take fits in there.
            options.setting("drain_timeout", "700ms");
            options.setting("pause_lease", "1s");
            if options.name == "p2" {
                options.backend_port(SOURCE, ports[0]);
                options.backend_port(TARGET, ports[1]);
            }
        })
        .await?;
        stage.control.budget(&SHORT);
        if gone {
            stage.control.budget(&[("catch_up", "1200ms")]);
        }
        stage.control.with_way_back();
        if setting.kind == Kind::Physical {
            stage.control.set("replication", "kind", "physical");
        }
        let mut kept = None;
        match setting.members {
            Members::Proxies => links.push(link_to_second(&mut stage).await?),
            Members::Pgbouncer => {
                stage.control.budget(&[("drain", "900ms"), ("lease", "1500ms")]);
                let lines = "pool_mode = transaction\ndefault_pool_size = 10\n";
                kept = Some(Kept::start(&mut stage, "b1", lines).await?);
            }
        }
        Ok(Cast { kept, links, stage, kind: setting.kind })
    }

    /// Where clients connect.
    pub(super) fn ports(&self) -> Vec<u16> {
        let mut ports = self.stage.ports();
        ports.extend(self.kept.iter().map(|kept| kept.bouncer.port()));
        ports
    }

    /// What the victim goes through.
    pub(super) async fn strike(&mut self, victim: Victim) -> Result<()> {
        match victim {
            Victim::Proxyctl => {}
            Victim::Proxy => self.stage.proxies[1].kill9(),
            Victim::Source | Victim::SourceGone => self.stage.pair.source.kill9().await?,
            Victim::Target => self.stage.pair.target.kill9().await?,
            Victim::Network => self.links.iter().for_each(|link| link.set_both(Fault::Hold)),
            Victim::Pgbouncer => self.kept()?.bouncer.kill9(),
            Victim::Keeper => self.kept()?.keeper.take().context("a keeper")?.kill9(),
        }
        Ok(())
    }

    /// Brings it back, so long after it was `killed`.
    pub(super) async fn revive(&mut self, victim: Victim, killed: Instant) -> Result<()> {
        let away = if victim == Victim::SourceGone { AWAY } else { OUTAGE };
        // reason: a supervisor takes its time; the length of the outage is part of the experiment.
        tokio::time::sleep_until((killed + away).into()).await;
        match victim {
            Victim::Proxyctl => {}
            Victim::Proxy => self.stage.proxies[1].restart().await?,
            Victim::Source | Victim::SourceGone => self.stage.pair.source.restart().await?,
            Victim::Target => self.stage.pair.target.restart().await?,
            Victim::Network => self.links.iter().for_each(|link| link.set_both(Fault::Pass)),
            Victim::Pgbouncer => self.kept()?.bouncer.restart().await?,
            Victim::Keeper => {
                let kept = self.kept.as_mut().context("no PgBouncer takes part")?;
                kept.keep(&self.stage.pair).await?;
            }
        }
        Ok(())
    }

    fn kept(&mut self) -> Result<&mut Kept> {
        self.kept.as_mut().context("no PgBouncer takes part")
    }

    /// How things stand now, while everybody lives.
    pub(super) async fn standing(&self) -> Result<Standing> {
        let target = self.stage.pair.target.superuser(DATABASE).await?;
        let says = async |question: &str| anyhow::Ok(target.text(question).await?.as_deref() == Some("t"));
        if says("SELECT to_regclass('pgcutover.evidence') IS NOT NULL").await?
            && says("SELECT EXISTS (SELECT FROM pgcutover.evidence WHERE outcome = 'commit')").await?
        {
            return Ok(Standing::Committed);
        }
        let gates = self.gates().await?;
        Ok(if gates.iter().all(|[state, _]| state == "paused") { Standing::Held } else { Standing::Open })
    }

    /// Waits until everybody serves and writes go on; where.
    pub(super) async fn serves(&self, load: &Workload) -> Result<String> {
        let side = self.settled().await?;
        load.acknowledges(5, LIMIT).await?;
        Ok(side)
    }

    /// Waits until every proxy is open, all on one backend, and a PgBouncer answers from there; which.
    pub(super) async fn settled(&self) -> Result<String> {
        let until = Instant::now() + LIMIT;
        loop {
            let gates = self.gates().await?;
            let [state, side] = gates.first().context("no proxy")?;
            let there = match &self.kept {
                Some(kept) => kept.bouncer.points_at().await.ok() == Some(self.server(side).port()),
                None => true,
            };
            if state == "open" && there && gates.iter().all(|gate| *gate == gates[0]) {
                self.answers(side).await?;
                return Ok(side.clone());
            }
            ensure!(Instant::now() < until, "gates do not settle: {gates:?}");
            // reason: a look at the gates; the loop has a deadline.
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A client of PgBouncer is answered by that side.
    async fn answers(&self, side: &str) -> Result<()> {
        let Some(kept) = &self.kept else { return Ok(()) };
        let asked = async {
            let client = kept.bouncer.connect(APP, DATABASE).await?;
            client.number("SELECT inet_server_port()").await
        };
        let port = tokio::time::timeout(LIMIT, asked).await.context("PgBouncer lets nobody go")??;
        ensure!(port == i64::from(self.server(side).port()), "PgBouncer's clients are on {port}, not on {side}");
        Ok(())
    }

    /// State and backend of each proxy's gate.
    async fn gates(&self) -> Result<Vec<[String; 2]>> {
        let mut gates = Vec::new();
        for proxy in &self.stage.proxies {
            let rows = proxy.ask("SHOW GATES").await?;
            let gate = rows.iter().find(|row| row.get("database") == Some(DATABASE)).context("no gate")?;
            gates.push(["state", "backend"].map(|column| gate.get(column).unwrap_or_default().to_owned()));
        }
        Ok(gates)
    }

    fn server(&self, side: &str) -> &Cluster {
        if side == SOURCE { &self.stage.pair.source } else { &self.stage.pair.target }
    }

    /// The ledger in one line, where all is well: it adds up, and the side that lost takes no writes.
    pub(super) async fn audit(&self, notes: &[Notes], side: &str) -> Result<String> {
        let pair = &self.stage.pair;
        let (serving, loser) =
            if side == SOURCE { (Serving::Source, &pair.target) } else { (Serving::Target, &pair.source) };
        let audit = if self.kind == Kind::Physical && serving == Serving::Source && !is_standby(loser).await? {
            // Promoted for nothing: it follows nobody any more.
            let (source, target) = tokio::try_join!(pair.source.superuser(DATABASE), pair.target.superuser(DATABASE))?;
            audit(notes, Sides { serving: &source, other: Some(&target), moves: 0 }).await?
        } else {
            audit_of(pair, notes, serving).await?
        };
        ensure!(audit.is_clean(), "the ledger does not add up on {side}: {audit}");
        // A logical target that was never a source has no gate: nobody was sent there.
        if serving == Serving::Target || self.kind == Kind::Physical {
            refuses_writes(loser).await?;
        }
        Ok(audit.to_string())
    }
}

/// What goes between the second proxy's console and proxyctl, from now on.
async fn link_to_second(stage: &mut Stage) -> Result<FaultProxy> {
    let console = stage.proxies[1].port();
    let link = FaultProxy::start(console).await?;
    let config = &mut stage.control.config;
    let second = config.get_mut("proxies").and_then(Value::as_array_mut).and_then(|proxies| proxies.get_mut(1));
    let second = second.and_then(Value::as_table_mut).context("two proxies")?;
    let dsn = second.get("dsn").and_then(Value::as_str).context("a dsn")?;
    let dsn = dsn.replace(&format!("port={console}"), &format!("port={}", link.port()));
    second.insert("dsn".to_owned(), dsn.into());
    Ok(link)
}

async fn is_standby(cluster: &Cluster) -> Result<bool> {
    Ok(cluster.superuser(DATABASE).await?.text("SELECT pg_is_in_recovery()").await?.as_deref() == Some("t"))
}

/// A client that goes past the proxies is told that this side is not to be written to.
async fn refuses_writes(cluster: &Cluster) -> Result<()> {
    let client = cluster.connect(APP, &password(APP), DATABASE).await?;
    let answer = client.batch_execute("INSERT INTO branches (bid) VALUES (99)").await;
    let state = answer.as_ref().err().and_then(|error| error.code()).map(|code| code.code());
    ensure!(state == Some("25006"), "the side that lost takes writes, or says something else: {answer:?}");
    Ok(())
}
