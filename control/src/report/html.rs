//! The report as one HTML page that needs nothing but itself.
//!
//! Invariant: every text that is not ours goes through `escape`; no script, no link to anywhere.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use crate::event::{Ending, Facts};
use crate::finding::{Finding, Level};
use crate::report::samples::Samples;
use crate::report::timeline::{Kind, count, length};
use crate::report::verification::Verification;
use crate::report::{Report, StepOutcome, picture};

/// Writes the page to a file, whole or not at all.
pub fn write(path: &Path, report: &Report, samples: &Samples) -> std::io::Result<()> {
    let unfinished = path.with_extension("html.part");
    std::fs::write(&unfinished, page(report, samples))?;
    std::fs::rename(&unfinished, path)
}

const STYLE: &str = "
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1140px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.1em;margin:1.6em 0 .4em}
.verdict{font-size:1.15em;padding:.6em .9em;border-left:.5em solid;margin:1em 0}
.good{border-color:#078;background:#e8f6f6}.back{border-color:#c80;background:#fdf5e4}.bad{border-color:#c31;background:#fdecea}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3em .6em;border-bottom:1px solid #ddd;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th{font-weight:600;border-bottom:2px solid #999}
tr.red td:first-child,tr.failed td:first-child{border-left:.4em solid #c31}tr.yellow td:first-child{border-left:.4em solid #c80}
tr.green td:first-child{border-left:.4em solid #078}
code,.facts{font:13px/1.4 ui-monospace,monospace;overflow-wrap:anywhere}svg{max-width:100%;height:auto}
.small{color:#666;font-size:.9em}details{margin:.6em 0}";

/// The page.
pub fn page(report: &Report, samples: &Samples) -> String {
    let title = format!("Cutover of {}: {}", report.database, report.outcome);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{}</title><style>{STYLE}</style></head><body>\n",
        escape(&title)
    );
    head(&mut page, report);
    findings(&mut page, "What to fix", report.findings.iter().filter(|finding| finding.level == Level::Red));
    prediction(&mut page, report);
    let svg = picture::draw(report, samples);
    if !svg.is_empty() {
        add(&mut page, format_args!("<h2>Stall and steps</h2>\n{svg}\n"));
    }
    steps(&mut page, report);
    members(&mut page, report);
    traffic(&mut page, report);
    lag(&mut page, report);
    page.push_str(&report.verification.as_ref().map(Verification::html).unwrap_or_default());
    findings(&mut page, "Worth knowing", report.findings.iter().filter(|finding| finding.level == Level::Yellow));
    observations(&mut page, report);
    budgets(&mut page, report);
    findings(
        &mut page,
        "Checked and found right",
        report.findings.iter().filter(|finding| finding.level == Level::Green),
    );
    add(
        &mut page,
        format_args!(
            "<p class=\"small\">Folded from {}</p></body></html>\n",
            escape(&report.journal.display().to_string())
        ),
    );
    page
}

fn head(page: &mut String, report: &Report) {
    let class = match report.outcome {
        Ending::Committed => "good",
        Ending::Aborted | Ending::Refused | Ending::Rehearsed => "back",
        Ending::Unfinished | Ending::Undecided => "bad",
    };
    add(page, format_args!("<h1>Cutover of {}</h1>\n", escape(&report.database)));
    add(page, format_args!("<p class=\"verdict {class}\">{}</p>\n<table>\n", escape(&report.verdict())));
    let run = report.run.map(|run| run.to_string()).unwrap_or_default();
    let epoch = report.epoch.map_or("none opened".to_owned(), |epoch| epoch.to_string());
    let pause = report.pause_ms.map_or("not at all".to_owned(), |pause_ms| format!("{pause_ms:.1} ms"));
    let from = report.steps.first().map(|step| moment(step.at_us)).unwrap_or_default();
    for (name, value) in [
        ("From", format!("{} (PostgreSQL {})", report.source, report.source_version)),
        ("To", format!("{} (PostgreSQL {})", report.target, report.target_version)),
        ("Clients held for", pause),
        ("Began", from),
        ("Proxies", report.proxies.join(", ")),
        ("Run", run),
        ("Epoch", epoch),
        ("Begun by", report.by.clone()),
        ("Configuration", report.config.clone()),
        ("Log", report.log.as_ref().map(|log| log.words()).unwrap_or_default()),
    ] {
        add(page, format_args!("<tr><th>{name}</th><td>{}</td></tr>\n", escape(&value)));
    }
    page.push_str("</table>\n");
}

fn prediction(page: &mut String, report: &Report) {
    let Some(prediction) = &report.prediction else { return };
    let title = format!("A cutover would hold clients for about {:.0} ms", prediction.pause_ms);
    add(page, format_args!("<h2>{title}</h2>\n<table><tr><th>Part</th><th>ms</th><th>How it is known</th></tr>\n"));
    for part in &prediction.parts {
        let row = format_args!(
            "<tr><td>{}</td><td class=\"n\">{:.1}</td><td>{}</td></tr>\n",
            part.step,
            part.ms,
            escape(&part.known.to_string())
        );
        add(page, row);
    }
    page.push_str("</table>\n");
}

fn steps(page: &mut String, report: &Report) {
    page.push_str("<h2>Steps</h2>\n<table><tr><th>Step</th><th>ms</th><th>Outcome</th><th>Facts</th></tr>\n");
    for step in &report.steps {
        let (class, outcome) = match step.outcome {
            StepOutcome::Done => ("done", "done"),
            StepOutcome::Failed => ("failed", "failed"),
            StepOutcome::Undone => ("undone", "done, then taken back"),
            StepOutcome::BrokenOff => ("failed", "broken off"),
        };
        let error = step.error.as_deref().map(|error| format!("<br>{}", escape(error))).unwrap_or_default();
        add(
            page,
            format_args!(
                "<tr class=\"{class}\"><td>{}<br><span class=\"small\">{}</span></td><td class=\"n\">{:.1}</td><td>{outcome}{error}</td><td class=\"facts\">{}</td></tr>\n",
                step.name,
                step.name.purpose(),
                step.ms,
                facts(&step.facts)
            ),
        );
    }
    page.push_str("</table>\n");
}

fn members(page: &mut String, report: &Report) {
    if report.members.is_empty() {
        return;
    }
    page.push_str("<h2>Members</h2>\n<p class=\"small\">paused, switched, resumed: milliseconds from the first PAUSE to the answer; drain, shut and holds: as the member measured them</p>\n<table><tr>");
    for title in [
        "Member",
        "Configuration",
        "Paused",
        "Drain",
        "Switched",
        "Resumed",
        "Shut",
        "Clients held: paused, switched, resumed",
        "Half of the holds",
        "Longest hold",
        "",
    ] {
        add(page, format_args!("<th>{title}</th>"));
    }
    page.push_str("</tr>\n");
    for member in &report.members {
        let kind = if member.kind == Some(Kind::Pgbouncer) { "<br><span class=\"small\">PgBouncer</span>" } else { "" };
        let config = member.config.as_deref().unwrap_or("-");
        add(page, format_args!("<tr><td>{}{kind}</td><td><code>{}</code></td>", escape(&member.name), escape(config)));
        let held = &member.held;
        let clients = [held.paused, held.switched, held.resumed].map(count).join(", ");
        let moments = [member.paused_ms, member.drain_ms, member.switched_ms, member.resumed_ms, member.shut_ms];
        let cells = moments.map(length).into_iter().chain([clients, length(held.p50_ms), length(held.longest_ms)]);
        cells.for_each(|cell| add(page, format_args!("<td class=\"n\">{cell}</td>")));
        let not_read = member.not_read.as_ref().map(|why| format!("not read: {why}"));
        let words = member.switched_by.clone().into_iter().chain(not_read).collect::<Vec<_>>().join("; ");
        add(page, format_args!("<td>{}</td></tr>\n", escape(&words)));
    }
    page.push_str("</table>\n");
}

fn traffic(page: &mut String, report: &Report) {
    let Some(traffic) = &report.traffic else { return };
    page.push_str("<h2>Where traffic goes</h2>\n<table><tr><th>When</th><th>Member</th><th>Backend</th><th>Transactions</th><th>a second</th></tr>\n");
    for (when, window) in [("before the pause", &traffic.before), ("after RESUME", &traffic.after)] {
        let Some(window) = window else { continue };
        let of_members = window
            .transactions
            .iter()
            .flat_map(|(member, by_backend)| by_backend.iter().map(move |(backend, begun)| (member, backend, begun)));
        for (member, backend, begun) in of_members {
            let (member, backend) = (escape(member), escape(backend));
            let (ms, rate) = (window.ms, window.per_second(*begun));
            add(
                page,
                format_args!(
                    "<tr><td>{when}, {ms:.0} ms</td><td>{member}</td><td>{backend}</td><td class=\"n\">{begun}</td><td class=\"n\">{rate:.0}</td></tr>\n"
                ),
            );
        }
    }
    page.push_str("</table>\n");
    for (member, why) in &traffic.not_read {
        add(page, format_args!("<p class=\"small\">{}: not read: {}</p>\n", escape(member), escape(why)));
    }
}

fn lag(page: &mut String, report: &Report) {
    let Some(lag) = &report.lag else { return };
    add(
        page,
        format_args!("<h2>Replication lag</h2>\n<p>{}</p>\n{}\n", escape(&lag.to_string()), picture::lag(report, lag)),
    );
}

fn findings<'a>(page: &mut String, title: &str, findings: impl Iterator<Item = &'a Finding>) {
    let mut findings = findings.peekable();
    if findings.peek().is_none() {
        return;
    }
    add(
        page,
        format_args!("<h2>{title}</h2>\n<table><tr><th>Check</th><th>Object</th><th>Found</th><th>Fix</th></tr>\n"),
    );
    for finding in findings {
        let class = match finding.level {
            Level::Red => "red",
            Level::Yellow => "yellow",
            Level::Green => "green",
        };
        add(
            page,
            format_args!(
                "<tr class=\"{class}\"><td>{}</td><td><code>{}</code></td><td>{}</td><td>{}</td></tr>\n",
                escape(&finding.check),
                escape(&finding.object),
                escape(&finding.problem),
                escape(&finding.fix)
            ),
        );
    }
    page.push_str("</table>\n");
}

fn observations(page: &mut String, report: &Report) {
    if report.observations.is_empty() {
        return;
    }
    let zero_us = report.pause_us().map(|(from, _)| from).or(report.steps.first().map(|step| step.at_us)).unwrap_or(0);
    page.push_str("<h2>Seen on the way</h2>\n<details open><summary>ms since the pause began</summary>\n<table><tr><th>ms</th><th>What</th><th>Facts</th></tr>\n");
    for seen in &report.observations {
        let at_ms = (seen.at_us as f64 - zero_us as f64) / 1000.0;
        add(
            page,
            format_args!(
                "<tr><td class=\"n\">{at_ms:.1}</td><td>{}</td><td class=\"facts\">{}</td></tr>\n",
                escape(&seen.what),
                facts(&seen.facts)
            ),
        );
    }
    page.push_str("</table></details>\n");
}

fn budgets(page: &mut String, report: &Report) {
    page.push_str("<h2>Budgets</h2>\n<table><tr><th>Budget</th><th>ms</th></tr>\n");
    for (name, budget_ms) in &report.budgets_ms {
        add(page, format_args!("<tr><td>{}</td><td class=\"n\">{budget_ms}</td></tr>\n", escape(name)));
    }
    page.push_str("</table>\n");
}

fn facts(facts: &Facts) -> String {
    let lines = facts.0.iter().map(|(name, value)| {
        let value = value.as_str().map_or_else(|| plain(value), str::to_owned);
        format!("{}: {}", escape(name), escape(&value))
    });
    lines.collect::<Vec<_>>().join("<br>")
}

fn plain(value: &Value) -> String {
    match value {
        Value::Array(items) => items
            .iter()
            .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => value.to_string(),
    }
}

fn moment(at_us: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_micros(at_us);
    humantime::format_rfc3339_millis(at).to_string()
}

/// Text as it may stand between tags and in double-quoted attributes.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // Control characters have no place in HTML.
            control if control.is_control() && control != '\n' && control != '\t' => safe.push('\u{fffd}'),
            plain => safe.push(plain),
        }
    }
    safe
}

