//! SHOW CLIENTS, SERVERS, SOCKETS and ACTIVE_SOCKETS: one row per connection.
//!
//! Invariant: a connection has one state here, in the words of the table that shows it.

use std::net::SocketAddr;
use std::time::SystemTime;

use super::{Sheet, count, flag, number, text};
use crate::console::admin::{Admin, ClientState, ServerState, SocketRow, SocketState};
use crate::message::Replication;

const SOCKETS: &[&str] = &[
    "type",
    "user",
    "database",
    "replication",
    "state",
    "addr",
    "port",
    "local_addr",
    "local_port",
    "connect_time",
    "request_time",
    "wait",
    "wait_us",
    "close_needed",
    "ptr",
    "link",
    "remote_pid",
    "tls",
    "application_name",
    "prepared_statements",
    "id",
    "recv_pos",
    "pkt_pos",
    "pkt_remain",
    "send_pos",
    "send_remain",
    "pkt_avail",
    "send_avail",
];
/// Of [`SOCKETS`] without the buffer figures.
const SOCKET_LETTERS: &str = "ssssssisiTTiiississii";
/// Of all of [`SOCKETS`].
const SOCKET_LETTERS_ALL: &str = "ssssssisiTTiiississiiiiiiiii";

pub(super) async fn all_sockets<A: Admin>(admin: &A) -> Vec<SocketRow> {
    let mut sockets = admin.clients().await;
    sockets.extend(admin.servers().await);
    sockets
}

pub(super) fn busy(mut sockets: Vec<SocketRow>) -> Vec<SocketRow> {
    sockets.retain(|socket| {
        !matches!(socket.state, SocketState::Client(ClientState::Idle) | SocketState::Server(ServerState::Idle))
    });
    sockets
}

pub(super) fn clients(clients: &[SocketRow]) -> Sheet {
    let word = |socket: &SocketRow| match socket.state {
        SocketState::Client(ClientState::Active) => Some("active"),
        SocketState::Client(ClientState::Idle) => Some("idle"),
        SocketState::Client(ClientState::Waiting) => Some("waiting"),
        SocketState::Client(ClientState::ActiveCancelReq) => Some("active_cancel_req"),
        SocketState::Client(ClientState::WaitingCancelReq) => Some("waiting_cancel_req"),
        SocketState::Login(_) | SocketState::Server(_) => None,
    };
    let rows = clients.iter().filter_map(|socket| word(socket).map(|word| socket_row("C", word, socket)));
    Sheet::new(SOCKET_LETTERS, SOCKETS, rows)
}

pub(super) fn servers(servers: &[SocketRow]) -> Sheet {
    let word = |socket: &SocketRow| match socket.state {
        SocketState::Server(ServerState::Active) => Some("active"),
        SocketState::Server(ServerState::Idle) => Some("idle"),
        SocketState::Server(ServerState::Used) => Some("used"),
        SocketState::Server(ServerState::Tested) => Some("tested"),
        SocketState::Server(ServerState::New) => Some("new"),
        SocketState::Server(ServerState::ActiveCancel) => Some("active_cancel"),
        SocketState::Server(ServerState::BeingCanceled) => Some("being_canceled"),
        SocketState::Login(_) | SocketState::Client(_) => None,
    };
    let rows = servers.iter().filter_map(|socket| word(socket).map(|word| socket_row("S", word, socket)));
    Sheet::new(SOCKET_LETTERS, SOCKETS, rows)
}

/// SHOW SOCKETS has its own words, and leaves cancel requests out.
pub(super) fn sockets(sockets: &[SocketRow]) -> Sheet {
    let words = |socket: &SocketRow| match socket.state {
        SocketState::Login(_) => Some(("C", "cl_login")),
        SocketState::Client(ClientState::Active | ClientState::Idle) => Some(("C", "cl_active")),
        SocketState::Client(ClientState::Waiting) => Some(("C", "cl_waiting")),
        SocketState::Client(ClientState::ActiveCancelReq | ClientState::WaitingCancelReq) => None,
        SocketState::Server(ServerState::Active) => Some(("S", "sv_active")),
        SocketState::Server(ServerState::Idle) => Some(("S", "sv_idle")),
        SocketState::Server(ServerState::Used) => Some(("S", "sv_used")),
        SocketState::Server(ServerState::Tested) => Some(("S", "sv_tested")),
        SocketState::Server(ServerState::New) => Some(("S", "sv_login")),
        SocketState::Server(ServerState::ActiveCancel | ServerState::BeingCanceled) => None,
    };
    let figures = SOCKET_LETTERS_ALL.len() - SOCKET_LETTERS.len();
    let rows = sockets.iter().filter_map(|socket| {
        let (role, word) = words(socket)?;
        let mut cells = socket_row(role, word, socket);
        // Buffers exist only while a batch is forwarded: their figures are zero whenever anybody looks.
        cells.extend(std::iter::repeat_n(number(0), figures));
        Some(cells)
    });
    Sheet::new(SOCKET_LETTERS_ALL, SOCKETS, rows)
}

fn socket_row(role: &str, state: &str, socket: &SocketRow) -> Vec<Option<String>> {
    let (addr, port) = address(socket.addr);
    let (local_addr, local_port) = address(socket.local_addr);
    vec![
        text(role),
        text(socket.user.as_deref().unwrap_or("(nouser)")),
        text(socket.database.as_deref().unwrap_or("(nodb)")),
        text(match socket.replication {
            Replication::No => "none",
            Replication::Physical => "physical",
            Replication::Database => "logical",
        }),
        text(state),
        addr,
        port,
        local_addr,
        local_port,
        moment(socket.connect_time),
        socket.request_time.and_then(moment),
        count(u32::try_from(socket.wait.as_secs()).unwrap_or(u32::MAX)),
        count(socket.wait.subsec_micros()),
        flag(socket.close_needed),
        pointer(socket.id),
        socket.link.map_or_else(|| text(""), pointer),
        number(socket.remote_pid),
        text(&socket.tls),
        text(&socket.application_name),
        count(socket.prepared_statements),
        // PgBouncer's type for it is int4; ids start at 1, so this wraps after two thousand million connections.
        number(socket.id & u64::from(i32::MAX.unsigned_abs())),
    ]
}

fn address(address: Option<SocketAddr>) -> (Option<String>, Option<String>) {
    match address {
        Some(address) => (number(address.ip()), number(address.port())),
        None => (text("unix"), number(0)),
    }
}

/// PgBouncer prints where a socket is in memory; what people use it for is to join `ptr` with `link`.
fn pointer(id: u64) -> Option<String> {
    text(format!("{id:#x}"))
}

/// `2026-08-05 12:00:00 UTC`.
fn moment(at: SystemTime) -> Option<String> {
    let rfc3339 = humantime::format_rfc3339_seconds(at).to_string();
    text(rfc3339.replace('T', " ").replace('Z', " UTC"))
}
