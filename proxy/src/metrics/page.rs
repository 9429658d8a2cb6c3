//! The page that a scraper reads.
//!
//! Invariant: made anew for each scrape, so that what is gone is not shown, and nothing is kept that nobody reads.

use metrics::Label;
use metrics_exporter_prometheus::PrometheusBuilder;

use super::names::{Kind, METRICS, Metric};

/// One figure of one metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    metric: &'static Metric,
    labels: Vec<Label>,
    value: Value,
}

/// Counters are integers, gauges are not.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Value {
    Count(u64),
    Level(f64),
}

impl Reading {
    /// Of that metric, without labels, zero.
    #[must_use]
    pub fn new(metric: &'static Metric) -> Self {
        Self { metric, labels: Vec::new(), value: Value::Count(0) }
    }

    /// With one more label.
    #[must_use]
    pub fn label(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.labels.push(Label::new(name, value.into()));
        self
    }

    /// With this value of a counter.
    #[must_use]
    pub fn count(self, count: u64) -> Self {
        Self { value: Value::Count(count), ..self }
    }

    /// With this value of a gauge.
    #[must_use]
    pub fn level(self, level: f64) -> Self {
        Self { value: Value::Level(level), ..self }
    }

    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; above 2^53 its last digits do not matter")]
    fn publish(self) {
        let Self { metric, labels, value } = self;
        match (metric.kind, value) {
            (Kind::Counter, Value::Count(count)) => metrics::counter!(metric.name, labels).absolute(count),
            (Kind::Counter, Value::Level(level)) => metrics::counter!(metric.name, labels).absolute(level as u64),
            (Kind::Gauge, Value::Count(count)) => metrics::gauge!(metric.name, labels).set(count as f64),
            (Kind::Gauge, Value::Level(level)) => metrics::gauge!(metric.name, labels).set(level),
        }
    }
}

/// The page of these readings, in the text format of Prometheus.
#[must_use]
pub fn page(readings: Vec<Reading>) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::with_local_recorder(&recorder, || {
        for metric in METRICS {
            match metric.kind {
                Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
                Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            }
        }
        readings.into_iter().for_each(Reading::publish);
    });
    handle.render()
}