fn add(page: &mut String, text: std::fmt::Arguments<'_>) {
    // A String takes whatever is written to it.
    let _ = page.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::tests::{committed, fold};

    #[test]
    fn nothing_from_outside_becomes_markup() {
        let mut report = fold(committed());
        let evil = "<img src=x onerror=alert(1)>\"'&";
        report.findings.push(Finding::red(evil, evil, evil, evil));
        report.source_version = evil.to_owned();
        report.steps[2].error = Some(evil.to_owned());
        let page = page(&report, &Samples::default());
        assert!(!page.contains("<script") && !page.contains("<img"));
        assert!(page.contains("&lt;app&gt; &amp; &quot;co&quot;"));
        assert!(page.contains("a&lt;b"));
    }

    #[test]
    fn the_page_loads_nothing_from_anywhere() {
        let page = page(&fold(committed()), &Samples::default());
        for word in ["href=", "src=", "@import", "url("] {
            assert!(!page.contains(word), "{word}");
        }
        // The one address is the name of the SVG vocabulary, which nobody fetches.
        assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
        assert!(page.contains("<svg") && !page.contains("What to fix"));
    }

    proptest! {
        #[test]
        fn escaped_text_holds_no_markup(text in ".*") {
            let safe = escape(&text);
            prop_assert!(!safe.contains(['<', '>', '"', '\'']));
        }
    }
}
