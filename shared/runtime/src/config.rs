//! What every service can be told about this replica of it.

use std::{path::PathBuf, time::Duration};

use uuid::Uuid;

#[derive(Clone, clap::Args)]
pub struct ReplicaConfig {
    /// Name of this replica, unique among them: letters, digits, `-` and `_` [default: made at the start]
    #[arg(long = "replica", env = "REPLICA", value_parser = replica_name)]
    name: Option<String>,
    /// A file that is there while the service is ready
    #[arg(long, env = "READY_FILE")]
    pub ready_file: Option<PathBuf>,
    /// Milliseconds that stopping may take
    #[arg(long, env = "SHUTDOWN_MS", default_value_t = 10_000)]
    shutdown_ms: u64,
}

impl ReplicaConfig {
    /// A new name each time, if none is configured.
    pub fn name(&self) -> String {
        // Not clap's default, which is the same for all replicas in one process.
        self.name.clone().unwrap_or_else(|| Uuid::now_v7().to_string())
    }

    pub fn shutdown_deadline(&self) -> Duration {
        Duration::from_millis(self.shutdown_ms)
    }
}

/// It is a token of subjects.
fn replica_name(text: &str) -> Result<String, String> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if (1..=64).contains(&text.len()) && text.chars().all(is_token) {
        return Ok(text.to_owned());
    }
    Err("expected 1 to 64 letters, digits, '-' or '_'".to_owned())
}

/// For settings that make no sense at 0.
///
/// # Errors
/// If the text is not a whole number, or is 0.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("expected a whole number".to_owned()),
    }
}
