//! Figures that are read from the service's state when somebody asks for the metrics.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::{Server, locked};

/// Adds figures when it is asked.
pub(crate) type FigureSource = Box<dyn Fn(&mut Figures) + Send + Sync>;

/// Gauges and counters that are read from the service's state when somebody asks.
#[derive(Default)]
pub struct Figures(Vec<FigureFamily>);

struct FigureFamily {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    series: Vec<(Vec<(&'static str, String)>, f64)>,
}

impl Figures {
    pub fn gauge(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.add(name, help, MetricType::Gauge, labels, value);
    }

    /// The name ends without `_total`, which is added.
    pub fn counter(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.add(name, help, MetricType::Counter, labels, value);
    }

    /// The figures of a pool of connections.
    pub fn connections(&mut self, server: Server, busy: usize, idle: usize, limit: usize, waiters: usize) {
        let label = ("server", server.label());
        let help = "Open connections of the pool";
        self.gauge("watershed_connections", help, &[label, ("state", "busy")], busy as f64);
        self.gauge("watershed_connections", help, &[label, ("state", "idle")], idle as f64);
        self.gauge("watershed_connections_limit", "Connections that the pool may open", &[label], limit as f64);
        let help = "Tasks that wait for a connection of the pool";
        self.gauge("watershed_connection_waiters", help, &[label], waiters as f64);
    }

    fn add(
        &mut self,
        name: &'static str,
        help: &'static str,
        kind: MetricType,
        labels: &[(&'static str, &str)],
        value: f64,
    ) {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        match self.0.iter_mut().find(|family| family.name == name) {
            Some(family) => family.series.push((labels, value)),
            None => self.0.push(FigureFamily { name, help, kind, series: vec![(labels, value)] }),
        }
    }
}

/// All sources, as one collector of the registry.
pub(crate) struct LiveFigures(pub Arc<Mutex<Vec<FigureSource>>>);

impl fmt::Debug for LiveFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LiveFigures")
    }
}

impl Collector for LiveFigures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut figures = Figures::default();
        for source in &*locked(&self.0) {
            source(&mut figures);
        }
        for FigureFamily { name, help, kind, series } in figures.0 {
            // The registry adds a full stop to the help texts of its metrics.
            let mut family = encoder.encode_descriptor(name, &format!("{help}."), None, kind)?;
            for (labels, value) in series {
                let metric = family.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => {
                        ConstCounter::new(value).encode(metric)?;
                    }
                    _ => ConstGauge::new(value).encode(metric)?,
                }
            }
        }
        Ok(())
    }
}

/// A gauge's value for yes or no.
pub fn number(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

/// Seconds to the millisecond, for people.
pub fn rounded(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}
