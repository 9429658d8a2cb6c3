//! Every transition of the model names the code that does it, and that code is there.
//!
//! Invariant: a function of the product that is renamed or gone makes this red; "in nothing" needs a reason.

use std::fs;
use std::path::Path;

/// Where transitions are declared: file and enum.
const DECLARED: [(&str, &str); 4] =
    [("step.rs", "ProxyVerb"), ("step.rs", "ControllerVerb"), ("step.rs", "WriterVerb"), ("state.rs", "Sent")];

/// A variant, and what its documentation says from the word "In" on.
fn variants(text: &str, name: &str) -> Vec<(String, Option<String>)> {
    let (_, rest) = text.split_once(&format!("pub enum {name} {{")).expect("the enum is there");
    let (body, _) = rest.split_once("\n}").expect("an enum ends");
    let mut found = Vec::new();
    let mut place: Option<String> = None;
    for line in body.lines().map(str::trim) {
        match (line.strip_prefix("///").map(str::trim), &mut place) {
            (Some(doc), _) if doc.starts_with("In ") => place = Some(doc.to_owned()),
            (Some(doc), Some(place)) => *place = format!("{place} {doc}"),
            (Some(_), None) => {}
            (None, _) if line.is_empty() => {}
            (None, _) => found.push((line.trim_end_matches(',').to_owned(), place.take())),
        }
    }
    found
}

/// What is wrong with one place: "In `path`: name, name; `path`: name."
fn complaints(place: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let place = place.trim_start_matches("In ").trim_end_matches('.');
    if let Some(reason) = place.strip_prefix("nothing") {
        return if reason.len() > 10 { Vec::new() } else { vec!["no reason".to_owned()] };
    }
    let mut found = Vec::new();
    for part in place.split("; ") {
        let Some((path, names)) = part.strip_prefix('`').and_then(|part| part.split_once("`: ")) else {
            found.push(format!("'{part}' is no place"));
            continue;
        };
        let Some(text) = read(path) else {
            found.push(format!("there is no {path}"));
            continue;
        };
        // What leads up to `, for …` are names.
        let names = names.split(", ").take_while(|name| !name.starts_with("for "));
        let gone = names.filter(|name| {
            let ways = [format!("fn {name}("), format!("fn {name}<"), format!("FUNCTION pgcutover.{name}(")];
            !ways.iter().any(|way| text.contains(way))
        });
        found.extend(gone.map(|name| format!("{path} has no {name}")));
    }
    found
}

fn product(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).ok()
}

#[test]
fn every_transition_names_code_that_is_there() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (file, name) in DECLARED {
        let text = product(&format!("model/src/{file}")).expect("the model's source");
        for (variant, place) in variants(&text, name) {
            seen += 1;
            match place {
                None => wrong.push(format!("{name}::{variant} does not say where the product does it")),
                Some(place) => wrong
                    .extend(complaints(&place, product).into_iter().map(|what| format!("{name}::{variant}: {what}"))),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(seen, 9 + 10 + 3 + 10, "a transition was added: does the search take it?");
}

#[test]
fn what_is_not_there_is_told() {
    let read =
        |path: &str| (path == "a.rs").then(|| "fn one() {} fn two<T>() {} CREATE FUNCTION pgcutover.three(".to_owned());
    assert!(complaints("In `a.rs`: one, two, three.", read).is_empty());
    assert!(complaints("In `a.rs`: one, for what passes.", read).is_empty());
    assert_eq!(complaints("In `a.rs`: one, on; `b.rs`: one.", read), ["a.rs has no on", "there is no b.rs"]);
    assert_eq!(complaints("In nothing.", read), ["no reason"]);
    assert!(complaints("In nothing: kill -9 does it.", read).is_empty());
    assert_eq!(complaints("In a.rs, one", read).len(), 1);
    let text = "pub enum E {\n    /// It does.\n    ///\n    /// In `a.rs`: one;\n    /// `b.rs`: two.\n    A(u8),\n    /// Silent.\n    B,\n}\n";
    assert_eq!(
        variants(text, "E"),
        [("A(u8)".to_owned(), Some("In `a.rs`: one; `b.rs`: two.".to_owned())), ("B".to_owned(), None)]
    );
}
