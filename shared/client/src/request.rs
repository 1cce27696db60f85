//! A request and its retries. The invariants: all attempts of a command have the same idempotency key, so that it
//! happens once; nothing is sent again after a reply that settles it; and an error never claims more than is known.

use std::{
    future::{Future, IntoFuture},
    marker::PhantomData,
    pin::Pin,
    time::Duration,
};

use async_nats::{HeaderMap, HeaderName, HeaderValue, Message, RequestError, RequestErrorKind};
use bytes::Bytes;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tokio::{
    sync::broadcast::Receiver,
    time::{Instant, sleep, timeout_at},
};
use uuid::Uuid;
use wire::{ACTOR, Code, EXPECTED_VERSION, Failure, MIN_POSITION, MSG_ID, POSITION, TRACEPARENT, failure_status};

use crate::{Client, Error, backoff, connect::Trouble};

/// How long one attempt may take. It is longer than any reply should take, and short enough for several attempts.
const ATTEMPT: Duration = Duration::from_secs(5);
/// No retry begins with less time than this before the deadline. Its reply would hardly come in time, and what is known
/// of the attempts before would be in doubt again.
const SHORTEST_RETRY: Duration = Duration::from_millis(250);

/// A request to be awaited. A failure that passes is retried until the deadline.
#[must_use = "a request is sent when it is awaited"]
pub struct Request<'a, T> {
    client: &'a Client,
    subject: String,
    /// The headers and the body, unless one of them is not valid.
    content: Result<(HeaderMap, Bytes), Error>,
    deadline: Duration,
    is_as_given: bool,
    reply: PhantomData<fn() -> T>,
}

/// A successful reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply<T> {
    pub body: T,
    /// The position of the command's last event, or of the view that was read.
    pub position: Option<u64>,
    pub traceparent: Option<String>,
}

impl<'a, T> Request<'a, T> {
    pub(crate) fn new(client: &'a Client, subject: String, body: serde_json::Result<Bytes>) -> Self {
        let content = body.map(|body| (HeaderMap::new(), body)).map_err(|error| Error::Unsendable(error.to_string()));
        Self { client, subject, content, deadline: client.deadline, is_as_given: false, reply: PhantomData }
    }

    /// The idempotency key of a command. By default, a new one is made for each request.
    pub fn key(self, key: &str) -> Self {
        self.header(MSG_ID, key)
    }

    /// Lets the command be refused unless its aggregate is at this version.
    pub fn expected_version(self, version: u64) -> Self {
        self.header(EXPECTED_VERSION, &version.to_string())
    }

    /// Who acts; kept with the command's events.
    pub fn actor(self, actor: &str) -> Self {
        self.header(ACTOR, actor)
    }

    /// W3C Trace Context.
    pub fn traceparent(self, traceparent: &str) -> Self {
        self.header(TRACEPARENT, traceparent)
    }

    /// The position that the query's view must have reached, instead of the session's. With 0 the query does not wait.
    pub fn min_position(self, position: u64) -> Self {
        self.header(MIN_POSITION, &position.to_string())
    }

    /// Any header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        if let Ok((headers, _)) = &mut self.content {
            match (name.parse::<HeaderName>(), value.parse::<HeaderValue>()) {
                (Ok(name), Ok(value)) => headers.insert(name, value),
                (Err(_), _) | (_, Err(_)) => {
                    let text =
                        format!("the name or the value of the header {name:?} has a character that it may not have");
                    self.content = Err(Error::Unsendable(text));
                }
            }
        }
        self
    }

    /// How long the request may take, with all its retries.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Sends the request once, and with no headers but those given: for tools and tests.
    pub fn as_given(self) -> Self {
        Self { is_as_given: true, ..self }
    }
}

