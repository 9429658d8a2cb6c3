//! One database as clients know it: its gate, its route, its pools, and its word in the decision store.
//!
//! Invariant: the route moves only while the gate is shut and drained, to where a read decision (or an operator's
//! force) says; a claimed pause ends only by a decision that this proxy has read itself.

mod blockers;
mod draft;
mod link;
mod lookup;
mod names;
mod pause;
mod pauses;
mod refusal;
mod reload;
mod switch;
mod transplant;
mod verdict;
mod watch;
mod writes;

pub use blockers::Blocker;
pub use lookup::Question;
pub use pauses::Paused;
pub use refusal::{Refusal, Why};
pub use reload::Change;
pub use switch::{Switched, SwitchedBy};
pub use transplant::{Moved, Transplanted};
pub use watch::watch;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use pgcutover_api::epoch::Epoch;
use pgcutover_api::store::{Identity, Name};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{Address, Cleartext, Login, Password, Secret};
use crate::client::{Client, Clients};
use crate::config;
use crate::config::{Config, ProtocolVersion};
use crate::gate::{Gate, PauseId};
use crate::message::Protocol;
use crate::metrics::Events;
use crate::parameters::Reported;
use crate::pool::{Errands, Leaving, Pool, Sharing, Site, Tally};
use crate::resolver::Name as HostName;
use crate::resolver::Registry;
use crate::resolver::Resolver;
use crate::route;
use crate::route::{Active, Durable, Endpoint, Route};
use crate::statements::{Budget, Cache};
use crate::tls::{Connector, RootCert};

use draft::Drafts;
use link::Link;
use lookup::Lookups;
use transplant::Successors;

/// Switches that are remembered for SHOW SWITCHES.
const SWITCHES_KEPT: usize = 100;

/// What all databases of the process share.
#[derive(Clone)]
pub struct Process {
    /// The running configuration.
    pub config: Arc<ArcSwap<Config>>,
    /// Where tasks are spawned.
    pub tasks: TaskTracker,
    /// Cancelled when the process ends.
    pub closing: CancellationToken,
    /// The next id of a client or server.
    pub ids: Arc<AtomicU64>,
    /// What happened, for the exporter.
    pub events: Arc<Events>,
    /// Every client.
    pub clients: Arc<Clients>,
    /// Where answers for host names come from.
    pub resolver: Resolver,
    /// Server connections per user over all databases.
    pub user_connections: Arc<Mutex<UserConnections>>,
    /// Bytes of the texts of named statements, of all databases.
    pub statements: Budget,
    /// This instance's name in the decision stores.
    pub instance: Arc<str>,
    /// Where its console can be reached.
    pub address: Arc<Mutex<String>>,
}

/// Open connections by user.
pub type UserConnections = BTreeMap<Box<[u8]>, Arc<Tally>>;

/// A declared backend with its parsed address.
#[derive(Clone)]
struct Declared {
    settings: config::Backend,
    endpoint: Arc<Endpoint>,
}

/// One database.
pub struct Database {
    /// Gate, route, and what the pools share.
    pub site: Arc<Site>,
    process: Process,
    /// What the host names of its backends have in common.
    registry: Registry,
    name: Option<Name>,
    declared: ArcSwap<BTreeMap<String, Declared>>,
    pools: Mutex<BTreeMap<Box<[u8]>, Arc<Pool>>>,
    /// Cleared by DISABLE.
    admits: AtomicBool,
    switches: Mutex<VecDeque<Switched>>,
    pauses: Mutex<VecDeque<Paused>>,
    /// The last pause under which no transaction was open any more, and since when.
    drained: Mutex<Option<(PauseId, Instant)>>,
    links: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<Link>>>>,
    lookups: Lookups,
    /// What each backend said of itself, when its control login last read it.
    identities: Mutex<BTreeMap<String, Identity>>,
    /// The welcome of users that no server has welcomed yet.
    welcome: ArcSwap<Option<Arc<Reported>>>,
    /// Whether the last look into the store succeeded.
    store_answers: AtomicBool,
    /// One change of the route at a time.
    moving: tokio::sync::Mutex<()>,
    /// Copies of live sessions, until a switch gives them to their clients or the pause ends.
    successors: Mutex<Option<Successors>>,
    /// Copies made ahead of a pause.
    drafts: Mutex<Drafts>,
}

