//! Folds the events into one generation of a view: without an end where the generation serves, or up to a position where
//! it is being built. The invariant: what is folded follows the stored checkpoint without a gap. After any error all of
//! it is dropped, and the fold starts again from the stored checkpoint.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, anyhow, ensure};
use domain::{Recorded, Timestamp};
use futures_util::future::BoxFuture;
use mongodb::Database;
use runtime::{
    Nats, Tracer, age, mongodb_driver,
    traces::{Ended, KeyValue, Kind, TraceContext, database, messaging},
};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use views::{Digest, View, layout};
use wire::{Foreign, generation_header};

use crate::{
    event::{Size, StreamMessage, Unapplied},
    fold::Fold,
    generations::Catalog,
    history::{Mismatch, Standing},
    lease::{Lease, Leases},
    metrics::{Metrics, ViewMetrics},
    reader::ReadError,
    retry_state::RetryState,
    shared_reader::{SharedReader, Subscription},
    store::{Batch, Store, TakenOver, kill_session},
    writer::{WritePermit, Writer, Writers},
};

/// How long a checkpoint may remain unsaved if no document has changed. It is announced at once all the same.
const SAVE_AFTER: Duration = Duration::from_millis(200);
/// How long a view that is catching up folds events before it writes them. Each document is then written less often.
const SAVE_AFTER_CATCHING_UP: Duration = Duration::from_secs(1);
/// A view that has run for this long without an error has recovered, even if no event has come to show it.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);

/// By how much the batches of a build are smaller while events keep coming: a transaction of many documents keeps the
/// server from others.
const GIVING_WAY: usize = 8;
/// The weight of the last batch in the rate of a build.
const RATE_WEIGHT: f64 = 0.2;

/// The largest number of events of one batch that are traced.
const MAX_TRACED: usize = 256;

/// Bytes of the events that are folded at once. Their documents are loaded together.
const CHUNK_BYTES: usize = 1 << 20;
/// Roughly what a document takes in memory beyond its stored size, in bytes.
const DOCUMENT_OVERHEAD: usize = 1 << 10;

/// The resources that the views of a replica share.
pub struct Resources {
    pub nats: Nats,
    pub stream: String,
    pub database: Database,
    pub leases: Leases,
    pub catalog: Catalog,
    /// What reads and writes for the generations that serve.
    pub live: Lines,
    /// What reads and writes for those that are being built, so that they hold nobody up.
    pub building: Lines,
    /// The part of the time that a build may use while events keep coming.
    pub build_share: f64,
    pub metrics: Arc<Metrics>,
    pub tracer: Tracer,
    /// The size at which a batch is written.
    pub batch_limit: Size,
}

/// What generations with the same purpose read and write with.
pub struct Lines {
    pub reader: Arc<SharedReader>,
    pub writers: Writers,
}

/// What a projector's generation is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Queries read it.
    Live,
    /// It is being built.
    Build,
}

/// A generation while it is led: its events are read, folded and written.
pub struct Projector<'a, V: View> {
    resources: &'a Resources,
    purpose: Purpose,
    metrics: Arc<ViewMetrics>,
    /// The position beyond which nothing is read.
    limit: Option<u64>,
    /// The size at which a batch is written.
    batch_limit: Size,
    /// How fast the generation is being built.
    rate: Rate,
    subscription: Subscription,
    fold: Fold<V>,
    output: Output<'a>,
    progress: Progress,
    /// How much has been folded since the last batch was sealed.
    open_batch: Size,
    /// When the first event of the open batch that concerns the view was recorded.
    oldest: Option<Timestamp>,
    /// The events of the open batch that are being traced.
    traced: Vec<TracedEvent>,
    timers: Timers,
    /// The view has failed and not yet recovered. It has a dedicated reader, and loads even documents that an event
    /// should create: if such a document exists, the error then names the event instead of a write that failed.
    is_recovering: bool,
    /// The view has a batch window, and the stream has far more events to come.
    is_catching_up: bool,
}

/// Where a view is written, and what is being written.
struct Output<'a> {
    writer: &'a Writer,
    store: Arc<Store>,
    term: i64,
    state: WriteState,
}

