//! `cargo run -p e2e --bin matrix`: every driver, in every way and pooling, over real cutovers; its table goes into README.md.
//!
//! Invariant: a cell of the table is what a driver did in this very run, over all pairs of versions; nothing of it is typed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::binaries::Network;
use e2e::crossing::{Crossing, Report, Verdict};
use e2e::drivers::course::{Pooling, Types};
use e2e::drivers::ways::{WAYS, Way};
use e2e::printer::{result, say};
use e2e::program;

/// Up, down, and one with 18.
const PAIRS: [(u32, u32); 3] = [(13, 17), (17, 13), (16, 18)];
/// Oids differ in the same way whatever the versions.
const PAIR_OF_OIDS: (u32, u32) = (13, 17);
const BEGIN: &str = "<!-- matrix: begin -->";
const END: &str = "<!-- matrix: end -->";

/// Lets every driver work across cutovers between majors, in transaction and in session pooling, and writes the table of
/// README.md from what they did.
///
/// Exit codes: 0 the cutovers took place and every ledger adds up, whatever single drivers noticed; 1 otherwise.
#[derive(Debug, Parser)]
#[command(name = "matrix")]
#[expect(clippy::struct_excessive_bools, reason = "flags on a command line are booleans")]
struct Args {
    /// Only these ways (ids); the table is printed, not written
    #[arg(long)]
    way: Vec<String>,
    /// Only these pairs, such as 13:17; the table is printed, not written
    #[arg(long, value_parser = pair)]
    pair: Vec<(u32, u32)>,
    /// Print the table, do not write it
    #[arg(long)]
    print: bool,
    /// Leave out types with other oids
    #[arg(long)]
    no_oids: bool,
}

fn pair(text: &str) -> Result<(u32, u32), String> {
    let (from, to) = text.split_once(':').ok_or("two majors, such as 13:17")?;
    let number = |text: &str| text.parse().map_err(|_| format!("{text} is no major"));
    Ok((number(from)?, number(to)?))
}

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("matrix", async { matrix(&args).await.map(program::exit) })
}

/// Did every crossing hold?
async fn matrix(args: &Args) -> Result<bool> {
    let mut reports = Vec::new();
    for crossing in crossings(args)? {
        let Crossing { from, to, pooling, types, .. } = &crossing;
        say(format_args!("{from} to {to}, {} pooling, {types:?}", pooling.word()));
        let report = crossing.run(Network::from_env()).await?;
        say(&report);
        reports.push(report);
    }
    let table = table(&reports);
    result(&table);
    let whole = args.way.is_empty() && args.pair.is_empty() && !args.print && !args.no_oids;
    if whole {
        write(&table)?;
    }
    Ok(reports.iter().all(Report::holds))
}

fn crossings(args: &Args) -> Result<Vec<Crossing>> {
    let known = |id: &String| Way::of(id).with_context(|| format!("no way is called {id}"));
    let asked: Vec<&'static Way> = args.way.iter().map(known).collect::<Result<_>>()?;
    let ways = if asked.is_empty() { WAYS.iter().collect() } else { asked };
    let pairs = if args.pair.is_empty() { PAIRS.to_vec() } else { args.pair.clone() };
    let mut all: Vec<_> = pairs.into_iter().map(|pair| (pair, Types::BuiltIn)).collect();
    if !args.no_oids {
        all.push((PAIR_OF_OIDS, Types::OtherOids));
    }
    let each = |((from, to), types)| {
        let ways: Vec<&'static Way> = Vec::clone(&ways);
        [Pooling::Transaction, Pooling::Session].map(|pooling| Crossing {
            from,
            to,
            pooling,
            types,
            ways: ways.clone(),
        })
    };
    Ok(all.into_iter().flat_map(each).collect())
}

/// Replaces what stands between the marks.
fn write(table: &str) -> Result<()> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = fs::read_to_string(&path)?;
    let marks = format!("{} has no {BEGIN} … {END}", path.display());
    let (before, rest) = text.split_once(BEGIN).context(marks.clone())?;
    let (_, after) = rest.split_once(END).context(marks)?;
    ensure!(!after.contains(BEGIN), "two tables in {}", path.display());
    fs::write(&path, format!("{before}{BEGIN}\n{table}\n{END}{after}")).context("writing README.md")?;
    say(format_args!("the table in {} is new", path.display()));
    Ok(())
}

