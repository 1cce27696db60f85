//! How views are stored in MongoDB: the collections that the projection service writes and the query service reads,
//! besides those of the documents.

use serde::{Deserialize, Serialize};

/// The collection that says which generation of each view serves queries, by one [`Serving`] per view.
pub const VIEWS: &str = "views";
/// The collection that says how far each generation is, by one [`Checkpoint`] per generation.
pub const CHECKPOINTS: &str = "checkpoints";
/// The collection that says which replica leads each view.
pub const LEASES: &str = "leases";

/// The collection of a view's generation, such as `orders@3`; also the `_id` of its checkpoint.
pub fn collection(view: &str, generation: i32) -> String {
    format!("{view}@{generation}")
}

/// The generation of a view that serves queries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// The view's name.
    #[serde(rename = "_id")]
    pub view: String,
    pub generation: i32,
}

/// How far a generation is. It is written in one transaction with the documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The generation's collection.
    #[serde(rename = "_id")]
    pub collection: String,
    /// The position of the last event whose effect is in the documents.
    pub position: i64,
    /// The view's `VERSION` when the generation was begun.
    pub version: i32,
    /// The lease term of the writer. A writer of an earlier term cannot write any more.
    pub term: i64,
    /// The identity of the journal whose events these are; absent until there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
}
