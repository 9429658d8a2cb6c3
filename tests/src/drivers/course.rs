//! What a driver is engaged for, what each of its rounds writes, and what it tells.
//!
//! Invariant: the figures of a round are those of the programs in `tests/drivers`, so that one audit is good for all.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::ledger::{Notes, Write};

/// So often no driver is ever needed: a program that is forgotten ends by itself.
pub(crate) const ROUNDS_MAX: i64 = 2000;

/// 2026-01-01 00:00 UTC: what the parcels' times count from.
pub(crate) const EPOCH_S: i64 = 1_767_225_600;

/// How the proxy shares server connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Pooling {
    /// A server per transaction.
    Transaction,
    /// A server per client.
    Session,
}

impl Pooling {
    /// As the proxy's configuration says it.
    pub fn word(self) -> &'static str {
        match self {
            Pooling::Transaction => "transaction",
            Pooling::Session => "session",
        }
    }
}

/// Do drivers use types whose oids are not everywhere the same?
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Types {
    /// Built-in types only.
    BuiltIn,
    /// An enum, an array of it and a composite too, which have other oids on the target.
    OtherOids,
}

/// Where and how a driver works.
#[derive(Clone, Debug)]
pub struct Engagement {
    /// On 127.0.0.1.
    pub port: u16,
    /// Login.
    pub user: String,
    /// Its password.
    pub password: String,
    /// Database.
    pub database: String,
    /// First number in the ledger.
    pub client: i32,
    /// Its application_name, where the driver can be told one.
    pub name: &'static str,
    /// What the proxy does with its connection.
    pub pooling: Pooling,
    /// What it writes.
    pub types: Types,
    /// Between its rounds.
    pub pace: Duration,
    /// For its files.
    pub dir: PathBuf,
}

impl Engagement {
    /// The variables by which libpq and most drivers know where to connect.
    pub(crate) fn environment(&self) -> [(&'static str, String); 6] {
        [
            ("PGHOST", "127.0.0.1".to_owned()),
            ("PGPORT", self.port.to_string()),
            ("PGUSER", self.user.clone()),
            ("PGPASSWORD", self.password.clone()),
            ("PGDATABASE", self.database.clone()),
            ("PGAPPNAME", self.name.to_owned()),
        ]
    }
}

/// What a driver has told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// The driver's own version.
    pub version: Option<String>,
    /// Transactions whose commit was acknowledged.
    pub acknowledged: Vec<Write>,
    /// Transactions of unknown outcome.
    pub unknown: Vec<Write>,
    /// What should not have been, in its words.
    pub errors: Vec<String>,
    /// Collisions that were refused as they have to be.
    pub refused: u64,
    /// It has ended.
    pub ended: bool,
}

impl Told {
    /// For the audit.
    pub fn notes(&self) -> Vec<Notes> {
        let all = self.acknowledged.iter().map(|write| (write, true));
        let all = all.chain(self.unknown.iter().map(|write| (write, false)));
        let note = |((client, n), known): (&Write, bool)| {
            let (acknowledged, unknown) = if known { (vec![*n], Vec::new()) } else { (Vec::new(), vec![*n]) };
            Notes { client: *client, acknowledged, unknown, refused: Vec::new() }
        };
        all.map(|(write, known)| note((write, known))).collect()
    }
}

/// What one round writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) client: i32,
    pub(crate) n: i64,
}

impl Order {
    pub(crate) fn aid(self) -> i64 {
        1 + (i64::from(self.client) * 31 + self.n) % 1000
    }

    pub(crate) fn delta(self) -> i64 {
        self.n % 7 - 3
    }

    pub(crate) fn body(self) -> Vec<u8> {
        (0..300).map(|place| (place + self.n).to_le_bytes()[0]).collect()
    }

    pub(crate) fn sent(self) -> SystemTime {
        let since = Duration::from_secs(EPOCH_S.unsigned_abs()) + Duration::from_millis(self.n.unsigned_abs());
        UNIX_EPOCH + since
    }

    pub(crate) fn mood(self) -> &'static str {
        match self.n % 3 {
            0 => "ok",
            1 => "so, so",
            _ => "it's {bad}",
        }
    }

    /// The composite, as text.
    pub(crate) fn spot(self) -> String {
        format!("(street,\"{}\")", self.mood())
    }

    /// Does this round send its parcel twice, and in a transaction?
    pub(crate) fn collision(self) -> Option<InTransaction> {
        let inside = if self.n % 2 == 0 { InTransaction::Yes } else { InTransaction::No };
        (self.n % 3 == 0).then_some(inside)
    }
}

/// Where a statement stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InTransaction {
    Yes,
    No,
}

/// # Errors
/// They differ; the message says how.
pub(crate) fn check<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Result<()> {
    ensure!(found == wanted, "{what}: {found:?}, wanted {wanted:?}");
    Ok(())
}
