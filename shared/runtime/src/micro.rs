//! NATS micro services (ADR-32): endpoints, and `$SRV.PING`, `INFO` and `STATS` for `nats micro`.
//!
//! The client library has them too, but counts an error only where it sends it with an empty body, and takes a lock and
//! copies the endpoint's name for each request. Here every error is counted, and has its body.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use async_nats::{Client, HeaderMap, Message, Subject, Subscriber};
use bytes::Bytes;
use domain::Timestamp;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wire::{Code, Failure, failure_reply};

use crate::{Nats, now};

/// How many requests more a stopping endpoint takes. Draining alone would lose some: the library forgets a subscription
/// before the server has heard that it ended, and drops what comes in between. So server and library are told to end it
/// after the same request, soon to come. Where it does not come in [`LAST_WAIT`], a nearer one is named, and at last,
/// where requests are rare, the subscription is drained.
const LAST_REQUESTS: [u64; 3] = [64, 8, 1];
const LAST_WAIT: Duration = Duration::from_millis(100);

/// Bytes of a reply that are left to its headers, which the server counts too.
const HEADER_ROOM: usize = 1024;

/// What `nats micro info` says of the service.
#[derive(Clone, Debug)]
pub struct Description {
    /// Also the queue group of its endpoints.
    pub name: &'static str,
    pub description: &'static str,
    /// Semantic.
    pub version: &'static str,
    /// Of this replica, unique.
    pub id: String,
}

/// One endpoint of the service.
#[derive(Clone, Debug)]
pub struct EndpointDescription {
    /// Letters, digits, `-`, `_`.
    pub name: String,
    pub subject: String,
    pub description: String,
    /// The JSON Schema of the request.
    pub schema: String,
}

/// A running micro service.
pub struct Service {
    client: Client,
    description: Description,
    endpoints: Arc<Mutex<Vec<Arc<Endpoint>>>>,
    tasks: TaskTracker,
    /// Stops the endpoints.
    stop: CancellationToken,
    /// Stops the answers to `$SRV`.
    gone: CancellationToken,
}

struct Endpoint {
    description: EndpointDescription,
    queue_group: &'static str,
    requests: AtomicU64,
    errors: AtomicU64,
    processing_nanos: AtomicU64,
    last_error: Mutex<String>,
}

/// A request, to be answered once.
pub struct Request {
    pub message: Message,
    received: Instant,
    client: Client,
    endpoint: Arc<Endpoint>,
}

/// What is answered: headers and body, or a failure.
pub type Response = Result<(HeaderMap, Bytes), Failure>;

impl Service {
    /// Answers to `$SRV` from now on; endpoints are added afterwards.
    ///
    /// # Errors
    /// If a subscription cannot be made.
    pub async fn start(nats: &Nats, description: Description) -> anyhow::Result<Self> {
        let service = Self {
            client: nats.client.clone(),
            description,
            endpoints: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            gone: CancellationToken::new(),
        };
        for verb in ["PING", "INFO", "STATS"] {
            service.answer(verb).await?;
        }
        Ok(service)
    }

    /// Serves an endpoint: each request is handed to `handle` in the order of arrival. `handle` must not block: it hands
    /// the request on, to a queue or a task.
    ///
    /// # Errors
    /// If the subscription cannot be made.
    pub async fn serve(
        &self,
        description: EndpointDescription,
        mut handle: impl FnMut(Request) + Send + 'static,
    ) -> anyhow::Result<()> {
        let subject = description.subject.clone();
        let mut requests = self.client.queue_subscribe(subject, self.description.name.to_owned()).await?;
        let endpoint = Arc::new(Endpoint {
            description,
            queue_group: self.description.name,
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            processing_nanos: AtomicU64::new(0),
            last_error: Mutex::default(),
        });
        locked(&self.endpoints).push(Arc::clone(&endpoint));
        let (client, stop) = (self.client.clone(), self.stop.clone());
        let mut hand_on = move |message| {
            let (client, endpoint) = (client.clone(), Arc::clone(&endpoint));
            handle(Request { message, received: Instant::now(), client, endpoint });
        };
        self.tasks.spawn(async move {
            let mut taken = 0;
            let mut stopped = pin!(stop.cancelled());
            loop {
                tokio::select! {
                    biased;
                    () = &mut stopped => break,
                    message = requests.next() => {
                        let Some(message) = message else { return };
                        taken += 1;
                        hand_on(message);
                    }
                }
            }
            take_last(requests, taken, hand_on).await;
        });
        Ok(())
    }

