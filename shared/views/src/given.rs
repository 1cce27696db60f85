//! Events for tests. They all have the same time, and an order is at version 1 when it is placed.

use std::collections::BTreeSet;

use bson::RawDocumentBuf;
use domain::{
    Country, Email, Event, Id, Malformed, Money, Name, Recorded, Sku, Timestamp,
    order::{self, Line},
    product, user,
};

use crate::{List, Plan, View, document_ids};

pub fn id(n: u128) -> Id {
    format!("00000000-0000-0000-0000-{n:012}").parse().unwrap()
}

/// The document with this identifier after the events that change it.
pub fn fold<V: View>(id: &str, events: &[Recorded]) -> Option<V::Document> {
    let relevant = events.iter().filter(|event| document_ids::<V>(event).iter().any(|changed| changed == id));
    relevant.fold(None, |document, event| V::evolve(document, id, event).unwrap())
}

/// All documents of the view after the events, in the form in which they are stored.
pub fn documents<V: View>(events: &[Recorded]) -> Vec<RawDocumentBuf> {
    let ids: BTreeSet<String> = events.iter().flat_map(document_ids::<V>).collect();
    let documents = ids.iter().filter_map(|id| fold::<V>(id, events));
    documents.map(|document| bson::serialize_to_raw_document_buf(&document).unwrap()).collect()
}

pub fn page(plan: fn(&[u8]) -> Result<Plan, Malformed>, body: &str) -> List {
    match plan(body.as_bytes()).unwrap() {
        Plan::List(list) => list,
        other => panic!("{other:?}"),
    }
}

/// The field that the error about a malformed query names.
pub fn refusal(plan: fn(&[u8]) -> Result<Plan, Malformed>, body: &str) -> String {
    plan(body.as_bytes()).unwrap_err().field
}

pub fn registered(id: u128, name: &str, country: Option<&str>) -> Recorded {
    let (email, name, country) = person(id, name, country);
    recorded(id, 1, Event::User(user::Event::Registered(user::Registered { email, name, country })))
}

pub fn user_updated(id: u128, version: u64, name: &str, country: Option<&str>) -> Recorded {
    let (email, name, country) = person(id, name, country);
    recorded(id, version, Event::User(user::Event::Updated(user::Updated { email, name, country })))
}

pub fn user_deleted(id: u128, version: u64) -> Recorded {
    recorded(id, version, Event::User(user::Event::Deleted(user::Deleted {})))
}

pub fn created(id: u128, name: &str, price: i64, stock: i64) -> Recorded {
    let (sku, name, price) = (sku(id), Name::new(name).unwrap(), money(price, "GBP"));
    recorded(id, 1, Event::Product(product::Event::Created(product::Created { sku, name, price, stock })))
}

pub fn product_updated(id: u128, version: u64, name: &str, price: i64) -> Recorded {
    let (sku, name, price) = (sku(id), Name::new(name).unwrap(), money(price, "GBP"));
    recorded(id, version, Event::Product(product::Event::Updated(product::Updated { sku, name, price })))
}

pub fn restocked(id: u128, version: u64, stock: i64) -> Recorded {
    recorded(id, version, Event::Product(product::Event::Restocked(product::Restocked { quantity: 1, stock })))
}

pub fn stock_taken(product: u128, version: u64, stock: i64) -> Recorded {
    let taken = product::StockTaken { order: id(7), quantity: 1, stock };
    recorded(product, version, Event::Product(product::Event::StockTaken(taken)))
}

pub fn stock_returned(product: u128, version: u64, stock: i64) -> Recorded {
    let returned = product::StockReturned { order: id(7), quantity: 1, stock };
    recorded(product, version, Event::Product(product::Event::StockReturned(returned)))
}

pub fn product_deleted(id: u128, version: u64) -> Recorded {
    recorded(id, version, Event::Product(product::Event::Deleted(product::Deleted {})))
}

