//! The operations of the projection service.

use std::sync::Arc;

use bson::{DateTime, Document, doc};
use futures_util::{TryStreamExt, future::try_join_all};
use mongodb::{
    Database,
    error::{Error, ErrorKind},
};
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
use views::layout::{self, Checkpoint, Generation, Generations};
use wire::{Code, Failure};

use crate::{
    generations::{Catalog, Change, Refusal},
    lease::{Leases, Snapshot},
    metrics::{Metrics, ViewMetrics},
    observer::EventAges,
};

/// The code of the server's error `NamespaceNotFound`.
const NAMESPACE_NOT_FOUND: i32 = 26;

/// What the operations work on.
pub struct Context {
    pub database: Database,
    pub nats: Nats,
    pub stream: String,
    pub leases: Leases,
    pub catalog: Catalog,
    pub metrics: Arc<Metrics>,
}

/// All operations of the service, a line each.
pub fn endpoints(context: &Arc<Context>, tasks: &TaskTracker) -> Vec<Endpoint> {
    let subjects = &context.nats.subjects;
    vec![
        endpoint::<ListViews>(subjects, context, tasks),
        endpoint::<ShowView>(subjects, context, tasks),
        endpoint::<RebuildView>(subjects, context, tasks),
        endpoint::<VerifyView>(subjects, context, tasks),
        endpoint::<RollBackView>(subjects, context, tasks),
        endpoint::<DropGeneration>(subjects, context, tasks),
    ]
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListViews {}

impl Operation for ListViews {
    const NOUN: &'static str = "view";
    const VERB: &'static str = "list";
    const DESCRIPTION: &'static str = "The views, with position, lag, leader and generations";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let stored = Stored::read(context).await?;
        let names = context.metrics.views.iter().map(|metrics| metrics.view);
        let views = try_join_all(names.map(|view| stored.describe(view, context))).await?;
        Ok(json!({ "views": views }))
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
    const DESCRIPTION: &'static str = "One view, also with its indexes, its digest and the journal that it comes from";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let view = known(&self.view, context)?;
        let stored = Stored::read(context).await?;
        let mut json = stored.describe(view.view, context).await?;
        for generation in json["generations"].as_array_mut().into_iter().flatten() {
            let Some(number) = generation["generation"].as_i64().and_then(|number| i32::try_from(number).ok()) else {
                continue;
            };
            let comparison = context.catalog.comparison(&layout::collection(view.view, number)).await;
            if let Some(comparison) = comparison.map_err(|error| unavailable(&error))? {
                generation["comparison"] = serde_json::from_str(&comparison).unwrap_or_default();
            }
        }
        let Some(serving) = stored.of(view.view).and_then(|found| found.serving(view.version)) else { return Ok(json) };
        let collection = layout::collection(view.view, serving.number);
        let indexes = context.database.collection::<Document>(&collection).list_index_names().await;
        json["indexes"] = indexes.map_err(|error| unavailable(&error))?.into();
        let checkpoint = stored.checkpoint(&collection);
        json["journal"] = checkpoint.and_then(|checkpoint| checkpoint.journal.clone()).into();
        json["digest"] = checkpoint.and_then(|checkpoint| checkpoint.digest).map(|digest| digest.to_string()).into();
        Ok(json)
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RebuildView {
    /// The name of the view, such as `orders`.
    view: String,
    /// Let the new generation serve even if its documents differ from those of the one before.
    #[serde(default)]
    force: bool,
}

impl Operation for RebuildView {
    const NOUN: &'static str = "view";
    const VERB: &'static str = "rebuild";
    const DESCRIPTION: &'static str =
        "Builds the view anew beside the generation that serves, and then lets the new one serve";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let view = known(&self.view, context)?;
        let change = context.catalog.rebuild(view.view, view.version, self.force).await.map_err(refused)?;
        Ok(changed(view, &change, "building"))
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct VerifyView {
    /// The name of the view, such as `orders`.
    view: String,
    /// Show the values that differ, which clients have stored, and not only the names of their fields.
    #[serde(default)]
    values: bool,
}

impl Operation for VerifyView {
    const NOUN: &'static str = "view";
    const VERB: &'static str = "verify";
    const DESCRIPTION: &'static str = "Builds the view anew, compares it with what queries read, and drops it";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let view = known(&self.view, context)?;
        let change = context.catalog.verify(view.view, view.version, self.values).await.map_err(refused)?;
        Ok(changed(view, &change, "verifying"))
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RollBackView {
    /// The name of the view, such as `orders`.
    view: String,
    /// The number of the generation to return to; by default, of the last one that served.
    generation: Option<i32>,
    /// Let the generation serve even if its documents differ from those of the one that serves now.
    #[serde(default)]
    force: bool,
}

impl Operation for RollBackView {
    const NOUN: &'static str = "view";
    const VERB: &'static str = "rollback";
    const DESCRIPTION: &'static str = "Brings the generation that served before up to date, and lets it serve again";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let view = known(&self.view, context)?;
        let change = context.catalog.roll_back(view.view, view.version, self.generation, self.force).await;
        let change = change.map_err(refused)?;
        Ok(changed(view, &change, "building"))
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct DropGeneration {
    /// The name of the view, such as `orders`.
    view: String,
    /// The number of the generation, such as 3 of `orders@3`.
    generation: i32,
}

impl Operation for DropGeneration {
    const NOUN: &'static str = "view";
    const VERB: &'static str = "drop";
    const DESCRIPTION: &'static str = "Drops a generation of a view that does not serve";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let view = known(&self.view, context)?;
        let change = context.catalog.drop(view.view, self.generation, view.version).await.map_err(refused)?;
        Ok(changed(view, &change, "dropping"))
    }
}

/// The view of this name.
fn known<'a>(view: &str, context: &'a Context) -> Result<&'a ViewMetrics, Failure> {
    let found = context.metrics.views.iter().find(|metrics| metrics.view == view);
    found.map(Arc::as_ref).ok_or_else(|| {
        let message = format!("there is no view {view}");
        Failure::new(Code::NotFound, message).with("view", view)
    })
}

fn changed(view: &ViewMetrics, change: &Change, state: &str) -> Value {
    let (number, is_new) = match change {
        Change::Done(number) => (number, true),
        Change::Already(number) => (number, false),
    };
    json!({ "view": view.view, "version": view.version, "generation": number, "state": state, "is_new": is_new })
}

fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Unavailable(error) => unavailable(&error),
        Refusal::NotFound(message) => Failure::new(Code::NotFound, message),
        Refusal::Conflict(message) => Failure::new(Code::Conflict, message),
    }
}

