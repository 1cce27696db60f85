//! Compares two generations of a view that are at the same position, document by document. The invariant: each
//! generation is read as it was at one moment, with the checkpoint that it had then. So the one that serves queries can
//! be written meanwhile, and a difference is never one of time.
//!
//! Documents are equal if their digests are: the order of their fields does not count.

use std::collections::{HashMap, VecDeque};

use bson::{RawBsonRef, RawDocument, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use mongodb::{
    ClientSession, Collection, Database,
    error::{Error, ErrorKind},
    options::{CollectionOptions, ReadConcern},
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use views::{
    Digest,
    layout::{self, Checkpoint},
};

/// The largest number of documents that are listed as different, and of fields of each.
const MAX_DIFFERENCES: usize = 100;
const MAX_FIELDS: usize = 10;
/// The length of the values in JSON that are shown in full. With the bounds above, all values of a comparison fit in a
/// message.
const MAX_VALUE_CHARACTERS: usize = 100;
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
    #[error("a document cannot be read")]
    Unreadable(bson::error::Error),
}

impl From<Error> for ComparisonError {
    fn from(error: Error) -> Self {
        match &*error.kind {
            ErrorKind::Command(reason) if reason.code == SNAPSHOT_TOO_OLD => Self::SnapshotTooOld,
            _ => Self::Mongodb(error),
        }
    }
}

impl From<bson::error::Error> for ComparisonError {
    fn from(error: bson::error::Error) -> Self {
        Self::Unreadable(error)
    }
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
    /// The identifier. It is in JSON if it is not a text, which all those are that a view makes.
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
    /// The value in `a`, with its type if both values look the same in JSON. It is absent if the document has no such
    /// field, or if values are not wanted.
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

/// The documents of a snapshot, in the order of their identifiers.
struct Documents {
    batches: mpsc::Receiver<Result<VecDeque<ReadDocument>, ComparisonError>>,
    batch: VecDeque<ReadDocument>,
    /// What has been skipped so far.
    side: Side,
    _reading: AbortOnDropHandle<()>,
}

struct ReadDocument {
    document: RawDocumentBuf,
    /// The identifier; `None` if it is not a text.
    id: Option<String>,
    digest: Digest,
}

impl Documents {
    /// Begins to read. The next batch is read while this one is being compared.
    fn of(snapshot: Snapshot) -> Self {
        let Checkpoint { collection, digest: checkpoint_digest, .. } = snapshot.checkpoint.clone();
        let (batch_read, batches) = mpsc::channel(1);
        let reading = AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(error) = read(snapshot, &batch_read).await {
                let _ = batch_read.send(Err(error)).await;
            }
        }));
        let side = Side { collection, documents: 0, digest: Digest::default(), checkpoint_digest };
        Self { batches, batch: VecDeque::new(), side, _reading: reading }
    }

    /// The next document; `None` after the last.
    async fn peek(&mut self) -> Result<Option<&ReadDocument>, ComparisonError> {
        while self.batch.is_empty() {
            let Some(batch) = self.batches.recv().await else { return Ok(None) };
            self.batch = batch?;
        }
        Ok(self.batch.front())
    }

    /// Goes on to the document after the next.
    fn skip(&mut self) {
        if let Some(document) = self.batch.pop_front() {
            self.side.documents += 1;
            self.side.digest += document.digest;
        }
    }
}

async fn read(
    snapshot: Snapshot,
    batch_read: &mpsc::Sender<Result<VecDeque<ReadDocument>, ComparisonError>>,
) -> Result<(), ComparisonError> {
    let Snapshot { mut session, documents, .. } = snapshot;
    let find = documents.find(doc! {}).sort(doc! { "_id": 1 }).batch_size(BATCH);
    let mut cursor = find.session(&mut session).batch().await?;
    let mut replies = cursor.stream(&mut session);
    while let Some(reply) = replies.try_next().await? {
        let batch: Result<_, ComparisonError> =
            reply.doc_slices()?.into_iter().map(|it| ReadDocument::new(it?)).collect();
        if batch_read.send(Ok(batch?)).await.is_err() {
            // Nobody compares any more.
            return Ok(());
        }
    }
    Ok(())
}

impl ReadDocument {
    fn new(value: RawBsonRef<'_>) -> Result<Self, ComparisonError> {
        let document =
            value.as_document().ok_or_else(|| Error::custom("MongoDB sent something other than a document"))?;
        let id = document.get_str("_id").ok().map(str::to_owned);
        Ok(Self { id, digest: Digest::of(document)?, document: document.to_owned() })
    }

    /// Whether the other side, whose next document is `other`, does not have this one. MongoDB sorts texts by their
    /// bytes, as Rust does. An identifier that is not a text is in no order here: no view makes one, so the other side
    /// does not have it.
    fn is_before(&self, other: &Self) -> bool {
        match (&self.id, &other.id) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(id), Some(other)) => id < other,
        }
    }
}