enum WriteState {
    Idle,
    /// The open batch is to be written. Events are added to it until the permit comes.
    AwaitingPermit(BoxFuture<'static, anyhow::Result<WritePermit>>),
    /// A sealed batch is being written.
    Writing(BoxFuture<'static, anyhow::Result<WrittenBatch>>),
}

/// How a [`WriteState`] ended.
enum WriteOutcome {
    Permitted(WritePermit),
    Written(WrittenBatch),
}

/// A batch that is stored.
struct WrittenBatch {
    /// The new checkpoint.
    to: u64,
    events: u64,
    documents: usize,
    oldest: Option<Timestamp>,
    traced: Vec<TracedEvent>,
    sealed: SystemTime,
}

/// An event whose trace will show its way into the view.
struct TracedEvent {
    context: TraceContext,
    subject: String,
    bytes: usize,
    taken: SystemTime,
}

/// How far the view has come.
struct Progress {
    /// The last event that was folded.
    standing: Standing,
    /// The stored checkpoint.
    stored: u64,
    /// The position of the last event that was folded.
    folded: u64,
    /// The position that was announced last.
    announced: Option<u64>,
}

/// Each is `None` while there is nothing to wait for.
struct Timers {
    /// When the open batch is to be written at the latest.
    save_at: Option<Instant>,
    /// When a view with a batch window, after it has written documents, may take events again.
    resume_at: Option<Instant>,
    /// When the view has recovered at the latest.
    healthy_at: Option<Instant>,
}

/// Why a step failed.
pub enum StepError {
    /// The next event cannot be read or applied. The events folded before it are good, and can be written.
    Input(anyhow::Error),
    /// The documents in memory may differ from the stored ones.
    Store(anyhow::Error),
}

impl<'a, V: View> Projector<'a, V> {
    /// Takes the generation over, and subscribes to the events after its checkpoint.
    ///
    /// # Errors
    /// [`Superseded`] if a later leader has taken the view over; others if a server is unavailable, or there is no
    /// stream yet.
    pub async fn start(
        resources: &'a Resources,
        lease: &Lease,
        (generation, purpose): (i32, Purpose),
        is_recovering: bool,
    ) -> anyhow::Result<Self> {
        let Resources { database, leases, metrics, .. } = resources;
        let metrics = metrics.of::<V>();
        let Lines { reader, writers } = match purpose {
            Purpose::Live => &resources.live,
            Purpose::Build => &resources.building,
        };
        let writer = writers.of::<V>();
        let own = writer.session().await.id().clone();
        // A transaction that the leader before left open would lock its documents for a minute or more.
        let former = leases.recorded_session(lease).await?.context("the lease was lost")?.session;
        if let Some(former) = former.filter(|former| *former != own)
            && let Err(error) = kill_session(database, former).await
        {
            tracing::warn!(
                view = V::NAME,
                reason = mongodb_driver::describe(&error),
                "cannot end the former leader's session, whose open transaction may block this view"
            );
        }
        ensure!(leases.record_session(lease, &own).await?, "the lease was lost");
        let store = Store::open::<V>(database, generation, purpose == Purpose::Live).await?;
        // A batch of this generation that was still being written is now either stored, or never will be.
        let TakenOver { standing, digest } = store.take_over(&mut *writer.session().await, lease.term).await?;
        let stored = standing.position;
        match purpose {
            Purpose::Live => metrics.taken_over(generation, stored),
            Purpose::Build => resources.metrics.built(V::NAME, generation, stored, None),
        }
        compare(reader, &metrics, &layout::collection(V::NAME, generation), &standing).await?;
        let subscription = reader.subscribe(V::NAME, standing, !is_recovering).await?;
        let healthy_at = Some(Instant::now() + HEALTHY_AFTER);
        let mut projector = Self {
            resources,
            purpose,
            metrics,
            limit: None,
            batch_limit: resources.batch_limit,
            rate: Rate::new(stored),
            subscription,
            fold: Fold::new(digest),
            output: Output { writer, store: Arc::new(store), term: lease.term, state: WriteState::Idle },
            progress: Progress { standing, stored, folded: stored, announced: None },
            open_batch: Size::default(),
            oldest: None,
            traced: Vec::new(),
            timers: Timers { save_at: None, resume_at: None, healthy_at },
            is_recovering,
            is_catching_up: false,
        };
        projector.announce().await;
        Ok(projector)
    }

    /// Runs until the token is cancelled, then writes what is folded.
    ///
    /// # Errors
    /// If a step fails. What could still be written has been written then.
    pub async fn run(mut self, stop: &CancellationToken, retry: &mut RetryState) -> anyhow::Result<()> {
        let ended = self.run_steps(stop, retry).await;
        self.subscription.close().await;
        ended
    }

    async fn run_steps(&mut self, stop: &CancellationToken, retry: &mut RetryState) -> anyhow::Result<()> {
        loop {
            match stop.run_until_cancelled(self.step()).await {
                None => return self.finish().await,
                Some(step) => self.stepped(step, retry).await?,
            }
        }
    }

    /// Folds the events up to a position, and no further, and writes them. While events keep coming, uses `share` of the
    /// time only.
    ///
    /// # Errors
    /// If a step fails. What could still be written has been written then.
    pub async fn advance_to(&mut self, position: u64, share: f64, retry: &mut RetryState) -> anyhow::Result<()> {
        self.limit = Some(position);
        while self.progress.stored < position {
            let is_giving_way = share < 1.0 && self.resources.metrics.is_stream_moving();
            let Size { events, bytes } = self.resources.batch_limit;
            self.batch_limit = match is_giving_way {
                true => Size { events: events.div_ceil(GIVING_WAY), bytes: bytes.div_ceil(GIVING_WAY) },
                false => Size { events, bytes },
            };
            let began = Instant::now();
            let step = self.step().await;
            self.stepped(step, retry).await?;
            if is_giving_way {
                sleep(began.elapsed().mul_f64(1.0 / share - 1.0)).await;
            }
        }
        Ok(())
    }

    async fn stepped(&mut self, step: Result<(), StepError>, retry: &mut RetryState) -> anyhow::Result<()> {
        match step {
            Ok(()) if self.timers.healthy_at.is_none() && retry.is_failing() => {
                let generation = self.output.store.generation;
                tracing::info!(view = V::NAME, generation, position = self.progress.stored, "the view has recovered");
                retry.reset();
                if self.purpose == Purpose::Live {
                    self.metrics.recovered();
                }
                self.is_recovering = false;
                self.subscription.allow_joining();
                Ok(())
            }
            Ok(()) => Ok(()),
            Err(StepError::Store(error)) => Err(error),
            Err(StepError::Input(error)) => {
                self.finish().await?;
                Err(error)
            }
        }
    }

    /// The stored checkpoint.
    pub fn position(&self) -> u64 {
        self.progress.stored
    }

    /// The digest of the stored documents; `None` if it is unknown. To be asked when nothing is being folded.
    pub fn digest(&self) -> Option<Digest> {
        self.fold.digest()
    }

    /// What the generation is stored with.
    pub fn store(&self) -> Arc<Store> {
        Arc::clone(&self.output.store)
    }

    /// Stops reading.
    pub async fn close(self) {
        self.subscription.close().await;
    }

    /// Does one thing: starts to write a batch, notes that one is written, or folds the events that have arrived.
    ///
    /// # Errors
    /// See [`StepError`].
    pub async fn step(&mut self) -> Result<(), StepError> {
        if self.is_batch_due() {
            self.output.request_permit();
        }
        self.timers.resume_at = self.timers.resume_at.filter(|at| !self.is_catching_up && *at > Instant::now());
        let room = self.room().filter(|_| self.timers.resume_at.is_none());
        let is_idle = self.output.is_idle();
        tokio::select! {
            biased;
            outcome = self.output.outcome(), if !is_idle => {
                self.advance_write(outcome).await.map_err(StepError::Store)?;
            }
            messages = self.subscription.next(room.unwrap_or_default()), if room.is_some() => {
                self.take(messages.map_err(|error| StepError::Input(error.into()))?).await?;
            }
            () = reached(self.timers.save_at), if is_idle => {}
            () = reached(self.timers.resume_at) => {}
            () = reached(self.timers.healthy_at) => self.timers.healthy_at = None,
        }
        Ok(())
    }

    /// Folds the events of the messages into their documents.
    async fn take(&mut self, messages: Vec<Arc<StreamMessage>>) -> Result<(), StepError> {
        let subjects = &self.resources.nats.subjects;
        let (events, mut refused) = self.decode(&messages);
        let documents_before = self.fold.document_count();
        self.load(&events).await.map_err(StepError::Store)?;
        for DecodedMessage { position, event, ids } in &events {
            if *position != self.progress.folded + 1 {
                let error = anyhow!("position {position} came after {}", self.progress.folded);
                return Err(StepError::Store(error));
            }
            if let Some(event) = event
                && let Err(error) = self.fold.apply(event, ids)
            {
                refused = Some(Unapplied::new(subjects, event, &error).into());
                break;
            }
            self.progress.folded = *position;
        }
        let folded = messages.iter().rev().find(|message| message.position == self.progress.folded);
        self.progress.standing = folded.map_or(self.progress.standing, |message| message.standing());
        self.open_batch.bytes += (self.fold.document_count() - documents_before) * DOCUMENT_OVERHEAD;
        self.is_catching_up = !V::BATCH_WINDOW.is_zero() && messages.last().is_some_and(|last| last.is_catching_up());
        if self.progress.folded > self.progress.stored {
            self.timers.save_within(self.save_after());
        }
        self.announce().await;
        refused.map_or(Ok(()), |error| Err(StepError::Input(error)))
    }

    /// Decodes the events up to the first that this view cannot take, and returns them with the reason.
    fn decode<'m>(&mut self, messages: &'m [Arc<StreamMessage>]) -> (Vec<DecodedMessage<'m>>, Option<anyhow::Error>) {
        let mut events = Vec::with_capacity(messages.len());
        for message in messages {
            let position = message.position;
            let journal = *self.progress.standing.journal.get_or_insert(message.journal);
            if journal != message.journal {
                let reason = format!("it comes from the journal {}, the view from {journal}", message.journal);
                return (events, Some(ReadError::from(Foreign { position, reason }).into()));
            }
            let event = match message.event(&self.resources.nats.subjects, V::AGGREGATES) {
                Ok(event) => event,
                Err(error) => return (events, Some(error.into())),
            };
            self.open_batch.events += 1;
            if event.is_some_and(V::creates_document) {
                // The new document will be about as large as its event.
                self.open_batch.bytes += message.bytes();
            }
            self.oldest = self.oldest.or(event.map(|event| event.at));
            self.traced.extend(event.and_then(|event| self.trace(message, event)));
            events.push(DecodedMessage { position, event, ids: event.map(V::document_ids).unwrap_or_default() });
        }
        (events, None)
    }

    /// The event as one to be traced, if it is.
    fn trace(&self, message: &StreamMessage, event: &Recorded) -> Option<TracedEvent> {
        let tracer = &self.resources.tracer;
        if self.purpose == Purpose::Build || !tracer.is_on() || self.traced.len() >= MAX_TRACED {
            return None;
        }
        let context = tracer.of_event(message.traceparent(), age(event.at))?;
        let (subject, bytes) = (message.subject().to_owned(), message.bytes());
        Some(TracedEvent { context, subject, bytes, taken: SystemTime::now() })
    }

    /// Records the spans of events that the view shows now.
    fn record(&self, traced: Vec<TracedEvent>, documents: usize, sealed: SystemTime) {
        let (tracer, now) = (&self.resources.tracer, SystemTime::now());
        for TracedEvent { context, subject, bytes, taken } in traced {
            let attributes = messaging("process", "process", &subject, bytes);
            let process = Ended::new(format!("process {subject}"), Kind::Consumer, taken, now);
            let process = process.with(attributes).with([KeyValue::new("watershed.view", V::NAME)]);
            let Some(process) = tracer.record(Some(&context), process) else { continue };
            tracer.record(Some(&process), Ended::new("fold", Kind::Internal, taken, sealed));
            let write = Ended::new(format!("update {}", V::NAME), Kind::Client, sealed, now);
            tracer.record(Some(&process), write.with(database("mongodb", "update", V::NAME, documents)));
        }
    }

    /// Loads the documents of the events, except those that are in memory, and those that an event creates.
    async fn load(&mut self, events: &[DecodedMessage<'_>]) -> anyhow::Result<()> {
        let mut missing = HashSet::new();
        for DecodedMessage { ids, event, .. } in events {
            if !self.is_recovering && event.is_some_and(V::creates_document) {
                self.fold.assume_absent(ids);
            }
            missing.extend(self.fold.missing(ids));
        }
        if missing.is_empty() {
            return Ok(());
        }
        for document in self.output.store.load(missing).await? {
            self.open_batch.bytes += document.as_bytes().len();
            self.fold.load(document)?;
        }
        Ok(())
    }

    /// How much may be folded next; `None` if the open batch is full.
    fn room(&self) -> Option<Size> {
        let left = self.batch_limit.left_by(self.open_batch)?;
        let until_limit = self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.progress.folded));
        let events = left.events.min(usize::try_from(until_limit).unwrap_or(usize::MAX));
        (events > 0).then_some(Size { events, bytes: left.bytes.min(CHUNK_BYTES) })
    }

