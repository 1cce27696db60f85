//! The view `products`: every product with its price and stock, and the search for products. The invariant: `_tokens`
//! contains every token of a search for a word of the name or for a prefix of one.

use std::{collections::BTreeSet, time::Duration};

use bson::{Document, doc};
use domain::{
    Amount, Currency, Event, Id, Malformed, Money, Name, Reason, Recorded, Sku, Timestamp, product, strict::Choice,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Inapplicable, Page, Query, QueryRequest, View, absent, present,
    query::{Direction, Key, Limit, List, Plan, get_by, one_of},
    words::{Word, chunks, normalized},
};

/// The largest number of words in a search, separated by white space. Further words are ignored.
const MAX_WORDS: usize = 8;
/// The largest number of tokens in a search. A word may have several, such as the bigrams of a script without spaces.
const MAX_QUERY_TOKENS: usize = 32;
/// The largest number of tokens of a product. It is above what the words of any name can have, so no token is left out.
const MAX_TOKENS: usize = 600;
/// A token that every product has, so that a search without words can use the same indexes.
const MATCH_ALL: &str = "";

pub struct Products;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Product {
    #[serde(rename = "_id", alias = "id")]
    pub id: Id,
    pub sku: Sku,
    pub name: Name,
    pub price: Money,
    /// The number of pieces.
    pub stock: i64,
    pub in_stock: bool,
    pub version: u64,
    pub updated_at: Timestamp,
    #[serde(rename = "_sku", default)]
    normalized_sku: String,
    #[serde(rename = "_name", default)]
    normalized_name: String,
    /// The number of words in the name, followed by the normalised name. The fewer words a name has, the larger the
    /// part of it that a search matches.
    #[serde(rename = "_rank", default)]
    rank: String,
    #[serde(rename = "_tokens", default)]
    tokens: BTreeSet<String>,
}

impl View for Products {
    const NAME: &'static str = "products";
    const VERSION: i32 = 2;
    type Document = Product;
    const BATCH_WINDOW: Duration = Duration::from_millis(100);
    const AGGREGATES: &'static [&'static str] = &[product::KIND];

    fn creates_document(event: &Recorded) -> bool {
        matches!(event.event, Event::Product(product::Event::Created(_)))
    }

    fn evolve(document: Option<Product>, id: &str, event: &Recorded) -> Result<Option<Product>, Inapplicable> {
        let Event::Product(product_event) = &event.event else { return Ok(document) };
        match product_event {
            product::Event::Created(created) => {
                absent(document.as_ref(), id)?;
                Ok(Some(Product::created(event, created)))
            }
            product::Event::Updated(product::Updated { sku, name, price }) => {
                let (sku, name, price) = (sku.clone(), name.clone(), *price);
                let before = present(document, id)?;
                let product = Product { sku, name, price, version: event.version, updated_at: event.at, ..before };
                Ok(Some(product.indexed()))
            }
            product::Event::Restocked(product::Restocked { stock, .. })
            | product::Event::StockTaken(product::StockTaken { stock, .. })
            | product::Event::StockReturned(product::StockReturned { stock, .. }) => {
                let (stock, in_stock, before) = (*stock, *stock > 0, present(document, id)?);
                Ok(Some(Product { stock, in_stock, version: event.version, updated_at: event.at, ..before }))
            }
            product::Event::Deleted(product::Deleted {}) => present(document, id).map(|_| None),
        }
    }

    fn indexes() -> Vec<Document> {
        // The index is not unique, because a SKU may pass from one product to another within a batch, whose writes are
        // unordered.
        vec![doc! { "_sku": 1 }, index(Sort::Relevance), index(Sort::Name), index(Sort::Price)]
    }

    const QUERIES: &'static [Query] = &[
        Query::of::<GetProduct>(
            "A product by its id or SKU",
            get,
            &[r#"{"id":"00000000-0000-0000-0000-000000000011"}"#, r#"{"sku":"71053"}"#],
        ),
        Query::of::<SearchProducts>(
            "Products by words of the name, price and stock, sorted by relevance, name or price, in pages",
            search,
            &[
                r#"{"text":"lan","price_min":1,"price_max":1000,"currency":"GBP","in_stock":true,"sort":"name","order":"asc"}"#,
                r#"{"text":"white lan","sort":"relevance"}"#,
            ],
        ),
    ];
}

