//! Unique values, e-mail addresses and SKUs: only one living aggregate holds each, even under races, and can release
//! it.

use futures_util::future::join_all;
use serde_json::json;
use tests::{Expect, System, journal};

#[tokio::test(flavor = "multi_thread")]
async fn of_many_clients_that_race_for_an_address_one_gets_it() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    for round in 0..10 {
        let register = |n: usize| {
            // Addresses that differ in letter case are the same address.
            let email =
                if n.is_multiple_of(2) { format!("ADA{round}@example.com") } else { format!("ada{round}@example.com") };
            system.try_command("user.register", json!({"email": email, "name": format!("Ada {n}")}))
        };
        let replies = join_all((0..16).map(register)).await;
        let (won, lost): (Vec<_>, Vec<_>) = replies.into_iter().partition(|reply| reply.is_ok());
        assert_eq!(won.len(), 1, "round {round}");
        assert!(lost.into_iter().all(|reply| reply.code() == "email_taken"));
    }
    let events = journal::events(&system).await;
    journal::check(&events);
    assert_eq!(events.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_clients_that_race_for_an_id_one_gets_it() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let id = system.user().await.id.to_string().replace(|c: char| c.is_ascii_digit(), "7");
    let price = json!({"amount": 1, "currency": "EUR"});
    let create = |n: usize| {
        let product = json!({"id": id, "sku": format!("S{n}"), "name": "Lantern", "price": price});
        system.try_command("product.create", product)
    };
    let replies = join_all((0..16).map(create)).await;
    let (won, lost): (Vec<_>, Vec<_>) = replies.into_iter().partition(|reply| reply.is_ok());
    assert_eq!(won.len(), 1);
    assert!(lost.into_iter().all(|reply| reply.code() == "id_taken"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_free_again_after_delete_and_rename() {
    let system = System::new().await;
    let _command = system.command().await;
    let ada = json!({"email": "ada@example.com", "name": "Ada"});
    let first = system.accept("user.register", ada.clone()).await.id;
    assert_eq!(system.try_command("user.register", ada.clone()).await.code(), "email_taken");

    system.accept("user.update", json!({"id": first, "email": "lovelace@example.com"})).await;
    let second = system.accept("user.register", ada.clone()).await.id;
    let back = json!({"id": first, "email": "ada@example.com"});
    assert_eq!(system.try_command("user.update", back.clone()).await.code(), "email_taken");

    system.accept("user.delete", json!({"id": second})).await;
    system.accept("user.update", back).await;
    assert_eq!(system.try_command("user.register", ada).await.code(), "email_taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sku_is_free_again_while_others_ask_for_it() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let price = json!({"amount": 1, "currency": "EUR"});
    let create = json!({"sku": "S1", "name": "Lantern", "price": price});
    for _ in 0..20 {
        let id = system.accept("product.create", create.clone()).await.id;
        // One product releases the SKU while others claim it. Each gets a clear reply, and never do two of them hold
        // it.
        let (deleted, taken) = tokio::join!(
            system.try_command("product.delete", json!({"id": id})),
            join_all((0..8).map(|_| system.try_command("product.create", create.clone()))),
        );
        deleted.accepted();
        let winners: Vec<_> = taken
            .into_iter()
            .filter_map(|reply| match reply {
                Ok(_) => Some(reply.id()),
                Err(_) => {
                    assert_eq!(reply.code(), "sku_taken");
                    None
                }
            })
            .collect();
        assert!(winners.len() <= 1, "{winners:?}");
        for winner in winners {
            system.accept("product.delete", json!({"id": winner})).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spellings_that_look_the_same_are_the_same_address_and_sku() {
    let system = System::new().await;
    let _command = system.command().await;
    let register = |email: &str| system.try_command("user.register", json!({"email": email, "name": "Ada"}));
    register("amélie@münchen.de").await.accepted();
    for email in ["AME\u{301}LIE@MÜNCHEN.DE", "amélie@xn--mnchen-3ya.de", "ａｍélie@mu\u{308}nchen.de"] {
        assert_eq!(register(email).await.code(), "email_taken", "{email}");
    }
    for email in ["am\u{200b}élie@münchen.de", "amélie@mün\u{ad}chen.de", "\u{3164}@example.com"] {
        assert_eq!(register(email).await.code(), "malformed", "{email:?}");
    }
    let price = json!({"amount": 1, "currency": "EUR"});
    let create =
        |sku: &str| system.try_command("product.create", json!({"sku": sku, "name": "Lantern", "price": price}));
    create("É1").await.accepted();
    create("é1").await.accepted();
    assert_eq!(create("E\u{301}1").await.code(), "sku_taken");
    assert_eq!(create("É\u{200d}1").await.code(), "malformed");
}

/// Earlier versions compared addresses in lower case, and SKUs byte by byte.
#[tokio::test(flavor = "multi_thread")]
async fn claims_of_an_older_version_are_migrated_to_the_present_comparison() {
    let system = System::new().await;
    let command = system.command().await;
    let register = |email: &str| system.try_command("user.register", json!({"email": email, "name": "Ada"}));
    let price = json!({"amount": 1, "currency": "EUR"});
    let create =
        |sku: &str| system.try_command("product.create", json!({"sku": sku, "name": "Lantern", "price": price}));
    let [sharp, double, munich] = {
        let journal = system.journal().await;
        let claimed_before = async |id: domain::Id, value: &str| {
            journal.execute("update claims set value = $2 where id = $1", &[&id.0, &value]).await.unwrap();
            id
        };
        let sharp = claimed_before(register("straße@example.com").await.id(), "straße@example.com").await;
        // By the rules of that version this was another address.
        let double = register("strasse@example.com").await.id();
        let munich = claimed_before(register("ada@münchen.de").await.id(), "ada@münchen.de").await;
        claimed_before(create("É1").await.id(), "E\u{301}1").await;
        command.stop().await;
        journal.execute("delete from migrations where version = 3", &[]).await.unwrap();
        [sharp, double, munich]
    };

    let _command = system.command().await;
    for email in ["STRASSE@example.com", "STRAßE@example.com", "ada@xn--mnchen-3ya.de", "ADA@MÜNCHEN.DE"] {
        assert_eq!(register(email).await.code(), "email_taken", "{email}");
    }
    assert_eq!(create("É1").await.code(), "sku_taken");
    // Two users hold the same address now. Neither loses it through what the other does.
    system.accept("user.update", json!({"id": sharp, "name": "Grace"})).await;
    system.accept("user.update", json!({"id": double, "name": "Grace"})).await;
    system.accept("user.delete", json!({"id": sharp})).await;
    assert_eq!(register("straße@example.com").await.code(), "email_taken");
    system.accept("user.delete", json!({"id": double})).await;
    register("straße@example.com").await.accepted();
    system.accept("user.delete", json!({"id": munich})).await;
    register("ada@münchen.de").await.accepted();
}
