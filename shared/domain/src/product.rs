//! Products and their stock. No two products have the same SKU, in whatever spelling, unless one of them is deleted.
//! Stock never falls below zero, and a new price is in a currency that is in use.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{
    Aggregate, Aggregates, Claim, Currency, Id, Money, Name, Needs, Rejection, Sample, Sku, Timestamp, strict,
};

/// The largest stock that a product can be created with or restocked to, in pieces. Only the returns of cancelled
/// orders can exceed it.
pub const MAX_STOCK: i64 = 1_000_000_000_000;

commands! {
    Product {
        Create("create", creates, "Creates a product with a price and, if given, a first stock; the SKU must be free")
        Update("update", "Changes the SKU, name or price of a product; orders keep what they fixed")
        Restock("restock", "Adds to the stock of a product, or takes from it where the quantity is negative")
        Delete("delete", "Deletes a product and frees the SKU; orders stay")
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Made by the service if absent; UUID version 7 recommended.
    #[serde(default, deserialize_with = "strict::or_default")]
    #[schemars(with = "Option<Id>", skip_serializing_if = "Id::is_none")]
    pub id: Id,
    #[serde(deserialize_with = "Sku::requested")]
    pub sku: Sku,
    #[serde(deserialize_with = "Name::requested")]
    pub name: Name,
    /// In a currency that is in use.
    pub price: Money,
    /// Pieces in stock from the start.
    #[serde(default, deserialize_with = "stock")]
    #[schemars(with = "Option<i64>", range(min = 0, max = MAX_STOCK))]
    pub stock: i64,
}

/// What is absent stays as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Update {
    pub id: Id,
    #[serde(default, deserialize_with = "Sku::requested_if_any")]
    pub sku: Option<Sku>,
    #[serde(default, deserialize_with = "Name::requested_if_any")]
    pub name: Option<Name>,
    /// In a currency that is in use, unless it is the price that the product has.
    pub price: Option<Money>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Restock {
    pub id: Id,
    /// Pieces: positive to add, negative to take.
    #[serde(deserialize_with = "restock_quantity")]
    #[schemars(range(min = -MAX_STOCK, max = MAX_STOCK))]
    pub quantity: i64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    pub id: Id,
}

events! {
    Created("created", 1)
    Updated("updated", 1)
    Restocked("restocked", 1)
    StockTaken("stock_taken", 1)
    StockReturned("stock_returned", 1)
    Deleted("deleted", 1)
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Created {
    pub sku: Sku,
    pub name: Name,
    /// The price of one piece.
    pub price: Money,
    /// The number of pieces.
    pub stock: i64,
}

/// The product after the change, except for its stock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Updated {
    pub sku: Sku,
    pub name: Name,
    pub price: Money,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restocked {
    /// The number of pieces, positive if they were added and negative if they were taken. It is never 0.
    pub quantity: i64,
    /// The stock after the change.
    pub stock: i64,
}

/// An order took pieces. There is one event for all of its lines with this product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StockTaken {
    pub order: Id,
    /// The number of pieces, above 0.
    pub quantity: i64,
    /// The stock after the change.
    pub stock: i64,
}

/// A cancelled order returned its pieces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StockReturned {
    pub order: Id,
    /// The number of pieces, above 0.
    pub quantity: i64,
    /// The stock after the change.
    pub stock: i64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deleted {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Product {
    Living(Living),
    Deleted,
}

/// A product that can be bought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Living {
    pub sku: Sku,
    pub name: Name,
    /// The price of one piece.
    pub price: Money,
    /// The number of pieces, never below 0.
    pub stock: i64,
}

impl Aggregate for Product {
    const KIND: &'static str = "product";

    const REJECTIONS: &'static [(&'static str, &'static str)] = &[
        ("product_not_found", "the command names a product that does not exist, or not any more"),
        ("sku_taken", "another product has this SKU, in whatever spelling; `details.id` is the product's"),
        ("out_of_stock", "there are fewer pieces than the command asks for"),
        ("stock_overflow", "a stock can be 1,000,000,000,000 at most"),
        (
            "currency_withdrawn",
            "a new price, or an order placed since, is in a currency that is no longer in use; `details.withdrawn` says \
                since when",
        ),
    ];

    const SAMPLES: &'static [Sample] = &[
        Sample::accepted(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000011","sku":"71053","name":"White metal lantern",
                "price":{"amount":339,"currency":"GBP"},"stock":10}"#,
        ),
        Sample::refused(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000012","sku":"71053","name":"Lantern",
                "price":{"amount":250,"currency":"GBP"}}"#,
            "sku_taken",
        ),
        Sample::refused(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000012","sku":"71054","name":"Lantern",
                "price":{"amount":250,"currency":"HRK"}}"#,
            "currency_withdrawn",
        ),
        Sample::accepted(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000012","sku":"71054","name":"Lantern",
                "price":{"amount":250,"currency":"GBP"}}"#,
        ),
        Sample::accepted(
            "update",
            r#"{"id":"00000000-0000-0000-0000-000000000011","sku":"71053B","name":"Red metal lantern",
                "price":{"amount":375,"currency":"GBP"}}"#,
        ),
        Sample::accepted("restock", r#"{"id":"00000000-0000-0000-0000-000000000011","quantity":-2}"#),
        Sample::refused("restock", r#"{"id":"00000000-0000-0000-0000-000000000011","quantity":-20}"#, "out_of_stock"),
        Sample::refused(
            "restock",
            r#"{"id":"00000000-0000-0000-0000-000000000011","quantity":1000000000000}"#,
            "stock_overflow",
        ),
        Sample::accepted("delete", r#"{"id":"00000000-0000-0000-0000-000000000012"}"#),
        Sample::refused("delete", r#"{"id":"00000000-0000-0000-0000-000000000012"}"#, "product_not_found"),
    ];

    type Command = Command;
    type Event = Event;

    fn needs(command: &Command) -> Needs {
        let claims = match command {
            Command::Create(Create { sku, .. }) | Command::Update(Update { sku: Some(sku), .. }) => vec![claim(sku)],
            Command::Update(Update { sku: None, .. }) | Command::Restock(_) | Command::Delete(_) => vec![],
        };
        Needs { claims, ..Needs::default() }
    }

    fn decide(command: Command, aggregates: &Aggregates, now: Timestamp) -> Result<Vec<(Id, crate::Event)>, Rejection> {
        let id = command.target();
        let event = match command {
            Command::Create(command) => command.decide(aggregates, now).map(Some),
            Command::Update(command) => command.decide(aggregates, now),
            Command::Restock(command) => command.decide(aggregates).map(Some),
            Command::Delete(command) => command.decide(aggregates).map(Some),
        }?;
        Ok(event.into_iter().map(|event| (id, event.into())).collect())
    }

    fn evolve(before: Option<Self>, event: &Event) -> Option<Self> {
        match (before, event) {
            (None, Event::Created(Created { sku, name, price, stock })) => {
                Some(Self::Living(Living { sku: sku.clone(), name: name.clone(), price: *price, stock: *stock }))
            }
            (Some(Self::Living(product)), Event::Updated(Updated { sku, name, price })) => {
                Some(Self::Living(Living { sku: sku.clone(), name: name.clone(), price: *price, ..product }))
            }
            (
                Some(Self::Living(product)),
                Event::Restocked(Restocked { stock, .. })
                | Event::StockTaken(StockTaken { stock, .. })
                | Event::StockReturned(StockReturned { stock, .. }),
            ) => Some(Self::Living(Living { stock: *stock, ..product })),
            (Some(Self::Living(_)), Event::Deleted(Deleted {})) => Some(Self::Deleted),
            (
                before,
                Event::Created(_)
                | Event::Updated(_)
                | Event::Restocked(_)
                | Event::StockTaken(_)
                | Event::StockReturned(_)
                | Event::Deleted(_),
            ) => before,
        }
    }

    fn claims(&self) -> Vec<Claim> {
        match self {
            Self::Living(product) => vec![claim(&product.sku)],
            Self::Deleted => vec![],
        }
    }
}

impl Create {
    fn decide(self, aggregates: &Aggregates, now: Timestamp) -> Result<Event, Rejection> {
        let Self { id, sku, name, price, stock } = self;
        aggregates.require_new(id)?;
        require_free(aggregates, id, &sku)?;
        require_in_use(price.currency, now, "price.currency")?;
        Ok(Event::Created(Created { sku, name, price, stock }))
    }
}

impl Update {
    fn decide(self, aggregates: &Aggregates, now: Timestamp) -> Result<Option<Event>, Rejection> {
        let product = living(aggregates, self.id)?;
        let updated = Updated {
            sku: self.sku.unwrap_or_else(|| product.sku.clone()),
            name: self.name.unwrap_or_else(|| product.name.clone()),
            price: self.price.unwrap_or(product.price),
        };
        if (&updated.sku, &updated.name, updated.price) == (&product.sku, &product.name, product.price) {
            return Ok(None);
        }
        if claim(&updated.sku) != claim(&product.sku) {
            require_free(aggregates, self.id, &updated.sku)?;
        }
        if updated.price != product.price {
            require_in_use(updated.price.currency, now, "price.currency")?;
        }
        Ok(Some(Event::Updated(updated)))
    }
}

impl Restock {
    fn decide(self, aggregates: &Aggregates) -> Result<Event, Rejection> {
        let product = living(aggregates, self.id)?;
        // The sum cannot overflow, since both numbers are far from the limits of 64 bits. Saturating only rules out a
        // panic.
        let stock = product.stock.saturating_add(self.quantity);
        if stock < 0 {
            return Err(out_of_stock(self.id, product, self.quantity.saturating_neg()));
        }
        if stock > MAX_STOCK && self.quantity > 0 {
            return Err(Rejection::refused("stock_overflow", format!("quantity: a stock can be {MAX_STOCK} at most"))
                .with("product", self.id.to_string())
                .with("field", "quantity")
                .with("quantity", self.quantity)
                .with("available", product.stock)
                .with("max", MAX_STOCK));
        }
        Ok(Event::Restocked(Restocked { quantity: self.quantity, stock }))
    }
}

impl Delete {
    fn decide(self, aggregates: &Aggregates) -> Result<Event, Rejection> {
        living(aggregates, self.id)?;
        Ok(Event::Deleted(Deleted {}))
    }
}

/// The product, which must exist.
///
/// # Errors
/// If there is no such product, or it is deleted.
pub(crate) fn living(aggregates: &Aggregates, id: Id) -> Result<&Living, Rejection> {
    match aggregates.get::<Product>(id) {
        Some(Product::Living(product)) => Ok(product),
        Some(Product::Deleted) | None => {
            Err(Rejection::not_found("product_not_found", format!("there is no product {id}"))
                .with("product", id.to_string()))
        }
    }
}

pub(crate) fn out_of_stock(id: Id, product: &Living, requested: i64) -> Rejection {
    Rejection::refused("out_of_stock", format!("{requested} of {} requested, {} in stock", product.sku, product.stock))
        .with("product", id.to_string())
        .with("sku", &*product.sku)
        .with("requested", requested)
        .with("available", product.stock)
}

fn require_free(aggregates: &Aggregates, id: Id, sku: &Sku) -> Result<(), Rejection> {
    match aggregates.holder(&claim(sku)) {
        Some(holder) if holder != id => Err(Rejection::conflict("sku_taken", "another product has this SKU")
            .with("sku", &**sku)
            .with("id", holder.to_string())),
        Some(_) | None => Ok(()),
    }
}

fn claim(sku: &Sku) -> Claim {
    Claim { scope: "product.sku", value: sku.normalized() }
}

/// Checks that the currency was in use at that time.
///
/// # Errors
/// If it had been withdrawn by then.
pub(crate) fn require_in_use(currency: Currency, at: Timestamp, field: &str) -> Result<(), Rejection> {
    match currency.withdrawn() {
        Some(day) if *at.day() >= *day => {
            let message = format!("{field}: {currency} has not been in use since {day}");
            Err(Rejection::refused("currency_withdrawn", message)
                .with("field", field)
                .with("currency", currency.as_str())
                .with("withdrawn", day))
        }
        Some(_) | None => Ok(()),
    }
}

fn stock<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Default)]
    struct Stock(i64);

    impl<'de> Deserialize<'de> for Stock {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let expected = format_args!("a whole number of pieces from 0 to {MAX_STOCK}");
            strict::whole_number(deserializer, expected, |stock| (0..=MAX_STOCK).contains(&stock)).map(Self)
        }
    }

    strict::or_default(deserializer).map(|Stock(stock)| stock)
}

