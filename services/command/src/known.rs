//! Aggregates as this lane has lately loaded or written them, so that the next batch is decided without loading them
//! again. Another lane or replica may have changed them since: whoever relies on it demands the versions when writing.

use std::collections::HashMap;

use domain::{Id, State};

/// Bytes of states that are kept lately, as JSON. In memory there are twice as many at most, each about as large.
const BYTES: usize = 4 << 20;
/// What an aggregate costs beyond its state, roughly.
const AGGREGATE_BYTES: usize = 128;

#[derive(Default)]
pub struct Known {
    lately: HashMap<Id, Aggregate>,
    /// Of `lately`.
    bytes: usize,
    /// What was not used since `lately` was begun.
    before: HashMap<Id, Aggregate>,
}

#[derive(Debug)]
pub struct Aggregate {
    pub version: u64,
    pub state: State,
    /// The state's, as JSON.
    pub bytes: usize,
}

impl Known {
    pub fn get(&self, id: Id) -> Option<&Aggregate> {
        self.lately.get(&id).or_else(|| self.before.get(&id))
    }

    pub fn take(&mut self, id: Id) -> Option<Aggregate> {
        if let Some(aggregate) = self.lately.remove(&id) {
            self.bytes -= aggregate.bytes + AGGREGATE_BYTES;
            return Some(aggregate);
        }
        self.before.remove(&id)
    }

    pub fn keep(&mut self, id: Id, aggregate: Aggregate) {
        // So that it is there once.
        self.take(id);
        self.bytes += aggregate.bytes + AGGREGATE_BYTES;
        self.lately.insert(id, aggregate);
        if self.bytes > BYTES {
            self.before = std::mem::take(&mut self.lately);
            self.bytes = 0;
        }
    }

    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> Id {
        Id(uuid::Uuid::from_u128(n))
    }

    fn aggregate(bytes: usize) -> Aggregate {
        Aggregate { version: 1, state: State::User(domain::user::User::Deleted), bytes }
    }

    #[test]
    fn what_is_known_is_bounded_and_what_was_used_lately_stays() {
        let mut known = Known::default();
        known.keep(id(0), aggregate(100));
        for n in 1..1_000 {
            known.keep(id(n), aggregate(BYTES / 100));
            let used = known.take(id(0)).unwrap();
            known.keep(id(0), used);
            assert!(known.lately.len() + known.before.len() <= 202);
        }
        assert!(known.get(id(999)).is_some() && known.get(id(1)).is_none());
        known.forget();
        assert!(known.get(id(0)).is_none() && known.bytes == 0);
    }

    #[test]
    fn an_aggregate_is_known_as_it_was_kept_last() {
        let mut known = Known::default();
        known.keep(id(1), aggregate(BYTES));
        known.keep(id(1), Aggregate { version: 2, ..aggregate(10) });
        assert_eq!(known.take(id(1)).map(|aggregate| aggregate.version), Some(2));
        assert!(known.take(id(1)).is_none());
    }
}
