//! The admin console: PgBouncer's commands and ours, on the PostgreSQL wire.
//!
//! Invariant: a command is answered once, to the connection that sent it; what it does, it does through [`Admin`].

mod admin;

pub use admin::{
    Admin, Census, ClientState, DatabaseRow, DnsRow, Forwards, LoginState, Peer, PoolRow, Refusal, ServerState,
    SettingRow, SocketRow, SocketState, UserRow, Visitor, Why,
};
