//! What is subscribed, how far replication is, and the sentinel that proves that it has caught up.
//!
//! Invariant: the position to reach is read once, after a synchronous commit; "caught up" needs the sentinel on the target
//! and the applied position of every subscription, or the replayed one of a standby.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use pgcutover_api::store::{self, Name, identifier, literal};

use crate::clusters::tables::{TableFacts, TableKind};
use crate::clusters::{BadCell, Cells, Cluster, ClusterError, Clusters, Deadline, way_back};

const SUBSCRIPTIONS: &str = "SELECT s.subname, s.subenabled, s.subslotname, array_to_json(s.subpublications)::text AS publications \
    FROM pg_subscription s WHERE s.subdbid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) \
    ORDER BY s.subname";

/// The subscription's oid comes from pg_stat_subscription: before 14 only superusers may read it in pg_subscription.
const TABLE_STATES: &str = "SELECT DISTINCT st.subname, n.nspname, c.relname, r.srsubstate FROM pg_subscription_rel r \
    JOIN pg_stat_subscription st ON st.subid = r.srsubid JOIN pg_class c ON c.oid = r.srrelid \
    JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY 1, 2, 3";

/// to_jsonb reads columns that older servers lack as NULL.
const PUBLISHED: &str = "SELECT t.pubname, t.schemaname, t.tablename, p.puballtables, \
      p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate AS every_operation, \
      EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = c.oid \
        AND (to_jsonb(r) ->> 'prqual' IS NOT NULL OR to_jsonb(r) ->> 'prattrs' IS NOT NULL)) AS partial \
    FROM pg_publication_tables t JOIN pg_publication p ON p.pubname = t.pubname \
    JOIN pg_namespace n ON n.nspname = t.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename \
    ORDER BY 1, 2, 3";

const SLOTS: &str = "SELECT s.slot_name, s.active, to_jsonb(s) ->> 'wal_status' AS wal_status, r.replay_lsn, \
      pg_wal_lsn_diff(pg_current_wal_lsn(), r.replay_lsn)::bigint AS applied_lag, \
      pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn)::bigint AS durable_lag \
    FROM pg_replication_slots s LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid \
    WHERE s.slot_type = 'logical' AND s.database = current_database()";

/// After this the sentinel is written once more: a commit un-sticks a publisher that waits for its next keepalive (11).
const NUDGE: Duration = Duration::from_millis(250);
/// Most drains end within this; so long the target is asked without a break.
const EAGER: Duration = Duration::from_millis(20);
/// How often it is asked afterwards.
const EVERY: Duration = Duration::from_millis(1);

/// A position in the write-ahead log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

impl Lsn {
    /// How many bytes of the log lie between an earlier position and this one; 0 if it is no earlier one.
    pub fn bytes_after(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl FromStr for Lsn {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (high, low) = text.split_once('/').unwrap_or((text, ""));
        Ok(Lsn(u64::from(u32::from_str_radix(high, 16)?) << 32 | u64::from(u32::from_str_radix(low, 16)?)))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// A subscription of the target database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// Its name.
    pub name: String,
    /// Whether it is enabled.
    pub is_enabled: bool,
    /// Its slot on the source.
    pub slot: Option<String>,
    /// Its publications on the source.
    pub publications: Vec<String>,
}

/// What brings the source's changes to the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feed {
    /// These subscriptions of it.
    Subscriptions(Vec<Subscription>),
    /// The write-ahead log: it is a physical standby.
    Wal,
}

/// How far the copy of one table is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableState {
    /// The subscription.
    pub subscription: String,
    /// The table as `schema.name`.
    pub table: String,
    /// `r` ready; `i`, `d`, `f`, `s` on the way.
    pub state: String,
}

/// A table of a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedTable {
    /// The publication.
    pub publication: String,
    /// The table as `schema.name`.
    pub table: String,
    /// How much of it is published.
    pub extent: Extent,
    /// Whether the publication is FOR ALL TABLES.
    pub is_of_all: bool,
}

/// How much of a table a publication carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Every row, column and operation.
    Whole,
    /// A row filter or a column list cuts it.
    Filtered,
    /// INSERT, UPDATE, DELETE or TRUNCATE is left out.
    SomeOperations,
}

/// A slot of this database on the source and the connection that reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// Its name.
    pub name: String,
    /// Whether someone reads it.
    pub is_active: bool,
    /// 13+: reserved, extended, unreserved, lost.
    pub wal_status: Option<String>,
    /// How far the target has applied; none without pg_read_all_stats or a reader.
    pub replayed: Option<Lsn>,
    /// How far behind the target is.
    pub lag: Lag,
}

