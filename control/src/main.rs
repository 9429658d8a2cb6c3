//! proxyctl's entry: what was typed becomes an exit code.
//!
//! Invariant: nothing is decided here.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    proxyctl::cli::run(std::env::args_os()).await.into()
}
