//! The view `orders`: the current state of every order, with lists by user, status, date and total. The invariant:
//! there is one document for each order that was placed and not deleted.

use std::time::Duration;

use bson::{Document, doc};
use domain::{
    Currency, Event, Id, Malformed, Money, Reason, Recorded, Timestamp,
    order::{self, Line},
    strict::Choice,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Inapplicable, Page, Query, QueryRequest, View, absent, present,
    query::{Direction, Limit, List, Plan},
    totals,
};

pub struct Orders;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    #[serde(rename = "_id", alias = "id")]
    pub id: Id,
    pub user: Id,
    pub status: Status,
    pub placed_at: Timestamp,
    pub total: Money,
    /// The number of pieces in all lines.
    pub units: i64,
    pub lines: Vec<Line>,
    /// Whether the order was cancelled after it was paid.
    pub refund_due: bool,
    pub version: u64,
    pub updated_at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Status {
    Placed,
    Paid,
    Shipped,
    Cancelled,
}

impl View for Orders {
    const NAME: &'static str = "orders";
    const VERSION: i32 = 1;
    type Document = Order;
    const BATCH_WINDOW: Duration = Duration::ZERO;
    const AGGREGATES: &'static [&'static str] = &[order::KIND];

    fn creates_document(event: &Recorded) -> bool {
        matches!(event.event, Event::Order(order::Event::Placed(_)))
    }

    fn evolve(document: Option<Order>, id: &str, event: &Recorded) -> Result<Option<Order>, Inapplicable> {
        let Event::Order(order_event) = &event.event else { return Ok(document) };
        match order_event {
            order::Event::Placed(placed) => {
                absent(document.as_ref(), id)?;
                Order::placed(event, placed).map(Some)
            }
            order::Event::Paid(order::Paid {}) => Ok(Some(present(document, id)?.in_status(Status::Paid, event))),
            order::Event::Shipped(order::Shipped {}) => {
                Ok(Some(present(document, id)?.in_status(Status::Shipped, event)))
            }
            order::Event::Cancelled(order::Cancelled { refund_due, .. }) => {
                let order = present(document, id)?.in_status(Status::Cancelled, event);
                Ok(Some(Order { refund_due: *refund_due, ..order }))
            }
            order::Event::Deleted(order::Deleted {}) => present(document, id).map(|_| None),
        }
    }

    fn indexes() -> Vec<Document> {
        let fields = [None, Some("user"), Some("status")];
        fields.into_iter().flat_map(|group| [index(group, Sort::Date), index(group, Sort::Total)]).collect()
    }

    const QUERIES: &'static [Query] = &[
        Query::get::<GetOrder>("An order by its id"),
        Query::of::<ListOrders>(
            "Orders by user, status and date, sorted by date or total, in pages",
            list,
            &[
                r#"{"user":"00000000-0000-0000-0000-000000000001","status":"paid","from":"2010-12-01T00:00:00Z",
                    "to":"2010-12-09T00:00:00Z","sort":"date","order":"asc"}"#,
                r#"{"sort":"total","currency":"GBP"}"#,
            ],
        ),
    ];
}

impl Order {
    fn placed(event: &Recorded, placed: &order::Placed) -> Result<Self, Inapplicable> {
        let order::Placed { user, placed_at, lines, total } = placed;
        Ok(Self {
            id: event.id,
            user: *user,
            status: Status::Placed,
            placed_at: *placed_at,
            total: *total,
            units: totals::units(lines)?,
            lines: lines.clone(),
            refund_due: false,
            version: event.version,
            updated_at: event.at,
        })
    }

