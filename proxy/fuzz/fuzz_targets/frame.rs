//! Cuts a stream of hostile bytes into messages.
//!
//! Invariant: pieces of a stream give the same messages as the whole; nothing is cut past its end or the limit.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pgcutover::frame;
use pgcutover::frame::Frame;

/// Small, so that a short input can be too long.
const LIMIT_BYTES: usize = 200;

fuzz_target!(|stream: &[u8]| {
    let mut rest = stream;
    while let Ok(Some(whole)) = frame::next(rest, LIMIT_BYTES) {
        let len = whole.len_bytes();
        assert!(len <= LIMIT_BYTES && len <= rest.len());
        for cut in 0..len {
            assert_eq!(frame::next(&rest[..cut], LIMIT_BYTES), Ok(None), "a part was taken for a message");
        }
        assert_eq!(frame::next(&rest[..len], LIMIT_BYTES), Ok(Some(Frame { tag: rest[0], body: &rest[5..len] })));
        rest = &rest[len..];
    }
    // What is left is incomplete or wrong, and said to be: nobody waits for the rest of a message that can't come.
    if let [_, a, b, c, d, ..] = *rest {
        let length = i32::from_be_bytes([a, b, c, d]);
        let fits = usize::try_from(length).is_ok_and(|length| length >= 4 && length < LIMIT_BYTES);
        assert_eq!(frame::next(rest, LIMIT_BYTES).is_ok(), fits, "length {length}");
    }
    if let Ok(Some(body)) = frame::startup(stream) {
        assert!(body.len() >= 4 && body.len() + 4 <= stream.len());
        assert!(body.len() + 4 <= frame::STARTUP_BYTES_MAX);
    }
});
