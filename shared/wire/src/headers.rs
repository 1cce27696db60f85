//! The request headers, read strictly: a header that cannot be read is an error, not a header that is not there.

use async_nats::HeaderMap;
use domain::{Malformed, Reason};

/// The command's idempotency key: 1 to 128 visible ASCII characters.
pub const MSG_ID: &str = "Nats-Msg-Id";
/// Refuse the command unless its aggregate is at this version.
pub const EXPECTED_VERSION: &str = "Expected-Version";
/// Answer the query from a view at least that far.
pub const MIN_POSITION: &str = "Min-Position";
/// Who sends the command, kept with its events: 1 to 128 characters.
pub const ACTOR: &str = "Actor";
/// W3C Trace Context, kept with the events.
pub const TRACEPARENT: &str = "traceparent";
/// In replies: of a command, its last event's position; of a query, that of the view which it read.
pub const POSITION: &str = "Position";

const MAX_LENGTH: usize = 128;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestHeaders {
    pub command_id: Option<String>,
    pub expected_version: Option<u64>,
    pub min_position: Option<u64>,
    pub actor: Option<String>,
    pub traceparent: Option<String>,
}

impl RequestHeaders {
    /// # Errors
    /// Names the header that cannot be read, and says what was expected. An invalid `traceparent` is left out instead,
    /// as its specification demands.
    pub fn parse(headers: Option<&HeaderMap>) -> Result<Self, Malformed> {
        let Some(headers) = headers else {
            return Ok(Self::default());
        };
        let text = |name| headers.get(name).map(|value| value.as_str());
        Ok(Self {
            command_id: text(MSG_ID).map(|value| key(MSG_ID, value)).transpose()?,
            expected_version: text(EXPECTED_VERSION).map(|value| number(EXPECTED_VERSION, value)).transpose()?,
            min_position: text(MIN_POSITION).map(|value| number(MIN_POSITION, value)).transpose()?,
            actor: text(ACTOR).map(actor).transpose()?,
            traceparent: text(TRACEPARENT).filter(|value| is_traceparent(value)).map(str::to_owned),
        })
    }
}

fn key(name: &str, value: &str) -> Result<String, Malformed> {
    if (1..=MAX_LENGTH).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(value.to_owned());
    }
    Err(Malformed::new(name, Reason::Invalid, format!("1 to {MAX_LENGTH} visible ASCII characters without spaces")))
}

fn actor(value: &str) -> Result<String, Malformed> {
    let value = value.trim();
    if (1..=MAX_LENGTH).contains(&value.chars().count()) && !value.chars().any(char::is_control) {
        return Ok(value.to_owned());
    }
    Err(Malformed::new(ACTOR, Reason::Invalid, format!("1 to {MAX_LENGTH} characters without control characters")))
}

/// Up to `i64::MAX`, which is as far as the stores count.
fn number(name: &str, value: &str) -> Result<u64, Malformed> {
    let value = value.trim();
    let digits = value.strip_prefix('-').unwrap_or(value);
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let reason = if is_number { Reason::OutOfBounds } else { Reason::Invalid };
    let number: Option<u64> = value.parse().ok();
    number
        .filter(|number| *number <= i64::MAX as u64)
        .ok_or_else(|| Malformed::new(name, reason, "a whole number from 0 to 9223372036854775807"))
}

/// `00-<32 hex>-<16 hex>-<2 hex>`, W3C Trace Context level 1, section 3.2.
fn is_traceparent(value: &str) -> bool {
    let hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let mut parts = value.split('-');
    let shape = [2, 32, 16, 2].iter().all(|length| parts.next().is_some_and(|part| hex(part, *length)));
    shape && parts.next().is_none() && !value.starts_with("ff")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, value: &str) -> Result<RequestHeaders, Malformed> {
        let mut headers = HeaderMap::new();
        headers.insert(name, value);
        RequestHeaders::parse(Some(&headers))
    }

    #[test]
    fn each_header_is_read() {
        assert_eq!(parse(MSG_ID, "k-1").unwrap().command_id.as_deref(), Some("k-1"));
        assert_eq!(parse(EXPECTED_VERSION, "3").unwrap().expected_version, Some(3));
        assert_eq!(parse(MIN_POSITION, "0").unwrap().min_position, Some(0));
        assert_eq!(parse(ACTOR, "Ada L.").unwrap().actor.as_deref(), Some("Ada L."));
        assert_eq!(RequestHeaders::parse(None).unwrap(), RequestHeaders::default());
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        let long = "x".repeat(129);
        let cases = [
            (MSG_ID, "", Reason::Invalid),
            (MSG_ID, "a b", Reason::Invalid),
            (MSG_ID, "a\0b", Reason::Invalid),
            (MSG_ID, &long, Reason::Invalid),
            (EXPECTED_VERSION, "-1", Reason::OutOfBounds),
            (EXPECTED_VERSION, "x", Reason::Invalid),
            (EXPECTED_VERSION, "", Reason::Invalid),
            (MIN_POSITION, "99999999999999999999", Reason::OutOfBounds),
            (ACTOR, "", Reason::Invalid),
            (ACTOR, "a\0b", Reason::Invalid),
        ];
        for (name, value, reason) in cases {
            let malformed = parse(name, value).unwrap_err();
            assert_eq!((&*malformed.field, malformed.reason), (name, reason), "{value:?}");
        }
        assert_eq!(parse(MIN_POSITION, "-1").unwrap_err().bounds(), Some((0, i64::MAX)));
    }

    #[test]
    fn an_invalid_traceparent_is_left_out() {
        let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(parse(TRACEPARENT, valid).unwrap().traceparent.as_deref(), Some(valid));
        assert_eq!(parse(TRACEPARENT, "00-nonsense").unwrap().traceparent, None);
    }
}
