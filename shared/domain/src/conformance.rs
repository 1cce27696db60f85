//! What must hold of every command, event and state of every aggregate, also of those still to be written: a new one
//! needs an example here, and no test.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{
    Aggregates, Command, Event, Malformed, Reason, State, commands, events,
    scenario::{bare, command, create_order, create_product, gbp, id, now, parse, register, restock},
};

/// A request for each command, with every field that it may have.
fn examples() -> BTreeMap<&'static str, Value> {
    let line = json!({ "product": id(10), "quantity": 2, "unit_price": gbp(199) });
    BTreeMap::from([
        ("user.register", json!({ "id": id(1), "email": "a@example.com", "name": "Ada", "country": "Malta" })),
        ("user.update", json!({ "id": id(1), "email": "a@example.com", "name": "Ada", "country": "Malta" })),
        ("user.delete", json!({ "id": id(1) })),
        ("product.create", json!({ "id": id(10), "sku": "A", "name": "Lamp", "price": gbp(250), "stock": 5 })),
        ("product.update", json!({ "id": id(10), "sku": "A", "name": "Lamp", "price": gbp(250) })),
        ("product.restock", json!({ "id": id(10), "quantity": -3 })),
        ("product.delete", json!({ "id": id(10) })),
        ("order.create", json!({ "id": id(20), "user": id(1), "lines": [line, line], "placed_at": now() })),
        ("order.pay", json!({ "id": id(20) })),
        ("order.ship", json!({ "id": id(20) })),
        ("order.cancel", json!({ "id": id(20) })),
        ("order.delete", json!({ "id": id(20) })),
    ])
}

/// Commands that lead to every event and through every state.
fn history() -> Vec<Command> {
    vec![
        register(1, "ada@example.com"),
        command("user.update", json!({ "id": id(1), "name": "Ada L.", "country": "United Kingdom" })),
        create_product(10, "A", 50),
        command("product.update", json!({ "id": id(10), "name": "Lamp \"é\" \u{1F4A1}" })),
        restock(10, -3),
        create_order(20, 1, &[(10, 1), (10, 2)]),
        bare("order.pay", 20),
        bare("order.ship", 20),
        bare("order.delete", 20),
        create_order(21, 1, &[(10, 3)]),
        bare("order.cancel", 21),
        bare("product.delete", 10),
        bare("user.delete", 1),
    ]
}

/// Every place in the request, as a JSON pointer and as the path by which an error names it.
fn places(value: &Value) -> Vec<(String, String)> {
    let mut found = vec![(String::new(), String::new())];
    let children: Vec<(String, String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, child)| (name.clone(), name.clone(), child)).collect(),
        Value::Array(items) => {
            items.iter().enumerate().map(|(i, child)| (i.to_string(), format!("[{i}]"), child)).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => vec![],
    };
    for (step, name, child) in children {
        for (pointer, path) in places(child) {
            let dot = if path.is_empty() || path.starts_with('[') { "" } else { "." };
            found.push((format!("/{step}{pointer}"), format!("{name}{dot}{path}")));
        }
    }
    found
}

fn refusal(name: &str, request: impl AsRef<[u8]>) -> Malformed {
    let request = request.as_ref();
    let malformed = parse(name, request).expect_err(&String::from_utf8_lossy(request));
    assert!(!malformed.to_string().is_empty());
    malformed
}

#[test]
fn every_command_has_its_own_name_and_an_example_that_is_read() {
    let names: Vec<_> = commands().map(|command| format!("{}.{}", command.aggregate, command.verb)).collect();
    let unique: BTreeSet<_> = names.iter().map(String::as_str).collect();
    assert_eq!(unique.len(), names.len());
    assert_eq!(unique, examples().into_keys().collect());
    for (name, request) in examples() {
        let command = command(name, request.clone());
        assert_eq!(json!(command.target()), request["id"]);
        assert!(command.touches().contains(&command.target()));
    }
}

#[test]
fn every_command_has_a_schema_that_takes_its_example_and_no_unknown_field() {
    for command in commands() {
        assert!(!command.description.is_empty());
        let name = format!("{}.{}", command.aggregate, command.verb);
        let schema = (command.schema)().to_value();
        let example = &examples()[name.as_str()];
        let objects =
            [&schema].into_iter().chain(schema["$defs"].as_object().into_iter().flat_map(|defs| defs.values()));
        for object in objects {
            assert_eq!((&object["type"], &object["additionalProperties"]), (&json!("object"), &json!(false)), "{name}");
        }
        let properties: BTreeSet<_> = schema["properties"].as_object().unwrap().keys().collect();
        assert_eq!(properties, example.as_object().unwrap().keys().collect(), "{name}");
        assert_eq!(schema["properties"]["id"]["default"], Value::Null, "{name}: the nil UUID is no default to show");
    }
}

