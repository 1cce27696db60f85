//! The form of an event in the stream: the payload is the event's own JSON, everything else is in headers, and the
//! stream sequence is the position.

use std::fmt;

use async_nats::{HeaderMap, HeaderValue};
use domain::{Event, Id, Recorded, Timestamp, Undecodable};
use uuid::Uuid;

use crate::{ACTOR, POSITION, Subjects, TRACEPARENT, headers::header_text};

/// Header of an event: the aggregate that it belongs to.
pub const AGGREGATE_ID: &str = "Aggregate-Id";
/// Header of an event: the identity of the journal that it comes from.
pub const JOURNAL: &str = "Journal";
/// Header of an event: the branch of the journal. Events from before there were branches do not have it.
pub const BRANCH: &str = "Branch";
/// Header of an event: the aggregate's version after it.
pub const AGGREGATE_VERSION: &str = "Aggregate-Version";
/// Header of an event: when the command service decided it.
pub const RECORDED_AT: &str = "Recorded-At";
/// Header of an event: the idempotency key of its command, if that had one.
pub const COMMAND_ID: &str = "Command-Id";
/// Header of an announced checkpoint: the generation of the view that has come so far.
pub const GENERATION: &str = "Generation";
const EVENT_SCHEMA: &str = "Event-Schema";

/// Everything that the journal has of an event, except its subject and payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub journal: Uuid,
    pub branch: Uuid,
    pub position: u64,
    pub id: Id,
    pub version: u64,
    pub schema: i16,
    pub at: Timestamp,
    pub actor: Option<&'a str>,
    pub command_id: Option<&'a str>,
    pub traceparent: Option<&'a str>,
}

/// Why a message in the stream cannot be read as an event that this program knows.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    #[error("the subject {0:?} is not that of an event")]
    Subject(String),
    #[error("the header {0} is missing or cannot be read")]
    Header(&'static str),
    #[error(transparent)]
    Event(#[from] Undecodable),
}

pub fn event_headers(envelope: &Envelope<'_>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(POSITION, HeaderValue::from(envelope.position));
    headers.insert(JOURNAL, envelope.journal.to_string());
    headers.insert(BRANCH, envelope.branch.to_string());
    headers.insert(AGGREGATE_ID, envelope.id.to_string());
    headers.insert(AGGREGATE_VERSION, HeaderValue::from(envelope.version));
    headers.insert(EVENT_SCHEMA, HeaderValue::from(envelope.schema));
    headers.insert(RECORDED_AT, envelope.at.to_string());
    let optional = [(ACTOR, envelope.actor), (COMMAND_ID, envelope.command_id), (TRACEPARENT, envelope.traceparent)];
    for (name, value) in optional {
        if let Some(value) = value {
            headers.insert(name, header_text(value));
        }
    }
    headers
}

/// The header of an announced checkpoint.
pub fn generation_header(generation: i32) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(GENERATION, HeaderValue::from(generation));
    headers
}

/// The generation that an announced checkpoint belongs to; `None` if it does not say.
pub fn generation_of(headers: Option<&HeaderMap>) -> Option<i32> {
    header(headers, GENERATION).ok()
}

/// A message in the stream that this journal's relay has not published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream's message {position} is not the journal's event {position}: {reason}")]
pub struct Foreign {
    /// Its sequence in the stream.
    pub position: u64,
    pub reason: String,
}

/// The journal that a message in the stream comes from, as its headers say.
///
/// # Errors
/// If the headers do not say that the message is the event at this position of a journal.
pub fn journal_of(position: u64, headers: Option<&HeaderMap>) -> Result<Uuid, Foreign> {
    let foreign = |reason: String| Foreign { position, reason };
    let stated: u64 = header(headers, POSITION).map_err(|error| foreign(error.to_string()))?;
    if stated != position {
        return Err(foreign(format!("it says that it is at position {stated}")));
    }
    header(headers, JOURNAL).map_err(|error| foreign(error.to_string()))
}

/// The branch that an event of the journal belongs to.
///
/// # Errors
/// If the headers name something that is no branch. An event that names none belongs to the first branch.
pub fn branch_of(position: u64, journal: Uuid, headers: Option<&HeaderMap>) -> Result<Uuid, Foreign> {
    match headers.and_then(|headers| headers.get(BRANCH)) {
        None => Ok(journal),
        Some(_) => header(headers, BRANCH).map_err(|error| Foreign { position, reason: error.to_string() }),
    }
}

/// Which event stands at a position of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventMark {
    pub aggregate: Id,
    pub version: u64,
    pub at: Timestamp,
    pub branch: Uuid,
}

impl fmt::Display for EventMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { aggregate, version, at, branch } = self;
        write!(f, "version {version} of the aggregate {aggregate}, recorded at {at} in the branch {branch}")
    }
}

