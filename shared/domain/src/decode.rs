//! Decoding of stored events and states.

use serde::de::DeserializeOwned;

/// The error for a stored event or state that this version of the program cannot decode.
#[derive(Debug, thiserror::Error)]
pub enum Undecodable {
    #[error("unknown kind, name or schema")]
    Unknown,
    // The error's own text would quote the payload, which may be somebody's e-mail address.
    #[error("the payload does not match the schema, at line {} column {}", .0.line(), .0.column())]
    Payload(#[from] serde_json::Error),
}

pub(crate) fn decode_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Undecodable> {
    Ok(serde_json::from_slice(payload)?)
}
