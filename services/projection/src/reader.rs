//! Reads the stream from a position on. The invariant: events are handed out in the order of their positions, none
//! twice and none left out; where that cannot be kept up, reading ends with an error, and begins anew.
//!
//! The consumer is what NATS calls an ordered one (ephemeral, in memory, no acks, one replica), but made here: the
//! library's own, made anew before its first message, starts at the beginning of the stream, and its check for gaps is
//! weaker than the one by position.

use std::{sync::OnceLock, time::Duration};

use async_nats::{
    Message,
    jetstream::{
        self, ErrorCode,
        consumer::{AckPolicy, DeliverPolicy, pull},
        message::Info,
        stream::ConsumerErrorKind,
    },
};
use domain::Recorded;
use futures_util::{FutureExt, StreamExt};
use runtime::Nats;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::{event::Unapplied, projector::Size};

/// A consumer that has been silent for twice this is gone.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long one request for messages holds.
const REQUEST: Duration = Duration::from_secs(30);
/// Events in one request at most: they wait in memory, and their headers make them much larger there.
const IN_ADVANCE: usize = 500;
const BYTES_IN_ADVANCE: usize = 2 << 20;
/// The server forgets a consumer that nobody has asked for messages for this long.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);
const CLOSING: Duration = Duration::from_secs(1);
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
}

/// An event as it came.
pub struct Arrival {
    pub position: u64,
    /// How many more the stream had when it sent this one.
    pub pending: u64,
    pub message: Message,
    /// Once a view has asked for it.
    pub decoded: OnceLock<Result<Recorded, Unapplied>>,
}

impl Arrival {
    pub fn new(position: u64, pending: u64, message: Message) -> Self {
        Self { position, pending, message, decoded: OnceLock::new() }
    }
}

pub struct Reader {
    nats: Nats,
    stream: String,
    /// Of what it reads for.
    name: String,
    consumer: String,
    messages: pull::Stream,
    /// Of the last event that was handed out.
    position: u64,
    /// When somebody last listened.
    waited_until: Instant,
    /// What ended the reading, after events that were handed out first.
    failed: Option<Unreadable>,
}

/// Notes, also where the waiting is cancelled, when it ended.
struct Listening<'a>(&'a mut Reader);

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.0.waited_until = Instant::now();
    }
}

impl Reader {
    /// Reads on after a position, for a view or all of them. Waits while NATS is away.
    ///
    /// # Errors
    /// If there is no such stream (yet), or no answer.
    pub async fn open(nats: &Nats, stream: &str, view: &str, after: u64) -> Result<Self, Unreadable> {
        nats.up().await;
        // Unique: a name that comes again could be that of a consumer elsewhere in the stream.
        let consumer_name = format!("{view}-{}", Uuid::now_v7());
        let config = pull::Config {
            name: Some(consumer_name.clone()),
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
        // No message may be larger than a request: it would never come.
        let bytes = BYTES_IN_ADVANCE.max(nats.client.max_payload() + ENVELOPE_BYTES);
        let messages = consumer
            .stream()
            .max_messages_per_batch(IN_ADVANCE)
            .max_bytes_per_batch(bytes)
            .expires(REQUEST)
            .heartbeat(HEARTBEAT)
            .messages()
            .await
            .map_err(lost)?;
        Ok(Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            name: view.to_owned(),
            consumer: consumer_name,
            messages,
            position: after,
            waited_until: Instant::now(),
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
        if self.waited_until.elapsed() > HEARTBEAT {
            // Nobody has listened meanwhile, and so it cannot be told whether the consumer has been silent.
            *self = Self::open(&self.nats, &self.stream, &self.name, self.position).await?;
        }
        Listening(self).0.wait(room).await
    }

    async fn wait(&mut self, room: Size) -> Result<Vec<Arrival>, Unreadable> {
        let nats = self.nats.clone();
        let first = tokio::select! {
            biased;
            arrival = self.one() => arrival?,
            // The consumer may be gone with the server: sooner noticed here than by its silence.
            () = nats.down() => return Err(lost("NATS does not answer")),
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
        let Self { nats, stream, consumer, .. } = self;
        if nats.is_up() {
            // If it fails, the server forgets it later.
            let jetstream = jetstream::new(nats.client);
            let _ = timeout(CLOSING, jetstream.delete_consumer_from_stream(consumer, stream)).await;
        }
    }

    async fn one(&mut self) -> Result<Arrival, Unreadable> {
        loop {
            let message = self.messages.next().await.ok_or_else(|| lost("it ended"))?.map_err(lost)?;
            let Info { stream_sequence: position, pending, .. } = message.info().map_err(lost)?;
            match Verdict::of(self.position, position) {
                Verdict::Seen => {}
                Verdict::Next => {
                    self.position = position;
                    return Ok(Arrival::new(position, pending, message.message));
                }
                Verdict::Gap => return Err(Unreadable::Gap { last: self.position, position }),
            }
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
    use super::*;

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