/// Bytes of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lag {
    /// Not applied yet; none without pg_read_all_stats or a reader.
    pub applied_bytes: Option<i64>,
    /// Not known to be on the target's disk.
    pub durable_bytes: Option<i64>,
}

/// A table that replication does not carry whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// The table as `schema.name`.
    pub table: String,
    /// What is missing.
    pub problem: String,
}

/// Everything committed on the source before is applied on the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaughtUp {
    /// The position of the source behind the sentinel.
    pub position: Lsn,
    /// What the target had replayed by then: of several subscriptions the one that is least far.
    pub replayed: Option<Lsn>,
    /// How long it took.
    pub waited: Duration,
    /// How often the sentinel had to be written again.
    pub nudges: u32,
}

/// Why catch-up was not reached.
#[derive(Debug, thiserror::Error)]
pub enum CatchUpError {
    /// The store is not seeded, or the login may not update it.
    #[error("the sentinel of {0} is missing: seed() comes first")]
    NoSentinel(Name),
    /// Not there in time.
    #[error("not applied on the target within {limit:?}: {}", .missing.join(", "))]
    Late {
        /// How long was waited.
        limit: Duration,
        /// The sentinel, or subscriptions or a standby whose applied position is short of it.
        missing: Vec<String>,
    },
    /// A server did not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

/// The tables that replication does not carry whole to the target, the store's own two included. Pure.
pub fn uncovered(tables: &[TableFacts], published: &[PublishedTable], states: &[TableState]) -> Vec<Coverage> {
    let parents: BTreeMap<String, &str> =
        tables.iter().filter_map(|t| Some((t.full_name(), t.parent.as_deref()?))).collect();
    let own = ["pgcutover.heartbeat".to_owned(), "pgcutover.sentinel".to_owned()];
    let logged = tables.iter().filter(|table| table.kind == TableKind::Logged).map(TableFacts::full_name);
    logged.chain(own).filter_map(|table| uncovered_one(table, &parents, published, states)).collect()
}

fn uncovered_one(
    table: String,
    parents: &BTreeMap<String, &str>,
    published: &[PublishedTable],
    states: &[TableState],
) -> Option<Coverage> {
    let line: Vec<&str> = std::iter::successors(Some(table.as_str()), |at| parents.get(*at).copied()).collect();
    let here: Vec<&PublishedTable> = published.iter().filter(|p| line.contains(&p.table.as_str())).collect();
    let state = states.iter().filter(|s| line.contains(&s.table.as_str()));
    let ready = state.clone().any(|s| s.state == "r");
    let problem = if here.is_empty() {
        "is in no publication that the target subscribes to".to_owned()
    } else if here.iter().any(|p| p.extent == Extent::Whole) {
        match (ready, state.map(|s| s.state.as_str()).next()) {
            (true, _) => return None,
            (false, Some(state)) => format!("its initial copy has not ended (state {state})"),
            (false, None) => "is published, but the subscription does not know it".to_owned(),
        }
    } else if here.iter().any(|p| p.extent == Extent::Filtered) {
        "only some of its rows or columns are published".to_owned()
    } else {
        "its publication leaves out INSERT, UPDATE, DELETE or TRUNCATE".to_owned()
    };
    Some(Coverage { table, problem })
}

impl Cluster {
    /// The target's subscriptions: those named, or all of the database if none is. A database that has moved there and back
    /// is fed by the way back that we made: then it is that one.
    pub async fn subscriptions(
        &self,
        db: &Name,
        named: &[String],
        limit: Duration,
    ) -> Result<Vec<Subscription>, ClusterError> {
        let all = self.all_subscriptions(limit).await?;
        let (ours, other): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|subscription| way_back::epoch_of(db, &subscription.name).is_some());
        if !ours.is_empty() {
            return Ok(ours);
        }
        Ok(other.into_iter().filter(|s| named.is_empty() || named.contains(&s.name)).collect())
    }

    /// Every subscription of the database.
    pub async fn all_subscriptions(&self, limit: Duration) -> Result<Vec<Subscription>, ClusterError> {
        self.list("subscriptions", SUBSCRIPTIONS, limit, subscription).await
    }

