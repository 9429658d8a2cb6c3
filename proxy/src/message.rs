//! The messages of the cold path: what strangers send before and while they log in, what servers answer, and how
//! both are written.
//!
//! Invariant: every reader is a total function over `&[u8]` (a frame's body, already bounded by `frame`): it never
//! panics, never reads past its slice, and allocates at most what the slice holds. Names and values stay bytes: user
//! and database names need not be UTF-8. Source: PostgreSQL, "Frontend/Backend Protocol", Message Formats.

use bytes::{BufMut, BytesMut};
use thiserror::Error;

/// The request code of an SSLRequest.
pub const SSL_REQUEST_CODE: i32 = 80_877_103;
/// The request code of a GSSENCRequest.
pub const GSSENC_REQUEST_CODE: i32 = 80_877_104;
/// The request code of a CancelRequest.
pub const CANCEL_REQUEST_CODE: i32 = 80_877_102;
/// Protocol 3.0, as a number in the StartupMessage.
pub const PROTOCOL_3_0: i32 = 3 << 16;

/// The shortest and the longest secret of a cancel key, in bytes (4 in protocol 3.0, up to 256 in 3.2).
pub const CANCEL_SECRET_BYTES: std::ops::RangeInclusive<usize> = 4..=256;

/// Bytes that are not the message they claim to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("malformed {message}: {what}")]
pub struct Malformed {
    /// The message's name in PostgreSQL's documentation.
    pub message: &'static str,
    /// What is wrong with it.
    pub what: &'static str,
}

/// What a key in a CancelRequest or BackendKeyData says.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CancelKey {
    /// The process id, or what looks like one.
    pub pid: i32,
    /// 4 to 256 bytes.
    pub secret: Box<[u8]>,
}

impl std::fmt::Debug for CancelKey {
    /// The secret is one.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelKey").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// A protocol version that this proxy speaks with a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// 3.0: cancel secrets have exactly 4 bytes.
    V3_0,
    /// 3.2: cancel secrets have up to 256 bytes.
    V3_2,
}

impl Protocol {
    /// The version as the number on the wire.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::V3_0 => PROTOCOL_3_0,
            Self::V3_2 => PROTOCOL_3_0 + 2,
        }
    }
}

/// Whether the connection is one for replication (`replication` in the StartupMessage).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Replication {
    /// An ordinary session.
    No,
    /// A physical walsender.
    Physical,
    /// A walsender bound to a database; takes SQL too.
    Database,
}

/// A name and its value, as bytes.
pub type Pair = (Box<[u8]>, Box<[u8]>);

/// A name and its value, where they lie in a message.
pub type PairRef<'a> = (&'a [u8], &'a [u8]);

/// What a client wants to be: the checked StartupMessage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    /// The version spoken from here on, already negotiated.
    pub protocol: Protocol,
    /// Never empty.
    pub user: Box<[u8]>,
    /// The user's name where the client named no database. Never empty.
    pub database: Box<[u8]>,
    /// For walsenders.
    pub replication: Replication,
    /// Settings in the order in which they apply: those of `options` (`-c k=v`, `--k=v`), then the others as sent.
    /// `user`, `database`, `options`, `replication` and `_pq_.` names are not among them.
    pub settings: Vec<Pair>,
}

/// The longest list of anything in one message (options, columns, fields): PostgreSQL's own limit of columns.
const LIST_LEN_MAX: usize = 1664;

