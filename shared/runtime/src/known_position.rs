//! A position that is shown to people, as far as it is known.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::Value;

/// A position, or that it is not known yet.
#[derive(Debug, Default)]
pub struct KnownPosition {
    /// The position plus 1; 0 while it is unknown.
    next: AtomicU64,
}

impl KnownPosition {
    pub fn set(&self, position: u64) {
        self.next.store(position.saturating_add(1), Relaxed);
    }

    /// Sets the position unless a later one is known.
    pub fn advance(&self, position: u64) {
        self.next.fetch_max(position.saturating_add(1), Relaxed);
    }

    pub fn get(&self) -> Option<u64> {
        self.next.load(Relaxed).checked_sub(1)
    }

    /// The position, or `null`.
    pub fn json(&self) -> Value {
        self.get().map_or(Value::Null, Value::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_unknown_at_first_and_only_set_goes_back() {
        let position = KnownPosition::default();
        assert_eq!(position.get(), None);
        position.set(0);
        assert_eq!(position.get(), Some(0));
        position.advance(5);
        position.advance(3);
        assert_eq!(position.get(), Some(5));
        position.set(3);
        assert_eq!(position.get(), Some(3));
    }
}
