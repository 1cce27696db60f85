//! Carries one view forward while this replica leads it. The invariant: what is folded follows the stored checkpoint
//! without a gap; after any error all of it is dropped, and the work goes on from what the store says.

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::{Context, anyhow, ensure};
use domain::Recorded;
use futures_util::future::BoxFuture;
use mongodb::Database;
use runtime::Nats;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use views::View;
use wire::Foreign;

use crate::{
    event::{self, Unapplied},
    feed::{Feed, Place},
    fold::Fold,
    lease::{Lease, Leases},
    reader::{Arrival, Unreadable},
    store::{Batch, Store, Superseded, end_session},
    trouble::Trouble,
    writer::{Turn, Writer, Writers},
};

/// How much later than announced a checkpoint may be saved where no document changed.
const SAVE_AFTER: Duration = Duration::from_millis(200);
/// Where the stream has so many more events, nobody waits for this one. A view that gathers then writes what it can hold
/// at once: each document less often.
const FAR: u64 = 20_000;
/// For how long it folds before it writes then.
const SAVE_AFTER_FAR: Duration = Duration::from_secs(1);
/// What goes on for so long is out of trouble, also if no event came to show it.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);

/// Of the events that are folded at once: for them, their documents are loaded together.
const CHUNK_BYTES: usize = 1 << 20;
/// What a document costs in memory beyond its own bytes, roughly.
const DOCUMENT_BYTES: usize = 1 << 10;

/// What all views are led with.
pub struct Resources {
    pub nats: Nats,
    pub database: Database,
    pub leases: Leases,
    pub feed: Arc<Feed>,
    pub writers: Writers,
    /// Of a batch.
    pub bounds: Size,
}

/// Of events that are, or may be, in memory.
#[derive(Clone, Copy, Default)]
pub struct Size {
    pub events: usize,
    pub bytes: usize,
}

impl Size {
    /// What may be taken next of this when that is used; nothing if it is used up.
    fn left_by(self, used: Self) -> Option<Self> {
        let events = self.events.saturating_sub(used.events);
        let bytes = self.bytes.saturating_sub(used.bytes);
        (events > 0 && bytes > 0).then_some(Self { events, bytes: bytes.min(CHUNK_BYTES) })
    }
}

/// Leads a view until it is told to stop, and says the highest term that it met. What goes wrong is waited out.
pub async fn lead<V: View>(resources: &Resources, lease: &Lease, stop: &CancellationToken) -> i64 {
    let (view, term) = (V::NAME, lease.term);
    tracing::info!(view, term, "leading");
    let mut trouble = Trouble::default();
    loop {
        let starting = Projector::<V>::start(resources, lease, trouble.is_told());
        let ended = match stop.run_until_cancelled(starting).await {
            None => return term,
            Some(Ok(projector)) => projector.run(stop, &mut trouble).await,
            Some(Err(error)) => Err(error),
        };
        let Err(error) = ended else { return term };
        if let Some(Superseded { term: later }) = error.downcast_ref() {
            tracing::warn!(view, term, later, "the view has been written under a later term");
            return *later;
        }
        tell(view, &error, &mut trouble);
        if stop.run_until_cancelled(trouble.wait()).await.is_none() {
            return term;
        }
    }
}

fn tell(view: &str, error: &anyhow::Error, trouble: &mut Trouble) {
    let Some(text) = trouble.news(error) else { return };
    if let Some(Unapplied { position, aggregate, event, reason }) = error.downcast_ref() {
        tracing::error!(view, position, aggregate, event, reason, "the view stopped at an event, trying again");
        return;
    }
    match error.downcast_ref() {
        Some(Unreadable::NoStream(_) | Unreadable::NoConsumer(..) | Unreadable::Lost(_)) => {
            tracing::warn!(view, reason = text, "the view waits");
        }
        Some(Unreadable::Gap { .. } | Unreadable::Foreign(_)) | None => {
            tracing::error!(view, reason = text, "the view stopped, trying again")
        }
    }
}

/// A view on its way: what is stored, and what is in memory beyond it.
pub struct Projector<'a, V: View> {
    resources: &'a Resources,
    writer: &'a Writer,
    store: Arc<Store>,
    term: i64,
    place: Place,
    fold: Fold<V>,
    /// Something went wrong before: the view reads by itself, and documents are looked for also where there can be none,
    /// so that one that is there all the same is told of by its event, and not as a write that failed.
    is_careful: bool,
    /// The journal whose events the view has; `None` before the first.
    journal: Option<Uuid>,
    /// The stored checkpoint.
    stored: u64,
    /// The last event that was folded.
    folded: u64,
    announced: Option<u64>,
    /// What has been folded since the last batch was sealed.
    open: Size,
    /// The view gathers, and there is far more to come than what was folded last.
    is_far: bool,
    /// When what is folded is to be written at the latest.
    save_at: Option<Instant>,
    /// Until then a view that gathers lets events wait: it has just changed documents.
    rests_until: Option<Instant>,
    /// `None` when it is out of trouble.
    healthy_at: Option<Instant>,
    /// A batch that is being written; it ends with the new checkpoint.
    writing: Option<BoxFuture<'static, anyhow::Result<u64>>>,
    /// What is folded waits for its turn to be written; more may be folded meanwhile.
    turn: Option<BoxFuture<'static, anyhow::Result<Turn>>>,
}

