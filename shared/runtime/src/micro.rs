//! NATS micro services (ADR-32): endpoints, and `$SRV.PING`, `INFO` and `STATS` for `nats micro`.
//!
//! The client library has them too, but counts an error only where it sends it with an empty body, takes a lock and copies
//! the endpoint's name for each request, and listens on a connection of its own, of which [`crate::listener`] tells. Here every error
//! is counted, and has its body.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use domain::Timestamp;
use serde_json::{Value, json};
use wire::{Code, Failure, failure_headers, position_headers};

use crate::{
    Nats,
    listener::{Listener, Publisher, Subscription},
    now,
    protocol::Delivery,
};

/// Bytes of a reply that are left to its headers, which the server counts too.
const HEADER_ROOM: usize = 1024;
/// Bytes of a reply subject at most: a client's own have some fifty.
const MAX_INBOX: usize = 512;

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

/// An endpoint, and what is done with its requests, in the order of their arrival. `handle` must not block: it hands the
/// request on, to a queue or a task.
pub struct Endpoint {
    pub description: EndpointDescription,
    pub handle: Box<dyn FnMut(Request) + Send>,
}

/// A running micro service.
pub struct Service {
    listener: Listener,
}

/// An endpoint's figures.
struct EndpointStats {
    description: EndpointDescription,
    queue_group: &'static str,
    requests: AtomicU64,
    errors: AtomicU64,
    processing_nanos: AtomicU64,
    last_error: Mutex<String>,
}

/// A request, to be answered once.
pub struct Request {
    /// As they came, from `NATS/1.0` on; empty if there are none.
    pub headers: Bytes,
    pub payload: Bytes,
    reply: Option<String>,
    received: Instant,
    publisher: Publisher,
    stats: Arc<EndpointStats>,
}

/// The body of a reply.
pub struct Reply {
    /// For the header `Position`.
    pub position: u64,
    pub body: Bytes,
}

/// What is answered.
pub type Response = Result<Reply, Failure>;

impl Service {
    /// Serves the endpoints, and answers to `$SRV`, from when this returns.
    pub async fn start(nats: &Nats, description: Description, endpoints: Vec<Endpoint>) -> Self {
        let queue_group = description.name;
        let (stats, handles): (Vec<Arc<EndpointStats>>, Vec<_>) = endpoints
            .into_iter()
            .map(|it| (Arc::new(EndpointStats::new(it.description, queue_group)), it.handle))
            .unzip();
        let mut subscriptions = Vec::new();
        let publisher = Publisher::default();
        for (stats, mut handle) in stats.iter().cloned().zip(handles) {
            let publisher = publisher.clone();
            subscriptions.push(Subscription {
                subject: stats.description.subject.clone(),
                queue_group: Some(queue_group),
                handle: Box::new(move |delivery| {
                    if let Some(request) = Request::new(delivery, &publisher, &stats) {
                        handle(request);
                    }
                }),
            });
        }
        let service_info = Arc::new(ServiceInfo { description, started: now(), endpoints: stats });
        for verb in [Verb::Ping, Verb::Info, Verb::Stats] {
            for subject in service_info.subjects(verb) {
                let (publisher, service_info) = (publisher.clone(), Arc::clone(&service_info));
                let handle = Box::new(move |Delivery { reply, .. }: Delivery| {
                    if let Some(reply) = reply.as_ref().and_then(inbox) {
                        let answer = service_info.answer(verb).to_string();
                        // Where it finds no room, whoever asked will ask again.
                        if answer.len() <= publisher.max_payload() {
                            publisher.try_publish(reply, &[], answer.as_bytes());
                        }
                    }
                });
                subscriptions.push(Subscription { subject, queue_group: None, handle });
            }
        }
        let name = format!("watershed {queue_group}, requests");
        let listener = Listener::start(nats.servers.clone(), name, subscriptions, publisher, nats.closed.clone());
        listener.up().await;
        Self { listener }
    }

    /// Takes no more requests; returns when all that were sent here have been handed to their handlers.
    pub async fn stop(&self) {
        self.listener.drain().await;
    }

    /// Returns when the server has taken all replies.
    pub async fn close(self) {
        self.listener.close().await;
    }
}

