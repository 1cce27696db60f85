//! A NATS micro service (ADR-32): its endpoints, and the answers to `$SRV.PING`, `INFO` and `STATS` for `nats micro`.
//!
//! The client library has micro services too. But it counts an error only if it sends it with an empty body, takes a
//! lock and copies the endpoint's name for every request, and receives requests on a connection with the weaknesses
//! that [`crate::listener`] describes. Here every error is counted, and has a body.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use domain::Timestamp;
use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;
use wire::{Code, Failure, failure_headers, success_headers};

use crate::{
    Monitor, Nats, Problem, Tracer,
    listener::{Listener, Publisher, Subscription},
    locked,
    monitor::EndpointMetrics,
    now,
    protocol::Delivery,
    traces::{Ended, KeyValue, Kind, Span, TraceContext, messaging, trace_id},
};

/// How long the connection for requests may be silent. It is pinged far more often.
const LISTENER_BOUND: Duration = Duration::from_secs(60);

/// Bytes of a reply that are reserved for its headers, which the server's limit includes.
const HEADER_ROOM: usize = 1024;
/// The longest reply subject that is accepted, in bytes. Those of real clients have about fifty.
const MAX_INBOX: usize = 512;

/// One endpoint of the service.
#[derive(Clone, Debug)]
pub struct EndpointDescription {
    /// Letters, digits, `-` and `_`.
    pub name: String,
    pub subject: String,
    pub description: String,
    /// The JSON Schema of the request.
    pub schema: String,
}

/// An endpoint with its handler, which is called with the requests in the order of their arrival. It must not block,
/// but pass the request on to a queue or a task.
pub struct Endpoint {
    pub description: EndpointDescription,
    /// Whether the service takes requests for it at present; it always does if `None`. What the server has sent before
    /// it reads of a change comes to the handler all the same.
    pub open: Option<watch::Receiver<bool>>,
    pub handle: Box<dyn FnMut(Request) + Send>,
}

/// A running micro service.
pub struct Service {
    listener: Listener,
}

/// An endpoint's statistics.
struct EndpointStats {
    description: EndpointDescription,
    metrics: EndpointMetrics,
    tracer: Tracer,
    queue_group: &'static str,
    requests: AtomicU64,
    errors: AtomicU64,
    processing_nanos: AtomicU64,
    last_error: Mutex<String>,
}

/// Identifies a request in the logs, and in the reply if the service was at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId(u64);

impl RequestId {
    fn next() -> Self {
        static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(Uuid::new_v4().as_u64_pair().0));
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A request, which must be answered once.
pub struct Request {
    pub id: RequestId,
    /// The header block as it was received, from `NATS/1.0` on; empty if there is none.
    pub headers: Bytes,
    pub payload: Bytes,
    reply: Option<String>,
    received: Instant,
    publisher: Publisher,
    stats: Arc<EndpointStats>,
    trace: RequestTrace,
}

/// The trace that a request belongs to.
#[derive(Default)]
struct RequestTrace {
    /// What is stored with the events, and returned to the requester: the identity of the request's span, or the
    /// `traceparent` as it was received if none is recorded.
    traceparent: Option<String>,
    span: Option<Box<Span>>,
}

/// A successful reply.
pub struct Reply {
    /// The value of the header `Position`; `None` if the reply does not depend on one.
    pub position: Option<u64>,
    pub body: Bytes,
}

/// The answer to a request.
pub type Response = Result<Reply, Failure>;

impl Service {
    /// Starts to serve; returns when the endpoints and `$SRV` are being served. `description` is shown by `nats micro
    /// info`. The service's name is also the queue group of its endpoints.
    pub async fn start(nats: &Nats, monitor: &Monitor, description: &'static str, endpoints: Vec<Endpoint>) -> Self {
        let queue_group = monitor.service();
        let stats = |description: EndpointDescription| {
            let metrics = monitor.endpoint_metrics(nats.subjects.name(&description.subject));
            Arc::new(EndpointStats::new(description, queue_group, metrics, monitor.tracer().clone()))
        };
        let (stats, handles): (Vec<Arc<EndpointStats>>, Vec<_>) =
            endpoints.into_iter().map(|it| (stats(it.description), (it.open, it.handle))).unzip();
        let mut subscriptions = Vec::new();
        let publisher = Publisher::default();
        for (stats, (open, mut handle)) in stats.iter().cloned().zip(handles) {
            let publisher = publisher.clone();
            subscriptions.push(Subscription {
                subject: stats.description.subject.clone(),
                queue_group: Some(queue_group),
                open,
                handle: Box::new(move |delivery| {
                    if let Some(request) = Request::new(delivery, &publisher, &stats) {
                        handle(request);
                    }
                }),
            });
        }
        let service_info =
            Arc::new(ServiceInfo { description, monitor: monitor.clone(), started: now(), endpoints: stats });
        for verb in [Verb::Ping, Verb::Info, Verb::Stats] {
            for subject in service_info.subjects(verb) {
                let (publisher, service_info) = (publisher.clone(), Arc::clone(&service_info));
                let handle = Box::new(move |Delivery { reply, .. }: Delivery| {
                    if let Some(reply) = reply.as_ref().and_then(inbox) {
                        let answer = service_info.answer(verb).to_string();
                        // If there is no room in the send buffer, the requester times out and asks again.
                        if answer.len() <= publisher.max_payload() {
                            publisher.try_publish(reply, &[], answer.as_bytes());
                        }
                    }
                });
                subscriptions.push(Subscription { subject, queue_group: None, open: None, handle });
            }
        }
        let name = format!("watershed {queue_group}, requests");
        let pulse = monitor.pulse("the connection for requests", LISTENER_BOUND);
        let listener =
            Listener::start(nats.servers.clone(), name, subscriptions, publisher, pulse, nats.closed.clone());
        let is_up = listener.is_up();
        monitor.add_check(move || match is_up() {
            true => vec![],
            false => vec![Problem::blocking("the connection to NATS for requests is down")],
        });
        listener.up().await;
        Self { listener }
    }

