//! Tests that views apply whatever the domain accepts: any sequence of accepted commands, fields at the ends of their
//! ranges, and sums beyond 64 bits. The commands are generated from their schemas, so new commands and new views are
//! covered automatically.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
};

use bson::RawDocumentBuf;
use domain::{Aggregates, Command, CommandType, Recorded, Timestamp};
use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::{
    View, Visitor, document_ids, given,
    request_generators::{self, ids},
    visit,
};

/// The limit of MongoDB.
const MAX_DOCUMENT_BYTES: usize = 16 << 20;

/// Applies events to every view. Each document is read from the bytes that were stored before.
struct Apply<'a> {
    events: &'a [Recorded],
    stored: &'a mut HashMap<(&'static str, String), RawDocumentBuf>,
}

impl Visitor for Apply<'_> {
    fn visit<V: View>(&mut self) {
        let mut changed: BTreeMap<String, Option<V::Document>> = BTreeMap::new();
        for event in self.events {
            for id in document_ids::<V>(event) {
                let before = changed.remove(&id).unwrap_or_else(|| {
                    let stored = self.stored.get(&(V::NAME, id.clone()));
                    stored.map(|stored| bson::deserialize_from_slice(stored.as_bytes()).unwrap())
                });
                let after = V::evolve(before, &id, event);
                let after = after.unwrap_or_else(|error| panic!("{} of {id} cannot take an event: {error}", V::NAME));
                changed.insert(id, after);
            }
        }
        for (id, document) in changed {
            let key = (V::NAME, id);
            let Some(document) = document else {
                self.stored.remove(&key);
                continue;
            };
            let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
            let read: V::Document = bson::deserialize_from_slice(stored.as_bytes()).unwrap();
            assert!(read == document, "{key:?} is not read back as it was written");
            let again = bson::serialize_to_raw_document_buf(&read).unwrap();
            assert_eq!(again, stored, "{key:?} is stored in two forms");
            assert!(stored.as_bytes().len() < MAX_DOCUMENT_BYTES, "{key:?}: {} bytes", stored.as_bytes().len());
            self.stored.insert(key, stored);
        }
    }
}

/// The aggregates and all stored documents.
#[derive(Default)]
struct System {
    aggregates: Aggregates,
    stored: HashMap<(&'static str, String), RawDocumentBuf>,
    /// The number of commands that led to an event.
    accepted: u32,
}

impl System {
    fn execute(&mut self, command: Command, now: Timestamp) -> Vec<Recorded> {
        let events = self.aggregates.execute(command, None, now).unwrap_or_default();
        self.accepted += u32::from(!events.is_empty());
        events
    }

    fn apply(&mut self, events: &[Recorded]) {
        visit(&mut Apply { events, stored: &mut self.stored });
    }

    fn documents(&self, view: &str) -> usize {
        self.stored.keys().filter(|(name, _)| *name == view).count()
    }
}

fn parse(command: &CommandType, request: &Value, new_id: u128) -> Option<Command> {
    (command.parse)(request.to_string().as_bytes(), given::id(new_id)).ok()
}

/// Commands that create aggregates of every kind, in an order in which they can refer to earlier ones.
fn opening() -> BoxedStrategy<Vec<(&'static CommandType, Value)>> {
    let creates =
        |command_type: &CommandType, request: &Value| parse(command_type, request, 1).is_none_or(|it| it.creates());
    let of_kind = |command_type: &'static CommandType| {
        let named = |id: String| {
            request_generators::command(command_type).prop_map(move |mut request| {
                request["id"] = json!(id);
                (command_type, request)
            })
        };
        ids(command_type.aggregate).into_iter().map(named).collect::<Vec<_>>()
    };
    let all: Vec<_> = domain::commands().flat_map(of_kind).collect();
    all.prop_map(move |all| all.into_iter().filter(|(command_type, request)| creates(command_type, request)).collect())
        .boxed()
}

