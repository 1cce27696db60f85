//! Logging: one line per event on standard output, as text or, with `LOG_FORMAT=json`, as JSON. `RUST_LOG` filters it.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Sets up logging for the process.
pub fn trace() {
    // An empty variable counts as unset, as for every setting.
    let mut levels = std::env::var("RUST_LOG").ok().filter(|it| !it.is_empty()).unwrap_or_else(|| "info".to_owned());
    // `nats` logs the events of the client library, and throttles them.
    if !levels.contains("async_nats") {
        levels.push_str(",async_nats=off");
    }
    let filter = EnvFilter::try_new(&levels).unwrap_or_else(|_| EnvFilter::new("info,async_nats=off"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    if std::env::var("LOG_FORMAT").is_ok_and(|format| format == "json") {
        builder.json().init();
    } else {
        builder.with_ansi(std::io::stdout().is_terminal()).init();
    }
}
