//! The business rules: what users, products and orders may do, and nothing else. Pure: no I/O, no clock, no
//! randomness; time and identifiers come in.
//!
//! A command names the aggregates that it touches ([`Command::touches`]) and decides over their states
//! ([`Aggregates::execute`]): events, or a [`Rejection`] with a stable code. Applying an event never fails.
//!
//! A new aggregate is one new file and one line in the list below.

#[macro_use]
mod define;
mod aggregates;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod frozen;
mod id;
mod money;
pub mod order;
pub mod product;
#[cfg(test)]
mod properties;
mod rejection;
mod request;
#[cfg(test)]
mod scenario;
pub mod strict;
mod text;
mod timestamp;
mod unicode;
pub mod user;

pub use aggregates::{Aggregates, Changed, Claim, Kind};
pub use id::{Id, InvalidId};
pub use money::{Amount, Currency, InvalidCurrency, MAX_AMOUNT, Money};
pub use rejection::{Rejection, RejectionKind};
pub use request::{CommandType, Malformed, Reason, Undecodable, parse};
pub use text::{Country, Email, InvalidText, Name, Sku};
pub use timestamp::{InvalidTimestamp, Timestamp};
pub use unicode::caseless;

use request::decode_payload;

aggregates! {
    User(user)
    Product(product)
    Order(order)
}

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
