//! Connections that have a successor on another server, or were parked for nothing: closed when clients are served again, a
//! few at a time.
//!
//! Invariant: nobody is served by one. The end of a server process costs about as much as a transaction: hundreds of them at
//! once would take the processors from clients that have just waited for a switch.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::gate::Gate;
use crate::pool::connection::Pooled;
use crate::pool::{Pool, Site, lock};

/// How long they wait for the gate to open: then they close, whatever it does.
const HELD_MAX: Duration = Duration::from_secs(2);

/// Time for the clients that were held: their first statements come all at once.
const FIRST_STATEMENTS: Duration = Duration::from_millis(500);

/// All are closed in about this many steps, of [`STEP`] each.
const STEPS: usize = 200;

/// Time between two steps.
const STEP: Duration = Duration::from_millis(5);

/// Those that wait for their end; the task that sees to it runs while there are any.
#[derive(Default)]
pub struct Leaving {
    queue: Mutex<VecDeque<(Arc<Pool>, Box<Pooled>)>>,
}

impl Pool {
    /// Closes a connection that its session has left, in its turn.
    pub(super) fn dismiss_later(self: &Arc<Self>, pooled: Box<Pooled>) {
        let mut queue = lock(&self.site.leaving.queue);
        queue.push_back((Arc::clone(self), pooled));
        if queue.len() == 1 {
            self.site.tasks.spawn(see_off(Arc::clone(&self.site)));
        }
    }
}

async fn see_off(site: Arc<Site>) {
    // Ended by RESUME, or else by the time: either way they close.
    let _ = tokio::time::timeout(HELD_MAX, opened(&site.gate)).await;
    // reason: a pace, not a wait for something.
    tokio::time::sleep(FIRST_STATEMENTS).await;
    let some = lock(&site.leaving.queue).len().div_ceil(STEPS);
    loop {
        for _ in 0..some {
            let mut queue = lock(&site.leaving.queue);
            let Some((pool, pooled)) = queue.pop_front() else { return };
            // Whoever comes next finds either the task at work or an empty queue.
            let is_last = queue.is_empty();
            drop(queue);
            pool.dismiss(pooled);
            if is_last {
                return;
            }
        }
        // reason: a pace, not a wait for something.
        tokio::time::sleep(STEP).await;
    }
}

async fn opened(gate: &Gate) {
    loop {
        let change = gate.change();
        tokio::pin!(change);
        change.as_mut().enable();
        if gate.pause().is_none() {
            return;
        }
        change.await;
    }
}
