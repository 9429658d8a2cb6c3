//! Whether a cutover would work, before anything is touched: facts are gathered, then judged.
//!
//! Invariant: gathering changes nothing that outlives it (what is tried is tried in a transaction that is rolled back);
//! judging is pure. What our login may not see is red, never green.

mod attempts;
mod checks;
mod definitions;
mod facts;
mod standby;
mod types;

pub use crate::preflight::attempts::Attempt;
pub use crate::preflight::checks::checks;
pub use crate::preflight::definitions::{Definition, Definitions, Part};
pub use crate::preflight::facts::{
    BouncerFacts, ClusterFacts, Control, Facts, Inquiry, Limits, LoginRole, LoginVerdict, ProxyBackend, ProxyFacts,
    ReplicationFacts, Session, StoreFacts, Verdict, Verifiers, Watched, gather,
};
pub use crate::preflight::standby::{Holds, Neighbour, StandbyFacts};
pub use crate::preflight::types::{Kind, Rank, TypeFacts, TypeName, Types};
