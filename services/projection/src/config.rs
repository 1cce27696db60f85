//! The settings of the service, each a flag or an environment variable.

use std::time::Duration;

use anyhow::Context;
use runtime::{NatsConfig, Password, ReplicaConfig, at_least_one, with_password};

/// Builds the views from the stream.
#[derive(Clone, clap::Parser)]
#[command(version, about)]
pub struct Config {
    #[command(flatten)]
    pub nats: NatsConfig,
    #[command(flatten)]
    pub replica: ReplicaConfig,
    /// MongoDB, a replica set or a sharded cluster: mongodb://user:password@host:port/
    #[arg(long, env = "MONGODB_URL", hide_env_values = true)]
    mongodb_url: String,
    /// A file with the password, instead of the one in the URL
    #[arg(long = "mongodb-password-file", env = "MONGODB_PASSWORD_FILE", value_parser = Password::from_file)]
    mongodb_password: Option<Password>,
    /// MongoDB database of the views
    #[arg(long, env = "MONGODB_DATABASE", default_value = "watershed")]
    pub database: String,
    /// Events in one batch at most
    #[arg(long, env = "BATCH_EVENTS", default_value_t = 100_000, value_parser = at_least_one)]
    pub batch_events: usize,
    /// Bytes of documents after which a batch takes no more events
    #[arg(long, env = "BATCH_BYTES", default_value_t = 2 << 20, value_parser = at_least_one)]
    pub batch_bytes: usize,
    /// Milliseconds after which a replica that has stopped renewing its leases loses its views to the others
    #[arg(long, env = "LEASE_MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(100..=600_000))]
    pub lease_ms: u64,
    /// Percent of the time that building a generation may use while events keep coming
    #[arg(long, env = "BUILD_SHARE", default_value_t = 25, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub build_share: u8,
    /// Seconds for which a generation that serves no longer is kept, so that the operator can return to it
    #[arg(long, env = "GENERATION_GRACE_SECONDS", default_value_t = 24 * 3600)]
    pub generation_grace_seconds: u64,
}

impl Config {
    /// # Errors
    /// If the password is in a file, but the URL does not name a user.
    pub fn mongodb_url(&self) -> anyhow::Result<String> {
        with_password(&self.mongodb_url, self.mongodb_password.as_ref()).context("MONGODB_URL")
    }

    /// The part of the time that building a generation may use while events keep coming.
    pub fn build_share(&self) -> f64 {
        f64::from(self.build_share) / 100.0
    }

    /// How long a generation that serves no longer is kept.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.generation_grace_seconds)
    }

    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    const URLS: [&str; 5] =
        ["projection-service", "--nats-url", "nats://localhost", "--mongodb-url", "mongodb://localhost"];

    #[test]
    fn two_urls_are_enough() {
        let config = Config::try_parse_from(URLS).unwrap();
        assert_eq!(config.lease(), Duration::from_secs(5));
    }

    #[test]
    fn senseless_settings_are_refused() {
        for flag in ["--batch-events=0", "--batch-bytes=0", "--batch-events=x", "--lease-ms=1"] {
            assert!(Config::try_parse_from(URLS.into_iter().chain([flag])).is_err(), "{flag}");
        }
    }
}
