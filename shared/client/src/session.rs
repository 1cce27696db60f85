//! What a client has been told of the journal. The invariant: the position never goes back.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// The highest position in any reply so far. Queries send it as `Min-Position`, so a session never sees less than it
/// has written or seen before. Clones are the same session; it can be shared by many tasks.
#[derive(Clone, Debug, Default)]
pub struct Session(Arc<AtomicU64>);

impl Session {
    /// The highest position; 0 if there was none yet.
    pub fn position(&self) -> u64 {
        let Self(position) = self;
        position.load(Relaxed)
    }

    /// Takes note of a position from elsewhere, such as another service's session.
    pub fn note(&self, position: u64) {
        let Self(highest) = self;
        highest.fetch_max(position, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_remembers_the_highest_position_and_shares_it() {
        let session = Session::default();
        let same = session.clone();
        for (position, highest) in [(3, 3), (2, 3), (7, 7), (0, 7)] {
            session.note(position);
            assert_eq!(same.position(), highest);
        }
        assert_eq!(Session::default().position(), 0);
    }
}
