//! Digests: they follow from the events alone, and what was changed behind the service's back is found and named.

use std::{collections::BTreeMap, time::Duration};

use bson::{Document, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use mongodb::Database;
use projection_service::comparison::{
    Comparison, ComparisonError, DifferenceKind, DocumentDifference, FieldDifference, Snapshot, Values,
};
use serde_json::json;
use tests::{Replica, System, eventually, journal};
use views::{
    Digest,
    layout::{self, Checkpoint},
};

use crate::load::mixed_load;

/// Short leases, so that a takeover does not make the test long.
const SHORT: [&str; 2] = ["--lease-ms", "1000"];
/// More documents than are read at once.
const MANY: usize = 2_500;

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_batches_and_takeovers_digests_follow_from_the_events_alone() {
    let system = System::new().await;
    let _command = system.command().await;
    let chaos = async {
        let _bystander = system.start_projection(&SHORT);
        // Different at each round: in the middle of reading, folding, writing.
        for pause in [700, 1600, 300, 2100] {
            let projection = system.process("projection", &[&SHORT[..], &["--batch-events", "7"]].concat());
            tokio::time::sleep(Duration::from_millis(pause)).await;
            projection.kill();
        }
    };
    tokio::join!(mixed_load(&system, 16, 100), chaos);
    let _projection = system.start_projection(&SHORT);
    journal::caught_up(&system).await;
    let views = system.views().await;
    let digests = checkpoint_digests(&views).await;
    assert_eq!(digests.len(), views::names().len());
    for (collection, digest) in &digests {
        assert_ne!(*digest, Some(Digest::default()), "{collection}");
        assert_eq!(*digest, Some(computed(&views, collection).await), "{collection}");
    }
    let operator = system.connect_as("NATS_OPERATOR_URL").await;
    let show = operator.request("ops.view.show", json!({"view": "orders"}).to_string());
    let shown = show.as_given().reply().await.unwrap().body;
    assert_eq!(shown["digest"], json!(digests["orders@1"]));

    // Built anew from the first event, elsewhere and in other batches.
    let (elsewhere, _projection) = built_elsewhere(&system).await;
    assert_eq!(checkpoint_digests(&elsewhere).await, digests);
    for collection in digests.keys() {
        let comparison = compare(&views, collection, &elsewhere, collection).await;
        assert!(comparison.is_equal(), "{comparison:?}");
        assert_eq!(Some(comparison.a.digest), digests[collection]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_that_was_changed_by_hand_is_named_while_the_view_goes_on() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.start_projection(&SHORT));
    let (user, product) = (system.user().await.id, system.product(1_000).await.id);
    let order = json!({"user": user, "lines": [{"product": product, "quantity": 1}]});
    let mut orders = Vec::new();
    for _ in 0..3 {
        orders.push(system.accept("order.create", order.clone()).await.id.to_string());
    }
    journal::caught_up(&system).await;
    let (elsewhere, projection) = built_elsewhere(&system).await;
    projection.stop().await;

    let views = system.views().await;
    let stored = views.collection::<Document>("orders@1");
    let change = doc! {"$set": {"lines.0.name": "White metal lanterm"}};
    assert_eq!(stored.update_one(doc! {"_id": &orders[1]}, change).await.unwrap().modified_count, 1);
    // The one that serves is read as it was at this moment, and is written meanwhile.
    let snapshot = Snapshot::open(&views, "orders@1").await.unwrap();
    let position = snapshot.checkpoint.position;
    system.accept("order.create", order).await;
    system.accept("order.pay", json!({"id": orders[0]})).await;
    journal::caught_up(&system).await;

    let comparison = snapshot.compare_with(Snapshot::open(&elsewhere, "orders@1").await.unwrap(), Values::Shown).await;
    let Comparison { position: compared, a, b, different, differences } = comparison.unwrap();
    assert_eq!((compared, a.documents, b.documents, different), (position, 3, 3, 1));
    let name = FieldDifference {
        field: "lines.0.name".to_owned(),
        a: Some("White metal lanterm".into()),
        b: Some("White metal lantern".into()),
    };
    assert_eq!(
        differences,
        [DocumentDifference { id: orders[1].clone(), kind: DifferenceKind::Differs, fields: vec![name] }]
    );
    assert_ne!(a.digest, b.digest);
    assert_eq!((a.checkpoint_digest, b.checkpoint_digest), (Some(b.digest), Some(b.digest)));

    let behind = Snapshot::open(&views, "orders@1").await.unwrap();
    let refused = behind.compare_with(Snapshot::open(&elsewhere, "orders@1").await.unwrap(), Values::Hidden).await;
    assert!(matches!(refused, Err(ComparisonError::Positions { .. })), "{refused:?}");
    let missing = Snapshot::open(&views, "orders@2").await;
    assert!(matches!(missing, Err(ComparisonError::NoCheckpoint(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_are_missing_added_or_changed_are_named_and_reordered_fields_are_not() {
    let system = System::new().await;
    let views = system.views().await;
    let digest = fill(&views, "orders@8").await;
    assert_eq!(fill(&views, "orders@9").await, digest);
    let equal = compare(&views, "orders@8", &views, "orders@9").await;
    assert!(equal.is_equal(), "{equal:?}");
    assert_eq!((equal.a.documents, equal.a.digest), (MANY as u64, digest));

    let changed = views.collection::<Document>("orders@8");
    changed.delete_one(doc! {"_id": "000000"}).await.unwrap();
    changed.delete_one(doc! {"_id": "002499"}).await.unwrap();
    changed.insert_one(doc! {"_id": "001000a", "n": 1}).await.unwrap();
    // As `mongosh` would, without an identifier.
    let strange = changed.insert_one(doc! {"n": 1}).await.unwrap().inserted_id.as_object_id().unwrap();
    changed.update_one(doc! {"_id": "001500"}, doc! {"$set": {"n": 1_500_i64}}).await.unwrap();
    changed
        .replace_one(doc! {"_id": "001600"}, doc! {"total": {"currency": "GBP", "amount": 5}, "n": 1_600})
        .await
        .unwrap();
    let comparison = compare(&views, "orders@8", &views, "orders@9").await;
    assert!(!comparison.is_equal());
    let found: Vec<_> = comparison
        .differences
        .iter()
        .map(|it| (&*it.id, it.kind, it.fields.iter().map(|field| &*field.field).collect::<Vec<_>>()))
        .collect();
    let strange = json!({"$oid": strange.to_hex()}).to_string();
    let expected = [
        ("000000", DifferenceKind::OnlyInB, vec![]),
        ("001000a", DifferenceKind::OnlyInA, vec![]),
        ("001500", DifferenceKind::Differs, vec!["n"]),
        (&strange, DifferenceKind::OnlyInA, vec![]),
        ("002499", DifferenceKind::OnlyInB, vec![]),
    ];
    assert_eq!(found, expected);
    assert_eq!((comparison.different, comparison.b.digest), (5, digest));
    assert_eq!(comparison.a.digest, computed(&views, "orders@8").await);
}

/// A projection of the same events into another database, which has caught up.
async fn built_elsewhere(system: &System) -> (Database, Replica) {
    let name = format!("{}_elsewhere", system.prefix);
    let elsewhere = system.views().await.client().database(&name);
    let replica = system.start_projection(&["--database", &name]);
    let head = i64::try_from(system.head().await).unwrap();
    eventually("the views are built elsewhere", async || {
        let checkpoints = checkpoints(&elsewhere).await;
        let there = checkpoints.iter().filter(|checkpoint| checkpoint.position == head).count();
        (there == views::names().len()).then_some(())
    })
    .await;
    (elsewhere, replica)
}

async fn compare(database_a: &Database, a: &str, database_b: &Database, b: &str) -> Comparison {
    let (a, b) = (Snapshot::open(database_a, a).await.unwrap(), Snapshot::open(database_b, b).await.unwrap());
    a.compare_with(b, Values::Hidden).await.unwrap()
}

async fn checkpoints(database: &Database) -> Vec<Checkpoint> {
    let checkpoints = database.collection::<Checkpoint>(layout::CHECKPOINTS);
    checkpoints.find(doc! {}).await.unwrap().try_collect().await.unwrap()
}

async fn checkpoint_digests(database: &Database) -> BTreeMap<String, Option<Digest>> {
    checkpoints(database).await.into_iter().map(|checkpoint| (checkpoint.collection, checkpoint.digest)).collect()
}

/// The digest of the stored documents.
async fn computed(database: &Database, collection: &str) -> Digest {
    let mut documents = database.collection::<RawDocumentBuf>(collection).find(doc! {}).await.unwrap();
    let mut digest = Digest::default();
    while let Some(document) = documents.try_next().await.unwrap() {
        digest += Digest::of(&document).unwrap();
    }
    digest
}

/// Makes a generation of many documents, and returns its digest.
async fn fill(database: &Database, collection: &str) -> Digest {
    let document = |n: usize| doc! {"_id": format!("{n:06}"), "n": i32::try_from(n).unwrap(), "total": {"amount": 5, "currency": "GBP"}};
    database.collection(collection).insert_many((0..MANY).map(document)).await.unwrap();
    let digest = computed(database, collection).await;
    let checkpoint = Checkpoint {
        collection: collection.to_owned(),
        position: 7,
        version: 1,
        term: 1,
        journal: None,
        digest: Some(digest),
        branch: None,
        event: None,
        rate: None,
    };
    database.collection(layout::CHECKPOINTS).insert_one(checkpoint).await.unwrap();
    digest
}
