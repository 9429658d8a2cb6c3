//! A PostgreSQL proxy and pooler that moves a database to another server without a client noticing.
//!
//! # Life of a client
//! `server` accepts a socket and gives it to `connection`, which is one client's life on one screen: `handshake`
//! turns bytes into a `Startup` (or a cancel request), `auth` says who it is, `session` serves it. A session waits for
//! its client without owning a buffer or a server connection. When bytes arrive it takes a `Pass` from the `gate`, a
//! `Lease` from the `pool`, and lets `relay` move frames both ways until `tracker` says the transaction rests; then
//! both go back. A cutover shuts the gate, waits until no pass is out, swaps the `route`, and opens the gate again.
//!
//! # The law of the list
//! A module uses only modules below it in this list; `tests/tidy.rs` checks it.

pub mod server;
pub mod console;
pub mod http;
pub mod connection;
pub mod handshake;
pub mod auth;
pub mod session;
pub mod database;
pub mod cancel;
pub mod pool;
pub mod gate;
pub mod route;
pub mod client;
pub mod transplant;
pub mod backend;
pub mod resolver;
pub mod relay;
pub mod statements;
pub mod parameters;
pub mod tracker;
pub mod scram;
pub mod tls;
pub mod certificate;
pub mod stream;
pub mod message;
pub mod report;
pub mod frame;
pub mod metrics;
pub mod config;
