//! A client that always has many requests in flight: it never rests by itself.
//!
//! Each request is a whole write (Parse, Bind, Execute, Sync of an unnamed statement). Answers are timed to their first
//! byte.
//!
//! Invariant: each number `n` is sent once and noted once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio_postgres::Config;
use tokio_util::sync::CancellationToken;

use crate::errors::ClientError;
use crate::samples::{Kind, now_us};
use crate::wire::{Report, Wire};
use crate::writer::{Counters, ONE_STATEMENT, Record};

/// Between attempts to log in again.
const LOGIN_PAUSE: Duration = Duration::from_millis(50);

/// OIDs of int4 and int8, fixed in every PostgreSQL.
const PARAMETER_TYPES: [u32; 4] = [23, 20, 20, 20];

pub(crate) struct Pipeliner {
    login: Config,
    depth: usize,
    accounts: u32,
    n: i64,
    pub(crate) counters: Arc<Counters>,
    pub(crate) record: Record,
}

struct InFlight {
    n: i64,
    at_us: i64,
    sent: Instant,
    answered: bool,
    error: Option<Report>,
}

impl Pipeliner {
    pub(crate) fn new(login: Config, depth: usize, accounts: u32) -> Pipeliner {
        Pipeliner { login, depth, accounts, n: 0, counters: Arc::default(), record: Record::default() }
    }

    /// Runs until told to stop and everything in flight is answered.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> Record {
        while !stop.is_cancelled() {
            let mut in_flight = VecDeque::new();
            if let Err(error) = self.converse(&mut in_flight, &stop).await {
                self.record.notes.unknown.extend(in_flight.iter().map(|request| request.n));
                self.error(ClientError::because(self.record.notes.client, format!("pipelining: {error:#}")));
                tokio::time::sleep(LOGIN_PAUSE).await;
            }
        }
        self.record
    }

    async fn converse(&mut self, in_flight: &mut VecDeque<InFlight>, stop: &CancellationToken) -> Result<()> {
        let mut wire = self.connect().await?;
        let mut output = BytesMut::new();
        while !stop.is_cancelled() || !in_flight.is_empty() {
            output.clear();
            while in_flight.len() < self.depth && !stop.is_cancelled() {
                self.n += 1;
                in_flight.push_back(InFlight {
                    n: self.n,
                    at_us: now_us(),
                    sent: Instant::now(),
                    answered: false,
                    error: None,
                });
                self.request(self.n, &mut output)?;
            }
            wire.send(&output).await?;
            self.answer(wire.message().await?, in_flight)?;
        }
        Ok(())
    }

    async fn connect(&self) -> Result<Wire> {
        let port = *self.login.get_ports().first().context("a login without port")?;
        let user = self.login.get_user().context("a login without user")?;
        let database = self.login.get_dbname().context("a login without database")?;
        let password = String::from_utf8_lossy(self.login.get_password().unwrap_or_default());
        Ok(Wire::log_in(port, user, &password, database).await?.0)
    }

    fn request(&self, n: i64, output: &mut BytesMut) -> Result<()> {
        let who = self.record.notes.client;
        let aid = (i64::from(who) * 7919 + n * 104_729).rem_euclid(i64::from(self.accounts)) + 1;
        let values = [i64::from(who), n, aid, n % 199 - 99].map(|value| value.to_string());
        frontend::parse("", ONE_STATEMENT, PARAMETER_TYPES, output)?;
        let as_text = |value: &String, buffer: &mut BytesMut| {
            buffer.extend_from_slice(value.as_bytes());
            Ok(IsNull::No)
        };
        // Text format for all parameters and results.
        frontend::bind("", "", [0], &values, as_text, [0], output)
            .map_err(|_error| anyhow::anyhow!("the parameters of write {n} do not fit"))?;
        frontend::execute("", 0, output)?;
        frontend::sync(output);
        Ok(())
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "the driver's enum may grow; only errors and ends matter here")]
    fn answer(&mut self, message: Message, in_flight: &mut VecDeque<InFlight>) -> Result<()> {
        let request = in_flight.front_mut().context("an answer that nobody asked for")?;
        if !request.answered {
            request.answered = true;
            self.record.samples.add(request.at_us, request.sent.elapsed(), Kind::Write);
        }
        match message {
            Message::ErrorResponse(body) => request.error = Some(Report::of(&body)),
            Message::ReadyForQuery(_) => {
                if let Some(done) = in_flight.pop_front() {
                    self.note(done);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn note(&mut self, done: InFlight) {
        let notes = &mut self.record.notes;
        let Some(report) = done.error else {
            notes.acknowledged.push(done.n);
            self.counters.acknowledged.fetch_add(1, Ordering::Relaxed);
            self.counters.transactions.fetch_add(1, Ordering::Relaxed);
            return;
        };
        notes.refused.push(done.n);
        let client = notes.client;
        self.error(ClientError {
            at_us: now_us(),
            client,
            sqlstate: Some(report.sqlstate.clone()),
            text: format!("pipelining: {report}"),
        });
    }

    fn error(&mut self, error: ClientError) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        self.record.errors.push(error);
    }
}
