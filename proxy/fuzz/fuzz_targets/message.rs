//! Reads every message of the cold path from a hostile body: the first byte chooses which.
//!
//! Invariant: no panic, and what we write from what we read is read back the same.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use pgcutover::frame;
use pgcutover::message;

fuzz_target!(|input: &[u8]| {
    let Some((choice, body)) = input.split_first() else { return };
    match choice % 10 {
        0 => {
            let _ = message::sasl_initial_response(body);
        }
        1 => {
            let _ = message::password(body);
        }
        2 => authentication(body),
        3 => {
            let _ = message::notice(body);
        }
        4 => parameter_status(body),
        5 => backend_key_data(body),
        6 => {
            let _ = message::ready_for_query(body);
        }
        7 => {
            let _ = message::negotiate_protocol_version(body);
        }
        8 => {
            let _ = message::row_description(body);
        }
        _ => {
            let _ = message::data_row(body);
        }
    }
});

fn written(write: impl FnOnce(&mut BytesMut)) -> BytesMut {
    let mut out = BytesMut::new();
    write(&mut out);
    out
}

fn body(bytes: &[u8]) -> &[u8] {
    frame::next(bytes, usize::MAX).unwrap().unwrap().body
}

fn authentication(bytes: &[u8]) {
    let Ok(read) = message::authentication(bytes) else { return };
    if !matches!(read, message::Authentication::Other(_)) {
        let out = written(|out| message::put_authentication(out, &read));
        assert_eq!(message::authentication(body(&out)), Ok(read));
    }
}

fn parameter_status(bytes: &[u8]) {
    let Ok((name, value)) = message::parameter_status(bytes) else { return };
    let out = written(|out| message::put_parameter_status(out, name, value));
    assert_eq!(message::parameter_status(body(&out)), Ok((name, value)));
}

fn backend_key_data(bytes: &[u8]) {
    let Ok(key) = message::backend_key_data(bytes) else { return };
    let out = written(|out| message::put_backend_key_data(out, &key));
    assert_eq!(message::backend_key_data(body(&out)), Ok(key));
}
