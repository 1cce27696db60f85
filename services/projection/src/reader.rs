//! Reads the stream from a position on. The invariant: events are returned in the order of their positions, none twice
//! and none left out. Where that order cannot be kept, reading ends with an error, and the caller opens a new reader.
//!
//! The consumer is what NATS calls an ordered one: ephemeral, in memory, with one replica and without acknowledgements.
//! This file makes its own, because async-nats's ordered consumer begins at the start of the stream if it has to be
//! recreated before its first message, and checks for gaps less strictly than by position. It also pulls its own
//! messages: async-nats pulls from a separate task and counts the messages to come only when that task reports; if all
//! of them have arrived by then, its stream waits for them for ever.

use std::time::Duration;

use async_nats::{
    Message, StatusCode, Subject, Subscriber,
    jetstream::{
        self, Context, ErrorCode,
        consumer::{
            AckPolicy, DeliverPolicy, PullConsumer,
            pull::{self, BatchConfig},
        },
        message::Info,
        stream::ConsumerErrorKind,
    },
};
use futures_util::{FutureExt, StreamExt};
use runtime::Nats;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use wire::{Foreign, Lineage, mark_of};

use crate::{
    event::{Size, StreamMessage},
    history::{self, Mismatch, Standing, StreamHistory},
};

/// The server sends a heartbeat this often while it has no message. A consumer that stays silent for twice as long is
/// taken for lost.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long the server keeps one pull request. A reader that has not been polled for this long opens a new consumer.
const REQUEST_EXPIRY: Duration = Duration::from_secs(30);
/// How many events are requested ahead at most. They wait in memory, where their headers make them much larger.
const PREFETCH_EVENTS: usize = 500;
const PREFETCH_BYTES: usize = 2 << 20;
/// The server deletes a consumer that has not been pulled from for this long.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(30);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// The header that says how many messages of a pull request will not come.
const PENDING_MESSAGES: &str = "Nats-Pending-Messages";
/// What the server counts towards a request's bytes beyond payload and headers: subject and reply subject.
const OVERHEAD_BYTES: usize = 4 << 10;

/// Why the next event cannot be read at the moment.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The command service creates the stream.
    #[error("there is no stream {0} yet")]
    NoStream(String),
    #[error("the stream {0} cannot be read: {1}")]
    NoConsumer(String, String),
    #[error("the consumer of the stream was lost: {0}")]
    Lost(String),
    #[error("position {position} came after {last}")]
    Gap { last: u64, position: u64 },
    /// Somebody else has published into the stream.
    #[error("{0}. No event after it is read until the stream is repaired: see the log of the command service's relay")]
    Foreign(#[from] Foreign),
    /// The stream is not the one that was read before.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
}

pub struct Reader {
    nats: Nats,
    stream: String,
    /// The name of the view that it reads for, or of all of them.
    name: String,
    /// How often the connection had been lost when the reader was opened. Another loss ends its pull requests.
    losses: u64,
    requests: PullRequests,
    /// The lineage of the journal, as the stream told it when the reader was opened.
    lineage: Option<Lineage>,
    /// The last event that was returned.
    standing: Standing,
    /// The event at `standing` has yet to come from the consumer, and to be compared.
    is_comparing: bool,
    /// An error that is held back until the events before it have been returned.
    failed: Option<ReadError>,
}

/// Pulls messages from a consumer, and asks for more before they run out.
struct PullRequests {
    jetstream: Context,
    consumer: PullConsumer,
    inbox: Subject,
    replies: Subscriber,
    /// The largest size of one request. The server never sends a message that is larger.
    max_bytes: usize,
    /// How many requested messages are still to come.
    outstanding: usize,
    /// When the server last sent something, or was last asked for messages.
    last_active: Instant,
}

impl Reader {
    /// Opens a reader that returns the events after those that were read before. Waits while NATS is unavailable.
    ///
    /// # Errors
    /// If the stream does not exist (yet) or is another one than was read before, or if NATS does not answer.
    pub async fn open(nats: &Nats, stream: &str, name: &str, after: &Standing) -> Result<Self, ReadError> {
        nats.up().await;
        let losses = nats.losses();
        tokio::select! {
            opened = Self::open_now(nats, stream, name, after, losses) => opened,
            // The next connection does not answer what was asked on the lost one.
            () = nats.lost(losses) => Err(lost("NATS does not answer")),
        }
    }

