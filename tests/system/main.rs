//! Tests of the whole system against the real servers, one file per behaviour.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_servers;
mod cli;
mod cli_views;
mod client;
mod commands;
mod digests;
mod endpoints;
mod generations;
mod hostile;
mod idempotency;
mod identity;
mod load;
mod monitor;
mod outages;
mod pages;
mod paging;
mod permissions;
mod projection;
mod prometheus;
mod queries;
mod refold;
mod relay;
mod restarts;
mod retail;
mod rolling;
mod settings;
mod sums;
mod switch;
mod traces;
mod uniqueness;
mod wire_format;
mod witnesses;
