//! The view `users`: the registered users, with the number of their orders and the amounts that they spent. The
//! invariant: `orders` and `spent` cover exactly the user's orders that were placed and not cancelled.

use std::{collections::BTreeMap, time::Duration};

use bson::{Document, doc};
use domain::{
    Country, Currency, Email, Event, Id, Malformed, Name, Reason, Recorded, Timestamp, order, strict::Choice, user,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Inapplicable, Page, Query, QueryRequest, View, WholeNumber, absent, present,
    query::{Direction, Key, Limit, List, Plan, get_by, one_of},
    totals::{OrderDelta, Sum, whole_number},
    words::normalized,
};

pub struct Users;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct User {
    #[serde(rename = "_id", alias = "id")]
    pub id: Id,
    pub email: Email,
    pub name: Name,
    pub country: Option<Country>,
    pub registered_at: Timestamp,
    /// The number of orders that were placed and not cancelled.
    pub orders: WholeNumber,
    /// The totals of those orders, by currency.
    pub spent: Vec<Sum>,
    pub version: u64,
    #[serde(rename = "_email", default)]
    normalized_email: String,
    #[serde(rename = "_name", default)]
    normalized_name: String,
    /// The amount and the identifier in one text, for each currency alone and together with the country
    /// ([`spent_key`]). All sort keys are in one field, because the index for any number of currencies is a wildcard
    /// index, and such an index sorts by a single field.
    #[serde(rename = "_spent", default)]
    spent_sort_keys: BTreeMap<String, String>,
}

impl View for Users {
    const NAME: &'static str = "users";
    const VERSION: i32 = 2;
    type Document = User;
    const BATCH_WINDOW: Duration = Duration::from_millis(100);
    const AGGREGATES: &'static [&'static str] = &[user::KIND, order::KIND];

    fn creates_document(event: &Recorded) -> bool {
        matches!(event.event, Event::User(user::Event::Registered(_)))
    }

    fn document_ids(event: &Recorded) -> Vec<String> {
        match &event.event {
            Event::User(_) => vec![event.id.to_string()],
            Event::Order(_) => OrderDelta::of(event).map(|order| order.user.to_string()).into_iter().collect(),
            _ => vec![],
        }
    }

    fn evolve(document: Option<User>, id: &str, event: &Recorded) -> Result<Option<User>, Inapplicable> {
        let user_event = match &event.event {
            Event::User(user_event) => user_event,
            // There may be events of orders after their user was deleted.
            Event::Order(_) => {
                return match (document, OrderDelta::of(event)) {
                    (Some(user), Some(order)) => user.with_order(&order).map(Some),
                    (document, _) => Ok(document),
                };
            }
            _ => return Ok(document),
        };
        match user_event {
            user::Event::Registered(registered) => {
                absent(document.as_ref(), id)?;
                Ok(Some(User::registered(event, registered)))
            }
            user::Event::Updated(user::Updated { email, name, country }) => {
                let (email, name, country) = (email.clone(), name.clone(), country.as_ref().map(Country::composed));
                let user = User { email, name, country, version: event.version, ..present(document, id)? };
                Ok(Some(user.indexed()))
            }
            user::Event::Deleted(user::Deleted {}) => present(document, id).map(|_| None),
        }
    }

    fn indexes() -> Vec<Document> {
        vec![
            // The index is not unique, because an address may pass from one user to another within a batch, whose
            // writes are unordered.
            doc! { "_email": 1 },
            index(false, Sort::Name),
            index(true, Sort::Name),
            index(false, Sort::Registered),
            index(true, Sort::Registered),
            index(false, Sort::Spent),
        ]
    }

    const QUERIES: &'static [Query] = &[
        Query::of::<GetUser>(
            "A user by its id or e-mail address",
            get,
            &[r#"{"id":"00000000-0000-0000-0000-000000000001"}"#, r#"{"email":"ada@example.com"}"#],
        ),
        Query::of::<ListUsers>(
            "Users by country and name prefix, sorted by name, registration or amount spent, in pages",
            list,
            &[
                r#"{"country":"United Kingdom","name_prefix":"ad","sort":"name","order":"asc"}"#,
                r#"{"country":"United Kingdom","sort":"spent","currency":"GBP"}"#,
            ],
        ),
    ];
}

