//! The read models: one file per view, with its document, how the document evolves, its indexes, and the queries over
//! it. Evolving is pure; nothing here talks to a server.
//!
//! A new view is one new file and one line in [`visit`].

mod cursor;
pub mod layout;
pub mod orders;
pub mod products;
mod query;
pub mod sales;
pub mod users;

pub use cursor::Cursor;
pub use query::{List, Plan, Query, Report};

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

    /// The identifiers of the documents that the event concerns, each once.
    fn concerns(event: &Recorded) -> Vec<String>;

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
