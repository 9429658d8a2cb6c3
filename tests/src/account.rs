//! What a load came to: what its clients were told, and what the servers have of it.
//!
//! Invariant: figures of one run; what the servers have was counted by the ledger, not by the clients.

use serde::Serialize;

use crate::errors::tally;
use crate::ledger::Audit;
use crate::workload::Outcome;

/// The figures.
#[derive(Clone, Debug, Serialize)]
pub struct Account {
    /// How long the load ran.
    pub seconds: f64,
    /// Transactions that ended well.
    pub transactions: u64,
    /// Writes acknowledged.
    pub writes_acknowledged: usize,
    /// The same a second.
    pub writes_per_s: f64,
    /// Errors that clients saw.
    pub errors: usize,
    /// What they said, and how often.
    pub error_texts: Vec<(String, usize)>,
    /// Acknowledged, but not there.
    pub lost: usize,
    /// There twice, or though refused.
    pub duplicated: usize,
    /// Taken by a side that did not serve.
    pub two_sided: usize,
    /// Whether balances and histories agree with the ledger.
    pub balanced: bool,
    /// What the ledger says.
    #[serde(skip)]
    pub audit: Audit,
}

impl Account {
    /// Of a load that has ended.
    pub fn of(outcome: &Outcome, audit: Audit) -> Account {
        let errors = outcome.errors();
        let seconds = outcome.duration.as_secs_f64();
        let acknowledged = u32::try_from(outcome.acknowledged()).unwrap_or(u32::MAX);
        Account {
            seconds,
            transactions: outcome.transactions,
            writes_acknowledged: outcome.acknowledged(),
            writes_per_s: f64::from(acknowledged) / seconds,
            errors: errors.len(),
            error_texts: tally(&errors),
            lost: audit.lost.len(),
            duplicated: audit.doubled.len() + audit.phantom.len(),
            two_sided: audit.stranded.len() + audit.split.len(),
            balanced: audit.imbalance == 0 && audit.orphaned == 0,
            audit,
        }
    }

    /// Whether no client saw an error and every write is where it belongs, once.
    pub fn is_good(&self) -> bool {
        self.errors == 0 && self.audit.is_clean()
    }
}
