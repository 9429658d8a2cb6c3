//! The end-to-end tests: one binary, a module per promise.

// `cfg(test)` tells clippy that the functions beside the tests are tests too.
#[cfg(test)]
mod harness;
#[cfg(test)]
mod login;
#[cfg(test)]
mod credentials;
#[cfg(test)]
mod auth_query;
#[cfg(test)]
mod replication;
#[cfg(test)]
mod protocol;
#[cfg(test)]
mod armed;
#[cfg(test)]
mod store;
#[cfg(test)]
mod fence;
#[cfg(test)]
mod preflight;
#[cfg(test)]
mod types;
#[cfg(test)]
mod stand;
#[cfg(test)]
mod pause;
#[cfg(test)]
mod theatre;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod resume_run;
#[cfg(test)]
mod kills;
#[cfg(test)]
mod calm;
#[cfg(test)]
mod series;
#[cfg(test)]
mod house;
#[cfg(test)]
mod traffic;
#[cfg(test)]
mod prepared;
#[cfg(test)]
mod parameters;
#[cfg(test)]
mod resets;
#[cfg(test)]
mod hold;
#[cfg(test)]
mod writes;
#[cfg(test)]
mod cancel;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod bad_input;
#[cfg(test)]
mod console;
#[cfg(test)]
mod exporter;
#[cfg(test)]
mod bouncer;
#[cfg(test)]
mod process;
#[cfg(test)]
mod switch;
#[cfg(test)]
mod watch;
#[cfg(test)]
mod names;
#[cfg(test)]
mod transplant;
#[cfg(test)]
mod transplant_core;
#[cfg(test)]
mod drivers;
#[cfg(test)]
mod transplant_random;
#[cfg(test)]
mod transplant_many;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod evidence;
#[cfg(test)]
mod rehearse;
#[cfg(test)]
mod verification;
#[cfg(test)]
mod rollback;
#[cfg(test)]
mod physical;
#[cfg(test)]
mod chapter;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod release;
#[cfg(test)]
mod mixed;
