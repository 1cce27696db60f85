//! The replies: the body of a command's success, and the headers of successes and failures, as NATS micro defines them.

use async_nats::Message;
use domain::Id;
use serde::{Deserialize, Serialize};

use crate::{Failure, POSITION, TRACEPARENT, headers::header_text};

const SERVICE_ERROR: &str = "Nats-Service-Error";
const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";

/// The reply to a command that succeeded. It contains no data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The aggregate that the command was for.
    pub id: Id,
    /// That aggregate's version afterwards.
    pub version: u64,
    /// The position of the command's last event. A query with it as `Min-Position` sees what the command wrote. For a
    /// command that changed nothing, the last position before it.
    pub position: u64,
}

impl Accepted {
    /// `{"id":"…","version":3,"position":1042}`
    pub fn body(&self) -> Vec<u8> {
        let Self { id, version, position } = self;
        format!(r#"{{"id":"{id}","version":{version},"position":{position}}}"#).into_bytes()
    }
}

/// The header block of a success.
pub fn success_headers(position: Option<u64>, traceparent: Option<&str>) -> Vec<u8> {
    let position = position.map(|position| format!("{POSITION}: {position}\r\n")).unwrap_or_default();
    block(&position, traceparent)
}

/// A header block; empty if there are no headers.
fn block(lines: &str, traceparent: Option<&str>) -> Vec<u8> {
    let traceparent = traceparent.map(|traceparent| format!("{TRACEPARENT}: {traceparent}\r\n")).unwrap_or_default();
    if lines.is_empty() && traceparent.is_empty() {
        return vec![];
    }
    format!("NATS/1.0\r\n{lines}{traceparent}\r\n").into_bytes()
}

/// The header block of a failure.
pub fn failure_headers(failure: &Failure, traceparent: Option<&str>) -> Vec<u8> {
    let (text, status) = (header_text(&failure.to_string()), failure.status);
    block(&format!("{SERVICE_ERROR}: {text}\r\n{SERVICE_ERROR_CODE}: {status}\r\n"), traceparent)
}

/// The status of a reply that reports a failure; `None` for a success.
pub fn failure_status(reply: &Message) -> Option<u16> {
    reply.headers.as_ref()?.get(SERVICE_ERROR_CODE)?.as_str().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    #[test]
    fn a_success_is_read_back_as_it_was_written() {
        let accepted =
            Accepted { id: "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001".parse().unwrap(), version: 3, position: 1042 };
        assert_eq!(serde_json::from_slice::<Accepted>(&accepted.body()).unwrap(), accepted);
    }

    #[test]
    fn a_failure_header_is_one_line_of_visible_ascii() {
        let headers = failure_headers(&Failure::new(Code::Malformed, "no\r\nsuch: \"thing\"\0, Zoë"), None);
        let expected = "NATS/1.0\r\nNats-Service-Error: malformed: no%0D%0Asuch: %22thing%22%00, Zo%C3%AB\r\n\
            Nats-Service-Error-Code: 400\r\n\r\n";
        assert_eq!(String::from_utf8(headers).unwrap(), expected);
    }
}
