//! Requests are parsed once, and strictly: unknown fields, wrong types and values out of bounds are errors that name
//! the field and say what was expected. The invariant: of the texts in a request, an error repeats only the name of an
//! unknown field.

use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::{Malformed, Reason, strict::Object};

/// Parses a request, which is one JSON object. An empty body is read as `{}`, so that `nats request qry.user.list ""`
/// works.
///
/// # Errors
/// The error names the field, and says what was expected.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Malformed> {
    let body = if body.is_empty() { b"{}" } else { body };
    read(body).map_err(|(path, error)| {
        let Some(body) = with_a_smaller_number(body, &error) else { return malformed(&path, &error) };
        match read::<T>(&body) {
            Err((same, error)) if same == path => malformed(&path, &error).got("a number that is too large to read"),
            Ok(_) | Err(_) => Malformed::new(&path, Reason::OutOfBounds, "a number that 64 bits hold"),
        }
    })
}

/// Deserializes a request. An error comes with the path of the field that it concerns.
fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, (String, serde_json::Error)> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let Object(parsed) = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        // The path of the whole request is a dot, and that of a key with a syntax error is `?`.
        let path = match error.path().to_string() {
            path if error.inner().classify() == Category::Data => path,
            path => path.trim_end_matches(['.', '?']).to_owned(),
        };
        (if path == "." { String::new() } else { path }, error.into_inner())
    })?;
    json.end().map_err(|error| (String::new(), error))?;
    Ok(parsed)
}

/// The request with a smaller number, if the error is about a number that is too large even for a float. That error
/// comes before the field says what it expects. The smaller number can be parsed, but no field accepts it either.
fn with_a_smaller_number(body: &[u8], error: &serde_json::Error) -> Option<Vec<u8>> {
    if !error.to_string().starts_with("number out of range") {
        return None;
    }
    let line_start = body.split(|byte| *byte == b'\n').take(error.line() - 1).map(|line| line.len() + 1).sum::<usize>();
    let (before, after) = body.split_at_checked(line_start + error.column())?;
    let is_numeric = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
    let start = before.iter().rposition(|byte| !is_numeric(byte)).map_or(0, |index| index + 1);
    let rest = after.iter().position(|byte| !is_numeric(byte)).map_or(&b""[..], |index| &after[index..]);
    Some([&body[..start], b"1e300", rest].concat())
}

/// Translates an error of serde, which speaks of Rust, into the terms of JSON.
fn malformed(path: &str, error: &serde_json::Error) -> Malformed {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = text.strip_suffix(&place).unwrap_or(&text);
    match error.classify() {
        Category::Data => explain(path, message),
        Category::Syntax
            if ["lone leading surrogate in hex escape", "unexpected end of hex escape"].contains(&message) =>
        {
            Malformed::new(path, Reason::Invalid, "text in which every surrogate has its other half")
        }
        Category::Syntax if message == "recursion limit exceeded" => {
            Malformed::new(path, Reason::Invalid, "a value that is not nested as deep as this")
        }
        Category::Syntax | Category::Eof | Category::Io => {
            Malformed::new(path, Reason::NotJson, "one JSON object in UTF-8").got(&text)
        }
    }
}