/// What MongoDB has about all views, and how far the stream is.
struct Stored {
    generations: Vec<Generations>,
    checkpoints: Vec<Checkpoint>,
    leases: Snapshot,
    stream: Option<u64>,
}

impl Stored {
    async fn read(context: &Context) -> Result<Self, Failure> {
        let Context { database, leases, catalog, .. } = context;
        let read = async {
            let generations = catalog.all().await?;
            let checkpoints = database.collection(layout::CHECKPOINTS).find(doc! {}).await?.try_collect().await?;
            Ok((generations, checkpoints, leases.snapshot().await?))
        };
        let (generations, checkpoints, leases) = read.await.map_err(|error| unavailable(&error))?;
        let stream = context.nats.stream_state(&context.stream).await.ok().flatten();
        Ok(Self { generations, checkpoints, leases, stream: stream.map(|state| state.last_sequence) })
    }

    fn of(&self, view: &str) -> Option<&Generations> {
        self.generations.iter().find(|generations| generations.view == view)
    }

    fn checkpoint(&self, collection: &str) -> Option<&Checkpoint> {
        self.checkpoints.iter().find(|checkpoint| checkpoint.collection == collection)
    }

    /// Describes a view: first the generation that serves queries of this program's version, then all generations.
    async fn describe(&self, view: &str, context: &Context) -> Result<Value, Failure> {
        let version = known(view, context)?.version;
        let found = self.of(view);
        let described =
            found.into_iter().flat_map(|found| &found.generations).map(|it| self.generation(view, it, context));
        let generations = try_join_all(described).await.map_err(|error| unavailable(&error))?;
        let serving = found.and_then(|found| found.serving(version));
        let collection = serving.map(|serving| layout::collection(view, serving.number));
        let checkpoint = collection.as_ref().and_then(|collection| self.checkpoint(collection));
        let position = checkpoint.map(|checkpoint| u64::try_from(checkpoint.position).unwrap_or_default());
        let lag_events = self.stream.zip(position).map(|(last, position)| last.saturating_sub(position));
        let lag_seconds = match lag_events.zip(position) {
            Some((0, _)) => Some(0.0),
            Some((_, position)) => EventAges::new(&context.nats, &context.stream)
                .recorded(position + 1)
                .await
                .map(|recorded| age(recorded).as_secs_f64()),
            None => None,
        };
        let (leader, term) = collection.and_then(|collection| self.leases.holder(&collection)).unzip();
        let number = serving.map(|serving| serving.number);
        let size = |field: &str| {
            let serving = generations.iter().find(|generation| generation["generation"] == json!(number));
            serving.map(|serving| serving[field].clone())
        };
        Ok(json!({
            "view": view, "version": version, "generation": number, "position": position, "lag_events": lag_events,
            "lag_seconds": lag_seconds.map(rounded), "leader": leader, "term": term,
            "problem": serving.and_then(|serving| serving.problem.clone()),
            "documents": size("documents"), "bytes": size("bytes"), "generations": generations,
        }))
    }

