//! The verbs of the decision store, sent: install, arm, open, flip, decide, witness, and their reading.
//!
//! Invariant: what a verb did not acknowledge has not happened as far as proxyctl is concerned, except `decide` and `open`,
//! whose outcome is asked for again.

use std::time::Duration;

use pgcutover_api::epoch::{Claim, Epoch, RunId};
use pgcutover_api::store::{self, BadRow, Gate, Identity, Member, Name, Outcome, StoreView, Turn};

use crate::clusters::{Cluster, ClusterError, Deadline, cells};

/// How often a lost answer is asked for again.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Whether the event trigger stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certainty {
    /// DDL is refused by the server itself.
    Enforced,
    /// The login may not create event triggers: a catalogue fingerprint has to do.
    Watched,
}

/// Why an outcome is not known.
#[derive(Debug, thiserror::Error)]
pub enum DecideError {
    /// The server says that this run can't decide this epoch: an error, never an outcome.
    #[error("the epoch can't be decided: {0}")]
    Refused(ClusterError),
    /// The server did not answer within the limit: undecided, or decided and not acknowledged.
    #[error("the outcome is not known: {0}")]
    Unknown(ClusterError),
}

impl Cluster {
    /// Creates or updates the store, in one transaction. Target first.
    pub async fn install(&self, limit: Duration) -> Result<(), ClusterError> {
        self.ask("install the store", &store::transaction(store::OBJECTS), limit).await.map(drop)
    }

    /// Takes the store away with every gate, whatever they hold. Clients of the tables wait behind no more than 300 ms of it at
    /// a time; 55P03 when `limit` is over and a lock still could not be had.
    pub async fn uninstall(&self, limit: Duration) -> Result<(), ClusterError> {
        let deadline = Deadline::after(limit);
        loop {
            match self.ask("drop the store", &store::drop_objects(), deadline.left()).await {
                Err(error) if error.sqlstate() == Some("55P03") && !deadline.is_over() => {}
                answer => return answer.map(drop),
            }
        }
    }

    /// Whose objects the store holds.
    pub async fn routes(&self, limit: Duration) -> Result<Vec<String>, ClusterError> {
        self.list("routes", store::ROUTES, limit, |row| row.text("route")).await
    }

    /// Whether the store is there.
    pub async fn installed(&self, limit: Duration) -> Result<bool, ClusterError> {
        self.row("store", store::INSTALLED, limit, store::decode_bool).await
    }

    /// Gives the proxies' control login its rights on the store.
    pub async fn grant(&self, role: &str, limit: Duration) -> Result<(), ClusterError> {
        self.ask("grant", &store::transaction(&store::grants(role)), limit).await.map(drop)
    }

    /// The rows of heartbeat and sentinel that are only updated afterwards.
    pub async fn seed(&self, db: &Name, limit: Duration) -> Result<(), ClusterError> {
        self.ask("seed", &store::seed(db), limit).await.map(drop)
    }

    /// Creates the gate of a route as a no-op, and its event trigger where that is allowed.
    pub async fn arm(&self, db: &Name, limit: Duration) -> Result<Certainty, ClusterError> {
        let deadline = Deadline::after(limit);
        self.ask("arm", &store::arm(db), limit).await?;
        match self.ask("event trigger", &store::event_trigger(db), deadline.left()).await {
            Ok(_) => Ok(Certainty::Enforced),
            Err(error) if error.sqlstate() == Some("42501") => Ok(Certainty::Watched),
            Err(error) => Err(error),
        }
    }

    /// Opens the next epoch of a route. An answer that is lost is looked for in the store: the epoch is this run's or not.
    pub async fn open(&self, db: &Name, run: RunId, target: &Name, floor: Epoch) -> Result<Epoch, ClusterError> {
        // Opening waits for nothing but another open() or flip() of the same server.
        const LIMIT: Duration = Duration::from_secs(2);
        let error = match self.row("open", &store::open(db, run, target, floor), LIMIT, store::decode_epoch).await {
            Ok(epoch) => return Ok(epoch),
            Err(error) => error,
        };
        if !error.is_absence() {
            return Err(error);
        }
        match self.view(db, LIMIT).await?.open {
            Some(open) if open.run == run => Ok(open.epoch),
            Some(_) | None => Err(error),
        }
    }

    /// Asks for an outcome until one is acknowledged, the server refuses, or the limit is over.
    pub async fn decide(&self, turn: &Turn, want: Outcome, limit: Duration) -> Result<Outcome, DecideError> {
        let deadline = Deadline::after(limit);
        let sql = store::decide(turn, want);
        loop {
            match self.row("decide", &sql, deadline.left(), store::decode_outcome).await {
                Ok(outcome) => return Ok(outcome),
                Err(error) if is_final(&error) => return Err(DecideError::Refused(error)),
                Err(error) if deadline.is_over() => return Err(DecideError::Unknown(error)),
                // reason: a server that is away is asked again, within the deadline.
                Err(_) => tokio::time::sleep(ASK_AGAIN.min(deadline.left())).await,
            }
        }
    }

