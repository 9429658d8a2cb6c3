//! What a report tells of a run beside its steps: each member's part in the pause, where traffic went, how late replication was.
//!
//! Invariant: facts are compared with each other, as whoever reads a report does; other tests' runs are what they are about.

use serde_json::Value as Json;

/// Under load a member that told nothing is a failure, and so is traffic to any other backend than this one before and that
/// one after.
pub(crate) fn tells(report: &Json, members: &[&str], before: &str, after: &str) {
    let told = report["members"].as_array().unwrap();
    assert_eq!(told.iter().map(|member| member["name"].as_str().unwrap()).collect::<Vec<_>>(), members, "{report:#}");
    for member in told {
        takes_part(report, member, before != after);
    }
    let number = |member: &Json, key: &str| member["held"][key].as_f64();
    assert!(told.iter().any(|member| number(member, "longest_ms").is_some_and(|ms| ms > 1.0)), "{told:#?}");
    for (when, backend) in [("before", before), ("after", after)] {
        goes_to(&report["traffic"][when], members, backend);
    }
    assert!(report["findings"].as_array().unwrap().iter().all(|found| found["check"] != "traffic"), "{report:#}");
    let (lag, log) = (&report["lag"], &report["log"]);
    assert!(lag["points"].as_array().unwrap().len() > 4 && lag["at_fence_ms"].as_f64().unwrap() > 0.0, "{lag}");
    assert!(lag["max_ms"].as_f64() >= lag["median_ms"].as_f64(), "{lag}");
    for position in ["fence", "sentinel", "replayed"] {
        assert!(log[position].as_str().unwrap().contains('/'), "{log}");
    }
}

/// A member's moments lie within the run's pause and in their order.
fn takes_part(report: &Json, member: &Json, moves: bool) {
    let ms = |key: &str| member[key].as_f64().unwrap_or_else(|| panic!("no {key}: {member:#}"));
    assert_eq!((&member["kind"], &member["not_read"]), (&"proxy".into(), &Json::Null), "{member:#}");
    assert_eq!(member["config"].as_str().unwrap().len(), 16, "{member:#}");
    let pause_ms = report["pause_ms"].as_f64().unwrap();
    // What a member tells is whole milliseconds.
    assert!(ms("drain_ms") <= ms("paused_ms") && ms("shut_ms") <= pause_ms, "{pause_ms}: {member:#}");
    assert!(0.0 < ms("paused_ms") && ms("paused_ms") < ms("resumed_ms") && ms("resumed_ms") <= pause_ms, "{member:#}");
    if moves {
        assert!(ms("paused_ms") < ms("switched_ms") && ms("switched_ms") < ms("resumed_ms"), "{member:#}");
        assert_eq!(member["switched_by"], "decision", "{member:#}");
    } else {
        assert!(member["switched_ms"].is_null() && member["switched_by"].is_null(), "{member:#}");
    }
}

fn goes_to(window: &Json, members: &[&str], backend: &str) {
    assert!(window["ms"].as_f64().unwrap() > 100.0, "{window}");
    for member in members {
        for (to, count) in window["transactions"][member].as_object().unwrap() {
            assert_eq!(count.as_u64().unwrap() > 0, to == backend, "{member} to {to}: {window}");
        }
    }
}
