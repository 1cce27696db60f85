//! The layout of views in MongoDB: the collections and records that the projection service writes and the query service
//! reads, besides the documents of the views.

use serde::{Deserialize, Serialize};

/// The collection of the generations that serve queries, with one [`Serving`] per view.
pub const VIEWS: &str = "views";
/// The collection of the progress of each generation, with one [`Checkpoint`] per generation.
pub const CHECKPOINTS: &str = "checkpoints";
/// The collection of the leases by which a replica leads a view.
pub const LEASES: &str = "leases";

/// The name of the collection of a view's generation, such as `orders@3`. It is also the `_id` of the checkpoint.
pub fn collection(view: &str, generation: i32) -> String {
    format!("{view}@{generation}")
}

/// The generation of a view that serves queries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// The name of the view.
    #[serde(rename = "_id")]
    pub view: String,
    pub generation: i32,
}

/// The progress of a generation. It is written in the same transaction as the documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The name of the generation's collection.
    #[serde(rename = "_id")]
    pub collection: String,
    /// The position of the last event whose effect is in the documents.
    pub position: i64,
    /// The view's `VERSION` when the generation was created.
    pub version: i32,
    /// The lease term of the writer. A writer with an earlier term can no longer write.
    pub term: i64,
    /// The identity of the journal that the events are from; absent until it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
}
