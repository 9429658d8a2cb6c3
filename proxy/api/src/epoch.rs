//! Which run and which epoch an order belongs to, and for how long a hold is leased.
//!
//! Invariant: an [`Epoch`] always fits PostgreSQL's `bigint`, a [`Lease`] always ends.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;
use uuid::Uuid;

/// The number of a route's generation: grows by at least one with every cutover that is opened, 0 before the first.
/// Range 0..=2^63-1, so that it is a `bigint` everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Epoch(u64);

impl Epoch {
    /// Before any cutover.
    pub const ZERO: Self = Self(0);
    /// The largest one.
    pub const MAX: Self = Self(i64::MAX as u64);

    /// As the `bigint` of the decision store.
    pub const fn as_i64(self) -> i64 {
        self.0 as i64
    }

    /// As a plain number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

/// A number that is no epoch: negative or above 2^63-1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("an epoch is a whole number from 0 to 9223372036854775807")]
pub struct NotAnEpoch;

impl TryFrom<u64> for Epoch {
    type Error = NotAnEpoch;

    fn try_from(number: u64) -> Result<Self, NotAnEpoch> {
        if number <= Self::MAX.0 { Ok(Self(number)) } else { Err(NotAnEpoch) }
    }
}

impl TryFrom<i64> for Epoch {
    type Error = NotAnEpoch;

    fn try_from(number: i64) -> Result<Self, NotAnEpoch> {
        u64::try_from(number).map(Self).map_err(|_| NotAnEpoch)
    }
}

impl From<Epoch> for u64 {
    fn from(epoch: Epoch) -> Self {
        epoch.0
    }
}

impl FromStr for Epoch {
    type Err = NotAnEpoch;

    fn from_str(text: &str) -> Result<Self, NotAnEpoch> {
        if !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(NotAnEpoch);
        }
        text.parse::<u64>().map_err(|_| NotAnEpoch)?.try_into()
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The identity of one run of `proxyctl`: only its own orders can end what it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(Uuid);

impl RunId {
    /// A new random one.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// As the `uuid` of the decision store.
    pub const fn as_uuid(self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for RunId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

/// A text that is no run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a run is a UUID such as '8a6f0c1e-6a53-4a0e-9d0e-3a6b1c2d4e5f'")]
pub struct NotARun;

impl FromStr for RunId {
    type Err = NotARun;

    fn from_str(text: &str) -> Result<Self, NotARun> {
        Uuid::parse_str(text).map(Self).map_err(|_| NotARun)
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// Whose hold it is: every order about an epoch names both, and both have to match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Claim {
    /// The run that opened the epoch.
    pub run: RunId,
    /// The epoch it opened.
    pub epoch: Epoch,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {} of run {}", self.epoch, self.run)
    }
}

/// How long a hold lasts unless it is renewed: 1 ms to 1 day, whole milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease(Duration);

impl Lease {
    /// A day: longer is no lease but a wish.
    pub const MAX: Duration = Duration::from_secs(86_400);

    /// The time it lasts.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

/// A time that is no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a lease lasts from 1 ms to 1 day")]
pub struct NotALease;

impl TryFrom<Duration> for Lease {
    type Error = NotALease;

    fn try_from(duration: Duration) -> Result<Self, NotALease> {
        let whole = Duration::from_millis(u64::try_from(duration.as_millis()).map_err(|_| NotALease)?);
        if whole.is_zero() || whole > Self::MAX { Err(NotALease) } else { Ok(Self(whole)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_a_bigint_that_is_not_negative() {
        assert_eq!("9223372036854775807".parse(), Ok(Epoch::MAX));
        assert_eq!("9223372036854775808".parse::<Epoch>(), Err(NotAnEpoch));
        assert_eq!("-1".parse::<Epoch>(), Err(NotAnEpoch));
        assert_eq!("+1".parse::<Epoch>(), Err(NotAnEpoch));
        assert_eq!("".parse::<Epoch>(), Err(NotAnEpoch));
        assert_eq!(Epoch::try_from(-1_i64), Err(NotAnEpoch));
        assert_eq!(Epoch::MAX.as_i64(), i64::MAX);
    }

    #[test]
    fn a_lease_ends() {
        assert_eq!(Lease::try_from(Duration::ZERO), Err(NotALease));
        assert_eq!(Lease::try_from(Duration::MAX), Err(NotALease));
        assert_eq!(Lease::try_from(Duration::from_secs(3)).map(Lease::duration), Ok(Duration::from_secs(3)));
    }
}
