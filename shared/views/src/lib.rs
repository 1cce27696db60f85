//! The read models: one file per view, with its document, how the document evolves, its indexes, and the queries over
//! it. Evolving is pure; nothing here talks to a server.
//!
//! A new view is one new file, which keeps the contract of [`View`], and one line in the list below;
//! `docs/extending.md` walks through it.

/// Declares the modules of all views, and what there is over all of them, from the one list of them.
macro_rules! views {
    ($($view:ident($module:ident))*) => {
        $(pub mod $module;)*

        /// Visits every view.
        pub fn visit(visitor: &mut impl Visitor) {
            $(visitor.visit::<$module::$view>();)*
        }

        /// The names of all views.
        pub fn names() -> Vec<&'static str> {
            vec![$(<$module::$view as View>::NAME),*]
        }

        /// All queries of all views, each with the name of its view.
        pub fn queries() -> Vec<(&'static str, &'static Query)> {
            let mut queries = Vec::new();
            $(queries.extend($module::$view::QUERIES.iter().map(|query| (<$module::$view as View>::NAME, query)));)*
            queries
        }
    };
}

// The name of the view's type, and the module that has it.
views! {
    Orders(orders)
    Users(users)
    Products(products)
    Sales(sales)
}

mod cursor;
#[cfg(test)]
mod extremes;
#[cfg(test)]
mod given;
pub mod layout;
mod query;
#[cfg(test)]
mod requests;
#[cfg(test)]
mod strictness;
mod tally;
mod whole;
mod words;

pub use cursor::Cursor;
pub use query::{Key, List, Plan, Query, Rendered, Report};
pub use tally::Sum;
pub use whole::Whole;

use std::time::Duration;

use bson::RawDocumentBuf;
use domain::Recorded;
use serde::{Serialize, de::DeserializeOwned};

/// The contract of a view: a read model that is built from the events alone.
pub trait View: Send + Sync + 'static {
    /// The name of its collection, before the `@`.
    const NAME: &'static str;

    /// The version of its documents. Raise it when documents come out differently than before: the view must then be
    /// built anew.
    const VERSION: i32;

    /// What is stored in MongoDB. Its `_id` is a string. Fields whose names start with `_` serve the indexes and are
    /// left out of replies; `_id` is shown as `id`.
    type Document: Serialize + DeserializeOwned + Clone + PartialEq + Send + Sync;

    /// The kinds of aggregates ([`domain::Aggregate::KIND`]) whose events it is built from. The functions below are
    /// called for these alone.
    const AGGREGATES: &'static [&'static str];

    /// How long changes are gathered before they are written, while they come all the time. That costs much less where
    /// many events change the same few documents. What comes after a pause is written at once in any case.
    const BATCH_WINDOW: Duration = Duration::ZERO;

    /// The identifiers of the documents that the event may change, each once. By default a document has the identifier
    /// of its aggregate.
    fn document_ids(event: &Recorded) -> Vec<String> {
        vec![event.id.to_string()]
    }

    /// Whether all documents of [`Self::document_ids`] are new with this event, so that they need not be looked for in
    /// MongoDB first. `false` is always right, and slower.
    fn creates_document(_event: &Recorded) -> bool {
        false
    }

    /// The document after the event; `None` where there is none, before its first event and after its last.
    ///
    /// # Errors
    /// If the event cannot be applied. The document stays as it was, and the view stops there.
    fn evolve(
        document: Option<Self::Document>,
        id: &str,
        event: &Recorded,
    ) -> Result<Option<Self::Document>, Inapplicable>;

    /// The keys of the indexes that serve the queries. The one over `_id` is always there.
    fn indexes() -> Vec<bson::Document> {
        vec![]
    }

    /// The queries that read this view.
    const QUERIES: &'static [Query];
}

/// The identifiers of the view's documents that an event of any aggregate may change, each once.
pub fn document_ids<V: View>(event: &Recorded) -> Vec<String> {
    if V::AGGREGATES.contains(&event.event.aggregate()) { V::document_ids(event) } else { vec![] }
}

/// Why an event cannot be applied to a document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Inapplicable(pub String);

/// Something to be done with every view, whatever its type.
pub trait Visitor {
    fn visit<V: View>(&mut self);
}

/// Reads the documents that a query was answered with.
///
/// # Errors
/// If one is not of this form.
fn read<T: DeserializeOwned>(documents: &[RawDocumentBuf]) -> Result<Vec<T>, Inapplicable> {
    let read = |document: &RawDocumentBuf| bson::deserialize_from_slice(document.as_bytes());
    documents.iter().map(read).collect::<Result<_, _>>().map_err(|error| Inapplicable(error.to_string()))
}

/// Writes the body of a reply.
///
/// # Errors
/// If it has no JSON form, as a map with keys that are no strings.
fn write<T: Serialize>(reply: &T) -> Result<Vec<u8>, Inapplicable> {
    serde_json::to_vec(reply).map_err(|error| Inapplicable(error.to_string()))
}

/// The document, for an event that needs it.
fn present<D>(document: Option<D>, id: &str) -> Result<D, Inapplicable> {
    document.ok_or_else(|| Inapplicable(format!("there is no document {id}")))
}

