//! The replies: what a command's success says, and how a failure looks in the headers that NATS micro defines.

use async_nats::{HeaderMap, HeaderValue, Message};
use domain::Id;
use serde::{Deserialize, Serialize};

use crate::{Failure, POSITION};

const SERVICE_ERROR: &str = "Nats-Service-Error";
const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";

/// What a command says when it succeeded. It returns no data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The aggregate that the command was for.
    pub id: Id,
    /// That aggregate's version afterwards.
    pub version: u64,
    /// The position of the command's last event: the `Min-Position` to read what it wrote. A command that changed
    /// nothing gets the last position before it.
    pub position: u64,
}

impl Accepted {
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(POSITION, HeaderValue::from(self.position));
        headers
    }

    /// `{"id":"…","version":3,"position":1042}`
    pub fn body(&self) -> Vec<u8> {
        let Self { id, version, position } = self;
        format!(r#"{{"id":"{id}","version":{version},"position":{position}}}"#).into_bytes()
    }
}

/// The headers and the body of a failure.
pub fn failure_reply(failure: &Failure) -> (HeaderMap, Vec<u8>) {
    let mut headers = HeaderMap::new();
    headers.insert(SERVICE_ERROR, header_text(&failure.to_string()));
    headers.insert(SERVICE_ERROR_CODE, HeaderValue::from(u64::from(failure.status)));
    (headers, failure.body())
}

/// The status of a reply that tells of a failure; `None` of one that tells of success.
pub fn failure_status(reply: &Message) -> Option<u16> {
    reply.headers.as_ref()?.get(SERVICE_ERROR_CODE)?.as_str().parse().ok()
}

/// A header is one line: a message may quote what a client sent.
fn header_text(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
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
    fn a_line_break_in_a_message_stays_out_of_the_header() {
        let (headers, body) = failure_reply(&Failure::new(Code::Malformed, "no\r\nsuch: thing\0"));
        assert_eq!(headers.get(SERVICE_ERROR).unwrap().as_str(), "malformed: no  such: thing ");
        assert!(String::from_utf8(body).unwrap().contains(r"no\r\nsuch"));
    }
}
