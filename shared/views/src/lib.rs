//! The read models: one file per view, with its document, how the document evolves, its indexes, and the queries over
//! it. Evolving is pure; nothing here talks to a server.
//!
//! A new view is one new file and one line in [`visit`].

mod cursor;
#[cfg(test)]
mod extremes;
#[cfg(test)]
mod given;
pub mod layout;
pub mod orders;
pub mod products;
mod query;
#[cfg(test)]
mod requests;
pub mod sales;
#[cfg(test)]
mod strictness;
mod tally;
pub mod users;
mod whole;
mod words;

pub use cursor::Cursor;
pub use query::{Key, List, Plan, Query, Report};
pub use tally::Sum;
pub use whole::Whole;

use std::time::Duration;

use domain::Recorded;
use serde::{Serialize, de::DeserializeOwned};

/// A read model, built from the events alone.
pub trait View: Send + Sync + 'static {
    /// The collection's name before the `@`.
    const NAME: &'static str;
    /// To be raised when documents come out differently: the view is then built anew.
    const VERSION: i32;
    /// Its `_id` is a string. Fields that start with `_` serve the indexes and are left out of replies.
    type Document: Serialize + DeserializeOwned + Clone + PartialEq + Send + Sync;

    /// For how long changes are gathered, while they come all the time, before they are written: where many events change
    /// the same few documents, that costs much less. What comes after a pause is written at once.
    const BATCH_WINDOW: Duration;

    /// The aggregates whose events concern its documents. Those of others are passed over undecoded.
    const AGGREGATES: &'static [&'static str];

    /// Whether none of the documents that the event concerns can have been there before it: they need not be looked for.
    fn creates_document(event: &Recorded) -> bool;

    /// The identifiers of the documents that the event concerns, each once.
    fn document_ids(event: &Recorded) -> Vec<String>;

    /// The document after the event; `None` where there is none (yet, or any more).
    ///
    /// # Errors
    /// If the event cannot be applied; the document stays as it was.
    fn evolve(
        document: Option<Self::Document>,
        id: &str,
        event: &Recorded,
    ) -> Result<Option<Self::Document>, Inapplicable>;

    /// The indexes that serve the queries, by their keys.
    fn indexes() -> Vec<bson::Document>;

    /// The queries that read this view.
    const QUERIES: &'static [Query];
}

/// Why an event cannot be applied to a document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Inapplicable(pub String);

/// What is to be done with every view.
pub trait Visitor {
    fn visit<V: View>(&mut self);
}

/// The list of views.
pub fn visit(visitor: &mut impl Visitor) {
    visitor.visit::<orders::Orders>();
    visitor.visit::<users::Users>();
    visitor.visit::<products::Products>();
    visitor.visit::<sales::Sales>();
}

/// The names of all views.
pub fn names() -> Vec<&'static str> {
    struct Names(Vec<&'static str>);

    impl Visitor for Names {
        fn visit<V: View>(&mut self) {
            self.0.push(V::NAME);
        }
    }

    let mut names = Names(Vec::new());
    visit(&mut names);
    names.0
}

/// All queries of all views, each with the name of its view.
pub fn queries() -> Vec<(&'static str, &'static Query)> {
    struct Queries(Vec<(&'static str, &'static Query)>);

    impl Visitor for Queries {
        fn visit<V: View>(&mut self) {
            self.0.extend(V::QUERIES.iter().map(|query| (V::NAME, query)));
        }
    }

    let mut queries = Queries(Vec::new());
    visit(&mut queries);
    queries.0
}

/// The document, which the event needs to be there.
fn present<D>(document: Option<D>, id: &str) -> Result<D, Inapplicable> {
    document.ok_or_else(|| Inapplicable(format!("there is no document {id}")))
}

