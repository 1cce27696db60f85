//! Types of text that are valid by construction: trimmed, in NFC, not empty, bounded in characters, and without control
//! characters (PostgreSQL's text cannot contain a NUL, and a line break in a name is a mistake).
//!
//! These rules are for requests. Stored texts were accepted under earlier rules, which were fewer, and must stay
//! readable. `Deserialize` therefore accepts any text, and the structs of commands use `requested` instead.

use std::{borrow::Cow, fmt, ops::Deref};

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    strict,
    unicode::{caseless, compatible, composed, is_assigned, is_invisible, visible},
};

/// Declares types of text. This is a macro because the types differ only in their names, bounds and rules, and each
/// needs much boilerplate.
macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident {
        max: $max:expr, breaks: $breaks:expr, check: $check:expr, expected: $expected:expr
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The text, trimmed and in NFC.
            ///
            /// # Errors
            /// Says what was expected, if the text breaks one of the rules.
            pub fn new(text: &str) -> Result<Self, InvalidText> {
                let composed = composed(text);
                let text = composed.trim();
                let bounded = !text.is_empty() && text.chars().count() <= $max;
                let check: fn(&str) -> bool = $check;
                if bounded && !text.contains(|c| is_control(c) && !$breaks.contains(&c)) && check(text) {
                    return Ok(Self(text.to_owned()));
                }
                Err(InvalidText($expected))
            }

            /// The text in NFC. Texts of requests always are, but some texts that were stored earlier are not.
            #[must_use]
            pub fn composed(&self) -> Self {
                Self(composed(&self.0).into_owned())
            }

            /// Reads the text of a request by the rules of [`Self::new`], for `deserialize_with`.
            ///
            /// # Errors
            /// Says what was expected.
            pub fn requested<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                strict::text(deserializer, $expected, |text| Self::new(text).ok())
            }

            /// Reads an optional text of a request by the rules of [`Self::new`], for `deserialize_with`.
            ///
            /// # Errors
            /// Says what was expected.
            pub fn requested_if_any<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Self>, D::Error> {
                strict::text_if_any(deserializer, $expected, |text| Self::new(text).ok())
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

        /// Reads a stored text unchanged.
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                strict::text(deserializer, "a text", |text| Some(Self(text.to_owned())))
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

/// The control characters that are allowed in a text of one line.
const NO_BREAKS: [char; 0] = [];
/// The control characters that are allowed in a text of several lines.
const LINE_BREAKS: [char; 2] = ['\n', '\r'];

texts! {
    /// The name of a user or a product. Joiners and similar characters are allowed, since some scripts and emoji need
    /// them.
    Name {
        max: 200,
        breaks: NO_BREAKS,
        check: is_legible,
        expected: "a text of 1 to 200 characters, not all invisible, without control characters"
    }
    /// An e-mail address: a local part of at most 64 bytes, `@` and a domain. It is measured in bytes, as mail servers
    /// do.
    Email {
        max: 254,
        breaks: NO_BREAKS,
        check: is_email,
        expected: "an e-mail address such as ada@example.com, at most 254 bytes, without invisible characters"
    }
    /// A stock-keeping unit, the seller's own code for a product. It is case-sensitive (85123A and 85123a are two
    /// SKUs), and may contain spaces, as real ones do (BANK CHARGES).
    Sku {
        max: 64,
        breaks: NO_BREAKS,
        check: |text| text.chars().all(|c| c == ' ' || is_plain(c)),
        expected: "a SKU of 1 to 64 characters without control characters, invisible ones, or white space other \
            than spaces"
    }
    /// A country, as the name or code that the client uses.
    Country {
        max: 60,
        breaks: NO_BREAKS,
        check: is_legible,
        expected: "a country of 1 to 60 characters, not all invisible, without control characters"
    }
    /// A text of several lines, such as a review or a message. Line endings are kept as they were sent.
    Note {
        max: 2_000,
        breaks: LINE_BREAKS,
        check: is_legible,
        expected: "a text of 1 to 2,000 characters, not all invisible, without control characters but line breaks"
    }
}

/// The error for a text that breaks the rules of its type. It says what was expected.
#[derive(Debug, thiserror::Error)]
#[error("expected {0}")]
pub struct InvalidText(&'static str);

impl Email {
    /// The address in the form in which addresses are compared. Addresses that look the same, or differ only in letter
    /// case (`Ada@Example.com`, `ada@example.com`), have the same form, and so have the two spellings of a non-ASCII
    /// domain.
    pub fn normalized(&self) -> String {
        match self.0.rsplit_once('@') {
            Some((local, domain)) => {
                // A stored address may have a domain that is not valid by the present rules.
                let domain = ascii_domain(&visible(domain)).unwrap_or_else(|| caseless(domain));
                format!("{}@{domain}", caseless(local))
            }
            None => caseless(&self.0),
        }
    }
}

impl Sku {
    /// The code in the form in which codes are compared. Codes that look the same have the same form.
    pub fn normalized(&self) -> String {
        compatible(&self.0)
    }
}

/// Checks the form only. Whether an address works shows when something is sent to it.
fn is_email(text: &str) -> bool {
    let Some((local, domain)) = text.rsplit_once('@') else {
        return false;
    };
    let Some(ascii) = ascii_domain(domain) else {
        return false;
    };
    text.chars().all(|c| is_plain(c) && !",;:<>()[]\\\"".contains(c))
        && (1..=64).contains(&local.len())
        && !local.contains('@')
        && ascii.contains('.')
        && local.len() + 1 + domain.len().max(ascii.len()) <= 254
}

/// The domain in its ASCII form, in which the domain name system compares domains; `None` if the domain is invalid.
fn ascii_domain(domain: &str) -> Option<String> {
    let ascii =
        Uts46::new().to_ascii(domain.as_bytes(), AsciiDenyList::URL, Hyphens::CheckFirstLast, DnsLength::Verify);
    ascii.ok().map(Cow::into_owned)
}

/// Whether the text has a visible character, and no bidirectional control that reorders the text. Such controls can
/// make a name look like another, or disturb the line that shows it.
fn is_legible(text: &str) -> bool {
    text.chars().any(|c| !c.is_whitespace() && !is_invisible(c))
        && !text.contains(|c| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'))
}

/// Whether the character is visible, and no later version of Unicode can change its normal form.
fn is_plain(c: char) -> bool {
    !c.is_whitespace() && !is_invisible(c) && is_assigned(c)
}

/// Whether this is a control character, or one of Unicode's other line breaks.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_note_may_have_several_lines() {
        let text = "Bright.\nA little \u{1f4a1} heavy.\r\n\r\nStill.";
        assert_eq!(&*Note::new(text).unwrap(), text);
        assert!(Name::new(text).is_err() && Country::new(text).is_err() && Sku::new(text).is_err());
        for bad in ["", "\n\n", "a\tb", "a\0b", "a\u{2028}b", "a\u{202e}b", &"x".repeat(2_001)] {
            assert!(Note::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_is_trimmed_and_bounded() {
        assert_eq!(&*Name::new("  WHITE METAL LANTERN ").unwrap(), "WHITE METAL LANTERN");
        assert_eq!(Name::new(&"é".repeat(200)).unwrap().chars().count(), 200);
        for bad in ["", "  ", "a\0b", "a\nb", &"x".repeat(201)] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_email_has_a_local_part_and_a_domain() {
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
    fn the_only_white_space_in_a_sku_is_the_space() {
        for good in ["85123A", "BANK CHARGES", &"x".repeat(64)] {
            assert_eq!(&*Sku::new(good).unwrap(), good);
        }
        for bad in ["", " ", "85\t123", "85\u{a0}123", "85\u{2028}123", &"x".repeat(65)] {
            assert!(Sku::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn texts_are_normalised_to_nfc() {
        assert_eq!(&*Name::new("Cafe\u{301} \u{212b}").unwrap(), "Café Å");
        assert_eq!(&*Sku::new("E\u{301}1").unwrap(), "É1");
        assert_eq!(&*Country::new("Co\u{302}te d’Ivoire").unwrap(), "Côte d’Ivoire");
        assert_eq!(&*Email::new("ame\u{301}lie@example.com").unwrap(), "amélie@example.com");
        // The limit counts composed characters.
        assert!(Name::new(&"e\u{301}".repeat(200)).is_ok() && Name::new(&"e\u{301}".repeat(201)).is_err());
        assert!(Sku::new(&"e\u{301}".repeat(64)).is_ok() && Sku::new(&"é".repeat(65)).is_err());
    }

    #[test]
    fn a_name_may_have_the_invisible_characters_that_scripts_and_emoji_need_but_not_only_those() {
        for good in [
            "👩\u{200d}🚀",
            "❤\u{fe0f}",
            "می\u{200c}خواهم",
            "ක්\u{200d}ෂ",
            "🏴\u{e0067}\u{e0062}\u{e0065}\u{e006e}\u{e0067}\u{e007f}",
            "ภาษา\u{200b}ไทย",
            "C++\u{200e} 5",
            "Sham\u{ad}poo",
            "★",
            "!!!",
        ] {
            assert_eq!(&*Name::new(good).unwrap(), good);
            assert_eq!(&*Country::new(good).unwrap(), good);
        }
        for bad in [
            "\u{200b}",
            "\u{200d}\u{fe0f}",
            "\u{3164}",
            "\u{115f}\u{1160}",
            "\u{ffa0}",
            "\u{2800} \u{2800}",
            "\u{feff}",
            "\u{34f}",
            "\u{e0041}",
            "\u{10ffff}",
            "\u{ad}",
            "gnp\u{202e}exe",
            "a\u{2066}b",
            "a\u{2028}b",
            "a\u{2029}b",
            "a\u{85}b",
        ] {
            assert!(Name::new(bad).is_err() && Country::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_email_and_a_sku_have_no_invisible_characters() {
        for bad in "\u{ad}\u{34f}\u{61c}\u{600}\u{115f}\u{1160}\u{180e}\u{200b}\u{200c}\u{200d}\u{200e}\u{202e}\u{2060}\u{2800}\u{3164}\
            \u{fe0f}\u{feff}\u{ffa0}\u{fff9}\u{fffe}\u{378}\u{e0041}\u{e0100}"
            .chars()
        {
            for text in [format!("{bad}ada@example.com"), format!("a{bad}da@example.com"), format!("ada{bad}@example.com")] {
                assert!(Email::new(&text).is_err(), "{text:?}");
            }
            for text in [format!("ada@{bad}example.com"), format!("ada@exam{bad}ple.com"), format!("ada@example.com{bad}")] {
                assert!(Email::new(&text).is_err(), "{text:?}");
            }
            for text in [format!("{bad}A1"), format!("A{bad}1"), format!("A1{bad}"), bad.to_string()] {
                assert!(Sku::new(&text).is_err(), "{text:?}");
            }
        }
    }

    #[test]
    fn an_email_is_bounded_in_bytes() {
        let local = |local: &str| Email::new(&format!("{local}@example.com")).is_ok();
        assert!(local(&"x".repeat(64)) && !local(&"x".repeat(65)));
        assert!(local(&"é".repeat(32)) && !local(&"é".repeat(33)));
        assert!(local(&"e\u{301}".repeat(32)), "composed first");
        let domain = |labels: usize, last: usize| {
            Email::new(&format!("{}@{}{}.com", "x".repeat(60), "abcdefghi.".repeat(labels), "x".repeat(last))).is_ok()
        };
        assert!(domain(18, 9) && !domain(18, 10), "254 bytes in all");
        let label = |label: &str| Email::new(&format!("a@{label}.com")).is_ok();
        assert!(label(&"x".repeat(63)) && !label(&"x".repeat(64)));
        // The ASCII form of such a label is longer than the label.
        assert!(label("é") && !label(&"éa".repeat(30)));
        let ascii_is_longer = format!("{}@{}com", "x".repeat(60), "ü.".repeat(60));
        assert!(ascii_is_longer.len() < 254 && Email::new(&ascii_is_longer).is_err());
    }

    #[test]
    fn emails_that_look_the_same_are_equal_whatever_their_letter_case() {
        let one = [
            ["Ada@Example.COM", "ada@example.com"],
            ["amélie@example.com", "AME\u{301}LIE@example.com"],
            ["\u{212b}sa@example.com", "åsa@example.com"],
            ["ﬁona@example.com", "FIONA@example.com"],
            ["STRASSE@example.com", "straße@example.com"],
            ["ΣΑΣ@example.com", "σας@example.com"],
            ["ａｄａ@example.com", "ada@example.com"],
            ["ada@münchen.de", "ada@xn--mnchen-3ya.de"],
            ["ada@MU\u{308}NCHEN.de", "ADA@XN--MNCHEN-3YA.DE"],
            ["ada@例え。ｊｐ", "ada@例え.jp"],
        ];
        for [one, other] in one {
            // The ideographic full stop counts as a dot of the domain.
            let normalized = |text: &str| Email::new(text).unwrap_or_else(|_| panic!("{text}")).normalized();
            assert_eq!(normalized(one), normalized(other), "{one} {other}");
            assert!(normalized(one).rsplit_once('@').unwrap().1.is_ascii());
        }
        for [one, other] in [["ada@straße.de", "ada@strasse.de"], ["rene@example.com", "rené@example.com"]] {
            assert_ne!(Email::new(one).unwrap().normalized(), Email::new(other).unwrap().normalized());
        }
    }

    #[test]
    fn skus_that_look_the_same_are_equal_but_letter_case_counts() {
        let normalized = |text: &str| Sku::new(text).unwrap().normalized();
        for [one, other] in [["E\u{301}1", "É1"], ["\u{212b}", "Å"], ["Ａ１", "A1"], ["ﬁ", "fi"], ["ｶﾞ", "ガ"]]
        {
            assert_eq!(normalized(one), normalized(other), "{one} {other}");
        }
        assert_ne!(normalized("85123A"), normalized("85123a"));
        assert_ne!(normalized("É1"), normalized("é1"));
        assert_eq!(normalized("BANK CHARGES"), "BANK CHARGES");
        assert!(normalized(&"\u{fdfa}".repeat(64)).len() < 2_500, "an index of PostgreSQL takes no longer values");
    }

    #[test]
    fn stored_texts_are_read_unchanged() {
        for text in ["", " ", "\u{200b}", "a@b@c", "e\u{301}", "a\u{0}"] {
            let json = serde_json::to_string(text).unwrap();
            assert_eq!(&*serde_json::from_str::<Name>(&json).unwrap(), text);
            assert_eq!(&*serde_json::from_str::<Sku>(&json).unwrap(), text);
            assert_eq!(&*serde_json::from_str::<Country>(&json).unwrap(), text);
            let email: Email = serde_json::from_str(&json).unwrap();
            assert_eq!((&*email, email.normalized().is_empty()), (text, text.is_empty() || text == "\u{200b}"));
        }
    }
}
