//! The console's end of the wire: requests in, answers out.
//!
//! Invariant: at most [`REQUEST_BYTES_MAX`] of what a visitor sent is kept, and no write waits longer than
//! [`WRITE_TIMEOUT`].

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pgcutover_api::rows::Column;
use pgwire::messages::Message;
use pgwire::messages::data::{DataRow, FORMAT_CODE_TEXT, FieldDescription, RowDescription};
use pgwire::messages::response::{CommandComplete, EmptyQueryResponse};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::SERVER_VERSION;
use super::orders::Answer;
use super::tables::Sheet;
use crate::frame;
use crate::message::{self, CancelKey, Status};
use crate::report::Report;

/// The longest message a console reads: sixteen times the longest command, so that too long a one still gets an ERROR.
const REQUEST_BYTES_MAX: usize = 65_536;
/// A visitor that does not read its answer for this long is gone; libpq's own TCP timeouts are of this order.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Rows are written out when this many bytes have gathered: a table of any size needs little memory.
const CHUNK_BYTES: usize = 32_768;

/// What PgBouncer's console says on a welcome, beside its version.
const WELCOME: &[(&str, &str)] = &[
    ("client_encoding", "UTF8"),
    ("server_encoding", "UTF8"),
    ("DateStyle", "ISO"),
    ("TimeZone", "GMT"),
    ("standard_conforming_strings", "on"),
    ("is_superuser", "on"),
];

/// A request of a visitor.
#[derive(Debug)]
pub(super) enum Request {
    /// A simple query, without its final NUL.
    Query(Bytes),
    /// The first message of an extended-protocol sequence; the others up to Sync are not reported.
    Extended,
    /// A function call.
    FunctionCall,
    /// The end of an extended-protocol sequence.
    Sync,
    /// No message that belongs here; the report ends the visit.
    Broken(Report),
}

/// Whether messages of an extended-protocol sequence are being skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Skipping {
    /// Each message counts.
    No,
    /// The sequence was refused: nothing counts until Sync.
    UntilSync,
}

/// What a message means here.
enum Meaning {
    Request(Request),
    Ignore,
    Leave,
}

