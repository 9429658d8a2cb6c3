//! A source with the store installed and its gate armed, as the least role does it.
//!
//! Invariant: everything of ours is made by `pgcutover`, which is no superuser; only what the superuser alone may make
//! (the event trigger) is made by it, where a test asks for it.

use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::client::Client;
use e2e::cluster::Cluster;
use e2e::pair::{APP, DATABASE, PGCUTOVER, PROXY, PairOptions, password, single};
use pgcutover_api::epoch::{Claim, Epoch, RunId};
use pgcutover_api::store::{self, Name, Outcome, Turn};
use proxyctl::clusters::{self, Role};
use proxyctl::config::{Endpoint, RootCertificate, TlsMode};

/// The majors that every rule is tried on.
pub(crate) const MAJORS: [u32; 3] = [13, 15, 17];
/// The isolation levels, as SQL and as settings spell them.
pub(crate) const LEVELS: [&str; 3] = ["read committed", "repeatable read", "serializable"];
/// A question to a server that lives.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// An armed source.
pub(crate) struct Armed {
    pub(crate) source: Cluster,
    /// As proxyctl is connected.
    pub(crate) control: clusters::Cluster,
    pub(crate) db: Name,
}

impl Armed {
    /// A single cluster of this major.
    pub(crate) async fn start(major: u32) -> Armed {
        let source = single(&Binaries::of(&[major]).unwrap(), &PairOptions::new(major, major)).await.unwrap();
        let armed = Armed { control: as_proxyctl(Role::Source, &source), source, db: Name::new(DATABASE).unwrap() };
        armed.control.install(LIMIT).await.unwrap();
        armed.control.grant(PROXY, LIMIT).await.unwrap();
        armed.control.seed(&armed.db, LIMIT).await.unwrap();
        armed.control.arm(&armed.db, LIMIT).await.unwrap();
        assert_eq!(armed.control.arm_tables(&armed.db, LIMIT).await.unwrap(), []);
        armed
    }

    pub(crate) async fn app(&self) -> Client {
        self.source.connect(APP, &password(APP), DATABASE).await.unwrap()
    }

    pub(crate) async fn proxy(&self) -> Client {
        self.source.connect(PROXY, &password(PROXY), DATABASE).await.unwrap()
    }

    pub(crate) async fn superuser(&self) -> Client {
        self.source.superuser(DATABASE).await.unwrap()
    }

    /// Opens the next epoch for a new run.
    pub(crate) async fn open(&self) -> Turn {
        let run = RunId::random();
        let epoch = self.control.open(&self.db, run, &Name::new("green").unwrap(), Epoch::ZERO).await.unwrap();
        Turn { db: self.db.clone(), claim: Claim { run, epoch } }
    }

    /// Opens an epoch and fences.
    pub(crate) async fn fence(&self) -> Turn {
        let turn = self.open().await;
        self.control.flip(&turn, LIMIT).await.unwrap();
        turn
    }

    pub(crate) async fn decide(&self, turn: &Turn, want: Outcome) -> Outcome {
        self.control.decide(turn, want, LIMIT).await.unwrap()
    }

    /// Lets the superuser make the event trigger.
    pub(crate) async fn fence_ddl(&self) {
        self.superuser().await.run(&store::event_trigger(&self.db)).await.unwrap();
    }
}

/// A cluster as proxyctl is connected to it.
pub(crate) fn as_proxyctl(role: Role, cluster: &Cluster) -> clusters::Cluster {
    clusters::Cluster::new(role, &endpoint(cluster, PGCUTOVER))
}

pub(crate) fn endpoint(cluster: &Cluster, login: &str) -> Endpoint {
    let pg = cluster.dsn(login, &password(login), DATABASE).parse().unwrap();
    Endpoint { pg, tls: TlsMode::Disable, root: RootCertificate::System }
}

/// The SQLSTATE of what `sql` is answered with; none if it goes through.
pub(crate) async fn sqlstate(client: &Client, sql: &str) -> Option<String> {
    let error = client.simple_query(sql).await.err()?;
    Some(error.code().unwrap_or_else(|| panic!("{sql}: {error}")).code().to_owned())
}

/// `sql` is refused by the fence; a transaction that it leaves open is rolled back.
#[track_caller]
pub(crate) fn is_fenced(what: &str, state: Option<String>) {
    assert_eq!(state.as_deref(), Some(store::SQLSTATE_FENCED), "{what}");
}
