//! The buffer of one direction: bytes are written out of the place they were read into.
//!
//! Invariant: `start <= cleared <= end <= data.len()`; only `start..cleared` is ever sent on. An idle client owns no
//! buffer: buffers come from, and go back to, a list of the worker thread.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::frame;
use crate::frame::{FrameError, Header};
use crate::statements::Rest;

/// Large enough that a read of an ordinary answer is short, which tells the runtime that the socket is empty without
/// another system call; small enough that a thousand of them are 16 MB.
const BUFFER_BYTES: usize = 16 * 1024;

/// Free buffers that one worker keeps: as many as its transactions under way, and no more after a peak.
const FREE_MAX: usize = 256;

/// A message that has to be seen whole (ParameterStatus) may make the buffer grow up to this.
pub(super) const WHOLE_BYTES_MAX: usize = 1024 * 1024;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// One direction's bytes.
#[derive(Debug)]
pub struct Buffer {
    data: Box<[u8]>,
    start: usize,
    cleared: usize,
    end: usize,
    passing: Passing,
}

/// What happens with the rest of the message that the scan is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passing {
    Between,
    Send(usize),
    Drop(usize),
}

/// What came of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Bytes came.
    Some,
    /// The peer has closed.
    End,
    /// No room: something has to be written first.
    Full,
}

