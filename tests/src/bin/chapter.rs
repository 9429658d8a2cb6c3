//! `cargo run -p e2e --bin chapter`: plays README's chapter "Your first production cutover" and writes what it printed into README.md.
//!
//! Invariant: nothing between the marks of README.md is typed; a run that found nothing new leaves the file as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use e2e::binaries::Network;
use e2e::chapter::blocks::{Block, Figures, put};
use e2e::chapter::play;
use e2e::printer::{result, say};
use e2e::program;

/// Runs every command of the chapter "Your first production cutover" on servers of its own, under load, and writes what they
/// printed between the marks of README.md. What differs from it in figures only stays.
///
/// Exit codes: 0 every command ended as the chapter says, without an error of a client; 1 otherwise.
#[derive(Debug, Parser)]
#[command(name = "chapter")]
#[expect(clippy::struct_excessive_bools, reason = "flags on a command line are booleans")]
struct Args {
    /// Print the blocks, write nothing
    #[arg(long)]
    print: bool,
    /// Write figures, too, that have changed
    #[arg(long)]
    figures: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("chapter", async { chapter(&args).await.map(|()| ExitCode::SUCCESS) })
}

async fn chapter(args: &Args) -> Result<()> {
    let blocks = play(Network::from_env()).await?;
    if args.print {
        blocks.iter().for_each(|Block { name, text }| result(format_args!("== {name}\n{text}")));
        return Ok(());
    }
    let figures = if args.figures { Figures::Anew } else { Figures::Stay };
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let (page, new) = put(&fs::read_to_string(&path)?, &blocks, figures)?;
    fs::write(&path, page).context("writing README.md")?;
    if new.is_empty() {
        say("README.md says what the commands print, figures aside");
    } else {
        say(format_args!("new in README.md: {}", new.join(", ")));
    }
    Ok(())
}