/// A reader over a body: takes from the front, never past the end.
struct Reader<'a> {
    message: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(message: &'static str, rest: &'a [u8]) -> Self {
        Self { message, rest }
    }

    fn malformed(&self, what: &'static str) -> Malformed {
        Malformed { message: self.message, what }
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (front, rest) = self.rest.split_at_checked(len).ok_or(self.malformed("too short"))?;
        self.rest = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (front, rest) = self.rest.split_first_chunk::<N>().ok_or(self.malformed("too short"))?;
        self.rest = rest;
        Ok(*front)
    }

    fn i32(&mut self) -> Result<i32, Malformed> {
        self.array().map(i32::from_be_bytes)
    }

    fn i16(&mut self) -> Result<i16, Malformed> {
        self.array().map(i16::from_be_bytes)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Up to the next NUL, which is taken too.
    fn cstring(&mut self) -> Result<&'a [u8], Malformed> {
        let nul = self.rest.iter().position(|b| *b == 0).ok_or(self.malformed("string without an end"))?;
        let text = self.bytes(nul)?;
        self.bytes(1)?;
        Ok(text)
    }

    /// A count that a list starts with; bounded, so that it may size an allocation.
    fn count(&mut self) -> Result<usize, Malformed> {
        let count = self.i16()?;
        usize::try_from(count).ok().filter(|n| *n <= LIST_LEN_MAX).ok_or(self.malformed("impossible count"))
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed("bytes after its end")) }
    }
}

/// The first packet of a connection, by its request code; `body` starts with the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstPacket<'a> {
    /// May we speak TLS?
    SslRequest,
    /// May we speak GSS encryption?
    GssEncRequest,
    /// Cancel what runs under this key.
    Cancel(CancelKey),
    /// A StartupMessage of this version; the rest of its body is still to be read.
    Startup {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
        /// What follows the version.
        parameters: &'a [u8],
    },
}

/// Tells the first packets apart.
///
/// # Errors
/// [`Malformed`] for a request with a wrong length or an impossible cancel secret.
pub fn first_packet(body: &[u8]) -> Result<FirstPacket<'_>, Malformed> {
    let mut reader = Reader::new("startup packet", body);
    let code = reader.i32()?;
    match code {
        SSL_REQUEST_CODE => {
            reader.message = "SSLRequest";
            reader.end().map(|()| FirstPacket::SslRequest)
        }
        GSSENC_REQUEST_CODE => {
            reader.message = "GSSENCRequest";
            reader.end().map(|()| FirstPacket::GssEncRequest)
        }
        CANCEL_REQUEST_CODE => {
            reader.message = "CancelRequest";
            cancel_key(reader).map(FirstPacket::Cancel)
        }
        version => {
            let [a, b, c, d] = version.to_be_bytes();
            let (major, minor) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            Ok(FirstPacket::Startup { major, minor, parameters: reader.rest })
        }
    }
}

fn cancel_key(mut reader: Reader<'_>) -> Result<CancelKey, Malformed> {
    let pid = reader.i32()?;
    if !CANCEL_SECRET_BYTES.contains(&reader.rest.len()) {
        return Err(reader.malformed("secret is not 4 to 256 bytes long"));
    }
    Ok(CancelKey { pid, secret: reader.rest.into() })
}

/// Reads the names and values of a StartupMessage, in order.
///
/// # Errors
/// [`Malformed`] where a string has no end or the terminator is not the last byte.
pub fn startup_pairs(parameters: &[u8]) -> Result<Vec<PairRef<'_>>, Malformed> {
    let mut reader = Reader::new("startup packet", parameters);
    let mut pairs = Vec::new();
    loop {
        let name = reader.cstring()?;
        if name.is_empty() {
            return reader.end().map(|()| pairs);
        }
        pairs.push((name, reader.cstring()?));
    }
}

/// Splits `options` as PostgreSQL does (pg_split_opts: white space separates, a backslash takes the next byte as it is)
/// and reads the settings in it: `-c name=value`, `-cname=value`, `--name=value`; `-` in a name means `_`.
///
/// # Errors
/// [`Malformed`] for any other switch, or a setting without a value.
pub fn options(text: &[u8]) -> Result<Vec<Pair>, Malformed> {
    let malformed = |what| Malformed { message: "startup parameter \"options\"", what };
    let mut words = split_options(text).into_iter();
    let mut settings = Vec::new();
    while let Some(word) = words.next() {
        let assignment = match word.as_slice() {
            b"-c" => words.next().ok_or(malformed("-c requires a value"))?,
            [b'-', b'c', rest @ ..] | [b'-', b'-', rest @ ..] if !rest.is_empty() => rest.to_vec(),
            _ => return Err(malformed("only -c name=value and --name=value are understood")),
        };
        let equals = assignment.iter().position(|b| *b == b'=').ok_or(malformed("a setting requires a value"))?;
        let (name, value) = assignment.split_at(equals);
        if name.is_empty() {
            return Err(malformed("a setting requires a name"));
        }
        let name: Box<[u8]> = name.iter().map(|b| if *b == b'-' { b'_' } else { *b }).collect();
        settings.push((name, value.get(1..).unwrap_or_default().into()));
    }
    Ok(settings)
}

