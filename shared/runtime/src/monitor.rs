//! What a replica shows of itself: figures and problems in the `data` of `$SRV.STATS`, metrics, health and readiness.
//! The parts of a service add to its monitor what they know; [`crate::micro`] and [`crate::http`] show it.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, histogram::Histogram, info::Info},
    registry::{Metric, Registry},
};
use serde_json::{Map, Value, json};
use wire::Code;

use crate::{
    Pulse, ReplicaConfig, ServerStatus, Tracer,
    figures::{FigureSource, Figures, LiveFigures, number, rounded},
    locked,
    nats::NatsConfig,
    process,
};

/// Upper bounds of the buckets of durations, in seconds.
const DURATIONS: [f64; 14] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// The revision that the program was built from.
pub(crate) const REVISION: &str = match option_env!("WATERSHED_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// What one replica shows of itself. Clones share it.
#[derive(Clone)]
pub struct Monitor(Arc<Shared>);

struct Shared {
    service: &'static str,
    replica: String,
    stream: String,
    prefix: String,
    tracer: Tracer,
    registry: Mutex<Registry>,
    requests: Family<RequestLabels, Counter>,
    durations: Family<EndpointLabels, Histogram, fn() -> Histogram>,
    servers: Mutex<Vec<ServerStatus>>,
    pulses: Mutex<Vec<Pulse>>,
    checks: Mutex<Vec<Check>>,
    data: Mutex<Vec<DataSource>>,
    figures: Arc<Mutex<Vec<FigureSource>>>,
    is_serving: AtomicBool,
}

/// The one label of a family of metrics, such as `view`.
pub type Label = [(&'static str, &'static str); 1];

type Check = Box<dyn Fn() -> Vec<Problem> + Send + Sync>;
type DataSource = Box<dyn Fn(&mut Map<String, Value>) + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: String,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointLabels {
    endpoint: String,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// A sentence without a full stop.
    pub text: String,
    /// Whether the replica cannot do its work meanwhile.
    pub is_blocking: bool,
}

impl Problem {
    /// A problem that keeps the replica from its work.
    pub fn blocking(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_blocking: true }
    }

    /// A problem beside which the replica works on.
    pub fn other(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_blocking: false }
    }
}

impl Monitor {
    /// `service` is `command`, `projection` or `query`.
    pub fn new(service: &'static str, replica: &ReplicaConfig, nats: &NatsConfig) -> Self {
        let name = replica.name();
        let tracer = Tracer::new(replica.otlp_endpoint.as_deref(), service, &name);
        let figures: Arc<Mutex<Vec<FigureSource>>> = Arc::default();
        let (requests, durations) = (Family::default(), Family::new_with_constructor(duration_histogram as fn() -> _));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(LiveFigures(Arc::clone(&figures))));
        registry.register("watershed_requests", "Requests by endpoint and outcome: ok, or the failure's code", {
            Family::clone(&requests)
        });
        registry.register("watershed_request_duration_seconds", "Time from receiving a request to its reply", {
            Family::clone(&durations)
        });
        let build = [("service", service), ("version", env!("CARGO_PKG_VERSION")), ("revision", REVISION)];
        registry.register("watershed_build", "What this program was built from", Info::new(Vec::from(build)));
        let monitor = Self(Arc::new(Shared {
            service,
            replica: name,
            stream: nats.stream.clone(),
            prefix: nats.subject_prefix.as_ref().map(ToString::to_string).unwrap_or_default(),
            tracer,
            registry: Mutex::new(registry),
            requests,
            durations,
            servers: Mutex::default(),
            pulses: Mutex::default(),
            checks: Mutex::default(),
            data: Mutex::default(),
            figures,
            is_serving: AtomicBool::new(false),
        }));
        let shared = Arc::downgrade(&monitor.0);
        monitor.add_figures(move |figures| {
            let Some(shared) = shared.upgrade() else { return };
            shared.figures(figures);
        });
        monitor.add_figures(process::figures);
        monitor
    }

    pub fn service(&self) -> &'static str {
        self.0.service
    }

    pub fn replica(&self) -> &str {
        &self.0.replica
    }

    pub fn tracer(&self) -> &Tracer {
        &self.0.tracer
    }

    /// The metadata in the replies to `$SRV`, by which a reader tells installations on one NATS server apart.
    pub fn metadata(&self) -> Value {
        let Shared { replica, stream, prefix, .. } = &*self.0;
        json!({ "replica": replica, "revision": REVISION, "stream": stream, "prefix": prefix })
    }

    /// Registers a counter or a histogram. The name of a counter ends without `_total`, which is added.
    pub fn register(&self, name: &str, help: &str, metric: impl Metric) {
        locked(&self.0.registry).register(name, help, metric);
    }

    /// A new histogram of durations in seconds.
    pub fn duration(&self, name: &str, help: &str) -> Histogram {
        let histogram = duration_histogram();
        self.register(name, help, histogram.clone());
        histogram
    }

    /// A new histogram of durations in seconds for each view.
    pub fn durations_by_view(&self, name: &str, help: &str) -> Family<Label, Histogram, fn() -> Histogram> {
        let family = Family::new_with_constructor(duration_histogram as fn() -> _);
        self.register(name, help, Family::clone(&family));
        family
    }

    /// Adds gauges that are read when somebody asks for them.
    pub fn add_figures(&self, source: impl Fn(&mut Figures) + Send + Sync + 'static) {
        locked(&self.0.figures).push(Box::new(source));
    }

    /// Adds fields to the `data` of `$SRV.STATS`.
    pub fn add_data(&self, source: impl Fn(&mut Map<String, Value>) + Send + Sync + 'static) {
        locked(&self.0.data).push(Box::new(source));
    }

    /// Adds a server without which the replica is not ready.
    pub fn add_server(&self, status: ServerStatus) {
        locked(&self.0.servers).push(status);
    }

    /// Adds a source of problems, which is asked each time.
    pub fn add_check(&self, check: impl Fn() -> Vec<Problem> + Send + Sync + 'static) {
        locked(&self.0.checks).push(Box::new(check));
    }

    /// The pulse of a loop, which counts as hung once it has been at work for longer than `bound` without a beat.
    pub fn pulse(&self, name: &'static str, bound: Duration) -> Pulse {
        let pulse = Pulse::new(name, bound);
        locked(&self.0.pulses).push(pulse.clone());
        pulse
    }

    /// Says whether the replica takes requests.
    pub fn set_serving(&self, is_serving: bool) {
        self.0.is_serving.store(is_serving, Relaxed);
    }

    /// Everything that this replica finds wrong.
    pub fn problems(&self) -> Vec<Problem> {
        self.0.problems()
    }

    /// The loops that hang, each in a sentence.
    pub fn hung(&self) -> Vec<String> {
        self.0.hung()
    }

    /// Whether the replica can do its work.
    pub fn is_ready(&self) -> bool {
        self.0.is_ready()
    }

    /// The `data` of `$SRV.STATS`.
    pub fn data(&self) -> Value {
        let mut data = Map::new();
        let problems = self.problems();
        data.insert("ready".to_owned(), self.0.is_ready_with(&problems).into());
        data.insert("problems".to_owned(), problems.into_iter().map(|problem| problem.text).collect());
        let server = |status: &ServerStatus| {
            let away = rounded(status.away().as_secs_f64());
            let state = json!({ "up": status.is_up(), "losses": status.losses(), "away_seconds": away });
            (status.server.label().to_owned(), state)
        };
        let servers = locked(&self.0.servers).iter().map(server).collect();
        data.insert("servers".to_owned(), Value::Object(servers));
        for source in &*locked(&self.0.data) {
            source(&mut data);
        }
        Value::Object(data)
    }

    /// All metrics as OpenMetrics text.
    ///
    /// # Errors
    /// Never: writing to a string cannot fail.
    pub fn metrics(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &locked(&self.0.registry))?;
        Ok(text)
    }

    pub(crate) fn endpoint_metrics(&self, endpoint: &str) -> EndpointMetrics {
        let Shared { requests, durations, .. } = &*self.0;
        let requests_with =
            |code: &str| requests.get_or_create_owned(&RequestLabels { endpoint: endpoint.into(), code: code.into() });
        // A series that begins with its first failure would hide that one from whoever looks at increases.
        for code in [Code::Internal, Code::Overloaded, Code::Unavailable] {
            requests_with(code.as_str());
        }
        EndpointMetrics {
            endpoint: endpoint.to_owned(),
            accepted: requests_with("ok"),
            requests: requests.clone(),
            duration: durations.get_or_create_owned(&EndpointLabels { endpoint: endpoint.into() }),
        }
    }
}

