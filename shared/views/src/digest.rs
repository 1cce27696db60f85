//! The digest of a generation: the sum, modulo 2^256, of the SHA-256 hash of each document's canonical form. The
//! invariant: documents of equal content have equal digests, in whatever order they came, and whatever the order of
//! their fields. So a writer can keep the digest of a collection current without reading it, and two programs can
//! compare millions of documents by 32 bytes.
//!
//! The canonical form of a document is its BSON with the fields of every document sorted by the bytes of their names,
//! also in documents that are nested in others or in arrays. Elements of arrays keep their places. Nothing else is made
//! equal: the integer 5 differs in 32 and in 64 bits and from 5.0, 0.0 from -0.0, a missing field from null, and a text
//! from the same text in another normalization form. The identifier counts as the field `_id`.
//!
//! A digest shows what went wrong by mistake or by hand. It is no signature: who may write both the documents and the
//! digest can make them agree.

use std::{
    fmt,
    ops::{AddAssign, SubAssign},
    str::FromStr,
};

use bson::{
    RawDocument,
    raw::{RawBsonRef, RawElement},
    spec::ElementType,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256};

/// The length at the beginning of a document.
const LENGTH_BYTES: usize = 4;

/// The digest of any number of documents. The default is that of none. Its text form is 64 hexadecimal digits.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Digest {
    /// The lowest 64 bits come first.
    words: [u64; 4],
}

/// The error for a text that is not a digest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a digest: {} hexadecimal digits", Digest::DIGITS)]
pub struct InvalidDigest;

impl Digest {
    /// The number of digits of the text form.
    const DIGITS: usize = 64;

    /// The digest of one document.
    ///
    /// # Errors
    /// If it is not valid BSON.
    pub fn of(document: &RawDocument) -> bson::error::Result<Self> {
        let mut canonical = CanonicalForm { bytes: Vec::with_capacity(document.as_bytes().len()), fields: Vec::new() };
        canonical.append_document(document, Order::ByName)?;
        let hash: [u8; 32] = Sha256::digest(&canonical.bytes).into();
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(hash.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Ok(Self { words })
    }
}

/// Adds documents.
impl AddAssign for Digest {
    fn add_assign(&mut self, other: Self) {
        let mut carry = false;
        for (word, other) in self.words.iter_mut().zip(other.words) {
            let (sum, overflowed) = word.overflowing_add(other);
            let (sum, carried) = sum.overflowing_add(carry.into());
            (*word, carry) = (sum, overflowed || carried);
        }
    }
}

/// Removes documents.
impl SubAssign for Digest {
    fn sub_assign(&mut self, other: Self) {
        let mut borrow = false;
        for (word, other) in self.words.iter_mut().zip(other.words) {
            let (difference, overflowed) = word.overflowing_sub(other);
            let (difference, borrowed) = difference.overflowing_sub(borrow.into());
            (*word, borrow) = (difference, overflowed || borrowed);
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.words.iter().rev().try_for_each(|word| write!(f, "{word:016x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != Self::DIGITS || !text.bytes().all(is_digit) {
            return Err(InvalidDigest);
        }
        let mut words = [0; 4];
        for (index, word) in words.iter_mut().rev().enumerate() {
            *word = u64::from_str_radix(&text[16 * index..16 * (index + 1)], 16).map_err(|_| InvalidDigest)?;
        }
        Ok(Self { words })
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text: String = Deserialize::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// A canonical form that is being written. It is as long as the document itself.
struct CanonicalForm<'a> {
    bytes: Vec<u8>,
    /// The fields of the documents that are being written, those of the innermost last.
    fields: Vec<Field<'a>>,
}

#[derive(Clone)]
struct Field<'a> {
    element: RawElement<'a>,
    /// Its type, name and value.
    stored: &'a [u8],
}

/// The order in which fields are written.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    ByName,
    /// An array is stored as a document whose names are the places of the elements.
    AsStored,
}

impl<'a> CanonicalForm<'a> {
    fn append_document(&mut self, document: &'a RawDocument, order: Order) -> bson::error::Result<()> {
        let (length, mut rest) = document.as_bytes().split_at(LENGTH_BYTES);
        let first = self.fields.len();
        for element in document.iter_elements() {
            let element = element?;
            // A byte for the type, and one for the end of the name.
            let (stored, others) = rest.split_at(1 + element.key().as_str().len() + 1 + element.size());
            self.fields.push(Field { element, stored });
            rest = others;
        }
        if order == Order::ByName {
            // MongoDB accepts two fields of one name. They keep their order.
            self.fields[first..].sort_by_key(|field| field.element.key().as_str());
        }
        self.bytes.extend_from_slice(length);
        for index in first..self.fields.len() {
            self.append_field(self.fields[index].clone())?;
        }
        self.bytes.push(0);
        self.fields.truncate(first);
        Ok(())
    }

