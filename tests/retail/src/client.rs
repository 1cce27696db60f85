//! A client of the system, which sends NATS requests as any other service would.

use std::time::Duration;

use async_nats::{HeaderMap, Request};
use domain::Id;
use serde_json::Value;
use wire::{Accepted, Failure, POSITION, Subjects, failure_status};

/// How long a reply may take. No reply should take as long, even on a slow machine.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub struct Client {
    pub nats: async_nats::Client,
    subjects: Subjects,
}

/// The reply to a command or a query.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The body of a success, or the failure.
    pub result: Result<Value, Failure>,
    /// The header `Position`.
    pub position: Option<u64>,
}

impl Client {
    /// # Errors
    /// If the server does not accept the connection.
    pub async fn connect(url: &str, subjects: Subjects) -> anyhow::Result<Self> {
        let (options, servers) = runtime::nats_options(url)?;
        Ok(Self { nats: options.connect(servers).await?, subjects })
    }

    /// Sends a command such as `order.create`, with headers.
    ///
    /// # Errors
    /// If no reply has come, or one that cannot be read.
    pub async fn command(&self, name: &str, body: Value, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
        let (aggregate, verb) = name.split_once('.').unwrap_or((name, ""));
        self.request(self.subjects.command(aggregate, verb), body.to_string().into(), headers).await
    }

    /// Sends a query such as `order.get`, with headers.
    ///
    /// # Errors
    /// If no reply has come, or one that cannot be read.
    pub async fn query(&self, name: &str, body: Value, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
        let (noun, verb) = name.split_once('.').unwrap_or((name, ""));
        self.request(self.subjects.query(noun, verb), body.to_string().into(), headers).await
    }

    /// Sends any request.
    ///
    /// # Errors
    /// If no reply has come, or one that cannot be read.
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
    /// The reply to a command that was accepted.
    ///
    /// # Panics
    /// If the request failed.
    pub fn accepted(self) -> Accepted {
        let body = self.result.unwrap_or_else(|failure| panic!("refused: {failure} {:?}", failure.details));
        let accepted: Accepted = serde_json::from_value(body).expect("the body of a command's reply");
        assert_eq!(self.position, Some(accepted.position), "the header says what the body says");
        accepted
    }

    /// The identifier in the reply to a command.
    ///
    /// # Panics
    /// If the request failed.
    pub fn id(self) -> Id {
        self.accepted().id
    }

    /// The body of the reply to a query.
    ///
    /// # Panics
    /// If the request failed.
    pub fn data(self) -> Value {
        assert!(self.position.is_some() || self.result.is_err(), "every query's reply has a position");
        self.result.unwrap_or_else(|failure| panic!("refused: {failure} {:?}", failure.details))
    }

    /// The code of the failure.
    ///
    /// # Panics
    /// If the request succeeded.
    pub fn code(self) -> String {
        self.failure().code.into_owned()
    }

    /// The failure.
    ///
    /// # Panics
    /// If the request succeeded.
    pub fn failure(self) -> Failure {
        self.result.expect_err("the request should fail")
    }
}
