//! What must hold of every command, event and state of every aggregate, also of those still to be written. All of it
//! runs on the samples that each aggregate gives of itself.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{
    Event, Malformed, Reason, State, commands, events, rejections, sample_events, samples,
    scenario::{Stored, assert_declared, command, id, parse},
};

/// For each command, the accepted sample with the most fields.
fn examples() -> BTreeMap<String, Value> {
    let mut examples: BTreeMap<String, Value> = BTreeMap::new();
    for (known, sample) in samples().filter(|(_, sample)| sample.refused.is_none()) {
        let request: Value = serde_json::from_str(sample.request).unwrap();
        let name = format!("{}.{}", known.aggregate, known.verb);
        let fields = |value: &Value| places(value).len();
        if examples.get(&name).is_none_or(|example| fields(example) < fields(&request)) {
            examples.insert(name, request);
        }
    }
    examples
}

/// The first field of the schema that the request does not have.
fn missing(schema: &Value, part: &Value, value: &Value) -> Option<String> {
    if let Some(choices) = part["anyOf"].as_array() {
        return choices.iter().find_map(|choice| missing(schema, choice, value));
    }
    if let Some(name) = part["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
        return missing(schema, &schema["$defs"][name], value);
    }
    if let (Some(fields), Some(object)) = (part["properties"].as_object(), value.as_object()) {
        return fields.iter().find_map(|(name, field)| match object.get(name) {
            None | Some(Value::Null) => Some(name.clone()),
            Some(value) => missing(schema, field, value).map(|path| format!("{name}.{path}")),
        });
    }
    match value.as_array() {
        Some(items) => {
            let of_each: Vec<_> = items.iter().map(|item| missing(schema, &part["items"], item)).collect();
            // It is enough that one item has every field.
            of_each.into_iter().reduce(Option::and).flatten()
        }
        None => None,
    }
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
fn every_command_has_its_own_name_and_a_sample_with_every_field() {
    let names: Vec<_> = commands().map(|command| format!("{}.{}", command.aggregate, command.verb)).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    let examples = examples();
    for (name, known) in names.iter().zip(commands()) {
        let place = format!("SAMPLES of `{}`", known.aggregate);
        let example = examples.get(name).unwrap_or_else(|| panic!("{place}: add one of `{}`", known.verb));
        let schema = (known.schema)().to_value();
        let missing = missing(&schema, &schema, example);
        assert_eq!(missing, None, "{place}: no accepted one of `{}` has every field; add one", known.verb);
        let command = command(name, example.clone());
        assert_eq!(json!(command.target()), example["id"]);
        assert!(command.touches().contains(&command.target()));
    }
}

#[test]
fn every_sample_is_what_it_says_and_together_they_show_every_event_and_every_code() {
    let mut stored = Stored::default();
    let (mut emitted, mut refused) = (BTreeSet::new(), BTreeSet::new());
    for (known, sample) in samples() {
        let request = serde_json::from_str(sample.request).unwrap();
        match stored.execute(command(&format!("{}.{}", known.aggregate, known.verb), request)) {
            Ok(events) => {
                assert_eq!(sample.refused, None, "{sample:?} was accepted");
                emitted.extend(events.iter().map(|it| (it.event.aggregate(), it.event.name(), it.event.schema())));
            }
            Err(rejection) => {
                assert_eq!(Some(rejection.code), sample.refused, "{sample:?}: {}", rejection.message);
                assert_declared(rejection.code);
                refused.insert(rejection.code);
            }
        }
    }
    for event in events() {
        assert!(emitted.contains(&event), "SAMPLES of `{}`: add one that leads to the event `{}`", event.0, event.1);
    }
    for (kind, code, meaning) in rejections().filter(|(kind, ..)| !kind.is_empty()) {
        assert!(refused.contains(code), "SAMPLES of `{kind}`: add one that is refused with `{code}`");
        assert!(!meaning.is_empty());
    }
    let codes: Vec<_> = rejections().map(|(_, code, _)| code).collect();
    assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len(), "a code has one meaning: {codes:?}");
    // What is decided on what commands name is what is decided on everything.
    let versions: BTreeMap<_, _> = sample_events().into_iter().map(|event| (event.id, event.version)).collect();
    assert_eq!(
        stored.states().into_iter().map(|(id, (version, _))| (id, version)).collect::<BTreeMap<_, _>>(),
        versions
    );
}

