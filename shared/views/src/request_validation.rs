//! Tests of the validation of all requests, for commands and queries alike: `null` means that an optional field is
//! absent, and an error about a value agrees with the schema of the field. Requests are generated from the schemas, so
//! new commands, queries and fields are covered automatically.

use std::collections::BTreeMap;

use domain::{Malformed, Reason};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::{given, request_generators};

type Parse = dyn Fn(&str) -> Result<String, Malformed>;

/// A command or a query.
struct Endpoint {
    name: String,
    /// The kind of the aggregate that `id` in the requests refers to.
    kind: &'static str,
    schema: Value,
    /// Parses a request. The result is a text, since commands and plans have no common type.
    parse: Box<Parse>,
}

fn endpoints() -> Vec<Endpoint> {
    let commands = domain::commands().map(|command_type| Endpoint {
        name: format!("cmd.{}.{}", command_type.aggregate, command_type.verb),
        kind: command_type.aggregate,
        schema: (command_type.schema)().to_value(),
        parse: Box::new(|body| Ok(format!("{:?}", (command_type.parse)(body.as_bytes(), given::id(1))?))),
    });
    let queries = crate::queries().into_iter().map(|(_, query)| Endpoint {
        name: format!("qry.{}.{}", query.noun, query.verb),
        kind: query.noun,
        schema: (query.schema)().to_value(),
        parse: Box::new(|body| Ok(format!("{:?}", (query.plan)(body.as_bytes())?))),
    });
    commands.chain(queries).collect()
}

/// A field of a request or of an object within it.
struct Field {
    /// The object that has the field, as a JSON pointer.
    object: String,
    name: String,
    /// The path of the field in errors.
    path: String,
    schema: Value,
    is_required: bool,
}

impl Endpoint {
    /// Generated requests, each with the fields that it may have.
    fn requests(&self, number: usize) -> impl Iterator<Item = (Value, Vec<Field>)> {
        let mut runner = TestRunner::deterministic();
        let requests = request_generators::request(&self.schema, self.kind);
        let generated = (0..number).map(move |_| requests.new_tree(&mut runner).unwrap().current());
        generated.map(|request| {
            let mut fields = Vec::new();
            self.collect(&self.schema, &request, "", "", &mut fields);
            (request, fields)
        })
    }

    /// Generated requests that are accepted.
    fn accepted_requests(&self) -> Vec<(Value, Vec<Field>)> {
        let is_accepted = |(request, _): &(Value, Vec<Field>)| (self.parse)(&request.to_string()).is_ok();
        let accepted: Vec<_> = self.requests(400).filter(is_accepted).take(10).collect();
        assert_eq!(accepted.len(), 10, "{}", self.name);
        accepted
    }

    fn collect(&self, schema: &Value, value: &Value, pointer: &str, path: &str, fields: &mut Vec<Field>) {
        if let Some(items) = value.as_array() {
            for (n, item) in items.iter().take(2).enumerate() {
                self.collect(&schema["items"], item, &format!("{pointer}/{n}"), &format!("{path}[{n}]"), fields);
            }
            return;
        }
        if !value.is_object() {
            return;
        }
        let Some(schema) = self.object(schema) else { panic!("{schema} is the schema of an object") };
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            if let Some(value) = value.get(name) {
                self.collect(property, value, &format!("{pointer}/{name}"), &path, fields);
            }
            let is_required = schema["required"].as_array().is_some_and(|required| required.contains(&json!(name)));
            let (object, name, schema) = (pointer.to_owned(), name.clone(), property.clone());
            fields.push(Field { object, name, path, schema, is_required });
        }
    }

    fn object<'a>(&'a self, schema: &'a Value) -> Option<&'a Value> {
        if let Some(choices) = schema["anyOf"].as_array() {
            return choices.iter().find_map(|choice| self.object(choice));
        }
        let reference = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix("#/$defs/"));
        let schema = reference.map_or(schema, |reference| &self.schema["$defs"][reference]);
        (schema["type"] == "object").then_some(schema)
    }

    /// The names of the JSON types that a value of the schema may have.
    fn types(&self, schema: &Value) -> Vec<String> {
        if let Some(choices) = schema["anyOf"].as_array() {
            return choices.iter().flat_map(|choice| self.types(choice)).collect();
        }
        if let Some(object) = self.object(schema) {
            return vec![object["type"].as_str().unwrap().to_owned()];
        }
        let types = &schema["type"];
        types
            .as_array()
            .cloned()
            .unwrap_or_else(|| vec![types.clone()])
            .iter()
            .map(|it| it.as_str().unwrap().to_owned())
            .collect()
    }
}

