//! Normal forms of texts for comparison: texts that look the same, or differ only in letter case, have the same form.
//! The invariants: normalisation is idempotent, and texts that Unicode calls equivalent have equal forms. Unicode
//! guarantees that the forms of assigned characters never change, so stored forms stay comparable in later versions.

use std::borrow::Cow;

use icu_casemap::CaseMapper;
use icu_normalizer::{ComposingNormalizerBorrowed, DecomposingNormalizerBorrowed};
use icu_properties::{
    CodePointMapData, CodePointSetData,
    props::{DefaultIgnorableCodePoint, GeneralCategory, NoncharacterCodePoint},
};

/// Characters that are drawn as blank, though their Unicode properties do not say so.
const BLANKS: [char; 5] = ['\u{2800}', '\u{16fe4}', '\u{13441}', '\u{13442}', '\u{1d159}'];

/// The text in NFC, in which letters and their marks are composed where possible.
pub(crate) fn composed(text: &str) -> Cow<'_, str> {
    ComposingNormalizerBorrowed::new_nfc().normalize(text)
}

/// The form for case-sensitive comparison: NFKC, without invisible characters.
pub(crate) fn compatible(text: &str) -> String {
    ComposingNormalizerBorrowed::new_nfkc().normalize(&visible(text)).into_owned()
}

/// The form for caseless comparison: NFKC and full case folding, without invisible characters. The final sigma of a
/// word is folded like any other sigma, so that the form of a prefix is a prefix of the form.
pub fn caseless(text: &str) -> String {
    if text.is_ascii() {
        return text.to_ascii_lowercase();
    }
    // Case folding may yield characters that have a compatibility form, and the other way round, so both are done twice
    // (definition D146 of Unicode).
    let (nfkd, folding) = (DecomposingNormalizerBorrowed::new_nfkd(), CaseMapper::new());
    let once = nfkd.normalize(folding.fold_string(&nfkd.normalize(&visible(text))).as_ref()).into_owned();
    ComposingNormalizerBorrowed::new_nfkc().normalize(&folding.fold_string(&once)).into_owned()
}

/// Whether the character is invisible, and neither white space nor a control character. These are format characters,
/// fillers, joiners and variation selectors.
pub(crate) fn is_invisible(c: char) -> bool {
    !c.is_ascii()
        && (CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(c)
            || CodePointSetData::new::<NoncharacterCodePoint>().contains(c)
            || CodePointMapData::<GeneralCategory>::new().get(c) == GeneralCategory::Format
            || BLANKS.contains(&c))
}

/// Whether Unicode has assigned the character. The forms of an unassigned one may change in a later version.
pub(crate) fn is_assigned(c: char) -> bool {
    c.is_ascii() || CodePointMapData::<GeneralCategory>::new().get(c) != GeneralCategory::Unassigned
}

/// The text without its invisible characters.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    if text.contains(is_invisible) { text.chars().filter(|c| !is_invisible(*c)).collect() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn every_character() -> impl Iterator<Item = char> {
        ('\0'..=char::MAX).filter(|c| is_assigned(*c))
    }

    #[test]
    fn texts_that_people_take_for_the_same_have_the_same_caseless_form() {
        for (one, other) in [
            ("STRASSE", "Straße"),
            ("STRASSE", "STRAẞE"),
            ("\u{212b}ngstrom", "åNGSTROM"),
            ("A\u{30a}", "å"),
            ("\u{fb01}n", "FIN"),
            ("ΣΑΣ", "σας"),
            ("Ἀχιλλεύς", "ἈΧΙΛΛΕΎΣ"),
            ("ᾳ", "ΑΙ"),
            ("ｶﾞｲﾄﾞ", "ガイド"),
            ("㌔", "キロ"),
            ("①", "1"),
            ("x\u{ad}y\u{200b}\u{200d}\u{fe0f}", "XY"),
            ("e\u{34f}\u{301}", "É"),
            ("ꭰ", "Ꭰ"),
            ("\u{3b9}\u{308}\u{301}", "ΐ"),
        ] {
            assert_eq!(caseless(one), caseless(other), "{one} {other}");
        }
        assert_ne!(caseless("e"), caseless("é"));
        assert_ne!(compatible("A"), compatible("a"));
        assert_eq!(compatible("\u{212b}\u{feff}"), "Å");
    }

    #[test]
    fn the_forms_of_every_character_are_idempotent_and_visible_if_the_character_is() {
        for c in every_character() {
            let text = c.to_string();
            for form in [caseless, compatible] {
                let once = form(&text);
                assert_eq!(form(&once), once, "{c:?}");
                assert!(!once.contains(is_invisible), "{c:?}");
                assert_eq!(once.is_empty(), is_invisible(c), "{c:?}");
            }
            assert_eq!(caseless(&text.to_lowercase()), caseless(&text), "{c:?}");
            // Only in Turkish and a few other languages is I its upper case, and the language of a text is unknown.
            assert!(c == 'ı' || caseless(&text.to_uppercase()) == caseless(&text), "{c:?}");
        }
    }

    #[test]
    fn fillers_joiners_and_blanks_are_invisible() {
        let invisible = "\u{ad}\u{34f}\u{61c}\u{115f}\u{1160}\u{17b4}\u{180b}\u{180e}\u{200b}\u{200c}\u{200d}\u{200e}\u{202e}\
            \u{2060}\u{2066}\u{2800}\u{3164}\u{fe00}\u{fe0f}\u{feff}\u{ffa0}\u{fff9}\u{1d159}\u{1d173}\u{e0041}\u{e0100}\u{10ffff}";
        assert!(invisible.chars().all(is_invisible));
        assert!(!"a1 é字ิ\u{301}★🎁\u{e000}".contains(is_invisible));
    }

    /// Texts of letters, marks and invisible characters that interact, with an occasional arbitrary character.
    fn text() -> impl Strategy<Value = String> {
        let c = prop_oneof![
            8 => prop::sample::select("aAeßẞσςΣﬁÅ\u{212b}\u{301}\u{323}\u{30a}\u{345}ᾳΐ가\u{1100}\u{1161}\u{11a8}ｶﾞกำิ่क्षि\u{200d}\u{fe0f}\u{200b} ".chars().collect::<Vec<_>>()),
            1 => any::<char>(),
        ];
        prop::collection::vec(c, 0..12).prop_map(|text| text.into_iter().filter(|c| is_assigned(*c)).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn equivalent_texts_have_equal_forms_and_forms_are_idempotent(text in text()) {
            let nfkc = ComposingNormalizerBorrowed::new_nfkc();
            let (nfd, nfkd) = (DecomposingNormalizerBorrowed::new_nfd(), DecomposingNormalizerBorrowed::new_nfkd());
            for form in [caseless, compatible] {
                let wanted = form(&text);
                prop_assert_eq!(&form(&wanted), &wanted);
                for equivalent in [composed(&text), nfd.normalize(&text)] {
                    prop_assert_eq!(&form(&equivalent), &wanted);
                }
            }
            // Compatibility normalisation may reorder the neighbours of an invisible character, so those are removed
            // first.
            let text = visible(&text).into_owned();
            for form in [caseless, compatible] {
                for equivalent in [nfkc.normalize(&text), nfkd.normalize(&text)] {
                    prop_assert_eq!(form(&equivalent), form(&text));
                }
            }
            prop_assert_eq!(caseless(&text.to_lowercase()), caseless(&text));
        }
    }
}
