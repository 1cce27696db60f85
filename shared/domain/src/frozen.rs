//! Tests that stored events and states stay readable. The files hold what older versions of this program stored under
//! the rules of their time: texts that are invisible, not normalised or reordered, invalid addresses, and currencies
//! that have been withdrawn since. Lines may be added to the files, but never changed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::{Currency, Email, Event, Id, Name, Sku, State, events};

/// Lines of identifier, kind, name, schema and payload.
const EVENTS: &str = include_str!("frozen/events.jsonl");
/// Lines of identifier, kind, state, and the claims that it had then.
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

#[test]
fn every_stored_event_is_decoded_without_loss() {
    let mut seen = BTreeSet::new();
    let mut states: BTreeMap<Id, State> = BTreeMap::new();
    for row in rows(EVENTS) {
        let [id, kind, name, schema, payload] = &row[..] else { panic!("{row:?}") };
        let (kind, name) = (kind.as_str().unwrap(), name.as_str().unwrap());
        let schema = i16::try_from(schema.as_i64().unwrap()).unwrap();
        let event = Event::decode(kind, name, schema, payload.to_string().as_bytes()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&event.encode().unwrap()).unwrap(), *payload);
        let id: Id = serde_json::from_value(id.clone()).unwrap();
        let after = State::evolve(states.remove(&id), &event);
        states.extend(after.map(|state| (id, state)));
        seen.insert((event.aggregate(), event.name(), schema));
    }
    // A kind without a line in the file is not in production yet.
    let frozen: BTreeSet<&str> = seen.iter().map(|(kind, ..)| *kind).collect();
    for event in events().into_iter().filter(|(kind, _, schema)| frozen.contains(kind) && *schema == 1) {
        assert!(seen.contains(&event), "{event:?} is not in frozen/events.jsonl: add a line with one");
    }
    assert!(["user", "product", "order"].iter().all(|kind| frozen.contains(kind)));
}

#[test]
fn every_stored_state_is_decoded_without_loss_and_has_the_claims_that_it_had() {
    let mut seen = BTreeSet::new();
    for row in rows(STATES) {
        let [_, kind, stored, claims] = &row[..] else { panic!("{row:?}") };
        let state = State::decode(kind.as_str().unwrap(), stored.to_string().as_bytes()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&state.encode().unwrap()).unwrap(), *stored);
        seen.insert(format!("{kind} {}", stored["status"]));
        let now: Vec<_> = state.claims().into_iter().map(|claim| (claim.scope, claim.value)).collect();
        let then: Vec<(String, String)> = serde_json::from_value(claims.clone()).unwrap();
        assert_eq!(now.len(), then.len());
        for ((scope, value), (old_scope, old_value)) in now.into_iter().zip(then) {
            assert_eq!(scope, old_scope);
            // The migration left ASCII claims unchanged.
            assert!(value == old_value || !old_value.is_ascii(), "{old_value:?} {value:?}");
            assert!(value.len() < 2_500, "an index of PostgreSQL takes no longer values");
        }
    }
    assert_eq!(seen.len(), 9, "every state of every kind: {seen:?}");
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
