//! What the command service counts and shows: batches, retries, the relay, and the positions of journal and stream.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use runtime::{Counter, Family, Histogram, KnownPosition, Label, Monitor, Problem, number};
use serde_json::json;

/// Upper bounds of the buckets of batch sizes, in commands.
const BATCH_SIZES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

pub struct Metrics {
    batch_commands: Histogram,
    batch_duration: Histogram,
    pub transaction_duration: Histogram,
    retries: Family<Label, Counter>,
    published: Counter,
    pub states_folded: Counter,
    batches: AtomicU64,
    commands: AtomicU64,
    last_batch: AtomicU64,
    largest_batch: AtomicU64,
    /// The aggregates in the caches of all lanes.
    known_aggregates: AtomicI64,
    /// The last position of the journal.
    pub journal: KnownPosition,
    /// The last sequence of the stream.
    pub stream: KnownPosition,
    /// The last position that the stream has acknowledged to this replica's relay.
    acknowledged: KnownPosition,
    relay: Mutex<RelayState>,
}

/// What the relay of this replica does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayState {
    /// Another replica runs the relay, or nobody does yet.
    Standby,
    Running,
    /// It was interrupted, for this reason, and tries again.
    Failing(String),
}

/// Why a batch is tried again.
#[derive(Clone, Copy)]
pub enum Retry {
    Race,
    Connection,
    InDoubt,
    Locked,
    Slow,
    Stale,
    Newer,
    Fault,
}

impl Retry {
    pub fn label(self) -> &'static str {
        match self {
            Self::Race => "race",
            Self::Connection => "connection",
            Self::InDoubt => "in_doubt",
            Self::Locked => "locked",
            Self::Slow => "slow",
            Self::Stale => "stale",
            Self::Newer => "newer",
            Self::Fault => "fault",
        }
    }

    const ALL: [Self; 8] =
        [Self::Race, Self::Connection, Self::InDoubt, Self::Locked, Self::Slow, Self::Stale, Self::Newer, Self::Fault];
}

impl Metrics {
    pub fn new(monitor: &Monitor) -> Arc<Self> {
        let batch_commands = Histogram::new(BATCH_SIZES);
        monitor.register(
            "watershed_batch_commands",
            "Commands in a batch; those of a batch that is split count again in its parts",
            batch_commands.clone(),
        );
        let (retries, published, states_folded) = (Family::default(), Counter::default(), Counter::default());
        let help = "Batches that failed and were tried again, split or given up, by reason";
        monitor.register("watershed_batch_retries", help, Family::clone(&retries));
        let help = "Events that the stream has acknowledged to the relay of this replica";
        monitor.register("watershed_events_published", help, published.clone());
        let help = "States that were folded anew from their events, because they were stored in another form";
        monitor.register("watershed_states_folded", help, states_folded.clone());
        for retry in Retry::ALL {
            retries.get_or_create_owned(&[("reason", retry.label())]);
        }
        let metrics = Arc::new(Self {
            batch_commands,
            batch_duration: monitor
                .duration("watershed_batch_duration_seconds", "Time to run a batch, retries included"),
            transaction_duration: monitor.duration(
                "watershed_transaction_duration_seconds",
                "Time of a PostgreSQL transaction, up to its commit",
            ),
            retries,
            published,
            states_folded,
            batches: AtomicU64::default(),
            commands: AtomicU64::default(),
            last_batch: AtomicU64::default(),
            largest_batch: AtomicU64::default(),
            known_aggregates: AtomicI64::default(),
            journal: KnownPosition::default(),
            stream: KnownPosition::default(),
            acknowledged: KnownPosition::default(),
            relay: Mutex::new(RelayState::Standby),
        });
        metrics.show(monitor);
        metrics
    }

    fn show(self: &Arc<Self>, monitor: &Monitor) {
        let metrics = Arc::clone(self);
        monitor.add_figures(move |figures| {
            let known = metrics.known_aggregates.load(Relaxed) as f64;
            figures.gauge("watershed_known_aggregates", "Aggregates in the lanes' caches", &[], known);
            let positions = [
                ("watershed_journal_position", "The last position of the journal", &metrics.journal),
                ("watershed_stream_position", "The last sequence of the stream", &metrics.stream),
                ("watershed_relay_position", "The last position acknowledged to this relay", &metrics.acknowledged),
            ];
            for (name, help, position) in positions {
                if let Some(position) = position.get() {
                    figures.gauge(name, help, &[], position as f64);
                }
            }
            let relay = metrics.relay();
            let is_running = number(relay == RelayState::Running);
            figures.gauge("watershed_relay_running", "1 if this replica runs the relay", &[], is_running);
            let is_failing = number(matches!(relay, RelayState::Failing(_)));
            figures.gauge(
                "watershed_relay_failing",
                "1 if this replica's relay has failed and not yet run again",
                &[],
                is_failing,
            );
        });
        let metrics = Arc::clone(self);
        monitor.add_data(move |data| {
            let [count, commands, last, largest] =
                [&metrics.batches, &metrics.commands, &metrics.last_batch, &metrics.largest_batch].map(load);
            let batches = json!({ "count": count, "commands": commands, "last": last, "largest": largest });
            data.insert("batches".into(), batches);
            data.insert("known_aggregates".into(), metrics.known_aggregates.load(Relaxed).into());
            data.insert("relay".into(), (metrics.relay() == RelayState::Running).into());
            data.insert("journal".into(), json!({ "position": metrics.journal.json() }));
            data.insert("stream".into(), json!({ "position": metrics.stream.json() }));
        });
        let metrics = Arc::clone(self);
        monitor.add_check(move || match metrics.relay() {
            RelayState::Failing(reason) => vec![Problem::other(format!("the relay publishes no events: {reason}"))],
            RelayState::Standby | RelayState::Running => vec![],
        });
    }

    /// Counts a batch that was run.
    pub fn batch(&self, commands: usize, elapsed: Duration) {
        self.batch_commands.observe(commands as f64);
        self.batch_duration.observe(elapsed.as_secs_f64());
        let commands = commands as u64;
        self.batches.fetch_add(1, Relaxed);
        self.commands.fetch_add(commands, Relaxed);
        self.last_batch.store(commands, Relaxed);
        self.largest_batch.fetch_max(commands, Relaxed);
    }

    pub fn retry(&self, retry: Retry) {
        self.retries.get_or_create(&[("reason", retry.label())]).inc();
    }

    /// Says that a lane's cache holds more aggregates than before, or fewer.
    pub fn known_aggregates_changed(&self, by: i64) {
        self.known_aggregates.fetch_add(by, Relaxed);
    }

    /// Says that the stream has acknowledged everything up to this position, which is `events` more than before.
    pub fn acknowledged(&self, position: u64, events: u64) {
        self.published.inc_by(events);
        self.acknowledged.set(position);
        self.stream.set(position);
    }

    pub fn relay(&self) -> RelayState {
        self.relay.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_relay(&self, state: RelayState) {
        *self.relay.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

fn load(number: &AtomicU64) -> u64 {
    number.load(Relaxed)
}
