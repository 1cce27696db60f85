//! Documents by their ids, or by another key. Those that are asked for at the same time share one `find`; one that is asked for alone is
//! fetched at once: nobody waits for a batch to fill, only for one of the few finds in flight to come back.
//!
//! A find takes requests that were queued before it started, and their positions were known by then: it shows at least
//! what they say.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    positions::ViewPosition,
    reply::{self, internal, too_large},
    store::{MAX_TIME, Store},
};

/// Finds of one view in flight. The second uses the round trip of the first; more make the batches small.
const MAX_FINDS: usize = 2;
/// Keys in one find at most.
const BATCH: usize = 256;

/// A request for one document.
pub struct LookupRequest {
    pub request: Request,
    pub noun: &'static str,
    pub key: Key,
    /// The view as it was when the request was queued.
    pub view_position: ViewPosition,
    /// Held until the reply is out.
    pub permit: OwnedSemaphorePermit,
}

/// The lookups in one view.
pub struct Lookup {
    view: &'static str,
    store: Store,
    max_reply_bytes: usize,
    tasks: TaskTracker,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    requests: VecDeque<LookupRequest>,
    /// Tasks that take from the queue until it is empty.
    finds: usize,
}

type Found = HashMap<String, Result<Bytes, Failure>>;

impl Lookup {
    pub fn new(view: &'static str, store: Store, max_reply_bytes: usize, tasks: TaskTracker) -> Self {
        Self { view, store, max_reply_bytes, tasks, queue: Mutex::default() }
    }

    /// Sees to it that the request is answered.
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
            let found = self.find(view_position, &batch).await;
            for wanted in batch {
                self.answer(wanted, &found).await;
            }
        }
    }

    /// Takes what waits, as far as it is for the same field of the same generation. If nothing waits, the task has ended.
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

    /// The documents of a batch as JSON, by key; what is not there is left out.
    async fn find(&self, view_position: ViewPosition, batch: &[LookupRequest]) -> Result<Found, Failure> {
        let Some(LookupRequest { key: Key { field, .. }, .. }) = batch.first() else { return Ok(Found::new()) };
        let collection = self.store.collection(self.view, view_position);
        // One more than can come: the server then sees the end, and keeps no cursor.
        let batch_size = u32::try_from(batch.len() + 1).unwrap_or(u32::MAX);
        let find = collection.find(any_of(field, batch)).batch_size(batch_size).max_time(MAX_TIME).batch();
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
                Some(Ok(body)) => Ok(Reply { position: view_position.position, body: body.clone() }),
                Some(Err(failure)) => Err(failure.clone()),
                None => Err(reply::not_found(noun, &key, view_position)),
            },
        };
        request.respond(response).await;
        drop(permit);
    }

    /// Nothing that holds this lock can leave the queue half changed.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn any_of(field: &str, batch: &[LookupRequest]) -> Document {
    match batch {
        // The server has a shorter way for a single id.
        [LookupRequest { key, .. }] => doc! { field: &key.value },
        batch => {
            let mut values: Vec<&str> = batch.iter().map(|wanted| wanted.key.value.as_str()).collect();
            values.sort_unstable();
            values.dedup();
            doc! { field: { "$in": values } }
        }
    }
}
