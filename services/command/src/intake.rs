//! The intake turns a request into a command that waits for its batch. The queue is bounded, in commands and in bytes;
//! when it is full, a request is refused at once, never left to time out.

use std::sync::Arc;

use domain::{CommandType, Id};
use runtime::{
    Monitor,
    micro::{Reply, Request, RequestId},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::{
    OwnedSemaphorePermit, Semaphore,
    mpsc::{self, error::TrySendError},
};
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use wire::{Accepted, Code, Failure, RequestHeaders};

use crate::{Config, postgres::Postgres};

/// A command in the queue, and the requester who waits for its reply.
pub struct QueuedRequest {
    pub command: QueuedCommand,
    pub requester: Requester,
}

/// The client that waits for a reply.
pub struct Requester {
    request: Request,
    /// Releases the request's bytes when the command has been answered.
    _bytes: OwnedSemaphorePermit,
}

impl Requester {
    pub fn request(&self) -> &Request {
        &self.request
    }

    pub async fn answer(self, outcome: Result<Accepted, Failure>) {
        let reply = |accepted: Accepted| Reply { position: Some(accepted.position), body: accepted.body().into() };
        self.request.respond(outcome.map(reply)).await;
    }
}

/// A command with the headers that it came with.
#[derive(Clone)]
pub struct QueuedCommand {
    pub command: domain::Command,
    pub expected_version: Option<u64>,
    pub key: Option<IdempotencyKey>,
    pub actor: Option<String>,
    pub traceparent: Option<String>,
    pub request_id: RequestId,
}

/// An idempotency key, with the fingerprint of the request that it identifies.
#[derive(Clone)]
pub struct IdempotencyKey {
    pub id: String,
    /// SHA-256 of the subject, the expected version and the command's canonical form.
    pub fingerprint: [u8; 32],
    /// SHA-256 of the subject, the expected version and the body as it was sent. Entries of the ledger from earlier
    /// versions have this one.
    pub legacy_fingerprint: [u8; 32],
}

impl IdempotencyKey {
    /// Whether the ledger's fingerprint is that of this request.
    pub fn matches(&self, fingerprint: &[u8; 32]) -> bool {
        [self.fingerprint, self.legacy_fingerprint].contains(fingerprint)
    }
}

/// The sending side of the queue, which all endpoints share.
#[derive(Clone)]
pub struct Intake {
    queue: mpsc::Sender<QueuedRequest>,
    bytes: Arc<Semaphore>,
    max_request_bytes: usize,
    postgres: Postgres,
    replies: TaskTracker,
}

impl Intake {
    pub fn new(config: &Config, postgres: Postgres, replies: TaskTracker) -> (Self, mpsc::Receiver<QueuedRequest>) {
        let (queue, waiting) = mpsc::channel(config.queue_commands);
        let bytes = Arc::new(Semaphore::new(config.queue_bytes as usize));
        (Self { queue, bytes, max_request_bytes: config.max_request_bytes, postgres, replies }, waiting)
    }

    /// Shows how full the queue is, without keeping it open.
    pub fn show(&self, config: &Config, monitor: &Monitor) {
        let (queue, bytes) = (self.queue.downgrade(), Arc::clone(&self.bytes));
        let (max_commands, max_bytes) = (config.queue_commands, config.queue_bytes as usize);
        let waiting = move || {
            let commands = queue.upgrade().map_or(0, |queue| queue.max_capacity() - queue.capacity());
            (commands, max_bytes - bytes.available_permits().min(max_bytes))
        };
        let figures = waiting.clone();
        monitor.add_figures(move |it| {
            let (commands, bytes) = figures();
            it.gauge("watershed_queue_commands", "Commands that wait for a batch", &[], commands as f64);
            it.gauge("watershed_queue_commands_limit", "QUEUE_COMMANDS", &[], max_commands as f64);
            it.gauge("watershed_queue_bytes", "Bytes of requests that are not answered yet", &[], bytes as f64);
            it.gauge("watershed_queue_bytes_limit", "QUEUE_BYTES", &[], max_bytes as f64);
        });
        monitor.add_data(move |data| {
            let (commands, bytes) = waiting();
            let queue = json!({
                "commands": commands, "bytes": bytes, "max_commands": max_commands, "max_bytes": max_bytes,
            });
            data.insert("queue".into(), queue);
        });
    }

    /// Puts the request's command into the queue, or answers why it was refused.
    pub fn take(&self, command_type: CommandType, mut request: Request) {
        let admitted = self.admit(request.payload.len());
        let (bytes, command) = match admitted.and_then(|bytes| Ok((bytes, read(command_type, &mut request)?))) {
            Ok(admitted) => admitted,
            Err(failure) => return self.refuse(request, failure),
        };
        let queued = QueuedRequest { command, requester: Requester { request, _bytes: bytes } };
        match self.queue.try_send(queued) {
            Ok(()) => {}
            Err(TrySendError::Full(queued)) => self.refuse(queued.requester.request, overloaded()),
            Err(TrySendError::Closed(queued)) => {
                self.refuse(queued.requester.request, Failure::new(Code::Unavailable, "the service is stopping"));
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
            return Err(Failure::new(Code::Unavailable, "the journal's database is unavailable"));
        }
        // A parsed command takes about as much memory as its text, and even an empty one takes some.
        let bytes = u32::try_from(length.max(256)).unwrap_or(u32::MAX);
        Arc::clone(&self.bytes).try_acquire_many_owned(bytes).map_err(|_| overloaded())
    }
}

fn read(command_type: CommandType, request: &mut Request) -> Result<QueuedCommand, Failure> {
    let headers = RequestHeaders::parse(&request.headers)?;
    request.begin_trace(headers.traceparent);
    let traceparent = request.traceparent().map(str::to_owned);
    let generated = Id(Uuid::now_v7());
    let command = (command_type.parse)(&request.payload, generated)?;
    let RequestHeaders { command_id, expected_version, actor, .. } = headers;
    let key = command_id.map(|id| IdempotencyKey {
        fingerprint: fingerprint(request.subject(), expected_version, &canonical_form(&command, generated)),
        legacy_fingerprint: fingerprint(request.subject(), expected_version, &request.payload),
        id,
    });
    Ok(QueuedCommand { command, expected_version, key, actor, traceparent, request_id: request.id })
}

/// The command as JSON in a canonical form, which does not depend on how the client wrote it: without absent fields,
/// and without an identifier that was generated here.
fn canonical_form(command: &domain::Command, generated: Id) -> Vec<u8> {
    // Serialising cannot fail: every command type has a JSON form.
    let mut json = command.to_json().unwrap_or_default();
    if command.target() == generated
        && let Some(fields) = json.as_object_mut()
    {
        fields.remove("id");
    }
    without_nulls(&mut json);
    json.sort_all_objects();
    json.to_string().into_bytes()
}

fn without_nulls(json: &mut Value) {
    match json {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn fingerprint(subject: &str, expected_version: Option<u64>, body: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [subject.as_bytes(), format!("{expected_version:?}").as_bytes(), body] {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

fn overloaded() -> Failure {
    Failure::new(Code::Overloaded, "more commands are waiting than the service takes: try again later")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(verb: &str, body: &str) -> Vec<u8> {
        let generated = Id(Uuid::now_v7());
        let found = domain::commands().find(|it| it.aggregate == "product" && it.verb == verb).unwrap();
        canonical_form(&(found.parse)(body.as_bytes(), generated).unwrap(), generated)
    }

    #[test]
    fn a_command_means_the_same_however_it_is_written() {
        let price = r#"{"amount":250,"currency":"GBP"}"#;
        let plain = canonical("create", &format!(r#"{{"sku":"A","name":"Lamp","price":{price}}}"#));
        for same in [
            r#"{"price":{"currency":"GBP","amount":250},"name":"Lamp","sku":"A"}"#,
            r#" { "sku" : "\u0041", "name":" Lamp ","price":{"amount":250,"currency":"G\u0042P"},"stock":0 } "#,
        ] {
            assert_eq!(canonical("create", same), plain, "{same}");
        }
        let other = canonical("create", &format!(r#"{{"sku":"A","name":"Lamp","price":{price},"stock":1}}"#));
        assert_ne!(other, plain);
        let id = "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001";
        assert_ne!(canonical("create", &format!(r#"{{"id":"{id}","sku":"A","name":"Lamp","price":{price}}}"#)), plain);
        let bare = canonical("update", &format!(r#"{{"id":"{id}"}}"#));
        assert_eq!(canonical("update", &format!(r#"{{"name":null,"sku":null,"id":"{}"}}"#, id.to_uppercase())), bare);
    }
}
