//! The end-to-end tests: one binary, a module per promise.

// `cfg(test)` tells clippy that the functions beside the tests are tests too.
#[cfg(test)]
mod harness;
#[cfg(test)]
mod login;