fn steps() -> BoxedStrategy<Vec<(&'static CommandType, Value)>> {
    let commands: Vec<_> = domain::commands()
        .map(|command_type| request_generators::command(command_type).prop_map(move |it| (command_type, it)))
        .collect();
    (opening(), vec(proptest::strategy::Union::new(commands), 0..60))
        .prop_map(|(opening, steps)| opening.into_iter().chain(steps).collect())
        .boxed()
}

fn timestamps() -> impl Strategy<Value = Timestamp> {
    select(vec!["2026-01-31T09:30:00Z", "9999-12-31T23:59:59.999Z"]).prop_map(|text| text.parse().unwrap())
}

#[test]
fn every_view_applies_any_sequence_of_accepted_commands() {
    let config = ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() };
    let (sent, accepted) = (Cell::new(0), Cell::new(0));
    let outcome = TestRunner::new(config).run(&(steps(), timestamps()), |(steps, now)| {
        let mut system = System::default();
        for (new_id, (command_type, request)) in (1_u128..).zip(steps) {
            sent.set(sent.get() + 1);
            let Some(command) = parse(command_type, &request, new_id) else { continue };
            let events = system.execute(command, now);
            system.apply(&events);
        }
        accepted.set(accepted.get() + system.accepted);
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    // The test would show nothing if most commands were refused.
    assert!(accepted.get() * 5 > sent.get(), "{accepted:?} of {sent:?}");
}

/// Places so many orders of one user on one day that every sum exceeds 64 bits, and then cancels them all.
#[test]
fn sums_can_exceed_64_bits_and_return() {
    const ORDERS: u128 = 10_000;

    let now = "2026-01-31T09:30:00Z".parse().unwrap();
    let mut system = System::default();
    let command = |name: &str, request: Value| {
        let command_type = domain::commands().find(|it| name == format!("{}.{}", it.aggregate, it.verb)).unwrap();
        parse(command_type, &request, 1).unwrap()
    };
    let price = json!({ "amount": domain::MAX_AMOUNT, "currency": "GBP" });
    let product = json!({ "id": given::id(2), "sku": "A", "name": "Lamp", "price": price, "stock": ORDERS });
    let user = json!({ "id": given::id(1), "email": "ada@example.com", "name": "Ada", "country": "St. Lucia" });
    let order = |n: u128| {
        let lines = json!([{ "product": given::id(2), "quantity": 1 }]);
        json!({ "id": given::id(10 + n), "user": given::id(1), "lines": lines })
    };
    let mut events = system.execute(command("user.register", user), now);
    events.extend(system.execute(command("product.create", product), now));
    for n in 0..ORDERS {
        events.extend(system.execute(command("order.create", order(n)), now));
    }
    system.apply(&events);
    let total = (ORDERS * domain::MAX_AMOUNT as u128).to_string();
    assert!(total.parse::<i64>().is_err());
    let decimal: bson::Decimal128 = total.parse().unwrap();
    let user = bson::Document::try_from(&system.stored[&("users", given::id(1).to_string())]).unwrap();
    assert_eq!(user.get_array("spent").unwrap()[0].as_document().unwrap().get("amount"), Some(&decimal.into()));
    assert_eq!(user.get_document("_spent").unwrap().get_str("GBP|St%2E Lucia").unwrap().find(&total), Some(34 - 20));
    let day = bson::Document::try_from(&system.stored[&("sales", "2026-01-31".to_owned())]).unwrap();
    assert_eq!(day.get_array("revenue").unwrap()[0].as_document().unwrap().get("amount"), Some(&decimal.into()));
    assert_eq!((system.documents("orders"), system.documents("sales")), (ORDERS as usize, 2));

    let mut events = Vec::new();
    for n in 0..ORDERS {
        events.extend(system.execute(command("order.cancel", json!({ "id": given::id(10 + n) })), now));
    }
    system.apply(&events);
    assert_eq!(system.documents("sales"), 0, "nothing was sold on the day");
    let user = bson::Document::try_from(&system.stored[&("users", given::id(1).to_string())]).unwrap();
    assert!(user.get_array("spent").unwrap().is_empty() && user.get_document("_spent").unwrap().is_empty());
}
