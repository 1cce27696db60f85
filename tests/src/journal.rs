//! Reads the journal, and folds it into the documents that the views must hold.

use std::{collections::BTreeMap, time::Duration};

use bson::Document;
use domain::{Event, Id, Recorded, Timestamp};
use futures_util::TryStreamExt;
use tokio::time::{Instant, sleep};
use views::{View, Visitor, layout};

use crate::{System, eventually};

/// How long PostgreSQL may take to vacuum a journal.
const VACUUM_TIMEOUT: Duration = Duration::from_secs(1800);
/// The tables of the journal's database. Vacuuming the whole database would include the catalogs.
const TABLES: &str = "select string_agg(relid::regclass::text, ', ') from pg_stat_user_tables";

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

/// The documents that the views must hold after the events.
pub fn fold(events: &[Recorded]) -> Documents {
    struct Fold<'a> {
        events: &'a [Recorded],
        documents: Documents,
    }

    impl Visitor for Fold<'_> {
        fn visit<V: View>(&mut self) {
            let mut documents: BTreeMap<String, V::Document> = BTreeMap::new();
            for event in self.events {
                for id in views::document_ids::<V>(event) {
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

/// The documents that the views show.
pub async fn stored(system: &System) -> Documents {
    let database = system.views().await;
    let serving = serving(system).await;
    let mut documents = Documents::new();
    for view in views::names() {
        let Some(collection) = serving.get(view) else { continue };
        let collection = database.collection::<Document>(collection);
        let mut cursor = collection.find(Document::new()).await.unwrap();
        while let Some(document) = cursor.try_next().await.unwrap() {
            documents.insert((view, document.get_str("_id").unwrap().to_owned()), document);
        }
    }
    documents
}

/// The collections of the generations that serve, by view.
pub async fn serving(system: &System) -> BTreeMap<String, String> {
    let generations = system.views().await.collection::<layout::Generations>(layout::VIEWS);
    let found: Vec<_> = generations.find(Document::new()).await.unwrap().try_collect().await.unwrap();
    let serving = |(view, version): (&str, i32)| {
        let number = found.iter().find(|found| found.view == view)?.serving(version)?.number;
        Some((view.to_owned(), layout::collection(view, number)))
    };
    views::versions().into_iter().filter_map(serving).collect()
}

/// The stored checkpoint of each view that serves.
pub async fn checkpoints(system: &System) -> BTreeMap<String, u64> {
    let serving = serving(system).await;
    let checkpoints = system.views().await.collection::<layout::Checkpoint>(layout::CHECKPOINTS);
    let stored: Vec<_> = checkpoints.find(Document::new()).await.unwrap().try_collect().await.unwrap();
    let position = |collection: &str| {
        let found = stored.iter().find(|it| it.collection == collection)?;
        u64::try_from(found.position).ok()
    };
    serving.iter().filter_map(|(view, collection)| Some((view.clone(), position(collection)?))).collect()
}

/// Waits until every view has reached the journal's head.
pub async fn caught_up(system: &System) {
    let head = system.head().await;
    eventually("all views have caught up", async || {
        let there = checkpoints(system).await.values().filter(|position| **position == head).count();
        (there == views::names().len()).then_some(())
    })
    .await;
}

/// Vacuums the journal until none of its tables has a dead row, and none is being vacuumed.
///
/// # Panics
/// If that takes longer than half an hour.
pub async fn vacuumed(system: &System) {
    const PENDING: &str = "select
        (select count(*) from pg_stat_progress_vacuum where datname = current_database())
        + (select coalesce(sum(n_dead_tup), 0)::bigint from pg_stat_user_tables)";
    let journal = system.journal().await;
    let deadline = Instant::now() + VACUUM_TIMEOUT;
    loop {
        // Rows that a running transaction can still see are left to the next vacuum. Without `index_cleanup`, a few
        // dead rows would stay in the indexes, and go on counting as dead.
        let tables = journal.query_one(TABLES, &[]).await.unwrap().get::<_, String>(0);
        journal.batch_execute(&format!("vacuum (analyze, index_cleanup on) {tables}")).await.unwrap();
        let pending: i64 = journal.query_one(PENDING, &[]).await.unwrap().get(0);
        if pending == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{pending} rows are dead, or tables are being vacuumed");
        sleep(Duration::from_millis(100)).await;
    }
}

/// Checks that positions, and the versions of each aggregate, are 1, 2, 3 … without a gap.
///
/// # Panics
/// If they are not.
pub fn check(events: &[Recorded]) {
    let mut versions: BTreeMap<Id, u64> = BTreeMap::new();
    for (position, event) in (1..).zip(events) {
        assert_eq!(event.position, position, "positions have no gap");
        let version = versions.entry(event.id).or_default();
        *version += 1;
        assert_eq!(event.version, *version, "versions of {} have no gap", event.id);
    }
}
