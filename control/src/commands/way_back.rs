//! `proxyctl way-back`: how reverse replication stands; attaches what a run could not, or takes all of it away.
//!
//! Invariant: what leads to the server that serves is never taken for the way back.

use std::fmt;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::clusters::{ClusterError, Clusters};
use crate::commands::Context;
use crate::finding::Finding;
use crate::printer::Exit;
use crate::steps::reverse::{self, Attached, Way, drop_subscription};
use crate::steps::{STEP_DEADLINE, StepError};

/// What to do.
#[derive(Debug, Args)]
pub struct WayBack {
    /// What to do.
    #[arg(value_enum, default_value_t)]
    work: Work,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Work {
    /// Say how it stands.
    #[default]
    Status,
    /// Let the old server follow the one that serves, if the last run made a slot for it.
    Attach,
    /// Drop subscription, slot and publications: from then on only a new copy leads back.
    Drop,
}

#[derive(Serialize)]
struct Standing {
    database: String,
    /// The backend that serves by the last commit; none if there was none.
    serving: Option<String>,
    /// Nothing of it if there is no slot.
    #[serde(flatten)]
    state: State,
    /// What was dropped just now.
    dropped: Vec<String>,
    findings: Vec<Finding>,
}

impl WayBack {
    /// Looks, attaches or drops.
    pub async fn run(&self, context: &Context) -> anyhow::Result<Exit> {
        let config = &context.config;
        let clusters = Clusters::connect(&config.source.endpoint, &config.target.endpoint).await?;
        let mut standing = Standing {
            database: config.database.clone(),
            serving: None,
            state: State::default(),
            dropped: Vec::new(),
            findings: Vec::new(),
        };
        let served = reverse::served(config, &clusters).await?;
        let mut exit = Exit::Done;
        if let Some(served) = served {
            let way = Way::of(config, &clusters, served);
            standing.serving = Some(way.serving.1.backend.clone());
            match self.work {
                Work::Status => {}
                Work::Attach => standing.note(&way, way.attach().await),
                Work::Drop => {
                    if let Err(error) = drop_all(&way, &mut standing).await {
                        standing.findings.extend(error.findings);
                    }
                }
            }
            standing.state = State::of(&way).await?;
            if self.work == Work::Attach && !standing.state.attached || !standing.findings.is_empty() {
                exit = Exit::Unfinished;
            }
        }
        context.printer.data(&standing);
        if self.work == Work::Drop && exit == Exit::Done {
            context.printer.next("'proxyctl objects drop', if our tables and gates shall go, too");
        }
        Ok(exit)
    }
}

/// How the way back stands.
#[derive(Debug, Clone, Default, Serialize)]
pub struct State {
    /// Name of slot and subscription; none if there is no slot.
    pub name: Option<String>,
    /// Whether the old server has the subscription and reads the slot.
    pub attached: bool,
    /// WAL that is not applied on the old server yet; none while nobody reads.
    pub lag_bytes: Option<i64>,
    /// WAL that the slot keeps.
    pub kept_bytes: Option<i64>,
}

impl State {
    /// Looks.
    ///
    /// # Errors
    /// A server does not answer, or our login may not see its slots or subscriptions.
    pub async fn of(way: &Way<'_>) -> Result<State, ClusterError> {
        let Some(offer) = way.offer().await? else { return Ok(State::default()) };
        let there = way.other.0.all_subscriptions(STEP_DEADLINE).await?;
        let own: Vec<_> = there.into_iter().filter(|subscription| subscription.name == offer.slot).collect();
        let slots = way.serving.0.slots(&own, STEP_DEADLINE).await?;
        Ok(State {
            attached: !own.is_empty() && offer.is_active,
            lag_bytes: slots.first().and_then(|slot| slot.lag.applied_bytes),
            kept_bytes: offer.kept_bytes,
            name: Some(offer.slot),
        })
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |bytes: Option<i64>| bytes.map_or("unknown".to_owned(), |bytes| format!("{bytes} bytes"));
        let Some(name) = &self.name else { return f.write_str("way back: none") };
        let attached = if self.attached { "attached" } else { "NOT ATTACHED" };
        write!(
            f,
            "way back: {name}, {attached}, lag {}, keeps {} of WAL",
            bytes(self.lag_bytes),
            bytes(self.kept_bytes)
        )
    }
}

async fn drop_all(way: &Way<'_>, standing: &mut Standing) -> Result<(), StepError> {
    let (serving, other) = (way.serving.0, way.other.0);
    let there = other.subscriptions(way.db, &[way.name()], STEP_DEADLINE).await?;
    for subscription in &there {
        drop_subscription(other, serving, subscription).await?;
        let (on, from) = (&way.other.1.backend, &way.serving.1.backend);
        standing.dropped.push(format!("subscription {} of {on}, with its slot on {from}", subscription.name));
    }
    for (cluster, side) in [way.serving, way.other] {
        for offer in cluster.offers(way.db, STEP_DEADLINE).await? {
            cluster.drop_slot(&offer.slot, STEP_DEADLINE).await?;
            standing.dropped.push(format!("slot {} of {}", offer.slot, side.backend));
        }
        let publication = cluster.withdraw(way.db, STEP_DEADLINE).await?;
        standing.dropped.extend(publication.map(|name| format!("publication {name} of {}", side.backend)));
    }
    Ok(())
}

impl Standing {
    fn note(&mut self, way: &Way<'_>, outcome: Result<Attached, StepError>) {
        let fix = "only a new copy leads back; 'proxyctl way-back drop' gives the WAL free";
        match outcome {
            Ok(Attached::Follows { dropped, .. }) => self.dropped.extend(dropped),
            Ok(Attached::None) => {
                let problem = "the last run made no slot: there is no way back";
                self.findings.push(Finding::red("way_back", way.name(), problem, fix));
            }
            Ok(Attached::Stranger(offer)) => {
                let problem = format!("{} is not the server that the last commit fenced", way.other.1.backend);
                self.findings.push(Finding::red("way_back", offer.slot, problem, fix));
            }
            Err(error) => self.findings.push(way.not_attached(&error)),
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(serving) = &self.serving else {
            return write!(f, "{}: no cutover was ever committed", self.database);
        };
        writeln!(f, "{}: served by {serving}", self.database)?;
        writeln!(f, "{}", self.state)?;
        self.dropped.iter().try_for_each(|dropped| writeln!(f, "  dropped: {dropped}"))?;
        self.findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))
    }
}
