//! Folds events into documents in memory. The invariants: an event is applied to all of its documents, or to none; and
//! a document in memory equals what MongoDB will hold once the batches up to here are written. Nobody else writes these
//! documents: each transaction makes sure of that, since it demands the checkpoint and the lease's term.

use std::collections::HashMap;

use anyhow::anyhow;
use bson::RawDocumentBuf;
use domain::Recorded;
use views::{Digest, Inapplicable, View};

use crate::document_write::DocumentWrite;

pub struct Fold<V: View> {
    /// The documents of the batch that is being folded.
    open: Documents<V>,
    /// The documents of the batch that is being written, as the batch leaves them.
    sealed: Documents<V>,
    /// The documents of earlier batches, as they are stored.
    cache: Cache<V>,
    changed: bool,
    /// The digest of the generation after the sealed batch; `None` if it is unknown. Nothing is hashed then.
    digest: Option<Digest>,
}

/// A bounded cache with two ages. A document that is used is young. When the young ones have become too large, they all
/// become old, and those that were old are dropped.
struct Cache<V: View> {
    young: Documents<V>,
    /// The size of the young documents as they are stored.
    young_bytes: usize,
    old: Documents<V>,
}

/// How large the young documents may become, in bytes as stored. In memory they are several times as large.
const MAX_YOUNG_BYTES: usize = 512 << 10;

type Documents<V> = HashMap<String, LoadedDocument<<V as View>::Document>>;

/// A document in memory; `None` stands for a document that does not exist.
struct LoadedDocument<D> {
    stored: Option<Stored>,
    current: Option<D>,
    changed: bool,
}

/// A document as it is stored.
struct Stored {
    document: RawDocumentBuf,
    /// The digest of the document, computed once for all batches that change the document; zero if the digest of the
    /// generation is unknown.
    digest: Digest,
}

impl<V: View> Fold<V> {
    /// Goes on from documents with this digest.
    pub fn new(digest: Option<Digest>) -> Self {
        Self { open: HashMap::new(), sealed: HashMap::new(), cache: Cache::default(), changed: false, digest }
    }

    /// The digest of the generation once the sealed batch is written; `None` if it is unknown.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The identifiers whose documents are not in memory.
    pub fn missing<'a>(&self, ids: &'a [String]) -> impl Iterator<Item = &'a str> {
        let Self { open, sealed, cache, .. } = self;
        let is_loaded = |id| open.contains_key(id) || sealed.contains_key(id) || cache.contains(id);
        ids.iter().map(String::as_str).filter(move |id| !is_loaded(*id))
    }

    /// Assumes that those of the documents that are not in memory do not exist, so that they need not be loaded.
    pub fn assume_absent(&mut self, ids: &[String]) {
        for id in ids {
            self.entry(id);
        }
    }

    /// Takes in a document as it is stored.
    ///
    /// # Errors
    /// If it is not a document of the view.
    pub fn load(&mut self, stored: RawDocumentBuf) -> anyhow::Result<()> {
        let id = stored.get_str("_id")?.to_owned();
        // The error itself may quote the document.
        let current = bson::deserialize_from_slice(stored.as_bytes())
            .map_err(|_| anyhow!("the stored document {id} does not have the form of the view"))?;
        let stored = Some(Stored::new(stored, self.digest.is_some())?);
        self.open.insert(id, LoadedDocument { stored, current: Some(current), changed: false });
        Ok(())
    }

    /// Applies an event to its documents. A document that is not in memory counts as one that does not exist.
    ///
    /// # Errors
    /// If the event cannot be applied to one of them. Then it is applied to none.
    pub fn apply(&mut self, event: &Recorded, ids: &[String]) -> Result<(), Inapplicable> {
        let mut evolved = Vec::with_capacity(ids.len());
        for id in ids {
            let before = self.entry(id).current.clone();
            evolved.push(V::evolve(before, id, event)?);
        }
        for (id, after) in ids.iter().zip(evolved) {
            let entry = self.entry(id);
            if entry.current != after {
                entry.current = after;
                entry.changed = true;
                self.changed = true;
            }
        }
        Ok(())
    }

    /// The number of documents in the open batch.
    pub fn document_count(&self) -> usize {
        self.open.len()
    }

    /// Whether a document has changed since the last batch was sealed.
    pub fn has_changed(&self) -> bool {
        self.changed
    }

    /// Ends the open batch, and returns its writes. Its documents stay in memory until [`Self::mark_written`].
    ///
    /// # Errors
    /// If a document cannot be serialized to BSON.
    pub fn seal(&mut self) -> bson::error::Result<Vec<DocumentWrite>> {
        let mut changed: Vec<_> = self.open.iter_mut().filter(|(_, entry)| entry.changed).collect();
        // Documents that are neighbours in the collection lie close together in its files.
        changed.sort_unstable_by_key(|(id, _)| *id);
        let mut writes = Vec::with_capacity(changed.len());
        for (id, entry) in changed {
            let after = entry.current.as_ref().map(bson::serialize_to_raw_document_buf).transpose()?;
            entry.changed = false;
            let before = entry.stored.as_ref().map(|stored| &*stored.document);
            let Some(write) = DocumentWrite::between(id, before, after.as_deref())? else { continue };
            writes.push(write);
            let after = after.map(|document| Stored::new(document, self.digest.is_some())).transpose()?;
            if let Some(digest) = &mut self.digest {
                entry.stored.iter().for_each(|before| *digest -= before.digest);
                after.iter().for_each(|after| *digest += after.digest);
            }
            entry.stored = after;
        }
        self.sealed = std::mem::take(&mut self.open);
        self.changed = false;
        Ok(writes)
    }

    /// To be called when the sealed batch has been written.
    pub fn mark_written(&mut self) {
        self.cache.insert(std::mem::take(&mut self.sealed));
    }

    fn entry(&mut self, id: &str) -> &mut LoadedDocument<V::Document> {
        let Self { open, sealed, cache, .. } = self;
        let absent = LoadedDocument { stored: None, current: None, changed: false };
        open.entry(id.to_owned()).or_insert_with(|| sealed.remove(id).or_else(|| cache.remove(id)).unwrap_or(absent))
    }
}

