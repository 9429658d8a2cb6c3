//! The process: listeners, workers, watchers, and an orderly end.
//!
//! Invariant: every task is spawned on the tracker, so that the end waits for it; each connection belongs to one worker,
//! a thread with a runtime of its own, for life.

mod admin;
mod instance;
mod listener;
mod reload;
mod rows;
mod settings;
mod worker;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use arc_swap::ArcSwap;
use pgcutover_api::command::Shutdown;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client::{Clients, Order};
use crate::config::Config;
use crate::connection::Door;
use crate::database;
use crate::database::{Database, Process};
use crate::http;
use crate::metrics::Book;
use crate::resolver::Resolver;

use admin::{Operator, Page};
use worker::Workers;

/// How often pools close what is outdated and averages are looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// How long clients that were told to go at once may take.
const LAST_MOMENTS: Duration = Duration::from_secs(5);

/// Runs until `signals` ends it: each value is a wish to end, the last one counts.
///
/// # Errors
/// What could not be set up, with its cause.
pub async fn run(config: Config, mut signals: watch::Receiver<Signal>) -> anyhow::Result<()> {
    let workers = Workers::start(config.general.workers)?;
    let door = door(config, workers.count())?;
    let (ending, mut ended) = watch::channel(None);
    let operator = Operator { door: Arc::clone(&door), ending };
    let listeners = listener::bind(&door).await?;
    let page = Page::new(operator.clone());
    // The pages outlive the listeners: a proxy that drains is alive and not ready.
    let pages_over = CancellationToken::new();
    // Clients wait in the listeners' queues meanwhile.
    let databases = door.databases.load_full();
    futures_util::future::join_all(databases.values().map(|database| database.look_first())).await;
    start_tasks(&door, &page, &pages_over).await?;
    for listener in listeners {
        let reception =
            worker::Reception { door: Arc::clone(&door), operator: operator.clone(), workers: workers.clone() };
        door.process.tasks.spawn(listener.accept(reception));
    }
    page.ready();
    // Ended by a signal or by SHUTDOWN on the console.
    loop {
        tokio::select! {
            changed = signals.changed() => {
                let signal = if changed.is_ok() { *signals.borrow_and_update() } else { Signal::End(Shutdown::Now) };
                match signal {
                    Signal::None => {}
                    Signal::Reload => {
                        if let Err(reason) = reload::reload(&door).await {
                            tracing::error!(reason, "RELOAD was refused; the running configuration goes on");
                        }
                    }
                    Signal::End(how) => { operator.ending.send_replace(Some(how)); }
                }
            }
            Ok(()) = ended.changed() => {
                let how = *ended.borrow_and_update();
                page.draining();
                if let Some(how) = how && end(&door, how, &mut ended, &mut signals).await { break }
            }
        }
    }
    door.process.closing.cancel();
    pages_over.cancel();
    door.process.tasks.close();
    // Clients have been told; what still runs after this ends with the process.
    let _ = tokio::time::timeout(LAST_MOMENTS, door.process.tasks.wait()).await;
    workers.stop();
    Ok(())
}

/// What the operating system or the console asks of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Nothing yet.
    None,
    /// SIGHUP.
    Reload,
    /// SIGTERM, SIGINT or SIGQUIT.
    End(Shutdown),
}

/// Lets clients go; `true` when the process may end. A further signal or SHUTDOWN hurries it.
async fn end(
    door: &Door,
    how: Shutdown,
    again: &mut watch::Receiver<Option<Shutdown>>,
    signals: &mut watch::Receiver<Signal>,
) -> bool {
    tracing::info!(%how, "shutting down");
    door.process.closing.cancel();
    let order = match how {
        Shutdown::Now => Some(Order::Kill),
        Shutdown::WaitForServers => Some(Order::Leave),
        Shutdown::WaitForClients => None,
    };
    loop {
        let clients = door.process.clients.all();
        if clients.is_empty() {
            return true;
        }
        if let Some(order) = order {
            clients.iter().for_each(|client| client.order(order));
        }
        let hurry = async {
            tokio::select! {
                _ = again.changed() => {}
                _ = signals.changed() => {}
            }
        };
        tokio::select! {
            () = tokio::time::sleep(HOUSEKEEPING) => {}
            () = all_gone(door) => return true,
            () = hurry => {
                door.process.clients.all().iter().for_each(|client| client.order(Order::Kill));
                return true;
            }
        }
    }
}

async fn all_gone(door: &Door) {
    // A few checks a second cost nothing here, and a client's end has no other sign. Ended by the caller's clock.
    let mut beat = tokio::time::interval(Duration::from_millis(10));
    while door.process.clients.count() > 0 {
        beat.tick().await;
    }
}

fn door(config: Config, workers: usize) -> anyhow::Result<Arc<Door>> {
    let (users, acceptor) = reload::load_parts(&config).map_err(anyhow::Error::msg)?;
    let instance = instance::name(&config.general).context("the instance's name")?;
    let process = Process {
        config: Arc::new(ArcSwap::from_pointee(config)),
        tasks: TaskTracker::new(),
        closing: CancellationToken::new(),
        ids: Arc::new(AtomicU64::new(1)),
        events: Arc::default(),
        clients: Arc::new(Clients::default()),
        resolver: Resolver::system(),
        user_connections: Arc::default(),
        statements: Arc::default(),
        instance: instance.into(),
        address: Arc::new(Mutex::new(String::new())),
    };
    let mut databases = BTreeMap::new();
    let config = process.config.load_full();
    for name in config.databases.keys() {
        let database = Database::start(name, &config, process.clone())
            .map_err(|reason| anyhow::anyhow!("{}: databases.{name}: {reason}", config.path.display()))?;
        databases.insert(name.clone(), database);
    }
    Ok(Arc::new(Door {
        process,
        databases: ArcSwap::from_pointee(databases),
        users: ArcSwap::from_pointee(users),
        acceptor: ArcSwap::from_pointee(acceptor),
        cancels: Arc::default(),
        // One slot more than workers: the main thread opens connections too.
        book: Book::new(workers + 1, Instant::now()),
        inside: Arc::default(),
        logging_in: Arc::default(),
        changing: tokio::sync::Mutex::default(),
    }))
}

/// Watchers, housekeeping and the HTTP pages.
async fn start_tasks(door: &Arc<Door>, page: &Arc<Page>, pages_over: &CancellationToken) -> anyhow::Result<()> {
    for database in door.databases.load().values() {
        door.process.tasks.spawn(database::watch(Arc::clone(database)));
    }
    door.process.tasks.spawn(keep_house(Arc::clone(door)));
    if let Some(address) = &door.process.config.load().general.http_addr {
        let listener = tokio::net::TcpListener::bind(address).await.with_context(|| format!("http_addr {address}"))?;
        tracing::info!("http on {}", listener.local_addr()?);
        door.process.tasks.spawn(http::serve(listener, Arc::clone(page), pages_over.clone()));
    }
    Ok(())
}

/// Ended by the process.
async fn keep_house(door: Arc<Door>) {
    let mut beat = tokio::time::interval(HOUSEKEEPING);
    let mut period_ends = Instant::now() + Book::PERIOD;
    loop {
        tokio::select! {
            () = door.process.closing.cancelled() => return,
            _ = beat.tick() => {}
        }
        let now = Instant::now();
        for database in door.databases.load().values() {
            database.pools().iter().for_each(|pool| pool.keep_house(now));
        }
        if now >= period_ends {
            door.book.end_period(now);
            period_ends = now + Book::PERIOD;
        }
    }
}