impl Database {
    /// A database that starts where its durable route points, or at the configured backend.
    ///
    /// # Errors
    /// The reason, for the configuration's error: a damaged route file, a route to a backend that is not declared, or
    /// TLS settings that can't be.
    pub fn start(name: &str, config: &Config, mut process: Process) -> Result<Arc<Self>, String> {
        // Ends with the process, or before it when the database is removed.
        process.closing = process.closing.child_token();
        let settings = config.databases.get(name).ok_or("is not declared")?;
        let gate: Arc<Gate> = Arc::default();
        let registry =
            Registry { resolver: process.resolver.clone(), gate: Arc::clone(&gate) as _, told: Arc::default() };
        let declared = declare(settings, &registry, &BTreeMap::new())?;
        let file = route::file(&config.general.state_dir, name);
        let durable = route::load(&file).map_err(|error| error.to_string())?;
        let Durable { backend, epoch } =
            durable.unwrap_or(Durable { backend: settings.active.clone(), epoch: Epoch::ZERO });
        let Some(active) = declared.get(&backend) else {
            return Err(format!(
                "traffic was switched to the backend '{backend}' (epoch {epoch}), which is not declared any more; declare it"
            ));
        };
        if backend != settings.active {
            tracing::warn!(database = name, configured = %settings.active, active = %backend, %epoch,
                "the configuration's `active` differs from the durable route, which wins");
        }
        let active =
            Active { backend: backend.as_str().into(), endpoint: Arc::clone(&active.endpoint), epoch, generation: 1 };
        let site = Arc::new(Site {
            database: name.into(),
            route: Route::new(active, file),
            gate,
            config: Arc::clone(&process.config),
            tasks: process.tasks.clone(),
            ids: Arc::clone(&process.ids),
            events: Arc::clone(&process.events),
            connections: Arc::default(),
            servers: Mutex::default(),
            errands: Errands::default(),
            leaving: Leaving::default(),
            statements: Cache::new(Arc::clone(&process.statements)),
            holds: ArcSwap::default(),
            begun: Mutex::default(),
        });
        Ok(Arc::new(Self {
            site,
            name: Name::new(name).ok(),
            process,
            registry,
            declared: ArcSwap::from_pointee(declared),
            pools: Mutex::default(),
            admits: AtomicBool::new(true),
            switches: Mutex::default(),
            pauses: Mutex::default(),
            drained: Mutex::default(),
            links: Mutex::default(),
            lookups: Lookups::default(),
            identities: Mutex::default(),
            welcome: ArcSwap::from_pointee(None),
            store_answers: AtomicBool::new(false),
            moving: tokio::sync::Mutex::default(),
            successors: Mutex::default(),
            drafts: Mutex::default(),
        }))
    }

