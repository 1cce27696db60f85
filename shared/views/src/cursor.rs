//! Cursors for keyset pagination. A cursor is an opaque text with the sort keys of the last document of a page; a
//! client sends it back to get the next page. The invariants: a cursor is valid only for the query that it came from
//! (the limit may change), and whatever a client sends as a cursor, only plain strings and integers from it get into a
//! filter.

use bson::{Bson, Document, RawBsonRef, RawDocument, doc};
use domain::{Malformed, Reason};
use serde::{Deserialize, Serialize};

use crate::Inapplicable;

/// A limit above the length of any cursor, in bytes. The longest sort key is a name of 200 characters, which is at most
/// 800 bytes, and each byte takes two hexadecimal digits.
const MAX_CURSOR_BYTES: usize = 4_096;

/// Writes and reads the cursors of one query.
#[derive(Clone, Debug, PartialEq)]
pub struct Cursor {
    /// A hash of the query's name, filters and sort.
    fingerprint: u64,
    /// The sort keys, all in the same direction.
    sort: Document,
}

/// The content of a cursor: the fingerprint and the sort values. It is written as JSON, in hexadecimal digits.
#[derive(Serialize, Deserialize)]
struct Content(u64, Vec<SortValue>);

/// The value of a sort key in the last document of a page. Values of other types are neither written to a cursor nor
/// read from one.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum SortValue {
    Integer(i64),
    Text(String),
}

impl Cursor {
    /// The cursors of one query. The last key of `sort` must be unique, so that the order is total.
    pub(crate) fn new(query: &str, filter: &Document, sort: &Document) -> Self {
        Self { fingerprint: fnv1a(&format!("{query} {filter:?} {sort:?}")), sort: sort.clone() }
    }

    /// The cursor of the page after the one that ends with this document.
    ///
    /// # Errors
    /// If a sort key of the document is neither a string nor an integer.
    pub fn next(&self, last: &RawDocument) -> Result<String, Inapplicable> {
        let value = |path| sort_value(last, path).ok_or_else(|| Inapplicable(format!("nothing to sort by at {path}")));
        let values = self.sort.keys().map(|path| value(path)).collect::<Result<_, _>>()?;
        let json = serde_json::to_vec(&Content(self.fingerprint, values));
        json.map(|json| to_hex(&json)).map_err(|error| Inapplicable(error.to_string()))
    }

    /// The condition that a document comes after the last document of the page that the cursor is from.
    ///
    /// # Errors
    /// If the text is not a cursor of this query.
    pub(crate) fn after(&self, text: &str) -> Result<Document, Malformed> {
        let content = Some(text)
            .filter(|text| text.len() <= MAX_CURSOR_BYTES)
            .and_then(from_hex)
            .and_then(|json| serde_json::from_slice(&json).ok());
        match content {
            Some(Content(fingerprint, values))
                if fingerprint == self.fingerprint && values.len() == self.sort.len() =>
            {
                Ok(self.keyset_condition(values.into_iter().map(Bson::from).collect()))
            }
            Some(_) | None => Err(Malformed::new(
                "cursor",
                Reason::Invalid,
                "the `next` of an earlier reply to this query, with the same filters and sort",
            )),
        }
    }

    /// For the keys a, b and the values x, y, the condition is `a > x or (a = x and b > y)`. The redundant `a >= x` in
    /// front of it bounds the index scan, however the planner treats the `or`.
    fn keyset_condition(&self, values: Vec<Bson>) -> Document {
        let (after, at_or_after) = match self.sort.values().next() {
            Some(Bson::Int32(1)) => ("$gt", "$gte"),
            Some(_) | None => ("$lt", "$lte"),
        };
        let mut condition = Document::new();
        let mut equal = Document::new();
        let mut alternatives = vec![];
        for (key, value) in self.sort.keys().zip(values) {
            if equal.is_empty() {
                condition.insert(key, doc! { at_or_after: &value });
            }
            let mut alternative = equal.clone();
            alternative.insert(key, doc! { after: &value });
            alternatives.push(alternative);
            equal.insert(key, value);
        }
        condition.insert("$or", alternatives);
        condition
    }
}

impl From<SortValue> for Bson {
    fn from(value: SortValue) -> Self {
        match value {
            SortValue::Integer(integer) => integer.into(),
            SortValue::Text(text) => text.into(),
        }
    }
}

fn sort_value(document: &RawDocument, path: &str) -> Option<SortValue> {
    if let Some((field, rest)) = path.split_once('.') {
        return sort_value(document.get_document(field).ok()?, rest);
    }
    match document.get(path).ok()?? {
        RawBsonRef::String(text) => Some(SortValue::Text(text.to_owned())),
        RawBsonRef::Int32(integer) => Some(SortValue::Integer(integer.into())),
        RawBsonRef::Int64(integer) => Some(SortValue::Integer(integer)),
        _ => None,
    }
}

