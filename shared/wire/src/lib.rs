//! The formats of everything that is sent over NATS, the same for all services: subjects, headers, envelopes, replies
//! and failures.

mod envelope;
mod failure;
mod headers;
mod reply;
mod subjects;

pub use envelope::{
    AGGREGATE_ID, Envelope, EnvelopeError, Foreign, JOURNAL, decode_event, event_headers, journal_of, recorded_at,
};
pub use failure::{Code, Failure};
pub use headers::{ACTOR, EXPECTED_VERSION, MIN_POSITION, MSG_ID, POSITION, RequestHeaders, TRACEPARENT};
pub use reply::{Accepted, failure_headers, failure_status, success_headers};
pub use subjects::{InvalidPrefix, Prefix, Subjects};