impl Product {
    fn created(event: &Recorded, created: &product::Created) -> Self {
        let product::Created { sku, name, price, stock } = created.clone();
        let product = Self {
            id: event.id,
            sku,
            name,
            price,
            stock,
            in_stock: stock > 0,
            version: event.version,
            updated_at: event.at,
            normalized_sku: String::new(),
            normalized_name: String::new(),
            rank: String::new(),
            tokens: BTreeSet::new(),
        };
        product.indexed()
    }

    /// Derives the fields for the indexes from the SKU and the name.
    fn indexed(mut self) -> Self {
        self.normalized_sku = self.sku.normalized();
        let words = chunks(&self.name).concat();
        self.normalized_name = normalized(&self.name);
        // Three digits are enough. The rank is a single text because with two keys, a page would have to scan all
        // products with the same number of words to find its start.
        let word_count = words.iter().map(Word::word_count).sum::<usize>().min(999);
        self.rank = format!("{word_count:03}/{}", self.normalized_name);
        self.tokens = BTreeSet::from([MATCH_ALL.to_owned()]);
        for token in words.iter().flat_map(Word::index_tokens) {
            if self.tokens.len() < MAX_TOKENS {
                self.tokens.insert(token);
            }
        }
        self
    }
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = one_of("sku")))]
pub struct GetProduct {
    pub id: Option<Id>,
    #[serde(default, deserialize_with = "Sku::requested_if_any")]
    pub sku: Option<Sku>,
}

impl QueryRequest for GetProduct {
    const NOUN: &'static str = "product";
    const VERB: &'static str = "get";
    type Reply = Product;
}