    async fn open_now(nats: &Nats, stream: &str, name: &str, after: &Standing, losses: u64) -> Result<Self, ReadError> {
        let StreamHistory { lineage, .. } = history::compare(nats, stream, after).await?;
        // The stream may be replaced before the consumer reads it, so the consumer shows the last event once more.
        let is_comparing = after.mark.is_some();
        let start_sequence = if is_comparing { after.position } else { after.position + 1 };
        let config = pull::Config {
            // The name is unique: a reused one could belong to a consumer at another place in the stream.
            name: Some(format!("{name}-{}", Uuid::now_v7())),
            description: Some(format!("Reads for the projection service ({name}), without acknowledgements")),
            // Where the stream ends before this sequence, the server starts behind its end: see `Verdict::Duplicate`.
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE_THRESHOLD,
            memory_storage: true,
            num_replicas: 1,
            ..pull::Config::default()
        };
        let jetstream = jetstream::new(nats.client.clone());
        let consumer =
            jetstream.create_consumer_on_stream(config, stream).await.map_err(|error| match error.kind() {
                ConsumerErrorKind::JetStream(reason) if reason.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    ReadError::NoStream(stream.to_owned())
                }
                _ => ReadError::NoConsumer(stream.to_owned(), error.to_string()),
            })?;
        let inbox = Subject::from(nats.client.new_inbox());
        let replies = nats.client.subscribe(inbox.clone()).await.map_err(lost)?;
        let max_bytes = PREFETCH_BYTES.max(nats.client.max_payload() + OVERHEAD_BYTES);
        let requests = PullRequests {
            jetstream,
            consumer,
            inbox,
            replies,
            max_bytes,
            outstanding: 0,
            last_active: Instant::now(),
        };
        Ok(Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            name: name.to_owned(),
            losses,
            requests,
            lineage,
            standing: *after,
            is_comparing,
            failed: None,
        })
    }

    /// Waits for an event, and returns it with those that have arrived behind it and fit into the room. The last one
    /// may exceed the bytes. The call can be cancelled without losing an event.
    ///
    /// # Errors
    /// If the order cannot be kept, or the consumer is gone. The reader cannot be used any more then.
    pub async fn next(&mut self, room: Size) -> Result<Vec<StreamMessage>, ReadError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.requests.last_active.elapsed() > REQUEST_EXPIRY {
            *self = Self::open(&self.nats, &self.stream, &self.name, &self.standing).await?;
        }
        self.wait(room).await
    }

    async fn wait(&mut self, room: Size) -> Result<Vec<StreamMessage>, ReadError> {
        let (nats, losses) = (self.nats.clone(), self.losses);
        let first = tokio::select! {
            biased;
            message = self.next_message() => message?,
            // The consumer may be gone with the server. This notices it sooner than its silence would.
            () = nats.lost(losses) => return Err(lost("NATS does not answer")),
        };
        // Nothing below waits, so that a cancelled call loses no event.
        let mut bytes = first.bytes();
        let mut messages = vec![first];
        while messages.len() < room.events && bytes < room.bytes {
            // Tokio's cooperative budget would report an empty channel after every 128 messages.
            match tokio::task::unconstrained(self.next_message()).now_or_never() {
                None => break,
                Some(Ok(message)) => {
                    bytes += message.bytes();
                    messages.push(message);
                }
                Some(Err(error)) => {
                    self.failed = Some(error);
                    break;
                }
            }
        }
        if let Some(last) = messages.last() {
            self.standing = last.standing();
        }
        Ok(messages)
    }

    /// The last event that was returned.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Deletes the consumer. The server would otherwise go on looking for its messages until it counts as inactive.
    pub async fn close(self) {
        let Self { nats, stream, requests: PullRequests { jetstream, consumer, .. }, .. } = self;
        if nats.is_up() {
            // If this fails, the server deletes the consumer later.
            let name = &consumer.cached_info().name;
            let _ = timeout(CLOSE_TIMEOUT, jetstream.delete_consumer_from_stream(name, stream)).await;
        }
    }

    async fn next_message(&mut self) -> Result<StreamMessage, ReadError> {
        loop {
            let message = self.requests.next().await?;
            let Info { stream_sequence: position, pending, .. } = message.info().map_err(lost)?;
            let headers = message.message.headers.as_ref();
            match Verdict::of(self.standing.position, position) {
                Verdict::Duplicate if self.is_comparing && position == self.standing.position => {
                    history::compare_marks(&self.standing, mark_of(headers))?;
                    self.is_comparing = false;
                }
                Verdict::Duplicate => {}
                Verdict::Next => {
                    let journal = history::journal_in(self.lineage.as_ref(), position, headers)?;
                    self.standing = Standing { position, journal: Some(journal), mark: None };
                    self.is_comparing = false;
                    return Ok(StreamMessage::new(position, journal, pending, message.message));
                }
                Verdict::Gap => return Err(ReadError::Gap { last: self.standing.position, position }),
            }
        }
    }
}

