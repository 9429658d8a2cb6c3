//! Many messages of ours in one write, each answer collected by its ReadyForQuery.
//!
//! Invariant: reading goes on while writing does, so that neither side waits for the other to empty its buffers. The
//! unnamed statement and portal are not touched (a simple query ends them: that is the caller's choice).

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use crate::backend::statement::{refusal, row};
use crate::backend::{READ_BYTES, Rest, Row, ServerConnection, ServerError, WireError};
use crate::frame;
use crate::message;
use crate::stream::Arrived;

/// The name of our statement and portal: none that a client would choose.
const OURS: &[u8] = b"_pgcutover_\x01";

/// The longest message in an answer, in bytes: one setting or statement text of the longest that is moved.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// All answers to a batch, in bytes.
const ANSWERS_BYTES_MAX: usize = 64 << 20;

/// What to do with messages that are for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asides {
    /// Keep notices, notifications and reported settings.
    All,
    /// Keep notifications: the rest is about what we do there ourselves.
    Notifications,
}

/// Whether a connection at rest is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alive {
    /// As far as can be told without asking.
    Yes,
    /// It has ended, is in the middle of a message, or says what no server at rest says.
    No,
}

/// Requests that are written at once.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: BytesMut,
    answers: usize,
}

/// What came up to one ReadyForQuery.
#[derive(Debug, Default)]
pub struct Answer {
    /// All rows.
    pub rows: Vec<Row>,
    /// One for each Describe.
    pub described: Vec<Described>,
    /// The first error; what was asked behind it did not happen.
    pub refused: Option<ServerError>,
}

/// A statement as the server describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Described {
    /// The OIDs of its parameters' types.
    pub parameters: Vec<u32>,
    /// Its columns; none for a statement without rows.
    pub columns: Vec<Column>,
}

/// A column of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: Box<[u8]>,
    /// The OID of its type.
    pub type_oid: u32,
    /// The type's modifier; -1: none.
    pub modifier: i32,
}

impl Batch {
    /// Nothing asked yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.answers == 0
    }

    /// Answers that are due for what was asked so far.
    #[must_use]
    pub fn answers(&self) -> usize {
        self.answers
    }

    /// A simple query: an answer of its own.
    pub fn query(&mut self, sql: &[u8]) {
        message::put_query(&mut self.bytes, sql);
        self.answers += 1;
    }

    /// Prepares a statement of ours and runs it once for each list of text parameters.
    pub fn run<'a>(&mut self, sql: &str, times: impl IntoIterator<Item = &'a [&'a [u8]]>) {
        // A run that failed has left its statement behind.
        message::put_close(&mut self.bytes, OURS);
        message::put_parse(&mut self.bytes, OURS, sql.as_bytes(), &[]);
        times.into_iter().for_each(|params| message::put_bind_execute(&mut self.bytes, OURS, params));
        message::put_close(&mut self.bytes, OURS);
    }

    /// Prepares a statement for the client.
    pub fn parse(&mut self, name: &[u8], sql: &[u8], types: &[u32]) {
        message::put_parse(&mut self.bytes, name, sql, types);
    }

    /// Asks what a statement of the client looks like.
    pub fn describe(&mut self, name: &[u8]) {
        message::put_describe(&mut self.bytes, name);
    }

    /// Ends what was asked since the last answer: one answer, one transaction.
    pub fn sync(&mut self) {
        message::put_sync(&mut self.bytes);
        self.answers += 1;
    }

    /// Drops our statement, which a failed run has left behind: an empty answer.
    pub fn tidy(&mut self) {
        message::put_close(&mut self.bytes, OURS);
        self.sync();
    }
}

impl Described {
    /// The OIDs of all types in it.
    pub fn types(&self) -> impl Iterator<Item = u32> {
        self.parameters.iter().copied().chain(self.columns.iter().map(|column| column.type_oid))
    }
}

impl Answer {
    /// The answer, unless it is an error.
    ///
    /// # Errors
    /// The first [`ServerError::Refused`].
    pub fn accepted(self) -> Result<Self, ServerError> {
        match self.refused {
            Some(error) => Err(error),
            None => Ok(self),
        }
    }
}

impl ServerConnection {
    /// Writes a batch and reads its answers, as many as it has syncs and queries. Messages for the client are kept in
    /// [`asides`](Self::asides). Not cancel safe: drop the connection with the future.
    ///
    /// # Errors
    /// [`ServerError::Broken`] and [`ServerError::Timeout`]; what the server refuses is in the answers.
    pub async fn converse(
        &mut self,
        batch: Batch,
        asides: Asides,
        deadline: Instant,
    ) -> Result<Vec<Answer>, ServerError> {
        if self.rest == Rest::Busy {
            return Err(ServerError::Broken("the connection is in the middle of another request".to_owned()));
        }
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.rest = Rest::Busy;
        let Batch { bytes, answers } = batch;
        // Boxed: the future is large, and waits inside others that are many.
        let messages = match timeout_at(deadline, Box::pin(self.transact(&bytes, answers))).await {
            Ok(messages) => messages?,
            Err(_) => return Err(ServerError::Timeout),
        };
        self.sort(messages, asides)
    }

