//! The request headers, read strictly: a header that cannot be read is an error, and never counts as absent.

use domain::{Malformed, Reason};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// The command's idempotency key: 1 to 128 visible ASCII characters.
pub const MSG_ID: &str = "Nats-Msg-Id";
/// Refuse the command unless its aggregate is at this version.
pub const EXPECTED_VERSION: &str = "Expected-Version";
/// Answer the query from a view that has reached at least this position.
pub const MIN_POSITION: &str = "Min-Position";
/// Who sends the command, kept with its events: 1 to 128 characters.
pub const ACTOR: &str = "Actor";
/// W3C Trace Context, kept with the events.
pub const TRACEPARENT: &str = "traceparent";
/// Header of replies: the position of the command's last event, or of the view that the query has read.
pub const POSITION: &str = "Position";

const KNOWN: [&str; 5] = [MSG_ID, EXPECTED_VERSION, MIN_POSITION, ACTOR, TRACEPARENT];
const MAX_LENGTH: usize = 128;
/// The length of a version 00 `traceparent`, up to and including the flags.
const TRACEPARENT_LENGTH: usize = 55;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestHeaders {
    pub command_id: Option<String>,
    pub expected_version: Option<u64>,
    pub min_position: Option<u64>,
    pub actor: Option<String>,
    pub traceparent: Option<String>,
}

impl RequestHeaders {
    /// Reads a header block: `NATS/1.0`, then a line for each header. Letter case in the names does not matter. Unknown
    /// headers are ignored, whatever they contain.
    ///
    /// # Errors
    /// If a header cannot be read or occurs twice; the error names it, and says what was expected. An invalid
    /// `traceparent` is ignored instead, as its specification demands.
    pub fn parse(block: &[u8]) -> Result<Self, Malformed> {
        let mut read = Self::default();
        if block.is_empty() {
            return Ok(read);
        }
        let mut seen = Vec::new();
        for (name, value) in lines(block)? {
            let Some(known) = KNOWN.into_iter().find(|known| known.eq_ignore_ascii_case(name)) else { continue };
            if seen.contains(&known) {
                return Err(Malformed::new(known, Reason::Duplicate, ""));
            }
            seen.push(known);
            match known {
                MSG_ID => read.command_id = Some(key(MSG_ID, value)?),
                EXPECTED_VERSION => read.expected_version = Some(number(EXPECTED_VERSION, value)?),
                MIN_POSITION => read.min_position = Some(number(MIN_POSITION, value)?),
                ACTOR => read.actor = Some(actor(value)?),
                _ => read.traceparent = traceparent(value),
            }
        }
        Ok(read)
    }
}

/// The lines of a header block, each as a name and a value. A line ends with CR LF; neither CR nor LF alone ends one.
fn lines(block: &[u8]) -> Result<Vec<(&str, &[u8])>, Malformed> {
    let unreadable =
        || Malformed::new("", Reason::Invalid, "a header block of NATS/1.0, and lines of a name, a colon and a value");
    let text = block.strip_suffix(b"\r\n\r\n").ok_or_else(unreadable)?;
    let mut lines = split_lines(text);
    let version = lines.next().unwrap_or_default();
    if version.trim_ascii_end() != b"NATS/1.0" {
        return Err(unreadable());
    }
    lines
        .map(|line| {
            let colon = line.iter().position(|byte| *byte == b':').ok_or_else(unreadable)?;
            let name = std::str::from_utf8(&line[..colon]).map_err(|_| unreadable())?;
            let is_token = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
            if is_token { Ok((name, line[colon + 1..].trim_ascii())) } else { Err(unreadable()) }
        })
        .collect()
}

fn split_lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        match text.windows(2).position(|pair| pair == b"\r\n") {
            Some(end) => {
                rest = Some(&text[end + 2..]);
                Some(&text[..end])
            }
            None => rest.take(),
        }
    })
}

/// Encodes a text as visible ASCII and spaces, since some clients drop all headers of a message if the value of one has
/// other characters. These are percent-encoded in UTF-8, and so are `"` and `%`, as in the NATS binding of CloudEvents
/// (section 3.1.3.2), which however encodes spaces too.
pub fn header_text(text: &str) -> String {
    const ENCODED: AsciiSet = CONTROLS.add(b'"').add(b'%');
    utf8_percent_encode(text, &ENCODED).to_string()
}