    fn in_status(self, status: Status, event: &Recorded) -> Self {
        Self { status, version: event.version, updated_at: event.at, ..self }
    }
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GetOrder {
    pub id: Id,
}

impl QueryRequest for GetOrder {
    const NOUN: &'static str = "order";
    const VERB: &'static str = "get";
    type Reply = Order;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Sort {
    #[default]
    Date,
    Total,
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListOrders {
    /// Orders of this user only.
    pub user: Option<Id>,
    pub status: Option<Choice<Status>>,
    /// Placed then or later.
    pub from: Option<Timestamp>,
    /// Placed before that.
    pub to: Option<Timestamp>,
    #[schemars(extend("default" = "date"))]
    pub sort: Option<Choice<Sort>>,
    /// Needed with, and only with, `sort` by `total`: orders in this currency only.
    pub currency: Option<Currency>,
    /// Descending if absent: the latest, or the largest, first.
    pub order: Option<Choice<Direction>>,
    pub limit: Option<Limit>,
    /// The `next` of the reply before.
    pub cursor: Option<String>,
}

impl QueryRequest for ListOrders {
    const NOUN: &'static str = "order";
    const VERB: &'static str = "list";
    type Reply = Page<Order>;
}

fn list(body: &[u8]) -> Result<Plan, Malformed> {
    let ListOrders { user, status, from, to, sort, currency, order, limit, cursor } = domain::parse(body)?;
    let Choice(sort) = sort.unwrap_or_default();
    let mut filter = Document::new();
    if let Some(user) = user {
        filter.insert("user", user.to_string());
    }
    if let Some(Choice(status)) = status {
        filter.insert("status", status.name());
    }
    if from.is_some() || to.is_some() {
        filter.insert("placed_at", range(from, to)?);
    }
    let keys = match (sort, currency) {
        (Sort::Date, None) => ["placed_at", "_id"],
        (Sort::Date, Some(_)) => {
            return Err(Malformed::new("currency", Reason::Unexpected, "it only with `sort` by `total`"));
        }
        (Sort::Total, Some(currency)) => {
            filter.insert("total.currency", currency.as_str());
            ["total.amount", "_id"]
        }
        (Sort::Total, None) => {
            return Err(Malformed::new("currency", Reason::Missing, "a currency, as the totals of one are sorted"));
        }
    };
    // The index by user also ends with the status, so it serves both filters together.
    let group = match (user, status) {
        (Some(_), _) => Some("user"),
        (None, Some(_)) => Some("status"),
        (None, None) => None,
    };
    let sorted = order.map_or(Direction::Desc, |Choice(order)| order).over(&keys);
    List::page("order.list", filter, sorted, index(group, sort), limit, cursor.as_deref()).map(Plan::List)
}

/// The index in the order of the sort, over all orders or grouped by `user` or `status`. The sort keys are followed by
/// the other fields that filters use, so that no document is read only to be discarded.
fn index(group: Option<&str>, sort: Sort) -> Document {
    let mut index = Document::new();
    if let Some(field) = group {
        index.insert(field, 1);
    }
    index.extend(match sort {
        Sort::Date => doc! { "placed_at": 1, "_id": 1 },
        Sort::Total => doc! { "total.currency": 1, "total.amount": 1, "_id": 1, "placed_at": 1 },
    });
    if group == Some("user") {
        index.insert("status", 1);
    }
    index
}

fn range(from: Option<Timestamp>, to: Option<Timestamp>) -> Result<Document, Malformed> {
    let mut range = Document::new();
    if let Some(from) = from {
        range.insert("$gte", from.to_string());
    }
    if let Some(to) = to {
        if from.is_some_and(|from| from >= to) {
            return Err(Malformed::new("to", Reason::OutOfBounds, "a moment after `from`"));
        }
        range.insert("$lt", to.to_string());
    }
    Ok(range)
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Paid => "paid",
            Self::Shipped => "shipped",
            Self::Cancelled => "cancelled",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::given::{self, cancelled, line, order_deleted, page, paid, placed, refusal, shipped};

    fn fold(events: &[Recorded]) -> Option<Order> {
        given::fold::<Orders>("00000000-0000-0000-0000-000000000007", events)
    }

    fn lines() -> Vec<Line> {
        vec![line(1, 2, 250), line(2, 1, 100), line(1, 3, 200)]
    }

    #[test]
    fn a_placed_order_has_the_fields_of_its_event() {
        let order = fold(&[placed(7, 9, "2010-12-01T08:26:00Z", lines())]).unwrap();
        let json = serde_json::to_string(&order).unwrap();
        assert!(
            json.starts_with(
                r#"{"_id":"00000000-0000-0000-0000-000000000007","user":"00000000-0000-0000-0000-000000000009","status":"placed","placed_at":"2010-12-01T08:26:00.000Z","total":{"amount":1200,"currency":"GBP"},"units":6,"lines":[{"product":"00000000-0000-0000-0000-000000000001","sku":"S1","name":"LANTERN 1","quantity":2,"unit_price":{"amount":250,"currency":"GBP"}},"#
            ),
            "{json}"
        );
        assert!(
            json.ends_with(r#","refund_due":false,"version":1,"updated_at":"2011-01-01T00:00:00.000Z"}"#),
            "{json}"
        );
    }

    #[test]
    fn an_order_goes_through_its_statuses() {
        let mut events = vec![placed(7, 9, "2010-12-01T08:26:00Z", lines())];
        for (event, status) in [(paid(7, 2), Status::Paid), (shipped(7, 3), Status::Shipped)] {
            events.push(event);
            let order = fold(&events).unwrap();
            assert_eq!((order.status, order.version, order.refund_due), (status, events.len() as u64, false));
        }
        events.push(order_deleted(7, 4));
        assert_eq!(fold(&events), None);
    }

    #[test]
    fn a_refund_is_due_only_after_cancelling_a_paid_order() {
        let placed = placed(7, 9, "2010-12-01T08:26:00Z", lines());
        let order = fold(&[placed.clone(), cancelled(&placed, 2, false)]).unwrap();
        assert_eq!((order.status, order.refund_due), (Status::Cancelled, false));
        let order = fold(&[placed.clone(), paid(7, 2), cancelled(&placed, 3, true)]).unwrap();
        assert_eq!((order.status, order.refund_due, order.version), (Status::Cancelled, true, 3));
    }

    #[test]
    fn events_that_do_not_fit_are_inapplicable() {
        let placed = placed(7, 9, "2010-12-01T08:26:00Z", lines());
        let order = fold(std::slice::from_ref(&placed));
        assert!(Orders::evolve(order, "", &placed).is_err());
        for event in [paid(7, 2), shipped(7, 2), cancelled(&placed, 2, false), order_deleted(7, 2)] {
            assert!(Orders::evolve(None, "", &event).is_err(), "{event:?}");
        }
    }

    #[test]
    fn units_that_overflow_are_inapplicable() {
        let event = placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, i64::MAX, 0), line(1, 1, 0)]);
        assert!(Orders::evolve(None, "", &event).is_err());
    }

