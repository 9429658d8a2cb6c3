//! Every word and SQLSTATE that this proxy says to a peer in its own name, and who is to blame.
//!
//! Invariant: pure, and one place: an ErrorResponse or NoticeResponse of ours is written nowhere else. Where
//! PostgreSQL has words for a case they are PostgreSQL's. Source: PostgreSQL, errcodes.txt; "Error and Notice Message
//! Fields".

use std::borrow::Cow;
use std::fmt;

use bytes::{BufMut, BytesMut};

/// Whose fault a failure is; also the metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The client: wrong password, broken protocol.
    Client,
    /// This process: a limit of ours, a bug of ours.
    Proxy,
    /// The server a database lives on now.
    Source,
    /// The server a database is to move to.
    Target,
    /// Who runs us: a wrong setting, an ordered shutdown.
    Operator,
}

impl Blame {
    /// The word in logs and metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Proxy => "proxy",
            Self::Source => "source",
            Self::Target => "target",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A five-character SQLSTATE.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState([u8; 5]);

impl SqlState {
    /// 08001: a connection to the server could not be made.
    pub const CANNOT_CONNECT: Self = Self(*b"08001");
    /// 08006: the connection was lost.
    pub const CONNECTION_FAILURE: Self = Self(*b"08006");
    /// 08P01: the peer broke the protocol.
    pub const PROTOCOL_VIOLATION: Self = Self(*b"08P01");
    /// 0A000: not supported here.
    pub const FEATURE_NOT_SUPPORTED: Self = Self(*b"0A000");
    /// 22023: a setting has no such value.
    pub const INVALID_PARAMETER_VALUE: Self = Self(*b"22023");
    /// 25006: a write in a read-only transaction.
    pub const READ_ONLY_TRANSACTION: Self = Self(*b"25006");
    /// 28000: this user may not log in this way.
    pub const INVALID_AUTHORIZATION: Self = Self(*b"28000");
    /// 28P01: wrong password (or no such user).
    pub const INVALID_PASSWORD: Self = Self(*b"28P01");
    /// 3D000: no such database.
    pub const UNKNOWN_DATABASE: Self = Self(*b"3D000");
    /// 42501: not allowed.
    pub const INSUFFICIENT_PRIVILEGE: Self = Self(*b"42501");
    /// 42601: not in the grammar.
    pub const SYNTAX_ERROR: Self = Self(*b"42601");
    /// 42704: no object of that name.
    pub const UNDEFINED_OBJECT: Self = Self(*b"42704");
    /// 53300: no more connections.
    pub const TOO_MANY_CONNECTIONS: Self = Self(*b"53300");
    /// 53400: more than a limit of ours.
    pub const CONFIGURATION_LIMIT_EXCEEDED: Self = Self(*b"53400");
    /// 54000: longer than can be taken.
    pub const PROGRAM_LIMIT_EXCEEDED: Self = Self(*b"54000");
    /// 55000: not in the state this needs.
    pub const WRONG_STATE: Self = Self(*b"55000");
    /// 55P03: what this needs was not free in time.
    pub const NOT_AVAILABLE_IN_TIME: Self = Self(*b"55P03");
    /// 57014: cancelled.
    pub const QUERY_CANCELED: Self = Self(*b"57014");
    /// 57P01: closed by the operator.
    pub const ADMIN_SHUTDOWN: Self = Self(*b"57P01");
    /// 57P03: not accepting work now; try again.
    pub const CANNOT_CONNECT_NOW: Self = Self(*b"57P03");
    /// XX000: a bug of ours.
    pub const INTERNAL_ERROR: Self = Self(*b"XX000");

    /// A SQLSTATE as a peer sent it; `None` unless it is five of `0-9A-Z`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let code: [u8; 5] = bytes.try_into().ok()?;
        code.iter().all(|c| c.is_ascii_digit() || c.is_ascii_uppercase()).then_some(Self(code))
    }

    /// The five characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Only ASCII can be in here: constants above, or `parse`.
        std::str::from_utf8(&self.0).unwrap_or("XX000")
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the peer may do after it read this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The connection goes on.
    Error,
    /// We close the connection after it.
    Fatal,
    /// Worth a look, nothing failed.
    Warning,
    /// Told, nothing failed.
    Notice,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
            Self::Warning => "WARNING",
            Self::Notice => "NOTICE",
        }
    }

    fn tag(self) -> u8 {
        match self {
            Self::Error | Self::Fatal => b'E',
            Self::Warning | Self::Notice => b'N',
        }
    }
}

