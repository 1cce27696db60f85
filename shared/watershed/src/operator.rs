//! Asks the services for operations, `ops.<noun>.<verb>`, as the operator. Invariant: what is not answered is asked
//! again, since a replica may hang that the request went to. That is safe, because each operation says what shall be, and
//! finds it so the second time.

use std::time::Duration;

use client::Error;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::{
    Failure, Installation,
    connection::{Connection, User, name_operator},
};

/// How long to wait for one reply. A replica takes milliseconds, or seconds while MongoDB elects a primary.
const ATTEMPT: Duration = Duration::from_secs(3);
/// How long an operation may remain without a reply.
const PATIENCE: Duration = Duration::from_secs(30);
/// The time before it is asked again.
const PAUSE: Duration = Duration::from_millis(200);

pub struct Operator {
    connection: Connection,
}

/// A reply that has not come.
pub enum Unasked {
    /// It may come a little later; in words.
    ForNow(String),
    ForGood(Failure),
}

impl Operator {
    /// # Errors
    /// If the installation is not described as it must be, or NATS cannot be reached.
    pub async fn connect(installation: &Installation) -> Result<Self, Failure> {
        Ok(Self { connection: Connection::open(installation, User::Operator).await? })
    }

    /// Asks for an operation, such as `view.rebuild`, until it is answered; returns the body of the reply.
    ///
    /// # Errors
    /// If it is refused, nobody offers it, or no reply comes within [`PATIENCE`].
    pub async fn ask(&self, name: &str, body: &Value) -> Result<Value, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = match self.attempt(name, body).await {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            let is_unanswered = matches!(error, Error::TimedOut(_) | Error::ConnectionLost | Error::Overloaded(_));
            if !is_unanswered || Instant::now() + ATTEMPT > deadline {
                return Err(self.failure(&error));
            }
            sleep(PAUSE).await;
        }
    }

    /// Asks once, for who will ask again in any case.
    ///
    /// # Errors
    /// As [`Self::ask`]; what may pass is told apart.
    pub async fn ask_once(&self, name: &str, body: &Value) -> Result<Value, Unasked> {
        self.attempt(name, body).await.map_err(|error| match error {
            Error::TimedOut(_) | Error::Overloaded(_) => Unasked::ForNow("no reply comes".to_owned()),
            Error::ConnectionLost => {
                Unasked::ForNow("the connection to NATS is lost, and is being tried again".to_owned())
            }
            Error::NoResponders(_) => Unasked::ForNow("no replica of the projection service answers".to_owned()),
            Error::Unavailable(failure) => Unasked::ForNow(failure.message),
            error => Unasked::ForGood(self.failure(&error)),
        })
    }

    async fn attempt(&self, name: &str, body: &Value) -> Result<Value, Error> {
        self.connection.client.request(&format!("ops.{name}"), body.to_string()).deadline(ATTEMPT).await
    }

    fn failure(&self, error: &Error) -> Failure {
        match error {
            Error::Forbidden(_) => {
                name_operator(self.connection.not_permitted(&error.to_string()), "Operations are sent")
            }
            Error::NoResponders(subject) => Failure::Unanswered(format!("nobody serves {subject}")),
            Error::TimedOut(_) | Error::ConnectionLost => Failure::Unanswered(error.to_string()),
            error => {
                Failure::Refused(error.failure().map_or_else(|| error.to_string(), |failure| failure.message.clone()))
            }
        }
    }
}
