//! What a loop that retries remembers of its failures. The invariants: the wait grows with each retry, and a failure
//! that lasts is logged once, not each time.

use runtime::{Backoff, LogThrottle, mongodb_driver};

#[derive(Default)]
pub struct RetryState {
    backoff: Backoff,
    log_throttle: LogThrottle,
}

impl RetryState {
    /// The text to log for a failure; `None` if the same failure was logged not long ago.
    pub fn log_once(&mut self, error: &anyhow::Error) -> Option<String> {
        let text = describe(error);
        tracing::debug!(detail = ?error, "{text}");
        self.log_throttle.is_due(&text).then_some(text)
    }

    /// Whether a failure has been logged since the last [`Self::reset`].
    pub fn is_failing(&self) -> bool {
        self.log_throttle.is_failing()
    }

    /// Waits before the next try, longer each time.
    pub async fn wait(&mut self) {
        self.backoff.wait().await;
    }

    /// To be called when a try has succeeded.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

/// The error and its causes, on one line.
pub fn describe(error: &anyhow::Error) -> String {
    let texts: Vec<_> = error
        .chain()
        .map(|cause| match cause.downcast_ref() {
            Some(error) => mongodb_driver::describe(error),
            None => cause.to_string(),
        })
        .collect();
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn a_failure_is_logged_once_until_a_try_succeeds() {
        let mut retry = RetryState::default();
        let failure = || Err::<(), _>(anyhow!("no")).context("stopped").unwrap_err();
        assert_eq!(retry.log_once(&failure()).as_deref(), Some("stopped: no"));
        assert_eq!(retry.log_once(&failure()), None);
        assert!(retry.log_once(&anyhow!("another")).is_some());
        retry.reset();
        assert!(!retry.is_failing());
        assert!(retry.log_once(&failure()).is_some());
    }
}