impl User {
    fn registered(event: &Recorded, registered: &user::Registered) -> Self {
        let user::Registered { email, name, country } = registered.clone();
        let user = Self {
            id: event.id,
            email,
            name,
            // Countries in requests are in NFC, but those in events of older versions may not be.
            country: country.as_ref().map(Country::composed),
            registered_at: event.at,
            orders: WholeNumber::ZERO,
            spent: vec![],
            version: event.version,
            normalized_email: String::new(),
            normalized_name: String::new(),
            spent_sort_keys: BTreeMap::new(),
        };
        user.indexed()
    }

    /// Adds the order to the totals or subtracts it. The version is not changed, since it counts the events of the
    /// user.
    fn with_order(mut self, order: &OrderDelta<'_>) -> Result<Self, Inapplicable> {
        self.orders = order.operation.apply(self.orders, whole_number(1)?)?;
        order.operation.apply_to_sums(&mut self.spent, &order.total.try_into()?)?;
        Ok(self.indexed())
    }

    /// Derives the fields for the indexes from the others.
    fn indexed(mut self) -> Self {
        self.normalized_email = self.email.normalized();
        self.normalized_name = normalized(&self.name);
        self.spent_sort_keys.clear();
        for Sum { amount, currency } in &self.spent {
            // The amounts have leading zeros, so that the texts sort by amount.
            let text = format!("{amount:0digits$}/{}", self.id, digits = WholeNumber::DIGITS as usize);
            if let Some(country) = &self.country {
                self.spent_sort_keys.insert(spent_key(*currency, Some(country)), text.clone());
            }
            self.spent_sort_keys.insert(spent_key(*currency, None), text);
        }
        self
    }
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = one_of("email")))]
pub struct GetUser {
    pub id: Option<Id>,
    /// In whatever letter case and spelling.
    #[serde(default, deserialize_with = "Email::requested_if_any")]
    pub email: Option<Email>,
}

impl QueryRequest for GetUser {
    const NOUN: &'static str = "user";
    const VERB: &'static str = "get";
    type Reply = User;
}