/// One thing to tell a peer, and to log once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// How bad, and whether the connection survives.
    pub severity: Severity,
    /// For programs.
    pub sqlstate: SqlState,
    /// For people; no internal address, no full stop.
    pub message: Cow<'static, str>,
    /// More of the facts.
    pub detail: Option<Cow<'static, str>>,
    /// What to do.
    pub hint: Option<Cow<'static, str>>,
    /// Whose fault.
    pub blame: Blame,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.severity.as_str(), self.message, self.sqlstate)?;
        match &self.detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Report {}

impl Report {
    /// An ERROR: the connection goes on.
    #[must_use]
    pub fn error(sqlstate: SqlState, message: impl Into<Cow<'static, str>>, blame: Blame) -> Self {
        Self { severity: Severity::Error, sqlstate, message: message.into(), detail: None, hint: None, blame }
    }

    /// A FATAL: the connection is closed after it.
    #[must_use]
    pub fn fatal(sqlstate: SqlState, message: impl Into<Cow<'static, str>>, blame: Blame) -> Self {
        Self { severity: Severity::Fatal, ..Self::error(sqlstate, message, blame) }
    }

    /// A NOTICE: nothing failed.
    #[must_use]
    pub fn notice(message: impl Into<Cow<'static, str>>) -> Self {
        Self { severity: Severity::Notice, ..Self::error(SqlState(*b"00000"), message, Blame::Proxy) }
    }

    /// The same with more facts.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// The same with advice.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Appends the ErrorResponse (or NoticeResponse) to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u8(self.severity.tag());
        let length_at = out.len();
        out.put_i32(0);
        put_field(out, b'S', self.severity.as_str());
        // V: the severity that is never translated (since 9.6).
        put_field(out, b'V', self.severity.as_str());
        put_field(out, b'C', self.sqlstate.as_str());
        put_field(out, b'M', &self.message);
        if let Some(detail) = &self.detail {
            put_field(out, b'D', detail);
        }
        if let Some(hint) = &self.hint {
            put_field(out, b'H', hint);
        }
        out.put_u8(0);
        let length = u32::try_from(out.len() - length_at).unwrap_or(u32::MAX);
        if let Some(place) = out.get_mut(length_at..length_at + 4) {
            place.copy_from_slice(&length.to_be_bytes());
        }
    }

    /// The message as bytes of its own.
    #[must_use]
    pub fn to_bytes(&self) -> BytesMut {
        let mut out = BytesMut::with_capacity(256);
        self.encode(&mut out);
        out
    }
}

/// An ErrorResponse that refuses a write (25006) with `advice` as its hint; `None` for another one, or one that has a hint.
#[must_use]
pub fn advised(body: &[u8], advice: &str) -> Option<BytesMut> {
    let (mut is_refusal, mut rest) = (false, body);
    loop {
        let (field, after) = match rest {
            [0] => break,
            [0, ..] | [] => return None,
            [field, after @ ..] => (field, after),
        };
        let end = after.iter().position(|byte| *byte == 0)?;
        match field {
            b'C' => is_refusal = after[..end] == SqlState::READ_ONLY_TRANSACTION.0,
            b'H' => return None,
            _ => {}
        }
        rest = &after[end + 1..];
    }
    let fields = body.strip_suffix(&[0]).filter(|_| is_refusal)?;
    let mut hint = BytesMut::new();
    put_field(&mut hint, b'H', advice);
    let mut out = BytesMut::new();
    out.put_u8(b'E');
    out.put_u32(u32::try_from(4 + body.len() + hint.len()).ok()?);
    out.put_slice(fields);
    out.put_slice(&hint);
    out.put_u8(0);
    Some(out)
}

/// The cases that occur, each in one place.
impl Report {
    /// 28P01, for a wrong password and for a user that does not exist alike.
    #[must_use]
    pub fn password_authentication_failed(user: &[u8]) -> Self {
        let message = format!("password authentication failed for user \"{}\"", shown(user));
        Self::fatal(SqlState::INVALID_PASSWORD, message, Blame::Client)
    }

