//! Load: so many requests in flight for so long, and how long each took.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use futures_util::future::join_all;

/// How long each of some operations took.
#[derive(Default)]
pub struct Latencies {
    nanos: Vec<u64>,
    elapsed: Duration,
}

/// Runs the operation over and over, so many at a time, and measures those that end after the warm-up.
pub async fn in_flight<T>(number: usize, time: Duration, operation: impl AsyncFn() -> T) -> Latencies {
    let start = Instant::now() + time / 3;
    let end = start + time;
    let one = async || {
        let mut nanos = Vec::new();
        loop {
            let began = Instant::now();
            operation().await;
            let ended = Instant::now();
            if ended > end {
                return nanos;
            }
            if ended > start {
                nanos.push(u64::try_from((ended - began).as_nanos()).unwrap_or(u64::MAX));
            }
        }
    };
    let nanos = join_all((0..number).map(|_| one())).await.into_iter().flatten().collect();
    Latencies { nanos, elapsed: time }
}

impl Latencies {
    /// Runs one operation and notes how long it took.
    pub async fn time<T>(&mut self, operation: impl AsyncFnOnce() -> T) -> T {
        let began = Instant::now();
        let value = operation().await;
        let took = began.elapsed();
        self.nanos.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        self.elapsed += took;
        value
    }

    /// Operations each second.
    pub fn rate(&self) -> f64 {
        self.nanos.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// In milliseconds.
    pub fn quantile(&self, quantile: f64) -> f64 {
        let mut nanos = self.nanos.clone();
        nanos.sort_unstable();
        let place = (nanos.len() as f64 * quantile) as usize;
        nanos.get(place.min(nanos.len().saturating_sub(1))).map_or(f64::NAN, |nanos| *nanos as f64 / 1e6)
    }
}

/// A number below the bound. Marsaglia's xorshift, 64 bits: load must not wait for randomness.
pub fn random(bound: usize) -> usize {
    thread_local!(static STATE: Cell<u64> = const { Cell::new(0x9e37_79b9_7f4a_7c15) });
    STATE.with(|state| {
        let mut x = state.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        state.set(x);
        (x % bound as u64) as usize
    })
}