/// The mark of an event; `None` if its headers do not tell.
pub fn mark_of(headers: Option<&HeaderMap>) -> Option<EventMark> {
    Some(EventMark {
        aggregate: header(headers, AGGREGATE_ID).ok()?,
        version: header(headers, AGGREGATE_VERSION).ok()?,
        at: header(headers, RECORDED_AT).ok()?,
        branch: branch_of(0, header(headers, JOURNAL).ok()?, headers).ok()?,
    })
}

/// When an event was recorded; `None` if the headers do not say so.
pub fn recorded_at(headers: &HeaderMap) -> Option<Timestamp> {
    header(Some(headers), RECORDED_AT).ok()
}

/// Reads an event from the stream.
///
/// # Errors
/// If the message is not an event, or of an aggregate, name or schema version that this program does not know.
pub fn decode_event(
    subjects: &Subjects,
    position: u64,
    subject: &str,
    headers: Option<&HeaderMap>,
    payload: &[u8],
) -> Result<Recorded, EnvelopeError> {
    let (aggregate, name) = subjects.parse_event(subject).ok_or_else(|| EnvelopeError::Subject(subject.to_owned()))?;
    Ok(Recorded {
        position,
        at: header(headers, RECORDED_AT)?,
        id: header(headers, AGGREGATE_ID)?,
        version: header(headers, AGGREGATE_VERSION)?,
        event: Event::decode(aggregate, name, header(headers, EVENT_SCHEMA)?, payload)?,
    })
}

fn header<T: std::str::FromStr>(headers: Option<&HeaderMap>, name: &'static str) -> Result<T, EnvelopeError> {
    let value = headers.and_then(|headers| headers.get(name)).ok_or(EnvelopeError::Header(name))?;
    value.as_str().parse().map_err(|_| EnvelopeError::Header(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_back_as_it_was_written() {
        let event =
            Event::Product(domain::product::Event::Restocked(domain::product::Restocked { quantity: 5, stock: 7 }));
        let journal = Uuid::from_u128(7);
        let envelope = Envelope {
            journal,
            branch: Uuid::from_u128(8),
            position: 42,
            id: "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001".parse().unwrap(),
            version: 3,
            schema: event.schema(),
            at: "2026-01-31T09:30:00.125Z".parse().unwrap(),
            actor: Some("Zoë"),
            command_id: Some("k-1"),
            traceparent: None,
        };
        let subjects = Subjects::default();
        let subject = subjects.event(event.aggregate(), event.name());
        let headers = event_headers(&envelope);
        let recorded = decode_event(&subjects, 42, &subject, Some(&headers), &event.encode().unwrap()).unwrap();
        assert_eq!(recorded, Recorded { position: 42, at: envelope.at, id: envelope.id, version: 3, event });
        assert!(decode_event(&subjects, 42, "evt.product.vanished", Some(&headers), b"{}").is_err());
        assert!(decode_event(&subjects, 42, &subject, None, b"{}").is_err());
        assert_eq!(headers.get(ACTOR).unwrap().as_str(), "Zo%C3%AB");
        assert_eq!(journal_of(42, Some(&headers)), Ok(journal));
        let mark = mark_of(Some(&headers)).unwrap();
        assert_eq!(mark, EventMark { aggregate: envelope.id, version: 3, at: envelope.at, branch: Uuid::from_u128(8) });
    }

    #[test]
    fn a_message_without_its_position_or_journal_is_foreign() {
        let headers = |position: &str, journal: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(POSITION, position);
            if let Some(journal) = journal {
                headers.insert(JOURNAL, journal);
            }
            headers
        };
        let journal = Uuid::from_u128(7).to_string();
        assert!(journal_of(42, Some(&headers("42", Some(&journal)))).is_ok());
        for (position, journal) in
            [("41", Some(&*journal)), ("x", Some(&journal)), ("", Some(&journal)), ("42", None), ("42", Some("x"))]
        {
            assert!(journal_of(42, Some(&headers(position, journal))).is_err(), "{position} {journal:?}");
        }
        assert!(journal_of(42, None).is_err());
    }

    #[test]
    fn an_event_that_names_no_branch_belongs_to_the_first() {
        let (journal, mut headers) = (Uuid::from_u128(7), HeaderMap::new());
        assert_eq!(branch_of(42, journal, Some(&headers)), Ok(journal));
        headers.insert(BRANCH, "x");
        assert!(branch_of(42, journal, Some(&headers)).is_err());
        headers.insert(BRANCH, Uuid::from_u128(8).to_string());
        assert_eq!(branch_of(42, journal, Some(&headers)), Ok(Uuid::from_u128(8)));
    }
}