    /// 28000: no such user, where no password is asked for (trust).
    #[must_use]
    pub fn role_does_not_exist(user: &[u8]) -> Self {
        let message = format!("role \"{}\" does not exist", shown(user));
        Self::fatal(SqlState::INVALID_AUTHORIZATION, message, Blame::Client)
    }

    /// 28000: the client's certificate is good and names somebody else, or nobody.
    #[must_use]
    pub fn certificate_authentication_failed(user: &[u8]) -> Self {
        let message = format!("certificate authentication failed for user \"{}\"", shown(user));
        Self::fatal(SqlState::INVALID_AUTHORIZATION, message, Blame::Client)
            .with_hint("The certificate's subject must have exactly one common name (CN), and it must be the user.")
    }

    /// 57P03: nobody answered who this user is; the cause goes to the log.
    #[must_use]
    pub fn user_lookup_unanswered() -> Self {
        let message = "the user could not be looked up: no answer to auth_query";
        Self::fatal(SqlState::CANNOT_CONNECT_NOW, message, Blame::Source)
    }

    /// 28000: the question who this user is makes no sense where it was asked; the cause goes to the log.
    #[must_use]
    pub fn user_lookup_failed() -> Self {
        let message = "the user could not be looked up: auth_query failed";
        Self::fatal(SqlState::INVALID_AUTHORIZATION, message, Blame::Operator).with_hint("The proxy's log says why.")
    }