impl PullRequests {
    /// Waits for the next message. The call can be cancelled without losing it.
    async fn next(&mut self) -> Result<jetstream::Message, ReadError> {
        loop {
            if self.outstanding <= PREFETCH_EVENTS / 2 {
                let request = BatchConfig {
                    batch: PREFETCH_EVENTS,
                    max_bytes: self.max_bytes,
                    expires: Some(REQUEST_EXPIRY),
                    idle_heartbeat: HEARTBEAT,
                    ..BatchConfig::default()
                };
                self.consumer.request_batch(request, self.inbox.clone()).await.map_err(lost)?;
                self.outstanding += PREFETCH_EVENTS;
                self.last_active = Instant::now();
            }
            let reply = timeout_at(self.last_active + 2 * HEARTBEAT, self.replies.next());
            let message = reply
                .await
                .map_err(|_| lost("the server has sent neither messages nor heartbeats"))?
                .ok_or_else(|| lost("the subscription ended"))?;
            self.last_active = Instant::now();
            match Reply::of(&message) {
                Reply::Event => {
                    self.outstanding = self.outstanding.saturating_sub(1);
                    return Ok(jetstream::Message { message, context: self.jetstream.clone() });
                }
                Reply::Heartbeat => {}
                Reply::RequestEnded { undelivered } => {
                    self.outstanding = self.outstanding.saturating_sub(undelivered);
                }
                Reply::Lost(error) => return Err(lost(error)),
            }
        }
    }
}

/// The kinds of replies to a pull request.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    /// The message holds an event.
    Event,
    /// The consumer is alive, and has no message.
    Heartbeat,
    /// The request has ended, and this many of its messages will not come.
    RequestEnded { undelivered: usize },
    /// The consumer is gone.
    Lost(String),
}

impl Reply {
    fn of(message: &Message) -> Self {
        let Some(status) = message.status.filter(|status| *status != StatusCode::OK) else { return Self::Event };
        if status == StatusCode::IDLE_HEARTBEAT {
            return Self::Heartbeat;
        }
        let pending = message.headers.as_ref().and_then(|headers| headers.get(PENDING_MESSAGES));
        match pending.map(|count| count.as_str().parse()) {
            Some(Ok(undelivered)) => Self::RequestEnded { undelivered },
            _ => Self::Lost(format!("{status} {}", message.description.as_deref().unwrap_or_default())),
        }
    }
}

fn lost(error: impl ToString) -> ReadError {
    ReadError::Lost(error.to_string())
}

/// Where a message stands in the order of positions.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The message has been returned before, and is skipped. The stream lost its end, or was rebuilt, and fills up
    /// again.
    Duplicate,
    /// The message is the one expected.
    Next,
    /// Messages are missing before it.
    Gap,
}

impl Verdict {
    /// `last` is the last position that was returned.
    fn of(last: u64, position: u64) -> Self {
        match position {
            position if position <= last => Self::Duplicate,
            position if position == last + 1 => Self::Next,
            _ => Self::Gap,
        }
    }
}

#[cfg(test)]
mod tests {
    use async_nats::HeaderMap;
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_request_that_ends_says_how_many_messages_will_not_come() {
        let of = |status, description, pending| Reply::of(&reply(status, description, pending));
        assert_eq!(of(None, "", None), Reply::Event);
        assert_eq!(of(Some(100), "Idle Heartbeat", None), Reply::Heartbeat);
        assert_eq!(of(Some(408), "Request Timeout", Some("202")), Reply::RequestEnded { undelivered: 202 });
        assert_eq!(of(Some(409), "Batch Completed", Some("0")), Reply::RequestEnded { undelivered: 0 });
        assert_eq!(of(Some(409), "Message Size Exceeds MaxBytes", Some("7")), Reply::RequestEnded { undelivered: 7 });
        assert_eq!(of(Some(409), "Consumer Deleted", None), Reply::Lost("409 Consumer Deleted".to_owned()));
        assert_eq!(of(Some(503), "", None), Reply::Lost("503 ".to_owned()));
    }

    fn reply(status: Option<u16>, description: &str, pending: Option<&str>) -> Message {
        let mut headers = HeaderMap::new();
        if let Some(pending) = pending {
            headers.insert(PENDING_MESSAGES, pending);
        }
        Message {
            subject: "_INBOX.x".into(),
            reply: None,
            payload: Bytes::new(),
            headers: Some(headers),
            status: status.map(|status| StatusCode::from_u16(status).unwrap()),
            description: Some(description.to_owned()),
            length: 0,
        }
    }

    #[test]
    fn only_the_next_position_is_returned() {
        assert_eq!(Verdict::of(0, 1), Verdict::Next);
        assert_eq!(Verdict::of(41, 42), Verdict::Next);
        assert_eq!(Verdict::of(42, 1), Verdict::Duplicate);
        assert_eq!(Verdict::of(42, 42), Verdict::Duplicate);
        assert_eq!(Verdict::of(42, 44), Verdict::Gap);
        assert_eq!(Verdict::of(0, 2), Verdict::Gap);
    }
}
