//! Property tests of what a view's documents and digest are, over any sequence of events: the same, however the events
//! are cut into batches, and however often the service starts again in between.

use std::collections::BTreeMap;

use bson::RawDocumentBuf;
use domain::{Aggregates, Id, Recorded, Timestamp, commands, samples};
use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};
use views::{Digest, View, Visitor, document_ids};

use super::Fold;
use crate::document_write::DocumentWrite;

/// A day, so that the events of a history belong to many.
const DAY_MILLIS: i64 = 86_400_000;

/// A command's name, such as `order.create`, and the body of its request.
type Request = (String, Value);

/// What happens after an event has been folded.
#[derive(Clone, Copy, Debug)]
enum Then {
    Nothing,
    /// The open batch is sealed. If another is still being written, that one is finished first.
    Seal,
    /// The sealed batch has been written.
    Written,
    /// The service is killed, and goes on from what is stored.
    Killed,
}

/// What MongoDB has of a view.
#[derive(Clone, Debug, PartialEq)]
struct StoredView {
    documents: BTreeMap<String, RawDocumentBuf>,
    digest: Option<Digest>,
    /// The number of events that are in the documents.
    position: usize,
}

/// A batch that is being written.
struct SealedBatch {
    writes: Vec<DocumentWrite>,
    digest: Option<Digest>,
    position: usize,
}

impl StoredView {
    fn empty() -> Self {
        Self { documents: BTreeMap::new(), digest: Some(Digest::default()), position: 0 }
    }

    fn write(&mut self, batch: SealedBatch) {
        let SealedBatch { writes, digest, position } = batch;
        writes.iter().for_each(|write| write.apply_to(&mut self.documents));
        (self.digest, self.position) = (digest, position);
    }

    /// The digest computed anew from the documents.
    fn recomputed(&self) -> Option<Digest> {
        let mut digest = Digest::default();
        self.documents.values().for_each(|document| digest += Digest::of(document).unwrap());
        Some(digest)
    }
}

/// Folds the events as the projector does.
fn project<V: View>(events: &[Recorded], steps: &[Then]) -> StoredView {
    let mut stored = StoredView::empty();
    let mut fold = Fold::<V>::new(stored.digest);
    let (mut sealed, mut next) = (None, 0);
    let mut steps = steps.iter();
    while let Some(event) = events.get(next) {
        fold_event(&mut fold, &stored, event);
        next += 1;
        match steps.next().unwrap_or(&Then::Nothing) {
            Then::Nothing => {}
            Then::Seal => {
                finish(&mut fold, &mut stored, &mut sealed);
                sealed = Some(seal(&mut fold, next));
            }
            Then::Written => finish(&mut fold, &mut stored, &mut sealed),
            Then::Killed => {
                (fold, sealed, next) = (Fold::new(stored.digest), None, stored.position);
            }
        }
    }
    finish(&mut fold, &mut stored, &mut sealed);
    sealed = Some(seal(&mut fold, next));
    finish(&mut fold, &mut stored, &mut sealed);
    stored
}

fn fold_event<V: View>(fold: &mut Fold<V>, stored: &StoredView, event: &Recorded) {
    let ids = document_ids::<V>(event);
    if V::AGGREGATES.contains(&event.event.aggregate()) && V::creates_document(event) {
        fold.assume_absent(&ids);
    }
    let missing: Vec<_> = fold.missing(&ids).filter_map(|id| stored.documents.get(id).cloned()).collect();
    for document in missing {
        fold.load(document).unwrap();
    }
    fold.apply(event, &ids).unwrap();
}

fn seal<V: View>(fold: &mut Fold<V>, position: usize) -> SealedBatch {
    let writes = fold.seal().unwrap();
    SealedBatch { writes, digest: fold.digest(), position }
}

fn finish<V: View>(fold: &mut Fold<V>, stored: &mut StoredView, sealed: &mut Option<SealedBatch>) {
    if let Some(batch) = sealed.take() {
        stored.write(batch);
        fold.mark_written();
    }
}

/// Events that commands in any order lead to: to a shop of few users, products and orders, and the samples of all
/// aggregates.
fn history() -> impl Strategy<Value = Vec<Recorded>> {
    let request = prop_oneof![4 => shop_request(), 1 => sample_request()];
    vec(request, 1..80).prop_map(|requests| {
        let mut aggregates = Aggregates::default();
        let mut events = Vec::new();
        for (at, (name, body)) in (1..).zip(opening().into_iter().chain(requests)) {
            let command = commands().find(|command| name == format!("{}.{}", command.aggregate, command.verb));
            let parsed = (command.unwrap().parse)(body.to_string().as_bytes(), id(99)).unwrap();
            let now = Timestamp::from_unix_millis(1_700_000_000_000 + at * DAY_MILLIS / 8).unwrap();
            events.extend(aggregates.execute(parsed, None, now).unwrap_or_default());
        }
        for (position, event) in (1..).zip(&mut events) {
            event.position = position;
        }
        events
    })
}

