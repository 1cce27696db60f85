//! Queries over views. A request is parsed strictly and becomes a plan, which the query service executes. Clients send
//! the same struct that the service parses.

use bson::{Document, RawDocumentBuf};
use domain::{Id, Malformed, Reason, strict};
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use crate::{Cursor, Inapplicable};

/// The default number of documents on a page.
pub const DEFAULT_LIMIT: i64 = 20;
/// The largest number of documents on a page.
pub const MAX_LIMIT: i64 = 100;

/// A query as the query service serves it.
#[derive(Clone, Copy)]
pub struct Query {
    pub noun: &'static str,
    pub verb: &'static str,
    pub description: &'static str,
    /// The JSON Schema of the request.
    pub schema: fn() -> Schema,
    /// Parses a request.
    pub plan: fn(&[u8]) -> Result<Plan, Malformed>,
    /// Reads the body of a reply as clients do, for tests.
    pub check_reply: fn(&[u8]) -> serde_json::Result<()>,
    /// Examples of requests, in JSON. Together they must show every field except `limit` and `cursor`. The tests send
    /// every combination of the values in them, and check that an index serves it.
    pub examples: &'static [&'static str],
}

/// The struct of a query, as clients send it.
pub trait QueryRequest: Serialize + JsonSchema {
    /// The middle word of the subject.
    const NOUN: &'static str;
    /// The last word of the subject.
    const VERB: &'static str;
    /// The body of the reply.
    type Reply: DeserializeOwned;
}

/// A page of a list, as clients read it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// The `cursor` of the next page; absent from the last page.
    pub next: Option<String>,
}

/// What the query service has to read.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "one per request, and most are lists")]
pub enum Plan {
    /// The document with this key, which is the whole reply. If there is none, the reply is `not_found`.
    Get(Key),
    /// A page of documents: `{"items":[…],"next":"…"}`. `next` is absent from the last page.
    List(List),
    /// A reply computed from several documents.
    Report(Report),
}

/// The value of a field that at most one document has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The field of the document. It is indexed and contains a text. The field of the request has the same name without
    /// the leading `_`.
    pub field: &'static str,
    /// The value in the form that documents have.
    pub value: String,
    /// The value as the client sent it.
    pub requested: String,
}

/// A page of documents in the order of an index (keyset pagination, without `skip`). In all documents that the filter
/// finds, the sort keys must be strings or whole numbers of at most 64 bits, since a cursor can carry no other types.
#[derive(Clone, Debug, PartialEq)]
pub struct List {
    /// The filter, including the condition of the cursor.
    pub filter: Document,
    /// The sort. Its last key must be unique, such as `_id`, so that the order of the documents is total.
    pub sort: Document,
    /// The keys of the index in whose order the page is read. Without this hint the planner may prefer to sort the
    /// results of a selective filter in memory, which is fast on the data that it tried but unbounded on other data.
    pub hint: Document,
    /// The largest number of documents on this page.
    pub limit: i64,
    /// Makes the `next` of the reply from the last document of the page.
    pub cursor: Cursor,
}

/// A reply that is computed by an aggregation over a bounded number of documents.
#[derive(Clone, Debug)]
pub struct Report {
    pub pipeline: Vec<Document>,
    /// Makes the body of the reply from the results of the pipeline.
    pub render: fn(&[RawDocumentBuf]) -> Rendered,
}

/// The body of a reply, in JSON. For `None` the reply is `not_found`.
pub type Rendered = Result<Option<Vec<u8>>, Inapplicable>;

impl PartialEq for Report {
    fn eq(&self, other: &Self) -> bool {
        self.pipeline == other.pipeline
    }
}

impl Query {
    /// The query with this request.
    pub(crate) const fn of<R: QueryRequest>(
        description: &'static str,
        plan: fn(&[u8]) -> Result<Plan, Malformed>,
        examples: &'static [&'static str],
    ) -> Self {
        Self {
            noun: R::NOUN,
            verb: R::VERB,
            description,
            schema: || schemars::schema_for!(R),
            plan,
            check_reply: |body| serde_json::from_slice::<R::Reply>(body).map(drop),
            examples,
        }
    }

    /// The query for one document by its identifier. The request has an `id: Id` and nothing else.
    pub(crate) const fn get<R: QueryRequest>(description: &'static str) -> Self {
        Self::of::<R>(description, get, &[r#"{"id":"00000000-0000-0000-0000-000000000001"}"#])
    }

    /// The name `<noun>.<verb>`, which is the query's subject without its prefix.
    pub fn name(&self) -> String {
        format!("{}.{}", self.noun, self.verb)
    }

    /// Requests for tests: every combination of the values that each field has in the examples, or in the schema where
    /// that lists them. Optional fields are also left out. Some of the requests are refused.
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

fn get(body: &[u8]) -> Result<Plan, Malformed> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Get {
        id: Id,
    }

    let Get { id } = domain::parse(body)?;
    Ok(Plan::Get(Key::id(id)))
}

impl Key {
    fn id(id: Id) -> Self {
        Self { field: "_id", value: id.to_string(), requested: id.to_string() }
    }

    /// The name of the field in the request.
    pub fn name(&self) -> &'static str {
        self.field.trim_start_matches('_')
    }
}

/// The query for one document by its identifier or by another key, whose field in the request is `name`.
///
/// # Errors
/// If the request has neither or both.
pub(crate) fn get_by(id: Option<Id>, name: &str, other: Option<Key>) -> Result<Plan, Malformed> {
    match (id, other) {
        (Some(id), None) => Ok(Plan::Get(Key::id(id))),
        (None, Some(key)) => Ok(Plan::Get(key)),
        (None, None) => Err(Malformed::new("id", Reason::Missing, format!("`id` or `{name}`"))),
        (Some(_), Some(_)) => Err(Malformed::new(name, Reason::Unexpected, format!("`id` or `{name}`, not both"))),
    }
}

/// The part of the query's JSON Schema that requires exactly one of the two.
pub(crate) fn one_of(name: &str) -> Value {
    let only = |name: &str| json!({ "required": [name], "properties": { name: { "type": "string" } } });
    json!([only("id"), only(name)])
}

impl List {
    /// The page after the cursor, or the first page if there is no cursor. `query` is the name of the query.
    ///
    /// # Errors
    /// If the cursor is not from this query.
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

/// The largest number of documents on a page.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(inline, extend("default" = DEFAULT_LIMIT))]
pub struct Limit(#[schemars(range(min = 1, max = MAX_LIMIT))] pub i64);

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

/// The direction of a sort.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Direction {
    Asc,
    Desc,
}

impl Direction {
    /// The sort by these keys. All have the same direction, so that one index serves both directions.
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
    fn get_takes_exactly_one_identifier() {
        let query = Query::get::<crate::orders::GetOrder>("");
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
    fn the_limit_of_a_page_is_bounded() {
        assert_eq!(serde_json::from_str::<Limit>("100").unwrap(), Limit(100));
        for bad in ["0", "-1", "101", "1.5", "\"1\"", "99999999999999999999"] {
            assert!(serde_json::from_str::<Limit>(bad).is_err(), "{bad}");
        }
    }
}
