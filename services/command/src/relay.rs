//! The relay publishes the journal to the stream, so that an event's position is its stream sequence. It stores
//! nothing: the journal is the outbox, and the stream's last sequence is the cursor. Every message tells the server
//! to accept it only if the stream's last sequence is the one before its position. So the server rejects a second
//! relay, and every message after one that was lost, and no event is lost, duplicated or out of order.
//!
//! That condition alone could be met by a foreign message in the place of one of ours: ours would be rejected, and
//! the next one accepted. So every message is acknowledged, not only the last of many, and after any failure the
//! messages that were in flight are compared with the journal before anything more is published.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use async_nats::{
    HeaderMap, HeaderValue, Message, StatusCode, Subject, Subscriber,
    header::NATS_EXPECTED_LAST_SEQUENCE,
    jetstream::{
        self, Context,
        publish::PublishAck,
        response::Response,
        stream::{Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType, Stream},
    },
};
use futures_util::{FutureExt, StreamExt, future::try_join_all};
use runtime::{
    Backoff, LogThrottle, Monitor, Nats, Pulse, Tracer, age,
    traces::{Ended, Kind, TraceContext, messaging},
};
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;
use wire::{TRACEPARENT, recorded_at};

use crate::{
    Config,
    handover::{Handover, Next},
    identity::{self, KnownStream, Misaligned},
    metrics::{Metrics, RelayState},
    outbox::{self, Origin, OutgoingEvent},
    postgres::{self, Postgres, with_timeout},
};

/// The key of the database's advisory lock: the replica that holds it runs the relay. An arbitrary number.
pub const LOCK: i64 = 0x0072_656c_6179;
/// What comes before the replica's name in the name of the connection that holds the lock.
pub const CONNECTION: &str = "relay ";
/// How long a step of the relay may take. Each of its waits for a server is shorter by far.
const STEP_BOUND: Duration = Duration::from_secs(60);
/// How often a replica that does not run the relay tries to take the lock.
const STANDBY_POLL: Duration = Duration::from_secs(1);

/// The largest number of messages in flight. The server holds those in memory that it has not stored yet.
const IN_FLIGHT: u64 = 2_000;
/// How long the stream may take to acknowledge a message.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// How many messages are fetched at the same time to be compared with the journal.
const COMPARE_CONCURRENCY: usize = 64;

pub struct Relay {
    config: Config,
    nats: Nats,
    jetstream: Context,
    handover: Handover,
    postgres: Postgres,
    replica: String,
    metrics: Arc<Metrics>,
    pulse: Pulse,
    tracer: Tracer,
    /// The last position for which this replica has received the stream's acknowledgement.
    acknowledged: u64,
    /// How often the connection to NATS had been lost when this replica began to lead. After another loss,
    /// acknowledgements may be missing.
    losses: u64,
}

/// The state of the stream as far as the relay knows it.
struct StreamState {
    origin: Origin,
    /// Its last sequence once it has stored all messages in flight.
    last: u64,
    /// The last position that it has acknowledged.
    acknowledged: u64,
    /// Whether the journal may have further events that are not handed over.
    is_behind: bool,
    inbox: Subject,
    acknowledgements: Subscriber,
    /// The messages in flight that are being traced.
    traced: VecDeque<TracedMessage>,
}

/// A message whose trace will show its publishing.
struct TracedMessage {
    position: u64,
    context: TraceContext,
    subject: String,
    bytes: usize,
    sent: SystemTime,
}

impl StreamState {
    /// Processes the acknowledgement of the next message.
    fn acknowledge(&mut self, reply: &Message) -> anyhow::Result<()> {
        let position = self.acknowledged + 1;
        ensure!(reply.status != Some(StatusCode::NO_RESPONDERS), "the stream does not exist any more");
        match serde_json::from_slice(&reply.payload).context("the stream's acknowledgement cannot be read")? {
            Response::Ok(PublishAck { sequence, .. }) if sequence == position => self.acknowledged = position,
            Response::Ok(PublishAck { sequence, .. }) => bail!("the stream stored event {position} at {sequence}"),
            Response::Err { error } => bail!("the stream rejected event {position}: {error}"),
        }
        Ok(())
    }
}

