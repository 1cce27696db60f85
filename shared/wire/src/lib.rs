//! The formats of everything that is sent over NATS, the same for all services: subjects, headers, envelopes, replies
//! and failures; and how the URLs of NATS servers are written.

mod envelope;
mod failure;
mod headers;
mod reply;
mod servers;
mod subjects;

pub use envelope::{
    AGGREGATE_ID, AGGREGATE_VERSION, COMMAND_ID, Envelope, EnvelopeError, Foreign, GENERATION, JOURNAL, RECORDED_AT,
    decode_event, event_headers, generation_header, generation_of, journal_of, recorded_at,
};
pub use failure::{Code, Failure};
pub use headers::{ACTOR, EXPECTED_VERSION, MIN_POSITION, MSG_ID, POSITION, RequestHeaders, TRACEPARENT};
pub use reply::{Accepted, failure_headers, failure_status, success_headers};
pub use servers::{Credentials, InvalidServers, nats_options, parse_servers};
pub use subjects::{InvalidPrefix, Prefix, Subjects};
