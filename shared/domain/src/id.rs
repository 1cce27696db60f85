//! Identifiers are UUIDs. The client may choose them; otherwise the command service makes them.

use std::{fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::strict;

/// The identifier of an aggregate. It is written as 36 lower-case characters in both JSON and BSON, so that a stored
/// document can be sent to clients without conversion. The nil UUID, which is the default, stands for an absent
/// identifier, and clients may not send it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub Uuid);

const EXPECTED: &str = "a UUID of 36 characters such as 0192d3a0-7c1e-7b5a-9f00-3c2b1a000001, not the nil one";

impl Id {
    /// Whether this is the nil UUID, which stands for an absent identifier.
    pub(crate) fn is_none(&self) -> bool {
        self.0.is_nil()
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl FromStr for Id {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        // `Uuid` also parses braces, URNs and bare hexadecimal digits. Only one spelling is accepted here, so that no
        // two texts stand for the same identifier.
        match Uuid::try_parse(text) {
            Ok(uuid) if text.len() == 36 && !uuid.is_nil() => Ok(Self(uuid)),
            Ok(_) | Err(_) => Err(InvalidId),
        }
    }
}

/// The error for a text that is not a UUID of 36 characters, or that is the nil UUID.
#[derive(Debug, thiserror::Error)]
#[error("expected {EXPECTED}")]
pub struct InvalidId;

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_hyphenated().encode_lower(&mut Uuid::encode_buffer()))
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        strict::text(deserializer, EXPECTED, |text| text.parse().ok())
    }
}

impl JsonSchema for Id {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Id".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "uuid" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_spelling_of_an_identifier_is_read() {
        let text = "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001";
        assert_eq!(text.parse::<Id>().unwrap().to_string(), text);
        assert_eq!(text.to_uppercase().parse::<Id>().unwrap().to_string(), text);
        for bad in [
            "",
            "1",
            "{0192d3a0-7c1e-7b5a-9f00-3c2b1a000001}",
            "0192d3a07c1e7b5a9f003c2b1a000001",
            "00000000-0000-0000-0000-000000000000",
        ] {
            assert!(bad.parse::<Id>().is_err(), "{bad}");
        }
    }
}