/// The FNV-1a hash, which is the same in every replica and every build, unlike that of the standard library. It guards
/// against mistakes and not against malice, since a forged cursor can read nothing that its query could not.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn to_hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> = text.chars().map(|digit| digit.to_digit(16)).collect::<Option<_>>()?;
    digits
        .chunks(2)
        .map(|pair| match pair {
            &[high, low] => u8::try_from(high << 4 | low).ok(),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(filter: &Document) -> Cursor {
        Cursor::new("order.list", filter, &doc! { "placed_at": -1, "_id": -1 })
    }

    fn raw(document: &Document) -> bson::RawDocumentBuf {
        document.try_into().unwrap()
    }

    #[test]
    fn the_next_page_starts_after_the_last_document() {
        let cursor = cursor(&doc! { "user": "u" });
        let text = cursor.next(&raw(&doc! { "_id": "o", "placed_at": "2010", "lines": [] })).unwrap();
        let expected = doc! {
            "placed_at": { "$lte": "2010" },
            "$or": [{ "placed_at": { "$lt": "2010" } }, { "placed_at": "2010", "_id": { "$lt": "o" } }],
        };
        assert_eq!(cursor.after(&text), Ok(expected));
    }

    #[test]
    fn a_sort_key_may_be_nested_and_an_integer_of_any_width() {
        let cursor = Cursor::new("x", &doc! {}, &doc! { "total.amount": 1, "_id": 1 });
        for amount in [Bson::Int32(7), Bson::Int64(7)] {
            let text = cursor.next(&raw(&doc! { "_id": "o", "total": { "amount": amount } })).unwrap();
            let after = cursor.after(&text).unwrap();
            assert_eq!(after.get_document("total.amount").unwrap(), &doc! { "$gte": 7_i64 });
        }
    }

    #[test]
    fn three_keys_make_three_alternatives() {
        let cursor = Cursor::new("x", &doc! {}, &doc! { "a": 1, "b": 1, "_id": 1 });
        let text = cursor.next(&raw(&doc! { "_id": "z", "a": 1, "b": "y" })).unwrap();
        let expected = doc! {
            "a": { "$gte": 1_i64 },
            "$or": [
                { "a": { "$gt": 1_i64 } },
                { "a": 1_i64, "b": { "$gt": "y" } },
                { "a": 1_i64, "b": "y", "_id": { "$gt": "z" } },
            ],
        };
        assert_eq!(cursor.after(&text), Ok(expected));
    }

    #[test]
    fn a_document_without_valid_sort_keys_is_an_error() {
        let cursor = cursor(&doc! {});
        for last in [
            doc! { "_id": "o" },
            doc! { "_id": "o", "placed_at": 1.5 },
            doc! { "_id": "o", "placed_at": { "$gt": "" } },
        ] {
            assert!(cursor.next(&raw(&last)).is_err(), "{last}");
        }
    }

    #[test]
    fn a_cursor_of_another_query_is_refused() {
        let last = raw(&doc! { "_id": "o", "placed_at": "2010" });
        let text = cursor(&doc! { "user": "u" }).next(&last).unwrap();
        let ascending = Cursor::new("order.list", &doc! { "user": "u" }, &doc! { "placed_at": 1, "_id": 1 });
        let other_query = Cursor::new("user.list", &doc! { "user": "u" }, &doc! { "placed_at": -1, "_id": -1 });
        for other in [cursor(&doc! { "user": "v" }), cursor(&doc! {}), ascending, other_query] {
            assert_eq!(other.after(&text).unwrap_err().field, "cursor");
        }
    }

    #[test]
    fn an_invalid_cursor_is_refused() {
        let cursor = cursor(&doc! {});
        let forged = |json: String| to_hex(json.as_bytes());
        let fingerprint = cursor.fingerprint;
        for bad in [
            String::new(),
            "é".into(),
            "+f".into(),
            "abc".into(),
            "zz".into(),
            "ff".repeat(MAX_CURSOR_BYTES),
            forged("[]".into()),
            forged("[".repeat(2_000)),
            forged(format!("[{fingerprint},[]]")),
            forged(format!("[{fingerprint},[\"a\"]]")),
            forged(format!("[{fingerprint},[\"a\",\"b\",\"c\"]]")),
            forged(format!("[{fingerprint},[\"a\",{{\"$gt\":\"\"}}]]")),
            forged(format!("[{fingerprint},[\"a\",[1]]]")),
            forged(format!("[{fingerprint},[\"a\",null]]")),
            forged(format!("[{fingerprint},[\"a\",1.5]]")),
            forged("[0,[\"a\",\"b\"]]".into()),
        ] {
            assert_eq!(cursor.after(&bad).unwrap_err().field, "cursor", "{bad:.40}");
        }
        assert!(cursor.after(&forged(format!("[{fingerprint},[\"a\",\"b\"]]"))).is_ok());
    }

    #[test]
    fn the_longest_name_fits_into_a_cursor() {
        let cursor = Cursor::new("x", &doc! {}, &doc! { "_name": 1, "_id": 1 });
        for name in ["\u{10FFFF}".repeat(200), "\"".repeat(200)] {
            let text = cursor.next(&raw(&doc! { "_id": "0".repeat(36), "_name": name })).unwrap();
            assert!(cursor.after(&text).is_ok(), "{}", text.len());
        }
    }

    #[test]
    fn the_fingerprint_is_the_same_in_every_build() {
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
