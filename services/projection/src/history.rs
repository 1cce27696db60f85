//! Whether what was read from the stream before can go on with the stream that there is now. The invariant: nobody goes
//! on from a position before the event that stood there has been compared with the one that stands there now, and the
//! branch with the journal's lineage. The stream may be another one by now: deleted and filled from a journal that was
//! restored, restored itself, or another installation's.

use async_nats::jetstream::{
    self, ErrorCode,
    context::GetStreamErrorKind,
    stream::{Info, RawMessageErrorKind, Stream},
};
use runtime::Nats;
use uuid::Uuid;
use wire::{EventMark, Fit, Lineage, branch_of, head_from_metadata, journal_of, mark_of};

use crate::reader::ReadError;

/// Up to where events were read, and which one was the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// The position of the last event; 0 before the first.
    pub position: u64,
    /// The journal that the events are from; `None` if that is not known.
    pub journal: Option<Uuid>,
    /// The last event; `None` if that is not known, as in checkpoints of a time before there were branches.
    pub mark: Option<EventMark>,
}

/// The stream as it is now.
pub struct StreamHistory {
    /// `None` in a stream from before there were branches.
    pub lineage: Option<Lineage>,
}

/// Why it cannot go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Mismatch {
    /// The stream is being filled again, or has lost its end. This passes.
    #[error("the stream ends at position {last}, but was read up to {position} before")]
    Short { position: u64, last: u64 },
    /// The stream and what was read before are of different histories.
    #[error("{0}")]
    Refused(String),
    /// The journal was declared the truth, and has left the branch that was read before. What was built from events
    /// beyond the fork must be built anew.
    #[error(
        "it stands at position {position} of the branch {theirs}, which the journal has left at position {fork} for the branch {ours}"
    )]
    BeyondFork { position: u64, theirs: Uuid, fork: u64, ours: Uuid },
}

impl Standing {
    /// The branch of the last event; `None` if nothing has been read.
    fn branch(&self) -> Option<Uuid> {
        // Before there were branches, there was only the first, which has the journal's identifier.
        self.mark.map(|mark| mark.branch).or(self.journal)
    }
}

/// Compares what was read before with the stream.
///
/// # Errors
/// [`Mismatch`] if it cannot go on with this stream; others if there is no stream, or NATS does not answer.
pub async fn compare(nats: &Nats, name: &str, standing: &Standing) -> Result<StreamHistory, ReadError> {
    let context = jetstream::new(nats.client.clone());
    let stream = context.get_stream(name).await.map_err(|error| match error.kind() {
        GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
            ReadError::NoStream(name.to_owned())
        }
        _ => ReadError::NoConsumer(name.to_owned(), error.to_string()),
    })?;
    let Info { config, state, .. } = stream.cached_info();
    let lineage = Lineage::from_metadata(&config.metadata).map_err(|error| Mismatch::Refused(error.to_string()))?;
    if standing.position > 0 {
        if let (Some(lineage), Some(journal), Some(branch)) = (&lineage, standing.journal, standing.branch()) {
            check_lineage(name, lineage, journal, branch, standing.position)?;
        }
        if state.last_sequence < standing.position {
            return Err(check_end(name, stream.cached_info(), standing).into());
        }
        if state.first_sequence <= standing.position {
            compare_event(name, &stream, standing).await?;
        }
    }
    Ok(StreamHistory { lineage })
}

fn check_lineage(stream: &str, lineage: &Lineage, journal: Uuid, branch: Uuid, position: u64) -> Result<(), Mismatch> {
    let theirs = lineage.journal();
    match lineage.fits(journal, branch, position) {
        Fit::Ours => Ok(()),
        Fit::BeyondFork { fork, ours } => Err(Mismatch::BeyondFork { position, theirs: branch, fork, ours }),
        Fit::UnknownBranch => Err(Mismatch::Refused(format!(
            "it stands at position {position} of the branch {branch}, which the stream {stream} does not know, whose journal \
             is in the branch {}",
            lineage.present()
        ))),
        Fit::OtherJournal => Err(Mismatch::Refused(other_journal(stream, journal, theirs))),
    }
}

pub fn other_journal(stream: &str, ours: Uuid, theirs: Uuid) -> String {
    format!("it comes from the journal {ours}, the stream {stream} from the journal {theirs}")
}

