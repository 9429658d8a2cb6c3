//! A TCP relay that breaks on order: between a proxy and a server, or between proxyctl and a proxy.
//!
//! Invariant: without a fault it passes every byte on unchanged and in order; a fault changes no byte either, it only
//! withholds, delays or cuts.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What happens to the bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// They pass.
    #[default]
    Pass,
    /// They wait until the fault ends, as on a network that drops packets: nobody gets an error.
    Hold,
    /// They pass so much later.
    Delay(Duration),
}

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From those who connect to the upstream.
    Up,
    /// From the upstream to those who connected.
    Down,
}

/// What happens to new connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Door {
    #[default]
    Open,
    /// They are accepted and reset at once.
    Closed,
}

/// What the test has ordered.
#[derive(Clone, Debug, Default)]
struct Orders {
    up: Fault,
    down: Fault,
    door: Door,
    /// Every connection that lives is cut when it changes.
    generation: u64,
    cut: Cut,
}

impl Orders {
    fn of(&self, direction: Direction) -> Fault {
        match direction {
            Direction::Up => self.up,
            Direction::Down => self.down,
        }
    }
}

/// How connections are ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cut {
    /// FIN: an orderly close in the middle of anything.
    #[default]
    Close,
    /// RST: a machine that forgot the connection.
    Reset,
}

/// A relay with faults; dropping it cuts everything.
#[derive(Debug)]
pub struct FaultProxy {
    port: u16,
    orders: watch::Sender<Orders>,
    end: CancellationToken,
}

impl FaultProxy {
    /// Listens on a free port for `upstream` on this machine.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(upstream: u16) -> Result<FaultProxy> {
        FaultProxy::at(SocketAddr::from(([127, 0, 0, 1], 0)), upstream).await
    }

    /// Listens there for `upstream` on this machine: a second address of a name.
    ///
    /// # Errors
    /// The address is in use.
    pub async fn at(address: SocketAddr, upstream: u16) -> Result<FaultProxy> {
        let listener = TcpListener::bind(address).await.context("a port for the fault proxy")?;
        let port = listener.local_addr()?.port();
        let (orders, heard) = watch::channel(Orders::default());
        let end = CancellationToken::new();
        tokio::spawn(end.clone().run_until_cancelled_owned(accept(listener, upstream, heard)));
        Ok(FaultProxy { port, orders, end })
    }

    /// Where to connect.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets a fault, for the connections that live and for new ones.
    pub fn set(&self, direction: Direction, fault: Fault) {
        self.orders.send_modify(|orders| match direction {
            Direction::Up => orders.up = fault,
            Direction::Down => orders.down = fault,
        });
    }

    /// Sets a fault for both directions.
    pub fn set_both(&self, fault: Fault) {
        self.set(Direction::Up, fault);
        self.set(Direction::Down, fault);
    }

    /// Ends all connections that live.
    pub fn cut(&self, how: Cut) {
        self.orders.send_modify(|orders| {
            orders.generation += 1;
            orders.cut = how;
        });
    }

    /// Ends all connections and resets each new one, as a machine without that server does, until
    /// [`FaultProxy::reopen`].
    pub fn shut(&self) {
        self.orders.send_modify(|orders| orders.door = Door::Closed);
        self.cut(Cut::Reset);
    }

    /// Ends [`FaultProxy::shut`].
    pub fn reopen(&self) {
        self.orders.send_modify(|orders| orders.door = Door::Open);
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.cut(Cut::Reset);
        self.end.cancel();
    }
}

async fn accept(listener: TcpListener, upstream: u16, orders: watch::Receiver<Orders>) {
    // Ends when its fault proxy is dropped.
    while let Ok((client, _)) = listener.accept().await {
        if orders.borrow().door == Door::Closed {
            let _ = client.set_zero_linger();
            continue;
        }
        tokio::spawn(relay(client, upstream, orders.clone()));
    }
}

async fn relay(mut client: TcpStream, upstream: u16, orders: watch::Receiver<Orders>) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", upstream)).await else {
        // Who can't reach the upstream gets what a closed port would give.
        let _ = client.set_zero_linger();
        return;
    };
    // Without the delay of Nagle's algorithm: the relay shall cost as little as it can.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let cut = {
        let ((client_read, client_write), (server_read, server_write)) = (client.split(), server.split());
        tokio::select! {
            cut = ordered_cut(orders.clone()) => Some(cut),
            _ = async {
                tokio::join!(
                    pass(client_read, server_write, orders.clone(), Direction::Up),
                    pass(server_read, client_write, orders.clone(), Direction::Down),
                )
            } => None,
        }
    };
    if cut == Some(Cut::Reset) {
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

/// Ends when a cut is ordered, or when the fault proxy is gone.
async fn ordered_cut(mut orders: watch::Receiver<Orders>) -> Cut {
    let generation = orders.borrow().generation;
    let _ = orders.wait_for(|now| now.generation != generation).await;
    orders.borrow().cut
}

/// Carries one direction to its end. Bytes are read on while they wait, up to a bound, as a network would take them.
async fn pass(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut orders: watch::Receiver<Orders>,
    direction: Direction,
) {
    const CHUNKS: usize = 64;
    let (sender, mut receiver) = mpsc::channel::<(Instant, Bytes)>(CHUNKS);
    let arrivals = orders.clone();
    let reading = async move {
        let mut buffer = BytesMut::new();
        while from.read_buf(&mut buffer).await.is_ok_and(|n| n > 0) {
            let due = Instant::now() + delay(fault(&arrivals, direction));
            if sender.send((due, buffer.split().freeze())).await.is_err() {
                break;
            }
        }
    };
    let writing = async move {
        while let Some((due, chunk)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            // Ended by the test, which takes the fault away or the proxy down.
            let _ = orders.wait_for(|now| now.of(direction) != Fault::Hold).await;
            if to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

fn fault(orders: &watch::Receiver<Orders>, direction: Direction) -> Fault {
    orders.borrow().of(direction)
}

fn delay(fault: Fault) -> Duration {
    match fault {
        Fault::Delay(time) => time,
        Fault::Pass | Fault::Hold => Duration::ZERO,
    }
}
