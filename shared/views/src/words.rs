//! Sort keys and search tokens of texts. What an index holds and what a search asks for go through the same functions,
//! so that they match. The invariants: a prefix of a text gives a prefix of its key, and an index holds a bounded
//! number of tokens for a text.

use domain::caseless;
use icu_properties::{
    CodePointMapData,
    props::{GeneralCategory, GeneralCategoryGroup, LineBreak},
};

/// The most characters of a key: as many as a name has, though its compatibility form can be longer.
const MAX_KEY: usize = 200;
/// How many characters of a word count in a search.
const MAX_PREFIX: usize = 16;

/// The key that names are sorted by and matched with prefixes: its first [`MAX_KEY`] characters, whatever the letter
/// case, the spelling and the blanks.
pub(crate) fn normalized(text: &str) -> String {
    let text = caseless(text);
    let single_spaces: Vec<&str> = text.split_whitespace().collect();
    first(&single_spaces.join(" "), MAX_KEY).to_owned()
}

/// A word, or something that is searched like one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Word {
    /// Letters, digits and their marks: found by every beginning.
    Spaced(String),
    /// A run of letters in a script without blanks, such as Chinese, Japanese or Thai: found by any part.
    Unspaced(String),
    /// Something else that can be seen, such as an emoji.
    Symbol(char),
}

/// Splits the text at blanks into pieces, and each piece into words: `T-light 12cm` has two pieces, with two words and
/// one. Pieces without a word are left out.
pub(crate) fn pieces(text: &str) -> Vec<Vec<Word>> {
    caseless(text).split_whitespace().map(words).filter(|words| !words.is_empty()).collect()
}

impl Word {
    /// The tokens that an index holds for the word: all that [`Word::wanted`] returns for any text that is to find it.
    pub(crate) fn held(&self) -> Vec<String> {
        match self {
            Self::Spaced(word) => {
                let ends = word.char_indices().map(|(at, c)| at + c.len_utf8());
                ends.take(MAX_PREFIX).map(|end| word[..end].to_owned()).collect()
            }
            Self::Unspaced(run) => pairs(run).into_iter().chain(run.chars().map(String::from)).collect(),
            Self::Symbol(symbol) => vec![symbol.to_string()],
        }
    }

    /// The tokens that a text must have in the index to be found by this word.
    pub(crate) fn wanted(&self) -> Vec<String> {
        match self {
            Self::Spaced(word) => vec![first(word, MAX_PREFIX).to_owned()],
            Self::Unspaced(run) if run.chars().nth(1).is_none() => vec![run.clone()],
            Self::Unspaced(run) => pairs(run),
            Self::Symbol(symbol) => vec![symbol.to_string()],
        }
    }

    /// How many words it counts for. In scripts without blanks, a word has roughly two letters.
    pub(crate) fn weight(&self) -> usize {
        match self {
            Self::Spaced(_) => 1,
            Self::Unspaced(run) => run.chars().count().div_ceil(2),
            Self::Symbol(_) => 0,
        }
    }
}

fn words(piece: &str) -> Vec<Word> {
    let categories = CodePointMapData::<GeneralCategory>::new();
    let (letters, marks) = (GeneralCategoryGroup::Letter, GeneralCategoryGroup::Mark);
    let mut words = Vec::new();
    // Whether the last word can be continued by the next character.
    let mut goes_on = false;
    for c in piece.chars() {
        let category = categories.get(c);
        match words.last_mut().filter(|_| goes_on) {
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
                goes_on = word.is_some();
                words.extend(word);
            }
        }
    }
    words
}

fn is_spaced(c: char, category: GeneralCategory) -> bool {
    let is_letter = GeneralCategoryGroup::Letter.contains(category);
    GeneralCategoryGroup::Number.contains(category) || is_letter && !is_unspaced(c)
}

/// Whether the script has no blanks between words. Those are the scripts in which a line may break between any two
/// letters, or only where a dictionary says so.
fn is_unspaced(c: char) -> bool {
    let without_blanks = [
        LineBreak::Ideographic,
        LineBreak::ConditionalJapaneseStarter,
        LineBreak::Nonstarter,
        LineBreak::ComplexContext,
        LineBreak::Aksara,
        LineBreak::AksaraPrebase,
        LineBreak::AksaraStart,
    ];
    !c.is_ascii() && without_blanks.contains(&CodePointMapData::<LineBreak>::new().get(c))
}

