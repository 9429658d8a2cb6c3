//! PgBouncers as members of a cutover: held, pointed elsewhere, let go, each by one keeper beside it.
//!
//! A PgBouncer can't read a decision, so nobody commands it from afar: its [`keeper`] does for it what a proxy's own watch does.
//! It holds when the store has an open epoch, renews nothing and follows what is decided; proxyctl only sees it enrolled, like a
//! proxy that nobody listed, and waits for it. So a killed proxyctl, a killed keeper and a killed PgBouncer end as the store says.
//!
//! What was measured of PgBouncer and binds here: the *global* PAUSE only (one of a single database, with its host changed
//! under it, books logins as failures and kills clients); a PAUSE counts when no server connection is left, whatever it
//! answers; RESUME on another connection than the waiting PAUSE; one admin at a time; `server_login_retry` and
//! `query_wait_timeout` are eased for the time of the hold. While it is held all its databases are.
//!
//! Invariant: PgBouncer is resumed on the side it was paused on only after an abort was read, and on the other one only after
//! the evidence is there and SHOW DATABASES says that it points there (R2, R7, R10).

pub mod console;
pub mod keeper;
mod grip;
mod note;
mod point;
mod verdict;

pub use crate::bouncers::console::{Blocker, Console, ConsoleError, Pointed};
pub use crate::bouncers::keeper::{Keeper, Keepers};
