//! The description of a command, from which the command service makes its endpoint, and the form in which a client sends
//! one.

use schemars::Schema;

use crate::{Command, Id, Malformed};

/// A command as the command service serves it.
#[derive(Clone, Copy, Debug)]
pub struct CommandType {
    pub aggregate: &'static str,
    pub verb: &'static str,
    pub description: &'static str,
    /// The JSON Schema of the request.
    pub schema: fn() -> Schema,
    /// Parses a request. The identifier is used for a new aggregate if the client does not choose one.
    pub parse: fn(&[u8], Id) -> Result<Command, Malformed>,
}

/// The struct of a command, as clients send it. The macro `commands!` implements it.
pub trait CommandRequest {
    /// The kind of aggregate, which is the middle word of the subject.
    const AGGREGATE: &'static str;
    /// The last word of the subject.
    const VERB: &'static str;

    /// The body of the request. A nil `id` is left out, so that the service makes one.
    ///
    /// # Errors
    /// Never for the commands of this crate, whose types all have a JSON form.
    fn to_json(&self) -> serde_json::Result<serde_json::Value>;
}