impl<V: View> Cache<V> {
    fn contains(&self, id: &str) -> bool {
        self.young.contains_key(id) || self.old.contains_key(id)
    }

    fn remove(&mut self, id: &str) -> Option<LoadedDocument<V::Document>> {
        if let Some(document) = self.young.remove(id) {
            self.young_bytes -= document.stored_bytes();
            return Some(document);
        }
        self.old.remove(id)
    }

    /// Caches the documents that exist.
    fn insert(&mut self, documents: Documents<V>) {
        for (id, document) in documents.into_iter().filter(|(_, document)| document.stored.is_some()) {
            self.young_bytes += document.stored_bytes();
            self.young.insert(id, document);
            if self.young_bytes > MAX_YOUNG_BYTES {
                self.old = std::mem::take(&mut self.young);
                self.young_bytes = 0;
            }
        }
    }
}

impl<V: View> Default for Cache<V> {
    fn default() -> Self {
        Self { young: HashMap::new(), young_bytes: 0, old: HashMap::new() }
    }
}

impl<D> LoadedDocument<D> {
    fn stored_bytes(&self) -> usize {
        self.stored.as_ref().map_or(0, |stored| stored.document.as_bytes().len())
    }
}

impl Stored {
    fn new(document: RawDocumentBuf, is_hashed: bool) -> bson::error::Result<Self> {
        let digest = if is_hashed { Digest::of(&document)? } else { Digest::default() };
        Ok(Self { document, digest })
    }
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use bson::rawdoc;
    use domain::{Event, product};
    use serde::{Deserialize, Serialize};
    use views::Query;

    use super::*;

    /// Counts pieces, in the document of the aggregate and in `total`, which holds 10 at most.
    struct Pieces;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Count {
        #[serde(rename = "_id")]
        id: String,
        pieces: i64,
    }

    impl View for Pieces {
        const NAME: &'static str = "pieces";
        const VERSION: i32 = 1;
        type Document = Count;
        const AGGREGATES: &'static [&'static str] = &["product"];

        fn document_ids(event: &Recorded) -> Vec<String> {
            vec![event.id.to_string(), "total".to_owned()]
        }

