//! What was found when a rebuilt generation of a view was compared with the serving one, and how it is told.

use std::fmt::Write;

use serde::Deserialize;
use serde_json::Value;

use crate::words::{documents, list, number};

/// The comparison of the serving generation `a` with the rebuilt one, `b`.
#[derive(Clone, Debug, Deserialize)]
pub struct Comparison {
    /// Where both were.
    pub position: u64,
    a: Side,
    b: Side,
    /// How many documents differ.
    different: u64,
    /// The first of them.
    #[serde(default)]
    differences: Vec<Difference>,
}

#[derive(Clone, Debug, Deserialize)]
struct Side {
    collection: String,
    documents: u64,
    /// The digest of its documents.
    digest: String,
    /// The digest that its checkpoint has.
    #[serde(default)]
    checkpoint_digest: Option<String>,
}

/// A document that differs.
#[derive(Clone, Debug, Deserialize)]
struct Difference {
    id: String,
    kind: String,
    #[serde(default)]
    fields: Vec<Field>,
}

/// A field that differs.
#[derive(Clone, Debug, Deserialize)]
struct Field {
    field: String,
    /// What it contains, if that was asked for, and the document has the field.
    #[serde(default, deserialize_with = "present")]
    a: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    b: Option<Value>,
}

impl Comparison {
    /// The comparison; `None` if this version cannot read it.
    pub fn read(json: &Value) -> Option<Self> {
        Self::deserialize(json).ok()
    }

    pub fn is_equal(&self) -> bool {
        self.different == 0 && self.strange_checkpoints().next().is_none()
    }

    /// How many documents were compared.
    pub fn size(&self) -> String {
        match (self.a.documents, self.b.documents) {
            (one, other) if one == other => number(one),
            (one, other) => format!("{} / {}", number(one), number(other)),
        }
    }

    /// `equal`, `2 documents differ`
    pub fn result(&self) -> String {
        match self.different {
            0 if self.is_equal() => "equal".to_owned(),
            0 => "a checkpoint has another digest".to_owned(),
            1 => "1 document differs".to_owned(),
            different => format!("{} differ", documents(different)),
        }
    }

    /// A line for each document that differs, indented, and below it one for each field of which the values are known.
    pub fn differences(&self) -> String {
        let mut text = String::new();
        for Difference { id, kind, fields } in &self.differences {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {}  {}", plain(id), in_words(kind, fields));
            for Field { field, a, b } in fields {
                if a.is_some() || b.is_some() {
                    let _ = writeln!(text, "      {}: {} / {}", plain(field), value(a.as_ref()), value(b.as_ref()));
                }
            }
        }
        let more = self.different.saturating_sub(self.differences.len() as u64);
        if more > 0 {
            let _ = writeln!(text, "  and {} more", number(more));
        }
        for Side { collection, .. } in self.strange_checkpoints() {
            let _ = writeln!(text, "  the checkpoint of {} has another digest than its documents", plain(collection));
        }
        text
    }

    /// Generations whose checkpoints do not have the digest of their documents: somebody else has written to them.
    fn strange_checkpoints(&self) -> impl Iterator<Item = &Side> {
        let is_strange = |side: &&Side| side.checkpoint_digest.as_ref().is_some_and(|digest| *digest != side.digest);
        [&self.a, &self.b].into_iter().filter(is_strange)
    }
}

fn in_words(kind: &str, fields: &[Field]) -> String {
    let names: Vec<String> = fields.iter().map(|field| plain(&field.field)).collect();
    match kind {
        "only_in_a" => "is only in the serving generation".to_owned(),
        "only_in_b" => "is only in the rebuilt generation".to_owned(),
        "differs" if names.is_empty() => "differs".to_owned(),
        "differs" => format!("differs in {}", list(&names)),
        // One of another version.
        other => plain(other),
    }
}

/// JSON on one line; nothing where the document does not have the field.
fn value(value: Option<&Value>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| plain(&value.to_string()))
}

/// The text without what a terminal takes for a command.
fn plain(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// A field that is `null` has a value, unlike one that is absent.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differences_are_told_in_words() {
        let comparison = Comparison::read(&json!({
            "position": 1042, "different": 4,
            "a": {"collection": "orders@1", "documents": 120, "digest": "aa", "checkpoint_digest": "bb"},
            "b": {"collection": "orders@2", "documents": 121, "digest": "bb", "checkpoint_digest": "bb"},
            "differences": [
                {"id": "a1", "kind": "differs", "fields": [
                    {"field": "name", "a": "x", "b": "\u{9b}2J"}, {"field": "price.amount", "a": null},
                ]},
                {"id": "a2", "kind": "only_in_a", "fields": []},
                {"id": "a\u{1b}[2J", "kind": "only_in_b"},
            ],
        }));
        let comparison = comparison.unwrap();
        assert_eq!((&*comparison.size(), &*comparison.result()), ("120 / 121", "4 documents differ"));
        assert_eq!(
            comparison.differences(),
            "  a1  differs in name and price.amount
      name: \"x\" / \"\u{fffd}2J\"
      price.amount: null / -
  a2  is only in the serving generation
  a\u{fffd}[2J  is only in the rebuilt generation
  and 1 more
  the checkpoint of orders@1 has another digest than its documents
"
        );
    }

    #[test]
    fn equal_generations_have_nothing_to_tell() {
        let side = |digest: &str| json!({"collection": "orders@1", "documents": 3, "digest": "aa", "checkpoint_digest": digest});
        let compared =
            |digest| json!({"position": 7, "a": side(digest), "b": side("aa"), "different": 0, "differences": []});
        let equal = Comparison::read(&compared("aa")).unwrap();
        assert_eq!((&*equal.size(), &*equal.result(), &*equal.differences()), ("3", "equal", ""));
        // Two errors could cancel each other out, but not in the digest.
        let strange = Comparison::read(&compared("bb")).unwrap();
        assert!(!strange.is_equal());
        assert_eq!(strange.result(), "a checkpoint has another digest");
    }

    #[test]
    fn a_comparison_of_another_version_counts_as_far_as_it_can_be_read() {
        let side = json!({"collection": "orders@1", "documents": 3, "digest": "aa", "new": 1});
        let other = json!({"position": 7, "a": side, "b": side, "different": 1, "new": 1, "differences": [{"id": "7", "kind": "moved"}]});
        let other = Comparison::read(&other).unwrap();
        assert_eq!((&*other.result(), &*other.differences()), ("1 document differs", "  7  moved\n"));
        assert!(Comparison::read(&json!({"digest": "aa"})).is_none());
    }
}