fn explain(path: &str, text: &str) -> Malformed {
    let quoted = |prefix| text.strip_prefix(prefix).and_then(|rest| rest.strip_suffix('`'));
    if let Some(name) = quoted("missing field `") {
        return Malformed::new(&join(path, name), Reason::Missing, "");
    }
    if let Some(name) = quoted("duplicate field `") {
        return Malformed::new(&join(path, name), Reason::Duplicate, "");
    }
    // The expectation, which this crate wrote, comes last. The text before it may contain anything that the client
    // sent.
    let (got, expected) = text.rsplit_once(", expected ").unwrap_or((text, ""));
    let of = |reason| Malformed::new(path, reason, in_json(expected));
    let fault = |prefix| got.strip_prefix(prefix);
    if fault("unknown field ").is_some() {
        return if expected.is_empty() {
            Malformed::new(path, Reason::Unknown, "none at all")
        } else {
            of(Reason::Unknown)
        };
    }
    if let Some(got) = fault("invalid type: ") {
        return of(Reason::WrongType).got(in_json(got));
    }
    if let Some(count) = fault("invalid length ") {
        return of(Reason::OutOfBounds).got(count);
    }
    match fault("invalid value: ") {
        Some(got) if got.starts_with("integer ") || got.starts_with("floating point ") => {
            of(Reason::OutOfBounds).got(in_json(got))
        }
        Some(_) => of(Reason::Invalid),
        None if fault("unknown variant ").is_some() => of(Reason::Invalid),
        None => Malformed::new(path, Reason::Invalid, text),
    }
}

