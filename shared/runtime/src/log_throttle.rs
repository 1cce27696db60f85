//! What goes wrong again and again is logged once, and then at long intervals.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Between two lines that say the same.
const INTERVAL: Duration = Duration::from_secs(600);
/// Texts that are remembered at most: they may hold what changes each time.
const MAX_TEXTS: usize = 16;

/// The failures of one thing that is tried again until it succeeds.
#[derive(Debug, Default)]
pub struct LogThrottle {
    logged: HashMap<String, Instant>,
}

impl LogThrottle {
    /// Whether it is time to log this.
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

    /// Whether something has been logged since the last success.
    pub fn is_failing(&self) -> bool {
        !self.logged.is_empty()
    }

    /// It succeeded.
    pub fn reset(&mut self) {
        self.logged.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_failure_is_logged_once_until_it_is_over_also_if_it_takes_turns_with_another() {
        let mut log_throttle = LogThrottle::default();
        assert!(!log_throttle.is_failing());
        assert!(log_throttle.is_due("refused") && log_throttle.is_due("silent"));
        assert!(!log_throttle.is_due("refused") && !log_throttle.is_due("silent"));
        assert!(log_throttle.is_failing());
        log_throttle.reset();
        assert!(!log_throttle.is_failing() && log_throttle.is_due("refused"));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut log_throttle = LogThrottle::default();
        for n in 0..1_000 {
            log_throttle.is_due(&n.to_string());
            assert!(log_throttle.logged.len() <= MAX_TEXTS);
        }
    }
}