    /// 28000: the client came without TLS and must not.
    #[must_use]
    pub fn tls_required() -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, "connection requires TLS", Blame::Client)
            .with_hint("Use sslmode=require or stronger.")
    }

    /// 3D000.
    #[must_use]
    pub fn database_does_not_exist(database: &[u8]) -> Self {
        let message = format!("database \"{}\" does not exist", shown(database));
        Self::fatal(SqlState::UNKNOWN_DATABASE, message, Blame::Client)
    }

    /// 53300: `max_client_conn` is reached.
    #[must_use]
    pub fn too_many_clients() -> Self {
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, "sorry, too many clients already", Blame::Operator)
    }

    /// 53300: a per-user limit is reached.
    #[must_use]
    pub fn too_many_connections_for_role(user: &[u8]) -> Self {
        let message = format!("too many connections for role \"{}\"", shown(user));
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, message, Blame::Operator)
    }

    /// 53300: a per-database limit is reached.
    #[must_use]
    pub fn too_many_connections_for_database(database: &[u8]) -> Self {
        let message = format!("too many connections for database \"{}\"", shown(database));
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, message, Blame::Operator)
    }

    /// 08P01: the client's bytes make no sense; `what` says which and why.
    #[must_use]
    pub fn protocol_violation(what: impl Into<Cow<'static, str>>) -> Self {
        Self::fatal(SqlState::PROTOCOL_VIOLATION, what, Blame::Client)
    }

    /// 0A000: a protocol version that is not 3.x; PostgreSQL's words.
    #[must_use]
    pub fn unsupported_protocol(major: u16, minor: u16) -> Self {
        let message = format!("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2");
        Self::fatal(SqlState::FEATURE_NOT_SUPPORTED, message, Blame::Client)
    }

    /// 57P01: the operator closed this connection.
    #[must_use]
    pub fn admin_shutdown() -> Self {
        Self::fatal(SqlState::ADMIN_SHUTDOWN, "terminating connection due to administrator command", Blame::Operator)
    }

    /// 57P03: this process takes no new clients because it is going down.
    #[must_use]
    pub fn shutting_down() -> Self {
        Self::fatal(SqlState::CANNOT_CONNECT_NOW, "the database system is shutting down", Blame::Operator)
    }

    /// 57P03: `DISABLE db`.
    #[must_use]
    pub fn database_disabled(database: &[u8]) -> Self {
        let message = format!("database \"{}\" is disabled", shown(database));
        Self::fatal(SqlState::CANNOT_CONNECT_NOW, message, Blame::Operator)
    }

    /// 57P03: no server connection came free within `query_wait_timeout`; safe to retry, nothing was sent.
    #[must_use]
    pub fn query_wait_timeout() -> Self {
        Self::fatal(
            SqlState::CANNOT_CONNECT_NOW,
            "no server connection became free in time (query_wait_timeout)",
            Blame::Proxy,
        )
        .with_hint("Nothing was sent to the server; the transaction can be retried.")
    }

    /// 57P03: held by a pause for longer than `hold_budget`; safe to retry, nothing was sent.
    #[must_use]
    pub fn held_too_long() -> Self {
        Self::fatal(
            SqlState::CANNOT_CONNECT_NOW,
            "the database is paused for longer than this client may be held (hold_budget)",
            Blame::Operator,
        )
        .with_hint("Nothing was sent to the server; the transaction can be retried.")
    }

    /// 57014: a cancel request reached this statement.
    #[must_use]
    pub fn query_canceled() -> Self {
        Self::error(SqlState::QUERY_CANCELED, "canceling statement due to user request", Blame::Client)
    }

    /// 08006: the client hung up in the middle of its login (psql does, to ask for the password).
    #[must_use]
    pub fn client_gone() -> Self {
        Self::fatal(SqlState::CONNECTION_FAILURE, "client closed the connection during login", Blame::Client)
    }

    /// 08P01: bytes came between a client's request for TLS and our answer to it.
    #[must_use]
    pub fn unencrypted_data() -> Self {
        Self::protocol_violation("received unencrypted data after SSL request").with_detail(
            "This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.",
        )
    }

    /// 57014: the login took longer than `client_login_timeout`.
    #[must_use]
    pub fn login_timeout() -> Self {
        Self::fatal(SqlState::QUERY_CANCELED, "canceling authentication due to timeout", Blame::Client)
    }

    /// 08006: the server connection broke while it was this client's.
    #[must_use]
    pub fn server_connection_lost() -> Self {
        Self::fatal(SqlState::CONNECTION_FAILURE, "server closed the connection unexpectedly", Blame::Source)
    }

    /// 57P03: no connection to the server can be had now; the cause goes to the log, not to the client.
    #[must_use]
    pub fn server_unavailable(database: &[u8]) -> Self {
        let message = format!("the server of database \"{}\" is not available", shown(database));
        Self::fatal(SqlState::CANNOT_CONNECT_NOW, message, Blame::Source)
    }

    /// 0A000: a named statement where the next transaction may run on another server connection.
    #[must_use]
    pub fn named_statement() -> Self {
        let message = "named prepared statements are switched off in transaction pooling (max_prepared_statements = 0)";
        Self::fatal(SqlState::FEATURE_NOT_SUPPORTED, message, Blame::Operator)
            .with_hint("Use session pooling for this user, or let the driver send unnamed statements.")
    }

    /// 0A000: SQL prepared a statement on a server connection that the client does not keep.
    #[must_use]
    pub fn prepared_by_sql() -> Self {
        let message =
            "PREPARE is not supported in transaction pooling: the statement is lost, and so is this connection";
        Self::fatal(SqlState::FEATURE_NOT_SUPPORTED, message, Blame::Client)
            .with_hint("Use session pooling for this user, or let the driver prepare statements by the protocol.")
    }

    /// 0A000: named statements in a sequence of messages whose answers can't be told apart.
    #[must_use]
    pub fn statements_out_of_order() -> Self {
        let message = "named prepared statements can't be followed through a Query or COPY in the middle of a batch";
        Self::fatal(SqlState::FEATURE_NOT_SUPPORTED, message, Blame::Client)
            .with_hint("End the batch with Sync first, or use session pooling for this user.")
    }

    /// 53400: a client's statements are too many, or too long together.
    #[must_use]
    pub fn too_many_statements() -> Self {
        let message = "too many named prepared statements for one client in transaction pooling";
        Self::fatal(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message, Blame::Client)
            .with_hint("Close statements that are not used any more, or use session pooling for this user.")
    }

    /// 54000: a named statement's text does not fit.
    #[must_use]
    pub fn statement_too_long(bytes_max: usize) -> Self {
        let message =
            format!("a named prepared statement is longer than the {bytes_max} bytes that transaction pooling takes");
        Self::fatal(SqlState::PROGRAM_LIMIT_EXCEEDED, message, Blame::Client)
            .with_hint("Use an unnamed statement, or session pooling for this user.")
    }

    /// 22023: the server refused a setting that the client asked for in its Startup; `why` are the server's words.
    #[must_use]
    pub fn settings_refused(why: &str) -> Self {
        let message = format!("the server refused this session's settings: {why}");
        Self::fatal(SqlState::INVALID_PARAMETER_VALUE, message, Blame::Client)
    }

    /// XX000: a bug of ours.
    #[must_use]
    pub fn internal(what: impl Into<Cow<'static, str>>) -> Self {
        Self::fatal(SqlState::INTERNAL_ERROR, what, Blame::Proxy)
    }
}

