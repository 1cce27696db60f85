//! The part of the NATS client protocol that is needed to receive requests and send replies. The invariant: a message
//! ends where the server says that it ends, and the parts that a client controls, the headers and the reply subject,
//! are not interpreted. So no client can send anything that makes the rest of the connection unreadable.

use bytes::{Buf, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// The longest line that is accepted. The longest that a server sends is its `INFO`, which lists its cluster.
const MAX_LINE: usize = 1 << 20;

/// Messages with fewer bytes are copied, since a waiting one would otherwise keep the whole buffer that it was read
/// into.
const SMALL: usize = 4 << 10;

/// A protocol operation that the server sends.
#[derive(Debug)]
pub enum Operation {
    Info(Info),
    Ping,
    Pong,
    Error(String),
    Message(Delivery),
}

/// A message as it was received; nothing in it has been checked.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The number of the subscription that it was sent to.
    pub subscription: usize,
    pub reply: Option<Bytes>,
    /// The header block, from `NATS/1.0` to the empty line; empty if there is none.
    pub headers: Bytes,
    pub payload: Bytes,
}

/// The fields of the server's `INFO` that are needed here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Info {
    pub max_payload: usize,
    pub tls_required: bool,
    /// The server is about to stop, and asks its clients to leave.
    #[serde(rename = "ldm")]
    pub lame_duck_mode: bool,
    /// The other servers of its cluster, each as `host:port`.
    pub connect_urls: Vec<String>,
}

/// The arguments of `CONNECT`.
#[derive(Serialize)]
pub struct Connect<'a> {
    pub name: &'a str,
    pub user: Option<&'a str>,
    pub pass: Option<&'a str>,
    pub lang: &'static str,
    pub version: &'static str,
    /// 1 means that the client understands further `INFO` operations.
    pub protocol: u8,
    pub verbose: bool,
    pub pedantic: bool,
    pub headers: bool,
    pub no_responders: bool,
}

/// Why the server's bytes cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("this is not a NATS server: it sent {0:?}")]
    Unknown(String),
    #[error("the server sent a line of more than {MAX_LINE} bytes")]
    Overlong,
    #[error("the server's INFO cannot be read: {0}")]
    Info(#[from] serde_json::Error),
}

/// Takes the next operation from the bytes that have been read; `None` if it is not complete yet.
///
/// # Errors
/// If a NATS server would not send this.
pub fn take_operation(read: &mut BytesMut) -> Result<Option<Operation>, ProtocolError> {
    while let Some(end) = read.iter().position(|byte| *byte == b'\n') {
        let line = read[..end].strip_suffix(b"\r").unwrap_or(&read[..end]);
        let (name, arguments) = match line.iter().position(|byte| *byte == b' ') {
            Some(space) => (&line[..space], &line[space + 1..]),
            None => (line, &[][..]),
        };
        let operation = match name {
            b"MSG" | b"HMSG" => return take_message(read, end + 1),
            b"PING" => Operation::Ping,
            b"PONG" => Operation::Pong,
            b"INFO" => Operation::Info(serde_json::from_slice(arguments)?),
            b"-ERR" => Operation::Error(String::from_utf8_lossy(arguments).trim_matches('\'').to_owned()),
            b"+OK" => {
                read.advance(end + 1);
                continue;
            }
            _ => return Err(unknown(line)),
        };
        read.advance(end + 1);
        return Ok(Some(operation));
    }
    if read.len() > MAX_LINE { Err(ProtocolError::Overlong) } else { Ok(None) }
}

/// Reads `MSG <subject> <sid> [reply] <bytes>`, or `HMSG`, which has the length of the headers before the total
/// length. The server has split the client's line at spaces and tabs, so no argument contains one, whatever else it
/// contains.
fn take_message(read: &mut BytesMut, line_length: usize) -> Result<Option<Operation>, ProtocolError> {
    let line = &read[..line_length];
    let broken = || unknown(line);
    let words: Vec<&[u8]> = line.trim_ascii_end().split(|byte| *byte == b' ').collect();
    let (sid, reply, header_length, length) = match words[..] {
        [b"MSG", _, sid, length] => (sid, None, None, length),
        [b"MSG", _, sid, reply, length] => (sid, Some(reply), None, length),
        [b"HMSG", _, sid, headers, length] => (sid, None, Some(headers), length),
        [b"HMSG", _, sid, reply, headers, length] => (sid, Some(reply), Some(headers), length),
        _ => return Err(broken()),
    };
    let subscription = number(sid).ok_or_else(broken)?;
    let length = number(length).ok_or_else(broken)?;
    let header_length = header_length.map_or(Some(0), number).filter(|it| *it <= length).ok_or_else(broken)?;
    let whole = line_length + length + 2;
    if read.len() < whole {
        let missing = whole - read.len();
        read.reserve(missing);
        return Ok(None);
    }
    let reply = reply.map(Bytes::copy_from_slice);
    read.advance(line_length);
    let (headers, payload) = if length < SMALL {
        let message = Bytes::copy_from_slice(&read[..length]);
        read.advance(length);
        (message.slice(..header_length), message.slice(header_length..))
    } else {
        (read.split_to(header_length).freeze(), read.split_to(length - header_length).freeze())
    };
    read.advance(2);
    Ok(Some(Operation::Message(Delivery { subscription, reply, headers, payload })))
}

