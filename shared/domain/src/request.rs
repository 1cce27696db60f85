//! Requests, parsed once, strictly: unknown fields, wrong types and values out of bounds are errors that name the
//! field and say what was expected.

use schemars::Schema;
use serde::de::DeserializeOwned;

use crate::{Command, Id};

/// One kind of command: what the command service needs to serve it.
#[derive(Clone, Copy)]
pub struct CommandType {
    pub aggregate: &'static str,
    pub verb: &'static str,
    pub description: &'static str,
    /// The JSON Schema of the request.
    pub schema: fn() -> Schema,
    /// Reads a request; the identifier is for the aggregate that it makes, if the client names none.
    pub parse: fn(&[u8], Id) -> Result<Command, Malformed>,
}

/// A request that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{expected}", if field.is_empty() { String::new() } else { format!("{field}: ") })]
pub struct Malformed {
    /// The path of the field, such as `lines[2].quantity`; empty where the fault is not in one field.
    pub field: String,
    /// What was expected instead.
    pub expected: String,
}

impl Malformed {
    pub fn new(field: &str, expected: impl Into<String>) -> Self {
        Self { field: field.to_owned(), expected: expected.into() }
    }
}

/// A stored event or state that this program does not understand.
#[derive(Debug, thiserror::Error)]
pub enum Undecodable {
    #[error("unknown kind, name or schema")]
    Unknown,
    #[error("the payload does not have the schema's shape: {0}")]
    Payload(#[from] serde_json::Error),
}

/// Parses a JSON request. An empty body is read as `{}`, so that `nats request qry.user.list ""` works.
///
/// # Errors
/// Names the field, and says what was expected.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Malformed> {
    let body = if body.is_empty() { b"{}" } else { body };
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = error.path().to_string();
        let field = if field == "." { String::new() } else { field };
        Malformed { field, expected: error.into_inner().to_string() }
    })?;
    json.end().map_err(|error| Malformed { field: String::new(), expected: error.to_string() })?;
    Ok(parsed)
}

pub(crate) fn decode_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Undecodable> {
    Ok(serde_json::from_slice(payload)?)
}