    /// Takes in what the server has said at rest; notifications are kept in [`asides`](Self::asides).
    pub fn listen(&mut self) -> Alive {
        // Ended by a server that says nothing more for a moment: at rest it says little.
        loop {
            match self.stream.arrived(&mut self.input) {
                Arrived::Bytes => {}
                Arrived::Nothing => break,
                Arrived::End => return Alive::No,
            }
        }
        loop {
            let total_bytes = match (frame::header(&self.input), frame::next(&self.input, MESSAGE_BYTES_MAX)) {
                (Ok(Some(header)), Ok(Some(_))) => header.total_bytes,
                (Ok(_), Ok(_)) if self.input.is_empty() => return Alive::Yes,
                (_, _) => return Alive::No,
            };
            let whole = self.input.split_to(total_bytes).freeze();
            match whole.first() {
                Some(b'A') => self.asides.extend_from_slice(&whole),
                Some(b'N') => {}
                Some(b'S') if self.learn(&whole.slice(frame::HEADER_BYTES..)).is_ok() => {}
                Some(_) | None => return Alive::No,
            }
        }
    }

    /// Writes and reads at the same time.
    async fn transact(&mut self, bytes: &[u8], answers: usize) -> Result<Vec<Bytes>, ServerError> {
        let Self { stream, input, .. } = self;
        let (mut reading, mut writing) = tokio::io::split(stream);
        let write = async {
            writing.write_all(bytes).await?;
            writing.flush().await?;
            Ok::<(), WireError>(())
        };
        let ((), messages) = tokio::try_join!(write, gather(&mut reading, input, answers))?;
        Ok(messages)
    }

    /// Tells answers from what came aside.
    fn sort(&mut self, messages: Vec<Bytes>, asides: Asides) -> Result<Vec<Answer>, ServerError> {
        let mut answers = Vec::new();
        let mut answer = Answer::default();
        for whole in messages {
            let (Some(tag), body) = (whole.first().copied(), whole.slice(frame::HEADER_BYTES..)) else { continue };
            match tag {
                b'Z' => {
                    self.come_to_rest(&body)?;
                    answers.push(std::mem::take(&mut answer));
                }
                b'D' => answer.rows.push(row(&body)?),
                b'E' => answer.refused = answer.refused.or(Some(refusal(&body))),
                b't' => answer.described.push(Described {
                    parameters: message::parameter_description(&body).map_err(WireError::from)?,
                    columns: Vec::new(),
                }),
                b'T' => {
                    // A simple query describes its rows too; those are text and need no description.
                    if let Some(described) = answer.described.last_mut() {
                        described.columns = columns(&body)?;
                    }
                }
                b'A' => self.asides.extend_from_slice(&whole),
                b'S' | b'N' => {
                    if tag == b'S' {
                        self.learn(&body)?;
                    }
                    if asides == Asides::All {
                        self.asides.extend_from_slice(&whole);
                    }
                }
                // ParseComplete, BindComplete, CloseComplete, NoData, CommandComplete, EmptyQueryResponse.
                b'1' | b'2' | b'3' | b'n' | b'C' | b'I' => {}
                _ => return Err(ServerError::Broken(format!("unexpected message {tag:#04x} in an answer"))),
            }
        }
        Ok(answers)
    }
}

fn columns(body: &[u8]) -> Result<Vec<Column>, WireError> {
    let columns = message::columns(body)?;
    Ok(columns
        .into_iter()
        .map(|c| Column { name: c.name.into(), type_oid: c.type_oid, modifier: c.modifier })
        .collect())
}

/// Reads whole messages up to the last ReadyForQuery that is due.
async fn gather(
    reading: &mut (impl AsyncRead + Unpin),
    input: &mut BytesMut,
    answers: usize,
) -> Result<Vec<Bytes>, WireError> {
    let (mut messages, mut due, mut total_bytes) = (Vec::new(), answers, 0);
    while due > 0 {
        if let Some(header) = frame::header(input)?
            && frame::next(input, MESSAGE_BYTES_MAX)?.is_some()
        {
            total_bytes += header.total_bytes;
            if total_bytes > ANSWERS_BYTES_MAX {
                return Err(frame::FrameError::TooLong {
                    tag: header.tag,
                    total_bytes,
                    limit_bytes: ANSWERS_BYTES_MAX,
                }
                .into());
            }
            due -= usize::from(header.tag == b'Z');
            messages.push(input.split_to(header.total_bytes).freeze());
            continue;
        }
        input.reserve(READ_BYTES);
        if reading.read_buf(input).await? == 0 {
            return Err(farewell(&messages));
        }
    }
    Ok(messages)
}

/// Why the server closed: its last error, if it said one.
fn farewell(messages: &[Bytes]) -> WireError {
    match messages.last() {
        Some(last) if last.first() == Some(&b'E') => {
            let mut body = last.clone();
            body.advance(frame::HEADER_BYTES);
            let text = String::from_utf8_lossy(message::notice(&body).message).into_owned();
            WireError::Io(std::io::Error::other(text))
        }
        Some(_) | None => WireError::Closed,
    }
}
