//! The shape of the code as a test: the order of the modules, the head and the length of files, names, sleeps.
//!
//! Invariant: every message says where, which rule, and how to mend it; every rule is shown to bite at the end of this file.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

/// Crates whose lib.rs lists the modules in the order of the layers.
const LAYERED: [&str; 5] = ["proxy/src", "proxy/api/src", "control/src", "model/src", "tests/src"];
/// Where Rust code of ours is.
const ROOTS: [&str; 4] = ["proxy", "control", "model", "tests"];
/// A file longer than this, tests not counted, hides more than one noun.
const LINES_MAX: usize = 600;
/// Names that say nothing about what is in the file.
const EMPTY_NAMES: [&str; 7] = ["utils", "util", "common", "shared", "helpers", "manager", "handler"];

struct Source {
    /// From the root of the repository.
    path: PathBuf,
    text: String,
}

impl Source {
    /// The part before the tests of the file; nothing, if all of it is tests.
    fn code(&self) -> &str {
        if self.path.components().skip(1).any(|part| ["tests", "tests.rs"].iter().any(|name| part.as_os_str() == *name))
        {
            return "";
        }
        // `mod tests;` has its tests in another file, and code may follow it.
        self.text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default()
    }

    /// Number and text of each line of these that is not a comment.
    fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
        text.lines()
            .enumerate()
            .map(|(at, line)| (at + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    fn complain(&self, line: usize, rule: &str) -> String {
        format!("{}:{line}: {rule}", self.path.display())
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    for start in ROOTS {
        collect(&root().join(start), &mut found).expect("the source tree is readable");
    }
    assert!(found.len() > 40, "only {} files: the walk has lost its way", found.len());
    found
}

fn collect(dir: &Path, found: &mut Vec<Source>) -> std::io::Result<()> {
    let entries = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    let mut entries: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir()
            && !["target", "node_modules", "corpus", "artifacts"].contains(&name.as_str())
            && !name.starts_with('.')
        {
            collect(&path, found)?;
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path)?;
            let path = path.strip_prefix(root()).map_or_else(|_| path.clone(), Path::to_owned);
            found.push(Source { path, text });
        }
    }
    Ok(())
}

fn expect_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// The modules that a lib.rs lists, highest first.
fn layers(lib: &str) -> Vec<&str> {
    let declared = Source::lines(lib).filter_map(|(_, line)| {
        let line = line.trim_start_matches("pub(crate) ").trim_start_matches("pub ");
        line.strip_prefix("mod ")?.strip_suffix(';')
    });
    declared.collect()
}

/// Uses of a module that stands higher in the list than the user, and groups, which hide such uses.
fn upward_uses(source: &Source, module: &str, layers: &[&str]) -> Vec<String> {
    let mut complaints = Vec::new();
    let rank = |name: &str| layers.iter().position(|layer| *layer == name);
    let Some(own) = rank(module) else { return complaints };
    for (number, line) in Source::lines(&source.text) {
        for after in line.split("crate::").skip(1) {
            let used: String = after.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
            if after.starts_with('{') || after.starts_with('*') {
                let rule = "a group hides what a module uses; write one `use crate::a::B;` a line";
                complaints.push(source.complain(number, rule));
            } else if rank(&used).is_some_and(|there| there < own) {
                let rule = format!(
                    "`{module}` uses `{used}`, which stands above it in lib.rs; pass the value as an argument, move the type \
                     down, or, if the layers really changed, move the line in lib.rs"
                );
                complaints.push(source.complain(number, &rule));
            }
        }
    }
    complaints
}

#[test]
fn a_module_uses_only_modules_below_it() {
    let all = sources();
    let mut complaints = Vec::new();
    for crate_src in LAYERED {
        let lib = fs::read_to_string(root().join(crate_src).join("lib.rs")).unwrap();
        let layers = layers(&lib);
        assert!(!layers.is_empty(), "{crate_src}/lib.rs lists no module");
        for source in &all {
            let Ok(inside) = source.path.strip_prefix(crate_src) else { continue };
            let first = inside.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned());
            let module = first.unwrap_or_default().trim_end_matches(".rs").to_owned();
            complaints.extend(upward_uses(source, &module, &layers));
        }
    }
    expect_none(&complaints);
}

fn headless(source: &Source) -> Vec<String> {
    let rule = "a file opens with its purpose, then its invariant: `//! Decides when … Invariant: …`";
    if source.text.starts_with("//! ") { Vec::new() } else { vec![source.complain(1, rule)] }
}

#[test]
fn a_file_opens_with_its_purpose() {
    expect_none(&sources().iter().flat_map(headless).collect::<Vec<_>>());
}

fn too_long(source: &Source) -> Vec<String> {
    let lines = source.code().lines().count();
    if lines <= LINES_MAX {
        return Vec::new();
    }
    vec![source.complain(
        lines,
        &format!("{lines} lines without tests, {LINES_MAX} at most; cut out the noun that hides here"),
    )]
}

