//! The settings of the query service, each a flag and an environment variable.

use std::time::Duration;

use anyhow::Context;
use runtime::{NatsConfig, Password, ReplicaConfig, with_password};

/// Answers queries from the views; any number of replicas.
#[derive(Clone, clap::Parser)]
#[command(version, about)]
pub struct Config {
    #[command(flatten)]
    pub nats: NatsConfig,
    #[command(flatten)]
    pub replica: ReplicaConfig,
    /// MongoDB server, with the read-only user of this service: mongodb://user:password@host:port
    #[arg(long, env = "MONGODB_URL", hide_env_values = true)]
    mongodb_url: String,
    /// A file with the password, instead of the one in the URL
    #[arg(long = "mongodb-password-file", env = "MONGODB_PASSWORD_FILE", value_parser = Password::from_file)]
    mongodb_password: Option<Password>,
    /// MongoDB database that holds the views
    #[arg(long, env = "MONGODB_DATABASE", default_value = "watershed")]
    pub database: String,
    /// Milliseconds that a query waits at most for its view to reach `Min-Position`
    #[arg(long, env = "MIN_POSITION_WAIT_MS", default_value_t = 2_000)]
    pub min_position_wait_ms: u64,
    /// Requests that are being answered at the same time; more are refused as overloaded
    #[arg(long, env = "MAX_IN_FLIGHT", default_value_t = 4_096, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_in_flight: u32,
    /// Bytes that one reply may have at most; must be less than the NATS server allows
    #[arg(long, env = "MAX_REPLY_BYTES", default_value_t = 1_000_000)]
    pub max_reply_bytes: usize,
}

impl Config {
    /// # Errors
    /// If the password is in a file, but the URL names no user.
    pub fn mongodb_url(&self) -> anyhow::Result<String> {
        with_password(&self.mongodb_url, self.mongodb_password.as_ref()).context("MONGODB_URL")
    }

    pub fn min_position_wait(&self) -> Duration {
        Duration::from_millis(self.min_position_wait_ms)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn two_urls_are_enough() {
        let arguments = ["query-service", "--nats-url", "nats://localhost", "--mongodb-url", "mongodb://localhost"];
        let config = Config::try_parse_from(arguments).unwrap();
        assert_eq!(config.min_position_wait(), Duration::from_secs(2));
        assert_ne!(config.replica.name(), Config::try_parse_from(arguments).unwrap().replica.name());
    }
}