    /// The route's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.site.database
    }

    /// The pool of a user, which logs in to servers with what the user's login taught us.
    pub fn pool(&self, user: &[u8], secret: Secret) -> Arc<Pool> {
        let login = Login { user: user.into(), secret, settings: Vec::new() };
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(user) {
            pool.learn(login);
            return Arc::clone(pool);
        }
        let pool = Pool::new(Arc::clone(&self.site), Sharing::Pooled, self.connections_of(user), login);
        pools.insert(user.into(), Arc::clone(&pool));
        pool
    }

    /// A pool for the one connection of one client, which logs in to the server with the client's own settings. It counts
    /// for the limits of the database and of the user, and goes with the client.
    #[must_use]
    pub fn pool_for_one(&self, login: Login) -> Arc<Pool> {
        let open = self.connections_of(&login.user);
        Pool::new(Arc::clone(&self.site), Sharing::OneToOne, open, login)
    }

    fn connections_of(&self, user: &[u8]) -> Arc<Tally> {
        Arc::clone(lock(&self.process.user_connections).entry(user.into()).or_default())
    }

    /// Every pool.
    #[must_use]
    pub fn pools(&self) -> Vec<Arc<Pool>> {
        lock(&self.pools).values().cloned().collect()
    }

    /// Clients of this database.
    #[must_use]
    pub fn clients(&self) -> Vec<Arc<Client>> {
        let mut all = self.process.clients.all();
        all.retain(|client| *client.who.database == *self.site.database);
        all
    }

    /// Whether new logins are admitted.
    #[must_use]
    pub fn admits(&self) -> bool {
        self.admits.load(Ordering::Acquire)
    }

    /// DISABLE and ENABLE.
    pub fn set_admits(&self, admits: bool) {
        self.admits.store(admits, Ordering::Release);
    }

    /// Whether the control login works.
    #[must_use]
    pub fn store_answers(&self) -> bool {
        self.store_answers.load(Ordering::Acquire)
    }

    /// What a backend said of itself.
    #[must_use]
    pub fn identity(&self, backend: &str) -> Option<Identity> {
        lock(&self.identities).get(backend).cloned()
    }

    /// What a user whom no server has welcomed yet is told at login; the differences follow with its first transaction.
    #[must_use]
    pub fn welcome(&self) -> Option<Arc<Reported>> {
        self.welcome.load().as_ref().clone()
    }

    /// Ends the watch: the database is gone.
    pub fn close(&self) {
        self.process.closing.cancel();
    }

    fn endpoint(&self, backend: &str) -> Option<Arc<Endpoint>> {
        self.declared.load().get(backend).map(|declared| Arc::clone(&declared.endpoint))
    }

    /// The declared backends and their settings.
    #[must_use]
    pub fn backends(&self) -> Vec<(String, config::Backend)> {
        self.declared.load().iter().map(|(name, declared)| (name.clone(), declared.settings.clone())).collect()
    }
}

/// The declared backends. Whoever has the place of one `before` shares its answer.
fn declare(
    settings: &config::Database,
    registry: &Registry,
    before: &BTreeMap<String, Declared>,
) -> Result<BTreeMap<String, Declared>, String> {
    settings
        .backends
        .iter()
        .map(|(name, backend)| {
            let present = before.get(name).and_then(|declared| declared.endpoint.address.name.clone());
            let present = present.filter(|present| present.place() == (&*backend.host, backend.port));
            let host = present.or_else(|| HostName::new(&backend.host, backend.port, registry));
            let address = address(backend, host).map_err(|reason| format!("backends.{name}: {reason}"))?;
            let forced = backend.user.as_ref().map(|user| Login {
                user: user.as_bytes().into(),
                secret: password(backend.password.as_deref()),
                settings: Vec::new(),
            });
            let endpoint = Arc::new(Endpoint { address: Arc::new(address), forced });
            Ok((name.clone(), Declared { settings: backend.clone(), endpoint }))
        })
        .collect()
}

fn address(backend: &config::Backend, name: Option<Arc<HostName>>) -> Result<Address, String> {
    let root = backend.sslrootcert.as_deref().map(|root| match root {
        "system" => RootCert::System,
        file => RootCert::File(file.into()),
    });
    Ok(Address {
        host: backend.host.as_str().into(),
        port: backend.port,
        name,
        dbname: backend.dbname.as_bytes().into(),
        tls: Connector::new(backend.sslmode, root.as_ref()).map_err(|error| error.to_string())?,
        protocol: match backend.max_protocol_version {
            ProtocolVersion::V3_0 => Protocol::V3_0,
            ProtocolVersion::V3_2 => Protocol::V3_2,
        },
        cleartext: Cleartext::Protected,
    })
}

fn password(text: Option<&str>) -> Secret {
    text.map_or(Secret::None, |text| Secret::Password(Password::new(text.as_bytes())))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
