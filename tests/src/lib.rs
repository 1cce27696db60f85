//! The test harness: private servers for a run of the tests, with a fresh prefix, stream and databases for each test.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod answer;
pub mod bench;
mod collector;
pub mod http;
pub mod journal;
mod project;
pub mod prometheus;
mod proxy;
mod raw;
mod stack;
mod system;

pub use answer::{Answer, Expect};
pub use collector::{Collected, Collector};
pub use project::Project;
pub use proxy::Proxy;
pub use raw::Raw;
pub use stack::Stack;
pub use system::{Process, Replica, System, binary, program};

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long a test waits for a condition.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until the condition returns a value.
///
/// # Panics
/// If it has returned none within [`PATIENCE`].
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

/// Polls for three seconds, and checks that the value does not change.
///
/// # Panics
/// If it does.
pub async fn stays<T: PartialEq + std::fmt::Debug>(what: &str, value: T, mut current: impl AsyncFnMut() -> T) {
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        assert_eq!(current().await, value, "{what}");
        sleep(Duration::from_millis(50)).await;
    }
}