impl Relay {
    pub fn new(
        config: Config,
        nats: Nats,
        handover: Handover,
        postgres: Postgres,
        monitor: &Monitor,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (jetstream, replica) = (jetstream::new(nats.client.clone()), monitor.replica().to_owned());
        let pulse = monitor.pulse("the relay", STEP_BOUND);
        Self {
            config,
            nats,
            jetstream,
            handover,
            postgres,
            replica,
            metrics,
            pulse,
            tracer: monitor.tracer().clone(),
            acknowledged: 0,
            losses: 0,
        }
    }

    /// Runs until `stop`, and then, if possible, until the stream has all events of the journal.
    pub async fn run(mut self, stop: CancellationToken) {
        let (mut backoff, mut log_throttle) = (Backoff::default(), LogThrottle::default());
        while !stop.is_cancelled() {
            let failed = match self.lead(&stop, &mut backoff, &mut log_throttle).await {
                Ok(()) => return,
                Err(error) => error,
            };
            self.handover.set_relay_is_here(false);
            if failed.is::<postgres::TimedOut>() {
                self.postgres.mark_down();
            }
            self.pulse.rest();
            let reason = postgres::describe(&failed);
            self.metrics.set_relay(RelayState::Failing(reason.clone()));
            if log_throttle.is_due(&reason) {
                match failed.downcast_ref::<Misaligned>() {
                    Some(misaligned) => misaligned.log(&reason),
                    None => tracing::warn!(%reason, "the relay was interrupted, retrying"),
                }
            }
            stop.run_until_cancelled(backoff.wait()).await;
        }
    }

    /// Runs the relay as soon as no other replica does.
    async fn lead(
        &mut self,
        stop: &CancellationToken,
        backoff: &mut Backoff,
        log_throttle: &mut LogThrottle,
    ) -> anyhow::Result<()> {
        // A replica without a connection to NATS must not keep the lock from one that has one.
        if stop.run_until_cancelled(self.nats.up()).await.is_none() {
            return Ok(());
        }
        let client = connect(&self.config, &format!("{CONNECTION}{}", self.replica)).await?;
        while !try_lock(&client).await? {
            self.metrics.set_relay(RelayState::Standby);
            if stop.run_until_cancelled(tokio::time::sleep(STANDBY_POLL)).await.is_none() {
                return Ok(());
            }
        }
        self.losses = self.nats.losses();
        let mut committed = self.nats.client.subscribe(self.nats.subjects.committed()).await?;
        let inbox = Subject::from(self.nats.client.new_inbox());
        let acknowledgements = self.nats.client.subscribe(inbox.clone()).await?;
        // This comes before the journal is read, so that events which are committed afterwards are handed over.
        self.handover.set_relay_is_here(true);
        let origin = Origin::read(&client, &self.nats.subjects).await?;
        let last = self.while_connected(self.align(&client, &origin)).await?;
        self.acknowledged = last;
        let mut stream = StreamState {
            origin,
            last,
            acknowledged: last,
            is_behind: true,
            inbox,
            acknowledgements,
            traced: VecDeque::new(),
        };
        self.metrics.set_relay(RelayState::Running);
        self.metrics.acknowledged(last, 0);
        tracing::info!(position = last, "this replica runs the relay");
        let mut is_stopping = false;
        loop {
            // Whoever holds the lock now may have begun another branch of the journal.
            ensure!(!client.is_closed(), "the connection to PostgreSQL was lost, and the lock with it");
            self.publish_all(&client, &mut stream).await?;
            if stream.acknowledged < stream.last {
                let handover = self.handover.clone();
                tokio::select! {
                    acknowledged = self.acknowledged(&mut stream) => {
                        acknowledged?;
                        backoff.reset();
                        log_throttle.reset();
                    }
                    () = handover.notified() => {}
                }
                continue;
            }
            self.pulse.rest();
            if is_stopping {
                return Ok(());
            }
            tokio::select! {
                () = stop.cancelled() => (is_stopping, stream.is_behind) = (true, true),
                () = self.handover.notified() => {}
                woken = committed.next() => {
                    woken.context("the connection to NATS was closed")?;
                    stream.is_behind = true;
                }
                () = tokio::time::sleep(self.config.relay_poll()) => {
                    self.while_connected(self.check_stream(&client, &mut stream)).await?;
                    self.acknowledged = stream.acknowledged;
                    self.metrics.acknowledged(self.acknowledged, 0);
                }
            }
        }
    }

