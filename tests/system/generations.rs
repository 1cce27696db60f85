//! Generations: a view is built anew beside the one that serves, and takes its place, while nobody notices.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use bson::{Document, doc};
use futures_util::TryStreamExt;
use serde_json::{Value, json};
use tests::{Expect, System, eventually, journal};
use views::layout;

use crate::{load::mixed_load, projection::assert_views_are_journal};

/// Short leases, and what is dropped is dropped soon.
const SHORT: [&str; 2] = ["--lease-ms", "1000"];

#[tokio::test(flavor = "multi_thread")]
async fn a_view_is_rebuilt_under_load_and_returned_to_and_nobody_notices() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.start_projection(&SHORT));
    mixed_load(&system, 8, 60).await;
    journal::caught_up(&system).await;
    let _query = system.query().await;

    let changes = async {
        for view in views::names() {
            let begun = system.operate("view.rebuild", json!({"view": view})).await.unwrap().body;
            assert_eq!((&begun["generation"], &begun["is_new"]), (&json!(2), &json!(true)), "{begun}");
            let again = system.operate("view.rebuild", json!({"view": view})).await.unwrap().body;
            assert_ne!(again["generation"], 1);
        }
        for view in views::names() {
            serves(&system, view, 2).await;
        }
        let states = states(&system, "orders").await;
        assert_eq!((&*states[&1], &*states[&2]), ("previous", "serving"));

        let back = system.operate("view.rollback", json!({"view": "orders"})).await.unwrap().body;
        assert_eq!(back["generation"], 1);
        serves(&system, "orders", 1).await;
        assert_eq!(self::states(&system, "orders").await[&2], "previous");
    };
    while_queried(&system, async { tokio::join!(mixed_load(&system, 8, 120), changes) }).await;
    assert_views_are_journal(&system).await;

    // What serves cannot be dropped, what has served can.
    let refused = system.operate("view.drop", json!({"view": "orders", "generation": 1})).await.failure();
    assert_eq!((refused.status, &*refused.code), (409, "conflict"));
    assert_eq!(system.operate("view.drop", json!({"view": "orders", "generation": 9})).await.code(), "not_found");
    assert_eq!(system.operate("view.rebuild", json!({"view": "nothing"})).await.code(), "not_found");
    system.operate("view.drop", json!({"view": "orders", "generation": 2})).await.unwrap();
    let collection = layout::collection("orders", 2);
    eventually("it is dropped", async || {
        let names = system.views().await.list_collection_names().await.ok()?;
        let is_known = states(&system, "orders").await.contains_key(&2);
        (!is_known && !names.contains(&collection)).then_some(())
    })
    .await;
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_that_served_is_dropped_after_its_time() {
    let system = System::new().await;
    let _command = system.command().await;
    let _projection = system.start_projection(&[&SHORT[..], &["--generation-grace-seconds", "1"]].concat());
    system.product(1).await;
    journal::caught_up(&system).await;
    system.operate("view.rebuild", json!({"view": "products"})).await.unwrap();
    serves(&system, "products", 2).await;
    eventually("the one before is dropped", async || {
        let names = system.views().await.list_collection_names().await.ok()?;
        let is_known = states(&system, "products").await.contains_key(&1);
        (!is_known && !names.contains(&layout::collection("products", 1))).then_some(())
    })
    .await;
    assert_eq!(system.operate("view.rollback", json!({"view": "products"})).await.code(), "not_found");
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_has_dropped_is_named_not_served_and_rebuilt_by_one_operation() {
    let (system, _services) = System::complete().await;
    let product = system.product(7).await;
    system.read("product.get", json!({"id": product.id}), product.position).await.unwrap();
    let views = system.views().await;
    let checkpoints = views.collection::<Document>(layout::CHECKPOINTS);
    for (generation, what) in [(1, "collection"), (2, "checkpoint")] {
        let collection = layout::collection("products", generation);
        match what {
            "collection" => views.collection::<Document>(&collection).drop().await.unwrap(),
            _ => assert_eq!(checkpoints.delete_one(doc! {"_id": &collection}).await.unwrap().deleted_count, 1),
        }
        let refused = eventually("it is not served", async || {
            let reply = system.ask("qry.product.get", json!({"id": product.id}), &[]).await;
            reply.err()?.failure().filter(|failure| failure.code == "unavailable").cloned()
        })
        .await;
        assert!(refused.message.contains(what) && refused.message.contains(&collection), "{}", refused.message);
        // Nothing is built in its place, and events go on.
        let restocked = system.accept("product.restock", json!({"id": product.id, "quantity": 1})).await;
        let problem = eventually("the operator is told", async || {
            let listed = system.operate("view.list", json!({})).await.ok()?.body;
            let listed = listed["views"].as_array()?.iter().find(|view| view["view"] == "products")?.clone();
            Some(listed["problem"].as_str()?.to_owned())
        })
        .await;
        assert!(problem.contains(what) && problem.contains("watershed rebuild products"), "{problem}");
        system.operate("view.rebuild", json!({"view": "products"})).await.unwrap();
        serves(&system, "products", generation + 1).await;
        let shown = eventually("it is served again", async || {
            system.read("product.get", json!({"id": product.id}), restocked.position).await.ok()
        })
        .await;
        assert_eq!(shown.body["stock"], 7 + generation);
    }
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_that_somebody_changed_is_found_by_verifying_and_mended_by_rebuilding() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.start_projection(&SHORT));
    let product = system.product(7).await;
    mixed_load(&system, 4, 20).await;
    journal::caught_up(&system).await;
    for view in views::names() {
        let found = verified(&system, view, false).await;
        assert_eq!((&found["different"], found["differences"].as_array().unwrap().len()), (&json!(0), 0), "{found}");
        assert_eq!(found["a"]["digest"], found["b"]["digest"]);
        assert_eq!(found["a"]["digest"], found["a"]["checkpoint_digest"], "{found}");
    }

    let products = system.views().await.collection::<Document>(&layout::collection("products", 1));
    let changed = doc! {"$set": {"name": "White metal lanterm"}};
    products.update_one(doc! {"_id": product.id.to_string()}, changed).await.unwrap();
    let load = mixed_load(&system, 4, 20);
    let (_, found) = tokio::join!(load, verified(&system, "products", false));
    assert_eq!(found["different"], 1, "{found}");
    let difference = &found["differences"][0];
    assert_eq!((&difference["id"], &difference["kind"]), (&json!(product.id), &json!("differs")));
    assert_eq!(difference["fields"], json!([{"field": "name"}]));
    assert_ne!(found["a"]["digest"], found["a"]["checkpoint_digest"]);
    let shown = verified(&system, "products", true).await;
    let field = &shown["differences"][0]["fields"][0];
    assert_eq!((&field["a"], &field["b"]), (&json!("White metal lanterm"), &json!("White metal lantern")));
    // What was built for it is gone.
    let names = system.views().await.list_collection_names().await.unwrap();
    assert_eq!(names.iter().filter(|name| name.starts_with("products@")).count(), 1, "{names:?}");

    let begun = system.operate("view.rebuild", json!({"view": "products"})).await.unwrap().body;
    serves(&system, "products", i32::try_from(begun["generation"].as_i64().unwrap()).unwrap()).await;
    assert_views_are_journal(&system).await;
    assert_eq!(verified(&system, "products", false).await["different"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_that_differs_does_not_take_the_place_of_the_one_that_serves() {
    let system = System::new().await;
    let (_command, projection) = (system.command().await, system.start_projection(&SHORT));
    let product = system.product(7).await;
    journal::caught_up(&system).await;
    projection.stop().await;
    // As if the view's code had made another document of the same events.
    let views = system.views().await;
    let products = views.collection::<Document>(&layout::collection("products", 1));
    products.update_one(doc! {"_id": product.id.to_string()}, doc! {"$set": {"stock": 8_i64}}).await.unwrap();
    let changed = doc! {"$set": {"digest": "1".repeat(64)}};
    let checkpoints = views.collection::<Document>(layout::CHECKPOINTS);
    checkpoints.update_one(doc! {"_id": "products@1"}, changed).await.unwrap();

    let _projection = system.start_projection(&SHORT);
    system.offers_operations("projection").await;
    system.operate("view.rebuild", json!({"view": "products"})).await.unwrap();
    eventually("it is refused", async || (states(&system, "products").await.get(&2)? == "refused").then_some(())).await;
    let shown = system.operate("view.show", json!({"view": "products"})).await.unwrap().body;
    let refused = shown["generations"].as_array().unwrap().iter().find(|it| it["generation"] == 2).unwrap();
    assert_eq!(refused["comparison"]["differences"][0]["fields"], json!([{"field": "stock"}]), "{refused}");
    // The other goes on.
    system.accept("product.restock", json!({"id": product.id, "quantity": 1})).await;
    journal::caught_up(&system).await;
    assert_eq!(states(&system, "products").await[&1], "serving");
    // The operator decides.
    system.operate("view.rebuild", json!({"view": "products", "force": true})).await.unwrap();
    serves(&system, "products", 3).await;
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_gives_way_too_much_catches_up_all_the_same() {
    let system = System::new().await;
    let _command = system.command().await;
    let _projection = system.start_projection(&[&SHORT[..], &["--build-share", "1"]].concat());
    mixed_load(&system, 8, 60).await;
    journal::caught_up(&system).await;
    system.operate("view.rebuild", json!({"view": "orders"})).await.unwrap();
    let is_over = AtomicBool::new(false);
    let load = async {
        while !is_over.load(Relaxed) {
            mixed_load(&system, 8, 5).await;
        }
    };
    let building = async {
        serves(&system, "orders", 2).await;
        is_over.store(true, Relaxed);
    };
    tokio::join!(load, building);
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_of_before_has_built_is_taken_over() {
    let system = System::new().await;
    let (_command, projection) = (system.command().await, system.projection().await);
    system.send_samples().await;
    journal::caught_up(&system).await;
    projection.stop().await;

    // It knew one generation of each view, and a lease was the view's.
    let (views, before) = (system.views().await, checkpoints(&system).await);
    let (records, leases) = (views.collection::<Document>(layout::VIEWS), views.collection::<Document>(layout::LEASES));
    for view in views::names() {
        records.replace_one(doc! {"_id": view}, doc! {"generation": 1}).await.unwrap();
        let term = before[&format!("{view}@1")].get_i64("term").unwrap();
        leases.insert_one(doc! {"_id": view, "term": term}).await.unwrap();
    }
    leases.delete_many(doc! {"_id": {"$regex": "@"}}).await.unwrap();

    let _projection = system.projection().await;
    system.product(1).await;
    assert_views_are_journal(&system).await;
    for view in views::names() {
        assert_eq!(states(&system, view).await, [(1, "serving".to_owned())].into());
    }
}

/// Verifies a view, and returns what was found.
async fn verified(system: &System, view: &str, values: bool) -> Value {
    let begun = system.operate("view.verify", json!({"view": view, "values": values})).await.unwrap().body;
    eventually("it is verified", async || {
        let shown = system.operate("view.show", json!({"view": view})).await.ok()?.body;
        let generations = shown["generations"].as_array()?;
        let verified = generations.iter().find(|it| it["generation"] == begun["generation"])?;
        (verified["state"] == "verified").then(|| verified["comparison"].clone())
    })
    .await
}

/// Waits until a generation of the view serves.
async fn serves(system: &System, view: &str, generation: i32) {
    let collection = layout::collection(view, generation);
    eventually("the generation serves", async || {
        (journal::serving(system).await.get(view) == Some(&collection)).then_some(())
    })
    .await;
}

/// The state of each generation of a view, as it is stored.
async fn states(system: &System, view: &str) -> BTreeMap<i32, String> {
    let generations = system.views().await.collection::<Document>(layout::VIEWS);
    let found = generations.find_one(doc! {"_id": view}).await.unwrap().unwrap();
    let generations = found.get_array("generations").unwrap().iter().map(|it| it.as_document().unwrap());
    generations.map(|it| (it.get_i32("number").unwrap(), it.get_str("state").unwrap().to_owned())).collect()
}

/// The checkpoints of all generations, by their collections.
async fn checkpoints(system: &System) -> BTreeMap<String, Document> {
    let checkpoints = system.views().await.collection::<Document>(layout::CHECKPOINTS);
    let found: Vec<Document> = checkpoints.find(doc! {}).await.unwrap().try_collect().await.unwrap();
    found.into_iter().map(|it| (it.get_str("_id").unwrap().to_owned(), it)).collect()
}

/// Asks queries all the time until `work` is done. None may fail, and none may be answered from an earlier position than
/// one of the same view that was answered before it was asked.
async fn while_queried<T>(system: &System, work: impl Future<Output = T>) -> T {
    let (is_over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let (is_over, answered) = (&is_over, &answered);
    let asking = views::queries().into_iter().map(|(_, query)| async move {
        let example: Value = serde_json::from_str(query.examples[0]).unwrap();
        let (name, mut last) = (format!("qry.{}", query.name()), 0);
        while !is_over.load(Relaxed) {
            match system.ask(&name, example.clone(), &[]).await {
                Ok(reply) => {
                    let position = reply.position.unwrap();
                    assert!(position >= last, "{name}: {position} after {last}");
                    last = position;
                }
                Err(client::Error::NotFound(_)) => {}
                Err(error) => panic!("{name} {example}: {error}"),
            }
            answered.fetch_add(1, Relaxed);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let working = async {
        let done = work.await;
        is_over.store(true, Relaxed);
        done
    };
    let (done, _) = tokio::join!(working, futures_util::future::join_all(asking));
    assert!(answered.load(Relaxed) > 1_000, "{answered:?}");
    done
}