    /// Takes no more requests; returns when all that the server had sent have been passed to their handlers.
    pub async fn stop(&self) {
        self.listener.drain().await;
    }

    /// Waits until the server has received all replies, and closes the connection.
    pub async fn close(self) {
        self.listener.close().await;
    }
}

/// A request of the micro protocol, about the service itself.
#[derive(Clone, Copy)]
enum Verb {
    Ping,
    Info,
    Stats,
}

/// What the service tells about itself.
struct ServiceInfo {
    description: &'static str,
    monitor: Monitor,
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
        let (name, id) = (self.monitor.service(), self.monitor.replica());
        [format!("$SRV.{verb}"), format!("$SRV.{verb}.{name}"), format!("$SRV.{verb}.{name}.{id}")]
    }

    fn answer(&self, verb: Verb) -> Value {
        let (name, id, metadata) = (self.monitor.service(), self.monitor.replica(), self.monitor.metadata());
        let mut answer = json!({ "name": name, "id": id, "version": env!("CARGO_PKG_VERSION"), "metadata": metadata });
        match verb {
            Verb::Ping => answer["type"] = "io.nats.micro.v1.ping_response".into(),
            Verb::Info => {
                answer["type"] = "io.nats.micro.v1.info_response".into();
                answer["description"] = self.description.into();
                answer["endpoints"] = self.endpoints.iter().map(|endpoint| endpoint.info()).collect();
            }
            Verb::Stats => {
                answer["type"] = "io.nats.micro.v1.stats_response".into();
                answer["started"] = self.started.to_string().into();
                answer["endpoints"] = self.endpoints.iter().map(|endpoint| endpoint.to_json()).collect();
                answer["data"] = self.monitor.data();
            }
        }
        answer
    }
}