fn get(body: &[u8]) -> Result<Plan, Malformed> {
    let GetProduct { id, sku } = domain::parse(body)?;
    let key = |sku: Sku| Key { field: "_sku", value: sku.normalized(), requested: sku.to_string() };
    get_by(id, "sku", sku.map(key))
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Sort {
    Relevance,
    Name,
    Price,
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SearchProducts {
    /// Words, of which the first 8 count. Each is to be a word of the name or the beginning of one, in any letter case,
    /// spelling and order, as far as its first 16 characters; in scripts without blanks, any part of the name.
    #[serde(default, deserialize_with = "Name::requested_if_any")]
    pub text: Option<Name>,
    /// The lowest price, in minor units; with `currency`.
    pub price_min: Option<Amount>,
    /// The highest price, in minor units; with `currency`.
    pub price_max: Option<Amount>,
    /// Products only that are priced in this currency. Needed with `price_min`, `price_max` and `sort` by `price`.
    pub currency: Option<Currency>,
    /// Products only that are in stock, or only those that are not.
    pub in_stock: Option<bool>,
    /// If absent: by relevance with `text`, by name without. The most relevant are those with the fewest other words.
    pub sort: Option<Choice<Sort>>,
    /// Ascending if absent. Not with `sort` by `relevance`, whose best always come first.
    pub order: Option<Choice<Direction>>,
    pub limit: Option<Limit>,
    /// The `next` of the reply before.
    pub cursor: Option<String>,
}

impl QueryRequest for SearchProducts {
    const NOUN: &'static str = "product";
    const VERB: &'static str = "search";
    type Reply = Page<Product>;
}

fn search(body: &[u8]) -> Result<Plan, Malformed> {
    let SearchProducts { text, price_min, price_max, currency, in_stock, sort, order, limit, cursor } =
        domain::parse(body)?;
    let sort = sort.map(|Choice(sort)| sort);
    let mut filter = doc! { "_tokens": { "$all": query_tokens(text.as_deref())? } };
    if let Some(in_stock) = in_stock {
        filter.insert("in_stock", in_stock);
    }
    match currency {
        Some(currency) => {
            filter.insert("price.currency", currency.as_str());
        }
        None if price_min.is_some() || price_max.is_some() || sort == Some(Sort::Price) => {
            return Err(Malformed::new("currency", Reason::Missing, "a currency, as prices of one are compared"));
        }
        None => {}
    }
    if price_min.is_some() || price_max.is_some() {
        filter.insert("price.amount", range(price_min, price_max)?);
    }
    let sort = match (sort, &text) {
        (Some(Sort::Relevance), None) => {
            return Err(Malformed::new("text", Reason::Missing, "words, as relevance is to them"));
        }
        (Some(sort), _) => sort,
        (None, Some(_)) => Sort::Relevance,
        (None, None) => Sort::Name,
    };
    let keys: &[&str] = match sort {
        Sort::Relevance if order.is_some() => {
            return Err(Malformed::new("order", Reason::Unexpected, "it only with `sort` by `name` or `price`"));
        }
        Sort::Relevance => &["_rank", "_id"],
        Sort::Name => &["_name", "_id"],
        Sort::Price => &["price.amount", "_id"],
    };
    let sorted = order.map_or(Direction::Asc, |Choice(order)| order).over(keys);
    List::page("product.search", filter, sorted, index(sort), limit, cursor.as_deref()).map(Plan::List)
}

/// The index in the order of the sort. The sort keys are followed by the other fields that filters use.
fn index(sort: Sort) -> Document {
    match sort {
        Sort::Relevance => doc! {
            "_tokens": 1, "_rank": 1, "_id": 1, "in_stock": 1, "price.currency": 1, "price.amount": 1,
        },
        Sort::Name => doc! {
            "_tokens": 1, "_name": 1, "_id": 1, "in_stock": 1, "price.currency": 1, "price.amount": 1,
        },
        Sort::Price => doc! { "_tokens": 1, "price.currency": 1, "price.amount": 1, "_id": 1, "in_stock": 1 },
    }
}

/// The tokens that a product must have to be found, without repetitions.
///
/// # Errors
/// If the text has no letter, digit or symbol.
fn query_tokens(text: Option<&str>) -> Result<Vec<String>, Malformed> {
    let Some(text) = text else {
        return Ok(vec![MATCH_ALL.to_owned()]);
    };
    let (symbols, mut words): (Vec<Word>, Vec<Word>) =
        first_words(text).into_iter().partition(|word| matches!(word, Word::Symbol(_)));
    // Symbols are mostly ornaments or units, so they count only if there are no words.
    if words.is_empty() {
        words = symbols;
    }
    let tokens: BTreeSet<String> = words.iter().flat_map(Word::query_tokens).take(MAX_QUERY_TOKENS).collect();
    if tokens.is_empty() {
        return Err(Malformed::new("text", Reason::Invalid, "at least one letter, digit or symbol"));
    }
    Ok(tokens.into_iter().collect())
}

/// The words in the first [`MAX_WORDS`] distinct chunks of the text.
fn first_words(text: &str) -> Vec<Word> {
    let mut first: Vec<Vec<Word>> = Vec::new();
    for chunk in chunks(text) {
        if first.len() < MAX_WORDS && !first.contains(&chunk) {
            first.push(chunk);
        }
    }
    first.concat()
}

fn range(min: Option<Amount>, max: Option<Amount>) -> Result<Document, Malformed> {
    let mut range = Document::new();
    if let Some(Amount(min)) = min {
        range.insert("$gte", min);
    }
    if let Some(Amount(max)) = max {
        if min.is_some_and(|Amount(min)| min > max) {
            return Err(Malformed::new("price_max", Reason::OutOfBounds, "`price_min` or more"));
        }
        range.insert("$lte", max);
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        given::{
            self, created, line, page, placed, product_deleted, product_updated, refusal, restocked, stock_returned,
            stock_taken,
        },
        words,
    };

    const ID: &str = "00000000-0000-0000-0000-000000000001";

    fn fold(events: &[Recorded]) -> Option<Product> {
        given::fold::<Products>(ID, events)
    }

    #[test]
    fn a_created_product_has_every_prefix_of_its_words_as_a_token() {
        let product = fold(&[created(1, "Red  T-LIGHT", 255, 3)]).unwrap();
        assert_eq!(
            serde_json::to_string(&product).unwrap(),
            r#"{"_id":"00000000-0000-0000-0000-000000000001","sku":"S1","name":"Red  T-LIGHT","price":{"amount":255,"currency":"GBP"},"stock":3,"in_stock":true,"version":1,"updated_at":"2011-01-01T00:00:00.000Z","_sku":"S1","_name":"red t-light","_rank":"003/red t-light","_tokens":["","l","li","lig","ligh","light","r","re","red","t"]}"#
        );
    }

    #[test]
    fn the_tokens_of_a_long_word_have_up_to_sixteen_characters() {
        let product = fold(&[created(1, &"é".repeat(20), 255, 0)]).unwrap();
        let lengths: Vec<usize> = product.tokens.iter().map(|token| token.chars().count()).collect();
        assert_eq!(lengths, (0..=16).collect::<Vec<_>>());
        assert!(!product.in_stock);
    }

    /// Whether a search for the text finds a product of this name.
    fn finds(text: &str, name: &str) -> bool {
        let product = fold(&[created(1, name, 255, 3)]).unwrap();
        query_tokens(Some(text)).unwrap().iter().all(|token| product.tokens.contains(token))
    }

    #[test]
    fn a_search_finds_texts_that_people_take_for_the_same() {
        for (text, name) in [
            ("STRASSE", "Straße 5"),
            ("straße", "STRASSE"),
            ("\u{212b}", "Ångström"),
            ("angstro\u{308}m", "ANGSTRÖM"),
            ("ﬁ", "Fish"),
            ("fish", "ﬁsh"),
            ("ΣΑΣ", "σασα"),
            ("１２cm", "12CM"),
            ("हिन्दी", "किताब हिन्दी"),
            ("หนังสือ", "ซื้อหนังสือที่นี่"),
            ("ที่นี่", "ซื้อหนังสือที่นี่"),
            ("ือ", "ซื้อ"),
            ("タワー", "東京タワー"),
            ("ﾀﾜｰ", "東京タワー"),
            ("京", "東京タワー"),
            ("手机", "红色iPhone手机壳"),
            ("iphone", "红色iPhone手机壳"),
            ("ភាសា", "រៀនភាសាខ្មែរ"),
            ("စာ", "မြန်မာစာ"),
            ("ລາວ", "ພາສາລາວ"),
            ("🎁", "Box 🎁"),
            ("box 🎁", "Box"),
            ("don’t", "Don’t panic"),
            ("Donaudampfschifffahrtsges", "Donaudampfschifffahrtsgesellschaft"),
        ] {
            assert!(finds(text, name), "{text} {name}");
        }
        for (text, name) in [
            ("antern", "lantern"),
            ("京東", "東京タワー"),
            ("ไทย", "ซื้อหนังสือ"),
            ("rene", "rémy"),
            ("🎁", "Box"),
            ("क", "हिन्दी"),
        ] {
            assert!(!finds(text, name), "{text} {name}");
        }
    }

    #[test]
    fn a_search_ignores_words_after_the_eighth() {
        assert!(finds("a b c d e f g h i", "a b c d e f g h"));
        assert!(finds("a a a a a a a a b", "a b") && !finds("a a a a a a a a b", "a c"));
        let eight = "don’t can’t won’t isn’t aren’t wasn’t T-light";
        assert!(finds(&format!("{eight} lamp"), &format!("{eight} lamp")));
        assert!(!finds(&format!("{eight} lamp"), &format!("{eight} table")));
        let devanagari = "हिन्दी किताब नई दिल्ली में मिलती है";
        assert!(!finds(&format!("{devanagari} यहाँ"), devanagari));
    }

    #[test]
    fn the_index_fields_of_a_product_are_bounded() {
        let names = ["\u{fdfa}", "㌖", "東", "ß", "ab c-", "🎁", "ก", "a\u{301}"];
        let varied: String = ('\u{3300}'..).filter(|c| !c.is_control()).take(200).collect();
        for name in names.map(|part| part.chars().cycle().take(200).collect()).into_iter().chain([varied]) {
            let name: String = name;
            let product = fold(&[created(1, &name, 255, 3)]).unwrap();
            assert!(product.tokens.len() <= MAX_TOKENS);
            assert!(product.tokens.iter().all(|token| token.chars().count() <= 16));
            assert!(product.rank.chars().count() <= 204 && product.normalized_name.chars().count() <= 200);
            assert!(query_tokens(Some(&name)).unwrap().len() <= MAX_QUERY_TOKENS);
            assert!(finds(&name, &name));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_name_is_found_by_its_own_text(text in words::arbitrary_text()) {
            let Ok(name) = Name::new(&text) else { return Ok(()) };
            if query_tokens(Some(&name)).is_ok() {
                prop_assert!(finds(&name, &name));
                prop_assert!(finds(&name.to_lowercase(), &name));
                prop_assert!(finds(&normalized(&name), &name));
            }
        }
    }

    #[test]
    fn an_update_changes_the_fields_of_its_event_and_the_tokens() {
        let product = fold(&[created(1, "Red lamp", 255, 3), product_updated(1, 2, "Blue", 300)]).unwrap();
        assert_eq!((&*product.name, product.price.amount, product.stock, product.version), ("Blue", 300, 3, 2));
        assert_eq!(product.tokens.iter().collect::<Vec<_>>(), ["", "b", "bl", "blu", "blue"]);
        assert_eq!((&*product.rank, &*product.normalized_name), ("001/blue", "blue"));
    }

    #[test]
    fn the_stock_is_that_of_the_last_event() {
        let mut events = vec![created(1, "Red", 255, 0)];
        for (event, stock) in [
            (restocked(1, 2, 5), 5),
            (stock_taken(1, 3, 1), 1),
            (stock_taken(1, 4, 0), 0),
            (stock_returned(1, 5, 4), 4),
        ] {
            events.push(event);
            let product = fold(&events).unwrap();
            assert_eq!((product.stock, product.in_stock), (stock, stock > 0));
            assert_eq!(product.version, events.len() as u64);
        }
        events.push(product_deleted(1, 6));
        assert_eq!(fold(&events), None);
    }

    #[test]
    fn events_that_do_not_fit_are_inapplicable() {
        let product = fold(&[created(1, "Red", 255, 0)]);
        assert!(Products::evolve(product, ID, &created(1, "Red", 255, 0)).is_err());
        for event in [
            product_updated(1, 2, "Blue", 1),
            restocked(1, 2, 5),
            stock_taken(1, 2, 1),
            stock_returned(1, 2, 1),
            product_deleted(1, 2),
        ] {
            assert!(Products::evolve(None, ID, &event).is_err(), "{event:?}");
        }
    }

    #[test]
    fn an_event_of_an_order_changes_no_product() {
        assert!(crate::document_ids::<Products>(&placed(7, 9, "2010-12-01T08:26:00Z", vec![line(1, 1, 1)])).is_empty());
    }

    #[test]
    fn all_products_are_listed_by_name() {
        let page = page(search, "");
        assert_eq!(page.filter, doc! { "_tokens": { "$all": [""] } });
        assert_eq!(page.sort, doc! { "_name": 1, "_id": 1 });
    }

    #[test]
    fn a_search_requires_all_of_its_words_and_sorts_by_the_length_of_names() {
        let page = page(search, r#"{"text":" T-Light  hanging, hanging "}"#);
        assert_eq!(page.filter, doc! { "_tokens": { "$all": ["hanging", "light", "t"] } });
        assert_eq!(page.sort, doc! { "_rank": 1, "_id": 1 });
    }

    #[test]
    fn all_filters_can_be_combined_with_every_sort() {
        for sort in ["relevance", "name", "price"] {
            let body = format!(
                r#"{{"text":"red","price_min":100,"price_max":100,"currency":"GBP","in_stock":false,"sort":"{sort}"}}"#
            );
            let page = page(search, &body);
            assert_eq!(
                page.filter,
                doc! {
                    "_tokens": { "$all": ["red"] },
                    "in_stock": false,
                    "price.currency": "GBP",
                    "price.amount": { "$gte": 100_i64, "$lte": 100_i64 },
                }
            );
            assert!(Products::indexes().contains(&page.hint));
        }
    }

    #[test]
    fn refusals_name_the_field() {
        for (body, field) in [
            (r#"{"text":""}"#, "text"),
            (r#"{"text":"--"}"#, "text"),
            (r#"{"text":"\u200b"}"#, "text"),
            (r#"{"sort":"relevance"}"#, "text"),
            (r#"{"price_min":1}"#, "currency"),
            (r#"{"price_max":1}"#, "currency"),
            (r#"{"sort":"price"}"#, "currency"),
            (r#"{"currency":"GBP","price_min":-1}"#, "price_min"),
            (r#"{"currency":"GBP","price_max":1000000000000001}"#, "price_max"),
            (r#"{"currency":"GBP","price_max":1.5}"#, "price_max"),
            (r#"{"currency":"GBP","price_min":2,"price_max":1}"#, "price_max"),
            (r#"{"text":"a","order":"desc"}"#, "order"),
            (r#"{"in_stock":"yes"}"#, "in_stock"),
            (r#"{"limit":1000}"#, "limit"),
            (r#"{"cursor":"zz"}"#, "cursor"),
            (r#"{"words":"a"}"#, "words"),
        ] {
            assert_eq!(refusal(search, body), field, "{body}");
        }
    }
}
