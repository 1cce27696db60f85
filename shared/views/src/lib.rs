//! The read models. Each view has one file with its document, how events change the document, its indexes and its
//! queries. All of it is pure; nothing here talks to a server.
//!
//! A new view is one new file, which keeps the contract of [`View`], and one line in the list below;
//! `docs/extending.md` walks through it.

/// Declares the modules of all views, and the functions over all views, from the one list below.
macro_rules! views {
    ($($view:ident($module:ident))*) => {
        $(pub mod $module;)*

        /// Calls the visitor with every view.
        pub fn visit(visitor: &mut impl Visitor) {
            $(visitor.visit::<$module::$view>();)*
        }

        /// The names of all views.
        pub fn names() -> Vec<&'static str> {
            vec![$(<$module::$view as View>::NAME),*]
        }

        /// The names of all views, each with the version of its documents.
        pub fn versions() -> Vec<(&'static str, i32)> {
            vec![$((<$module::$view as View>::NAME, <$module::$view as View>::VERSION)),*]
        }

        /// All queries of all views, each with the name of its view.
        pub fn queries() -> Vec<(&'static str, &'static Query)> {
            let mut queries = Vec::new();
            $(queries.extend($module::$view::QUERIES.iter().map(|query| (<$module::$view as View>::NAME, query)));)*
            queries
        }
    };
}

// Each line names the type of a view and the module that defines it.
views! {
    Orders(orders)
    Users(users)
    Products(products)
    Sales(sales)
}

#[cfg(test)]
mod boundary_values;
mod cursor;
mod digest;
#[cfg(test)]
mod given;
pub mod layout;
mod query;
#[cfg(test)]
mod request_generators;
#[cfg(test)]
mod request_validation;
mod totals;
mod whole_number;
mod words;

pub use cursor::Cursor;
pub use digest::{Digest, InvalidDigest};
pub use query::{Direction, Key, Limit, List, Page, Plan, Query, QueryRequest, Rendered, Report};
pub use totals::Sum;
pub use whole_number::WholeNumber;

use std::time::Duration;

use bson::RawDocumentBuf;
use domain::Recorded;
use serde::{Serialize, de::DeserializeOwned};

/// The contract of a view: a read model that is built from the events alone.
pub trait View: Send + Sync + 'static {
    /// The name of the view, which is also the part of its collection's name before the `@`.
    const NAME: &'static str;

    /// The version of the documents. Raise it whenever the same events lead to different documents than before, or the
    /// indexes change. The projection service then builds the documents of the new version beside those of the old.
    const VERSION: i32;

    /// The document that is stored in MongoDB. Its `_id` is a string, which replies show as `id`. Other fields whose
    /// names start with `_` serve the indexes and are left out of replies. Where clients read it as this type, too
    /// ([`QueryRequest::Reply`]), it accepts `id` for `_id` (`alias = "id"`), and has defaults for those fields.
    type Document: Serialize + DeserializeOwned + Clone + PartialEq + Send + Sync;

    /// The kinds of aggregates ([`domain::Aggregate::KIND`]) that the view is built from. The functions below are
    /// called only for their events.
    const AGGREGATES: &'static [&'static str];

    /// How long changes are gathered before they are written, while events keep coming. This is much cheaper for a view
    /// in which many events change the same few documents. An event after a pause is written at once in any case.
    const BATCH_WINDOW: Duration = Duration::ZERO;

    /// The identifiers of the documents that the event may change, without repetitions. The default is the identifier
    /// of the event's aggregate.
    fn document_ids(event: &Recorded) -> Vec<String> {
        vec![event.id.to_string()]
    }

    /// Whether the event creates all documents of [`Self::document_ids`], so that they need not be read from MongoDB
    /// first. `false` is always correct, but slower.
    fn creates_document(_event: &Recorded) -> bool {
        false
    }

    /// The document after the event. `None` stands for no document, both before the event and after it. The result
    /// depends on nothing else, or digests would differ.
    ///
    /// # Errors
    /// If the event cannot be applied. The document is not changed then, and the view stops at this event.
    fn evolve(
        document: Option<Self::Document>,
        id: &str,
        event: &Recorded,
    ) -> Result<Option<Self::Document>, Inapplicable>;

    /// The keys of the indexes that serve the queries. There is always an index on `_id`.
    fn indexes() -> Vec<bson::Document> {
        vec![]
    }

    /// The queries that read this view.
    const QUERIES: &'static [Query];
}

