//! The description of a command, from which the command service makes its endpoint.

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