/// The request with another value in a field, or without the field. The value is a text, since a [`Value`] cannot hold
/// everything that a client can send.
fn with(request: &Value, field: &Field, value: Option<&str>) -> String {
    const PLACEHOLDER: &str = "\u{1}here\u{1}";

    let mut request = request.clone();
    let object = request.pointer_mut(&field.object).unwrap().as_object_mut().unwrap();
    object.remove(&field.name);
    if value.is_some() {
        object.insert(field.name.clone(), json!(PLACEHOLDER));
    }
    request.to_string().replace(&json!(PLACEHOLDER).to_string(), value.unwrap_or_default())
}

#[test]
fn null_means_absent_for_every_optional_field() {
    for endpoint in endpoints() {
        let mut accepted: BTreeMap<String, usize> = BTreeMap::new();
        for (request, fields) in endpoint.requests(80) {
            for field in fields.iter().filter(|field| !field.is_required) {
                let absent = (endpoint.parse)(&with(&request, field, None));
                let null = (endpoint.parse)(&with(&request, field, Some("null")));
                assert_eq!(null, absent, "{} {}", endpoint.name, field.path);
                *accepted.entry(field.path.clone()).or_default() += usize::from(null.is_ok());
                assert!(endpoint.types(&field.schema).contains(&"null".to_owned()), "{}: {}", field.path, field.schema);
            }
        }
        assert!(
            accepted.values().all(|times| *times > 0),
            "{}: a field was never accepted: {accepted:?}",
            endpoint.name
        );
    }
}

#[test]
fn a_value_of_another_json_type_is_of_the_wrong_type() {
    let values = [
        ("boolean", "true"),
        ("integer", "7"),
        ("number", "0.5"),
        ("string", r#""""#),
        ("array", "[]"),
        ("array", "[7]"),
        ("object", "{}"),
        ("object", r#"{"name":null}"#),
        ("number", "1e400"),
    ];
    for endpoint in endpoints() {
        for (request, fields) in endpoint.accepted_requests() {
            for field in fields {
                let types = endpoint.types(&field.schema);
                for (_, value) in values.iter().filter(|(of, _)| !types.contains(&(*of).to_owned())) {
                    let malformed = (endpoint.parse)(&with(&request, &field, Some(value))).unwrap_err();
                    let what = format!("{} {} {value}: {malformed}", endpoint.name, field.path);
                    assert_eq!(malformed.field, field.path, "{what}");
                    let is_huge = *value == "1e400" && types.contains(&"integer".to_owned());
                    assert_eq!(
                        malformed.reason,
                        if is_huge { Reason::OutOfBounds } else { Reason::WrongType },
                        "{what}"
                    );
                    assert!(!malformed.expected.is_empty() && malformed.to_string().contains(", got "), "{what}");
                }
            }
        }
    }
}

#[test]
fn an_error_about_a_number_names_the_bounds_of_the_schema() {
    let mut fields_seen = 0;
    for endpoint in endpoints() {
        for (request, fields) in endpoint.accepted_requests() {
            for field in
                fields.into_iter().filter(|field| endpoint.types(&field.schema).contains(&"integer".to_owned()))
            {
                let bound = |name: &str| field.schema[name].as_i64().unwrap();
                let (min, max) = (bound("minimum"), bound("maximum"));
                let beyond = [min - 1, max + 1, i64::MIN, i64::MAX].map(|number| number.to_string());
                let larger = ["18446744073709551615", "18446744073709551616", "-1e300", "1e400"].map(str::to_owned);
                for number in beyond.into_iter().chain(larger).chain(["9".repeat(400)]) {
                    let malformed = (endpoint.parse)(&with(&request, &field, Some(&number))).unwrap_err();
                    let what = format!("{} {} {number:.30}: {malformed}", endpoint.name, field.path);
                    assert_eq!((&malformed.field, malformed.reason), (&field.path, Reason::OutOfBounds), "{what}");
                    assert_eq!(malformed.bounds(), Some((min, max)), "{what}");
                }
                fields_seen += 1;
            }
        }
    }
    assert!(fields_seen > 50, "{fields_seen}");
}

#[test]
fn a_text_with_forbidden_characters_is_invalid() {
    for endpoint in endpoints() {
        for (request, fields) in endpoint.accepted_requests() {
            for field in fields.into_iter().filter(|field| endpoint.types(&field.schema).contains(&"string".to_owned()))
            {
                for wrong in [r#""\u0000""#, r#""\ud800""#, r#""a\udc00b""#] {
                    let malformed = (endpoint.parse)(&with(&request, &field, Some(wrong))).unwrap_err();
                    let what = format!("{} {} {wrong}: {malformed}", endpoint.name, field.path);
                    assert_eq!((&malformed.field, malformed.reason), (&field.path, Reason::Invalid), "{what}");
                    assert!(!malformed.expected.is_empty(), "{what}");
                }
            }
        }
    }
}
