//! The cutover protocol as a finite machine, and a search through all of its states.
//!
//! A state holds two servers (their decision stores, their gates), the proxies, at most one controller, every message that
//! a controller ever sent, and one writer that goes past the proxies. A message that was sent may arrive at any later time,
//! any number of times, or never; whatever may die may die at any moment; a lease may end at any moment. The search visits
//! every state and reports the shortest way into a forbidden one, and every state from which the proxies alone, with the
//! controller dead for good, can no longer get back to service.
//!
//! Invariant: a transition does what the product's verb of the same name does, under the rules that are switched on; with
//! all of them on no state is forbidden and none is stuck.
//!
//! What is left out, and so must be right by other means: failover of a server, PgBouncer members, `mode writes`, a proxy
//! cut off from one server only. Drain, catch-up and sentinel are one step; a proxy registers before it looks, and a run
//! lists the proxies after it opened its epoch; epoch numbers never collide, because the floor given to `open` covers both
//! stores and every proxy; a server that never served clients has none that go past the proxies.

pub mod search;
pub mod words;
pub mod safety;
pub mod step;
mod controller;
mod proxy;
mod writer;
mod store;
pub mod state;
pub mod rules;
