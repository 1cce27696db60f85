//! Requests, parsed once, strictly: unknown fields, wrong types and values out of bounds are errors that name the
//! field and say what was expected. The errors are short and free of control characters, whatever the client sent, so
//! that they fit into any reply and header, and never repeat a text of the request but the name of an unknown field.

use schemars::Schema;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::{Command, Id, strict::Object};

/// One kind of command: what the command service needs to serve it.
#[derive(Clone, Copy)]
pub struct CommandType {
    pub aggregate: &'static str,
    pub verb: &'static str,
    pub description: &'static str,
    /// The JSON Schema of the request.
    pub schema: fn() -> Schema,
    /// Reads a request; the identifier is for the aggregate that it makes, if the client names none.
    pub parse: fn(&[u8], Id) -> Result<Command, Malformed>,
}

/// A request that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{expected}", if field.is_empty() { String::new() } else { format!("{field}: ") })]
pub struct Malformed {
    /// The path of the field, such as `lines[2].quantity`; empty where the fault is not in one field.
    pub field: String,
    /// What was expected instead.
    pub expected: String,
}

impl Malformed {
    /// Both are cut where they are overlong, and control characters replaced.
    pub fn new(field: &str, expected: impl Into<String>) -> Self {
        Self { field: printable(field, 120), expected: printable(&expected.into(), 480) }
    }
}

/// A stored event or state that this program does not understand.
#[derive(Debug, thiserror::Error)]
pub enum Undecodable {
    #[error("unknown kind, name or schema")]
    Unknown,
    #[error("the payload does not have the schema's shape: {0}")]
    Payload(#[from] serde_json::Error),
}

/// Parses a request: one JSON object. An empty body is read as `{}`, so that `nats request qry.user.list ""` works.
///
/// # Errors
/// Names the field, and says what was expected.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Malformed> {
    let body = if body.is_empty() { b"{}" } else { body };
    let mut json = serde_json::Deserializer::from_slice(body);
    let Object(parsed) = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| malformed(&error.path().to_string(), error.inner()))?;
    json.end().map_err(|error| malformed("", &error))?;
    Ok(parsed)
}

pub(crate) fn decode_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Undecodable> {
    Ok(serde_json::from_slice(payload)?)
}

/// Says in the client's words what serde says in Rust's.
fn malformed(path: &str, error: &serde_json::Error) -> Malformed {
    // The path of the whole request.
    let path = if path == "." { "" } else { path };
    let text = error.to_string();
    match error.classify() {
        Category::Data => {
            let place = format!(" at line {} column {}", error.line(), error.column());
            explain(path, text.strip_suffix(&place).unwrap_or(&text))
        }
        Category::Syntax if text.starts_with("number out of range") => {
            Malformed::new(path, "expected a number within 64 bits")
        }
        Category::Syntax | Category::Eof | Category::Io => {
            // A key that is broken itself is `?` in the path.
            Malformed::new(path.trim_end_matches(['.', '?']), format!("cannot be read: {text}"))
        }
    }
}

fn explain(path: &str, text: &str) -> Malformed {
    let quoted = |prefix| text.strip_prefix(prefix).and_then(|rest| rest.strip_suffix('`'));
    if let Some(name) = quoted("missing field `") {
        return Malformed::new(&join(path, name), "expected a value, the field is missing");
    }
    if let Some(name) = quoted("duplicate field `") {
        return Malformed::new(&join(path, name), "expected once, the field is there again");
    }
    // What was expected is ours and comes last; before it may stand what the client sent, whatever that says.
    let (got, expected) = text.rsplit_once(", expected ").unwrap_or((text, ""));
    if got.starts_with("unknown field ") {
        let names = if expected.is_empty() { "none at all" } else { expected };
        return Malformed::new(path, format!("unknown field, expected {names}"));
    }
    if got.starts_with("unknown variant ") {
        return Malformed::new(path, format!("expected {expected}"));
    }
    match got.strip_prefix("invalid type: ").or_else(|| got.strip_prefix("invalid value: ")) {
        Some(got) => Malformed::new(path, format!("expected {}, got {}", in_json(expected), in_json(got))),
        None => Malformed::new(path, text),
    }
}