impl Buffer {
    /// A buffer from the worker's list.
    #[must_use]
    pub fn take() -> Self {
        let data = FREE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice());
        Self { data, start: 0, cleared: 0, end: 0, passing: Passing::Between }
    }

    /// Whether nothing is in it and no message is half through.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end && self.passing == Passing::Between
    }

    /// Whether something waits to be written.
    #[must_use]
    pub fn has_cleared(&self) -> bool {
        self.start < self.cleared
    }

    /// Bytes read and not yet cleared.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.data[self.cleared..self.end]
    }

    /// Appends bytes of our own, cleared; `false` if there is no room.
    pub fn append(&mut self, bytes: &[u8]) -> bool {
        if self.cleared != self.end {
            return false;
        }
        self.compact();
        if self.data.len() - self.end < bytes.len() {
            return false;
        }
        self.data[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
        self.cleared = self.end;
        true
    }

    /// Lets the message under way go on, then tells of the next header; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`] for a length that can't be one.
    pub fn next_header(&mut self) -> Result<Option<Header>, FrameError> {
        match self.passing {
            Passing::Between => {}
            Passing::Send(left) => {
                let now = left.min(self.end - self.cleared);
                self.cleared += now;
                self.passing = if now == left { Passing::Between } else { Passing::Send(left - now) };
            }
            Passing::Drop(left) => {
                let now = left.min(self.end - self.cleared);
                self.remove(now);
                self.passing = if now == left { Passing::Between } else { Passing::Drop(left - now) };
            }
        }
        if self.passing != Passing::Between {
            return Ok(None);
        }
        frame::header(self.pending())
    }

    /// Whether `bytes` of the message at hand are here. If they never could be, the buffer grows, within bounds.
    pub fn holds(&mut self, bytes: usize, bytes_max: usize) -> bool {
        if self.end - self.cleared >= bytes {
            return true;
        }
        if bytes > self.data.len() && bytes <= bytes_max {
            self.grow(bytes);
        }
        false
    }

    /// Moves to a place with room for so many bytes.
    fn grow(&mut self, bytes: usize) {
        let mut larger = vec![0; bytes.next_power_of_two()].into_boxed_slice();
        larger[..self.end - self.start].copy_from_slice(&self.data[self.start..self.end]);
        self.cleared -= self.start;
        self.end -= self.start;
        self.start = 0;
        self.data = larger;
    }

    /// Puts bytes of our own, cleared, in the place of the first bytes of the message at hand. What follows of it is sent
    /// on or dropped, also the part that has not come yet.
    pub fn replace(&mut self, header: Header, front_bytes: usize, bytes: &[u8], rest: Rest) {
        let needed = self.end - self.start - front_bytes + bytes.len();
        if needed > self.data.len() {
            self.grow(needed);
        } else if self.end - front_bytes + bytes.len() > self.data.len() {
            self.data.copy_within(self.start..self.end, 0);
            self.cleared -= self.start;
            self.end -= self.start;
            self.start = 0;
        }
        self.data.copy_within(self.cleared + front_bytes..self.end, self.cleared + bytes.len());
        self.data[self.cleared..self.cleared + bytes.len()].copy_from_slice(bytes);
        self.end = self.end - front_bytes + bytes.len();
        self.cleared += bytes.len();
        let left = header.total_bytes - front_bytes;
        self.passing = match rest {
            _ if left == 0 => Passing::Between,
            Rest::Send => Passing::Send(left),
            Rest::Drop => Passing::Drop(left),
        };
    }

    /// Puts other bytes in the place of the whole message at hand, which is still to be cleared.
    pub fn rewrite(&mut self, header: Header, bytes: &[u8]) {
        self.replace(header, header.total_bytes, bytes, Rest::Drop);
        self.cleared -= bytes.len();
    }

    /// Gives the message at hand another tag.
    pub fn retag(&mut self, tag: u8) {
        self.data[self.cleared] = tag;
    }

    /// Clears the message at hand, also the part of it that has not come yet.
    pub fn send(&mut self, header: Header) {
        self.passing = Passing::Send(header.total_bytes);
    }

    /// Drops the message at hand, also the part of it that has not come yet.
    pub fn discard(&mut self, header: Header) {
        self.passing = Passing::Drop(header.total_bytes);
    }

    /// Reads once. Cancel safe: what was read is in the buffer.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_read<S: AsyncRead + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<Read>> {
        self.compact();
        if self.end == self.data.len() {
            return Poll::Ready(Ok(Read::Full));
        }
        let mut room = ReadBuf::new(&mut self.data[self.end..]);
        std::task::ready!(Pin::new(stream).poll_read(cx, &mut room))?;
        let count = room.filled().len();
        self.end += count;
        Poll::Ready(Ok(if count == 0 { Read::End } else { Read::Some }))
    }

    /// Writes cleared bytes until none are left. Cancel safe: what was written has left the buffer.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut written = 0;
        while self.has_cleared() {
            match Pin::new(&mut *stream).poll_write(cx, &self.data[self.start..self.cleared]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => {
                    self.start += count;
                    written += count;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if written > 0 => return Poll::Ready(Ok(written)),
                Poll::Pending => return Poll::Pending,
            }
        }
        std::task::ready!(Pin::new(stream).poll_flush(cx))?;
        Poll::Ready(Ok(written))
    }

    /// Forgets what was to be written: its reader is gone.
    pub fn forget_cleared(&mut self) {
        self.start = self.cleared;
    }

    fn remove(&mut self, bytes: usize) {
        self.data.copy_within(self.cleared + bytes..self.end, self.cleared);
        self.end -= bytes;
    }

    fn compact(&mut self) {
        if self.start == self.end {
            (self.start, self.cleared, self.end) = (0, 0, 0);
        } else if self.start > 0 && self.end == self.data.len() {
            self.data.copy_within(self.start..self.end, 0);
            self.cleared -= self.start;
            self.end -= self.start;
            self.start = 0;
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        // The list is gone when the thread ends; then the buffer simply goes too.
        let _ = FREE.try_with(|free| {
            if let Ok(mut free) = free.try_borrow_mut()
                && data.len() == BUFFER_BYTES
                && free.len() < FREE_MAX
            {
                free.push(data);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn read(buffer: &mut Buffer, bytes: &[u8]) {
        let mut source = bytes;
        let mut cx = Context::from_waker(Waker::noop());
        while !source.is_empty() {
            assert!(matches!(buffer.poll_read(&mut source, &mut cx), Poll::Ready(Ok(Read::Some))));
        }
    }

    fn written(buffer: &mut Buffer) -> Vec<u8> {
        let mut out = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(buffer.poll_write(&mut out, &mut cx).is_ready());
        out
    }

    #[test]
    fn messages_are_sent_and_dropped_as_told_even_in_pieces() {
        let mut buffer = Buffer::take();
        read(&mut buffer, b"Q\0\0\0\x06ab");
        let first = buffer.next_header().unwrap().unwrap();
        buffer.send(first);
        read(&mut buffer, b"d\0\0\0\x08x");
        let dropped = buffer.next_header().unwrap().unwrap();
        assert_eq!(dropped.tag, b'd');
        buffer.discard(dropped);
        assert_eq!(buffer.next_header().unwrap(), None);
        read(&mut buffer, b"yzwS\0\0\0\x04");
        let last = buffer.next_header().unwrap().unwrap();
        assert_eq!(last.tag, b'S');
        buffer.send(last);
        assert_eq!(buffer.next_header().unwrap(), None);
        assert_eq!(written(&mut buffer), b"Q\0\0\0\x06abS\0\0\0\x04");
        assert!(buffer.is_empty());
    }

    #[test]
    fn the_front_of_a_message_is_replaced_and_its_rest_is_sent_or_dropped() {
        for (rest, wanted) in [(Rest::Send, &b"Sxnew!cdeS\0\0\0\x04"[..]), (Rest::Drop, b"Sxnew!S\0\0\0\x04")] {
            for new in [&b"new!"[..], &[b'n'; 20_000]] {
                let mut buffer = Buffer::take();
                read(&mut buffer, b"Sx");
                (buffer.cleared, buffer.passing) = (2, Passing::Between);
                read(&mut buffer, b"B\0\0\0\x09abc");
                let header = buffer.next_header().unwrap().unwrap();
                buffer.replace(header, 7, new, rest);
                assert_eq!(buffer.next_header().unwrap(), None);
                read(&mut buffer, b"deS\0\0\0\x04");
                let last = buffer.next_header().unwrap().unwrap();
                buffer.send(last);
                assert_eq!(buffer.next_header().unwrap(), None);
                let wanted = [&wanted[..2], new, &wanted[6..]].concat();
                assert_eq!(written(&mut buffer), wanted);
                assert!(buffer.is_empty());
            }
        }
    }

    #[test]
    fn a_message_longer_than_the_buffer_streams_through() {
        let mut buffer = Buffer::take();
        let body = vec![7_u8; 100_000];
        let mut message = vec![b'D'];
        message.extend_from_slice(&100_004_i32.to_be_bytes());
        message.extend_from_slice(&body);
        let mut out = Vec::new();
        for piece in message.chunks(5000) {
            read(&mut buffer, piece);
            if let Some(header) = buffer.next_header().unwrap() {
                buffer.send(header);
                assert_eq!(buffer.next_header().unwrap(), None);
            }
            out.extend(written(&mut buffer));
        }
        assert_eq!(out, message);
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_message_that_must_be_seen_whole_makes_room_for_itself_within_bounds() {
        let mut buffer = Buffer::take();
        let mut message = vec![b'S'];
        message.extend_from_slice(&50_004_i32.to_be_bytes());
        message.extend_from_slice(&vec![b'x'; 50_000]);
        read(&mut buffer, &message[..10_000]);
        let header = buffer.next_header().unwrap().unwrap();
        assert!(!buffer.holds(header.total_bytes, WHOLE_BYTES_MAX));
        read(&mut buffer, &message[10_000..]);
        assert!(buffer.holds(header.total_bytes, WHOLE_BYTES_MAX));
        assert!(!buffer.holds(2 * WHOLE_BYTES_MAX, WHOLE_BYTES_MAX));
    }
}