impl EndpointStats {
    fn new(
        description: EndpointDescription,
        queue_group: &'static str,
        metrics: EndpointMetrics,
        tracer: Tracer,
    ) -> Self {
        Self {
            description,
            metrics,
            tracer,
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
        self.metrics.count(elapsed, failure.map(|failure| &*failure.code));
        self.requests.fetch_add(1, Relaxed);
        self.processing_nanos.fetch_add(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        if let Some(failure) = failure {
            self.errors.fetch_add(1, Relaxed);
            // Not the message, which may quote what the client has sent.
            *locked(&self.last_error) = format!("{}:{}", failure.status, failure.code);
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
    /// Reads a request; `None` if its reply subject is not UTF-8. Such a request is not carried out, since nobody
    /// could be told the outcome.
    fn new(delivery: Delivery, publisher: &Publisher, stats: &Arc<EndpointStats>) -> Option<Self> {
        let Delivery { subscription: _, reply, headers, payload } = delivery;
        let reply = reply.map(|reply| String::from_utf8(reply.to_vec())).transpose();
        let Ok(reply) = reply else {
            stats.count(Duration::ZERO, Some(&Failure::new(Code::Malformed, "the reply subject is not UTF-8")));
            return None;
        };
        let (publisher, stats, trace) = (publisher.clone(), Arc::clone(stats), RequestTrace::default());
        let id = RequestId::next();
        Some(Self { id, headers, payload, reply, received: Instant::now(), publisher, stats, trace })
    }

    /// Begins the request's span, as a child of the `traceparent` that the requester has sent.
    pub fn begin_trace(&mut self, traceparent: Option<String>) {
        self.trace.traceparent = traceparent;
        if !self.stats.tracer.is_on() {
            return;
        }
        let subject = self.subject();
        let attributes = messaging("process", "process", subject, self.payload.len());
        let (name, parent) = (format!("process {subject}"), self.trace.traceparent.as_deref());
        let span = self.stats.tracer.begin(name, Kind::Consumer, self.received_at(), parent, attributes);
        if let Some(span) = span {
            self.trace = RequestTrace { traceparent: Some(span.context.to_string()), span: Some(Box::new(span)) };
        }
    }

    /// The `traceparent` for whatever follows from this request.
    pub fn traceparent(&self) -> Option<&str> {
        self.trace.traceparent.as_deref()
    }

    /// The identity of the request's span; `None` if none is recorded.
    pub fn span(&self) -> Option<&TraceContext> {
        self.trace.span.as_ref().map(|span| &span.context)
    }

    /// Records a part of the request's span. It is made only if the request is being traced.
    pub fn record(&self, part: impl FnOnce() -> Ended) {
        if let Some(span) = self.span() {
            self.stats.tracer.record(Some(span), part());
        }
    }

    /// The context of log lines that belong to this request.
    pub fn log_span(&self) -> tracing::Span {
        tracing::error_span!("request", request_id = %self.id, trace_id = self.trace.trace_id())
    }

    /// When the request was received.
    pub fn received_at(&self) -> SystemTime {
        SystemTime::now() - self.received.elapsed()
    }

    /// The endpoint's subject.
    pub fn subject(&self) -> &str {
        &self.stats.description.subject
    }

    /// Sends the answer, and counts the request. One without a reply subject is only counted.
    pub async fn respond(self, response: Response) {
        let Self { id, reply, received, publisher, stats, mut trace, .. } = self;
        let response = response.and_then(|reply| match reply.body.len() + HEADER_ROOM <= publisher.max_payload() {
            true => Ok(reply),
            false => Err(Failure::new(Code::TooLarge, "the reply is larger than the server allows: ask for less")),
        });
        let response =
            response.map_err(|failure| identified(failure, id, trace.trace_id(), &stats.description.subject));
        stats.count(received.elapsed(), response.as_ref().err());
        if let Some(inbox) = reply.as_ref().and_then(inbox) {
            let traceparent = trace.traceparent.as_deref();
            match &response {
                Ok(Reply { position, body }) => {
                    publisher.publish(inbox, &success_headers(*position, traceparent), body).await;
                }
                Err(failure) => {
                    publisher.publish(inbox, &failure_headers(failure, traceparent), &failure.body()).await;
                }
            }
        }
        trace.end(&response);
    }
}

impl RequestTrace {
    fn trace_id(&self) -> Option<&str> {
        self.traceparent.as_deref().and_then(trace_id)
    }

    fn end(&mut self, response: &Response) {
        let Some(span) = &mut self.span else { return };
        match response {
            Ok(Reply { position, .. }) => {
                if let Some(position) = position.and_then(|position| i64::try_from(position).ok()) {
                    span.set(KeyValue::new("watershed.position", position));
                }
            }
            Err(failure) if failure.status >= 500 => span.set_error(&failure.code),
            Err(failure) => span.set(KeyValue::new("watershed.code", failure.code.to_string())),
        }
    }
}

/// Adds its identifier to a fault of the service, by which the requester's report leads to the lines in the log.
fn identified(failure: Failure, id: RequestId, trace_id: Option<&str>, endpoint: &str) -> Failure {
    if failure.code != Code::Internal.as_str() {
        return failure;
    }
    tracing::error!(endpoint, request_id = %id, trace_id, "a request was answered with a fault of the service");
    failure.with("request_id", id.to_string())
}

/// The reply subject, if it is an inbox. The requester chooses it, and the service may publish to subjects to which the
/// requester may not: without this check, a client could have a reply published as an event.
fn inbox(reply: &impl AsRef<[u8]>) -> Option<&str> {
    let subject = std::str::from_utf8(reply.as_ref()).ok()?;
    (subject.starts_with("_INBOX.") && subject.len() <= MAX_INBOX).then_some(subject)
}