fn split_options(text: &[u8]) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        // isspace() of the C locale, which has the vertical tab that is_ascii_whitespace lacks.
        if byte.is_ascii_whitespace() || *byte == 0x0b {
            words.extend(word.take());
            continue;
        }
        let taken = if *byte == b'\\' { bytes.next() } else { Some(byte) };
        word.get_or_insert_default().extend(taken);
    }
    words.extend(word);
    words
}

/// A client's first SASL message: the mechanism, and data where it sent any.
///
/// # Errors
/// [`Malformed`].
pub fn sasl_initial_response(body: &[u8]) -> Result<(&[u8], Option<&[u8]>), Malformed> {
    let mut reader = Reader::new("SASLInitialResponse", body);
    let mechanism = reader.cstring()?;
    let length = reader.i32()?;
    if length == -1 {
        return reader.end().map(|()| (mechanism, None));
    }
    let length = usize::try_from(length).map_err(|_| reader.malformed("impossible length"))?;
    let data = reader.bytes(length)?;
    reader.end().map(|()| (mechanism, Some(data)))
}

/// A PasswordMessage: the password, or the answer to an md5 challenge.
///
/// # Errors
/// [`Malformed`] unless it is exactly one string.
pub fn password(body: &[u8]) -> Result<&[u8], Malformed> {
    let mut reader = Reader::new("PasswordMessage", body);
    let text = reader.cstring()?;
    reader.end().map(|()| text)
}

/// What a server asks of us, or says about our login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authentication<'a> {
    /// We are in.
    Ok,
    /// Send the password.
    Cleartext,
    /// Send md5 with this salt.
    Md5([u8; 4]),
    /// Choose one of these SASL mechanisms.
    Sasl(Vec<&'a [u8]>),
    /// A challenge.
    SaslContinue(&'a [u8]),
    /// The server's proof.
    SaslFinal(&'a [u8]),
    /// A method that this proxy does not speak (GSS, SSPI, Kerberos …), by its number.
    Other(i32),
}

/// Reads an Authentication message.
///
/// # Errors
/// [`Malformed`].
pub fn authentication(body: &[u8]) -> Result<Authentication<'_>, Malformed> {
    let mut reader = Reader::new("Authentication", body);
    match reader.i32()? {
        0 => reader.end().map(|()| Authentication::Ok),
        3 => reader.end().map(|()| Authentication::Cleartext),
        5 => {
            let salt = reader.array()?;
            reader.end().map(|()| Authentication::Md5(salt))
        }
        10 => {
            let mut mechanisms = Vec::new();
            loop {
                let mechanism = reader.cstring()?;
                if mechanism.is_empty() {
                    return reader.end().map(|()| Authentication::Sasl(mechanisms));
                }
                mechanisms.push(mechanism);
            }
        }
        11 => Ok(Authentication::SaslContinue(reader.rest)),
        12 => Ok(Authentication::SaslFinal(reader.rest)),
        other => Ok(Authentication::Other(other)),
    }
}

/// What an ErrorResponse or NoticeResponse of a server says; absent fields are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notice<'a> {
    /// `V` where there is one, else `S`.
    pub severity: &'a [u8],
    /// `C`: as sent, need not be five characters.
    pub sqlstate: &'a [u8],
    /// `M`.
    pub message: &'a [u8],
    /// `D`.
    pub detail: &'a [u8],
    /// `H`.
    pub hint: &'a [u8],
}

