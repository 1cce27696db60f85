//! Traces, sent by OTLP to a collector if one is configured. Most spans are recorded when they have ended, so that code
//! which is not being traced does nothing at all. Names and attributes follow OpenTelemetry's semantic conventions for
//! messaging and for databases, version 1.37. No attribute holds what a client sent, but for its trace's identifiers.

use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context,
    trace::{
        Span as _, SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer as _,
        TracerProvider,
    },
};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter},
};
use tokio::{runtime::Handle, time::timeout};

use crate::LogThrottle;

pub use opentelemetry::{KeyValue, trace::SpanKind as Kind};

/// The path that the specification appends to the endpoint.
const PATH: &str = "v1/traces";
/// How long to wait for the collector when the service stops.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Spans of an event are recorded only if the event is not older: who reads history again must not repeat its traces.
const RECENT: Duration = Duration::from_secs(60);

/// Records spans, or nothing if no collector is configured. Clones share it.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Inner>>);

struct Inner {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Shutting down waits for the collector, which a task must not do.
        let provider = self.provider.clone();
        std::thread::spawn(move || provider.shutdown());
    }
}

/// The identity of a span, by which others can become its children or link to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext(SpanContext);

impl TraceContext {
    /// Reads a valid `traceparent`, see W3C Trace Context, section 3.2.
    fn parse(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-').skip(1);
        let trace = TraceId::from_hex(parts.next()?).ok()?;
        let span = SpanId::from_hex(parts.next()?).ok()?;
        let flags = TraceFlags::new(u8::from_str_radix(parts.next()?, 16).ok()?);
        Some(Self(SpanContext::new(trace, span, flags, true, TraceState::NONE)))
    }
}

/// As a `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(context) = self;
        write!(f, "00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8())
    }
}

/// The trace's identifier in a valid `traceparent`.
pub fn trace_id(traceparent: &str) -> Option<&str> {
    traceparent.split('-').nth(1)
}

/// A span that has begun, and is recorded when this is ended or dropped.
pub struct Span {
    span: opentelemetry_sdk::trace::Span,
    pub context: TraceContext,
}

/// A span that has ended.
pub struct Ended {
    pub name: Cow<'static, str>,
    pub kind: Kind,
    pub start: SystemTime,
    pub end: SystemTime,
    pub attributes: Vec<KeyValue>,
    pub links: Vec<TraceContext>,
}

impl Ended {
    pub fn new(name: impl Into<Cow<'static, str>>, kind: Kind, start: SystemTime, end: SystemTime) -> Self {
        Self { name: name.into(), kind, start, end, attributes: vec![], links: vec![] }
    }

    #[must_use]
    pub fn with(mut self, attributes: impl IntoIterator<Item = KeyValue>) -> Self {
        self.attributes.extend(attributes);
        self
    }

    #[must_use]
    pub fn linked(mut self, links: impl IntoIterator<Item = TraceContext>) -> Self {
        self.links.extend(links);
        self
    }
}

/// The attributes of a span that handles a message, by the conventions for messaging.
pub fn messaging(operation: &'static str, kind: &'static str, destination: &str, bytes: usize) -> [KeyValue; 5] {
    [
        KeyValue::new("messaging.system", "nats"),
        KeyValue::new("messaging.operation.name", operation),
        KeyValue::new("messaging.operation.type", kind),
        KeyValue::new("messaging.destination.name", destination.to_owned()),
        KeyValue::new("messaging.message.body.size", i64::try_from(bytes).unwrap_or(i64::MAX)),
    ]
}

/// The attributes of a span that waits for a database, by the conventions for databases.
pub fn database(system: &'static str, operation: &'static str, collection: &str, batch: usize) -> [KeyValue; 4] {
    [
        KeyValue::new("db.system.name", system),
        KeyValue::new("db.operation.name", operation),
        KeyValue::new("db.collection.name", collection.to_owned()),
        KeyValue::new("db.operation.batch.size", i64::try_from(batch).unwrap_or(i64::MAX)),
    ]
}

impl Tracer {
    /// A tracer that sends to the collector at `endpoint`; one that does nothing if there is none, or if the endpoint
    /// cannot be used, which is logged.
    pub fn new(endpoint: Option<&str>, service: &'static str, replica: &str) -> Self {
        let Some(endpoint) = endpoint else { return Self::default() };
        match Inner::new(endpoint, service, replica) {
            Ok(inner) => Self(Some(Arc::new(inner))),
            Err(reason) => {
                // The reason could quote the endpoint, and with it a password.
                tracing::error!(reason, "no traces are sent: OTEL_EXPORTER_OTLP_ENDPOINT cannot be used");
                Self::default()
            }
        }
    }

    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Begins a span now, or at an earlier time. `None` if the trace is not sampled.
    pub fn begin(
        &self,
        name: String,
        kind: Kind,
        start: SystemTime,
        parent: Option<&str>,
        attributes: impl IntoIterator<Item = KeyValue>,
    ) -> Option<Span> {
        let Self(Some(inner)) = self else { return None };
        let parent = parent.and_then(TraceContext::parse);
        let builder = inner.tracer.span_builder(name).with_kind(kind).with_start_time(start);
        let builder = builder.with_attributes(attributes);
        let span = builder.start_with_context(&inner.tracer, &context(parent.as_ref()));
        let context = TraceContext(span.span_context().clone());
        span.is_recording().then_some(Span { span, context })
    }

