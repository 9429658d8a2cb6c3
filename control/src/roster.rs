//! Who takes part: the proxies of each entry of the configuration, wherever it finds them, and who else serves the database.
//!
//! Invariant: whoever is commanded at an address that it enrolled is the one that enrolled it. Names and members are looked up
//! when a run begins and again before clients are held ([`changes`]): a fleet that has changed meanwhile is not paused.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::future::join_all;
use pgcutover_api::store::Member;
use tokio_postgres::config::Host;

use crate::clusters::{Cluster, ClusterError};
use crate::config::Config;
use crate::config::members::{Find, ProxyEntry};
use crate::proxies::{Fleet, Origin, ProxyAddress, ProxyError, ProxyErrors};

/// A member that was seen within this is alive: proxies look at the store every second (R9).
pub const ALIVE: Duration = Duration::from_secs(3);
/// One that was not seen for so long is gone: its row stays until the server restarts.
pub const GONE: Duration = Duration::from_secs(10);
/// One lookup of a name; a resolver that is slower than this is in trouble.
const LOOKUP: Duration = Duration::from_secs(2);
/// One look at the members.
const LOOK: Duration = Duration::from_secs(3);

/// Logs in to every proxy of the configuration, or tells which could not be had.
///
/// # Errors
/// Whoever could not be found or reached.
pub async fn assemble(config: &Config, source: &Cluster) -> Result<Fleet, ProxyErrors> {
    let (fleet, absent) = assemble_some(config, source).await;
    if absent.is_empty() { Ok(fleet) } else { Err(ProxyErrors(absent)) }
}

/// Logs in to every proxy that can be had; the rest is told.
pub async fn assemble_some(config: &Config, source: &Cluster) -> (Fleet, Vec<ProxyError>) {
    let (addresses, mut absent) = addresses(config).await;
    let (mut fleet, unreached) = Fleet::connect_some(&addresses).await;
    for error in unreached {
        absent.push(error);
    }
    for entry in config.proxies.iter().filter(|entry| entry.find == Find::Members) {
        match unmet(&fleet, source, config).await {
            Ok(members) => {
                let (addresses, bad) = enrolled(entry, members);
                let (found, unreached) = Fleet::connect_some(&addresses).await;
                let (found, strangers) = found.that_are_who_enrolled();
                fleet.join(found);
                absent.extend(bad.into_iter().chain(unreached).chain(strangers));
            }
            Err(error) => absent.push(nobody(entry, format!("the members can't be read: {error}"))),
        }
    }
    (fleet, absent)
}

/// The addresses of those that do not depend on the store.
async fn addresses(config: &Config) -> (Vec<ProxyAddress>, Vec<ProxyError>) {
    let (mut addresses, mut absent) = (Vec::new(), Vec::new());
    for found in join_all(config.proxies.iter().map(of_entry)).await {
        match found {
            Ok(found) => addresses.extend(found),
            Err(error) => absent.push(error),
        }
    }
    (addresses, absent)
}

async fn of_entry(entry: &ProxyEntry) -> Result<Vec<ProxyAddress>, ProxyError> {
    match entry.find {
        Find::Listed => {
            let (name, endpoint) = (entry.name.clone(), entry.endpoint.clone());
            Ok(vec![ProxyAddress { name, endpoint, origin: Origin::Listed }])
        }
        Find::Dns => of_name(entry).await,
        Find::Members => Ok(Vec::new()),
    }
}

/// One proxy at each address. TLS goes on asking for the name.
async fn of_name(entry: &ProxyEntry) -> Result<Vec<ProxyAddress>, ProxyError> {
    let Some(Host::Tcp(host)) = entry.endpoint.pg.get_hosts().first() else {
        return Err(nobody(entry, "its dsn names no host".to_owned()));
    };
    let port = entry.endpoint.pg.get_ports().first().copied().unwrap_or(5432);
    let found = tokio::time::timeout(LOOKUP, tokio::net::lookup_host((host.as_str(), port))).await;
    let found = found.map_err(|_| nobody(entry, format!("{host}: no answer within {LOOKUP:?}")))?;
    let found = found.map_err(|error| nobody(entry, format!("{host}: {error}")))?;
    let addresses: BTreeSet<IpAddr> = found.map(|address| address.ip()).collect();
    if addresses.is_empty() {
        return Err(nobody(entry, format!("{host} has no address")));
    }
    let proxies = addresses.into_iter().map(|address| {
        let mut endpoint = entry.endpoint.clone();
        endpoint.pg.hostaddr(address);
        ProxyAddress { name: format!("{}@{address}", entry.name), endpoint, origin: Origin::Dns { host: host.clone() } }
    });
    Ok(proxies.collect())
}

