//! Sums beyond 64 bits, which valid orders can reach within seconds: the views, their reports and their lists stay
//! right.

use std::iter::repeat_n;

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tests::{Expect, System, journal};

use crate::projection::assert_views_are_journal;

/// The largest total that an order may have, in the smallest unit of its currency.
const LARGEST: u64 = 1_000_000_000_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn sums_of_a_day_and_a_user_may_exceed_64_bits() {
    let (system, _replicas) = System::complete().await;
    let (rich, poor) = (system.user().await.id, system.user().await.id);
    let (product, other) = (system.product(100_000).await.id, system.product(10).await.id);
    let order = |day: &str, user, product, amount: u64, currency: &str| {
        let price = json!({"amount": amount, "currency": currency});
        let lines = json!([{"product": product, "quantity": 1, "unit_price": price}]);
        json!({"user": user, "placed_at": format!("{day}T08:00:00Z"), "lines": lines})
    };
    let days = repeat_n("2010-12-01", 9_250).chain(repeat_n("2010-12-02", 50));
    let orders = days.map(|day| system.accept("order.create", order(day, rich, product, LARGEST, "GBP")));
    let placed: Vec<_> = stream::iter(orders).buffer_unordered(256).collect().await;
    let last = system.accept("order.create", order("2010-12-01", poor, other, 7, "EUR")).await.position;

    let read = async |name: &str, request: Value, position: u64| system.read(name, request, position).await.data();
    let pounds = |count: u64| json!({"amount": count * LARGEST, "currency": "GBP"});
    let euros = json!({"amount": 7, "currency": "EUR"});
    let days = json!({"from": "2010-12-01", "to": "2010-12-31"});
    let sales = read("sales.daily", days.clone(), last).await;
    assert_eq!(sales["days"][0]["revenue"], json!([euros, pounds(9_250)]));
    assert_eq!(sales["total"], json!({"orders": 9_301, "units": 9_301, "revenue": [euros, pounds(9_300)]}));
    let top = async |more: Value, position: u64| {
        let mut request = days.clone();
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let items = read("sales.top", request, position).await["items"].take();
        let items = items.as_array().unwrap().iter();
        items.map(|item| json!([item["product"], item["units"], item["revenue"]])).collect::<Vec<_>>()
    };
    let (much, little) = ([json!([product, 9_300, [pounds(9_300)]])], [json!([other, 1, [euros]])]);
    assert_eq!(top(json!({"by": "revenue", "currency": "GBP"}), last).await, much);
    assert_eq!(top(json!({"by": "revenue", "currency": "EUR"}), last).await, little);
    assert_eq!(top(json!({"by": "units", "currency": "GBP"}), last).await, much);
    assert_eq!(top(json!({"by": "units"}), last).await, [much, little].concat());
    let spent = async |position: u64| {
        let users = read("user.list", json!({"sort": "spent", "currency": "GBP"}), position).await;
        users["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|user| json!([user["id"], user["orders"], user["spent"]]))
            .collect()
    };
    let spenders: Vec<Value> = spent(last).await;
    assert_eq!(spenders, [json!([rich, 9_300, [pounds(9_300)]])]);

    let cancel = |id| system.accept("order.cancel", json!({"id": id}));
    let cancelled = stream::iter(placed.iter().take(200).map(|placed| cancel(placed.id))).buffer_unordered(64);
    let last = cancelled.map(|cancelled| cancelled.position).fold(0, async |last, next| u64::max(last, next)).await;
    let spenders: Vec<Value> = spent(last).await;
    assert_eq!(spenders, [json!([rich, 9_100, [pounds(9_100)]])]);
    let user = read("user.get", json!({"id": rich}), last).await;
    assert_eq!((&user["orders"], &user["spent"]), (&json!(9_100), &json!([pounds(9_100)])));
    let sales = read("sales.daily", days.clone(), last).await;
    assert_eq!(sales["total"]["revenue"], json!([euros, pounds(9_100)]));
    assert_eq!(top(json!({"by": "units"}), last).await[0], json!([product, 9_100, [pounds(9_100)]]));
    journal::caught_up(&system).await;
    assert_views_are_journal(&system).await;
}
