//! Normalisation and tokenisation of names. Stored names and searches go through the same functions, so that they
//! match. The invariants: the normal form of a prefix is a prefix of the normal form, and the index entries of a text
//! are bounded.

use domain::caseless;
use icu_properties::{
    CodePointMapData,
    props::{GeneralCategory, GeneralCategoryGroup, LineBreak},
};

/// The largest number of characters in a normalised name. It is the limit of names, whose compatibility forms can be
/// longer.
const MAX_NORMALIZED_CHARS: usize = 200;
/// The largest number of characters in a token, which is a prefix of a word.
const MAX_PREFIX_CHARS: usize = 16;

/// The form of a name for sorting and for matching prefixes: the first [`MAX_NORMALIZED_CHARS`] characters of its
/// caseless form, with single spaces.
pub(crate) fn normalized(text: &str) -> String {
    let text = caseless(text);
    let single_spaces: Vec<&str> = text.split_whitespace().collect();
    prefix(&single_spaces.join(" "), MAX_NORMALIZED_CHARS).to_owned()
}

/// A part of a text that is searched for as a whole.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Word {
    /// A word of letters, digits and their marks. It is found by its prefixes.
    Spaced(String),
    /// A run of letters in a script without spaces, such as Chinese, Japanese or Thai. It is found by its substrings.
    Unspaced(String),
    /// Another visible character, such as an emoji.
    Symbol(char),
}

/// The words of the text, grouped by the chunks between white space: `T-light 12cm` has a chunk of two words and a
/// chunk of one. Chunks without words are left out.
pub(crate) fn chunks(text: &str) -> Vec<Vec<Word>> {
    caseless(text).split_whitespace().map(words).filter(|words| !words.is_empty()).collect()
}

impl Word {
    /// The tokens that the index has for the word. They include [`Word::query_tokens`] of every word that finds this
    /// one.
    pub(crate) fn index_tokens(&self) -> Vec<String> {
        match self {
            Self::Spaced(word) => {
                let ends = word.char_indices().map(|(start, c)| start + c.len_utf8());
                ends.take(MAX_PREFIX_CHARS).map(|end| word[..end].to_owned()).collect()
            }
            Self::Unspaced(run) => bigrams(run).into_iter().chain(run.chars().map(String::from)).collect(),
            Self::Symbol(symbol) => vec![symbol.to_string()],
        }
    }

    /// The tokens that the index must have for a text to match this word of a search.
    pub(crate) fn query_tokens(&self) -> Vec<String> {
        match self {
            Self::Spaced(word) => vec![prefix(word, MAX_PREFIX_CHARS).to_owned()],
            Self::Unspaced(run) if run.chars().nth(1).is_none() => vec![run.clone()],
            Self::Unspaced(run) => bigrams(run),
            Self::Symbol(symbol) => vec![symbol.to_string()],
        }
    }

    /// The length in words. In scripts without spaces a word has roughly two letters.
    pub(crate) fn word_count(&self) -> usize {
        match self {
            Self::Spaced(_) => 1,
            Self::Unspaced(run) => run.chars().count().div_ceil(2),
            Self::Symbol(_) => 0,
        }
    }
}

/// The words of a chunk, which is already in caseless form.
fn words(chunk: &str) -> Vec<Word> {
    let categories = CodePointMapData::<GeneralCategory>::new();
    let (letters, marks) = (GeneralCategoryGroup::Letter, GeneralCategoryGroup::Mark);
    let mut words = Vec::new();
    // Whether the next character may continue the last word.
    let mut can_continue = false;
    for c in chunk.chars() {
        let category = categories.get(c);
        match words.last_mut().filter(|_| can_continue) {
            // A mark belongs to the letter before it.
            Some(Word::Spaced(word) | Word::Unspaced(word)) if marks.contains(category) => word.push(c),
            Some(Word::Unspaced(word)) if letters.contains(category) && is_unspaced(c) => word.push(c),
            Some(Word::Spaced(word)) if is_spaced(c, category) => word.push(c),
            Some(Word::Spaced(_) | Word::Unspaced(_) | Word::Symbol(_)) | None => {
                let word = if letters.contains(category) && is_unspaced(c) {
                    Some(Word::Unspaced(c.into()))
                } else if is_spaced(c, category) || marks.contains(category) {
                    Some(Word::Spaced(c.into()))
                } else if is_symbol(category) {
                    Some(Word::Symbol(c))
                } else {
                    None
                };
                can_continue = word.is_some();
                words.extend(word);
            }
        }
    }
    words
}

