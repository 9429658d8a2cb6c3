//! Cuts what a peer sends into PostgreSQL messages, in place.
//!
//! Invariant: nothing here copies, allocates or panics, whatever the bytes; no frame longer than the caller's limit is
//! ever reported as complete. Source: PostgreSQL, "Frontend/Backend Protocol", Message Formats.

use thiserror::Error;

/// Bytes in front of a typed message's body: the tag and the length, which counts itself.
pub const HEADER_BYTES: usize = 5;

/// The longest StartupMessage, SSLRequest or CancelRequest that PostgreSQL reads (MAX_STARTUP_PACKET_LENGTH), in bytes.
pub const STARTUP_BYTES_MAX: usize = 10_000;

/// A complete typed message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The message type.
    pub tag: u8,
    /// The body, without tag and length.
    pub body: &'a [u8],
}

impl Frame<'_> {
    /// Bytes that the whole message occupies.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        HEADER_BYTES + self.body.len()
    }
}

/// The front of a typed message, complete or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The message type.
    pub tag: u8,
    /// Bytes of the whole message, tag and length included; at least 5.
    pub total_bytes: usize,
}

/// What is wrong with a length that a peer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The length is smaller than the length field itself, or negative.
    #[error("message of type {tag:#04x} has the invalid length {length}")]
    Length {
        /// The message type; 0 for an untyped startup packet.
        tag: u8,
        /// The length as sent.
        length: i32,
    },
    /// The message is longer than this place accepts.
    #[error("message of type {tag:#04x} has {total_bytes} bytes, more than the {limit_bytes} accepted here")]
    TooLong {
        /// The message type; 0 for an untyped startup packet.
        tag: u8,
        /// Bytes of the whole message.
        total_bytes: usize,
        /// Bytes accepted.
        limit_bytes: usize,
    },
}

/// Reads the front of the next typed message; `None` while fewer than five bytes are there.
///
/// # Errors
/// [`FrameError::Length`] when the length can't be one.
pub fn header(bytes: &[u8]) -> Result<Option<Header>, FrameError> {
    let [tag, a, b, c, d, ..] = *bytes else { return Ok(None) };
    let length = i32::from_be_bytes([a, b, c, d]);
    match usize::try_from(length) {
        Ok(counted) if counted >= 4 => Ok(Some(Header { tag, total_bytes: counted + 1 })),
        Ok(_) | Err(_) => Err(FrameError::Length { tag, length }),
    }
}

/// Cuts the first complete typed message; `None` while it is still incomplete.
///
/// # Errors
/// [`FrameError`] as soon as the header shows that the message is impossible or longer than `limit_bytes`.
pub fn next(bytes: &[u8], limit_bytes: usize) -> Result<Option<Frame<'_>>, FrameError> {
    let Some(Header { tag, total_bytes }) = header(bytes)? else { return Ok(None) };
    if total_bytes > limit_bytes {
        return Err(FrameError::TooLong { tag, total_bytes, limit_bytes });
    }
    Ok(bytes.get(HEADER_BYTES..total_bytes).map(|body| Frame { tag, body }))
}

/// Cuts the first untyped packet (length, then body: StartupMessage, SSLRequest, CancelRequest); `None` while incomplete.
///
/// The body starts with the four bytes of the protocol version or request code.
///
/// # Errors
/// [`FrameError`] when the length is impossible, shorter than the code, or longer than [`STARTUP_BYTES_MAX`].
pub fn startup(bytes: &[u8]) -> Result<Option<&[u8]>, FrameError> {
    let [a, b, c, d, ..] = *bytes else { return Ok(None) };
    let length = i32::from_be_bytes([a, b, c, d]);
    match usize::try_from(length) {
        Ok(total_bytes) if total_bytes > STARTUP_BYTES_MAX => {
            Err(FrameError::TooLong { tag: 0, total_bytes, limit_bytes: STARTUP_BYTES_MAX })
        }
        Ok(total_bytes) if total_bytes >= 8 => Ok(bytes.get(4..total_bytes)),
        Ok(_) | Err(_) => Err(FrameError::Length { tag: 0, length }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_cut_without_panic_and_within_the_limit(bytes in proptest::collection::vec(any::<u8>(), 0..64), limit in 5usize..64) {
            if let Ok(Some(frame)) = next(&bytes, limit) {
                prop_assert!(frame.len_bytes() <= limit && frame.len_bytes() <= bytes.len());
            }
            if let Ok(Some(body)) = startup(&bytes) {
                prop_assert!(body.len() + 4 <= bytes.len() && body.len() >= 4);
            }
        }

        #[test]
        fn a_written_frame_is_read_back(tag in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..300), rest in proptest::collection::vec(any::<u8>(), 0..9)) {
            let mut bytes = vec![tag];
            bytes.extend_from_slice(&i32::try_from(body.len() + 4).unwrap().to_be_bytes());
            bytes.extend_from_slice(&body);
            for cut in 0..bytes.len() {
                prop_assert_eq!(next(&bytes[..cut], 4096).unwrap(), None);
            }
            bytes.extend_from_slice(&rest);
            prop_assert_eq!(next(&bytes, 4096).unwrap(), Some(Frame { tag, body: &body }));
        }
    }

    #[test]
    fn impossible_lengths_are_named() {
        assert_eq!(next(b"Q\0\0\0\x03", 100), Err(FrameError::Length { tag: b'Q', length: 3 }));
        assert_eq!(next(b"Q\xff\xff\xff\xff", 100), Err(FrameError::Length { tag: b'Q', length: -1 }));
        assert_eq!(
            next(b"Q\0\0\x10\0", 100),
            Err(FrameError::TooLong { tag: b'Q', total_bytes: 4097, limit_bytes: 100 })
        );
        assert_eq!(startup(b"\0\0\0\x04"), Err(FrameError::Length { tag: 0, length: 4 }));
    }
}
