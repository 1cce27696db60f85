//! Queries through NATS: they read what a command wrote, at once if asked to, and are served by indexes alone.

use std::time::{Duration, Instant};

use bson::{Bson, Document, doc};
use client::Error;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tests::{Expect, System, eventually, journal};
use views::{Plan, layout};
use wire::MIN_POSITION;

use crate::projection::assert_views_are_journal;

#[tokio::test(flavor = "multi_thread")]
async fn read_your_writes_holds_for_1000_commands_through_three_replicas() {
    let (system, _replicas) = System::complete().await;
    let _more = [system.query().await, system.query().await];
    let product = system.product(1_000_000).await.id;
    let one_client = async |client: usize| {
        let user = system.user().await.id;
        for n in 0..62 {
            let name = format!("Ada {client} {n}");
            let written = system.accept("user.update", json!({"id": user, "name": name})).await;
            let reply = system.read("user.get", json!({"id": user}), written.position).await;
            assert!(reply.as_ref().is_ok_and(|reply| reply.position >= Some(written.position)));
            assert_eq!(reply.data()["name"], *name);

            let order = json!({"user": user, "lines": [{"product": product, "quantity": 1}]});
            let order = system.accept("order.create", order).await;
            let newest = system.read("order.list", json!({"user": user, "limit": 1}), order.position).await.data();
            assert_eq!(newest["items"][0]["id"], json!(order.id));
            assert_eq!(newest["items"].as_array().unwrap().len(), 1);
        }
    };
    join_all((0..8).map(one_client)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_is_not_reached_in_time_is_told() {
    let system = System::new().await;
    let _services = [system.command().await, system.projection().await];
    let _query = system.query_with(&["--min-position-wait-ms", "500"]).await;
    let user = system.user().await;
    let asked = Instant::now();
    let ahead = system.read("user.get", json!({"id": user.id}), user.position + 1).await.failure();
    assert_eq!((ahead.status, &*ahead.code), (408, "view_behind"));
    assert!(asked.elapsed() > Duration::from_millis(500) && asked.elapsed() < Duration::from_secs(10));
    journal::caught_up(&system).await;
    eventually("it is there", async || system.read("user.get", json!({"id": user.id}), user.position).await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_shown_as_it_was_placed() {
    let (system, _replicas) = System::complete().await;
    let (user, product) = (system.user().await.id, system.product(10).await.id);
    let eur = json!({"amount": 199, "currency": "GBP"});
    let lines = json!([{"product": product, "quantity": 2}, {"product": product, "quantity": 1, "unit_price": eur}]);
    let order = json!({"user": user, "lines": lines, "placed_at": "2010-12-01T08:26:00Z"});
    let order = system.accept("order.create", order).await.id;
    let rename = json!({"id": product, "name": "Other", "price": {"amount": 1, "currency": "GBP"}});
    system.accept("product.update", rename).await;
    let paid = system.accept("order.pay", json!({"id": order})).await;

    let shown = system.read("order.get", json!({"id": order}), paid.position).await.data();
    assert_eq!((&shown["status"], &shown["placed_at"]), (&json!("paid"), &json!("2010-12-01T08:26:00.000Z")));
    assert_eq!(shown["total"], json!({"amount": 709, "currency": "GBP"}));
    assert_eq!(shown["lines"][0]["name"], "White metal lantern");
    assert_eq!(shown["lines"][1]["unit_price"]["amount"], 199);
    let fields: Vec<&String> = shown.as_object().unwrap().keys().collect();
    assert!(fields.iter().all(|field| !field.starts_with('_')), "{fields:?}");

    let cancelled = system.accept("order.cancel", json!({"id": order})).await;
    let shown = system.read("order.get", json!({"id": order}), cancelled.position).await.data();
    assert_eq!((&shown["status"], &shown["refund_due"]), (&json!("cancelled"), &json!(true)));
    let day = json!({"from": "2010-12-01", "to": "2010-12-01"});
    let sales = system.read("sales.daily", day, cancelled.position).await.data();
    assert_eq!(sales["total"]["orders"], 0);
    let deleted = system.accept("order.delete", json!({"id": order})).await;
    let gone = system.read("order.get", json!({"id": order}), deleted.position).await.failure();
    assert_eq!((gone.status, &*gone.code), (404, "not_found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn products_are_found_by_words_and_their_beginnings() {
    let (system, _replicas) = System::complete().await;
    let mut position = 0;
    for (sku, name, amount, stock) in [
        ("A", "White metal lantern", 339, 5),
        ("B", "Lantern", 1000, 0),
        ("C", "Red woolly hottie WHITE heart.", 339, 5),
        ("D", "Café lantern, white", 250, 5),
    ] {
        let price = json!({"amount": amount, "currency": "GBP"});
        let product = json!({"sku": sku, "name": name, "price": price, "stock": stock});
        position = system.accept("product.create", product).await.position;
    }
    let found = async |request: Value| -> String {
        let data = system.read("product.search", request, position).await.data();
        data["items"].as_array().unwrap().iter().map(|product| product["sku"].as_str().unwrap()).collect()
    };
    assert_eq!(found(json!({"text": "lantern"})).await, "BDA", "the fewer other words, the more relevant");
    assert_eq!(found(json!({"text": "WHI lan"})).await, "DA");
    assert_eq!(found(json!({"text": "café"})).await, "D");
    assert_eq!(found(json!({"text": "antern"})).await, "");
    assert_eq!(found(json!({"text": "lan", "in_stock": true})).await, "DA");
    let cheap = json!({"text": "white", "currency": "GBP", "price_min": 250, "price_max": 339, "sort": "price"});
    assert_eq!(found(cheap).await.chars().next(), Some('D'));
    assert_eq!(found(json!({"sort": "name"})).await, "DBCA");
    assert_eq!(found(json!({"sort": "price", "currency": "GBP", "order": "desc", "limit": 1})).await, "B");
    assert_eq!(found(json!({"sort": "price", "currency": "EUR"})).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_are_found_as_people_write_them() {
    let (system, _replicas) = System::complete().await;
    let price = json!({"amount": 339, "currency": "GBP"});
    let long = "A very long name, don’t you think, of a lantern that is white, has more than eight words, and T-lights";
    // What has no blanks asks for many tokens.
    let run: String = ('\u{5000}'..).take(200).collect();
    let mut position = 0;
    for (sku, name) in [
        ("A", "Straße"),
        ("B", "東京タワー 模型"),
        ("C", "หนังสือภาษาไทย"),
        ("D", long),
        ("E", "Ångström"),
        ("F", "Fish"),
        ("G", &run),
    ] {
        let product = json!({"sku": sku, "name": name, "price": price});
        system.accept("product.create", product).await;
        let user = json!({"email": format!("{sku}@example.com"), "name": name});
        position = system.accept("user.register", user).await.position;
    }
    let found = async |query: &str, request: Value, field: &str| -> String {
        let data = system.read(query, request, position).await.data();
        data["items"].as_array().unwrap().iter().map(|item| item[field].as_str().unwrap().to_owned() + " ").collect()
    };
    let mut reversed: Vec<&str> = long.split(' ').collect();
    reversed.reverse();
    for (text, sku) in [
        ("STRASSE", "A "),
        ("タワー", "B "),
        ("京", "B "),
        ("ﾀﾜｰ 模型", "B "),
        ("ภาษา", "C "),
        ("สือ", "C "),
        (long, "D "),
        (&long.to_uppercase(), "D "),
        (&reversed.join(" "), "D "),
        ("\u{212b}NGSTRO\u{308}M", "E "),
        ("ﬁ", "F "),
        (&run, "G "),
    ] {
        assert_eq!(found("product.search", json!({"text": text}), "sku").await, sku, "{text}");
    }
    for (prefix, email) in [("STRAS", "A@example.com "), ("\u{212b}", "E@example.com "), ("ﬁ", "F@example.com ")] {
        assert_eq!(found("user.list", json!({"name_prefix": prefix}), "email").await, email, "{prefix}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_queries_are_refused_by_field() {
    let (system, _replicas) = System::complete().await;
    let cases = [
        ("user.get", json!({}), "id"),
        ("user.get", json!({"id": "01900000-0000-7000-8000-000000000001", "email": "a@b.co"}), "email"),
        ("user.list", json!({"sort": 1}), "sort"),
        ("user.get", json!({"id": "x"}), "id"),
        ("user.list", json!({"limit": 0}), "limit"),
        ("user.list", json!({"limit": 101}), "limit"),
        ("user.list", json!({"cursor": "zz"}), "cursor"),
        ("user.list", json!({"sort": "shoe size"}), "sort"),
        ("user.list", json!({"country": {"$gt": ""}}), "country"),
        ("order.list", json!({"from": "yesterday"}), "from"),
        ("order.list", json!({"status": "lost"}), "status"),
        ("order.list", json!({"colour": "red"}), "colour"),
        ("product.search", json!({"price_min": 1}), "currency"),
        ("sales.daily", json!({"from": "2010-12-02", "to": "2010-12-01"}), "to"),
        ("sales.top", json!({"from": "2010-12-01", "to": "2010-12-01", "by": "revenue"}), "currency"),
    ];
    for (name, body, field) in cases {
        let failure = system.ask(&format!("qry.{name}"), body.clone(), &[]).await.failure();
        assert_eq!((failure.status, &*failure.code), (400, "malformed"), "{name} {body}");
        assert_eq!(failure.details["field"], field, "{name} {body}: {}", failure.message);
    }
    let header = system.ask("qry.user.list", json!({}), &[(MIN_POSITION, "-1")]).await.failure();
    assert_eq!(header.details["field"], MIN_POSITION);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_filter_and_sort_is_served_by_an_index() {
    let (system, _replicas) = System::complete().await;
    let (user, product) = (system.user().await.id, system.product(1000).await.id);
    let mut last = 0;
    for n in 0..40 {
        let placed_at = format!("2010-12-{:02}T08:00:00Z", 1 + n % 20);
        let order =
            json!({"user": user, "placed_at": placed_at, "lines": [{"product": product, "quantity": 1 + n % 5}]});
        last = system.accept("order.create", order).await.position;
    }
    system.read("order.list", json!({}), last).await.data();
    system.send_samples().await;
    journal::caught_up(&system).await;
    let database = system.views().await;
    let mut explained = 0;
    for (view, query) in views::queries() {
        let collection = layout::collection(view, 1);
        for request in query.combinations() {
            let Ok(plan) = (query.plan)(request.to_string().as_bytes()) else { continue };
            // A report sorts the few groups that it has made; a list never sorts.
            let may_sort = matches!(plan, Plan::Report(_));
            let command = match plan {
                Plan::Get(key) => doc! {"find": &collection, "filter": {key.field: key.value}},
                Plan::List(list) => {
                    doc! {"find": &collection, "filter": list.filter, "sort": list.sort, "hint": list.hint}
                }
                Plan::Report(report) => doc! {"aggregate": &collection, "pipeline": report.pipeline, "cursor": {}},
            };
            let reads = database.run_command(doc! {"explain": command, "verbosity": "queryPlanner"}).await;
            let reads = reads.unwrap_or_else(|error| panic!("{} {request}: {error}", query.name()));
            let stages = winning_stages(&reads);
            let what = format!("{} {request}: {stages:?}", query.name());
            assert!(!stages.iter().any(|stage| stage == "COLLSCAN"), "no index of the view serves {what}");
            assert!(stages.iter().any(|stage| ["IXSCAN", "IDHACK"].contains(&&**stage)), "{what}");
            assert!(may_sort || !stages.iter().any(|stage| stage == "SORT"), "{what}");
            explained += 1;
        }
    }
    assert!(explained > 100, "{explained} combinations");
}

/// Each aggregate gives samples of itself, each query examples: what they show works through NATS, and every view is a
/// fold of the journal afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn every_sample_and_every_example_is_answered() {
    let (system, _replicas) = System::complete().await;
    system.send_samples().await;
    assert_views_are_journal(&system).await;
    let head = system.head().await;
    for (_, query) in views::queries() {
        for example in query.examples {
            let reply = system.read(&query.name(), serde_json::from_str(example).unwrap(), head).await;
            match reply {
                Ok(reply) => {
                    let read = (query.check_reply)(reply.body.to_string().as_bytes());
                    assert!(read.is_ok(), "the type `Reply` of {} cannot read {}: {read:?}", query.name(), reply.body);
                }
                Err(Error::NotFound(_)) => {}
                Err(error) => panic!("{} {example}: {error}", query.name()),
            }
        }
    }
}

/// All stages of the plan that was chosen.
fn winning_stages(explained: &Document) -> Vec<String> {
    fn collect(value: &Bson, within: bool, stages: &mut Vec<String>) {
        match value {
            Bson::Document(document) => {
                if let (true, Ok(stage)) = (within, document.get_str("stage")) {
                    stages.push(stage.to_owned());
                }
                for (name, value) in document {
                    if name != "rejectedPlans" {
                        collect(value, within || name == "winningPlan", stages);
                    }
                }
            }
            Bson::Array(values) => values.iter().for_each(|value| collect(value, within, stages)),
            _ => {}
        }
    }

    let mut stages = Vec::new();
    collect(&Bson::Document(explained.clone()), false, &mut stages);
    stages
}

#[tokio::test(flavor = "multi_thread")]
async fn lookups_at_the_same_time_each_get_their_own_document() {
    let (system, _replicas) = System::complete().await;
    let users = join_all((0..50).map(|_| system.user())).await;
    let last = users.iter().map(|user| user.position).max().unwrap();
    let missing = system.product(1).await.id;
    let ask = async |n: usize| {
        let id = if n.is_multiple_of(7) { missing } else { users[n % 50].id };
        let reply = system.read("user.get", json!({"id": id}), last).await;
        if n.is_multiple_of(7) {
            assert_eq!(reply.code(), "not_found");
        } else {
            assert_eq!(reply.data()["id"], json!(id));
        }
    };
    join_all((0..2000).map(ask)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_got_by_email_and_a_product_by_sku_also_many_at_once() {
    let (system, _replicas) = System::complete().await;
    let register = |n: usize| json!({"email": format!("Ada{n}@Example.com"), "name": "Ada"});
    let users = join_all((0..50).map(|n| system.accept("user.register", register(n)))).await;
    let product = json!({"sku": "BANK CHARGES", "name": "Charges", "price": {"amount": 1, "currency": "GBP"}});
    let product_id = system.accept("product.create", product.clone()).await.id;
    let taken = system.try_command("product.create", product).await.failure();
    assert_eq!((&*taken.code, &taken.details["id"]), ("sku_taken", &json!(product_id)));
    let taken = system.try_command("user.register", register(7)).await.failure();
    assert_eq!((&*taken.code, &taken.details["id"]), ("email_taken", &json!(users[7].id)));
    let last = system.accept("user.update", json!({"id": users[7].id, "email": "grace@example.com"})).await.position;

    let ask = async |n: usize| {
        let (by_id, by_email) =
            (json!({"id": users[n % 50].id}), json!({"email": format!("ADA{}@example.com", n % 50)}));
        let reply = system.read("user.get", if n.is_multiple_of(3) { by_id } else { by_email.clone() }, last).await;
        if n % 50 == 7 && !n.is_multiple_of(3) {
            let failure = reply.failure();
            assert_eq!((&*failure.code, &failure.details["email"]), ("not_found", &by_email["email"]));
        } else {
            assert_eq!(reply.data()["id"], json!(users[n % 50].id));
        }
    };
    join_all((0..1000).map(ask)).await;
    let user = system.read("user.get", json!({"id": null, "email": "Grace@example.com"}), last).await.data();
    assert_eq!((&user["id"], &user["email"]), (&json!(users[7].id), &json!("grace@example.com")));
    let product = system.read("product.get", json!({"sku": "BANK CHARGES"}), last).await.data();
    assert_eq!(product["id"], json!(product_id));
    let failure = system.read("product.get", json!({"sku": "bank"}), last).await.failure();
    assert_eq!((failure.status, &failure.details["sku"]), (404, &json!("bank")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_was_never_built_is_said_to_be_unavailable() {
    let system = System::new().await;
    let _query = system.start_query(&[]);
    let failure = eventually("the service answers", async || {
        system.ask("qry.user.list", json!({}), &[]).await.err()?.failure().cloned()
    })
    .await;
    assert_eq!((failure.status, &*failure.code), (503, "unavailable"));
}
