//! Two clusters, the target following the source: of different majors by native logical replication, or as its physical standby.
//!
//! Database, roles and rights are those that the README tells an operator to make: `pgcutover` is no superuser.
//!
//! Invariant: a [`Pair`] that was started is in step: every table's initial copy is done, or the standby streams.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::binaries::Binaries;
use crate::client::Client;
use crate::cluster::{Cluster, ClusterOptions};

/// The database that moves, under the same name on both clusters and on the proxies.
pub const DATABASE: &str = "app";
/// The application's login.
pub const APP: &str = "app";
/// A second application login, for what happens between users.
pub const OTHER: &str = "other";
/// proxyctl's login: replication, membership in the owner of the tables, pg_monitor.
pub const PGCUTOVER: &str = "pgcutover";
/// The proxies' control login: nothing but CONNECT until proxyctl grants it the decision store.
pub const PROXY: &str = "pgcutover_proxy";
/// All logins of a pair.
pub const LOGINS: [&str; 4] = [APP, OTHER, PGCUTOVER, PROXY];
/// As whom the target reads the source where nobody thought of a cutover.
pub const REPLICATOR: &str = "replicator";
/// The backend name of the source on the proxies.
pub const SOURCE: &str = "blue";
/// The backend name of the target on the proxies.
pub const TARGET: &str = "green";
/// The subscription on the target, and its slot on the source.
pub const SUBSCRIPTION: &str = "app_sub";
/// The publication on the source.
pub const PUBLICATION: &str = "app_pub";

/// The first copy of an almost empty database takes under 2 s; a loaded machine gets time.
const COPY_LIMIT: Duration = Duration::from_secs(90);

/// The password of a login of the pair.
pub fn password(login: &str) -> String {
    format!("{login}-secret")
}

/// How the source's publication names its tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publication {
    /// `FOR TABLE a, b, …`, owned by `pgcutover`.
    Tables,
    /// `FOR ALL TABLES`, owned by the superuser as PostgreSQL demands.
    AllTables,
}

/// Which of a cutover's rights are there at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// All that `proxyctl objects sql` grants.
    Granted,
    /// None: no login of ours, and replication is a superuser's, which logs in as [`REPLICATOR`].
    ToGrant,
}

/// What a test may want to have different.
#[derive(Clone, Debug)]
pub struct PairOptions {
    /// The source.
    pub source: ClusterOptions,
    /// The target.
    pub target: ClusterOptions,
    /// How tables are published.
    pub publication: Publication,
    /// Rows in `accounts`.
    pub accounts: u32,
    /// Whether a cutover was thought of already.
    pub rights: Rights,
}

impl PairOptions {
    /// A pair of these majors as tests want it.
    pub fn new(from: u32, to: u32) -> PairOptions {
        let (source, target) = (ClusterOptions::new(from), ClusterOptions::new(to));
        let (publication, rights) = (Publication::Tables, Rights::Granted);
        PairOptions { source, target, publication, accounts: 1000, rights }
    }
}

/// A cluster like the pair's source, with nobody that follows it.
///
/// # Errors
/// As [`Pair::start`].
pub async fn single(binaries: &Binaries, options: &PairOptions) -> Result<Cluster> {
    let cluster = Cluster::start(binaries, &options.source).await?;
    let client = cluster.superuser("postgres").await?;
    make_source_logins(&client, options.rights).await?;
    grant_roles(&client, cluster.major(), options.rights).await?;
    make_database(&cluster, options.rights).await?;
    fill(&cluster, options.accounts).await?;
    Ok(cluster)
}

/// Source and target in step.
#[derive(Debug)]
pub struct Pair {
    /// The cluster that serves at first.
    pub source: Cluster,
    /// The cluster that follows.
    pub target: Cluster,
    verifiers: BTreeMap<String, String>,
    follows: Follows,
}

/// How the target follows the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Follows {
    Logically,
    Physically,
}

/// The standby's slot on the source.
pub const STANDBY_SLOT: &str = "standby";

impl Pair {
    /// Starts both clusters, makes roles, database and tables, and waits for the initial copy.
    ///
    /// # Errors
    /// A version is missing, a server does not start, or replication does not get in step: the message says which.
    pub async fn start(binaries: &Binaries, options: &PairOptions) -> Result<Pair> {
        let (source, target) =
            tokio::try_join!(Cluster::start(binaries, &options.source), Cluster::start(binaries, &options.target))?;
        let rights = options.rights;
        let verifiers = make_logins(&source, &target, rights).await?;
        let pair = Pair { source, target, verifiers, follows: Follows::Logically };
        tokio::try_join!(make_database(&pair.source, rights), make_database(&pair.target, rights))?;
        fill(&pair.source, options.accounts).await?;
        pair.publish(options.publication, rights).await?;
        pair.subscribe(rights).await?;
        Ok(pair)
    }

