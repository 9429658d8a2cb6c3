//! The run by member: when each proxy and each PgBouncer was paused, switched and resumed, and how long it held its clients.
//!
//! Invariant: pure. What a journal does not say is absent, never zero; moments are proxyctl's, lengths are the member's own.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::report::{PAUSE_SENT, Report, ms};

/// Who takes part: by member its `kind` and the digest of its `config`.
pub const MEMBERS: &str = "members";
/// By member: how many clients it held when everybody was paused.
pub const HELD: &str = "members_held";
/// By member: what it says of the pause that is over.
pub const TOLD: &str = "members_told";
/// Instead of a fact: why it is not there.
pub const NOT_READ: &str = "not_read";
/// More members than this are told on the page only: the report fits a screen.
const LINES_MAX: usize = 8;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One of ours.
    Proxy,
    /// A PgBouncer, by its keeper.
    Pgbouncer,
}

/// What a member did at a moment of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// It was paused and drained.
    Paused,
    /// It routes to the target.
    Switched,
    /// It has let its clients go.
    Resumed,
}

impl Moment {
    /// Each.
    pub const ALL: [Moment; 3] = [Moment::Paused, Moment::Switched, Moment::Resumed];

    /// The observation of it: by member the moment, microseconds since 1970.
    pub fn what(self) -> &'static str {
        match self {
            Moment::Paused => "members_paused",
            Moment::Switched => "members_switched",
            Moment::Resumed => "members_resumed",
        }
    }
}

/// One member's part in the run. Moments are milliseconds since the first PAUSE was sent.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Option<Kind>,
    /// A digest of its configuration.
    pub config: Option<String>,
    /// When it had said that it is paused and drained.
    pub paused_ms: Option<f64>,
    /// From its gate's shutting until no transaction was open.
    pub drain_ms: Option<f64>,
    /// When it had said that it routes to the target.
    pub switched_ms: Option<f64>,
    /// By what right: `decision`, or `followed` if it found the decision by itself.
    pub switched_by: Option<String>,
    /// When it had said that its clients go on.
    pub resumed_ms: Option<f64>,
    /// From its gate's shutting to its opening.
    pub shut_ms: Option<f64>,
    /// Clients that it held when everybody was paused, when it was switched, and when it let them go.
    pub held: Held,
    /// Why something of this is not there.
    pub not_read: Option<String>,
}

/// How a member held its clients.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Held {
    /// How many when everybody was paused.
    pub paused: Option<u64>,
    /// How many when it was switched.
    pub switched: Option<u64>,
    /// How many when it let them go.
    pub resumed: Option<u64>,
    /// Half of the transactions were held no longer than this.
    pub p50_ms: Option<f64>,
    /// The longest hold that a client felt there.
    pub longest_ms: Option<f64>,
}

impl Held {
    /// The most that it held at any of the moments that are known.
    pub fn most(&self) -> Option<u64> {
        [self.paused, self.switched, self.resumed].into_iter().flatten().max()
    }
}

/// Folds the observations; nobody in a journal that does not name members.
pub fn members(report: &Report) -> Vec<Member> {
    let mut members: BTreeMap<&str, Member> = BTreeMap::new();
    let zero_us = report.observations.iter().find(|seen| seen.what == PAUSE_SENT).map(|seen| seen.at_us);
    for seen in &report.observations {
        let moment = Moment::ALL.into_iter().find(|moment| moment.what() == seen.what);
        if moment.is_none() && ![MEMBERS, HELD, TOLD].contains(&seen.what.as_str()) {
            continue;
        }
        for (name, value) in &seen.facts.0 {
            let member = members.entry(name).or_insert_with(|| Member { name: name.clone(), ..Member::default() });
            match (moment, seen.what.as_str()) {
                (Some(moment), _) => member.at(moment, since(zero_us, value)),
                (None, MEMBERS) => member.introduced(value),
                (None, HELD) => member.held.paused = value.as_u64(),
                (None, _) => member.told(value),
            }
        }
    }
    members.into_values().collect()
}

