//! How views lie in MongoDB: what the projection service writes and the query service reads besides the documents.

use serde::{Deserialize, Serialize};

/// Which generation of each view serves queries: one [`Serving`] per view.
pub const VIEWS: &str = "views";
/// How far each generation is: one [`Checkpoint`] per generation.
pub const CHECKPOINTS: &str = "checkpoints";
/// Who leads each view.
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

/// How far a generation is. The documents and this are written in one transaction.
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
