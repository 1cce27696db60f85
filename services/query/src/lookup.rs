//! Lookups find documents by their ids, or by another key. Those that wait at the same time share one `find`.
//! A lookup that comes alone is sent at once: nothing waits for a batch to fill, only for one of the few finds in
//! flight to return.
//!
//! A find serves only requests that were queued before it started. Their view positions were known by then, so it shows
//! at least everything up to the position that each reply states.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use bson::{Document, RawDocument, doc};
use bytes::Bytes;
use futures_util::TryStreamExt;
use runtime::micro::{Reply, Request};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::TaskTracker;
use views::Key;
use wire::Failure;

use crate::{
    json,
    metrics::Metrics,
    positions::ViewPosition,
    reply::{self, internal, too_large},
    store::{MAX_TIME, Store, read_span},
};

/// Finds in flight for one view. The second uses the round trip of the first; more would make the batches small.
const MAX_FINDS: usize = 2;
/// The largest number of keys in one find.
const BATCH: usize = 256;

/// A request for one document.
pub struct LookupRequest {
    pub request: Request,
    pub noun: &'static str,
    pub key: Key,
    /// The view's generation and position when the request was queued.
    pub view_position: ViewPosition,
    /// Counts the request as in flight until its reply has been sent.
    pub permit: OwnedSemaphorePermit,
}

/// The lookups in one view, which are batched together.
pub struct Lookup {
    view: &'static str,
    store: Store,
    max_reply_bytes: usize,
    tasks: TaskTracker,
    metrics: Arc<Metrics>,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    requests: VecDeque<LookupRequest>,
    /// The number of tasks that take from the queue until it is empty.
    finds: usize,
}

type Found = HashMap<String, Result<Bytes, Failure>>;

impl Lookup {
    pub fn new(
        view: &'static str,
        store: Store,
        max_reply_bytes: usize,
        tasks: TaskTracker,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { view, store, max_reply_bytes, tasks, metrics, queue: Mutex::default() }
    }

    /// Makes sure that the request will be answered; does not wait for the answer.
    pub fn add(self: &Arc<Self>, wanted: LookupRequest) {
        let mut queue = self.queue();
        queue.requests.push_back(wanted);
        if queue.finds < MAX_FINDS {
            queue.finds += 1;
            self.tasks.spawn(Arc::clone(self).work());
        }
    }

    async fn work(self: Arc<Self>) {
        while let Some((view_position, batch)) = self.take() {
            self.metrics.find_lookups.observe(batch.len() as f64);
            let began = SystemTime::now();
            let found = self.find(view_position.generation, &batch).await;
            let requests = batch.len();
            for wanted in batch {
                wanted.request.record(|| read_span("find", self.view, requests, began));
                self.answer(wanted, &found).await;
            }
        }
    }

    /// Takes the waiting requests up to the first for another field or generation. If none wait, counts the calling
    /// task as ended.
    fn take(&self) -> Option<(ViewPosition, Vec<LookupRequest>)> {
        let mut queue = self.queue();
        let Some(LookupRequest { view_position, key, .. }) = queue.requests.front() else {
            queue.finds -= 1;
            return None;
        };
        let (view_position, field) = (*view_position, key.field);
        let same = |wanted: &&LookupRequest| {
            (wanted.view_position.generation, wanted.key.field) == (view_position.generation, field)
        };
        let count = queue.requests.iter().take(BATCH).take_while(same).count();
        Some((view_position, queue.requests.drain(..count).collect()))
    }

    /// The documents of a batch as JSON, by key. Keys without a document are missing from the result.
    async fn find(&self, generation: i32, batch: &[LookupRequest]) -> Result<Found, Failure> {
        let Some(LookupRequest { key: Key { field, .. }, .. }) = batch.first() else { return Ok(Found::new()) };
        let collection = self.store.collection(self.view, generation);
        // One more than there can be: so the server sees that the result has ended, and keeps no cursor.
        let batch_size = u32::try_from(batch.len() + 1).unwrap_or(u32::MAX);
        let find = collection.find(any_of(field, batch)).batch_size(batch_size).max_time(MAX_TIME).batch();
        let _timer = self.store.time_read();
        let mut replies = self.store.read(self.view, find).await?;
        let mut found = Found::with_capacity(batch.len());
        while let Some(reply) = self.store.read(self.view, replies.try_next()).await? {
            for document in self.store.documents(self.view, &reply)? {
                let document = document?;
                let value = document.get_str(field).map_err(|error| internal(self.view, error))?;
                found.insert(value.to_owned(), self.encode(document));
            }
        }
        Ok(found)
    }

    fn encode(&self, document: &RawDocument) -> Result<Bytes, Failure> {
        // A document is about as long in JSON as in BSON.
        let mut body = Vec::with_capacity(document.as_bytes().len() * 5 / 4);
        json::write_document(&mut body, document).map_err(|error| internal(self.view, error))?;
        if body.len() > self.max_reply_bytes { Err(too_large(self.max_reply_bytes)) } else { Ok(body.into()) }
    }

    async fn answer(&self, wanted: LookupRequest, found: &Result<Found, Failure>) {
        let LookupRequest { request, noun, key, view_position, permit } = wanted;
        let response = match found {
            Err(failure) => Err(failure.clone()),
            Ok(found) => match found.get(&key.value) {
                Some(Ok(body)) => Ok(Reply { position: Some(view_position.position), body: body.clone() }),
                Some(Err(failure)) => Err(failure.clone()),
                None => Err(reply::not_found(noun, &key, view_position.position)),
            },
        };
        request.respond(response).await;
        drop(permit);
    }

    /// A panic cannot poison the queue: no code that holds this lock can leave the queue half changed.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn any_of(field: &str, batch: &[LookupRequest]) -> Document {
    match batch {
        // MongoDB has a faster plan for a single value than for `$in`.
        [LookupRequest { key, .. }] => doc! { field: &key.value },
        batch => {
            let mut values: Vec<&str> = batch.iter().map(|wanted| wanted.key.value.as_str()).collect();
            values.sort_unstable();
            values.dedup();
            doc! { field: { "$in": values } }
        }
    }
}
