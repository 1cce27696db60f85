//! Invalid input gets a clear error that names the field, changes nothing, and does not affect other commands in its
//! batch. Every endpoint can be discovered, and every error is counted.

use client::Client;
use futures_util::{StreamExt, future::join_all};
use serde_json::{Value, json};
use tests::{Expect, System, eventually, journal};

#[tokio::test(flavor = "multi_thread")]
async fn invalid_commands_are_refused_by_field_and_do_not_affect_their_batch() {
    let system = System::new().await;
    let _command = system.command().await;
    let (user, product) = (system.user().await.id, system.product(1_000_000).await.id);
    let line = json!({"product": product, "quantity": 1});
    let order = |lines: Value| json!({"user": user, "lines": lines}).to_string();
    let priced =
        |amount: Value| json!({"product": product, "quantity": 1, "unit_price": {"amount": amount, "currency": "GBP"}});
    let deep = format!("{{\"user\":\"{user}\",\"lines\":{}", "[".repeat(100_000));
    let register = |email: &str, name: &str| json!({"email": email, "name": name}).to_string();
    let cases: Vec<(&str, String, &str)> = vec![
        ("user.register", "".into(), "email"),
        ("user.register", "nonsense".into(), ""),
        ("user.register", "[]".into(), ""),
        ("user.register", register("ada", "Ada"), "email"),
        ("user.register", register("ada@example.com", ""), "name"),
        ("user.register", register("ada@example.com", "A\0da"), "name"),
        ("user.register", register("ada@example.com", &"x".repeat(201)), "name"),
        ("user.register", json!({"email": "a@example.com", "name": "A", "age": 3}).to_string(), "age"),
        ("user.register", json!({"id": "1", "email": "a@example.com", "name": "A"}).to_string(), "id"),
        ("product.restock", json!({"id": product, "quantity": 0}).to_string(), "quantity"),
        ("product.restock", json!({"id": product, "quantity": "1"}).to_string(), "quantity"),
        ("product.restock", format!(r#"{{"id":"{product}","quantity":99999999999999999999}}"#), "quantity"),
        ("order.create", order(json!([])), "lines"),
        ("order.create", order(json!(vec![line.clone(); 2001])), "lines"),
        ("order.create", order(json!([line, {"product": product, "quantity": -1}])), "lines[1].quantity"),
        ("order.create", order(json!([{"product": "x", "quantity": 1}])), "lines[0].product"),
        ("order.create", order(json!([priced(json!(-1))])), "lines[0].unit_price.amount"),
        ("order.create", order(json!([priced(json!(1.5))])), "lines[0].unit_price.amount"),
        ("order.create", order(json!([priced(json!(i64::MAX))])), "lines[0].unit_price.amount"),
        ("order.create", deep, "lines"),
    ];
    let before = journal::events(&system).await.len();
    let bad = join_all(cases.iter().map(async |(name, body, field)| {
        let (aggregate, verb) = name.split_once('.').unwrap();
        let subject = system.subjects.command(aggregate, verb);
        let failure = system.ask_with(&subject, body.clone(), &[]).await.failure();
        let shown = &body[..body.len().min(200)];
        assert_eq!((failure.status, &*failure.code), (400, "malformed"), "{name} {shown}");
        let named = failure.details.get("field").and_then(Value::as_str).unwrap_or_default();
        assert!(named.starts_with(field), "{name} {shown}: {named:?} is named instead of {field:?}");
        assert!(!failure.message.is_empty());
    }));
    let good = join_all((0..100).map(|_| system.accept("product.restock", json!({"id": product, "quantity": 1}))));
    tokio::join!(bad, good);
    assert_eq!(journal::events(&system).await.len(), before + 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_are_explained_in_a_machine_readable_way() {
    let (system, _replicas) = System::complete().await;
    let id = "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001";
    let quantity =
        |quantity: &str| format!(r#"{{"user":"{id}","lines":[{{"product":"{id}","quantity":{quantity}}}]}}"#);
    let pieces = json!({
        "field": "lines[0].quantity", "reason": "out_of_bounds", "expected": "a whole number of pieces from 1 to 1000000",
        "min": 1, "max": 1_000_000,
    });
    let (list, limit) = ("qry.user.list", "a whole number from 1 to 100");
    for (subject, body, details) in [
        ("cmd.order.create", quantity("0"), pieces.clone()),
        ("cmd.order.create", quantity("1e400"), pieces.clone()),
        ("cmd.order.create", quantity(&"9".repeat(400)), pieces),
        ("cmd.user.delete", "{}".to_owned(), json!({"field": "id", "reason": "missing"})),
        (
            "cmd.user.delete",
            r#"{"colour":1}"#.to_owned(),
            json!({"field": "colour", "reason": "unknown", "expected": "`id`"}),
        ),
        ("cmd.user.delete", format!(r#"{{"id":"{id}","id":"{id}"}}"#), json!({"field": "id", "reason": "duplicate"})),
        ("cmd.user.delete", "[]".to_owned(), json!({"reason": "wrong_type", "expected": "an object"})),
        ("cmd.user.delete", "{".to_owned(), json!({"reason": "not_json", "expected": "one JSON object in UTF-8"})),
        (
            list,
            r#"{"sort":"size"}"#.to_owned(),
            json!({
                "field": "sort", "reason": "invalid", "expected": "one of `name`, `registered`, `spent`",
            }),
        ),
        (
            list,
            r#"{"limit":101}"#.to_owned(),
            json!({
                "field": "limit", "reason": "out_of_bounds", "expected": limit, "min": 1, "max": 100,
            }),
        ),
        (
            list,
            r#"{"limit":"5"}"#.to_owned(),
            json!({
                "field": "limit", "reason": "wrong_type", "expected": limit, "min": 1, "max": 100,
            }),
        ),
    ] {
        let subject = format!("{}.{subject}", system.prefix);
        let failure = system.ask_with(&subject, body.clone(), &[]).await.failure();
        assert_eq!((failure.status, &*failure.code), (400, "malformed"), "{body:.200}");
        assert_eq!(json!(failure.details), details, "{body:.200}");
    }
    let header = [("Expected-Version", "-1")];
    let failure = system.ask("cmd.user.delete", json!({"id": id}), &header).await.failure();
    let expected = "a whole number from 0 to 9223372036854775807";
    assert_eq!(
        json!(failure.details),
        json!({
            "field": "Expected-Version", "reason": "out_of_bounds", "expected": expected, "min": 0, "max": i64::MAX,
        })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn amounts_that_overflow_are_refused() {
    let system = System::new().await;
    let _command = system.command().await;
    let (user, product) = (system.user().await.id, system.product(1_000_000).await.id);
    let price = json!({"amount": 1_000_000_000_000_000_i64, "currency": "GBP"});
    let lines = json!([{"product": product, "quantity": 1_000_000, "unit_price": price}]);
    let failure = system.try_command("order.create", json!({"user": user, "lines": lines})).await.failure();
    assert_eq!((failure.status, &*failure.code), (422, "total_overflow"));
    let mixed = json!([
        {"product": product, "quantity": 1},
        {"product": product, "quantity": 1, "unit_price": {"amount": 1, "currency": "EUR"}},
    ]);
    let failure = system.try_command("order.create", json!({"user": user, "lines": mixed})).await.failure();
    assert_eq!((failure.status, &*failure.code), (422, "mixed_currencies"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_header_is_refused_by_name() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(1).await.id;
    let long = "k".repeat(200);
    for (name, value) in [
        ("Nats-Msg-Id", "a b"),
        ("Nats-Msg-Id", &*long),
        ("Nats-Msg-Id", "a\0b"),
        ("Actor", "\0"),
        ("Expected-Version", "x"),
    ] {
        let restock = json!({"id": product, "quantity": 1});
        let failure = system.ask("cmd.product.restock", restock, &[(name, value)]).await.failure();
        assert_eq!((failure.status, failure.details["field"].as_str()), (400, Some(name)));
    }
    assert_eq!(journal::events(&system).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn header_values_of_events_and_refusals_are_visible_ascii() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(1).await;
    let mut events = system.client.nats().subscribe(system.subjects.events()).await.unwrap();
    system.client.nats().flush().await.unwrap();
    let restock = json!({"id": product.id, "quantity": 1});
    let headers = [("actor", "Zoë 50 %"), ("TRACEPARENT", "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x")];
    let restocked = system.ask("cmd.product.restock", restock, &headers).await.accepted();
    let headers = loop {
        let headers = events.next().await.unwrap().headers.unwrap();
        // The creation of the product may arrive first.
        if headers.get("Position").unwrap().as_str() == restocked.position.to_string() {
            break headers;
        }
    };
    let of = |name: &str| headers.get(name).unwrap().as_str().to_owned();
    assert_eq!(of("Actor"), "Zo%C3%AB 50 %25");
    assert_eq!(of("traceparent"), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let identity = system.journal().await.query_one("select journal::text from journal_head", &[]).await.unwrap();
    assert_eq!(of("Journal"), identity.get::<_, String>(0));

    let unknown = json!({"id": product.id, "quantity": 1, "größe\u{7f}\"": 1}).to_string();
    let reply =
        system.client.nats().request(system.subjects.command("product", "restock"), unknown.into()).await.unwrap();
    for (name, values) in reply.headers.unwrap().iter() {
        for value in values {
            assert!(value.as_str().bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{name}: {value}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_over_the_limit_is_refused_as_too_large() {
    let system = System::new().await;
    let _command = system.command_with(&["--max-request-bytes", "1000"]).await;
    let name = "x".repeat(2000);
    let failure = system.try_command("user.register", json!({"email": "a@example.com", "name": name})).await.failure();
    assert_eq!((failure.status, &*failure.code), (413, "too_large"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_services_can_be_discovered_and_count_every_error() {
    let (system, _replicas) = System::complete().await;
    let product = system.product(1).await.id;
    system.try_command("product.restock", json!({"id": product, "quantity": -2})).await.failure();
    system.try_command("product.restock", json!({"id": product})).await.failure();
    system.accept("product.restock", json!({"id": product, "quantity": 1})).await;

    let (commands, queries) = (domain::commands().count(), views::queries().len());
    for (service, endpoints) in [("command", commands), ("query", queries), ("projection", 0)] {
        let info = discover(&system.client, "INFO", service, &system.prefix).await;
        assert_eq!(info["type"], "io.nats.micro.v1.info_response");
        assert!(info["description"].is_string() && info["version"].is_string());
        assert_eq!(info["metadata"]["replica"], info["id"]);
        assert!(info["metadata"]["revision"].is_string());
        let is_operation = |endpoint: &&Value| endpoint["subject"].as_str().unwrap().contains(".ops.");
        let (operations, described): (Vec<_>, Vec<_>) =
            info["endpoints"].as_array().unwrap().iter().partition(is_operation);
        assert_eq!(described.len(), endpoints, "{service}");
        assert_eq!(operations.is_empty(), service == "query", "{service}");
        for endpoint in info["endpoints"].as_array().unwrap() {
            let schema: Value = serde_json::from_str(endpoint["metadata"]["schema"].as_str().unwrap()).unwrap();
            assert_eq!(schema["type"], "object");
            assert!(!endpoint["metadata"]["description"].as_str().unwrap().is_empty());
        }
    }
    let statistics = discover(&system.client, "STATS", "command", &system.prefix).await;
    let endpoints = statistics["endpoints"].as_array().unwrap();
    let restock = endpoints.iter().find(|endpoint| endpoint["name"] == "product-restock").unwrap();
    assert_eq!((&restock["num_requests"], &restock["num_errors"]), (&json!(3), &json!(2)));
    assert!(restock["last_error"].as_str().unwrap().starts_with("400:malformed"));
}

/// The answer of this installation's service. Services of other tests run at the same time.
async fn discover(client: &Client, verb: &str, service: &str, prefix: &str) -> Value {
    eventually("the service answers", async || {
        let inbox = client.nats().new_inbox();
        let mut answers = client.nats().subscribe(inbox.clone()).await.ok()?;
        client.nats().publish_with_reply(format!("$SRV.{verb}.{service}"), inbox, "".into()).await.ok()?;
        let soon = std::time::Duration::from_secs(1);
        while let Ok(Some(answer)) = tokio::time::timeout(soon, answers.next()).await {
            let answer: Value = serde_json::from_slice(&answer.payload).ok()?;
            if answer["metadata"]["prefix"] == prefix {
                return Some(answer);
            }
        }
        None
    })
    .await
}
