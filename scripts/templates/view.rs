//! The view `__name__`. TODO: what it shows, and what always holds of its documents.

use bson::{Document, doc};
use domain::{__of__, Id, Malformed, Recorded, Timestamp, strict::Choice};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Inapplicable, Page, Query, QueryRequest, View,
    query::{Direction, Limit, List, Plan},
};

pub struct __Type__;

/// TODO: what clients are to see of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    #[serde(rename = "_id", alias = "id")]
    pub id: String,
    pub version: u64,
    pub updated_at: Timestamp,
}

impl View for __Type__ {
    const NAME: &'static str = "__name__";
    const VERSION: i32 = 1;
    type Document = Shown;
    const AGGREGATES: &'static [&'static str] = &[__of__::KIND];

    /// TODO: what each event makes of the document.
    fn evolve(_document: Option<Shown>, id: &str, event: &Recorded) -> Result<Option<Shown>, Inapplicable> {
        if event.event.name() == "deleted" {
            return Ok(None);
        }
        Ok(Some(Shown { id: id.to_owned(), version: event.version, updated_at: event.at }))
    }

    fn indexes() -> Vec<Document> {
        vec![by_time()]
    }

    const QUERIES: &'static [Query] = &[
        Query::get::<GetOne>("One of the __name__ by its id"),
        Query::of::<ListAll>("The __name__ by the time of their last change, in pages", list, &[r#"{"order":"asc"}"#]),
    ];
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GetOne {
    pub id: Id,
}

impl QueryRequest for GetOne {
    const NOUN: &'static str = "__name__";
    const VERB: &'static str = "get";
    type Reply = Shown;
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListAll {
    /// Descending if absent: the latest first.
    pub order: Option<Choice<Direction>>,
    pub limit: Option<Limit>,
    /// The `next` of the reply before.
    pub cursor: Option<String>,
}

impl QueryRequest for ListAll {
    const NOUN: &'static str = "__name__";
    const VERB: &'static str = "list";
    type Reply = Page<Shown>;
}

fn list(body: &[u8]) -> Result<Plan, Malformed> {
    let ListAll { order, limit, cursor } = domain::parse(body)?;
    let sorted = order.map_or(Direction::Desc, |Choice(order)| order).over(&["updated_at", "_id"]);
    List::page("__name__.list", Document::new(), sorted, by_time(), limit, cursor.as_deref()).map(Plan::List)
}

fn by_time() -> Document {
    doc! { "updated_at": 1, "_id": 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::given;

    #[test]
    fn it_follows_the_samples() {
        let documents = given::documents::<__Type__>(&domain::sample_events());
        assert!(!documents.is_empty());
    }
}