    fn is_batch_due(&self) -> bool {
        let is_late = self.timers.save_at.is_some_and(|at| at <= Instant::now());
        self.output.is_idle() && self.progress.folded > self.progress.stored && (self.room().is_none() || is_late)
    }

    /// How soon what was folded just now is to be written.
    fn save_after(&self) -> Duration {
        if self.is_catching_up {
            SAVE_AFTER_CATCHING_UP
        } else if self.fold.has_changed() {
            Duration::ZERO
        } else {
            SAVE_AFTER
        }
    }

    /// Writes the open batch once that is permitted, and notes the new checkpoint once the batch is written.
    async fn advance_write(&mut self, outcome: anyhow::Result<WriteOutcome>) -> anyhow::Result<()> {
        match outcome? {
            WriteOutcome::Permitted(permit) => self.write(permit),
            WriteOutcome::Written(batch) => {
                self.written(batch).await;
                Ok(())
            }
        }
    }

    /// Seals the open batch, and starts to write it.
    fn write(&mut self, permit: WritePermit) -> anyhow::Result<()> {
        let Output { store, term, .. } = &self.output;
        let Progress { standing, stored: from, folded: to, .. } = self.progress;
        let rate = (self.purpose == Purpose::Build).then(|| self.rate.at(to));
        let (writes, digest) = (self.fold.seal()?, self.fold.digest());
        let batch = Batch { store: Arc::clone(store), from, to, term: *term, standing, rate, digest, writes };
        let (documents, oldest) = (batch.writes.len(), self.oldest.take());
        let (traced, sealed) = (std::mem::take(&mut self.traced), SystemTime::now());
        let written = WrittenBatch { to, events: to - from, documents, oldest, traced, sealed };
        self.open_batch = Size::default();
        self.timers.save_at = None;
        if !batch.writes.is_empty() {
            self.timers.resume_at = Some(Instant::now() + V::BATCH_WINDOW);
        }
        let writing = permit.write(batch);
        self.output.state = WriteState::Writing(Box::pin(async move { writing.await.map(|()| written) }));
        Ok(())
    }

