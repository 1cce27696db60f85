//! Reads the stream from a position on. The invariant: events are handed out in the order of their positions, none
//! twice and none left out; where that cannot be kept up, reading ends with an error, and begins anew.
//!
//! The consumer is what NATS calls an ordered one (ephemeral, in memory, no acks, one replica), but made here: the
//! library's own, made anew before its first message, starts at the beginning of the stream, and its check for gaps is
//! weaker than the one by position. It is asked for messages here too: the library's stream of messages asks from a task
//! of its own and counts what is to come when that task says so; if all of it has come by then, it waits for it for ever.

use std::{sync::OnceLock, time::Duration};

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
use domain::Recorded;
use futures_util::{FutureExt, StreamExt};
use runtime::Nats;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use wire::{Foreign, journal_of};

use crate::{event::Unapplied, projector::Size};

/// A consumer that has been silent for twice this is gone.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long one request for messages holds. After so long without listening, a reader begins anew.
const REQUEST: Duration = Duration::from_secs(30);
/// Events in one request at most: they wait in memory, and their headers make them much larger there.
const IN_ADVANCE: usize = 500;
const BYTES_IN_ADVANCE: usize = 2 << 20;
/// The server forgets a consumer that nobody has asked for messages for this long.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);
const CLOSING: Duration = Duration::from_secs(1);
/// The header that says how many messages of a request do not come.
const LEFT: &str = "Nats-Pending-Messages";
/// What a message counts beyond its payload and headers in a request's bytes: subject and reply subject.
const ENVELOPE_BYTES: usize = 4 << 10;

/// Why the next event cannot be had at the moment.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unreadable {
    /// The command service makes it.
    #[error("there is no stream {0} yet")]
    NoStream(String),
    #[error("the stream {0} cannot be read: {1}")]
    NoConsumer(String, String),
    #[error("the reader was lost: {0}")]
    Lost(String),
    #[error("position {position} came after {last}")]
    Gap { last: u64, position: u64 },
    /// Somebody else has published into the stream.
    #[error(
        "{0}. Nothing is read beyond it until the stream is mended: delete it, and it is made anew from the journal"
    )]
    Foreign(#[from] Foreign),
}

/// An event as it came.
pub struct Arrival {
    pub position: u64,
    /// The journal that it is from.
    pub journal: Uuid,
    /// How many more the stream had when it sent this one.
    pub pending: u64,
    pub message: Message,
    /// Once a view has asked for it.
    pub decoded: OnceLock<Result<Recorded, Unapplied>>,
}

impl Arrival {
    pub fn new(position: u64, journal: Uuid, pending: u64, message: Message) -> Self {
        Self { position, journal, pending, message, decoded: OnceLock::new() }
    }
}

pub struct Reader {
    nats: Nats,
    stream: String,
    /// Of what it reads for.
    name: String,
    /// How often the connection had been lost when it began: what it has asked for does not come after another loss.
    losses: u64,
    requests: Requests,
    /// Of the last event that was handed out.
    position: u64,
    /// What ended the reading, after events that were handed out first.
    failed: Option<Unreadable>,
}

/// Asks a consumer for messages, for more before they end.
struct Requests {
    jetstream: Context,
    consumer: PullConsumer,
    inbox: Subject,
    replies: Subscriber,
    /// In one request at most. No message may be larger, for it would never come.
    bytes: usize,
    /// How many messages are still to come.
    due: usize,
    /// When something last came, or was asked for.
    heard: Instant,
}

impl Reader {
    /// Reads on after a position, for a view or all of them. Waits while NATS is away.
    ///
    /// # Errors
    /// If there is no such stream (yet), or no answer.
    pub async fn open(nats: &Nats, stream: &str, view: &str, after: u64) -> Result<Self, Unreadable> {
        nats.up().await;
        let losses = nats.losses();
        tokio::select! {
            opened = Self::open_now(nats, stream, view, after, losses) => opened,
            // What was asked of the lost connection is not answered by the next one.
            () = nats.lost(losses) => Err(lost("NATS does not answer")),
        }
    }