    /// Starts a cluster of this major with the pair's tables, and a standby of it that streams through a slot.
    ///
    /// # Errors
    /// As [`Pair::start`].
    pub async fn physical(binaries: &Binaries, major: u32) -> Result<Pair> {
        let options = PairOptions::new(major, major);
        let mut source = single(binaries, &options).await?;
        let superuser = source.superuser(DATABASE).await?;
        superuser.run("GRANT EXECUTE ON FUNCTION pg_promote(boolean, integer) TO pgcutover").await?;
        superuser.run(&format!("SELECT pg_create_physical_replication_slot('{STANDBY_SLOT}', true)")).await?;
        let verifiers = "SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL";
        let rows = superuser.rows(verifiers).await?;
        let verifiers = rows.iter().map(|row| {
            let cell = |at| row.get(at).map(str::to_owned).context("a login without name or verifier");
            Ok((cell(0)?, cell(1)?))
        });
        let verifiers = verifiers.collect::<Result<_>>()?;
        drop(superuser);
        let target = source.standby(&options.target, &password(PGCUTOVER)).await?;
        let pair = Pair { source, target, verifiers, follows: Follows::Physically };
        pair.in_step().await?;
        Ok(pair)
    }

    /// The SCRAM verifier of each login, the same text on both clusters; what a proxy's user file holds.
    pub fn verifiers(&self) -> &BTreeMap<String, String> {
        &self.verifiers
    }

    async fn publish(&self, publication: Publication, rights: Rights) -> Result<()> {
        let source = self.source.superuser(DATABASE).await?;
        let some = format!("CREATE PUBLICATION {PUBLICATION} FOR TABLE branches, accounts, ledger, history");
        match (publication, rights) {
            (Publication::AllTables, _) => {
                source.run(&format!("CREATE PUBLICATION {PUBLICATION} FOR ALL TABLES")).await
            }
            (Publication::Tables, Rights::Granted) => {
                source.run(&format!("SET ROLE {PGCUTOVER}; {some}; RESET ROLE")).await
            }
            (Publication::Tables, Rights::ToGrant) => source.run(&some).await,
        }
    }

    async fn subscribe(&self, rights: Rights) -> Result<()> {
        let target = self.target.superuser(DATABASE).await?;
        let login = if rights == Rights::Granted { PGCUTOVER } else { REPLICATOR };
        let dsn = self.source.dsn(login, &password(login), DATABASE);
        target.run(&format!("CREATE SUBSCRIPTION {SUBSCRIPTION} CONNECTION '{dsn}' PUBLICATION {PUBLICATION}")).await?;
        if rights == Rights::Granted && self.target.major() >= 16 {
            // Before 16 only a superuser may own a subscription.
            target.run(&format!("ALTER SUBSCRIPTION {SUBSCRIPTION} OWNER TO {PGCUTOVER}")).await?;
        }
        target
            .until("SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel", COPY_LIMIT)
            .await
            .with_context(|| format!("the initial copy; the target's log is {}", self.target.log().display()))
    }

    /// Waits until the target has applied everything that the source has committed up to now.
    ///
    /// # Errors
    /// It does not within a minute.
    pub async fn in_step(&self) -> Result<()> {
        let source = self.source.superuser(DATABASE).await?;
        // A commit of our own: it flushes what asynchronous commits left in memory, and its end is a position that
        // the target can confirm.
        source.run("SELECT pg_logical_emit_message(true, 'harness', '')").await?;
        let position = source.text("SELECT pg_current_wal_flush_lsn()").await?.context("no WAL position")?;
        match self.follows {
            Follows::Logically => {
                let reached = format!(
                    "SELECT coalesce(bool_and(confirmed_flush_lsn >= '{position}'), false)
                       FROM pg_replication_slots WHERE slot_name = '{SUBSCRIPTION}'"
                );
                source.until(&reached, COPY_LIMIT).await
            }
            Follows::Physically => {
                let reached = format!("SELECT pg_last_wal_replay_lsn() >= '{position}'");
                self.target.superuser(DATABASE).await?.until(&reached, COPY_LIMIT).await
            }
        }
    }
}

