//! The relay: it publishes the journal to the stream, so that an event's position is its stream sequence. It stores
//! nothing: the journal is the outbox, and the stream's last sequence is the cursor. Every batch demands of the server
//! that the stream is where the relay believes it to be, so a second relay is refused, and nothing is lost or doubled.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context as _;
use async_nats::{
    HeaderValue,
    jetstream::{
        self, Context,
        stream::{Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType},
    },
};
use futures_util::StreamExt;
use runtime::{Backoff, Nats};
use tokio::sync::Notify;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    Config,
    outbox::{self, Outgoing},
    postgres,
};

/// Any number, the same for all replicas: who holds this lock of the database runs the relay.
const LOCK: i64 = 0x0072_656c_6179;
/// How often a replica that does not run the relay asks whether it should.
const STANDBY: Duration = Duration::from_secs(1);

/// Wakes the relay, in this replica or another, when something was committed.
#[derive(Clone, Default)]
pub struct Wake {
    notify: Arc<Notify>,
    /// The relay runs in this replica.
    here: Arc<AtomicBool>,
}

impl Wake {
    pub async fn committed(&self, nats: &Nats) {
        self.notify.notify_one();
        if !self.here.load(Relaxed) {
            // If it does not arrive, the relay looks by itself a little later.
            let _ = nats.client.publish(nats.subjects.committed(), "".into()).await;
        }
    }
}

pub struct Relay {
    config: Config,
    nats: Nats,
    jetstream: Context,
    wake: Wake,
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
    pub fn new(config: Config, nats: Nats, wake: Wake) -> Self {
        let jetstream = jetstream::new(nats.client.clone());
        Self { config, nats, jetstream, wake }
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
            self.wake.here.store(false, Relaxed);
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
        let mut last = self.align(&client).await?;
        self.wake.here.store(true, Relaxed);
        tracing::info!(position = last, "this replica runs the relay");
        loop {
            let published = self.step(&client, &mut last).await?;
            backoff.reset();
            if published > 0 {
                continue;
            }
            if stop.is_cancelled() {
                return Ok(());
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.wake.notify.notified() => {}
                _ = committed.next() => {}
                () = tokio::time::sleep(self.config.relay_poll()) => self.look_after(&client, &mut last).await?,
            }
        }
    }

    /// Publishes what the journal has after `last`, one batch of it; returns how many events that were.
    async fn step(&self, client: &Client, last: &mut u64) -> anyhow::Result<usize> {
        let batch = outbox::read(client, &self.nats.subjects, *last).await?;
        let published = batch.len();
        if published > 0 {
            *last = self.publish(batch, *last).await.context("the stream did not take a batch")?;
        }
        Ok(published)
    }

    /// Publishes all of the batch or nothing of it (ADR-50); returns the stream's last sequence.
    async fn publish(&self, mut batch: Vec<Outgoing>, last: u64) -> anyhow::Result<u64> {
        use async_nats::header::{NATS_BATCH_COMMIT, NATS_BATCH_ID, NATS_BATCH_SEQUENCE, NATS_EXPECTED_LAST_SEQUENCE};

        let expected = last + batch.len() as u64;
        if let Some(first) = batch.first_mut() {
            first.headers.insert(NATS_EXPECTED_LAST_SEQUENCE, HeaderValue::from(last));
        }
        if batch.len() > 1 {
            let id = Uuid::now_v7().simple().to_string();
            for (sequence, outgoing) in (1_u64..).zip(&mut batch) {
                outgoing.headers.insert(NATS_BATCH_ID, id.as_str());
                outgoing.headers.insert(NATS_BATCH_SEQUENCE, HeaderValue::from(sequence));
            }
        }
        let Some(mut final_one) = batch.pop() else { return Ok(last) };
        if !batch.is_empty() {
            final_one.headers.insert(NATS_BATCH_COMMIT, "1");
        }
        for Outgoing { subject, headers, payload } in batch {
            self.nats.client.publish_with_headers(subject, headers, payload).await?;
        }
        let Outgoing { subject, headers, payload } = final_one;
        let acknowledged = self.jetstream.publish_with_headers(subject, headers, payload).await?.await?;
        anyhow::ensure!(
            acknowledged.sequence == expected,
            "the stream is at {} instead of {expected}",
            acknowledged.sequence
        );
        Ok(expected)
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

    /// Nothing has happened for a while: the stream may have been deleted, or somebody may have written into it.
    async fn look_after(&self, client: &Client, last: &mut u64) -> anyhow::Result<()> {
        let stream = self.jetstream.get_stream_no_info(&self.config.nats.stream).await?;
        let unchanged = stream.get_info().await.is_ok_and(|info| info.state.last_sequence == *last);
        if !unchanged {
            tracing::warn!(position = *last, "the stream is not where the relay left it");
            *last = self.align(client).await?;
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
            allow_atomic_publish: true,
            // Without these, a hole could come between two positions.
            deny_delete: true,
            deny_purge: true,
            ..StreamConfig::default()
        }
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        let (client, connection) = postgres::settings(&self.config.postgres_url)?.connect(NoTls).await?;
        // It ends with the client, or makes the client's next statement fail.
        tokio::spawn(connection);
        Ok(client)
    }
}

async fn try_lock(client: &Client) -> Result<bool, tokio_postgres::Error> {
    client.query_one("select pg_try_advisory_lock($1)", &[&LOCK]).await?.try_get(0)
}
