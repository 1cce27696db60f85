//! How texts are made comparable: what is stored for an index and what is searched for go through the same functions,
//! so that they meet. Letters are lowered one by one, not as `str::to_lowercase` does it, to which the last sigma of a
//! Greek word is another letter than one with more to come: the beginning of a text must stay its beginning.

/// In lower case and with single spaces: the key that names are sorted by and matched with prefixes.
pub(crate) fn normalized(text: &str) -> String {
    lower(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The words, in lower case: runs of letters and digits of any script.
pub(crate) fn words(text: &str) -> Vec<String> {
    let lower = lower(text);
    lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn lower(text: &str) -> String {
    text.chars().flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_spaces_do_not_matter() {
        assert_eq!(normalized("  Ada \u{a0} LOVELACE "), "ada lovelace");
        assert_eq!(normalized("ÉCLAIR"), "éclair");
        assert!(normalized("ΣΑΣΑ").starts_with(&normalized("ΣΑΣ")));
    }

    #[test]
    fn words_are_runs_of_letters_and_digits() {
        assert_eq!(words("WHITE T-LIGHT holder, 12cm"), ["white", "t", "light", "holder", "12cm"]);
        assert_eq!(words("Ünïque 東京"), ["ünïque", "東京"]);
        assert!(words(" -- !").is_empty());
    }
}