    /// Records a span that has ended; returns its identity if the trace is sampled.
    pub fn record(&self, parent: Option<&TraceContext>, ended: Ended) -> Option<TraceContext> {
        let Self(Some(inner)) = self else { return None };
        let Ended { name, kind, start, end, attributes, links } = ended;
        let builder = inner.tracer.span_builder(name).with_kind(kind).with_start_time(start);
        let links = links.into_iter().map(|TraceContext(link)| opentelemetry::trace::Link::with_context(link));
        let builder = builder.with_attributes(attributes).with_links(links.collect());
        let mut span = builder.start_with_context(&inner.tracer, &context(parent));
        span.end_with_timestamp(end);
        let recorded = span.span_context();
        recorded.is_sampled().then(|| TraceContext(recorded.clone()))
    }

    /// The trace that an event belongs to, if its spans are to be recorded: it is sampled, and the event is recent.
    pub fn of_event(&self, traceparent: Option<&str>, age: Duration) -> Option<TraceContext> {
        let traceparent = traceparent.filter(|_| self.is_on() && age < RECENT)?;
        TraceContext::parse(traceparent).filter(|TraceContext(context)| context.is_sampled())
    }

    /// Sends what was recorded, for a limited time.
    pub async fn flush(&self) {
        let Self(Some(inner)) = self else { return };
        let provider = inner.provider.clone();
        let _ = timeout(FLUSH_TIMEOUT, tokio::task::spawn_blocking(move || provider.force_flush())).await;
    }
}

fn context(parent: Option<&TraceContext>) -> Context {
    match parent {
        Some(TraceContext(parent)) => Context::new().with_remote_span_context(parent.clone()),
        None => Context::new(),
    }
}

impl Span {
    pub fn set(&mut self, attribute: KeyValue) {
        self.span.set_attribute(attribute);
    }

    /// Says that the service failed, with a code and not with a text, which could contain anything.
    pub fn set_error(&mut self, code: &str) {
        self.span.set_attribute(KeyValue::new("error.type", code.to_owned()));
        self.span.set_status(Status::error(code.to_owned()));
    }
}

impl Inner {
    fn new(endpoint: &str, service: &'static str, replica: &str) -> Result<Self, &'static str> {
        let is_http = endpoint.starts_with("http://");
        let url = format!("{}/{PATH}", endpoint.trim_end_matches('/'));
        if !is_http || url.parse::<axum::http::Uri>().is_err() {
            return Err("expected http://host:port of a collector, which takes OTLP over HTTP");
        }
        let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().with_endpoint(url).build();
        let exporter = exporter.map_err(|_| "one of the variables OTEL_EXPORTER_OTLP_… cannot be read")?;
        let resource = Resource::builder()
            .with_service_name(format!("watershed-{service}"))
            .with_attribute(KeyValue::new("service.namespace", "watershed"))
            .with_attribute(KeyValue::new("service.instance.id", replica.to_owned()))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let exporter =
            Exporter { inner: Arc::new(exporter), runtime: Handle::current(), log_throttle: Mutex::default() };
        // The sampler is the one of OTEL_TRACES_SAMPLER; by default the parent decides, and all others are sampled.
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { tracer: provider.tracer("watershed"), provider })
    }
}

/// Exports on the service's own runtime, which the HTTP client needs, and logs a failure once.
struct Exporter {
    inner: Arc<opentelemetry_otlp::SpanExporter>,
    runtime: Handle,
    log_throttle: Mutex<LogThrottle>,
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exporter")
    }
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let inner = Arc::clone(&self.inner);
        let exporting = self.runtime.spawn(async move { inner.export(batch).await });
        // The runtime ends before the last export if the process does.
        let exported = exporting.await.unwrap_or(Ok(()));
        let mut log_throttle = self.log_throttle.lock().unwrap_or_else(PoisonError::into_inner);
        match &exported {
            Ok(()) if log_throttle.is_failing() => {
                log_throttle.reset();
                tracing::info!("the collector takes traces again");
            }
            Ok(()) => {}
            Err(_) if log_throttle.is_failing() => {}
            Err(error) => {
                log_throttle.is_due("");
                tracing::warn!(%error, "traces cannot be sent to the collector (OTEL_EXPORTER_OTLP_ENDPOINT) and are lost");
            }
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.set_resource(resource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_written_as_it_was_read() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = TraceContext::parse(text).unwrap();
        assert_eq!(context.to_string(), text);
        assert_eq!(trace_id(text), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
    }

    #[tokio::test]
    async fn without_a_collector_nothing_is_recorded() {
        for endpoint in [None, Some("nonsense"), Some("https://collector:4318"), Some("http://"), Some("http://a b")] {
            let tracer = Tracer::new(endpoint, "query", "q1");
            assert!(!tracer.is_on(), "{endpoint:?}");
            assert!(tracer.begin("x".into(), Kind::Internal, SystemTime::now(), None, []).is_none());
            tracer.flush().await;
        }
    }

    #[tokio::test]
    async fn the_parent_decides_and_the_age_of_an_event() {
        let tracer = Tracer::new(Some("http://127.0.0.1:1"), "query", "q1");
        let parent = |flags: &str| format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}");
        let begin = |parent: &str| tracer.begin("x".into(), Kind::Internal, SystemTime::now(), Some(parent), []);
        assert!(begin(&parent("00")).is_none());
        let span = begin(&parent("01")).unwrap();
        assert_eq!(trace_id(&span.context.to_string()), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        assert!(tracer.begin("x".into(), Kind::Internal, SystemTime::now(), None, []).is_some());
        assert!(tracer.of_event(Some(&parent("01")), Duration::ZERO).is_some());
        assert!(tracer.of_event(Some(&parent("01")), RECENT).is_none());
        assert!(tracer.of_event(Some(&parent("00")), Duration::ZERO).is_none());
        assert!(tracer.of_event(None, Duration::ZERO).is_none());
    }
}
