//! A lane's cache of the aggregates that it has recently loaded or written, so that it can decide its next batch
//! without loading them. Another lane or replica may have changed them since: whoever decides on cached states must
//! check their versions when writing.
//!
//! The cache has two ages. When the young half is full it becomes the old half, and the old one is dropped; an
//! aggregate that is used moves back to the young half. So it approximates an LRU cache without a list to maintain.

use std::collections::HashMap;

use domain::{Id, State};

/// Bytes of JSON that the young half holds at most. Both halves together hold twice as much, and take about as much
/// memory.
const BYTES: usize = 4 << 20;
/// The approximate memory that an aggregate needs in addition to its state, in bytes.
const AGGREGATE_BYTES: usize = 128;

#[derive(Default)]
pub struct StateCache {
    young: HashMap<Id, CachedAggregate>,
    /// The size of `young`.
    bytes: usize,
    /// Aggregates that have not been used since `young` was started.
    old: HashMap<Id, CachedAggregate>,
}

#[derive(Debug)]
pub struct CachedAggregate {
    pub version: u64,
    pub state: State,
    /// The size of the state as JSON.
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
        // It must not be in both halves.
        self.take(id);
        self.bytes += aggregate.bytes + AGGREGATE_BYTES;
        self.young.insert(id, aggregate);
        if self.bytes > BYTES {
            self.old = std::mem::take(&mut self.young);
            self.bytes = 0;
        }
    }

    /// How many aggregates are cached.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
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
    fn the_cache_is_bounded_and_keeps_what_was_used_recently() {
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
    fn an_aggregate_is_cached_as_it_was_inserted_last() {
        let mut cache = StateCache::default();
        cache.insert(id(1), aggregate(BYTES));
        cache.insert(id(1), CachedAggregate { version: 2, ..aggregate(10) });
        assert_eq!(cache.take(id(1)).map(|aggregate| aggregate.version), Some(2));
        assert!(cache.take(id(1)).is_none());
    }
}