    /// Publishes all events that there are.
    async fn publish_all(&mut self, client: &Client, stream: &mut StreamState) -> anyhow::Result<()> {
        loop {
            match self.handover.next(stream.last) {
                Next::Committed(committed) => {
                    let outgoing: Vec<OutgoingEvent> = outbox::from_committed(committed, &stream.origin).collect();
                    self.publish(outgoing, stream).await?;
                }
                Next::Nothing if !stream.is_behind => return Ok(()),
                next @ (Next::InJournal | Next::Nothing) => {
                    let read = with_timeout(outbox::read(client, &stream.origin, stream.last)).await?;
                    let is_missing = matches!(next, Next::InJournal) && read.is_empty();
                    ensure!(!is_missing, "the journal has no event {}, but later ones", stream.last + 1);
                    stream.is_behind = !read.is_empty();
                    self.publish(read, stream).await?;
                }
            }
        }
    }

    /// Publishes events, each on the condition that the one before it is the stream's last.
    async fn publish(&mut self, outgoing: Vec<OutgoingEvent>, stream: &mut StreamState) -> anyhow::Result<()> {
        self.pulse.beat();
        for OutgoingEvent { position, subject, mut headers, payload } in outgoing {
            while stream.last - stream.acknowledged >= IN_FLIGHT {
                self.acknowledged(stream).await?;
            }
            ensure!(position == stream.last + 1, "event {position} came after {}", stream.last);
            headers.insert(NATS_EXPECTED_LAST_SEQUENCE, HeaderValue::from(stream.last));
            if self.tracer.is_on()
                && let Some(context) = trace_of(&self.tracer, &headers)
            {
                let (subject, bytes, sent) = (subject.clone(), payload.len(), SystemTime::now());
                stream.traced.push_back(TracedMessage { position, context, subject, bytes, sent });
            }
            let inbox = stream.inbox.clone();
            self.nats.client.publish_with_reply_and_headers(subject, inbox, headers, payload).await?;
            stream.last = position;
        }
        Ok(())
    }

    /// Waits until the stream has acknowledged at least one more message. Cancelling the call loses nothing.
    async fn acknowledged(&mut self, stream: &mut StreamState) -> anyhow::Result<()> {
        let first = tokio::select! {
            biased;
            first = timeout(ACK_TIMEOUT, stream.acknowledgements.next()) => {
                first.context("the stream does not answer")?.context("the connection to NATS was closed")?
            }
            () = self.nats.lost(self.losses) => bail!("the connection to NATS was lost"),
        };
        self.pulse.beat();
        let before = self.acknowledged;
        stream.acknowledge(&first)?;
        while let Some(Some(next)) = stream.acknowledgements.next().now_or_never() {
            stream.acknowledge(&next)?;
        }
        self.acknowledged = stream.acknowledged;
        self.metrics.acknowledged(self.acknowledged, self.acknowledged.saturating_sub(before));
        let acknowledged = stream.traced.partition_point(|message| message.position <= stream.acknowledged);
        for message in stream.traced.drain(..acknowledged) {
            let TracedMessage { position: _, context, subject, bytes, sent } = message;
            let attributes = messaging("send", "send", &subject, bytes);
            let ended = Ended::new(format!("send {subject}"), Kind::Producer, sent, SystemTime::now());
            self.tracer.record(Some(&context), ended.with(attributes));
        }
        Ok(())
    }

    /// Waits for an answer from NATS, which will never come if the connection is lost meanwhile.
    async fn while_connected<T>(&self, asked: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::select! {
            answer = asked => answer,
            () = self.nats.lost(self.losses) => bail!("the connection to NATS was lost"),
        }
    }

