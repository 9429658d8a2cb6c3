//! Reverse replication as one server sees it: what the one that serves offers, what the one that served before subscribes.
//!
//! Invariant: everything made here has a name that begins with `pgcutover_back_` and tells the route; nothing else is dropped
//! without being named by the caller.

use std::collections::BTreeSet;
use std::time::Duration;

use pgcutover_api::epoch::Epoch;
use pgcutover_api::store::{Name, identifier, literal};

use crate::clusters::tables::{TableFacts, TableKind};
use crate::clusters::{BadCell, Cells, Cluster, ClusterError, Deadline, Lsn};

/// From this on partitioned tables can be published, with the partitions that they will have.
const PARENTS_PUBLISHED: u32 = 13;
/// From this on a subscription can leave out what came from elsewhere.
const ORIGINS: u32 = 16;

/// What publications of ours hold; one row without a table for one that holds none.
const PUBLICATION: &str = "SELECT n.nspname, c.relname FROM pg_publication p LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid \
    LEFT JOIN pg_class c ON c.oid = r.prrelid LEFT JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = ";

const OFFERS: &str = "SELECT s.slot_name, s.active, to_jsonb(s) ->> 'wal_status' AS wal_status, \
      pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint AS kept_bytes \
    FROM pg_replication_slots s WHERE s.slot_type = 'logical' AND s.database = current_database() ORDER BY s.slot_name";

/// Whether the functions that a superuser has left for us are there and needed.
const HELPED: &str = "SELECT NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.rolname = session_user) \
      AND EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
        WHERE n.nspname = 'pgcutover_subscriber' AND p.proname = 'subscribe' \
          AND has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE')) AS helped";

fn stem(db: &Name) -> String {
    let letters = db.as_str().chars();
    let plain: String =
        letters.map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).take(30).collect();
    format!("pgcutover_back_{plain}")
}

/// The publication of a route on whichever server may come to serve.
pub fn publication(db: &Name) -> String {
    stem(db)
}

/// The way back of one epoch: the slot on the server that won it, and the subscription on the one that lost it.
pub fn of_epoch(db: &Name, epoch: Epoch) -> String {
    format!("{}_{epoch}", stem(db))
}

/// The epoch in such a name; none if it is not one of this route's.
pub fn epoch_of(db: &Name, name: &str) -> Option<Epoch> {
    name.strip_prefix(&stem(db))?.strip_prefix('_')?.parse().ok()
}

/// A slot for a way back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Its name.
    pub slot: String,
    /// The epoch that it belongs to.
    pub epoch: Epoch,
    /// Whether someone reads it.
    pub is_active: bool,
    /// 13+: reserved, extended, unreserved, lost.
    pub wal_status: Option<String>,
    /// WAL that it keeps, bytes.
    pub kept_bytes: Option<i64>,
}

impl Cluster {
    /// Sees to it that the route's publication holds these tables and ours, and no others.
    pub async fn offer(&self, db: &Name, tables: &[TableFacts], limit: Duration) -> Result<(), ClusterError> {
        let deadline = Deadline::after(limit);
        let major = self.identity(deadline.left()).await?.version_num / 10_000;
        let wanted = published(tables, major);
        let publication = publication(db);
        let sql = format!("{PUBLICATION}{}", literal(&publication));
        let there = self.list("publication of the way back", &sql, deadline.left(), member).await?;
        let held: BTreeSet<String> = there.iter().flatten().cloned().collect();
        let verb = match (there.is_empty(), held == wanted) {
            (true, _) => "CREATE PUBLICATION",
            (false, true) => return Ok(()),
            (false, false) => "ALTER PUBLICATION",
        };
        let set = if there.is_empty() { "FOR" } else { "SET" };
        let list: Vec<String> = wanted.into_iter().collect();
        let sql = format!("{verb} {} {set} TABLE {}", identifier(&publication), list.join(", "));
        self.ask("publish the way back", &sql, deadline.left()).await.map(drop)
    }

    /// The slots of ours for this route.
    pub async fn offers(&self, db: &Name, limit: Duration) -> Result<Vec<Offer>, ClusterError> {
        let all = self.list("slots of the way back", OFFERS, limit, offer).await?;
        Ok(all.into_iter().filter_map(|offer| Some(Offer { epoch: epoch_of(db, &offer.slot)?, ..offer })).collect())
    }