    /// How far the copies of the tables of these subscriptions are (target).
    pub async fn table_states(&self, of: &[Subscription], limit: Duration) -> Result<Vec<TableState>, ClusterError> {
        let all = self.list("subscribed tables", TABLE_STATES, limit, table_state).await?;
        Ok(all.into_iter().filter(|state| of.iter().any(|s| s.name == state.subscription)).collect())
    }

    /// The tables of the publications that these subscriptions use (source).
    pub async fn published(&self, of: &[Subscription], limit: Duration) -> Result<Vec<PublishedTable>, ClusterError> {
        let names: BTreeSet<&String> = of.iter().flat_map(|s| &s.publications).collect();
        let all = self.list("published tables", PUBLISHED, limit, published_table).await?;
        Ok(all.into_iter().filter(|table| names.contains(&table.publication)).collect())
    }

    /// The slots of these subscriptions that exist (source).
    pub async fn slots(&self, of: &[Subscription], limit: Duration) -> Result<Vec<SlotState>, ClusterError> {
        let all = self.list("slots", SLOTS, limit, slot).await?;
        Ok(all.into_iter().filter(|slot| of.iter().any(|s| s.slot.as_deref() == Some(&slot.name))).collect())
    }

    /// Writes the sentinel with a synchronous commit and reads the position behind it, once (source).
    pub async fn write_sentinel(&self, db: &Name, token: &str, limit: Duration) -> Result<Lsn, CatchUpError> {
        let update = format!(
            "SET LOCAL synchronous_commit = on; UPDATE pgcutover.sentinel SET token = {} WHERE db = {}",
            literal(token),
            literal(db.as_str())
        );
        // The flushed position, not the inserted one: that can lie behind a page header which no record has reached.
        let script = format!("{}; SELECT pg_current_wal_flush_lsn() AS lsn", store::transaction(&update));
        let answer = self.ask("write the sentinel", &script, limit).await?;
        if !answer.counts.contains(&1) {
            return Err(CatchUpError::NoSentinel(db.clone()));
        }
        let lsn = answer.rows.first().and_then(|row| row.get("lsn")).and_then(|text| text.parse().ok());
        lsn.ok_or_else(|| self.unreadable("write the sentinel", "no position came").into())
    }

    /// A position behind everything that is committed, which a subscription can reach: the end of a commit of ours, flushed (source).
    pub async fn position(&self, limit: Duration) -> Result<Lsn, ClusterError> {
        const WHAT: &str = "position";
        let message = "SET LOCAL synchronous_commit = on; SELECT pg_logical_emit_message(true, 'pgcutover', '')";
        let script = format!("{}; SELECT pg_current_wal_flush_lsn() AS lsn", store::transaction(message));
        let answer = self.ask(WHAT, &script, limit).await?;
        let lsn =
            answer.rows.last().and_then(|row| row.try_get("lsn").ok().flatten()).and_then(|text| text.parse().ok());
        lsn.ok_or_else(|| self.unreadable(WHAT, "no position came"))
    }

    /// The sentinel as it is here (target).
    pub async fn sentinel(&self, db: &Name, limit: Duration) -> Result<Option<String>, ClusterError> {
        let sql = format!("SELECT s.token FROM pgcutover.sentinel s WHERE s.db = {}", literal(db.as_str()));
        Ok(self.list("read the sentinel", &sql, limit, |row| row.text("token")).await?.pop())
    }

    /// One heartbeat (source).
    pub async fn beat(&self, db: &Name, n: i64, limit: Duration) -> Result<(), ClusterError> {
        let update = format!(
            "UPDATE pgcutover.heartbeat SET n = {n}, at = clock_timestamp() WHERE db = {}",
            literal(db.as_str())
        );
        self.ask("heartbeat", &store::transaction(&update), limit).await.map(drop)
    }

    /// The last heartbeat that arrived (target).
    pub async fn heard(&self, db: &Name, limit: Duration) -> Result<Option<i64>, ClusterError> {
        let sql = format!("SELECT h.n FROM pgcutover.heartbeat h WHERE h.db = {}", literal(db.as_str()));
        Ok(self.list("read the heartbeat", &sql, limit, |row| row.number("n")).await?.pop())
    }
}