fn since(zero_us: Option<u64>, at_us: &Value) -> Option<f64> {
    Some(ms(at_us.as_u64()?.saturating_sub(zero_us?)))
}

impl Member {
    fn at(&mut self, moment: Moment, at_ms: Option<f64>) {
        match moment {
            Moment::Paused => self.paused_ms = at_ms,
            Moment::Switched => self.switched_ms = at_ms,
            Moment::Resumed => self.resumed_ms = at_ms,
        }
    }

    fn introduced(&mut self, value: &Value) {
        self.kind = value.get("kind").and_then(|kind| Kind::deserialize(kind).ok());
        self.config = text(value, "config");
        self.missed(value);
    }

    fn told(&mut self, value: &Value) {
        let number = |key: &str| value.get(key)?.as_u64();
        self.drain_ms = number("drain_ms").map(|drain_ms| drain_ms as f64);
        self.shut_ms = number("pause_ms").map(|pause_ms| pause_ms as f64);
        self.switched_by = text(value, "how");
        self.held.switched = number("held_at_switch");
        self.held.resumed = number("held_clients");
        self.held.p50_ms = number("held_us_p50").map(ms);
        self.held.longest_ms = number("held_us_max").map(ms);
        self.missed(value);
    }

    fn missed(&mut self, value: &Value) {
        if let Some(why) = text(value, NOT_READ) {
            self.not_read.get_or_insert(why);
        }
    }
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).map(str::to_owned)
}

/// A length as it stands in a table.
pub fn length(ms: Option<f64>) -> String {
    ms.map_or("-".to_owned(), |ms| format!("{ms:.1}"))
}

/// A count as it stands in a table.
pub fn count(number: Option<u64>) -> String {
    number.map_or("-".to_owned(), |number| number.to_string())
}