/// The identifiers of the view's documents that the event may change, without repetitions. Unlike
/// [`View::document_ids`], this may be called with events of any aggregate.
pub fn document_ids<V: View>(event: &Recorded) -> Vec<String> {
    if V::AGGREGATES.contains(&event.event.aggregate()) { V::document_ids(event) } else { vec![] }
}

/// The error for an event that cannot be applied to a document. It gives the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Inapplicable(pub String);

/// Something to do with every view.
pub trait Visitor {
    fn visit<V: View>(&mut self);
}

/// Deserializes the documents that MongoDB returned for a query.
///
/// # Errors
/// If a document does not have this form.
fn read<T: DeserializeOwned>(documents: &[RawDocumentBuf]) -> Result<Vec<T>, Inapplicable> {
    let read = |document: &RawDocumentBuf| bson::deserialize_from_slice(document.as_bytes());
    documents
        .iter()
        .map(read)
        .collect::<Result<_, _>>()
        // The error itself may quote the document.
        .map_err(|_| Inapplicable("a stored document does not have the form of the view".to_owned()))
}

/// Serializes the body of a reply.
///
/// # Errors
/// If the value has no JSON form.
fn write<T: Serialize>(reply: &T) -> Result<Vec<u8>, Inapplicable> {
    serde_json::to_vec(reply).map_err(|error| Inapplicable(error.to_string()))
}

/// The document, which the event requires to exist.
fn present<D>(document: Option<D>, id: &str) -> Result<D, Inapplicable> {
    document.ok_or_else(|| Inapplicable(format!("there is no document {id}")))
}

