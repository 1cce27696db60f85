//! A client of the system: what any other service would do with NATS requests.

use std::time::Duration;

use async_nats::{HeaderMap, Request};
use domain::Id;
use serde_json::Value;
use wire::{Accepted, Failure, POSITION, Subjects, failure_status};

/// Longer than any answer should take, whatever the machine.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub struct Client {
    pub nats: async_nats::Client,
    subjects: Subjects,
}

/// A reply as it came.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The body, or the failure.
    pub result: Result<Value, Failure>,
    /// The header `Position`.
    pub position: Option<u64>,
}

impl Client {
    /// # Errors
    /// If the server does not take the connection.
    pub async fn connect(url: &str, subjects: Subjects) -> anyhow::Result<Self> {
        let (options, servers) = runtime::nats_options(url)?;
        Ok(Self { nats: options.connect(servers).await?, subjects })
    }

    /// A command such as `order.create`, with headers.
    ///
    /// # Errors
    /// If no reply came.
    pub async fn command(&self, name: &str, body: Value, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
        let (aggregate, verb) = name.split_once('.').unwrap_or((name, ""));
        self.request(self.subjects.command(aggregate, verb), body.to_string().into(), headers).await
    }

    /// A query such as `order.get`, with headers.
    ///
    /// # Errors
    /// If no reply came.
    pub async fn query(&self, name: &str, body: Value, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
        let (noun, verb) = name.split_once('.').unwrap_or((name, ""));
        self.request(self.subjects.query(noun, verb), body.to_string().into(), headers).await
    }

    /// Anything.
    ///
    /// # Errors
    /// If no reply came, or one that is not of the wire's form.
    pub async fn request(&self, subject: String, body: Vec<u8>, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        let mut request = Request::new().payload(body.into()).timeout(Some(TIMEOUT));
        if !map.is_empty() {
            request = request.headers(map);
        }
        let message = self.nats.send_request(subject, request).await?;
        let mut body: Value = serde_json::from_slice(&message.payload)?;
        let position = message.headers.as_ref().and_then(|headers| headers.get(POSITION)?.as_str().parse().ok());
        let result = match failure_status(&message) {
            None => Ok(body),
            Some(status) => {
                let mut failure = body["error"].take();
                failure["status"] = status.into();
                Err(serde_json::from_value(failure)?)
            }
        };
        Ok(Reply { result, position })
    }
}

impl Reply {
    /// The success of a command.
    ///
    /// # Panics
    /// If it failed.
    pub fn accepted(self) -> Accepted {
        let body = self.result.unwrap_or_else(|failure| panic!("refused: {failure} {:?}", failure.details));
        let accepted: Accepted = serde_json::from_value(body).expect("a command's reply");
        assert_eq!(self.position, Some(accepted.position), "the header says what the body says");
        accepted
    }

    /// The identifier that a command's reply tells.
    ///
    /// # Panics
    /// If it failed.
    pub fn id(self) -> Id {
        self.accepted().id
    }

    /// The data of a query.
    ///
    /// # Panics
    /// If it failed.
    pub fn data(self) -> Value {
        assert!(self.position.is_some() || self.result.is_err(), "every query's reply has a position");
        self.result.unwrap_or_else(|failure| panic!("refused: {failure} {:?}", failure.details))
    }

    /// The code of a failure.
    ///
    /// # Panics
    /// If it succeeded.
    pub fn code(self) -> String {
        self.failure().code.into_owned()
    }

    /// The failure.
    ///
    /// # Panics
    /// If it succeeded.
    pub fn failure(self) -> Failure {
        self.result.expect_err("a failure")
    }
}