/// Reads an ErrorResponse or NoticeResponse. What is missing stays empty; what is cut off ends the reading: a broken
/// error is still an error.
#[must_use]
pub fn notice(body: &[u8]) -> Notice<'_> {
    let mut reader = Reader::new("ErrorResponse", body);
    let mut notice = Notice::default();
    while let Ok(code @ 1..) = reader.u8() {
        let Ok(text) = reader.cstring() else { break };
        match code {
            b'S' if notice.severity.is_empty() => notice.severity = text,
            b'V' => notice.severity = text,
            b'C' => notice.sqlstate = text,
            b'M' => notice.message = text,
            b'D' => notice.detail = text,
            b'H' => notice.hint = text,
            // Position, context, schema, file, line …: not ours to look at; new codes may come.
            _ => {}
        }
    }
    notice
}

/// A ParameterStatus: name and value.
///
/// # Errors
/// [`Malformed`].
pub fn parameter_status(body: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let mut reader = Reader::new("ParameterStatus", body);
    let pair = (reader.cstring()?, reader.cstring()?);
    reader.end().map(|()| pair)
}

/// A BackendKeyData.
///
/// # Errors
/// [`Malformed`], also for a secret that is not 4 to 256 bytes long.
pub fn backend_key_data(body: &[u8]) -> Result<CancelKey, Malformed> {
    cancel_key(Reader::new("BackendKeyData", body))
}

/// What a ReadyForQuery says about the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// `I`: none.
    Idle,
    /// `T`: in one.
    InTransaction,
    /// `E`: in a failed one.
    Failed,
}

/// Reads a ReadyForQuery.
///
/// # Errors
/// [`Malformed`] for another status byte.
pub fn ready_for_query(body: &[u8]) -> Result<Status, Malformed> {
    match body {
        b"I" => Ok(Status::Idle),
        b"T" => Ok(Status::InTransaction),
        b"E" => Ok(Status::Failed),
        _ => Err(Malformed { message: "ReadyForQuery", what: "unknown transaction status" }),
    }
}

/// A NegotiateProtocolVersion: the version the server speaks (as a number), and the options it does not know.
///
/// # Errors
/// [`Malformed`].
pub fn negotiate_protocol_version(body: &[u8]) -> Result<(i32, Vec<&[u8]>), Malformed> {
    let mut reader = Reader::new("NegotiateProtocolVersion", body);
    let version = reader.i32()?;
    let count = reader.i32()?;
    let count =
        usize::try_from(count).ok().filter(|n| *n <= LIST_LEN_MAX).ok_or(reader.malformed("impossible count"))?;
    let options = (0..count).map(|_| reader.cstring()).collect::<Result<_, _>>()?;
    reader.end().map(|()| (version, options))
}

/// The names of the columns in a RowDescription.
///
/// # Errors
/// [`Malformed`].
pub fn row_description(body: &[u8]) -> Result<Vec<&[u8]>, Malformed> {
    // Behind each name: table oid, column, type oid, length, modifier, format.
    const FIXED_BYTES: usize = 4 + 2 + 4 + 2 + 4 + 2;
    let mut reader = Reader::new("RowDescription", body);
    let count = reader.count()?;
    let mut names = Vec::with_capacity(count);
    for _ in 0..count {
        names.push(reader.cstring()?);
        reader.bytes(FIXED_BYTES)?;
    }
    reader.end().map(|()| names)
}

/// The values of a DataRow; `None` is NULL.
///
/// # Errors
/// [`Malformed`].
pub fn data_row(body: &[u8]) -> Result<Vec<Option<&[u8]>>, Malformed> {
    let mut reader = Reader::new("DataRow", body);
    let count = reader.count()?;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        let length = reader.i32()?;
        values.push(match usize::try_from(length) {
            Ok(length) => Some(reader.bytes(length)?),
            Err(_) if length == -1 => None,
            Err(_) => return Err(reader.malformed("impossible length")),
        });
    }
    reader.end().map(|()| values)
}

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

