//! What is wrong with a request: the field, a reason for programs and a message for people. The invariant: a message is
//! short and free of control characters, whatever the client sent, so that it fits into any reply and header.

use std::fmt;

/// The error for a request that could not be parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The path of the field, such as `lines[2].quantity`; empty if the error does not concern a single field.
    pub field: String,
    pub reason: Reason,
    /// What was expected instead, as a phrase to follow "expected"; empty if the reason is enough.
    pub expected: String,
    /// What was sent, as a phrase to follow "got"; empty if it would repeat a text of the client.
    got: String,
}

/// The reason why a request could not be parsed, for programs. The words of [`Self::as_str`] are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The field is required and absent.
    Missing,
    /// There is no such field.
    Unknown,
    /// The field is present more than once.
    Duplicate,
    /// There is such a field, but it may not be combined with the others.
    Unexpected,
    /// The value has another JSON type, or is a number with a fraction instead of a whole number.
    WrongType,
    /// The value has the right type, but is too small or too large, or has too few or too many items.
    OutOfBounds,
    /// The value has the right type, but the wrong form, or is none of the choices.
    Invalid,
    /// The body is not one JSON value in UTF-8.
    NotJson,
}

impl Reason {
    /// The word in the details of a failure, which the documentation lists.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Duplicate => "duplicate",
            Self::Unexpected => "unexpected",
            Self::WrongType => "wrong_type",
            Self::OutOfBounds => "out_of_bounds",
            Self::Invalid => "invalid",
            Self::NotJson => "not_json",
        }
    }

    /// The reason for people; empty if the expectation is enough.
    fn in_words(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unknown => "unknown field",
            Self::Duplicate => "present more than once",
            Self::Unexpected => "not allowed here",
            Self::WrongType | Self::OutOfBounds | Self::Invalid | Self::NotJson => "",
        }
    }
}

impl Malformed {
    /// Makes the error, where `expected` is a phrase to follow "expected". Long texts are truncated, and control
    /// characters are replaced.
    pub fn new(field: &str, reason: Reason, expected: impl Into<String>) -> Self {
        let (field, expected) = (printable(field, 120), printable(&expected.into(), 480));
        Self { field, reason, expected, got: String::new() }
    }

    /// The least and the greatest value of the expected range, if a range was expected.
    pub fn bounds(&self) -> Option<(i64, i64)> {
        // An error of serde carries nothing but its text, so the bounds have to be read from that.
        let (_, range) = self.expected.split_once(" from ")?;
        let (min, rest) = range.split_once(" to ")?;
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        Some((min.parse().ok()?, rest[..end].parse().ok()?))
    }

    pub(crate) fn got(self, got: &str) -> Self {
        Self { got: printable(got, 120), ..self }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, reason, expected, got } = self;
        let mut parts = vec![reason.in_words().to_owned()];
        parts.extend((!expected.is_empty()).then(|| format!("expected {expected}")));
        parts.extend((!got.is_empty()).then(|| format!("got {got}")));
        parts.retain(|part| !part.is_empty());
        let colon = if field.is_empty() { "" } else { ": " };
        write!(f, "{field}{colon}{}", parts.join(", "))
    }
}

impl std::error::Error for Malformed {}

fn printable(text: &str, max_chars: usize) -> String {
    let mut printable: String =
        text.chars().take(max_chars).map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    if text.chars().nth(max_chars).is_some() {
        printable.push('…');
    }
    printable
}
