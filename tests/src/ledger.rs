//! The ledger: what clients were told against what the servers hold.
//!
//! Every write is a row `(client, n)` of table `ledger` with the port of the server that took it. Invariant of a good
//! cutover: acknowledged ⊆ stored on the serving side, nothing twice, nothing that was refused, balances that add up,
//! nothing left on the other side, and no client's writes going back to a side it had left.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::client::Client;

/// One write: client and its running number.
pub type Write = (i32, i64);

/// What one client was told.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Who.
    pub client: i32,
    /// Commit was acknowledged: must be stored, once.
    pub acknowledged: Vec<i64>,
    /// The connection broke after the commit was sent: may be stored, once.
    pub unknown: Vec<i64>,
    /// An error came, or the connection broke before the commit was sent: must not be stored.
    pub refused: Vec<i64>,
}

/// The two sides when all is over.
#[derive(Clone, Copy, Debug)]
pub struct Sides<'a> {
    /// A connection to the side that serves now.
    pub serving: &'a Client,
    /// A connection to the other side, if it still runs.
    pub other: Option<&'a Client>,
    /// How often the database has moved: so often a client's writes may change sides.
    pub moves: usize,
}

/// What the comparison found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Audit {
    /// Writes acknowledged.
    pub acknowledged: usize,
    /// Rows on the serving side.
    pub stored: usize,
    /// Writes of unknown outcome, stored or not: neither is wrong.
    pub unknown: usize,
    /// Acknowledged, but not on the serving side.
    pub lost: Vec<Write>,
    /// On the serving side more than once.
    pub doubled: Vec<Write>,
    /// On the serving side although refused, or although nobody sent it.
    pub phantom: Vec<Write>,
    /// On the other side only: taken there after the last change was carried over.
    pub stranded: Vec<Write>,
    /// Taken by a side that the client had left before: two sides accepted writes at one time.
    pub split: Vec<Write>,
    /// Sum of the ledger less the sum of the balances.
    pub imbalance: i64,
    /// Rows of `history` without their row in the ledger.
    pub orphaned: i64,
}

impl Audit {
    /// Nothing lost, nothing doubled, never two sides.
    pub fn is_clean(&self) -> bool {
        let lists = [&self.lost, &self.doubled, &self.phantom, &self.stranded, &self.split];
        lists.iter().all(|list| list.is_empty()) && self.imbalance == 0 && self.orphaned == 0
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} acknowledged, {} stored, {} unknown", self.acknowledged, self.stored, self.unknown)?;
        let lists = [
            ("lost", &self.lost),
            ("doubled", &self.doubled),
            ("phantom", &self.phantom),
            ("stranded on the other side", &self.stranded),
            ("taken by a side already left", &self.split),
        ];
        for (word, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
            write!(f, "; {} {word} (such as {:?})", list.len(), &list[..list.len().min(5)])?;
        }
        if self.imbalance != 0 || self.orphaned != 0 {
            write!(f, "; balances off by {}, {} orphaned in history", self.imbalance, self.orphaned)?;
        }
        Ok(())
    }
}

/// Compares what clients were told with what the sides hold.
///
/// # Errors
/// A side can't be read.
pub async fn audit(notes: &[Notes], sides: Sides<'_>) -> Result<Audit> {
    let stored = rows(sides.serving).await?;
    let elsewhere = match sides.other {
        Some(other) => rows(other).await?,
        None => BTreeMap::new(),
    };
    let told = Told::of(notes);
    let balance = "SELECT (SELECT coalesce(sum(delta), 0) FROM ledger) - (SELECT sum(abalance) FROM accounts)";
    let orphans = "SELECT count(*) FROM history h WHERE NOT EXISTS
        (SELECT FROM ledger l WHERE (l.client, l.n, l.aid, l.delta) = (h.client, h.n, h.aid, h.delta))";
    let allowed = |write: &Write| told.acknowledged.contains(write) || told.unknown.contains(write);
    Ok(Audit {
        acknowledged: told.acknowledged.len(),
        stored: stored.values().map(Vec::len).sum(),
        unknown: told.unknown.len(),
        lost: told.acknowledged.iter().filter(|write| !stored.contains_key(write)).copied().collect(),
        doubled: stored.iter().filter(|(_, ports)| ports.len() > 1).map(|(write, _)| *write).collect(),
        phantom: stored.keys().filter(|write| !allowed(write)).copied().collect(),
        stranded: elsewhere.keys().filter(|write| !stored.contains_key(write)).copied().collect(),
        split: split(&stored, sides.moves),
        imbalance: sides.serving.number(balance).await?,
        orphaned: sides.serving.number(orphans).await?,
    })
}

struct Told {
    acknowledged: BTreeSet<Write>,
    unknown: BTreeSet<Write>,
}

impl Told {
    fn of(notes: &[Notes]) -> Told {
        let all = |pick: fn(&Notes) -> &Vec<i64>| {
            notes.iter().flat_map(|one| pick(one).iter().map(|n| (one.client, *n))).collect()
        };
        Told { acknowledged: all(|one| &one.acknowledged), unknown: all(|one| &one.unknown) }
    }
}

/// Every row of the ledger: the ports of the servers that took it.
async fn rows(client: &Client) -> Result<BTreeMap<Write, Vec<i32>>> {
    let mut found: BTreeMap<Write, Vec<i32>> = BTreeMap::new();
    for row in
        client.query("SELECT client, n, port FROM ledger ORDER BY id", &[]).await.context("reading the ledger")?
    {
        let port: Option<i32> = row.get(2);
        found.entry((row.get(0), row.get(1))).or_default().push(port.unwrap_or(0));
    }
    Ok(found)
}

/// The first write of each client at which its writes changed sides once too often.
fn split(stored: &BTreeMap<Write, Vec<i32>>, moves: usize) -> Vec<Write> {
    let mut wrong = BTreeMap::new();
    let mut now: BTreeMap<i32, (i32, usize)> = BTreeMap::new();
    for ((client, n), ports) in stored {
        for port in ports {
            let (side, changes) = now.entry(*client).or_insert((*port, 0));
            if side != port {
                (*side, *changes) = (*port, *changes + 1);
            }
            if *changes > moves {
                wrong.entry(*client).or_insert(*n);
            }
        }
    }
    wrong.into_iter().collect()
}
