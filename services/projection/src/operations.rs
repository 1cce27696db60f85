//! The operations of the projection service.

use std::sync::Arc;

use bson::doc;
use futures_util::{TryStreamExt, future::join_all};
use mongodb::{Database, error::Error};
use runtime::{
    Nats, age,
    micro::Endpoint,
    mongodb_driver,
    operations::{Operation, endpoint},
    rounded,
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::task::TaskTracker;
use views::layout::{self, Checkpoint, Serving};
use wire::{Code, Failure};

use crate::{
    lease::{Leases, Snapshot},
    metrics::Metrics,
    observer::EventAges,
};

/// What the operations work on.
pub struct Context {
    pub database: Database,
    pub nats: Nats,
    pub stream: String,
    pub leases: Leases,
    pub metrics: Arc<Metrics>,
}

/// All operations of the service, a line each.
pub fn endpoints(context: &Arc<Context>, tasks: &TaskTracker) -> Vec<Endpoint> {
    let subjects = &context.nats.subjects;
    vec![endpoint::<ListViews>(subjects, context, tasks), endpoint::<ShowView>(subjects, context, tasks)]
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListViews {}

impl Operation for ListViews {
    const NOUN: &'static str = "view";
    const VERB: &'static str = "list";
    const DESCRIPTION: &'static str = "The views, with position, lag and leader";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let stored = Stored::read(context).await?;
        let names = context.metrics.views.iter().map(|metrics| metrics.view);
        let views =
            join_all(names.map(|view| async { stored.describe(view, context).await.map(|view| view.json) })).await;
        Ok(json!({ "views": views.into_iter().flatten().collect::<Vec<_>>() }))
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ShowView {
    /// The name of the view, such as `orders`.
    view: String,
}

impl Operation for ShowView {
    const NOUN: &'static str = "view";
    const VERB: &'static str = "show";
    const DESCRIPTION: &'static str = "One view, also with its size, its indexes and the journal that it comes from";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let stored = Stored::read(context).await?;
        let Some(described) = stored.describe(&self.view, context).await else {
            let message = format!("there is no view {}", self.view);
            return Err(Failure::new(Code::NotFound, message).with("view", self.view));
        };
        let Described { collection, mut json, journal } = described;
        let size = Size::read(&context.database, &collection).await.map_err(|error| unavailable(&error))?;
        let Size { documents, bytes, indexes } = size;
        json["documents"] = documents.into();
        json["bytes"] = bytes.into();
        json["indexes"] = indexes.into();
        json["journal"] = journal.into();
        Ok(json)
    }
}

/// What MongoDB has about all views, and how far the stream is.
struct Stored {
    serving: Vec<Serving>,
    checkpoints: Vec<Checkpoint>,
    leases: Snapshot,
    stream: Option<u64>,
}

struct Described {
    collection: String,
    json: Value,
    journal: Option<String>,
}

impl Stored {
    async fn read(context: &Context) -> Result<Self, Failure> {
        let Context { database, leases, .. } = context;
        let read = async {
            let serving = database.collection(layout::VIEWS).find(doc! {}).await?.try_collect().await?;
            let checkpoints = database.collection(layout::CHECKPOINTS).find(doc! {}).await?.try_collect().await?;
            Ok((serving, checkpoints, leases.snapshot().await?))
        };
        let (serving, checkpoints, leases) = read.await.map_err(|error| unavailable(&error))?;
        let stream = context.nats.stream_state(&context.stream).await.ok().flatten();
        Ok(Self { serving, checkpoints, leases, stream: stream.map(|state| state.last_sequence) })
    }

    /// Describes the generation of a view that serves queries; `None` if there is no such view.
    async fn describe(&self, view: &str, context: &Context) -> Option<Described> {
        let generation = self.serving.iter().find(|serving| serving.view == view)?.generation;
        let collection = layout::collection(view, generation);
        let checkpoint = self.checkpoints.iter().find(|checkpoint| checkpoint.collection == collection)?;
        let position = u64::try_from(checkpoint.position).unwrap_or_default();
        let lag_events = self.stream.map(|last| last.saturating_sub(position));
        let lag_seconds = match lag_events {
            Some(0) => Some(0.0),
            Some(_) => EventAges::new(&context.nats, &context.stream)
                .recorded(position + 1)
                .await
                .map(|recorded| age(recorded).as_secs_f64()),
            None => None,
        };
        let (leader, term) = self.leases.holder(view).unzip();
        let json = json!({
            "view": view, "version": checkpoint.version, "generation": generation, "position": position,
            "lag_events": lag_events, "lag_seconds": lag_seconds.map(rounded), "leader": leader, "term": term,
        });
        Some(Described { collection, json, journal: checkpoint.journal.clone() })
    }
}

struct Size {
    documents: u64,
    bytes: i64,
    indexes: Vec<String>,
}

impl Size {
    async fn read(database: &Database, collection: &str) -> Result<Self, Error> {
        let collection = database.collection::<bson::Document>(collection);
        let documents = collection.estimated_document_count().await?;
        let indexes = collection.list_index_names().await?;
        let mut stats = collection.aggregate([doc! { "$collStats": { "storageStats": {} } }]).await?;
        let stats = stats.try_next().await?.unwrap_or_default();
        // The server sends a number in the smallest type that it fits in.
        let size = stats.get_document("storageStats").ok().and_then(|stats| stats.get("size"));
        let bytes = size.and_then(|size| size.as_i64().or(size.as_i32().map(i64::from))).unwrap_or_default();
        Ok(Self { documents, bytes, indexes })
    }
}

fn unavailable(error: &Error) -> Failure {
    tracing::warn!(reason = mongodb_driver::describe(error), "the views cannot be shown");
    Failure::new(Code::Unavailable, "the views' database is unavailable")
}
