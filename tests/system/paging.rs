//! Paging by cursor through lists that change meanwhile: no document appears twice, and none that stays is missed.

use std::collections::HashSet;

use serde_json::{Value, json};
use tests::{Expect, System};

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_changes_shows_no_document_twice_and_misses_none_that_stays() {
    let (system, _replicas) = System::complete().await;
    let (user, product) = (system.user().await.id, system.product(1_000_000).await.id);
    let order = |day: usize, quantity: usize| {
        // Many orders have the same time and the same total. The cursor must tell them apart.
        let placed_at = format!("2010-12-{:02}T08:00:00Z", 1 + day % 5);
        json!({"user": user, "placed_at": placed_at, "lines": [{"product": product, "quantity": 1 + quantity % 3}]})
    };
    let mut staying = HashSet::new();
    let mut removed = Vec::new();
    for n in 0..90 {
        let id = system.accept("order.create", order(n, n)).await.id.to_string();
        if n % 3 == 0 {
            removed.push(id);
        } else {
            staying.insert(id);
        }
    }
    let last = system.head().await;
    for (round, request) in [
        json!({"limit": 7}),
        json!({"limit": 7, "order": "asc", "user": user}),
        json!({"limit": 7, "sort": "total", "currency": "GBP"}),
        json!({"limit": 7, "sort": "total", "currency": "GBP", "order": "asc", "from": "2010-12-01T00:00:00Z"}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut seen = HashSet::new();
        let mut request: Value = request;
        let mut position = last;
        for page in 0.. {
            let data = system.read("order.list", request.clone(), position).await.data();
            for item in data["items"].as_array().unwrap() {
                assert!(seen.insert(item["id"].as_str().unwrap().to_owned()), "twice in round {round}: {item}");
            }
            let Some(next) = data["next"].as_str() else { break };
            request["cursor"] = json!(next);
            // Documents are added and removed before and behind the cursor.
            system.accept("order.create", order(page, page)).await;
            if let Some(id) = removed.pop() {
                system.accept("order.cancel", json!({"id": id})).await;
                position = system.accept("order.delete", json!({"id": id})).await.position;
            }
        }
        assert!(staying.is_subset(&seen), "round {round} missed {:?}", staying.difference(&seen));
    }
    assert!(removed.is_empty(), "the list changed all the time");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_paged_by_name_registration_and_amount_spent() {
    let (system, _replicas) = System::complete().await;
    let product = system.product(1_000_000).await.id;
    let mut last = 0;
    for n in 0..25 {
        let country = if n % 2 == 0 { "France" } else { "St. Lucia" };
        let user = json!({"email": format!("u{n}@example.com"), "name": format!("User {}", n % 5), "country": country});
        let user = system.accept("user.register", user).await.id;
        let order = json!({"user": user, "lines": [{"product": product, "quantity": 1 + n % 4}]});
        last = system.accept("order.create", order).await.position;
    }
    let all = async |mut request: Value| {
        request["limit"] = json!(4);
        let mut items: Vec<Value> = Vec::new();
        loop {
            let data = system.read("user.list", request.clone(), last).await.data();
            items.extend(data["items"].as_array().unwrap().iter().cloned());
            match data["next"].as_str() {
                Some(next) => request["cursor"] = json!(next),
                None => return items,
            }
        }
    };
    let by = |items: &[Value], key: &dyn Fn(&Value) -> String| items.iter().map(key).collect::<Vec<_>>();
    let name = |user: &Value| user["name"].as_str().unwrap().to_owned();
    let spent = |user: &Value| format!("{:09}", user["spent"][0]["amount"].as_i64().unwrap());

    let names = by(&all(json!({})).await, &name);
    assert!(names.is_sorted() && names.len() == 25);
    let newest =
        by(&all(json!({"sort": "registered"})).await, &|user| user["registered_at"].as_str().unwrap().to_owned());
    assert!(newest.iter().rev().is_sorted() && newest.len() == 25);
    let amounts = by(&all(json!({"sort": "spent", "currency": "GBP", "country": "St. Lucia"})).await, &spent);
    assert!(amounts.iter().rev().is_sorted() && amounts.len() == 12, "{amounts:?}");
    let some = all(json!({"name_prefix": "uSER 3", "country": "France"})).await;
    assert!(some.iter().all(|user| user["name"] == "User 3" && user["country"] == "France"));
    assert_eq!(some.len(), 2);
}