/// Translates serde's name of a type or value into the terms of JSON.
fn in_json(name: &str) -> &str {
    let value = ["integer `", "floating point `", "boolean `"].iter().find_map(|kind| name.strip_prefix(kind));
    if let Some(value) = value.and_then(|value| value.strip_suffix('`')) {
        return value;
    }
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

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::{
        Reason::{Duplicate, Invalid, Missing, NotJson, OutOfBounds, Unknown, WrongType},
        *,
    };
    use crate::{scenario, strict::Choice};

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

    /// Checks the field, the reason, and the message after the field.
    #[track_caller]
    fn refused(command: &str, request: &str, field: &str, reason: Reason, message: &str) {
        let malformed = scenario::parse(command, request).expect_err(request);
        assert_eq!((malformed.field.as_str(), malformed.reason), (field, reason), "{request:.200} {malformed}");
        let colon = if field.is_empty() { "" } else { ": " };
        assert_eq!(malformed.to_string(), format!("{field}{colon}{message}"), "{request:.200}");
    }

    /// A line of an order, with `rest` after the field `product`.
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
            refused("user.delete", &format!(r#"{{"id":{bad}}}"#), "id", Invalid, A_UUID);
            refused(
                "user.register",
                &format!(r#"{{"id":{bad},"email":"a@b.co","name":"Ada"}}"#),
                "id",
                Invalid,
                A_UUID,
            );
            refused("order.create", &format!(r#"{{"user":{bad},"lines":[]}}"#), "user", Invalid, A_UUID);
            let lines = format!(r#"[{},{{"product":{bad},"quantity":1}}]"#, line(r#","quantity":1"#));
            refused("order.create", &order(&lines), "lines[1].product", Invalid, A_UUID);
        }
        refused("user.delete", r#"{"id":7}"#, "id", WrongType, &format!("{A_UUID}, got 7"));
        refused("user.delete", r#"{"id":null}"#, "id", WrongType, &format!("{A_UUID}, got null"));
    }

    #[test]
    fn a_text_is_neither_empty_nor_too_long_and_has_no_control_characters() {
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
                refused(command, &request, field, Invalid, expected);
            }
        }
        for bad in ["ada", "ada@example", "@example.com", "a b@example.com", "ada@example.com,bob@example.com"] {
            refused("user.update", &format!(r#"{{"id":"{UUID}","email":"{bad}"}}"#), "email", Invalid, AN_EMAIL);
        }
    }

    #[test]
    fn a_quantity_is_a_whole_number_of_pieces() {
        let cases = [
            ("0", OutOfBounds, "0"),
            ("-1", OutOfBounds, "-1"),
            ("1000001", OutOfBounds, "1000001"),
            ("9223372036854775807", OutOfBounds, "9223372036854775807"),
            ("9223372036854775808", OutOfBounds, "9223372036854775808"),
            ("-9223372036854775808", OutOfBounds, "-9223372036854775808"),
            ("18446744073709551616", OutOfBounds, "1.8446744073709552e+19"),
            ("-1e20", OutOfBounds, "-1e+20"),
            ("1e400", OutOfBounds, "a number that is too large to read"),
            ("-1E+400", OutOfBounds, "a number that is too large to read"),
            (&"9".repeat(400), OutOfBounds, "a number that is too large to read"),
            ("1.5", WrongType, "1.5"),
            ("1.0", WrongType, "1.0"),
            ("1e2", WrongType, "100.0"),
            (r#""1""#, WrongType, "a string"),
            ("null", WrongType, "null"),
            ("true", WrongType, "true"),
            ("[1]", WrongType, "an array"),
            ("{}", WrongType, "an object"),
        ];
        for (bad, reason, got) in cases {
            let lines = format!("[{},\n{}]", line(r#","quantity":1"#), line(&format!(r#","quantity":{bad}"#)));
            refused("order.create", &order(&lines), "lines[1].quantity", reason, &format!("{A_QUANTITY}, got {got}"));
        }
        let malformed = scenario::parse("order.create", order(&format!("[{}]", line(r#","quantity":0"#)))).unwrap_err();
        assert_eq!(malformed.expected, "a whole number of pieces from 1 to 1000000");
        assert_eq!(malformed.bounds(), Some((1, 1_000_000)));
    }

    #[test]
    fn a_number_beyond_64_bits_is_of_the_wrong_type_if_no_number_is_expected() {
        for huge in ["1e400", "-1e400", &"9".repeat(400), &format!("{}.5", "9".repeat(400))] {
            let got = ", got a number that is too large to read";
            refused("user.delete", &format!(r#"{{"id":{huge}}}"#), "id", WrongType, &format!("{A_UUID}{got}"));
            let lines = order(huge);
            refused("order.create", &lines, "lines", WrongType, &format!("expected an array{got}"));
            let lines = order(&format!("[{huge}]"));
            refused("order.create", &lines, "lines[0]", WrongType, &format!("expected an object{got}"));
            refused("user.delete", huge, "", WrongType, &format!("expected an object{got}"));
            let unknown = "unknown field, expected `id`";
            refused("user.delete", &format!(r#"{{"colour":{huge}}}"#), "colour", Unknown, unknown);
        }
    }

    #[test]
    fn a_stock_is_bounded_and_a_restock_is_not_zero() {
        for bad in ["-1", "1000000000001"] {
            let price = r#"{"amount":1,"currency":"GBP"}"#;
            let request = format!(r#"{{"sku":"A","name":"Lamp","price":{price},"stock":{bad}}}"#);
            refused("product.create", &request, "stock", OutOfBounds, &format!("{A_STOCK}, got {bad}"));
        }
        for bad in ["0", "1000000000001", "-1000000000001", "-9223372036854775808"] {
            let request = format!(r#"{{"id":"{UUID}","quantity":{bad}}}"#);
            refused("product.restock", &request, "quantity", OutOfBounds, &format!("{A_RESTOCK}, got {bad}"));
            let malformed = scenario::parse("product.restock", request).unwrap_err();
            assert_eq!(malformed.bounds(), Some((-1_000_000_000_000, 1_000_000_000_000)));
        }
        // serde_json reads -0 as a float.
        let request = format!(r#"{{"id":"{UUID}","quantity":-0}}"#);
        refused("product.restock", &request, "quantity", WrongType, &format!("{A_RESTOCK}, got -0.0"));
    }

    #[test]
    fn money_is_a_bounded_amount_in_a_real_currency() {
        let price = |price: &str| format!(r#"{{"id":"{UUID}","price":{price}}}"#);
        for bad in ["-1", "1000000000000001", "9223372036854775808"] {
            let request = price(&format!(r#"{{"amount":{bad},"currency":"GBP"}}"#));
            refused("product.update", &request, "price.amount", OutOfBounds, &format!("{AN_AMOUNT}, got {bad}"));
            let lines = line(&format!(r#","quantity":1,"unit_price":{{"amount":{bad},"currency":"GBP"}}"#));
            let field = "lines[0].unit_price.amount";
            refused(
                "order.create",
                &order(&format!("[{lines}]")),
                field,
                OutOfBounds,
                &format!("{AN_AMOUNT}, got {bad}"),
            );
        }
        let pounds = price(r#"{"amount":2.5,"currency":"GBP"}"#);
        refused("product.update", &pounds, "price.amount", WrongType, &format!("{AN_AMOUNT}, got 2.5"));
        for bad in ["", "gbp", "POUND", "XXX", "XTS", "XAU", "£", "GB\\u0000"] {
            let request = price(&format!(r#"{{"amount":1,"currency":"{bad}"}}"#));
            refused("product.update", &request, "price.currency", Invalid, A_CURRENCY);
        }
        refused("product.update", &price(r#"{"amount":1}"#), "price.currency", Missing, "missing");
        refused("product.update", &price(r#"{"currency":"GBP"}"#), "price.amount", Missing, "missing");
        refused("product.update", &price("250"), "price", WrongType, "expected an object, got 250");
    }

    #[test]
    fn an_order_has_1_to_2000_lines() {
        let lines = |count| format!("[{}]", vec![line(r#","quantity":1"#); count].join(","));
        assert!(scenario::parse("order.create", order(&lines(1))).is_ok());
        assert!(scenario::parse("order.create", order(&lines(2_000))).is_ok());
        refused("order.create", &order(&lines(2_001)), "lines", OutOfBounds, "expected 1 to 2000 lines, got 2001");
        refused("order.create", &order("[]"), "lines", OutOfBounds, "expected 1 to 2000 lines, got 0");
        refused("order.create", &order("{}"), "lines", WrongType, "expected an array, got an object");
        refused("order.create", &order("[5]"), "lines[0]", WrongType, "expected an object, got 5");
        refused("order.create", &order("[{}]"), "lines[0].product", Missing, "missing");
        refused("order.create", &order(&format!("[{}]", line(""))), "lines[0].quantity", Missing, "missing");
        refused(
            "order.create",
            &order(&format!("[{}]", line(r#","quantity":1,"price":1"#))),
            "lines[0].price",
            Unknown,
            "unknown field, expected one of `product`, `quantity`, `unit_price`",
        );
    }

    #[test]
    fn a_time_is_rfc_3339() {
        for bad in ["", "now", "2026-01-31", "2026-01-31T09:30:00", "2026-02-30T09:30:00Z", "1769851800"] {
            let request = format!(r#"{{"user":"{UUID}","lines":[{}],"placed_at":"{bad}"}}"#, line(r#","quantity":1"#));
            refused("order.create", &request, "placed_at", Invalid, A_TIME);
        }
        let request = format!(r#"{{"user":"{UUID}","lines":[{}],"placed_at":5}}"#, line(r#","quantity":1"#));
        refused("order.create", &request, "placed_at", WrongType, &format!("{A_TIME}, got 5"));
    }

    #[test]
    fn a_request_is_one_object() {
        for (bad, got) in [
            ("5", "5"),
            ("null", "null"),
            ("true", "true"),
            (r#""x""#, "a string"),
            ("[]", "an array"),
            (&"[".repeat(10_000), "an array"),
        ] {
            refused("user.delete", bad, "", WrongType, &format!("expected an object, got {got}"));
        }
        refused("user.delete", "", "id", Missing, "missing");
        refused("user.delete", "{}", "id", Missing, "missing");
        let whole = format!(r#"{{"id":"{UUID}"}}"#);
        for (bad, field, got) in [
            (&*format!("{whole} x"), "", "trailing characters at line 1 column 47"),
            (" ", "", "EOF while parsing a value at line 1 column 1"),
            ("\u{feff}{}", "", "expected value at line 1 column 1"),
            ("{\"i\0\":1}", "", "control character (\\u0000-\\u001F) found while parsing a string at line 1 column 4"),
            (
                "{\"id\":\"\0\"}",
                "id",
                "control character (\\u0000-\\u001F) found while parsing a string at line 1 column 8",
            ),
        ] {
            refused("user.delete", bad, field, NotJson, &format!("expected one JSON object in UTF-8, got {got}"));
        }
    }

    #[test]
    fn half_a_surrogate_pair_is_valid_json_but_not_a_text() {
        let message = "expected text in which every surrogate has its other half";
        for half in [r"\ud800", r"\udc00", r"\ud800\ud800", r"\ud800\n", r"a\udfffb"] {
            refused("user.delete", &format!(r#"{{"id":"{half}"}}"#), "id", Invalid, message);
            refused("user.delete", &format!(r#"{{"{half}":1}}"#), "", Invalid, message);
        }
    }

    #[test]
    fn a_duplicate_field_is_named() {
        refused(
            "user.delete",
            &format!(r#"{{"id":"{UUID}","id":"{UUID}"}}"#),
            "id",
            Duplicate,
            "present more than once",
        );
    }

    #[test]
    fn a_body_that_is_not_utf_8_is_refused() {
        let malformed = scenario::parse("user.delete", b"{\"id\":\"\xff\"}").unwrap_err();
        assert_eq!(
            malformed.to_string(),
            "id: expected one JSON object in UTF-8, got invalid unicode code point at line 1 column 8"
        );
        let malformed = scenario::parse("user.delete", b"{\"\xff\":1}").unwrap_err();
        assert_eq!(
            malformed.to_string(),
            "expected one JSON object in UTF-8, got invalid unicode code point at line 1 column 3"
        );
    }

    #[test]
    fn an_unknown_field_is_named_without_control_characters() {
        let known = "unknown field, expected one of `id`, `email`, `name`, `country`";
        refused("user.register", r#"{"emial":"ada@example.com"}"#, "emial", Unknown, known);
        refused("user.register", r#"{"a\u0000\r\nb":1}"#, "a\u{fffd}\u{fffd}\u{fffd}b", Unknown, known);
        refused("user.register", r#"{"x, expected y":1}"#, "x, expected y", Unknown, known);
        refused("user.register", r#"{"":1}"#, "", Unknown, known);
        refused("user.register", r#"{"why?":1}"#, "why?", Unknown, known);
        refused("user.delete", r#"{"name":"Ada"}"#, "name", Unknown, "unknown field, expected `id`");
    }

    /// Covers the types that occur in queries but not in commands.
    #[test]
    fn errors_about_numbers_choices_and_empty_objects_are_in_the_terms_of_json() {
        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Sort {
            Name,
            Price,
        }

        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Request {
            sort: Option<Choice<Sort>>,
            limit: Option<u32>,
            in_stock: Option<bool>,
        }

        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Nothing {}

        let refused = |body: &str| parse::<Request>(body.as_bytes()).unwrap_err().to_string();
        assert_eq!(refused(r#"{"sort":"size"}"#), "sort: expected `name` or `price`");
        for (other, got) in [("5", "5"), ("{}", "an object"), (r#"{"name":null}"#, "an object"), ("[]", "an array")] {
            let message = format!("sort: expected `name` or `price`, got {got}");
            assert_eq!(refused(&format!(r#"{{"sort":{other}}}"#)), message);
        }
        assert_eq!(refused(r#"{"limit":"5"}"#), "limit: expected a whole number from 0 to 4294967295, got a string");
        assert_eq!(refused(r#"{"limit":-5}"#), "limit: expected a whole number from 0 to 4294967295, got -5");
        assert_eq!(refused(r#"{"in_stock":1}"#), "in_stock: expected true or false, got 1");
        assert_eq!(parse::<Nothing>(b"{\"x\":1}").unwrap_err().to_string(), "x: unknown field, expected none at all");
        assert_eq!(parse::<Nothing>(b"").unwrap(), Nothing {});
        assert_eq!(
            parse::<Request>(br#"{"sort":"price","limit":null}"#).unwrap(),
            Request { sort: Some(Choice(Sort::Price)), limit: None, in_stock: None }
        );
    }
}