    async fn generation(&self, view: &str, generation: &Generation, context: &Context) -> Result<Value, Error> {
        let Generation { number, version, state, since, returns, problem, idle_since, .. } = generation;
        let collection = layout::collection(view, *number);
        let Size { documents, bytes } = Size::read(&context.database, &collection).await?;
        let checkpoint = self.checkpoint(&collection);
        let position = checkpoint.map(|checkpoint| u64::try_from(checkpoint.position).unwrap_or_default());
        let rate = checkpoint.and_then(|checkpoint| checkpoint.rate).filter(|rate| *rate > 0.0);
        let left = self.stream.zip(position).map(|(last, position)| last.saturating_sub(position));
        let seconds_left = left.zip(rate).map(|(events, rate)| rounded(events as f64 / rate));
        let leader = self.leases.holder(&collection).map(|(name, _)| name);
        let time = |time: &DateTime| time.try_to_rfc3339_string().ok();
        Ok(json!({
            "generation": number, "version": version, "state": state, "since": time(since), "returns": returns,
            "position": position,
            "events_left": left, "events_per_second": rate.map(rounded), "seconds_left": seconds_left,
            "leader": leader, "documents": documents, "bytes": bytes, "problem": problem,
            "idle_since": idle_since.as_ref().and_then(time),
        }))
    }
}

struct Size {
    documents: u64,
    bytes: i64,
}

impl Size {
    async fn read(database: &Database, collection: &str) -> Result<Self, Error> {
        let collection = database.collection::<Document>(collection);
        let documents = collection.estimated_document_count().await?;
        let stats = collection.aggregate([doc! { "$collStats": { "storageStats": {} } }]).await;
        let stats = match stats {
            Ok(mut stats) => stats.try_next().await?.unwrap_or_default(),
            // There is no such collection yet, or any more.
            Err(error) if matches!(&*error.kind, ErrorKind::Command(reason) if reason.code == NAMESPACE_NOT_FOUND) => {
                Document::new()
            }
            Err(error) => return Err(error),
        };
        // The server sends a number in the smallest type that it fits in.
        let size = stats.get_document("storageStats").ok().and_then(|stats| stats.get("size"));
        let bytes = size.and_then(|size| size.as_i64().or(size.as_i32().map(i64::from))).unwrap_or_default();
        Ok(Self { documents, bytes })
    }
}

fn unavailable(error: &Error) -> Failure {
    tracing::warn!(reason = mongodb_driver::describe(error), "the views cannot be shown");
    Failure::new(Code::Unavailable, "the views' database is unavailable")
}