/// The table of the text.
pub struct Table<'a>(pub &'a [Member]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        let wide = self.0.iter().map(|member| member.name.len()).max().unwrap_or(0).clamp(6, 30);
        let titles = ["paused", "drain", "switched", "resumed", "clients", "p50 held", "max held"];
        write!(f, "  {:<wide$}", "member")?;
        titles.iter().try_for_each(|title| write!(f, "{title:>10}"))?;
        writeln!(f, "  configuration (times: ms since the first PAUSE)")?;
        for member in self.0.iter().take(LINES_MAX) {
            let Member { name, paused_ms, drain_ms, switched_ms, resumed_ms, held, .. } = member;
            write!(f, "  {name:<wide$}")?;
            let cells = [length(*paused_ms), length(*drain_ms), length(*switched_ms), length(*resumed_ms)];
            let holds = [count(held.most()), length(held.p50_ms), length(held.longest_ms)];
            cells.iter().chain(&holds).try_for_each(|cell| write!(f, "{cell:>10}"))?;
            write!(f, "  {}", member.config.as_deref().unwrap_or("-"))?;
            let by_itself = member.switched_by.as_deref().filter(|how| *how != "decision");
            by_itself.iter().try_for_each(|how| write!(f, "   {how}"))?;
            member.not_read.iter().try_for_each(|why| write!(f, "   not read: {why}"))?;
            writeln!(f)?;
        }
        if self.0.len() > LINES_MAX {
            writeln!(f, "  and {} more: see the page", self.0.len() - LINES_MAX)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::event::{Event, Facts};
    use crate::report::tests::{committed, fold};

    fn seen(what: &str, facts: &[(&str, Value)]) -> Event {
        let facts = facts.iter().fold(Facts::new(), |facts, (name, value)| facts.with(name, value.clone()));
        Event::Observed { what: what.to_owned(), facts }
    }

    /// A run with what its members told, before its end.
    fn told(told: Vec<Event>) -> Report {
        let mut events = committed();
        let end = events.len() - 1;
        events.splice(end..end, told);
        fold(events)
    }

    #[test]
    fn a_member_has_its_moments_since_the_first_pause_and_its_own_lengths() {
        let zero_us = fold(committed()).pause_us().unwrap().0;
        let report = told(vec![
            seen(MEMBERS, &[("p1", json!({"kind": "proxy", "config": "ab"})), ("b", json!({"kind": "pgbouncer"}))]),
            seen(Moment::Paused.what(), &[("p1", (zero_us + 1_500).into()), ("b", (zero_us + 9_000).into())]),
            seen(HELD, &[("p1", 3.into())]),
            seen(Moment::Switched.what(), &[("p1", (zero_us + 20_000).into())]),
            seen(Moment::Resumed.what(), &[("p1", (zero_us + 30_000).into())]),
            seen(
                TOLD,
                &[(
                    "p1",
                    json!({"drain_ms": 1, "pause_ms": 29, "held_clients": 8, "holds": 9, "held_us_p50": 14_000,
                        "held_us_max": 28_500, "how": "followed", "held_at_switch": 7}),
                )],
            ),
        ]);
        let [b, p1] = &report.members[..] else { panic!("{:?}", report.members) };
        assert_eq!((b.kind, b.paused_ms, b.resumed_ms, b.held.most()), (Some(Kind::Pgbouncer), Some(9.0), None, None));
        assert_eq!((p1.paused_ms, p1.switched_ms, p1.resumed_ms), (Some(1.5), Some(20.0), Some(30.0)));
        assert_eq!((p1.drain_ms, p1.shut_ms, p1.config.as_deref()), (Some(1.0), Some(29.0), Some("ab")));
        assert_eq!((p1.held.most(), p1.held.p50_ms, p1.held.longest_ms), (Some(8), Some(14.0), Some(28.5)));
        let text = report.to_string();
        let line = text.lines().find(|line| line.trim_start().starts_with("p1 ")).unwrap();
        for word in ["1.5", "20.0", "30.0", "8", "14.0", "28.5", "ab", "followed"] {
            assert!(line.split_whitespace().any(|cell| cell == word), "{word}: {line}");
        }
        assert!(report.observations.iter().all(|seen| !seen.what.starts_with("members")), "told once");
        let page = crate::report::html::page(&report, &crate::report::samples::Samples::default());
        for cell in ["<td>p1</td>", ">1.5</td>", ">3, 7, 8</td>", ">28.5</td>", "<code>ab</code>", "followed"] {
            assert!(page.contains(cell), "{cell}");
        }
    }

    #[test]
    fn what_a_member_did_not_say_is_absent_and_why_is_told() {
        let why = json!({ NOT_READ: "no answer within 500ms" });
        let report = told(vec![seen(MEMBERS, &[("p1", json!({"kind": "proxy"}))]), seen(TOLD, &[("p1", why)])]);
        let member = &report.members[0];
        assert_eq!((member.drain_ms, member.held.most(), member.held.longest_ms), (None, None, None));
        assert!(report.to_string().contains("not read: no answer within 500ms"), "{report}");
    }

    #[test]
    fn a_journal_of_before_tells_of_no_members_and_no_traffic() {
        let json = serde_json::to_value(fold(committed())).unwrap();
        assert_eq!(json["members"], json!([]));
        for absent in ["traffic", "lag", "log"] {
            assert!(json[absent].is_null(), "{absent}");
        }
        assert!(!fold(committed()).to_string().contains("member"));
    }

    #[test]
    fn a_large_fleet_fits_a_screen() {
        let members: Vec<Member> = (0..40).map(|n| Member { name: format!("p{n}"), ..Member::default() }).collect();
        let text = Table(&members).to_string();
        assert_eq!(text.lines().count(), LINES_MAX + 2);
        assert!(text.contains("and 32 more"), "{text}");
    }
}