fn key(name: &str, value: &[u8]) -> Result<String, Malformed> {
    if (1..=MAX_LENGTH).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic) {
        return Ok(String::from_utf8_lossy(value).into_owned());
    }
    Err(Malformed::new(name, Reason::Invalid, format!("1 to {MAX_LENGTH} visible ASCII characters without spaces")))
}

fn actor(value: &[u8]) -> Result<String, Malformed> {
    let is_allowed =
        |value: &&str| (1..=MAX_LENGTH).contains(&value.chars().count()) && !value.chars().any(char::is_control);
    let value = std::str::from_utf8(value).ok().map(str::trim).filter(is_allowed);
    let expected = format!("1 to {MAX_LENGTH} characters in UTF-8 without control characters");
    value.map(str::to_owned).ok_or_else(|| Malformed::new(ACTOR, Reason::Invalid, expected))
}

/// At most `i64::MAX`, which is the largest number that the stores can hold.
fn number(name: &str, value: &[u8]) -> Result<u64, Malformed> {
    let digits = value.strip_prefix(b"-").unwrap_or(value);
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let reason = if is_number { Reason::OutOfBounds } else { Reason::Invalid };
    let number: Option<u64> = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
    number
        .filter(|number| *number <= i64::MAX as u64)
        .ok_or_else(|| Malformed::new(name, reason, "a whole number from 0 to 9223372036854775807"))
}

