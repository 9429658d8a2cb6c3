//! Whose statement a cancel request is about, and where it has to go.
//!
//! Invariant: a cancel reaches the statement of the client that owns the key or nobody: a server connection serves
//! nobody else while a cancel is on its way to it. Keys carry the instance that gave them out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use crate::backend;
use crate::backend::{Address, BackendKey, Cleartext};
use crate::client::{Client, Order, State};
use crate::config::{Config, Peer};
use crate::message::{CancelKey, Protocol};
use crate::metrics::Events;
use crate::tls::Connector;

/// How long one cancel request may take, from here to the server's answer.
const CANCEL: Duration = Duration::from_secs(10);

/// Bits of the process id in a key that are random; the 14 above them are the instance's peer_id.
const RANDOM_PID_BITS: u32 = 17;

/// Secret bytes of a key: four in protocol 3.0, PostgreSQL's own length in 3.2.
const SECRET_BYTES_3_0: usize = 4;
const SECRET_BYTES_3_2: usize = 32;

/// Every key that is out.
#[derive(Debug, Default)]
pub struct Cancels {
    owners: Mutex<HashMap<CancelKey, Owner>>,
}

/// Who owns a key.
#[derive(Debug, Clone)]
pub enum Owner {
    /// A client of a database.
    Client(Weak<Client>),
    /// A visitor of the console: rung to end a waiting command.
    Console(Arc<Notify>),
}

/// A key that is out until this is dropped.
#[derive(Debug)]
pub struct Issued {
    /// The key.
    pub key: CancelKey,
    cancels: Arc<Cancels>,
}

impl Drop for Issued {
    fn drop(&mut self) {
        lock(&self.cancels.owners).remove(&self.key);
    }
}

impl Cancels {
    /// A new key, for the protocol that its owner speaks.
    ///
    /// # Errors
    /// The operating system has no random bytes.
    pub fn issue(self: &Arc<Self>, peer_id: u16, protocol: Protocol, owner: Owner) -> Result<Issued, getrandom::Error> {
        let secret_bytes = match protocol {
            Protocol::V3_0 => SECRET_BYTES_3_0,
            Protocol::V3_2 => SECRET_BYTES_3_2,
        };
        loop {
            let mut secret = vec![0; secret_bytes];
            getrandom::fill(&mut secret)?;
            let random = getrandom::u32()? & ((1 << RANDOM_PID_BITS) - 1);
            let pid = ((u32::from(peer_id) << RANDOM_PID_BITS) | random).cast_signed();
            let key = CancelKey { pid, secret: secret.into() };
            let mut owners = lock(&self.owners);
            if owners.contains_key(&key) {
                continue;
            }
            owners.insert(key.clone(), owner);
            return Ok(Issued { key, cancels: Arc::clone(self) });
        }
    }

    /// Carries a cancel request to where it belongs; one that belongs nowhere is counted and dropped.
    pub async fn carry(&self, key: CancelKey, config: &Config, events: &Events) {
        let instance = u16::try_from(key.pid.cast_unsigned() >> RANDOM_PID_BITS).unwrap_or(0);
        let owner = lock(&self.owners).get(&key).cloned();
        match owner {
            Some(Owner::Console(bell)) => bell.notify_waiters(),
            Some(Owner::Client(client)) => {
                if let Some(client) = client.upgrade() {
                    cancel_statement(&client, events).await;
                }
            }
            None => match config.peers.get(&instance).filter(|_| instance != config.general.peer_id) {
                Some(peer) => {
                    events.cancels_forwarded.count();
                    forward(peer, key).await;
                }
                None => events.cancels_dropped.count(),
            },
        }
    }
}

async fn cancel_statement(client: &Client, events: &Events) {
    match client.state() {
        State::Idle => return,
        State::Held | State::Waiting => {
            client.order(Order::Cancel);
            // It may just have stopped waiting: then nobody looks at the order, and its server has the statement.
            if client.state() != State::Active {
                return;
            }
        }
        State::Active => {}
    }
    let Some(mark) = client.cancel_target() else { return };
    let server = mark.server();
    let Some(key) = &server.key else { return };
    events.cancels_forwarded.count();
    let deadline = tokio::time::Instant::now() + CANCEL;
    if let Err(error) = backend::cancel(&server.address, key, deadline).await {
        mark.doubt();
        tracing::warn!(pid = server.pid, %error, "nobody knows whether a cancel request has reached its server");
    }
}

async fn forward(peer: &Peer, key: CancelKey) {
    let address = Address {
        host: peer.host.as_str().into(),
        port: peer.port,
        name: None,
        dbname: Box::default(),
        tls: Connector::disabled(),
        protocol: Protocol::V3_0,
        cleartext: Cleartext::Protected,
    };
    let key = BackendKey { key, peer: None };
    if let Err(error) = backend::cancel(&address, &key, tokio::time::Instant::now() + CANCEL).await {
        tracing::warn!(host = %peer.host, port = peer.port, %error, "a cancel request did not reach its instance");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under this lock panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
