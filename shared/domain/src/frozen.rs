//! Tests that stored events stay readable, under every schema that was ever written, and that stored states are what
//! their events lead to. The files hold what older versions of this program stored under the rules of their time: texts
//! that are invisible, not normalised or reordered, invalid addresses, and currencies that have been withdrawn since.
//! Lines may be added to the files, but never changed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{Currency, Email, Event, Id, Name, Recorded, Sku, State, Undecodable, conformance::states, events};

/// Lines of identifier, kind, name, schema and payload.
const EVENTS: &str = include_str!("frozen/events.jsonl");
/// Lines of identifier, kind, form, state, and the claims that it had then.
const STATES: &str = include_str!("frozen/states.jsonl");
/// The currencies that older versions accepted.
const CURRENCIES: &str = "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN \
    BZD CAD CDF CHF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD \
    HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD \
    MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON \
    RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX \
    USD UYU UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG";
/// Currencies that older versions did not accept. They are now accepted in orders of their time.
const WITHDRAWN: [&str; 9] = ["HRK", "ANG", "CUC", "SLL", "ZWL", "LTL", "LVL", "EEK", "DEM"];

fn rows(file: &str) -> impl Iterator<Item = Vec<Value>> {
    file.lines().map(|line| serde_json::from_str(line).unwrap())
}

/// An event as it was stored.
struct FrozenEvent {
    id: Id,
    kind: String,
    name: String,
    schema: i16,
    payload: Value,
}

impl FrozenEvent {
    fn decode(&self, payload: &Value) -> Result<Event, Undecodable> {
        Event::decode(&self.kind, &self.name, self.schema, payload.to_string().as_bytes())
    }
}

fn frozen_events() -> Vec<FrozenEvent> {
    let event = |row: Vec<Value>| {
        let (id, kind, name, schema, payload) = serde_json::from_value(Value::Array(row)).unwrap();
        FrozenEvent { id, kind, name, schema, payload }
    };
    rows(EVENTS).map(event).collect()
}

/// A state as it was stored.
struct FrozenState {
    id: Id,
    kind: String,
    form: i16,
    json: Value,
    claims: Vec<(String, String)>,
}

fn frozen_states() -> Vec<FrozenState> {
    let state = |row: Vec<Value>| {
        let (id, kind, form, json, claims) = serde_json::from_value(Value::Array(row)).unwrap();
        FrozenState { id, kind, form, json, claims }
    };
    rows(STATES).map(state).collect()
}

/// The kinds of aggregate that are in production: a kind without a line in the file is not yet.
fn kinds() -> BTreeSet<String> {
    let kinds: BTreeSet<String> = frozen_events().into_iter().map(|event| event.kind).collect();
    assert!(["user", "product", "order"].iter().all(|kind| kinds.contains(*kind)), "{kinds:?}");
    kinds
}

/// The states that the stored events lead to.
fn folded() -> BTreeMap<Id, State> {
    let mut states: BTreeMap<Id, State> = BTreeMap::new();
    for event in frozen_events() {
        let after = State::evolve(states.remove(&event.id), &event.decode(&event.payload).unwrap());
        states.extend(after.map(|state| (event.id, state)));
    }
    states
}

#[test]
fn every_stored_event_is_decoded_and_one_of_the_present_schema_without_loss() {
    for frozen in frozen_events() {
        let FrozenEvent { kind, name, schema, payload, .. } = &frozen;
        let event = frozen.decode(payload).unwrap_or_else(|error| {
            panic!(
                "{kind}.{name} of schema {schema} is stored, and cannot be decoded: {error}. Let the struct be as it \
                    was, or give the event a new schema: docs/extending.md, \"An event or a state that changes\""
            )
        });
        let encoded = json_of(&event.encode().unwrap());
        if *schema == event.schema() {
            assert_eq!(encoded, *payload, "{kind}.{name} has changed: raise its schema");
        } else {
            let again = Event::decode(kind, name, event.schema(), encoded.to_string().as_bytes()).unwrap();
            assert_eq!(again, event);
        }
    }
}

