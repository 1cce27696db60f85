//! What tests expect of the answer to a request.

use client::{Error, Reply};
use domain::Id;
use serde_json::Value;
use wire::{Accepted, Failure};

/// The answer to a request that was sent once.
pub type Answer = Result<Reply<Value>, Error>;

pub trait Expect {
    /// The reply to a command that was accepted.
    fn accepted(self) -> Accepted;

    /// The identifier in the reply to a command.
    fn id(self) -> Id;

    /// The body of the reply to a query.
    fn data(self) -> Value;

    /// The failure with which a service has answered.
    fn failure(self) -> Failure;

    /// The code of that failure.
    fn code(self) -> String;
}

impl Expect for Answer {
    fn accepted(self) -> Accepted {
        let position = self.as_ref().ok().and_then(|reply| reply.position);
        let accepted: Accepted = serde_json::from_value(self.data()).expect("the body of a command's reply");
        assert_eq!(position, Some(accepted.position), "the header says what the body says");
        accepted
    }

    fn id(self) -> Id {
        self.accepted().id
    }

    fn data(self) -> Value {
        let reply = self.unwrap_or_else(|error| panic!("it failed: {error} {error:?}"));
        assert!(reply.position.is_some(), "every success has a position");
        reply.body
    }

    fn failure(self) -> Failure {
        let error = self.expect_err("the request should fail");
        error.failure().unwrap_or_else(|| panic!("it was not answered: {error}")).clone()
    }

    fn code(self) -> String {
        self.failure().code.into_owned()
    }
}
