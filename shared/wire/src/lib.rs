//! The formats of everything that is sent over NATS, the same for all services: subjects, headers, envelopes, replies
//! and failures; the lineage of a journal; and how the URLs of NATS servers are written.

mod envelope;
mod failure;
mod headers;
mod lineage;
mod reply;
mod servers;
mod subjects;

pub use envelope::{
    AGGREGATE_ID, AGGREGATE_VERSION, BRANCH, COMMAND_ID, Envelope, EnvelopeError, EventMark, Foreign, GENERATION,
    JOURNAL, RECORDED_AT, branch_of, decode_event, event_headers, generation_header, generation_of, journal_of,
    mark_of, recorded_at,
};
pub use failure::{Code, Failure};
pub use headers::{ACTOR, EXPECTED_VERSION, MIN_POSITION, MSG_ID, POSITION, RequestHeaders, TRACEPARENT};
pub use lineage::{Branch, Fit, InvalidLineage, Lineage, head_from_metadata};
pub use reply::{Accepted, failure_headers, failure_status, success_headers};
pub use servers::{Credentials, InvalidServers, nats_options, parse_servers};
pub use subjects::{InvalidPrefix, Prefix, Subjects};
