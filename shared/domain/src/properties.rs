//! Property tests of what must hold over any sequence of commands, even when the states are stored and loaded again
//! between batches.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::select,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use serde_json::{Value, json};

use crate::{
    Aggregates, Claim, Command, CommandType, Event, Id, MAX_AMOUNT, Recorded, Rejection, Sample, State, Timestamp,
    commands, events,
    order::{self, Order},
    product::{self, Product},
    rejections, samples,
    scenario::{InMemoryJournal, bare, command, id, now, parse},
    user::{self, User},
};

const CASES: u32 = 128;

/// A command to execute, and whether its batch ends with it.
#[derive(Clone, Debug)]
struct Step {
    command: Command,
    expected_version: Option<u64>,
    ends_batch: bool,
}

/// Sequences of commands, either to the shop (users, products and orders) or to aggregates of all kinds.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop_oneof![3 => shop_steps(), 1 => sample_steps()]
}

/// Commands to the shop. They draw on few identifiers, e-mail addresses and SKUs, so that they often conflict.
fn shop_steps() -> BoxedStrategy<Vec<Step>> {
    // Most sequences start with users and products.
    let openings = vec![vec![], open_shop(), open_shop(), open_shop()];
    steps_of(openings, shop_command().boxed())
}

/// Recombinations of the samples of all aggregates.
fn sample_steps() -> BoxedStrategy<Vec<Step>> {
    let read = |(command_type, sample): (&CommandType, &Sample)| parse_sample(command_type, sample.request);
    let opening: Vec<Command> = samples().filter_map(read).collect();
    let half = opening.iter().take(opening.len() / 2).cloned().collect();
    steps_of(vec![vec![], half, opening], recombined().boxed())
}

fn steps_of(openings: Vec<Vec<Command>>, command: BoxedStrategy<Command>) -> BoxedStrategy<Vec<Step>> {
    let expected_version = prop_oneof![30 => Just(None), 1 => (0..4_u64).prop_map(Some)];
    let step = (command, expected_version, prop::bool::weighted(0.15));
    let steps = (select(openings), vec(step, 1..100)).prop_map(|(opening, steps)| {
        let opening = opening.into_iter().map(|command| (command, None, false));
        let step = |(command, expected_version, ends_batch)| Step { command, expected_version, ends_batch };
        opening.chain(steps).map(step).collect()
    });
    steps.boxed()
}

/// A sample in which each field may have its value from another sample of the aggregate, or be absent.
fn recombined() -> impl Strategy<Value = Command> {
    let all: Vec<(&CommandType, Value)> =
        samples().map(|(command_type, sample)| (command_type, serde_json::from_str(sample.request).unwrap())).collect();
    let values_by_field = |kind: &str| {
        let mut values: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for (_, request) in all.iter().filter(|(command_type, _)| command_type.aggregate == kind) {
            for (field, value) in request.as_object().unwrap() {
                values.entry(field.clone()).or_default().push(value.clone());
            }
        }
        values
    };
    let variants = |(command_type, request): &(&'static CommandType, Value)| {
        let (command_type, request, values) = (*command_type, request.clone(), values_by_field(command_type.aggregate));
        let field = move |(field, own): (&String, &Value)| {
            let others = values[field].clone();
            let value = prop_oneof![6 => Just(own.clone()), 3 => select(others), 1 => Just(Value::Null)];
            (Just(field.clone()), value)
        };
        let fields: Vec<_> = request.as_object().unwrap().iter().map(field).collect();
        fields.prop_filter_map("the request is well-formed", move |fields| {
            parse_sample(command_type, &Value::Object(fields.into_iter().collect()).to_string())
        })
    };
    proptest::strategy::Union::new(all.iter().map(variants).collect::<Vec<_>>())
}

fn parse_sample(command_type: &CommandType, request: &str) -> Option<Command> {
    (command_type.parse)(request.as_bytes(), id(99)).ok()
}

fn open_shop() -> Vec<Command> {
    let user = |n, email| command("user.register", json!({ "id": id(n), "email": email, "name": "Ada" }));
    let product = |n, sku, stock| command("product.create", product_request(n, sku, money(250, "GBP"), stock));
    vec![
        user(1, "a@example.com"),
        user(2, "b@example.com"),
        product(11, "A", 20),
        product(12, "a", 9),
        product(13, "B", 3),
        product(14, "b", 0),
        user(3, "c@example.com"),
    ]
}

