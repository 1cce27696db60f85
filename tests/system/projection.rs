//! The projection service: the views are a fold of the journal, exactly once, whatever is killed, stopped or doubled.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use async_nats::jetstream;
use bson::{Document, doc};
use domain::product;
use futures_util::{StreamExt, TryStreamExt, future::join_all};
use serde_json::json;
use tests::{Expect, System, eventually, journal, stays};
use tokio::time::Instant;
use views::{View, Visitor, layout};

use crate::load::mixed_load;

/// Short leases, so that a takeover does not make the test long.
const SHORT: [&str; 2] = ["--lease-ms", "1000"];

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_restarted_at_any_time_the_views_are_a_fold_of_the_journal() {
    let system = System::new().await;
    let _command = system.command().await;
    let chaos = async {
        // Different at each round: in the middle of reading, folding, writing.
        for pause in [40, 900, 350, 1700, 80, 1200, 500, 2100] {
            let projection = system.process("projection", &SHORT);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            projection.kill();
        }
    };
    tokio::join!(mixed_load(&system, 16, 120), chaos);
    let _projection = system.start_projection(&SHORT);
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_asleep_cannot_write_any_more() {
    let system = System::new().await;
    let _command = system.command().await;
    mixed_load(&system, 4, 20).await;
    let sleeper = system.process("projection", &SHORT);
    journal::caught_up(&system).await;
    let terms = terms(&system).await;

    sleeper.signal("STOP");
    let load = mixed_load(&system, 4, 60);
    let takeover = async {
        let _second = system.start_projection(&SHORT);
        eventually("the other has taken over", async || {
            let now = self::terms(&system).await;
            now.iter().zip(&terms).all(|(now, before)| now > before).then_some(())
        })
        .await;
        // It wakes up with events in its hands that the other has written already, or is writing.
        sleeper.signal("CONT");
        _second
    };
    let (_, _second) = tokio::join!(load, takeover);
    mixed_load(&system, 4, 40).await;
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_of_one_name_are_told_so_and_work() {
    let system = System::new().await;
    let _command = system.command().await;
    let logs = [1, 2].map(|number| system.stack.directory().join(format!("{}-same-{number}.log", system.prefix)));
    let arguments = [&SHORT[..], &["--replica", "same"]].concat();
    let _replicas = logs.each_ref().map(|log| system.logged_process("projection", &arguments, log));
    let said = || logs.iter().map(|log| std::fs::read_to_string(log).unwrap()).collect::<String>();
    eventually("they say what is wrong", async || said().contains("REPLICA must be unique").then_some(())).await;
    mixed_load(&system, 4, 20).await;
    assert_views_are_journal(&system).await;
    stays("nobody goes on about it", true, async || said().lines().count() <= 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_the_views_and_take_over_from_one_another() {
    let system = System::new().await;
    let _command = system.command().await;
    system.product(1).await;
    let first = system.start_projection(&[&SHORT[..], &["--replica", "first"]].concat());
    let views = views::names().len();
    eventually("one leads all views", async || (holders(&system).await == vec!["first"; views]).then_some(())).await;

    let second = system.start_projection(&[&SHORT[..], &["--replica", "second"]].concat());
    eventually("they share the views", async || {
        let holders = holders(&system).await;
        let led = ["first", "second"].map(|name| holders.iter().filter(|holder| *holder == name).count());
        (led.iter().sum::<usize>() == views && led[0].abs_diff(led[1]) <= 1).then_some(())
    })
    .await;
    assert_views_are_journal(&system).await;

    first.stop().await;
    eventually("the other leads all", async || (holders(&system).await == vec!["second"; views]).then_some(())).await;
    system.product(1).await;
    assert_views_are_journal(&system).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_under_load_never_both_write_a_view() {
    let system = System::new().await;
    let _command = system.command().await;
    let _replicas = [system.start_projection(&SHORT), system.start_projection(&SHORT)];
    // Every write of a checkpoint demands the one before it: were two writing, some event's effect would come twice.
    mixed_load(&system, 16, 100).await;
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_position_is_announced_in_order() {
    let system = System::new().await;
    let _command = system.command().await;
    let mut announced = system.client.nats().subscribe(system.subjects.checkpoint("orders")).await.unwrap();
    system.client.nats().flush().await.unwrap();
    let _projection = system.projection().await;
    // The view of orders is not concerned by any of these, and comes to them all the same.
    for _ in 0..10 {
        system.user().await;
    }
    let mut last = 0;
    while last < 10 {
        let message = tokio::time::timeout(tests::PATIENCE, announced.next()).await.unwrap().unwrap();
        let position: u64 = std::str::from_utf8(&message.payload).unwrap().parse().unwrap();
        assert!(position >= last, "{position} after {last}");
        last = position;
    }
    journal::caught_up(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_applied_stops_its_view_and_no_other_and_no_document_is_harmed() {
    let system = System::new().await;
    let command = system.command().await;
    let (user, product) = (system.user().await.id, system.product(10).await.id);
    let _projection = system.projection().await;
    journal::caught_up(&system).await;
    // As if a later version of the service had recorded something that this one does not know.
    command.stop().await;
    let later_version = format!(
        r#"insert into events (position, aggregate, id, version, type, schema, payload, at)
            values (3, 'product', '{product}', 2, 'restocked', 99, '{{"quantity": 5, "stock": 15}}', now());
        update aggregates set version = 2 where id = '{product}';
        update journal_head set position = 3"#
    );
    system.journal().await.batch_execute(&later_version).await.unwrap();
    let _command = system.command().await;
    system.accept("user.update", json!({"id": user, "name": "Grace Hopper"})).await;

    let of_products = views_of(product::KIND);
    let expected: BTreeMap<String, u64> = views::names()
        .into_iter()
        .map(|view| (view.to_owned(), if of_products.contains(view) { 2 } else { 4 }))
        .collect();
    eventually("the others go on", async || (journal::checkpoints(&system).await == expected).then_some(())).await;
    stays("nothing behind it is applied", expected, async || journal::checkpoints(&system).await).await;
    let products = system.views().await.collection::<Document>(&layout::collection("products", 1));
    assert_eq!(products.find_one(doc! {}).await.unwrap().unwrap().get_i64("stock").unwrap(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_cannot_be_written_takes_no_other_view_with_it() {
    let system = System::new().await;
    let _command = system.command().await;
    let (user, product) = (system.user().await.id, system.product(1_000).await.id);
    let _projection = system.projection().await;
    journal::caught_up(&system).await;
    // Somebody has a hand in the view's documents, while the projection service believes that it has this one in
    // memory.
    let products = system.views().await.collection::<Document>(&layout::collection("products", 1));
    assert_eq!(products.delete_one(doc! { "_id": product.to_string() }).await.unwrap().deleted_count, 1);
    let order = json!({"user": user, "lines": [{"product": product, "quantity": 1}]});
    // Together, so that the batches of all views share transactions.
    join_all((0..20).map(|_| system.accept("order.create", order.clone()))).await;

    // An order is placed at 3, and takes from the product at 4.
    let head = system.head().await;
    let mut expected: BTreeMap<String, u64> = views::names().into_iter().map(|view| (view.to_owned(), head)).collect();
    expected.insert("products".to_owned(), 3);
    eventually("the others go on", async || (journal::checkpoints(&system).await == expected).then_some(())).await;
    stays("nothing is written to it", expected, async || journal::checkpoints(&system).await).await;
    assert_eq!(products.count_documents(doc! {}).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_somebody_deletes_is_made_anew() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.projection().await);
    system.user().await;
    journal::caught_up(&system).await;
    let stream = jetstream::new(system.operator().await).get_stream(system.stream()).await.unwrap();
    let consumers: Vec<String> = stream.consumer_names().try_collect().await.unwrap();
    assert_eq!(consumers.len(), 1, "the views read together");
    stream.delete_consumer(&consumers[0]).await.unwrap();
    system.user().await;
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_document_holds_its_own_view_up_which_reads_by_itself_until_it_goes_on() {
    let (system, _services) = System::complete().await;
    let (user, product) = (system.user().await.id, system.product(1_000).await.id);
    journal::caught_up(&system).await;
    let streams = jetstream::new(system.operator().await);
    let readers = async || streams.get_stream(system.stream()).await.unwrap().cached_info().state.consumer_count;
    // In somebody else's transaction.
    let views = system.views().await;
    let mut other = views.client().start_session().await.unwrap();
    other.start_transaction().await.unwrap();
    let products = views.collection::<Document>(&layout::collection("products", 1));
    let lock = products.update_one(doc! {"_id": product.to_string()}, doc! {"$set": {"name": "Mine"}});
    assert_eq!(lock.session(&mut other).await.unwrap().modified_count, 1);

    let order = json!({"user": user, "lines": [{"product": product, "quantity": 1}]});
    let placed = system.accept("order.create", order.clone()).await;
    let shown = system.read("order.get", json!({"id": placed.id}), placed.position).await.data();
    assert_eq!(shown["status"], "placed");
    let head = system.head().await;
    let is_behind = async || journal::checkpoints(&system).await["products"] < head;
    stays("its own view is held up", true, is_behind).await;

    other.abort_transaction().await.unwrap();
    assert_views_are_journal(&system).await;
    eventually("the view reads by itself", async || (readers().await == 2).then_some(())).await;
    system.accept("order.create", order).await;
    eventually("it reads with the others", async || (readers().await == 1).then_some(())).await;
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_and_stocks_of_a_busy_shop_are_gathered() {
    const GATHERED: Duration = Duration::from_millis(100);

    let system = System::new().await;
    let _command = system.command().await;
    let (user, product) = (system.user().await.id, system.product(1_000).await.id);
    let _projection = system.projection().await;
    journal::caught_up(&system).await;
    let mut announced = system.client.nats().subscribe(system.subjects.checkpoint("products")).await.unwrap();
    system.client.nats().flush().await.unwrap();

    let began = Instant::now();
    let order = json!({"user": user, "lines": [{"product": product, "quantity": 1}]});
    for _ in 0..200 {
        system.accept("order.create", order.clone()).await;
    }
    let head = system.head().await.to_string();
    let mut announcements = 0;
    loop {
        let message = tokio::time::timeout(tests::PATIENCE, announced.next()).await.unwrap().unwrap();
        announcements += 1;
        if message.payload == head.as_bytes() {
            break;
        }
    }
    // Each time one for what changes nothing, up to the event that does, and one for what was gathered.
    let windows = began.elapsed().as_millis() / GATHERED.as_millis() + 1;
    assert!(announcements <= 2 * windows, "{announcements} announcements in {windows} times {GATHERED:?}");
    assert_views_are_journal(&system).await;
}

/// Waits until the views have caught up, and compares every document.
pub async fn assert_views_are_journal(system: &System) {
    journal::caught_up(system).await;
    let expected = journal::fold(&journal::events(system).await);
    let stored = journal::stored(system).await;
    assert_eq!(stored.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (key, document) in &expected {
        assert_eq!(&stored[key], document, "{key:?}");
    }
}

pub async fn terms(system: &System) -> Vec<i64> {
    checkpoints(system).await.iter().map(|checkpoint| checkpoint.term).collect()
}

/// The views that are built from events of this kind of aggregate.
fn views_of(kind: &'static str) -> BTreeSet<&'static str> {
    struct Of(&'static str, BTreeSet<&'static str>);

    impl Visitor for Of {
        fn visit<V: View>(&mut self) {
            if V::AGGREGATES.contains(&self.0) {
                self.1.insert(V::NAME);
            }
        }
    }

    let mut of = Of(kind, BTreeSet::new());
    views::visit(&mut of);
    of.1
}

async fn checkpoints(system: &System) -> Vec<layout::Checkpoint> {
    let collection = system.views().await.collection::<layout::Checkpoint>(layout::CHECKPOINTS);
    collection.find(doc! {}).sort(doc! {"_id": 1}).await.unwrap().try_collect().await.unwrap()
}

async fn holders(system: &System) -> Vec<String> {
    let leases = system.views().await.collection::<Document>(layout::LEASES);
    let filter = doc! {"_id": {"$regex": "@"}, "$expr": {"$gt": ["$expires", "$$NOW"]}};
    let leases: Vec<Document> = leases.find(filter).await.unwrap().try_collect().await.unwrap();
    // Behind the replica's name stands its process.
    let name = |lease: &Document| lease.get_str("holder").unwrap().split('/').next().unwrap().to_owned();
    leases.iter().map(name).collect()
}