    /// Makes the slot from which the old source can follow (target, S6), anew if it is there. Waits for running
    /// transactions, so: a limit.
    pub async fn create_slot(&self, slot: &str, limit: Duration) -> Result<Lsn, ClusterError> {
        self.drop_slot(slot, limit).await?;
        let sql = format!("SELECT s.lsn FROM pg_create_logical_replication_slot({}, 'pgoutput') s", literal(slot));
        self.one("create a slot", &sql, limit, |row| row.number("lsn")).await
    }

    /// Drops that slot if it is there; 55006 while somebody reads it.
    pub async fn drop_slot(&self, slot: &str, limit: Duration) -> Result<(), ClusterError> {
        let sql = format!(
            "SELECT pg_drop_replication_slot(s.slot_name) FROM pg_replication_slots s WHERE s.slot_name = {}",
            literal(slot)
        );
        self.ask("drop a slot", &sql, limit).await.map(drop)
    }

    /// Follows that slot of the server at `conninfo` from where it stands: nothing is copied.
    pub async fn subscribe(&self, db: &Name, slot: &str, conninfo: &str, limit: Duration) -> Result<(), ClusterError> {
        let sql = self.subscription(db, conninfo, Some(slot), limit).await?;
        self.ask("subscribe to the way back", &sql, limit).await.map(drop)
    }

    /// Tries that, the login on the other server included, and takes it back.
    pub async fn try_subscribe(&self, db: &Name, conninfo: &str, limit: Duration) -> Result<(), ClusterError> {
        let sql = self.subscription(db, conninfo, None, limit).await?;
        self.ask("try to subscribe", &format!("BEGIN; {sql}; ROLLBACK"), limit).await.map(drop)
    }

    /// The statement that subscribes, under the name of its slot; without a slot for a try.
    async fn subscription(
        &self,
        db: &Name,
        conninfo: &str,
        slot: Option<&str>,
        limit: Duration,
    ) -> Result<String, ClusterError> {
        let publication = publication(db);
        let name = slot.map_or_else(|| format!("{}_probe", stem(db)), str::to_owned);
        if self.is_helped(limit).await? {
            let [name, conninfo, publication] = [&name, conninfo, &publication].map(literal);
            let slot = slot.map_or("NULL".to_owned(), literal);
            return Ok(format!("SELECT pgcutover_subscriber.subscribe({name}, {conninfo}, {publication}, {slot})"));
        }
        let major = self.identity(limit).await?.version_num / 10_000;
        let origin = if major >= ORIGINS { ", origin = none" } else { "" };
        Ok(format!(
            "CREATE SUBSCRIPTION {} CONNECTION {} PUBLICATION {} WITH (create_slot = false, copy_data = false, enabled = {}, \
             slot_name = {}{origin})",
            identifier(&name),
            literal(conninfo),
            identifier(&publication),
            slot.is_some(),
            slot.map_or("NONE".to_owned(), literal)
        ))
    }

    /// Lets a subscription rest.
    pub async fn disable(&self, subscription: &str, limit: Duration) -> Result<(), ClusterError> {
        let sql = self.disabling(subscription, limit).await?;
        self.ask("disable a subscription", &sql, limit).await.map(drop)
    }

    /// Tries that, and takes it back.
    pub async fn try_disable(&self, subscription: &str, limit: Duration) -> Result<(), ClusterError> {
        let sql = self.disabling(subscription, limit).await?;
        self.ask("try to disable", &format!("BEGIN; {sql}; ROLLBACK"), limit).await.map(drop)
    }

    async fn disabling(&self, subscription: &str, limit: Duration) -> Result<String, ClusterError> {
        if self.is_helped(limit).await? {
            return Ok(format!("SELECT pgcutover_subscriber.disable({})", literal(subscription)));
        }
        Ok(format!("ALTER SUBSCRIPTION {} DISABLE", identifier(subscription)))
    }

