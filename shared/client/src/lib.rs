//! A client of the services, for other services and for tools; `docs/requests.md` shows how to use it. The invariants:
//! a command that is sent more than once happens once, and a client sees what it has written.
//!
//! [`Client`] connects, and makes a [`Request`] of a command or a query, which are the structs that the domain and the
//! views parse. A request is sent, with retries, when it is awaited. The client's [`Session`] remembers positions, and
//! [`Error`] says why a request failed for good.

mod backoff;
mod connect;
mod context;
mod error;
mod request;
mod session;

pub use connect::{Client, ConnectError, ConnectOptions};
pub use error::Error;
pub use request::{Reply, Request};
pub use session::Session;

/// Compiles the example on the page.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/requests.md")]
mod page {}
