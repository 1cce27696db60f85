//! An event as it comes from the stream, and what is said of one that cannot be applied: which it is and why, never what
//! is in it.

use domain::{Recorded, Undecodable};
use views::Inapplicable;
use wire::{AGGREGATE_ID, EnvelopeError, Subjects, decode_event};

use crate::reader::Arrival;

/// An event that stops its view.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the event at position {position} cannot be applied: {reason}")]
pub struct Unapplied {
    pub position: u64,
    pub aggregate: String,
    /// The event's subject.
    pub event: String,
    pub reason: String,
}

/// The event; nothing if it is of none of these aggregates. It is decoded once for all views.
///
/// # Errors
/// If this program does not know such an event.
pub fn decode<'a>(
    subjects: &Subjects,
    arrival: &'a Arrival,
    aggregates: &[&str],
) -> Result<Option<&'a Recorded>, Unapplied> {
    let Arrival { position, journal: _, message, decoded, pending: _ } = arrival;
    let headers = message.headers.as_ref();
    if subjects.parse_event(&message.subject).is_some_and(|(aggregate, _)| !aggregates.contains(&aggregate)) {
        return Ok(None);
    }
    let decode = || {
        let decoded = decode_event(subjects, *position, &message.subject, headers, &message.payload);
        decoded.map_err(|error| Unapplied {
            position: *position,
            aggregate: headers
                .and_then(|headers| headers.get(AGGREGATE_ID))
                .map_or_else(|| "unknown".to_owned(), ToString::to_string),
            event: message.subject.to_string(),
            reason: reason(&error),
        })
    };
    decoded.get_or_init(decode).as_ref().map(Some).map_err(Clone::clone)
}

/// Names the event that could not be applied.
pub fn unapplied(subjects: &Subjects, event: &Recorded, error: &Inapplicable) -> Unapplied {
    Unapplied {
        position: event.position,
        aggregate: event.id.to_string(),
        event: subjects.event(event.event.aggregate(), event.event.name()),
        reason: error.to_string(),
    }
}

fn reason(error: &EnvelopeError) -> String {
    match error {
        // Its text would quote the payload.
        EnvelopeError::Event(Undecodable::Payload(error)) => {
            format!("the payload does not have the schema's shape, at line {} column {}", error.line(), error.column())
        }
        EnvelopeError::Event(Undecodable::Unknown) | EnvelopeError::Subject(_) | EnvelopeError::Header(_) => {
            error.to_string()
        }
    }
}
