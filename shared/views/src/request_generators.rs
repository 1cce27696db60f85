//! Generators of requests for property tests. They follow the JSON Schemas: fields take values at the ends of their
//! ranges, and optional fields may be absent. New commands, queries and fields are covered automatically.

use domain::CommandType;
use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Map, Value, json};

use crate::given;

/// The number of different aggregates of each kind in the requests.
const AGGREGATES_PER_KIND: usize = 5;
/// Times in the requests. Those after the time at which a test runs are refused.
const TIMESTAMPS: [&str; 4] =
    ["0000-01-01T00:00:00Z", "2010-12-01T23:59:59.999Z", "2010-12-02T00:30:00+01:00", "9999-12-31T23:59:59.999Z"];
/// Characters to fill texts with. They have one to four bytes, grow in lower case or in NFKC, or have a meaning in
/// MongoDB or JSON.
const FILLERS: [&str; 14] = ["x", "é", "ß", "İ", "ﷺ", "한", "𝄞", "👩", "$", ".", "%", "/", "\"", " a"];

/// The identifiers of aggregates of one kind in the requests.
pub fn ids(kind: &str) -> Vec<String> {
    let first = kind.bytes().fold(0, |sum, byte| sum * 31 % 1_000_000 + u128::from(byte)) * 1_000;
    (0..AGGREGATES_PER_KIND as u128).map(|n| given::id(first + n).to_string()).collect()
}

/// Generates requests for a command.
pub fn command(command: &CommandType) -> BoxedStrategy<Value> {
    let schema = (command.schema)().to_value();
    request(&schema, command.aggregate)
}

/// Generates requests that follow a schema. Their `id` is that of an aggregate of this kind.
pub fn request(schema: &Value, kind: &str) -> BoxedStrategy<Value> {
    Generator { definitions: &schema["$defs"], kind }.value("", schema)
}

struct Generator<'a> {
    definitions: &'a Value,
    kind: &'a str,
}

impl Generator<'_> {
    fn value(&self, name: &str, schema: &Value) -> BoxedStrategy<Value> {
        if let Some(reference) = schema["$ref"].as_str() {
            let definition = reference.strip_prefix("#/$defs/").unwrap();
            return self.value(name, &self.definitions[definition]);
        }
        if let Some(choices) = schema["anyOf"].as_array() {
            let any = choices.iter().map(|choice| self.value(name, choice)).collect::<Vec<_>>();
            return proptest::strategy::Union::new(any).boxed();
        }
        if let Some(choices) = schema["enum"].as_array() {
            return select(choices.clone()).boxed();
        }
        let types = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
        let of_type = |kind: &Value| match kind.as_str().unwrap() {
            "null" => Just(Value::Null).boxed(),
            "boolean" => any::<bool>().prop_map(Value::from).boxed(),
            "integer" => integer(name, schema),
            "string" => self.string(name, schema),
            "array" => self.array(name, schema),
            "object" => self.object(schema),
            "number" => panic!("`{name}` may have a fraction: let it be a whole number of a smaller unit"),
            other => panic!("add a generator for values of the type {other} here, for `{name}`"),
        };
        proptest::strategy::Union::new(types.iter().map(of_type).collect::<Vec<_>>()).boxed()
    }

    fn string(&self, name: &str, schema: &Value) -> BoxedStrategy<Value> {
        let texts: Vec<String> = match (schema["format"].as_str(), schema["pattern"].as_str()) {
            (Some("uuid"), _) => ids(if name == "id" { self.kind } else { name }),
            (Some("date-time"), _) => TIMESTAMPS.map(str::to_owned).to_vec(),
            (Some("date"), _) => TIMESTAMPS.map(|timestamp| timestamp[..10].to_owned()).to_vec(),
            (Some(_), _) => shown(name),
            (None, Some("^[A-Z]{3}$")) => ["GBP", "EUR", "JPY"].map(str::to_owned).to_vec(),
            (None, Some(_)) => shown(name),
            (None, None) if name == "email" => return emails(),
            (None, None) => return text(schema),
        };
        select(texts).prop_map(Value::from).boxed()
    }

    fn array(&self, name: &str, schema: &Value) -> BoxedStrategy<Value> {
        let item = self.value(name, &schema["items"]);
        assert!(
            schema["maxItems"].is_u64(),
            "the schema of `{name}` does not say its maxItems: bound the list, as `lines` in order.rs is"
        );
        let (min, max) = (size(schema, "minItems", 0), size(schema, "maxItems", 0));
        let full = item.clone().prop_map(move |item| vec![item; max]);
        prop_oneof![40 => vec(item, min..=min + 2), 1 => full].prop_map(Value::from).boxed()
    }

    fn object(&self, schema: &Value) -> BoxedStrategy<Value> {
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let field = |(name, property): (&String, &Value)| {
            let (name, value) = (name.clone(), self.value(name, property));
            let is_present = if required.contains(&&*name) { Just(true).boxed() } else { any::<bool>().boxed() };
            (Just(name), value, is_present)
        };
        let properties = schema["properties"].as_object().into_iter().flatten();
        let fields: Vec<_> = properties.map(field).collect();
        let object = |fields: Vec<(String, Value, bool)>| {
            let present = fields.into_iter().filter(|(.., is_present)| *is_present);
            Value::Object(present.map(|(name, value, _)| (name, value)).collect::<Map<_, _>>())
        };
        fields.prop_map(object).boxed()
    }
}