    async fn open_now(nats: &Nats, stream: &str, view: &str, after: u64, losses: u64) -> Result<Self, Unreadable> {
        let config = pull::Config {
            // Unique: a name that comes again could be that of a consumer elsewhere in the stream.
            name: Some(format!("{view}-{}", Uuid::now_v7())),
            description: Some(format!("Reads for the projection service ({view}), without acknowledgements")),
            // Beyond the last message, the server takes the one after the last: see `Verdict::Seen`.
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: after + 1 },
            ack_policy: AckPolicy::None,
            inactive_threshold: FORGOTTEN_AFTER,
            memory_storage: true,
            num_replicas: 1,
            ..pull::Config::default()
        };
        let jetstream = jetstream::new(nats.client.clone());
        let consumer =
            jetstream.create_consumer_on_stream(config, stream).await.map_err(|error| match error.kind() {
                ConsumerErrorKind::JetStream(reason) if reason.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    Unreadable::NoStream(stream.to_owned())
                }
                _ => Unreadable::NoConsumer(stream.to_owned(), error.to_string()),
            })?;
        let inbox = Subject::from(nats.client.new_inbox());
        let replies = nats.client.subscribe(inbox.clone()).await.map_err(lost)?;
        let bytes = BYTES_IN_ADVANCE.max(nats.client.max_payload() + ENVELOPE_BYTES);
        let requests = Requests { jetstream, consumer, inbox, replies, bytes, due: 0, heard: Instant::now() };
        Ok(Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            name: view.to_owned(),
            losses,
            requests,
            position: after,
            failed: None,
        })
    }

    /// Waits for an event, then takes with it what else has arrived and finds room: the last may go beyond the bytes.
    /// Nothing is lost if the call is cancelled.
    ///
    /// # Errors
    /// If the order cannot be kept up, or the consumer is gone. Then the reader is of no more use.
    pub async fn next(&mut self, room: Size) -> Result<Vec<Arrival>, Unreadable> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.requests.heard.elapsed() > REQUEST {
            *self = Self::open(&self.nats, &self.stream, &self.name, self.position).await?;
        }
        self.wait(room).await
    }

    async fn wait(&mut self, room: Size) -> Result<Vec<Arrival>, Unreadable> {
        let (nats, losses) = (self.nats.clone(), self.losses);
        let first = tokio::select! {
            biased;
            arrival = self.one() => arrival?,
            // The consumer may be gone with the server: sooner noticed here than by its silence.
            () = nats.lost(losses) => return Err(lost("NATS does not answer")),
        };
        // From here on there is no more waiting, hence no loss.
        let mut taken = first.message.length;
        let mut arrivals = vec![first];
        while arrivals.len() < room.events && taken < room.bytes {
            // Tokio would say that nothing is there after every 128 messages, so that others get their turn.
            match tokio::task::unconstrained(self.one()).now_or_never() {
                None => break,
                Some(Ok(arrival)) => {
                    taken += arrival.message.length;
                    arrivals.push(arrival);
                }
                Some(Err(error)) => {
                    self.failed = Some(error);
                    break;
                }
            }
        }
        Ok(arrivals)
    }

    /// Of the last event that was handed out.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Lets the server forget the consumer, or else it would for a while go on to look for its messages.
    pub async fn close(self) {
        let Self { nats, stream, requests: Requests { jetstream, consumer, .. }, .. } = self;
        if nats.is_up() {
            // If it fails, the server forgets it later.
            let name = &consumer.cached_info().name;
            let _ = timeout(CLOSING, jetstream.delete_consumer_from_stream(name, stream)).await;
        }
    }

    async fn one(&mut self) -> Result<Arrival, Unreadable> {
        loop {
            let message = self.requests.next().await?;
            let Info { stream_sequence: position, pending, .. } = message.info().map_err(lost)?;
            match Verdict::of(self.position, position) {
                Verdict::Seen => {}
                Verdict::Next => {
                    let message = message.message;
                    let journal = journal_of(position, message.headers.as_ref())?;
                    self.position = position;
                    return Ok(Arrival::new(position, journal, pending, message));
                }
                Verdict::Gap => return Err(Unreadable::Gap { last: self.position, position }),
            }
        }
    }
}

