//! The vocabulary that the proxy and proxyctl share: admin commands, rows of our own SHOW tables, and the decision store's SQL.
//!
//! Invariant: no IO here; both sides parse and print the same words. A module uses only modules below it
//! in this list.

pub mod store;
pub mod rows;
pub mod command;
pub mod epoch;
