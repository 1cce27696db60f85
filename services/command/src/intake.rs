//! From a request to a command that waits for its batch. What waits is bounded, in commands and in bytes; past that a
//! request is refused at once, never left to time out.

use std::sync::Arc;

use domain::{CommandType, Id};
use runtime::micro::Request;
use sha2::{Digest, Sha256};
use tokio::sync::{
    OwnedSemaphorePermit, Semaphore,
    mpsc::{self, error::TrySendError},
};
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use wire::{Accepted, Code, Failure, RequestHeaders};

use crate::{Config, postgres::Postgres};

/// A command, and who waits for its reply.
pub struct Waiting {
    pub command: Command,
    pub requester: Requester,
}

/// Who waits for a reply.
pub struct Requester {
    request: Request,
    /// Gives the bytes free again when the command has been answered.
    _bytes: OwnedSemaphorePermit,
}

impl Requester {
    pub async fn answer(self, outcome: Result<Accepted, Failure>) {
        self.request.respond(outcome.map(|accepted| (accepted.headers(), accepted.body().into()))).await;
    }
}

/// A command with what its headers say.
#[derive(Clone)]
pub struct Command {
    pub command: domain::Command,
    pub expected_version: Option<u64>,
    /// The idempotency key.
    pub key: Option<String>,
    /// SHA-256 of what the key stands for: subject, expected version, body.
    pub fingerprint: [u8; 32],
    pub actor: Option<String>,
    pub traceparent: Option<String>,
}

/// Where the endpoints put commands.
#[derive(Clone)]
pub struct Intake {
    queue: mpsc::Sender<Waiting>,
    bytes: Arc<Semaphore>,
    max_request_bytes: usize,
    postgres: Postgres,
    replies: TaskTracker,
}

impl Intake {
    pub fn new(config: &Config, postgres: Postgres, replies: TaskTracker) -> (Self, mpsc::Receiver<Waiting>) {
        let (queue, waiting) = mpsc::channel(config.queue_commands);
        let bytes = Arc::new(Semaphore::new(config.queue_bytes as usize));
        (Self { queue, bytes, max_request_bytes: config.max_request_bytes, postgres, replies }, waiting)
    }

    /// Queues the request's command, or answers why not.
    pub fn take(&self, command_type: CommandType, request: Request) {
        let admitted = self.admit(request.message.payload.len());
        let (bytes, command) = match admitted.and_then(|bytes| Ok((bytes, read(command_type, &request)?))) {
            Ok(admitted) => admitted,
            Err(failure) => return self.refuse(request, failure),
        };
        let waiting = Waiting { command, requester: Requester { request, _bytes: bytes } };
        match self.queue.try_send(waiting) {
            Ok(()) => {}
            Err(TrySendError::Full(waiting)) => self.refuse(waiting.requester.request, overloaded()),
            Err(TrySendError::Closed(waiting)) => {
                self.refuse(waiting.requester.request, Failure::new(Code::Unavailable, "the service is stopping"));
            }
        }
    }

    fn refuse(&self, request: Request, failure: Failure) {
        self.replies.spawn(request.respond(Err(failure)));
    }

    fn admit(&self, length: usize) -> Result<OwnedSemaphorePermit, Failure> {
        if length > self.max_request_bytes {
            let message = format!("a request can have {} bytes at most, this has {length}", self.max_request_bytes);
            return Err(Failure::new(Code::TooLarge, message).with("max_bytes", self.max_request_bytes));
        }
        if !self.postgres.is_up() {
            return Err(Failure::new(Code::Unavailable, "the journal's database is away"));
        }
        // A parsed command holds about as much as its text, and never nothing.
        let bytes = u32::try_from(length.max(256)).unwrap_or(u32::MAX);
        Arc::clone(&self.bytes).try_acquire_many_owned(bytes).map_err(|_| overloaded())
    }
}

fn read(command_type: CommandType, request: &Request) -> Result<Command, Failure> {
    let message = &request.message;
    let headers = RequestHeaders::parse(message.headers.as_ref())?;
    let command = (command_type.parse)(&message.payload, Id(Uuid::now_v7()))?;
    let RequestHeaders { command_id: key, expected_version, min_position: _, actor, traceparent } = headers;
    let mut hash = Sha256::new();
    if key.is_some() {
        for part in [message.subject.as_bytes(), format!("{expected_version:?}").as_bytes(), &message.payload] {
            hash.update(part.len().to_be_bytes());
            hash.update(part);
        }
    }
    Ok(Command { command, expected_version, key, fingerprint: hash.finalize().into(), actor, traceparent })
}

fn overloaded() -> Failure {
    Failure::new(Code::Overloaded, "more commands are waiting than the service takes: try again later")
}