/// Whether the character belongs to a word of a script with spaces.
fn is_spaced(c: char, category: GeneralCategory) -> bool {
    let is_letter = GeneralCategoryGroup::Letter.contains(category);
    GeneralCategoryGroup::Number.contains(category) || is_letter && !is_unspaced(c)
}

/// Whether the character belongs to a script without spaces. These are the scripts in which a line may break between
/// any two letters, or only where a dictionary allows it.
fn is_unspaced(c: char) -> bool {
    let classes_without_spaces = [
        LineBreak::Ideographic,
        LineBreak::ConditionalJapaneseStarter,
        LineBreak::Nonstarter,
        LineBreak::ComplexContext,
        LineBreak::Aksara,
        LineBreak::AksaraPrebase,
        LineBreak::AksaraStart,
    ];
    !c.is_ascii() && classes_without_spaces.contains(&CodePointMapData::<LineBreak>::new().get(c))
}

/// Whether the character is visible, but is not a letter, number, mark or punctuation.
fn is_symbol(category: GeneralCategory) -> bool {
    GeneralCategoryGroup::Symbol.contains(category)
        || [GeneralCategory::PrivateUse, GeneralCategory::Unassigned].contains(&category)
}

/// All pairs of adjacent characters.
fn bigrams(run: &str) -> Vec<String> {
    run.chars().zip(run.chars().skip(1)).map(|(one, next)| [one, next].iter().collect()).collect()
}