impl Shared {
    fn problems(&self) -> Vec<Problem> {
        let down = |status: &ServerStatus| {
            let down_for = status.down_for()?;
            Some(Problem::blocking(format!("{} has not answered for {} s", status.server, down_for.as_secs())))
        };
        let mut problems: Vec<Problem> = locked(&self.servers).iter().filter_map(down).collect();
        problems.extend(self.hung().into_iter().map(Problem::blocking));
        for check in &*locked(&self.checks) {
            problems.extend(check());
        }
        problems
    }

    fn hung(&self) -> Vec<String> {
        locked(&self.pulses).iter().filter_map(Pulse::hung).collect()
    }

    fn is_ready(&self) -> bool {
        self.is_ready_with(&self.problems())
    }

    fn is_ready_with(&self, problems: &[Problem]) -> bool {
        self.is_serving.load(Relaxed) && !problems.iter().any(|problem| problem.is_blocking)
    }

    fn figures(&self, figures: &mut Figures) {
        figures.gauge("watershed_ready", "1 if the replica can do its work", &[], number(self.is_ready()));
        for status in &*locked(&self.servers) {
            let labels = [("server", status.server.label())];
            figures.gauge("watershed_server_up", "1 if the server answers", &labels, number(status.is_up()));
            figures.counter(
                "watershed_server_losses",
                "How often the server was lost",
                &labels,
                status.losses() as f64,
            );
            let away = status.away().as_secs_f64();
            figures.counter("watershed_server_away_seconds", "How long the server was away", &labels, away);
        }
    }
}

/// The metrics of one endpoint.
pub(crate) struct EndpointMetrics {
    endpoint: String,
    accepted: Counter,
    requests: Family<RequestLabels, Counter>,
    duration: Histogram,
}

impl EndpointMetrics {
    pub fn count(&self, elapsed: Duration, code: Option<&str>) {
        self.duration.observe(elapsed.as_secs_f64());
        match code {
            None => self.accepted.inc(),
            Some(code) => {
                let labels = RequestLabels { endpoint: self.endpoint.clone(), code: code.to_owned() };
                self.requests.get_or_create(&labels).inc()
            }
        };
    }
}

fn duration_histogram() -> Histogram {
    Histogram::new(DURATIONS)
}