fn get(body: &[u8]) -> Result<Plan, Malformed> {
    let GetUser { id, email } = domain::parse(body)?;
    let key = |email: Email| Key { field: "_email", value: email.normalized(), requested: email.to_string() };
    get_by(id, "email", email.map(key))
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Sort {
    #[default]
    Name,
    Registered,
    Spent,
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListUsers {
    /// Users of this country only, spelled as they registered it.
    #[serde(default, deserialize_with = "Country::requested_if_any")]
    pub country: Option<Country>,
    /// Users only whose name begins so, in any letter case and spelling. Only with `sort` by `name`.
    #[serde(default, deserialize_with = "Name::requested_if_any")]
    pub name_prefix: Option<Name>,
    #[schemars(extend("default" = "name"))]
    pub sort: Option<Choice<Sort>>,
    /// Needed with, and only with, `sort` by `spent`: users only who spent anything in this currency.
    pub currency: Option<Currency>,
    /// If absent, names ascend, registrations and amounts spent descend.
    pub order: Option<Choice<Direction>>,
    pub limit: Option<Limit>,
    /// The `next` of the reply before.
    pub cursor: Option<String>,
}

impl QueryRequest for ListUsers {
    const NOUN: &'static str = "user";
    const VERB: &'static str = "list";
    type Reply = Page<User>;
}

fn list(body: &[u8]) -> Result<Plan, Malformed> {
    let ListUsers { country, name_prefix, sort, currency, order, limit, cursor } = domain::parse(body)?;
    let Choice(sort) = sort.unwrap_or_default();
    let mut filter = Document::new();
    let (keys, default_order) = match (sort, currency) {
        (Sort::Name, None) => (vec!["_name".to_owned(), "_id".to_owned()], Direction::Asc),
        (Sort::Registered, None) => (vec!["registered_at".to_owned(), "_id".to_owned()], Direction::Desc),
        (Sort::Spent, Some(currency)) => {
            let key = format!("_spent.{}", spent_key(currency, country.as_ref()));
            filter.insert(&key, doc! { "$gt": "" });
            (vec![key], Direction::Desc)
        }
        (Sort::Spent, None) => {
            return Err(Malformed::new("currency", Reason::Missing, "a currency, as the amounts of one are sorted"));
        }
        (Sort::Name | Sort::Registered, Some(_)) => {
            return Err(Malformed::new("currency", Reason::Unexpected, "it only with `sort` by `spent`"));
        }
    };
    if let Some(country) = country.as_deref().filter(|_| sort != Sort::Spent) {
        filter.insert("country", country);
    }
    if let Some(prefix) = name_prefix {
        if sort != Sort::Name {
            return Err(Malformed::new("name_prefix", Reason::Unexpected, "it only with `sort` by `name`"));
        }
        let prefix = normalized(&prefix);
        filter.insert("_name", doc! { "$gte": &prefix, "$lt": format!("{prefix}{}", char::MAX) });
    }
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let sorted = order.map_or(default_order, |Choice(order)| order).over(&keys);
    let hint = index(country.is_some(), sort);
    List::page("user.list", filter, sorted, hint, limit, cursor.as_deref()).map(Plan::List)
}

/// The index in the order of the sort, over all users or grouped by country.
fn index(by_country: bool, sort: Sort) -> Document {
    let sorted = match sort {
        Sort::Name => doc! { "_name": 1, "_id": 1 },
        Sort::Registered => doc! { "registered_at": 1, "_id": 1 },
        // A country would be part of the field's name.
        Sort::Spent => return doc! { "_spent.$**": 1 },
    };
    let country = if by_country {
        doc! { "country": 1 }
    } else {
        doc! {}
    };
    country.into_iter().chain(sorted).collect()
}

/// The field under `_spent` to sort by. Characters that are not allowed in the name of a field are escaped without
/// ambiguity, so that no two countries share a field.
fn spent_key(currency: Currency, country: Option<&Country>) -> String {
    let Some(country) = country else {
        return currency.to_string();
    };
    format!("{currency}|{}", country.replace('%', "%25").replace('.', "%2E").replace('$', "%24"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::given::{
        self, cancelled, id, line, order_deleted, page, paid, placed, priced, refusal, registered, shipped,
        user_deleted, user_updated,
    };

    const ID: &str = "00000000-0000-0000-0000-000000000009";

    fn fold(events: &[Recorded]) -> Option<User> {
        given::fold::<Users>(ID, events)
    }

    fn sum(amount: i64, currency: &str) -> Sum {
        Sum { amount: whole_number(amount).unwrap(), currency: currency.parse().unwrap() }
    }

    #[test]
    fn a_registered_user_has_no_orders() {
        let user = fold(&[registered(9, "Ada  LOVELACE", Some("United Kingdom"))]).unwrap();
        assert_eq!(
            serde_json::to_string(&user).unwrap(),
            r#"{"_id":"00000000-0000-0000-0000-000000000009","email":"user9@example.com","name":"Ada  LOVELACE","country":"United Kingdom","registered_at":"2011-01-01T00:00:00.000Z","orders":0,"spent":[],"version":1,"_email":"user9@example.com","_name":"ada lovelace","_spent":{}}"#
        );
    }

    #[test]
    fn an_update_changes_the_fields_of_its_event_and_the_index_fields() {
        let user = fold(&[
            registered(9, "Ada", Some("United Kingdom")),
            placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250)]),
            user_updated(9, 2, "Grace", None),
        ])
        .unwrap();
        assert_eq!(
            (&*user.name, user.country, user.version, user.orders),
            ("Grace", None, 2, whole_number(1).unwrap())
        );
        assert_eq!(user.normalized_name, "grace");
        assert_eq!(user.spent_sort_keys.keys().collect::<Vec<_>>(), ["GBP"]);
    }

    #[test]
    fn orders_are_counted_and_amounts_summed_by_currency() {
        let user = fold(&[
            registered(9, "Ada", Some("St. Lucia")),
            placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250), line(1, 1, 5)]),
            placed(8, 9, "2010-12-01T08:26:00Z", vec![priced(1, 1, 30, "EUR")]),
            placed(10, 9, "2010-12-01T08:26:00Z", vec![line(1, 1, 1)]),
            paid(7, 2),
            shipped(7, 3),
            order_deleted(7, 4),
        ])
        .unwrap();
        assert_eq!((user.orders, user.version), (whole_number(3).unwrap(), 1));
        assert_eq!(user.spent, [sum(30, "EUR"), sum(506, "GBP")]);
        let texts = user.spent_sort_keys.into_iter().collect::<Vec<_>>();
        let text = |key: &str, amount: &str| (key.to_owned(), format!("{amount}/{ID}"));
        assert_eq!(
            texts,
            [
                text("EUR", "0000000000000000000000000000000030"),
                text("EUR|St%2E Lucia", "0000000000000000000000000000000030"),
                text("GBP", "0000000000000000000000000000000506"),
                text("GBP|St%2E Lucia", "0000000000000000000000000000000506"),
            ]
        );
    }

    #[test]
    fn cancelling_restores_the_document_before_placing() {
        let order = placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250)]);
        let other = placed(8, 9, "2010-12-01T08:26:00Z", vec![line(1, 1, 1)]);
        let mut events = vec![registered(9, "Ada", Some("France"))];
        for placed in [order, other] {
            let before = fold(&events);
            let cancelled = cancelled(&placed, 2, false);
            assert_eq!(fold(&[events.clone(), vec![placed.clone(), cancelled]].concat()), before);
            events.push(placed);
        }
    }

    #[test]
    fn the_orders_of_a_deleted_user_leave_no_document() {
        let order = placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250)]);
        let events = [registered(9, "Ada", None), order.clone(), user_deleted(9, 2), cancelled(&order, 2, false)];
        assert_eq!(fold(&events), None);
    }

    #[test]
    fn events_that_do_not_fit_are_inapplicable() {
        let user = fold(&[registered(9, "Ada", None)]).unwrap();
        let order = placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250)]);
        assert!(Users::evolve(Some(user.clone()), ID, &cancelled(&order, 2, false)).is_err());
        let rich = User { spent: vec![Sum { amount: WholeNumber::MAX, ..sum(0, "GBP") }], ..user.clone() };
        assert!(Users::evolve(Some(rich), ID, &order).is_err());
        assert!(Users::evolve(Some(user), ID, &registered(9, "Ada", None)).is_err());
        for event in [user_updated(9, 2, "Ada", None), user_deleted(9, 2)] {
            assert!(Users::evolve(None, ID, &event).is_err(), "{event:?}");
        }
    }

    #[test]
    fn an_order_changes_its_user_only_when_it_is_placed_or_cancelled() {
        let order = placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250)]);
        assert_eq!(Users::document_ids(&order), [id(9).to_string()]);
        assert_eq!(Users::document_ids(&cancelled(&order, 2, true)), [id(9).to_string()]);
        for event in [paid(7, 2), shipped(7, 3), order_deleted(7, 4)] {
            assert!(crate::document_ids::<Users>(&event).is_empty());
        }
    }

    #[test]
    fn a_user_is_found_by_either_id_or_email() {
        let key = |field, value: &str, requested: &str| {
            Plan::Get(Key { field, value: value.to_owned(), requested: requested.to_owned() })
        };
        let by_id = get(format!(r#"{{"id":"{ID}"}}"#).as_bytes());
        assert_eq!(by_id, Ok(key("_id", ID, ID)));
        let by_email = get(br#"{"email":"ADA@Example.com","id":null}"#);
        assert_eq!(by_email, Ok(key("_email", "ada@example.com", "ADA@Example.com")));
        let user = fold(&[registered(9, "Ada", None)]).unwrap();
        assert_eq!(user.normalized_email, user.email.normalized());
        for (body, field) in [
            ("{}".to_owned(), "id"),
            (r#"{"id":null,"email":null}"#.to_owned(), "id"),
            (format!(r#"{{"id":"{ID}","email":"ada@example.com"}}"#), "email"),
            (r#"{"email":"ada"}"#.to_owned(), "email"),
        ] {
            assert_eq!(get(body.as_bytes()).unwrap_err().field, field);
        }
    }

    #[test]
    fn by_default_names_ascend_and_registrations_and_amounts_descend() {
        assert_eq!(page(list, "").sort, doc! { "_name": 1, "_id": 1 });
        assert_eq!(page(list, r#"{"sort":"registered"}"#).sort, doc! { "registered_at": -1, "_id": -1 });
        assert_eq!(page(list, r#"{"sort":"spent","currency":"GBP"}"#).sort, doc! { "_spent.GBP": -1 });
        assert_eq!(page(list, r#"{"order":"desc"}"#).sort, doc! { "_name": -1, "_id": -1 });
    }

    #[test]
    fn a_prefix_is_a_range_of_normalized_names() {
        let page = page(list, r#"{"name_prefix":" ADA  L","country":"France"}"#);
        assert_eq!(page.filter, doc! { "country": "France", "_name": { "$gte": "ada l", "$lt": "ada l\u{10FFFF}" } });
        assert_eq!(page.hint, doc! { "country": 1, "_name": 1, "_id": 1 });
    }

    #[test]
    fn a_country_that_is_stored_unnormalised_is_found() {
        let before: Country = serde_json::from_str("\"Co\u{302}te d’Ivoire\"").unwrap();
        let mut event = registered(9, "Ada", Some("France"));
        if let Event::User(user::Event::Registered(registered)) = &mut event.event {
            registered.country = Some(before);
        }
        let user = fold(&[event]).unwrap();
        let filter = page(list, "{\"country\":\"Co\u{302}te d’Ivoire\"}").filter;
        assert_eq!(filter.get_str("country").unwrap(), &*user.country.unwrap());
    }

    #[test]
    fn a_prefix_is_normalised_like_the_names() {
        for (prefix, name) in
            [("STRASS", "Straße"), ("\u{212b}", "åsa"), ("ﬁ", "Fiona"), ("ΣΑΣ", "σασα"), ("किता", "किताब")]
        {
            let filter = page(list, &format!(r#"{{"name_prefix":"{prefix}"}}"#)).filter;
            let range = filter.get_document("_name").unwrap();
            let user = fold(&[registered(9, name, None)]).unwrap();
            assert!(range.get_str("$gte").unwrap() <= &*user.normalized_name, "{prefix} {name}");
            assert!(range.get_str("$lt").unwrap() > &*user.normalized_name, "{prefix} {name}");
        }
    }

    #[test]
    fn the_sort_by_amount_has_the_country_in_the_name_of_the_field() {
        let page = page(list, r#"{"sort":"spent","currency":"GBP","country":"$t. Lucia 5%"}"#);
        assert_eq!(page.filter, doc! { "_spent.GBP|%24t%2E Lucia 5%25": { "$gt": "" } });
        assert_eq!(page.sort, doc! { "_spent.GBP|%24t%2E Lucia 5%25": -1 });
        assert_eq!(page.hint, doc! { "_spent.$**": 1 });
    }

    #[test]
    fn a_cursor_carries_the_field_of_the_sort() {
        let body = |cursor: &str| format!(r#"{{"sort":"spent","currency":"GBP","country":"St. Lucia"{cursor}}}"#);
        let order = placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 2, 250)]);
        let user = fold(&[registered(9, "Ada", Some("St. Lucia")), order]).unwrap();
        let last = bson::serialize_to_raw_document_buf(&user).unwrap();
        let next = page(list, &body("")).cursor.next(&last).unwrap();
        let second = page(list, &body(&format!(r#","cursor":"{next}""#)));
        assert!(
            second.filter.to_string().contains(&format!("0000000000000000000000000000000500/{ID}")),
            "{}",
            second.filter
        );
        let other = format!(r#"{{"sort":"spent","currency":"GBP","cursor":"{next}"}}"#);
        assert_eq!(refusal(list, &other), "cursor");
    }

    #[test]
    fn refusals_name_the_field() {
        for (body, field) in [
            (r#"{"country":""}"#, "country"),
            (r#"{"name_prefix":"  "}"#, "name_prefix"),
            (r#"{"name_prefix":"\u200b"}"#, "name_prefix"),
            (r#"{"name_prefix":"a\u0000"}"#, "name_prefix"),
            (r#"{"name_prefix":"a","sort":"registered"}"#, "name_prefix"),
            (r#"{"name_prefix":"a","sort":"spent","currency":"GBP"}"#, "name_prefix"),
            (r#"{"sort":"spent"}"#, "currency"),
            (r#"{"sort":"name","currency":"GBP"}"#, "currency"),
            (r#"{"sort":"email"}"#, "sort"),
            (r#"{"order":1}"#, "order"),
            (r#"{"limit":"5"}"#, "limit"),
            (r#"{"cursor":""}"#, "cursor"),
            (r#"{"name":"a"}"#, "name"),
        ] {
            assert_eq!(refusal(list, body), field, "{body}");
        }
    }
}
