//! Orders. An order goes from placed to paid to shipped. It can be cancelled while it is placed or paid, and deleted
//! once it is shipped or cancelled. Placing it takes the stock of all lines or of none; cancelling it gives the stock
//! back. The names and prices of the lines are fixed when the order is placed, and an order has one currency.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{
    Aggregate, Aggregates, Id, MAX_AMOUNT, Money, Name, Needs, Note, Rejection, Sample, Sku, Timestamp, product,
    strict::{self, Object},
    user,
};

/// The largest number of lines in one order.
pub const MAX_LINES: usize = 2_000;
/// The largest number of pieces in one line.
pub const MAX_QUANTITY: i64 = 1_000_000;
/// How far the clock of a client may be ahead, so that an order placed "now" is not refused. The client's time is
/// stored unchanged.
const MAX_CLOCK_SKEW_MILLIS: i64 = 5_000;

commands! {
    Order {
        Create("create", creates, "Places an order: fixes names and prices, takes the stock of all lines or of none")
        Pay("pay", "Marks a placed order as paid")
        Ship("ship", "Marks a paid order as shipped")
        Cancel("cancel", "Cancels a placed or paid order and gives its stock back")
        Delete("delete", "Deletes a shipped or cancelled order")
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Made by the service if absent; UUID version 7 recommended.
    #[serde(default, deserialize_with = "strict::or_default")]
    #[schemars(with = "Option<Id>", skip_serializing_if = "Id::is_none")]
    pub id: Id,
    /// Who buys.
    pub user: Id,
    /// 1 to 2,000; a product may stand in several.
    #[serde(deserialize_with = "lines")]
    #[schemars(length(min = 1, max = MAX_LINES))]
    pub lines: Vec<RequestedLine>,
    /// When it was placed, if not now; not in the future, but for 5 seconds that clocks may differ by.
    pub placed_at: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RequestedLine {
    pub product: Id,
    /// Pieces.
    #[serde(deserialize_with = "quantity")]
    #[schemars(range(min = 1, max = MAX_QUANTITY))]
    pub quantity: i64,
    /// The product's price if absent. In a currency that was in use when the order was placed.
    pub unit_price: Option<Money>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pay {
    pub id: Id,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ship {
    pub id: Id,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    pub id: Id,
    /// Why, for whoever reads the event.
    #[serde(default, deserialize_with = "Note::requested_if_any")]
    pub reason: Option<Note>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    pub id: Id,
}

events! {
    Placed("placed", 1)
    Paid("paid", 1)
    Shipped("shipped", 1)
    Cancelled("cancelled", 2, from CancelledV1)
    Deleted("deleted", 1)
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placed {
    pub user: Id,
    pub placed_at: Timestamp,
    pub lines: Vec<Line>,
    /// The sum over the lines.
    pub total: Money,
}

/// A line of an order, with the product's name and price as they were when the order was placed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    pub product: Id,
    pub sku: Sku,
    pub name: Name,
    /// The number of pieces.
    pub quantity: i64,
    pub unit_price: Money,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paid {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shipped {}

/// The event carries what the order was, so that a view that counts orders can subtract it without having kept it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cancelled {
    pub user: Id,
    pub placed_at: Timestamp,
    pub lines: Vec<Line>,
    pub total: Money,
    /// Whether the order had been paid, so that the money has to be refunded.
    pub refund_due: bool,
    /// As far as whoever cancelled it gave one.
    pub reason: Option<Note>,
}

/// The cancellation of an order when nobody was asked for a reason yet.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CancelledV1 {
    user: Id,
    placed_at: Timestamp,
    lines: Vec<Line>,
    total: Money,
    refund_due: bool,
}

impl From<CancelledV1> for Cancelled {
    fn from(CancelledV1 { user, placed_at, lines, total, refund_due }: CancelledV1) -> Self {
        Self { user, placed_at, lines, total, refund_due, reason: None }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deleted {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Order {
    Placed(Placed),
    Paid(Placed),
    Shipped,
    /// Form 1 did not say whether a refund is due.
    Cancelled {
        refund_due: bool,
    },
    Deleted,
}

impl Aggregate for Order {
    const KIND: &'static str = "order";
    const FORM: i16 = 2;

    const REJECTIONS: &'static [(&'static str, &'static str)] = &[
        ("order_not_found", "the command names an order that does not exist, or not any more"),
        (
            "wrong_status",
            "the order's status does not allow it; `details.allowed` says which would, and `details.refund_due` \
                whether a cancelled order had been paid",
        ),
        ("placed_in_future", "`placed_at` lies more than 5 seconds in the future"),
        ("mixed_currencies", "an order has one currency"),
        ("total_overflow", "the total of an order can be 1,000,000,000,000,000 at most"),
    ];

    const SAMPLES: &'static [Sample] = &[
        Sample::accepted(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000021","user":"00000000-0000-0000-0000-000000000001",
                "placed_at":"2010-12-01T08:26:00Z","lines":[
                    {"product":"00000000-0000-0000-0000-000000000011","quantity":2,
                        "unit_price":{"amount":250,"currency":"GBP"}},
                    {"product":"00000000-0000-0000-0000-000000000011","quantity":1}]}"#,
        ),
        Sample::refused("delete", r#"{"id":"00000000-0000-0000-0000-000000000021"}"#, "wrong_status"),
        Sample::accepted("pay", r#"{"id":"00000000-0000-0000-0000-000000000021"}"#),
        Sample::accepted("ship", r#"{"id":"00000000-0000-0000-0000-000000000021"}"#),
        Sample::accepted("delete", r#"{"id":"00000000-0000-0000-0000-000000000021"}"#),
        Sample::refused("pay", r#"{"id":"00000000-0000-0000-0000-000000000021"}"#, "order_not_found"),
        Sample::refused(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000022","user":"00000000-0000-0000-0000-000000000001",
                "placed_at":"9999-12-31T00:00:00Z",
                "lines":[{"product":"00000000-0000-0000-0000-000000000011","quantity":1}]}"#,
            "placed_in_future",
        ),
        Sample::refused(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000022","user":"00000000-0000-0000-0000-000000000001","lines":[
                {"product":"00000000-0000-0000-0000-000000000011","quantity":1,
                    "unit_price":{"amount":250,"currency":"EUR"}},
                {"product":"00000000-0000-0000-0000-000000000011","quantity":1}]}"#,
            "mixed_currencies",
        ),
        Sample::refused(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000022","user":"00000000-0000-0000-0000-000000000001","lines":[
                {"product":"00000000-0000-0000-0000-000000000011","quantity":2,
                    "unit_price":{"amount":1000000000000000,"currency":"GBP"}}]}"#,
            "total_overflow",
        ),
        Sample::accepted(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000022","user":"00000000-0000-0000-0000-000000000001",
                "placed_at":"2010-12-02T08:26:00Z","lines":[
                    {"product":"00000000-0000-0000-0000-000000000011","quantity":1,
                        "unit_price":{"amount":30,"currency":"EUR"}}]}"#,
        ),
        Sample::accepted("cancel", r#"{"id":"00000000-0000-0000-0000-000000000022","reason":"Ordered twice."}"#),
        Sample::accepted(
            "create",
            r#"{"id":"00000000-0000-0000-0000-000000000023","user":"00000000-0000-0000-0000-000000000001",
                "lines":[{"product":"00000000-0000-0000-0000-000000000011","quantity":1}]}"#,
        ),
    ];

    type Command = Command;
    type Event = Event;

    fn needs(command: &Command) -> Needs {
        match command {
            Command::Create(Create { user, lines, .. }) => {
                let products = lines.iter().map(|line| line.product);
                Needs { aggregates: [*user].into_iter().chain(products).collect(), ..Needs::default() }
            }
            // Cancelling an order changes its products, which the command does not name.
            Command::Cancel(_) => Needs { references: true, ..Needs::default() },
            Command::Pay(_) | Command::Ship(_) | Command::Delete(_) => Needs::default(),
        }
    }

    fn decide(command: Command, aggregates: &Aggregates, now: Timestamp) -> Result<Vec<(Id, crate::Event)>, Rejection> {
        match command {
            Command::Create(command) => command.decide(aggregates, now),
            Command::Pay(Pay { id }) => match order(aggregates, id)? {
                Order::Placed(_) => Ok(vec![(id, Event::Paid(Paid {}).into())]),
                other @ (Order::Paid(_) | Order::Shipped | Order::Cancelled { .. } | Order::Deleted) => {
                    Err(wrong_status(id, other, &["placed"]))
                }
            },
            Command::Ship(Ship { id }) => match order(aggregates, id)? {
                Order::Paid(_) => Ok(vec![(id, Event::Shipped(Shipped {}).into())]),
                other @ (Order::Placed(_) | Order::Shipped | Order::Cancelled { .. } | Order::Deleted) => {
                    Err(wrong_status(id, other, &["paid"]))
                }
            },
            Command::Cancel(Cancel { id, reason }) => match order(aggregates, id)? {
                Order::Placed(placed) => Ok(cancel(aggregates, id, placed, false, reason)),
                Order::Paid(placed) => Ok(cancel(aggregates, id, placed, true, reason)),
                other @ (Order::Shipped | Order::Cancelled { .. } | Order::Deleted) => {
                    Err(wrong_status(id, other, &["placed", "paid"]))
                }
            },
            Command::Delete(Delete { id }) => match order(aggregates, id)? {
                Order::Shipped | Order::Cancelled { .. } => Ok(vec![(id, Event::Deleted(Deleted {}).into())]),
                other @ (Order::Placed(_) | Order::Paid(_) | Order::Deleted) => {
                    Err(wrong_status(id, other, &["shipped", "cancelled"]))
                }
            },
        }
    }

    fn evolve(before: Option<Self>, event: &Event) -> Option<Self> {
        match (before, event) {
            (None, Event::Placed(placed)) => Some(Self::Placed(placed.clone())),
            (Some(Self::Placed(placed)), Event::Paid(Paid {})) => Some(Self::Paid(placed)),
            (Some(Self::Paid(_)), Event::Shipped(Shipped {})) => Some(Self::Shipped),
            (Some(Self::Placed(_) | Self::Paid(_)), Event::Cancelled(Cancelled { refund_due, .. })) => {
                Some(Self::Cancelled { refund_due: *refund_due })
            }
            (Some(Self::Shipped | Self::Cancelled { .. }), Event::Deleted(Deleted {})) => Some(Self::Deleted),
            (
                before,
                Event::Placed(_) | Event::Paid(_) | Event::Shipped(_) | Event::Cancelled(_) | Event::Deleted(_),
            ) => before,
        }
    }

    /// The products of an order that can still be cancelled.
    fn references(&self) -> Vec<Id> {
        match self {
            Self::Placed(placed) | Self::Paid(placed) => placed.lines.iter().map(|line| line.product).collect(),
            Self::Shipped | Self::Cancelled { .. } | Self::Deleted => vec![],
        }
    }
}

impl Create {
    fn decide(self, aggregates: &Aggregates, now: Timestamp) -> Result<Vec<(Id, crate::Event)>, Rejection> {
        let Self { id, user, lines: requested, placed_at } = self;
        aggregates.require_new(id)?;
        user::living(aggregates, user)?;
        let placed_at = placed_at.unwrap_or(now);
        if placed_at.unix_millis() > now.unix_millis() + MAX_CLOCK_SKEW_MILLIS {
            return Err(Rejection::refused(
                "placed_in_future",
                format!("placed_at: expected a time that is not in the future, it is {now} now"),
            )
            .with("field", "placed_at")
            .with("placed_at", placed_at.to_string())
            .with("now", now.to_string()));
        }
        let lines = requested
            .into_iter()
            .map(|RequestedLine { product, quantity, unit_price }| {
                let product::Living { sku, name, price, .. } = product::living(aggregates, product)?;
                let unit_price = unit_price.unwrap_or(*price);
                Ok(Line { product, sku: sku.clone(), name: name.clone(), quantity, unit_price })
            })
            .collect::<Result<Vec<_>, Rejection>>()?;
        let total = total(&lines)?;
        product::require_in_use(total.currency, placed_at, "lines[0].unit_price.currency")?;
        let stock_taken = take_stock(aggregates, id, &lines)?;
        let placed = Event::Placed(Placed { user, placed_at, lines, total });
        Ok([(id, placed.into())].into_iter().chain(stock_taken).collect())
    }
}

impl Order {
    fn status(&self) -> &'static str {
        match self {
            Self::Placed(_) => "placed",
            Self::Paid(_) => "paid",
            Self::Shipped => "shipped",
            Self::Cancelled { .. } => "cancelled",
            Self::Deleted => "deleted",
        }
    }
}

/// The order, which must exist.
///
/// # Errors
/// If there is no such order, or it is deleted.
fn order(aggregates: &Aggregates, id: Id) -> Result<&Order, Rejection> {
    match aggregates.get::<Order>(id) {
        Some(Order::Deleted) | None => {
            Err(Rejection::not_found("order_not_found", format!("there is no order {id}"))
                .with("order", id.to_string()))
        }
        Some(order @ (Order::Placed(_) | Order::Paid(_) | Order::Shipped | Order::Cancelled { .. })) => Ok(order),
    }
}

fn wrong_status(id: Id, order: &Order, allowed: &[&str]) -> Rejection {
    let status = order.status();
    let message = format!("the order is {status}; it would have to be {}", allowed.join(" or "));
    let rejection = Rejection::refused("wrong_status", message)
        .with("order", id.to_string())
        .with("status", status)
        .with("allowed", allowed);
    match order {
        Order::Cancelled { refund_due } => rejection.with("refund_due", *refund_due),
        Order::Placed(_) | Order::Paid(_) | Order::Shipped | Order::Deleted => rejection,
    }
}

/// The sum over the lines.
///
/// # Errors
/// If there is no line, the currencies differ, or the sum is above [`MAX_AMOUNT`].
fn total(lines: &[Line]) -> Result<Money, Rejection> {
    let mut total: Option<Money> = None;
    for (index, line) in lines.iter().enumerate() {
        let field = || format!("lines[{index}]");
        let currency = line.unit_price.currency;
        let before = total.unwrap_or(Money { amount: 0, currency });
        if before.currency != currency {
            let message = format!("{}: an order has one currency, not {} and {currency}", field(), before.currency);
            return Err(Rejection::refused("mixed_currencies", message)
                .with("field", field())
                .with("currencies", vec![before.currency.to_string(), currency.to_string()]));
        }
        let Some(sum) = line.unit_price.checked_mul(line.quantity).and_then(|amount| before.checked_add(amount)) else {
            let message = format!("{}: the total of an order can be {MAX_AMOUNT} minor units at most", field());
            return Err(Rejection::refused("total_overflow", message).with("field", field()).with("max", MAX_AMOUNT));
        };
        total = Some(sum);
    }
    total.ok_or_else(|| Rejection::refused("no_lines", "lines: an order has at least one").with("field", "lines"))
}

/// The events that take the stock: one for each product, over all of its lines.
///
/// # Errors
/// If a product does not exist or has too little stock.
fn take_stock(aggregates: &Aggregates, order: Id, lines: &[Line]) -> Result<Vec<(Id, crate::Event)>, Rejection> {
    let take = |(id, quantity)| {
        let product = product::living(aggregates, id)?;
        if quantity > product.stock {
            return Err(product::out_of_stock(id, product, quantity));
        }
        let stock = product.stock - quantity;
        let event = product::Event::StockTaken(product::StockTaken { order, quantity, stock });
        Ok((id, event.into()))
    };
    quantities(lines).into_iter().map(take).collect()
}

fn cancel(
    aggregates: &Aggregates,
    id: Id,
    placed: &Placed,
    refund_due: bool,
    reason: Option<Note>,
) -> Vec<(Id, crate::Event)> {
    let Placed { user, placed_at, lines, total } = placed.clone();
    // A product that has been deleted in the meantime gets nothing back.
    let give_back = |(product, quantity)| {
        let stock = product::living(aggregates, product).ok()?.stock.saturating_add(quantity);
        let event = product::Event::StockReturned(product::StockReturned { order: id, quantity, stock });
        Some((product, event.into()))
    };
    let stock_returned: Vec<_> = quantities(&lines).into_iter().filter_map(give_back).collect();
    let cancelled = Event::Cancelled(Cancelled { user, placed_at, lines, total, refund_due, reason });
    [(id, cancelled.into())].into_iter().chain(stock_returned).collect()
}

/// The number of pieces of each product, in the order in which the lines first name the products. The sums cannot
/// overflow, since they are at most [`MAX_LINES`] times [`MAX_QUANTITY`].
fn quantities(lines: &[Line]) -> Vec<(Id, i64)> {
    let mut indexes: HashMap<Id, usize> = HashMap::new();
    let mut quantities: Vec<(Id, i64)> = Vec::new();
    for line in lines {
        let index = *indexes.entry(line.product).or_insert_with(|| {
            quantities.push((line.product, 0));
            quantities.len() - 1
        });
        quantities[index].1 += line.quantity;
    }
    quantities
}

fn lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<RequestedLine>, D::Error> {
    let lines: Vec<Object<RequestedLine>> = Vec::deserialize(deserializer)?;
    if (1..=MAX_LINES).contains(&lines.len()) {
        return Ok(lines.into_iter().map(|Object(line)| line).collect());
    }
    Err(de::Error::invalid_length(lines.len(), &&*format!("1 to {MAX_LINES} lines")))
}

fn quantity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let expected = format_args!("a whole number of pieces from 1 to {MAX_QUANTITY}");
    strict::whole_number(deserializer, expected, |quantity| (1..=MAX_QUANTITY).contains(&quantity))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Cancelled, Create, Deleted, Event, MAX_QUANTITY, Order, Paid, Placed, Shipped};
    use crate::{
        Aggregate, Aggregates, Command, MAX_AMOUNT,
        RejectionKind::{Conflict, NotFound, Refused},
        scenario::{bare, command, create_order, create_product, gbp, given, given_stored, id, now, register, restock},
    };

    /// User 1, and two products at 2.50: product 10 with five pieces and product 11 with three.
    fn shop() -> Vec<Command> {
        vec![register(1, "ada@example.com"), create_product(10, "A", 5), create_product(11, "B", 3)]
    }

    fn shop_and(more: impl IntoIterator<Item = Command>) -> Vec<Command> {
        shop().into_iter().chain(more).collect()
    }

    fn line(product: u128, sku: &str, quantity: i64, unit_price: i64) -> Value {
        let unit_price = gbp(unit_price);
        json!({ "product": id(product), "sku": sku, "name": "Lantern", "quantity": quantity, "unit_price": unit_price })
    }

    fn placed(lines: Value, total: i64) -> Value {
        json!({ "user": id(1), "placed_at": now(), "lines": lines, "total": gbp(total) })
    }

    fn moved(quantity: i64, stock: i64) -> Value {
        json!({ "order": id(20), "quantity": quantity, "stock": stock })
    }

    fn create(lines: Value) -> Command {
        command("order.create", json!({ "id": id(20), "user": id(1), "lines": lines }))
    }

    fn create_at(placed_at: &str) -> Command {
        let lines = json!([{ "product": id(10), "quantity": 1 }]);
        command("order.create", json!({ "id": id(20), "user": id(1), "lines": lines, "placed_at": placed_at }))
    }

    #[test]
    fn an_order_is_in_a_currency_that_was_in_use_when_it_was_placed() {
        let order = |code: &str, placed_at: Value| {
            let line = json!({ "product": id(10), "quantity": 1, "unit_price": { "amount": 5, "currency": code } });
            command("order.create", json!({ "id": id(20), "user": id(1), "lines": [line], "placed_at": placed_at }))
        };
        for (code, last, first) in [
            ("HRK", "2022-12-31T23:59:59.999Z", "2023-01-01T00:00:00Z"),
            ("BGN", "2025-12-31T23:59:59.999Z", "2026-01-01T00:00:00Z"),
            ("DEM", "2001-12-31T12:00:00Z", "2002-03-01T00:00:00Z"),
            ("LTL", "2014-12-31T12:00:00Z", "2015-01-01T00:00:00Z"),
            ("LVL", "2013-12-31T12:00:00Z", "2014-01-01T00:00:00Z"),
            ("EEK", "2010-12-31T12:00:00Z", "2011-01-01T00:00:00Z"),
            ("ANG", "2025-06-30T12:00:00Z", "2025-07-01T00:00:00Z"),
            ("CUC", "2021-06-30T12:00:00Z", "2021-07-01T00:00:00Z"),
            ("SLL", "2023-12-31T12:00:00Z", "2024-01-01T00:00:00Z"),
            ("ZWL", "2024-08-31T12:00:00Z", "2024-09-01T00:00:00Z"),
        ] {
            given(shop()).when(order(code, json!(last))).then_accepted();
            for late in [json!(first), json!(null)] {
                let withdrawn = &first[..10];
                let details =
                    json!({ "field": "lines[0].unit_price.currency", "currency": code, "withdrawn": withdrawn });
                given(shop()).when(order(code, late)).then_refused(Refused, "currency_withdrawn", details);
            }
        }
    }

    #[test]
    fn an_order_fixes_names_and_prices_and_takes_the_stock_of_every_line() {
        given(shop()).when(create_order(20, 1, &[(11, 1), (10, 2)])).then([
            ("order.placed", 20, placed(json!([line(11, "B", 1, 250), line(10, "A", 2, 250)]), 750)),
            ("product.stock_taken", 11, moved(1, 2)),
            ("product.stock_taken", 10, moved(2, 3)),
        ]);
    }

    #[test]
    fn a_product_may_be_in_several_lines_and_its_stock_is_taken_in_one_event() {
        given(shop()).when(create_order(20, 1, &[(10, 2), (11, 1), (10, 3)])).then([
            (
                "order.placed",
                20,
                placed(json!([line(10, "A", 2, 250), line(11, "B", 1, 250), line(10, "A", 3, 250)]), 1500),
            ),
            ("product.stock_taken", 10, moved(5, 0)),
            ("product.stock_taken", 11, moved(1, 2)),
        ]);
    }

    #[test]
    fn the_lines_of_a_product_cannot_together_take_more_than_its_stock() {
        given(shop()).when(create_order(20, 1, &[(10, 3), (10, 3)])).then_refused(
            Refused,
            "out_of_stock",
            json!({ "product": id(10), "sku": "A", "requested": 6, "available": 5 }),
        );
    }

    #[test]
    fn a_line_may_have_its_own_price_and_even_be_free() {
        let lines = json!([
            { "product": id(10), "quantity": 2, "unit_price": gbp(199) },
            { "product": id(10), "quantity": 1 },
            { "product": id(11), "quantity": 1, "unit_price": gbp(0) },
        ]);
        given(shop()).when(create(lines)).then([
            (
                "order.placed",
                20,
                placed(json!([line(10, "A", 2, 199), line(10, "A", 1, 250), line(11, "B", 1, 0)]), 648),
            ),
            ("product.stock_taken", 10, moved(3, 2)),
            ("product.stock_taken", 11, moved(1, 2)),
        ]);
    }

    #[test]
    fn an_order_may_be_in_another_currency_than_its_products() {
        let euros = json!({ "amount": 100, "currency": "EUR" });
        let lines = json!([{ "product": id(10), "quantity": 2, "unit_price": euros }]);
        given(shop()).when(create(lines)).then([
            (
                "order.placed",
                20,
                json!({
                    "user": id(1),
                    "placed_at": now(),
                    "lines": [{
                        "product": id(10), "sku": "A", "name": "Lantern", "quantity": 2, "unit_price": euros,
                    }],
                    "total": { "amount": 200, "currency": "EUR" },
                }),
            ),
            ("product.stock_taken", 10, moved(2, 3)),
        ]);
    }

    #[test]
    fn an_order_keeps_names_and_prices_when_a_product_changes() {
        let price = gbp(999);
        let change = command("product.update", json!({ "id": id(10), "sku": "C", "name": "Lamp", "price": price }));
        given(shop_and([create_order(20, 1, &[(10, 1)]), change])).when(bare("order.cancel", 20)).then([
            (
                "order.cancelled",
                20,
                json!({
                    "user": id(1),
                    "placed_at": now(),
                    "lines": [line(10, "A", 1, 250)],
                    "total": gbp(250),
                    "refund_due": false,
                    "reason": null,
                }),
            ),
            ("product.stock_returned", 10, moved(1, 5)),
        ]);
    }

    #[test]
    fn an_order_takes_the_stock_of_all_lines_or_of_none() {
        given(shop()).when(create_order(20, 1, &[(10, 5), (11, 4)])).then_refused(
            Refused,
            "out_of_stock",
            json!({ "product": id(11), "sku": "B", "requested": 4, "available": 3 }),
        );
    }

    #[test]
    fn stock_that_one_order_took_is_not_available_to_another() {
        given(shop_and([create_order(21, 1, &[(10, 4)])])).when(create_order(20, 1, &[(10, 2)])).then_refused(
            Refused,
            "out_of_stock",
            json!({ "product": id(10), "sku": "A", "requested": 2, "available": 1 }),
        );
    }

    #[test]
    fn an_order_has_one_currency() {
        let euros = json!({ "amount": 100, "currency": "EUR" });
        let lines = json!([
            { "product": id(10), "quantity": 1 },
            { "product": id(11), "quantity": 1 },
            { "product": id(10), "quantity": 1, "unit_price": euros },
        ]);
        given(shop()).when(create(lines)).then_refused(
            Refused,
            "mixed_currencies",
            json!({ "field": "lines[2]", "currencies": ["GBP", "EUR"] }),
        );
    }

    #[test]
    fn a_total_has_an_upper_limit() {
        let of =
            |quantity: i64, price: i64| json!({ "product": id(10), "quantity": quantity, "unit_price": gbp(price) });
        let too_large = |index: usize| json!({ "field": format!("lines[{index}]"), "max": MAX_AMOUNT });
        let cases = [
            (json!([of(1, MAX_AMOUNT), of(1, 1)]), too_large(1)),
            (json!([of(1, 1), of(2, MAX_AMOUNT)]), too_large(1)),
            (json!([of(MAX_QUANTITY, MAX_AMOUNT)]), too_large(0)),
        ];
        for (lines, details) in cases {
            given(shop()).when(create(lines)).then_refused(Refused, "total_overflow", details);
        }
        given(shop()).when(create(json!([of(1, MAX_AMOUNT - 1), of(1, 1)]))).then([
            ("order.placed", 20, placed(json!([line(10, "A", 1, MAX_AMOUNT - 1), line(10, "A", 1, 1)]), MAX_AMOUNT)),
            ("product.stock_taken", 10, moved(2, 3)),
        ]);
    }

    #[test]
    fn an_order_may_have_been_placed_earlier_and_its_time_is_stored_in_utc() {
        for (requested, stored) in [
            ("2010-12-01T08:26:00Z", "2010-12-01T08:26:00.000Z"),
            ("2010-12-01T09:26:00+01:00", "2010-12-01T08:26:00.000Z"),
            ("2026-01-31T09:30:00.000Z", "2026-01-31T09:30:00.000Z"),
            // The client's clock may be ahead.
            ("2026-01-31T09:30:05Z", "2026-01-31T09:30:05.000Z"),
        ] {
            let lines = json!([line(10, "A", 1, 250)]);
            given(shop()).when(create_at(requested)).then([
                ("order.placed", 20, json!({ "user": id(1), "placed_at": stored, "lines": lines, "total": gbp(250) })),
                ("product.stock_taken", 10, moved(1, 4)),
            ]);
        }
    }

    #[test]
    fn an_order_cannot_have_been_placed_in_the_future() {
        for requested in ["2026-01-31T09:30:05.001Z", "9999-12-31T23:59:59.999Z"] {
            let placed_at: crate::Timestamp = requested.parse().unwrap();
            given(shop()).when(create_at(requested)).then_refused(
                Refused,
                "placed_in_future",
                json!({ "field": "placed_at", "placed_at": placed_at, "now": now() }),
            );
        }
    }

    #[test]
    fn only_a_user_who_exists_can_order() {
        let gone = shop_and([register(2, "bob@example.com"), bare("user.delete", 2)]);
        for (past, user) in [(shop(), 2), (gone, 2), (shop(), 10)] {
            given(past).when(create_order(20, user, &[(10, 1)])).then_refused(
                NotFound,
                "user_not_found",
                json!({ "user": id(user) }),
            );
        }
    }

    #[test]
    fn only_a_product_that_exists_can_be_ordered() {
        let gone = shop_and([create_product(12, "C", 5), bare("product.delete", 12)]);
        for (past, product) in [(shop(), 12), (gone, 12), (shop(), 1), (shop(), 20)] {
            given(past).when(create_order(20, 1, &[(10, 1), (product, 1)])).then_refused(
                NotFound,
                "product_not_found",
                json!({ "product": id(product) }),
            );
        }
    }

    #[test]
    fn an_identifier_cannot_be_used_again_after_a_deletion_or_for_another_kind() {
        let order = || create_order(20, 1, &[(10, 1)]);
        let pasts = [
            shop_and([order()]),
            shop_and([order(), bare("order.cancel", 20), bare("order.delete", 20)]),
            shop_and([register(20, "bob@example.com")]),
            shop_and([create_product(20, "C", 1)]),
        ];
        for past in pasts {
            given(past).when(order()).then_refused(Conflict, "id_taken", json!({ "id": id(20) }));
        }
        given(shop()).when(create_order(1, 1, &[(10, 1)])).then_refused(Conflict, "id_taken", json!({ "id": id(1) }));
    }

    #[test]
    fn an_order_without_lines_is_refused_even_though_no_request_can_ask_for_one() {
        let order = Create { id: id(20), user: id(1), lines: vec![], placed_at: None };
        let mut aggregates = Aggregates::default();
        aggregates.execute(register(1, "ada@example.com"), None, now()).unwrap();
        let rejection = aggregates.execute(Command::Order(super::Command::Create(order)), None, now()).unwrap_err();
        assert_eq!((rejection.kind, rejection.code), (Refused, "no_lines"));
    }

    #[test]
    fn a_placed_order_is_paid() {
        let past = shop_and([create_order(20, 1, &[(10, 1)])]);
        given(past).when(bare("order.pay", 20)).then([("order.paid", 20, json!({}))]);
    }

    #[test]
    fn a_paid_order_is_shipped() {
        let past = shop_and([create_order(20, 1, &[(10, 1)]), bare("order.pay", 20)]);
        given(past).when(bare("order.ship", 20)).then([("order.shipped", 20, json!({}))]);
    }

    #[test]
    fn a_cancelled_order_gives_its_stock_back_and_says_whether_a_refund_is_due() {
        for (past, refund_due) in [(vec![], false), (vec![bare("order.pay", 20)], true)] {
            let past = shop_and([create_order(20, 1, &[(10, 2), (11, 3), (10, 1)])].into_iter().chain(past));
            given(past).when(bare("order.cancel", 20)).then([
                (
                    "order.cancelled",
                    20,
                    json!({
                        "user": id(1),
                        "placed_at": now(),
                        "lines": [line(10, "A", 2, 250), line(11, "B", 3, 250), line(10, "A", 1, 250)],
                        "total": gbp(1500),
                        "refund_due": refund_due,
                        "reason": null,
                    }),
                ),
                ("product.stock_returned", 10, moved(3, 5)),
                ("product.stock_returned", 11, moved(3, 3)),
            ]);
        }
    }

    #[test]
    fn a_reason_for_the_cancellation_stands_in_the_event() {
        let cancel = command("order.cancel", json!({ "id": id(20), "reason": " Ordered twice.\n" }));
        given(shop_and([create_order(20, 1, &[(10, 2)])])).when(cancel).then([
            ("order.cancelled", 20, cancelled(false, json!("Ordered twice."))),
            ("product.stock_returned", 10, moved(2, 5)),
        ]);
    }

    #[test]
    fn who_comes_too_late_for_a_cancelled_order_is_told_whether_a_refund_is_due() {
        for (paid, past) in [(false, vec![]), (true, vec![bare("order.pay", 20)])] {
            let cancelled = past.into_iter().chain([bare("order.cancel", 20)]);
            let past = shop_and([create_order(20, 1, &[(10, 1)])].into_iter().chain(cancelled));
            given(past).when(bare("order.pay", 20)).then_refused(
                Refused,
                "wrong_status",
                json!({ "order": id(20), "status": "cancelled", "allowed": ["placed"], "refund_due": paid }),
            );
        }
    }

    /// The cancellation of an order for two pieces of product 10, as it was stored before there was a reason.
    fn cancelled_v1(refund_due: bool) -> Value {
        let lines = json!([line(10, "A", 2, 250)]);
        json!({ "user": id(1), "placed_at": now(), "lines": lines, "total": gbp(500), "refund_due": refund_due })
    }

    fn cancelled(refund_due: bool, reason: Value) -> Value {
        let mut payload = cancelled_v1(refund_due);
        payload["reason"] = reason;
        payload
    }

    #[test]
    fn a_cancellation_of_schema_1_has_no_reason() {
        for refund_due in [false, true] {
            let stored = given_stored("order.cancelled", 1, cancelled_v1(refund_due));
            stored.when_read().then(cancelled(refund_due, Value::Null));
        }
        given_stored("order.cancelled", 1, cancelled(false, Value::Null)).when_read().then_undecodable();
    }

    #[test]
    fn returned_stock_is_added_to_what_was_restocked_in_the_meantime() {
        let past = shop_and([create_order(20, 1, &[(10, 5)]), restock(10, 4)]);
        given(past).when(bare("order.cancel", 20)).then([
            (
                "order.cancelled",
                20,
                json!({
                    "user": id(1),
                    "placed_at": now(),
                    "lines": [line(10, "A", 5, 250)],
                    "total": gbp(1250),
                    "refund_due": false,
                    "reason": null,
                }),
            ),
            ("product.stock_returned", 10, moved(5, 9)),
        ]);
    }

    #[test]
    fn stock_is_not_returned_to_deleted_products() {
        let past = shop_and([create_order(20, 1, &[(10, 2), (11, 1)]), bare("product.delete", 10)]);
        given(past).when(bare("order.cancel", 20)).then([
            (
                "order.cancelled",
                20,
                json!({
                    "user": id(1),
                    "placed_at": now(),
                    "lines": [line(10, "A", 2, 250), line(11, "B", 1, 250)],
                    "total": gbp(750),
                    "refund_due": false,
                    "reason": null,
                }),
            ),
            ("product.stock_returned", 11, moved(1, 3)),
        ]);
    }

    #[test]
    fn an_order_outlives_its_user() {
        let past = shop_and([create_order(20, 1, &[(10, 1)]), bare("user.delete", 1)]);
        given(past).when(bare("order.pay", 20)).then([("order.paid", 20, json!({}))]);
    }

    #[test]
    fn a_shipped_or_cancelled_order_is_deleted() {
        let shipped = [bare("order.pay", 20), bare("order.ship", 20)];
        for past in [shipped.to_vec(), vec![bare("order.cancel", 20)]] {
            let past = shop_and([create_order(20, 1, &[(10, 1)])].into_iter().chain(past));
            given(past).when(bare("order.delete", 20)).then([("order.deleted", 20, json!({}))]);
        }
    }

    /// Tries every command in every status. A refusal says which statuses would allow the command.
    #[test]
    fn each_status_allows_what_follows_it_and_nothing_else() {
        let pay = || bare("order.pay", 20);
        let statuses = [
            ("placed", vec![], vec!["pay", "cancel"]),
            ("paid", vec![pay()], vec!["ship", "cancel"]),
            ("shipped", vec![pay(), bare("order.ship", 20)], vec!["delete"]),
            ("cancelled", vec![bare("order.cancel", 20)], vec!["delete"]),
        ];
        let verbs = [
            ("pay", json!(["placed"])),
            ("ship", json!(["paid"])),
            ("cancel", json!(["placed", "paid"])),
            ("delete", json!(["shipped", "cancelled"])),
        ];
        for (status, past, allowed) in statuses {
            for (verb, from) in &verbs {
                let past = shop_and([create_order(20, 1, &[(10, 1)])].into_iter().chain(past.clone()));
                let outcome = given(past).when(bare(&format!("order.{verb}"), 20));
                if allowed.contains(verb) {
                    outcome.then_accepted();
                } else {
                    let mut details = json!({ "order": id(20), "status": status, "allowed": from });
                    if status == "cancelled" {
                        details["refund_due"] = json!(false);
                    }
                    outcome.then_refused(Refused, "wrong_status", details);
                }
            }
        }
    }

    /// Applies every event in every status. An event that cannot follow changes nothing.
    #[test]
    fn each_event_changes_only_the_statuses_that_it_can_follow() {
        let events = || {
            let past = shop_and([create_order(20, 1, &[(10, 1)])]);
            let Some(Order::Placed(placed)) = given(past).state::<Order>(20) else { panic!("the order is placed") };
            let Placed { user, placed_at, lines, total } = placed.clone();
            let cancelled = Cancelled { user, placed_at, lines, total, refund_due: true, reason: None };
            [
                Event::Placed(placed),
                Event::Paid(Paid {}),
                Event::Shipped(Shipped {}),
                Event::Cancelled(cancelled),
                Event::Deleted(Deleted {}),
            ]
        };
        let after = |status: Option<&Order>| {
            events().map(|event| Order::evolve(status.cloned(), &event).map_or("none", |order| order.status()))
        };
        let [placed, paid, ..] = events();
        let placed = Order::evolve(None, &placed).unwrap();
        let paid = Order::evolve(Some(placed.clone()), &paid).unwrap();
        assert_eq!(after(None), ["placed", "none", "none", "none", "none"]);
        assert_eq!(after(Some(&placed)), ["placed", "paid", "placed", "cancelled", "placed"]);
        assert_eq!(after(Some(&paid)), ["paid", "paid", "shipped", "cancelled", "paid"]);
        assert_eq!(after(Some(&Order::Shipped)), ["shipped", "shipped", "shipped", "shipped", "deleted"]);
        let cancelled = Order::Cancelled { refund_due: true };
        assert_eq!(after(Some(&cancelled)), ["cancelled", "cancelled", "cancelled", "cancelled", "deleted"]);
        assert_eq!(after(Some(&Order::Deleted)), ["deleted"; 5]);
    }

    #[test]
    fn an_order_that_does_not_exist_or_is_deleted_cannot_be_changed() {
        let deleted = [create_order(20, 1, &[(10, 1)]), bare("order.cancel", 20), bare("order.delete", 20)];
        for past in [shop(), shop_and(deleted), shop_and([register(20, "bob@example.com")])] {
            for verb in ["pay", "ship", "cancel", "delete"] {
                given(past.clone()).when(bare(&format!("order.{verb}"), 20)).then_refused(
                    NotFound,
                    "order_not_found",
                    json!({ "order": id(20) }),
                );
            }
        }
    }
}
