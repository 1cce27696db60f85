//! Decoding of stored events and states. The invariant: a payload is read as the schema that it was written in, and a
//! state only in the form that this program writes; nothing is guessed.

use serde::de::DeserializeOwned;

/// The error for a stored event or state that this version of the program cannot decode.
#[derive(Debug, thiserror::Error)]
pub enum Undecodable {
    #[error("unknown kind, name or schema")]
    Unknown,
    /// A newer version of the program wrote the event.
    #[error("schema {schema} of {kind}.{name} is newer than the {known} that this program knows")]
    Newer { kind: &'static str, name: &'static str, schema: i16, known: i16 },
    /// An older or a newer version of the program wrote the state.
    #[error("the state has form {form}, and this program reads form {known}")]
    Form { form: i16, known: i16 },
    // The error's own text would quote the payload, which may be somebody's e-mail address.
    #[error("the payload does not match the schema, at line {} column {}", .0.line(), .0.column())]
    Payload(#[from] serde_json::Error),
}

/// Reads the payload of an older schema, and turns it step by step into the present one.
pub(crate) type ReadOlder<E> = fn(&[u8]) -> Result<E, Undecodable>;

pub(crate) fn decode_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Undecodable> {
    Ok(serde_json::from_slice(payload)?)
}

/// Decodes the payload of an event: one of the present schema directly, one of an older schema by `older`, in which the
/// schemas 1, 2 … have their places.
pub(crate) fn decode_event<E: DeserializeOwned>(
    (kind, name, known): (&'static str, &'static str, i16),
    older: &[ReadOlder<E>],
    schema: i16,
    payload: &[u8],
) -> Result<E, Undecodable> {
    if schema == known {
        return decode_payload(payload);
    }
    if schema > known {
        return Err(Undecodable::Newer { kind, name, schema, known });
    }
    let place = usize::try_from(schema).ok().and_then(|schema| schema.checked_sub(1));
    match place.and_then(|place| older.get(place)) {
        Some(read) => read(payload),
        None => Err(Undecodable::Unknown),
    }
}
