//! Logging: one line per event on standard output, as text for people on a terminal, and as JSON elsewhere, or as
//! `LOG_FORMAT` says. `RUST_LOG` filters it.

use std::{
    fmt,
    io::{self, IsTerminal},
};

use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormattedFields,
        format::{FormatFields, JsonFields, Writer},
    },
    registry::LookupSpan,
};

use crate::{ReplicaConfig, now};

/// Sets up logging for the process, which is one replica of a service.
pub fn trace(service: &'static str, replica: &ReplicaConfig) {
    // An empty variable counts as unset, as for every setting.
    let setting = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let mut levels = setting("RUST_LOG").unwrap_or_else(|| "info".to_owned());
    // `nats` logs the events of the client library, and throttles them.
    if !levels.contains("async_nats") {
        levels.push_str(",async_nats=off");
    }
    let filter = EnvFilter::try_new(&levels).unwrap_or_else(|_| EnvFilter::new("info,async_nats=off"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    let is_json = match setting("LOG_FORMAT").as_deref() {
        Some("json") => true,
        Some(_) => false,
        None => !io::stdout().is_terminal(),
    };
    if is_json {
        let format = Json { service, replica: replica.name() };
        builder.fmt_fields(JsonFields::new()).event_format(format).init();
    } else {
        builder.with_ansi(io::stdout().is_terminal()).init();
    }
}

/// One JSON object per line: time, level, service and replica, the message, and the fields of the event and of the
/// spans that it is in.
struct Json {
    service: &'static str,
    replica: String,
}

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields(Map::new());
        fields.insert("timestamp", now().to_string());
        fields.insert("level", event.metadata().level().as_str());
        fields.insert("service", self.service);
        fields.insert("replica", self.replica.as_str());
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            let written = extensions.get::<FormattedFields<N>>().map(|fields| &*fields.fields);
            let read = written.and_then(|written| serde_json::from_str::<Map<String, Value>>(written).ok());
            fields.0.extend(read.unwrap_or_default());
        }
        event.record(&mut fields);
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}

struct Fields(Map<String, Value>);

impl Fields {
    fn insert(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field.name(), value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Written {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn a_line_is_one_object_with_service_and_replica() {
        let written = Written::default();
        let format = Json { service: "query", replica: "q\"1".to_owned() };
        let subscriber = tracing_subscriber::fmt().with_writer(written.clone()).fmt_fields(JsonFields::new());
        let subscriber = subscriber.event_format(format).finish();
        tracing::subscriber::with_default(subscriber, || {
            let (view, trace_id) = ("orders", None::<&str>);
            let _span = tracing::error_span!("request", request_id = "r1").entered();
            tracing::warn!(view, trace_id, position = 7_u64, reason = %"two\nlines", "it \"failed\"");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        let mut line: Value = serde_json::from_str(&text).unwrap();
        assert!(line["timestamp"].take().as_str().unwrap().ends_with('Z'));
        let expected = serde_json::json!({
            "timestamp": null, "level": "WARN", "service": "query", "replica": "q\"1", "message": "it \"failed\"",
            "request_id": "r1", "view": "orders", "position": 7, "reason": "two\nlines",
        });
        assert_eq!(line, expected);
    }
}
