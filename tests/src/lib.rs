//! The harness: private servers for a run of the tests, and in them a fresh prefix, stream and databases for each test.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

pub mod bench;
pub mod journal;
mod proxy;
mod raw;
mod stack;
mod system;

pub use proxy::Proxy;
pub use raw::Raw;
pub use retail::{Client, Reply};
pub use stack::Stack;
pub use system::{Process, Replica, System, program};

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long a test waits for what must come about by itself.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until the condition gives a value.
///
/// # Panics
/// If it has not within [`PATIENCE`].
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Watches for a while that something does not change.
///
/// # Panics
/// If it does.
pub async fn stays<T: PartialEq + std::fmt::Debug>(what: &str, value: T, mut present: impl AsyncFnMut() -> T) {
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        assert_eq!(present().await, value, "{what}");
        sleep(Duration::from_millis(50)).await;
    }
}