#[test]
fn a_required_field_of_the_schema_is_required() {
    for command in commands() {
        let name = format!("{}.{}", command.aggregate, command.verb);
        let example = examples()[name.as_str()].clone();
        let schema = (command.schema)().to_value();
        let required = schema["required"].as_array().unwrap();
        for field in example.as_object().unwrap().keys() {
            let mut request = example.clone();
            request.as_object_mut().unwrap().remove(field);
            if required.contains(&json!(field)) {
                let malformed = refusal(&name, request.to_string());
                assert_eq!(malformed, Malformed::new(field, Reason::Missing, ""));
            } else {
                assert!(parse(&name, request.to_string()).is_ok(), "{name} without {field}");
            }
        }
    }
}

#[test]
fn an_unknown_field_is_named_wherever_it_stands() {
    for (name, example) in examples() {
        for (pointer, path) in places(&example) {
            let mut request = example.clone();
            let Value::Object(fields) = request.pointer_mut(&pointer).unwrap() else {
                continue;
            };
            fields.insert("colour".to_owned(), json!("red"));
            let malformed = refusal(name, request.to_string());
            assert_eq!(malformed.field, if path.is_empty() { "colour".to_owned() } else { format!("{path}.colour") });
            assert_eq!(malformed.reason, Reason::Unknown, "{malformed}");
            assert!(malformed.expected.contains('`'), "{malformed}");
        }
    }
}

#[test]
fn a_value_of_the_wrong_type_is_named_wherever_it_stands() {
    let others = [json!(true), json!(5), json!(1.5), json!("x"), json!([]), json!([5]), json!({}), json!({ "x": 1 })];
    for (name, example) in examples() {
        for (pointer, path) in places(&example) {
            let kind = std::mem::discriminant(example.pointer(&pointer).unwrap());
            for other in others.iter().filter(|other| std::mem::discriminant(*other) != kind || other.is_f64()) {
                let mut request = example.clone();
                *request.pointer_mut(&pointer).unwrap() = other.clone();
                let malformed = refusal(name, request.to_string());
                assert_eq!(malformed.field, path, "{name}: {malformed}");
                assert_eq!(malformed.reason, Reason::WrongType, "{name}: {malformed}");
                let told = malformed.to_string();
                assert!(told.contains(": expected ") || path.is_empty(), "{name}: {malformed}");
                assert!(told.contains(", got "), "{name}: {malformed}");
            }
        }
    }
}

/// Whoever adds a text to a command must name `requested` beside it: `Deserialize` takes whatever was stored.
#[test]
fn a_text_that_shows_nothing_or_cannot_be_is_refused_wherever_it_stands() {
    for (name, example) in examples() {
        for (pointer, path) in places(&example) {
            for bad in ["", " ", "\u{200b}", "\u{3164}\u{fe0f}", "\u{2800}", "a\u{7}b", "a\u{2028}b", "a\u{202e}b"] {
                let mut request = example.clone();
                let place = request.pointer_mut(&pointer).unwrap();
                if !place.is_string() {
                    continue;
                }
                *place = json!(bad);
                assert_eq!(refusal(name, request.to_string()).field, path, "{name} {bad:?}");
            }
        }
    }
}

#[test]
fn an_array_is_no_object_even_if_its_items_are_in_the_order_of_the_fields() {
    let id = json!(id(1));
    assert_eq!(refusal("user.delete", json!([id]).to_string()).to_string(), "expected an object, got an array");
    let lines = json!({ "user": id, "lines": [{ "product": id, "quantity": 1 }, [id, 1, null]] });
    assert_eq!(refusal("order.create", lines.to_string()).field, "lines[1]");
    let price = json!({ "id": id, "price": [250, "GBP"] });
    assert_eq!(refusal("product.update", price.to_string()).field, "price");
}

#[test]
fn a_field_that_is_there_twice_is_named() {
    for (name, example) in examples() {
        let text = example.to_string();
        for (field, value) in example.as_object().unwrap() {
            let twice = format!("{{\"{field}\":{value},{}", &text[1..]);
            let malformed = refusal(name, twice);
            assert_eq!(malformed, Malformed::new(field, Reason::Duplicate, ""));
        }
    }
}

