//! The journal as the tests read it, and what the views must be: a plain fold of it.

use std::collections::BTreeMap;

use bson::Document;
use domain::{Event, Id, Recorded, Timestamp};
use futures_util::TryStreamExt;
use views::{View, Visitor, layout};

use crate::{System, eventually};

/// The events of the journal, in order.
pub async fn events(system: &System) -> Vec<Recorded> {
    let statement = "select position, (extract(epoch from at) * 1000)::bigint, id, version, aggregate, type, schema, \
        payload::text from events order by position";
    let rows = system.journal().await.query(statement, &[]).await.unwrap();
    rows.iter()
        .map(|row| Recorded {
            position: u64::try_from(row.get::<_, i64>(0)).unwrap(),
            at: Timestamp::from_unix_millis(row.get(1)).unwrap(),
            id: Id(row.get(2)),
            version: u64::try_from(row.get::<_, i64>(3)).unwrap(),
            event: Event::decode(row.get(4), row.get(5), row.get(6), row.get::<_, &str>(7).as_bytes()).unwrap(),
        })
        .collect()
}

/// Documents by view and identifier.
pub type Documents = BTreeMap<(&'static str, String), Document>;

/// The documents of all views as they must be after the events.
pub fn fold(events: &[Recorded]) -> Documents {
    struct Fold<'a> {
        events: &'a [Recorded],
        documents: Documents,
    }

    impl Visitor for Fold<'_> {
        fn visit<V: View>(&mut self) {
            let mut documents: BTreeMap<String, V::Document> = BTreeMap::new();
            for event in self.events {
                for id in V::concerns(event) {
                    let before = documents.remove(&id);
                    if let Some(after) = V::evolve(before, &id, event).unwrap() {
                        documents.insert(id, after);
                    }
                }
            }
            for (id, document) in documents {
                let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
                self.documents.insert((V::NAME, id), stored.try_into().unwrap());
            }
        }
    }

    let mut fold = Fold { events, documents: BTreeMap::new() };
    views::visit(&mut fold);
    fold.documents
}

/// The documents of all views as they are stored.
pub async fn stored(system: &System) -> Documents {
    let database = system.views().await;
    let mut documents = Documents::new();
    for view in views::names() {
        let collection = database.collection::<Document>(&layout::collection(view, 1));
        let mut cursor = collection.find(Document::new()).await.unwrap();
        while let Some(document) = cursor.try_next().await.unwrap() {
            documents.insert((view, document.get_str("_id").unwrap().to_owned()), document);
        }
    }
    documents
}

/// How far each view is, as it is stored.
pub async fn checkpoints(system: &System) -> BTreeMap<String, u64> {
    let checkpoints = system.views().await.collection::<layout::Checkpoint>(layout::CHECKPOINTS);
    let stored: Vec<layout::Checkpoint> = checkpoints.find(Document::new()).await.unwrap().try_collect().await.unwrap();
    let view = |collection: &str| collection.split_once('@').map(|(view, _)| view.to_owned()).unwrap();
    stored.iter().map(|it| (view(&it.collection), u64::try_from(it.position).unwrap())).collect()
}

/// Waits until every view has come to the journal's head.
pub async fn caught_up(system: &System) {
    let head = system.head().await;
    eventually("all views have caught up", async || {
        let there = checkpoints(system).await.values().filter(|position| **position == head).count();
        (there == views::names().len()).then_some(())
    })
    .await;
}

/// Checks what the design promises of every journal: positions 1, 2, 3 …, each aggregate's versions 1, 2, 3 ….
///
/// # Panics
/// If that is not so.
pub fn check(events: &[Recorded]) {
    let mut versions: BTreeMap<Id, u64> = BTreeMap::new();
    for (position, event) in (1..).zip(events) {
        assert_eq!(event.position, position, "positions have no gap");
        let version = versions.entry(event.id).or_default();
        *version += 1;
        assert_eq!(event.version, *version, "versions of {} have no gap", event.id);
    }
}
