//! The end-to-end tests: one binary, a module per promise.

mod harness;