#[test]
fn what_is_cut_off_or_goes_on_or_is_no_text_is_refused() {
    for (name, example) in examples() {
        let text = example.to_string();
        for end in 1..text.len() {
            refusal(name, &text[..end]);
        }
        for more in ["x", "{}", ",", "]", "}", "\0", "\u{feff}"] {
            assert_eq!(refusal(name, format!("{text}{more}")).field, "", "{more}");
        }
        for place in 0..text.len() {
            for byte in [0x00, 0x1f, 0xff, 0xc0] {
                let mut broken = text.clone().into_bytes();
                broken[place] = byte;
                refusal(name, broken);
            }
        }
    }
}

#[test]
fn deep_nesting_is_refused_wherever_it_stands() {
    for (name, example) in examples() {
        for deep in ["[".repeat(10_000), "{\"a\":".repeat(10_000), "[".repeat(5_000) + &"]".repeat(5_000)] {
            refusal(name, &deep);
            for field in example.as_object().unwrap().keys() {
                assert!(refusal(name, format!("{{\"{field}\":{deep}}}")).field.starts_with(field.as_str()));
            }
            assert_eq!(refusal(name, format!("{{\"colour\":{deep}}}")).field, "colour");
        }
    }
}

#[test]
fn an_error_is_short_and_printable_whatever_was_sent() {
    let long = "\u{7}é\"".repeat(20_000);
    for (name, example) in examples() {
        for (pointer, _) in places(&example) {
            let mut request = example.clone();
            let place = request.pointer_mut(&pointer).unwrap();
            match place {
                Value::Object(fields) => {
                    fields.insert(long.clone(), json!(1));
                }
                other => *other = json!(long),
            }
            let malformed = refusal(name, request.to_string());
            let told = malformed.to_string();
            assert!(malformed.field.chars().count() <= 121 && told.chars().count() <= 760, "{told}");
            assert!(!told.contains(char::is_control), "{told}");
        }
    }
}

#[test]
fn every_event_has_its_own_name() {
    let names: BTreeSet<_> = events().into_iter().map(|(kind, name, _)| (kind, name)).collect();
    assert_eq!(names.len(), events().len());
}

#[test]
fn every_event_and_every_state_is_read_back_as_it_was_written() {
    let mut aggregates = Aggregates::default();
    let mut seen = BTreeSet::new();
    for command in history() {
        for recorded in aggregates.execute(command, None, now()).unwrap() {
            let event = recorded.event;
            let (kind, name, schema) = (event.aggregate(), event.name(), event.schema());
            assert_eq!(Event::decode(kind, name, schema, &event.encode().unwrap()).unwrap(), event);
            seen.insert((kind, name, schema));
        }
        for changed in aggregates.changed() {
            let json = changed.state.encode().unwrap();
            assert_eq!(State::decode(changed.state.aggregate(), &json).unwrap(), *changed.state);
        }
    }
    assert_eq!(seen, events().into_iter().collect(), "every event is emitted by the history");
}

#[test]
fn what_this_program_does_not_know_is_not_decoded() {
    let mut aggregates = Aggregates::default();
    for command in history() {
        for recorded in aggregates.execute(command, None, now()).unwrap() {
            let event = recorded.event;
            let (kind, name, schema) = (event.aggregate(), event.name(), event.schema());
            let payload = event.encode().unwrap();
            for (kind, name, schema) in [
                ("shop", name, schema),
                ("", name, schema),
                (kind, "vanished", schema),
                (kind, "", schema),
                (kind, name, schema + 1),
                (kind, name, 0),
                (kind, name, -1),
            ] {
                let decoded = Event::decode(kind, name, schema, &payload);
                assert!(matches!(decoded, Err(crate::Undecodable::Unknown)), "{kind}.{name} {schema}");
            }
            for payload in
                [b"".as_slice(), b"null", b"5", b"{", b"\xff", &payload[1..], &[&payload, b"x".as_slice()].concat()]
            {
                let decoded = Event::decode(kind, name, schema, payload);
                assert!(matches!(decoded, Err(crate::Undecodable::Payload(_))), "{kind}.{name}");
            }
        }
        for changed in aggregates.changed() {
            let json = changed.state.encode().unwrap();
            assert!(matches!(State::decode("shop", &json), Err(crate::Undecodable::Unknown)));
            for json in [b"{}".as_slice(), b"", b"{\"status\":\"lost\"}"] {
                let decoded = State::decode(changed.state.aggregate(), json);
                assert!(matches!(decoded, Err(crate::Undecodable::Payload(_))));
            }
        }
    }
}