    /// Drops a subscription that rests, and leaves its slot on the other server alone.
    pub async fn unsubscribe(&self, subscription: &str, limit: Duration) -> Result<(), ClusterError> {
        if self.is_helped(limit).await? {
            let sql = format!("SELECT pgcutover_subscriber.unsubscribe({})", literal(subscription));
            return self.ask("drop a subscription", &sql, limit).await.map(drop);
        }
        let name = identifier(subscription);
        self.ask("forget a slot", &format!("ALTER SUBSCRIPTION {name} SET (slot_name = NONE)"), limit).await?;
        self.ask("drop a subscription", &format!("DROP SUBSCRIPTION {name}"), limit).await.map(drop)
    }

    /// Takes the route's publication away; its name, if it was there.
    pub async fn withdraw(&self, db: &Name, limit: Duration) -> Result<Option<String>, ClusterError> {
        let name = publication(db);
        let sql = format!("{PUBLICATION}{}", literal(&name));
        if self.list("publication of the way back", &sql, limit, member).await?.is_empty() {
            return Ok(None);
        }
        let sql = format!("DROP PUBLICATION IF EXISTS {}", identifier(&name));
        self.ask("drop a publication", &sql, limit).await.map(|_| Some(name))
    }

    async fn is_helped(&self, limit: Duration) -> Result<bool, ClusterError> {
        self.one("the rights to subscribe", HELPED, limit, |row| row.flag("helped")).await
    }
}

/// The tables to publish, quoted: parents with the partitions they have and will have, where that can be done.
fn published(tables: &[TableFacts], major: u32) -> BTreeSet<String> {
    let parents = major >= PARENTS_PUBLISHED;
    let taken = tables.iter().filter(|table| match table.kind {
        TableKind::Logged => !parents || table.parent.is_none(),
        TableKind::Parent => parents && table.parent.is_none(),
        TableKind::Unlogged => false,
    });
    let own = ["heartbeat", "sentinel"].map(|name| quoted("pgcutover", name));
    taken.map(|table| quoted(&table.schema, &table.name)).chain(own).collect()
}

fn quoted(schema: &str, name: &str) -> String {
    format!("{}.{}", identifier(schema), identifier(name))
}

fn member(row: &Cells<'_>) -> Result<Option<String>, BadCell> {
    Ok(match (row.maybe("nspname"), row.maybe("relname")) {
        (Some(schema), Some(name)) => Some(quoted(schema, name)),
        (_, _) => None,
    })
}

fn offer(row: &Cells<'_>) -> Result<Offer, BadCell> {
    Ok(Offer {
        slot: row.text("slot_name")?,
        epoch: Epoch::ZERO,
        is_active: row.flag("active")?,
        wal_status: row.maybe_text("wal_status"),
        kept_bytes: row.maybe_number("kept_bytes")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_route_and_epoch_and_belongs_to_no_other_route() {
        let (app, other) = (Name::new("App-1").unwrap(), Name::new("app").unwrap());
        let epoch = Epoch::try_from(7u64).unwrap();
        let name = of_epoch(&app, epoch);
        assert_eq!(name, "pgcutover_back_app_1_7");
        assert_eq!((epoch_of(&app, &name), epoch_of(&other, &name)), (Some(epoch), None));
        assert_eq!(epoch_of(&app, &publication(&app)), None);
        assert_eq!(epoch_of(&app, "pgcutover_back_app_1_probe"), None);
    }

    #[test]
    fn partitions_go_with_their_parents_where_parents_can_be_published() {
        let tables = [
            TableFacts::plain("plain", TableKind::Logged, None),
            TableFacts::plain("cache", TableKind::Unlogged, None),
            TableFacts::plain("parent", TableKind::Parent, None),
            TableFacts::plain("leaf", TableKind::Logged, Some("public.parent")),
        ];
        let of = |major| {
            let names = published(&tables, major);
            assert!(names.contains("\"pgcutover\".\"heartbeat\"") && names.contains("\"pgcutover\".\"sentinel\""));
            names.into_iter().filter(|name| name.starts_with("\"public\"")).collect::<Vec<_>>()
        };
        assert_eq!(of(13), ["\"public\".\"parent\"", "\"public\".\"plain\""]);
        assert_eq!(of(12), ["\"public\".\"leaf\"", "\"public\".\"plain\""]);
    }
}
