//! Answers a statement that never reached a server, so that the client can go on.
//!
//! Invariant: the client gets one ErrorResponse and the ReadyForQuery that it waits for; what belongs to the refused
//! statement (up to the end of its batch) is consumed, what follows is not.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;

use crate::message;
use crate::relay::{Buffer, Read};
use crate::report::{Report, Severity};
use crate::session::{Farewell, Session, violation};

impl Session {
    /// Refuses the statement at hand with an ERROR; the connection lives on.
    pub(super) async fn refuse(&mut self, report: Box<Report>) -> Result<(), Farewell> {
        let mut answer = BytesMut::new();
        Report { severity: Severity::Error, ..*report }.encode(&mut answer);
        // Sent before the rest of a batch is read: its client may wait for the error before it sends Sync.
        self.stream.write_all(&answer).await.map_err(Farewell::ClientGone)?;
        while !self.consume_statement()? {
            std::future::poll_fn(|cx| {
                let up = self.up.get_or_insert_with(Buffer::take);
                up.poll_read(&mut self.stream, cx).map(|read| match read {
                    Ok(Read::Some | Read::Full) => Ok(()),
                    Ok(Read::End) => Err(Farewell::ClientGone(io::ErrorKind::UnexpectedEof.into())),
                    Err(error) => Err(Farewell::ClientGone(error)),
                })
            })
            .await?;
        }
        answer.clear();
        message::put_ready_for_query(&mut answer, message::Status::Idle);
        self.stream.write_all(&answer).await.map_err(Farewell::ClientGone)
    }

    /// Drops messages to the end of the statement (Query, FunctionCall) or of the batch (Sync); `false` while its end
    /// has not come.
    fn consume_statement(&mut self) -> Result<bool, Farewell> {
        let Some(up) = self.up.as_mut() else { return Ok(false) };
        loop {
            let header = match up.next_header() {
                Ok(Some(header)) => header,
                Ok(None) => return Ok(false),
                Err(error) => return Err(violation(error.to_string())),
            };
            match header.tag {
                b'X' => return Err(Farewell::Terminated),
                b'Q' | b'F' | b'S' => {
                    up.discard(header);
                    return Ok(true);
                }
                _ => up.discard(header),
            }
        }
    }
}
