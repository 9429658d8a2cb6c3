//! proxyctl: moves a database from one PostgreSQL server to another while its clients keep their connections.
//!
//! # Life of a cutover
//! [`cli`] reads what was typed, [`commands`] picks the work, [`engine`] walks the steps of [`plan`]: the intent goes to the
//! [`journal`], the step of [`steps`] acts on [`clusters`] and [`proxies`] (whoever the [`roster`] finds; [`bouncers`] are
//! kept), the outcome goes to the journal; [`state`] says which [`event`] may follow which; [`standing`] says what the store
//! knows of a run that broke off.
//! Before the decision every failure ends with `decide(abort)` and traffic on the source;
//! after it everything goes forward. [`report`] is folded from the journal alone.
//!
//! Invariant: the list below is the order of the layers; a module uses only modules below it.

pub mod cli;
pub mod commands;
pub mod engine;
pub mod steps;
pub mod preflight;
pub mod report;
pub mod journal;
pub mod standing;
pub mod state;
pub mod event;
pub mod plan;
pub mod roster;
pub mod bouncers;
pub mod clusters;
pub mod proxies;
pub mod dial;
pub mod printer;
pub mod finding;
pub mod config;