    /// Writes the evidence of a commit (target).
    pub async fn witness(&self, turn: &Turn, target: &Name, limit: Duration) -> Result<(), ClusterError> {
        self.row("witness", &store::witness(turn, target), limit, store::decode_outcome).await.map(drop)
    }

    /// Fences (source).
    pub async fn flip(&self, turn: &Turn, limit: Duration) -> Result<(), ClusterError> {
        self.ask("flip", &store::flip(turn), limit).await.map(drop)
    }

    /// Opens the fence of an aborted epoch (source).
    pub async fn unfence(&self, turn: &Turn, limit: Duration) -> Result<(), ClusterError> {
        self.ask("unfence", &store::unfence(turn), limit).await.map(drop)
    }

    /// Puts the target's form on a target that has a gate; false if it has none.
    pub async fn guard(&self, turn: &Turn, limit: Duration) -> Result<bool, ClusterError> {
        self.row("guard", &store::guard(turn), limit, store::decode_bool).await
    }

    /// Replaces the target's form by the no-op after the evidence is there.
    pub async fn settle(&self, turn: &Turn, limit: Duration) -> Result<(), ClusterError> {
        self.ask("settle", &store::settle(turn), limit).await.map(drop)
    }

    /// What is open and what is decided.
    pub async fn view(&self, db: &Name, limit: Duration) -> Result<StoreView, ClusterError> {
        self.row("read the store", &store::view(db), limit, StoreView::decode).await
    }

    /// The proxies, and the keepers of PgBouncers, that enrolled themselves.
    pub async fn members(&self, db: &Name, limit: Duration) -> Result<Vec<Member>, ClusterError> {
        let mut members = self.rows("members", &store::members(db), limit, Member::decode).await?;
        members.retain(|member| member.address != store::CONTROLLER);
        Ok(members)
    }

    /// Writes a member's row.
    pub async fn enroll(&self, db: &Name, member: &Member, limit: Duration) -> Result<(), ClusterError> {
        self.ask("enrol", &store::enroll(db, member), limit).await.map(drop)
    }

    /// Says that a run lives: the lease of every PgBouncer that is held for it.
    pub async fn renew_lease(&self, db: &Name, claim: Claim, limit: Duration) -> Result<(), ClusterError> {
        let member = Member {
            instance: claim.run.to_string(),
            address: store::CONTROLLER.to_owned(),
            backend: String::new(),
            route_epoch: Epoch::ZERO,
            paused_epoch: Some(claim.epoch),
            seen_ms_ago: 0,
        };
        self.enroll(db, &member, limit).await
    }

    /// How long ago a run last said that it lives; never if it holds no lease for this epoch.
    pub async fn lease_age(&self, db: &Name, claim: Claim, limit: Duration) -> Result<Option<Duration>, ClusterError> {
        let members = self.rows("lease", &store::members(db), limit, Member::decode).await?;
        Ok(store::sign_of_life(members, claim).map(Duration::from_millis))
    }

    /// Every gate of this database.
    pub async fn gates(&self, limit: Duration) -> Result<Vec<Gate>, ClusterError> {
        self.rows("gates", store::GATES, limit, Gate::decode).await
    }

    /// Which server this is.
    pub async fn identity(&self, limit: Duration) -> Result<Identity, ClusterError> {
        self.row("identity", store::IDENTITY, limit, Identity::decode).await
    }

    async fn row<T>(
        &self,
        what: &'static str,
        sql: &str,
        limit: Duration,
        decode: StoreDecode<T>,
    ) -> Result<T, ClusterError> {
        let answer = self.ask(what, sql, limit).await?;
        let row = answer.rows.first().ok_or_else(|| self.unreadable(what, "no row came"))?;
        decode(&cells(row)).map_err(|problem| self.unreadable(what, problem))
    }

    async fn rows<T>(
        &self,
        what: &'static str,
        sql: &str,
        limit: Duration,
        decode: StoreDecode<T>,
    ) -> Result<Vec<T>, ClusterError> {
        let answer = self.ask(what, sql, limit).await?;
        let decoded = answer.rows.iter().map(|row| decode(&cells(row))).collect::<Result<Vec<T>, BadRow>>();
        decoded.map_err(|problem| self.unreadable(what, problem))
    }
}

type StoreDecode<T> = fn(&[Option<&str>]) -> Result<T, BadRow>;

/// Whether asking again can't help: the store answered about the epoch, or it is not ours to ask.
fn is_final(error: &ClusterError) -> bool {
    match error {
        ClusterError::Answer { .. } => true,
        ClusterError::Unreachable { .. } | ClusterError::Lost { .. } | ClusterError::Deadline { .. } => false,
        // 55: epoch or run; 42: no rights or no store; 22: our own arguments; 25: a standby, or the wrong isolation.
        // Everything else passes: shutdown (57), too many connections (53), lock or serialisation trouble (40, 55P03).
        ClusterError::Refused { sqlstate, .. } => {
            sqlstate == "55000" || ["42", "22", "25"].iter().any(|class| sqlstate.starts_with(class))
        }
    }
}