/// Checks that there is no document yet, since the event creates it.
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

    /// Checks that every view can apply the events.
    struct ApplyAll {
        events: Vec<Recorded>,
        /// How many documents each view has after the last event.
        remaining: BTreeMap<&'static str, usize>,
    }

    impl Visitor for ApplyAll {
        fn visit<V: View>(&mut self) {
            let mut documents = BTreeMap::new();
            let mut written = 0;
            for event in self.events.iter().filter(|event| V::AGGREGATES.contains(&event.event.aggregate())) {
                let ids = V::document_ids(event);
                let distinct: HashSet<&String> = ids.iter().collect();
                assert_eq!(distinct.len(), ids.len(), "each id once: {} {event:?}", V::NAME);
                if V::creates_document(event) {
                    assert!(ids.iter().all(|id| !documents.contains_key(id)), "{} {event:?}", V::NAME);
                    assert!(ids.iter().all(|id| V::evolve(None, id, event).is_ok_and(|document| document.is_some())));
                }
                for id in ids {
                    let after = V::evolve(documents.remove(&id), &id, event);
                    let document = after.unwrap_or_else(|error| panic!("{} cannot take {event:?}: {error}", V::NAME));
                    if let Some(document) = document {
                        let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
                        assert_eq!(stored.get_str("_id").unwrap(), id, "`_id` of the documents of {}", V::NAME);
                        let read: V::Document = bson::deserialize_from_slice(stored.as_bytes()).unwrap();
                        assert!(read == document);
                        let again = bson::serialize_to_raw_document_buf(&read).unwrap();
                        assert_eq!(
                            Digest::of(&again).unwrap(),
                            Digest::of(&stored).unwrap(),
                            "{}: the same document must be stored in the same form every time; a `HashMap` or \
                             `HashSet` has another order each time, a `BTreeMap` or `BTreeSet` has not",
                            V::NAME
                        );
                        documents.insert(id, document);
                        written += 1;
                    }
                }
                // An event that does not fit may be refused, but must not cause a panic.
                for id in ["", "/", "2010-12-01", "2010-12-01/GBP/1"] {
                    let _ = V::evolve(None, id, event);
                    for document in documents.values() {
                        let _ = V::evolve(Some(document.clone()), id, event);
                    }
                }
            }
            assert!(written > 0, "no event of the samples of {:?} leads to a document of {}", V::AGGREGATES, V::NAME);
            self.remaining.insert(V::NAME, documents.len());
        }
    }

    /// Checks that cursors can carry the sort keys of every list to the next page.
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
                    let hint = &list.hint;
                    let by_id = bson::doc! { "_id": 1 };
                    assert!(
                        *hint == by_id || V::indexes().contains(hint),
                        "{name} reads in the order of the index {hint}, which `indexes` of the view does not have"
                    );
                    let is_indexed = |field: &str| {
                        hint.keys().any(|key| {
                            key == field || key.strip_suffix("$**").is_some_and(|prefix| field.starts_with(prefix))
                        })
                    };
                    for field in list.filter.keys().filter(|field| !field.starts_with('$')) {
                        assert!(is_indexed(field), "{name} filters by `{field}`, which the index {hint} does not have");
                    }
                    let cursors: Vec<String> =
                        documents.iter().filter_map(|document| list.cursor.next(document).ok()).collect();
                    assert!(
                        !cursors.is_empty(),
                        "{name}: no document of the samples has a string or a whole number at each of {keys}"
                    );
                    let distinct: BTreeSet<&String> = cursors.iter().collect();
                    assert_eq!(distinct.len(), cursors.len(), "{name}: two documents have the same sort keys {keys}");
                }
            }
        }
    }

    /// Checks that clients can read every document that a query shows.
    struct CheckReplies(Vec<Recorded>);

    impl Visitor for CheckReplies {
        fn visit<V: View>(&mut self) {
            for document in given::documents::<V>(&self.0) {
                let document: V::Document = bson::deserialize_from_slice(document.as_bytes()).unwrap();
                let stored = serde_json::to_value(&document).unwrap();
                let fields =
                    stored.as_object().unwrap().iter().filter(|(name, _)| *name == "_id" || !name.starts_with('_'));
                let shown: serde_json::Map<_, _> =
                    fields.map(|(name, value)| (name.trim_start_matches('_').to_owned(), value.clone())).collect();
                for query in V::QUERIES {
                    let reply = match (query.plan)(query.examples[0].as_bytes()) {
                        Ok(Plan::Get(_)) => serde_json::json!(shown),
                        Ok(Plan::List(_)) => serde_json::json!({ "items": [shown], "next": "more" }),
                        Ok(Plan::Report(_)) | Err(_) => continue,
                    };
                    let read = (query.check_reply)(reply.to_string().as_bytes());
                    assert!(
                        read.is_ok(),
                        "the type `Reply` of {} cannot read {reply}: {read:?}; `_id` needs `alias = \"id\"`, and other \
                         fields that start with `_` need `default`",
                        query.name()
                    );
                }
            }
        }
    }

    #[test]
    fn clients_can_read_what_queries_show() {
        visit(&mut CheckReplies(domain::sample_events()));
    }

    #[test]
    fn the_sort_keys_of_lists_are_strings_or_whole_numbers() {
        visit(&mut CheckSortKeys(domain::sample_events()));
    }

    /// Views must accept events that older versions of the domain stored, and read back the documents that they lead
    /// to.
    #[test]
    fn views_apply_events_of_older_versions() {
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
        visit(&mut ApplyAll { events: domain::sample_events(), remaining: BTreeMap::new() });
    }

    #[test]
    fn a_deleted_aggregate_leaves_no_document() {
        // The events end with all aggregates deleted. Only the sale of one order remains: one day with two products.
        let mut check = ApplyAll { events: given::everything(), remaining: BTreeMap::new() };
        check.visit::<orders::Orders>();
        check.visit::<users::Users>();
        check.visit::<products::Products>();
        check.visit::<sales::Sales>();
        assert_eq!(check.remaining, BTreeMap::from([("orders", 0), ("users", 0), ("products", 0), ("sales", 3)]));
    }

    /// Sales from the time when it was in use must still be found.
    #[test]
    fn queries_accept_a_withdrawn_currency() {
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
    fn queries_have_unique_names_and_strict_schemas() {
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
    fn every_field_of_every_query_is_in_an_example() {
        for (view, query) in queries() {
            let place = format!("the examples of the query `{}` of the view {view}", query.name());
            let examples: Vec<serde_json::Value> =
                query.examples.iter().map(|example| serde_json::from_str(example).unwrap()).collect();
            for field in
                (query.schema)().to_value()["properties"].as_object().into_iter().flatten().map(|(name, _)| name)
            {
                // These two are the same in all lists.
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
