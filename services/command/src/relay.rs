//! The relay: it publishes the journal to the stream, so that an event's position is its stream sequence. It stores
//! nothing: the journal is the outbox, and the stream's last sequence is the cursor. Every message demands of the server
//! that the stream's last sequence is the one before its position: so the server refuses a second relay, and all that
//! follows a message which did not arrive, and nothing is lost, doubled or out of order.

use std::{collections::VecDeque, time::Duration};

use anyhow::Context as _;
use async_nats::{
    HeaderValue,
    header::NATS_EXPECTED_LAST_SEQUENCE,
    jetstream::{
        self, Context,
        context::{PublishAckFuture, PublishError},
        publish::PublishAck,
        stream::{Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType},
    },
};
use futures_util::StreamExt;
use runtime::{Backoff, Nats};
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    handover::{Handover, Next},
    outbox::{self, Outgoing},
    postgres,
};

/// Any number, the same for all replicas: who holds this lock of the database runs the relay.
const LOCK: i64 = 0x0072_656c_6179;
/// How often a replica that does not run the relay asks whether it should.
const STANDBY: Duration = Duration::from_secs(1);

/// Bursts on their way at most: the server acknowledges one while it stores the next.
const BURSTS: usize = 4;
/// Messages of a burst at most. Those that a server has not stored yet it holds in memory.
const BURST: usize = 500;

pub struct Relay {
    config: Config,
    nats: Nats,
    jetstream: Context,
    handover: Handover,
}

/// The stream as the relay believes it to be when it will have taken all bursts.
struct Stream {
    last: u64,
    /// There may be more in the journal that is not handed over.
    is_behind: bool,
    bursts: VecDeque<Burst>,
}

/// Messages on their way, of which the last will be acknowledged.
struct Burst {
    last: u64,
    acknowledged: Acknowledged,
}

type Acknowledged = <PublishAckFuture as IntoFuture>::IntoFuture;

impl Burst {
    fn check(&self, acknowledged: Result<PublishAck, PublishError>) -> anyhow::Result<()> {
        let sequence = acknowledged.context("the stream did not take what was published")?.sequence;
        anyhow::ensure!(sequence == self.last, "the stream is at {sequence} instead of {}", self.last);
        Ok(())
    }
}

/// Why the relay publishes nothing: somebody's mistake, which only a person can mend.
#[derive(Debug, thiserror::Error)]
pub enum Misaligned {
    #[error(
        "the stream is ahead of the journal: its last sequence is {stream}, the journal's last position {journal}. \
         Either the journal was restored from an old backup, or this is another journal's stream"
    )]
    Ahead { stream: u64, journal: u64 },
    #[error(
        "the stream's message {0} is not the journal's event {0}: somebody else has published into the stream, or it is \
         another journal's. Delete the stream, and it will be made anew from the journal"
    )]
    Foreign(u64),
}

impl Relay {
    pub fn new(config: Config, nats: Nats, handover: Handover) -> Self {
        let jetstream = jetstream::new(nats.client.clone());
        Self { config, nats, jetstream, handover }
    }