/// `<version>-<trace id>-<parent id>-<flags>` in lower-case hexadecimal digits, by W3C Trace Context, level 1,
/// section 3.2.2: version `ff` and identifiers of zeros are invalid, and in version `00` nothing follows the flags.
/// In a later version, further fields may follow after a dash; it is read like version `00`, and passed on as such
/// (section 3.2.4).
fn traceparent(value: &[u8]) -> Option<String> {
    let value =
        std::str::from_utf8(value).ok().filter(|value| value.is_ascii() && value.len() >= TRACEPARENT_LENGTH)?;
    let (known, later) = value.split_at(TRACEPARENT_LENGTH);
    let parts: Vec<&str> = known.split('-').collect();
    let [version, trace, parent, flags] = parts[..] else { return None };
    let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let is_id = |text: &str, length| text.len() == length && is_hex(text) && text.bytes().any(|byte| byte != b'0');
    let is_version = version.len() == 2 && is_hex(version) && version != "ff";
    let ends = later.is_empty() || version != "00" && later.starts_with('-');
    let is_valid = is_version && is_id(trace, 32) && is_id(parent, 16) && flags.len() == 2 && is_hex(flags) && ends;
    is_valid.then(|| format!("00-{trace}-{parent}-{flags}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(lines: &[&[u8]]) -> Vec<u8> {
        let lines = lines.iter().flat_map(|line| [*line, b"\r\n"].concat());
        [b"NATS/1.0\r\n".to_vec(), lines.collect(), b"\r\n".to_vec()].concat()
    }

    fn parse(name: &str, value: &str) -> Result<RequestHeaders, Malformed> {
        RequestHeaders::parse(&block(&[format!("{name}: {value}").as_bytes()]))
    }

    #[test]
    fn each_header_is_read_in_any_letter_case() {
        for cased in [str::to_owned, str::to_lowercase, str::to_uppercase] as [fn(&str) -> String; 3] {
            assert_eq!(parse(&cased(MSG_ID), "k-1").unwrap().command_id.as_deref(), Some("k-1"));
            assert_eq!(parse(&cased(EXPECTED_VERSION), "3").unwrap().expected_version, Some(3));
            assert_eq!(parse(&cased(MIN_POSITION), "0").unwrap().min_position, Some(0));
            assert_eq!(parse(&cased(ACTOR), "Zoë L.").unwrap().actor.as_deref(), Some("Zoë L."));
            assert!(parse(&cased(TRACEPARENT), &format!("00-{TRACE}-01")).unwrap().traceparent.is_some());
        }
        assert_eq!(RequestHeaders::parse(b"").unwrap(), RequestHeaders::default());
        assert_eq!(RequestHeaders::parse(b"NATS/1.0\r\n\r\n").unwrap(), RequestHeaders::default());
    }

    #[test]
    fn a_header_that_comes_twice_is_refused_by_name() {
        for name in KNOWN {
            let line = format!("{name}:1");
            let again = format!("{}:1", name.to_uppercase());
            let twice = RequestHeaders::parse(&block(&[line.as_bytes(), b"X: y", again.as_bytes()]));
            assert_eq!(twice.unwrap_err().field, name);
        }
        assert!(RequestHeaders::parse(&block(&[b"X: 1", b"X: 2"])).is_ok());
    }

    #[test]
    fn an_unreadable_header_is_refused_by_name() {
        let long = "x".repeat(129);
        let cases = [
            (MSG_ID, "", Reason::Invalid),
            (MSG_ID, "a b", Reason::Invalid),
            (MSG_ID, "a\0b", Reason::Invalid),
            (MSG_ID, &long, Reason::Invalid),
            (EXPECTED_VERSION, "-1", Reason::OutOfBounds),
            (EXPECTED_VERSION, "x", Reason::Invalid),
            (EXPECTED_VERSION, "", Reason::Invalid),
            (MIN_POSITION, "99999999999999999999", Reason::OutOfBounds),
            (ACTOR, "", Reason::Invalid),
            (ACTOR, "a\0b", Reason::Invalid),
            (ACTOR, "Ada\rLovelace", Reason::Invalid),
            (ACTOR, "Ada\nLovelace", Reason::Invalid),
        ];
        for (name, value, reason) in cases {
            let malformed = parse(name, value).unwrap_err();
            assert_eq!((&*malformed.field, malformed.reason), (name, reason), "{value:?}");
        }
        assert_eq!(parse(MIN_POSITION, "-1").unwrap_err().bounds(), Some((0, i64::MAX)));
        assert_eq!(RequestHeaders::parse(&block(&[b"Actor: \xff"])).unwrap_err().field, ACTOR);
    }

    #[test]
    fn an_invalid_header_block_is_refused() {
        let broken: [&[u8]; 8] = [
            b"NATS/1.0 abc\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"NATS/1.0\r\nno colon\r\n\r\n",
            b"NATS/1.0\r\na blank: x\r\n\r\n",
            b"NATS/1.0\r\n: x\r\n\r\n",
            b"NATS/1.0\r\nn\xff: x\r\n\r\n",
            b"NATS/1.0\r\nName: x\r\n",
            b"\xff",
        ];
        for block in broken {
            let malformed = RequestHeaders::parse(block).unwrap_err();
            assert!(malformed.field.is_empty(), "{block:?}");
        }
        // The values of unknown headers are not checked.
        assert!(RequestHeaders::parse(&block(&[b"Other: \xff\r\x00"])).is_ok());
    }

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";

    #[test]
    fn a_traceparent_is_read_as_its_specification_says() {
        let read = |value: String| parse(TRACEPARENT, &value).unwrap().traceparent;
        let valid = format!("00-{TRACE}-01");
        for later in [format!("00-{TRACE}-01"), format!("01-{TRACE}-01"), format!("cc-{TRACE}-01-what-ever")] {
            assert_eq!(read(later), Some(valid.clone()));
        }
        let zeros = "0".repeat(32);
        for invalid in [
            "00-nonsense".to_owned(),
            format!("ff-{TRACE}-01"),
            format!("00-{TRACE}-01-more"),
            format!("00-{TRACE}-01-"),
            format!("cc-{TRACE}-01.more"),
            format!("cc-{TRACE}-011"),
            format!("00-{TRACE}-0"),
            format!("0-{TRACE}-001"),
            format!("00-{TRACE}-0G"),
            format!("00-{}-01", TRACE.to_uppercase()),
            format!("00-{zeros}-00f067aa0ba902b7-01"),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01".to_owned(),
        ] {
            assert_eq!(read(invalid.clone()), None, "{invalid}");
        }
    }
}
