//! The view `sales`: the sales of each day, in total and by product, with queries for the daily figures and the best
//! sellers of a period. The invariant: the figures of a day are the sums over the orders that were placed on that day,
//! in UTC, and not cancelled. Without such orders there is no document.

use std::{collections::BTreeSet, str::FromStr, time::Duration};

use bson::{Document, RawDocumentBuf, doc};
use domain::{
    Currency, Id, Malformed, Name, Reason, Recorded, Sku, Timestamp, order,
    strict::{self, Choice},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    Inapplicable, Query, QueryRequest, View, WholeNumber,
    query::{Limit, Plan, Rendered, Report},
    read,
    totals::{self, Operation, OrderDelta, Sum, whole_number},
    write,
};

/// The largest number of days in a period, which is a leap year.
const MAX_DAYS: i64 = 366;
const DAY_MILLIS: i64 = 86_400_000;

pub struct Sales;

/// The two kinds of documents in the collection.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Figures {
    Day(DayFigures),
    Product(ProductFigures),
}

/// This is not derived, because what serde derives for a tag no longer tells BSON from JSON, in which [`WholeNumber`]
/// has another form.
impl<'de> Deserialize<'de> for Figures {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let document = RawDocumentBuf::deserialize(deserializer)?;
        let read = match document.get_str("kind").map_err(de::Error::custom)? {
            "day" => bson::deserialize_from_slice(document.as_bytes()).map(Self::Day),
            "product" => bson::deserialize_from_slice(document.as_bytes()).map(Self::Product),
            _ => return Err(de::Error::custom("expected a document of the kind `day` or `product`")),
        };
        read.map_err(de::Error::custom)
    }
}

/// The total sales of a day.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DayFigures {
    /// The day, such as `2010-12-01`.
    #[serde(rename = "_id")]
    pub id: String,
    pub day: String,
    pub orders: WholeNumber,
    /// The number of pieces.
    pub units: WholeNumber,
    pub revenue: Vec<Sum>,
}

/// The sales of a product in one currency on a day.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProductFigures {
    /// The day, the currency and the identifier of the product, separated by slashes.
    #[serde(rename = "_id")]
    pub id: String,
    pub day: String,
    pub currency: Currency,
    pub product: Id,
    /// The SKU and the name are those of the sale that was recorded last.
    pub sku: Sku,
    pub name: Name,
    /// The number of pieces.
    pub units: WholeNumber,
    /// The revenue in minor units.
    pub revenue: WholeNumber,
}

impl View for Sales {
    const NAME: &'static str = "sales";
    const VERSION: i32 = 2;
    type Document = Figures;
    const BATCH_WINDOW: Duration = Duration::from_millis(100);
    const AGGREGATES: &'static [&'static str] = &[order::KIND];

    fn document_ids(event: &Recorded) -> Vec<String> {
        let Some(order) = OrderDelta::of(event) else {
            return vec![];
        };
        let products: BTreeSet<Id> = order.lines.iter().map(|line| line.product).collect();
        let product_keys = products.into_iter().map(|product| product_key(&order, product));
        [order.placed_at.day()].into_iter().chain(product_keys).collect()
    }

    fn evolve(document: Option<Figures>, id: &str, event: &Recorded) -> Result<Option<Figures>, Inapplicable> {
        let Some(order) = OrderDelta::of(event) else {
            return Ok(document);
        };
        match (document, id.rsplit_once('/')) {
            (None, None) => count_day(DayFigures::zero(&order), &order),
            (Some(Figures::Day(day)), None) => count_day(day, &order),
            (None, Some((_, product))) => match ProductFigures::zero(&order, product) {
                Some(figures) => count_product(figures, &order),
                None => Ok(None),
            },
            (Some(Figures::Product(figures)), Some(_)) => count_product(figures, &order),
            (Some(Figures::Product(_)), None) | (Some(Figures::Day(_)), Some(_)) => {
                Err(Inapplicable(format!("the document {id} is of the wrong kind")))
            }
        }
    }

    fn indexes() -> Vec<Document> {
        vec![doc! { "kind": 1, "day": 1, "currency": 1 }]
    }

    const QUERIES: &'static [Query] = &[
        Query::of::<DailySales>(
            "Orders, units and revenue of each day of a period on which something was sold, and in all",
            daily,
            &[r#"{"from":"2010-12-01","to":"2010-12-09"}"#],
        ),
        Query::of::<TopSales>(
            "The best sellers of a period, by revenue in a currency or by units",
            top,
            &[r#"{"from":"2010-12-01","to":"2010-12-09","by":"revenue","currency":"GBP"}"#],
        ),
    ];
}

