//! Why a session can't be moved.
//!
//! Invariant: every refusal has exactly one of these; its word is what consoles and metrics show.

/// One kind of thing that keeps a session where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// It is a replication connection.
    Replication,
    /// A transaction is open, or an answer is due.
    InTransaction,
    /// The session's role may not read its own state (42501).
    CatalogueRights,
    /// More statements, settings, channels or locks than are moved at once.
    TooLarge,
    /// Objects in the temporary schema.
    TemporaryObjects,
    /// A cursor WITH HOLD.
    HeldCursor,
    /// currval or lastval would answer, and can't be made to there.
    SequenceState,
    /// SET SESSION AUTHORIZATION.
    SessionAuthorization,
    /// LOAD.
    Load,
    /// A FunctionCall by an OID of the user's own.
    FunctionCall,
    /// setseed.
    RandomSeed,
    /// set_config with a name made at run time, and no configured names.
    DynamicSetting,
    /// An installed extension or language keeps state in the process that SQL can't see.
    Extension,
    /// Prepared statements, and a setting that changes what their text means has changed.
    ParseSettings,
    /// A PREPARE that was one of several statements in its text.
    PreparedText,
    /// The unnamed statement is alive and its text unknown.
    UnnamedStatement,
    /// Advisory locks that may be held more than once, or by an OID.
    AdvisoryLocks,
    /// An advisory lock is held by another session on the new server.
    LockTaken,
    /// A type of a statement is not there.
    TypeMissing,
    /// A statement's parameters or columns differ.
    StatementDrift,
    /// A setting of the session is not there.
    SettingGone,
    /// A setting has another value.
    SettingDiffers,
    /// Another user or role.
    UserDiffers,
    /// The server refused.
    Server,
}

impl Reason {
    /// The word in consoles and metric labels.
    #[must_use]
    pub fn word(self) -> &'static str {
        self.both().0
    }

    /// The words for an operator.
    #[must_use]
    pub fn text(self) -> &'static str {
        self.both().1
    }

    fn both(self) -> (&'static str, &'static str) {
        match self {
            Self::Replication => ("replication", "a replication connection follows this very server"),
            Self::InTransaction => ("in_transaction", "a transaction is open"),
            Self::CatalogueRights => ("catalogue_rights", "the role may not read the session's state"),
            Self::TooLarge => ("too_large", "too many or too long statements, settings, channels or locks"),
            Self::TemporaryObjects => ("temporary_objects", "temporary objects exist"),
            Self::HeldCursor => ("held_cursor", "a cursor WITH HOLD is open"),
            Self::SequenceState => ("sequence_state", "currval or lastval is defined and can't be restored"),
            Self::SessionAuthorization => ("session_authorization", "SET SESSION AUTHORIZATION was used"),
            Self::Load => ("load", "a library was loaded by LOAD"),
            Self::FunctionCall => ("function_call", "a function was called by its OID"),
            Self::RandomSeed => ("random_seed", "setseed was called"),
            Self::DynamicSetting => ("dynamic_setting", "settings with names made at run time may exist"),
            Self::Extension => ("extension", "an extension may keep state that SQL can't see"),
            Self::ParseSettings => ("parse_settings", "a setting that statements are parsed under has changed"),
            Self::PreparedText => ("prepared_text", "a PREPARE was sent together with other statements"),
            Self::UnnamedStatement => ("unnamed_statement", "the unnamed statement is alive and its text unknown"),
            Self::AdvisoryLocks => ("advisory_locks", "advisory locks may be held more than once or by an OID"),
            Self::LockTaken => ("lock_taken", "an advisory lock is taken on the new server"),
            Self::TypeMissing => ("type_missing", "a type is missing on the new server"),
            Self::StatementDrift => ("statement_drift", "a prepared statement differs on the new server"),
            Self::SettingGone => ("setting_gone", "a setting is missing on the new server"),
            Self::SettingDiffers => ("setting_differs", "a setting differs on the new server"),
            Self::UserDiffers => ("user_differs", "the user or role differs on the new server"),
            Self::Server => ("server", "the server refused"),
        }
    }
}

/// A session stays where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotMovable {
    /// All that was found, at least one, each once, sorted.
    pub reasons: Vec<Reason>,
}

impl From<Reason> for NotMovable {
    fn from(reason: Reason) -> Self {
        Self { reasons: vec![reason] }
    }
}

impl NotMovable {
    /// The words, separated by `,`.
    #[must_use]
    pub fn words(&self) -> String {
        self.reasons.iter().map(|reason| reason.word()).collect::<Vec<_>>().join(",")
    }
}