impl<T: DeserializeOwned> Request<'_, T> {
    /// Sends the request and waits for the reply, with its headers.
    ///
    /// # Errors
    /// If the request is refused, or has not succeeded by the deadline.
    pub async fn reply(self) -> Result<Reply<T>, Error> {
        let Self { client, subject, content, deadline, is_as_given, .. } = self;
        let (mut headers, body) = content?;
        let deadline = Instant::now() + deadline;
        let kind = Kind::of(client.subjects().name(&subject));
        let is_retried = kind != Kind::Other && !is_as_given;
        if is_retried {
            kind.complete(&mut headers, client.session().position());
        }
        let (mut is_in_doubt, mut retry) = (false, 0);
        loop {
            let limit = if is_retried { deadline.min(Instant::now() + ATTEMPT) } else { deadline };
            let error = match attempt(client, &subject, &headers, &body, limit).await.and_then(|reply| read(&reply)) {
                Ok(reply) => {
                    client.session().note(reply.position.unwrap_or(0));
                    return Ok(reply);
                }
                Err(error) => error,
            };
            is_in_doubt |= kind == Kind::Command && error.leaves_doubt();
            let delay = backoff::delay(retry);
            if is_retried && error.is_passing() && Instant::now() + delay + SHORTEST_RETRY < deadline {
                sleep(delay).await;
                retry += 1;
                continue;
            }
            return Err(match get(&headers, MSG_ID) {
                Some(key) if is_in_doubt && !error.settles() => {
                    Error::OutcomeUnknown { key: key.to_owned(), last: Box::new(error) }
                }
                Some(_) | None => error,
            });
        }
    }
}

/// What may be done with a request.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Command,
    Query,
    /// It may not be safe to repeat.
    Other,
}

impl Kind {
    /// The kind of the requests to the subject of this name.
    fn of(name: &str) -> Self {
        match name.split('.').next() {
            Some("cmd") => Self::Command,
            Some("qry") => Self::Query,
            Some(_) | None => Self::Other,
        }
    }

    /// Adds the headers that make a retry safe, and that let a query see what the session has seen, unless they are
    /// given.
    fn complete(self, headers: &mut HeaderMap, position: u64) {
        match self {
            Self::Command if get(headers, MSG_ID).is_none() => headers.insert(MSG_ID, Uuid::now_v7().to_string()),
            Self::Query if get(headers, MIN_POSITION).is_none() && position > 0 => {
                headers.insert(MIN_POSITION, position.to_string());
            }
            Self::Command | Self::Query | Self::Other => {}
        }
    }
}

/// A header, in whatever letter case its name is.
fn get<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let is_named = |it: &HeaderName| AsRef::<str>::as_ref(it).eq_ignore_ascii_case(name);
    headers.iter().find(|(it, _)| is_named(it)).and_then(|(_, values)| Some(values.first()?.as_str()))
}

/// Sends a request once.
async fn attempt(
    client: &Client,
    subject: &str,
    headers: &HeaderMap,
    body: &Bytes,
    limit: Instant,
) -> Result<Message, Error> {
    let mut troubles = client.troubles.subscribe();
    let mut request = async_nats::Request::new().payload(body.clone()).timeout(None);
    if !headers.is_empty() {
        request = request.headers(headers.clone());
    }
    // The limit also covers the time until the request is sent, which may wait for a connection.
    let replied = timeout_at(limit, client.nats().send_request(subject.to_owned(), request));
    tokio::select! {
        replied = replied => match replied {
            Ok(reply) => reply.map_err(|error| not_sent(subject, &error)),
            Err(_) => Err(Error::TimedOut(subject.to_owned())),
        },
        error = trouble(&mut troubles, subject) => Err(error),
    }
}

/// Waits for what prevents the reply.
async fn trouble(troubles: &mut Receiver<Trouble>, subject: &str) -> Error {
    let refused = format!("Publish to \"{subject}\"");
    loop {
        match troubles.recv().await {
            Ok(Trouble::Refused(reason)) if reason.contains(&refused) => {
                return Error::Forbidden(subject.to_owned());
            }
            Ok(Trouble::Refused(_)) => {}
            Ok(Trouble::Lost) | Err(_) => return Error::ConnectionLost,
        }
    }
}

