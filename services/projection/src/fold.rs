//! Folds events into documents in memory. The invariant: an event is applied to all the documents that it concerns, or
//! to none; and a document in memory is what the store will hold when the batches up to here are written. Nobody else
//! writes these documents: the commit says so, which demands the checkpoint and the lease.

use std::collections::HashMap;

use bson::RawDocumentBuf;
use domain::Recorded;
use views::{Inapplicable, View};

use crate::write::Write;

pub struct Fold<V: View> {
    /// The documents of the batch that is being folded.
    open: Documents<V>,
    /// Those of the batch that is being written, as that leaves them.
    sealed: Documents<V>,
    /// Those of earlier batches: they are as they are stored.
    kept: Kept<V>,
    changed: bool,
}

/// Documents that may be wanted again, within bounds: those that were used lately stay.
struct Kept<V: View> {
    lately: Documents<V>,
    /// Of `lately`, roughly.
    bytes: usize,
    before: Documents<V>,
}

/// Bytes of documents that are kept lately, as they are stored. In memory they are several times as large.
const KEPT_BYTES: usize = 512 << 10;

type Documents<V> = HashMap<String, Held<<V as View>::Document>>;

struct Held<D> {
    stored: Option<RawDocumentBuf>,
    document: Option<D>,
    changed: bool,
}

impl<V: View> Default for Fold<V> {
    fn default() -> Self {
        Self { open: HashMap::new(), sealed: HashMap::new(), kept: Kept::default(), changed: false }
    }
}

impl<V: View> Fold<V> {
    /// Those of the identifiers whose documents are not in memory.
    pub fn missing<'a>(&self, ids: &'a [String]) -> impl Iterator<Item = &'a str> {
        let Self { open, sealed, kept, .. } = self;
        let is_here = |id| open.contains_key(id) || sealed.contains_key(id) || kept.has(id);
        ids.iter().map(String::as_str).filter(move |id| !is_here(*id))
    }

    /// Takes it that those of the documents which are not in memory are not in the store either.
    pub fn begin(&mut self, ids: &[String]) {
        for id in ids {
            self.held(id);
        }
    }

    /// Takes a document as it is stored.
    ///
    /// # Errors
    /// If it is not a document of the view.
    pub fn load(&mut self, stored: RawDocumentBuf) -> bson::error::Result<()> {
        let id = stored.get_str("_id")?.to_owned();
        let document = bson::deserialize_from_slice(stored.as_bytes())?;
        self.open.insert(id, Held { stored: Some(stored), document: Some(document), changed: false });
        Ok(())
    }

    /// Applies an event to the documents that it concerns. One that is not in memory is not in the store either.
    ///
    /// # Errors
    /// If it cannot be applied to one of them; then it is applied to none.
    pub fn apply(&mut self, event: &Recorded, ids: &[String]) -> Result<(), Inapplicable> {
        let mut evolved = Vec::with_capacity(ids.len());
        for id in ids {
            let before = self.held(id).document.clone();
            evolved.push(V::evolve(before, id, event)?);
        }
        for (id, document) in ids.iter().zip(evolved) {
            let held = self.held(id);
            if held.document != document {
                held.document = document;
                held.changed = true;
                self.changed = true;
            }
        }
        Ok(())
    }

    /// How many documents the batch has so far.
    pub fn documents(&self) -> usize {
        self.open.len()
    }

    /// Whether a document has changed since the last batch was sealed.
    pub fn has_changed(&self) -> bool {
        self.changed
    }

    /// Ends the batch, and says what is to be written. Its documents stay in memory until it is.
    ///
    /// # Errors
    /// If a document has no BSON form.
    pub fn seal(&mut self) -> bson::error::Result<Vec<Write>> {
        let mut changed: Vec<_> = self.open.iter_mut().filter(|(_, held)| held.changed).collect();
        // Neighbours in the collection lie together in its files.
        changed.sort_unstable_by_key(|(id, _)| *id);
        let mut writes = Vec::with_capacity(changed.len());
        for (id, held) in changed {
            let after = held.document.as_ref().map(bson::serialize_to_raw_document_buf).transpose()?;
            writes.extend(Write::between(id, held.stored.as_deref(), after.as_deref())?);
            held.stored = after;
            held.changed = false;
        }
        self.sealed = std::mem::take(&mut self.open);
        self.changed = false;
        Ok(writes)
    }

    /// Takes it that the batch that was ended last is written.
    pub fn written(&mut self) {
        self.kept.keep(std::mem::take(&mut self.sealed));
    }

    fn held(&mut self, id: &str) -> &mut Held<V::Document> {
        let Self { open, sealed, kept, .. } = self;
        let none = Held { stored: None, document: None, changed: false };
        open.entry(id.to_owned()).or_insert_with(|| sealed.remove(id).or_else(|| kept.take(id)).unwrap_or(none))
    }
}

impl<V: View> Kept<V> {
    fn has(&self, id: &str) -> bool {
        self.lately.contains_key(id) || self.before.contains_key(id)
    }

    fn take(&mut self, id: &str) -> Option<Held<V::Document>> {
        if let Some(held) = self.lately.remove(id) {
            self.bytes -= held.bytes();
            return Some(held);
        }
        self.before.remove(id)
    }