pub(super) struct Desk<S> {
    stream: S,
    inbox: BytesMut,
    outbox: BytesMut,
    skipping: Skipping,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Desk<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, inbox: BytesMut::new(), outbox: BytesMut::new(), skipping: Skipping::No }
    }

    /// Parameters, the cancel key, ReadyForQuery.
    pub(super) async fn welcome(&mut self, key: &CancelKey) -> io::Result<()> {
        message::put_parameter_status(&mut self.outbox, b"server_version", SERVER_VERSION.as_bytes());
        for (name, value) in WELCOME {
            message::put_parameter_status(&mut self.outbox, name.as_bytes(), value.as_bytes());
        }
        message::put_backend_key_data(&mut self.outbox, key);
        self.ready().await
    }

    /// The next request; `None` at the end of the stream or a Terminate. Cancel safe.
    pub(super) async fn request(&mut self) -> io::Result<Option<Request>> {
        loop {
            match self.cut() {
                Some(Meaning::Request(request)) => return Ok(Some(request)),
                Some(Meaning::Leave) => return Ok(None),
                Some(Meaning::Ignore) => {}
                // No limit on the wait: the visitor ends it, or whoever drops this future.
                None if self.stream.read_buf(&mut self.inbox).await? == 0 => return Ok(None),
                None => {}
            }
        }
    }

    /// Ready when the visitor has gone. What it sends meanwhile is kept for later; once that is too much, this stays
    /// pending and the visitor is not read from, until the command it waits for ends. Cancel safe.
    pub(super) async fn hung_up(&mut self) {
        while self.inbox.len() < REQUEST_BYTES_MAX {
            match self.stream.read_buf(&mut self.inbox).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
        std::future::pending().await
    }

    /// Cuts the first message off the inbox; `None` while it is incomplete.
    fn cut(&mut self) -> Option<Meaning> {
        let (tag, total) = match frame::next(&self.inbox, REQUEST_BYTES_MAX) {
            Ok(Some(frame)) => (frame.tag, frame.len_bytes()),
            Ok(None) => return None,
            Err(error) => return Some(broken(error.to_string())),
        };
        let mut body = self.inbox.split_to(total).freeze();
        body.advance(frame::HEADER_BYTES);
        Some(self.meaning(tag, body))
    }

    fn meaning(&mut self, tag: u8, body: Bytes) -> Meaning {
        match tag {
            b'Q' => {
                // A simple query ends what is skipped: a client that gave a sequence up this way gets its answer.
                self.skipping = Skipping::No;
                match body.split_last() {
                    Some((0, text)) if !text.contains(&0) => Meaning::Request(Request::Query(body.slice(..text.len()))),
                    Some(_) | None => broken("malformed Query message"),
                }
            }
            b'X' => Meaning::Leave,
            b'P' | b'B' | b'D' | b'E' | b'C' => match self.skipping {
                Skipping::UntilSync => Meaning::Ignore,
                Skipping::No => {
                    self.skipping = Skipping::UntilSync;
                    Meaning::Request(Request::Extended)
                }
            },
            b'S' => {
                self.skipping = Skipping::No;
                Meaning::Request(Request::Sync)
            }
            b'F' => Meaning::Request(Request::FunctionCall),
            // Flush: nothing is held back. CopyData, CopyDone, CopyFail: PostgreSQL ignores strays, too.
            b'H' | b'd' | b'c' | b'f' => Meaning::Ignore,
            other => broken(format!("invalid frontend message type {other}")),
        }
    }

    /// One ERROR or FATAL without ReadyForQuery.
    pub(super) async fn refuse(&mut self, report: &Report) -> io::Result<()> {
        report.encode(&mut self.outbox);
        self.send().await
    }

    /// ReadyForQuery.
    pub(super) async fn ready(&mut self) -> io::Result<()> {
        message::put_ready_for_query(&mut self.outbox, Status::Idle);
        self.send().await
    }

    /// The whole answer to one query.
    pub(super) async fn answer(&mut self, answer: Result<Answer, Report>) -> io::Result<()> {
        match answer {
            Ok(Answer::Nothing) => self.put(&EmptyQueryResponse::new())?,
            Ok(Answer::Done(tag)) => self.put(&CommandComplete::new(tag))?,
            Ok(Answer::Told(notice, tag)) => {
                notice.encode(&mut self.outbox);
                self.put(&CommandComplete::new(tag))?;
            }
            Ok(Answer::Rows(sheet, tag)) => {
                self.sheet(sheet).await?;
                self.put(&CommandComplete::new(tag))?;
            }
            Err(report) => report.encode(&mut self.outbox),
        }
        self.ready().await
    }

    async fn sheet(&mut self, sheet: Sheet) -> io::Result<()> {
        self.put(&RowDescription::new(sheet.columns.iter().map(field).collect()))?;
        for row in sheet.rows {
            self.put(&data_row(&row)?)?;
            if self.outbox.len() >= CHUNK_BYTES {
                self.send().await?;
            }
        }
        Ok(())
    }

    fn put(&mut self, message: &impl Message) -> io::Result<()> {
        message.encode(&mut self.outbox).map_err(io::Error::other)
    }

    async fn send(&mut self) -> io::Result<()> {
        let write = async {
            self.stream.write_all_buf(&mut self.outbox).await?;
            self.stream.flush().await
        };
        tokio::time::timeout(WRITE_TIMEOUT, write).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

fn broken(what: impl Into<std::borrow::Cow<'static, str>>) -> Meaning {
    Meaning::Request(Request::Broken(Report::protocol_violation(what)))
}

fn field(column: &Column) -> FieldDescription {
    let (oid, size) = (column.kind.oid(), column.kind.size_bytes());
    FieldDescription::new(column.name.to_owned(), 0, 0, oid, size, -1, FORMAT_CODE_TEXT)
}

fn data_row(row: &[Option<String>]) -> io::Result<DataRow> {
    let mut cells = BytesMut::new();
    for cell in row {
        match cell {
            None => cells.put_i32(-1),
            Some(text) => {
                cells.put_i32(i32::try_from(text.len()).map_err(io::Error::other)?);
                cells.put_slice(text.as_bytes());
            }
        }
    }
    Ok(DataRow::new(cells, i16::try_from(row.len()).map_err(io::Error::other)?))
}
