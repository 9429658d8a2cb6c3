//! The vocabulary that the proxy and proxyctl share: admin commands, rows of our own SHOW tables, and the decision store's SQL.
//!
//! Invariant: no IO here; both sides parse and print the same words.

pub mod store;
pub mod command;
pub mod rows;
pub mod epoch;
