//! All that a cutover needs, running: a pair, proxies in front of it, proxyctl ready to go.
//!
//! Invariant: proxies end before the servers behind them.

use anyhow::Result;

use crate::binaries::Binaries;
use crate::control::Control;
use crate::ledger::{Audit, Notes, Sides, audit};
use crate::pair::{DATABASE, Pair, PairOptions};
use crate::proxy::{Proxy, ProxyOptions};

/// A stage that was set up. Fields end in this order.
#[derive(Debug)]
pub struct Stage {
    /// proxyctl, configured for all of it.
    pub control: Control,
    /// The proxies, `p1` first.
    pub proxies: Vec<Proxy>,
    /// The servers.
    pub pair: Pair,
}

/// The side that clients are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serving {
    /// No cutover took place.
    Source,
    /// One did.
    Target,
}

impl Stage {
    /// Starts a pair and so many proxies.
    ///
    /// # Errors
    /// Something does not start: the message says what, with its log.
    pub async fn start(binaries: &Binaries, options: &PairOptions, proxies: u16) -> Result<Stage> {
        Stage::with(Pair::start(binaries, options).await?, proxies, |_| ()).await
    }

    /// Puts so many proxies in front of a pair; `change` may alter each one's configuration before it starts.
    ///
    /// # Errors
    /// As [`Stage::start`].
    pub async fn with(pair: Pair, proxies: u16, change: impl Fn(&mut ProxyOptions)) -> Result<Stage> {
        let mut started = Vec::new();
        for peer_id in 1..=proxies {
            let mut options = ProxyOptions::for_pair(&pair, peer_id)?;
            change(&mut options);
            started.push(Proxy::start(options).await?);
        }
        let control = Control::for_pair(&pair, &started.iter().collect::<Vec<_>>())?;
        Ok(Stage { control, proxies: started, pair })
    }

    /// Where clients connect.
    pub fn ports(&self) -> Vec<u16> {
        self.proxies.iter().map(Proxy::port).collect()
    }

    /// As [`audit_of`].
    ///
    /// # Errors
    /// A side can't be read.
    pub async fn audit(&self, notes: &[Notes], serving: Serving) -> Result<Audit> {
        audit_of(&self.pair, notes, serving).await
    }
}

/// Compares what clients were told with both sides; after a cutover that did not take place the target must have caught up,
/// so replication must run.
///
/// # Errors
/// A side can't be read.
pub async fn audit_of(pair: &Pair, notes: &[Notes], serving: Serving) -> Result<Audit> {
    if serving == Serving::Source {
        pair.in_step().await?;
    }
    let (source, target) = tokio::try_join!(pair.source.superuser(DATABASE), pair.target.superuser(DATABASE))?;
    let sides = match serving {
        Serving::Source => Sides { serving: &source, other: Some(&target), moves: 0 },
        Serving::Target => Sides { serving: &target, other: Some(&source), moves: 1 },
    };
    audit(notes, sides).await
}