fn opening() -> Vec<Request> {
    let user =
        |n| ("user.register".to_owned(), json!({ "id": id(n), "email": format!("{n}@example.com"), "name": "A" }));
    let product = |n| ("product.create".to_owned(), product(n, 250));
    vec![user(1), user(2), product(11), product(12), product(13)]
}

fn product(n: u128, price: i64) -> Value {
    let price = json!({ "amount": price, "currency": "GBP" });
    json!({ "id": id(n), "sku": format!("S{n}"), "name": "Lantern", "price": price, "stock": 50 })
}

fn shop_request() -> impl Strategy<Value = Request> {
    let line = (11..14_u128, 1..4_i64, prop::option::weighted(0.3, select(vec!["GBP", "EUR"])));
    let lines = vec(line, 1..4).prop_map(|lines| {
        let line = |(product, quantity, currency): (u128, i64, Option<&str>)| {
            let price = currency.map(|currency| json!({ "amount": 99, "currency": currency }));
            json!({ "product": id(product), "quantity": quantity, "unit_price": price })
        };
        lines.into_iter().map(line).collect::<Vec<_>>()
    });
    let create = (21..29_u128, 1..3_u128, lines);
    let create = create.prop_map(|(n, user, lines)| {
        ("order.create".to_owned(), json!({ "id": id(n), "user": id(user), "lines": lines }))
    });
    let about_order = (21..29_u128, select(vec!["pay", "ship", "cancel", "cancel", "delete"]))
        .prop_map(|(n, verb)| (format!("order.{verb}"), json!({ "id": id(n) })));
    let about_product = (11..14_u128, 0..9_i64).prop_map(|(n, number)| match number {
        0 => ("product.delete".to_owned(), json!({ "id": id(n) })),
        1 => ("product.create".to_owned(), product(n, 300)),
        2..5 => ("product.update".to_owned(), json!({ "id": id(n), "name": format!("Lantern {number}") })),
        _ => ("product.restock".to_owned(), json!({ "id": id(n), "quantity": number })),
    });
    let about_user = (1..3_u128, select(vec!["Ada", "Grace"]))
        .prop_map(|(n, name)| ("user.update".to_owned(), json!({ "id": id(n), "name": name })));
    prop_oneof![5 => create, 4 => about_order, 3 => about_product, 1 => about_user]
}

fn sample_request() -> impl Strategy<Value = Request> {
    let samples: Vec<_> = samples()
        .map(|(command, sample)| {
            (format!("{}.{}", command.aggregate, command.verb), serde_json::from_str(sample.request).unwrap())
        })
        .collect();
    select(samples)
}

fn id(n: u128) -> Id {
    Id(uuid::Uuid::from_u128(n))
}

fn steps() -> impl Strategy<Value = Vec<Then>> {
    let step = prop_oneof![
        6 => Just(Then::Nothing),
        4 => Just(Then::Seal),
        3 => Just(Then::Written),
        1 => Just(Then::Killed),
    ];
    vec(step, 0..300)
}

/// Compares the fold of the events that is interrupted by these steps with that of one batch.
struct CheckDigest<'a> {
    events: &'a [Recorded],
    steps: &'a [Then],
    documents: usize,
}

impl Visitor for CheckDigest<'_> {
    fn visit<V: View>(&mut self) {
        let at_once = project::<V>(self.events, &[]);
        assert_eq!(at_once.position, self.events.len());
        assert_eq!(at_once.digest, at_once.recomputed(), "{}", V::NAME);
        assert_eq!(project::<V>(self.events, self.steps), at_once, "{}", V::NAME);
        self.documents += at_once.documents.len();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn documents_and_digest_do_not_depend_on_batches_and_restarts(events in history(), steps in steps()) {
        let mut check = CheckDigest { events: &events, steps: &steps, documents: 0 };
        views::visit(&mut check);
        prop_assert!(check.documents > 0);
    }
}

/// Two different histories have different digests, or the test above would be worth nothing.
#[test]
fn another_history_has_another_digest() {
    struct Digests<'a>(&'a [Recorded], Vec<Option<Digest>>);

    impl Visitor for Digests<'_> {
        fn visit<V: View>(&mut self) {
            self.1.push(project::<V>(self.0, &[]).digest);
        }
    }

    let events = domain::sample_events();
    let digests = [&events[..], &events[..1], &[]].map(|events| {
        let mut digests = Digests(events, vec![]);
        views::visit(&mut digests);
        digests.1
    });
    assert!(digests[0].iter().zip(&digests[2]).all(|(some, none)| some != none), "{digests:?}");
    assert_ne!(digests[0], digests[1]);
    assert!(digests[2].iter().all(|none| *none == Some(Digest::default())));
}