/// Writes a StartupMessage of protocol 3.0.
pub fn put_startup(out: &mut BytesMut, pairs: &[PairRef<'_>]) {
    put_counted(out, |out| {
        out.put_i32(PROTOCOL_3_0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame;
    use proptest::prelude::*;

    fn body_of(write: impl FnOnce(&mut BytesMut)) -> (u8, Vec<u8>) {
        let mut out = BytesMut::new();
        write(&mut out);
        let frame = frame::next(&out, 1 << 20).unwrap().unwrap();
        assert_eq!(frame.len_bytes(), out.len());
        (frame.tag, frame.body.to_vec())
    }

    /// Every reader, so that a new one is not forgotten.
    fn read_with_all(bytes: &[u8]) {
        let _ = first_packet(bytes);
        let _ = startup_pairs(bytes);
        let _ = options(bytes);
        let _ = sasl_initial_response(bytes);
        let _ = password(bytes);
        let _ = authentication(bytes);
        let _ = notice(bytes);
        let _ = parameter_status(bytes);
        let _ = backend_key_data(bytes);
        let _ = ready_for_query(bytes);
        let _ = negotiate_protocol_version(bytes);
        let _ = row_description(bytes);
        let _ = data_row(bytes);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            read_with_all(&bytes);
        }

        #[test]
        fn small_numbers_in_front_do_not_either(front in proptest::collection::vec(0u8..4, 0..12), rest in proptest::collection::vec(any::<u8>(), 0..40)) {
            read_with_all(&[front, rest].concat());
        }

        #[test]
        fn a_cut_message_is_malformed_and_not_misread(cut in 0usize..100) {
            let mut out = BytesMut::new();
            put_startup(&mut out, &[(b"user", b"alice"), (b"database", b"app"), (b"application_name", b"x y")]);
            let body = frame::startup(&out).unwrap().unwrap();
            let FirstPacket::Startup { parameters, .. } = first_packet(body).unwrap() else { panic!("not a startup") };
            let cut = cut % parameters.len();
            prop_assert!(startup_pairs(&parameters[..cut]).is_err());
        }

        #[test]
        fn sasl_messages_are_read_as_written(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (tag, body) = body_of(|out| put_sasl_initial_response(out, b"SCRAM-SHA-256", &data));
            prop_assert_eq!(tag, b'p');
            prop_assert_eq!(sasl_initial_response(&body).unwrap(), (&b"SCRAM-SHA-256"[..], Some(&data[..])));
        }
    }

    #[test]
    fn first_packets_are_told_apart() {
        assert_eq!(first_packet(&SSL_REQUEST_CODE.to_be_bytes()), Ok(FirstPacket::SslRequest));
        assert_eq!(first_packet(&GSSENC_REQUEST_CODE.to_be_bytes()), Ok(FirstPacket::GssEncRequest));
        assert!(first_packet(&[&SSL_REQUEST_CODE.to_be_bytes()[..], b"x"].concat()).is_err());
        assert!(first_packet(b"\0\x03").is_err());
        let packet = first_packet(b"\0\x03\x27\x0fuser\0").unwrap();
        assert_eq!(packet, FirstPacket::Startup { major: 3, minor: 9999, parameters: b"user\0" });
    }

    #[test]
    fn cancel_secrets_have_4_to_256_bytes() {
        for (len, good) in [(0, false), (3, false), (4, true), (32, true), (256, true), (257, false)] {
            let key = CancelKey { pid: -7, secret: vec![9; len].into() };
            let mut out = BytesMut::new();
            put_cancel_request(&mut out, &key);
            let read = first_packet(frame::startup(&out).unwrap().unwrap());
            assert_eq!(read == Ok(FirstPacket::Cancel(key.clone())), good, "{len}");
            assert_eq!(backend_key_data(&body_of(|out| put_backend_key_data(out, &key)).1).is_ok(), good, "{len}");
        }
    }

    #[test]
    fn a_startup_message_ends_with_its_terminator() {
        assert_eq!(startup_pairs(b"user\0a\0\0").unwrap(), vec![(&b"user"[..], &b"a"[..])]);
        assert_eq!(startup_pairs(b"user\0\xff\xfe\0\0").unwrap(), vec![(&b"user"[..], &b"\xff\xfe"[..])]);
        assert_eq!(startup_pairs(b"user\0\0\0").unwrap(), vec![(&b"user"[..], &b""[..])]);
        assert!(startup_pairs(b"user\0a\0").is_err());
        assert!(startup_pairs(b"user\0a\0\0x").is_err());
        assert!(startup_pairs(b"").is_err());
    }

    #[test]
    fn options_are_split_as_postgresql_splits_them() {
        let read = |text: &[u8]| {
            options(text).map(|pairs| {
                pairs
                    .into_iter()
                    .map(|(n, v)| format!("{}={}", String::from_utf8_lossy(&n), String::from_utf8_lossy(&v)))
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(read(b"").unwrap(), Vec::<String>::new());
        assert_eq!(read(b"-c a=1 -cb=2\t--work-mem=64MB").unwrap(), ["a=1", "b=2", "work_mem=64MB"]);
        assert_eq!(read(br"  -c search_path=a,\ b\\c ").unwrap(), [r"search_path=a, b\c"]);
        assert_eq!(read(b"-c a=b=c --e=").unwrap(), ["a=b=c", "e="]);
        for wrong in [&b"-c"[..], b"-c a", b"--", b"-B 5", b"word", b"-c =1"] {
            assert!(read(wrong).is_err(), "{}", String::from_utf8_lossy(wrong));
        }
    }

    #[test]
    fn authentication_requests_are_read_as_written() {
        for request in [
            Authentication::Ok,
            Authentication::Cleartext,
            Authentication::Md5([1, 2, 3, 4]),
            Authentication::Sasl(vec![b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"]),
            Authentication::SaslContinue(b"r=x"),
            Authentication::SaslFinal(b"v=y"),
            Authentication::Other(7),
        ] {
            let (tag, body) = body_of(|out| put_authentication(out, &request));
            assert_eq!((tag, authentication(&body).unwrap()), (b'R', request));
        }
    }

    #[test]
    fn a_broken_error_is_still_an_error() {
        let full = notice(b"SERREUR\0VERROR\0C28P01\0Mno\0Ddetail\0Hhint\0Ffile\0\0");
        assert_eq!((full.severity, full.sqlstate, full.message), (&b"ERROR"[..], &b"28P01"[..], &b"no"[..]));
        assert_eq!((full.detail, full.hint), (&b"detail"[..], &b"hint"[..]));
        assert_eq!(notice(b"").sqlstate, b"");
        assert_eq!(notice(b"Mcut o").message, b"");
        assert_eq!(notice(b"SFATAL\0C").severity, b"FATAL");
    }

    #[test]
    fn rows_are_bounded_by_their_body() {
        assert_eq!(data_row(b"\0\x02\0\0\0\x01a\xff\xff\xff\xff").unwrap(), vec![Some(&b"a"[..]), None]);
        for wrong in [&b"\x7f\xff"[..], b"\0\x01\0\0\0\x05a", b"\0\x01\xff\xff\xff\xfe", b"\0\0x", b"\xff\xff"] {
            assert!(data_row(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(row_description(&[b"\0\x01name\0", &[0; 18][..]].concat()).unwrap(), vec![b"name"]);
        assert!(row_description(b"\0\x01name\0").is_err());
    }

    #[test]
    fn unknown_options_are_echoed_as_they_came() {
        let unknown: [&[u8]; 2] = [b"_pq_.a", b"_pq_.\xff"];
        let (tag, body) = body_of(|out| put_negotiate_protocol_version(out, Protocol::V3_2, &unknown));
        assert_eq!(tag, b'v');
        assert_eq!(negotiate_protocol_version(&body).unwrap(), (0x3_0002, unknown.to_vec()));
        assert!(negotiate_protocol_version(b"\0\x03\0\0\x7f\xff\xff\xff").is_err());
    }
}