/// What has been found different so far.
struct Differences {
    values: Values,
    total: u64,
    listed: Vec<DocumentDifference>,
}

impl Differences {
    fn new(values: Values) -> Self {
        Self { values, total: 0, listed: Vec::new() }
    }

    fn add(
        &mut self,
        kind: DifferenceKind,
        a: Option<&ReadDocument>,
        b: Option<&ReadDocument>,
    ) -> Result<(), ComparisonError> {
        self.total += 1;
        let Some(ReadDocument { document, id, .. }) = a.or(b).filter(|_| self.listed.len() < MAX_DIFFERENCES) else {
            return Ok(());
        };
        let id = match (id, document.get("_id")?) {
            (Some(id), _) => id.clone(),
            (None, id) => id.map_or(Value::Null, json).to_string(),
        };
        let mut fields = DifferingFields { values: self.values, found: Vec::new() };
        match (a, b) {
            (Some(a), Some(b)) => fields.between("", &a.document, &b.document)?,
            // All fields differ, which is worth saying only with their values.
            _ if self.values == Values::Shown => {
                let empty = RawDocumentBuf::new();
                let [a, b] = [a, b].map(|side| side.map_or(&*empty, |read| &*read.document));
                fields.between("", a, b)?;
            }
            _ => {}
        }
        self.listed.push(DocumentDifference { id, kind, fields: fields.found });
        Ok(())
    }
}

struct DifferingFields {
    values: Values,
    found: Vec<FieldDifference>,
}

impl DifferingFields {
    /// Finds the fields of the documents at this path that differ.
    fn between(&mut self, path: &str, a: &RawDocument, b: &RawDocument) -> bson::error::Result<()> {
        let (fields_of_a, fields_of_b) = (fields(a)?, fields(b)?);
        let (in_a, in_b): (HashMap<_, _>, HashMap<_, _>) =
            (fields_of_a.iter().copied().collect(), fields_of_b.iter().copied().collect());
        let only_in_b = fields_of_b.iter().filter(|(name, _)| !in_a.contains_key(name));
        for (name, _) in fields_of_a.iter().chain(only_in_b) {
            if self.found.len() == MAX_FIELDS {
                return Ok(());
            }
            let field = if path.is_empty() { (*name).to_owned() } else { format!("{path}.{name}") };
            match (in_a.get(name).copied(), in_b.get(name).copied()) {
                (Some(RawBsonRef::Document(a)), Some(RawBsonRef::Document(b))) => self.between(&field, a, b)?,
                (Some(RawBsonRef::Array(a)), Some(RawBsonRef::Array(b))) => {
                    let [a, b] = [a, b].map(|array| RawDocument::from_bytes(array.as_bytes()));
                    self.between(&field, a?, b?)?;
                }
                (a, b) if is_same(a, b) => {}
                (a, b) => self.add(field, a, b),
            }
        }
        Ok(())
    }

    fn add(&mut self, field: String, a: Option<RawBsonRef<'_>>, b: Option<RawBsonRef<'_>>) {
        let (a, b) = match self.values {
            Values::Hidden => (None, None),
            Values::Shown => match (a.map(json), b.map(json)) {
                (json_of_a, json_of_b) if json_of_a == json_of_b => (a.map(typed), b.map(typed)),
                (json_of_a, json_of_b) => (json_of_a, json_of_b),
            },
        };
        self.found.push(FieldDifference { field, a: a.map(shortened), b: b.map(shortened) });
    }
}

fn fields(document: &RawDocument) -> bson::error::Result<Vec<(&str, RawBsonRef<'_>)>> {
    document.iter().map(|field| field.map(|(name, value)| (name.as_str(), value))).collect()
}

/// Whether both are there and the same for a digest, too.
fn is_same(a: Option<RawBsonRef<'_>>, b: Option<RawBsonRef<'_>>) -> bool {
    match (a, b) {
        (Some(RawBsonRef::Double(a)), Some(RawBsonRef::Double(b))) => a.to_bits() == b.to_bits(),
        (a, b) => a == b,
    }
}

fn json(value: RawBsonRef<'_>) -> Value {
    serde_json::to_value(value).unwrap_or_else(|_| "unreadable".into())
}

fn typed(value: RawBsonRef<'_>) -> Value {
    json!({ "type": format!("{:?}", value.element_type()), "value": json(value) })
}

fn shortened(value: Value) -> Value {
    let text = value.to_string();
    match text.char_indices().nth(MAX_VALUE_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => value,
    }
}

#[cfg(test)]
mod tests {
    use bson::{oid::ObjectId, rawdoc};

