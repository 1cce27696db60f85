//! Texts that cannot be wrong: trimmed, not empty, bounded in characters, without control characters (PostgreSQL's
//! text cannot hold a NUL, and a line break in a name is somebody's mistake).

use std::{borrow::Cow, fmt, ops::Deref};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::strict;

/// Declares a text type. A macro because four types differ in nothing but their name, bound and extra rule, and the
/// boilerplate that a checked text needs is long.
macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident { max: $max:expr, check: $check:expr, expected: $expected:expr })*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// # Errors
            /// What was expected, in words for the one who sent the text.
            pub fn new(text: &str) -> Result<Self, InvalidText> {
                let text = text.trim();
                let bounded = !text.is_empty() && text.chars().count() <= $max;
                let check: fn(&str) -> bool = $check;
                if bounded && !text.chars().any(char::is_control) && check(text) {
                    return Ok(Self(text.to_owned()));
                }
                Err(InvalidText($expected))
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                strict::text(deserializer, $expected, |text| Self::new(text).ok())
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "minLength": 1, "maxLength": $max, "description": $expected })
            }
        }
    )*};
}

texts! {
    /// The name of a user or a product.
    Name {
        max: 200,
        check: |_| true,
        expected: "a text of 1 to 200 characters without control characters"
    }
    /// An e-mail address: a local part of at most 64 bytes, `@`, a domain.
    Email {
        max: 254,
        check: is_email,
        expected: "an e-mail address such as ada@example.com, at most 254 characters"
    }
    /// A stock-keeping unit, the seller's own code for a product. Letter case counts (85123A and 85123a are two), and
    /// real ones have spaces inside (BANK CHARGES).
    Sku {
        max: 64,
        check: |text| text.chars().all(|c| c == ' ' || !c.is_whitespace()),
        expected: "a SKU of 1 to 64 characters without control characters or white space other than spaces"
    }
    /// A country, by the name or code that the client uses.
    Country {
        max: 60,
        check: |_| true,
        expected: "a country of 1 to 60 characters without control characters"
    }
}

/// What was expected instead of the text.
#[derive(Debug, thiserror::Error)]
#[error("expected {0}")]
pub struct InvalidText(&'static str);

impl Email {
    /// The address as it is compared: `Ada@Example.com` and `ada@example.com` are one.
    pub fn normalized(&self) -> String {
        self.0.to_lowercase()
    }
}

impl Sku {
    /// The SKU as it is compared.
    pub fn normalized(&self) -> String {
        self.0.clone()
    }
}

/// The shape alone: whether an address works shows only when something is sent to it.
fn is_email(text: &str) -> bool {
    let Some((local, domain)) = text.rsplit_once('@') else {
        return false;
    };
    let label = |label: &str| !label.is_empty() && !label.starts_with('-') && !label.ends_with('-');
    let plain = |c: char| !c.is_whitespace() && !"@,;:<>()[]\\\"".contains(c);
    text.chars().filter(|c| *c != '@').all(plain)
        && !local.is_empty()
        && !local.contains('@')
        && local.len() <= 64
        && domain.contains('.')
        && domain.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_trimmed_and_bounded() {
        assert_eq!(&*Name::new("  WHITE METAL LANTERN ").unwrap(), "WHITE METAL LANTERN");
        assert_eq!(Name::new(&"é".repeat(200)).unwrap().chars().count(), 200);
        for bad in ["", "  ", "a\0b", "a\nb", &"x".repeat(201)] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_email_has_the_shape_of_one() {
        for good in ["ada@example.com", "a.b+c@sub.example.co.uk", "Ada@Example.com"] {
            assert!(Email::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "ada",
            "@example.com",
            "ada@",
            "ada@example",
            "a b@example.com",
            "a@b@example.com",
            "a@-x.com",
            "a@x..com",
            "a\0@example.com",
            &format!("{}@example.com", "x".repeat(65)),
            &format!("a@{}.com", "x".repeat(254)),
        ] {
            assert!(Email::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_sku_has_no_white_space_but_spaces() {
        for good in ["85123A", "BANK CHARGES", &"x".repeat(64)] {
            assert_eq!(&*Sku::new(good).unwrap(), good);
        }
        for bad in ["", " ", "85\t123", "85\u{a0}123", "85\u{2028}123", &"x".repeat(65)] {
            assert!(Sku::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_email_is_compared_in_lower_case() {
        assert_eq!(Email::new("Ada@Example.COM").unwrap().normalized(), "ada@example.com");
    }
}