fn number(word: &[u8]) -> Option<usize> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

fn unknown(line: &[u8]) -> ProtocolError {
    ProtocolError::Unknown(String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn all(mut read: BytesMut) -> Vec<Operation> {
        std::iter::from_fn(|| take_operation(&mut read).unwrap()).collect()
    }

    #[test]
    fn each_operation_is_read() {
        let sent = "INFO {\"max_payload\":7,\"ldm\":true,\"connect_urls\":[\"a:1\"],\"x\":1}\r\nPING\r\n+OK\r\nPONG\r\n\
            -ERR 'Permissions Violation'\r\nMSG a 3 2\r\nhi\r\n";
        let operations = all(BytesMut::from(sent));
        let [
            Operation::Info(info),
            Operation::Ping,
            Operation::Pong,
            Operation::Error(error),
            Operation::Message(message),
        ] = &operations[..]
        else {
            panic!("{operations:?}");
        };
        assert!(info.max_payload == 7 && info.lame_duck_mode && info.connect_urls == ["a:1"]);
        assert_eq!(error, "Permissions Violation");
        let (headers, payload) = (Bytes::new(), Bytes::from("hi"));
        assert_eq!(*message, Delivery { subscription: 3, reply: None, headers, payload });
    }

    #[test]
    fn anything_that_no_nats_server_sends_is_an_error() {
        for sent in [
            "HTTP/1.1 400 Bad Request\r\n",
            "SSH-2.0\r\n",
            "INFO {\r\n",
            "MSG a\r\n",
            "HMSG a 1 9 3\r\n",
            "MSG a x 1\r\n",
        ] {
            assert!(take_operation(&mut BytesMut::from(sent)).is_err(), "{sent}");
        }
        assert!(take_operation(&mut BytesMut::from(&vec![b'x'; MAX_LINE + 1][..])).is_err());
    }

    /// Any reply subject that a client can choose: the server splits its line at these four characters.
    fn reply() -> impl Strategy<Value = Vec<u8>> {
        let allowed = any::<u8>().prop_filter("no separator", |byte| !b" \t\r\n".contains(byte));
        vec(allowed, 1..40)
    }

    proptest! {
        #[test]
        fn a_message_ends_where_the_server_says_whatever_is_in_it(
            messages in vec((reply(), vec(any::<u8>(), 0..60), vec(any::<u8>(), 0..60)), 1..8),
            piece in 1_usize..50,
        ) {
            let mut sent = Vec::new();
            let mut expected = Vec::new();
            for (subscription, (reply, headers, payload)) in messages.into_iter().enumerate() {
                let length = headers.len() + payload.len();
                let line = match headers.len() {
                    0 => [format!("MSG s {subscription} ").as_bytes(), &reply, format!(" {length}\r\n").as_bytes()].concat(),
                    own => [format!("HMSG s {subscription} ").as_bytes(), &reply, format!(" {own} {length}\r\n").as_bytes()]
                        .concat(),
                };
                sent.extend([&line[..], &headers, &payload, b"\r\n"].concat());
                let (reply, headers, payload) = (Some(reply.into()), headers.into(), payload.into());
                expected.push(Delivery { subscription, reply, headers, payload });
            }
            let (mut read, mut arrived) = (BytesMut::new(), Vec::new());
            for piece in sent.chunks(piece) {
                read.extend_from_slice(piece);
                while let Some(operation) = take_operation(&mut read).unwrap() {
                    let Operation::Message(delivery) = operation else { panic!("{operation:?}") };
                    arrived.push(delivery);
                }
            }
            prop_assert_eq!(arrived, expected);
        }
    }
}