    use super::*;

    fn read(document: RawDocumentBuf) -> ReadDocument {
        ReadDocument::new(RawBsonRef::Document(&document)).unwrap()
    }

    /// The fields that differ, with their values.
    fn differing(a: RawDocumentBuf, b: RawDocumentBuf) -> Vec<(String, Option<Value>, Option<Value>)> {
        let mut fields = DifferingFields { values: Values::Shown, found: vec![] };
        fields.between("", &a, &b).unwrap();
        fields.found.into_iter().map(|FieldDifference { field, a, b }| (field, a, b)).collect()
    }

    #[test]
    fn a_field_that_differs_is_named_by_its_path() {
        let a = rawdoc! { "_id": "1", "total": { "amount": 5 }, "lines": [{ "n": 1 }, { "n": 2 }], "gone": null };
        let b =
            rawdoc! { "_id": "1", "lines": [{ "n": 1 }, { "n": 3 }, { "n": 4 }], "total": { "amount": 6 }, "new": "x" };
        let expected = [
            ("total.amount", Some(json!(5)), Some(json!(6))),
            ("lines.1.n", Some(json!(2)), Some(json!(3))),
            ("lines.2", None, Some(json!({ "n": 4 }))),
            ("gone", Some(Value::Null), None),
            ("new", None, Some(json!("x"))),
        ];
        assert_eq!(differing(a, b), expected.map(|(field, a, b)| (field.to_owned(), a, b)));
    }

    #[test]
    fn values_that_look_the_same_are_shown_with_their_types() {
        let typed = |kind: &str, value: Value| Some(json!({ "type": kind, "value": value }));
        let (int, long) = (typed("Int32", json!(5)), typed("Int64", json!(5)));
        assert_eq!(differing(rawdoc! { "n": 5 }, rawdoc! { "n": 5_i64 }), [("n".to_owned(), int, long)]);
        assert_eq!(differing(rawdoc! { "n": 0.0 }, rawdoc! { "n": -0.0 }).len(), 1);
        assert_eq!(differing(rawdoc! { "n": f64::NAN }, rawdoc! { "n": f64::NAN }), []);
    }

    #[test]
    fn values_and_lists_are_bounded() {
        let of = |text: &str| {
            let mut document = RawDocumentBuf::new();
            for n in 0..2 * MAX_FIELDS {
                document.append(bson::raw::CString::try_from(n.to_string()).unwrap(), text);
            }
            document
        };
        let found = differing(of("a"), of(&"ä".repeat(1000)));
        assert_eq!(found.len(), MAX_FIELDS);
        let Some(Value::String(shown)) = &found[0].2 else { panic!("{found:?}") };
        assert!(shown.ends_with('…') && shown.chars().count() == MAX_VALUE_CHARACTERS + 1, "{shown}");

        let mut differences = Differences::new(Values::Hidden);
        for n in 0..2 * MAX_DIFFERENCES {
            let document = read(rawdoc! { "_id": n.to_string() });
            differences.add(DifferenceKind::OnlyInA, Some(&document), None).unwrap();
        }
        assert_eq!(differences.total, 2 * MAX_DIFFERENCES as u64);
        assert_eq!(differences.listed.len(), MAX_DIFFERENCES);
    }

    #[test]
    fn values_are_hidden_unless_they_are_wanted() {
        let (a, b) = (read(rawdoc! { "_id": "1", "name": "Ada" }), read(rawdoc! { "_id": "1", "name": "Grace" }));
        let mut differences = Differences::new(Values::Hidden);
        differences.add(DifferenceKind::Differs, Some(&a), Some(&b)).unwrap();
        differences.add(DifferenceKind::OnlyInA, Some(&a), None).unwrap();
        let name = FieldDifference { field: "name".to_owned(), a: None, b: None };
        assert_eq!(differences.listed[0].fields, [name]);
        assert_eq!(differences.listed[1].fields, []);
        assert!(!serde_json::to_string(&differences.listed).unwrap().contains("Ada"));
    }

    #[test]
    fn a_document_with_an_identifier_of_another_type_is_on_one_side_only() {
        let strange = read(rawdoc! { "_id": ObjectId::from_bytes([1; 12]) });
        let usual = read(rawdoc! { "_id": "a" });
        assert!(strange.is_before(&usual) && strange.is_before(&strange) && !usual.is_before(&strange));
        assert!(usual.is_before(&read(rawdoc! { "_id": "b" })) && !usual.is_before(&usual));
        let mut differences = Differences::new(Values::Hidden);
        differences.add(DifferenceKind::OnlyInB, None, Some(&strange)).unwrap();
        assert_eq!(differences.listed[0].id, r#"{"$oid":"010101010101010101010101"}"#);
    }
}
