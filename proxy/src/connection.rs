//! One connection's life: handshake, then a cancel, a visit to the console, or a login and its session.
//!
//! Invariant: no stranger costs more than one bounded packet and the login timeout; what a client is told is a chosen
//! [`Report`]; whoever gets in has a place that is given back when it leaves, however that happens.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::auth;
use crate::auth::{Identity, Lookup, Terms, Users};
use crate::backend::Login;
use crate::cancel::{Cancels, Issued, Owner};
use crate::client::{Client, Enrolled, Who};
use crate::config::PoolMode;
use crate::database::{Database, Process};
use crate::gate::Wants;
use crate::handshake;
use crate::handshake::Hello;
use crate::message;
use crate::message::{Pair, Protocol, Replication, Startup};
use crate::metrics::Book;
use crate::parameters;
use crate::parameters::{Reported, Settings};
use crate::pool::{Kept, Lease, NoServer, Pool};
use crate::report::{Blame, Report, SqlState};
use crate::session::{Farewell, Session};
use crate::stream::{Peer, Stream};
use crate::tls::Acceptor;

/// The names of the admin console.
const CONSOLES: [&[u8]; 2] = [b"pgbouncer", b"pgcutover"];

/// What a new connection finds.
pub struct Door {
    /// What all databases share.
    pub process: Process,
    /// The databases by the name that clients use.
    pub databases: ArcSwap<BTreeMap<String, Arc<Database>>>,
    /// Who may log in.
    pub users: ArcSwap<Users>,
    /// TLS towards clients.
    pub acceptor: ArcSwap<Acceptor>,
    /// Cancel keys.
    pub cancels: Arc<Cancels>,
    /// Statistics.
    pub book: Book,
    /// Connections that have passed the handshake, logged in or not.
    pub inside: Arc<AtomicU32>,
    /// Of these, not logged in yet.
    pub logging_in: Arc<AtomicU32>,
    /// One change of the configuration at a time: RELOAD and SET.
    pub changing: tokio::sync::Mutex<()>,
}

/// An authenticated visitor of the console.
pub struct Visitor {
    /// Its socket; AuthenticationOk is written.
    pub stream: Stream,
    /// The user as text.
    pub user: String,
    /// What it may do.
    pub rights: Rights,
    /// Its cancel key.
    pub key: Issued,
    /// Rung by its cancel requests.
    pub cancels: Arc<Notify>,
    /// Its place.
    pub place: Place,
}

/// What a visitor of the console may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// Everything.
    Admin,
    /// SHOW.
    Stats,
}

/// A place among those who are inside; dropping it frees the place.
pub struct Place(Arc<AtomicU32>);

