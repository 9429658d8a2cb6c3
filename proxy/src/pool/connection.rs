//! A pooled server connection and the place it takes in its pool.
//!
//! Invariant: a place is counted from before the connection is opened until it is gone, whatever became of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use bytes::BytesMut;

use crate::backend::ServerConnection;
use crate::client::Server;
use crate::frame;
use crate::message;
use crate::parameters;
use crate::parameters::{Reported, Settings};
use crate::statements::Shelf;
use crate::stream::Arrived;
use crate::tracker::Tracker;

/// A message that may come at rest is short; anything longer means that the connection is not what we think.
const AT_REST_BYTES_MAX: usize = 64 * 1024;

/// A place among the connections of a pool, of its database and of its user: dropping it frees all three.
#[derive(Debug)]
pub struct Place {
    counts: Option<[Arc<AtomicU32>; 3]>,
}

impl Place {
    /// No place: of a connection that is parked on a backend that is not active.
    pub(super) fn none() -> Self {
        Self { counts: None }
    }

    /// A place that the caller has counted.
    pub(super) fn taken(counts: [&Arc<AtomicU32>; 3]) -> Self {
        Self { counts: Some(counts.map(Arc::clone)) }
    }

    /// Takes a place unless one of the limits is reached, which the error names; a limit of 0 is none.
    pub(super) fn take(counts: [&Arc<AtomicU32>; 3], limits: [u32; 3]) -> Result<Self, usize> {
        for (taken, (count, limit)) in counts.iter().zip(limits).enumerate() {
            let fits = |now: u32| (limit == 0 || now < limit).then_some(now + 1);
            if count.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_err() {
                counts[..taken].iter().for_each(|count| {
                    count.fetch_sub(1, Ordering::AcqRel);
                });
                return Err(taken);
            }
        }
        Ok(Self::taken(counts))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for count in self.counts.iter().flatten() {
            count.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// A server connection that a pool owns or has leased.
#[derive(Debug)]
pub struct Pooled {
    /// The authenticated connection.
    pub server: ServerConnection,
    /// What others know of it.
    pub shared: Arc<Server>,
    /// What it reported when it was opened.
    pub initial: Arc<Reported>,
    /// What it reports now.
    pub reported: Arc<Reported>,
    /// How it differs from its start.
    pub applied: Arc<Settings>,
    /// A client has reset settings: what is applied is not known.
    pub is_reset: bool,
    /// Whether it rests.
    pub tracker: Tracker,
    /// What is prepared there for clients that share it.
    pub shelf: Shelf,
    /// The worker whose runtime its socket is registered with.
    pub(super) home: usize,
    /// The route's generation that it belongs to.
    pub generation: u64,
    /// When it came to rest.
    pub(super) idle_since: Instant,
    pub(super) place: Place,
}

impl Pooled {
    /// Takes note of what the server reported on the way.
    pub fn note(&mut self, reported: &[message::Pair]) {
        if reported.is_empty() {
            return;
        }
        let mut now = Reported::clone(&self.reported);
        for (name, value) in reported {
            parameters::report(&mut now, name, value);
            // What the connection knows of itself: the next statement of ours starts from it.
            parameters::report(&mut self.server.parameters, name, value);
        }
        self.reported = Arc::new(now);
    }

    /// Its server was perhaps a standby when it was opened, and is none now. It would say so with its next answer only, and
    /// clients would be told the contrary before each of their transactions.
    pub(super) fn promoted(&mut self) {
        for told in [&mut self.initial, &mut self.reported] {
            if parameters::reported(told, b"in_hot_standby") == Some(b"on") {
                parameters::report(Arc::make_mut(told), b"in_hot_standby", b"off");
            }
        }
    }

    /// Whether it is still there, asked without a system call unless something came in. At rest a server may report a
    /// setting or send a notice or a notification that nobody listens to any more; anything else is its end.
    pub(super) fn is_alive(&mut self) -> bool {
        let mut input = BytesMut::new();
        loop {
            match self.server.stream.arrived(&mut input) {
                Arrived::Nothing => return input.is_empty(),
                Arrived::End => return false,
                Arrived::Bytes => {}
            }
            loop {
                match frame::next(&input, AT_REST_BYTES_MAX) {
                    Ok(None) => break,
                    Ok(Some(frame)) => {
                        match (frame.tag, message::parameter_status(frame.body)) {
                            (b'S', Ok((name, value))) => self.note(&[(name.into(), value.into())]),
                            (b'N' | b'A', _) => {}
                            (_, _) => return false,
                        }
                        let length = frame.len_bytes();
                        let _ = input.split_to(length);
                    }
                    Err(_) => return false,
                }
            }
        }
    }
}
