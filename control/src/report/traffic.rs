//! Where transactions went before the pause and after RESUME, by member and backend.
//!
//! Invariant: pure. A count is the difference of two looks at one counter; one that went back belongs to a member that was
//! started anew, and is not told.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use crate::finding::Finding;
use crate::report::timeline::NOT_READ;
use crate::report::{Observation, Report};

/// A look before clients are held: by member [`BEGUN`].
pub const BEFORE: &str = "traffic_before";
/// A look after they were let go.
pub const AFTER: &str = "traffic_after";
/// By backend: transactions that the member has begun there since it was started.
pub const BEGUN: &str = "begun";

/// The shares of more members than this are told on the page only.
const SHARES_MAX: usize = 4;

/// What went where.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Traffic {
    /// Before clients were held; none if it was not looked at twice.
    pub before: Option<Window>,
    /// After they were let go.
    pub after: Option<Window>,
    /// Members that were not read, and why.
    pub not_read: BTreeMap<String, String>,
}

/// What was counted between two looks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Window {
    /// How far the looks are apart.
    pub ms: f64,
    /// Transactions by member and backend.
    pub transactions: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Window {
    /// Of two looks.
    fn of(first: &Observation, last: &Observation) -> Window {
        let mut transactions = BTreeMap::new();
        for (member, earlier) in &first.facts.0 {
            let Some(later) = last.facts.0.get(member).map(begun) else { continue };
            let grown = |(backend, count): (&String, &u64)| {
                Some((backend.clone(), count.checked_sub(*begun(earlier).get(backend)?)?))
            };
            let of_member: BTreeMap<String, u64> = later.iter().filter_map(grown).collect();
            if !of_member.is_empty() {
                transactions.insert(member.clone(), of_member);
            }
        }
        Window { ms: crate::report::ms(last.at_us.saturating_sub(first.at_us)), transactions }
    }

    /// By backend, all members together.
    pub fn totals(&self) -> BTreeMap<&str, u64> {
        let mut totals = BTreeMap::new();
        for (backend, count) in self.transactions.values().flatten() {
            *totals.entry(backend.as_str()).or_insert(0) += count;
        }
        totals
    }

    /// What each of a few members has sent there; nothing where that adds nothing.
    fn shares(&self, backend: &str) -> String {
        let of = |(member, by_backend): (&String, &BTreeMap<String, u64>)| {
            by_backend.get(backend).filter(|count| **count > 0).map(|count| format!("{member} {count}"))
        };
        let shares: Vec<String> = self.transactions.iter().filter_map(of).collect();
        let tells = self.transactions.len() > 1 && (1..=SHARES_MAX).contains(&shares.len());
        if tells { format!("; {}", shares.join(", ")) } else { String::new() }
    }

    /// So many a second.
    pub fn per_second(&self, count: u64) -> f64 {
        count as f64 * 1000.0 / self.ms.max(1.0)
    }
}

fn begun(of_member: &Value) -> BTreeMap<String, u64> {
    let by_backend = of_member.get(BEGUN).and_then(Value::as_object).into_iter().flatten();
    by_backend.filter_map(|(backend, count)| Some((backend.clone(), count.as_u64()?))).collect()
}

/// Folds the looks; none in a journal without any.
pub fn traffic(report: &Report) -> Option<Traffic> {
    let looks = |what: &'static str| report.observations.iter().filter(move |seen| seen.what == what);
    let window = |what: &'static str| {
        let (first, last) = (looks(what).next()?, looks(what).next_back()?);
        (last.at_us > first.at_us).then(|| Window::of(first, last))
    };
    let all = looks(BEFORE).chain(looks(AFTER));
    let not_read = all
        .flat_map(|look| &look.facts.0)
        .filter_map(|(member, value)| Some((member.clone(), value.get(NOT_READ)?.as_str()?.to_owned())));
    let traffic = Traffic { before: window(BEFORE), after: window(AFTER), not_read: not_read.collect() };
    (traffic != Traffic::default()).then_some(traffic)
}

