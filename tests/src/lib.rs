//! The harness of the end-to-end tests and of the demo: real servers, real replication, real load.
//!
//! # A test's life
//! [`binaries`] finds (or fetches) server binaries, [`cluster`] starts a server from them, [`pair`] connects two of
//! different majors by logical replication, [`proxy`] and [`control`] run the programs under test, [`workload`] puts
//! load on them and notes in the [`ledger`] what was acknowledged, [`faults`] breaks the network between any two of
//! them. Everything a process starts lives in its [`run_dir`] and is gone when the process is, however it ended.
//!
//! The harness starts `pgcutover` and `proxyctl` as users do: by their binaries and configuration files.
//!
//! A module uses only modules below it in this list.

pub mod program;
pub mod chapter;
pub mod crossing;
pub mod shuttle;
pub mod moves;
pub mod kills;
pub mod account;
pub mod kept;
pub mod stage;
pub mod faults;
pub mod workload;
mod pipeliner;
pub mod writer;
pub mod drivers;
pub mod belongings;
pub mod ledger;
pub mod errors;
pub mod samples;
pub mod wire;
pub mod control;
pub mod bouncer;
pub mod proxy;
pub mod product;
pub mod pair;
pub mod cluster;
pub mod tls;
pub mod client;
pub mod binaries;
mod fetch;
pub mod process;
pub mod run_dir;
pub mod port;
pub mod user;
pub mod printer;
