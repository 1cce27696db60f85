//! A view takes whatever the domain accepts: any sequence of accepted commands, every field with its extreme values,
//! and sums beyond 64 bits. The commands are made from their schemas and the views come from the list of all, so that
//! new ones are covered without a change here.

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
    requests::{self, ids},
    visit,
};

/// MongoDB's limit.
const MAX_DOCUMENT_BYTES: usize = 16 << 20;

/// Applies events to every view, each time to the documents as they are stored.
struct Apply<'a> {
    events: &'a [Recorded],
    stored: &'a mut HashMap<(&'static str, String), RawDocumentBuf>,
}

impl Visitor for Apply<'_> {
    fn visit<V: View>(&mut self) {
        let mut open: BTreeMap<String, Option<V::Document>> = BTreeMap::new();
        for event in self.events {
            for id in document_ids::<V>(event) {
                let before = open.remove(&id).unwrap_or_else(|| {
                    let stored = self.stored.get(&(V::NAME, id.clone()));
                    stored.map(|stored| bson::deserialize_from_slice(stored.as_bytes()).unwrap())
                });
                let after = V::evolve(before, &id, event);
                let after = after.unwrap_or_else(|error| panic!("{} of {id} cannot take an event: {error}", V::NAME));
                open.insert(id, after);
            }
        }
        for (id, document) in open {
            let key = (V::NAME, id);
            let Some(document) = document else {
                self.stored.remove(&key);
                continue;
            };
            let stored = bson::serialize_to_raw_document_buf(&document).unwrap();
            let read: V::Document = bson::deserialize_from_slice(stored.as_bytes()).unwrap();
            assert!(read == document, "{key:?} is read back as it was written");
            let again = bson::serialize_to_raw_document_buf(&read).unwrap();
            assert_eq!(again, stored, "{key:?} has one form");
            assert!(stored.as_bytes().len() < MAX_DOCUMENT_BYTES, "{key:?}: {} bytes", stored.as_bytes().len());
            self.stored.insert(key, stored);
        }
    }
}

/// The aggregates, and all documents as they are stored.
#[derive(Default)]
struct World {
    aggregates: Aggregates,
    stored: HashMap<(&'static str, String), RawDocumentBuf>,
    /// How many commands were accepted.
    accepted: u32,
}

impl World {
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

fn parse(command: &CommandType, request: &Value, made: u128) -> Option<Command> {
    (command.parse)(request.to_string().as_bytes(), given::id(made)).ok()
}

/// Commands that create aggregates of every kind, in the order in which they refer to one another.
fn opening() -> BoxedStrategy<Vec<(&'static CommandType, Value)>> {
    let creates = |known: &CommandType, request: &Value| parse(known, request, 1).is_none_or(|it| it.creates());
    let of_kind = |known: &'static CommandType| {
        let named = |id: String| {
            requests::command(known).prop_map(move |mut request| {
                request["id"] = json!(id);
                (known, request)
            })
        };
        ids(known.aggregate).into_iter().map(named).collect::<Vec<_>>()
    };
    let all: Vec<_> = domain::commands().flat_map(of_kind).collect();
    all.prop_map(move |all| all.into_iter().filter(|(known, request)| creates(known, request)).collect()).boxed()
}

fn steps() -> BoxedStrategy<Vec<(&'static CommandType, Value)>> {
    let known: Vec<_> =
        domain::commands().map(|known| requests::command(known).prop_map(move |it| (known, it))).collect();
    (opening(), vec(proptest::strategy::Union::new(known), 0..60))
        .prop_map(|(opening, steps)| opening.into_iter().chain(steps).collect())
        .boxed()
}

fn moments() -> impl Strategy<Value = Timestamp> {
    select(vec!["2026-01-31T09:30:00Z", "9999-12-31T23:59:59.999Z"]).prop_map(|moment| moment.parse().unwrap())
}

#[test]
fn any_sequence_of_accepted_commands_is_taken_by_every_view() {
    let config = ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() };
    let (sent, accepted) = (Cell::new(0), Cell::new(0));
    let outcome = TestRunner::new(config).run(&(steps(), moments()), |(steps, now)| {
        let mut world = World::default();
        for (made, (known, request)) in (1_u128..).zip(steps) {
            sent.set(sent.get() + 1);
            let Some(command) = parse(known, &request, made) else { continue };
            let events = world.execute(command, now);
            world.apply(&events);
        }
        accepted.set(accepted.get() + world.accepted);
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    // Otherwise the test would show nothing.
    assert!(accepted.get() * 5 > sent.get(), "{accepted:?} of {sent:?}");
}

/// Enough orders to take every sum beyond 64 bits, all of one user and one day, and then the cancellation of each.
#[test]
fn sums_go_beyond_64_bits_and_come_back() {
    const ORDERS: u128 = 10_000;

    let now = "2026-01-31T09:30:00Z".parse().unwrap();
    let mut world = World::default();
    let command = |name: &str, request: Value| {
        let known = domain::commands().find(|known| name == format!("{}.{}", known.aggregate, known.verb)).unwrap();
        parse(known, &request, 1).unwrap()
    };
    let price = json!({ "amount": domain::MAX_AMOUNT, "currency": "GBP" });
    let product = json!({ "id": given::id(2), "sku": "A", "name": "Lamp", "price": price, "stock": ORDERS });
    let user = json!({ "id": given::id(1), "email": "ada@example.com", "name": "Ada", "country": "St. Lucia" });
    let order = |n: u128| {
        let lines = json!([{ "product": given::id(2), "quantity": 1 }]);
        json!({ "id": given::id(10 + n), "user": given::id(1), "lines": lines })
    };
    let mut events = world.execute(command("user.register", user), now);
    events.extend(world.execute(command("product.create", product), now));
    for n in 0..ORDERS {
        events.extend(world.execute(command("order.create", order(n)), now));
    }
    world.apply(&events);
    let total = (ORDERS * domain::MAX_AMOUNT as u128).to_string();
    assert!(total.parse::<i64>().is_err());
    let decimal: bson::Decimal128 = total.parse().unwrap();
    let user = bson::Document::try_from(&world.stored[&("users", given::id(1).to_string())]).unwrap();
    assert_eq!(user.get_array("spent").unwrap()[0].as_document().unwrap().get("amount"), Some(&decimal.into()));
    assert_eq!(user.get_document("_spent").unwrap().get_str("GBP|St%2E Lucia").unwrap().find(&total), Some(34 - 20));
    let day = bson::Document::try_from(&world.stored[&("sales", "2026-01-31".to_owned())]).unwrap();
    assert_eq!(day.get_array("revenue").unwrap()[0].as_document().unwrap().get("amount"), Some(&decimal.into()));
    assert_eq!((world.documents("orders"), world.documents("sales")), (ORDERS as usize, 2));

    let mut events = Vec::new();
    for n in 0..ORDERS {
        events.extend(world.execute(command("order.cancel", json!({ "id": given::id(10 + n) })), now));
    }
    world.apply(&events);
    assert_eq!(world.documents("sales"), 0, "nothing was sold on the day");
    let user = bson::Document::try_from(&world.stored[&("users", given::id(1).to_string())]).unwrap();
    assert!(user.get_array("spent").unwrap().is_empty() && user.get_document("_spent").unwrap().is_empty());
}
