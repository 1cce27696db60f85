//! The settings of the command service, each a flag and an environment variable.

use std::time::Duration;

use anyhow::Context;
use runtime::{NatsConfig, Password, ReplicaConfig, at_least_one, with_password};

/// Takes commands, writes the journal, relays it to the stream.
#[derive(Clone, clap::Parser)]
#[command(version, about)]
pub struct Config {
    #[command(subcommand)]
    pub task: Option<Task>,
    #[command(flatten)]
    pub nats: NatsConfig,
    #[command(flatten)]
    pub replica: ReplicaConfig,
    /// PostgreSQL database of the journal: postgres://user:password@host:port/database
    #[arg(long, env = "POSTGRES_URL", hide_env_values = true)]
    postgres_url: String,
    /// A file with the password, instead of the one in the URL
    #[arg(long = "postgres-password-file", env = "POSTGRES_PASSWORD_FILE", value_parser = Password::from_file)]
    postgres_password: Option<Password>,
    /// Batches that are written at the same time
    #[arg(long, env = "LANES", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub lanes: u16,
    /// The largest number of commands in one batch
    #[arg(long, env = "BATCH_COMMANDS", default_value_t = 256, value_parser = at_least_one)]
    pub batch_commands: usize,
    /// Commands that may wait for a batch; more are refused as overloaded
    #[arg(long, env = "QUEUE_COMMANDS", default_value_t = 8192, value_parser = at_least_one)]
    pub queue_commands: usize,
    /// Bytes of requests that may wait for a batch; more are refused as overloaded
    #[arg(long, env = "QUEUE_BYTES", default_value_t = 64 << 20)]
    pub queue_bytes: u32,
    /// Bytes that one request may have at most
    #[arg(long, env = "MAX_REQUEST_BYTES", default_value_t = 1 << 20)]
    pub max_request_bytes: usize,
    /// Seconds for which a command that is sent again with its key gets its first reply
    #[arg(long, env = "LEDGER_SECONDS", default_value_t = 7 * 24 * 3600)]
    pub ledger_seconds: u32,
    /// Replicas of the stream, if this service creates it: 1, or 3 in a cluster
    #[arg(long, env = "STREAM_REPLICAS", default_value_t = 1)]
    pub stream_replicas: usize,
    /// Milliseconds after which the relay checks the journal and the stream when nothing wakes it
    #[arg(long, env = "RELAY_POLL_MS", default_value_t = 1000)]
    pub relay_poll_ms: u64,
}

#[derive(Clone, Copy, clap::Subcommand)]
pub enum Task {
    /// Bring the database's schema up to date, and exit
    Migrate,
}

impl Config {
    /// # Errors
    /// If the password is in a file, but the URL names no user.
    pub fn postgres_url(&self) -> anyhow::Result<String> {
        with_password(&self.postgres_url, self.postgres_password.as_ref()).context("POSTGRES_URL")
    }

    pub fn relay_poll(&self) -> Duration {
        Duration::from_millis(self.relay_poll_ms)
    }
}