impl DayFigures {
    fn zero(order: &OrderDelta<'_>) -> Self {
        let day = order.placed_at.day();
        Self { id: day.clone(), day, orders: WholeNumber::ZERO, units: WholeNumber::ZERO, revenue: vec![] }
    }
}

impl ProductFigures {
    /// The figures before any sale; `None` if the product is not in the order.
    fn zero(order: &OrderDelta<'_>, product: &str) -> Option<Self> {
        let product = product.parse().ok()?;
        let line = order.lines.iter().find(|line| line.product == product)?;
        Some(Self {
            id: product_key(order, product),
            day: order.placed_at.day(),
            currency: order.total.currency,
            product,
            sku: line.sku.clone(),
            name: line.name.clone(),
            units: WholeNumber::ZERO,
            revenue: WholeNumber::ZERO,
        })
    }
}

fn product_key(order: &OrderDelta<'_>, product: Id) -> String {
    format!("{}/{}/{product}", order.placed_at.day(), order.total.currency)
}

fn count_day(mut figures: DayFigures, order: &OrderDelta<'_>) -> Result<Option<Figures>, Inapplicable> {
    figures.orders = order.operation.apply(figures.orders, whole_number(1)?)?;
    figures.units = order.operation.apply(figures.units, whole_number(totals::units(order.lines)?)?)?;
    order.operation.apply_to_sums(&mut figures.revenue, &order.total.try_into()?)?;
    Ok((figures.orders > WholeNumber::ZERO).then_some(Figures::Day(figures)))
}

fn count_product(mut figures: ProductFigures, order: &OrderDelta<'_>) -> Result<Option<Figures>, Inapplicable> {
    for line in order.lines.iter().filter(|line| line.product == figures.product) {
        let amount = line.unit_price.checked_mul(line.quantity);
        let amount = amount.ok_or_else(|| Inapplicable(format!("the amount of a line of {} overflows", line.sku)))?;
        figures.units = order.operation.apply(figures.units, whole_number(line.quantity)?)?;
        figures.revenue = order.operation.apply(figures.revenue, whole_number(amount.amount)?)?;
        if order.operation == Operation::Add {
            (figures.sku, figures.name) = (line.sku.clone(), line.name.clone());
        }
    }
    Ok((figures.units > WholeNumber::ZERO).then_some(Figures::Product(figures)))
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DailySales {
    /// The first day of the period.
    pub from: Day,
    /// Its last day; 366 days at most.
    pub to: Day,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopSales {
    /// The first day of the period.
    pub from: Day,
    /// Its last day; 366 days at most.
    pub to: Day,
    pub by: Choice<By>,
    /// Sales in this currency only. Needed with `by` `revenue`.
    pub currency: Option<Currency>,
    pub limit: Option<Limit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum By {
    Revenue,
    Units,
}

/// A day in UTC, as the time at which it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day(Timestamp);

impl FromStr for Day {
    type Err = InvalidDay;

    fn from_str(text: &str) -> Result<Self, InvalidDay> {
        let begin = (text.len() == "2026-01-31".len()).then(|| format!("{text}T00:00:00Z").parse().ok()).flatten();
        begin.map(Self).ok_or(InvalidDay)
    }
}

const EXPECTED_DAY: &str = "a day such as 2026-01-31";

/// The error for a text that is not a day.
#[derive(Debug, thiserror::Error)]
#[error("expected {EXPECTED_DAY}")]
pub struct InvalidDay;

impl Serialize for Day {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(begin) = self;
        serializer.serialize_str(&begin.day())
    }
}

impl<'de> Deserialize<'de> for Day {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        strict::text(deserializer, EXPECTED_DAY, |text| text.parse().ok())
    }
}

impl JsonSchema for Day {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Day".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "date" })
    }
}

