//! What a query asks of its view: a request, parsed strictly, becomes a plan, which the query service carries out.

use bson::{Document, RawDocumentBuf};
use domain::Malformed;
use schemars::Schema;

use crate::{Cursor, Inapplicable};

/// Documents on a page if the request does not say.
pub const DEFAULT_LIMIT: i64 = 20;
/// Documents on a page at most.
pub const MAX_LIMIT: i64 = 100;

/// One kind of query: what the query service needs to serve it.
#[derive(Clone, Copy)]
pub struct Query {
    pub noun: &'static str,
    pub verb: &'static str,
    pub description: &'static str,
    /// The JSON Schema of the request.
    pub schema: fn() -> Schema,
    /// Reads a request.
    pub plan: fn(&[u8]) -> Result<Plan, Malformed>,
}

/// What to read.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// The document with this identifier, as the whole reply; `not_found` with its `noun` if there is none.
    Get { id: String },
    /// A page: `{"items":[…],"next":"…"}`, `next` only where more follow.
    List(List),
    /// A few documents made into one reply.
    Report(Report),
}

/// A page of documents in the order of an index, never skipped to.
#[derive(Clone, Debug, PartialEq)]
pub struct List {
    /// The cursor's own condition included.
    pub filter: Document,
    /// The last key is unique, so that the order is total.
    pub sort: Document,
    /// Documents on this page at most.
    pub limit: i64,
    /// Makes the `next` of the reply from the page's last document.
    pub cursor: Cursor,
}

/// An aggregation over a bounded number of documents.
#[derive(Clone, Debug)]
pub struct Report {
    pub pipeline: Vec<Document>,
    /// Makes the body of the reply from what the pipeline returned.
    pub render: fn(&[RawDocumentBuf]) -> Result<Vec<u8>, Inapplicable>,
}

impl PartialEq for Report {
    fn eq(&self, other: &Self) -> bool {
        self.pipeline == other.pipeline
    }
}