    #[test]
    fn the_latest_orders_come_first() {
        let page = page(list, "");
        assert_eq!(page.filter, doc! {});
        assert_eq!(page.sort, doc! { "placed_at": -1, "_id": -1 });
        assert_eq!(page.hint, doc! { "placed_at": 1, "_id": 1 });
        assert_eq!(page.limit, 20);
    }

    #[test]
    fn all_filters_can_be_combined_with_a_sort() {
        let page = page(
            list,
            r#"{"user":"00000000-0000-0000-0000-000000000009","status":"paid","from":"2010-12-01T01:00:00+01:00",
                "to":"2011-01-01T00:00:00Z","sort":"total","currency":"GBP","order":"asc","limit":3}"#,
        );
        assert_eq!(
            page.filter,
            doc! {
                "user": "00000000-0000-0000-0000-000000000009",
                "status": "paid",
                "placed_at": { "$gte": "2010-12-01T00:00:00.000Z", "$lt": "2011-01-01T00:00:00.000Z" },
                "total.currency": "GBP",
            }
        );
        assert_eq!(page.sort, doc! { "total.amount": 1, "_id": 1 });
        assert!(Orders::indexes().contains(&page.hint));
    }

    #[test]
    fn refusals_name_the_field() {
        for (body, field) in [
            (r#"{"user":"9"}"#, "user"),
            (r#"{"status":"lost"}"#, "status"),
            (r#"{"from":"yesterday"}"#, "from"),
            (r#"{"from":"2010-12-01T00:00:00Z","to":"2010-12-01T00:00:00Z"}"#, "to"),
            (r#"{"sort":"total"}"#, "currency"),
            (r#"{"sort":"total","currency":"gbp"}"#, "currency"),
            (r#"{"currency":"GBP"}"#, "currency"),
            (r#"{"sort":"user"}"#, "sort"),
            (r#"{"order":"down"}"#, "order"),
            (r#"{"limit":0}"#, "limit"),
            (r#"{"limit":101}"#, "limit"),
            (r#"{"cursor":"ff"}"#, "cursor"),
            (r#"{"colour":"red"}"#, "colour"),
        ] {
            assert_eq!(refusal(list, body), field, "{body}");
        }
    }
}
