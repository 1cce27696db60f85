//! Compares two generations of a view that are at the same position, document by document. The invariant: each
//! generation is read as it was at one moment, with the checkpoint that it had then. So the one that serves queries can
//! be written meanwhile, and a difference is never one of time.
//!
//! Documents are equal if their digests are: the order of their fields does not count.

use std::collections::BTreeMap;

use bson::{Bson, RawBsonRef, RawDocument, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use mongodb::{
    ClientSession, Collection, Database,
    error::{Error, ErrorKind},
    options::{CollectionOptions, ReadConcern},
};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use views::{
    Digest,
    layout::{self, Checkpoint},
};

/// The largest number of documents that are listed as different, and of fields of each.
const MAX_DIFFERENCES: usize = 100;
const MAX_FIELDS: usize = 20;
/// The largest size of a value in bytes that is shown in full. With the bounds above, everything fits in a message.
const MAX_VALUE_BYTES: usize = 100;
/// The number of documents that are read at once. MongoDB sends 16 MiB of them at most.
const BATCH: u32 = 1_000;
/// The code of the server's error `SnapshotTooOld`.
const SNAPSHOT_TOO_OLD: i32 = 239;

/// A generation as it was when the snapshot was opened. MongoDB can read it like that for as long as
/// `minSnapshotHistoryWindowInSeconds` says, which is 5 minutes unless somebody has changed it.
pub struct Snapshot {
    session: ClientSession,
    documents: Collection<RawDocumentBuf>,
    pub checkpoint: Checkpoint,
}

/// Why two generations could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ComparisonError {
    #[error("{0} has no checkpoint")]
    NoCheckpoint(String),
    #[error("{} is at position {}, but {} is at position {}", a.collection, a.position, b.collection, b.position)]
    Positions { a: Box<Checkpoint>, b: Box<Checkpoint> },
    #[error(
        "the comparison took longer than MongoDB keeps what has been overwritten: try again at a quieter time, or raise \
         minSnapshotHistoryWindowInSeconds"
    )]
    SnapshotTooOld,
    #[error(transparent)]
    Mongodb(Error),
    /// The error itself may quote the document.
    #[error("{0} has a document that cannot be read")]
    Unreadable(String),
}

/// How the generations `a` and `b` compare.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The position of both.
    pub position: i64,
    pub a: Side,
    pub b: Side,
    /// The number of documents that differ, or that only one of the generations has.
    pub different: u64,
    /// The first of them by identifier.
    pub differences: Vec<DocumentDifference>,
}

/// One of the two generations.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Side {
    pub collection: String,
    pub documents: u64,
    /// The digest that was computed from the documents.
    pub digest: Digest,
    /// The digest in the checkpoint; `None` if it is unknown. If it is not that of the documents, somebody else has
    /// written to the collection.
    pub checkpoint_digest: Option<Digest>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DocumentDifference {
    /// The identifier; in extended JSON if it is not a text, as all those are that a view makes.
    pub id: String,
    pub kind: DifferenceKind,
    /// The first fields that differ, by name.
    pub fields: Vec<FieldDifference>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    OnlyInA,
    OnlyInB,
    Differs,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FieldDifference {
    /// The path of the field, such as `lines.0.quantity`.
    pub field: String,
    /// The value in `a` in extended JSON. It is absent if the document has no such field, or if values are not wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub a: Option<Value>,
    /// The value in `b`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b: Option<Value>,
}

/// Whether a comparison shows the values that differ, which clients have stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    Shown,
    Hidden,
}

impl Snapshot {
    /// Opens a snapshot of a generation as it is now.
    ///
    /// # Errors
    /// If there is no such generation, or if MongoDB is unavailable.
    pub async fn open(database: &Database, collection: &str) -> Result<Self, ComparisonError> {
        let mut session = database.client().start_session().snapshot(true).await?;
        // Otherwise the driver would combine the session's snapshot with the read concern of the database.
        let options = CollectionOptions::builder().read_concern(ReadConcern::snapshot()).build();
        let documents = database.collection_with_options(collection, options.clone());
        let checkpoints = database.collection_with_options::<Checkpoint>(layout::CHECKPOINTS, options);
        let checkpoint = checkpoints
            .find_one(doc! { "_id": collection })
            .session(&mut session)
            .await?
            .ok_or_else(|| ComparisonError::NoCheckpoint(collection.to_owned()))?;
        Ok(Self { session, documents, checkpoint })
    }

    /// Compares this generation, which becomes `a`, with another. The documents need not fit in memory.
    ///
    /// # Errors
    /// If the two are not at the same position, if it takes too long, or if MongoDB is unavailable.
    pub async fn compare_with(self, other: Self, values: Values) -> Result<Comparison, ComparisonError> {
        let (a, b) = (&self.checkpoint, &other.checkpoint);
        if a.position != b.position {
            return Err(ComparisonError::Positions { a: Box::new(a.clone()), b: Box::new(b.clone()) });
        }
        let (position, mut differences) = (a.position, Differences::new(values));
        let (mut a, mut b) = (Documents::of(self), Documents::of(other));
        loop {
            match (a.peek().await?, b.peek().await?) {
                (None, None) => break,
                (Some(document), other) if other.is_none_or(|other| document.is_before(other)) => {
                    differences.add(DifferenceKind::OnlyInA, Some(document), None)?;
                    a.skip();
                }
                (other, Some(document)) if other.is_none_or(|other| document.is_before(other)) => {
                    differences.add(DifferenceKind::OnlyInB, None, Some(document))?;
                    b.skip();
                }
                (in_a, in_b) => {
                    if in_a.map(|document| document.digest) != in_b.map(|document| document.digest) {
                        differences.add(DifferenceKind::Differs, in_a, in_b)?;
                    }
                    a.skip();
                    b.skip();
                }
            }
        }
        let Differences { total: different, listed: differences, .. } = differences;
        Ok(Comparison { position, a: a.side, b: b.side, different, differences })
    }
}

impl Comparison {
    /// Whether both generations have the same documents, and the checkpoints have their digests, as far as they are
    /// known.
    pub fn is_equal(&self) -> bool {
        let has_digest = |side: &Side| side.checkpoint_digest.is_none_or(|digest| digest == side.digest);
        self.different == 0 && has_digest(&self.a) && has_digest(&self.b)
    }
}