/// Checks that there is no document yet, for an event that creates it.
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
    struct Check {
        events: Vec<Recorded>,
        /// Of each view, how many documents are left in the end.
        left: BTreeMap<&'static str, usize>,
    }

    impl Visitor for Check {
        fn visit<V: View>(&mut self) {
            let mut documents = BTreeMap::new();
            let mut made = 0;
            for event in self.events.iter().filter(|event| V::AGGREGATES.contains(&event.event.aggregate())) {
                let ids = V::document_ids(event);
                let distinct: HashSet<&String> = ids.iter().collect();
                assert_eq!(distinct.len(), ids.len(), "each id once: {} {event:?}", V::NAME);
                if V::creates_document(event) {
                    assert!(ids.iter().all(|id| !documents.contains_key(id)), "{} {event:?}", V::NAME);
                    assert!(ids.iter().all(|id| V::evolve(None, id, event).is_ok_and(|made| made.is_some())));
                }
                for id in ids {
                    let after = V::evolve(documents.remove(&id), &id, event);
                    let document = after.unwrap_or_else(|error| panic!("{} cannot take {event:?}: {error}", V::NAME));
                    if let Some(document) = document {
                        let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
                        assert_eq!(stored.get_str("_id").unwrap(), id, "`_id` of the documents of {}", V::NAME);
                        assert!(bson::deserialize_from_slice::<V::Document>(stored.as_bytes()).unwrap() == document);
                        documents.insert(id, document);
                        made += 1;
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
            assert!(made > 0, "no event of the samples of {:?} makes a document of {}", V::AGGREGATES, V::NAME);
            self.left.insert(V::NAME, documents.len());
        }
    }

    /// Checks that a cursor can carry the sort keys of every list to the next page.
    struct CheckSortKeys(Vec<Recorded>);

    impl Visitor for CheckSortKeys {
        fn visit<V: View>(&mut self) {
            let documents = given::documents::<V>(&self.0);
            for query in V::QUERIES {
                let plans =
                    query.combinations().into_iter().map(|request| (query.plan)(request.to_string().as_bytes()));
                let lists = plans.filter_map(|plan| match plan {
                    Ok(Plan::List(list)) => Some(list),
                    Ok(Plan::Get(_) | Plan::Report(_)) | Err(_) => None,
                });
                for list in lists {
                    let (name, keys) = (query.name(), &list.sort);
                    let places: Vec<String> =
                        documents.iter().filter_map(|document| list.cursor.next(document).ok()).collect();
                    assert!(
                        !places.is_empty(),
                        "{name}: no document of the samples has a string or a whole number at each of {keys}"
                    );
                    let distinct: BTreeSet<&String> = places.iter().collect();
                    assert_eq!(distinct.len(), places.len(), "{name}: two documents have the same place by {keys}");
                }
            }
        }
    }

    #[test]
    fn lists_are_sorted_by_strings_and_whole_numbers() {
        visit(&mut CheckSortKeys(domain::sample_events()));
    }

    /// The views must take what older versions of the domain accepted, and read again what they store of it.
    #[test]
    fn views_apply_what_was_ever_accepted() {
        struct Frozen(Vec<Recorded>);

        impl Visitor for Frozen {
            fn visit<V: View>(&mut self) {
                let mut documents: BTreeMap<String, V::Document> = BTreeMap::new();
                let mut kinds = BTreeSet::new();
                for event in &self.0 {
                    kinds.insert(event.event.aggregate());
                    for id in document_ids::<V>(event) {
                        let before = documents.remove(&id);
                        // The file does not hold every event of every aggregate, so some cannot be applied.
                        let after = V::evolve(before.clone(), &id, event).unwrap_or(before);
                        let Some(document) = after else { continue };
                        let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
                        assert!(bson::deserialize_from_slice::<V::Document>(stored.as_bytes()).unwrap() == document);
                        documents.insert(id, document);
                    }
                }
                let is_frozen = V::AGGREGATES.iter().all(|kind| kinds.contains(kind));
                assert!(!is_frozen || documents.len() >= 5, "{} {}", V::NAME, documents.len());
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
        visit(&mut Check { events: domain::sample_events(), left: BTreeMap::new() });
    }

    #[test]
    fn what_is_deleted_leaves_no_document() {
        // All aggregates are deleted in the end; the sale of one order stays, as its day and its two products.
        let mut check = Check { events: given::everything(), left: BTreeMap::new() };
        check.visit::<orders::Orders>();
        check.visit::<users::Users>();
        check.visit::<products::Products>();
        check.visit::<sales::Sales>();
        assert_eq!(check.left, BTreeMap::from([("orders", 0), ("users", 0), ("products", 0), ("sales", 3)]));
    }

    /// Sales of the time when the currency was in use can be asked for.
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
        let names: BTreeSet<String> = queries.iter().map(|(_, query)| query.name()).collect();
        assert_eq!(names.len(), queries.len(), "{names:?}");
        for (view, query) in queries {
            let schema = (query.schema)();
            assert!(!query.description.is_empty());
            assert_eq!(schema.get("additionalProperties"), Some(&false.into()), "{view} {}", query.verb);
            if let Some(limit) = schema.pointer("/properties/limit") {
                assert_eq!(limit["default"], query::DEFAULT_LIMIT);
                assert_eq!(limit["maximum"], query::MAX_LIMIT);
            }
        }
    }

    #[test]
    fn every_field_of_every_query_stands_in_an_example() {
        for (view, query) in queries() {
            let place = format!("the examples of the query `{}` of the view {view}", query.name());
            let examples: Vec<serde_json::Value> =
                query.examples.iter().map(|example| serde_json::from_str(example).unwrap()).collect();
            for field in
                (query.schema)().to_value()["properties"].as_object().into_iter().flatten().map(|(name, _)| name)
            {
                // These fields are the same for all lists.
                let is_common = ["limit", "cursor"].contains(&&**field);
                let is_shown = examples.iter().any(|example| example.get(field).is_some());
                assert!(is_common || is_shown, "{place}: add one with the field `{field}`");
            }
            for example in query.examples {
                let plan = (query.plan)(example.as_bytes());
                assert!(plan.is_ok(), "{place}: {example} is refused: {}", plan.unwrap_err());
            }
            assert!(!examples.is_empty(), "{place}: add one");
        }
    }
}