/// Why a step failed.
pub enum Halt {
    /// The next event cannot be had or applied. What was folded before it is good.
    Input(anyhow::Error),
    /// What was folded may not be what is stored.
    Store(anyhow::Error),
}

impl<'a, V: View> Projector<'a, V> {
    /// Takes the view over, and begins to read behind its checkpoint.
    ///
    /// # Errors
    /// [`Superseded`] if the lease has passed on; others if a server is away, or the stream is not there yet.
    async fn start(resources: &'a Resources, lease: &Lease, is_careful: bool) -> anyhow::Result<Self> {
        let Resources { database, leases, feed, writers, .. } = resources;
        let writer = writers.of::<V>();
        let own = writer.session().await.id().clone();
        // What the leader before may have left open would lock its documents for a minute or more.
        let former = leases.session(lease).await?.context("the lease was lost")?.session;
        if let Some(former) = former.filter(|former| *former != own)
            && let Err(error) = end_session(database, former).await
        {
            tracing::warn!(view = V::NAME, %error.kind, "a transaction of a dead leader may hold this view up");
        }
        ensure!(leases.note_session(lease, &own).await?, "the lease was lost");
        let store = Store::open::<V>(database).await?;
        // What was being written of this view is now written, or will not be.
        let (stored, journal) = store.take_over(&mut *writer.session().await, lease.term).await?;
        let place = feed.open(V::NAME, stored, is_careful).await?;
        let mut projector = Self {
            resources,
            writer,
            store: Arc::new(store),
            term: lease.term,
            place,
            fold: Fold::default(),
            is_careful,
            journal,
            stored,
            folded: stored,
            announced: None,
            open: Size::default(),
            is_far: false,
            save_at: None,
            rests_until: None,
            healthy_at: Some(Instant::now() + HEALTHY_AFTER),
            writing: None,
            turn: None,
        };
        projector.announce().await;
        Ok(projector)
    }

    /// Goes on until the token is cancelled; then writes what is folded.
    ///
    /// # Errors
    /// If it cannot go on. What could be written is.
    async fn run(mut self, stop: &CancellationToken, trouble: &mut Trouble) -> anyhow::Result<()> {
        let ended = self.go_on(stop, trouble).await;
        self.place.close().await;
        ended
    }

    async fn go_on(&mut self, stop: &CancellationToken, trouble: &mut Trouble) -> anyhow::Result<()> {
        loop {
            match stop.run_until_cancelled(self.step()).await {
                None => return self.finish().await,
                Some(Ok(())) if self.healthy_at.is_none() && trouble.is_told() => {
                    tracing::info!(view = V::NAME, position = self.stored, "the view goes on");
                    trouble.over();
                    self.is_careful = false;
                    self.place.may_join();
                }
                Some(Ok(())) => {}
                Some(Err(Halt::Store(error))) => return Err(error),
                Some(Err(Halt::Input(error))) => {
                    self.finish().await?;
                    return Err(error);
                }
            }
        }
    }

    /// Does one thing: begins to write what is folded, notes that it is written, or folds what has arrived.
    ///
    /// # Errors
    /// If it cannot go on, see [`Halt`].
    pub async fn step(&mut self) -> Result<(), Halt> {
        if self.is_to_be_written() && self.turn.is_none() {
            self.turn = Some(Box::pin(self.writer.turn()));
        }
        self.rests_until = self.rests_until.filter(|at| !self.is_far && *at > Instant::now());
        let room = self.resources.bounds.left_by(self.open).filter(|_| self.rests_until.is_none());
        tokio::select! {
            biased;
            written = finished(&mut self.writing), if self.writing.is_some() => {
                self.written(written.map_err(Halt::Store)?).await;
            }
            turn = finished(&mut self.turn), if self.turn.is_some() => {
                let begun = turn.and_then(|turn| self.write(turn));
                begun.map_err(Halt::Store)?;
            }
            arrivals = self.place.next(room.unwrap_or_default()), if room.is_some() => {
                self.take(arrivals.map_err(|error| Halt::Input(error.into()))?).await?;
            }
            () = moment(self.save_at), if self.writing.is_none() && self.turn.is_none() => {}
            () = moment(self.rests_until) => {}
            () = moment(self.healthy_at) => self.healthy_at = None,
        }
        Ok(())
    }