/// What is asked of the service itself.
#[derive(Clone, Copy)]
enum Verb {
    Ping,
    Info,
    Stats,
}

/// What the service says of itself.
struct ServiceInfo {
    description: Description,
    started: Timestamp,
    endpoints: Vec<Arc<EndpointStats>>,
}

impl ServiceInfo {
    fn subjects(&self, verb: Verb) -> [String; 3] {
        let verb = match verb {
            Verb::Ping => "PING",
            Verb::Info => "INFO",
            Verb::Stats => "STATS",
        };
        let Description { name, id, .. } = &self.description;
        [format!("$SRV.{verb}"), format!("$SRV.{verb}.{name}"), format!("$SRV.{verb}.{name}.{id}")]
    }

    fn answer(&self, verb: Verb) -> Value {
        let Description { name, description, version, id } = &self.description;
        let metadata = json!({ "replica": id, "revision": option_env!("WATERSHED_REVISION").unwrap_or("unknown") });
        let mut answer = json!({ "name": name, "id": id, "version": version, "metadata": metadata });
        match verb {
            Verb::Ping => answer["type"] = "io.nats.micro.v1.ping_response".into(),
            Verb::Info => {
                answer["type"] = "io.nats.micro.v1.info_response".into();
                answer["description"] = (*description).into();
                answer["endpoints"] = self.endpoints.iter().map(|endpoint| endpoint.info()).collect();
            }
            Verb::Stats => {
                answer["type"] = "io.nats.micro.v1.stats_response".into();
                answer["started"] = self.started.to_string().into();
                answer["endpoints"] = self.endpoints.iter().map(|endpoint| endpoint.to_json()).collect();
            }
        }
        answer
    }
}

impl EndpointStats {
    fn new(description: EndpointDescription, queue_group: &'static str) -> Self {
        Self {
            description,
            queue_group,
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            processing_nanos: AtomicU64::new(0),
            last_error: Mutex::default(),
        }
    }

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

    fn to_json(&self) -> Value {
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
    /// `None` where the reply subject cannot be read: nobody can be told what became of the request, and it is not done.
    fn new(delivery: Delivery, publisher: &Publisher, stats: &Arc<EndpointStats>) -> Option<Self> {
        let Delivery { subscription: _, reply, headers, payload } = delivery;
        let reply = reply.map(|reply| String::from_utf8(reply.to_vec())).transpose();
        let Ok(reply) = reply else {
            stats.count(Duration::ZERO, Some(&Failure::new(Code::Malformed, "the reply subject is not UTF-8")));
            return None;
        };
        let (publisher, stats) = (publisher.clone(), Arc::clone(stats));
        Some(Self { headers, payload, reply, received: Instant::now(), publisher, stats })
    }

    /// The endpoint's subject.
    pub fn subject(&self) -> &str {
        &self.stats.description.subject
    }

    /// Answers, and counts. A request without a reply subject is counted alone.
    pub async fn respond(self, response: Response) {
        let Self { reply, received, publisher, stats, .. } = self;
        let response = response.and_then(|reply| match reply.body.len() + HEADER_ROOM <= publisher.max_payload() {
            true => Ok(reply),
            false => Err(Failure::new(Code::TooLarge, "the reply is larger than the server allows: ask for less")),
        });
        stats.count(received.elapsed(), response.as_ref().err());
        let Some(inbox) = reply.as_ref().and_then(inbox) else { return };
        match response {
            Ok(Reply { position, body }) => publisher.publish(inbox, &position_headers(position), &body).await,
            Err(failure) => publisher.publish(inbox, &failure_headers(&failure), &failure.body()).await,
        }
    }
}

/// The requester names the subject of the reply, and a service may publish what the requester may not: only an inbox is
/// answered to. Without this, a client could have a reply published as an event.
fn inbox(reply: &impl AsRef<[u8]>) -> Option<&str> {
    let subject = std::str::from_utf8(reply.as_ref()).ok()?;
    (subject.starts_with("_INBOX.") && subject.len() <= MAX_INBOX).then_some(subject)
}

/// Nothing that holds these locks can leave what they guard half written.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