        fn evolve(document: Option<Count>, id: &str, event: &Recorded) -> Result<Option<Count>, Inapplicable> {
            let Event::Product(product::Event::Restocked(product::Restocked { quantity, .. })) = event.event else {
                return Ok(None);
            };
            let pieces = document.map_or(0, |count| count.pieces) + quantity;
            match id {
                "total" if pieces > 10 => Err(Inapplicable("more than 10".to_owned())),
                _ => Ok(Some(Count { id: id.to_owned(), pieces })),
            }
        }

        const QUERIES: &'static [Query] = &[];
    }

    const ID: &str = "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001";

    fn event(event: product::Event) -> Recorded {
        Recorded {
            position: 1,
            at: "2026-01-31T09:30:00Z".parse().unwrap(),
            id: ID.parse().unwrap(),
            version: 1,
            event: Event::Product(event),
        }
    }

    fn restocked(quantity: i64) -> Recorded {
        event(product::Event::Restocked(product::Restocked { quantity, stock: 0 }))
    }

    fn apply(fold: &mut Fold<Pieces>, event: &Recorded) -> Result<(), Inapplicable> {
        fold.apply(event, &Pieces::document_ids(event))
    }

    fn sealed(fold: &mut Fold<Pieces>) -> Vec<DocumentWrite> {
        let mut writes = fold.seal().unwrap();
        writes.sort_by_key(|write| format!("{write:?}"));
        writes
    }

    fn between(id: &str, before: Option<i64>, after: Option<i64>) -> DocumentWrite {
        let document = |pieces: i64| rawdoc! { "_id": id, "pieces": pieces };
        DocumentWrite::between(id, before.map(document).as_deref(), after.map(document).as_deref()).unwrap().unwrap()
    }

    #[test]
    fn the_events_of_a_batch_make_one_write_for_each_document() {
        let mut fold = Fold::new(Some(Digest::default()));
        fold.load(rawdoc! { "_id": "total", "pieces": 1_i64 }).unwrap();
        apply(&mut fold, &restocked(2)).unwrap();
        apply(&mut fold, &restocked(3)).unwrap();
        assert!(fold.has_changed());
        assert_eq!(sealed(&mut fold), [between(ID, None, Some(5)), between("total", Some(1), Some(6))]);
    }

    #[test]
    fn the_next_batch_sees_the_batch_that_is_still_being_written() {
        let mut fold = Fold::new(Some(Digest::default()));
        apply(&mut fold, &restocked(2)).unwrap();
        fold.seal().unwrap();
        assert_eq!(fold.missing(&[ID.to_owned(), "total".to_owned()]).count(), 0);
        apply(&mut fold, &restocked(3)).unwrap();
        fold.mark_written();
        assert_eq!(sealed(&mut fold), [between(ID, Some(2), Some(5)), between("total", Some(2), Some(5))]);
        fold.mark_written();
        apply(&mut fold, &event(product::Event::Deleted(product::Deleted {}))).unwrap();
        assert_eq!(sealed(&mut fold), [between(ID, Some(5), None), between("total", Some(5), None)]);
    }

    #[test]
    fn an_event_is_applied_to_all_of_its_documents_or_to_none() {
        let mut fold = Fold::new(Some(Digest::default()));
        apply(&mut fold, &restocked(9)).unwrap();
        apply(&mut fold, &restocked(2)).unwrap_err();
        assert_eq!(sealed(&mut fold), [between(ID, None, Some(9)), between("total", None, Some(9))]);
    }

    #[test]
    fn a_document_that_does_not_change_is_not_written() {
        let mut fold = Fold::new(Some(Digest::default()));
        fold.load(rawdoc! { "_id": "total", "pieces": 1_i64 }).unwrap();
        fold.load(rawdoc! { "_id": ID, "pieces": 1_i64 }).unwrap();
        apply(&mut fold, &restocked(0)).unwrap();
        assert!(!fold.has_changed());
        assert_eq!(sealed(&mut fold), []);
    }

    #[test]
    fn the_digest_is_that_of_the_stored_documents() {
        let digest = |documents: &[RawDocumentBuf]| {
            let mut digest = Digest::default();
            documents.iter().for_each(|document| digest += Digest::of(document).unwrap());
            Some(digest)
        };
        let of = |id: &str, pieces: i64| rawdoc! { "_id": id, "pieces": pieces };
        let mut fold = Fold::new(digest(&[of("total", 1), of("other", 3)]));
        fold.load(of("total", 1)).unwrap();
        apply(&mut fold, &restocked(2)).unwrap();
        fold.seal().unwrap();
        assert_eq!(fold.digest(), digest(&[of("total", 3), of("other", 3), of(ID, 2)]));
        // Before the batch is written, as well as after.
        apply(&mut fold, &restocked(3)).unwrap();
        assert_eq!(fold.digest(), digest(&[of("total", 3), of("other", 3), of(ID, 2)]));
        fold.mark_written();
        fold.seal().unwrap();
        assert_eq!(fold.digest(), digest(&[of("total", 6), of("other", 3), of(ID, 5)]));
        fold.mark_written();
        apply(&mut fold, &event(product::Event::Deleted(product::Deleted {}))).unwrap();
        fold.seal().unwrap();
        assert_eq!(fold.digest(), digest(&[of("other", 3)]));
    }

    #[test]
    fn an_unknown_digest_stays_unknown() {
        let mut fold = Fold::new(None);
        fold.load(rawdoc! { "_id": "total", "pieces": 1_i64 }).unwrap();
        apply(&mut fold, &restocked(2)).unwrap();
        assert_eq!(fold.seal().unwrap().len(), 2);
        assert_eq!(fold.digest(), None);
    }

    /// Somebody has changed a document by hand. The service may write over that, but the digest keeps the difference.
    #[test]
    fn the_digest_shows_a_document_that_somebody_else_changed() {
        let (fold, changed) = [1_i64, 2]
            .map(|pieces| {
                let mut fold = Fold::new(Some(Digest::of(&rawdoc! { "_id": "total", "pieces": 1_i64 }).unwrap()));
                fold.load(rawdoc! { "_id": "total", "pieces": pieces }).unwrap();
                apply(&mut fold, &event(product::Event::Deleted(product::Deleted {}))).unwrap();
                fold.seal().unwrap();
                fold.digest()
            })
            .into();
        assert_eq!(fold, Some(Digest::default()));
        assert_ne!(changed, fold);
    }

    #[test]
    fn documents_of_earlier_batches_are_cached_as_they_were_written() {
        let mut fold = Fold::new(Some(Digest::default()));
        apply(&mut fold, &restocked(2)).unwrap();
        for _ in 0..3 {
            fold.seal().unwrap();
            fold.mark_written();
        }
        assert_eq!(fold.missing(&[ID.to_owned(), "total".to_owned()]).count(), 0);
        apply(&mut fold, &restocked(3)).unwrap();
        assert_eq!(sealed(&mut fold), [between(ID, Some(2), Some(5)), between("total", Some(2), Some(5))]);
    }

    #[test]
    fn the_cache_is_bounded_and_a_document_that_is_used_stays() {
        let mut fold = Fold::<Pieces>::new(Some(Digest::default()));
        let large = |id: &str| {
            rawdoc! { "_id": id, "pieces": 1_i64, "padding": "x".repeat(MAX_YOUNG_BYTES / 10) }
        };
        fold.load(large("total")).unwrap();
        for n in 0..100 {
            fold.load(large(&n.to_string())).unwrap();
            // Every batch uses this one again, as it would the sums of a day.
            fold.assume_absent(&["total".to_owned()]);
            fold.seal().unwrap();
            fold.mark_written();
        }
        let cached = (0..100).filter(|n| fold.missing(&[n.to_string()]).count() == 0).count();
        assert!((10..=22).contains(&cached), "{cached}");
        assert_eq!(fold.missing(&["total".to_owned(), "99".to_owned()]).count(), 0);
    }

    #[test]
    fn a_document_that_is_assumed_absent_is_not_loaded() {
        let mut fold = Fold::<Pieces>::new(Some(Digest::default()));
        fold.assume_absent(&[ID.to_owned()]);
        assert_eq!(fold.missing(&[ID.to_owned()]).count(), 0);
        assert_eq!(sealed(&mut fold), []);
    }
}
