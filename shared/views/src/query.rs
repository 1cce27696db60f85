//! A query's request is parsed strictly and becomes a plan, which the query service carries out.

use bson::{Document, RawDocumentBuf};
use domain::{Id, Malformed, Reason, strict};
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use crate::{Cursor, Inapplicable};

/// The number of documents on a page if the request does not say.
pub const DEFAULT_LIMIT: i64 = 20;
/// The most documents on a page.
pub const MAX_LIMIT: i64 = 100;

/// One kind of query: what the query service needs to serve it.
#[derive(Clone, Copy)]
pub struct Query {
    pub noun: &'static str,
    pub verb: &'static str,
    pub description: &'static str,
    /// The JSON Schema of the request.
    pub schema: fn() -> Schema,
    /// Reads a request and returns what it asks for.
    pub plan: fn(&[u8]) -> Result<Plan, Malformed>,
    /// Requests, in JSON. Every field stands in one of them, but `limit` and `cursor`; tests ask for every combination
    /// of the values that they show, and see to it that an index serves it.
    pub examples: &'static [&'static str],
}

/// What to read.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "one per request, and most are lists")]
pub enum Plan {
    /// The document with this key, as the whole reply; `not_found` with its `noun` if there is none.
    Get(Key),
    /// A page: `{"items":[…],"next":"…"}`, `next` only where more follow.
    List(List),
    /// A few documents made into one reply.
    Report(Report),
}

/// A key that at most one document has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The document's field: indexed, and a text. The request's field has the same name without a leading `_`.
    pub field: &'static str,
    /// The value as documents have it.
    pub value: String,
    /// The value as the request has it.
    pub asked: String,
}

/// A page of documents in the order of an index. No documents are skipped to get to it. Each sort key of each document
/// that the filter finds is a string or a whole number of at most 64 bits, for nothing else can be carried by the
/// cursor to the next page.
#[derive(Clone, Debug, PartialEq)]
pub struct List {
    /// The request's conditions and the cursor's.
    pub filter: Document,
    /// The last key is unique, as `_id` is, so that no two documents have the same place.
    pub sort: Document,
    /// The index in whose order the page is read, by its keys. Left to itself, the planner prefers to sort in memory
    /// what a selective filter leaves: fast on the data that it tried, without bound on the next.
    pub hint: Document,
    /// Documents on this page at most.
    pub limit: i64,
    /// Makes the `next` of the reply from the page's last document.
    pub cursor: Cursor,
}

/// An aggregation over a bounded number of documents, made into one reply.
#[derive(Clone, Debug)]
pub struct Report {
    pub pipeline: Vec<Document>,
    /// Makes the body of the reply from what the pipeline returned.
    pub render: fn(&[RawDocumentBuf]) -> Rendered,
}

/// The body of a reply, in JSON; `None` is answered with `not_found`.
pub type Rendered = Result<Option<Vec<u8>>, Inapplicable>;

impl PartialEq for Report {
    fn eq(&self, other: &Self) -> bool {
        self.pipeline == other.pipeline
    }
}