impl Requests {
    /// Nothing is lost if the call is cancelled.
    async fn next(&mut self) -> Result<jetstream::Message, Unreadable> {
        loop {
            if self.due <= IN_ADVANCE / 2 {
                let request = BatchConfig {
                    batch: IN_ADVANCE,
                    max_bytes: self.bytes,
                    expires: Some(REQUEST),
                    idle_heartbeat: HEARTBEAT,
                    ..BatchConfig::default()
                };
                self.consumer.request_batch(request, self.inbox.clone()).await.map_err(lost)?;
                self.due += IN_ADVANCE;
                self.heard = Instant::now();
            }
            let reply = timeout_at(self.heard + 2 * HEARTBEAT, self.replies.next());
            let message = reply.await.map_err(|_| lost("its consumer is silent"))?.ok_or_else(|| lost("it ended"))?;
            self.heard = Instant::now();
            match Reply::of(&message) {
                Reply::Event => {
                    self.due = self.due.saturating_sub(1);
                    return Ok(jetstream::Message { message, context: self.jetstream.clone() });
                }
                Reply::Heartbeat => {}
                Reply::Ended { left } => self.due = self.due.saturating_sub(left),
                Reply::Lost(error) => return Err(lost(error)),
            }
        }
    }
}

/// What a consumer says.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Event,
    /// It is there, and has nothing.
    Heartbeat,
    /// A request is at its end, and so many of its messages do not come.
    Ended {
        left: usize,
    },
    Lost(String),
}

impl Reply {
    fn of(message: &Message) -> Self {
        let Some(status) = message.status.filter(|status| *status != StatusCode::OK) else { return Self::Event };
        if status == StatusCode::IDLE_HEARTBEAT {
            return Self::Heartbeat;
        }
        let left = message.headers.as_ref().and_then(|headers| headers.get(LEFT)).map(|left| left.as_str().parse());
        match left {
            Some(Ok(left)) => Self::Ended { left },
            _ => Self::Lost(format!("{status} {}", message.description.as_deref().unwrap_or_default())),
        }
    }
}

fn lost(error: impl ToString) -> Unreadable {
    Unreadable::Lost(error.to_string())
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Leave it out. The stream lost its end, or was made anew, and fills up again with what has been seen.
    Seen,
    /// Take it.
    Next,
    /// Something is missing before it.
    Gap,
}

impl Verdict {
    /// `last` is the last position taken.
    fn of(last: u64, position: u64) -> Self {
        match position {
            position if position <= last => Self::Seen,
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
    fn a_request_that_ends_says_how_many_messages_do_not_come() {
        let ended = |status, description, left| Reply::of(&reply(status, description, left));
        assert_eq!(ended(None, "", None), Reply::Event);
        assert_eq!(ended(Some(100), "Idle Heartbeat", None), Reply::Heartbeat);
        assert_eq!(ended(Some(408), "Request Timeout", Some("202")), Reply::Ended { left: 202 });
        assert_eq!(ended(Some(409), "Batch Completed", Some("0")), Reply::Ended { left: 0 });
        assert_eq!(ended(Some(409), "Message Size Exceeds MaxBytes", Some("7")), Reply::Ended { left: 7 });
        assert_eq!(ended(Some(409), "Consumer Deleted", None), Reply::Lost("409 Consumer Deleted".to_owned()));
        assert_eq!(ended(Some(503), "", None), Reply::Lost("503 ".to_owned()));
    }

    fn reply(status: Option<u16>, description: &str, left: Option<&str>) -> Message {
        let mut headers = HeaderMap::new();
        if let Some(left) = left {
            headers.insert(LEFT, left);
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
    fn only_the_next_position_is_taken() {
        assert_eq!(Verdict::of(0, 1), Verdict::Next);
        assert_eq!(Verdict::of(41, 42), Verdict::Next);
        assert_eq!(Verdict::of(42, 1), Verdict::Seen);
        assert_eq!(Verdict::of(42, 42), Verdict::Seen);
        assert_eq!(Verdict::of(42, 44), Verdict::Gap);
        assert_eq!(Verdict::of(0, 2), Verdict::Gap);
    }
}