/// Makes the logins on the source and copies their verifiers, so that a client's proof is good on both.
async fn make_logins(source: &Cluster, target: &Cluster, rights: Rights) -> Result<BTreeMap<String, String>> {
    let (on_source, on_target) = tokio::try_join!(source.superuser("postgres"), target.superuser("postgres"))?;
    make_source_logins(&on_source, rights).await?;
    let mut verifiers = BTreeMap::new();
    for row in on_source.rows("SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL").await? {
        let (login, verifier) = (row.get(0).context("a role without name")?, row.get(1).context("no verifier")?);
        on_target.run(&format!("CREATE ROLE {login} LOGIN PASSWORD '{verifier}'")).await?;
        verifiers.insert(login.to_owned(), verifier.to_owned());
    }
    let (on_source, on_target) = (&on_source, &on_target);
    tokio::try_join!(grant_roles(on_source, source.major(), rights), grant_roles(on_target, target.major(), rights))?;
    Ok(verifiers)
}

async fn make_source_logins(client: &Client, rights: Rights) -> Result<()> {
    let logins = match rights {
        Rights::Granted => LOGINS.as_slice(),
        Rights::ToGrant => &[APP, OTHER, REPLICATOR],
    };
    for login in logins {
        client.run(&format!("CREATE ROLE {login} LOGIN PASSWORD '{}'", password(login))).await?;
    }
    Ok(())
}

async fn fill(cluster: &Cluster, accounts: u32) -> Result<()> {
    let client = cluster.superuser(DATABASE).await?;
    client
        .run(&format!(
            "INSERT INTO branches (bid) SELECT generate_series(1, 10);
             INSERT INTO accounts (bid) SELECT n % 10 + 1 FROM generate_series(1, {accounts}) n"
        ))
        .await
}

/// The rights of proxyctl's login, the same on both sides: a rollback runs the other way.
async fn grant_roles(client: &Client, major: u32, rights: Rights) -> Result<()> {
    client.run("CREATE ROLE app_owner NOLOGIN").await?;
    client.run(&format!("CREATE DATABASE {DATABASE} OWNER app_owner")).await?;
    if rights == Rights::ToGrant {
        // It reads the tables for their first copy.
        return client.run(&format!("ALTER ROLE {REPLICATOR} REPLICATION; GRANT app_owner TO {REPLICATOR}")).await;
    }
    client.run(&format!("ALTER ROLE {PGCUTOVER} REPLICATION")).await?;
    client.run(&format!("GRANT app_owner, pg_monitor TO {PGCUTOVER}")).await?;
    client.run(&format!("GRANT CREATE ON DATABASE {DATABASE} TO {PGCUTOVER}")).await?;
    if major >= 16 {
        client.run(&format!("GRANT pg_create_subscription TO {PGCUTOVER}")).await?;
    }
    Ok(())
}

/// The tables of pgbench with what makes a cutover hard: serial and identity columns, a sequence that no column owns,
/// a partitioned table; and the ledger, whose rows say which server took them (`port`).
const SCHEMA: &str = "
SET ROLE app_owner;
CREATE SEQUENCE ticket;
CREATE TABLE branches (bid int PRIMARY KEY, bbalance bigint NOT NULL DEFAULT 0);
CREATE TABLE accounts (
    aid bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    bid int NOT NULL,
    abalance bigint NOT NULL DEFAULT 0,
    filler text NOT NULL DEFAULT repeat('x', 80)
);
CREATE TABLE ledger (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ticket bigint NOT NULL DEFAULT nextval('ticket') UNIQUE,
    client int NOT NULL,
    n bigint NOT NULL,
    aid bigint NOT NULL,
    delta bigint NOT NULL,
    port int DEFAULT inet_server_port(),
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ON ledger (client, n);
CREATE TABLE history (
    hid bigserial,
    client int NOT NULL,
    n bigint NOT NULL,
    aid bigint NOT NULL,
    delta bigint NOT NULL,
    PRIMARY KEY (client, hid)
) PARTITION BY HASH (client);
CREATE TABLE history_0 PARTITION OF history FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE history_1 PARTITION OF history FOR VALUES WITH (MODULUS 2, REMAINDER 1);
GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA public TO app, other;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO app, other;
RESET ROLE;
";

async fn make_database(cluster: &Cluster, rights: Rights) -> Result<()> {
    let superuser = cluster.superuser(DATABASE).await?;
    superuser.run(SCHEMA).await?;
    if rights == Rights::ToGrant {
        return Ok(());
    }
    superuser.run(&format!("GRANT SELECT (rolname, rolpassword) ON pg_catalog.pg_authid TO {PGCUTOVER}")).await?;
    if cluster.major() < 16 {
        // Only a superuser subscribes there: it leaves its functions, as the README tells it to.
        superuser.run(pgcutover_api::store::SUBSCRIBER).await?;
    }
    Ok(())
}