impl Query {
    /// The query for one document by its identifier.
    pub(crate) const fn get(noun: &'static str, description: &'static str) -> Self {
        Self {
            noun,
            verb: "get",
            description,
            schema: || schemars::schema_for!(Get),
            plan: get,
            examples: &[r#"{"id":"00000000-0000-0000-0000-000000000001"}"#],
        }
    }

    /// `<noun>.<verb>`: its subject without the prefix.
    pub fn name(&self) -> String {
        format!("{}.{}", self.noun, self.verb)
    }

    /// For tests: every combination of the values that the examples show of each field, and the schema where it lists
    /// them, with the optional fields also left out. Some of them are refused.
    ///
    /// # Panics
    /// If an example is not a JSON object.
    pub fn combinations(&self) -> Vec<Value> {
        let schema = (self.schema)().to_value();
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        let examples: Vec<Map<String, Value>> =
            self.examples.iter().map(|example| serde_json::from_str(example).expect(example)).collect();
        let mut requests = vec![Map::new()];
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let mut values: Vec<&Value> = match property["enum"].as_array() {
                Some(choices) => choices.iter().filter(|choice| !choice.is_null()).collect(),
                None => examples.iter().filter_map(|example| example.get(name)).collect(),
            };
            let both = [false.into(), true.into()];
            if values.iter().any(|value| value.is_boolean()) {
                values = both.iter().collect();
            }
            let mut combined = if required.contains(&json!(name)) { vec![] } else { requests.clone() };
            for (n, value) in values.iter().enumerate() {
                if !values[..n].contains(value) {
                    let with = |request: &Map<String, Value>| {
                        let mut request = request.clone();
                        request.insert(name.clone(), (*value).clone());
                        request
                    };
                    combined.extend(requests.iter().map(with));
                }
            }
            requests = combined;
        }
        requests.into_iter().map(Value::Object).collect()
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Get {
    id: Id,
}

fn get(body: &[u8]) -> Result<Plan, Malformed> {
    let Get { id } = domain::parse(body)?;
    Ok(Plan::Get(Key::id(id)))
}

impl Key {
    fn id(id: Id) -> Self {
        Self { field: "_id", value: id.to_string(), asked: id.to_string() }
    }

    /// The name of the request's field.
    pub fn name(&self) -> &'static str {
        self.field.trim_start_matches('_')
    }
}

/// The document with the identifier or the other key, named `name` in the request, whichever of the two was sent.
///
/// # Errors
/// If neither was sent, or both.
pub(crate) fn get_by(id: Option<Id>, name: &str, other: Option<Key>) -> Result<Plan, Malformed> {
    match (id, other) {
        (Some(id), None) => Ok(Plan::Get(Key::id(id))),
        (None, Some(key)) => Ok(Plan::Get(key)),
        (None, None) => Err(Malformed::new("id", Reason::Missing, format!("`id` or `{name}`"))),
        (Some(_), Some(_)) => Err(Malformed::new(name, Reason::Unexpected, format!("`id` or `{name}`, not both"))),
    }
}

/// Says in the JSON Schema of such a query that exactly one of the two fields must be there.
pub(crate) fn one_of(name: &str) -> Value {
    let only = |name: &str| json!({ "required": [name], "properties": { name: { "type": "string" } } });
    json!([only("id"), only(name)])
}

impl List {
    /// The page after the one that the cursor was made of, or the first page without a cursor. `query` is
    /// `<noun>.<verb>`.
    ///
    /// # Errors
    /// If the cursor does not come from this query.
    pub(crate) fn page(
        query: &str,
        filter: Document,
        sort: Document,
        hint: Document,
        limit: Option<Limit>,
        after: Option<&str>,
    ) -> Result<Self, Malformed> {
        let cursor = Cursor::new(query, &filter, &sort);
        let filter = match after {
            Some(text) => bson::doc! { "$and": [filter, cursor.after(text)?] },
            None => filter,
        };
        Ok(Self { filter, sort, hint, limit: limit.unwrap_or_default().0, cursor })
    }
}

/// How many documents a page may have.
#[derive(Clone, Copy, Debug, PartialEq, JsonSchema)]
#[schemars(inline, extend("default" = DEFAULT_LIMIT))]
pub(crate) struct Limit(#[schemars(range(min = 1, max = MAX_LIMIT))] pub i64);

impl Default for Limit {
    fn default() -> Self {
        Self(DEFAULT_LIMIT)
    }
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = format_args!("a whole number from 1 to {MAX_LIMIT}");
        strict::whole_number(deserializer, expected, |limit| (1..=MAX_LIMIT).contains(&limit)).map(Self)
    }
}

/// The order of a page: ascending or descending.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(crate) enum Direction {
    Asc,
    Desc,
}

impl Direction {
    /// The sort by these keys, all in this direction, so that one index serves both directions.
    pub(crate) fn over(self, keys: &[&str]) -> Document {
        let direction = match self {
            Self::Asc => 1,
            Self::Desc => -1,
        };
        keys.iter().map(|key| ((*key).to_owned(), direction.into())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn get_asks_for_one_identifier() {
        let query = Query::get("order", "");
        let id = "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001";
        let body = format!(r#"{{"id":"{}"}}"#, id.to_uppercase());
        assert_eq!((query.plan)(body.as_bytes()), Ok(Plan::Get(Key::id(id.parse().unwrap()))));
        assert_eq!((query.plan)(br#"{"id":"1"}"#).unwrap_err().field, "id");
        assert_eq!((query.plan)(br#"{"id":"1","x":1}"#).unwrap_err().field, "id");
        for bad in ["", "[]", "{}", "null", r#"{"ids":[]}"#] {
            assert!((query.plan)(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_page_is_bounded() {
        assert_eq!(serde_json::from_str::<Limit>("100").unwrap(), Limit(100));
        for bad in ["0", "-1", "101", "1.5", "\"1\"", "99999999999999999999"] {
            assert!(serde_json::from_str::<Limit>(bad).is_err(), "{bad}");
        }
    }
}
