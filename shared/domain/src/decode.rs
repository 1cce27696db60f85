//! Decoding of stored events and states.

use serde::de::DeserializeOwned;

/// The error for a stored event or state that this version of the program cannot decode.
#[derive(Debug, thiserror::Error)]
pub enum Undecodable {
    #[error("unknown kind, name or schema")]
    Unknown,
    #[error("the payload does not have the schema's shape: {0}")]
    Payload(#[from] serde_json::Error),
}

pub(crate) fn decode_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Undecodable> {
    Ok(serde_json::from_slice(payload)?)
}
