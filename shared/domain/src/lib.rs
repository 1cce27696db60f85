//! The business rules: what users, products and orders may do, and nothing else. The crate is pure: it does no I/O and
//! reads no clock and no source of randomness. Times and identifiers are passed in.
//!
//! A command declares which aggregates it needs ([`Aggregate::needs`]). It is decided on their states
//! ([`Aggregates::execute`]), which yields events or a [`Rejection`] with a stable code. Applying an event never fails.
//!
//! A new aggregate is one new file, which keeps the contract of [`Aggregate`], and one line in the list below;
//! `docs/extending.md` walks through it.

#[macro_use]
mod define;

// Each line names the type of an aggregate's state and the module that defines it.
aggregates! {
    User(user)
    Product(product)
    Order(order)
}

mod aggregate;
mod aggregates;
mod command_type;
#[cfg(test)]
mod conformance;
mod decode;
#[cfg(test)]
mod frozen;
mod id;
mod malformed;
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
pub use command_type::{CommandRequest, CommandType};
pub use decode::Undecodable;
pub use id::{Id, InvalidId};
pub use malformed::{Malformed, Reason};
pub use money::{Amount, Currency, InvalidCurrency, MAX_AMOUNT, Money};
pub use rejection::{Rejection, RejectionKind};
pub use request::parse;
pub use samples::{sample_events, samples};
pub use text::{Country, Email, InvalidText, Name, Note, Sku};
pub use timestamp::{InvalidTimestamp, Timestamp};
pub use unicode::caseless;

use decode::decode_payload;

/// An event as it is stored in the journal.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// The event's place among the events of all aggregates: 1, 2, 3 … without gaps, in commit order.
    pub position: u64,
    /// When the command service decided the command that led to the event.
    pub at: Timestamp,
    /// The identifier of the aggregate.
    pub id: Id,
    /// The version that the event takes the aggregate to: 1 for its first event, without gaps.
    pub version: u64,
    pub event: Event,
}
