//! Keeps a log readable while something fails again and again: the same failure is logged once, then at long intervals.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// The time between two log lines with the same text.
const INTERVAL: Duration = Duration::from_secs(600);
/// The largest number of texts that are remembered, as there may be a new one each time.
const MAX_TEXTS: usize = 16;

/// The logged failures of an operation that is retried until it succeeds.
#[derive(Debug, Default)]
pub struct LogThrottle {
    logged: HashMap<String, Instant>,
}

impl LogThrottle {
    /// Whether this text should be logged now; if so, it counts as logged.
    pub fn is_due(&mut self, text: &str) -> bool {
        if self.logged.get(text).is_some_and(|at| at.elapsed() < INTERVAL) {
            return false;
        }
        if self.logged.len() >= MAX_TEXTS {
            self.logged.clear();
        }
        self.logged.insert(text.to_owned(), Instant::now());
        true
    }

    /// Whether a failure has been logged since the last success.
    pub fn is_failing(&self) -> bool {
        !self.logged.is_empty()
    }

    /// Forgets the logged failures, after a success.
    pub fn reset(&mut self) {
        self.logged.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternating_failures_are_each_logged_once_until_a_success() {
        let mut log_throttle = LogThrottle::default();
        assert!(!log_throttle.is_failing());
        assert!(log_throttle.is_due("refused") && log_throttle.is_due("silent"));
        assert!(!log_throttle.is_due("refused") && !log_throttle.is_due("silent"));
        assert!(log_throttle.is_failing());
        log_throttle.reset();
        assert!(!log_throttle.is_failing() && log_throttle.is_due("refused"));
    }

    #[test]
    fn the_number_of_remembered_texts_is_bounded() {
        let mut log_throttle = LogThrottle::default();
        for n in 0..1_000 {
            log_throttle.is_due(&n.to_string());
            assert!(log_throttle.logged.len() <= MAX_TEXTS);
        }
    }
}