/// serde's name of a type or value, as somebody says it who knows JSON and not Rust.
fn in_json(name: &str) -> &str {
    match name {
        "i64" => "a whole number from -9223372036854775808 to 9223372036854775807",
        "u64" => "a whole number from 0 to 18446744073709551615",
        "i32" => "a whole number from -2147483648 to 2147483647",
        "u32" => "a whole number from 0 to 4294967295",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        "a map" => "an object",
        "sequence" => "an array",
        "map" => "an object",
        text if text.starts_with("string ") => "a string",
        other => other,
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn printable(text: &str, max_chars: usize) -> String {
    let mut printable: String =
        text.chars().take(max_chars).map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    if text.chars().nth(max_chars).is_some() {
        printable.push('…');
    }
    printable
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::scenario;

    const UUID: &str = "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001";
    const A_UUID: &str =
        "expected a UUID of 36 characters such as 0192d3a0-7c1e-7b5a-9f00-3c2b1a000001, not the nil one";
    const AN_EMAIL: &str =
        "expected an e-mail address such as ada@example.com, at most 254 bytes, without invisible characters";
    const A_NAME: &str = "expected a text of 1 to 200 characters, not all invisible, without control characters";
    const A_SKU: &str = "expected a SKU of 1 to 64 characters without control characters, invisible ones, or white space other than spaces";
    const A_COUNTRY: &str = "expected a country of 1 to 60 characters, not all invisible, without control characters";
    const AN_AMOUNT: &str = "expected a whole number of minor units from 0 to 1000000000000000";
    const A_CURRENCY: &str = "expected an ISO 4217 currency code such as EUR";
    const A_STOCK: &str = "expected a whole number of pieces from 0 to 1000000000000";
    const A_RESTOCK: &str = "expected a whole number of pieces from -1000000000000 to 1000000000000, not 0";
    const A_QUANTITY: &str = "expected a whole number of pieces from 1 to 1000000";
    const A_TIME: &str = "expected a time in RFC 3339 such as 2026-01-31T09:30:00Z";

    #[track_caller]
    fn refused(command: &str, request: &str, field: &str, expected: &str) {
        let malformed = scenario::parse(command, request).expect_err(request);
        assert_eq!((malformed.field.as_str(), malformed.expected.as_str()), (field, expected), "{request:.200}");
    }

    /// A line of an order, with `rest` after the product.
    fn line(rest: &str) -> String {
        format!(r#"{{"product":"{UUID}"{rest}}}"#)
    }

    fn order(lines: &str) -> String {
        format!(r#"{{"user":"{UUID}","lines":{lines}}}"#)
    }

    #[test]
    fn an_identifier_is_a_uuid_in_one_spelling() {
        let bad = [
            r#""""#,
            r#""1""#,
            r#""0192d3a07c1e7b5a9f003c2b1a000001""#,
            r#""{0192d3a0-7c1e-7b5a-9f00-3c2b1a000001}""#,
            r#"" 0192d3a0-7c1e-7b5a-9f00-3c2b1a000001""#,
            r#""0192d3a0-7c1e-7b5a-9f00-3c2b1a00000g""#,
            r#""0192d3a0-7c1e-7b5a-9f00-3c2b1a00000\u0000""#,
            r#""00000000-0000-0000-0000-000000000000""#,
        ];
        for bad in bad {
            refused("user.delete", &format!(r#"{{"id":{bad}}}"#), "id", A_UUID);
            refused("user.register", &format!(r#"{{"id":{bad},"email":"a@b.co","name":"Ada"}}"#), "id", A_UUID);
            refused("order.create", &format!(r#"{{"user":{bad},"lines":[]}}"#), "user", A_UUID);
            let lines = format!(r#"[{},{{"product":{bad},"quantity":1}}]"#, line(r#","quantity":1"#));
            refused("order.create", &order(&lines), "lines[1].product", A_UUID);
        }
        refused("user.delete", r#"{"id":7}"#, "id", &format!("{A_UUID}, got integer `7`"));
        refused("user.delete", r#"{"id":null}"#, "id", &format!("{A_UUID}, got null"));
    }

    #[test]
    fn a_text_is_not_empty_nor_overlong_nor_has_it_control_characters() {
        let cases = [
            ("user.update", "email", AN_EMAIL, 255),
            ("user.update", "name", A_NAME, 201),
            ("user.update", "country", A_COUNTRY, 61),
            ("product.update", "sku", A_SKU, 65),
            ("product.update", "name", A_NAME, 201),
        ];
        for (command, field, expected, too_long) in cases {
            let long = "x".repeat(too_long);
            for bad in ["", " ", "\\u0000", "a\\u0000b", "a\\u001fb", "a\\nb", "a\\u007fb", "a\\u0085b", &long] {
                let request = format!(r#"{{"id":"{UUID}","{field}":"{bad}"}}"#);
                refused(command, &request, field, expected);
            }
        }
        for bad in ["ada", "ada@example", "@example.com", "a b@example.com", "ada@example.com,bob@example.com"] {
            refused("user.update", &format!(r#"{{"id":"{UUID}","email":"{bad}"}}"#), "email", AN_EMAIL);
        }
    }

    #[test]
    fn a_quantity_is_a_whole_number_of_pieces() {
        let cases = [
            ("0", ", got 0"),
            ("-1", ", got -1"),
            ("1000001", ", got 1000001"),
            ("9223372036854775807", ", got 9223372036854775807"),
            ("9223372036854775808", ", got 9223372036854775808"),
            ("-9223372036854775808", ", got -9223372036854775808"),
            ("18446744073709551616", ", got floating point `1.8446744073709552e+19`"),
            ("1.5", ", got floating point `1.5`"),
            ("1.0", ", got floating point `1.0`"),
            ("1e2", ", got floating point `100.0`"),
            (r#""1""#, ", got a string"),
            ("null", ", got null"),
            ("true", ", got boolean `true`"),
            ("[1]", ", got an array"),
            ("{}", ", got an object"),
        ];
        for (bad, got) in cases {
            let lines = format!("[{},{}]", line(r#","quantity":1"#), line(&format!(r#","quantity":{bad}"#)));
            refused("order.create", &order(&lines), "lines[1].quantity", &format!("{A_QUANTITY}{got}"));
        }
        for huge in ["1e400", &"9".repeat(400)] {
            let lines = format!("[{}]", line(&format!(r#","quantity":{huge}"#)));
            refused("order.create", &order(&lines), "lines[0].quantity", "expected a number within 64 bits");
        }
    }

    #[test]
    fn a_stock_is_bounded_and_a_restock_is_not_nothing() {
        for bad in ["-1", "1000000000001"] {
            let price = r#"{"amount":1,"currency":"GBP"}"#;
            let request = format!(r#"{{"sku":"A","name":"Lamp","price":{price},"stock":{bad}}}"#);
            refused("product.create", &request, "stock", &format!("{A_STOCK}, got {bad}"));
        }
        for bad in ["0", "-0", "1000000000001", "-1000000000001", "-9223372036854775808"] {
            let request = format!(r#"{{"id":"{UUID}","quantity":{bad}}}"#);
            // serde_json reads -0 as a float.
            let got = if bad == "-0" { "floating point `-0.0`" } else { bad };
            refused("product.restock", &request, "quantity", &format!("{A_RESTOCK}, got {got}"));
        }
    }

    #[test]
    fn money_is_a_bounded_amount_in_a_real_currency() {
        let price = |price: &str| format!(r#"{{"id":"{UUID}","price":{price}}}"#);
        for bad in ["-1", "1000000000000001", "9223372036854775808"] {
            let request = price(&format!(r#"{{"amount":{bad},"currency":"GBP"}}"#));
            refused("product.update", &request, "price.amount", &format!("{AN_AMOUNT}, got {bad}"));
            let lines = line(&format!(r#","quantity":1,"unit_price":{{"amount":{bad},"currency":"GBP"}}"#));
            let field = "lines[0].unit_price.amount";
            refused("order.create", &order(&format!("[{lines}]")), field, &format!("{AN_AMOUNT}, got {bad}"));
        }
        let pounds = price(r#"{"amount":2.5,"currency":"GBP"}"#);
        refused("product.update", &pounds, "price.amount", &format!("{AN_AMOUNT}, got floating point `2.5`"));
        for bad in ["", "gbp", "POUND", "XXX", "XTS", "XAU", "£", "GB\\u0000"] {
            let request = price(&format!(r#"{{"amount":1,"currency":"{bad}"}}"#));
            refused("product.update", &request, "price.currency", A_CURRENCY);
        }
        let missing = "expected a value, the field is missing";
        refused("product.update", &price(r#"{"amount":1}"#), "price.currency", missing);
        refused("product.update", &price(r#"{"currency":"GBP"}"#), "price.amount", missing);
        refused("product.update", &price("250"), "price", "expected an object, got integer `250`");
    }

    #[test]
    fn an_order_has_1_to_2000_lines() {
        let lines = |count| format!("[{}]", vec![line(r#","quantity":1"#); count].join(","));
        assert!(scenario::parse("order.create", order(&lines(1))).is_ok());
        assert!(scenario::parse("order.create", order(&lines(2_000))).is_ok());
        refused("order.create", &order(&lines(2_001)), "lines", "expected 1 to 2000 lines, got 2001");
        refused("order.create", &order("[]"), "lines", "expected 1 to 2000 lines, got 0");
        refused("order.create", &order("{}"), "lines", "expected an array, got an object");
        refused("order.create", &order("[5]"), "lines[0]", "expected an object, got integer `5`");
        let missing = "expected a value, the field is missing";
        refused("order.create", &order("[{}]"), "lines[0].product", missing);
        refused("order.create", &order(&format!("[{}]", line(""))), "lines[0].quantity", missing);
        refused(
            "order.create",
            &order(&format!("[{}]", line(r#","quantity":1,"price":1"#))),
            "lines[0].price",
            "unknown field, expected one of `product`, `quantity`, `unit_price`",
        );
    }

    #[test]
    fn a_time_is_rfc_3339() {
        for bad in ["", "now", "2026-01-31", "2026-01-31T09:30:00", "2026-02-30T09:30:00Z", "1769851800"] {
            let request = format!(r#"{{"user":"{UUID}","lines":[{}],"placed_at":"{bad}"}}"#, line(r#","quantity":1"#));
            refused("order.create", &request, "placed_at", A_TIME);
        }
        let request = format!(r#"{{"user":"{UUID}","lines":[{}],"placed_at":5}}"#, line(r#","quantity":1"#));
        refused("order.create", &request, "placed_at", &format!("{A_TIME}, got integer `5`"));
    }

    #[test]
    fn a_request_is_one_object() {
        for (bad, got) in [
            ("5", "integer `5`"),
            ("null", "null"),
            ("true", "boolean `true`"),
            (r#""x""#, "a string"),
            ("[]", "an array"),
            (&"[".repeat(10_000), "an array"),
        ] {
            refused("user.delete", bad, "", &format!("expected an object, got {got}"));
        }
        let missing = "expected a value, the field is missing";
        refused("user.delete", "", "id", missing);
        refused("user.delete", "{}", "id", missing);
        let whole = format!(r#"{{"id":"{UUID}"}}"#);
        refused("user.delete", &format!("{whole} x"), "", "cannot be read: trailing characters at line 1 column 47");
        refused("user.delete", " ", "", "cannot be read: EOF while parsing a value at line 1 column 1");
        refused("user.delete", "\u{feff}{}", "", "cannot be read: expected value at line 1 column 1");
        refused(
            "user.delete",
            "{\"i\0\":1}",
            "",
            "cannot be read: control character (\\u0000-\\u001F) found while parsing a string at line 1 column 4",
        );
        refused(
            "user.delete",
            "{\"id\":\"\0\"}",
            "id",
            "cannot be read: control character (\\u0000-\\u001F) found while parsing a string at line 1 column 8",
        );
        let unpaired = r#"{"id":"\ud800"}"#;
        refused("user.delete", unpaired, "id", "cannot be read: unexpected end of hex escape at line 1 column 14");
    }

    #[test]
    fn what_is_no_utf_8_is_refused() {
        let malformed = scenario::parse("user.delete", b"{\"id\":\"\xff\"}").unwrap_err();
        assert_eq!(malformed.to_string(), "id: cannot be read: invalid unicode code point at line 1 column 8");
        let malformed = scenario::parse("user.delete", b"{\"\xff\":1}").unwrap_err();
        assert_eq!(malformed.to_string(), "cannot be read: invalid unicode code point at line 1 column 3");
    }

    #[test]
    fn an_unknown_field_is_named_without_control_characters() {
        let known = "unknown field, expected one of `id`, `email`, `name`, `country`";
        refused("user.register", r#"{"emial":"ada@example.com"}"#, "emial", known);
        refused("user.register", r#"{"a\u0000\r\nb":1}"#, "a\u{fffd}\u{fffd}\u{fffd}b", known);
        refused("user.register", r#"{"x, expected y":1}"#, "x, expected y", known);
        refused("user.register", r#"{"":1}"#, "", known);
        refused("user.register", r#"{"why?":1}"#, "why?", known);
        refused("user.delete", r#"{"name":"Ada"}"#, "name", "unknown field, expected `id`");
    }

    /// Types that queries have and commands have not.
    #[test]
    fn numbers_choices_and_nothing_are_explained_too() {
        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Sort {
            Name,
            Price,
        }

        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Request {
            sort: Option<Sort>,
            limit: Option<u32>,
            in_stock: Option<bool>,
        }

        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Nothing {}

        let refused = |body: &str| parse::<Request>(body.as_bytes()).unwrap_err().to_string();
        assert_eq!(refused(r#"{"sort":"size"}"#), "sort: expected `name` or `price`");
        assert_eq!(refused(r#"{"limit":"5"}"#), "limit: expected a whole number from 0 to 4294967295, got a string");
        assert_eq!(refused(r#"{"limit":-5}"#), "limit: expected a whole number from 0 to 4294967295, got integer `-5`");
        assert_eq!(refused(r#"{"in_stock":1}"#), "in_stock: expected true or false, got integer `1`");
        assert_eq!(parse::<Nothing>(b"{\"x\":1}").unwrap_err().to_string(), "x: unknown field, expected none at all");
        assert_eq!(parse::<Nothing>(b"").unwrap(), Nothing {});
        assert_eq!(
            parse::<Request>(br#"{"sort":"price","limit":null}"#).unwrap(),
            Request { sort: Some(Sort::Price), limit: None, in_stock: None }
        );
    }
}