impl Place {
    fn take(count: &Arc<AtomicU32>, limit: u32) -> Option<Self> {
        let fits = |now: u32| (now < limit).then_some(now + 1);
        count.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).ok()?;
        Some(Self(Arc::clone(count)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Serves one connection to its end; a visitor of the console comes back to the caller.
pub async fn serve(stream: Stream, door: Arc<Door>, worker: usize) -> Option<Visitor> {
    // Boxed, and gone before the session begins: an idle client's future must not carry the handshake's.
    match Box::pin(admit(stream, &door, worker)).await? {
        Admitted::Visitor(visitor) => Some(*visitor),
        Admitted::Client(admitted) => {
            session(admitted, &door, worker).await;
            None
        }
    }
}

/// Who has passed the door.
enum Admitted {
    Visitor(Box<Visitor>),
    Client(Box<(Stream, Entry)>),
}

/// Handshake and login; `None` if that was all.
async fn admit(stream: Stream, door: &Arc<Door>, worker: usize) -> Option<Admitted> {
    let deadline = Instant::now() + door.process.config.load().general.client_login_timeout;
    // One for the whole login: what it is bound to is the certificate that this client was shown.
    let acceptor = door.acceptor.load_full();
    let greeted = Box::pin(handshake::greet(stream, &acceptor, deadline)).await;
    let (mut stream, arrival) = match greeted {
        Ok((stream, Hello::Session(startup))) => (stream, Arrival { startup: *startup, acceptor, deadline, worker }),
        Ok((_, Hello::Cancel(key))) => {
            let config = door.process.config.load_full();
            door.cancels.carry(key, &config, &door.process.events).await;
            return None;
        }
        Ok((_, Hello::Gone)) => return None,
        Err(report) => {
            turned_away(door, &report);
            return None;
        }
    };
    match Box::pin(enter(&mut stream, arrival, door)).await {
        Ok(Entered::Console { user, rights, key, cancels, place }) => {
            Some(Admitted::Visitor(Box::new(Visitor { stream, user, rights, key, cancels, place })))
        }
        Ok(Entered::Client(entry)) => Some(Admitted::Client(Box::new((stream, *entry)))),
        Err(report) => {
            turned_away(door, &report);
            stream.refuse(&report).await;
            None
        }
    }
}

fn turned_away(door: &Door, report: &Report) {
    door.process.events.logins_refused.count();
    tracing::info!(sqlstate = %report.sqlstate, blame = report.blame.as_str(), message = %report.message, "login refused");
}

/// A client that has said what it wants.
struct Arrival {
    startup: Startup,
    /// The side of TLS that greeted it.
    acceptor: Arc<Acceptor>,
    deadline: Instant,
    worker: usize,
}

/// Who got in.
enum Entered {
    Console { user: String, rights: Rights, key: Issued, cancels: Arc<Notify>, place: Place },
    Client(Box<Entry>),
}

/// A client that has been welcomed.
struct Entry {
    client: Arc<Client>,
    served: Served,
    _key: Issued,
    _place: Place,
}

/// How a client is served.
struct Served {
    /// Where its server connections come from.
    pool: Arc<Pool>,
    /// What has to be said to each of them in its name.
    settings: Settings,
    /// What it is told at its login.
    told: Reported,
    /// The one that it has from the start, and its place in the list of clients.
    own: Option<(Box<Kept>, Enrolled)>,
}

impl Served {
    /// Its settings are the server's from the start.
    fn one_to_one(pool: Arc<Pool>, kept: Kept, enrolled: Enrolled) -> Self {
        let told = Reported::clone(&kept.pooled.initial);
        Self { pool, settings: Settings::default(), told, own: Some((Box::new(kept), enrolled)) }
    }
}

/// Authenticates, and welcomes. Whoever is authenticated and has to wait for a pause waits as long as any held client.
async fn enter(stream: &mut Stream, arrival: Arrival, door: &Door) -> Result<Entered, Report> {
    let Arrival { mut startup, acceptor, deadline, worker } = arrival;
    let _logging_in = Place::take(&door.logging_in, u32::MAX);
    if CONSOLES.contains(&&*startup.database) {
        return in_time(deadline, console(stream, &startup, door, &acceptor)).await;
    }
    aim(&mut startup, door);
    let config = door.process.config.load_full();
    let place = Place::take(&door.inside, config.general.max_client_conn).ok_or_else(Report::too_many_clients)?;
    let users = door.users.load_full();
    let lookup = Lookup::new(&config, &users, &door.databases.load(), &startup.database);
    let terms = Terms { method: config.general.auth_type, users: &users, lookup: lookup.as_ref(), acceptor: &acceptor };
    let proof = auth::authenticate(stream, &startup, terms);
    let identity = in_time(deadline, proof).await?;
    let database = known_database(&startup, door)?;
    let (protocol, replication) = (startup.protocol, startup.replication);
    let client =
        Client::new(who(stream, &identity, &database, replication, door), &application_name(&startup.settings));
    let served = match replication {
        Replication::No => pooled(&database, &identity, startup.settings, worker).await?,
        Replication::Physical | Replication::Database => {
            let (pool, lease) = server_of_its_own(&database, &identity, startup, worker).await?;
            // Known before its pass ends: no switch may overlook who keeps a server.
            let enrolled = door.process.clients.enrol(&client);
            client.link(&lease.pooled.shared);
            Served::one_to_one(pool, lease.keep(), enrolled)
        }
    };
    let owner = Owner::Client(Arc::downgrade(&client));
    let key = issue(door, protocol, owner)?;
    let deadline = Instant::now() + config.general.client_login_timeout;
    in_time(deadline, async { say_welcome(stream, &served.told, &key).await.map_err(|_| Report::client_gone()) })
        .await?;
    Ok(Entered::Client(Box::new(Entry { client, served, _key: key, _place: place })))
}

/// A step of a login, bounded by the login timeout.
async fn in_time<T>(deadline: Instant, step: impl Future<Output = Result<T, Report>>) -> Result<T, Report> {
    timeout_at(deadline, step).await.unwrap_or_else(|_| Err(Report::login_timeout()))
}

async fn console(stream: &mut Stream, startup: &Startup, door: &Door, acceptor: &Acceptor) -> Result<Entered, Report> {
    let config = door.process.config.load_full();
    let own = CONSOLES.contains(&&*startup.user) && stream.peer().is_ok_and(auth::is_own_process);
    if own {
        auth::welcome_own_process(stream).await?;
    } else {
        let users = door.users.load_full();
        // The console belongs to no database that could be asked: its users are in the file.
        let terms = Terms { method: config.general.auth_type, users: &users, lookup: None, acceptor };
        auth::authenticate(stream, startup, terms).await?;
    }
    let user = String::from_utf8_lossy(&startup.user).into_owned();
    let rights = if own || config.general.admin_users.contains(&user) {
        Rights::Admin
    } else if config.general.stats_users.contains(&user) {
        Rights::Stats
    } else {
        let message = format!("user \"{user}\" may not use the admin console");
        return Err(Report::fatal(SqlState::INSUFFICIENT_PRIVILEGE, message, Blame::Operator)
            .with_hint("name it in admin_users or stats_users"));
    };
    // Visitors have places of their own: an admin gets in when clients have filled the house.
    let place = Place::take(&door.inside, u32::MAX).ok_or_else(Report::too_many_clients)?;
    let cancels = Arc::new(Notify::new());
    let key = issue(door, startup.protocol, Owner::Console(Arc::clone(&cancels)))?;
    Ok(Entered::Console { user, rights, key, cancels, place })
}

fn issue(door: &Door, protocol: Protocol, owner: Owner) -> Result<Issued, Report> {
    let peer_id = door.process.config.load().general.peer_id;
    door.cancels.issue(peer_id, protocol, owner).map_err(|error| Report::internal(format!("no random bytes: {error}")))
}

fn known_database(startup: &Startup, door: &Door) -> Result<Arc<Database>, Report> {
    let databases = door.databases.load();
    let database = std::str::from_utf8(&startup.database).ok().and_then(|name| databases.get(name));
    let database = database.ok_or_else(|| Report::database_does_not_exist(&startup.database))?;
    if !database.admits() {
        return Err(Report::database_disabled(&startup.database));
    }
    Ok(Arc::clone(database))
}

fn who(stream: &Stream, identity: &Identity, database: &Database, replication: Replication, door: &Door) -> Who {
    let config = door.process.config.load();
    Who {
        id: door.process.ids.fetch_add(1, Ordering::Relaxed),
        pool_mode: match replication {
            Replication::No => config.pool_mode(database.name(), &String::from_utf8_lossy(&identity.user)),
            Replication::Physical | Replication::Database => PoolMode::Session,
        },
        replication,
        user: identity.user.clone(),
        database: database.name().into(),
        addr: match stream.peer() {
            Ok(Peer::Tcp(addr)) => Some(addr),
            Ok(Peer::Unix { uid: _ }) | Err(_) => None,
        },
        local_addr: stream.local_address(),
        tls: if stream.is_tls() { "TLS".into() } else { "".into() },
    }
}

/// A physical replication connection is to a server and not to a database; its client need not know that we have names
/// for several (`pg_receivewal` says "replication"). Where one is declared it is meant.
fn aim(startup: &mut Startup, door: &Door) {
    let databases = door.databases.load();
    let is_known = std::str::from_utf8(&startup.database).is_ok_and(|name| databases.contains_key(name));
    if startup.replication == Replication::Physical
        && !is_known
        && databases.len() == 1
        && let Some(only) = databases.keys().next()
    {
        startup.database = only.as_bytes().into();
    }
}

/// Served from the pool that it shares with other clients of its user.
async fn pooled(
    database: &Database,
    identity: &Identity,
    settings: Vec<Pair>,
    worker: usize,
) -> Result<Served, Report> {
    let settings = Settings::new(settings);
    let pool = database.pool(&identity.user, identity.secret.clone());
    let told = welcome(database, &pool, identity, &settings, worker).await?;
    Ok(Served { pool, settings, told, own: None })
}

/// A server connection logged in as the client is, with its own settings: what the server says against it is said at
/// its login.
async fn server_of_its_own(
    database: &Database,
    identity: &Identity,
    startup: Startup,
    worker: usize,
) -> Result<(Arc<Pool>, Lease), Report> {
    let mut settings = startup.settings;
    settings.extend(startup.replication.value().map(|value| (b"replication"[..].into(), value.into())));
    let (user, secret) = (identity.user.clone(), identity.secret.clone());
    let pool = database.pool_for_one(Login { user, secret, settings });
    let lease = first_server(&pool, worker).await?;
    Ok((pool, lease))
}

/// What the client is told of its server: from what servers said before, without asking one if that can be helped, so
/// that logins are answered during a pause.
async fn welcome(
    database: &Database,
    pool: &Arc<Pool>,
    identity: &Identity,
    settings: &Settings,
    worker: usize,
) -> Result<Reported, Report> {
    let known = match pool.welcome().or_else(|| database.welcome()) {
        Some(known) => known,
        None => ask_server(pool, worker).await?,
    };
    let mut told = Reported::clone(&known);
    for (name, value) in &mut told {
        if let Some(wanted) = settings.value(name) {
            *value = wanted.into();
        }
    }
    // The server reports it at every login; the welcome of another user has it not.
    if parameters::reported(&told, b"application_name").is_none() {
        parameters::report(&mut told, b"application_name", settings.value(b"application_name").unwrap_or_default());
    }
    if parameters::reported(&told, b"session_authorization").is_none() {
        parameters::report(&mut told, b"session_authorization", &identity.user);
    }
    Ok(told)
}

/// Opens a server connection to learn the welcome.
async fn ask_server(pool: &Arc<Pool>, worker: usize) -> Result<Arc<Reported>, Report> {
    let lease = first_server(pool, worker).await?;
    let initial = Arc::clone(&lease.pooled.initial);
    lease.rest();
    Ok(initial)
}

/// A server connection at a login. Ended by the hold budget while the gate is shut, else by the login timeout, whose
/// clock stands still meanwhile.
async fn first_server(pool: &Arc<Pool>, worker: usize) -> Result<Lease, Report> {
    let config = pool.site.config.load_full();
    let shed_at = Instant::now() + config.general.hold_budget;
    loop {
        // It waits for no transaction: those that do come first.
        let turn = AtomicU64::new(0);
        let held = timeout_at(shed_at, pool.site.gate.enter(0, &turn, Wants::Any)).await;
        let pass = held.map_err(|_| Report::held_too_long())?;
        let deadline = Instant::now() + config.general.client_login_timeout;
        let checkout = timeout_at(deadline, pool.checkout(pass, None, worker)).await;
        match checkout.map_err(|_| Report::login_timeout())? {
            Ok(lease) => return Ok(lease),
            Err(NoServer::Shut) => {}
            Err(NoServer::Refused(report)) => return Err(*report),
        }
    }
}

async fn say_welcome(stream: &mut Stream, told: &Reported, key: &Issued) -> std::io::Result<()> {
    let mut out = BytesMut::new();
    for (name, value) in told {
        message::put_parameter_status(&mut out, name, value);
    }
    message::put_backend_key_data(&mut out, &key.key);
    message::put_ready_for_query(&mut out, message::Status::Idle);
    stream.write_all(&out).await
}

fn application_name(settings: &[Pair]) -> String {
    let given = settings.iter().rfind(|(name, _)| name.eq_ignore_ascii_case(b"application_name"));
    given.map_or_else(String::new, |(_, value)| String::from_utf8_lossy(value).into_owned())
}

/// The session of a welcomed client.
async fn session(admitted: Box<(Stream, Entry)>, door: &Door, worker: usize) {
    let (stream, Entry { client, served, _key, _place }) = *admitted;
    let Served { pool, settings, told, own } = served;
    let (kept, enrolled) = own.unzip();
    let _enrolled = enrolled.unwrap_or_else(|| door.process.clients.enrol(&client));
    let settings = Arc::new(settings);
    let meter = door.book.pool(&client.who.database, &String::from_utf8_lossy(&client.who.user)).meter(worker);
    meter.client_login();
    let id = client.who.id;
    let mut session = Session {
        stream,
        client,
        pool,
        meter,
        startup: Arc::clone(&settings),
        settings,
        told: Arc::new(told),
        told_by: 0,
        worker,
        up: None,
        down: None,
        kept,
        overheard: None,
        names: None,
        known: None,
    };
    match session.run().await {
        Farewell::Terminated => tracing::debug!(id, "client left"),
        Farewell::ClientGone(error) => tracing::debug!(id, %error, "client gone"),
        Farewell::ServerGone(why) => tracing::warn!(id, why, "a client lost its server"),
        Farewell::Refused(report) => {
            tracing::info!(id, sqlstate = %report.sqlstate, blame = report.blame.as_str(), message = %report.message, "client ended");
        }
    }
}
