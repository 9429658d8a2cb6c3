//! Reads bodies of messages: what strangers send before they are known, and what servers answer.
//!
//! Invariant: total functions: no bytes make one panic, read past its slice, or allocate more than the slice holds.

use crate::message::{
    Authentication, CANCEL_REQUEST_CODE, CANCEL_SECRET_BYTES, CancelKey, FirstPacket, GSSENC_REQUEST_CODE, Malformed,
    Notice, Pair, PairRef, SSL_REQUEST_CODE, Status,
};

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

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
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

/// A column as a RowDescription tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnRef<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// The OID of its type.
    pub type_oid: u32,
    /// The type's modifier; -1: none.
    pub modifier: i32,
}

/// The columns in a RowDescription.
///
/// # Errors
/// [`Malformed`].
pub fn columns(body: &[u8]) -> Result<Vec<ColumnRef<'_>>, Malformed> {
    let mut reader = Reader::new("RowDescription", body);
    let count = reader.count()?;
    let mut columns = Vec::with_capacity(count);
    for _ in 0..count {
        let name = reader.cstring()?;
        // Table oid and column; behind the type oid its length, behind the modifier the format.
        reader.bytes(4 + 2)?;
        let type_oid = reader.u32()?;
        reader.bytes(2)?;
        let modifier = reader.i32()?;
        reader.bytes(2)?;
        columns.push(ColumnRef { name, type_oid, modifier });
    }
    reader.end().map(|()| columns)
}

/// The OIDs of a statement's parameter types, of a ParameterDescription.
///
/// # Errors
/// [`Malformed`].
pub fn parameter_description(body: &[u8]) -> Result<Vec<u32>, Malformed> {
    let mut reader = Reader::new("ParameterDescription", body);
    // A statement may have 65,535: the count is unsigned here, and not what the allocation trusts.
    let count = u16::from_be_bytes(reader.array()?);
    let types = (0..count).map(|_| reader.u32()).collect::<Result<Vec<_>, _>>()?;
    reader.end().map(|()| types)
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
