//! The cutover protocol as a finite machine, and a search through all of its states.
//!
//! A state holds two servers (their decision stores, their gates, what is replicated between them), the proxies, at most one
//! controller, every message that a controller ever sent, and one writer that goes past the proxies. A message that was sent
//! may arrive at any later time, any number of times, or never; whatever may die may die at any moment; a lease may end at any
//! moment; a route file may be lost; the network between one proxy and one server may break. Each epoch goes whichever way the
//! database lies: a rollback is the next epoch, with source and target in each other's place. The search visits every state and
//! reports the shortest way into a forbidden one, and every state from which the proxies alone, with the controller dead for
//! good, can no longer get back to service. Proxies of a kind are interchangeable: states that differ only in that are one.
//!
//! Invariant: a transition does what the product's verb of the same name does, under the rules that are switched on; with
//! all of them on no state is forbidden and none is stuck. [`rules::Rule::AHEAD`] are on here and not in the product yet.
//!
//! What is left out, and so must be right by other means: failover of a server (R14), PgBouncer members (R15), parts of a
//! database and physical replication (R16), `mode writes`, a crash of a server that forgets what it acknowledged (R6, R11),
//! what a gate does not see (R13). A look, with what follows from it, is one step. Drain is one step; catch-up, sentinel, the
//! slot of S6 and S7 are one. A member is in the source's list exactly while it lives and reaches the source; a run lists the
//! members after it opened its epoch; epoch numbers never collide, because the floor given to `open` covers both stores and
//! every proxy; a server that never served clients has none that go past the proxies.

pub mod campaign;
pub mod search;
pub mod words;
pub mod safety;
pub mod step;
mod controller;
mod proxy;
mod writer;
mod store;
mod data;
pub mod state;
pub mod rules;