/// The first characters of the text.
fn prefix(text: &str, max_chars: usize) -> &str {
    text.char_indices().nth(max_chars).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
pub(crate) use tests::text as arbitrary_text;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        Word::{Spaced, Symbol, Unspaced},
        *,
    };

    #[test]
    fn case_spelling_and_spaces_do_not_matter() {
        assert_eq!(normalized("  Ada \u{a0} LOVELACE "), "ada lovelace");
        assert_eq!(normalized("E\u{301}CLAIR"), "éclair");
        assert_eq!(normalized("Straße\u{3000}１２"), "strasse 12");
        assert_eq!(normalized("\u{212b}"), normalized("å"));
        assert!(normalized("ΣΑΣΑ").starts_with(&normalized("ΣΑΣ")));
        assert!(normalized("Straße").starts_with(&normalized("STRAS")));
    }

    #[test]
    fn a_normalised_name_is_bounded() {
        assert_eq!(normalized(&"\u{fdfa}".repeat(200)).chars().count(), MAX_NORMALIZED_CHARS);
        assert_eq!(normalized(&"ß".repeat(150)), normalized(&"ß".repeat(160)));
    }

    fn words(text: &str) -> Vec<Word> {
        chunks(text).concat()
    }

    #[test]
    fn words_are_runs_of_letters_digits_and_their_marks() {
        let spaced = |text: &str| {
            let spaced = |word: Word| match word {
                Spaced(word) => word,
                other => panic!("{other:?}"),
            };
            words(text).into_iter().map(spaced).collect::<Vec<_>>()
        };
        assert_eq!(spaced("WHITE T-LIGHT holder, 12cm"), ["white", "t", "light", "holder", "12cm"]);
        assert_eq!(spaced("Ünïque x² ﬁne™"), ["ünïque", "x2", "finetm"]);
        assert_eq!(spaced("हिन्दी किताब"), ["हिन्दी", "किताब"]);
        assert_eq!(spaced("শুভ சென்னை"), ["শুভ", "சென்னை"]);
        assert_eq!(spaced("שָׁלוֹם عَرَبِيّ"), ["שָׁלוֹם", "عَرَبِيّ"]);
        assert_eq!(spaced("می\u{200c}خواهم"), ["میخواهم"]);
        assert_eq!(spaced("한국어 책"), ["한국어", "책"]);
        assert_eq!(spaced("x\u{323}\u{301}y q\u{301}"), ["x\u{323}\u{301}y", "q\u{301}"]);
        assert!(words(" -- !").is_empty());
    }

    #[test]
    fn runs_in_scripts_without_spaces_are_kept_whole_and_apart_from_other_words() {
        for run in ["東京タワー", "ひらがな", "ภาษาไทยที่นี่", "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာစာ", "々〆ゝ"]
        {
            let [Unspaced(found)] = &words(run)[..] else { panic!("{run} {:?}", words(run)) };
            assert_eq!(*found, caseless(run));
        }
        let (spaced, unspaced) = (|text: &str| Spaced(text.into()), |text: &str| Unspaced(text.into()));
        assert_eq!(words("iPhone手机15ｶﾞｲﾄﾞ"), [spaced("iphone"), unspaced("手机"), spaced("15"), unspaced("ガイド")]);
        assert_eq!(words("👩\u{200d}🚀 C+"), [Symbol('👩'), Symbol('🚀'), spaced("c"), Symbol('+')]);
        assert_eq!(words("★1\u{fe0f}\u{20e3}"), [Symbol('★'), spaced("1\u{20e3}")]);
    }

    #[test]
    fn a_chunk_is_what_people_call_a_word() {
        assert_eq!(chunks("don’t T-light o'clock - 東京タワー हिन्दी 12.5cm").len(), 6);
    }

    #[test]
    fn the_tokens_of_a_word_are_prefixes_and_those_of_a_run_are_bigrams() {
        assert_eq!(Spaced("red".into()).index_tokens(), ["r", "re", "red"]);
        assert_eq!(Spaced("é".repeat(20)).index_tokens().len(), 16);
        assert_eq!(Spaced("é".repeat(18)).query_tokens(), Spaced("é".repeat(20)).query_tokens());
        assert_eq!(Unspaced("東京都".into()).index_tokens(), ["東京", "京都", "東", "京", "都"]);
        assert_eq!(Unspaced("東京都".into()).query_tokens(), ["東京", "京都"]);
        assert_eq!(Unspaced("都".into()).query_tokens(), ["都"]);
    }

    /// Texts of letters from many scripts and the characters between them, with an occasional arbitrary character.
    pub(crate) fn text() -> impl Strategy<Value = String> {
        let characters = "aB3ßẞσςΣﬁÅé\u{301}\u{323}\u{345}東京ひカーｶﾞไทยี่ที่ำລາວខ្មមြန်हिन्दीक्षि한국\u{1112}\u{1161}שָׁעَ ..-’'+★🎁\u{200d}\u{fe0f}\u{200b}\u{ad}\u{fdfa}㌔½¨  ";
        let c = prop_oneof![
            12 => prop::sample::select(characters.chars().collect::<Vec<_>>()),
            1 => any::<char>(),
        ];
        prop::collection::vec(c, 1..40).prop_map(String::from_iter)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn normalisation_is_idempotent_and_keeps_prefixes(text in text()) {
            let normal = normalized(&text);
            prop_assert_eq!(&normalized(&normal), &normal);
            for (end, _) in normal.char_indices() {
                prop_assert!(normal.starts_with(&normalized(&normal[..end])), "{:?}", &normal[..end]);
            }
        }

        #[test]
        fn each_prefix_finds_a_word_and_each_substring_finds_a_run(text in text()) {
            for word in words(&text) {
                let indexed = word.index_tokens();
                let parts: Vec<Word> = match &word {
                    Spaced(text) => text.char_indices().map(|(start, c)| Spaced(text[..start + c.len_utf8()].into())).collect(),
                    Unspaced(text) => {
                        let ends: Vec<usize> = text.char_indices().map(|(start, _)| start).chain([text.len()]).collect();
                        let parts = ends.iter().flat_map(|from| ends.iter().map(move |to| (*from, *to)));
                        parts.filter(|(from, to)| from < to).map(|(from, to)| Unspaced(text[from..to].into())).collect()
                    }
                    Symbol(symbol) => vec![Symbol(*symbol)],
                };
                for part in parts {
                    prop_assert!(part.query_tokens().iter().all(|token| indexed.contains(token)), "{word:?} {part:?}");
                }
            }
        }
    }
}
