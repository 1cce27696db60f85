//! Tests of what must hold for the commands, events and states of all aggregates, present and future. They run on the
//! samples of the aggregates.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{
    Event, Id, Malformed, Reason, State, commands, events, rejections, sample_events, samples,
    scenario::{InMemoryJournal, assert_declared, command, id, parse},
};

/// For each command, the accepted sample with the most fields.
fn examples() -> BTreeMap<String, Value> {
    let mut examples: BTreeMap<String, Value> = BTreeMap::new();
    for (command_type, sample) in samples().filter(|(_, sample)| sample.refused.is_none()) {
        let request: Value = serde_json::from_str(sample.request).unwrap();
        let name = format!("{}.{}", command_type.aggregate, command_type.verb);
        let fields = |value: &Value| locations(value).len();
        if examples.get(&name).is_none_or(|example| fields(example) < fields(&request)) {
            examples.insert(name, request);
        }
    }
    examples
}

/// The first field of the schema that is absent from the request.
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
            let missing_fields: Vec<_> = items.iter().map(|item| missing(schema, &part["items"], item)).collect();
            // It is enough if one item has every field.
            missing_fields.into_iter().reduce(Option::and).flatten()
        }
        None => None,
    }
}

/// Every value in the request, as a JSON pointer and as the path in errors about it.
fn locations(value: &Value) -> Vec<(String, String)> {
    let mut found = vec![(String::new(), String::new())];
    let children: Vec<(String, String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, child)| (name.clone(), name.clone(), child)).collect(),
        Value::Array(items) => {
            items.iter().enumerate().map(|(i, child)| (i.to_string(), format!("[{i}]"), child)).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => vec![],
    };
    for (step, name, child) in children {
        for (pointer, path) in locations(child) {
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
    for (name, command_type) in names.iter().zip(commands()) {
        let place = format!("SAMPLES of `{}`", command_type.aggregate);
        let example = examples.get(name).unwrap_or_else(|| panic!("{place}: add one of `{}`", command_type.verb));
        let schema = (command_type.schema)().to_value();
        let missing = missing(&schema, &schema, example);
        assert_eq!(missing, None, "{place}: no accepted one of `{}` has every field; add one", command_type.verb);
        let command = command(name, example.clone());
        assert_eq!(json!(command.target()), example["id"]);
        assert!(command.touches().contains(&command.target()));
    }
}

/// Whether the unit tests of an aggregate contain the text.
fn is_tested(text: &str) -> bool {
    let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap();
    let sources = files.filter_map(|file| std::fs::read_to_string(file.unwrap().path()).ok());
    sources
        .filter_map(|source| source.split_once("\nmod tests {").map(|(_, tests)| tests.to_owned()))
        .any(|tests| tests.contains(text))
}

#[test]
fn every_sample_has_its_declared_outcome_and_together_they_show_every_event_and_every_code() {
    let mut stored = InMemoryJournal::default();
    let (mut emitted, mut refused) = (BTreeSet::new(), BTreeSet::new());
    for (command_type, sample) in samples() {
        let request = serde_json::from_str(sample.request).unwrap();
        match stored.execute(command(&format!("{}.{}", command_type.aggregate, command_type.verb), request)) {
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
        // Some refusals take more past than samples can give.
        assert!(
            refused.contains(code) || is_tested(&format!("\"{code}\"")),
            "SAMPLES of `{kind}`: add one that is refused with `{code}`, or a unit test where no sample can be"
        );
        assert!(!meaning.is_empty());
    }
    let codes: Vec<_> = rejections().map(|(_, code, _)| code).collect();
    assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len(), "a code has one meaning: {codes:?}");
    // Loading only what the commands declare must lead to the same versions as having everything in memory.
    let versions: BTreeMap<_, _> = sample_events().into_iter().map(|event| (event.id, event.version)).collect();
    assert_eq!(
        stored.states().into_iter().map(|(id, (version, _))| (id, version)).collect::<BTreeMap<_, _>>(),
        versions
    );
}

#[test]
fn the_schema_of_every_command_has_the_fields_of_its_example_and_no_others() {
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
        assert_eq!(
            schema["properties"]["id"]["default"],
            Value::Null,
            "{name}: the schema must not show the nil UUID as a default"
        );
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
fn an_unknown_field_is_named_wherever_it_is() {
    for (name, example) in examples() {
        for (pointer, path) in locations(&example) {
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
fn a_value_of_the_wrong_type_is_named_wherever_it_is() {
    let others = [json!(true), json!(5), json!(1.5), json!("x"), json!([]), json!([5]), json!({}), json!({ "x": 1 })];
    for (name, example) in examples() {
        for (pointer, path) in locations(&example) {
            let kind = std::mem::discriminant(example.pointer(&pointer).unwrap());
            for other in others.iter().filter(|other| std::mem::discriminant(*other) != kind || other.is_f64()) {
                let mut request = example.clone();
                *request.pointer_mut(&pointer).unwrap() = other.clone();
                let malformed = refusal(&name, request.to_string());
                assert_eq!(malformed.field, path, "{name}: {malformed}");
                assert_eq!(malformed.reason, Reason::WrongType, "{name}: {malformed}");
                let message = malformed.to_string();
                assert!(message.contains(": expected ") || path.is_empty(), "{name}: {malformed}");
                assert!(message.contains(", got "), "{name}: {malformed}");
            }
        }
    }
}

/// This fails for a text without `requested`, since `Deserialize` accepts any stored text.
#[test]
fn a_text_that_is_blank_or_has_forbidden_characters_is_refused_wherever_it_is() {
    for (name, example) in examples() {
        for (pointer, path) in locations(&example) {
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
fn an_array_is_not_read_as_an_object() {
    let id = json!(id(1));
    assert_eq!(refusal("user.delete", json!([id]).to_string()).to_string(), "expected an object, got an array");
    let lines = json!({ "user": id, "lines": [{ "product": id, "quantity": 1 }, [id, 1, null]] });
    assert_eq!(refusal("order.create", lines.to_string()).field, "lines[1]");
    let price = json!({ "id": id, "price": [250, "GBP"] });
    assert_eq!(refusal("product.update", price.to_string()).field, "price");
}

#[test]
fn a_duplicate_field_is_named() {
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
fn a_body_that_is_truncated_or_goes_on_or_is_not_text_is_refused() {
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
fn deep_nesting_is_refused_wherever_it_is() {
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
        for (pointer, _) in locations(&example) {
            let mut request = example.clone();
            let place = request.pointer_mut(&pointer).unwrap();
            match place {
                Value::Object(fields) => {
                    fields.insert(long.clone(), json!(1));
                }
                other => *other = json!(long),
            }
            let malformed = refusal(&name, request.to_string());
            let message = malformed.to_string();
            assert!(malformed.field.chars().count() <= 121 && message.chars().count() <= 760, "{message}");
            assert!(!message.contains(char::is_control), "{message}");
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
    for (_, state) in states() {
        assert_eq!(State::decode(state.aggregate(), state.form(), &state.encode().unwrap()).unwrap(), state);
    }
}

#[test]
fn every_step_from_a_schema_to_the_next_has_a_unit_test() {
    for (kind, name, schema) in events() {
        for older in 1..schema {
            let given = format!("given_stored(\"{kind}.{name}\", {older},");
            assert!(
                is_tested(&given),
                "{kind}.rs: schema {older} of `{name}` has no unit test: write one with `{given} …`"
            );
        }
    }
}

/// The states that the samples lead to, after each of them.
pub(crate) fn states() -> Vec<(Id, State)> {
    let mut stored = InMemoryJournal::default();
    let mut states = Vec::new();
    for (command_type, sample) in samples() {
        let request = serde_json::from_str(sample.request).unwrap();
        let _ = stored.execute(command(&format!("{}.{}", command_type.aggregate, command_type.verb), request));
        states.extend(stored.states().into_iter().map(|(id, (_, state))| (id, state)));
    }
    states
}

#[test]
fn unknown_events_and_states_are_not_decoded() {
    for recorded in sample_events() {
        let event = recorded.event;
        let (kind, name, schema) = (event.aggregate(), event.name(), event.schema());
        let payload = event.encode().unwrap();
        for (kind, name, schema) in [
            ("shop", name, schema),
            ("", name, schema),
            (kind, "vanished", schema),
            (kind, "", schema),
            (kind, name, 0),
            (kind, name, -1),
            (kind, name, i16::MIN),
        ] {
            let decoded = Event::decode(kind, name, schema, &payload);
            assert!(matches!(decoded, Err(crate::Undecodable::Unknown)), "{kind}.{name} {schema}");
        }
        for newer in [schema + 1, i16::MAX] {
            let message = format!("schema {newer} of {kind}.{name} is newer than the {schema} that this program knows");
            let error = Event::decode(kind, name, newer, &payload).unwrap_err();
            assert!(matches!(error, crate::Undecodable::Newer { .. }));
            assert_eq!(error.to_string(), message);
        }
        for payload in
            [b"".as_slice(), b"null", b"5", b"{", b"\xff", &payload[1..], &[&payload, b"x".as_slice()].concat()]
        {
            let decoded = Event::decode(kind, name, schema, payload);
            assert!(matches!(decoded, Err(crate::Undecodable::Payload(_))), "{kind}.{name}");
        }
    }
    for (_, state) in states() {
        let (kind, form, json) = (state.aggregate(), state.form(), state.encode().unwrap());
        assert!(matches!(State::decode("shop", form, &json), Err(crate::Undecodable::Unknown)));
        for other in [form - 1, form + 1] {
            let decoded = State::decode(kind, other, &json);
            assert!(matches!(decoded, Err(crate::Undecodable::Form { .. })), "{kind} {other}");
        }
        for json in [b"".as_slice(), b"{", b"\xff", &json[1..], b"{\"status\":\"lost\"}"] {
            let decoded = State::decode(kind, form, json);
            assert!(matches!(decoded, Err(crate::Undecodable::Payload(_))), "{kind} {json:?}");
        }
    }
}
