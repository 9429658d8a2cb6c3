//! Every figure that this process publishes: its name, its unit, and the counters and guards that move it.
//!
//! Invariant: the hot path touches only relaxed counters in its own worker's cache lines; sums, names and labels are made
//! when somebody reads. Nothing here is global.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

mod holds;
pub(crate) mod names;
mod page;

pub use holds::{Felt, Holds};
pub use names::{Kind, METRICS, Metric};
pub use page::{Reading, page};

/// One tally per column of PgBouncer's SHOW STATS, in its order.
macro_rules! traffic {
    ($($(#[$doc:meta])* $field:ident),+ $(,)?) => {
        /// What passed through, summed: counts, bytes and microseconds since the start.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Traffic { $($(#[$doc])* pub $field: u64),+ }

        impl AddAssign for Traffic {
            fn add_assign(&mut self, other: Self) {
                $(self.$field = self.$field.wrapping_add(other.$field);)+
            }
        }

        impl Traffic {
            /// What came in addition to `before`.
            #[must_use]
            pub fn since(&self, before: &Self) -> Self {
                Self { $($field: self.$field.saturating_sub(before.$field)),+ }
            }
        }

        /// One worker's part, alone in its cache lines (two of 64 bytes: the adjacent-line prefetcher fetches pairs).
        #[derive(Debug, Default)]
        #[repr(align(128))]
        struct Slot { $($field: AtomicU64),+ }

        impl Slot {
            fn read(&self) -> Traffic {
                Traffic { $($field: self.$field.load(Relaxed)),+ }
            }
        }
    };
}

traffic! {
    /// How often a client was given a server connection.
    server_assignment_count,
    /// Transactions that ended.
    xact_count,
    /// Queries that ended.
    query_count,
    /// Bytes from clients.
    bytes_received,
    /// Bytes to clients.
    bytes_sent,
    /// Microseconds in transactions.
    xact_time_us,
    /// Microseconds in queries.
    query_time_us,
    /// Microseconds that clients waited for a server connection.
    wait_time_us,
    /// Parse messages from clients.
    client_parse_count,
    /// Parse messages to servers.
    server_parse_count,
    /// Bind messages.
    bind_count,
    /// Logins.
    client_login_count,
}

impl Traffic {
    /// The averages over `elapsed` of PgBouncer's SHOW STATS: counts and bytes become rates per second, times become
    /// microseconds per transaction, per query, and (waiting) per second.
    #[must_use]
    pub fn averages(&self, elapsed: Duration) -> Self {
        let per_second = |sum: u64| rate(sum, elapsed);
        Self {
            server_assignment_count: per_second(self.server_assignment_count),
            xact_count: per_second(self.xact_count),
            query_count: per_second(self.query_count),
            bytes_received: per_second(self.bytes_received),
            bytes_sent: per_second(self.bytes_sent),
            xact_time_us: self.xact_time_us.checked_div(self.xact_count).unwrap_or(0),
            query_time_us: self.query_time_us.checked_div(self.query_count).unwrap_or(0),
            wait_time_us: per_second(self.wait_time_us),
            client_parse_count: per_second(self.client_parse_count),
            server_parse_count: per_second(self.server_parse_count),
            bind_count: per_second(self.bind_count),
            client_login_count: per_second(self.client_login_count),
        }
    }
}

fn rate(sum: u64, elapsed: Duration) -> u64 {
    let per_second = (u128::from(sum) * 1_000_000).checked_div(elapsed.as_micros()).unwrap_or(0);
    u64::try_from(per_second).unwrap_or(u64::MAX)
}

/// The traffic of one (database, user) pool, one slot per worker.
#[derive(Debug)]
pub struct Stats {
    slots: Box<[Slot]>,
}

impl Stats {
    fn new(workers: usize) -> Self {
        Self { slots: (0..workers.max(1)).map(|_| Slot::default()).collect() }
    }

    /// The pen of a session: writes into `worker`'s slot (any number; sessions that share a slot still count right).
    #[must_use]
    pub fn meter(self: &Arc<Self>, worker: usize) -> Meter {
        Meter { slot: worker % self.slots.len(), stats: Arc::clone(self) }
    }

    /// Summed over the workers. Not one moment's picture: each counter is right, their sum may mix two moments.
    #[must_use]
    pub fn read(&self) -> Traffic {
        self.slots.iter().fold(Traffic::default(), |mut sum, slot| {
            sum += slot.read();
            sum
        })
    }
}

/// What a session counts with. Cheap: each call is one relaxed addition, or two; no time is taken here.
#[derive(Debug, Clone)]
pub struct Meter {
    stats: Arc<Stats>,
    slot: usize,
}

impl Meter {
    fn slot(&self) -> &Slot {
        // `slot` is a remainder by the number of slots, of which there is at least one.
        &self.stats.slots[self.slot]
    }

    /// Bytes came from the client.
    pub fn received(&self, bytes: u64) {
        self.slot().bytes_received.fetch_add(bytes, Relaxed);
    }

    /// Bytes went to the client.
    pub fn sent(&self, bytes: u64) {
        self.slot().bytes_sent.fetch_add(bytes, Relaxed);
    }

    /// A transaction of that many microseconds ended.
    pub fn xact(&self, duration_us: u64) {
        self.slot().xact_count.fetch_add(1, Relaxed);
        self.slot().xact_time_us.fetch_add(duration_us, Relaxed);
    }

    /// So many queries ended, which took so many microseconds together. Called once per transaction.
    pub fn queries(&self, count: u64, duration_us: u64) {
        self.slot().query_count.fetch_add(count, Relaxed);
        self.slot().query_time_us.fetch_add(duration_us, Relaxed);
    }

    /// The client waited that many microseconds for a server connection.
    pub fn wait(&self, duration_us: u64) {
        self.slot().wait_time_us.fetch_add(duration_us, Relaxed);
    }

    /// The client was given a server connection.
    pub fn server_assignment(&self) {
        self.slot().server_assignment_count.fetch_add(1, Relaxed);
    }

    /// A client logged in.
    pub fn client_login(&self) {
        self.slot().client_login_count.fetch_add(1, Relaxed);
    }

    /// So many Parse messages came from the client and so many went to the server.
    pub fn parses(&self, from_client: u64, to_server: u64) {
        self.slot().client_parse_count.fetch_add(from_client, Relaxed);
        self.slot().server_parse_count.fetch_add(to_server, Relaxed);
    }

    /// So many Bind messages came from the client.
    pub fn binds(&self, count: u64) {
        self.slot().bind_count.fetch_add(count, Relaxed);
    }
}

/// All traffic by database and user, and the periods that averages are taken over.
#[derive(Debug)]
pub struct Book {
    workers: usize,
    pages: RwLock<Pages>,
}

#[derive(Debug)]
struct Pages {
    pools: HashMap<(String, String), Arc<Stats>>,
    /// What pools that are gone had counted: totals of a database never fall.
    gone: HashMap<String, Traffic>,
    /// The last two ends of a period, the older first: averages run from there, so over one to two periods.
    marks: [Mark; 2],
}

#[derive(Debug, Clone)]
struct Mark {
    at: Instant,
    totals: BTreeMap<String, Traffic>,
}

/// A row of SHOW STATS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseTraffic {
    /// The route name.
    pub database: String,
    /// Since the start.
    pub total: Traffic,
    /// Over the last period.
    pub average: Traffic,
}

impl Book {
    /// How often [`Book::end_period`] is to be called: PgBouncer's `stats_period`.
    pub const PERIOD: Duration = Duration::from_secs(60);

    /// Empty, for so many workers.
    #[must_use]
    pub fn new(workers: usize, now: Instant) -> Self {
        let mark = Mark { at: now, totals: BTreeMap::new() };
        let pages = Pages { pools: HashMap::new(), gone: HashMap::new(), marks: [mark.clone(), mark] };
        Self { workers, pages: RwLock::new(pages) }
    }

    /// The statistics of one pool; the same as long as anybody holds them. Once per login, not per transaction.
    #[must_use]
    pub fn pool(&self, database: &str, user: &str) -> Arc<Stats> {
        let key = (database.to_owned(), user.to_owned());
        if let Some(stats) = self.reader().pools.get(&key) {
            return Arc::clone(stats);
        }
        Arc::clone(self.writer().pools.entry(key).or_insert_with(|| Arc::new(Stats::new(self.workers))))
    }

    /// Ends a period of the averages, and folds pools that nobody holds any more.
    pub fn end_period(&self, now: Instant) {
        let mut pages = self.writer();
        pages.fold_the_gone();
        let mark = Mark { at: now, totals: pages.totals() };
        let [_, newer] = &mut pages.marks;
        let older = std::mem::replace(newer, mark);
        pages.marks[0] = older;
    }

    /// By database, in the order of their names.
    #[must_use]
    pub fn traffic(&self, now: Instant) -> Vec<DatabaseTraffic> {
        let pages = self.reader();
        let [older, _] = &pages.marks;
        let elapsed = now.saturating_duration_since(older.at);
        let row = |(database, total): (String, Traffic)| {
            let before = older.totals.get(&database).copied().unwrap_or_default();
            DatabaseTraffic { average: total.since(&before).averages(elapsed), database, total }
        };
        pages.totals().into_iter().map(row).collect()
    }

    // A panic elsewhere while the lock was held leaves at worst a pool uncounted; figures go on.
    fn reader(&self) -> RwLockReadGuard<'_, Pages> {
        self.pages.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writer(&self) -> RwLockWriteGuard<'_, Pages> {
        self.pages.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pages {
    fn totals(&self) -> BTreeMap<String, Traffic> {
        let mut totals: BTreeMap<String, Traffic> = BTreeMap::new();
        for (database, traffic) in &self.gone {
            *totals.entry(database.clone()).or_default() += *traffic;
        }
        for ((database, _), stats) in &self.pools {
            *totals.entry(database.clone()).or_default() += stats.read();
        }
        totals
    }

    fn fold_the_gone(&mut self) {
        let Self { pools, gone, .. } = self;
        pools.retain(|(database, _), stats| {
            // Held by the book alone, and the book is locked: nobody can be given it now.
            let kept = Arc::strong_count(stats) > 1;
            if !kept {
                *gone.entry(database.clone()).or_default() += stats.read();
            }
            kept
        });
    }
}

/// What happened to the process as a whole, for the exporter: one counter per kind of event.
#[derive(Debug, Default)]
pub struct Events {
    /// Logins that were refused.
    pub logins_refused: Counter,
    /// Clients that waited longer than `query_wait_timeout` for a server connection.
    pub query_wait_timeouts: Counter,
    /// Clients that were held longer than `hold_budget`.
    pub holds_shed: Counter,
    /// Clients that were held and cancelled.
    pub holds_canceled: Counter,
    /// Cancel requests sent on to a server or a peer.
    pub cancels_forwarded: Counter,
    /// Cancel requests of unknown keys.
    pub cancels_dropped: Counter,
    /// Server connections that could not be made.
    pub server_logins_failed: Counter,
    /// Server connections that broke while a client had them.
    pub servers_lost: Counter,
    /// Pauses whose lease ended.
    pub leases_ended: Counter,
    /// Switches that followed a decision the proxy found by itself.
    pub decisions_followed: Counter,
    /// Changes of a host name's address in use.
    pub names_moved: Counter,
    /// Route files that could not be written: the route is right now, and lost with the process.
    pub route_writes_failed: Counter,
    /// How long clients were held by a gate.
    pub held: Held,
}

impl Events {
    /// As the exporter prints them.
    #[must_use]
    pub fn readings(&self) -> Vec<Reading> {
        let counters = [
            (&names::LOGINS_REFUSED, &self.logins_refused),
            (&names::QUERY_WAIT_TIMEOUTS, &self.query_wait_timeouts),
            (&names::HOLDS_SHED, &self.holds_shed),
            (&names::HOLDS_CANCELED, &self.holds_canceled),
            (&names::CANCELS_FORWARDED, &self.cancels_forwarded),
            (&names::CANCELS_DROPPED, &self.cancels_dropped),
            (&names::SERVER_LOGINS_FAILED, &self.server_logins_failed),
            (&names::SERVERS_LOST, &self.servers_lost),
            (&names::LEASES_ENDED, &self.leases_ended),
            (&names::DECISIONS_FOLLOWED, &self.decisions_followed),
            (&names::NAMES_MOVED, &self.names_moved),
            (&names::ROUTE_WRITES_FAILED, &self.route_writes_failed),
        ];
        let readings = counters.into_iter().map(|(metric, counter)| Reading::new(metric).count(counter.read()));
        readings.chain(self.held.readings()).collect()
    }
}

/// How long clients were held: a histogram with fixed bounds, so that nothing grows between scrapes.
#[derive(Debug, Default)]
pub struct Held {
    buckets: [Counter; HELD_BOUNDS_US.len()],
    count: Counter,
    sum_us: Counter,
}

/// From what nobody notices (5 ms) over the promise (250 ms) to the hold budget (15 s) and beyond, in microseconds.
const HELD_BOUNDS_US: [u64; 10] =
    [5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 5_000_000, 15_000_000];

impl Held {
    /// A client was held for so long.
    pub fn observe(&self, held: Duration) {
        let held_us = u64::try_from(held.as_micros()).unwrap_or(u64::MAX);
        if let Some(at) = HELD_BOUNDS_US.iter().position(|bound| held_us <= *bound) {
            self.buckets[at].count();
        }
        self.count.count();
        self.sum_us.add(held_us);
    }

    fn readings(&self) -> Vec<Reading> {
        let mut readings = Vec::with_capacity(HELD_BOUNDS_US.len() + 3);
        // The count first: a bucket read later can only be larger, never smaller than what it was when counted.
        let all = self.count.read();
        let mut up_to = 0;
        for (bound, bucket) in HELD_BOUNDS_US.iter().zip(&self.buckets) {
            up_to += bucket.read();
            let reading = Reading::new(&names::HELD_BUCKET).label("le", bound.to_string());
            readings.push(reading.count(up_to.min(all)));
        }
        readings.push(Reading::new(&names::HELD_BUCKET).label("le", "+Inf").count(all));
        readings.push(Reading::new(&names::HELD_COUNT).count(all));
        readings.push(Reading::new(&names::HELD_SUM).count(self.sum_us.read()));
        readings
    }
}

/// A number that rises and falls with what exists.
#[derive(Debug, Clone, Default)]
pub struct Gauge(Arc<AtomicI64>);

impl Gauge {
    /// One more, until the guard is dropped.
    #[must_use = "the gauge falls when this is dropped"]
    pub fn enter(&self) -> Present {
        self.0.fetch_add(1, Relaxed);
        Present(Arc::clone(&self.0))
    }

    /// How many there are.
    #[must_use]
    pub fn read(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// One of those that a [`Gauge`] counts.
#[derive(Debug)]
pub struct Present(Arc<AtomicI64>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A number that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn count(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Relaxed);
    }

    /// How many there were.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn later(from: Instant, seconds: u64) -> Instant {
        from + Duration::from_secs(seconds)
    }

    #[test]
    fn traffic_is_the_sum_over_workers_and_users() {
        let now = Instant::now();
        let book = Book::new(2, now);
        for (worker, user) in [(0, "alice"), (1, "alice"), (2, "alice"), (1, "bob")] {
            let meter = book.pool("app", user).meter(worker);
            meter.received(10);
            meter.sent(20);
            meter.xact(300);
            meter.queries(2, 250);
            meter.wait(7);
            meter.server_assignment();
            meter.client_login();
            meter.parses(3, 1);
            meter.binds(4);
        }
        let traffic = book.traffic(later(now, 2));
        let expected = Traffic {
            server_assignment_count: 4,
            xact_count: 4,
            query_count: 8,
            bytes_received: 40,
            bytes_sent: 80,
            xact_time_us: 1200,
            query_time_us: 1000,
            wait_time_us: 28,
            client_parse_count: 12,
            server_parse_count: 4,
            bind_count: 16,
            client_login_count: 4,
        };
        assert_eq!(traffic.len(), 1);
        assert_eq!(traffic[0].total, expected);
        let average = traffic[0].average;
        assert_eq!((average.xact_count, average.query_count, average.bytes_received), (2, 4, 20), "per second");
        assert_eq!((average.xact_time_us, average.query_time_us, average.wait_time_us), (300, 125, 14));
    }

    #[test]
    fn averages_forget_what_is_older_than_two_periods() {
        let now = Instant::now();
        let book = Book::new(1, now);
        let meter = book.pool("app", "alice").meter(0);
        (0..600).for_each(|_| meter.xact(1));
        book.end_period(later(now, 60));
        assert_eq!(book.traffic(later(now, 60))[0].average.xact_count, 10);
        book.end_period(later(now, 120));
        let rows = book.traffic(later(now, 121));
        assert_eq!((rows[0].average.xact_count, rows[0].total.xact_count), (0, 600));
    }

    #[test]
    fn totals_keep_what_pools_counted_that_are_gone() {
        let now = Instant::now();
        let book = Book::new(1, now);
        book.pool("app", "alice").meter(0).received(5);
        let kept = book.pool("app", "bob");
        book.end_period(later(now, 60));
        assert_eq!(book.reader().pools.len(), 1, "nobody holds alice's");
        kept.meter(0).received(2);
        assert_eq!(book.traffic(later(now, 61))[0].total.bytes_received, 7);
        assert!(Arc::ptr_eq(&kept, &book.pool("app", "bob")));
    }

    #[test]
    fn a_slot_is_alone_in_its_cache_lines() {
        assert_eq!((size_of::<Slot>(), align_of::<Slot>()), (128, 128));
        assert!(size_of::<Meter>() <= 16);
    }

    #[test]
    fn a_gauge_falls_with_its_guards() {
        let gauge = Gauge::default();
        let (first, second) = (gauge.enter(), gauge.enter());
        assert_eq!(gauge.read(), 2);
        drop(first);
        assert_eq!(gauge.read(), 1);
        drop(second);
        assert_eq!(gauge.read(), 0);
    }

    #[test]
    fn holds_are_counted_up_to_each_bound() {
        let events = Events::default();
        for millis in [1, 5, 40, 20_000] {
            events.held.observe(Duration::from_millis(millis));
        }
        events.leases_ended.count();
        let page = page(events.readings());
        for line in [
            "pgcutover_held_microseconds_bucket{le=\"5000\"} 2",
            "pgcutover_held_microseconds_bucket{le=\"50000\"} 3",
            "pgcutover_held_microseconds_bucket{le=\"15000000\"} 3",
            "pgcutover_held_microseconds_bucket{le=\"+Inf\"} 4",
            "pgcutover_held_microseconds_count 4",
            "pgcutover_held_microseconds_sum 20046000",
            "pgcutover_leases_ended_total 1",
            "# HELP pgcutover_leases_ended_total Pauses whose lease ended.",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }

    #[test]
    fn names_are_unique_and_say_what_they_count() {
        for (at, metric) in METRICS.iter().enumerate() {
            assert!(METRICS[..at].iter().all(|other| other.name != metric.name), "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
            let is_part = metric.name.contains("_held_microseconds_");
            assert_eq!(metric.name.ends_with("_total") || is_part, metric.kind == Kind::Counter, "{}", metric.name);
        }
    }
}