/// The condition that the field `day` is within the period.
///
/// # Errors
/// If the period ends before it begins, or is too long.
fn period(from: Day, to: Day) -> Result<Document, Malformed> {
    if from > to {
        return Err(Malformed::new("to", Reason::OutOfBounds, "the day `from` or a later one"));
    }
    if (to.0.unix_millis() - from.0.unix_millis()) / DAY_MILLIS >= MAX_DAYS {
        return Err(Malformed::new("to", Reason::OutOfBounds, format!("a period of at most {MAX_DAYS} days")));
    }
    Ok(doc! { "$gte": from.0.day(), "$lte": to.0.day() })
}

impl QueryRequest for DailySales {
    const NOUN: &'static str = "sales";
    const VERB: &'static str = "daily";
    type Reply = Daily;
}

fn daily(body: &[u8]) -> Result<Plan, Malformed> {
    let DailySales { from, to } = domain::parse(body)?;
    let pipeline = vec![doc! { "$match": { "kind": "day", "day": period(from, to)? } }, doc! { "$sort": { "day": 1 } }];
    Ok(Plan::Report(Report { pipeline, render: render_daily }))
}

/// The reply of `sales.daily`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Daily {
    pub days: Vec<DayItem>,
    pub total: Total,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DayItem {
    pub day: String,
    pub orders: WholeNumber,
    pub units: WholeNumber,
    pub revenue: Vec<Sum>,
}

/// The sums of all days.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Total {
    pub orders: WholeNumber,
    pub units: WholeNumber,
    pub revenue: Vec<Sum>,
}

fn render_daily(documents: &[RawDocumentBuf]) -> Rendered {
    let days: Vec<DayItem> = read(documents)?;
    let mut total = Total::default();
    for day in &days {
        total.orders = Operation::Add.apply(total.orders, day.orders)?;
        total.units = Operation::Add.apply(total.units, day.units)?;
        for sum in &day.revenue {
            Operation::Add.apply_to_sums(&mut total.revenue, sum)?;
        }
    }
    write(&Daily { days, total }).map(Some)
}

impl QueryRequest for TopSales {
    const NOUN: &'static str = "sales";
    const VERB: &'static str = "top";
    type Reply = Top;
}

fn top(body: &[u8]) -> Result<Plan, Malformed> {
    let TopSales { from, to, by: Choice(by), currency, limit } = domain::parse(body)?;
    let days = period(from, to)?;
    let Limit(limit) = limit.unwrap_or_default();
    let best = |key: &str| [doc! { "$sort": { key: -1, "_id": 1 } }, doc! { "$limit": limit }];
    let stages = match (by, currency) {
        (By::Revenue, Some(currency)) => [in_currency(days, currency), best("amount").into()],
        (By::Units, Some(currency)) => [in_currency(days, currency), best("units").into()],
        (By::Units, None) => [in_all_currencies(days), best("units").into()],
        (By::Revenue, None) => {
            return Err(Malformed::new("currency", Reason::Missing, "a currency, as revenues in one are compared"));
        }
    };
    Ok(Plan::Report(Report { pipeline: stages.concat(), render: render_top }))
}