/// Reasons are told once, below the table.
#[derive(Default)]
struct Notes {
    texts: Vec<String>,
}

impl Notes {
    fn mark(&mut self, text: String) -> usize {
        if let Some(place) = self.texts.iter().position(|known| *known == text) {
            return place + 1;
        }
        self.texts.push(text);
        self.texts.len()
    }
}

fn table(reports: &[Report]) -> String {
    let columns = [
        (Pooling::Transaction, Types::BuiltIn),
        (Pooling::Session, Types::BuiltIn),
        (Pooling::Transaction, Types::OtherOids),
        (Pooling::Session, Types::OtherOids),
    ];
    let mut lines = vec![
        "| driver | way | transaction pooling | session pooling | own types with other oids: transaction | session |"
            .to_owned(),
        "|---|---|---|---|---|---|".to_owned(),
    ];
    let mut notes = Notes::default();
    for way in WAYS {
        let of = |report: &&Report| report.of(way.id).is_some();
        let here: Vec<&Report> = reports.iter().filter(of).collect();
        if here.is_empty() {
            continue;
        }
        let version = here.iter().find_map(|report| report.of(way.id)?.version.clone()).unwrap_or_default();
        let cells = columns.map(|column| {
            let of_column = here.iter().filter(|report| (report.pooling, report.types) == column);
            let verdicts: Vec<_> = of_column.filter_map(|report| Some((*report, report.of(way.id)?))).collect();
            cell(&verdicts, &mut notes)
        });
        lines.push(format!("| {} {version} | {} | {} |", way.driver, way.words, cells.join(" | ")));
    }
    lines.push(String::new());
    lines.extend(notes.texts.iter().enumerate().map(|(at, text)| format!("{}. {text}", at + 1)));
    lines.push(String::new());
    lines.push(sum(reports));
    lines.join("\n")
}

fn cell(verdicts: &[(&Report, &Verdict)], notes: &mut Notes) -> String {
    if verdicts.is_empty() {
        return "not run".to_owned();
    }
    let mut reasons: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (report, verdict) in verdicts.iter().filter(|(_, verdict)| !verdict.survived()) {
        let why = match (&verdict.untried, verdict.errors.first()) {
            (Some(why), _) => format!("not tried: {why}"),
            (None, Some(error)) => anonymous(error),
            (None, None) => String::new(),
        };
        reasons.entry(why).or_default().push(format!("{} to {}", report.from, report.to));
    }
    if reasons.is_empty() {
        let writes: usize = verdicts.iter().map(|(_, verdict)| verdict.acknowledged).sum();
        return format!("yes ({writes} writes)");
    }
    let all = verdicts.len();
    let marks: Vec<String> = reasons
        .into_iter()
        .map(|(why, pairs)| {
            let text = if pairs.len() == all { why } else { format!("{} only: {why}", pairs.join(", ")) };
            notes.mark(text).to_string()
        })
        .collect();
    format!("no ({})", marks.join(", "))
}

/// Without what differs from run to run: the same reason has one note.
fn anonymous(error: &str) -> String {
    let what = error.strip_prefix("round ").and_then(|rest| rest.split_once(": "));
    what.map_or(error, |(_, what)| what).chars().take(300).collect()
}

fn sum(reports: &[Report]) -> String {
    let word = |report: &Report| {
        let oids = if report.types == Types::OtherOids { ", other oids" } else { "" };
        let pause_ms = report.pause_ms.unwrap_or_default();
        format!("{} to {} ({}{oids}; pause {pause_ms:.0} ms)", report.from, report.to, report.pooling.word())
    };
    let pairs: Vec<String> = reports.iter().map(word).collect();
    let writes: usize = reports.iter().flat_map(|report| &report.verdicts).map(|verdict| verdict.acknowledged).sum();
    let ledger = if reports.iter().all(|report| report.ledger_adds_up) { "adds up" } else { "DOES NOT ADD UP" };
    format!("{writes} acknowledged writes of drivers; the ledger {ledger} in all of {}.", pairs.join(", "))
}
