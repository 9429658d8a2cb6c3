//! Waiting for the gate or for a server connection, as a client that is still there.
//!
//! Invariant: whoever waits can be cancelled, killed, and seen to hang up; no wait outlasts the hold budget or
//! `query_wait_timeout`.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use crate::client::{Order, State};
use crate::gate::{Pass, Wants};
use crate::relay::Read;
use crate::report::Report;
use crate::session::{Farewell, Session};

/// How an attended wait ended.
enum Attended<T> {
    /// With what was waited for.
    Event(T),
    /// The client has cancelled, and was told.
    Canceled,
    /// There is an errand to run; the wait goes on after it.
    Errand,
}

/// Why a wait is not simply waited out.
enum Absence {
    Canceled,
    Errand,
    Farewell(Farewell),
}

impl Session {
    /// Waits at the shut gate for such a pass; `None` when the statement was refused (cancelled, or held for too long) and the client
    /// goes on.
    pub(super) async fn held(&mut self, asked_at: Instant, wants: Wants) -> Result<Option<Pass>, Farewell> {
        self.client.enter(State::Held, Instant::now());
        let site = Arc::clone(&self.pool.site);
        let budget = site.config.load().general.hold_budget;
        let id = self.client.who.id;
        let client = Arc::clone(&self.client);
        let holds = site.holds.load_full();
        let enter = site.gate.enter(id, &client.turn, wants);
        let mut enter = Box::pin(tokio::time::timeout_at((asked_at + budget).into(), enter));
        let outcome = loop {
            match self.attended(&mut enter).await? {
                Attended::Event(outcome) => break Some(outcome),
                Attended::Canceled => break None,
                // It keeps its place at the gate meanwhile.
                Attended::Errand => Box::pin(self.run_errand()).await?,
            }
        };
        let held = asked_at.elapsed();
        site.events.held.observe(held);
        holds.observe(held);
        match outcome {
            Some(Ok(pass)) => Ok(Some(pass)),
            Some(Err(_)) => {
                site.events.holds_shed.count();
                self.refuse(Box::new(Report::held_too_long())).await?;
                Ok(None)
            }
            None => {
                site.events.holds_canceled.count();
                Ok(None)
            }
        }
    }

    /// Waits for a server connection; `None` when the statement was cancelled and the client goes on.
    pub(super) async fn waited<T>(&mut self, checkout: impl Future<Output = T>) -> Result<Option<T>, Farewell> {
        let mut checkout = Box::pin(checkout);
        // Nearly always there is a connection, and no wait.
        let at_once = std::future::poll_fn(|cx| Poll::Ready(checkout.as_mut().poll(cx))).await;
        if let Poll::Ready(outcome) = at_once {
            return Ok(Some(outcome));
        }
        self.client.enter(State::Waiting, Instant::now());
        loop {
            match self.attended(&mut checkout).await? {
                Attended::Event(outcome) => return Ok(Some(outcome)),
                Attended::Canceled => return Ok(None),
                Attended::Errand => Box::pin(self.run_errand()).await?,
            }
        }
    }

    /// Waits for `event` while the client is watched.
    async fn attended<T>(&mut self, event: impl Future<Output = T>) -> Result<Attended<T>, Farewell> {
        let mut event = std::pin::pin!(event);
        let outcome = std::future::poll_fn(|cx| {
            if let Poll::Ready(value) = event.as_mut().poll(cx) {
                return Poll::Ready(Ok(Attended::Event(value)));
            }
            self.poll_absence(cx).map(|absence| match absence {
                Absence::Canceled => Ok(Attended::Canceled),
                Absence::Errand => Ok(Attended::Errand),
                Absence::Farewell(farewell) => Err(farewell),
            })
        })
        .await?;
        if matches!(outcome, Attended::Canceled) {
            self.client.forget(Order::Cancel);
            self.refuse(Box::new(Report::query_canceled())).await?;
        }
        Ok(outcome)
    }

    /// Ready when the client cancels, hangs up, has to go, or has an errand.
    fn poll_absence(&mut self, cx: &mut Context<'_>) -> Poll<Absence> {
        match self.client.poll_order(cx, &[Order::Kill, Order::Leave, Order::Cancel, Order::Errand]) {
            Poll::Ready(Order::Cancel) => return Poll::Ready(Absence::Canceled),
            Poll::Ready(Order::Errand) => return Poll::Ready(Absence::Errand),
            Poll::Ready(Order::Kill | Order::Leave) => {
                return Poll::Ready(Absence::Farewell(Farewell::Refused(Box::new(Report::admin_shutdown()))));
            }
            Poll::Pending => {}
        }
        if let Err(farewell) = self.poll_gossip(cx) {
            return Poll::Ready(Absence::Farewell(farewell));
        }
        // Read on as far as the buffer goes: that is how a hang-up is seen, and all that a held client may pile up.
        let Some(up) = self.up.as_mut() else { return Poll::Pending };
        loop {
            match up.poll_read(&mut self.stream, cx) {
                Poll::Ready(Ok(Read::Some)) => {}
                Poll::Ready(Ok(Read::Full)) | Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(Read::End)) => {
                    return Poll::Ready(Absence::Farewell(Farewell::ClientGone(io::ErrorKind::UnexpectedEof.into())));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Absence::Farewell(Farewell::ClientGone(error))),
            }
        }
    }
}