    /// Makes sure that the stream exists and is this journal's; returns its last sequence.
    async fn align(&self, client: &Client, origin: &Origin) -> anyhow::Result<u64> {
        let head = with_timeout(outbox::head(client)).await?;
        let created = self.jetstream.get_or_create_stream(stream_config(&self.config, origin, head)).await;
        let stream = created.context("the stream cannot be looked up or created")?;
        let (name, lineage) = (&self.config.nats.stream, &origin.lineage);
        let info = stream.get_info().await?;
        let known = identity::check_metadata(name, &info.config.metadata, lineage)?;
        let last = info.state.last_sequence;
        // Meanwhile a relay that has lost the lock may have published what was committed.
        let head = with_timeout(outbox::head(client)).await?;
        if last > head {
            let published = stream.get_raw_message(last).await.context("the stream's last message cannot be read")?;
            return Err(known.ahead(last, head, &published).into());
        }
        // At most as many of our messages as were in flight can follow a foreign one. Those that were acknowledged to
        // this replica need not be compared again, except the last, unless the stream is shorter now and so another
        // one.
        let sound = if last < self.acknowledged { 0 } else { self.acknowledged };
        let mut compared = sound.min(last.saturating_sub(1)).max(last.saturating_sub(IN_FLIGHT));
        while compared < last {
            let mut recorded = with_timeout(outbox::read(client, origin, compared)).await?;
            recorded.retain(|recorded| recorded.position <= last);
            compared = recorded.last().context("the stream has events that the journal does not have")?.position;
            for some in recorded.chunks(COMPARE_CONCURRENCY) {
                try_join_all(some.iter().map(|recorded| compare(&stream, &known, recorded))).await?;
            }
        }
        Ok(last)
    }

    /// Checks the stream after a while without events: an event may have been committed without the relay being
    /// woken, the stream may have been deleted, or somebody may have published into it.
    async fn check_stream(&self, client: &Client, stream: &mut StreamState) -> anyhow::Result<()> {
        stream.is_behind = true;
        let found = self.jetstream.get_stream_no_info(&self.config.nats.stream).await?;
        let unchanged = found.get_info().await.is_ok_and(|info| info.state.last_sequence == stream.last);
        if !unchanged {
            tracing::warn!(position = stream.last, "the stream has changed since the relay last published to it");
            stream.last = self.align(client, &stream.origin).await?;
            stream.acknowledged = stream.last;
        }
        Ok(())
    }
}

/// The settings of the stream, when the journal is at the position `head`.
pub fn stream_config(config: &Config, origin: &Origin, head: u64) -> StreamConfig {
    StreamConfig {
        name: config.nats.stream.clone(),
        description: Some("The events of the journal: the sequence is the position".to_owned()),
        subjects: vec![origin.subjects.events()],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        num_replicas: config.stream_replicas,
        // Deleting or purging messages would leave a gap between two positions. The stream as a whole can be deleted.
        deny_delete: true,
        deny_purge: true,
        metadata: origin.lineage.to_metadata(head),
        ..StreamConfig::default()
    }
}

/// A connection of its own, which shows by its name who holds the lock.
pub async fn connect(config: &Config, name: &str) -> anyhow::Result<Client> {
    let mut settings = postgres::settings(&config.postgres_url()?)?;
    settings.application_name(name);
    let (client, connection) = with_timeout(settings.connect(NoTls)).await?;
    // The task ends with the client. If it fails, so does the client's next statement.
    tokio::spawn(connection);
    Ok(client)
}

/// # Errors
/// [`Misaligned`] if the stream has another message in the place of the event.
async fn compare(stream: &Stream, known: &KnownStream<'_>, recorded: &OutgoingEvent) -> anyhow::Result<()> {
    let published = stream.get_raw_message(recorded.position).await;
    let published = published.with_context(|| format!("message {} of the stream cannot be read", recorded.position))?;
    if recorded.matches(&published) { Ok(()) } else { Err(known.other(recorded, &published).into()) }
}

/// The trace of an event that is about to be published.
fn trace_of(tracer: &Tracer, headers: &HeaderMap) -> Option<TraceContext> {
    tracer.of_event(headers.get(TRACEPARENT).map(HeaderValue::as_str), age(recorded_at(headers)?))
}

/// Takes the lock, unless another connection holds it.
pub async fn try_lock(client: &Client) -> anyhow::Result<bool> {
    let row = with_timeout(client.query_one("select pg_try_advisory_lock($1)", &[&LOCK])).await?;
    Ok(row.try_get(0)?)
}
