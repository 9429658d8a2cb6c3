//! The end-to-end tests: one binary, a module per promise.

// `cfg(test)` tells clippy that the functions beside the tests are tests too.
#[cfg(test)]
mod harness;
#[cfg(test)]
mod login;
#[cfg(test)]
mod armed;
#[cfg(test)]
mod store;
#[cfg(test)]
mod fence;
#[cfg(test)]
mod preflight;