/// Where members enrolled.
fn enrolled(entry: &ProxyEntry, members: Vec<Member>) -> (Vec<ProxyAddress>, Vec<ProxyError>) {
    let (mut addresses, mut bad) = (Vec::new(), Vec::new());
    for member in members {
        let name = format!("{}@{}", entry.name, member.instance);
        match member.address.parse::<SocketAddr>() {
            Ok(address) if !address.ip().is_unspecified() => {
                let mut endpoint = entry.endpoint.clone();
                endpoint.pg.host(address.ip().to_string()).port(address.port());
                addresses.push(ProxyAddress { name, endpoint, origin: Origin::Enrolled { instance: member.instance } });
            }
            Ok(_) | Err(_) => {
                let message = format!("enrolled at '{}', which nobody can connect to", member.address);
                bad.push(ProxyError { proxy: name, sqlstate: None, message });
            }
        }
    }
    (addresses, bad)
}

fn nobody(entry: &ProxyEntry, message: String) -> ProxyError {
    ProxyError { proxy: entry.name.clone(), sqlstate: None, message }
}

/// Who enrolled itself on this server; nobody where there is no store yet.
///
/// # Errors
/// The server does not answer, or our login may not read the store.
pub async fn members(cluster: &Cluster, config: &Config) -> Result<Vec<Member>, ClusterError> {
    if !cluster.installed(LOOK).await? {
        return Ok(Vec::new());
    }
    cluster.members(&config.route, LOOK).await
}

/// Living members that are not of this fleet, nor keepers of its PgBouncers.
pub async fn unmet(fleet: &Fleet, cluster: &Cluster, config: &Config) -> Result<Vec<Member>, ClusterError> {
    let is_kept = |member: &Member| config.bouncers.iter().any(|entry| entry.name == member.instance);
    let mut members = members(cluster, config).await?;
    members.retain(|member| is_alive(member) && !fleet.has_instance(&member.instance) && !is_kept(member));
    Ok(members)
}

/// Whether it was seen lately.
pub fn is_alive(member: &Member) -> bool {
    Duration::from_millis(member.seen_ms_ago) < ALIVE
}

/// A proxy that can't be reached, with what the store knows of it if it enrolled under this name.
pub fn last_seen(error: ProxyError, members: &[Member]) -> ProxyError {
    let Some(member) = members.iter().find(|member| error.proxy == member.instance) else { return error };
    let message = format!(
        "{}; the store last saw it {:.1} s ago, on {}",
        error.message,
        Duration::from_millis(member.seen_ms_ago).as_secs_f64(),
        member.backend
    );
    ProxyError { message, ..error }
}

/// How the fleet differs from what its entries find now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It is there now and was not.
    Came(String),
    /// It was there.
    Left(String),
    /// It can't be said.
    Unknown(String),
}

/// Looks every name up again, and the members where an entry stands for them.
pub async fn changes(config: &Config, cluster: &Cluster, fleet: &Fleet) -> Vec<Change> {
    let (now, absent) = addresses(config).await;
    let mut changes: Vec<Change> = absent.into_iter().map(|error| Change::Unknown(error.to_string())).collect();
    let now: BTreeSet<&str> = now.iter().map(|address| address.name.as_str()).collect();
    let of_names = fleet.iter().filter(|proxy| matches!(proxy.origin(), Origin::Listed | Origin::Dns { .. }));
    let before: BTreeSet<&str> = of_names.map(|proxy| proxy.name()).collect();
    if changes.is_empty() {
        changes.extend(now.difference(&before).map(|name| Change::Came((*name).to_owned())));
        changes.extend(before.difference(&now).map(|name| Change::Left((*name).to_owned())));
    }
    if config.proxies.iter().any(|entry| entry.find == Find::Members) {
        match unmet(fleet, cluster, config).await {
            Ok(members) => changes.extend(members.into_iter().map(|member| Change::Came(member.instance))),
            Err(error) => changes.push(Change::Unknown(error.to_string())),
        }
    }
    changes
}
