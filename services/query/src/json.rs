//! Stored documents as JSON, in one pass over their bytes: no tree is built, nothing is written twice.
//!
//! A document's `_id` is called `id` in a reply, and its other fields that start with `_`, which serve the indexes, stay
//! inside. A type that no view stores is an error, never a guess.

use bson::{RawArray, RawBsonRef, RawDocument, spec::ElementType};

/// Why a stored document cannot be written as JSON.
#[derive(Debug, thiserror::Error)]
pub enum Unencodable {
    #[error("a value of type {0:?} has no form in a reply")]
    Type(ElementType),
    #[error("broken BSON: {0}")]
    Bson(#[from] bson::error::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Appends a stored document. After an error the end of `out` is not JSON.
///
/// # Errors
/// If the document is broken or holds a type that no view stores.
pub fn write_document(out: &mut Vec<u8>, document: &RawDocument) -> Result<(), Unencodable> {
    let mut separator = b'{';
    for element in document {
        let (key, value) = element?;
        let key = match key.as_str() {
            "_id" => "id",
            key if key.starts_with('_') => continue,
            key => key,
        };
        write_field(out, separator, key, value)?;
        separator = b',';
    }
    close(out, separator, *b"{}");
    Ok(())
}

/// Appends a string with its quotes.
///
/// # Errors
/// None that is known; the library's signature has one.
pub fn write_string(out: &mut Vec<u8>, text: &str) -> Result<(), Unencodable> {
    // Without a branch in its body the loop over a string that needs no escape, which is nearly every one, is a few
    // vector instructions.
    let escape = |byte: u8| byte < b' ' || byte == b'"' || byte == b'\\';
    if text.bytes().fold(false, |found, byte| found | escape(byte)) {
        return Ok(serde_json::to_writer(out, text)?);
    }
    out.reserve(text.len() + 2);
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
    Ok(())
}

fn write_inner(out: &mut Vec<u8>, document: &RawDocument) -> Result<(), Unencodable> {
    let mut separator = b'{';
    for element in document {
        let (key, value) = element?;
        write_field(out, separator, key.as_str(), value)?;
        separator = b',';
    }
    close(out, separator, *b"{}");
    Ok(())
}

fn write_array(out: &mut Vec<u8>, array: &RawArray) -> Result<(), Unencodable> {
    let mut separator = b'[';
    for value in array {
        out.push(separator);
        write_value(out, value?)?;
        separator = b',';
    }
    close(out, separator, *b"[]");
    Ok(())
}

fn write_field(out: &mut Vec<u8>, separator: u8, key: &str, value: RawBsonRef<'_>) -> Result<(), Unencodable> {
    out.push(separator);
    write_string(out, key)?;
    out.push(b':');
    write_value(out, value)
}

/// What was empty has not been opened yet.
fn close(out: &mut Vec<u8>, separator: u8, [open, close]: [u8; 2]) {
    if separator == open {
        out.push(open);
    }
    out.push(close);
}

fn write_value(out: &mut Vec<u8>, value: RawBsonRef<'_>) -> Result<(), Unencodable> {
    match value {
        RawBsonRef::String(text) => write_string(out, text)?,
        RawBsonRef::Int32(number) => serde_json::to_writer(out, &number)?,
        RawBsonRef::Int64(number) => serde_json::to_writer(out, &number)?,
        // JSON has no infinity and no NaN: they become null.
        RawBsonRef::Double(number) => serde_json::to_writer(out, &number)?,
        RawBsonRef::Boolean(flag) => out.extend_from_slice(if flag { b"true" } else { b"false" }),
        RawBsonRef::Null => out.extend_from_slice(b"null"),
        RawBsonRef::Document(document) => write_inner(out, document)?,
        RawBsonRef::Array(array) => write_array(out, array)?,
        other => return Err(Unencodable::Type(other.element_type())),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bson::{Bson, DateTime, Document, RawDocumentBuf, doc};
    use serde_json::{Value, json};

    use super::*;

    fn text(document: &Document) -> String {
        let mut out = Vec::new();
        write_document(&mut out, &RawDocumentBuf::try_from(document).unwrap()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_document_is_written_in_its_order() {
        let document = doc! {
            "_id": "o-1", "total": 12_i32, "big": i64::MAX, "small": i64::MIN, "ratio": 0.5, "paid": true, "note": null,
            "lines": [{ "sku": "a" }, { "sku": "b", "_id": 7_i32 }], "none": [], "empty": {},
        };
        assert_eq!(
            text(&document),
            concat!(
                r#"{"id":"o-1","total":12,"big":9223372036854775807,"small":-9223372036854775808,"ratio":0.5,"#,
                r#""paid":true,"note":null,"lines":[{"sku":"a"},{"sku":"b","_id":7}],"none":[],"empty":{}}"#
            )
        );
    }

    #[test]
    fn fields_for_the_indexes_stay_inside() {
        assert_eq!(text(&doc! { "_words": ["a"], "name": "A", "_x": 1 }), r#"{"name":"A"}"#);
        assert_eq!(text(&doc! { "_words": [] }), "{}");
        assert_eq!(text(&doc! {}), "{}");
    }

    #[test]
    fn a_number_that_json_does_not_have_is_null() {
        let document = doc! { "a": f64::NAN, "b": f64::INFINITY, "c": f64::NEG_INFINITY, "d": -0.0, "e": 1e300 };
        assert_eq!(text(&document), r#"{"a":null,"b":null,"c":null,"d":-0.0,"e":1e+300}"#);
    }

    #[test]
    fn strings_are_escaped() {
        let strings =
            ["", "plain", "\"", "\\", "\n\r\t\u{8}\u{c}", "\0\u{1f}\u{7f}", "é 漢字 🦀", "\u{2028}", "a\"é\\🦀\n"];
        for string in strings {
            let mut out = Vec::new();
            write_string(&mut out, string).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), serde_json::to_string(string).unwrap(), "{string:?}");
        }
    }

    #[test]
    fn what_no_view_stores_is_an_error() {
        let values = [Bson::DateTime(DateTime::now()), Bson::ObjectId(bson::oid::ObjectId::new()), Bson::MaxKey];
        for value in values {
            let document = RawDocumentBuf::try_from(&doc! { "a": [{ "b": value }] }).unwrap();
            assert!(matches!(write_document(&mut Vec::new(), &document), Err(Unencodable::Type(_))));
        }
    }

    #[test]
    fn broken_bytes_are_an_error() {
        let whole = RawDocumentBuf::try_from(&doc! { "a": "text", "b": [1, { "c": "d" }] }).unwrap();
        for at in 4..whole.as_bytes().len() - 1 {
            let mut bytes = whole.as_bytes().to_vec();
            bytes[at] = 0xff;
            // Whatever it makes of them, it does not panic.
            if let Ok(document) = RawDocument::from_bytes(&bytes) {
                let _ = write_document(&mut Vec::new(), document);
            }
        }
        let mut bytes = whole.as_bytes().to_vec();
        bytes[4] = 0x70;
        assert!(write_document(&mut Vec::new(), RawDocument::from_bytes(&bytes).unwrap()).is_err());
    }

    #[test]
    fn random_documents_come_out_as_serde_json_writes_them() {
        let mut random = Random(7);
        for _ in 0..500 {
            let (bson, json) = random.object(4);
            // Both are read back: their keys may stand in another order.
            let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            assert_eq!(read(&text(&bson)), read(&json.to_string()));
        }
    }

    /// A linear congruential generator: the same documents in every run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % bound
        }

        fn string(&mut self) -> String {
            let alphabet = ['a', 'Z', '0', ' ', '"', '\\', '/', '\n', '\u{1}', '\u{7f}', 'é', '漢', '🦀'];
            let length = self.below(12);
            (0..length).map(|_| alphabet[self.below(alphabet.len() as u64) as usize]).collect()
        }

        fn object(&mut self, depth: u64) -> (Document, Value) {
            let (mut bson, mut json) = (Document::new(), serde_json::Map::new());
            for field in 0..self.below(6) {
                // A NUL cannot stand in a key, and a key comes once.
                let key = format!("{field}{}", self.string());
                let (value, expected) = self.value(depth);
                bson.insert(key.clone(), value);
                json.insert(key, expected);
            }
            (bson, Value::Object(json))
        }

        fn value(&mut self, depth: u64) -> (Bson, Value) {
            match self.below(if depth == 0 { 6 } else { 8 }) {
                0 => (Bson::Null, Value::Null),
                1 => (true.into(), true.into()),
                2 => {
                    let number = self.below(1 << 31) as i32 - (1 << 30);
                    (number.into(), number.into())
                }
                3 => {
                    let number = (self.below(1 << 31) as i64 - (1 << 30)) << 32;
                    (number.into(), number.into())
                }
                4 => {
                    let number = self.below(1 << 30) as f64 / 1024.0;
                    (number.into(), json!(number))
                }
                5 => {
                    let text = self.string();
                    (text.clone().into(), text.into())
                }
                6 => {
                    let values = (0..self.below(5)).map(|_| self.value(depth - 1));
                    let (bson, json): (Vec<_>, Vec<_>) = values.collect::<Vec<_>>().into_iter().unzip();
                    (bson.into(), json.into())
                }
                _ => {
                    let (bson, json) = self.object(depth - 1);
                    (bson.into(), json)
                }
            }
        }
    }
}