    async fn written(&mut self, batch: WrittenBatch) {
        let WrittenBatch { to, events, documents, oldest, traced, sealed } = batch;
        self.progress.stored = to;
        if self.purpose == Purpose::Build {
            self.resources.metrics.built(V::NAME, self.output.store.generation, to, self.rate.events_per_second);
        }
        self.fold.mark_written();
        self.metrics.written(events, documents, oldest.filter(|_| self.purpose == Purpose::Live));
        self.record(traced, documents, sealed);
        if self.progress.folded == to {
            self.timers.save_at = None;
        }
        self.timers.healthy_at = None;
        self.announce().await;
    }

    /// Writes what is folded.
    async fn finish(&mut self) -> anyhow::Result<()> {
        while self.progress.stored < self.progress.folded {
            if self.output.is_idle() {
                self.output.request_permit();
            }
            let outcome = self.output.outcome().await;
            self.advance_write(outcome).await?;
        }
        Ok(())
    }

    /// Publishes the position up to which the documents are complete. Events that changed none count at once.
    async fn announce(&mut self) {
        let Progress { stored, folded, announced, .. } = self.progress;
        let is_all_stored = !self.output.is_writing() && !self.fold.has_changed();
        let position = if is_all_stored { folded } else { stored };
        let Nats { client, subjects, .. } = &self.resources.nats;
        if self.purpose == Purpose::Build {
            return;
        }
        self.metrics.moved(position);
        // While NATS is unavailable nobody listens. The view starts again afterwards, and announces its position then.
        if announced < Some(position) && self.resources.nats.is_up() {
            let headers = generation_header(self.output.store.generation);
            let subject = subjects.checkpoint(V::NAME);
            let _ = client.publish_with_headers(subject, headers, position.to_string().into()).await;
            self.progress.announced = Some(position);
        }
    }
}

