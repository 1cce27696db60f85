//! What may be held by one living aggregate alone: e-mail addresses and SKUs, under races, and freed again.

use futures_util::future::join_all;
use serde_json::json;
use tests::{System, journal};

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_race_for_an_address_one_gets_it() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    for round in 0..10 {
        let register = |n: usize| {
            // Letter case does not make two addresses of one.
            let email =
                if n.is_multiple_of(2) { format!("ADA{round}@example.com") } else { format!("ada{round}@example.com") };
            system.try_command("user.register", json!({"email": email, "name": format!("Ada {n}")}))
        };
        let replies = join_all((0..16).map(register)).await;
        let (won, lost): (Vec<_>, Vec<_>) = replies.into_iter().partition(|reply| reply.result.is_ok());
        assert_eq!(won.len(), 1, "round {round}");
        assert!(lost.into_iter().all(|reply| reply.code() == "email_taken"));
    }
    let events = journal::events(&system).await;
    journal::check(&events);
    assert_eq!(events.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_race_for_an_id_one_gets_it() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let id = system.user().await.id.to_string().replace(|c: char| c.is_ascii_digit(), "7");
    let price = json!({"amount": 1, "currency": "EUR"});
    let create = |n: usize| {
        let product = json!({"id": id, "sku": format!("S{n}"), "name": "Lantern", "price": price});
        system.try_command("product.create", product)
    };
    let replies = join_all((0..16).map(create)).await;
    let (won, lost): (Vec<_>, Vec<_>) = replies.into_iter().partition(|reply| reply.result.is_ok());
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
async fn a_sku_is_free_again_after_delete_and_rename_even_at_once() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let price = json!({"amount": 1, "currency": "EUR"});
    let create = json!({"sku": "S1", "name": "Lantern", "price": price});
    for _ in 0..20 {
        let id = system.accept("product.create", create.clone()).await.id;
        // One gives the SKU up while others ask for it: each gets a clear answer, and never two of them have it.
        let (deleted, taken) = tokio::join!(
            system.try_command("product.delete", json!({"id": id})),
            join_all((0..8).map(|_| system.try_command("product.create", create.clone()))),
        );
        deleted.accepted();
        let winners: Vec<_> = taken
            .into_iter()
            .filter_map(|reply| match reply.result {
                Ok(_) => Some(reply.id()),
                Err(failure) => {
                    assert_eq!(failure.code, "sku_taken");
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
