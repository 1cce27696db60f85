//! The whole system against the real servers: one file per behaviour.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod commands;
mod idempotency;
mod load;
mod outages;
mod paging;
mod permissions;
mod projection;
mod queries;
mod readme;
mod relay;
mod retail;
mod sums;
mod uniqueness;
mod wire_format;
