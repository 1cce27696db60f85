//! A page of a list: `{"items":[…],"next":"…"}`, with `next` only where more items follow. A page ends early rather
//! than exceed the size limit of a reply.

use bson::{RawDocument, RawDocumentBuf};
use bytes::Bytes;
use futures_util::TryStreamExt;
use mongodb::options::Hint;
use views::List;
use wire::Failure;

use crate::{
    json::{self, EncodeError},
    reply::{internal, too_large},
    store::{MAX_TIME, Store},
};

/// Bytes that are reserved for `next`.
const NEXT_ROOM: usize = 4_096;

/// Reads a page.
///
/// # Errors
/// The failure to answer with, after it has been logged.
pub async fn read(store: &Store, view: &str, generation: i32, list: List, max_bytes: usize) -> Result<Bytes, Failure> {
    let List { filter, sort, hint, limit, cursor } = list;
    let _permit = store.read_permit().await;
    let collection = store.collection(view, generation);
    // One document more than the page holds shows whether there is a next page. The batch has room for yet another: so
    // the server sees that the result has ended, and keeps no cursor.
    let batch_size = u32::try_from(limit + 2).unwrap_or(u32::MAX);
    let find = collection.find(filter).sort(sort).hint(Hint::Keys(hint)).limit(limit + 1);
    let _timer = store.time_read();
    let mut replies = store.read(view, find.batch_size(batch_size).max_time(MAX_TIME).batch()).await?;
    let mut page = Page::new(limit, max_bytes);
    let mut last: Option<RawDocumentBuf> = None;
    while let Some(reply) = store.read(view, replies.try_next()).await? {
        // A document is about as long in JSON as in BSON.
        page.body.reserve(reply.as_raw_document().as_bytes().len().min(max_bytes));
        let mut previous = last.as_deref();
        for document in store.documents(view, &reply)? {
            let document = document?;
            if page.add(document).map_err(|error| internal(view, error))? {
                previous = Some(document);
                continue;
            }
            let Some(previous) = previous else { return Err(too_large(max_bytes)) };
            let next = cursor.next(previous).map_err(|error| internal(view, error))?;
            return page.end(Some(&next)).map_err(|error| internal(view, error));
        }
        // Only a page of several megabytes comes in more than one batch.
        last = previous.map(ToOwned::to_owned);
    }
    page.end(None).map_err(|error| internal(view, error))
}

/// A page that is being written.
struct Page {
    body: Vec<u8>,
    items: i64,
    limit: i64,
    max_bytes: usize,
}

impl Page {
    fn new(limit: i64, max_bytes: usize) -> Self {
        Self { body: br#"{"items":["#.to_vec(), items: 0, limit, max_bytes }
    }

    /// Adds the document if it fits; returns whether it did.
    fn add(&mut self, document: &RawDocument) -> Result<bool, EncodeError> {
        if self.items == self.limit {
            return Ok(false);
        }
        let before = self.body.len();
        if self.items > 0 {
            self.body.push(b',');
        }
        json::write_document(&mut self.body, document)?;
        if self.body.len() + NEXT_ROOM > self.max_bytes {
            self.body.truncate(before);
            return Ok(false);
        }
        self.items += 1;
        Ok(true)
    }

    fn end(mut self, next: Option<&str>) -> Result<Bytes, EncodeError> {
        self.body.push(b']');
        if let Some(next) = next {
            self.body.extend_from_slice(br#","next":"#);
            json::write_string(&mut self.body, next)?;
        }
        self.body.push(b'}');
        Ok(self.body.into())
    }
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;

    use super::*;

    fn text(page: Page, next: Option<&str>) -> String {
        String::from_utf8(page.end(next).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn a_page_takes_as_many_as_its_limit() {
        let mut page = Page::new(2, 1_000_000);
        assert!(page.add(&rawdoc! { "_id": "a" }).unwrap());
        assert!(page.add(&rawdoc! { "_id": "b" }).unwrap());
        assert!(!page.add(&rawdoc! { "_id": "c" }).unwrap());
        assert_eq!(text(page, Some("bmV4dA")), r#"{"items":[{"id":"a"},{"id":"b"}],"next":"bmV4dA"}"#);
    }

    #[test]
    fn an_empty_page_is_a_page() {
        assert_eq!(text(Page::new(2, 1_000_000), None), r#"{"items":[]}"#);
    }

    #[test]
    fn a_page_ends_before_it_grows_past_the_bound() {
        let mut page = Page::new(10, NEXT_ROOM + 100);
        let document = rawdoc! { "_id": "x".repeat(60) };
        assert!(page.add(&document).unwrap());
        assert!(!page.add(&document).unwrap());
        assert!(text(page, None).ends_with(r#"xxx"}]}"#));
    }
}