fn shop_command() -> impl Strategy<Value = Command> {
    prop_oneof![
        4 => (users(), emails()).prop_map(|(n, email)| {
            command("user.register", json!({ "id": id(n), "email": email, "name": "Ada" }))
        }),
        4 => (users(), option::of(emails()), option::of(select(vec!["Ada", "Bob"]))).prop_map(|(n, email, name)| {
            command("user.update", json!({ "id": id(n), "email": email, "name": name }))
        }),
        1 => users().prop_map(|n| bare("user.delete", n)),
        5 => (products(), skus(), prices(), 0..20_i64).prop_map(|(n, sku, price, stock)| {
            command("product.create", product_request(n, sku, price, stock))
        }),
        4 => (products(), option::of(skus()), option::of(prices())).prop_map(|(n, sku, price)| {
            command("product.update", json!({ "id": id(n), "sku": sku, "price": price }))
        }),
        10 => (products(), restocks()).prop_map(|(n, quantity)| {
            command("product.restock", json!({ "id": id(n), "quantity": quantity }))
        }),
        1 => products().prop_map(|n| bare("product.delete", n)),
        30 => (orders(), users(), vec(line(), 1..4), placed_at()).prop_map(|(n, user, lines, placed_at)| {
            command("order.create", json!({ "id": id(n), "user": id(user), "lines": lines, "placed_at": placed_at }))
        }),
        14 => orders().prop_map(|n| bare("order.pay", n)),
        14 => orders().prop_map(|n| bare("order.ship", n)),
        6 => orders().prop_map(|n| bare("order.cancel", n)),
        8 => orders().prop_map(|n| bare("order.delete", n)),
    ]
}

fn product_request(n: u128, sku: &str, price: Value, stock: i64) -> Value {
    json!({ "id": id(n), "sku": sku, "name": "Lantern", "price": price, "stock": stock })
}

/// The identifiers of users and, occasionally, of another kind of aggregate.
fn users() -> impl Strategy<Value = u128> {
    prop_oneof![40 => 1..4_u128, 1 => Just(11), 1 => Just(21)]
}

fn products() -> impl Strategy<Value = u128> {
    prop_oneof![40 => 11..15_u128, 1 => Just(1), 1 => Just(21)]
}

fn orders() -> impl Strategy<Value = u128> {
    prop_oneof![60 => 21..27_u128, 1 => Just(1), 1 => Just(11)]
}

fn emails() -> impl Strategy<Value = &'static str> {
    select(vec!["a@example.com", "A@Example.com", "ａ@example.com", "b@example.com", "c@example.com", "d@example.com"])
}

fn skus() -> impl Strategy<Value = &'static str> {
    select(vec!["A", "Ａ", "a", "B", "b", "C"])
}

fn money(amount: i64, currency: &str) -> Value {
    json!({ "amount": amount, "currency": currency })
}

fn prices() -> impl Strategy<Value = Value> {
    let amount = prop_oneof![12 => 0..1_000_i64, 1 => Just(MAX_AMOUNT)];
    let currency = prop_oneof![20 => Just("GBP"), 1 => Just("EUR"), 3 => Just("HRK")];
    (amount, currency).prop_map(|(amount, currency)| money(amount, currency))
}

fn restocks() -> impl Strategy<Value = i64> {
    prop_oneof![
        10 => 1..20_i64,
        5 => -8..0_i64,
        1 => Just(product::MAX_STOCK),
        1 => Just(-product::MAX_STOCK),
    ]
}

fn line() -> impl Strategy<Value = Value> {
    (products(), 1..5_i64, option::weighted(0.2, prices())).prop_map(
        |(product, quantity, price)| json!({ "product": id(product), "quantity": quantity, "unit_price": price }),
    )
}

fn placed_at() -> impl Strategy<Value = Option<&'static str>> {
    prop_oneof![8 => Just(None), 2 => Just(Some("2010-12-01T08:26:00Z")), 1 => Just(Some("2026-01-31T09:30:05.001Z"))]
}

