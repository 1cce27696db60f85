//! What the query service counts.

use std::sync::Arc;

use runtime::{Histogram, Monitor};

/// Upper bounds of the buckets of how many lookups share a find.
const LOOKUPS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

pub struct Metrics {
    /// How many lookups shared one find.
    pub find_lookups: Histogram,
    /// How long queries waited for their view to reach `Min-Position`.
    pub min_position_wait: Histogram,
    pub read_duration: Histogram,
}

impl Metrics {
    pub fn new(monitor: &Monitor) -> Arc<Self> {
        let find_lookups = Histogram::new(LOOKUPS);
        monitor.register("watershed_find_lookups", "Lookups that shared one find", find_lookups.clone());
        let help = "How long queries waited for their view to reach Min-Position, of those that had to";
        Arc::new(Self {
            find_lookups,
            min_position_wait: monitor.duration("watershed_min_position_wait_seconds", help),
            read_duration: monitor.duration("watershed_read_duration_seconds", "Time of a read from MongoDB"),
        })
    }
}
