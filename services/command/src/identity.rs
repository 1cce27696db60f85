//! Whether a stream is this journal's. The invariant: a stream that holds anything else is never published to, and the
//! reason names both sides, and what is to be done.

use std::collections::HashMap;

use async_nats::jetstream::message::StreamMessage;
use uuid::Uuid;
use wire::{EventMark, Fit, InvalidLineage, Lineage, journal_of, mark_of};

use crate::outbox::OutgoingEvent;

/// Why the relay publishes nothing: an operating mistake, which only a person can correct.
#[derive(Debug, thiserror::Error)]
pub enum Misaligned {
    #[error(
        "the stream {stream} holds events of the journal {theirs}, but PostgreSQL has the journal {ours}: STREAM, \
         NATS_URL or POSTGRES_URL names another installation's. Correct the setting, and delete nothing"
    )]
    OtherJournal { stream: String, theirs: Uuid, ours: Uuid },
    #[error(
        "the stream {stream} was made for the branch {theirs}, which the journal has left at position {fork}; it goes on \
         in the branch {ours}. `watershed journal branch` has not come to its end: run it again"
    )]
    FormerBranch { stream: String, theirs: Uuid, ours: Uuid, fork: u64 },
    #[error(
        "the stream {stream} was made for the branch {theirs}, which the journal in PostgreSQL does not know; it is in \
         the branch {ours}. PostgreSQL was restored to a copy from before that branch: restore a newer copy, or make \
         the journal the truth with `watershed journal branch`"
    )]
    UnknownBranch { stream: String, theirs: Uuid, ours: Uuid },
    #[error(
        "the stream {stream} ends at position {last}, but the journal in PostgreSQL at {head}. PostgreSQL was restored \
         to an older copy: restore a newer one, or make the journal the truth with `watershed journal branch`"
    )]
    Ahead { stream: String, last: u64, head: u64 },
    #[error(
        "the stream's message {position} is not the journal's event {position}: the stream {stream} has {theirs}, \
         PostgreSQL has {ours}. PostgreSQL was restored to an older copy, and went on: restore a newer one, or make the \
         journal the truth with `watershed journal branch`"
    )]
    OtherEvents { stream: String, position: u64, theirs: Box<EventMark>, ours: Box<EventMark> },
    #[error(
        "the stream's message {position} is not the journal's event {position}: {reason}. Somebody has published into \
         the stream {stream}, or it is from an older version: delete the stream, and it is filled from the journal again"
    )]
    Foreign { stream: String, position: u64, reason: String },
    #[error("the stream {stream} cannot be told from another: {invalid}. Delete it, and it is filled from the journal")]
    Unreadable { stream: String, invalid: InvalidLineage },
}

impl Misaligned {
    /// Logs that the relay publishes nothing.
    pub fn log(&self, reason: &str) {
        match self {
            Self::OtherJournal { .. } => {
                tracing::error!(reason, "the relay has stopped: the stream is another journal's")
            }
            Self::FormerBranch { .. } | Self::UnknownBranch { .. } => {
                tracing::error!(reason, "the relay has stopped: the stream is of another branch of the journal");
            }
            Self::Ahead { .. } => tracing::error!(reason, "the relay has stopped: the stream is ahead of the journal"),
            Self::OtherEvents { .. } => {
                tracing::error!(reason, "the relay has stopped: the stream has other events than the journal");
            }
            Self::Foreign { .. } | Self::Unreadable { .. } => {
                tracing::error!(reason, "the relay has stopped: the stream holds what the relay has not published");
            }
        }
    }
}

/// A stream that says of itself that it is this journal's, or that says nothing.
pub struct KnownStream<'a> {
    name: &'a str,
    lineage: &'a Lineage,
    has_metadata: bool,
}

/// Compares what a stream says of itself with the journal.
///
/// # Errors
/// If the stream is another journal's, or of another branch.
pub fn check_metadata<'a>(
    name: &'a str,
    metadata: &HashMap<String, String>,
    lineage: &'a Lineage,
) -> Result<KnownStream<'a>, Misaligned> {
    let stream = name.to_owned();
    let found = match Lineage::from_metadata(metadata) {
        Ok(None) => return Ok(KnownStream { name, lineage, has_metadata: false }),
        Ok(Some(found)) => found,
        Err(invalid) => return Err(Misaligned::Unreadable { stream, invalid }),
    };
    let (theirs, ours) = (found.present(), lineage.present());
    match lineage.fits(found.journal(), theirs, u64::MAX) {
        Fit::OtherJournal => Err(Misaligned::OtherJournal { stream, theirs: found.journal(), ours: lineage.journal() }),
        Fit::UnknownBranch => Err(Misaligned::UnknownBranch { stream, theirs, ours }),
        Fit::BeyondFork { fork, .. } => Err(Misaligned::FormerBranch { stream, theirs, ours, fork }),
        Fit::Ours => Ok(KnownStream { name, lineage, has_metadata: true }),
    }
}

impl KnownStream<'_> {
    /// Says what a message is that stands beyond the journal's head.
    pub fn ahead(&self, last: u64, head: u64, published: &StreamMessage) -> Misaligned {
        let ahead = Misaligned::Ahead { stream: self.name.to_owned(), last, head };
        self.stranger(last, published).unwrap_or(ahead)
    }

    /// Says what a message is that stands in the place of an event.
    pub fn other(&self, recorded: &OutgoingEvent, published: &StreamMessage) -> Misaligned {
        let position = recorded.position;
        if let Some(stranger) = self.stranger(position, published) {
            return stranger;
        }
        let stream = self.name.to_owned();
        match (mark_of(Some(&published.headers)), mark_of(Some(&recorded.headers))) {
            (Some(theirs), Some(ours)) if theirs != ours => {
                let (theirs, ours) = (Box::new(theirs), Box::new(ours));
                Misaligned::OtherEvents { stream, position, theirs, ours }
            }
            _ => Misaligned::Foreign { stream, position, reason: "its content is another".to_owned() },
        }
    }

    /// Whether the message is not an event of this journal at all.
    fn stranger(&self, position: u64, published: &StreamMessage) -> Option<Misaligned> {
        let (stream, ours) = (self.name.to_owned(), self.lineage.journal());
        match journal_of(position, Some(&published.headers)) {
            Err(foreign) => Some(Misaligned::Foreign { stream, position, reason: foreign.reason }),
            Ok(theirs) if theirs == ours => None,
            Ok(theirs) if self.has_metadata => {
                let reason = format!("it says that it comes from the journal {theirs}");
                Some(Misaligned::Foreign { stream, position, reason })
            }
            Ok(theirs) => Some(Misaligned::OtherJournal { stream, theirs, ours }),
        }
    }
}