/// The outcome of a sequence of commands that were all executed on the same aggregates in memory.
struct History {
    decided: Vec<(Step, Result<Vec<Recorded>, Rejection>)>,
    aggregates: Aggregates,
}

impl History {
    fn of(steps: Vec<Step>) -> Self {
        let mut aggregates = Aggregates::default();
        let decided = steps
            .into_iter()
            .map(|step| {
                let result = aggregates.execute(step.command.clone(), step.expected_version, now());
                (step, result)
            })
            .collect();
        Self { decided, aggregates }
    }

    fn events(&self) -> impl Iterator<Item = &Recorded> {
        self.decided.iter().filter_map(|(_, result)| result.as_ref().ok()).flatten()
    }

    fn states(&self) -> BTreeMap<Id, (u64, State)> {
        self.aggregates.changed().map(|changed| (changed.id, (changed.version, changed.state.clone()))).collect()
    }
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() }
}

fn for_any_steps(property: impl Fn(Vec<Step>)) {
    for_steps_of(TestRunner::new(config()), steps(), property);
}

fn for_steps_of(mut runner: TestRunner, steps: impl Strategy<Value = Vec<Step>>, property: impl Fn(Vec<Step>)) {
    let outcome = runner.run(&steps, |steps| {
        property(steps);
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

fn for_any_history(property: impl Fn(&History)) {
    for_any_steps(|steps| property(&History::of(steps)));
}

/// The property tests are worth something only if their sequences lead to every event and every refusal. This test
/// always runs the same sequences, so that it never fails by chance.
#[test]
fn the_sequences_lead_to_every_event_and_every_refusal_of_the_shop() {
    let seen: RefCell<BTreeMap<String, u32>> = RefCell::default();
    let count = |what: String| *seen.borrow_mut().entry(what).or_default() += 1;
    let fixed = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    for_steps_of(TestRunner::new_with_rng(config(), fixed), shop_steps(), |steps| {
        for (_, result) in History::of(steps).decided {
            match &result {
                Ok(events) if events.is_empty() => count("accepted without an event".to_owned()),
                Ok(events) => events.iter().for_each(|recorded| {
                    count(format!("event {}.{}", recorded.event.aggregate(), recorded.event.name()));
                }),
                Err(rejection) => count(format!("refused {}", rejection.code)),
            }
            count(if result.is_ok() { "accepted" } else { "refused" }.to_owned());
        }
    });
    let is_in_shop = |kind: &str| ["", user::KIND, product::KIND, order::KIND].contains(&kind);
    let codes = rejections().filter(|(kind, ..)| is_in_shop(kind)).map(|(_, code, _)| format!("refused {code}"));
    let events = events().into_iter().filter(|(kind, ..)| is_in_shop(kind));
    let expected: BTreeSet<_> = codes
        .chain(events.map(|(kind, name, _)| format!("event {kind}.{name}")))
        .chain(["accepted", "refused", "accepted without an event"].map(str::to_owned))
        .collect();
    let seen = seen.into_inner();
    assert_eq!(
        seen.keys().cloned().collect::<BTreeSet<_>>(),
        expected,
        "`shop_command` must make commands that lead to what is missing"
    );
    assert!(seen.values().all(|times| *times > 5), "{seen:#?}");
    assert!(seen["accepted"] > 1_000 && seen["refused"] > 1_000, "{seen:#?}");
}

#[test]
fn stock_is_never_negative() {
    for_any_history(|history| {
        for recorded in history.events() {
            let Event::Product(event) = &recorded.event else { continue };
            match event {
                product::Event::Created(product::Created { stock, .. })
                | product::Event::Restocked(product::Restocked { stock, .. })
                | product::Event::StockTaken(product::StockTaken { stock, .. })
                | product::Event::StockReturned(product::StockReturned { stock, .. }) => {
                    assert!(*stock >= 0, "{recorded:?}");
                }
                product::Event::Updated(_) | product::Event::Deleted(_) => {}
            }
        }
    });
}

/// For each product, the pieces that were created and restocked are either in stock or in orders that were not
/// cancelled.
#[test]
fn no_piece_is_lost_or_invented() {
    for_any_history(|history| {
        let mut supplied: HashMap<Id, i64> = HashMap::new();
        let mut sold: HashMap<Id, i64> = HashMap::new();
        let sell = |sold: &mut HashMap<Id, i64>, lines: &[order::Line], sign: i64| {
            lines.iter().for_each(|line| *sold.entry(line.product).or_default() += sign * line.quantity);
        };
        for Recorded { id, event, .. } in history.events() {
            match event {
                Event::Product(product::Event::Created(created)) => *supplied.entry(*id).or_default() += created.stock,
                Event::Product(product::Event::Restocked(restocked)) => {
                    *supplied.entry(*id).or_default() += restocked.quantity;
                }
                Event::Order(order::Event::Placed(placed)) => sell(&mut sold, &placed.lines, 1),
                Event::Order(order::Event::Cancelled(cancelled)) => sell(&mut sold, &cancelled.lines, -1),
                _ => {}
            }
        }
        for (id, (_, state)) in history.states() {
            if let State::Product(Product::Living(product)) = state {
                let sold = sold.get(&id).copied().unwrap_or_default();
                assert_eq!(product.stock + sold, supplied[&id], "{id}");
            }
        }
    });
}

#[test]
fn a_total_is_the_sum_of_its_lines() {
    for_any_history(|history| {
        for recorded in history.events() {
            let Event::Order(event) = &recorded.event else { continue };
            let (lines, total) = match event {
                order::Event::Placed(placed) => (&placed.lines, placed.total),
                order::Event::Cancelled(cancelled) => (&cancelled.lines, cancelled.total),
                order::Event::Paid(_) | order::Event::Shipped(_) | order::Event::Deleted(_) => continue,
            };
            let amount = |line: &order::Line| i128::from(line.unit_price.amount) * i128::from(line.quantity);
            assert_eq!(lines.iter().map(amount).sum::<i128>(), i128::from(total.amount));
            assert!(lines.iter().all(|line| line.unit_price.currency == total.currency));
            assert!((0..=MAX_AMOUNT).contains(&total.amount));
        }
    });
}

#[test]
fn versions_have_no_gaps() {
    for_any_history(|history| {
        let mut versions: BTreeMap<Id, u64> = BTreeMap::new();
        for recorded in history.events() {
            let version = versions.entry(recorded.id).or_default();
            *version += 1;
            assert_eq!(recorded.version, *version);
        }
        for (id, (version, _)) in history.states() {
            assert_eq!(versions.remove(&id), Some(version));
        }
        assert!(versions.is_empty());
    });
}

#[test]
fn an_accepted_command_either_creates_its_target_or_finds_it() {
    for_any_steps(|steps| {
        let mut aggregates = Aggregates::default();
        for Step { command, expected_version, .. } in steps {
            let (creates, is_new) = (command.creates(), aggregates.version(command.target()) == 0);
            let accepted = aggregates.execute(command, expected_version, now()).is_ok();
            assert!(!accepted || creates == is_new);
        }
    });
}

#[test]
fn a_command_that_is_refused_or_has_no_event_changes_nothing() {
    for_any_steps(|steps| {
        let mut aggregates = Aggregates::default();
        for Step { command, expected_version, .. } in steps {
            let before = aggregates.clone();
            let result = aggregates.execute(command, expected_version, now());
            let is_without_event = result.as_ref().map_or(true, Vec::is_empty);
            assert_eq!(is_without_event, aggregates == before, "{result:?}");
        }
    });
}

#[test]
fn replaying_the_events_leads_to_the_same_states() {
    for_any_history(|history| {
        let mut replayed: BTreeMap<Id, State> = BTreeMap::new();
        for Recorded { id, event, .. } in history.events() {
            let after = State::evolve(replayed.remove(id), &stored_and_read(event)).unwrap();
            replayed.insert(*id, after);
        }
        let states: BTreeMap<_, _> = history.states().into_iter().map(|(id, (_, state))| (id, state)).collect();
        assert_eq!(replayed, states);
    });
}

/// Applying an event never fails and never removes a state. A deleted aggregate stays as it is, whatever the event.
#[test]
fn an_event_that_cannot_follow_changes_nothing() {
    for_any_history(|history| {
        let events: Vec<_> = history.events().collect();
        for (_, state) in history.states().into_values() {
            for recorded in events.iter().take(20) {
                let after = State::evolve(Some(state.clone()), &recorded.event).unwrap();
                assert_eq!(after.aggregate(), state.aggregate());
                let deleted =
                    [State::User(User::Deleted), State::Product(Product::Deleted), State::Order(Order::Deleted)];
                let foreign = state.aggregate() != recorded.event.aggregate();
                if foreign || recorded.version == 1 || deleted.contains(&state) {
                    assert_eq!(after, state);
                }
                let created = State::evolve(None, &recorded.event);
                assert_eq!(created.is_some(), recorded.version == 1);
            }
        }
    });
}

#[test]
fn a_claim_is_held_by_the_one_aggregate_whose_state_has_it() {
    for_any_history(|history| {
        let mut held: BTreeMap<Claim, Id> = BTreeMap::new();
        for (id, (_, state)) in history.states() {
            for claim in state.claims() {
                assert_eq!(held.insert(claim, id), None, "two aggregates hold the same claim");
            }
        }
        for claim in history.decided.iter().flat_map(|(step, _)| step.command.claims()) {
            assert_eq!(history.aggregates.holder(&claim), held.get(&claim).copied());
        }
    });
}

/// A command needs nothing that it does not declare, and the changes that a batch stores, claims included, are exactly
/// those that its events made.
#[test]
fn batches_that_load_only_what_they_touch_lead_to_the_same_results() {
    for_any_steps(|steps| {
        let mut stored = InMemoryJournal::default();
        let mut results = Vec::new();
        for batch in steps.split_inclusive(|step| step.ends_batch) {
            let mut loaded = stored.load(batch.iter().map(|step| &step.command));
            for Step { command, expected_version, .. } in batch.iter().cloned() {
                results.push(loaded.execute(command, expected_version, now()));
            }
            stored.store(&loaded);
        }
        let history = History::of(steps);
        assert_eq!(results, history.decided.iter().map(|(_, result)| result.clone()).collect::<Vec<_>>());
        let states = stored.states();
        assert_eq!(states, history.states());
        let living = states.iter().flat_map(|(id, (_, state))| state.claims().into_iter().map(|claim| (claim, *id)));
        assert_eq!(*stored.claims(), living.collect());
    });
}

/// What a program of another version stored is folded anew from the events, and makes no difference.
#[test]
fn states_that_are_folded_anew_lead_to_the_same_results() {
    for_any_steps(|steps| {
        let mut stored = InMemoryJournal::default();
        let mut journal: BTreeMap<Id, Vec<Recorded>> = BTreeMap::new();
        for batch in steps.split_inclusive(|step| step.ends_batch) {
            let commands = || batch.iter().map(|step| &step.command);
            let mut loaded = stored.load(commands());
            let mut anew = Aggregates::default();
            for (id, version, _) in loaded.clone().into_states() {
                let events = &journal[&id];
                assert_eq!(events.len() as u64, version);
                let folded = events
                    .iter()
                    .fold(None, |before, recorded| State::evolve(before, &stored_and_read(&recorded.event)));
                anew.load_folded(id, version, folded.unwrap());
            }
            let held = |claim: Claim| Some((stored.claims().get(&claim).copied()?, claim));
            commands().flat_map(Command::claims).filter_map(held).for_each(|(id, claim)| anew.load_claim(claim, id));
            for Step { command, expected_version, .. } in batch.iter().cloned() {
                let result = loaded.execute(command.clone(), expected_version, now());
                assert_eq!(anew.execute(command, expected_version, now()), result);
                for recorded in result.into_iter().flatten() {
                    journal.entry(recorded.id).or_default().push(recorded);
                }
            }
            assert_eq!(anew.released_claims().collect::<Vec<_>>(), loaded.released_claims().collect::<Vec<_>>());
            assert_eq!(anew.taken_claims().collect::<Vec<_>>(), loaded.taken_claims().collect::<Vec<_>>());
            let states = |aggregates: &Aggregates| -> BTreeMap<Id, (u64, Vec<u8>)> {
                let states = aggregates.clone().into_states();
                states.map(|(id, version, state)| (id, (version, state.encode().unwrap()))).collect()
            };
            assert_eq!(states(&anew), states(&loaded));
            assert_eq!(anew.changed().count(), states(&anew).len(), "all are stored");
            stored.store(&loaded);
        }
    });
}

/// The event as it is read from the journal.
fn stored_and_read(event: &Event) -> Event {
    Event::decode(event.aggregate(), event.name(), event.schema(), &event.encode().unwrap()).unwrap()
}

/// Texts that are JSON, or nearly so.
fn json_like() -> impl Strategy<Value = String> {
    let pieces = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"",
        "null",
        "true",
        "-",
        "0",
        "1",
        "1.5",
        "1e999",
        "-9223372036854775809",
        "\\",
        "\\u0000",
        "\\ud800",
        "\0",
        "é",
        "\"id\"",
        "\"user\"",
        "\"lines\"",
        "\"product\"",
        "\"quantity\"",
        "\"unit_price\"",
        "\"amount\"",
        "\"currency\"",
        "\"GBP\"",
        "\"email\"",
        "\"name\"",
        "\"sku\"",
        "\"placed_at\"",
        "\"0192d3a0-7c1e-7b5a-9f00-3c2b1a000001\"",
    ];
    vec(select(pieces.to_vec()), 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_request_makes_a_parser_panic(body in prop_oneof![vec(any::<u8>(), 0..200), json_like().prop_map(String::into_bytes)]) {
        for command_type in commands() {
            if let Err(malformed) = parse(&format!("{}.{}", command_type.aggregate, command_type.verb), &body) {
                prop_assert!(!malformed.to_string().contains(char::is_control));
            }
        }
    }

    #[test]
    fn a_timestamp_is_read_back_as_it_was_written_and_its_text_sorts(millis in vec(-62_167_219_200_000..=253_402_300_799_999_i64, 2)) {
        let times: Vec<_> = millis.iter().map(|millis| Timestamp::from_unix_millis(*millis).unwrap()).collect();
        let texts: Vec<_> = times.iter().map(Timestamp::to_string).collect();
        prop_assert_eq!(texts[0].parse::<Timestamp>().unwrap(), times[0]);
        prop_assert_eq!(texts[0].len(), 24);
        prop_assert_eq!(texts[0].cmp(&texts[1]), times[0].cmp(&times[1]));
    }

    #[test]
    fn any_text_and_any_number_is_accepted_or_refused_without_a_panic(text in any::<String>(), millis in any::<i64>()) {
        let _ = (crate::Email::new(&text), crate::Name::new(&text), crate::Sku::new(&text), crate::Country::new(&text));
        let _ = (text.parse::<Id>(), text.parse::<Timestamp>(), text.parse::<crate::Currency>());
        let _ = Timestamp::from_unix_millis(millis).map(|time| time.day());
    }

    #[test]
    fn an_accepted_text_is_accepted_again_unchanged_and_read_back(text in "(\\PC|[a-zA-Z@. ]|[éÅßﬁ가한ไทย\\u{301}\\u{200d}]){1,20}", at in "[a-zé]{1,5}") {
        fn check<T: std::ops::Deref<Target = str> + serde::Serialize + serde::de::DeserializeOwned>(
            new: fn(&str) -> Result<T, crate::InvalidText>,
            text: &str,
        ) -> Result<(), TestCaseError> {
            if let Ok(accepted) = new(text) {
                let again = new(&accepted).map_err(|error| TestCaseError::fail(format!("{:?}: {error}", &*accepted)))?;
                prop_assert_eq!(&*again, &*accepted);
                let stored = serde_json::to_string(&accepted).unwrap();
                prop_assert_eq!(&*serde_json::from_str::<T>(&stored).unwrap(), &*accepted);
            }
            Ok(())
        }

        check(crate::Name::new, &text)?;
        check(crate::Sku::new, &text)?;
        check(crate::Country::new, &text)?;
        for email in [format!("{text}@example.com"), format!("ada@{at}{text}.com"), text.clone()] {
            check(crate::Email::new, &email)?;
            if let Ok(email) = crate::Email::new(&email) {
                let normalized = email.normalized();
                let stored: crate::Email = serde_json::from_value(json!(normalized)).unwrap();
                prop_assert_eq!(stored.normalized(), normalized);
            }
        }
    }
}