/// A stream that ends sooner has yet to be filled, unless it was made by a journal that did not have these events.
fn check_end(name: &str, info: &Info, standing: &Standing) -> Mismatch {
    let (position, last) = (standing.position, info.state.last_sequence);
    let made_at = info.created.unix_timestamp_nanos() / 1_000_000;
    match (head_from_metadata(&info.config.metadata), standing.mark) {
        (Some(head), Some(mark)) if head < position && made_at > i128::from(mark.at.unix_millis()) => {
            Mismatch::Refused(format!(
                "it stands at position {position} on {mark}, but the journal had only {head} events when the stream {name} \
                 was made after that"
            ))
        }
        _ => Mismatch::Short { position, last },
    }
}

async fn compare_event(name: &str, stream: &Stream, standing: &Standing) -> Result<(), ReadError> {
    let position = standing.position;
    let message = match stream.get_raw_message(position).await {
        Ok(message) => message,
        // The stream is another one by now.
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
            return Err(Mismatch::Short { position, last: 0 }.into());
        }
        Err(error) => return Err(ReadError::NoConsumer(name.to_owned(), error.to_string())),
    };
    let headers = Some(&message.headers);
    if let Ok(journal) = journal_of(position, headers)
        && let Some(ours) = standing.journal.filter(|ours| *ours != journal)
    {
        return Err(Mismatch::Refused(other_journal(name, ours, journal)).into());
    }
    compare_marks(standing, mark_of(headers)).map_err(Into::into)
}

/// Compares the last event that was read with the one that is there now.
///
/// # Errors
/// [`Mismatch::Refused`] if they differ.
pub fn compare_marks(standing: &Standing, found: Option<EventMark>) -> Result<(), Mismatch> {
    let Some(mark) = standing.mark.filter(|mark| Some(*mark) != found) else { return Ok(()) };
    let found = found.map_or_else(|| "something else".to_owned(), |found| found.to_string());
    let position = standing.position;
    Err(Mismatch::Refused(format!("it stands at position {position} on {mark}, but the stream has there {found}")))
}

/// The journal of a message that follows others of this lineage.
///
/// # Errors
/// If it does not say that it is the journal's event at this position.
pub fn journal_in(
    lineage: Option<&Lineage>,
    position: u64,
    headers: Option<&async_nats::HeaderMap>,
) -> Result<Uuid, wire::Foreign> {
    let journal = journal_of(position, headers)?;
    let branch = branch_of(position, journal, headers)?;
    let Some(lineage) = lineage else { return Ok(journal) };
    let expected = (lineage.journal(), lineage.branch_at(position));
    if (journal, branch) == expected {
        return Ok(journal);
    }
    let reason = format!(
        "it says that it is of the branch {branch} of the journal {journal}, but the stream is of the branch {} of the journal {}",
        expected.1, expected.0
    );
    Err(wire::Foreign { position, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_event_in_the_same_branch_is_the_same() {
        let mark = EventMark {
            aggregate: "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001".parse().unwrap(),
            version: 3,
            at: "2026-01-31T09:30:00.125Z".parse().unwrap(),
            branch: Uuid::from_u128(7),
        };
        let standing = Standing { position: 42, journal: Some(Uuid::from_u128(7)), mark: Some(mark) };
        assert!(compare_marks(&standing, Some(mark)).is_ok());
        let others = [
            EventMark { aggregate: "0192d3a0-7c1e-7b5a-9f00-3c2b1a000002".parse().unwrap(), ..mark },
            EventMark { version: 4, ..mark },
            EventMark { at: "2026-01-31T09:30:00.126Z".parse().unwrap(), ..mark },
            EventMark { branch: Uuid::from_u128(8), ..mark },
        ];
        for other in others {
            let refused = compare_marks(&standing, Some(other)).unwrap_err().to_string();
            assert!(refused.contains(&mark.to_string()) && refused.contains(&other.to_string()), "{refused}");
        }
        assert!(compare_marks(&standing, None).is_err());
        let unknown = Standing { mark: None, ..standing };
        assert!(compare_marks(&unknown, Some(mark)).is_ok(), "a checkpoint of before cannot be compared");
    }
}