#[test]
fn a_stored_event_of_an_older_schema_is_read_strictly() {
    let current: BTreeMap<_, _> = events().into_iter().map(|(kind, name, schema)| ((kind, name), schema)).collect();
    let older = |event: &FrozenEvent| event.schema < current[&(&*event.kind, &*event.name)];
    for frozen in frozen_events().into_iter().filter(older) {
        let FrozenEvent { kind, name, schema, payload, .. } = &frozen;
        for changed in changed(payload) {
            assert!(
                frozen.decode(&changed).is_err(),
                "{kind}.{name} of schema {schema} is decoded with a field too many or too few: {changed}. Its type \
                    needs `deny_unknown_fields`, and an `Option` in it `deserialize_with = \"Option::deserialize\"`"
            );
        }
    }
}

/// The value with one more field, or one less, wherever there are fields.
fn changed(value: &Value) -> Vec<Value> {
    match value {
        Value::Object(fields) => {
            let with = |name: &str, value: Value| {
                let mut fields = fields.clone();
                fields.insert(name.to_owned(), value);
                Value::Object(fields)
            };
            let mut all = vec![with("colour", "red".into())];
            for (name, child) in fields {
                let mut less = fields.clone();
                less.remove(name);
                all.push(Value::Object(less));
                all.extend(changed(child).into_iter().map(|child| with(name, child)));
            }
            all
        }
        Value::Array(items) => {
            let with = |index: usize, item: Value| {
                let mut items = items.clone();
                items[index] = item;
                Value::Array(items)
            };
            let changed = |(index, item)| changed(item).into_iter().map(move |item| with(index, item));
            items.iter().enumerate().flat_map(changed).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => vec![],
    }
}

/// What a program may have stored: the schemas of its events and the forms of its states, each with its status.
struct Seen {
    events: BTreeSet<(String, String, i16)>,
    states: BTreeSet<(String, i16, String)>,
}

impl Seen {
    fn frozen() -> Self {
        let events = frozen_events().into_iter().map(|event| (event.kind, event.name, event.schema)).collect();
        let states =
            frozen_states().into_iter().map(|state| (state.kind, state.form, state.json["status"].to_string()));
        Self { events, states: states.collect() }
    }
}

#[test]
fn every_schema_and_every_form_that_was_ever_stored_is_in_the_files() {
    let frozen = Seen::frozen();
    let kinds = kinds();
    let back = "what is stored has it: take the line back from the history of the file";
    for (kind, name, schema) in events().into_iter().filter(|(kind, ..)| kinds.contains(*kind)) {
        for older in 1..schema {
            let line = (kind.to_owned(), name.to_owned(), older);
            assert!(
                frozen.events.contains(&line),
                "frozen/events.jsonl lacks schema {older} of {kind}.{name}, and {back}"
            );
        }
    }
    for (_, state) in states().into_iter().filter(|(_, state)| kinds.contains(state.aggregate())) {
        for older in 1..state.form() {
            let kind = state.aggregate();
            let is_there = frozen.states.iter().any(|it| (&*it.0, it.1) == (kind, older));
            assert!(is_there, "frozen/states.jsonl lacks form {older} of {kind}, and {back}");
        }
    }
}

/// What is in production must be in the files before somebody changes it.
#[test]
fn what_this_program_stores_is_in_the_files() {
    let (mut seen, kinds) = (Seen::frozen(), kinds());
    let mut used: BTreeSet<Id> = frozen_events().into_iter().map(|event| event.id).collect();
    let (mut histories, mut event_lines, mut state_lines) = (BTreeMap::new(), vec![], vec![]);
    for Recorded { id, event, .. } in crate::sample_events() {
        let (history, state): &mut (Vec<Event>, Option<State>) = histories.entry(id).or_default();
        history.push(event.clone());
        *state = State::evolve(state.take(), &event);
        let Some(state) = state.as_ref().filter(|state| kinds.contains(state.aggregate())) else { continue };
        let (kind, json) = (state.aggregate(), json_of(&state.encode().unwrap()));
        let is_new_event = seen.events.insert((kind.to_owned(), event.name().to_owned(), event.schema()));
        let is_new_state = seen.states.insert((kind.to_owned(), state.form(), json["status"].to_string()));
        if is_new_event || is_new_state {
            let fresh =
                (1..).map(|n| Id(uuid::Uuid::from_u128(id.0.as_u128() + (n << 64)))).find(|id| used.insert(*id));
            for event in history {
                let payload = json_of(&event.encode().unwrap());
                event_lines.push(json!([fresh, kind, event.name(), event.schema(), payload]).to_string());
            }
            let claims: Vec<_> = state.claims().into_iter().map(|claim| (claim.scope, claim.value)).collect();
            state_lines.push(json!([fresh, kind, state.form(), json, claims]).to_string());
        }
    }
    assert!(
        event_lines.is_empty(),
        "add these lines to frozen/events.jsonl:\n{}\nand these to frozen/states.jsonl:\n{}\n",
        event_lines.join("\n"),
        state_lines.join("\n")
    );
}

fn json_of(encoded: &[u8]) -> Value {
    serde_json::from_slice(encoded).unwrap()
}

/// A state of an older form is not read any more. It is folded anew from the events, and holds the same claims.
#[test]
fn every_stored_state_of_the_present_form_is_decoded_without_loss_and_every_one_is_what_its_events_lead_to() {
    let mut folded = folded();
    for FrozenState { id, kind, form, json: stored, claims: then } in frozen_states() {
        let state = folded.remove(&id).unwrap_or_else(|| {
            panic!("frozen/events.jsonl has no events of {kind} {id}, whose state is in frozen/states.jsonl: add them")
        });
        let decoded = State::decode(&kind, form, stored.to_string().as_bytes());
        if form == state.form() {
            let raise = format!("the state of {kind} has changed: raise its FORM");
            assert_eq!(decoded.expect(&raise), state, "{raise}");
            assert_eq!(json_of(&state.encode().unwrap()), stored, "{raise}");
        } else {
            assert!(matches!(decoded, Err(Undecodable::Form { .. })), "{kind} {id}");
        }
        let now: Vec<_> = state.claims().into_iter().map(|claim| (claim.scope, claim.value)).collect();
        assert_eq!(now.len(), then.len());
        for ((scope, value), (old_scope, old_value)) in now.into_iter().zip(then) {
            assert_eq!(scope, old_scope);
            // The migration left ASCII claims unchanged.
            assert!(value == old_value || !old_value.is_ascii(), "{old_value:?} {value:?}");
            assert!(value.len() < 2_500, "an index of PostgreSQL takes no longer values");
        }
    }
}

/// The files are worth something only if they hold texts that are refused now.
#[test]
fn the_files_hold_many_texts_that_are_refused_now() {
    let texts = |field: &'static str| {
        rows(EVENTS).filter_map(move |row| Some(row[4].get(field)?.as_str()?.to_owned())).collect::<BTreeSet<_>>()
    };
    assert!(texts("email").iter().filter(|text| Email::new(text).is_err()).count() >= 12);
    assert!(texts("sku").iter().filter(|text| Sku::new(text).is_err()).count() >= 8);
    assert!(texts("name").iter().filter(|text| Name::new(text).is_err()).count() >= 6);
    assert!(texts("email").iter().any(|text| Email::new(text).is_ok_and(|email| *email != **text)), "not normalised");
}

#[test]
fn every_currency_that_was_ever_accepted_is_still_read() {
    for code in CURRENCIES.split(' ').chain(WITHDRAWN) {
        assert_eq!(code.parse::<Currency>().unwrap().as_str(), code);
        let price = format!(r#"{{"amount":1,"currency":"{code}"}}"#);
        assert!(serde_json::from_str::<crate::Money>(&price).is_ok(), "{code}");
    }
    for withdrawn in WITHDRAWN.into_iter().chain(["BGN"]) {
        assert!(withdrawn.parse::<Currency>().unwrap().withdrawn().is_some(), "{withdrawn}");
    }
}
