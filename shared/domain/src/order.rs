//! Orders: placed → paid → shipped; placed or paid → cancelled; shipped or cancelled → deleted. Placing takes the stock
//! of every line, or of none; cancelling gives it back. Name and price of a line are fixed when the order is placed, and
//! an order has one currency.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{
    Aggregates, Claim, Id, MAX_AMOUNT, Money, Name, Rejection, Sku, Timestamp, product,
    strict::{self, Object},
    user,
};

pub const KIND: &str = "order";

/// Lines in one order.
pub const MAX_LINES: usize = 2_000;
/// Pieces in one line.
pub const MAX_QUANTITY: i64 = 1_000_000;

commands! {
    Order {
        Create("create", "Places an order: fixes names and prices, takes the stock of all lines or of none")
        Pay("pay", "Marks a placed order as paid")
        Ship("ship", "Marks a paid order as shipped")
        Cancel("cancel", "Cancels a placed or paid order and gives its stock back")
        Delete("delete", "Deletes a shipped or cancelled order")
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Made by the service if absent; UUID version 7 recommended.
    #[serde(default)]
    #[schemars(skip_serializing_if = "Id::is_none")]
    pub id: Id,
    /// Who buys.
    pub user: Id,
    /// 1 to 2,000; a product may stand in several.
    #[serde(deserialize_with = "lines")]
    #[schemars(length(min = 1, max = MAX_LINES))]
    pub lines: Vec<RequestedLine>,
    /// When it was placed, if not now; not in the future.
    pub placed_at: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RequestedLine {
    pub product: Id,
    /// Pieces.
    #[serde(deserialize_with = "quantity")]
    #[schemars(range(min = 1, max = MAX_QUANTITY))]
    pub quantity: i64,
    /// The product's price if absent.
    pub unit_price: Option<Money>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pay {
    pub id: Id,
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ship {
    pub id: Id,
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    pub id: Id,
}

#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    pub id: Id,
}

events! {
    Placed("placed", 1)
    Paid("paid", 1)
    Shipped("shipped", 1)
    Cancelled("cancelled", 1)
    Deleted("deleted", 1)
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placed {
    pub user: Id,
    pub placed_at: Timestamp,
    pub lines: Vec<Line>,
    /// The sum of the lines.
    pub total: Money,
}

/// A line with its name and price as they were when the order was placed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub product: Id,
    pub sku: Sku,
    pub name: Name,
    /// Pieces.
    pub quantity: i64,
    pub unit_price: Money,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paid {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shipped {}

/// Carries what was undone, so that a view that counts orders can take it back without having kept them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cancelled {
    pub user: Id,
    pub placed_at: Timestamp,
    pub lines: Vec<Line>,
    pub total: Money,
    /// The order was paid: the money must go back.
    pub refund_due: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deleted {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Order {
    Placed(Placed),
    Paid(Placed),
    Shipped,
    Cancelled,
    Deleted,
}

impl Command {
    pub(crate) fn touches(&self) -> Vec<Id> {
        match self {
            Self::Create(Create { id, user, lines, .. }) => {
                [*id, *user].into_iter().chain(lines.iter().map(|line| line.product)).collect()
            }
            Self::Pay(_) | Self::Ship(_) | Self::Cancel(_) | Self::Delete(_) => vec![self.target()],
        }
    }

    /// Cancelling changes the products of the order, which only the order knows.
    pub(crate) fn touches_references_of(&self) -> Option<Id> {
        match self {
            Self::Cancel(Cancel { id }) => Some(*id),
            Self::Create(_) | Self::Pay(_) | Self::Ship(_) | Self::Delete(_) => None,
        }
    }

    pub(crate) fn claims(&self) -> Vec<Claim> {
        vec![]
    }

    pub(crate) fn decide(self, aggregates: &Aggregates, now: Timestamp) -> Result<Vec<(Id, crate::Event)>, Rejection> {
        match self {
            Self::Create(command) => command.decide(aggregates, now),
            Self::Pay(Pay { id }) => match order(aggregates, id)? {
                Order::Placed(_) => Ok(vec![(id, crate::Event::Order(Event::Paid(Paid {})))]),
                other @ (Order::Paid(_) | Order::Shipped | Order::Cancelled | Order::Deleted) => {
                    Err(wrong_status(id, other, &["placed"]))
                }
            },
            Self::Ship(Ship { id }) => match order(aggregates, id)? {
                Order::Paid(_) => Ok(vec![(id, crate::Event::Order(Event::Shipped(Shipped {})))]),
                other @ (Order::Placed(_) | Order::Shipped | Order::Cancelled | Order::Deleted) => {
                    Err(wrong_status(id, other, &["paid"]))
                }
            },
            Self::Cancel(Cancel { id }) => match order(aggregates, id)? {
                Order::Placed(placed) => Ok(cancel(aggregates, id, placed, false)),
                Order::Paid(placed) => Ok(cancel(aggregates, id, placed, true)),
                other @ (Order::Shipped | Order::Cancelled | Order::Deleted) => {
                    Err(wrong_status(id, other, &["placed", "paid"]))
                }
            },
            Self::Delete(Delete { id }) => match order(aggregates, id)? {
                Order::Shipped | Order::Cancelled => Ok(vec![(id, crate::Event::Order(Event::Deleted(Deleted {})))]),
                other @ (Order::Placed(_) | Order::Paid(_) | Order::Deleted) => {
                    Err(wrong_status(id, other, &["shipped", "cancelled"]))
                }
            },
        }
    }
}

impl Create {
    fn decide(self, aggregates: &Aggregates, now: Timestamp) -> Result<Vec<(Id, crate::Event)>, Rejection> {
        let Self { id, user, lines: requested, placed_at } = self;
        aggregates.require_new(id)?;
        user::require_living(aggregates, user)?;
        let placed_at = placed_at.unwrap_or(now);
        if placed_at > now {
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
        let stock_taken = take_stock(aggregates, id, &lines)?;
        let placed = Event::Placed(Placed { user, placed_at, lines, total });
        Ok([(id, crate::Event::Order(placed))].into_iter().chain(stock_taken).collect())
    }
}

impl Order {
    pub(crate) fn claims(&self) -> Vec<Claim> {
        vec![]
    }

    /// The products of an order that can still be cancelled.
    pub(crate) fn references(&self) -> Vec<Id> {
        match self {
            Self::Placed(placed) | Self::Paid(placed) => placed.lines.iter().map(|line| line.product).collect(),
            Self::Shipped | Self::Cancelled | Self::Deleted => vec![],
        }
    }

    pub(crate) fn evolve(before: Option<Self>, event: &Event) -> Option<Self> {
        match (before, event) {
            (None, Event::Placed(placed)) => Some(Self::Placed(placed.clone())),
            (Some(Self::Placed(placed)), Event::Paid(Paid {})) => Some(Self::Paid(placed)),
            (Some(Self::Paid(_)), Event::Shipped(Shipped {})) => Some(Self::Shipped),
            (Some(Self::Placed(_) | Self::Paid(_)), Event::Cancelled(_)) => Some(Self::Cancelled),
            (Some(Self::Shipped | Self::Cancelled), Event::Deleted(Deleted {})) => Some(Self::Deleted),
            (
                before,
                Event::Placed(_) | Event::Paid(_) | Event::Shipped(_) | Event::Cancelled(_) | Event::Deleted(_),
            ) => before,
        }
    }

    fn status(&self) -> &'static str {
        match self {
            Self::Placed(_) => "placed",
            Self::Paid(_) => "paid",
            Self::Shipped => "shipped",
            Self::Cancelled => "cancelled",
            Self::Deleted => "deleted",
        }
    }
}

/// # Errors
/// If there is no such order, or no more.
fn order(aggregates: &Aggregates, id: Id) -> Result<&Order, Rejection> {
    match aggregates.get::<Order>(id) {
        Some(Order::Deleted) | None => {
            Err(Rejection::not_found("order_not_found", format!("there is no order {id}"))
                .with("order", id.to_string()))
        }
        Some(order @ (Order::Placed(_) | Order::Paid(_) | Order::Shipped | Order::Cancelled)) => Ok(order),
    }
}

fn wrong_status(id: Id, order: &Order, allowed: &[&str]) -> Rejection {
    let status = order.status();
    Rejection::refused("wrong_status", format!("the order is {status}; it would have to be {}", allowed.join(" or ")))
        .with("order", id.to_string())
        .with("status", status)
        .with("allowed", allowed)
}

/// The sum of the lines.
///
/// # Errors
/// If their currencies differ, or the sum is larger than money can be.
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
        let Some(sum) = line.unit_price.times(line.quantity).and_then(|amount| before.plus(amount)) else {
            let message = format!("{}: the total of an order can be {MAX_AMOUNT} minor units at most", field());
            return Err(Rejection::refused("total_overflow", message).with("field", field()).with("max", MAX_AMOUNT));
        };
        total = Some(sum);
    }
    total.ok_or_else(|| Rejection::refused("no_lines", "lines: an order has at least one").with("field", "lines"))
}

/// One event for each product, for all of its lines together.
fn take_stock(aggregates: &Aggregates, order: Id, lines: &[Line]) -> Result<Vec<(Id, crate::Event)>, Rejection> {
    let take = |(id, quantity)| {
        let product = product::living(aggregates, id)?;
        if quantity > product.stock {
            return Err(product::out_of_stock(id, product, quantity));
        }
        let stock = product.stock - quantity;
        let event = product::Event::StockTaken(product::StockTaken { order, quantity, stock });
        Ok((id, crate::Event::Product(event)))
    };
    quantities(lines).into_iter().map(take).collect()
}

fn cancel(aggregates: &Aggregates, id: Id, placed: &Placed, refund_due: bool) -> Vec<(Id, crate::Event)> {
    let Placed { user, placed_at, lines, total } = placed.clone();
    // A product that was deleted meanwhile has no stock to give back to.
    let give_back = |(product, quantity)| {
        let stock = product::living(aggregates, product).ok()?.stock.saturating_add(quantity);
        let event = product::Event::StockReturned(product::StockReturned { order: id, quantity, stock });
        Some((product, crate::Event::Product(event)))
    };
    let stock_returned: Vec<_> = quantities(&lines).into_iter().filter_map(give_back).collect();
    let cancelled = Event::Cancelled(Cancelled { user, placed_at, lines, total, refund_due });
    [(id, crate::Event::Order(cancelled))].into_iter().chain(stock_returned).collect()
}

/// The pieces of each product, in the order in which the lines first name it. At most [`MAX_LINES`] times
/// [`MAX_QUANTITY`]: no overflow.
fn quantities(lines: &[Line]) -> Vec<(Id, i64)> {
    let mut place: HashMap<Id, usize> = HashMap::new();
    let mut quantities: Vec<(Id, i64)> = Vec::new();
    for line in lines {
        let at = *place.entry(line.product).or_insert_with(|| {
            quantities.push((line.product, 0));
            quantities.len() - 1
        });
        quantities[at].1 += line.quantity;
    }
    quantities
}

fn lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<RequestedLine>, D::Error> {
    let lines: Vec<Object<RequestedLine>> = Vec::deserialize(deserializer)?;
    if (1..=MAX_LINES).contains(&lines.len()) {
        return Ok(lines.into_iter().map(|Object(line)| line).collect());
    }
    Err(de::Error::custom(format_args!("expected 1 to {MAX_LINES} lines, got {}", lines.len())))
}

fn quantity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let expected = format_args!("a whole number of pieces from 1 to {MAX_QUANTITY}");
    strict::whole_number(deserializer, expected, |quantity| (1..=MAX_QUANTITY).contains(&quantity))
}
