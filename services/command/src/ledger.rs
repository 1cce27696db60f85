//! Keeps the command ledger from growing for ever: entries that are older than the retention are deleted in small
//! chunks.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::postgres::{Postgres, describe, with_timeout};

const INTERVAL: Duration = Duration::from_secs(600);
/// Rows per transaction, few enough that no batch waits long for it.
const CHUNK: i64 = 5_000;

/// Sweeps now and every ten minutes until `stop`.
pub async fn run(postgres: Postgres, retention: Duration, stop: CancellationToken) {
    loop {
        match sweep(&postgres, retention).await {
            Ok(0) => {}
            Ok(dropped) => tracing::info!(dropped, "deleted expired entries of the command ledger"),
            Err(error) => {
                tracing::warn!(error = describe(&error), "cannot delete expired entries of the command ledger")
            }
        }
        if stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_none() {
            return;
        }
    }
}

/// Deletes all entries that are older than the retention; returns how many there were.
///
/// # Errors
/// If the server is down, or refuses a statement.
pub async fn sweep(postgres: &Postgres, retention: Duration) -> anyhow::Result<u64> {
    let client = postgres.get().await?;
    let statement = with_timeout(client.prepare_cached(SWEEP)).await?;
    let mut dropped = 0;
    loop {
        let chunk = with_timeout(client.execute(&statement, &[&retention.as_secs_f64(), &CHUNK])).await?;
        dropped += chunk;
        if chunk == 0 {
            return Ok(dropped);
        }
    }
}

const SWEEP: &str = "
    delete from commands
    where key in (
        select key
        from commands
        where at < now() - make_interval(secs => $1)
        order by at
        limit $2
        for update skip locked
    )";
