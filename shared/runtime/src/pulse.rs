//! Whether the loops of a service turn.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// The value of `busy_since` while the loop waits for something to do.
const IDLE: u64 = u64::MAX;

/// Tells whether a loop turns. A loop that waits for something to do is healthy however long it waits.
#[derive(Clone, Debug)]
pub struct Pulse {
    name: &'static str,
    bound: Duration,
    started: Instant,
    /// Milliseconds from `started` to the last beat, or [`IDLE`].
    busy_since: Arc<AtomicU64>,
}

impl Pulse {
    pub(crate) fn new(name: &'static str, bound: Duration) -> Self {
        Self { name, bound, started: Instant::now(), busy_since: Arc::new(AtomicU64::new(IDLE)) }
    }

    /// Says that the loop goes on with its work.
    pub fn beat(&self) {
        self.busy_since.store(self.elapsed_millis(), Relaxed);
    }

    /// Says that the loop waits for something to do, until the next beat.
    pub fn rest(&self) {
        self.busy_since.store(IDLE, Relaxed);
    }

    /// Says that the loop is at work until the guard is dropped.
    pub fn work(&self) -> Working {
        self.beat();
        Working(self.clone())
    }

    fn elapsed_millis(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
    }

    /// Says that the loop hangs, if it does.
    pub(crate) fn hung(&self) -> Option<String> {
        let busy_since = Some(self.busy_since.load(Relaxed)).filter(|since| *since != IDLE)?;
        let silent = Duration::from_millis(self.elapsed_millis().saturating_sub(busy_since));
        (silent > self.bound).then(|| format!("{} has hung for {} s", self.name, silent.as_secs()))
    }
}

/// A loop at work.
pub struct Working(Pulse);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.rest();
    }
}
