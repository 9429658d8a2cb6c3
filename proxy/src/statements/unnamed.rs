//! Whose the unnamed statement of a server connection is while a client uses it.
//!
//! Invariant: a client never binds an unnamed statement that another client has left behind. Its own is kept from one
//! transaction to the next until it has been bound once: that is how drivers use it that prepare and run apart.

/// What a client can say of the server's unnamed statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing: another client may have left it.
    Foreign,
    /// Replaced in the batch that is open: what follows in that batch finds it so or is skipped.
    Sent,
    /// Replaced in a batch that is complete, but not answered: it may have been skipped.
    Unclear,
    /// It is what this client made of it.
    Own,
}

/// The unnamed statement during one transaction.
#[derive(Debug)]
pub(super) struct Unnamed {
    standing: Standing,
    /// What it is if the last replacement is not carried out: foreign or own.
    else_standing: Standing,
    /// Of the last replacement.
    serial: u64,
    /// Its text is kept and it has not been bound yet.
    is_spare: bool,
}

impl Unnamed {
    /// At the beginning of a transaction.
    pub(super) fn new() -> Self {
        Self { standing: Standing::Foreign, else_standing: Standing::Foreign, serial: 0, is_spare: false }
    }

    pub(super) fn standing(&self) -> Standing {
        self.standing
    }

    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// Whether it would be missed if it were replaced, or on another server connection.
    pub(super) fn is_spare(&self) -> bool {
        self.is_spare
    }

    /// A message goes up that replaces it.
    pub(super) fn replace(&mut self, is_kept: bool) -> u64 {
        self.serial += 1;
        if self.standing == Standing::Own {
            self.else_standing = Standing::Own;
        }
        (self.standing, self.is_spare) = (Standing::Sent, is_kept);
        self.serial
    }

    /// A Query goes up: it leaves none.
    pub(super) fn vanish(&mut self) {
        self.serial += 1;
        (self.standing, self.is_spare) = (Standing::Own, false);
    }

    /// The batch is complete.
    pub(super) fn close_batch(&mut self) {
        if self.standing == Standing::Sent {
            self.standing = Standing::Unclear;
        }
    }

    /// A replacement was confirmed.
    pub(super) fn confirm(&mut self, serial: u64) {
        if self.serial == serial {
            self.standing = Standing::Own;
        } else {
            self.else_standing = Standing::Own;
        }
    }

    /// It was bound.
    pub(super) fn spend(&mut self, serial: u64) {
        if self.serial == serial {
            self.is_spare = false;
        }
    }

    /// A replacement was not carried out.
    pub(super) fn lose(&mut self, serial: u64) {
        if self.serial == serial {
            (self.standing, self.is_spare) = (self.else_standing, false);
        }
    }

    /// Nobody can tell any more.
    pub(super) fn forget(&mut self) {
        (self.standing, self.else_standing, self.is_spare) = (Standing::Foreign, Standing::Foreign, false);
    }
}
