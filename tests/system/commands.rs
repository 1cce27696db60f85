//! Commands through NATS: their replies and refusals, and that a refusal changes nothing.

use futures_util::future::join_all;
use serde_json::json;
use tests::{Expect, System, eventually, journal};
use wire::EXPECTED_VERSION;

#[tokio::test(flavor = "multi_thread")]
async fn the_position_of_a_reply_is_that_of_the_commands_last_event() {
    let system = System::new().await;
    let _command = system.command().await;
    let (user, product) = (system.user().await, system.product(10).await);
    assert_eq!((user.version, user.position, product.version, product.position), (1, 1, 1, 2));

    let lines = json!([{"product": product.id, "quantity": 2}, {"product": product.id, "quantity": 3}]);
    let order = system.accept("order.create", json!({"user": user.id, "lines": lines})).await;
    assert_eq!((order.version, order.position), (1, 4), "the order, and one event for the product of both lines");

    let paid = system.accept("order.pay", json!({"id": order.id})).await;
    assert_eq!((paid.id, paid.version, paid.position), (order.id, 2, 5));

    let unchanged = system.accept("user.update", json!({"id": user.id, "name": "Ada Lovelace"})).await;
    assert_eq!((unchanged.version, unchanged.position), (1, 5), "nothing happened");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_for_an_outdated_version_is_refused() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(0).await.id;
    let restock = json!({"id": product, "quantity": 1});
    let at =
        async |version: &str| system.ask("cmd.product.restock", restock.clone(), &[(EXPECTED_VERSION, version)]).await;
    assert_eq!(at("1").await.accepted().version, 2);
    let failure = at("1").await.failure();
    assert_eq!((failure.status, &*failure.code), (409, "version_conflict"));
    assert_eq!((&failure.details["expected"], &failure.details["actual"]), (&json!(1), &json!(2)));

    // Of many clients that have read version 2, one succeeds.
    let replies = join_all((0..16).map(|_| at("2"))).await;
    assert_eq!(replies.into_iter().filter(|reply| reply.is_ok()).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_takes_the_stock_of_all_its_lines_or_of_none() {
    let system = System::new().await;
    let _command = system.command().await;
    let (user, plenty, few) = (system.user().await.id, system.product(100).await.id, system.product(1).await.id);
    let lines = json!([{"product": plenty, "quantity": 5}, {"product": few, "quantity": 2}]);
    let before = journal::events(&system).await.len();
    let refusal = system.try_command("order.create", json!({"user": user, "lines": lines})).await.failure();
    assert_eq!(refusal.code, "out_of_stock");
    assert_eq!(refusal.details["product"], json!(few));
    assert_eq!(journal::events(&system).await.len(), before);
    let all = json!([{"product": plenty, "quantity": 100}, {"product": few, "quantity": 1}]);
    system.accept("order.create", json!({"user": user, "lines": all})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_actor_and_the_command_id_are_stored_with_the_events() {
    let system = System::new().await;
    let _command = system.command().await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = [(wire::ACTOR, "Grace Hopper"), (wire::MSG_ID, "k-1"), (wire::TRACEPARENT, trace)];
    let register = json!({"email": "ada@example.com", "name": "Ada"});
    system.ask("cmd.user.register", register, &headers).await.accepted();
    let statement = "select actor, command_id, traceparent from events";
    let row = system.journal().await.query_one(statement, &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2)), ("Grace Hopper", "k-1", trace));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_of_2000_lines_with_the_longest_names_is_accepted() {
    let system = System::new().await;
    let _command = system.command().await;
    let user = system.user().await.id;
    let price = json!({"amount": 1, "currency": "EUR"});
    // The character takes four bytes in UTF-8.
    let (name, sku) = ("𝄞".repeat(200), "𝄞".repeat(60));
    let product = json!({"sku": sku, "name": name, "price": price, "stock": 2000});
    let product = system.accept("product.create", product).await.id;
    let lines: Vec<_> = (0..2000).map(|_| json!({"product": product, "quantity": 1})).collect();
    let order = system.accept("order.create", json!({"user": user, "lines": lines})).await.id;
    super::relay::assert_stream_is_journal(&system).await;
    system.accept("order.cancel", json!({"id": order})).await;
    super::relay::assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_can_be_created_and_cancelled_concurrently() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let (user, product) = (system.user().await.id, system.product(1000).await.id);
    // The cancellation may come first, and then finds no order. It never finds half an order.
    for n in 0..50 {
        let id = format!("0192d3a0-7c1e-7b5a-9f00-{n:012}");
        let order = json!({"id": id, "user": user, "lines": [{"product": product, "quantity": 1}]});
        let (created, cancelled) = tokio::join!(
            system.try_command("order.create", order),
            system.try_command("order.cancel", json!({"id": id})),
        );
        created.accepted();
        if cancelled.is_err() {
            assert_eq!(cancelled.code(), "order_not_found");
            system.accept("order.cancel", json!({"id": id})).await;
        }
    }
    let statement = "select (state->>'stock')::bigint from aggregates where id = $1";
    let row = system.journal().await.query_one(statement, &[&product.0]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 1000, "all pieces are back in stock");
    journal::check(&journal::events(&system).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_together_on_an_empty_database_migrate_it_once() {
    let system = System::new().await;
    let replicas: Vec<_> = (0..4).map(|_| system.start_command(&[])).collect();
    let mut migrate = system.process("command", &["migrate"]);
    eventually("the migration has ended successfully", async || migrate.has_ended().then_some(())).await;
    system.answers("command").await;
    system.user().await;
    for replica in replicas {
        assert!(!replica.has_ended());
        replica.stop().await;
    }
    let statement = "select count(*), count(distinct version) from migrations";
    let row = system.journal().await.query_one(statement, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(1));
}
