//! The observer looks at journal and stream every second, so that every replica can tell how far they are and whether
//! the servers answer, also one that writes nothing and does not run the relay.

use std::{sync::Arc, time::Duration};

use runtime::Nats;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    journal::unsigned,
    metrics::{Metrics, RelayState},
    postgres::{Postgres, describe, with_timeout},
};

const INTERVAL: Duration = Duration::from_secs(1);

/// Observes until `stop`.
pub async fn run(postgres: Postgres, nats: Nats, stream: String, metrics: Arc<Metrics>, stop: CancellationToken) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let observing = async {
        loop {
            ticks.tick().await;
            tokio::join!(observe_journal(&postgres, &metrics), observe_stream(&nats, &stream, &metrics));
        }
    };
    stop.run_until_cancelled(observing).await;
}

async fn observe_journal(postgres: &Postgres, metrics: &Metrics) {
    // A server that is down is being pinged already.
    if !postgres.is_up() {
        return;
    }
    match head(postgres).await {
        Ok(position) => metrics.journal.advance(position),
        Err(error) => {
            tracing::debug!(error = describe(&error), "cannot look at the journal");
            // So that a server which is lost while nobody sends commands is missed, too.
            if !postgres.responds().await {
                postgres.mark_down();
            }
        }
    }
}

async fn head(postgres: &Postgres) -> anyhow::Result<u64> {
    let client = postgres.get().await?;
    let row = with_timeout(client.query_one("select position from journal_head", &[])).await?;
    Ok(unsigned(row.try_get(0)?))
}

async fn observe_stream(nats: &Nats, stream: &str, metrics: &Metrics) {
    // The relay knows better.
    if metrics.relay() == RelayState::Running {
        return;
    }
    if let Ok(Some(state)) = nats.stream_state(stream).await {
        metrics.stream.set(state.last_sequence);
    }
}