/// A field's text ends at its first NUL: the protocol has no way to carry one.
fn put_field(out: &mut BytesMut, code: u8, text: &str) {
    out.put_u8(code);
    out.put_slice(text.split('\0').next().unwrap_or_default().as_bytes());
    out.put_u8(0);
}

/// Names come as bytes from strangers; a report shows what of them is UTF-8, and not more than PostgreSQL would.
fn shown(name: &[u8]) -> String {
    // NAMEDATALEN - 1 is the longest name; four times that leaves room for every encoding.
    const SHOWN_BYTES_MAX: usize = 252;
    String::from_utf8_lossy(name.get(..SHOWN_BYTES_MAX).unwrap_or(name)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame;
    use proptest::prelude::*;

    fn fields(report: &Report) -> (u8, Vec<(u8, String)>) {
        let bytes = report.to_bytes();
        let frame = frame::next(&bytes, 1 << 20).unwrap().unwrap();
        assert_eq!(frame.len_bytes(), bytes.len());
        let body = frame.body.strip_suffix(b"\0").unwrap();
        let fields = body.split(|b| *b == 0).filter(|f| !f.is_empty());
        let fields = fields.map(|f| (f[0], String::from_utf8(f[1..].to_vec()).unwrap())).collect();
        (frame.tag, fields)
    }

    #[test]
    fn advice_is_added_to_a_refused_write_only_and_once() {
        let body = |report: &Report| report.to_bytes().split_off(frame::HEADER_BYTES);
        let refused = Report::error(SqlState::READ_ONLY_TRANSACTION, "cannot execute INSERT", Blame::Client);
        let advised = super::advised(&body(&refused), "wait").unwrap();
        assert_eq!(advised, refused.clone().with_hint("wait").to_bytes());
        assert_eq!(super::advised(&body(&refused.with_hint("h")), "wait"), None);
        assert_eq!(super::advised(&body(&Report::query_canceled()), "wait"), None);
        for broken in [&b""[..], b"C25006", b"C25006\0", b"\0C25006\0\0"] {
            assert!(super::advised(broken, "wait").is_none(), "{broken:?}");
        }
    }

    #[test]
    fn an_error_response_carries_every_field_once() {
        let report = Report::password_authentication_failed(b"alice").with_detail("d").with_hint("h");
        let (tag, fields) = fields(&report);
        assert_eq!(tag, b'E');
        let wanted = [
            (b'S', "FATAL"),
            (b'V', "FATAL"),
            (b'C', "28P01"),
            (b'M', "password authentication failed for user \"alice\""),
            (b'D', "d"),
            (b'H', "h"),
        ];
        assert_eq!(fields, wanted.map(|(code, text)| (code, text.to_owned())));
    }

    #[test]
    fn a_notice_is_a_notice() {
        assert_eq!(fields(&Report::notice("x")).0, b'N');
        assert_eq!(fields(&Report::query_canceled()).1[0].1, "ERROR");
    }

    #[test]
    fn sqlstates_are_five_of_their_alphabet() {
        assert_eq!(SqlState::parse(b"28P01"), Some(SqlState::INVALID_PASSWORD));
        for wrong in [&b""[..], b"28p01", b"28P0", b"28P011", b"28P\x001", b"\xff\xff\xff\xff\xff"] {
            assert_eq!(SqlState::parse(wrong), None);
        }
    }

    proptest! {
        #[test]
        fn a_strangers_name_cannot_break_the_frame(name in proptest::collection::vec(any::<u8>(), 0..400)) {
            let report = Report::database_does_not_exist(&name);
            let (_, fields) = fields(&report);
            prop_assert_eq!(fields.len(), 4);
        }
    }
}