#[test]
fn a_file_is_one_noun_long() {
    expect_none(&sources().iter().flat_map(too_long).collect::<Vec<_>>());
}

/// Sleeps in test code. `// reason:` on the line or one of the two above it lets one stand.
fn sleeps(source: &Source) -> Vec<String> {
    let tests_from = source.code().lines().count();
    let lines: Vec<_> = source.text.lines().collect();
    let calls = [concat!("thread::", "sleep("), concat!("time::", "sleep(")];
    let rule = "a test waits for a condition with a deadline; if only time will do, say why: `// reason: …`";
    let fixed =
        lines.iter().enumerate().skip(tests_from).filter(|(_, line)| calls.iter().any(|call| line.contains(call)));
    let bare =
        fixed.filter(|(at, _)| !lines[at.saturating_sub(2)..=*at].iter().any(|line| line.contains("// reason:")));
    bare.map(|(at, _)| source.complain(at + 1, rule)).collect()
}

#[test]
fn a_test_waits_for_conditions() {
    expect_none(&sources().iter().flat_map(sleeps).collect::<Vec<_>>());
}

fn nameless(source: &Source) -> Vec<String> {
    let parts = source.path.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    let empty = parts.filter(|part| EMPTY_NAMES.contains(&part.trim_end_matches(".rs")));
    let rule = |name| format!("`{name}` names no noun or verb of the domain; name the file after what it is");
    empty.map(|name| source.complain(1, &rule(name))).collect()
}

#[test]
fn a_file_is_named_after_what_it_is() {
    expect_none(&sources().iter().flat_map(nameless).collect::<Vec<_>>());
}

fn hollow(source: &Source) -> Vec<String> {
    let has_code =
        Source::lines(&source.text).any(|(_, line)| !line.trim().is_empty() && line.trim() != "fn main() {}");
    let rule = "a module without code promises what is not there; write it or remove it";
    if has_code { Vec::new() } else { vec![source.complain(1, rule)] }
}

#[test]
fn a_module_has_code() {
    expect_none(&sources().iter().flat_map(hollow).collect::<Vec<_>>());
}

/// What each rule says of a file with this text.
fn judged(path: &str, text: &str) -> Vec<String> {
    let source = Source { path: PathBuf::from(path), text: text.to_owned() };
    [headless(&source), too_long(&source), sleeps(&source), nameless(&source), hollow(&source)].concat()
}

#[test]
fn every_rule_bites() {
    assert!(judged("proxy/src/gate.rs", "//! Good.\nfn f() {}\n").is_empty());
    assert!(judged("proxy/src/gate.rs", "fn f() {}\n")[0].contains("opens with its purpose"));
    assert!(judged("proxy/src/gate.rs", &format!("//! Long.\n{}", "fn f() {}\n".repeat(601)))[0].contains("602 lines"));
    let tests = format!("//! Long tests.\nfn f() {{}}\n#[cfg(test)]\nmod tests {{\n{}}}\n", "fn f() {}\n".repeat(601));
    assert!(judged("proxy/src/gate.rs", &tests).is_empty());
    let split = tests.replace("mod tests {", "mod tests;");
    assert!(judged("proxy/src/gate.rs", &split)[0].contains("lines without tests"), "code after `mod tests;` counts");
    assert!(judged("proxy/src/gate/tests.rs", &split).is_empty());
    let nap = concat!("//! Nap.\nfn f() { std::thread::", "sleep(x); }\n");
    assert!(judged("tests/tests/e2e/nap.rs", nap)[0].starts_with("tests/tests/e2e/nap.rs:2: a test waits"));
    assert_eq!(judged("proxy/src/gate/tests.rs", nap).len(), 1);
    assert!(judged("proxy/src/nap.rs", nap).is_empty());
    assert!(judged("tests/tests/e2e/nap.rs", &nap.replace("fn", "// reason: a timer is under test\nfn")).is_empty());
    assert!(judged("proxy/src/session/utils.rs", "//! A bag.\nfn f() {}\n")[0].contains("names no noun"));
    assert!(judged("proxy/src/later.rs", "//! Later.\n")[0].contains("without code"));

    let order = layers("//! Doc.\npub mod server;\n// mod gone;\nmod gate;\npub(crate) mod route;\n");
    assert_eq!(order, ["server", "gate", "route"]);
    let uses = |text: &str| {
        let source = Source { path: PathBuf::from("proxy/src/gate.rs"), text: text.to_owned() };
        upward_uses(&source, "gate", &order)
    };
    assert!(uses("use crate::route::Route;\nuse crate::gate::Pass;\n// crate::server is above\n").is_empty());
    assert!(uses("fn f(s: &crate::server::Server) {}\n")[0].starts_with("proxy/src/gate.rs:1: `gate` uses `server`"));
    assert!(uses("\nuse crate::{route::Route};\n")[0].starts_with("proxy/src/gate.rs:2: a group"));
}