    fn append_field(&mut self, Field { element, stored }: Field<'a>) -> bson::error::Result<()> {
        let Some((nested, order)) = nested_document(&element)? else {
            self.bytes.extend_from_slice(stored);
            return Ok(());
        };
        self.bytes.extend_from_slice(&stored[..stored.len() - nested.as_bytes().len()]);
        self.append_document(nested, order)
    }
}

/// The document with which the element's value ends, if its type has one.
fn nested_document<'a>(element: &RawElement<'a>) -> bson::error::Result<Option<(&'a RawDocument, Order)>> {
    if !matches!(
        element.element_type(),
        ElementType::EmbeddedDocument | ElementType::Array | ElementType::JavaScriptCodeWithScope
    ) {
        return Ok(None);
    }
    Ok(match element.value()? {
        RawBsonRef::Document(document) => Some((document, Order::ByName)),
        RawBsonRef::Array(array) => Some((RawDocument::from_bytes(array.as_bytes())?, Order::AsStored)),
        RawBsonRef::JavaScriptCodeWithScope(code) => Some((code.scope, Order::ByName)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bson::{
        Binary, Bson, DateTime, Decimal128, JavaScriptCodeWithScope, RawDocumentBuf, Regex, Timestamp, doc,
        oid::ObjectId, raw::cstr, rawdoc, spec::BinarySubtype,
    };
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    fn digest(document: &bson::Document) -> Digest {
        Digest::of(&RawDocumentBuf::try_from(document).unwrap()).unwrap()
    }

    /// The sum of the documents.
    fn sum(documents: &[bson::Document]) -> Digest {
        let mut sum = Digest::default();
        documents.iter().for_each(|document| sum += digest(document));
        sum
    }

    fn scalar() -> impl Strategy<Value = Bson> {
        prop_oneof![
            any::<i32>().prop_map(Bson::Int32),
            any::<i64>().prop_map(Bson::Int64),
            any::<u64>().prop_map(|bits| Bson::Double(f64::from_bits(bits))),
            any::<bool>().prop_map(Bson::Boolean),
            "[a-c\u{e4}]{0,3}".prop_map(Bson::String),
            "[ab]{0,2}".prop_map(Bson::Symbol),
            "[ab]{0,2}".prop_map(Bson::JavaScriptCode),
            any::<[u8; 12]>().prop_map(|bytes| Bson::ObjectId(ObjectId::from_bytes(bytes))),
            any::<[u8; 16]>().prop_map(|bytes| Bson::Decimal128(Decimal128::from_bytes(bytes))),
            any::<i64>().prop_map(|millis| Bson::DateTime(DateTime::from_millis(millis))),
            (any::<u32>(), any::<u32>()).prop_map(|(time, increment)| Bson::Timestamp(Timestamp { time, increment })),
            ("[ab]{0,2}", "[im]?").prop_map(|(pattern, options)| {
                let text = |text: String| text.try_into().unwrap();
                Bson::RegularExpression(Regex { pattern: text(pattern), options: text(options) })
            }),
            vec(any::<u8>(), 0..4).prop_map(|bytes| Bson::Binary(Binary { subtype: BinarySubtype::Generic, bytes })),
            Just(Bson::Null),
            Just(Bson::Undefined),
            Just(Bson::MinKey),
            Just(Bson::MaxKey),
        ]
    }

    /// Documents in which few names are used, so that documents that are nested in each other share some.
    fn document() -> impl Strategy<Value = bson::Document> {
        let value = scalar().prop_recursive(3, 40, 5, |inner| {
            prop_oneof![
                fields(inner.clone()).prop_map(Bson::Document),
                vec(inner.clone(), 0..4).prop_map(Bson::Array),
                (fields(inner), "[ab]{0,2}").prop_map(|(scope, code)| {
                    Bson::JavaScriptCodeWithScope(JavaScriptCodeWithScope { code, scope })
                }),
            ]
        });
        fields(value)
    }

    fn fields(value: impl Strategy<Value = Bson>) -> impl Strategy<Value = bson::Document> {
        vec(("[a-c]{0,2}|_id|\u{e4}|1|10|2", value), 0..6).prop_map(|fields| fields.into_iter().collect())
    }

    /// The same value with the fields of all its documents in another order.
    fn shuffled(value: &Bson, order: &mut impl FnMut() -> u64) -> Bson {
        match value {
            Bson::Document(document) => Bson::Document(shuffled_document(document, order)),
            Bson::Array(values) => Bson::Array(values.iter().map(|value| shuffled(value, order)).collect()),
            Bson::JavaScriptCodeWithScope(JavaScriptCodeWithScope { code, scope }) => {
                let (code, scope) = (code.clone(), shuffled_document(scope, order));
                Bson::JavaScriptCodeWithScope(JavaScriptCodeWithScope { code, scope })
            }
            scalar => scalar.clone(),
        }
    }

    fn shuffled_document(document: &bson::Document, order: &mut impl FnMut() -> u64) -> bson::Document {
        let mut fields: Vec<_> =
            document.iter().map(|(name, value)| (order(), name.clone(), shuffled(value, order))).collect();
        fields.sort_by_key(|(order, ..)| *order);
        fields.into_iter().map(|(_, name, value)| (name, value)).collect()
    }

    /// What the digest must tell apart: a description of the value with its types, and with the fields by name.
    fn description(value: &Bson) -> String {
        match value {
            Bson::Document(document) => described(document),
            Bson::Array(values) => format!("{:?}", values.iter().map(description).collect::<Vec<_>>()),
            Bson::Double(number) => format!("double {:x}", number.to_bits()),
            Bson::JavaScriptCodeWithScope(JavaScriptCodeWithScope { code, scope }) => {
                format!("{code:?} with {}", described(scope))
            }
            scalar => format!("{:?} {scalar:?}", scalar.element_type()),
        }
    }

    fn described(document: &bson::Document) -> String {
        let fields = document.iter().map(|(name, value)| (name, description(value)));
        format!("{:?}", fields.collect::<BTreeMap<_, _>>())
    }

    /// The same document with something changed in one place: a name, a value, or the order of an array.
    fn altered(document: &bson::Document, place: Index, value: Bson) -> bson::Document {
        let mut altered = document.clone();
        if document.is_empty() {
            altered.insert("new", value);
            return altered;
        }
        let (name, old) = document.iter().nth(place.index(document.len())).unwrap();
        match old {
            Bson::Document(nested) => drop(altered.insert(name, self::altered(nested, place, value))),
            Bson::Array(values) if values.len() > 1 => {
                let mut values = values.clone();
                values.reverse();
                altered.insert(name, values);
            }
            _ if place.index(2) == 0 => {
                altered.remove(name);
                altered.insert(format!("{name}x"), old.clone());
            }
            _ => drop(altered.insert(name, value)),
        }
        altered
    }

    proptest! {
        #[test]
        fn the_order_of_fields_does_not_count(document in document(), orders in vec(any::<u64>(), 1..20)) {
            let mut orders = orders.into_iter().cycle();
            let other = shuffled_document(&document, &mut || orders.next().unwrap());
            prop_assert_eq!(described(&document), described(&other));
            prop_assert_eq!(digest(&document), digest(&other));
        }

        #[test]
        fn anything_else_counts(document in document(), place in any::<Index>(), value in scalar()) {
            let altered = altered(&document, place, value);
            prop_assert_eq!(
                described(&document) == described(&altered),
                digest(&document) == digest(&altered),
                "{:?} {:?}", document, altered
            );
        }

        #[test]
        fn the_canonical_form_is_bson_of_the_same_length(document in document()) {
            let stored = RawDocumentBuf::try_from(&document).unwrap();
            let mut canonical = CanonicalForm { bytes: vec![], fields: vec![] };
            canonical.append_document(&stored, Order::ByName).unwrap();
            prop_assert_eq!(canonical.bytes.len(), stored.as_bytes().len());
            let read = RawDocumentBuf::from_bytes(canonical.bytes).unwrap();
            prop_assert_eq!(described(&bson::Document::try_from(&read).unwrap()), described(&document));
        }

        #[test]
        fn a_sum_does_not_depend_on_the_order(
            documents in vec(document(), 0..6).prop_flat_map(|documents| (Just(documents.clone()), Just(documents).prop_shuffle())),
        ) {
            prop_assert_eq!(sum(&documents.0), sum(&documents.1));
        }

        #[test]
        fn removing_a_document_undoes_adding_it(words in any::<[u64; 4]>(), document in document()) {
            let before = Digest { words };
            let mut after = before;
            after += digest(&document);
            prop_assert_ne!(after, before);
            after -= digest(&document);
            prop_assert_eq!(after, before);
        }

        #[test]
        fn the_text_form_can_be_read(words in any::<[u64; 4]>()) {
            let digest = Digest { words };
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
            prop_assert_eq!(digest.to_string().len(), Digest::DIGITS);
            let stored = bson::serialize_to_bson(&digest).unwrap();
            prop_assert_eq!(&stored, &Bson::String(digest.to_string()));
            prop_assert_eq!(bson::deserialize_from_bson::<Digest>(stored).unwrap(), digest);
        }
    }

    /// Digests are stored, so the form must never change.
    #[test]
    fn the_digest_of_a_document_is_the_hash_of_its_sorted_bson() {
        let sorted = rawdoc! { "_id": "1", "lines": [{ "n": 2_i64, "sku": "B" }, { "n": 1_i64, "sku": "A" }], "a": 1 };
        let document =
            rawdoc! { "lines": [{ "sku": "B", "n": 2_i64 }, { "n": 1_i64, "sku": "A" }], "a": 1, "_id": "1" };
        assert_eq!(Digest::of(&document).unwrap(), Digest::of(&sorted).unwrap());
        let sorted = rawdoc! { "_id": "1", "a": 1, "lines": [{ "n": 2_i64, "sku": "B" }, { "n": 1_i64, "sku": "A" }] };
        let hash: [u8; 32] = Sha256::digest(sorted.as_bytes()).into();
        let text: String = hash.iter().rev().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(Digest::of(&document).unwrap().to_string(), text);
        assert_eq!(text, "e2b583e71fd2a275822ec7ecc5b7d6a41f5d8b129cf58f9f357dbc5a62a0dd5d");
    }

    #[test]
    fn equal_numbers_of_different_types_differ() {
        let numbers = [doc! { "n": 0 }, doc! { "n": 0_i64 }, doc! { "n": 0.0 }, doc! { "n": -0.0 }, doc! { "n": "0" }];
        for (index, number) in numbers.iter().enumerate() {
            assert!(numbers.iter().skip(index + 1).all(|other| digest(number) != digest(other)), "{number}");
        }
        let nan = doc! { "n": f64::NAN };
        assert_eq!(digest(&nan), digest(&nan));
    }

    #[test]
    fn fields_of_one_name_keep_their_order() {
        let twice = |first: i32, second: i32| {
            let mut document = RawDocumentBuf::new();
            document.append(cstr!("a"), first);
            document.append(cstr!("a"), second);
            Digest::of(&document).unwrap()
        };
        assert_ne!(twice(1, 2), twice(2, 1));
    }

    #[test]
    fn sums_are_taken_modulo_two_to_the_256() {
        let largest = Digest { words: [u64::MAX; 4] };
        let one = Digest { words: [1, 0, 0, 0] };
        let mut digest = largest;
        digest += one;
        assert_eq!(digest, Digest::default());
        digest -= one;
        assert_eq!(digest, largest);
        digest += largest;
        assert_eq!(digest.to_string(), format!("{}e", "f".repeat(63)));
    }

    #[test]
    fn other_texts_are_refused() {
        let zero = Digest::default().to_string();
        for text in ["", "0", &zero[1..], &format!("{zero}0"), &zero.replacen('0', "+", 1), &zero.replacen('0', "F", 1)]
        {
            assert_eq!(text.parse::<Digest>(), Err(InvalidDigest), "{text}");
        }
    }

    #[test]
    fn bytes_that_are_not_bson_are_refused() {
        let mut bytes = rawdoc! { "nested": { "a": 1 } }.into_bytes();
        // The type of `a`, which no type of BSON has.
        let at = bytes.len() - 9;
        assert_eq!(bytes[at..at + 2], [ElementType::Int32 as u8, b'a']);
        bytes[at] = 0x2a;
        Digest::of(RawDocument::from_bytes(&bytes).unwrap()).unwrap_err();
    }
}
