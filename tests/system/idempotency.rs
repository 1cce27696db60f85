//! The command ledger: a command that is sent again takes effect once, and gets the same reply.

use futures_util::future::join_all;
use serde_json::json;
use tests::{Expect, System, eventually, journal};
use wire::MSG_ID;

#[tokio::test(flavor = "multi_thread")]
async fn the_same_command_20_times_at_once_takes_effect_once_and_gets_the_same_reply() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let (user, product) = (system.user().await.id, system.product(100).await.id);
    let order = json!({"user": user, "lines": [{"product": product, "quantity": 3}]});

    let same = (0..20).map(|_| system.ask("cmd.order.create", order.clone(), &[(MSG_ID, "k-1")]));
    let replies = join_all(same).await;

    let accepted: Vec<_> = replies.into_iter().map(|reply| reply.accepted()).collect();
    assert!(accepted.iter().all(|one| *one == accepted[0]), "{accepted:?}");
    let later = system.ask("cmd.order.create", order, &[(MSG_ID, "k-1")]).await.accepted();
    assert_eq!(later, accepted[0]);
    assert_eq!(journal::events(&system).await.len(), 4, "user, product, order, stock taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_repeated_too() {
    let system = System::new().await;
    let _command = system.command().await;
    let (user, product) = (system.user().await.id, system.product(1).await.id);
    let order = json!({"user": user, "lines": [{"product": product, "quantity": 2}]});
    let first = system.ask("cmd.order.create", order.clone(), &[(MSG_ID, "k-1")]).await.failure();
    assert_eq!(first.code, "out_of_stock");

    system.accept("product.restock", json!({"id": product, "quantity": 5})).await;

    let again = system.ask("cmd.order.create", order.clone(), &[(MSG_ID, "k-1")]).await.failure();
    assert_eq!(again, first);
    system.ask("cmd.order.create", order, &[(MSG_ID, "k-2")]).await.accepted();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_with_another_request_is_refused() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(1).await.id;
    let key = [(MSG_ID, "k-1")];
    let restock = |quantity| json!({"id": product, "quantity": quantity});
    system.ask("cmd.product.restock", restock(1), &key).await.accepted();

    let other_body = system.ask("cmd.product.restock", restock(2), &key).await;
    assert_eq!(other_body.failure().status, 409);
    let other_command = system.ask("cmd.product.delete", json!({"id": product}), &key).await;
    assert_eq!(other_command.code(), "command_id_reused");
    let other_version = [(MSG_ID, "k-1"), (wire::EXPECTED_VERSION, "2")];
    let other_version = system.ask("cmd.product.restock", restock(1), &other_version).await;
    assert_eq!(other_version.code(), "command_id_reused");
    assert_eq!(journal::events(&system).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_recognized_however_its_json_is_written() {
    let system = System::new().await;
    let _command = system.command().await;
    let id = "0192d3a0-7c1e-7b5a-9f00-3c2b1a00000a";
    let subject = system.subjects.command("user", "register");
    let send = async |body: String, name: &str| system.ask_with(&subject, body, &[(name, "k-1")]).await;
    let first = send(format!(r#"{{"id":"{id}","email":"zoe@example.com","name":"Zoë"}}"#), MSG_ID).await.accepted();
    for body in [
        format!(r#"{{"name":"Zoë","email":"zoe@example.com","id":"{id}"}}"#),
        format!("{{ \"id\":\t\"{}\", \"email\":\"zoe@example.com\",\n\"name\":\"Zoë\" }}", id.to_uppercase()),
        format!(r#"{{"id":"{id}","email":"zoe\u0040example.com","name":"Zo\u00eb"}}"#),
        format!(r#"{{"id":"{id}","email":"zoe@example.com","name":"Zoë","country":null}}"#),
    ] {
        assert_eq!(send(body.clone(), "nats-msg-id").await.accepted(), first, "{body}");
    }
    let other = format!(r#"{{"id":"{id}","email":"zoe@example.com","name":"Zoë","country":"France"}}"#);
    assert_eq!(send(other, MSG_ID).await.code(), "command_id_reused");
    // Without an identifier in the request, the service creates one. The command counts as the same nevertheless.
    let body = r#"{"email":"ada@example.com","name":"Ada"}"#;
    let created = system.ask_with(&subject, body, &[(MSG_ID, "k-2")]).await.accepted();
    let again = r#"{"name":"Ada","email":"ada@example.com"}"#;
    assert_eq!(system.ask_with(&subject, again, &[(MSG_ID, "k-2")]).await.accepted(), created);
    assert_eq!(journal::events(&system).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_of_an_older_version_are_remembered() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(1).await.id;
    let body = json!({"id": product, "quantity": 1}).to_string();
    // An older version stored a hash of the request's bytes.
    let subject = system.subjects.command("product", "restock");
    let former = "insert into commands (key, request, id, version, position, at) values ('k-1', \
        sha256(int8send(length($1)::int8) || convert_to($1, 'utf8') || int8send(4) || 'None' \
        || int8send(length($2)::int8) || convert_to($2, 'utf8')), $3, 7, 42, now())";
    system.journal().await.execute(former, &[&subject, &body, &product.0]).await.unwrap();
    let again = system.ask_with(&subject, body, &[(MSG_ID, "k-1")]).await.accepted();
    assert_eq!((again.version, again.position), (7, 42));
    let other = json!({"id": product, "quantity": 2});
    let other = system.ask("cmd.product.restock", other, &[(MSG_ID, "k-1")]).await;
    assert_eq!(other.code(), "command_id_reused");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_forgets_entries_older_than_its_retention() {
    let system = System::new().await;
    let command = system.command().await;
    let product = system.product(1).await.id;
    let restock = json!({"id": product, "quantity": 1});
    system.ask("cmd.product.restock", restock.clone(), &[(MSG_ID, "k-1")]).await.accepted();
    command.stop().await;

    let _command = system.command_with(&["--ledger-seconds", "0"]).await;
    let journal = system.journal().await;
    eventually("the entry is gone", async || {
        journal.query_opt("select from commands where key = 'k-1'", &[]).await.unwrap().is_none().then_some(())
    })
    .await;
}