/// A line with a price in GBP.
pub fn line(product: u128, quantity: i64, unit_price: i64) -> Line {
    priced(product, quantity, unit_price, "GBP")
}

pub fn priced(product: u128, quantity: i64, unit_price: i64, currency: &str) -> Line {
    Line {
        product: id(product),
        sku: sku(product),
        name: Name::new(&format!("LANTERN {product}")).unwrap(),
        quantity,
        unit_price: money(unit_price, currency),
    }
}

pub fn named(line: Line, name: &str) -> Line {
    Line { name: Name::new(name).unwrap(), ..line }
}

pub fn placed(order: u128, user: u128, placed_at: &str, lines: Vec<Line>) -> Recorded {
    let amount =
        lines.iter().map(|line| line.quantity.saturating_mul(line.unit_price.amount)).fold(0, i64::saturating_add);
    let total = Money { amount, currency: lines[0].unit_price.currency };
    let placed = order::Placed { user: id(user), placed_at: placed_at.parse().unwrap(), lines, total };
    recorded(order, 1, Event::Order(order::Event::Placed(placed)))
}

pub fn paid(order: u128, version: u64) -> Recorded {
    recorded(order, version, Event::Order(order::Event::Paid(order::Paid {})))
}

pub fn shipped(order: u128, version: u64) -> Recorded {
    recorded(order, version, Event::Order(order::Event::Shipped(order::Shipped {})))
}

/// The cancellation of the order of the event `placed`.
pub fn cancelled(placed: &Recorded, version: u64, refund_due: bool) -> Recorded {
    let Event::Order(order::Event::Placed(order::Placed { user, placed_at, lines, total })) = placed.event.clone()
    else {
        panic!("{placed:?}");
    };
    let cancelled = order::Cancelled { user, placed_at, lines, total, refund_due, reason: None };
    Recorded { version, event: Event::Order(order::Event::Cancelled(cancelled)), ..*placed }
}

pub fn order_deleted(order: u128, version: u64) -> Recorded {
    recorded(order, version, Event::Order(order::Event::Deleted(order::Deleted {})))
}

/// At least one event of every kind, in an order in which they can happen.
pub fn everything() -> Vec<Recorded> {
    let kept = placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250), line(2, 1, 100), line(1, 3, 200)]);
    let withdrawn = placed(8, 9, "2010-12-01T08:26:00Z", vec![priced(1, 1, 30, "EUR")]);
    vec![
        registered(9, "Ada", Some("United Kingdom")),
        user_updated(9, 2, "Grace", Some("France")),
        created(1, "WHITE METAL LANTERN", 250, 0),
        product_updated(1, 2, "RED METAL LANTERN", 260),
        restocked(1, 3, 9),
        kept,
        stock_taken(1, 4, 4),
        withdrawn.clone(),
        stock_taken(1, 5, 3),
        paid(7, 2),
        shipped(7, 3),
        cancelled(&withdrawn, 2, false),
        stock_returned(1, 6, 4),
        order_deleted(7, 4),
        order_deleted(8, 3),
        product_deleted(1, 7),
        user_deleted(9, 3),
    ]
}

fn recorded(aggregate: u128, version: u64, event: Event) -> Recorded {
    Recorded {
        position: 1,
        at: Timestamp::from_unix_millis(1_293_840_000_000).unwrap(),
        id: id(aggregate),
        version,
        event,
    }
}

fn person(id: u128, name: &str, country: Option<&str>) -> (Email, Name, Option<Country>) {
    let email = Email::new(&format!("user{id}@example.com")).unwrap();
    (email, Name::new(name).unwrap(), country.map(|country| Country::new(country).unwrap()))
}

fn sku(product: u128) -> Sku {
    Sku::new(&format!("S{product}")).unwrap()
}

fn money(amount: i64, currency: &str) -> Money {
    Money { amount, currency: currency.parse().unwrap() }
}