fn restock_quantity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let expected = format_args!("a whole number of pieces from -{MAX_STOCK} to {MAX_STOCK}, not 0");
    strict::whole_number(deserializer, expected, |quantity| {
        quantity != 0 && (-MAX_STOCK..=MAX_STOCK).contains(&quantity)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::MAX_STOCK;
    use crate::{
        Aggregates,
        RejectionKind::{Conflict, NotFound, Refused},
        scenario::{bare, command, create_order, create_product, gbp, given, id, now, register, restock},
    };

    #[test]
    fn a_sku_is_unique_whatever_its_spelling_but_letter_case_counts() {
        given([create_product(10, "É1", 5)]).when(create_product(11, "E\u{301}1", 5)).then_refused(
            Conflict,
            "sku_taken",
            json!({ "sku": "É1", "id": id(10) }),
        );
        given([create_product(10, "85123A", 5)]).when(create_product(11, "８５１２３Ａ", 5)).then_refused(
            Conflict,
            "sku_taken",
            json!({ "sku": "８５１２３Ａ", "id": id(10) }),
        );
        given([create_product(10, "85123A", 5)]).when(create_product(11, "85123a", 5)).then_accepted();
    }

    /// The tests run at 2026-01-31.
    #[test]
    fn a_new_price_is_in_a_currency_that_is_in_use() {
        for (code, day) in [("BGN", "2026-01-01"), ("HRK", "2023-01-01"), ("DEM", "2002-03-01")] {
            let price = json!({ "amount": 100, "currency": code });
            let details = json!({ "field": "price.currency", "currency": code, "withdrawn": day });
            let create = json!({ "id": id(10), "sku": "A", "name": "LANTERN", "price": price });
            given([]).when(command("product.create", create)).then_refused(
                Refused,
                "currency_withdrawn",
                details.clone(),
            );
            let update = command("product.update", json!({ "id": id(10), "price": price }));
            given([create_product(10, "A", 5)]).when(update).then_refused(Refused, "currency_withdrawn", details);
        }
    }

    #[test]
    fn a_price_stays_when_its_currency_is_withdrawn() {
        let price = json!({ "amount": 100, "currency": "BGN" });
        let mut aggregates = Aggregates::default();
        let before = "2025-12-31T23:59:59Z".parse().unwrap();
        let create = json!({ "id": id(10), "sku": "A", "name": "LANTERN", "price": price, "stock": 5 });
        aggregates.execute(command("product.create", create), None, before).unwrap();
        let rename = json!({ "id": id(10), "name": "Lamp", "price": price });
        assert_eq!(aggregates.execute(command("product.update", rename), None, now()).unwrap().len(), 1);
        let dearer = json!({ "id": id(10), "price": { "amount": 101, "currency": "BGN" } });
        let refused = aggregates.execute(command("product.update", dearer), None, now()).unwrap_err();
        assert_eq!(refused.code, "currency_withdrawn");
    }

    #[test]
    fn a_product_is_created() {
        let request = json!({ "id": id(10), "sku": "85123A", "name": "LANTERN", "price": gbp(255), "stock": 7 });
        given([]).when(command("product.create", request)).then([(
            "product.created",
            10,
            json!({ "sku": "85123A", "name": "LANTERN", "price": gbp(255), "stock": 7 }),
        )]);
    }

    #[test]
    fn a_product_may_be_free_of_charge_and_has_no_stock_by_default() {
        let request = json!({ "sku": "85123A", "name": "LANTERN", "price": gbp(0) });
        given([]).when(command("product.create", request)).then([(
            "product.created",
            99,
            json!({ "sku": "85123A", "name": "LANTERN", "price": gbp(0), "stock": 0 }),
        )]);
    }

    #[test]
    fn an_identifier_cannot_be_used_again_after_a_deletion_or_for_another_kind() {
        let pasts = [
            vec![create_product(10, "A", 5)],
            vec![create_product(10, "A", 5), bare("product.delete", 10)],
            vec![register(10, "ada@example.com")],
        ];
        for past in pasts {
            given(past).when(create_product(10, "B", 5)).then_refused(Conflict, "id_taken", json!({ "id": id(10) }));
        }
    }

    #[test]
    fn a_sku_is_unique() {
        let past = [create_product(10, "A", 5), create_product(11, "B", 5)];
        for command in [create_product(12, " A ", 5), command("product.update", json!({ "id": id(11), "sku": "A" }))] {
            given(past.clone()).when(command).then_refused(Conflict, "sku_taken", json!({ "sku": "A", "id": id(10) }));
        }
    }

    #[test]
    fn the_letter_case_of_a_sku_counts() {
        given([create_product(10, "15056BL", 5)]).when(create_product(11, "15056bl", 5)).then([(
            "product.created",
            11,
            json!({ "sku": "15056bl", "name": "Lantern", "price": gbp(250), "stock": 5 }),
        )]);
    }

    #[test]
    fn a_sku_is_free_again_after_a_deletion_and_after_a_change() {
        let change = command("product.update", json!({ "id": id(10), "sku": "B" }));
        for past in [bare("product.delete", 10), change] {
            given([create_product(10, "A", 5), past]).when(create_product(11, "A", 5)).then([(
                "product.created",
                11,
                json!({ "sku": "A", "name": "Lantern", "price": gbp(250), "stock": 5 }),
            )]);
        }
    }

    #[test]
    fn a_sku_is_taken_by_a_change_to_it() {
        let change = command("product.update", json!({ "id": id(10), "sku": "B" }));
        given([create_product(10, "A", 5), change]).when(create_product(11, "B", 5)).then_refused(
            Conflict,
            "sku_taken",
            json!({ "sku": "B", "id": id(10) }),
        );
    }

    #[test]
    fn an_update_changes_the_fields_that_it_has_and_keeps_the_rest() {
        let euros = json!({ "amount": 300, "currency": "EUR" });
        let cases = [
            (json!({ "id": id(10), "sku": "B" }), json!({ "sku": "B", "name": "Lantern", "price": gbp(250) })),
            (json!({ "id": id(10), "name": "Lamp" }), json!({ "sku": "A", "name": "Lamp", "price": gbp(250) })),
            (json!({ "id": id(10), "price": euros }), json!({ "sku": "A", "name": "Lantern", "price": euros })),
        ];
        for (request, event) in cases {
            let update = command("product.update", request);
            given([create_product(10, "A", 5)]).when(update).then([("product.updated", 10, event)]);
        }
    }

    #[test]
    fn an_update_keeps_the_stock() {
        let update = command("product.update", json!({ "id": id(10), "name": "Lamp" }));
        given([create_product(10, "A", 5), update]).when(restock(10, 1)).then([(
            "product.restocked",
            10,
            json!({ "quantity": 1, "stock": 6 }),
        )]);
    }

    #[test]
    fn an_update_that_changes_nothing_has_no_event() {
        for request in [
            json!({ "id": id(10) }),
            json!({ "id": id(10), "sku": "A", "name": "Lantern", "price": gbp(250) }),
            json!({ "id": id(10), "sku": null, "name": null, "price": null }),
        ] {
            given([create_product(10, "A", 5)]).when(command("product.update", request)).then([]);
        }
    }

    #[test]
    fn a_restock_adds_to_the_stock_or_takes_from_it_down_to_zero() {
        for (quantity, stock) in [(3, 8), (-3, 2), (-5, 0)] {
            given([create_product(10, "A", 5)]).when(restock(10, quantity)).then([(
                "product.restocked",
                10,
                json!({ "quantity": quantity, "stock": stock }),
            )]);
        }
    }

    #[test]
    fn a_restock_cannot_take_more_than_the_stock() {
        for (quantity, requested) in [(-6, 6), (-MAX_STOCK, MAX_STOCK)] {
            given([create_product(10, "A", 5)]).when(restock(10, quantity)).then_refused(
                Refused,
                "out_of_stock",
                json!({ "product": id(10), "sku": "A", "requested": requested, "available": 5 }),
            );
        }
    }

    #[test]
    fn a_stock_has_an_upper_limit() {
        given([create_product(10, "A", MAX_STOCK - 1)]).when(restock(10, 1)).then([(
            "product.restocked",
            10,
            json!({ "quantity": 1, "stock": MAX_STOCK }),
        )]);
        given([create_product(10, "A", MAX_STOCK)]).when(restock(10, 1)).then_refused(
            Refused,
            "stock_overflow",
            json!({
                "product": id(10), "field": "quantity", "quantity": 1, "available": MAX_STOCK, "max": MAX_STOCK,
            }),
        );
    }

    #[test]
    fn a_stock_that_a_cancellation_raised_above_the_limit_can_still_be_taken_from() {
        let past = [
            register(1, "ada@example.com"),
            create_product(10, "A", MAX_STOCK),
            create_order(20, 1, &[(10, 2)]),
            restock(10, 2),
            bare("order.cancel", 20),
        ];
        given(past).when(restock(10, -1)).then([(
            "product.restocked",
            10,
            json!({ "quantity": -1, "stock": MAX_STOCK + 1 }),
        )]);
    }

    #[test]
    fn a_product_can_be_deleted_while_it_has_stock() {
        given([create_product(10, "A", 5)]).when(bare("product.delete", 10)).then([("product.deleted", 10, json!({}))]);
    }

    #[test]
    fn a_product_that_does_not_exist_or_is_deleted_cannot_be_changed() {
        let pasts = [
            vec![],
            vec![create_product(10, "A", 5), bare("product.delete", 10)],
            vec![register(10, "ada@example.com")],
        ];
        for past in pasts {
            for command in [
                bare("product.update", 10),
                command("product.update", json!({ "id": id(10), "name": "Lamp" })),
                restock(10, 1),
                bare("product.delete", 10),
            ] {
                given(past.clone()).when(command).then_refused(
                    NotFound,
                    "product_not_found",
                    json!({ "product": id(10) }),
                );
            }
        }
    }
}