    /// Folds events, each into the documents that it concerns.
    async fn take(&mut self, arrivals: Vec<Arc<Arrival>>) -> Result<(), Halt> {
        let subjects = &self.resources.nats.subjects;
        let mut events = Vec::with_capacity(arrivals.len());
        let mut refused: Option<anyhow::Error> = None;
        for arrival in &arrivals {
            let journal = *self.journal.get_or_insert(arrival.journal);
            if journal != arrival.journal {
                let reason = format!("it is of the journal {}, the view is of {journal}", arrival.journal);
                refused = Some(Unreadable::from(Foreign { position: arrival.position, reason }).into());
                break;
            }
            let event = match event::decode(subjects, arrival, V::AGGREGATES) {
                Ok(event) => event,
                Err(error) => {
                    refused = Some(error.into());
                    break;
                }
            };
            let ids = event.map(V::document_ids).unwrap_or_default();
            self.open.events += 1;
            if event.is_some_and(V::creates_document) {
                // About what the document will have.
                self.open.bytes += arrival.message.length;
            }
            events.push((arrival.position, ids, event));
        }
        let before = self.fold.documents();
        self.load(&events).await.map_err(Halt::Store)?;
        for (position, ids, event) in &events {
            if *position != self.folded + 1 {
                return Err(Halt::Store(anyhow!("position {position} came after {}", self.folded)));
            }
            if let Some(event) = event
                && let Err(error) = self.fold.apply(event, ids)
            {
                refused = Some(event::unapplied(subjects, event, &error).into());
                break;
            }
            self.folded = *position;
        }
        self.open.bytes += (self.fold.documents() - before) * DOCUMENT_BYTES;
        self.is_far = !V::BATCH_WINDOW.is_zero() && arrivals.last().is_some_and(|last| last.pending > FAR);
        if self.folded > self.stored {
            let due = Instant::now() + patience(self.is_far, self.fold.has_changed());
            self.save_at = Some(self.save_at.map_or(due, |at| at.min(due)));
        }
        self.announce().await;
        refused.map_or(Ok(()), |error| Err(Halt::Input(error)))
    }

    /// Loads the documents that the events concern, but for those that are in memory, and those that an event begins.
    async fn load(&mut self, events: &[(u64, Vec<String>, Option<&Recorded>)]) -> anyhow::Result<()> {
        let mut missing = HashSet::new();
        for (_, ids, event) in events {
            if !self.is_careful && event.is_some_and(V::creates_document) {
                self.fold.begin(ids);
            }
            missing.extend(self.fold.missing(ids));
        }
        if missing.is_empty() {
            return Ok(());
        }
        for document in self.store.load(missing).await? {
            self.open.bytes += document.as_bytes().len();
            self.fold.load(document)?;
        }
        Ok(())
    }

    fn is_to_be_written(&self) -> bool {
        let is_full = self.resources.bounds.left_by(self.open).is_none();
        let is_late = self.save_at.is_some_and(|at| at <= Instant::now());
        self.writing.is_none() && self.folded > self.stored && (is_full || is_late)
    }

    /// Begins to write what is folded.
    fn write(&mut self, turn: Turn) -> anyhow::Result<()> {
        let (store, to) = (Arc::clone(&self.store), self.folded);
        let (term, journal) = (self.term, self.journal);
        let batch = Batch { store, from: self.stored, to, term, journal, writes: self.fold.seal()? };
        self.open = Size::default();
        self.save_at = None;
        if !batch.writes.is_empty() {
            self.rests_until = Some(Instant::now() + V::BATCH_WINDOW);
        }
        let written = turn.write(batch);
        self.writing = Some(Box::pin(async move { written.await.map(|()| to) }));
        Ok(())
    }

    async fn written(&mut self, stored: u64) {
        self.stored = stored;
        self.fold.written();
        if self.folded == stored {
            self.save_at = None;
        }
        self.healthy_at = None;
        self.announce().await;
    }

    /// Writes what is folded.
    async fn finish(&mut self) -> anyhow::Result<()> {
        self.turn = None;
        while self.stored < self.folded {
            if self.writing.is_none() {
                let turn = self.writer.turn().await?;
                self.write(turn)?;
            }
            let written = finished(&mut self.writing).await?;
            self.written(written).await;
        }
        Ok(())
    }

    /// Tells how far the documents are. Events that changed none count at once.
    async fn announce(&mut self) {
        let is_all_stored = self.writing.is_none() && !self.fold.has_changed();
        let position = if is_all_stored { self.folded } else { self.stored };
        let Nats { client, subjects, .. } = &self.resources.nats;
        // While NATS is away nobody listens, and reading begins anew afterwards, which announces again.
        if self.announced < Some(position) && self.resources.nats.is_up() {
            let _ = client.publish(subjects.checkpoint(V::NAME), position.to_string().into()).await;
            self.announced = Some(position);
        }
    }
}

/// How soon what was folded just now is to be written.
fn patience(is_far: bool, has_changed: bool) -> Duration {
    if is_far {
        SAVE_AFTER_FAR
    } else if has_changed {
        Duration::ZERO
    } else {
        SAVE_AFTER
    }
}

/// Waits for what is under way.
async fn finished<T>(under_way: &mut Option<BoxFuture<'static, anyhow::Result<T>>>) -> anyhow::Result<T> {
    let finished = under_way.as_mut().context("nothing is under way")?.await;
    *under_way = None;
    finished
}

async fn moment(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