/// Generates numbers at both ends of the range, and one so small that a million of them are within it.
fn integer(name: &str, schema: &Value) -> BoxedStrategy<Value> {
    let end = |end: &str| {
        schema[end].as_i64().unwrap_or_else(|| panic!("the schema of `{name}` does not say its {end}: {schema}"))
    };
    let (min, max) = (end("minimum"), end("maximum"));
    select(vec![min, min + 1, (max / 1_000_000).max(min), max / 2, max]).prop_map(Value::from).boxed()
}

/// The texts that the samples of commands and the examples of queries show for a field of this name: no others are
/// known where the schema has a form of its own.
fn shown(name: &str) -> Vec<String> {
    fn collect(name: &str, value: &Value, texts: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                texts.extend(fields.get(name).and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| collect(name, value, texts));
            }
            Value::Array(items) => items.iter().for_each(|item| collect(name, item, texts)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    let samples = domain::samples().map(|(_, sample)| sample.request);
    let examples = crate::queries().into_iter().flat_map(|(_, query)| query.examples.iter().copied());
    let mut texts = Vec::new();
    for request in samples.chain(examples) {
        collect(name, &serde_json::from_str(request).unwrap(), &mut texts);
    }
    assert!(!texts.is_empty(), "no sample of a command and no example of a query shows a text for `{name}`");
    texts
}

fn text(schema: &Value) -> BoxedStrategy<Value> {
    let (min, max) = (size(schema, "minLength", 1), size(schema, "maxLength", 100));
    let filled = |length: usize| {
        let text = move |(n, filler): (u32, &str)| {
            let filled = n.to_string() + &filler.repeat(length);
            Value::from(filled.chars().take(length).collect::<String>())
        };
        (0..1_000_u32, select(FILLERS.to_vec())).prop_map(text)
    };
    // Short texts are rare, because there are few of them and unique values would soon be taken.
    prop_oneof![1 => filled(min), 4 => filled(max), 4 => filled(max / 2)].boxed()
}

fn emails() -> BoxedStrategy<Value> {
    let short = (0..100).prop_map(|n| format!("{n}@a.bc"));
    let long = (0..100).prop_map(|n| {
        let (local, label) = (format!("{n:0>64}"), "x".repeat(61));
        format!("{local}@{label}.{label}.{label}.co")
    });
    let wide = (0..100).prop_map(|n| format!("{n}{}@ÉXAMPLE.com", "é".repeat(30)));
    prop_oneof![short, long, wide].prop_map(Value::from).boxed()
}

fn size(schema: &Value, name: &str, otherwise: usize) -> usize {
    schema[name].as_u64().map_or(otherwise, |size| usize::try_from(size).unwrap())
}

/// The generated requests are worth something only if most of them can be parsed.
#[test]
fn most_generated_requests_are_well_formed() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for command_type in domain::commands() {
        let requests = command(command_type);
        let generated = (0..100).map(|_| requests.new_tree(&mut runner).unwrap().current());
        let parsed = generated
            .filter(|request| (command_type.parse)(request.to_string().as_bytes(), given::id(1)).is_ok())
            .count();
        assert!(parsed > 40, "{}.{}: {parsed} of 100", command_type.aggregate, command_type.verb);
    }
    let nothing = json!({ "type": "object", "properties": {} });
    assert_eq!(request(&nothing, "").new_tree(&mut runner).unwrap().current(), json!({}));
}