impl Clusters {
    /// Sends the sentinel after everything committed so far and waits until it, and everything before it, has arrived.
    pub async fn catch_up(&self, db: &Name, token: &str, of: &Feed, limit: Duration) -> Result<CaughtUp, CatchUpError> {
        let deadline = Deadline::after(limit);
        let position = self.source.write_sentinel(db, token, deadline.left()).await?;
        let mut nudges = 0;
        loop {
            let (missing, replayed) = self.not_arrived(db, token, position, of).await?;
            if missing.is_empty() {
                return Ok(CaughtUp { position, replayed, waited: deadline.elapsed(), nudges });
            }
            if deadline.is_over() {
                return Err(CatchUpError::Late { limit, missing });
            }
            if deadline.elapsed() > NUDGE * (nudges + 1) {
                nudges += 1;
                // Its position is not taken: the goal never moves.
                // A nudge at the very end must not turn "late" into "no answer".
                self.source.write_sentinel(db, token, deadline.left().max(NUDGE)).await?;
            }
            if deadline.elapsed() > EAGER {
                // reason: the target tells nobody when it has applied; asked again within the deadline.
                tokio::time::sleep(EVERY).await;
            }
        }
    }

    /// What has not arrived yet, and how far the target is, as far as that was asked.
    async fn not_arrived(
        &self,
        db: &Name,
        token: &str,
        position: Lsn,
        of: &Feed,
    ) -> Result<(Vec<String>, Option<Lsn>), ClusterError> {
        // Each look is answered at once by a server that lives.
        const LOOK: Duration = Duration::from_millis(500);
        let replayed = match of {
            Feed::Subscriptions(_) => None,
            // First: before its WAL is replayed a standby may not have the table yet that the sentinel is in.
            Feed::Wal => match self.target.replayed(LOOK).await? {
                Some(at) if at >= position => Some(at),
                replayed @ (Some(_) | None) => return Ok((vec![format!("position {position}")], replayed)),
            },
        };
        if self.target.sentinel(db, LOOK).await?.as_deref() != Some(token) {
            return Ok((vec!["the sentinel".to_owned()], replayed));
        }
        let Feed::Subscriptions(of) = of else { return Ok((Vec::new(), replayed)) };
        let slots = self.source.slots(of, LOOK).await?;
        let arrived = |name: &str| slots.iter().any(|s| s.name == name && s.replayed.is_some_and(|at| at >= position));
        let late = of.iter().filter(|s| !s.slot.as_deref().is_some_and(arrived));
        let missing = late.map(|s| format!("subscription {}", s.name)).collect();
        Ok((missing, slots.iter().filter_map(|slot| slot.replayed).min()))
    }

    /// Sees to it that sentinel and heartbeat are published and subscribed. Refuses to refresh a subscription that lacks
    /// other tables: they would count as copied without being so.
    pub async fn publish_store(&self, of: &[Subscription], limit: Duration) -> Result<(), ClusterError> {
        let deadline = Deadline::after(limit);
        let own = ["pgcutover.heartbeat", "pgcutover.sentinel"];
        for subscription in of {
            let one = std::slice::from_ref(subscription);
            let published = self.source.published(one, deadline.left()).await?;
            let unpublished: Vec<&str> = own.into_iter().filter(|t| !published.iter().any(|p| p.table == *t)).collect();
            if let (false, Some(publication)) = (unpublished.is_empty(), subscription.publications.first()) {
                let sql = format!("ALTER PUBLICATION {} ADD TABLE {}", identifier(publication), unpublished.join(", "));
                self.source.ask("publish the sentinel", &sql, deadline.left()).await?;
            }
            self.refresh(subscription, &deadline).await?;
        }
        Ok(())
    }