/// Whether the character is visible, and neither a letter nor a number, mark or punctuation.
fn is_symbol(category: GeneralCategory) -> bool {
    GeneralCategoryGroup::Symbol.contains(category)
        || [GeneralCategory::PrivateUse, GeneralCategory::Unassigned].contains(&category)
}

/// Each pair of neighbouring characters.
fn pairs(run: &str) -> Vec<String> {
    run.chars().zip(run.chars().skip(1)).map(|(one, next)| [one, next].iter().collect()).collect()
}

fn first(text: &str, characters: usize) -> &str {
    text.char_indices().nth(characters).map_or(text, |(end, _)| &text[..end])
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
    fn a_key_is_bounded_and_so_is_what_it_is_compared_with() {
        assert_eq!(normalized(&"\u{fdfa}".repeat(200)).chars().count(), MAX_KEY);
        assert_eq!(normalized(&"ß".repeat(150)), normalized(&"ß".repeat(160)));
    }

    fn words(text: &str) -> Vec<Word> {
        pieces(text).concat()
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
    fn scripts_without_blanks_are_kept_whole_and_apart_from_others() {
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
    fn a_piece_is_what_people_call_a_word() {
        assert_eq!(pieces("don’t T-light o'clock - 東京タワー हिन्दी 12.5cm").len(), 6);
    }

    #[test]
    fn a_word_is_found_by_its_beginnings_and_a_run_by_its_parts() {
        assert_eq!(Spaced("red".into()).held(), ["r", "re", "red"]);
        assert_eq!(Spaced("é".repeat(20)).held().len(), 16);
        assert_eq!(Spaced("é".repeat(18)).wanted(), Spaced("é".repeat(20)).wanted());
        assert_eq!(Unspaced("東京都".into()).held(), ["東京", "京都", "東", "京", "都"]);
        assert_eq!(Unspaced("東京都".into()).wanted(), ["東京", "京都"]);
        assert_eq!(Unspaced("都".into()).wanted(), ["都"]);
    }

    /// Texts with letters of many scripts and what stands between them, and now and then with any character.
    pub(crate) fn text() -> impl Strategy<Value = String> {
        let known = "aB3ßẞσςΣﬁÅé\u{301}\u{323}\u{345}東京ひカーｶﾞไทยี่ที่ำລາວខ្មមြန်हिन्दीक्षि한국\u{1112}\u{1161}שָׁעَ ..-’'+★🎁\u{200d}\u{fe0f}\u{200b}\u{ad}\u{fdfa}㌔½¨  ";
        let c = prop_oneof![
            12 => prop::sample::select(known.chars().collect::<Vec<_>>()),
            1 => any::<char>(),
        ];
        prop::collection::vec(c, 1..40).prop_map(String::from_iter)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_key_is_its_own_key_and_each_of_its_beginnings_is_one(text in text()) {
            let key = normalized(&text);
            prop_assert_eq!(&normalized(&key), &key);
            for (end, _) in key.char_indices() {
                prop_assert!(key.starts_with(&normalized(&key[..end])), "{:?}", &key[..end]);
            }
        }

        #[test]
        fn each_beginning_of_a_word_and_each_part_of_a_run_finds_it(text in text()) {
            for word in words(&text) {
                let held = word.held();
                let parts: Vec<Word> = match &word {
                    Spaced(text) => text.char_indices().map(|(at, c)| Spaced(text[..at + c.len_utf8()].into())).collect(),
                    Unspaced(text) => {
                        let places: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
                        let parts = places.iter().flat_map(|from| places.iter().map(move |to| (*from, *to)));
                        parts.filter(|(from, to)| from < to).map(|(from, to)| Unspaced(text[from..to].into())).collect()
                    }
                    Symbol(symbol) => vec![Symbol(*symbol)],
                };
                for part in parts {
                    prop_assert!(part.wanted().iter().all(|wanted| held.contains(wanted)), "{word:?} {part:?}");
                }
            }
        }
    }
}