    fn keep(&mut self, documents: Documents<V>) {
        // Where there is none, there is nothing to keep.
        for (id, held) in documents.into_iter().filter(|(_, held)| held.stored.is_some()) {
            self.bytes += held.bytes();
            self.lately.insert(id, held);
            if self.bytes > KEPT_BYTES {
                self.before = std::mem::take(&mut self.lately);
                self.bytes = 0;
            }
        }
    }
}

impl<V: View> Default for Kept<V> {
    fn default() -> Self {
        Self { lately: HashMap::new(), bytes: 0, before: HashMap::new() }
    }
}

impl<D> Held<D> {
    fn bytes(&self) -> usize {
        self.stored.as_ref().map_or(0, |stored| stored.as_bytes().len())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bson::{Document, rawdoc};
    use domain::{Event, product};
    use serde::{Deserialize, Serialize};
    use views::Query;

    use super::*;

    /// Counts pieces: into the document of the aggregate and, where it is not zero, into `total`, which holds 10 at most.
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
        const BATCH_WINDOW: Duration = Duration::ZERO;
        const AGGREGATES: &'static [&'static str] = &["product"];

        fn creates_document(_: &Recorded) -> bool {
            false
        }

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

        fn indexes() -> Vec<Document> {
            vec![]
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

    fn sealed(fold: &mut Fold<Pieces>) -> Vec<Write> {
        let mut writes = fold.seal().unwrap();
        writes.sort_by_key(|write| format!("{write:?}"));
        writes
    }

    fn between(id: &str, before: Option<i64>, after: Option<i64>) -> Write {
        let document = |pieces: i64| rawdoc! { "_id": id, "pieces": pieces };
        Write::between(id, before.map(document).as_deref(), after.map(document).as_deref()).unwrap().unwrap()
    }

    #[test]
    fn events_of_a_batch_make_one_write_each_document() {
        let mut fold = Fold::default();
        fold.load(rawdoc! { "_id": "total", "pieces": 1_i64 }).unwrap();
        apply(&mut fold, &restocked(2)).unwrap();
        apply(&mut fold, &restocked(3)).unwrap();
        assert!(fold.has_changed());
        assert_eq!(sealed(&mut fold), [between(ID, None, Some(5)), between("total", Some(1), Some(6))]);
    }

    #[test]
    fn the_next_batch_sees_what_is_still_being_written() {
        let mut fold = Fold::default();
        apply(&mut fold, &restocked(2)).unwrap();
        fold.seal().unwrap();
        assert_eq!(fold.missing(&[ID.to_owned(), "total".to_owned()]).count(), 0);
        apply(&mut fold, &restocked(3)).unwrap();
        fold.written();
        assert_eq!(sealed(&mut fold), [between(ID, Some(2), Some(5)), between("total", Some(2), Some(5))]);
        fold.written();
        apply(&mut fold, &event(product::Event::Deleted(product::Deleted {}))).unwrap();
        assert_eq!(sealed(&mut fold), [between(ID, Some(5), None), between("total", Some(5), None)]);
    }

    #[test]
    fn an_event_is_applied_to_all_of_its_documents_or_to_none() {
        let mut fold = Fold::default();
        apply(&mut fold, &restocked(9)).unwrap();
        apply(&mut fold, &restocked(2)).unwrap_err();
        assert_eq!(sealed(&mut fold), [between(ID, None, Some(9)), between("total", None, Some(9))]);
    }

    #[test]
    fn what_does_not_change_is_not_written() {
        let mut fold = Fold::default();
        fold.load(rawdoc! { "_id": "total", "pieces": 1_i64 }).unwrap();
        fold.load(rawdoc! { "_id": ID, "pieces": 1_i64 }).unwrap();
        apply(&mut fold, &restocked(0)).unwrap();
        assert!(!fold.has_changed());
        assert_eq!(sealed(&mut fold), []);
    }

    #[test]
    fn documents_of_earlier_batches_stay_as_they_were_written() {
        let mut fold = Fold::default();
        apply(&mut fold, &restocked(2)).unwrap();
        for _ in 0..3 {
            fold.seal().unwrap();
            fold.written();
        }
        assert_eq!(fold.missing(&[ID.to_owned(), "total".to_owned()]).count(), 0);
        apply(&mut fold, &restocked(3)).unwrap();
        assert_eq!(sealed(&mut fold), [between(ID, Some(2), Some(5)), between("total", Some(2), Some(5))]);
    }

    #[test]
    fn what_is_kept_is_bounded_and_what_was_used_lately_stays() {
        let mut fold = Fold::<Pieces>::default();
        let large = |id: &str| {
            rawdoc! { "_id": id, "pieces": 1_i64, "padding": "x".repeat(KEPT_BYTES / 10) }
        };
        fold.load(large("total")).unwrap();
        for n in 0..100 {
            fold.load(large(&n.to_string())).unwrap();
            // In use again, as the document of a day is.
            fold.begin(&["total".to_owned()]);
            fold.seal().unwrap();
            fold.written();
        }
        let kept = (0..100).filter(|n| fold.missing(&[n.to_string()]).count() == 0).count();
        assert!((10..=22).contains(&kept), "{kept}");
        assert_eq!(fold.missing(&["total".to_owned(), "99".to_owned()]).count(), 0);
    }

    #[test]
    fn what_an_event_begins_is_not_looked_for() {
        let mut fold = Fold::<Pieces>::default();
        fold.begin(&[ID.to_owned()]);
        assert_eq!(fold.missing(&[ID.to_owned()]).count(), 0);
        assert_eq!(sealed(&mut fold), []);
    }
}
