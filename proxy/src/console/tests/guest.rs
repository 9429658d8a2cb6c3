//! A visitor's end of a console's stream.
//!
//! Invariant: reads every byte itself, so that what a driver would forgive is seen.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::DEADLINE;
use super::pretended::Pretended;
use crate::console::{Authority, Visit, Visitor, serve};
use crate::frame;
use crate::message::{self, CancelKey};

/// What a console sent in answer to one query.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Name, type and size.
    pub(super) columns: Vec<(String, u32, i16)>,
    pub(super) rows: Vec<Vec<Option<String>>>,
    pub(super) tag: Option<String>,
    /// Fields of the ErrorResponse by code.
    pub(super) error: Option<BTreeMap<char, String>>,
    pub(super) notice: Option<BTreeMap<char, String>>,
    /// Tags of the messages in order.
    pub(super) tags: String,
}

impl Heard {
    pub(super) fn column(&self, name: &str) -> (u32, Vec<Option<&str>>) {
        let at = self.columns.iter().position(|(column, ..)| column == name);
        let at = at.unwrap_or_else(|| panic!("no column {name} in {:?}", self.columns));
        (self.columns[at].1, self.rows.iter().map(|row| row[at].as_deref()).collect())
    }

    pub(super) fn error(&self, code: char) -> &str {
        self.error.as_ref().and_then(|fields| fields.get(&code)).map_or("", String::as_str)
    }
}

/// A visitor's end of the stream.
pub(super) struct Guest {
    pub(super) stream: DuplexStream,
    pub(super) inbox: BytesMut,
    pub(super) cancels: Arc<Notify>,
    pub(super) closing: CancellationToken,
    pub(super) served: JoinHandle<io::Result<()>>,
}

/// Enters as an admin, past the welcome.
pub(super) async fn enter(proxy: &Arc<Pretended>) -> Guest {
    enter_as(proxy, Authority::Admin).await.0
}

pub(super) async fn enter_as(proxy: &Arc<Pretended>, authority: Authority) -> (Guest, Vec<(String, String)>) {
    let (ours, theirs) = tokio::io::duplex(4096);
    let visit = Visit {
        visitor: Visitor { user: "admin".to_owned(), addr: Some(SocketAddr::from(([127, 0, 0, 1], 9))) },
        authority,
        key: CancelKey { pid: 5, secret: Box::new([1, 2, 3, 4]) },
        cancels: Arc::new(Notify::new()),
        closing: CancellationToken::new(),
    };
    let (cancels, closing) = (Arc::clone(&visit.cancels), visit.closing.clone());
    let proxy = Arc::clone(proxy);
    let served = tokio::spawn(async move { serve(theirs, &visit, &*proxy).await });
    let mut guest = Guest { stream: ours, inbox: BytesMut::new(), cancels, closing, served };
    let mut parameters = Vec::new();
    loop {
        let (tag, body) = guest.message().await.expect("the welcome");
        match tag {
            b'S' => {
                let (name, value) = message::parameter_status(&body).unwrap();
                parameters.push((String::from_utf8_lossy(name).into(), String::from_utf8_lossy(value).into()));
            }
            b'K' => assert_eq!(message::backend_key_data(&body).unwrap().pid, 5),
            other => {
                assert_eq!(other, b'Z');
                return (guest, parameters);
            }
        }
    }
}

impl Guest {
    pub(super) async fn message(&mut self) -> Option<(u8, BytesMut)> {
        let reading = async {
            loop {
                if let Some(found) = frame::next(&self.inbox, 1 << 20).unwrap() {
                    let (tag, total) = (found.tag, found.len_bytes());
                    let mut body = self.inbox.split_to(total);
                    body.advance(frame::HEADER_BYTES);
                    return Some((tag, body));
                }
                if self.stream.read_buf(&mut self.inbox).await.unwrap() == 0 {
                    return None;
                }
            }
        };
        tokio::time::timeout(DEADLINE, reading).await.expect("an answer in time")
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(super) async fn say(&mut self, query: &str) {
        let mut out = BytesMut::new();
        message::put_query(&mut out, query.as_bytes());
        self.send(&out).await;
    }

    /// Everything up to ReadyForQuery, or the end of the stream.
    pub(super) async fn hear(&mut self) -> Heard {
        let mut heard = Heard::default();
        while let Some((tag, body)) = self.message().await {
            heard.tags.push(char::from(tag));
            match tag {
                b'T' => heard.columns = columns(body),
                b'D' => {
                    let cells = message::data_row(&body).unwrap();
                    let text = |cell: &[u8]| String::from_utf8(cell.to_vec()).unwrap();
                    heard.rows.push(cells.into_iter().map(|cell| cell.map(text)).collect());
                }
                b'C' => heard.tag = Some(String::from_utf8_lossy(&body[..body.len() - 1]).into()),
                b'E' => heard.error = Some(fields(&body)),
                b'N' => heard.notice = Some(fields(&body)),
                b'Z' => break,
                other => assert_eq!(other, b'I'),
            }
        }
        heard
    }

    pub(super) async fn ask(&mut self, query: &str) -> Heard {
        self.say(query).await;
        self.hear().await
    }
}

fn columns(mut body: BytesMut) -> Vec<(String, u32, i16)> {
    let count = body.get_u16();
    let column = |_| {
        let end = body.iter().position(|byte| *byte == 0).unwrap();
        let name = String::from_utf8(body.split_to(end).to_vec()).unwrap();
        body.advance(1 + 4 + 2);
        let (oid, size) = (body.get_u32(), body.get_i16());
        body.advance(4 + 2);
        (name, oid, size)
    };
    (0..count).map(column).collect()
}

fn fields(body: &[u8]) -> BTreeMap<char, String> {
    let field = |field: &[u8]| (char::from(field[0]), String::from_utf8_lossy(&field[1..]).into_owned());
    body.split(|byte| *byte == 0).filter(|field| !field.is_empty()).map(field).collect()
}