/// Checks that there is no document yet, as the event makes it.
fn absent<D>(document: Option<&D>, id: &str) -> Result<(), Inapplicable> {
    match document {
        Some(_) => Err(Inapplicable(format!("there is a document {id} already"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet, HashSet};

    use domain::{Event, Timestamp};

    use super::*;

    /// What every view must do with any event.
    struct Check;

    impl Visitor for Check {
        fn visit<V: View>(&mut self) {
            let events = given::everything();
            let mut documents = BTreeMap::new();
            for event in &events {
                let concerned = V::document_ids(event);
                let distinct: HashSet<&String> = concerned.iter().collect();
                assert_eq!(distinct.len(), concerned.len(), "each id once: {} {event:?}", V::NAME);
                let aggregate = event.event.aggregate();
                assert!(concerned.is_empty() || V::AGGREGATES.contains(&aggregate), "{} {aggregate}", V::NAME);
                if V::creates_document(event) {
                    assert!(concerned.iter().all(|id| !documents.contains_key(id)), "{} {event:?}", V::NAME);
                    assert!(concerned.iter().all(|id| V::evolve(None, id, event).is_ok_and(|made| made.is_some())));
                }
                for id in concerned {
                    let document = V::evolve(documents.remove(&id), &id, event).unwrap();
                    if let Some(document) = document {
                        let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
                        assert_eq!(stored.get_str("_id").unwrap(), id);
                        assert!(bson::deserialize_from_slice::<V::Document>(stored.as_bytes()).unwrap() == document);
                        documents.insert(id, document);
                    }
                }
                // Out of place, an event may be refused, but must not panic.
                for id in ["", "/", "2010-12-01", "2010-12-01/GBP/1"] {
                    let _ = V::evolve(None, id, event);
                    for document in documents.values() {
                        let _ = V::evolve(Some(document.clone()), id, event);
                    }
                }
            }
            let kept: Vec<&str> = documents.keys().map(String::as_str).collect();
            // All aggregates were deleted in the end; the sale of one order stays, as its day and its two products.
            assert_eq!(kept.len(), if V::NAME == sales::Sales::NAME { 3 } else { 0 }, "{kept:?}");
        }
    }

    /// The views must take what older versions of the domain accepted, and read again what they store of it.
    #[test]
    fn views_apply_what_was_ever_accepted() {
        struct Frozen(Vec<Recorded>);

        impl Visitor for Frozen {
            fn visit<V: View>(&mut self) {
                let mut documents: BTreeMap<String, V::Document> = BTreeMap::new();
                for event in &self.0 {
                    for id in V::document_ids(event) {
                        let before = documents.remove(&id);
                        // The file does not hold all events of all aggregates.
                        if before.is_none() && !V::creates_document(event) && V::NAME != sales::Sales::NAME {
                            continue;
                        }
                        if let Ok(Some(document)) = V::evolve(before, &id, event) {
                            let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
                            assert!(
                                bson::deserialize_from_slice::<V::Document>(stored.as_bytes()).unwrap() == document
                            );
                            documents.insert(id, document);
                        }
                    }
                }
                assert!(documents.len() >= 5, "{} {}", V::NAME, documents.len());
            }
        }

        let mut versions: BTreeMap<String, u64> = BTreeMap::new();
        let recorded = |line: &str| {
            let (id, kind, name, schema, payload): (String, String, String, i16, serde_json::Value) =
                serde_json::from_str(line).unwrap();
            let event = Event::decode(&kind, &name, schema, payload.to_string().as_bytes()).unwrap();
            let version = versions.entry(id.clone()).or_default();
            *version += 1;
            Recorded { position: 1, at: Timestamp::default(), id: id.parse().unwrap(), version: *version, event }
        };
        let events = include_str!("../../domain/src/frozen/events.jsonl").lines().map(recorded).collect();
        visit(&mut Frozen(events));
    }

    #[test]
    fn views_apply_every_event_and_their_documents_survive_bson() {
        visit(&mut Check);
    }

    /// There are sales of the time when it was in use.
    #[test]
    fn queries_take_a_currency_that_is_withdrawn() {
        let bodies = [
            ("user.list", r#"{"sort":"spent","currency":"HRK"}"#),
            ("product.search", r#"{"currency":"HRK","price_min":1}"#),
            ("order.list", r#"{"sort":"total","currency":"HRK"}"#),
            ("sales.top", r#"{"from":"2010-12-01","to":"2010-12-01","by":"revenue","currency":"HRK"}"#),
        ];
        for (name, body) in bodies {
            let queries = queries();
            let (_, query) = queries.iter().find(|(_, it)| format!("{}.{}", it.noun, it.verb) == name).unwrap();
            assert!((query.plan)(body.as_bytes()).is_ok(), "{name}");
            assert!((query.plan)(body.replace("HRK", "XXX").as_bytes()).is_err(), "{name}");
        }
    }

    #[test]
    fn queries_have_names_of_their_own_and_strict_schemas() {
        let queries = queries();
        let names: BTreeSet<String> =
            queries.iter().map(|(_, query)| format!("{}.{}", query.noun, query.verb)).collect();
        assert_eq!(
            names.into_iter().collect::<Vec<_>>(),
            [
                "order.get",
                "order.list",
                "product.get",
                "product.search",
                "sales.daily",
                "sales.top",
                "user.get",
                "user.list"
            ]
        );
        for (view, query) in queries {
            let schema = (query.schema)();
            assert_eq!(schema.get("additionalProperties"), Some(&false.into()), "{view} {}", query.verb);
            if let Some(limit) = schema.pointer("/properties/limit") {
                assert_eq!(limit["default"], query::DEFAULT_LIMIT);
                assert_eq!(limit["maximum"], query::MAX_LIMIT);
            }
        }
    }
}
