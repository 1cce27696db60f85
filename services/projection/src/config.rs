//! What can be set, as a flag or an environment variable.

use std::{path::PathBuf, time::Duration};

use runtime::NatsConfig;
use uuid::Uuid;

/// Builds the views from the stream.
#[derive(Clone, clap::Parser)]
#[command(version, about)]
pub struct Config {
    #[command(flatten)]
    pub nats: NatsConfig,
    /// MongoDB, a replica set or a sharded cluster: mongodb://user:password@host:port/
    #[arg(long, env = "MONGODB_URL", hide_env_values = true)]
    pub mongodb_url: String,
    /// MongoDB database of the views
    #[arg(long, env = "MONGODB_DATABASE", default_value = "watershed")]
    pub database: String,
    /// Events in one batch at most
    #[arg(long, env = "BATCH_EVENTS", default_value_t = 1000, value_parser = at_least_one)]
    pub batch_events: usize,
    /// Bytes of events and loaded documents after which a batch takes no more events
    #[arg(long, env = "BATCH_BYTES", default_value_t = 4 << 20, value_parser = at_least_one)]
    pub batch_bytes: usize,
    /// Milliseconds after which a replica that is not heard of loses its views to the others
    #[arg(long, env = "LEASE_MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(100..=600_000))]
    pub lease_ms: u64,
    /// Milliseconds that stopping may take
    #[arg(long, env = "SHUTDOWN_MS", default_value_t = 10_000)]
    pub shutdown_ms: u64,
    /// A file that is there while the service is ready
    #[arg(long, env = "READY_FILE")]
    pub ready_file: Option<PathBuf>,
    /// Name of this replica, unique among them [default: made at the start]
    #[arg(long, env = "REPLICA")]
    pub replica: Option<String>,
}

impl Config {
    /// A new name each time, if none is configured.
    pub fn replica(&self) -> String {
        // Not clap's default, which is the same for all replicas in one process.
        self.replica.clone().unwrap_or_else(|| Uuid::now_v7().to_string())
    }

    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    pub fn shutdown_deadline(&self) -> Duration {
        Duration::from_millis(self.shutdown_ms)
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("expected a whole number".to_owned()),
    }
}
