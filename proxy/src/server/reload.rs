//! RELOAD: the configuration, the user file and the certificates are read again.
//!
//! Invariant: whole or not at all. Everything that can fail is done before anything changes; the message of a failure
//! names file, key and reason.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;

use crate::auth::Users;
use crate::client::Order;
use crate::config::Config;
use crate::connection::Door;
use crate::database;
use crate::database::Database;
use crate::server::settings;
use crate::tls::{Acceptor, ClientTlsSettings};

/// How often a removed database looks whether its last client has left.
const FAREWELL_LOOK: Duration = Duration::from_millis(250);

/// Who may log in, and TLS towards clients, as the configuration says.
pub(super) fn load_parts(config: &Config) -> Result<(Users, Acceptor), String> {
    let general = &config.general;
    let wrong = |key: &str, reason: String| format!("{}: pgcutover.{key}: {reason}", config.path.display());
    let users = match &general.auth_file {
        Some(file) => Users::load(file),
        None => Users::parse(b""),
    };
    let users = users.map_err(|error| wrong("auth_file", error.to_string()))?;
    for user in users.unusable(general.auth_type) {
        tracing::warn!(user = %String::from_utf8_lossy(user), auth_type = ?general.auth_type,
            "the user file's secret of this user does not allow a login by auth_type");
    }
    let tls = ClientTlsSettings {
        mode: general.client_tls_sslmode,
        key_file: general.client_tls_key_file.clone(),
        cert_file: general.client_tls_cert_file.clone(),
        ca_file: general.client_tls_ca_file.clone(),
    };
    let acceptor = Acceptor::new(&tls).map_err(|error| wrong("client_tls_sslmode", error.to_string()))?;
    Ok((users, acceptor))
}

/// Reads everything again and applies it.
///
/// Bounded by the drain of databases whose active address changes. Not to be dropped half way by a console; if it is,
/// nothing has changed, because what follows the last wait does not wait.
pub(super) async fn reload(door: &Arc<Door>) -> Result<(), String> {
    // Ended by the RELOAD or SET before this one.
    let _alone = door.changing.lock().await;
    let running = door.process.config.load_full();
    let mut config = Config::load(&running.path).map_err(|error| error.to_string())?;
    settings::keep_fixed(&running.general, &mut config.general);
    let (users, acceptor) = load_parts(&config)?;
    let present = door.databases.load_full();
    let (removed, staying): (Vec<_>, Vec<_>) =
        present.values().partition(|database| !config.databases.contains_key(database.name()));
    let wrong = |name: &str, reason: String| format!("{}: databases.{name}: {reason}", config.path.display());
    removed.iter().try_for_each(|database| may_go(database).map_err(|reason| wrong(database.name(), reason)))?;
    let added = start_new(door, &config, &present, wrong)?;
    // Last, since it holds the clients of databases that move.
    let considered = staying.iter().map(async |database| {
        let name = database.name();
        database.consider(&config.databases[name]).await.map_err(|reason| wrong(name, reason))
    });
    let changes = try_join_all(considered).await?;
    if !changes.iter().all(database::Change::holds) {
        return Err(format!("{}: a pause ended while this RELOAD relied on it; try again", config.path.display()));
    }
    // Nothing below can fail.
    door.users.store(Arc::new(users));
    door.acceptor.store(Arc::new(acceptor));
    let names = config.databases.len();
    door.process.config.store(Arc::new(config));
    changes.into_iter().for_each(database::Change::carry_out);
    admit(door, &present, added);
    let was_declared = |database: &&&Arc<Database>| running.databases.contains_key(database.name());
    staying.iter().filter(|database| !was_declared(database)).for_each(|database| welcome_back(database));
    for database in removed.iter().filter(was_declared) {
        database.set_admits(false);
        door.process.tasks.spawn(see_off(Arc::clone(door), Arc::clone(database)));
    }
    tracing::info!(databases = names, "RELOAD: the configuration was taken over");
    Ok(())
}

/// A removed database may go unless a run relies on it.
fn may_go(database: &Database) -> Result<(), String> {
    match database.site.gate.pause().and_then(|pause| pause.claim()) {
        Some(claim) => Err(format!("can't be removed while {claim} pauses it")),
        None => Ok(()),
    }
}

/// Databases that are not there yet; none of them serves anybody so far.
fn start_new(
    door: &Door,
    config: &Config,
    present: &BTreeMap<String, Arc<Database>>,
    wrong: impl Fn(&str, String) -> String,
) -> Result<Vec<Arc<Database>>, String> {
    let names = config.databases.keys().filter(|name| !present.contains_key(*name));
    let start =
        |name: &String| Database::start(name, config, door.process.clone()).map_err(|reason| wrong(name, reason));
    names.map(start).collect()
}

/// New databases: clients find them from here on.
fn admit(door: &Door, present: &BTreeMap<String, Arc<Database>>, added: Vec<Arc<Database>>) {
    let mut databases = present.clone();
    for database in added {
        door.process.tasks.spawn(database::watch(Arc::clone(&database)));
        databases.insert(database.name().to_owned(), database);
    }
    door.databases.store(Arc::new(databases));
}

/// A database that was removed, and is declared again before its last client has left.
fn welcome_back(database: &Database) {
    database.set_admits(true);
    database.clients().iter().for_each(|client| client.forget(Order::Leave));
}

/// A removed database: its clients leave when they are at rest, then it goes.
async fn see_off(door: Arc<Door>, database: Arc<Database>) {
    let mut beat = tokio::time::interval(FAREWELL_LOOK);
    // Ended by the last client, by a RELOAD that declares the database again, or by the process.
    loop {
        tokio::select! {
            () = door.process.closing.cancelled() => return,
            _ = beat.tick() => {}
        }
        let _alone = door.changing.lock().await;
        if door.process.config.load().databases.contains_key(database.name()) {
            return;
        }
        let clients = database.clients();
        if clients.is_empty() {
            return remove(&door, &database);
        }
        clients.iter().for_each(|client| client.order(Order::Leave));
    }
}

/// Nobody is left.
fn remove(door: &Door, database: &Database) {
    database.close();
    for pool in database.pools() {
        pool.unpark();
        pool.close_idle();
    }
    let mut databases = BTreeMap::clone(&door.databases.load());
    databases.remove(database.name());
    door.databases.store(Arc::new(databases));
    tracing::info!(database = %database.name(), "the last client of a removed database has left");
}
