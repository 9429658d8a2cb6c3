//! SHOW STATS, STATS_TOTALS, STATS_AVERAGES and TOTALS.
//!
//! Invariant: the same eleven figures in the same order in each; averages are those of [`crate::metrics::Book`].

use super::{Sheet, number, text};
use crate::metrics::{DatabaseTraffic, Traffic};

/// The eleven figures of PgBouncer 1.25, in its order.
fn figures(traffic: &Traffic) -> [u64; 11] {
    [
        traffic.server_assignment_count,
        traffic.xact_count,
        traffic.query_count,
        traffic.bytes_received,
        traffic.bytes_sent,
        traffic.xact_time_us,
        traffic.query_time_us,
        traffic.wait_time_us,
        traffic.client_parse_count,
        traffic.server_parse_count,
        traffic.bind_count,
    ]
}

pub(super) fn stats(databases: &[DatabaseTraffic]) -> Sheet {
    let names = [
        "database",
        "total_server_assignment_count",
        "total_xact_count",
        "total_query_count",
        "total_received",
        "total_sent",
        "total_xact_time",
        "total_query_time",
        "total_wait_time",
        "total_client_parse_count",
        "total_server_parse_count",
        "total_bind_count",
        "avg_server_assignment_count",
        "avg_xact_count",
        "avg_query_count",
        "avg_recv",
        "avg_sent",
        "avg_xact_time",
        "avg_query_time",
        "avg_wait_time",
        "avg_client_parse_count",
        "avg_server_parse_count",
        "avg_bind_count",
    ];
    let rows =
        databases.iter().map(|row| named(&row.database, figures(&row.total).into_iter().chain(figures(&row.average))));
    Sheet::new("sNNNNNNNNNNNNNNNNNNNNNN", &names, rows)
}

fn named(database: &str, figures: impl IntoIterator<Item = u64>) -> Vec<Option<String>> {
    std::iter::once(text(database)).chain(figures.into_iter().map(number)).collect()
}

pub(super) fn stats_totals(databases: &[DatabaseTraffic]) -> Sheet {
    let names = [
        "database",
        "server_assignment_count",
        "xact_count",
        "query_count",
        "bytes_received",
        "bytes_sent",
        "xact_time",
        "query_time",
        "wait_time",
        "client_parse_count",
        "server_parse_count",
        "bind_count",
    ];
    Sheet::new("sNNNNNNNNNNN", &names, databases.iter().map(|row| named(&row.database, figures(&row.total))))
}

pub(super) fn stats_averages(databases: &[DatabaseTraffic]) -> Sheet {
    let names = [
        "database",
        "server_assignment_count",
        "xact_count",
        "query_count",
        "bytes_received",
        "bytes_sent",
        "xact_time",
        "query_time",
        "wait_time",
        "avg_client_parse_count",
        "avg_server_parse_count",
        "avg_bind_count",
    ];
    Sheet::new("sNNNNNNNNNNN", &names, databases.iter().map(|row| named(&row.database, figures(&row.average))))
}

/// PgBouncer's internal names for the figures.
const TOTALS: [&str; 11] = [
    "server_assignment_count",
    "xact_count",
    "query_count",
    "client_bytes",
    "server_bytes",
    "xact_time",
    "query_time",
    "wait_time",
    "ps_client_parse_count",
    "ps_server_parse_count",
    "ps_bind_count",
];

pub(super) fn totals(databases: &[DatabaseTraffic]) -> Sheet {
    let (mut total, mut average) = (Traffic::default(), Traffic::default());
    let (mut xact_us, mut query_us) = (0_u128, 0_u128);
    for row in databases {
        total += row.total;
        average += row.average;
        // A mean of means is weighted by what each is the mean of.
        xact_us += u128::from(row.average.xact_time_us) * u128::from(row.average.xact_count);
        query_us += u128::from(row.average.query_time_us) * u128::from(row.average.query_count);
    }
    average.xact_time_us = mean(xact_us, average.xact_count);
    average.query_time_us = mean(query_us, average.query_count);
    let rows = |prefix: &'static str, traffic: &Traffic| {
        let named = TOTALS.into_iter().zip(figures(traffic));
        named.map(move |(name, figure)| vec![text(format!("{prefix}_{name}")), number(figure)])
    };
    Sheet::new("sN", &["name", "value"], rows("total", &total).chain(rows("avg", &average)))
}

fn mean(sum: u128, count: u64) -> u64 {
    u64::try_from(sum.checked_div(u128::from(count)).unwrap_or(0)).unwrap_or(u64::MAX)
}
