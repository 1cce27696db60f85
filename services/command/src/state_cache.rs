//! Aggregates as this lane has lately loaded or written them, so that the next batch is decided without loading them
//! again. Another lane or replica may have changed them since: whoever relies on it demands the versions when writing.

use std::collections::HashMap;

use domain::{Id, State};

/// Bytes of states that are kept lately, as JSON. In memory there are twice as many at most, each about as large.
const BYTES: usize = 4 << 20;
/// What an aggregate costs beyond its state, roughly.
const AGGREGATE_BYTES: usize = 128;

#[derive(Default)]
pub struct StateCache {
    young: HashMap<Id, CachedAggregate>,
    /// Of `lately`.
    bytes: usize,
    /// What was not used since `lately` was begun.
    old: HashMap<Id, CachedAggregate>,
}

#[derive(Debug)]
pub struct CachedAggregate {
    pub version: u64,
    pub state: State,
    /// The state's, as JSON.
    pub bytes: usize,
}

impl StateCache {
    pub fn get(&self, id: Id) -> Option<&CachedAggregate> {
        self.young.get(&id).or_else(|| self.old.get(&id))
    }

    pub fn take(&mut self, id: Id) -> Option<CachedAggregate> {
        if let Some(aggregate) = self.young.remove(&id) {
            self.bytes -= aggregate.bytes + AGGREGATE_BYTES;
            return Some(aggregate);
        }
        self.old.remove(&id)
    }

    pub fn insert(&mut self, id: Id, aggregate: CachedAggregate) {
        // So that it is there once.
        self.take(id);
        self.bytes += aggregate.bytes + AGGREGATE_BYTES;
        self.young.insert(id, aggregate);
        if self.bytes > BYTES {
            self.old = std::mem::take(&mut self.young);
            self.bytes = 0;
        }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> Id {
        Id(uuid::Uuid::from_u128(n))
    }

    fn aggregate(bytes: usize) -> CachedAggregate {
        CachedAggregate { version: 1, state: State::User(domain::user::User::Deleted), bytes }
    }

    #[test]
    fn what_is_known_is_bounded_and_what_was_used_lately_stays() {
        let mut cache = StateCache::default();
        cache.insert(id(0), aggregate(100));
        for n in 1..1_000 {
            cache.insert(id(n), aggregate(BYTES / 100));
            let used = cache.take(id(0)).unwrap();
            cache.insert(id(0), used);
            assert!(cache.young.len() + cache.old.len() <= 202);
        }
        assert!(cache.get(id(999)).is_some() && cache.get(id(1)).is_none());
        cache.clear();
        assert!(cache.get(id(0)).is_none() && cache.bytes == 0);
    }

    #[test]
    fn an_aggregate_is_known_as_it_was_kept_last() {
        let mut cache = StateCache::default();
        cache.insert(id(1), aggregate(BYTES));
        cache.insert(id(1), CachedAggregate { version: 2, ..aggregate(10) });
        assert_eq!(cache.take(id(1)).map(|aggregate| aggregate.version), Some(2));
        assert!(cache.take(id(1)).is_none());
    }
}
