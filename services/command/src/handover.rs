//! The handover passes committed events from the lanes to the relay of the same replica, which then need not read
//! them. It is only a shortcut: whatever does not come this way, the relay reads from the journal.

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

/// Bytes of events that may wait for the relay. It reads the rest from the journal later.
const MAX_BYTES: usize = 8 << 20;
/// The approximate memory that an event needs in addition to its payload, in bytes.
const EVENT_BYTES: usize = 512;

/// Events that were committed together.
#[derive(Debug)]
pub struct Committed {
    /// The position before the first of them.
    pub after: u64,
    pub at: Timestamp,
    pub events: Vec<EventRow>,
}

/// Wakes the relay, in this replica or another, and passes events to the one in this replica.
#[derive(Clone, Default)]
pub struct Handover(Arc<Shared>);

#[derive(Default)]
struct Shared {
    notify: Notify,
    /// Whether the relay runs in this replica.
    is_here: AtomicBool,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    /// Batches of events by the position before their first.
    committed: BTreeMap<u64, Committed>,
    bytes: usize,
}

/// What follows a position.
#[derive(Debug)]
pub enum Next {
    Committed(Committed),
    /// The next events are not here, but later ones are: so the next ones must be read from the journal.
    InJournal,
    Nothing,
}

impl Handover {
    /// Says that the events have been committed.
    pub async fn committed(&self, nats: &Nats, committed: Committed) {
        if self.0.is_here.load(Relaxed) {
            self.pending().add(committed);
            self.0.notify.notify_one();
        } else {
            // If this message is lost, the relay finds the events at its next poll.
            let _ = nats.client.publish(nats.subjects.committed(), "".into()).await;
        }
    }

    /// Waits until events have been committed in this replica.
    pub async fn notified(&self) {
        self.0.notify.notified().await;
    }

    /// Says whether the relay runs in this replica.
    pub fn set_relay_is_here(&self, is_here: bool) {
        self.0.is_here.store(is_here, Relaxed);
        if !is_here {
            *self.pending() = Pending::default();
        }
    }

    /// Takes the events directly after the position, and drops those before it.
    pub fn next(&self, after: u64) -> Next {
        self.pending().next(after)
    }

    /// A panic cannot poison the events: no code that holds this lock can leave them half changed.
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn add(&mut self, committed: Committed) {
        let bytes = committed.bytes();
        // The oldest events are dropped first: the relay notices a gap only by the events after it. So the newest ones
        // are kept, however large they are.
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
                // The relay has already read a part of this batch, and will read the rest too.
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
    fn events_are_taken_in_the_order_of_the_journal() {
        let mut pending = Pending::default();
        pending.add(committed(13, 2, 10));
        assert!(matches!(pending.next(10), Next::InJournal), "another lane or another replica has 11 to 13");
        pending.add(committed(10, 3, 10));
        assert_eq!(after(pending.next(10)), Some(10));
        assert_eq!(after(pending.next(13)), Some(13));
        assert!(matches!(pending.next(15), Next::Nothing));
        assert_eq!(pending.bytes, 0);
    }

    #[test]
    fn events_that_the_relay_has_read_meanwhile_are_dropped() {
        let mut pending = Pending::default();
        pending.add(committed(10, 3, 10));
        pending.add(committed(13, 3, 10));
        assert!(matches!(pending.next(14), Next::InJournal), "the rest of a batch is read");
        assert!(matches!(pending.next(16), Next::Nothing));
        assert_eq!(pending.bytes, 0);
    }

    #[test]
    fn pending_events_are_bounded_and_dropped_ones_leave_a_gap() {
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
