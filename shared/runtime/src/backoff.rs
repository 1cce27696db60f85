//! An exponential backoff: the delay before a retry is 50 ms at first, and doubles up to 2 s.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// Waits, and doubles the next delay.
    pub async fn wait(&mut self) {
        let wait = self.next;
        self.next = (wait * 2).min(LONGEST);
        tokio::time::sleep(wait).await;
    }

    /// Starts again with the first delay, after a success.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}