/// Who still sends transactions elsewhere than to the server that serves by now.
pub fn astray(traffic: &Traffic, serving: &str) -> Vec<Finding> {
    let after = traffic.after.iter().flat_map(|after| &after.transactions);
    let strays =
        after.flat_map(|(member, by_backend)| by_backend.iter().map(move |(backend, count)| (member, backend, count)));
    let found = strays.filter(|(_, backend, count)| *backend != serving && **count > 0).map(|(member, backend, count)| {
        let problem = format!("{count} transactions went to {backend} after RESUME, not to {serving}");
        let fix = "see SHOW BACKENDS and SHOW SWITCHES there; the fence refuses writes on the side that lost, reads are stale";
        Finding::red("traffic", member, problem, fix)
    });
    found.collect()
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (when, window) in [("before", &self.before), ("after", &self.after)] {
            let Some(window) = window else { continue };
            let totals = window.totals();
            let totals = totals.iter().map(|(backend, count)| {
                let rate = window.per_second(*count);
                format!("{backend} {count} ({rate:.0}/s{})", window.shares(backend))
            });
            writeln!(f, "transactions {when}: {} in {:.0} ms", totals.collect::<Vec<_>>().join(", "), window.ms)?;
        }
        let missed = self.not_read.iter().map(|(member, why)| format!("{member} ({why})")).collect::<Vec<_>>();
        if missed.is_empty() { Ok(()) } else { writeln!(f, "traffic not read: {}", missed.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::event::{Event, Facts};
    use crate::finding::Level;
    use crate::report::tests::{committed, fold};

    fn look(what: &str, members: &[(&str, Value)]) -> Event {
        let facts = members.iter().fold(Facts::new(), |facts, (name, value)| facts.with(name, value.clone()));
        Event::Observed { what: what.to_owned(), facts }
    }

    fn counts(blue: u64, green: u64) -> Value {
        json!({ BEGUN: { "blue": blue, "green": green } })
    }

    fn looked(looks: Vec<Event>) -> Report {
        let mut events = committed();
        let end = events.len() - 1;
        events.splice(end..end, looks);
        fold(events)
    }

    #[test]
    fn what_went_where_is_the_difference_of_two_looks() {
        let report = looked(vec![
            look(BEFORE, &[("p1", counts(100, 7)), ("p2", counts(50, 0))]),
            look(BEFORE, &[("p1", counts(160, 7)), ("p2", counts(80, 0))]),
            look(AFTER, &[("p1", counts(165, 10)), ("p2", counts(90, 1))]),
            look(AFTER, &[("p1", counts(165, 40)), ("p2", counts(90, 31))]),
        ]);
        let traffic = report.traffic.clone().unwrap();
        let (before, after) = (traffic.before.clone().unwrap(), traffic.after.clone().unwrap());
        assert_eq!(before.totals(), BTreeMap::from([("blue", 90), ("green", 0)]));
        assert_eq!(after.totals(), BTreeMap::from([("blue", 0), ("green", 60)]));
        assert_eq!((before.ms, after.transactions["p2"]["green"]), (5.0, 30));
        assert!(report.findings.iter().all(|finding| finding.check != "traffic"));
        assert!(
            report.to_string().contains("transactions after: blue 0 (0/s), green 60 (12000/s; p1 30, p2 30) in 5 ms")
        );
    }

    #[test]
    fn whatever_still_goes_to_the_side_that_lost_is_red_by_member() {
        let looks = |what| vec![look(what, &[("p1", counts(5, 5)), ("p2", counts(9, 9))])];
        let mut after = looks(AFTER);
        after.push(look(AFTER, &[("p1", counts(5, 8)), ("p2", counts(11, 9))]));
        let report = looked(after);
        let strays: Vec<_> = report.findings.iter().filter(|finding| finding.check == "traffic").collect();
        assert_eq!(strays.len(), 1, "{strays:?}");
        assert_eq!((strays[0].level, strays[0].object.as_str()), (Level::Red, "p2"));
        assert!(strays[0].problem.contains("2 transactions went to blue"), "{:?}", strays[0]);
        assert!(report.to_string().contains("went to blue") && looked(looks(AFTER)).traffic.is_none());
    }

    #[test]
    fn a_member_that_was_started_anew_or_not_read_counts_for_nothing() {
        let report = looked(vec![
            look(AFTER, &[("p1", counts(100, 7)), ("p2", json!({ NOT_READ: "away" }))]),
            look(AFTER, &[("p1", counts(0, 9)), ("p2", counts(0, 3))]),
        ]);
        let traffic = report.traffic.clone().unwrap();
        assert_eq!(
            traffic.after.clone().unwrap().transactions,
            BTreeMap::from([("p1".to_owned(), BTreeMap::from([("green".to_owned(), 2)]))])
        );
        assert_eq!(traffic.not_read["p2"], "away");
        assert!(report.to_string().contains("traffic not read: p2 (away)"), "{report}");
    }
}
