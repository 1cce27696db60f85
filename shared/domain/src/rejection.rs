//! The reason why a command is refused: a stable code for programs, a message for people, and details for both.

use serde_json::{Map, Value};

/// The reason why a command was refused. A refused command changes nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejection {
    pub kind: RejectionKind,
    /// A stable code. The aggregate explains it in [`crate::Aggregate::REJECTIONS`].
    pub code: &'static str,
    pub message: String,
    pub details: Map<String, Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectionKind {
    /// Something that the command names does not exist.
    NotFound,
    /// The command conflicts with an earlier one, over a version or over a unique value.
    Conflict,
    /// A rule of the business forbids it.
    Refused,
}

impl Rejection {
    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(RejectionKind::NotFound, code, message)
    }

    pub fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(RejectionKind::Conflict, code, message)
    }

    pub fn refused(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(RejectionKind::Refused, code, message)
    }

    /// Adds a detail.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }

    fn new(kind: RejectionKind, code: &'static str, message: impl Into<String>) -> Self {
        Self { kind, code, message: message.into(), details: Map::new() }
    }
}
