//! The business rules: what users, products and orders may do, and nothing else. Pure: no I/O, no clock, no
//! randomness; time and identifiers come in.
//!
//! A command says what it needs ([`Aggregate::needs`]) and is decided over the states of that
//! ([`Aggregates::execute`]): events, or a [`Rejection`] with a stable code. Applying an event never fails.
//!
//! A new aggregate is one new file, which keeps the contract of [`Aggregate`], and one line in the list below;
//! `docs/extending.md` walks through it.

#[macro_use]
mod define;

// The name of the state, and the module that has it.
aggregates! {
    User(user)
    Product(product)
    Order(order)
}

mod aggregate;
mod aggregates;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod frozen;
mod id;
mod money;
#[cfg(test)]
mod properties;
mod rejection;
mod request;
mod samples;
#[cfg(test)]
mod scenario;
pub mod strict;
mod text;
mod timestamp;
mod unicode;

pub use aggregate::{Aggregate, Needs, Sample};
pub use aggregates::{Aggregates, Changed, Claim, Kind};
pub use id::{Id, InvalidId};
pub use money::{Amount, Currency, InvalidCurrency, MAX_AMOUNT, Money};
pub use rejection::{Rejection, RejectionKind};
pub use request::{CommandType, Malformed, Reason, Undecodable, parse};
pub use samples::{sample_events, samples};
pub use text::{Country, Email, InvalidText, Name, Note, Sku};
pub use timestamp::{InvalidTimestamp, Timestamp};
pub use unicode::caseless;

use request::decode_payload;

/// An event as the journal holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// 1, 2, 3 … over all aggregates, without a gap, in commit order.
    pub position: u64,
    /// When the command service decided it.
    pub at: Timestamp,
    /// The aggregate's.
    pub id: Id,
    /// The aggregate's, 1 for its first event, without a gap.
    pub version: u64,
    pub event: Event,
}