    /// Takes no more requests; returns when all that were taken have been handed to their handlers.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.gone.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn answer(&self, verb: &'static str) -> anyhow::Result<()> {
        let Description { name, id, .. } = &self.description;
        let mut subscriptions: Vec<Subscriber> = Vec::new();
        for subject in [format!("$SRV.{verb}"), format!("$SRV.{verb}.{name}"), format!("$SRV.{verb}.{name}.{id}")] {
            subscriptions.push(self.client.subscribe(subject).await?);
        }
        let mut requests = stream::select_all(subscriptions);
        let (client, description, endpoints) =
            (self.client.clone(), self.description.clone(), Arc::clone(&self.endpoints));
        let (started, gone) = (now(), self.gone.clone());
        self.tasks.spawn(async move {
            while let Some(Some(Message { reply, .. })) = gone.run_until_cancelled(requests.next()).await {
                let Some(reply) = reply.filter(is_inbox) else { continue };
                let answer = { describe(verb, &description, &locked(&endpoints), started) };
                // The library tells of a lost connection itself; whoever asked will ask again.
                let _ = client.publish(reply, answer.to_string().into()).await;
            }
        });
        Ok(())
    }
}

/// Takes the last requests of an endpoint that has taken so many, and ends the subscription.
async fn take_last(mut requests: Subscriber, mut taken: u64, mut hand_on: impl FnMut(Message)) {
    for last in LAST_REQUESTS {
        // Fails only where the connection was closed for good, and then the stream ends by itself.
        let _ = requests.unsubscribe_after(taken + last).await;
        let rest = async {
            while let Some(message) = requests.next().await {
                taken += 1;
                hand_on(message);
            }
        };
        if timeout(LAST_WAIT, rest).await.is_ok() {
            return;
        }
    }
    let _ = requests.drain().await;
    while let Some(message) = requests.next().await {
        hand_on(message);
    }
}

fn describe(verb: &str, description: &Description, endpoints: &[Arc<Endpoint>], started: Timestamp) -> Value {
    let mut answer = json!({
        "type": format!("io.nats.micro.v1.{}_response", verb.to_lowercase()),
        "name": description.name,
        "id": description.id,
        "version": description.version,
        "metadata": {},
    });
    match verb {
        "INFO" => {
            answer["description"] = description.description.into();
            answer["endpoints"] = endpoints.iter().map(|endpoint| endpoint.info()).collect();
        }
        "STATS" => {
            answer["started"] = started.to_string().into();
            answer["endpoints"] = endpoints.iter().map(|endpoint| endpoint.statistics()).collect();
        }
        _ => {}
    }
    answer
}

impl Endpoint {
    fn info(&self) -> Value {
        let EndpointDescription { name, subject, description, schema } = &self.description;
        let metadata = BTreeMap::from([("description", description), ("schema", schema)]);
        json!({ "name": name, "subject": subject, "queue_group": self.queue_group, "metadata": metadata })
    }

    fn count(&self, elapsed: Duration, failure: Option<&Failure>) {
        self.requests.fetch_add(1, Relaxed);
        self.processing_nanos.fetch_add(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        if let Some(failure) = failure {
            self.errors.fetch_add(1, Relaxed);
            *locked(&self.last_error) = format!("{}:{failure}", failure.status);
        }
    }

    fn statistics(&self) -> Value {
        let (requests, nanos) = (self.requests.load(Relaxed), self.processing_nanos.load(Relaxed));
        json!({
            "name": self.description.name,
            "subject": self.description.subject,
            "queue_group": self.queue_group,
            "num_requests": requests,
            "num_errors": self.errors.load(Relaxed),
            "last_error": *locked(&self.last_error),
            "processing_time": nanos,
            "average_processing_time": nanos.checked_div(requests).unwrap_or(0),
        })
    }
}

impl Request {
    /// Answers, and counts. A request without a reply subject is counted alone.
    pub async fn respond(self, response: Response) {
        let Self { message, received, client, endpoint } = self;
        let response = response.and_then(|(headers, body)| match body.len() + HEADER_ROOM <= client.max_payload() {
            true => Ok((headers, body)),
            false => Err(Failure::new(Code::TooLarge, "the reply is larger than the server allows: ask for less")),
        });
        endpoint.count(received.elapsed(), response.as_ref().err());
        let Some(reply) = message.reply.filter(is_inbox) else { return };
        let (headers, body) = response.unwrap_or_else(|failure| {
            let (headers, body) = failure_reply(&failure);
            (headers, body.into())
        });
        // The library tells of a lost connection itself; nobody waits behind one for this reply.
        let _ = client.publish_with_headers(reply, headers, body).await;
    }
}

/// The requester names the subject of the reply, and a service may publish what the requester may not: without this, a
/// client could have a reply published as an event.
fn is_inbox(reply: &Subject) -> bool {
    reply.starts_with("_INBOX.")
}

/// Nothing that holds these locks can leave what they guard half written.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