/// The sums of each product in one currency. The documents are sorted by day, so that `$last` gives the latest name.
fn in_currency(days: Document, currency: Currency) -> Vec<Document> {
    vec![
        doc! { "$match": { "kind": "product", "day": days, "currency": currency.as_str() } },
        doc! { "$sort": { "day": 1 } },
        doc! { "$group": {
            "_id": "$product",
            "sku": { "$last": "$sku" },
            "name": { "$last": "$name" },
            "units": { "$sum": "$units" },
            "amount": { "$sum": "$revenue" },
            "currency": { "$last": "$currency" },
        } },
        doc! { "$set": { "revenue": [{ "amount": "$amount", "currency": "$currency" }] } },
    ]
}

/// The sums of each product, with the revenue in each currency. This takes about twice as long as one currency.
fn in_all_currencies(days: Document) -> Vec<Document> {
    vec![
        doc! { "$match": { "kind": "product", "day": days } },
        doc! { "$sort": { "day": 1 } },
        doc! { "$group": {
            "_id": { "product": "$product", "currency": "$currency" },
            "day": { "$last": "$day" },
            "sku": { "$last": "$sku" },
            "name": { "$last": "$name" },
            "units": { "$sum": "$units" },
            "amount": { "$sum": "$revenue" },
        } },
        doc! { "$sort": { "day": 1, "_id": 1 } },
        doc! { "$group": {
            "_id": "$_id.product",
            "sku": { "$last": "$sku" },
            "name": { "$last": "$name" },
            "units": { "$sum": "$units" },
            "revenue": { "$push": { "amount": "$amount", "currency": "$_id.currency" } },
        } },
    ]
}

/// The reply of `sales.top`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Top {
    pub items: Vec<TopItem>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopItem {
    pub product: Id,
    pub sku: Sku,
    pub name: Name,
    pub units: WholeNumber,
    pub revenue: Vec<Sum>,
}

