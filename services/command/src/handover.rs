//! From the lanes to the relay: what a lane has committed, the relay of the same replica publishes without reading it
//! again. It is a short cut and no more: what does not come this way, the relay reads from the journal.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use domain::Timestamp;
use runtime::Nats;
use tokio::sync::Notify;

use crate::journal::EventRow;

/// Bytes of events that may wait for the relay. What is more it reads later.
const MAX_BYTES: usize = 8 << 20;
/// What an event costs in memory beyond its payload, roughly.
const EVENT_BYTES: usize = 512;

/// Events that were committed together.
#[derive(Debug)]
pub struct Committed {
    /// The position before the first.
    pub after: u64,
    pub at: Timestamp,
    pub events: Vec<EventRow>,
}

/// Wakes the relay, in this replica or another, and hands it what it may have without reading.
#[derive(Clone, Default)]
pub struct Handover(Arc<Shared>);

#[derive(Default)]
struct Shared {
    notify: Notify,
    /// The relay runs in this replica.
    is_here: AtomicBool,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    /// By the position before their first event.
    committed: BTreeMap<u64, Committed>,
    bytes: usize,
}

/// What the relay finds after a position.
#[derive(Debug)]
pub enum Next {
    Committed(Committed),
    /// What comes next is not here, but something after it: it is in the journal.
    InJournal,
    Nothing,
}

impl Handover {
    /// Says that the events are in the journal.
    pub async fn committed(&self, nats: &Nats, committed: Committed) {
        if self.0.is_here.load(Relaxed) {
            self.pending().add(committed);
            self.0.notify.notify_one();
        } else {
            // If it does not arrive, the relay looks by itself a little later.
            let _ = nats.client.publish(nats.subjects.committed(), "".into()).await;
        }
    }

    /// Waits until something was committed in this replica.
    pub async fn notified(&self) {
        self.0.notify.notified().await;
    }

    /// The relay begins to run in this replica, or ends.
    pub fn set_relay_is_here(&self, is_here: bool) {
        self.0.is_here.store(is_here, Relaxed);
        if !is_here {
            *self.pending() = Pending::default();
        }
    }

    /// Takes what comes directly after the position; forgets what is before it.
    pub fn next(&self, after: u64) -> Next {
        self.pending().next(after)
    }

    /// Nothing that holds this lock can leave it half changed.
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn add(&mut self, committed: Committed) {
        let bytes = committed.bytes();
        // The oldest make room: the relay sees that they are missing only by what comes after them. So the newest stays,
        // however large.
        while self.bytes + bytes > MAX_BYTES
            && let Some((_, first)) = self.committed.pop_first()
        {
            self.bytes -= first.bytes();
        }
        self.bytes += bytes;
        self.committed.insert(committed.after, committed);
    }

    fn next(&mut self, after: u64) -> Next {
        while let Some(first) = self.committed.first_entry() {
            if *first.key() > after {
                return Next::InJournal;
            }
            let committed = first.remove();
            self.bytes -= committed.bytes();
            if committed.after == after {
                return Next::Committed(committed);
            }
            if committed.after + committed.events.len() as u64 > after {
                // The relay has read a part of it; it reads the rest too.
                return Next::InJournal;
            }
        }
        Next::Nothing
    }
}

impl Committed {
    fn bytes(&self) -> usize {
        self.events.iter().map(|event| event.payload.len() + EVENT_BYTES).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed(after: u64, events: u64, payload: usize) -> Committed {
        let event = |version| EventRow {
            aggregate: "user",
            id: uuid::Uuid::nil(),
            version,
            name: "registered",
            schema: 1,
            payload: "x".repeat(payload),
            actor: None,
            command_id: None,
            traceparent: None,
        };
        Committed { after, at: Timestamp::default(), events: (1..=events).map(event).collect() }
    }

    fn after(next: Next) -> Option<u64> {
        match next {
            Next::Committed(committed) => Some(committed.after),
            Next::InJournal | Next::Nothing => None,
        }
    }

    #[test]
    fn what_lanes_commit_is_taken_in_the_order_of_the_journal() {
        let mut pending = Pending::default();
        pending.add(committed(13, 2, 10));
        assert!(matches!(pending.next(10), Next::InJournal), "another lane has 11 to 13, or another replica");
        pending.add(committed(10, 3, 10));
        assert_eq!(after(pending.next(10)), Some(10));
        assert_eq!(after(pending.next(13)), Some(13));
        assert!(matches!(pending.next(15), Next::Nothing));
        assert_eq!(pending.bytes, 0);
    }

    #[test]
    fn what_the_relay_has_read_meanwhile_is_forgotten() {
        let mut pending = Pending::default();
        pending.add(committed(10, 3, 10));
        pending.add(committed(13, 3, 10));
        assert!(matches!(pending.next(14), Next::InJournal), "the rest of a part is read");
        assert!(matches!(pending.next(16), Next::Nothing));
        assert_eq!(pending.bytes, 0);
    }

    #[test]
    fn what_waits_is_bounded_and_what_is_left_out_is_missed() {
        let mut pending = Pending::default();
        for index in 0..20 {
            pending.add(committed(index, 1, MAX_BYTES / 4));
            assert!(pending.bytes <= MAX_BYTES);
        }
        assert!(matches!(pending.next(0), Next::InJournal));
        pending.add(committed(20, 1, 2 * MAX_BYTES));
        assert_eq!(pending.committed.len(), 1);
        assert_eq!(after(pending.next(20)), Some(20));
        assert_eq!(pending.bytes, 0);
    }
}
