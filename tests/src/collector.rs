//! A collector of traces, which takes OTLP over HTTP and keeps the spans.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Bytes, extract::State, routing::post};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value},
    trace::v1::Span,
};
use prost::Message;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// A span with the service and the replica that recorded it.
#[derive(Clone, Debug)]
pub struct Collected {
    pub service: String,
    pub replica: String,
    pub span: Span,
}

/// Collects until it is dropped.
pub struct Collector {
    pub url: String,
    spans: Arc<Mutex<Vec<Collected>>>,
    _task: AbortOnDropHandle<()>,
}

impl Collector {
    /// # Panics
    /// If no port is free.
    pub async fn start() -> Self {
        let spans = Arc::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address: SocketAddr = listener.local_addr().expect("it is bound");
        let router = Router::new().route("/v1/traces", post(take)).with_state(Arc::clone(&spans));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
        Self { url: format!("http://{address}"), spans, _task: AbortOnDropHandle::new(task) }
    }

    /// The spans that have come.
    pub fn spans(&self) -> Vec<Collected> {
        self.spans.lock().expect("no panic").clone()
    }
}

async fn take(State(spans): State<Arc<Mutex<Vec<Collected>>>>, body: Bytes) {
    let request = ExportTraceServiceRequest::decode(body).expect("the message of OTLP");
    let mut spans = spans.lock().expect("no panic");
    for resource_spans in request.resource_spans {
        let resource = resource_spans.resource.map(|resource| resource.attributes).unwrap_or_default();
        let (service, replica) = (text(&resource, "service.name"), text(&resource, "service.instance.id"));
        let found = resource_spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
        spans.extend(found.map(|span| Collected { service: service.clone(), replica: replica.clone(), span }));
    }
}

impl Collected {
    /// The identifier of its trace, in hexadecimal digits.
    pub fn trace(&self) -> String {
        hex(&self.span.trace_id)
    }

    /// Its `traceparent`.
    pub fn id(&self) -> String {
        hex(&self.span.span_id)
    }

    /// The identifier of its parent; empty if it has none.
    pub fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    /// The text of an attribute; empty if there is none.
    pub fn attribute(&self, name: &str) -> String {
        text(&self.span.attributes, name)
    }
}

fn text(attributes: &[KeyValue], name: &str) -> String {
    let value = attributes.iter().find(|attribute| attribute.key == name).and_then(|it| it.value.clone()?.value);
    match value {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        _ => String::new(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
