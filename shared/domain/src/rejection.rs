//! Why a command is refused: a stable code for programs, a message for people, details for both.

use serde_json::{Map, Value};

/// A refusal. The command changed nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejection {
    pub kind: RejectionKind,
    /// Stable, and documented where its aggregate declares it ([`crate::Aggregate::REJECTIONS`]).
    pub code: &'static str,
    pub message: String,
    pub details: Map<String, Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectionKind {
    /// What the command names does not exist.
    NotFound,
    /// It collides with what another command did: version, uniqueness.
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
