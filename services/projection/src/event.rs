//! A message of the stream, decoded once for all views, and the description of an event that cannot be applied. The
//! invariant: the description names the event and the reason, and never quotes the payload.
//!
//! This file stands below the others: the reader, the shared reader and the projector build on it.

use std::sync::OnceLock;

use async_nats::{HeaderValue, Message};
use domain::Recorded;
use uuid::Uuid;
use views::Inapplicable;
use wire::{AGGREGATE_ID, Subjects, TRACEPARENT, decode_event, mark_of};

use crate::history::Standing;

/// A view is catching up while the stream has more than this many events to come. Nobody waits for the next one then,
/// so that throughput counts for more than latency.
const CATCH_UP_LAG: u64 = 20_000;

/// A number of events, and a number of bytes: how much is in memory, or how much may be.
#[derive(Clone, Copy, Default)]
pub struct Size {
    pub events: usize,
    pub bytes: usize,
}

impl Size {
    /// The rest of this limit when `used` is taken from it; `None` if the events or the bytes are used up.
    pub fn left_by(self, used: Self) -> Option<Self> {
        let events = self.events.saturating_sub(used.events);
        let bytes = self.bytes.saturating_sub(used.bytes);
        (events > 0 && bytes > 0).then_some(Self { events, bytes })
    }
}

/// A message of the stream. It holds one event, at the position that is its sequence in the stream.
pub struct StreamMessage {
    pub position: u64,
    /// The journal that the event comes from.
    pub journal: Uuid,
    /// How many more messages the stream held when the server sent this one.
    pending: u64,
    raw: Message,
    /// Filled when the first view asks for the event.
    decoded: OnceLock<Result<Recorded, Unapplied>>,
}

/// An event that cannot be applied. The view stops in front of it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the event at position {position} cannot be applied: {reason}")]
pub struct Unapplied {
    pub position: u64,
    pub aggregate: String,
    /// The subject of the event.
    pub event: String,
    pub reason: String,
}

impl StreamMessage {
    pub fn new(position: u64, journal: Uuid, pending: u64, raw: Message) -> Self {
        Self { position, journal, pending, raw, decoded: OnceLock::new() }
    }

    /// The size of the message in bytes, headers included.
    pub fn bytes(&self) -> usize {
        self.raw.length
    }

    /// Whether whoever reads this message is still catching up.
    pub fn is_catching_up(&self) -> bool {
        self.pending > CATCH_UP_LAG
    }

    /// The event; `None` if it belongs to none of these aggregates.
    ///
    /// # Errors
    /// If this program does not know such an event.
    pub fn event(&self, subjects: &Subjects, aggregates: &[&str]) -> Result<Option<&Recorded>, Unapplied> {
        if subjects.parse_event(&self.raw.subject).is_some_and(|(aggregate, _)| !aggregates.contains(&aggregate)) {
            return Ok(None);
        }
        self.decoded.get_or_init(|| self.decode(subjects)).as_ref().map(Some).map_err(Clone::clone)
    }

    /// Where somebody stands who has read up to this message.
    pub fn standing(&self) -> Standing {
        let mark = mark_of(self.raw.headers.as_ref());
        Standing { position: self.position, journal: Some(self.journal), mark }
    }

    /// The event's subject.
    pub fn subject(&self) -> &str {
        &self.raw.subject
    }

    /// The `traceparent` that the event was stored with.
    pub fn traceparent(&self) -> Option<&str> {
        self.raw.headers.as_ref()?.get(TRACEPARENT).map(HeaderValue::as_str)
    }

    fn decode(&self, subjects: &Subjects) -> Result<Recorded, Unapplied> {
        let Message { subject, headers, payload, .. } = &self.raw;
        let headers = headers.as_ref();
        decode_event(subjects, self.position, subject, headers, payload).map_err(|error| Unapplied {
            position: self.position,
            aggregate: headers
                .and_then(|headers| headers.get(AGGREGATE_ID))
                .map_or_else(|| "unknown".to_owned(), ToString::to_string),
            event: subject.to_string(),
            reason: error.to_string(),
        })
    }
}

impl Unapplied {
    /// Describes an event that a view refused.
    pub fn new(subjects: &Subjects, event: &Recorded, error: &Inapplicable) -> Self {
        Self {
            position: event.position,
            aggregate: event.id.to_string(),
            event: subjects.event(event.event.aggregate(), event.event.name()),
            reason: error.to_string(),
        }
    }
}
