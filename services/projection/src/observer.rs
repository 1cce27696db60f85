//! The observer looks at the servers every second, for what the projectors cannot tell: how far the stream is, also
//! while a view hangs, how old the oldest event is that a view does not show, and whether MongoDB answers.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{self, Context};
use bson::doc;
use domain::Timestamp;
use futures_util::future::join_all;
use mongodb::Database;
use runtime::{Nats, ServerStatus, age};
use tokio::time::{MissedTickBehavior, interval, timeout};
use wire::recorded_at;

use crate::metrics::{Metrics, ViewMetrics};

const INTERVAL: Duration = Duration::from_secs(1);
/// How long MongoDB may take to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Reads when events were recorded.
#[derive(Clone)]
pub struct EventAges {
    nats: Nats,
    jetstream: Context,
    stream: String,
}

impl EventAges {
    pub fn new(nats: &Nats, stream: &str) -> Self {
        Self { nats: nats.clone(), jetstream: jetstream::new(nats.client.clone()), stream: stream.to_owned() }
    }

    /// When the event at a position was recorded; `None` if NATS does not tell.
    pub async fn recorded(&self, position: u64) -> Option<Timestamp> {
        // Requests would wait for the connection, and be sent when nobody needs the answers any more.
        if !self.nats.is_up() {
            return None;
        }
        let stream = self.jetstream.get_stream_no_info(&self.stream).await.ok()?;
        let message = stream.get_raw_message(position).await.ok()?;
        recorded_at(&message.headers)
    }
}

/// Observes for ever.
pub async fn run(nats: Nats, stream: String, database: Database, mongodb: ServerStatus, metrics: Arc<Metrics>) {
    let ages = EventAges::new(&nats, &stream);
    let looking_at_stream = async {
        // The last event of each view whose time was read, since a view that stands still is looked at again and again.
        let mut oldest = vec![None; metrics.views.len()];
        let mut ticks = every_second();
        loop {
            ticks.tick().await;
            match nats.stream_state(&stream).await {
                Ok(state) => metrics.stream_observed(state.map_or(0, |state| state.last_sequence)),
                Err(_) => {
                    metrics.views.iter().for_each(|view| view.observed(None));
                    continue;
                }
            }
            join_all(
                metrics.views.iter().zip(&mut oldest).map(|(view, oldest)| observe(view, &metrics, &ages, oldest)),
            )
            .await;
        }
    };
    let looking_at_mongodb = async {
        let mut ticks = every_second();
        loop {
            ticks.tick().await;
            let answered = timeout(PING_TIMEOUT, database.run_command(doc! { "ping": 1 })).await;
            mongodb.set_up(answered.is_ok_and(|answer| answer.is_ok()));
        }
    };
    tokio::join!(looking_at_stream, looking_at_mongodb);
}

async fn observe(view: &ViewMetrics, metrics: &Metrics, ages: &EventAges, oldest: &mut Option<(u64, Timestamp)>) {
    let Some(position) = view.leading().and_then(|leading| leading.position) else { return };
    if metrics.lag_events(position) == 0 {
        return view.observed(Some(0.0));
    }
    let next = position + 1;
    if oldest.is_none_or(|(position, _)| position != next) {
        *oldest = ages.recorded(next).await.map(|recorded| (next, recorded));
    }
    // Meanwhile the view may have come to the end of the stream.
    let now_at = view.leading().and_then(|leading| leading.position).unwrap_or(position);
    let lag = if metrics.lag_events(now_at) == 0 {
        Some(0.0)
    } else {
        oldest.map(|(_, recorded)| age(recorded).as_secs_f64())
    };
    view.observed(lag);
}

fn every_second() -> tokio::time::Interval {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
