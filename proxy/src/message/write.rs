//! Writes messages into a buffer.
//!
//! Invariant: every length is right and every string ends at its first NUL, whatever is in the texts.

use bytes::{BufMut, BytesMut};

use crate::message::{Authentication, CANCEL_REQUEST_CODE, CancelKey, PairRef, Protocol, SSL_REQUEST_CODE, Status};

/// Writes a typed message: the tag, the length, and the body that `write` appends.
pub fn put(out: &mut BytesMut, tag: u8, write: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    put_counted(out, write);
}

/// Writes an untyped message: the length, and the body that `write` appends.
fn put_counted(out: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    let length_at = out.len();
    out.put_i32(0);
    write(out);
    // Nothing of the cold path comes near 2 GiB: every text in it was bounded when it was read.
    let length = i32::try_from(out.len() - length_at).unwrap_or(i32::MAX);
    if let Some(place) = out.get_mut(length_at..length_at + 4) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

/// Writes a string and the NUL that ends it; a NUL inside ends it earlier.
pub fn put_cstring(out: &mut BytesMut, text: &[u8]) {
    out.put_slice(text.split(|b| *b == 0).next().unwrap_or_default());
    out.put_u8(0);
}

/// Writes a StartupMessage.
pub fn put_startup(out: &mut BytesMut, protocol: Protocol, pairs: &[PairRef<'_>]) {
    put_counted(out, |out| {
        out.put_i32(protocol.code());
        for (name, value) in pairs {
            put_cstring(out, name);
            put_cstring(out, value);
        }
        out.put_u8(0);
    });
}

/// Writes an SSLRequest.
pub fn put_ssl_request(out: &mut BytesMut) {
    put_counted(out, |out| out.put_i32(SSL_REQUEST_CODE));
}

/// Writes a CancelRequest.
pub fn put_cancel_request(out: &mut BytesMut, key: &CancelKey) {
    put_counted(out, |out| {
        out.put_i32(CANCEL_REQUEST_CODE);
        out.put_i32(key.pid);
        out.put_slice(&key.secret);
    });
}

/// Writes a NegotiateProtocolVersion: what we speak, and the options we don't know, as they came.
pub fn put_negotiate_protocol_version(out: &mut BytesMut, protocol: Protocol, unknown_options: &[&[u8]]) {
    put(out, b'v', |out| {
        out.put_i32(protocol.code());
        out.put_i32(i32::try_from(unknown_options.len()).unwrap_or(i32::MAX));
        for option in unknown_options {
            put_cstring(out, option);
        }
    });
}

/// Writes an Authentication message.
pub fn put_authentication(out: &mut BytesMut, authentication: &Authentication<'_>) {
    put(out, b'R', |out| match authentication {
        Authentication::Ok => out.put_i32(0),
        Authentication::Cleartext => out.put_i32(3),
        Authentication::Md5(salt) => {
            out.put_i32(5);
            out.put_slice(salt);
        }
        Authentication::Sasl(mechanisms) => {
            out.put_i32(10);
            mechanisms.iter().for_each(|mechanism| put_cstring(out, mechanism));
            out.put_u8(0);
        }
        Authentication::SaslContinue(data) => {
            out.put_i32(11);
            out.put_slice(data);
        }
        Authentication::SaslFinal(data) => {
            out.put_i32(12);
            out.put_slice(data);
        }
        Authentication::Other(code) => out.put_i32(*code),
    });
}

/// Writes a PasswordMessage.
pub fn put_password(out: &mut BytesMut, text: &[u8]) {
    put(out, b'p', |out| put_cstring(out, text));
}

/// Writes a SASLInitialResponse.
pub fn put_sasl_initial_response(out: &mut BytesMut, mechanism: &[u8], data: &[u8]) {
    put(out, b'p', |out| {
        put_cstring(out, mechanism);
        out.put_i32(i32::try_from(data.len()).unwrap_or(i32::MAX));
        out.put_slice(data);
    });
}

/// Writes a SASLResponse.
pub fn put_sasl_response(out: &mut BytesMut, data: &[u8]) {
    put(out, b'p', |out| out.put_slice(data));
}

/// Writes a ParameterStatus.
pub fn put_parameter_status(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    put(out, b'S', |out| {
        put_cstring(out, name);
        put_cstring(out, value);
    });
}

/// Writes a BackendKeyData.
pub fn put_backend_key_data(out: &mut BytesMut, key: &CancelKey) {
    put(out, b'K', |out| {
        out.put_i32(key.pid);
        out.put_slice(&key.secret);
    });
}

/// Writes a ReadyForQuery.
pub fn put_ready_for_query(out: &mut BytesMut, status: Status) {
    put(out, b'Z', |out| {
        out.put_u8(match status {
            Status::Idle => b'I',
            Status::InTransaction => b'T',
            Status::Failed => b'E',
        });
    });
}

/// Writes a simple Query.
pub fn put_query(out: &mut BytesMut, sql: &[u8]) {
    put(out, b'Q', |out| put_cstring(out, sql));
}

/// Writes Parse, Bind, Describe, Execute, Sync of one unnamed statement: text parameters in, text rows out.
pub fn put_statement(out: &mut BytesMut, sql: &[u8], params: &[Option<&str>]) {
    put(out, b'P', |out| {
        put_cstring(out, b"");
        put_cstring(out, sql);
        // No types: the server infers them.
        out.put_i16(0);
    });
    put(out, b'B', |out| {
        put_cstring(out, b"");
        put_cstring(out, b"");
        out.put_i16(0);
        out.put_i16(i16::try_from(params.len()).unwrap_or(i16::MAX));
        for param in params {
            out.put_i32(param.map_or(-1, |text| i32::try_from(text.len()).unwrap_or(i32::MAX)));
            out.put_slice(param.unwrap_or_default().as_bytes());
        }
        out.put_i16(0);
    });
    put(out, b'D', |out| out.put_slice(b"P\0"));
    put(out, b'E', |out| {
        put_cstring(out, b"");
        out.put_i32(0);
    });
    put(out, b'S', |_| {});
}

/// Writes a Parse with the OIDs of all parameter types, or none: the server infers them.
pub fn put_parse(out: &mut BytesMut, name: &[u8], sql: &[u8], types: &[u32]) {
    put(out, b'P', |out| {
        put_cstring(out, name);
        put_cstring(out, sql);
        // A server that told so many types told them with the same 16 bits.
        out.put_u16(u16::try_from(types.len()).unwrap_or(u16::MAX));
        types.iter().for_each(|oid| out.put_u32(*oid));
    });
}

/// Writes Bind and Execute of a statement, on a portal of its name: text parameters in, text rows out.
pub fn put_bind_execute(out: &mut BytesMut, name: &[u8], params: &[&[u8]]) {
    put(out, b'B', |out| {
        put_cstring(out, name);
        put_cstring(out, name);
        out.put_i16(0);
        out.put_i16(i16::try_from(params.len()).unwrap_or(i16::MAX));
        for param in params {
            out.put_i32(i32::try_from(param.len()).unwrap_or(i32::MAX));
            out.put_slice(param);
        }
        out.put_i16(0);
    });
    put(out, b'E', |out| {
        put_cstring(out, name);
        out.put_i32(0);
    });
    put(out, b'C', |out| {
        out.put_u8(b'P');
        put_cstring(out, name);
    });
}

/// Writes a Describe of a statement.
pub fn put_describe(out: &mut BytesMut, name: &[u8]) {
    put(out, b'D', |out| {
        out.put_u8(b'S');
        put_cstring(out, name);
    });
}

/// Writes a Close of a statement.
pub fn put_close(out: &mut BytesMut, name: &[u8]) {
    put(out, b'C', |out| {
        out.put_u8(b'S');
        put_cstring(out, name);
    });
}

/// Writes a Sync.
pub fn put_sync(out: &mut BytesMut) {
    put(out, b'S', |_| {});
}
