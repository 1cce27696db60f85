//! Why a request failed: a stable code, the HTTP status of that meaning, a message for people, and details for
//! programs.

use std::{borrow::Cow, fmt};

use domain::{Malformed, Rejection, RejectionKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A failure, as it is sent in a reply and kept in the command ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The HTTP status that has the meaning of `code`.
    pub status: u16,
    /// Stable and documented.
    pub code: Cow<'static, str>,
    pub message: String,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub details: Map<String, Value>,
}

/// The failures of the services themselves. Those of the business rules are [`Rejection`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request or one of its headers cannot be read, or a value is out of bounds.
    Malformed,
    /// The view does not have what the query asks for.
    NotFound,
    /// The view did not reach `Min-Position` in time.
    ViewBehind,
    /// The idempotency key was used before, with another request.
    CommandIdReused,
    /// The operation does not fit what is there now.
    Conflict,
    /// The request, the event that it would record, or the reply is larger than allowed.
    TooLarge,
    /// The service has too many requests waiting.
    Overloaded,
    /// A server that the service needs is down, or the service is stopping.
    Unavailable,
    /// A fault of the service itself.
    Internal,
}

impl Code {
    const ALL: [Self; 9] = [
        Self::Malformed,
        Self::NotFound,
        Self::ViewBehind,
        Self::CommandIdReused,
        Self::Conflict,
        Self::TooLarge,
        Self::Overloaded,
        Self::Unavailable,
        Self::Internal,
    ];

    /// The code that is written so; `None` for that of a business rule, or of a later version.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == text)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NotFound => "not_found",
            Self::ViewBehind => "view_behind",
            Self::CommandIdReused => "command_id_reused",
            Self::Conflict => "conflict",
            Self::TooLarge => "too_large",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }

    pub fn status(self) -> u16 {
        match self {
            Self::Malformed => 400,
            Self::NotFound => 404,
            Self::ViewBehind => 408,
            Self::CommandIdReused | Self::Conflict => 409,
            Self::TooLarge => 413,
            Self::Overloaded | Self::Unavailable => 503,
            Self::Internal => 500,
        }
    }
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { status: code.status(), code: code.as_str().into(), message: message.into(), details: Map::new() }
    }

    /// Adds a detail.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }

    /// The body of the reply: `{"error":{"code":…,"message":…,"details":{…}}}`.
    pub fn body(&self) -> Vec<u8> {
        let Self { status: _, code, message, details } = self;
        json!({ "error": { "code": code, "message": message, "details": details } }).to_string().into_bytes()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Self {
        let status = match rejection.kind {
            RejectionKind::NotFound => 404,
            RejectionKind::Conflict => 409,
            RejectionKind::Refused => 422,
        };
        Self { status, code: rejection.code.into(), message: rejection.message, details: rejection.details }
    }
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        let failure = Self::new(Code::Malformed, malformed.to_string()).with("reason", malformed.reason.as_str());
        let failure = match malformed.bounds() {
            Some((min, max)) => failure.with("min", min).with("max", max),
            None => failure,
        };
        let texts = [("field", malformed.field), ("expected", malformed.expected)];
        let given = texts.into_iter().filter(|(_, text)| !text.is_empty());
        given.fold(failure, |failure, (name, text)| failure.with(name, text))
    }
}

#[cfg(test)]
mod tests {
    use domain::Reason;

    use super::*;

    #[test]
    fn a_body_names_code_message_and_details() {
        let failure = Failure::from(Malformed::new("lines[0].quantity", Reason::OutOfBounds, "a number from 1 to 5"));
        assert_eq!(failure.status, 400);
        let body: Value = serde_json::from_slice(&failure.body()).unwrap();
        assert_eq!(
            body["error"],
            json!({
                "code": "malformed",
                "message": "lines[0].quantity: expected a number from 1 to 5",
                "details": {
                    "field": "lines[0].quantity", "reason": "out_of_bounds", "expected": "a number from 1 to 5",
                    "min": 1, "max": 5,
                },
            })
        );
    }

    #[test]
    fn absent_details_are_left_out() {
        let failure = Failure::from(Malformed::new("id", Reason::Missing, ""));
        assert_eq!(json!(failure.details), json!({ "field": "id", "reason": "missing" }));
        let failure = Failure::from(Malformed::new("", Reason::NotJson, "one JSON object in UTF-8"));
        assert_eq!(json!(failure.details), json!({ "reason": "not_json", "expected": "one JSON object in UTF-8" }));
    }

    #[test]
    fn a_failure_is_deserialised_as_it_was_serialised() {
        let failure = Failure::from(Rejection::refused("out_of_stock", "none left").with("available", 0));
        let json = serde_json::to_vec(&failure).unwrap();
        assert_eq!(serde_json::from_slice::<Failure>(&json).unwrap(), failure);
    }
}