#[test]
fn every_command_has_a_schema_that_takes_its_example_and_no_unknown_field() {
    for command in commands() {
        assert!(!command.description.is_empty());
        let name = format!("{}.{}", command.aggregate, command.verb);
        let schema = (command.schema)().to_value();
        let example = &examples()[&name];
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
        let example = examples()[&name].clone();
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
            let malformed = refusal(&name, request.to_string());
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
                let malformed = refusal(&name, request.to_string());
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
                assert_eq!(refusal(&name, request.to_string()).field, path, "{name} {bad:?}");
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
            let malformed = refusal(&name, twice);
            assert_eq!(malformed, Malformed::new(field, Reason::Duplicate, ""));
        }
    }
}

#[test]
fn what_is_cut_off_or_goes_on_or_is_no_text_is_refused() {
    for (name, example) in examples() {
        let text = example.to_string();
        for end in 1..text.len() {
            refusal(&name, &text[..end]);
        }
        for more in ["x", "{}", ",", "]", "}", "\0", "\u{feff}"] {
            assert_eq!(refusal(&name, format!("{text}{more}")).field, "", "{more}");
        }
        for place in 0..text.len() {
            for byte in [0x00, 0x1f, 0xff, 0xc0] {
                let mut broken = text.clone().into_bytes();
                broken[place] = byte;
                refusal(&name, broken);
            }
        }
    }
}

#[test]
fn deep_nesting_is_refused_wherever_it_stands() {
    for (name, example) in examples() {
        for deep in ["[".repeat(10_000), "{\"a\":".repeat(10_000), "[".repeat(5_000) + &"]".repeat(5_000)] {
            refusal(&name, &deep);
            for field in example.as_object().unwrap().keys() {
                assert!(refusal(&name, format!("{{\"{field}\":{deep}}}")).field.starts_with(field.as_str()));
            }
            assert_eq!(refusal(&name, format!("{{\"colour\":{deep}}}")).field, "colour");
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
            let malformed = refusal(&name, request.to_string());
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
    for recorded in sample_events() {
        let event = recorded.event;
        let (kind, name, schema) = (event.aggregate(), event.name(), event.schema());
        assert_eq!(Event::decode(kind, name, schema, &event.encode().unwrap()).unwrap(), event);
    }
    for state in states() {
        assert_eq!(State::decode(state.aggregate(), &state.encode().unwrap()).unwrap(), state);
    }
}

/// Every state that the samples lead to.
fn states() -> Vec<State> {
    let mut stored = Stored::default();
    let mut states = Vec::new();
    for (known, sample) in samples() {
        let request = serde_json::from_str(sample.request).unwrap();
        let _ = stored.execute(command(&format!("{}.{}", known.aggregate, known.verb), request));
        states.extend(stored.states().into_values().map(|(_, state)| state));
    }
    states
}

#[test]
fn what_this_program_does_not_know_is_not_decoded() {
    for recorded in sample_events() {
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
    for state in states() {
        let (kind, json) = (state.aggregate(), state.encode().unwrap());
        assert!(matches!(State::decode("shop", &json), Err(crate::Undecodable::Unknown)));
        for json in [b"".as_slice(), b"{", b"\xff", &json[1..], b"{\"status\":\"lost\"}"] {
            let decoded = State::decode(kind, json);
            assert!(matches!(decoded, Err(crate::Undecodable::Payload(_))), "{kind} {json:?}");
        }
    }
}