    async fn refresh(&self, subscription: &Subscription, deadline: &Deadline) -> Result<(), ClusterError> {
        let one = std::slice::from_ref(subscription);
        let published = self.source.published(one, deadline.left()).await?;
        let known: BTreeSet<String> =
            self.target.table_states(one, deadline.left()).await?.into_iter().map(|state| state.table).collect();
        let unknown: BTreeSet<&str> =
            published.iter().map(|p| p.table.as_str()).filter(|table| !known.contains(*table)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let users: Vec<&str> = unknown.into_iter().filter(|table| !table.starts_with("pgcutover.")).collect();
        if !users.is_empty() {
            let problem = format!(
                "subscription {} does not know {}: refresh it with copy_data = true first",
                subscription.name,
                users.join(", ")
            );
            return Err(self.target.unreadable("subscribe to the sentinel", problem));
        }
        let sql = format!(
            "ALTER SUBSCRIPTION {} REFRESH PUBLICATION WITH (copy_data = false)",
            identifier(&subscription.name)
        );
        self.target.ask("subscribe to the sentinel", &sql, deadline.left()).await.map(drop)
    }
}

fn subscription(row: &Cells<'_>) -> Result<Subscription, BadCell> {
    let publications = row.text("publications")?;
    Ok(Subscription {
        name: row.text("subname")?,
        is_enabled: row.flag("subenabled")?,
        slot: row.maybe_text("subslotname"),
        publications: serde_json::from_str(&publications).map_err(|_| BadCell {
            column: "publications",
            value: Some(publications),
            wanted: "a list of names",
        })?,
    })
}

fn table_state(row: &Cells<'_>) -> Result<TableState, BadCell> {
    Ok(TableState {
        subscription: row.text("subname")?,
        table: format!("{}.{}", row.text("nspname")?, row.text("relname")?),
        state: row.text("srsubstate")?,
    })
}

fn published_table(row: &Cells<'_>) -> Result<PublishedTable, BadCell> {
    let extent = match (row.flag("every_operation")?, row.flag("partial")?) {
        (true, false) => Extent::Whole,
        (_, true) => Extent::Filtered,
        (false, false) => Extent::SomeOperations,
    };
    Ok(PublishedTable {
        publication: row.text("pubname")?,
        table: format!("{}.{}", row.text("schemaname")?, row.text("tablename")?),
        extent,
        is_of_all: row.flag("puballtables")?,
    })
}

fn slot(row: &Cells<'_>) -> Result<SlotState, BadCell> {
    Ok(SlotState {
        name: row.text("slot_name")?,
        is_active: row.flag("active")?,
        wal_status: row.maybe_text("wal_status"),
        replayed: row.maybe_number("replay_lsn")?,
        lag: Lag { applied_bytes: row.maybe_number("applied_lag")?, durable_bytes: row.maybe_number("durable_lag")? },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(table: &str, extent: Extent) -> PublishedTable {
        PublishedTable { publication: "p".to_owned(), table: table.to_owned(), extent, is_of_all: false }
    }

    fn state(table: &str, state: &str) -> TableState {
        TableState { subscription: "s".to_owned(), table: table.to_owned(), state: state.to_owned() }
    }

    fn ours() -> (Vec<PublishedTable>, Vec<TableState>) {
        let own = ["pgcutover.sentinel", "pgcutover.heartbeat"];
        (own.iter().map(|t| published(t, Extent::Whole)).collect(), own.iter().map(|t| state(t, "r")).collect())
    }

    #[test]
    fn positions_read_and_print_as_postgres_does() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        assert_eq!(lsn.to_string(), "16/B374D848");
        assert!(lsn < "17/0".parse().unwrap());
        assert!("16".parse::<Lsn>().is_err());
    }

    #[test]
    fn a_table_is_covered_by_itself_or_by_a_partitioned_parent() {
        let tables = [
            TableFacts::plain("a", TableKind::Logged, None),
            TableFacts::plain("p", TableKind::Parent, None),
            TableFacts::plain("p1", TableKind::Logged, Some("public.p")),
            TableFacts::plain("u", TableKind::Unlogged, None),
        ];
        let (mut pubs, mut states) = ours();
        pubs.extend([published("public.a", Extent::Whole), published("public.p", Extent::Whole)]);
        states.extend([state("public.a", "r"), state("public.p", "r")]);
        assert_eq!(uncovered(&tables, &pubs, &states), []);
        pubs.pop();
        assert_eq!(uncovered(&tables, &pubs, &states)[0].table, "public.p1");
    }

    #[test]
    fn filters_missing_operations_unfinished_copies_and_our_own_tables_are_named() {
        let tables = [TableFacts::plain("a", TableKind::Logged, None)];
        let (pubs, states) = ours();
        let with = |extent, st: &[TableState]| {
            let pubs = [pubs.clone(), vec![published("public.a", extent)]].concat();
            uncovered(&tables, &pubs, &[states.clone(), st.to_vec()].concat()).first().map(|c| c.problem.clone())
        };
        assert_eq!(with(Extent::Whole, &[state("public.a", "r")]), None);
        assert!(with(Extent::Filtered, &[state("public.a", "r")]).unwrap().contains("rows or columns"));
        assert!(with(Extent::SomeOperations, &[state("public.a", "r")]).unwrap().contains("TRUNCATE"));
        assert!(with(Extent::Whole, &[state("public.a", "d")]).unwrap().contains("state d"));
        assert!(with(Extent::Whole, &[]).unwrap().contains("does not know it"));
        assert_eq!(uncovered(&[], &[], &[]).len(), 2);
    }
}