    /// Runs until `stop`, and then until the stream has all that the journal has, if that can be reached.
    pub async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::default();
        let mut complaint = String::new();
        while !stop.is_cancelled() {
            let failed = match self.lead(&stop, &mut backoff).await {
                Ok(()) => return,
                Err(error) => error,
            };
            self.handover.relay_is_here(false);
            // A trouble that lasts is told once.
            let reason = format!("{failed:#}");
            if reason != complaint {
                match failed.downcast_ref::<Misaligned>() {
                    Some(_) => tracing::error!(%reason, "the relay has stopped and publishes nothing"),
                    None => tracing::warn!(%reason, "the relay was interrupted, trying again"),
                }
                complaint = reason;
            }
            stop.run_until_cancelled(backoff.wait()).await;
        }
    }

    /// Runs the relay as soon as no other replica does.
    async fn lead(&self, stop: &CancellationToken, backoff: &mut Backoff) -> anyhow::Result<()> {
        let client = self.connect().await?;
        while !try_lock(&client).await? {
            if stop.run_until_cancelled(tokio::time::sleep(STANDBY)).await.is_none() {
                return Ok(());
            }
        }
        let mut committed = self.nats.client.subscribe(self.nats.subjects.committed()).await?;
        // Before the journal is read: what is committed afterwards is handed over.
        self.handover.relay_is_here(true);
        let mut stream = Stream { last: self.align(&client).await?, is_behind: true, bursts: VecDeque::new() };
        tracing::info!(position = stream.last, "this replica runs the relay");
        let mut is_stopping = false;
        loop {
            self.publish_all(&client, &mut stream).await?;
            if let Some(burst) = stream.bursts.front_mut() {
                tokio::select! {
                    acknowledged = &mut burst.acknowledged => {
                        burst.check(acknowledged)?;
                        stream.bursts.pop_front();
                        backoff.reset();
                    }
                    () = self.handover.notified() => {}
                }
                continue;
            }
            if is_stopping {
                return Ok(());
            }
            anyhow::ensure!(!client.is_closed(), "the connection to PostgreSQL was lost, and the lock with it");
            tokio::select! {
                () = stop.cancelled() => (is_stopping, stream.is_behind) = (true, true),
                () = self.handover.notified() => {}
                _ = committed.next() => stream.is_behind = true,
                () = tokio::time::sleep(self.config.relay_poll()) => self.look_after(&client, &mut stream).await?,
            }
        }
    }

    /// Publishes what there is, as far as bursts may be on their way.
    async fn publish_all(&self, client: &Client, stream: &mut Stream) -> anyhow::Result<()> {
        let subjects = &self.nats.subjects;
        while stream.bursts.len() < BURSTS {
            match self.handover.next(stream.last) {
                Next::Committed(committed) => {
                    let mut outgoing = outbox::of(committed, subjects).peekable();
                    while outgoing.peek().is_some() {
                        self.publish(outgoing.by_ref().take(BURST), stream).await?;
                    }
                }
                Next::Nothing if !stream.is_behind => return Ok(()),
                next @ (Next::Elsewhere | Next::Nothing) => {
                    let read = outbox::read(client, subjects, stream.last).await?;
                    let is_lacking = matches!(next, Next::Elsewhere) && read.is_empty();
                    anyhow::ensure!(
                        !is_lacking,
                        "the journal has nothing after position {}, and later events",
                        stream.last
                    );
                    stream.is_behind = !read.is_empty();
                    self.publish(read.into_iter(), stream).await?;
                }
            }
        }
        Ok(())
    }

    /// Publishes a burst. Only its last message is acknowledged: it is taken if, and only if, all before it were.
    async fn publish(&self, outgoing: impl Iterator<Item = Outgoing>, stream: &mut Stream) -> anyhow::Result<()> {
        let mut outgoing = outgoing.peekable();
        while let Some(Outgoing { subject, mut headers, payload }) = outgoing.next() {
            headers.insert(NATS_EXPECTED_LAST_SEQUENCE, HeaderValue::from(stream.last));
            stream.last += 1;
            if outgoing.peek().is_some() {
                self.nats.client.publish_with_headers(subject, headers, payload).await?;
            } else {
                let acknowledged = self.jetstream.publish_with_headers(subject, headers, payload).await?;
                stream.bursts.push_back(Burst { last: stream.last, acknowledged: acknowledged.into_future() });
            }
        }
        Ok(())
    }

    /// The stream's last sequence, after making sure that the stream is there and that it is this journal's.
    async fn align(&self, client: &Client) -> anyhow::Result<u64> {
        let stream = self.jetstream.get_or_create_stream(self.stream_config()).await.context("no stream")?;
        let last = stream.get_info().await?.state.last_sequence;
        let journal = outbox::head(client).await?;
        if last > journal {
            return Err(Misaligned::Ahead { stream: last, journal }.into());
        }
        if last > 0 {
            let published = stream.get_raw_message(last).await.context("the stream's last message cannot be read")?;
            let recorded = outbox::read(client, &self.nats.subjects, last - 1).await?;
            if !recorded.first().is_some_and(|recorded| recorded.is(&published)) {
                return Err(Misaligned::Foreign(last).into());
            }
        }
        Ok(last)
    }

    /// Nothing has happened for a while: something may have been committed unheard, the stream may have been deleted, or
    /// somebody may have written into it.
    async fn look_after(&self, client: &Client, stream: &mut Stream) -> anyhow::Result<()> {
        stream.is_behind = true;
        let found = self.jetstream.get_stream_no_info(&self.config.nats.stream).await?;
        let unchanged = found.get_info().await.is_ok_and(|info| info.state.last_sequence == stream.last);
        if !unchanged {
            tracing::warn!(position = stream.last, "the stream is not where the relay left it");
            stream.last = self.align(client).await?;
        }
        Ok(())
    }

    fn stream_config(&self) -> StreamConfig {
        StreamConfig {
            name: self.config.nats.stream.clone(),
            description: Some("The events of the journal: the sequence is the position".to_owned()),
            subjects: vec![self.nats.subjects.events()],
            retention: RetentionPolicy::Limits,
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            num_replicas: self.config.stream_replicas,
            // Without these, a hole could come between two positions.
            deny_delete: true,
            deny_purge: true,
            ..StreamConfig::default()
        }
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        let (client, connection) = postgres::settings(&self.config.postgres_url()?)?.connect(NoTls).await?;
        // It ends with the client, or makes the client's next statement fail.
        tokio::spawn(connection);
        Ok(client)
    }
}

async fn try_lock(client: &Client) -> Result<bool, tokio_postgres::Error> {
    client.query_one("select pg_try_advisory_lock($1)", &[&LOCK]).await?.try_get(0)
}