fn not_sent(subject: &str, error: &RequestError) -> Error {
    match error.kind() {
        RequestErrorKind::TimedOut => Error::TimedOut(subject.to_owned()),
        RequestErrorKind::NoResponders => Error::NoResponders(subject.to_owned()),
        RequestErrorKind::InvalidSubject => Error::Unsendable(format!("{subject:?} is not a subject")),
        RequestErrorKind::MaxPayloadExceeded => {
            Error::TooLarge(Failure::new(Code::TooLarge, "the request is larger than NATS allows"))
        }
        RequestErrorKind::Other => Error::ConnectionLost,
    }
}

fn read<T: DeserializeOwned>(message: &Message) -> Result<Reply<T>, Error> {
    if let Some(status) = failure_status(message) {
        return Err(failure(status, &message.payload));
    }
    let header = |name| get(message.headers.as_ref()?, name);
    let body = serde_json::from_slice(&message.payload).map_err(|error| Error::Unreadable(error.to_string()))?;
    let position = header(POSITION).and_then(|position| position.parse().ok());
    Ok(Reply { body, position, traceparent: header(TRACEPARENT).map(str::to_owned) })
}

/// Reads `{"error":{"code":…,"message":…,"details":{…}}}`.
fn failure(status: u16, body: &[u8]) -> Error {
    #[derive(Deserialize)]
    struct Body {
        error: Map<String, Value>,
    }

    let read = || {
        let Body { mut error } = serde_json::from_slice(body)?;
        error.insert("status".to_owned(), status.into());
        serde_json::from_value::<Failure>(error.into())
    };
    read().map_or_else(|error| Error::Unreadable(format!("a failure with the status {status}: {error}")), Error::from)
}

impl<'a, T: DeserializeOwned + Send + 'a> IntoFuture for Request<'a, T> {
    type Output = Result<T, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    /// Sends the request and waits for the body of the reply.
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.reply().await.map(|reply| reply.body) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;

    #[test]
    fn a_command_gets_a_key_and_a_query_the_position_unless_they_are_given() {
        let completed = |name: &str, given: Option<(&str, &str)>, position| {
            let mut headers = HeaderMap::new();
            if let Some((name, value)) = given {
                headers.insert(name, value);
            }
            Kind::of(name).complete(&mut headers, position);
            headers
        };
        let key = |headers: HeaderMap| get(&headers, MSG_ID).unwrap().parse::<Uuid>().unwrap();
        let (one, other) = (completed("cmd.order.pay", None, 7), completed("cmd.order.pay", None, 7));
        assert_eq!((one.len(), key(one.clone()).get_version_num()), (1, 7));
        assert_ne!(key(one), key(other));
        let given = completed("cmd.order.pay", Some(("nats-msg-id", "k-1")), 7);
        assert_eq!((given.len(), get(&given, MSG_ID)), (1, Some("k-1")));

        let query = completed("qry.order.get", None, 7);
        assert_eq!((query.len(), get(&query, MIN_POSITION)), (1, Some("7")));
        let given = completed("qry.order.get", Some((MIN_POSITION, "0")), 7);
        assert_eq!((given.len(), get(&given, MIN_POSITION)), (1, Some("0")));
        assert!(completed("qry.order.get", None, 0).is_empty());
        assert!(completed("ops.view.list", None, 7).is_empty());
    }

    #[test]
    fn a_failure_is_read_with_its_details() {
        let sent = Failure::new(Code::NotFound, "there is no such user").with("id", 7);
        let Error::NotFound(read) = failure(404, &sent.body()) else { panic!("it is another error") };
        assert_eq!(read, sent);
    }

    #[test]
    fn a_failure_that_cannot_be_read_is_no_success() {
        for body in ["", "{}", "[]", r#"{"error":7}"#] {
            assert!(matches!(failure(503, body.as_bytes()), Error::Unreadable(_)), "{body}");
        }
    }
}