fn render_top(documents: &[RawDocumentBuf]) -> Rendered {
    #[derive(Deserialize)]
    struct Group {
        #[serde(rename = "_id")]
        product: Id,
        sku: Sku,
        name: Name,
        units: WholeNumber,
        revenue: Vec<Sum>,
    }

    let item = |Group { product, sku, name, units, mut revenue }| {
        revenue.retain(|sum| sum.amount != WholeNumber::ZERO);
        revenue.sort_by_key(|sum| sum.currency);
        TopItem { product, sku, name, units, revenue }
    };
    write(&Top { items: read(documents)?.into_iter().map(item).collect() }).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::given::{self, cancelled, id, line, named, paid, placed, priced, refusal, shipped};

    const DAY: &str = "2010-12-01";

    fn number(number: i64) -> WholeNumber {
        whole_number(number).unwrap()
    }

    fn day(orders: i64, units: i64, revenue: &[(i64, &str)]) -> Figures {
        let revenue: Vec<_> = revenue.iter().map(|&(amount, currency)| (number(amount), currency)).collect();
        day_of(number(orders), number(units), &revenue)
    }

    fn day_of(orders: WholeNumber, units: WholeNumber, revenue: &[(WholeNumber, &str)]) -> Figures {
        let sum = |&(amount, currency): &(WholeNumber, &str)| Sum { amount, currency: currency.parse().unwrap() };
        let revenue = revenue.iter().map(sum).collect();
        Figures::Day(DayFigures { id: DAY.into(), day: DAY.into(), orders, units, revenue })
    }

    fn product_key(currency: &str, product: u128) -> String {
        format!("{DAY}/{currency}/{}", id(product))
    }

    fn product(currency: &str, n: u128, units: i64, revenue: i64) -> Figures {
        product_of(currency, n, number(units), number(revenue))
    }

    fn product_of(currency: &str, n: u128, units: WholeNumber, revenue: WholeNumber) -> Figures {
        Figures::Product(ProductFigures {
            id: product_key(currency, n),
            day: DAY.into(),
            currency: currency.parse().unwrap(),
            product: id(n),
            sku: Sku::new(&format!("S{n}")).unwrap(),
            name: Name::new(&format!("LANTERN {n}")).unwrap(),
            units,
            revenue,
        })
    }

    fn orders() -> Vec<Recorded> {
        vec![
            placed(7, 9, "2010-12-01T00:00:00Z", vec![line(1, 2, 250), line(2, 1, 100), line(1, 3, 200)]),
            placed(8, 9, "2010-12-01T23:59:59.999Z", vec![priced(1, 1, 30, "EUR")]),
            placed(10, 9, "2010-12-02T00:30:00+01:00", vec![line(2, 4, 0)]),
        ]
    }

    #[test]
    fn an_order_changes_the_documents_of_its_day_and_of_each_product() {
        let order = &orders()[0];
        let expected = [DAY.to_owned(), product_key("GBP", 1), product_key("GBP", 2)];
        assert_eq!(Sales::document_ids(order), expected);
        assert_eq!(Sales::document_ids(&cancelled(order, 2, false)), expected);
        for event in [paid(7, 2), shipped(7, 3)] {
            assert!(crate::document_ids::<Sales>(&event).is_empty());
        }
    }

    #[test]
    fn figures_are_the_sums_of_the_orders_placed_on_the_day() {
        let events = [orders(), vec![paid(7, 2), shipped(7, 3)]].concat();
        let fold = |id: &str| given::fold::<Sales>(id, &events);
        assert_eq!(fold(DAY), Some(day(3, 11, &[(30, "EUR"), (1200, "GBP")])));
        assert_eq!(fold(&product_key("GBP", 1)), Some(product("GBP", 1, 5, 1100)));
        assert_eq!(fold(&product_key("EUR", 1)), Some(product("EUR", 1, 1, 30)));
        assert_eq!(fold(&product_key("GBP", 2)), Some(product("GBP", 2, 5, 100)));
    }

    #[test]
    fn cancelling_restores_the_document_before_placing() {
        let orders = orders();
        let ids: BTreeSet<String> = orders.iter().flat_map(Sales::document_ids).collect();
        for id in &ids {
            for (at, placed) in orders.iter().enumerate() {
                let before = given::fold::<Sales>(id, &orders[..at]);
                let after = [orders[..at].to_vec(), vec![placed.clone(), cancelled(placed, 2, false)]].concat();
                assert_eq!(given::fold::<Sales>(id, &after), before, "{id}");
            }
            let cancelled = orders.iter().map(|placed| cancelled(placed, 2, false)).collect();
            assert_eq!(given::fold::<Sales>(id, &[orders.clone(), cancelled].concat()), None, "{id}");
        }
    }

    #[test]
    fn a_product_has_the_name_of_its_latest_sale() {
        let events = [
            placed(7, 9, "2010-12-01T08:00:00Z", vec![line(1, 2, 250)]),
            placed(8, 9, "2010-12-01T09:00:00Z", vec![named(line(1, 1, 250), "NEW NAME")]),
        ];
        let Some(Figures::Product(figures)) = given::fold::<Sales>(&product_key("GBP", 1), &events) else {
            panic!("no figures");
        };
        assert_eq!((&*figures.name, figures.units), ("NEW NAME", number(3)));
    }

    #[test]
    fn a_document_is_written_with_its_kind() {
        let json = |figures: Figures| serde_json::to_string(&figures).unwrap();
        assert_eq!(
            json(day(1, 2, &[(500, "GBP")])),
            r#"{"kind":"day","_id":"2010-12-01","day":"2010-12-01","orders":1,"units":2,"revenue":[{"amount":500,"currency":"GBP"}]}"#
        );
        assert_eq!(
            json(product("GBP", 1, 2, 500)),
            r#"{"kind":"product","_id":"2010-12-01/GBP/00000000-0000-0000-0000-000000000001","day":"2010-12-01","currency":"GBP","product":"00000000-0000-0000-0000-000000000001","sku":"S1","name":"LANTERN 1","units":2,"revenue":500}"#
        );
    }

    #[test]
    fn events_with_impossible_sums_are_inapplicable() {
        let order = placed(7, 9, "2010-12-01T00:00:00Z", vec![line(1, 2, 250)]);
        let huge = placed(7, 9, "2010-12-01T00:00:00Z", vec![line(1, i64::MAX, 250), line(1, i64::MAX, 250)]);
        let key = product_key("GBP", 1);
        for (document, id, event) in [
            (None, DAY, cancelled(&order, 2, false)),
            (None, &*key, cancelled(&order, 2, false)),
            (Some(day_of(WholeNumber::MAX, WholeNumber::ZERO, &[])), DAY, order.clone()),
            (Some(day_of(number(1), WholeNumber::MAX, &[])), DAY, order.clone()),
            (Some(day_of(number(1), number(1), &[(WholeNumber::MAX, "GBP")])), DAY, order.clone()),
            (Some(product_of("GBP", 1, WholeNumber::MAX, number(1))), &*key, order.clone()),
            (Some(product_of("GBP", 1, number(1), WholeNumber::MAX)), &*key, order.clone()),
            (None, DAY, huge.clone()),
            (None, &*key, huge.clone()),
            (Some(day(1, 1, &[])), &*key, order.clone()),
            (Some(product("GBP", 1, 1, 1)), DAY, order.clone()),
        ] {
            assert!(Sales::evolve(document.clone(), id, &event).is_err(), "{document:?} {id}");
        }
    }

    fn stored(figures: &Figures) -> Document {
        bson::serialize_to_raw_document_buf(figures).unwrap().try_into().unwrap()
    }

    fn report(plan: fn(&[u8]) -> Result<Plan, Malformed>, body: &str) -> Report {
        match plan(body.as_bytes()).unwrap() {
            Plan::Report(report) => report,
            other => panic!("{other:?}"),
        }
    }

    fn rendered(report: &Report, documents: &[Document]) -> Result<String, Inapplicable> {
        let documents: Vec<_> = documents.iter().map(|document| RawDocumentBuf::try_from(document).unwrap()).collect();
        (report.render)(&documents).map(|body| String::from_utf8(body.unwrap()).unwrap())
    }

    #[test]
    fn the_daily_figures_come_with_their_total() {
        let report = report(daily, r#"{"from":"2010-12-01","to":"2010-12-31"}"#);
        assert_eq!(
            report.pipeline[0],
            doc! { "$match": { "kind": "day", "day": { "$gte": "2010-12-01", "$lte": "2010-12-31" } } }
        );
        let document = |figures: Figures| stored(&figures);
        let days = [day(2, 3, &[(30, "EUR"), (500, "GBP")]), day(1, 1, &[(70, "GBP")])].map(document);
        assert_eq!(
            rendered(&report, &days).unwrap(),
            r#"{"days":[{"day":"2010-12-01","orders":2,"units":3,"revenue":[{"amount":30,"currency":"EUR"},{"amount":500,"currency":"GBP"}]},{"day":"2010-12-01","orders":1,"units":1,"revenue":[{"amount":70,"currency":"GBP"}]}],"total":{"orders":3,"units":4,"revenue":[{"amount":30,"currency":"EUR"},{"amount":570,"currency":"GBP"}]}}"#
        );
        assert_eq!(rendered(&report, &[]).unwrap(), r#"{"days":[],"total":{"orders":0,"units":0,"revenue":[]}}"#);
        // The total of a year is beyond 64 bits.
        let rich = document(day_of(number(i64::MAX), number(i64::MAX), &[(number(i64::MAX), "GBP")]));
        let sum = i128::from(i64::MAX) * 366;
        let total =
            format!(r#""total":{{"orders":{sum},"units":{sum},"revenue":[{{"amount":{sum},"currency":"GBP"}}]}}}}"#);
        assert!(rendered(&report, &vec![rich; 366]).unwrap().ends_with(&total));
    }

    #[test]
    fn the_database_groups_sorts_and_limits_the_best_sellers() {
        let body = r#"{"from":"2010-12-01","to":"2010-12-01","by":"revenue","currency":"GBP","limit":3}"#;
        let report = report(top, body);
        assert_eq!(
            report.pipeline[0].get_document("$match").unwrap(),
            &doc! { "kind": "product", "day": { "$gte": "2010-12-01", "$lte": "2010-12-01" }, "currency": "GBP" }
        );
        assert!(report.pipeline.ends_with(&[doc! { "$sort": { "amount": -1, "_id": 1 } }, doc! { "$limit": 3_i64 }]));
        let decimal = |digits: &str| digits.parse::<bson::Decimal128>().unwrap();
        let group = |units: bson::Bson| {
            let pounds = doc! { "amount": decimal("500"), "currency": "GBP" };
            let euros = doc! { "amount": decimal("30"), "currency": "EUR" };
            doc! {
                "_id": id(1).to_string(), "sku": "S1", "name": "LANTERN", "units": units, "revenue": [pounds, euros],
            }
        };
        assert_eq!(
            rendered(&report, &[group(decimal("7").into())]).unwrap(),
            r#"{"items":[{"product":"00000000-0000-0000-0000-000000000001","sku":"S1","name":"LANTERN","units":7,"revenue":[{"amount":30,"currency":"EUR"},{"amount":500,"currency":"GBP"}]}]}"#
        );
        assert!(rendered(&report, &[group(1e19.into())]).is_err());
    }

    #[test]
    fn units_are_compared_over_all_currencies_or_in_one() {
        let over_all = report(top, r#"{"from":"2010-12-01","to":"2010-12-01","by":"units"}"#);
        assert!(over_all.pipeline.contains(&doc! { "$sort": { "units": -1, "_id": 1 } }));
        let body = r#"{"from":"2010-12-01","to":"2010-12-01","by":"units","currency":"EUR"}"#;
        assert_eq!(report(top, body).pipeline[0].get_document("$match").unwrap().get_str("currency").unwrap(), "EUR");
    }

    #[test]
    fn refusals_name_the_field() {
        let top_of = |rest: &str| format!(r#"{{"from":"2010-12-01","to":"2010-12-31"{rest}}}"#);
        assert!(daily(br#"{"from":"2008-01-01","to":"2008-12-31"}"#).is_ok());
        for (plan, body, field) in [
            (daily as fn(&[u8]) -> _, r#"{"from":"2010-12-01"}"#.to_owned(), "to"),
            (daily, r#"{"from":"1.12.2010","to":"2010-12-31"}"#.into(), "from"),
            (daily, r#"{"from":"2010-12-01T00:00:00Z","to":"2010-12-31"}"#.into(), "from"),
            (daily, r#"{"from":"2010-12-01","to":"2010-02-29"}"#.into(), "to"),
            (daily, r#"{"from":"2010-12-02","to":"2010-12-01"}"#.into(), "to"),
            (daily, r#"{"from":"2009-01-01","to":"2010-01-02"}"#.into(), "to"),
            (daily, top_of(r#","limit":1"#), "limit"),
            (top, top_of(""), "by"),
            (top, top_of(r#","by":"luck""#), "by"),
            (top, top_of(r#","by":"revenue""#), "currency"),
            (top, top_of(r#","by":"units","currency":"XXX""#), "currency"),
            (top, top_of(r#","by":"units","limit":0"#), "limit"),
            (top, r#"{"from":"0001-01-01","to":"9999-12-31","by":"units"}"#.into(), "to"),
        ] {
            assert_eq!(refusal(plan, &body), field, "{body}");
        }
    }
}