/// Compares a generation with the stream.
///
/// # Errors
/// If it does not fit the stream. Others if a server is unavailable.
async fn compare(reader: &SharedReader, metrics: &ViewMetrics, name: &str, standing: &Standing) -> anyhow::Result<()> {
    // What has not been begun fits any stream, also one that is not there yet.
    if standing.position == 0 {
        return Ok(());
    }
    match reader.compare(standing).await {
        Ok(_) => {
            metrics.compared(true);
            Ok(())
        }
        Err(ReadError::Mismatch(Mismatch::Refused(reason))) => {
            metrics.compared(false);
            Err(ReadError::from(Mismatch::Refused(format!("{name} does not fit the stream: {reason}"))).into())
        }
        Err(other) => Err(other.into()),
    }
}

/// A message, with its event if that belongs to one of the view's aggregates, and the identifiers of its documents.
struct DecodedMessage<'m> {
    position: u64,
    event: Option<&'m Recorded>,
    ids: Vec<String>,
}

impl Output<'_> {
    fn is_idle(&self) -> bool {
        matches!(self.state, WriteState::Idle)
    }

    fn is_writing(&self) -> bool {
        matches!(self.state, WriteState::Writing(_))
    }

    fn request_permit(&mut self) {
        self.state = WriteState::AwaitingPermit(Box::pin(self.writer.permit()));
    }

    /// Waits for the permit or for the end of the write. Waits for ever if idle. The call can be cancelled.
    async fn outcome(&mut self) -> anyhow::Result<WriteOutcome> {
        let outcome = match &mut self.state {
            WriteState::Idle => std::future::pending().await,
            WriteState::AwaitingPermit(permit) => permit.await.map(WriteOutcome::Permitted),
            WriteState::Writing(written) => written.await.map(WriteOutcome::Written),
        };
        self.state = WriteState::Idle;
        outcome
    }
}

/// How many events per second a build takes.
struct Rate {
    position: u64,
    at: Instant,
    events_per_second: Option<f64>,
}

impl Rate {
    fn new(position: u64) -> Self {
        Self { position, at: Instant::now(), events_per_second: None }
    }

    /// The rate when the build has come to a position.
    fn at(&mut self, position: u64) -> f64 {
        let seconds = self.at.elapsed().as_secs_f64().max(0.001);
        let now = position.saturating_sub(self.position) as f64 / seconds;
        let rate = self.events_per_second.map_or(now, |before| before + RATE_WEIGHT * (now - before));
        (self.position, self.at, self.events_per_second) = (position, Instant::now(), Some(rate));
        rate
    }
}

impl Timers {
    /// Moves `save_at` forward, if it is later than that.
    fn save_within(&mut self, delay: Duration) {
        let due = Instant::now() + delay;
        self.save_at = Some(self.save_at.map_or(due, |at| at.min(due)));
    }
}

async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
