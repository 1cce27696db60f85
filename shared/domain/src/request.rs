//! Requests, parsed once, strictly: unknown fields, wrong types and values out of bounds are errors that name the
//! field and say what was expected. The errors are short and free of control characters, whatever the client sent, so
//! that they fit into any reply and header, and never repeat a text of the request but the name of an unknown field.

use schemars::Schema;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::{Command, Id, strict::Object};

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
    /// Both are cut where they are overlong, and control characters replaced.
    pub fn new(field: &str, expected: impl Into<String>) -> Self {
        Self { field: printable(field, 120), expected: printable(&expected.into(), 480) }
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

/// Parses a request: one JSON object. An empty body is read as `{}`, so that `nats request qry.user.list ""` works.
///
/// # Errors
/// Names the field, and says what was expected.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Malformed> {
    let body = if body.is_empty() { b"{}" } else { body };
    let mut json = serde_json::Deserializer::from_slice(body);
    let Object(parsed) = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| malformed(&error.path().to_string(), error.inner()))?;
    json.end().map_err(|error| malformed("", &error))?;
    Ok(parsed)
}

pub(crate) fn decode_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Undecodable> {
    Ok(serde_json::from_slice(payload)?)
}

/// Says in the client's words what serde says in Rust's.
fn malformed(path: &str, error: &serde_json::Error) -> Malformed {
    // The path of the whole is `.`, and what it could not follow is `?`, such as a key that is broken itself.
    let path = path.trim_end_matches('?').trim_end_matches('.');
    let text = error.to_string();
    match error.classify() {
        Category::Data => {
            let place = format!(" at line {} column {}", error.line(), error.column());
            explain(path, text.strip_suffix(&place).unwrap_or(&text))
        }
        Category::Syntax if text.starts_with("number out of range") => {
            Malformed::new(path, "expected a number within 64 bits")
        }
        Category::Syntax | Category::Eof | Category::Io => Malformed::new(path, format!("cannot be read: {text}")),
    }
}

fn explain(path: &str, text: &str) -> Malformed {
    let quoted = |prefix| text.strip_prefix(prefix).and_then(|rest| rest.strip_suffix('`'));
    if let Some(name) = quoted("missing field `") {
        return Malformed::new(&join(path, name), "expected a value, the field is missing");
    }
    if let Some(name) = quoted("duplicate field `") {
        return Malformed::new(&join(path, name), "expected once, the field is there again");
    }
    // What was expected is ours and comes last; before it may stand what the client sent, whatever that says.
    let (got, expected) = text.rsplit_once(", expected ").unwrap_or((text, ""));
    if got.starts_with("unknown field ") {
        let names = if expected.is_empty() { "none at all" } else { expected };
        return Malformed::new(path, format!("unknown field, expected {names}"));
    }
    if got.starts_with("unknown variant ") {
        return Malformed::new(path, format!("expected {expected}"));
    }
    match got.strip_prefix("invalid type: ").or_else(|| got.strip_prefix("invalid value: ")) {
        Some(got) => Malformed::new(path, format!("expected {}, got {}", in_json(expected), in_json(got))),
        None => Malformed::new(path, text),
    }
}

/// serde's name of a type or value, as somebody says it who knows JSON and not Rust.
fn in_json(name: &str) -> &str {
    match name {
        "i64" => "a whole number from -9223372036854775808 to 9223372036854775807",
        "u64" => "a whole number from 0 to 18446744073709551615",
        "i32" => "a whole number from -2147483648 to 2147483647",
        "u32" => "a whole number from 0 to 4294967295",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        "a map" => "an object",
        "sequence" => "an array",
        "map" => "an object",
        text if text.starts_with("string ") => "a string",
        other => other,
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn printable(text: &str, max_chars: usize) -> String {
    let mut printable: String =
        text.chars().take(max_chars).map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    if text.chars().nth(max_chars).is_some() {
        printable.push('…');
    }
    printable
}
